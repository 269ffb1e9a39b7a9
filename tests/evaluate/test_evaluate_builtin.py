"""The built-in task: real labels, the module's name masked, the same examples every time."""

from __future__ import annotations

import importlib
import inspect
import random
from collections import Counter

import pytest

from tercet.data.decontaminate import Decontaminator
from tercet.data.document import Document
from tercet.evaluate.builtin import AREAS, MASK, area_of, docs_routing_rows, first_paragraph, mask_module
from tercet.evaluate.task import Task


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    return docs_routing_rows()


@pytest.mark.parametrize(
    ("module", "text", "masked"),
    [
        (
            "json",
            "JSON (see json.org): jsonify json_data, Json.",
            f"{MASK} (see {MASK}.org): jsonify json_data, {MASK}.",
        ),
        ("xml.dom.minidom", "A DOM node of xml.sax, minidom's", f"A {MASK} node of {MASK}.sax, {MASK}'s"),
        ("_pydecimal", "A Decimal, by _pydecimal.", f"A {MASK}, by {MASK}."),
        ("_strptime", "See time.strptime().", f"See time.{MASK}()."),
        ("os", "those OSes: os.", f"those OSes: {MASK}."),
    ],
)
def test_the_modules_name_is_masked_as_a_whole_word(module: str, text: str, masked: str) -> None:
    assert mask_module(text, module) == masked


def test_the_first_paragraph_is_one_line() -> None:
    assert first_paragraph("Read\n  a line.\n \nMore.") == "Read a line."


def test_areas_follow_the_library_reference() -> None:
    # Chapters of docs.python.org/3/library in which these stand.
    assert area_of("difflib") == "text"
    assert area_of("collections.abc") == "data types"
    assert area_of("fractions") == area_of("functools") == "mathematics"
    assert area_of("zipfile") == area_of("csv") == "archives and formats"
    assert area_of("concurrent.futures.thread") == "concurrency"
    assert area_of("asyncio.tasks") == area_of("ssl") == "networking"
    assert area_of("http.client") == "internet protocols"
    assert area_of("importlib.resources") == area_of("ast") == "language"
    for left_out in ("idlelib.run", "tkinter", "lib2to3", "distutils", "test", "antigravity", "nonsense"):
        assert area_of(left_out) is None


def test_labels_differ_in_their_first_letters() -> None:
    assert 10 <= len(AREAS) <= 14
    assert len({label[:3] for label in AREAS}) == len(AREAS)
    assert all(label == label.lower().strip() and len(label.split()) <= 3 for label in AREAS)
    modules = [module for names in AREAS.values() for module in names.split()]
    assert len(modules) == len(set(modules))


def test_examples_are_the_docstrings_of_the_modules(rows: list[dict[str, str]]) -> None:
    by_name = {row["name"]: row for row in rows}
    for name in (
        "textwrap.dedent",
        "heapq.merge",
        "statistics.median",
        "shutil.copytree",
        "threading.Condition",
    ):
        module, _, attribute = name.rpartition(".")
        documented = inspect.getdoc(getattr(importlib.import_module(module), attribute)) or ""
        row = by_name[name]
        assert row["original"] == " ".join(documented.split("\n\n")[0].split())
        assert row["area"] == area_of(module)


def test_examples_are_many_distinct_masked_and_spread_over_the_areas(rows: list[dict[str, str]]) -> None:
    assert 3000 <= len(rows) <= 5000
    assert {row["area"] for row in rows} == set(AREAS)
    sizes = Counter(row["area"] for row in rows)
    assert max(sizes.values()) < 0.2 * len(rows) and min(sizes.values()) > 0.02 * len(rows)
    assert len({row["text"].casefold() for row in rows}) == len(rows)
    for row in rows:
        assert len(row["text"].replace(MASK, " ").split()) >= 3
        assert row["area"] == area_of(row["name"])
        top = row["name"].split(".")[0]
        assert mask_module(row["text"], top) == row["text"]
    assert rows == docs_routing_rows()


def test_the_task_has_a_locked_test_of_at_least_500() -> None:
    task = Task.load("builtin:docs-routing")
    assert len(task.test) >= 500 and len(task.dev) >= 300 and len(task.train) >= 2000
    assert task.labels == sorted(AREAS)
    assert task.corpus == ["builtin:python-docs"]
    assert not {example.id for example in task.test} & {example.id for example in task.train + task.dev}
    decontaminator = Decontaminator(example.fields["original"] for example in task.test)
    for example in task.test:
        wrapped = example.fields["original"].replace(" ", "\n    ")
        left, _ = decontaminator.clean(Document(f"Heading of it all.\n\n{wrapped}", "s", example.id))
        assert left is not None and left.text.strip() == "Heading of it all."


def test_a_bag_of_words_learns_it_in_part(rows: list[dict[str, str]]) -> None:
    """Neither solved nor hopeless for TF-IDF and logistic regression: about 0.73 in five folds."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    shuffled = random.Random(0).sample(rows, len(rows))
    cut = len(shuffled) * 4 // 5
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    train = vectorizer.fit_transform([row["text"] for row in shuffled[:cut]])
    model = LogisticRegression(C=20, max_iter=200).fit(train, [row["area"] for row in shuffled[:cut]])
    test = vectorizer.transform([row["text"] for row in shuffled[cut:]])
    accuracy = model.score(test, [row["area"] for row in shuffled[cut:]])
    assert 0.65 < accuracy < 0.85
