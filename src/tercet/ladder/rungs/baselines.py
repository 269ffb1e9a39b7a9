"""Rungs without a language model. They show whether the task needs one."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tercet.evaluate.answer import Answer
from tercet.evaluate.task import Example
from tercet.files import directory_size, write_json
from tercet.ladder.result import Level
from tercet.ladder.rungs.rung import Setting

REGULARISATIONS = (1.0, 10.0, 100.0)  # inverse strengths that are compared on dev


class Majority:
    """The most frequent target of the training examples, for every input."""

    name = "majority"
    level: Level = "baseline"

    def __init__(self) -> None:
        self.details: dict[str, Any] = {}
        self._answer = ""

    def fit(self, setting: Setting) -> None:
        """Count the targets."""
        counts = Counter(example.target for example in setting.task.train)
        # Among equally frequent targets the first in the alphabet, so that the order of rows has no effect.
        self._answer = min(counts, key=lambda target: (-counts[target], target))
        self.details = {"answer": self._answer}

    def predict(self, examples: Sequence[Example]) -> list[Answer]:
        """Return the most frequent target for each example."""
        return [Answer(self._answer) for _ in examples]

    def size_bytes(self) -> int:
        """Return the bytes of the answer."""
        return len(self._answer.encode())


class TfidfLogistic:
    """Logistic regression on the TF-IDF of words and word pairs; dev chooses its regularisation.

    An open task has no classes. There the answer is the target of the training example that is
    nearest in TF-IDF space.
    """

    name = "tfidf"
    level: Level = "baseline"

    def __init__(self) -> None:
        self.details: dict[str, Any] = {}
        self._directory: Path | None = None
        self._model: Any = None

    def fit(self, setting: Setting) -> None:
        """Fit the vectoriser and, for a closed task, the regression."""
        from sklearn.feature_extraction.text import TfidfVectorizer

        self._task, self._directory = setting.task, setting.directory / "model"
        train, dev = setting.task.train, setting.task.dev
        # Single letters and digits count too: they are words in code and in text messages.
        self._vectorizer = TfidfVectorizer(
            ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\b\w+\b"
        )
        self._rows = self._vectorizer.fit_transform([self._text(example) for example in train])
        self._targets = [example.target for example in train]
        if setting.task.labels is not None and len(set(self._targets)) > 1:
            self._choose(dev, setting.seed)
        else:
            self.details["method"] = "answer of the nearest training example"
        self._save(self._directory)

    def _choose(self, dev: Sequence[Example], seed: int) -> None:
        """Fit one model for each regularisation and keep the one with the best accuracy on dev.

        A model on half of the examples shows what more examples would give.
        """
        from sklearn.linear_model import LogisticRegression
        from threadpoolctl import threadpool_limits

        dev_rows = self._vectorizer.transform([self._text(example) for example in dev])
        dev_targets = [example.target for example in dev]
        best_score = -1.0
        for strength in REGULARISATIONS:
            model = LogisticRegression(C=strength, max_iter=2000, random_state=seed)
            # The optimiser's vectors are small. More threads only wait for each other: on two busy cores they
            # took ten times as long.
            with threadpool_limits(1):
                model.fit(self._rows, self._targets)
            score = float(model.score(dev_rows, dev_targets)) if dev_targets else 0.0
            if score > best_score:
                best_score, self._model = score, model
                self.details = {"method": "logistic regression", "C": strength, "dev_accuracy": score}
        half = random.Random(seed).sample(range(len(self._targets)), len(self._targets) // 2)
        targets = [self._targets[index] for index in half]
        if dev_targets and len(set(targets)) > 1:
            model = LogisticRegression(C=self.details["C"], max_iter=2000, random_state=seed)
            with threadpool_limits(1):
                model.fit(self._rows[half], targets)
            self.details["dev_accuracy_with_half"] = float(model.score(dev_rows, dev_targets))

    def _save(self, directory: Path) -> None:
        """Write the model as plain arrays and JSON, never pickled; the report shows the size of these files."""
        import numpy as np

        arrays: dict[str, Any] = {"idf": self._vectorizer.idf_}
        if self._model is not None:
            arrays |= {"coefficients": self._model.coef_, "intercepts": self._model.intercept_}
        else:
            arrays |= {"data": self._rows.data, "indices": self._rows.indices, "indptr": self._rows.indptr}
        directory.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(directory / "arrays.npz", **arrays)
        vocabulary = {word: int(index) for word, index in self._vectorizer.vocabulary_.items()}
        targets = list(self._model.classes_) if self._model is not None else self._targets
        write_json(directory / "vocabulary.json", {"vocabulary": vocabulary, "targets": targets})

    def _text(self, example: Example) -> str:
        return self._task.input_text(example.fields)

    def predict(self, examples: Sequence[Example]) -> list[Answer]:
        """Return the predicted class of each example, or the target of its nearest neighbour."""
        if not examples:
            return []
        rows = self._vectorizer.transform([self._text(example) for example in examples])
        if self._model is not None:
            return [Answer(str(label)) for label in self._model.predict(rows)]
        nearest = (rows @ self._rows.T).toarray().argmax(axis=1)
        return [Answer(self._targets[index]) for index in nearest]

    def size_bytes(self) -> int | None:
        """Return the bytes of the arrays and the vocabulary."""
        return directory_size(self._directory) if self._directory else None
