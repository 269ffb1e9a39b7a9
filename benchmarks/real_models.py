"""Tercet against llama.cpp on the same GGUF file of a real model, on the CPU.

    python benchmarks/real_models.py FILE.gguf ... --peer-python PYTHON [--rows decode,prefill,memory,start,greedy]

PYTHON is the interpreter of an environment with llama-cpp-python built for this machine (GGML_NATIVE); this script
runs in Tercet's. Each measurement is a process of its own; the sides alternate, so a machine that slows down affects
both equally. The table gives medians and the ratio of medians, the JSON lines below it every value. Nothing else
should be running.

decode, prefill   tokens a second: 512 tokens at once, then 100 one by one
memory            the peak resident memory of that process, mapped files included
start             seconds from the start of a process to the first token of an answer, second use
greedy            200 tokens for each of 20 prompts; where they part, the gap between Tercet's two best logits
"""

import argparse
import ctypes
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

PROMPT, NEW = 512, 100
GREEDY = 200
ROWS = ("decode", "prefill", "memory", "start", "greedy")
# For each row: the field of a side's result, the unit, whether more is better, and the ratio aimed for.
FIELDS = {
    "decode": ("decode", "tokens/s", True, 1.4),
    "prefill": ("prefill", "tokens/s", True, 2.5),
    "memory": ("peak_bytes", "bytes", False, 1.1),
    "start": ("start", "s", False, 0.7),
}
PROMPTS = (
    "The capital of France is", "Water boils at a temperature of", "def fibonacci(n):", "Once upon a time, there was",
    "The theory of evolution explains", "To make a good cup of coffee,", "In 1969, the first man",
    "The largest planet in the solar system", "A balanced diet should include", "import numpy as np\n",
    "The French Revolution began", "The heart pumps blood", "Photosynthesis is the process", "My favourite book is",
    "The stock market fell because", "How to learn a new language:", "The Great Wall of China", "Dear Sir or Madam,",
    "The main causes of climate change", "A prime number is a number",
)  # fmt: skip
CHAT = "What is the capital of France?"


def peak_bytes() -> int:
    """Return this process's peak memory; getrusage would include its parent's."""
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM:"))


def random_tokens(vocabulary: int, count: int) -> list[int]:
    tokens: list[int] = np.random.default_rng(1).integers(1000, vocabulary, count).tolist()
    return tokens


# The sides: each has `speed`, `greedy` and `first_token`


class Tercet:
    def __init__(self, path: str, threads: int) -> None:
        from tercet.engine.load import load_engine
        from tercet.model.reference import parse_reference
        from tercet.model.source import directory_of

        self.engine = load_engine(directory_of(parse_reference(path)), device="cpu", threads=threads)
        self.backend: Any = self.engine.backend
        self.vocabulary = self.backend.vocab_size

    def encode(self, text: str) -> list[int]:
        return list(self.engine.tokenizer.encode(text))

    def feed(self, tokens: list[int], start: int) -> np.ndarray:
        """Return the logits after the last token."""
        from tercet.engine.backend import Chunk

        pages = list(range((PROMPT + GREEDY) // self.backend.page_size + 3))
        size = self.backend.max_tokens
        for begin in range(0, len(tokens), size):
            part = tokens[begin : begin + size]
            outputs = [len(part) - 1] if begin + size >= len(tokens) else []
            logits = self.backend.feed([Chunk(0, part, start + begin, pages, outputs)])
        row: np.ndarray = logits[-1]
        return row

    def clear(self) -> None:
        self.backend.release(0)


class LlamaCpp:
    """llama.cpp's C interface, used as its llama-bench does."""

    def __init__(self, path: str, threads: int) -> None:
        import llama_cpp

        self.library = llama_cpp
        self._quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._quiet, None)
        llama_cpp.llama_backend_init()
        settings = llama_cpp.llama_model_default_params()
        settings.n_gpu_layers = 0
        if os.environ.get("LLAMA_EXTRA_BUFFERS") == "0":  # with them it can die where the processor has AMX
            settings.use_extra_bufts = False
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), settings)
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = 1024
        options.n_batch = 512
        options.n_threads = options.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, options)
        self.vocab = llama_cpp.llama_model_get_vocab(self.model)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(self.vocab)
        self.batch = llama_cpp.llama_batch_init(512, 0, 1)

    def encode(self, text: str) -> list[int]:
        data = text.encode()
        into = (self.library.llama_token * (len(data) + 8))()
        count = self.library.llama_tokenize(self.vocab, data, len(data), into, len(into), True, True)
        return list(into[:count])

    def feed(self, tokens: list[int], start: int) -> np.ndarray:
        batch = self.batch
        for at, token in enumerate(tokens):
            batch.token[at], batch.pos[at] = token, start + at
            batch.n_seq_id[at], batch.seq_id[at][0] = 1, 0
            batch.logits[at] = at == len(tokens) - 1
        batch.n_tokens = len(tokens)
        status = self.library.llama_decode(self.context, batch)
        assert status == 0, f"llama_decode: {status}"
        row = self.library.llama_get_logits_ith(self.context, len(tokens) - 1)
        return np.ctypeslib.as_array(
            ctypes.cast(row, ctypes.POINTER(ctypes.c_float)), (self.vocabulary,)
        ).copy()

    def clear(self) -> None:
        self.library.llama_memory_clear(self.library.llama_get_memory(self.context), True)


SIDES: dict[str, Any] = {"tercet": Tercet, "llama.cpp": LlamaCpp}


def speed(side: Any) -> dict[str, float]:
    """Measure after a warm-up of the same length."""
    tokens = random_tokens(side.vocabulary, PROMPT + NEW)
    for _ in range(2):
        side.clear()
        begun = time.perf_counter()
        side.feed(tokens[:PROMPT], 0)
        read = time.perf_counter()
        for place in range(NEW):
            side.feed([tokens[PROMPT + place]], PROMPT + place)
        done = time.perf_counter()
    return {"prefill": PROMPT / (read - begun), "decode": NEW / (done - read), "peak_bytes": peak_bytes()}


def greedy(side: Any) -> list[dict[str, Any]]:
    """Return for each prompt its tokens, the most probable continuation, and the gap at each token of it."""
    answers = []
    for prompt in PROMPTS:
        side.clear()
        tokens = side.encode(prompt)
        logits, new, gaps = side.feed(tokens, 0), list[int](), list[float]()
        for place in range(GREEDY):
            second, best = np.partition(logits, -2)[-2:]
            new.append(int(logits.argmax()))
            gaps.append(float(best - second))
            logits = side.feed([new[-1]], len(tokens) + place)
        answers.append({"prompt": tokens, "tokens": new, "gaps": gaps})
    return answers


FIRST_TOKEN = """
import sys, llama_cpp
model = llama_cpp.Llama(sys.argv[1], n_ctx=1024, n_threads=int(sys.argv[3]), verbose=False)
if model.metadata.get("tokenizer.chat_template"):
    model.create_chat_completion([{"role": "user", "content": sys.argv[2]}], max_tokens=1, temperature=0)
else:
    model.create_completion(sys.argv[2], max_tokens=1, temperature=0)
print("first token", flush=True)
"""


def start_seconds(name: str, path: str, peer: str, threads: int) -> float:
    """Return the seconds from the start of a process to its first output."""
    if name == "tercet":
        command = [
            sys.executable,
            "-m",
            "tercet",
            "prompt",
            path,
            CHAT,
            "--max-tokens",
            "1",
            "--temperature",
            "0",
        ]
    else:
        command = [peer, "-c", FIRST_TOKEN, path, CHAT, str(threads)]
    begun = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        seconds = time.perf_counter() - begun
        process.stdout.read()
    assert process.returncode == 0, f"{command} exited with {process.returncode}"
    return seconds


# The comparison


def measure(name: str, workload: str, path: str, peer: str, threads: int) -> Any:
    python = sys.executable if name == "tercet" else peer
    command = [python, __file__, path, "--side", name, "--workload", workload, "--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name}, {workload}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(path: str, rows: list[str], peer: str, threads: int, rounds: int) -> list[dict[str, Any]]:
    """Return the values of both sides, in alternation."""
    values: dict[str, dict[str, list[float]]] = {name: {} for name in SIDES}
    for number in range(rounds + 1):  # the first round compiles, caches and maps: it is not counted
        for name in SIDES:
            result: dict[str, float] = {}
            if {"decode", "prefill", "memory"} & set(rows):
                result |= measure(name, "speed", path, peer, threads)
            if "start" in rows:
                result["start"] = start_seconds(name, path, peer, threads)
            if number:
                for field, value in result.items():
                    values[name].setdefault(field, []).append(value)
    table = []
    for row in rows:
        if row in FIELDS:
            field, unit, more, goal = FIELDS[row]
            medians = {name: statistics.median(values[name][field]) for name in SIDES}
            ratio = medians["tercet"] / medians["llama.cpp"]
            every = {name: values[name][field] for name in SIDES}
            table.append(
                {
                    "row": row,
                    "unit": unit,
                    **medians,
                    "ratio": ratio,
                    "goal": goal,
                    "more": more,
                    "values": every,
                }
            )
    return table


def compare_greedy(path: str, peer: str, threads: int) -> dict[str, Any]:
    """Return how many continuations are equal, and the gaps where others part."""
    ours, theirs = (measure(name, "greedy", path, peer, threads) for name in SIDES)
    equal, gaps, same_prompts = 0, [], 0
    for mine, other in zip(ours, theirs, strict=True):
        same_prompts += mine["prompt"] == other["prompt"]
        parts = [place for place in range(GREEDY) if mine["tokens"][place] != other["tokens"][place]]
        if not parts:
            equal += 1
        else:
            gaps.append(
                {"token": parts[0], "tercet": mine["gaps"][parts[0]], "llama.cpp": other["gaps"][parts[0]]}
            )
    return {
        "row": "greedy",
        "prompts": len(PROMPTS),
        "same_prompt_tokens": same_prompts,
        "equal": equal,
        "gaps": gaps,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+")
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--side", choices=SIDES)
    parser.add_argument("--workload", choices=("speed", "greedy"))
    options = parser.parse_args()
    if options.side:
        side = SIDES[options.side](options.files[0], options.threads)
        print(json.dumps(speed(side) if options.workload == "speed" else greedy(side)))
        return
    rows = options.rows.split(",")
    code = "import importlib.metadata as m; print(m.version('llama-cpp-python'))"
    peer = subprocess.run([options.peer_python, "-c", code], capture_output=True, text=True, check=True)
    processor = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    print(
        f"{datetime.date.today()}, {processor}, {options.threads} threads, Tercet "
        f"{importlib.metadata.version('tercet')}, llama-cpp-python {peer.stdout.strip()}, {' '.join(sys.argv)}\n"
    )
    for path in options.files:
        table = compare(path, rows, options.peer_python, options.threads, options.rounds)
        print(f"| {Path(path).name} | Tercet | llama.cpp | ratio | goal |\n|---|---|---|---|---|")
        for row in table:
            bound = "at least" if row["more"] else "at most"
            tercet, other = row["tercet"], row["llama.cpp"]
            print(
                f"| {row['row']}, {row['unit']} | {tercet:,.4g} | {other:,.4g} | {row['ratio']:.2f} "
                f"| {bound} {row['goal']} |"
            )
        results: list[dict[str, Any]] = list(table)
        if "greedy" in rows:
            result = compare_greedy(path, options.peer_python, options.threads)
            results.append(result)
            worst = max((min(gap["tercet"], gap["llama.cpp"]) for gap in result["gaps"]), default=0.0)
            print(
                f"| greedy, {GREEDY} tokens | {result['equal']} of {result['prompts']} equal | | | "
                f"gap where they part: {worst:.3f} |"
            )
        print()
        for entry in results:
            print(json.dumps({"file": Path(path).name, **entry}))
        print()


if __name__ == "__main__":
    main()
