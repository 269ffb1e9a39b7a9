"""Curation compared with datatrove's pipeline: text per second and peak memory of the whole command.

    python benchmarks/curation.py articles.jsonl.gz [--peer-python VENV/bin/python] [--growth 0.5 1 2]

Both read the same files (jsonl, one per process), apply the rules of Gopher, C4 and FineWeb, remove
near-duplicates (14 bands of 8 over word 5-grams) and write the rest, each with two processes. Time and memory
are those of the whole command including its start. Memory is the peak of the command and its processes
together, with shared pages counted once. Tercet also removes exact duplicates, shuffles, and writes a report.
The peer needs: pip install "datatrove[processing]" spacy.

--growth: gigabytes of text. The articles are repeated, in each round with every fourth word replaced by
another of the same article, so that no 5-gram is repeated.
"""

import argparse
import gzip
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

BANDS, ROWS = 14, 8


def documents(path: Path) -> Iterator[dict[str, str]]:
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as lines:
        for line in lines:
            yield json.loads(line)


def changed(text: str, round_number: int) -> str:
    """Replace every fourth word by another word of the text."""
    words = re.split(r"(\s+)", text)  # white space at odd indices
    places = range((2 * round_number) % 8, len(words), 8)
    return "".join(
        words[(place * 7 + 26 * round_number) % len(words) // 2 * 2] if place in places else word
        for place, word in enumerate(words)
    )


def write_input(source: Path, directory: Path, size: float, files: int) -> int:
    """Write about ``size`` bytes of text to ``files`` files, or all text once if infinite; return the bytes."""
    directory.mkdir(parents=True)
    total = 0
    outputs = [(directory / f"{number}.jsonl").open("w", encoding="utf-8") for number in range(files)]
    for round_number in itertools.count():
        for number, row in enumerate(documents(source)):
            text = changed(row["text"], round_number) if round_number else row["text"]
            outputs[number % files].write(json.dumps({"text": text, "id": f"{round_number}-{number}"}) + "\n")
            total += len(text.encode())
            if total >= size:
                break
        if total >= size or size == float("inf"):
            break
    for output in outputs:
        output.close()
    return total


def memory_of(root: int) -> int:
    """Return the bytes of a process and its descendants in memory (proportional set size)."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            children.setdefault(parent, []).append(int(entry.name))
    waiting, total = [root], 0
    while waiting:
        process = waiting.pop()
        waiting += children.get(process, [])
        try:
            match = re.search(r"^Pss:\s+(\d+) kB", Path(f"/proc/{process}/smaps_rollup").read_text(), re.M)
        except OSError:
            continue
        total += int(match[1]) * 1024 if match else 0
    return total


def measured(command: list[str]) -> tuple[float, int, str]:
    """Return the seconds, peak bytes and output of a command."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"}
    begun = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    peak = 0

    def watch() -> None:
        nonlocal peak
        while process.poll() is None:
            peak = max(peak, memory_of(process.pid))
            time.sleep(0.25)

    watcher = threading.Thread(target=watch)
    watcher.start()
    output, errors = process.communicate()
    seconds = time.perf_counter() - begun
    watcher.join()
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{errors[-3000:]}")
    return seconds, peak, output.strip()


def ours(data: Path, out: Path, processes: int, preset: str) -> tuple[float, int, int]:
    """Return seconds, peak bytes and the number of written documents."""
    command = [sys.executable, "-m", "tercet", "curate", "--data", str(data), "--out", str(out)]
    command += ["--rules", preset, "--processes", str(processes), "--json"]
    seconds, memory, output = measured(command)
    stages = json.loads((out / "report.json").read_text())["stages"]
    print("  stages:", ", ".join(f"{name} {took:.1f} s" for name, took in stages.items()), file=sys.stderr)
    return seconds, memory, json.loads(output)["documents"]


def peer(data: Path, out: Path, processes: int) -> None:
    """Run datatrove's pipeline; this function runs under the peer's Python."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.dedup import MinhashDedupCluster, MinhashDedupFilter, MinhashDedupSignature
    from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupBuckets
    from datatrove.pipeline.filters import (
        C4QualityFilter,
        FineWebQualityFilter,
        GopherQualityFilter,
        GopherRepetitionFilter,
    )
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.writers.jsonl import JsonlWriter

    config = MinhashConfig(n_grams=5, num_buckets=BANDS, hashes_per_bucket=ROWS)

    def run(name: str, pipeline: list[object], tasks: int) -> None:
        LocalPipelineExecutor(
            pipeline=pipeline, tasks=tasks, workers=processes, logging_dir=str(out / "logs" / name)
        ).run()

    filtered, signatures = str(out / "kept"), str(out / "signatures")
    run(
        "filters",
        [
            JsonlReader(str(data)),
            GopherRepetitionFilter(),
            GopherQualityFilter(),
            C4QualityFilter(filter_no_terminal_punct=False),  # as FineWeb uses it
            FineWebQualityFilter(),
            JsonlWriter(filtered),
        ],
        processes,
    )
    run("signatures", [JsonlReader(filtered), MinhashDedupSignature(signatures, config=config)], processes)
    run("buckets", [MinhashDedupBuckets(signatures, str(out / "buckets"), config=config)], BANDS)
    run("cluster", [MinhashDedupCluster(str(out / "buckets"), str(out / "remove"), config=config)], 1)
    run(
        "last",
        [JsonlReader(filtered), MinhashDedupFilter(str(out / "remove")), JsonlWriter(str(out / "data"))],
        processes,
    )
    print(sum(gzip.decompress(path.read_bytes()).count(b"\n") for path in (out / "data").iterdir()))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="jsonl or jsonl.gz with a field text")
    parser.add_argument("--peer-python", type=Path, help="a Python that has datatrove")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rules", default="web", help="preset of tercet's rules")
    parser.add_argument("--mb", type=float, default=float("inf"), help="use only so much of the text")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--growth", type=float, nargs="*", default=[], metavar="GB")
    parser.add_argument("--scratch", type=Path, help="where temporary files go")
    parser.add_argument("--as-peer", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.as_peer:
        peer(arguments.data, arguments.as_peer, arguments.processes)
        return
    compare(arguments)


def compare(arguments: argparse.Namespace) -> None:
    processes = arguments.processes
    print(f"tercet {version('tercet')}, rensa {version('rensa')}, {processes} processes")
    print("| | text | seconds | MB/s | peak memory | documents kept |\n|---|---|---|---|---|---|")

    def row(name: str, size: int, result: tuple[float, int, int]) -> float:
        seconds, memory, count = result
        rate = size / seconds / 1e6
        print(
            f"| {name} | {size / 1e6:,.0f} MB | {seconds:.1f} | {rate:.2f} | {memory / 1e6:,.0f} MB | {count:,} |",
            flush=True,
        )
        return rate

    with tempfile.TemporaryDirectory(dir=arguments.scratch) as directory:
        scratch = Path(directory)
        size = write_input(arguments.data, scratch / "input", arguments.mb * 1e6, processes)
        rates: list[list[float]] = [[], []]
        for number in range(arguments.rounds):
            result = ours(scratch / "input", scratch / f"ours{number}", processes, arguments.rules)
            rates[0].append(row("tercet", size, result))
            if arguments.peer_python:
                out = scratch / f"peer{number}"
                command = [
                    str(arguments.peer_python),
                    __file__,
                    str(scratch / "input"),
                    "--as-peer",
                    str(out),
                ]
                seconds, memory, output = measured([*command, "--processes", str(processes)])
                rates[1].append(row("datatrove", size, (seconds, memory, int(output.split()[-1]))))
        if rates[1]:
            print(f"\nbest of each: {max(rates[0]) / max(rates[1]):.1f} times datatrove")
        for gigabytes in arguments.growth:
            size = write_input(arguments.data, scratch / f"input{gigabytes}", gigabytes * 1e9, processes)
            result = ours(
                scratch / f"input{gigabytes}", scratch / f"out{gigabytes}", processes, arguments.rules
            )
            row(f"tercet, {gigabytes:g} GB", size, result)


if __name__ == "__main__":
    main()
