"""Rungs that use a model without changing it: zero-shot and few-shot."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tercet.data.fewshot import Method, Order, ShotSelector
from tercet.errors import UserError
from tercet.evaluate.answer import Answer, Answerer
from tercet.evaluate.calibration import Calibration
from tercet.evaluate.choices import PromptChoices, ShotPool
from tercet.evaluate.task import Example
from tercet.evaluate.wording import Wording, default_wording, wordings
from tercet.ladder.result import Level
from tercet.ladder.rungs.racing import Contender, race
from tercet.ladder.rungs.rung import Setting
from tercet.prompt.llm import LLM

EMBEDDED_SHARE = 0.2  # of a rung's tokens that vectors of the training examples may take
FIRST_COUNT = 4  # shots in the race of methods
# The most promising first: with little time the last ones do not run. Two random choices, since the choice of
# examples and their order have a large effect (Lu et al. 2022, arXiv:2104.08786).
METHODS: tuple[tuple[Method, int], ...] = (
    ("characters", 0), ("bm25", 0), ("embedding", 0), ("balanced", 0), ("diverse", 0), ("balanced", 1),
)  # fmt: skip


class ZeroShot:
    """The model with the task's prompt, in the wording and with the calibration that score best on dev.

    Args:
        model: returns the model when it is needed.
    """

    name = "zero-shot"
    level: Level = "prompt"

    def __init__(self, model: Callable[[], LLM]) -> None:
        self._model = model
        self.details: dict[str, Any] = {}

    def fit(self, setting: Setting) -> None:
        """Load the model and choose the wording."""
        llm, task = self._model(), setting.task
        contenders = [
            Contender(str(wording), Answerer(llm, task, wording=wording)) for wording in wordings(llm, task)
        ]
        self._finish(setting, *self._race(contenders, setting, 1.0))

    def predict(self, examples: Sequence[Example]) -> list[Answer]:
        """Return one answer for each example."""
        return self.answerer.answer(examples)

    def size_bytes(self) -> int | None:
        """Return the size of the model's files; None for a hosted model."""
        return self.answerer.size_bytes()

    def _race(
        self, contenders: list[Contender], setting: Setting, share: float
    ) -> tuple[Contender, list[dict[str, Any]]]:
        """Race on dev with a share of the rung's tokens. A hosted model does not race: its tokens cost money."""
        tokens = share * setting.tokens if contenders[0].answerer.llm.is_local else 0
        return race(contenders, _shuffled(setting.task.dev, setting.seed), tokens)

    def _finish(
        self, setting: Setting, winner: Contender, rows: list[dict[str, Any]], **details: Any
    ) -> None:
        """Answer in the winner's way from now on, describe it, and store it for `evaluate`."""
        answerer = winner.answerer
        calibration: Calibration = "none"
        offsets = None
        if winner.seen:
            _, calibration, offsets = winner.calibrated()
        self.answerer = Answerer(
            answerer.llm, answerer.task, shots=answerer.shots, wording=answerer.wording, offsets=offsets
        )
        PromptChoices.of(self.answerer, calibration).save(setting.directory / PromptChoices.FILE)
        method = "labels scored by log-probability" if answerer.scores_labels else "generation"
        self.details = {
            "model": answerer.llm.name, "answers by": method, "wording": str(answerer.wording), **details,
        }  # fmt: skip
        if answerer.scores_labels:
            self.details["calibration"] = calibration
        if rows:
            self.details["chosen on dev"] = rows


class FewShot(ZeroShot):
    """The model with the task's prompt, after solved examples of the training split.

    Dev chooses how the examples are selected, how many there are, their order and the wording, one after another.
    """

    name = "few-shot"

    def fit(self, setting: Setting) -> None:
        """Choose the shots and the wording with the best score on dev."""
        llm, task = self._model(), setting.task
        pool = ShotPool(llm, task)
        most = pool.most(min(task.few_shot, len(task.train)))
        vectors = _Vectors(llm)
        tried = [entry for entry in METHODS if entry[0] != "embedding" or _can_embed(llm, pool, setting)]

        def contender(
            choice: str,
            method: Method,
            count: int,
            wording: Wording,
            seed: int = 0,
            order: Order = "nearest last",
        ) -> Contender:
            shots = pool.short(count)
            selector = ShotSelector(
                shots, min(count, len(shots)), task.labels, setting.seed + seed, method, order, vectors
            )
            return Contender(choice, Answerer(llm, task, shots=selector, wording=wording))

        wording = default_wording(llm, task)
        count = min(FIRST_COUNT, most) if llm.is_local else most
        methods = [
            contender(
                f"{_shots(count)}: {_described(method)}{' (another draw)' if seed else ''}",
                method,
                count,
                wording,
                seed,
            )
            for method, seed in tried
        ]
        winner, rows = self._race(methods, setting, 0.35)
        method, seed = tried[methods.index(winner)]
        fewer_and_more = [
            contender(f"{_shots(other)}: {_described(method)}", method, other, wording, seed)
            for other in _counts(most)
            if other != count
        ]
        winner, more = self._race([winner, *fewer_and_more], setting, 0.35)
        rows += more
        shots = winner.answerer.shots
        assert shots is not None
        others = [
            contender(str(other), method, shots.k, other, seed)
            for other in wordings(llm, task)
            if other != wording and other.labels != "question"
        ]
        if not shots.fixed:
            others.append(
                contender("the nearest shot first", method, shots.k, wording, seed, "nearest first")
            )
        winner, more = self._race([winner, *others], setting, 0.3)
        rows += more
        shots = winner.answerer.shots
        assert shots is not None
        details: dict[str, Any] = {"shots": shots.k, "shots are": _described(method)}
        if not shots.fixed:
            details["order"] = shots.order
        if most < task.few_shot:
            details["note"] = (
                f"at most {most} of the {task.few_shot} shots of the task fit the model's context"
            )
        self._finish(setting, winner, _latest(rows), **details)


def _shots(count: int) -> str:
    return "1 shot" if count == 1 else f"{count} shots"


def _described(method: Method) -> str:
    return {
        "balanced": "drawn at random, balanced over the labels",
        "characters": "nearest by character n-grams",
        "bm25": "nearest by BM25",
        "embedding": "nearest by the model's own vectors",
        "tfidf": "nearest by TF-IDF",
        "diverse": "near and unlike each other",
    }[method]


class _Vectors:
    """The vectors of texts, each computed once: every contender with the method searches the same examples."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self._vectors: dict[str, NDArray[np.float32]] = {}

    def __call__(self, texts: Sequence[str]) -> NDArray[np.float32]:
        missing = [text for text in dict.fromkeys(texts) if text not in self._vectors]
        self._vectors |= dict(zip(missing, self._llm.embed(missing), strict=True))
        return np.array([self._vectors[text] for text in texts])


def _can_embed(llm: LLM, pool: ShotPool, setting: Setting) -> bool:
    """Return whether the training texts take a small part of the tokens and the model gives vectors at all."""
    if not llm.is_local or pool.tokens > EMBEDDED_SHARE * setting.tokens:
        return False
    try:
        llm.embed(["text"])
    except UserError:  # through transformers
        return False
    return True


def _counts(most: int) -> list[int]:
    """Return the numbers of shots to compare: powers of two up to ``most``, and ``most`` itself."""
    counts = [2**power for power in range(most.bit_length()) if 2**power <= most]
    return counts if most in counts else [*counts, most]


def _shuffled(examples: Sequence[Example], seed: int) -> list[Example]:
    """Return examples in random order: a file may be sorted by label."""
    return random.Random(seed).sample(list(examples), len(examples))


def _latest(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows without repetition: a winner runs in the next race too, and its last row counts."""
    latest = {row["choice"]: row for row in rows}
    return list(latest.values())
