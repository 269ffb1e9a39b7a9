"""Turn raw text into a corpus: read, filter, mask, remove copies and test texts, mix, shuffle, write.

`curate` runs the stages (`filtering`, `matching`, `writing`) one after the other. Each writes whole files and
markers below ``OUT/.work``, so the same command resumes a killed one; the directory is deleted when
``OUT/data`` and the report are complete.
"""

from __future__ import annotations

import math
import shutil
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tercet.curation import filtering, matching, writing
from tercet.curation.contamination import read_test_texts
from tercet.curation.dedup import MinHash
from tercet.curation.filtering import Group
from tercet.curation.report import Account, account, write_report
from tercet.curation.settings import CurateSettings
from tercet.curation.weights import Weight
from tercet.curation.work import StageSettings, Work
from tercet.curation.workers import Workers, open_workers
from tercet.data.byte_streams import PACKED
from tercet.data.document import Document
from tercet.data.documents import read_documents, source_fingerprint
from tercet.errors import UserError
from tercet.files import fingerprint, read_json, write_json
from tercet.host import available_cores
from tercet.progress import Progress, say
from tercet.run_directory import open_run
from tercet.settings import keyword_form

_FORMAT = 1  # of the files of the stages: a run with another format cannot be resumed


@dataclass(frozen=True)
class Curated:
    """The result of a curation. Sizes in bytes are of UTF-8 text."""

    data: str  # the directory of the shards
    report: str  # the path of the page
    shards: int
    documents: int  # written
    bytes: int  # written
    documents_read: int
    bytes_read: int
    dropped: dict[str, int]  # documents by reason
    skipped: dict[str, int]  # rows that could not be read as documents, by reason
    seconds: float  # of the process that finished the work
    bytes_per_second: float | None  # of text read; None after a resumed run


def curate_with(requested: CurateSettings) -> Curated:
    """Curate raw text into parquet shards ``out/data`` and a report. The same call resumes an interrupted run.

    The parameters are the fields of `CurateSettings`. The output is the same for any number of processes and
    on either engine.

    - ``data`` is what `tercet.data.documents.read_documents` takes.
    - ``preset``, ``languages`` and ``rules`` decide which rules drop documents (`tercet.curation.filters.Rules`).
    - Exact copies, which differ in white space only, are always removed; the first in the order of ``data``
      stays. With ``near_duplicates`` MinHash removes near-copies too.
    - ``decontaminate`` holds test texts by the name of their set, or files of them (`read_test_texts`).
    - ``weights`` are by the name of a source in ``data``: a factor, or a `Weight` that is a share.
    - With ``engine="ray"``, ``data`` and ``out`` must be at the same paths on all machines.

    Returns:
        The paths of corpus and report, and what was read, dropped and written.

    Raises:
        UserError: wrong settings, unreadable data, a full disk, or ``out`` holds something else.
    """
    names = requested.sources
    out = Path(requested.out)
    processes = available_cores() if requested.processes is None else requested.processes
    tests = _test_texts(requested.decontaminate)
    settings = StageSettings(
        preset=requested.preset,
        languages=None if requested.languages is None else tuple(requested.languages),
        rules=tuple(sorted((requested.rules or {}).items())),
        mask_personal_data=requested.mask_personal_data,
        minhash=MinHash(requested.bands, requested.rows, seed=requested.seed)
        if requested.near_duplicates
        else None,
        tests=fingerprint(tests) if tests else None,
        weights=_checked_weights(requested.weights or {}, names),
        seed=requested.seed,
        shard_bytes=max(1, round(requested.shard_mb * 1e6)),
        allow_partial=requested.allow_partial,
    )
    # Report mistakes in the rules and missing paths before anything is written.
    filtering.rules_of(settings)
    read_documents(names)
    config = {
        "data": names,
        **asdict(settings),
        "test_texts": {name: len(texts) for name, texts in tests.items()},
    }
    # A run that stopped because of unusable files goes on when they are allowed.
    identity = {name: value for name, value in config.items() if name != "allow_partial"}
    key = fingerprint([_FORMAT, source_fingerprint(names), identity])
    with open_run(out, "curate", key, _plain(config)):
        finished = _finished(out)
        if finished is not None:
            say(f"{out} holds this corpus already")
            return finished
        say(f"writing to {out}; the same command resumes an interrupted run")
        return _run(out, Work(out / ".work", settings), names, tests, processes, requested.engine)


curate = keyword_form(CurateSettings, curate_with, "curate")


def _run(
    out: Path, work: Work, data: list[str], tests: dict[str, Sequence[str]], processes: int, engine: str
) -> Curated:
    """Run the stages that are not finished yet, write the report and delete the working directory."""
    started = time.monotonic()
    resumed = work.directory.is_dir()
    if tests:
        write_json(work.path("tests.json"), tests)
    seconds: dict[str, float] = {}

    def timed(stage: str, action: Callable[[], Any]) -> Any:
        begun = time.monotonic()
        result = action()
        seconds[stage] = round(time.monotonic() - begun, 3)
        return result

    with open_workers(engine, processes) as workers:
        timed("read and filter", lambda: _read(work, data, workers))
        timed("duplicates", lambda: matching.find_duplicates(work))
        count = read_json(work.path("plan.json"))["shards"]
        timed("decontaminate and mix", lambda: _scatter(work, workers))
        timed("write", lambda: _write(work, out / "data", count, workers))
    result = account(
        work, out / "data", data, tests, seconds=time.monotonic() - started, stages=seconds, resumed=resumed
    )
    write_report(result, out)
    shutil.rmtree(work.directory, ignore_errors=True)
    return _curated(result, out)


def _read(work: Work, data: Sequence[str], workers: Workers) -> None:
    groups = [
        group
        for group in (Group(number, (source,)) for number, source in enumerate(data))
        if not filtering.group_is_done(work, group)
    ]
    with Progress("reading and filtering", _expected_bytes(data) / 1e6, "MB") as bar:
        if workers.remote:
            sizes: Iterator[int] = workers.map(partial(filtering.filter_group, work), groups)
        else:
            sizes = _read_here(work, groups, workers)
        for size in sizes:
            bar.total = max(bar.total, (bar.completed + size / 1e6) * 1.01)
            bar.advance(size / 1e6)


def _read_here(work: Work, groups: Iterable[Group], workers: Workers) -> Iterator[int]:
    """Read in this process and filter in the workers, so that a single large file keeps all workers busy."""
    # Groups that were read to their end, while some of their parts are still being filtered.
    read: deque[tuple[Group, int, Counter[str]]] = deque()
    done: Counter[int] = Counter()
    order: deque[int] = deque()

    def parts() -> Iterator[tuple[str, list[Document]]]:
        for group in groups:
            skipped: Counter[str] = Counter()
            number = -1
            read_group = read_documents(group.sources, skipped, allow_partial=work.settings.allow_partial)
            for number, documents in enumerate(filtering.batches(read_group)):
                order.append(group.number)
                done_already = filtering.part_is_read(work, group.part(number))
                yield group.part(number), [] if done_already else documents
            read.append((group, number + 1, skipped))

    def finish() -> None:
        while read and done[read[0][0].number] == read[0][1]:
            group, count, skipped = read.popleft()
            filtering.finish_group(work, group, count, skipped)

    for size in workers.map(partial(filtering.filter_batch, work), parts()):
        done[order.popleft()] += 1
        finish()
        yield size
    finish()


def _scatter(work: Work, workers: Workers) -> None:
    pieces = writing.scatter_pieces(work)
    with Progress("removing copies", len(work.parts()), "parts") as bar:
        for _ in workers.map(partial(writing.scatter_part, work), pieces):
            bar.advance()


def _write(work: Work, directory: Path, count: int, workers: Workers) -> None:
    with Progress("writing shards", count, "shards") as bar:
        for _ in workers.map(partial(writing.write_shard, work, directory, count), range(count)):
            bar.advance()


def _test_texts(tests: Mapping[str, Sequence[str]] | Sequence[str | Path]) -> dict[str, Sequence[str]]:
    """Return the test texts by the name of their set; files of them are read."""
    if isinstance(tests, Mapping):
        return {name: list(texts) for name, texts in tests.items()}
    if isinstance(tests, str | Path):
        tests = [tests]
    return {str(path): read_test_texts(path) for path in tests}


def _checked_weights(
    weights: Mapping[str, Weight | float], data: Sequence[str]
) -> tuple[tuple[str, Weight], ...]:
    checked = []
    for source, weight in weights.items():
        # The built-in corpus names its own sources, which are only known once it is read.
        if source not in data and not any(name.startswith("builtin:") for name in data):
            raise UserError(
                f"`weights` names {source!r}, which is no source; the sources are {', '.join(data)}"
            )
        weight = weight if isinstance(weight, Weight) else Weight(float(weight))
        if not math.isfinite(weight.value) or weight.value < 0:
            raise UserError(f"`weights` gives {source!r} the factor {weight.value}; it must be 0 or more")
        checked.append((source, weight))
    return tuple(sorted(checked, key=lambda pair: pair[0]))


def _expected_bytes(data: Iterable[str]) -> float:
    """Estimate the bytes of text for the progress bar; compressed text is about a third of its size."""
    total = 0.0
    for source in data:
        path = Path(source)
        files = [path] if path.is_file() else path.rglob("*") if path.is_dir() else []
        for file in files:
            compressed = file.suffix.lower() in (*PACKED, ".zip", ".parquet")
            total += (3 if compressed else 1) * (file.stat().st_size if file.is_file() else 0)
    return total


def _plain(value: Any) -> Any:
    """Turn tuples into lists, since YAML has no tuples."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def _finished(out: Path) -> Curated | None:
    """Return the result of a finished run, or None if some of its files are missing."""
    if not (out / "report.json").is_file() or not (out / "report.html").is_file():
        return None
    result: Account = read_json(out / "report.json")
    whole = all((out / "data" / shard["file"]).is_file() for shard in result["shards"])
    return _curated(result, out) if whole else None


def _curated(result: Account, out: Path) -> Curated:
    return Curated(
        data=str(out / "data"),
        report=str(out / "report.html"),
        shards=len(result["shards"]),
        documents=result["written"]["documents"],
        bytes=result["written"]["bytes"],
        documents_read=result["read"]["documents"],
        bytes_read=result["read"]["bytes"],
        dropped={row["reason"]: row["documents"] for row in result["dropped"]},
        skipped=result["skipped"],
        seconds=result["seconds"],
        bytes_per_second=result["bytes_per_second"],
    )
