"""The rules that drop documents: their counts against plain Python, their limits against the papers."""

import json
import pickle
import re
import time
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tercet.curation.filters import PRESETS, Rules
from tercet.curation.language import identify
from tercet.curation.personal_data import mask_personal_data
from tercet.curation.pipeline import curate
from tercet.curation.text_statistics import STOP_WORDS, count, duplicate_grams, top_gram
from tercet.errors import UserError

PROSE = (
    "The harbour was quiet when the boats came back from the islands with their nets half full. Nobody on the "
    "quay had expected them before evening, and so the scales stood under their canvas and the ice had not been "
    "broken. Old Maren walked along the wall to count the sails, as she did on every day that had wind, and told "
    "the children which of them belonged to whom.\nLater the men carried baskets up the stairs. One of them said "
    "that the water beyond the point had been warm as milk, and another laughed at him."
)


def repeated(items: list[str]) -> tuple[int, int]:
    seen: set[str] = set()
    number = length = 0
    for item in items:
        if item in seen:
            number, length = number + 1, length + len(item)
        seen.add(item)
    return number, length


texts = st.lists(
    st.sampled_from(
        [
            "the",
            "The",
            "cat",
            "of",
            "...",
            "\u2026",
            "#",
            "- a",
            "x1",
            "12",
            "{",
            "\n",
            "\n\n",
            "\u00e9t\u00e9",
            "end.",
            "so?!",
            "\u201cyes.\u201d",
        ]
    ),
    max_size=60,
).map(" ".join)


@given(texts)
@settings(max_examples=300, deadline=None)
def test_counts_are_those_of_plain_python(text: str) -> None:
    counts, words = count(text)
    tokens = text.split()
    plain = [token for token in tokens if any(map(str.isalnum, token))]
    assert (counts.characters, counts.words) == (len(text), len(tokens))
    assert words.lengths.tolist() == [len(token) for token in tokens]
    assert (counts.plain_words, counts.plain_length) == (len(plain), sum(map(len, plain)))
    assert counts.alphabetic_words == sum(any(map(str.isalpha, token)) for token in tokens)
    assert (counts.hashes, counts.braces, counts.newlines) == (
        text.count("#"),
        text.count("{"),
        text.count("\n"),
    )
    assert counts.ellipses == text.count("...") + text.count("\u2026")
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    assert counts.lines == len(lines)
    assert counts.bullet_lines == sum(line.startswith("-") for line in lines)
    assert counts.ellipsis_lines == sum(line.endswith(("...", "\u2026")) for line in lines)
    assert counts.ended_lines == sum(bool(re.search(r"[.!?\u2026][\u201d}]*$", line)) for line in lines)
    assert counts.short_lines == sum(len(line) <= 30 for line in lines)
    assert (counts.duplicate_lines, counts.duplicate_line_length) == repeated(lines)
    parts = [
        [line.strip() for line in part.split("\n")] for part in re.split(r"\n\s*\n", text.strip()) if part
    ]
    lengths = [sum(map(len, part)) for part in parts]
    assert counts.paragraphs == len(parts)
    number, _ = repeated(["\n".join(part) for part in parts])
    assert counts.duplicate_paragraphs == number
    assert counts.duplicate_paragraph_length <= sum(lengths)
    folded = {"".join(filter(str.isalnum, token)).lower() for token in tokens}
    assert counts.stop_words == len(folded & set(STOP_WORDS))


@given(st.lists(st.sampled_from(["a", "b", "cc", "dd", "e"]), max_size=50), st.integers(2, 6))
@settings(max_examples=300, deadline=None)
def test_repeated_grams_are_those_of_plain_python(tokens: list[str], n: int) -> None:
    _, words = count(" ".join(tokens))
    grams = [tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)]
    times = Counter(grams)
    max_times = max(times.values(), default=0)
    longest = max((len(" ".join(gram)) for gram, number in times.items() if number == max_times), default=0)
    assert top_gram(words, n) == (max_times * longest if max_times > 1 else 0)
    seen: set[tuple[str, ...]] = set()
    start = length = 0
    while start < len(grams):
        if grams[start] in seen:
            length += len("".join(grams[start]))
            start += n
        else:
            seen.add(grams[start])
            start += 1
    assert duplicate_grams(words, n) == length


def test_prose_stays_with_every_preset() -> None:
    for preset in PRESETS:
        assert Rules(preset)(PROSE) is None


LINES = PROSE.replace("\n", " ").split(". ")
BARE = re.sub(r"[.,\n]+", " ", PROSE).split()
UNENDED = "\n".join(" ".join(BARE[start : start + 8]) for start in range(0, len(BARE), 8))


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("The boats of the harbour. They were small. That is all. ", "min_words"),
        ("the of " + "word " * 100_001, "max_words"),
        ("a b c d the of. " * 20, "min_word_length"),
        ("the of " + "extraordinarily-complicated " * 60, "max_word_length"),
        (" # ".join(LINES) + " #" * 20, "max_hashes"),
        (PROSE.replace(" the ", " ... "), "max_ellipses"),
        ("\n".join(f"- {line}." for line in LINES), "max_bullet_lines"),
        ("\n".join(f"{line} ..." for line in LINES), "max_ellipsis_lines"),
        (PROSE + " 12" * 60, "min_alphabetic_words"),
        (PROSE + " {", "max_curly_brackets"),
        (PROSE.replace(". ", ", ").replace(".\n", ", "), "min_sentences"),
        (UNENDED + " Late. Cold. Dark. Yet", "min_punctuated_lines"),
        (PROSE.replace("\n", " ") + "\n" + "\n".join(f"Item number {n}." for n in range(9)), "max_short_lines"),
        (PROSE + "\n" * 80, "max_newlines"),
        (PROSE + "\n" + PROSE[:60] + ".\n" + PROSE[:60] + ".", "max_duplicate_line_characters"),
        (PROSE + " Lorem ipsum dolor sit amet.", "max_lorem_ipsum"),
        (PROSE + " warm milk" * 30, "max_top_2_gram"),
        (re.sub(r"\b(the|be|to|of|and|that|have|with)\b", "le", PROSE, flags=re.I), "min_stop_words"),
        (PROSE + " " + PROSE[:200].split("\n")[0], "max_duplicate_5_grams"),
    ],
)  # fmt: skip
def test_each_rule_drops_the_text_that_breaks_it(text: str, rule: str) -> None:
    reason = Rules("web")(text)
    assert reason is not None and reason.rule == rule
    # With this rule disabled, only another rule may drop the text: its limit decided.
    disabled = {rule: 0.0 if rule.startswith("min_") else float("inf")}
    reason = Rules("web", overrides=disabled)(text)
    assert reason is None or reason.rule != rule


def test_limits_are_those_of_the_papers() -> None:
    # Gopher: 50 words stay, 49 go.
    fifty = " ".join(PROSE.split()[:49])
    assert Rules("light", overrides={"min_words": 50})(fifty + " quay.") is None
    assert Rules("light", overrides={"min_words": 50})(fifty).rule == "min_words"  # type: ignore[union-attr]
    numbers = {row["rule"]: row["limit"] for row in Rules("web").describe()}
    assert numbers["min_words"] == 50 and numbers["max_words"] == 100_000
    assert [numbers[f"max_top_{n}_gram"] for n in (2, 3, 4)] == [0.2, 0.18, 0.16]
    assert [numbers[f"max_duplicate_{n}_grams"] for n in range(5, 11)] == [0.15, 0.14, 0.13, 0.12, 0.11, 0.1]
    assert (numbers["min_punctuated_lines"], numbers["max_short_lines"], numbers["max_newlines"]) == (
        0.12,
        0.67,
        0.3,
    )


def test_text_without_spaces_is_no_single_long_word() -> None:
    # No character occurs twice, so that nothing is repeated.
    text = "\u3002".join("".join(chr(0x4E00 + 40 * line + place) for place in range(40)) for line in range(6))
    dropped = Rules("light")(text)
    assert dropped is None
    assert count(text)[0].sentences == 5


def test_texts_in_other_languages_are_dropped() -> None:
    german = (
        "Der Hafen war still, als die Boote von den Inseln zurückkamen. Niemand auf dem Kai hatte sie vor dem "
        "Abend erwartet, und so standen die Waagen noch unter dem Segeltuch, das Eis war nicht gebrochen."
    )
    assert identify(german)[0] == "de" and identify(PROSE)[0] == "en"
    only_german = Rules("none", languages=["de"])
    assert only_german(german) is None
    dropped = only_german(PROSE)
    assert dropped is not None and dropped.rule == "language" and dropped.detail.startswith("en")
    # German text needs no English stop words.
    assert "min_stop_words" not in {row["rule"] for row in Rules("web", languages=["de"]).describe()}


def test_rules_can_be_pickled_for_other_processes() -> None:
    rules = pickle.loads(pickle.dumps(Rules("web", languages=["en"])))
    assert rules(PROSE) is None and rules("short").rule == "min_words"


def test_unknown_presets_rules_and_languages_are_named() -> None:
    with pytest.raises(UserError, match="no rules 'strict'; choose none, light, web"):
        Rules("strict")
    with pytest.raises(UserError, match=r"no rule 'max_word' \(did you mean max_words\?\)"):
        Rules("web", overrides={"max_word": 3})
    with pytest.raises(UserError, match="it must be 0 or more"):
        Rules("web", overrides={"max_words": float("nan")})
    with pytest.raises(UserError, match=r"`languages` has 'xx', which is unknown; known are .*de, "):
        Rules("web", languages=["xx"])


@pytest.mark.parametrize(
    "text", ["", " ", "\n\n", "\0", "\ud800", "a" * 5_000_000, "\n" * 300_000, "a b " * 400_000]
)
def test_unusual_texts_are_judged(text: str) -> None:
    dropped = Rules("web")(text)
    assert dropped is not None
    assert Rules("none")(text) is None


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("write to a.b+c@mail.example.org.", "write to [EMAIL]."),
        ("IBAN GB82 WEST 1234 5698 7654 32 please", "IBAN [IBAN] please"),  # the example of the standard
        ("IBAN GB83 WEST 1234 5698 7654 32", None),  # one digit off
        ("card 4111 1111 1111 1111, 378282246310005", "card [CARD], [CARD]"),  # test numbers of the networks
        ("card 4111 1111 1111 1112", None),
        ("from 8.8.8.8 to 10.0.0.1", "from [IP_ADDRESS] to 10.0.0.1"),
        ("2001:4860:4860::8888 but ::1", "[IP_ADDRESS] but ::1"),
        ("call +49 30 1234567 or (555) 123-4567", "call [PHONE] or [PHONE]"),
        ("call +442079460958 now", "call [PHONE] now"),
        ("version 1.2.3.4.5, 12:30:45, 2019-2020, 1,234,567.89, ISBN 978-3-16-148410-0", None),
        ("f(a@b) and x@y", None),
        ("v8.8.8.8 8.8.8.8x 999.1.1.1", None),
    ],
)
def test_personal_data_is_masked(text: str, masked: str | None) -> None:
    result, counts = mask_personal_data(text)
    assert result == (masked or text)
    assert counts.total() == result.count("[")


@pytest.mark.parametrize(
    "unit", ["a", "@", "1", "1 ", ":", "a@", "+1-", "1.1.1.", "AB12", "(", "+1 (1) ", "a:b:", "4111 ", "a.@"]
)
def test_masking_time_grows_in_proportion_to_hostile_text(unit: str) -> None:
    def seconds(length: int) -> float:
        text = unit * (length // len(unit))
        # Processor time: on a busy machine the process waits, and time on the clock says little.
        begun = time.process_time()
        mask_personal_data(text)
        return time.process_time() - begun

    # Eight times the text: a quadratic pattern would take 64 times as long. 40 leaves room for noise.
    assert seconds(400_000) < 40 * min(seconds(50_000) for _ in range(3)) + 0.2


def test_curate_drops_by_rule_and_masks_personal_data(tmp_path: Path) -> None:
    source = tmp_path / "pages.jsonl"
    rows = [
        {"text": PROSE, "license": "CC0"},
        {"text": "Click here."},
        {"text": PROSE[::-1] + " call +442079460958"},
    ]
    rows.append({"text": PROSE.replace("harbour", "market") + " Write to maren@example.org."})
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = curate(source, tmp_path / "out", mask_personal_data=True, near_duplicates=False, processes=1)
    assert made.dropped == {"min_words": 1, "min_sentences": 1}
    table = pq.read_table(tmp_path / "out" / "data").to_pylist()
    assert {row["masked"] for row in table} == {0, 1}
    [unmasked] = [row for row in table if not row["masked"]]
    assert (unmasked["text"], unmasked["licence"], unmasked["offset"]) == (PROSE, "CC0", 0)
    [masked] = [row for row in table if row["masked"]]
    assert masked["text"].endswith("Write to [EMAIL].")
    # The offset is where the row begins in the file.
    assert json.loads(source.read_bytes()[masked["offset"] :].splitlines()[0])["text"].endswith(
        "example.org."
    )
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["personal_data"]["documents"] == 1
