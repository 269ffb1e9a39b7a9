"""Raw text to shards: the right documents stay, for every division of the work and after every kill."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tercet.curation import filtering, shards
from tercet.curation.contamination import Suspects, read_test_texts
from tercet.curation.mixture import copies, factors, order_keys
from tercet.curation.pipeline import Curated, curate
from tercet.curation.tally import Tally
from tercet.curation.weights import Weight, parse_weight
from tercet.data.decontaminate import Decontaminator
from tercet.data.document import Document
from tercet.errors import UserError

TEST = "Which of these nine planets is the one that has the largest number of moons?"


def sentence(generator: random.Random, length: int) -> str:
    return " ".join(f"w{number}" for number in generator.sample(range(10**9), length))


def write_corpus(directory: Path, documents: int = 60) -> Path:
    """Write different texts, then an exact copy, a near-copy, a test text and an empty row."""
    generator = random.Random(documents)
    texts = [sentence(generator, generator.randint(20, 60)) for _ in range(documents)]
    long = sentence(generator, 300)
    around = f"{sentence(generator, 30)}\n\n{TEST}\n\n{sentence(generator, 30)}"
    texts += [long, texts[3].replace(" ", "\n"), f"{long} and more", around, TEST, " "]
    path = directory / "corpus.jsonl"
    directory.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def run(data: Any, out: Path, **options: Any) -> Curated:
    return curate(data, out, **{"preset": "none", "processes": 1, **options})


def rows(out: Path) -> list[dict[str, Any]]:
    return [row for path in sorted((out / "data").iterdir()) for row in pq.read_table(path).to_pylist()]


def files(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((out / "data").iterdir())}


def report(out: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((out / "report.json").read_text())
    return content


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filtering, "PART_CHARACTERS", 2000)


def test_copies_and_test_texts_are_dropped_and_the_rest_stays(tmp_path: Path, small_parts: None) -> None:
    data = write_corpus(tmp_path)
    texts = [json.loads(line)["text"] for line in data.read_text().splitlines()]
    made = run(data, tmp_path / "out", decontaminate={"planets": [TEST]}, shard_mb=0.005)
    assert made.dropped == {"exact duplicate": 1, "near-duplicate": 1, "nothing but test texts": 1}
    assert made.skipped == {"empty": 1}
    assert (made.documents_read, made.documents) == (65, 62)
    written = rows(tmp_path / "out")
    without_test = texts[63].replace(f"{TEST}\n\n", "")
    assert Counter(row["text"] for row in written) == Counter([*texts[:61], without_test])
    assert (
        made.bytes
        == sum(len(row["text"].encode()) for row in written)
        == sum(row["bytes"] for row in written)
    )
    assert made.shards == len(files(tmp_path / "out")) > 2
    by_text = {row["text"]: row for row in written}
    assert by_text[texts[3]]["duplicates"] == 1
    assert by_text[texts[60]]["duplicates"] == 1
    assert by_text[without_test]["passages_removed"] == 1
    assert sum(row["duplicates"] for row in written) == 2
    assert by_text[texts[5]] == by_text[texts[5]] | {
        "source": str(data), "id": f"{data.as_posix()}:6", "words": len(texts[5].split()), "masked": 0, "copy": 0,
    }  # fmt: skip


def test_the_report_accounts_for_every_document(tmp_path: Path, small_parts: None) -> None:
    data = write_corpus(tmp_path)
    run(data, tmp_path / "out", decontaminate={"planets": [TEST, "not there at all, anywhere"]})
    account = report(tmp_path / "out")
    dropped = {row["reason"]: row for row in account["dropped"]}
    [exact] = dropped["exact duplicate"]["examples"]
    assert exact["id"] == f"{data.as_posix()}:62"
    assert exact["detail"] == f"of {data.as_posix()}:4"
    [near] = dropped["near-duplicate"]["examples"]
    assert (near["id"], near["detail"]) == (f"{data.as_posix()}:63", f"of {data.as_posix()}:61")
    assert account["read"]["documents"] - sum(row["documents"] for row in account["dropped"]) == 62
    assert account["written"]["documents"] == 62
    [source] = account["sources"]
    assert source["read"] == account["read"]
    assert source["written"] == account["written"]
    assert source["dropped"]["documents"] == 3
    assert {
        (cluster["first"], cluster["documents"], cluster["exact"]) for cluster in account["clusters"]
    } == {
        (f"{data.as_posix()}:4", 2, 1),
        (f"{data.as_posix()}:61", 2, 0),
    }
    assert account["decontamination"]["sets"] == [{"name": "planets", "texts": 2, "found": 1}]
    assert account["decontamination"]["passages_removed"] == 2
    page = (tmp_path / "out" / "report.html").read_text()
    for words in (
        "exact duplicate",
        "near-duplicate",
        "nothing but test texts",
        "planets",
        str(data),
        "empty",
    ):
        assert words in page


def test_the_text_of_documents_is_escaped_in_the_page(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(
        json.dumps({"text": "<script>alert(1)</script>"}) + "\n" + json.dumps({"text": "x"}) + "\n"
    )
    two = tmp_path / "b.jsonl"
    two.write_text(json.dumps({"text": "<script>alert(1)</script>"}) + "\n")
    run([path, two], tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert" in page


def test_the_output_is_the_same_for_any_number_of_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_corpus(tmp_path)
    monkeypatch.setattr(filtering, "PART_CHARACTERS", 3000)
    run(data, tmp_path / "one", decontaminate={"t": [TEST]}, shard_mb=0.01, weights={str(data): 1.5})
    monkeypatch.setattr(filtering, "PART_CHARACTERS", 5000)
    run(
        data,
        tmp_path / "two",
        processes=2,
        decontaminate={"t": [TEST]},
        shard_mb=0.01,
        weights={str(data): 1.5},
    )
    assert files(tmp_path / "one") == files(tmp_path / "two")
    accounts = [report(tmp_path / name) for name in ("one", "two")]
    for account in accounts:
        for timing in ("seconds", "stages", "bytes_per_second"):
            account.pop(timing)
    assert accounts[0] == accounts[1]


def test_the_seed_decides_the_order_and_not_the_documents(tmp_path: Path) -> None:
    data = write_corpus(tmp_path)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(data, tmp_path / name, seed=seed)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    first, other = ([row["id"] for row in rows(tmp_path / name)] for name in ("a", "c"))
    assert first != other
    assert sorted(first) == sorted(other) != first


def test_a_source_can_be_repeated_sampled_and_left_out(tmp_path: Path) -> None:
    names = [str(write_corpus(tmp_path / str(size), size)) for size in (50, 300, 70)]
    # The sources differ except for the test text, which stays in the first source.
    weights = {names[0]: 2.0, names[1]: 0.5, names[2]: 0.0}
    made = run(names, tmp_path / "out", weights=weights)
    written = rows(tmp_path / "out")
    count = Counter(row["source"] for row in written)
    assert count[names[0]] == 2 * 53
    assert 120 < count[names[1]] < 182  # 302 draws of a half: four standard deviations are 35
    assert count[names[2]] == 0
    assert made.dropped["left out by its weight"] == 72 + 302 - count[names[1]]
    assert Counter(row["copy"] for row in written)[1] == 53
    assert {row["id"] for row in written if row["copy"] == 1} == {
        row["id"] for row in written if row["source"] == names[0]
    }
    places = [place for place, row in enumerate(written) if row["id"] == written[0]["id"]]
    assert written[0]["source"] != names[0] or places[1] != places[0] + 1  # copies are not adjacent


def test_a_share_is_a_share_of_the_text_written(tmp_path: Path) -> None:
    names = [str(write_corpus(tmp_path / str(size), size)) for size in (400, 600)]
    made = run(names, tmp_path / "out", weights={names[0]: Weight(0.25, share=True)})
    size = sum(row["bytes"] for row in rows(tmp_path / "out") if row["source"] == names[0])
    assert size / made.bytes == pytest.approx(0.25, abs=0.04)


def test_factors_are_as_computed_by_hand() -> None:
    sizes = {"a": 100, "b": 300, "c": 50}
    assert factors({}, sizes) == {"a": 1, "b": 1, "c": 1}
    assert factors({"a": Weight(3.0)}, sizes)["a"] == 3
    # b is to be 60%: 150 bytes are the other 40%, so b gets 225 of its 300.
    assert factors({"b": Weight(0.6, share=True)}, sizes) == {"a": 1, "b": pytest.approx(0.75), "c": 1}
    shares = {"a": Weight(0.5, share=True), "b": Weight(0.25, share=True), "c": Weight(0.25, share=True)}
    assert factors(shares, sizes) == pytest.approx({"a": 1, "b": 1 / 6, "c": 1})


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"d": Weight(2.0)}, "of which no text is left"),
        ({"a": Weight(1.0, share=True)}, "leave nothing for the rest"),
        ({"a": Weight(0.6, share=True), "b": Weight(0.5, share=True)}, "110%"),
    ],
)
def test_impossible_weights_are_refused(weights: dict[str, Weight], message: str) -> None:
    with pytest.raises(UserError, match=message):
        factors(weights, {"a": 100, "b": 300} if len(weights) == 2 else {"a": 100, "b": 300, "c": 50})


@pytest.mark.parametrize(
    "text", ["books", "=2", "books=two", "books=-1", "books=nan", "books=120%", "books=0%"]
)
def test_a_malformed_weight_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="`weights` is given"):
        parse_weight(text)


def test_weights_are_parsed() -> None:
    assert parse_weight("a=b.txt=2") == ("a=b.txt", Weight(2.0))
    assert parse_weight("web=30%") == ("web", Weight(0.3, share=True))


def test_draws_are_uniform_and_independent_of_the_order() -> None:
    ids = [f"d{number}" for number in range(4000)]
    drawn = copies(1.25, ids, seed=0)
    assert set(drawn.tolist()) == {1, 2}
    assert abs((drawn == 2).mean() - 0.25) < 4 * (0.25 * 0.75 / 4000) ** 0.5
    keys = order_keys(ids, 0, 0)
    assert abs((keys < 2**63).mean() - 0.5) < 4 * 0.5 / 4000**0.5
    # Drawn documents must not be neighbours in the corpus.
    assert abs((keys[drawn == 2] < 2**63).mean() - 0.5) < 4 * 0.5 / 1000**0.5


VOCABULARY = st.sampled_from([*"abcdefg", "don't", "日本", "x_y", "É", ".", "\n\n"])
RANDOM_TEXT = st.lists(VOCABULARY, max_size=40).map(" ".join)


@given(st.lists(RANDOM_TEXT, max_size=5), st.lists(RANDOM_TEXT, min_size=1, max_size=6), st.data())
def test_every_document_that_decontamination_changes_is_a_suspect(
    tests: list[str], texts: list[str], data: st.DataObject
) -> None:
    if tests:  # most random texts match nothing
        texts = [
            *texts,
            f"a b {data.draw(st.sampled_from(tests))} c",
            f"f g\n\n{data.draw(st.sampled_from(tests))}",
        ]
    suspects = Suspects(tests)(texts)
    decontaminator = Decontaminator(tests)
    for text, suspect in zip(texts, suspects.tolist(), strict=True):
        _, removed = decontaminator.clean(Document(text, "s", "d"))
        assert suspect or not removed


def test_most_documents_are_no_suspects() -> None:
    generator = random.Random(0)
    texts = [sentence(generator, 50) + " one of the most common of all things" for _ in range(50)]
    tests = ["this is one of the most common of the questions which anybody could ask", TEST]
    assert Suspects(tests)([*texts, TEST]).tolist() == [False] * 50 + [True]


def test_test_texts_are_read_from_files(tmp_path: Path) -> None:
    table = tmp_path / "t.jsonl"
    table.write_text('{"question": "how many?", "answer": "7"}\n{"prompt": "p", "question": "q"}\n')
    assert read_test_texts(table) == ["how many?", "p"]
    lines = tmp_path / "t.txt"
    lines.write_text("one\n\n two\n")
    assert read_test_texts(lines) == ["one", "two"]
    table.write_text('{"answer": "7"}\n')
    with pytest.raises(UserError, match=r"row 1: no test text.*answer"):
        read_test_texts(table)
    lines.write_text("\n")
    with pytest.raises(UserError, match="holds no test text"):
        read_test_texts(lines)


def test_tallies_add_up_and_survive_json() -> None:
    first, second = Tally(), Tally()
    for tally, count in ((first, 2), (second, 3)):
        for number in range(count):
            tally.add_read("a", 10)
            tally.drop("rules", "short", "a", 10, {"id": f"{count}-{number}", "text": "", "detail": ""})
    first.add(Tally.from_json(json.loads(json.dumps(second.to_json()))))
    short = first.dropped["short"]
    assert (first.read["a"].documents, short.amount.bytes, first.lost["a"].documents) == (5, 50, 5)
    assert [example["id"] for example in first.dropped["short"].examples] == ["2-0", "2-1", "3-0"]


PROGRAM = """
import os, signal, sys
from tercet.curation import filtering, matching, shards, writing
from tercet.curation.pipeline import curate
filtering.PART_CHARACTERS = 2000
name, call = sys.argv[3], int(sys.argv[4])
if name:
    module = next(module for module in (shards, matching, writing) if hasattr(module, name))
    original, count = getattr(module, name), 0
    def counted(*arguments):
        global count
        count += 1
        if count == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments)
    setattr(module, name, counted)
curate(sys.argv[1], sys.argv[2], preset="none", processes=1, decontaminate={"t": [sys.argv[5]]}, shard_mb=0.005)
assert "torch" not in sys.modules
"""


def program(data: Path, out: Path, name: str = "", call: int = 0) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, str(data), str(out), name, str(call), TEST],
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize(
    ("name", "call"),
    [("write_hashes", 3), ("find_duplicates", 1), ("write_scattered", 4), ("write_shard", 2)],
)
def test_a_killed_run_resumes_with_the_same_result(
    tmp_path: Path, small_parts: None, name: str, call: int
) -> None:
    data = write_corpus(tmp_path)
    run(data, tmp_path / "whole", decontaminate={"t": [TEST]}, shard_mb=0.005)
    assert program(data, tmp_path / "killed", name, call).returncode == -signal.SIGKILL
    assert not (tmp_path / "killed" / "report.json").exists()
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed" / ".work").glob("*.read.json")}
    made = run(data, tmp_path / "killed", decontaminate={"t": [TEST]}, shard_mb=0.005)
    assert made.bytes_per_second is None  # the time of the first process is unknown
    assert done or name == "write_hashes"
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    assert report(tmp_path / "killed")["dropped"] == report(tmp_path / "whole")["dropped"]
    assert report(tmp_path / "killed")["skipped"] == {"empty": 1}
    assert not (tmp_path / "killed" / ".work").exists()


def test_finished_parts_are_not_repeated(
    tmp_path: Path, small_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_corpus(tmp_path)
    assert program(data, tmp_path / "out", "write_hashes", 5).returncode == -signal.SIGKILL
    written = []
    original = shards.write_part
    monkeypatch.setattr(
        shards, "write_part", lambda path, table: (written.append(path), original(path, table))
    )
    run(data, tmp_path / "out", decontaminate={"t": [TEST]}, shard_mb=0.005)
    assert written[0].name == "000000-000004.arrow"


def test_a_finished_run_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_corpus(tmp_path)
    first = run(data, tmp_path / "out")
    monkeypatch.setattr(filtering, "filter_part", None)
    assert run(data, tmp_path / "out") == first
    with pytest.raises(UserError, match="other data or settings"):
        run(data, tmp_path / "out", seed=1)


def test_a_full_disk_is_reported_in_one_line_and_loses_nothing(tmp_path: Path, small_parts: None) -> None:
    data = write_corpus(tmp_path)
    run(data, tmp_path / "whole", decontaminate={"t": [TEST]}, shard_mb=0.005)
    limited = f"""
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))
from tercet.errors import UserError
sys.argv = ["", {str(data)!r}, {str(tmp_path / "full")!r}, "", "0", {TEST!r}]
try:
    exec({PROGRAM!r})
except UserError as problem:
    assert "\\n" not in str(problem), problem
    sys.exit(str(problem))
"""
    done = subprocess.run([sys.executable, "-c", limited], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "cannot write" in done.stderr.splitlines()[-1]
    run(data, tmp_path / "full", decontaminate={"t": [TEST]}, shard_mb=0.005)
    assert files(tmp_path / "full") == files(tmp_path / "whole")


def test_workers_end_with_a_killed_parent(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys, time\n"
        "from tercet.curation.workers import open_workers\n"
        "def work(piece):\n"
        "    return os.getpid()\n"
        "if __name__ == '__main__':\n"
        "    with open_workers('local', 2) as workers:\n"
        "        print(*workers.map(work, range(4)), flush=True)\n"
        "        time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    workers = {int(number) for number in parent.stdout.readline().split()}
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert workers
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and any(alive(worker) for worker in workers):
        time.sleep(0.05)
    assert not any(alive(worker) for worker in workers)


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    # An orphan that nobody waits for stays a zombie.
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_user_error_in_a_worker_is_reported_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "fine"}\n{"text": \n')
    with pytest.raises(UserError, match=r"bad\.jsonl"):
        run(path, tmp_path / "out", processes=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "spark"}, "local, ray"),
        ({"processes": 0}, "`processes` is 0"),
        ({"bands": 0}, "`bands` is 0"),
        ({"shard_mb": 0}, "`shard_mb` is 0"),
        ({"seed": -1}, "`seed` is -1"),
        ({"weights": {"books": 2.0}}, "`weights` names 'books', which is no source"),
        ({"decontaminate": ["nowhere.jsonl"]}, "nowhere.jsonl"),
    ],
)
def test_a_user_error_is_one_line(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    data = write_corpus(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        run(data, tmp_path / "out", **options)
    assert "\n" not in str(error.value)


def test_missing_data_creates_no_directory(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no file or directory"):
        run(tmp_path / "nothing", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_corpus_of_which_most_is_unusable_stops_and_goes_on_when_that_is_allowed(tmp_path: Path) -> None:
    write_corpus(tmp_path / "data")
    (tmp_path / "data" / "zoo.jsonl").write_text('{"body": "x"}\n' * 4000)
    with pytest.raises(UserError, match="more than half of it can't be used"):
        run(str(tmp_path / "data"), tmp_path / "out")
    made = run(str(tmp_path / "data"), tmp_path / "out", allow_partial=True)
    assert made.skipped == {"empty": 1, "no text field": 4000} and made.documents_read == 65
