"""The nearest rung against scikit-learn's nearest neighbours, and its choices on dev."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.neighbors import KNeighborsClassifier

from tercet.evaluate.task import Task
from tercet.ladder.rungs import nearest
from tercet.ladder.rungs.nearest import Nearest
from tercet.ladder.rungs.rung import Setting

KINDS = {"fruit": "apple pear plum fig", "tool": "saw hammer drill file", "bird": "robin owl wren crow"}
FILLER = ["old", "new", "big", "small", "red", "grey", "one", "two", "my", "your", "their"]


def task() -> Task:
    draw = random.Random(0)
    rows = []
    for kind, names in KINDS.items():
        for _ in range(80):
            # A third of the texts name another kind too, so that the neighbours disagree.
            other = draw.choice(" ".join(KINDS.values()).split()) if draw.random() < 0.3 else "thing"
            text = [*draw.sample(FILLER, 4), draw.choice(names.split()), other, f"w{draw.randrange(400)}"]
            rows.append({"text": " ".join(text), "kind": kind})
    return Task.from_rows("kinds", rows, prompt="{text}:", target="kind", labels=list(KINDS), dev_size=60)


def fitted(task: Task, directory: Path) -> Nearest:
    rung = Nearest()
    rung.fit(Setting(task, directory))
    return rung


def test_the_vote_is_that_of_scikit_learn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nearest, "METHODS", ("tfidf",))
    kinds = task()
    texts, dev, test = (
        [str(example.fields["text"]) for example in split] for split in (kinds.train, kinds.dev, kinds.test)
    )
    vectorizer = TfidfVectorizer(sublinear_tf=True)
    rows = vectorizer.fit_transform(texts)
    scores, predictions = {}, {}
    for k in (1, 3, 5, 9, 17, 33):
        model = KNeighborsClassifier(k, metric="cosine", weights=lambda distances: 1 - distances)
        model.fit(rows, [example.target for example in kinds.train])
        scores[k] = model.score(vectorizer.transform(dev), [example.target for example in kinds.dev])
        predictions[k] = list(model.predict(vectorizer.transform(test)))
    rung = fitted(kinds, tmp_path)
    best = max(scores, key=lambda k: (scores[k], -k))
    assert best > 1, "one neighbour would need no vote"
    assert rung.details == {"method": "tfidf", "neighbours": best, "dev_score": pytest.approx(scores[best])}
    assert [answer.text for answer in rung.predict(kinds.test)] == predictions[best]


def test_an_open_task_is_answered_with_the_target_of_the_nearest(tmp_path: Path) -> None:
    rows = [{"q": f"the {city} of {n}", "a": f"{city}-{n}"} for n in range(20) for city in ("Bern", "Oslo")]
    cities = Task.from_rows(
        "cities", rows, prompt="{q}", target="a", test_rows=[{"q": "OSLO, 7?", "a": "unknown"}], dev_size=2
    )
    assert "Oslo-7" in {example.target for example in cities.train}
    rung = fitted(cities, tmp_path)
    assert rung.details["neighbours"] == 1
    assert [answer.text for answer in rung.predict(cities.test)] == ["Oslo-7"]


def test_a_text_like_no_training_example_gets_the_most_frequent_target(tmp_path: Path) -> None:
    rows = [{"text": f"alpha {n}", "kind": "a" if n % 3 else "b"} for n in range(90)]
    kinds = Task.from_rows(
        "kinds",
        rows,
        prompt="{text}:",
        target="kind",
        labels=["b", "a"],
        test_rows=[{"text": "zzz", "kind": "b"}],
    )
    assert [answer.text for answer in fitted(kinds, tmp_path).predict(kinds.test)] == ["a"]


def test_the_size_is_that_of_the_training_texts(tmp_path: Path) -> None:
    kinds = task()
    size = sum(len(example.fields["text"]) + len(example.target) for example in kinds.train)
    assert fitted(kinds, tmp_path).size_bytes() == size
