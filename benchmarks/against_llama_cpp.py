"""Tercet against llama.cpp and transformers: the same random weights of a published shape, on the CPU.

    python benchmarks/against_llama_cpp.py --shape smollm2-135m [--rows decode,prefill,batch,memory,transformers]

Needs `pip install llama-cpp-python gguf` beside Tercet's development install. Random weights are as fast
as trained ones. Each measurement runs in a separate process, and the two sides alternate, so a machine that
slows down affects both equally. The table gives medians and the ratio of medians, the JSON lines below it
every value. Nothing else should be running. `--shape tiny` is for testing the script: it also checks that
llama.cpp computes with the converted weights what transformers computes with the originals.
"""

import argparse
import ctypes
import datetime
import importlib.metadata
import json
import math
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

PROMPT, NEW = 512, 100  # a single sequence: prefill, then decoding at positions 512 to 611
BATCH, BATCH_PROMPT, BATCH_NEW = 8, 128, 64  # a batch of sequences
# Tercet's form of the weights, and the GGUF type of the same size.
PAIRS = {"none": "F16", "bf16": "F16", "int8": "Q8_0", "int4": "Q4_0"}
ROWS = ("decode", "prefill", "batch", "memory", "transformers")
# For each row of the table: its workload, the field of the result, the unit, and whether more is better.
FIELDS = {
    "decode": ("single", "decode", "tokens/s", True),
    "prefill": ("single", "prefill", "tokens/s", True),
    "memory": ("single", "peak_bytes", "bytes", False),
    "batch": ("batch", "decode", "tokens/s", True),
    "transformers": ("generate", "generate", "tokens/s", True),
}


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama, from the config.json of the published model."""

    vocab: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    positions: int
    theta: float
    scaling: dict[str, Any] | None = None
    deviation: float = 0.02  # of the random weights

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


LLAMA3 = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SHAPES = {
    "smollm2-135m": Shape(49152, 576, 1536, 30, 9, 3, 8192, 100_000.0),
    "llama-3.2-1b": Shape(
        128256, 2048, 8192, 16, 32, 8, 131072, 500_000.0, LLAMA3 | {"original_max_position_embeddings": 8192}
    ),
    # Weights large enough for clear choices of tokens, and scaled positions within the tested lengths.
    "tiny": Shape(
        1024, 128, 256, 2, 4, 2, 2048, 10_000.0, LLAMA3 | {"original_max_position_embeddings": 64}, 0.2
    ),
}


# Weights: a checkpoint directory and its conversion to GGUF


def config_of(shape: Shape) -> dict[str, Any]:
    rope = {"rope_theta": shape.theta, **(shape.scaling or {"rope_type": "default"})}
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": shape.vocab,
        "hidden_size": shape.hidden, "intermediate_size": shape.intermediate, "head_dim": shape.head_dim,
        "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads, "max_position_embeddings": shape.positions,
        "rms_norm_eps": 1e-5, "hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
        "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 0, "dtype": "bfloat16",
        "rope_theta": shape.theta, "rope_scaling": shape.scaling, "rope_parameters": rope,
    }  # fmt: skip


def tensors_of(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the checkpoint's tensor names and shapes."""
    hidden, wide = shape.hidden, shape.intermediate
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    yield "model.embed_tokens.weight", (shape.vocab, hidden)
    for layer in range(shape.layers):
        inner = f"model.layers.{layer}"
        yield f"{inner}.input_layernorm.weight", (hidden,)
        yield f"{inner}.self_attn.q_proj.weight", (queries, hidden)
        yield f"{inner}.self_attn.k_proj.weight", (keys, hidden)
        yield f"{inner}.self_attn.v_proj.weight", (keys, hidden)
        yield f"{inner}.self_attn.o_proj.weight", (hidden, queries)
        yield f"{inner}.post_attention_layernorm.weight", (hidden,)
        yield f"{inner}.mlp.gate_proj.weight", (wide, hidden)
        yield f"{inner}.mlp.up_proj.weight", (wide, hidden)
        yield f"{inner}.mlp.down_proj.weight", (hidden, wide)
    yield "model.norm.weight", (hidden,)


def write_checkpoint(shape: Shape, tokenizer: str | None, directory: Path) -> None:
    """Write config.json, random bfloat16 weights and a tokenizer: the given file, or one trained on Python code."""
    from tercet.model.checkpoint import write_tensors
    from tercet.model.tokenizer import Tokenizer

    rng = np.random.default_rng(0)

    def items() -> Iterator[tuple[str, str, tuple[int, ...], np.ndarray]]:
        for name, size in tensors_of(shape):
            values = np.ones(size, np.float32)
            if len(size) > 1:
                values = rng.standard_normal(size, dtype=np.float32) * np.float32(shape.deviation)
            halves = ((values.view(np.uint32) + 0x8000) >> 16).astype(np.uint16)  # rounded to bfloat16
            yield name, "BF16", size, halves.view(np.uint8)

    directory.mkdir(parents=True)
    if tokenizer is not None:
        (directory / "tokenizer.json").write_bytes(Path(tokenizer).read_bytes())
        Tokenizer.load(directory)
    else:
        from tercet.pretrain.vocabulary import train_tokenizer

        text = [Path(module.__file__ or "").read_text(encoding="utf-8") for module in (argparse, statistics)]
        train_tokenizer(text, min(shape.vocab, 4096)).save(directory)
    (directory / "config.json").write_text(json.dumps(config_of(shape), indent=2))
    write_tensors(directory, items())


def write_gguf(shape: Shape, directory: Path, path: Path, kind: str) -> None:
    """Write the checkpoint as GGUF, with every matrix in the same type (F16, Q8_0 or Q4_0)."""
    import gguf

    from tercet.model.checkpoint import open_tensors

    stored = open_tensors(directory)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, shape.layers)
    quantized = getattr(gguf.GGMLQuantizationType, kind)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(shape.vocab)
    writer.add_context_length(shape.positions)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.intermediate)
    writer.add_block_count(shape.layers)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.theta)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_file_type(getattr(gguf.LlamaFileType, "MOSTLY_" + kind))
    write_vocabulary(writer, directory, shape.vocab)
    if shape.scaling:
        writer.add_tensor("rope_freqs.weight", rope_factors(shape))
    for name, size in tensors_of(shape):
        halves = stored[name].data.view(np.uint16).astype(np.uint32)
        values = (halves << 16).view(np.float32).reshape(size)
        if "q_proj" in name:
            values = interleaved(values, shape.heads)
        elif "k_proj" in name:
            values = interleaved(values, shape.kv_heads)
        theirs = names.get_name(name, try_suffixes=(".weight",))
        if values.ndim == 1:
            writer.add_tensor(theirs, values)
        else:
            writer.add_tensor(theirs, gguf.quants.quantize(values, quantized), raw_dtype=quantized)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def interleaved(matrix: np.ndarray, heads: int) -> np.ndarray:
    """Reorder rows: llama.cpp rotates neighbouring rows of a head, checkpoints the two halves of a head."""
    rows, columns = matrix.shape
    return matrix.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def rope_factors(shape: Shape) -> np.ndarray:
    """Return the divisors of the rotary frequencies for llama.cpp: Llama 3.1 scales the low frequencies."""
    assert shape.scaling is not None
    factor, original = shape.scaling["factor"], shape.scaling["original_max_position_embeddings"]
    low, high = shape.scaling["low_freq_factor"], shape.scaling["high_freq_factor"]
    factors = []
    for pair in range(shape.head_dim // 2):
        wavelength = 2 * math.pi * shape.theta ** (2 * pair / shape.head_dim)
        smooth = min(1.0, max(0.0, (original / wavelength - low) / (high - low)))
        factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


def write_vocabulary(writer: Any, directory: Path, size: int) -> None:
    """Write a byte-level BPE like GPT-2's, filled up with unused tokens. The benchmark tokenizes no text."""
    import gguf

    model = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    known = {number: token for token, number in model["vocab"].items()}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([known.get(number, f"<unused{number}>") for number in range(size)])
    kinds = gguf.TokenType
    writer.add_token_types([kinds.NORMAL if number in known else kinds.UNUSED for number in range(size)])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)


# The sides: each measurement runs in a process of its own


def random_tokens(shape: Shape, rows: int, count: int) -> list[list[int]]:
    tokens: list[list[int]] = np.random.default_rng(1).integers(1, shape.vocab, (rows, count)).tolist()
    return tokens


def peak_bytes() -> int:
    """Return this process's peak memory; getrusage would include its parent's."""
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM:"))


def tercet_side(workload: str, directory: Path, kind: str, shape: Shape, threads: int) -> dict[str, float]:
    """Measure with `tercet bench`, which calls the engine's backend; measure generation with the engine itself."""
    if workload == "generate":
        from tercet.engine import bench
        from tercet.engine.request import Request, Sampling

        bench.use_threads(threads)
        engine = bench.load(str(directory), kind)
        prompt = tuple(random_tokens(shape, 1, PROMPT)[0])
        # Without the first token, so that the prefix cache has nothing for the measured run.
        engine.generate([Request(prompt[1:65], Sampling(max_tokens=4, temperature=0, ignore_eos=True))])
        begun = time.perf_counter()
        done = engine.generate([Request(prompt, Sampling(max_tokens=NEW, temperature=0, ignore_eos=True))])
        return {"generate": len(done[0].tokens) / (time.perf_counter() - begun), "peak_bytes": peak_bytes()}
    prompt_tokens, new, batch = (PROMPT, NEW, 1) if workload == "single" else (BATCH_PROMPT, BATCH_NEW, BATCH)
    sizes = (
        f"--prompt-tokens {prompt_tokens} --new-tokens {new} --batch {batch} --repeat 1 --threads {threads}"
    )
    command = [
        sys.executable,
        "-m",
        "tercet",
        "bench",
        str(directory),
        "--json",
        "--quantize",
        kind,
        *sizes.split(),
    ]
    report = json.loads(run(command))
    return {
        "decode": report["decode_tokens_per_second"],
        "prefill": report["prefill_tokens_per_second"],
        "peak_bytes": report["peak_memory_bytes"],
        "fraction_of_limit": report["fraction_of_limit"],
        "bandwidth": report["bandwidth_bytes_per_second"],
    }


class LlamaCpp:
    """llama.cpp's C interface, used as its llama-bench does."""

    def __init__(self, path: Path, shape: Shape, threads: int, context: int, sequences: int) -> None:
        import llama_cpp

        self.library, self.shape = llama_cpp, shape
        self._quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._quiet, None)
        llama_cpp.llama_backend_init()
        settings = llama_cpp.llama_model_default_params()
        settings.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), settings)
        assert self.model, f"llama.cpp cannot load {path}"
        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.n_seq_max = context * sequences, sequences
        options.n_batch = max(512, PROMPT)
        options.n_threads = options.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, options)
        assert self.context, "llama.cpp cannot make a context"
        self.batch = llama_cpp.llama_batch_init(options.n_batch, 0, sequences)

    def clear(self) -> None:
        self.library.llama_memory_clear(self.library.llama_get_memory(self.context), True)

    def feed(self, rows: list[tuple[int, int, list[int]]]) -> np.ndarray:
        """Return the logits [rows, V] after the last token of each (sequence, start, tokens)."""
        batch, at, last = self.batch, 0, []
        for sequence, start, tokens in rows:
            for offset, token in enumerate(tokens):
                batch.token[at], batch.pos[at] = token, start + offset
                batch.n_seq_id[at], batch.seq_id[at][0] = 1, sequence
                batch.logits[at] = offset == len(tokens) - 1
                at += 1
            last.append(at - 1)
        batch.n_tokens = at
        status = self.library.llama_decode(self.context, batch)
        assert status == 0, f"llama_decode: {status}"
        logits = [self.library.llama_get_logits_ith(self.context, index) for index in last]
        size = (self.shape.vocab,)
        return np.stack(
            [np.ctypeslib.as_array(ctypes.cast(row, ctypes.POINTER(ctypes.c_float)), size) for row in logits]
        )


def llama_side(workload: str, path: Path, shape: Shape, threads: int) -> dict[str, float]:
    prompt, new, batch = (PROMPT, NEW, 1) if workload == "single" else (BATCH_PROMPT, BATCH_NEW, BATCH)
    model = LlamaCpp(path, shape, threads, prompt + new, batch)
    tokens = random_tokens(shape, batch, prompt + new)

    def once() -> tuple[float, float]:
        model.clear()
        begun = time.perf_counter()
        for sequence, row in enumerate(tokens):
            model.feed([(sequence, 0, row[:prompt])])
        read = time.perf_counter()
        for at in range(prompt, prompt + new):
            model.feed([(sequence, at, row[at : at + 1]) for sequence, row in enumerate(tokens)])
        return batch * prompt / (read - begun), batch * new / (time.perf_counter() - read)

    once()  # maps the weights
    prefill, decode = once()
    return {"prefill": prefill, "decode": decode, "peak_bytes": peak_bytes()}


def transformers_side(directory: Path, shape: Shape, threads: int) -> dict[str, float]:
    """Measure transformers' generate in bfloat16, eager (not compiled), with its default attention."""
    import torch
    import transformers

    torch.set_num_threads(threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).eval()
    ids = torch.tensor(random_tokens(shape, 1, PROMPT))

    def generate(prompt: Any, count: int) -> None:
        mask = torch.ones_like(prompt)
        with torch.inference_mode():
            model.generate(
                prompt, attention_mask=mask, max_new_tokens=count, min_new_tokens=count, do_sample=False
            )

    generate(ids[:, 1:65], 4)
    begun = time.perf_counter()
    generate(ids, NEW)
    return {"generate": NEW / (time.perf_counter() - begun), "peak_bytes": peak_bytes()}


def check(directory: Path, gguf: Path, shape: Shape) -> None:
    """Check that llama.cpp on F16 chooses transformers' greedy tokens with the originals in float32.

    llama.cpp rounds activations, keys and values to half precision, so it may choose another token if two
    are almost equally likely. The text continues with transformers' choice, and differences that rounding
    does not explain are an error.
    """
    import torch
    import transformers

    prompt = random_tokens(shape, 1, 20)[0]
    count = 200  # beyond the length at which the scaling of positions begins
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.inference_mode():
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        ids = model.generate(
            ids, attention_mask=mask, max_new_tokens=count, eos_token_id=None, do_sample=False
        )
        expected = model(ids).logits[0].numpy()
    tokens = ids[0].tolist()
    llama = LlamaCpp(gguf, shape, 1, len(tokens), 1)
    same, worst = 0, 0.0
    for at, token in enumerate(tokens[:-1]):
        logits = llama.feed([(0, at, [token])])[0]
        spread = expected[at].std()
        worst = max(worst, float(np.abs(logits - expected[at]).max() / spread))
        if at >= len(prompt) - 1:
            chosen = int(logits.argmax())
            same += chosen == tokens[at + 1]
            lost = expected[at].max() - expected[at, chosen]
            if lost > 0.05 * spread:
                raise SystemExit(f"the conversion to GGUF is wrong: token {at + 1} differs")
    print(
        f"llama.cpp on F16 chooses {same} of {count} greedy tokens of transformers on the originals "
        f"(logits differ by {100 * worst:.1f}% of their spread at most)"
    )
    if worst > 0.05 or same < 0.95 * count:
        raise SystemExit("the conversion to GGUF is wrong")


# Alternating measurements


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{shlex.join(command)}\n{done.stderr[-2000:]}")
    return done.stdout


def measured(
    side: str, workload: str, kind: str, arguments: argparse.Namespace, cache: Path
) -> dict[str, Any]:
    """Measure once in a new process."""
    command = [sys.executable, __file__, "--side", side, "--workload", workload, "--kind", kind]
    command += ["--shape", arguments.shape, "--threads", str(arguments.threads), "--cache", str(cache)]
    result: dict[str, Any] = json.loads(run(command).splitlines()[-1])
    return result


def one_side(arguments: argparse.Namespace, directory: Path, gguf: Path) -> None:
    shape = SHAPES[arguments.shape]
    if arguments.side == "tercet":
        result = tercet_side(arguments.workload, directory, arguments.kind, shape, arguments.threads)
    elif arguments.side == "llama.cpp":
        result = llama_side(arguments.workload, gguf, shape, arguments.threads)
    else:
        result = transformers_side(directory, shape, arguments.threads)
    print(json.dumps(result))


def compare(
    arguments: argparse.Namespace, workload: str, kind: str, cache: Path
) -> dict[str, list[dict[str, Any]]]:
    """Run all rounds of both sides in alternation."""
    rival = "transformers" if workload == "generate" else "llama.cpp"
    results: dict[str, list[dict[str, Any]]] = {"tercet": [], rival: []}
    for number in range(arguments.rounds):
        for side in results:
            sys.stderr.write(f"{workload}, {kind}: {side}, round {number + 1} of {arguments.rounds}\n")
            results[side].append(measured(side, workload, kind, arguments, cache))
    return results


def report(
    row: str, kind: str, results: dict[str, list[dict[str, Any]]], about: dict[str, Any]
) -> dict[str, Any]:
    _, field, unit, more = FIELDS[row]
    sides = {}
    for side, runs in results.items():
        values = [result[field] for result in runs]
        best = max(values) if more else min(values)
        sides[side] = {
            "median": statistics.median(values),
            "min": min(values),
            "best": best,
            "values": values,
        }
    ours, theirs = (side["median"] for side in sides.values())
    rival = next(side for side in sides if side != "tercet")
    stored = {"tercet": kind, rival: "bfloat16" if rival == "transformers" else PAIRS[kind]}
    fields = {"row": row, "unit": unit, "more_is_better": more, "weights": stored, "sides": sides}
    limit = [result["fraction_of_limit"] for result in results["tercet"] if result.get("fraction_of_limit")]
    if row == "decode" and limit:
        fields["fraction_of_limit"] = statistics.median(limit)
    return fields | {"ratio": ours / theirs} | about


def versions() -> dict[str, str]:
    names = ("tercet", "llama_cpp_python", "gguf", "torch", "transformers", "numpy")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in names}


def machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"cpu": name or platform.processor(), "cores": os.cpu_count(), "memory_bytes": memory}


def shown(row: dict[str, Any]) -> str:
    scale, unit = (1, row["unit"]) if row["more_is_better"] else (2**20, "MiB")
    cells = [
        f"{side['median'] / scale:,.1f} ({side['best'] / scale:,.1f}) {unit}"
        for side in row["sides"].values()
    ]
    names = [f"{name} {row['weights'][name]}" for name in row["sides"]]
    return f"| {row['row']} | {names[0]} | {cells[0]} | {names[1]} | {cells[1]} | {row['ratio']:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--rows", default=",".join(ROWS), help="comma-separated: " + ", ".join(ROWS))
    parser.add_argument("--weights", default="bf16,int8,int4", help="comma-separated: " + ", ".join(PAIRS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokenizer", metavar="PATH", help="a tokenizer.json; without it one is trained")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="keep the weights there for the next time")
    for internal in ("--side", "--workload", "--kind"):
        parser.add_argument(internal, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    rows, kinds = arguments.rows.split(","), arguments.weights.split(",")
    if unknown := [name for name in rows if name not in ROWS] + [name for name in kinds if name not in PAIRS]:
        parser.error(f"{unknown[0]} is unknown")
    with tempfile.TemporaryDirectory() as temporary:
        cache = arguments.cache or Path(temporary)
        directory = cache / arguments.shape
        if arguments.side:
            one_side(arguments, directory, directory / f"{PAIRS[arguments.kind]}.gguf")
            return
        shape = SHAPES[arguments.shape]
        if not directory.is_dir():
            write_checkpoint(shape, arguments.tokenizer, directory)
        tiny = arguments.shape == "tiny"
        for kind in dict.fromkeys([PAIRS[kind] for kind in kinds] + (["F16"] if tiny else [])):
            if not (directory / f"{kind}.gguf").exists():
                write_gguf(shape, directory, directory / f"{kind}.gguf", kind)
        if tiny:
            check(directory, directory / "F16.gguf", shape)
        compare_all(arguments, rows, kinds, cache)


def compare_all(arguments: argparse.Namespace, rows: list[str], kinds: list[str], cache: Path) -> None:
    about = {
        "shape": arguments.shape, "threads": arguments.threads, "rounds": arguments.rounds,
        "prompt_tokens": PROMPT, "new_tokens": NEW, "batch": [BATCH, BATCH_PROMPT, BATCH_NEW],
        "versions": versions(), "machine": machine(), "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", *sys.argv]),
    }  # fmt: skip
    reports = []
    for kind in kinds:
        workloads = dict.fromkeys(FIELDS[row][0] for row in rows)
        results = {workload: compare(arguments, workload, kind, cache) for workload in workloads}
        reports += [report(row, kind, results[FIELDS[row][0]], about) for row in rows]
    print(
        f"\n{arguments.shape}, {arguments.threads} threads; median (best) of {arguments.rounds} processes each\n"
    )
    print("| | ours | | theirs | | ratio |\n|---|---|---|---|---|---|")
    for row in reports:
        print(shown(row))
    print()
    for row in reports:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
