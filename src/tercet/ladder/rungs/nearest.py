"""The nearest rung: what retrieval alone gives, without a language model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from tercet.data.retrieval import METHODS, Neighbours, Retriever
from tercet.evaluate.answer import Answer
from tercet.evaluate.task import Example, Task
from tercet.ladder.result import Level
from tercet.ladder.rungs.rung import Setting

NEIGHBOURS = (1, 3, 5, 9, 17, 33)  # numbers of neighbours that are compared on dev


class Nearest:
    """The answer of the most similar training examples.

    In a closed task the k nearest vote, each with its similarity as weight (Dudani 1976, "The
    distance-weighted k-nearest-neighbor rule"). In an open task the answer is that of the nearest. The method
    of retrieval and k are those with the best score on dev; among equal scores the first method and the
    smallest k.
    """

    name = "nearest"
    level: Level = "baseline"

    def __init__(self) -> None:
        self.details: dict[str, Any] = {}

    def fit(self, setting: Setting) -> None:
        """Index the training inputs, and choose the method and the number of neighbours on dev."""
        self._task = task = setting.task
        self._targets = [example.target for example in task.train]
        self._frequency = Counter(self._targets)
        self._texts = _texts(task, task.train)
        tried = NEIGHBOURS if task.labels is not None else (1,)
        counts = [k for k in tried if k <= len(self._texts)]
        best_score = -1.0
        for method in METHODS:
            retriever = Retriever(self._texts, method)
            neighbours = retriever.nearest(_texts(task, task.dev), counts[-1])
            for k in counts:
                score = task.score(self._answers(neighbours, k), task.dev)
                if score > best_score:
                    best_score, self._retriever, self._k = score, retriever, k
        self.details = {"method": self._retriever.method, "neighbours": self._k, "dev_score": best_score}

    def predict(self, examples: Sequence[Example]) -> list[Answer]:
        """Return the answer of each example's nearest training examples."""
        neighbours = self._retriever.nearest(_texts(self._task, examples), self._k)
        return [Answer(answer) for answer in self._answers(neighbours, self._k)]

    def size_bytes(self) -> int:
        """Return the bytes of the training inputs and targets, which answering needs."""
        return sum(len(text.encode("utf-8", "surrogatepass")) for text in (*self._texts, *self._targets))

    def _answers(self, neighbours: Neighbours, k: int) -> list[str]:
        rows = zip(neighbours.indices[:, :k].tolist(), neighbours.similarities[:, :k].tolist(), strict=True)
        return [self._vote(indices, similarities) for indices, similarities in rows]

    def _vote(self, indices: list[int], similarities: list[float]) -> str:
        votes: dict[str, float] = {}
        for index, similarity in zip(indices, similarities, strict=True):
            if similarity > 0:
                target = self._targets[index]
                votes[target] = votes.get(target, 0.0) + similarity
        # A text that is like no training example gets the most frequent target, as does a tie.
        candidates = votes or dict.fromkeys(self._frequency, 0.0)
        return min(candidates, key=lambda target: (-candidates[target], -self._frequency[target], target))


def _texts(task: Task, examples: Sequence[Example]) -> list[str]:
    return [task.input_text(example.fields) for example in examples]
