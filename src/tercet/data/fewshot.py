"""Few-shot prompts: the selection of training examples and their form in the prompt.

Showing a few solved examples is in-context learning (Brown et al. 2020, arXiv:2005.14165). The caller
passes examples of the train split only.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tercet.data.conversation import Message
from tercet.errors import UserError

Method = Literal["balanced", "similar"]


@dataclass(frozen=True)
class Example:
    """A solved example: the input that the model reads, and the right answer."""

    input: str
    target: str


class ShotSelector:
    """Selects ``k`` shots from ``train``; equal arguments give equal shots.

    ``balanced`` draws at random from each label in turn (from all examples if ``labels`` is None) and
    shows the shots in random order, the same for every query.

    ``similar`` takes the nearest neighbours of each query by TF-IDF of character n-grams, which suit any
    language and any length of text. The nearest comes last, where it has most influence (Liu et al. 2022,
    arXiv:2101.06804).

    Raises:
        UserError: ``k`` is below 1 or above the number of examples, or the method is unknown.
    """

    def __init__(
        self,
        train: Sequence[Example],
        k: int,
        labels: Sequence[str] | None = None,
        seed: int = 0,
        method: Method = "balanced",
    ) -> None:
        if not 1 <= k <= len(train):
            raise UserError(f"{k} shots from {len(train)} train examples; take from 1 to {len(train)}")
        if method not in ("balanced", "similar"):
            raise UserError(f"few-shot method {method!r}; the methods are balanced and similar")
        self.train, self.k, self.method = list(train), k, method
        self._fixed = _balanced(self.train, k, labels, seed) if method == "balanced" else []
        self._vectorizer: Any = None
        self._rows: Any = None
        if method == "similar":
            from sklearn.feature_extraction.text import TfidfVectorizer

            self._vectorizer = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4), sublinear_tf=True)
            # Only an empty text has no character n-grams.
            texts = [example.input or "(empty)" for example in self.train]
            self._rows = self._vectorizer.fit_transform(texts)

    def choose(self, query: str | None = None) -> list[Example]:
        """Return the shots for ``query``.

        Raises:
            UserError: the method is ``similar`` and there is no query.
        """
        if self.method == "balanced":
            return list(self._fixed)
        if query is None:
            raise UserError("similar shots are chosen for a query, which is missing")
        import numpy as np

        similarity = (self._rows @ self._vectorizer.transform([query]).T).toarray()[:, 0]
        nearest = np.argsort(-similarity, kind="stable")[: self.k]
        return [self.train[index] for index in reversed(nearest.tolist())]


def choose(
    train: Sequence[Example],
    k: int,
    labels: Sequence[str] | None = None,
    seed: int = 0,
    method: Method = "balanced",
    query: str | None = None,
) -> list[Example]:
    """Return the shots for a single query; for many queries make a :class:`ShotSelector` once."""
    return ShotSelector(train, k, labels, seed, method).choose(query)


def _balanced(train: list[Example], k: int, labels: Sequence[str] | None, seed: int) -> list[Example]:
    draw = random.Random(seed)
    if labels is None:
        return draw.sample(train, k)
    piles = {
        label: [example for example in train if example.target == label] for label in dict.fromkeys(labels)
    }
    unknown = [example.target for example in train if example.target not in piles]
    if unknown:
        raise UserError(f"train has the label {unknown[0]!r}, which is not among {', '.join(piles)}")
    for pile in piles.values():
        draw.shuffle(pile)
    turns = [pile for pile in piles.values() if pile]
    draw.shuffle(turns)  # with fewer shots than labels, the labels are chosen at random too
    chosen: list[Example] = []
    while len(chosen) < k:
        for pile in turns:
            if pile and len(chosen) < k:
                chosen.append(pile.pop())
    draw.shuffle(chosen)  # models favour the label shown last (Zhao et al. 2021, arXiv:2102.09690)
    return chosen


def separator(prompt: str) -> str:
    """Return the text between a prompt and its answer: a space, unless the prompt ends in white space.

    A continuation to score after :func:`few_shot_text` begins with it.
    """
    return "" if not prompt or prompt[-1].isspace() else " "


def few_shot_text(shots: Sequence[Example], query: str, instruction: str = "") -> str:
    """Return the prompt for a base model: instruction, shots and query, separated by blank lines.

    The query comes last without an answer, so the model's continuation is the answer.
    """
    solved = [shot.input + separator(shot.input) + shot.target for shot in shots]
    return "\n\n".join([*([instruction] if instruction else []), *solved, query])


def few_shot_messages(shots: Sequence[Example], query: str, instruction: str = "") -> list[Message]:
    """Return the conversation for a chat model: each shot is an exchange, the query the last message."""
    messages: list[Message] = [{"role": "system", "content": instruction}] if instruction else []
    for shot in shots:
        messages += [{"role": "user", "content": shot.input}, {"role": "assistant", "content": shot.target}]
    return [*messages, {"role": "user", "content": query}]
