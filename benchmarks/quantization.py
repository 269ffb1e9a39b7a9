"""The quality of quantised weights of real models, beside llama.cpp's from the same float32 weights, on the CPU.

    python benchmarks/quantization.py MODEL ... --data DATA --peer-python PYTHON [--tokens 2048] [--questions 300]

MODEL is a checkpoint or a GGUF file. It is written as a float32 GGUF file; Tercet computes that file with `none`
(the reference), `int8` and `int4`, and llama.cpp computes what its own quantiser makes of it. PYTHON is the
interpreter of an environment with llama-cpp-python; without it only Tercet is measured. DATA is a directory with
wikitext2/test.txt, wikipedia_en/articles.jsonl.gz and card_tasks/{arc_easy,openbook_qa}.jsonl.

text        windows of 512 tokens of WikiText-2: the mean KL divergence of a token's distribution from the
            reference's, how often the likeliest token is the same, and how many nats worse a token's probability is
questions   short questions, half on subjects of Wikipedia, half of ARC-easy and OpenBookQA: how often the ten
            greedy tokens of the answer are the reference's
Paris       whether a chat model's answer to "What is the capital of France?" names Paris

`--rescaled` changes the weights without changing the function: norms, values and the MLP's inner columns get
random scales that the next matrix takes back. A model that came out of a 4-bit file stands on that file's grid,
on which it can be quantised without error; its rescaled form does not.

The reference's logits take 2 KB a token for each 1,000 words of the vocabulary, on disk. Speed is not measured, so
other work on the machine does no harm.
"""

import argparse
import ctypes
import gzip
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

WINDOW, PART = 512, 64
ANSWER = 10
FORMS = ("none", "int8", "int4")
PEER_TYPES = {"Q8_0": 7, "Q4_K_M": 15, "Q4_0": 2}  # llama.h's llama_ftype
FRANCE = "What is the capital of France?"


def short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def subjects(path: Path, count: int) -> list[str]:
    """Return questions on the subjects of articles whose first sentence answers them."""
    questions = []
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        for line in stream:
            article = json.loads(line)
            title, first = article["title"], article["text"][:200].split("\n")[0]
            if "(" in title or len(title.split()) > 4 or not first.startswith(title):
                continue
            if re.search(r"\(born |\bborn in\b", first):
                questions.append(f"What is {title} known for?")
            elif re.search(r" is (a|an|the) ", first):
                questions.append(f"What is {title}?")
    return sorted(questions, key=short_hash)[:count]


def quiz(paths: list[Path], count: int) -> list[str]:
    """Return short questions that end with a question mark."""
    rows = [json.loads(line)["query"] for path in paths for line in path.read_text("utf-8").splitlines()]
    questions = [row.removeprefix("Question: ").removesuffix("\nAnswer:").strip() for row in rows]
    short = {text for text in questions if text.endswith("?") and len(text) < 120 and "\n" not in text}
    return sorted(short, key=short_hash)[:count]


def prepare(work: Path, gguf: Path, data: Path, tokens: int, count: int) -> None:
    """Write tokens.json: windows of text and prompts of questions, as token ids for both sides."""
    from tercet.model.checkpoint import read_config
    from tercet.model.gguf_directory import gguf_directory
    from tercet.model.tokenizer import Tokenizer

    directory = gguf_directory(gguf)
    config, tokenizer = read_config(directory), Tokenizer.load(directory)
    full, plain = tokenizer.encode("a"), tokenizer.encode("a", special=False)
    begin = full[: len(full) - len(plain)] if full != plain else []
    text = (data / "wikitext2" / "test.txt").read_text("utf-8")
    ids = tokenizer.encode(text[: 8 * tokens], special=False)
    own = WINDOW - len(begin)
    windows = [begin + ids[at : at + own] for at in range(0, max(1, tokens // WINDOW) * own, own)]
    tasks = [data / "card_tasks" / name for name in ("arc_easy.jsonl", "openbook_qa.jsonl")]
    questions = subjects(data / "wikipedia_en" / "articles.jsonl.gz", count // 2)
    questions += quiz(tasks, count - len(questions))

    def prompt(question: str) -> list[int]:
        if tokenizer.chat_template is None:
            return list(tokenizer.encode(f"Question: {question}\nAnswer:"))
        messages = [{"role": "user", "content": question}]
        return list(tokenizer.encode(tokenizer.render(messages), special=False))

    prompts = [prompt(question) for question in questions]
    stops = sorted(config.eos_token_ids)
    france = prompt(FRANCE)
    # The ids of " Paris" and "Paris", so that the other side needs no tokenizer.
    paris = [tokenizer.encode(name, special=False)[0] for name in (" Paris", "Paris")]
    content = {"windows": windows, "prompts": prompts, "france": france, "paris": paris, "stops": stops}
    (work / "tokens.json").write_text(json.dumps(content))


# The sides: each has `logits`, of the last ``outputs`` of some tokens, `clear` and `facts`


class Tercet:
    def __init__(self, gguf: str, form: str) -> None:
        from tercet.engine.load import load_engine
        from tercet.model.gguf_directory import gguf_directory

        begin = time.perf_counter()
        self.backend: Any = load_engine(gguf_directory(gguf), device="cpu", quantize=form).backend
        self.facts = {"load_seconds": round(time.perf_counter() - begin, 1)}
        self.facts["megabytes"] = round(self.backend.weight_bytes_per_token / 1e6, 1)

    def logits(self, tokens: list[int], start: int, outputs: int) -> Iterator[np.ndarray]:
        from tercet.engine.backend import Chunk

        size = min(PART, self.backend.max_tokens)
        pages = list(range(-(-2 * WINDOW // self.backend.page_size)))
        for begin in range(0, len(tokens), size):
            part = tokens[begin : begin + size]
            first = max(0, len(tokens) - outputs - begin)
            rows = self.backend.feed([Chunk(0, part, start + begin, pages, list(range(first, len(part))))])
            if first < len(part):
                yield rows

    def clear(self) -> None:
        self.backend.release(0)


class LlamaCpp:
    def __init__(self, path: str) -> None:
        import llama_cpp

        self.library = llama_cpp
        self._quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._quiet, None)
        llama_cpp.llama_backend_init()
        settings = llama_cpp.llama_model_default_params()
        settings.n_gpu_layers = 0
        settings.use_extra_bufts = False  # with them it can die where the processor has AMX
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), settings)
        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = 2 * WINDOW, PART, PART
        options.n_threads = options.n_threads_batch = len(os.sched_getaffinity(0))
        self.context = llama_cpp.llama_init_from_model(self.model, options)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.batch = llama_cpp.llama_batch_init(PART, 0, 1)
        self.facts = {"megabytes": round(Path(path).stat().st_size / 1e6, 1)}

    def logits(self, tokens: list[int], start: int, outputs: int) -> Iterator[np.ndarray]:
        batch = self.batch
        for begin in range(0, len(tokens), PART):
            part = tokens[begin : begin + PART]
            first = max(0, len(tokens) - outputs - begin)
            for at, token in enumerate(part):
                batch.token[at], batch.pos[at] = token, start + begin + at
                batch.n_seq_id[at], batch.seq_id[at][0] = 1, 0
                batch.logits[at] = at >= first
            batch.n_tokens = len(part)
            status = self.library.llama_decode(self.context, batch)
            assert status == 0, f"llama_decode: {status}"
            if first < len(part):
                rows = ctypes.cast(
                    self.library.llama_get_logits(self.context), ctypes.POINTER(ctypes.c_float)
                )
                yield np.ctypeslib.as_array(rows, (len(part) - first, self.vocabulary)).copy()

    def clear(self) -> None:
        self.library.llama_memory_clear(self.library.llama_get_memory(self.context), True)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(-1, keepdims=True))
    return shifted


def greedy(side: Any, prompt: list[int], stops: list[int]) -> list[int]:
    """Return the greedy tokens of an answer, up to ten and an end."""
    side.clear()
    answer, tokens, start = list[int](), prompt, 0
    while len(answer) < ANSWER and not (answer and answer[-1] in stops):
        [row] = list(side.logits(tokens, start, 1))
        start += len(tokens)
        tokens = [int(row[-1].argmax())]
        answer += tokens
    return answer


def measure(side: Any, work: Path, is_reference: bool) -> dict[str, Any]:
    """Measure a side against the reference's logits and answers in ``work``, or write them."""
    content = json.loads((work / "tokens.json").read_text())
    windows = content["windows"]
    path = work / "reference.npy"
    reference: Any = None if is_reference else np.load(path, mmap_mode="r")
    divergence, same, worse = list[float](), list[bool](), list[float]()
    for number, window in enumerate(windows):
        side.clear()
        begin = 0
        for rows in side.logits(window, 0, len(window)):
            if is_reference:
                if reference is None:
                    shape = (len(windows), WINDOW, rows.shape[1])
                    reference = np.lib.format.open_memmap(path, "w+", np.float32, shape)
                reference[number, begin : begin + len(rows)] = rows
            # After the last token there is no next one to compare.
            count = min(len(rows), len(window) - 1 - begin)
            exact, own = (
                log_softmax(x[:count]) for x in (reference[number, begin : begin + len(rows)], rows)
            )
            following = window[begin + 1 : begin + 1 + count]
            divergence += (np.exp(exact) * (exact - own)).sum(-1).tolist()
            same += (exact.argmax(-1) == own.argmax(-1)).tolist()
            worse += [float(exact[at, token] - own[at, token]) for at, token in enumerate(following)]
            begin += len(rows)
    answers = [greedy(side, prompt, content["stops"]) for prompt in content["prompts"]]
    if is_reference:
        (work / "answers.json").write_text(json.dumps(answers))
    exact_answers = json.loads((work / "answers.json").read_text())
    pairs = list(zip(answers, exact_answers, strict=True))
    france = greedy(side, content["france"], content["stops"])
    return side.facts | {
        "divergence": float(np.mean(divergence)),
        "same_top": float(np.mean(same)),
        "nats_worse": float(np.mean(worse)),
        "answers_equal": float(np.mean([a == b for a, b in pairs])),
        "first_equal": float(np.mean([a[0] == b[0] for a, b in pairs])),
        "paris": any(token in content["paris"] for token in france),
    }


# Preparing files


def quantize_by_llama_cpp(source: str, target: str, kind: str) -> dict[str, Any]:
    import llama_cpp

    quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(quiet, None)
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = PEER_TYPES[kind]
    status = llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(settings))
    assert status == 0, f"llama_model_quantize: {status}"
    return {}


def rescale(path: Path) -> None:
    """Change the weights of a float32 GGUF file of a Llama or Gemma 3 in place, but not what it computes."""
    from gguf import GGUFReader

    reader = GGUFReader(path, "r+")
    tensors = {tensor.name.removesuffix(".weight"): tensor.data for tensor in reader.tensors}
    fields = {
        name.split(".")[-1]: field.contents() for name, field in reader.fields.items() if "head_count" in name
    }
    heads, kv_heads = fields["head_count"], fields["head_count_kv"]
    rng = np.random.default_rng(7)
    layer = 0
    while f"blk.{layer}.attn_q" in tensors:
        block = {
            name.split(".")[2]: data for name, data in tensors.items() if name.startswith(f"blk.{layer}.")
        }
        for norm, parts in (
            ("attn_norm", ("attn_q", "attn_k", "attn_v")),
            ("ffn_norm", ("ffn_gate", "ffn_up")),
        ):
            scale = rng.uniform(0.75, 1.35, block[norm].size).astype(np.float32)
            for part in parts:
                block[part][:] *= scale
            block[norm][:] /= scale
        scale = rng.uniform(0.75, 1.35, len(block["ffn_up"])).astype(np.float32)
        block["ffn_up"][:] *= scale[:, None]
        block["ffn_down"][:] /= scale
        scale = rng.uniform(0.75, 1.35, len(block["attn_v"])).astype(np.float32)
        block["attn_v"][:] *= scale[:, None]
        block["attn_output"][:] /= np.repeat(
            scale.reshape(kv_heads, 1, -1), heads // kv_heads, axis=1
        ).reshape(-1)
        layer += 1


def run(python: str, *arguments: str) -> dict[str, Any]:
    """Run this script in a process of its own and return the JSON of its last line."""
    output = subprocess.run(
        [python, __file__, *arguments], check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    return result


def compare(model: str, rescaled: bool, settings: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(dir=settings.work) as name:
        work = Path(name)
        exact = work / "exact.gguf"
        command = [
            sys.executable,
            "-m",
            "tercet",
            "export",
            model,
            "--format",
            "gguf",
            "--type",
            "f32",
            "--out",
        ]
        subprocess.run(
            [*command, str(exact)], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        if rescaled:
            rescale(exact)
        prepare(work, exact, settings.data, settings.tokens, settings.questions)
        print(f"\n{model}{', rescaled' if rescaled else ''}\n", flush=True)
        print(
            "| weights | MB | KL a token | same top token | nats worse | answers equal | first token | Paris |"
        )
        print("|---|---|---|---|---|---|---|---|", flush=True)
        rows = list[tuple[str, dict[str, Any]]]()

        def show(label: str, result: dict[str, Any]) -> None:
            rows.append((label, result))
            print(
                f"| {label} | {result['megabytes']} | {result['divergence']:.5f} | {100 * result['same_top']:.1f}% | "
                f"{result['nats_worse']:+.4f} | {100 * result['answers_equal']:.1f}% | "
                f"{100 * result['first_equal']:.1f}% | {'yes' if result['paris'] else 'no'} |",
                flush=True,
            )

        for form in FORMS:
            show(f"Tercet {form}", run(sys.executable, "--side", "tercet", str(work), str(exact), form))
        for kind in PEER_TYPES if settings.peer_python else ():
            file = work / f"{kind}.gguf"
            run(settings.peer_python, "--side", "quantize", str(exact), str(file), kind)
            show(f"llama.cpp {kind}", run(settings.peer_python, "--side", "llama.cpp", str(work), str(file)))
            file.unlink()
        print()
        for label, result in rows:
            print(json.dumps({"model": model, "rescaled": rescaled, "weights": label} | result))


SIDES: dict[str, Callable[..., dict[str, Any]]] = {
    "tercet": lambda work, path, form: measure(Tercet(path, form), Path(work), form == "none"),
    "llama.cpp": lambda work, path: measure(LlamaCpp(path), Path(work), False),
    "quantize": quantize_by_llama_cpp,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--peer-python", help="interpreter with llama-cpp-python")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--questions", type=int, default=300)
    parser.add_argument("--rescaled", action="store_true", help="measure each model also rescaled")
    parser.add_argument("--work", help="directory for temporary files; default: the system's")
    settings = parser.parse_args()
    for model in settings.models:
        for rescaled in (False, True) if settings.rescaled else (False,):
            compare(model, rescaled, settings)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--side"]:
        print(json.dumps(SIDES[sys.argv[2]](*sys.argv[3:])))
    else:
        main()
