"""Check a task with a model: its prompts as the model reads them, what does not fit, and what answers cost."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from tercet.data.fewshot import ShotSelector
from tercet.data.prompt_tokens import PromptEnding, conversation_text, conversation_tokens
from tercet.errors import UserError
from tercet.evaluate.answer import Answerer, as_shots
from tercet.evaluate.choices import SHOT_SHARE
from tercet.evaluate.language_model import Prompt
from tercet.evaluate.measure import BATCH
from tercet.evaluate.task import Example, Task
from tercet.finetune.estimate import estimate
from tercet.finetune.settings import Method
from tercet.ladder.check_labels import token_clashes
from tercet.ladder.rungs.prompting import FIRST_COUNT, METHODS
from tercet.ladder.rungs.tuning import BATCH as SIZE
from tercet.ladder.rungs.tuning import local_start, training_rows
from tercet.model.tokenizer import Tokenizer
from tercet.progress import say
from tercet.prompt.llm import LLM
from tercet.train.calibrate import use_all_cores

MEASURED_SECONDS = 1.0  # of answering, for each prompting rung
LENGTHS = 1000  # test examples whose prompts are counted
TRAINING_SAMPLE = 300  # training examples whose tokens are counted, for the number of an epoch
BYTES_PER_TOKEN = 4  # about, in most languages; a hosted model does not count tokens before it is asked


@dataclass(frozen=True)
class PromptShown:
    """An input as the model reads it.

    Attributes:
        title: which example, and of which rung.
        text: the whole prompt.
        target: the right answer.
        tokens: of the prompt; None for a hosted model, or without a model.
        shortened: whether the input's middle was cut out to fit the context.
    """

    title: str
    text: str
    target: str
    tokens: int | None = None
    shortened: bool = False


@dataclass(frozen=True)
class PromptingCost:
    """What the answers of a prompting rung to the test split cost.

    Attributes:
        rung: its name.
        answers: number of test examples.
        seconds: of all answers, by the speed of some dev examples; None for a hosted model.
        tokens_per_second: of whole prompts, beginnings that they share included; None for a hosted model.
        dollars: of all answers, about; None without a price.
    """

    rung: str
    answers: int
    seconds: float | None = None
    tokens_per_second: float | None = None
    dollars: float | None = None


@dataclass
class ModelCheck:
    """What `check_task` finds with a model.

    Attributes:
        model: the reference.
        answers_by: how the model answers.
        context: tokens of prompt and answer together; None if unknown.
        longest: tokens of the longest test prompt of the zero-shot rung, before it is shortened.
        shortened: test examples that are shortened, by rung.
        counted: test examples whose prompts were counted.
        shots: solved examples that the task asks for.
        shots_that_fit: how many of them fit, with room for the input; None if the context is unknown.
        shots_shown: shots of the few-shot prompt that is shown and measured, the number that its rung begins with.
        prompting: the cost of the answers of each prompting rung.
        tokens_per_epoch: tokens of the training examples, about, as the tuning rungs read them.
        minutes_per_epoch: of training, by method, at the speed of some measured steps, evaluations included.
        not_tunable: why the model cannot be tuned here; None if it can.
        same_but_last: pairs of labels that differ only in their last token.
        warnings: in sentences.
    """

    model: str
    answers_by: str
    context: int | None
    shots: int
    longest: int | None = None
    shortened: dict[str, int] = field(default_factory=dict)
    counted: int = 0
    shots_that_fit: int | None = None
    shots_shown: int = 0
    prompting: list[PromptingCost] = field(default_factory=list)
    tokens_per_epoch: int | None = None
    minutes_per_epoch: dict[str, float] = field(default_factory=dict)
    not_tunable: str | None = None
    same_but_last: list[tuple[str, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def check_model(task: Task, llm: LLM) -> tuple[ModelCheck, list[PromptShown]]:
    """Return what a task is like for a model, and three of its prompts."""
    zero = _answerer(task, llm)
    shots = min(task.few_shot, len(task.train))
    check = ModelCheck(
        model=llm.name,
        answers_by="label scores" if zero.scores_labels else "generation",
        context=llm.context_length,
        shots=shots,
    )
    order = sorted(task.test, key=lambda example: (len(task.render(example.fields)), example.id))
    middle, longest = order[len(order) // 2], order[-1]
    train = task.train
    if zero.room is not None:
        shots, train = _fitting_shots(task, llm, shots, zero.room)
        check.shots_that_fit = shots
    shown = min(shots, FIRST_COUNT) if llm.is_local else shots
    rungs = {"zero-shot": zero} | ({"few-shot": _answerer(task, llm, shown, train)} if shown else {})
    if llm.is_local:
        longest = _count_lengths(check, task, rungs)
        _count_training(check, task, llm)
        check.same_but_last = _same_but_last(task, llm)
    else:
        check.not_tunable = f"{llm.name} is a hosted model, so its weights cannot be tuned here"
    prompts = [_shown(zero, middle, "zero-shot, an example of median length")]
    if shown:
        check.shots_shown = shown
        title = f"few-shot, the same example with {shown} {'shot' if shown == 1 else 'shots'}"
        prompts.append(_shown(rungs["few-shot"], middle, title))
    prompts.append(_shown(zero, longest, "zero-shot, the longest example"))
    check.warnings = _warnings(check)
    for rung, answerer in rungs.items():
        try:
            check.prompting.append(_cost(rung, answerer, task))
        except UserError as problem:  # an example that cannot be shortened enough
            check.warnings.append(f"The rung {rung} will fail: {problem}.")
    return check, prompts


def _answerer(task: Task, llm: LLM, shots: int = 0, train: Sequence[Example] = ()) -> Answerer:
    """Return what answers after a number of solved examples of ``train``.

    It is the first of the ways to prompt that the rung compares on dev.
    """
    if not shots:
        return Answerer(llm, task)
    method, seed = METHODS[0]
    return Answerer(llm, task, shots=ShotSelector(as_shots(task, train), shots, task.labels, seed, method))


def _prompt(answerer: Answerer, example: Example) -> Prompt:
    """Return what the model would read for an example if everything fitted."""
    task = answerer.task
    return answerer.prompt(task.render(example.fields), task.input_text(example.fields))


def _tokens(answerer: Answerer, example: Example) -> int:
    return answerer.llm.count_tokens(_prompt(answerer, example))


def _shown(answerer: Answerer, example: Example, title: str) -> PromptShown:
    try:
        [prompt], [shortened] = answerer.prompts([example])
    except UserError:  # nothing of the input fits: show what is too long
        prompt, shortened = _prompt(answerer, example), False
    tokens = answerer.llm.count_tokens(prompt) if answerer.llm.is_local else None
    return PromptShown(title, _as_text(prompt, answerer.llm.tokenizer), example.target, tokens, shortened)


def _as_text(prompt: Prompt, tokenizer: Tokenizer | None) -> str:
    """Return a prompt after the chat template; the messages as they are sent to a hosted model."""
    if isinstance(prompt, str):
        return prompt
    if tokenizer is None:
        return "\n\n".join(f"[{message['role']}]\n{message['content']}" for message in prompt)
    return str(conversation_text(tokenizer, prompt))


def _fitting_shots(task: Task, llm: LLM, shots: int, room: int) -> tuple[int, list[Example]]:
    """Return how many shots fit, and the training examples that are short enough to be among so many.

    As in the few-shot rung, shots use a share of the prompt's room, and several of them fit if a quarter of the
    training examples is short enough for that.
    """
    sample = _spread(task.train, LENGTHS)
    lengths = [llm.count_tokens(f"{task.render(example.fields)} {example.target}\n\n") for example in sample]
    for number in range(shots, 0, -1):
        limit = SHOT_SHARE * room / number
        short = [example for example, length in zip(sample, lengths, strict=True) if length <= limit]
        if len(short) >= (max(number, len(sample) / 4) if number > 1 else 1):
            return number, task.train if len(short) == len(sample) else short
    return 0, []


def _count_lengths(check: ModelCheck, task: Task, rungs: dict[str, Answerer]) -> Example:
    """Count the test prompts that are longer than the model's context takes; return the longest example."""
    examples = _spread(task.test, LENGTHS)
    check.counted = len(examples)
    longest = examples[0]
    for rung, answerer in rungs.items():
        lengths = [_tokens(answerer, example) for example in examples]
        check.shortened[rung] = sum(
            answerer.room is not None and length > answerer.room for length in lengths
        )
        if rung == "zero-shot":
            check.longest = max(lengths)
            longest = examples[lengths.index(check.longest)]
    return longest


def _same_but_last(task: Task, llm: LLM) -> list[tuple[str, str]]:
    if task.labels is None or llm.tokenizer is None:
        return []
    space = "" if llm.has_chat_template else " "  # what stands before an answer
    return token_clashes(
        [(label, llm.tokenizer.encode(space + label, special=False)) for label in task.labels]
    )


def _count_training(check: ModelCheck, task: Task, llm: LLM) -> None:
    """Count the tokens of an epoch on a sample of the training examples, and time some steps of training."""
    tokenizer, context = llm.tokenizer, llm.context_length
    sample = _spread(task.train, TRAINING_SAMPLE)
    try:
        start = local_start(llm)
        if tokenizer is None or context is None:
            return
        rows = training_rows(task, sample, tokenizer, context)
    except UserError as problem:
        check.not_tunable = str(problem)
        return
    whole = PromptEnding(add_generation_prompt=False)
    count = sum(
        len(conversation_tokens(tokenizer, row["messages"], ending=whole))
        if "messages" in row
        else len(tokenizer.encode(row["prompt"] + row["completion"]))
        for row in rows
    )
    check.tokens_per_epoch = round(count * len(task.train) / len(sample))
    methods: tuple[Method, ...] = ("lora", "full")
    for method in methods:
        measured = estimate(start, rows, method, examples=len(task.train))
        check.minutes_per_epoch[method] = round(measured.minutes(1, SIZE), 2)


def _cost(rung: str, answerer: Answerer, task: Task) -> PromptingCost:
    """Measure the speed on dev examples, or estimate the price of a hosted model from bytes."""
    llm, answers = answerer.llm, len(task.test)
    if not llm.is_local:
        price = llm.price if isinstance(llm, LLM) else None
        if price is None:
            return PromptingCost(rung, answers)
        size = sum(
            len(_as_text(_prompt(answerer, example), None).encode("utf-8", "replace"))
            for example in task.test
        )
        written = answers * task.max_tokens  # at most
        dollars = (size / BYTES_PER_TOKEN * price.prompt + written * price.completion) / 1e6
        return PromptingCost(rung, answers, dollars=dollars)
    say(f"measuring {rung} on a few dev examples")
    use_all_cores()
    warm_up, examples = _typical(task)
    answerer.answer([warm_up])  # loads, compiles and reads the beginning that all prompts share
    start, size = 0, 1
    while True:
        part = examples[start : start + size]
        begun = time.perf_counter()
        read = sum(answer.prompt_tokens for answer in answerer.answer(part))
        seconds = time.perf_counter() - begun
        start += len(part)
        if seconds > MEASURED_SECONDS or start >= len(examples):
            break
        # Larger batches are faster for an example, up to the size with which a rung is measured.
        size = min(BATCH, int(2 * MEASURED_SECONDS * len(part) / seconds) + 1)
    return PromptingCost(rung, answers, answers * seconds / len(part), read / seconds)


def _typical(task: Task) -> tuple[Example, list[Example]]:
    """Return a short dev example to warm up with, and the others, those of the mean test length first."""
    lengths = {example.id: len(task.render(example.fields)) for example in task.dev}
    mean = sum(len(task.render(example.fields)) for example in task.test) / len(task.test)
    order = sorted(task.dev, key=lambda example: (abs(lengths[example.id] - mean), example.id))
    short = min(order, key=lambda example: lengths[example.id])
    return short, [example for example in order if example is not short] or [short]


def _warnings(check: ModelCheck) -> list[str]:
    warnings = []
    if check.shots_that_fit is not None and check.shots_that_fit < check.shots:
        warnings.append(
            f"{check.shots_that_fit} of {check.shots} shots fit the context of {check.context:,} tokens."
        )
    cut = check.shortened.get("zero-shot", 0)
    if cut:
        warnings.append(
            f"{cut:,} of {check.counted:,} test inputs do not fit the context of {check.context:,} tokens: their "
            f"middle is cut out (the longest has {check.longest:,} tokens)."
        )
    elif few := check.shortened.get("few-shot", 0):
        warnings.append(
            f"{few:,} of {check.counted:,} test inputs do not fit the context after the shots: their middle is cut out."
        )
    return warnings


def _spread(examples: Sequence[Example], count: int) -> list[Example]:
    """Return ``count`` examples at equal distances, or all if there are no more."""
    if len(examples) <= count:
        return list(examples)
    return [examples[index * len(examples) // count] for index in range(count)]
