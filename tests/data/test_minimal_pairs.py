from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest

from tercet.data.minimal_pairs import Pair, read_pairs, sample_pairs
from tercet.errors import UserError


def row(number: int, group: str, **more: Any) -> dict[str, Any]:
    return {
        "sentence_good": f"They see {number}.",
        "sentence_bad": f"They sees {number}.",
        "UID": group,
        **more,
    }


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def test_a_directory_of_plain_and_compressed_files_with_blimp_fields(tmp_path: Path) -> None:
    write(tmp_path / "b.jsonl.gz", [row(2, "second")])
    write(tmp_path / "a.jsonl", [row(1, "first", linguistics_term="agreement")])
    (tmp_path / "SOURCE.txt").write_text("not pairs")
    assert read_pairs(tmp_path) == [
        Pair("They see 1.", "They sees 1.", "first"),
        Pair("They see 2.", "They sees 2.", "second"),
    ]
    assert read_pairs([tmp_path / "b.jsonl.gz"]) == [Pair("They see 2.", "They sees 2.", "second")]
    assert read_pairs(tmp_path / "a.jsonl", group="linguistics_term")[0].group == "agreement"


def test_other_fields_and_the_file_name_as_group(tmp_path: Path) -> None:
    write(tmp_path / "verbs.jsonl", [{"right": "He goes.", "wrong": "He go."}])
    (tmp_path / "nouns.csv").write_text("right,wrong\nOne cat.,One cats.\n")
    pairs = read_pairs([tmp_path / "verbs.jsonl", tmp_path / "nouns.csv"], good="right", bad="wrong")
    assert pairs == [Pair("He goes.", "He go.", "verbs"), Pair("One cat.", "One cats.", "nouns")]


def test_a_group_may_be_a_number(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [row(1, "x", level=3)])
    assert read_pairs(path, group="level")[0].group == "3"


PAIRS = [Pair(f"good {n}", f"bad {n}", f"group {n % 3}") for n in range(60)]


def test_a_sample_takes_a_number_of_pairs_per_group_in_order() -> None:
    chosen = sample_pairs(PAIRS, 5)
    assert len(chosen) == 15 and {pair.group for pair in chosen} == {"group 0", "group 1", "group 2"}
    assert chosen == [pair for pair in PAIRS if pair in chosen]
    assert sample_pairs(PAIRS, 100) == PAIRS


def test_a_sample_depends_only_on_the_pairs() -> None:
    shuffled = PAIRS.copy()
    random.Random(1).shuffle(shuffled)
    assert set(sample_pairs(shuffled, 5)) == set(sample_pairs(PAIRS, 5))
    assert set(sample_pairs(PAIRS, 5)) < set(sample_pairs(PAIRS, 6))  # a larger sample contains the smaller
    # A new pair in a group displaces at most one other.
    more = set(sample_pairs([*PAIRS, Pair("good x", "bad x", "group 0")], 5))
    assert len(more & set(sample_pairs(PAIRS, 5))) >= 14


def test_the_sample_of_a_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [row(n, "one") for n in range(9)])
    assert read_pairs(path, sample=4) == sample_pairs(read_pairs(path), 4)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (
            [row(1, "a"), {"text": "x"}],
            {},
            "pairs.jsonl, row 2 has no field 'sentence_good'; its fields are text",
        ),
        ([row(1, "a")], {"group": "term"}, "row 1 has no field 'term'; its fields are sentence_good, "),
        ([row(1, "a", sentence_bad=None)], {}, "row 1: sentence_bad is None; it must be a sentence"),
        ([row(1, "a", sentence_good=" ")], {}, "row 1: sentence_good is ' '; it must be a sentence"),
        ([row(1, "a", sentence_good="a \ud800")], {}, "row 1: sentence_good is not valid Unicode text"),
        ([], {}, "there are no minimal pairs in .*pairs.jsonl"),
        ([row(1, "a")], {"sample": 0}, "the sample is 0 pairs a group; it must be 1 or more"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, rows: list[dict[str, Any]], options: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_pairs(write(tmp_path / "pairs.jsonl", rows), **options)


def test_paths_without_pairs_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "pairs.jsonl", [row(1, "a")])
    with pytest.raises(
        UserError, match=r"there is no file or directory .*pair\.jsonl; did you mean pairs\.jsonl"
    ):
        read_pairs(tmp_path / "pair.jsonl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty holds no jsonl files"):
        read_pairs(tmp_path / "empty")
    with pytest.raises(UserError, match="no minimal pairs in no files"):
        read_pairs([])
