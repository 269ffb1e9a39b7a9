"""Rungs without a language model: does the task need one at all?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tercet.evaluate.answer import Answer
from tercet.evaluate.task import Example
from tercet.files import directory_size, write_json
from tercet.ladder.result import Level
from tercet.ladder.rungs.base import Setting

REGULARISATIONS = (1.0, 10.0, 100.0)  # inverse strengths tried on dev


class Majority:
    """The commonest target of train, whatever is asked."""

    name = "majority"
    level: Level = "baseline"

    def __init__(self) -> None:
        self.details: dict[str, Any] = {}
        self._answer = ""

    def fit(self, setting: Setting) -> None:
        counts = Counter(example.target for example in setting.task.train)
        # Of equally common ones the alphabetically first, so that the order of rows changes nothing.
        self._answer = min(counts, key=lambda target: (-counts[target], target))
        self.details = {"answer": self._answer}

    def predict(self, examples: Sequence[Example]) -> list[Answer]:
        return [Answer(self._answer) for _ in examples]

    def size_bytes(self) -> int:
        return len(self._answer.encode())


class TfidfLogistic:
    """TF-IDF of words and word pairs into logistic regression; its strength is chosen on dev.

    For an open task, where there are no classes, it answers with the target of the training example
    that is nearest in TF-IDF space.
    """

    name = "tfidf"
    level: Level = "baseline"

    def __init__(self) -> None:
        self.details: dict[str, Any] = {}
        self._directory: Path | None = None
        self._model: Any = None

    def fit(self, setting: Setting) -> None:
        import numpy as np
        from sklearn.feature_extraction.text import TfidfVectorizer

        self._task, self._directory = setting.task, setting.directory / "model"
        train, dev = setting.task.train, setting.task.dev
        # Single letters and digits count too: they are words in code and in text messages.
        self._vectorizer = TfidfVectorizer(
            ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\b\w+\b"
        )
        self._rows = self._vectorizer.fit_transform([self._text(example) for example in train])
        self._targets = [example.target for example in train]
        arrays: dict[str, Any] = {"idf": self._vectorizer.idf_}
        if setting.task.labels is not None and len(set(self._targets)) > 1:
            self._choose(dev, setting.seed)
            arrays |= {"coefficients": self._model.coef_, "intercepts": self._model.intercept_}
        else:
            self.details["method"] = "answer of the nearest training example"
            arrays |= {"data": self._rows.data, "indices": self._rows.indices, "indptr": self._rows.indptr}
        # Kept as plain arrays and JSON, never pickled; this is the size the report shows.
        self._directory.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(self._directory / "arrays.npz", **arrays)
        vocabulary = {word: int(index) for word, index in self._vectorizer.vocabulary_.items()}
        targets = list(self._model.classes_) if self._model is not None else self._targets
        write_json(self._directory / "vocabulary.json", {"vocabulary": vocabulary, "targets": targets})

    def _choose(self, dev: Sequence[Example], seed: int) -> None:
        from sklearn.linear_model import LogisticRegression

        held = self._vectorizer.transform([self._text(example) for example in dev])
        wanted = [example.target for example in dev]
        best = -1.0
        for strength in REGULARISATIONS:
            model = LogisticRegression(C=strength, max_iter=2000, random_state=seed)
            model.fit(self._rows, self._targets)
            score = float(model.score(held, wanted)) if wanted else 0.0
            if score > best:
                best, self._model = score, model
                self.details = {"method": "logistic regression", "C": strength, "dev_accuracy": score}

    def _text(self, example: Example) -> str:
        return self._task.input_text(example.fields)

    def predict(self, examples: Sequence[Example]) -> list[Answer]:
        if not examples:
            return []
        rows = self._vectorizer.transform([self._text(example) for example in examples])
        if self._model is not None:
            return [Answer(str(label)) for label in self._model.predict(rows)]
        nearest = (rows @ self._rows.T).toarray().argmax(axis=1)
        return [Answer(self._targets[index]) for index in nearest]

    def size_bytes(self) -> int | None:
        return directory_size(self._directory) if self._directory else None
