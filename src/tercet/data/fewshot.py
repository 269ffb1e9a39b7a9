"""Few-shot prompts: the selection of training examples and their form in the prompt.

Showing a few solved examples is in-context learning (Brown et al. 2020, arXiv:2005.14165). The caller
passes examples of the train split only.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

from tercet.data.conversation import Message
from tercet.data.retrieval import Embed, EmbeddingRetriever, Retriever
from tercet.data.retrieval import Method as RetrievalMethod
from tercet.errors import UserError

Method = Literal["balanced", "characters", "bm25", "tfidf", "diverse", "embedding"]
METHODS: tuple[Method, ...] = get_args(Method)
Order = Literal["nearest last", "nearest first"]

# Maximal marginal relevance (Carbonell & Goldstein 1998): the weight of the likeness to the query against that to
# the shots that are chosen already, and how many times the shots are candidates.
RELEVANCE, CANDIDATES = 0.5, 4


@dataclass(frozen=True)
class Example:
    """A solved example: the input that the model reads, and the right answer.

    ``text`` is what retrieval compares, without the words that all inputs share; "" means the input.
    """

    input: str
    target: str
    text: str = ""


class ShotSelector:
    """Selects ``k`` shots from ``train``; equal arguments give equal shots.

    ``balanced`` draws at random from each label in turn (from all examples if ``labels`` is None) and
    shows the shots in random order, the same for every query.

    ``characters``, ``bm25`` and ``tfidf`` take the nearest neighbours of each query (see
    `tercet.data.retrieval`), which most tasks gain from (Liu et al. 2022, arXiv:2101.06804). ``diverse`` takes
    near ones that are unlike each other (maximal marginal relevance, Carbonell & Goldstein 1998) by characters.
    ``embedding`` takes the nearest by vectors of the texts.

    Args:
        train: examples of the train split.
        k: shots in a prompt.
        labels: of a closed task, for ``balanced``.
        seed: of the random choice.
        method: how shots are chosen.
        order: where the nearest stands. Last, beside the query, it has most influence.
        embed: returns vectors of texts, for ``embedding``.

    Raises:
        UserError: ``k`` is below 1 or above the number of examples, the method is unknown, or ``embedding`` is used
            without ``embed``.
    """

    def __init__(
        self,
        train: Sequence[Example],
        k: int,
        labels: Sequence[str] | None = None,
        seed: int = 0,
        method: Method = "balanced",
        order: Order = "nearest last",
        embed: Embed | None = None,
    ) -> None:
        if not 1 <= k <= len(train):
            raise UserError(f"{k} shots from {len(train)} train examples; take from 1 to {len(train)}")
        if method not in METHODS:
            raise UserError(f"few-shot method {method!r}; the methods are {', '.join(METHODS)}")
        self.train, self.k, self.method, self.order = list(train), k, method, order
        self.seed = seed
        self._fixed: list[Example] = []
        if method == "balanced":
            self._fixed = _balanced(self.train, k, labels, seed)
            return
        texts = tuple(example.text or example.input for example in self.train)
        self._retriever: Retriever | EmbeddingRetriever
        if method == "embedding":
            if embed is None:
                raise UserError("few-shot method embedding needs `embed`, which returns vectors of texts")
            self._retriever = EmbeddingRetriever(texts, embed)
        else:
            self._retriever = _retriever(texts, "characters" if method == "diverse" else method)

    @property
    def fixed(self) -> bool:
        """Whether all queries get the same shots, whose beginning is then computed once."""
        return self.method == "balanced"

    def choose(self, query: str | None = None) -> list[Example]:
        """Return the shots for ``query``, a text like `Example.text`.

        Raises:
            UserError: shots are chosen for a query, and there is none.
        """
        if self.fixed:
            return list(self._fixed)
        if query is None:
            raise UserError(f"{self.method} shots are chosen for a query, which is missing")
        return self.choose_all([query])[0]

    def choose_all(self, queries: Sequence[str]) -> list[list[Example]]:
        """Return the shots for each query, in one search."""
        if self.fixed:
            return [list(self._fixed) for _ in queries]
        if not queries:
            return []
        count = self.k * CANDIDATES if self.method == "diverse" else self.k
        near = self._retriever.nearest(queries, count)
        rows = near.indices.tolist()
        if self.method == "diverse":
            rows = [
                self._unlike(row, likeness)
                for row, likeness in zip(rows, near.similarities.tolist(), strict=True)
            ]
        if self.order == "nearest last":
            rows = [row[::-1] for row in rows]
        return [[self.train[index] for index in row] for row in rows]

    def _unlike(self, candidates: list[int], likeness: list[float]) -> list[int]:
        """Return ``k`` of the candidates, each the best by its likeness to the query and to those before it."""
        texts = [self.train[index].text or self.train[index].input for index in candidates]
        between = self._retriever.similarities(texts)[:, candidates]
        chosen = [0]
        while len(chosen) < min(self.k, len(candidates)):
            rest = [place for place in range(len(candidates)) if place not in chosen]
            chosen.append(
                max(
                    rest,
                    key=lambda place: (
                        RELEVANCE * likeness[place] - (1 - RELEVANCE) * float(between[place, chosen].max())
                    ),
                )
            )
        return [candidates[place] for place in chosen]


@lru_cache(maxsize=4)
def _retriever(texts: tuple[str, ...], method: RetrievalMethod) -> Retriever:
    """Return an index; selectors that differ only in the number and order of shots share it."""
    return Retriever(texts, method)


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
