"""The zero-shot rung of a climb beside ten wordings made by hand, and the seconds of scoring labels.

    python benchmarks/prompting.py TASK ... --model REF [--limit 300] [--tokens 150000]

Each wording by hand is scored on the test examples as people do it: the label with the highest log-probability,
its end included, without any correction. The rung chooses its wording and calibration on dev, within the tokens
of `--tokens`, and answers the same test examples once. The best of the ten is chosen on test, which favours it.

The last row times 14 labels after four fixed shots, all test examples: by `LLM.choose`, which computes every label,
and by `LLM.best_choice`, in turn, three times.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from tercet import LLM, Task
from tercet.data.fewshot import ShotSelector
from tercet.evaluate.answer import Answerer, as_shots
from tercet.evaluate.task import Example
from tercet.evaluate.wording import Wording
from tercet.ladder.rungs.prompting import FewShot, ZeroShot
from tercet.ladder.rungs.racing import dev_score
from tercet.ladder.rungs.rung import Setting


def by_hand(task: Task, example: Example) -> dict[str, str | list[dict[str, str]]]:
    """Return ten prompts for one example: conversations and texts, with and without the labels."""
    labels = task.labels or []
    listed, text = ", ".join(labels), task.render(example.fields)
    own = task.input_text(example.fields)
    bullets = "\n".join(f"- {label}" for label in labels)

    def chat(system: str, user: str) -> list[dict[str, str]]:
        messages = [{"role": "system", "content": system}] if system else []
        return [*messages, {"role": "user", "content": user}]

    return {
        "the task's prompt": chat("", text),
        "labels in the system message": chat(f"Answer with one of: {listed}.", text),
        "labels before the input": chat("", f"Choose one of: {listed}.\n\n{text}"),
        "labels after the input": chat("", f"{text}\nChoose one of: {listed}."),
        "labels as bullets": chat(f"Labels:\n{bullets}\nReply with the label alone.", text),
        "a classifier": chat("You are a text classifier.", f"Text: {own}\nLabels: {listed}\nLabel:"),
        "a question": chat("", f'Which of {listed} fits this text best?\n"{own}"'),
        "text: the task's prompt": text,
        "text: labels first": f"Labels: {listed}.\n\n{text}",
        "text: a classifier": f"Text: {own}\nLabels: {listed}\nLabel:",
    }


def hand_scores(llm: LLM, task: Task, examples: list[Example]) -> dict[str, float]:
    prompts = [by_hand(task, example) for example in examples]
    scores = {}
    for name in prompts[0]:
        form = Wording("text" if name.startswith("text:") else "conversation")
        answerer = Answerer(llm, task, wording=form)
        values = answerer._label_scores([row[name] for row in prompts])
        answers = [(task.labels or [])[index] for index in values.argmax(axis=1)]
        scores[name] = 100 * dev_score(task, examples, answers)
    return scores


def rung_score(rung: ZeroShot, task: Task, examples: list[Example], tokens: int) -> float:
    with tempfile.TemporaryDirectory() as directory:
        rung.fit(Setting(task, Path(directory), tokens=tokens))
    return 100 * dev_score(task, examples, [answer.text for answer in rung.predict(examples)])


def label_seconds(llm: LLM, task: Task, examples: list[Example]) -> dict[str, float]:
    shots = ShotSelector(as_shots(task, task.train), 4, task.labels)
    answerer = Answerer(llm, task, shots=shots)
    prompts, choices = answerer._choices(answerer.prompts(examples)[0])
    times: dict[str, list[float]] = {"choose": [], "best_choice": []}
    for _ in range(3):
        start = time.monotonic()
        scores = llm.choose(prompts, choices)
        times["choose"].append(time.monotonic() - start)
        start = time.monotonic()
        best = llm.best_choice(prompts, choices)
        times["best_choice"].append(time.monotonic() - start)
        assert best == np.argmax(scores, axis=1).tolist()
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tasks", nargs="+")
    parser.add_argument("--model", default="builtin:smollm2")
    parser.add_argument("--limit", type=int, default=300, help="test examples; 0: all")
    parser.add_argument("--tokens", type=int, default=150_000, help="tokens of the rungs' choices on dev")
    parser.add_argument("--rows", default="hand,zero-shot,few-shot,seconds")
    arguments = parser.parse_args()
    rows, llm = arguments.rows.split(","), LLM(arguments.model)
    for reference in arguments.tasks:
        task = Task.load(reference)
        examples = task.test[: arguments.limit or None]
        result: dict[str, object] = {"task": task.name, "test examples": len(examples)}
        if "hand" in rows:
            result["by hand"] = {
                name: round(score, 1) for name, score in hand_scores(llm, task, examples).items()
            }
        for name, rung in (("zero-shot", ZeroShot(lambda: llm)), ("few-shot", FewShot(lambda: llm))):
            if name in rows:
                result[name] = round(rung_score(rung, task, examples, arguments.tokens), 1)
                result[f"{name} chose"] = {
                    key: value for key, value in rung.details.items() if key != "chosen on dev"
                }
        if "seconds" in rows and task.labels is not None:
            result["seconds"] = {
                name: round(value, 2) for name, value in label_seconds(llm, task, examples).items()
            }
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
