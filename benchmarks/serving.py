"""The server under load, and compared with llama_cpp.server and `transformers serve` on the same weights.

    python benchmarks/serving.py soak MODEL [--clients 64] [--minutes 5]
    python benchmarks/serving.py compare MODEL --gguf FILE [--llama PYTHON] [--transformers PYTHON]
                                 [--clients 16] [--seconds 60] [--rounds 2]
    python benchmarks/serving.py shape OUT --tokenizer DIR     a checkpoint of SmolLM2-135M's shape, random weights

soak: clients that send requests in sequence: short and long prompts and answers, streamed and whole, some
with a client that disconnects early, some invalid. Every status must be the expected one, and the server's
memory must not grow.

compare: the same streamed chat requests to each server in turn, each with its defaults for concurrent clients
(llama_cpp.server answers one request at a time; transformers serve with --continuous-batching). Tokens per
second are the streamed pieces of all clients, or the usage that the server reports; the time to the first
token is measured at the client. PYTHON has llama-cpp-python[server], or transformers[serving], installed;
llama_cpp.server runs the Q8_0 file that `tercet export` writes, Tercet its int8.

Nothing else should be running. Clients and server share the machine's cores.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WORDS = (
    "the",
    "a",
    "little",
    "bird",
    "sat",
    "in",
    "tree",
    "and",
    "sang",
    "while",
    "it",
    "rained",
    "on",
    "old",
)
HOST = "127.0.0.1"
START_SECONDS = 180


def words(rng: random.Random, count: int) -> str:
    return " ".join(rng.choices(WORDS, k=count))


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        return int(listener.getsockname()[1])


def resident(process: subprocess.Popen[bytes]) -> int:
    """Return the bytes of the process and its children in memory."""
    total = 0
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            status = (directory / "status").read_text()
        except OSError:
            continue
        fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
        if process.pid in (int(fields["Pid"]), int(fields["PPid"])):
            total += int(fields.get("VmRSS", "0").split()[0]) * 1024
    return total


# A minimal client, because it shares the cores with the server


@dataclass
class Answer:
    status: int = 0
    pieces: int = 0
    tokens: int | None = None  # as counted by the server
    first: float | None = None  # seconds to the first piece
    seconds: float = 0.0


async def lines(reader: asyncio.StreamReader, chunked: bool) -> AsyncIterator[bytes]:
    """Yield the lines of a body."""
    rest = b""
    while True:
        if chunked:
            size = int((await reader.readline()).split(b";")[0] or b"0", 16)
            data = (await reader.readexactly(size + 2))[:size] if size else b""
        else:
            data = await reader.read(1 << 16)
        if not data:
            break
        *whole, rest = (rest + data).split(b"\n")
        for line in whole:
            yield line
    if rest:
        yield rest


async def ask(port: int, path: str, body: dict[str, Any], hang_up_after: int | None = None) -> Answer:
    """Send a request; close the connection after ``hang_up_after`` pieces."""
    begun = time.perf_counter()
    answer = Answer()
    reader, writer = await asyncio.open_connection(HOST, port)
    try:
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: {HOST}:{port}\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(data)}\r\nConnection: close\r\n\r\n".encode() + data)
        answer.status = int((await reader.readline()).split()[1])
        chunked = False
        while (line := await reader.readline()) not in (b"\r\n", b""):
            chunked = chunked or line.lower().startswith(b"transfer-encoding: chunked")
        async for line in lines(reader, chunked):
            if body.get("stream"):
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line[6:])
                if (usage := event.get("usage")) is not None:
                    answer.tokens = usage["completion_tokens"]
                if any((choice.get("delta") or {}).get("content") for choice in event.get("choices", [])):
                    answer.pieces += 1
                    answer.first = answer.first or time.perf_counter() - begun
                if hang_up_after is not None and answer.pieces >= hang_up_after:
                    break
            elif line.strip().startswith(b"{"):
                answer.tokens = (json.loads(line).get("usage") or {}).get("completion_tokens")
    finally:
        writer.close()
    answer.seconds = time.perf_counter() - begun
    return answer


# Servers


@dataclass
class Server:
    """A server's process, which runs until the block ends."""

    name: str
    command: list[str]
    port: int
    model: str
    health: str
    process: subprocess.Popen[bytes] = field(init=False)

    def __enter__(self) -> Server:
        self.log = tempfile.TemporaryFile()
        self.process = subprocess.Popen(self.command, stdout=self.log, stderr=subprocess.STDOUT)
        begun = time.monotonic()
        while True:
            try:
                urllib.request.urlopen(f"http://{HOST}:{self.port}{self.health}", timeout=2).read()
                return self
            except OSError:
                if self.process.poll() is not None or time.monotonic() - begun > START_SECONDS:
                    self.process.kill()
                    raise SystemExit(f"{self.name} did not start: {self.output()}") from None
                time.sleep(0.3)

    def output(self) -> str:
        """Return the end of the server's output."""
        self.log.seek(0)
        return self.log.read().decode(errors="replace")[-2000:]

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()


def tercet(model: str, *options: str) -> Server:
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "tercet",
        "serve",
        f"bench={model}",
        "--port",
        str(port),
        "--no-page",
        *options,
    ]
    return Server("Tercet", command, port, "bench", "/health")


def llama(python: str, gguf: str) -> Server:
    port = free_port()
    command = [python, "-m", "llama_cpp.server", "--model", gguf, "--host", HOST, "--port", str(port)]
    command += ["--n_ctx", "2048", "--n_threads", "2", "--n_threads_batch", "2", "--verbose", "false"]
    # By default a new request interrupts the running one, so no concurrent client would get an answer.
    command += ["--model_alias", "bench", "--interrupt_requests", "false"]
    return Server("llama_cpp.server", command, port, "bench", "/v1/models")


def transformers(python: str, model: str) -> Server:
    port = free_port()
    program = str(Path(python).parent / "transformers")
    command = [
        program,
        "serve",
        "--host",
        HOST,
        "--port",
        str(port),
        "--device",
        "cpu",
        "--continuous-batching",
    ]
    return Server("transformers serve", command, port, str(Path(model).resolve()), "/v1/models")


# Requests


def question(rng: random.Random, model: str, stream: bool = True) -> dict[str, Any]:
    """Return a request with 20 to 300 words for an answer of 16 to 96 tokens."""
    return {
        "model": model,
        "messages": [{"role": "user", "content": words(rng, rng.choice([20, 60, 120, 300]))}],
        "max_tokens": rng.choice([16, 32, 64, 96]),
        "temperature": 0.8,
        "stream": stream,
    }


WRONG: list[tuple[dict[str, Any], int]] = [
    ({"model": "nobody"}, 404),
    ({"temperature": 9}, 400),
    ({"messages": []}, 400),
    ({"frequency": 1}, 400),
    ({"max_tokens": "many"}, 400),
    ({"messages": [{"role": "user", "content": "a " * 40_000}]}, 400),
]


async def soak_client(
    server: Server, number: int, until: float, counts: Counter[str], answers: list[Answer]
) -> None:
    rng = random.Random(number)
    while time.monotonic() < until:
        body = question(rng, server.model, stream=rng.random() < 0.7)
        kind = rng.random()
        if kind < 0.1:
            change, meant = rng.choice(WRONG)
            answer = await ask(server.port, "/v1/chat/completions", {**body, **change, "stream": False})
            counts["wrong, refused as meant" if answer.status == meant else f"WRONG got {answer.status}"] += 1
        elif kind < 0.25 and body["stream"]:
            answer = await ask(server.port, "/v1/chat/completions", body, hang_up_after=rng.randint(1, 8))
            counts["hung up" if answer.status in (200, 429) else f"HUNG UP got {answer.status}"] += 1
        else:
            answer = await ask(server.port, "/v1/chat/completions", body)
            counts["answered" if answer.status == 200 else f"status {answer.status}"] += 1
            if answer.status == 200:
                answers.append(answer)
            else:
                await asyncio.sleep(1)


async def soak(server: Server, clients: int, minutes: float) -> None:
    counts: Counter[str] = Counter()
    answers: list[Answer] = []
    memory: list[float] = []
    begun = time.monotonic()
    until = begun + 60 * minutes

    async def watch() -> None:
        while time.monotonic() < until:
            memory.append(resident(server.process) / 1e6)
            await asyncio.sleep(10)

    await asyncio.gather(watch(), *(soak_client(server, n, until, counts, answers) for n in range(clients)))
    memory.append(resident(server.process) / 1e6)
    first = [answer.first for answer in answers if answer.first is not None]
    print(f"{clients} clients, {minutes:g} minutes: {dict(counts)}")
    print(
        f"tokens/s {sum(answer.tokens or answer.pieces for answer in answers) / (time.monotonic() - begun):,.0f}"
    )
    print(f"time to first token: median {statistics.median(first):.2f} s, p95 {quantile(first, 0.95):.2f} s")
    print(f"memory, MB, every 10 s: {', '.join(f'{size:.0f}' for size in memory)}")


def quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


async def measured(server: Server, clients: int, seconds: float) -> tuple[float, float, float]:
    """Return tokens per second of all clients, and median and 95th percentile of the time to the first token."""
    first: list[float] = []
    tokens = 0

    async def client(number: int) -> None:
        nonlocal tokens
        rng = random.Random(number)
        while time.monotonic() < until:
            answer = await ask(server.port, "/v1/chat/completions", question(rng, server.model))
            if answer.status != 200:
                raise SystemExit(f"{server.name} answered {answer.status}")
            tokens += answer.tokens or answer.pieces
            if answer.first is not None:
                first.append(answer.first)

    await ask(
        server.port, "/v1/chat/completions", question(random.Random(0), server.model)
    )  # loads and compiles
    begun = time.monotonic()
    until = begun + seconds
    await asyncio.gather(*(client(number) for number in range(clients)))
    return tokens / (time.monotonic() - begun), statistics.median(first), quantile(first, 0.95)


def compare(arguments: argparse.Namespace) -> None:
    sides = {"Tercet": lambda: tercet(arguments.model)}
    if arguments.llama:
        sides["llama_cpp.server"] = lambda: llama(arguments.llama, arguments.gguf)
    if arguments.transformers:
        sides["transformers serve"] = lambda: transformers(arguments.transformers, arguments.model)
    results: dict[str, list[tuple[float, float, float]]] = {name: [] for name in sides}
    for _ in range(arguments.rounds):
        for name, make in sides.items():
            with make() as server:
                try:
                    results[name].append(asyncio.run(measured(server, arguments.clients, arguments.seconds)))
                except OSError as problem:
                    raise SystemExit(f"{name}: {problem}; its output: {server.output()}") from problem
            print(
                f"  {name}: %.0f tokens/s, first token %.2f s, p95 %.2f s" % results[name][-1],
                file=sys.stderr,
            )
    print("| server | tokens/s | Tercet over it | first token, median | p95 | it over Tercet |")
    print("|---|---|---|---|---|---|")
    middle = {
        name: [statistics.median(column) for column in zip(*rows, strict=True)]
        for name, rows in results.items()
    }
    pace, _, wait = middle["Tercet"]
    for name, (speed, median, p95) in middle.items():
        print(
            f"| {name} | {speed:,.0f} | {pace / speed:.2f} | {median:.2f} s | {p95:.2f} s | {p95 / wait:.2f} |"
        )


def write_shape(out: Path, tokenizer: Path) -> None:
    import shutil

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=2048,
        rope_theta=100_000.0,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(out)
    for file in tokenizer.iterdir():
        if file.suffix in (".json", ".jinja", ".txt") and file.name != "config.json":
            shutil.copy(file, out)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = parser.add_subparsers(dest="kind", required=True)
    soaks = kinds.add_parser("soak")
    soaks.add_argument("model")
    soaks.add_argument("--clients", type=int, default=64)
    soaks.add_argument("--minutes", type=float, default=5)
    comparisons = kinds.add_parser("compare")
    comparisons.add_argument("model")
    comparisons.add_argument("--gguf")
    comparisons.add_argument("--llama")
    comparisons.add_argument("--transformers")
    comparisons.add_argument("--clients", type=int, default=16)
    comparisons.add_argument("--seconds", type=float, default=60)
    comparisons.add_argument("--rounds", type=int, default=2)
    shapes = kinds.add_parser("shape")
    shapes.add_argument("out", type=Path)
    shapes.add_argument("--tokenizer", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.kind == "soak":
        with tercet(arguments.model) as server:
            asyncio.run(soak(server, arguments.clients, arguments.minutes))
    elif arguments.kind == "shape":
        write_shape(arguments.out, arguments.tokenizer)
    else:
        compare(arguments)


if __name__ == "__main__":
    main()
