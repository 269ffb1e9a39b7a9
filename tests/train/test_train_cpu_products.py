"""Products and attention by pairs of bfloat16, against the same in float64."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numba import njit

import tercet
from tercet.simd import INTEGERS, LANES, Vectors, kernel
from tercet.train.cpu import products
from tercet.train.cpu.attention import PairedAttention, PlainAttention, Read, attention_for
from tercet.train.cpu.products import (
    PANEL,
    Matrix,
    PairedMatrix,
    PairedProducts,
    PlainProducts,
    Sum,
    products_for,
)


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def close(result: torch.Tensor, expected: torch.Tensor, rounding: float) -> None:
    """Assert errors within ``rounding`` of each number, plus the error of float32 sums of the largest."""
    error = (result.double() - expected).abs()
    assert (error <= rounding * expected.abs() + 1e-6 * expected.abs().max()).all(), float(error.max())


@kernel(5)
def _dot_and_narrow(v: Vectors, left: Any, right: Any, sums: Any, native: Any, portable: Any) -> None:
    pairs = [v.load(place, INTEGERS, 4) for place in (left, right)]
    for out, fast in ((native, True), (portable, False)):
        total = v.dot2(v.floats(sums), *pairs, fast)
        v.store(total, out, 4)
        v.store(v.narrow(total, fast), v.address(out, 64), 2)


@njit
def dot_and_narrow(left: int, right: int, sums: int, native: int, portable: int) -> None:
    _dot_and_narrow(left, right, sums, native, portable)


def test_the_portable_form_computes_the_same() -> None:
    left, right = (numbers(LANES, 2, seed=seed) for seed in (1, 2))
    sums = numbers(LANES, seed=3).float()
    native, portable = (torch.zeros(2 * LANES) for _ in range(2))
    dot_and_narrow(*(tensor.data_ptr() for tensor in (left, right, sums, native, portable)))
    exact = sums.double() + (left.double() * right.double()).sum(1)
    for result in (native, portable):
        total, narrow = result[:LANES], result[LANES:].view(torch.bfloat16)[:LANES]
        close(total, exact, 2.0**-23)
        assert torch.equal(narrow, total.bfloat16())


def forward(matrix: Matrix, inputs: torch.Tensor, size: int) -> torch.Tensor:
    out = torch.empty(len(inputs), size, dtype=inputs.dtype)
    matrix.forward(inputs, out)
    return out


def backward(matrix: Matrix, d_out: torch.Tensor, size: int) -> torch.Tensor:
    d_inputs = torch.empty(len(d_out), size, dtype=d_out.dtype)
    matrix.backward(d_out, d_inputs)
    return d_inputs


BFLOAT = 2.0**-8  # half a unit in the last of 8 binary digits
SHAPES = [  # tokens, outputs, inputs
    (1, 2, 2), (3, 64, 64), (4, 128, 64), (130, 66, 130), (129, 192, 64), (517, 70, 96), (261, 64, 258),
]  # fmt: skip


@pytest.mark.parametrize(("tokens", "outputs", "inputs"), SHAPES)
def test_products_with_a_weight_and_its_gradient(tokens: int, outputs: int, inputs: int) -> None:
    x, d_out = numbers(tokens, inputs), numbers(tokens, outputs, seed=1)
    weight = numbers(outputs, inputs, seed=2).float()
    split = outputs // 4 * 2  # as queries, keys and values, or gates and values, are joined
    matrix = PairedMatrix([weight[:split].clone(), weight[split:].clone()] if split else [weight])
    matrix.refresh()
    exact = weight.double()
    close(forward(matrix, x, outputs), x.double() @ exact.T, BFLOAT)
    close(backward(matrix, d_out, inputs), d_out.double() @ exact, BFLOAT)
    for kind in (PairedProducts(), PlainProducts(torch.float32)):
        total = Sum(outputs, inputs)
        total.value.fill_(float("nan"))  # what is left of the step before
        for times in (1, 2):
            as_kind = (d_out, x) if isinstance(kind, PairedProducts) else (d_out.float(), x.float())
            kind.gradient(total, *as_kind)
            close(total.value, times * (d_out.double().T @ x.double()), 1e-6)


@pytest.mark.parametrize(("rows", "columns"), [(3, 130), (4, 70), (1, 64)])
def test_panels_hold_pairs_and_zeros_beyond_the_end(rows: int, columns: int) -> None:
    matrix = numbers(rows, columns)
    panels = np.full((-(-columns // PANEL), -(-rows // 2), PANEL), 7, np.uint32)
    products.pair_rows(products.raw(matrix), panels, 0)
    whole = np.zeros((2 * panels.shape[1], PANEL * len(panels)), np.uint32)
    whole[:rows, :columns] = products.raw(matrix)
    expected = whole[0::2] | whole[1::2] << 16
    assert np.array_equal(panels, expected.reshape(-1, len(panels), PANEL).transpose(1, 0, 2))


def test_weights_are_rounded_to_nearest_and_read_again_each_time() -> None:
    weight = torch.nn.Parameter(torch.randn(8, 6))
    matrix = PairedMatrix([weight])
    for _ in range(2):
        matrix.refresh()
        # A product with one row of the identity is the weight as it was laid out.
        assert torch.equal(forward(matrix, torch.eye(6).bfloat16(), 8), weight.detach().bfloat16().T)
        assert torch.equal(backward(matrix, torch.eye(8).bfloat16(), 6), weight.detach().bfloat16())
        weight.data.mul_(1.7)


def test_nan_stays_nan() -> None:
    matrix = PairedMatrix([torch.ones(64, 64)])
    matrix.refresh()
    x = torch.ones(8, 64).bfloat16()
    x[3, 5] = float("nan")
    assert forward(matrix, x, 64).isnan().any(dim=1).tolist() == [row == 3 for row in range(8)]


def reference(
    begins: np.ndarray[Any, Any], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> torch.Tensor:
    """Compute attention by its formula, in the tensors' own type."""
    heads, rows, _ = q.shape
    time, per_row = k.shape[1], heads // len(begins)
    place = torch.arange(rows) // (rows // time)
    first = torch.from_numpy(begins).repeat_interleave(per_row, 0)[:, place]
    keys = torch.arange(time)
    seen = (keys >= first[..., None]) & (keys <= place[:, None])
    scores = (q @ k.transpose(1, 2)).masked_fill(~seen, float("-inf"))
    return scores.softmax(-1) @ v


@pytest.mark.parametrize(
    ("time", "groups", "dim"), [(3, 1, 16), (5, 1, 64), (64, 2, 32), (131, 3, 64), (200, 1, 80), (257, 4, 16)]
)
@pytest.mark.parametrize("kind", [PairedAttention, PlainAttention])
def test_attention_and_its_gradients(kind: Any, time: int, groups: int, dim: int) -> None:
    batch, kv_heads = 2, 2
    begins = np.zeros((batch, time), np.int64)
    for start in (time // 3, time // 3 + 1, time // 2):  # documents of the second row; one is a single token
        begins[1, start:] = start
    q = (numbers(batch * kv_heads, time * groups, dim).float() * dim**-0.5).bfloat16()
    k, v = (numbers(batch * kv_heads, time, dim, seed=seed) for seed in (1, 2))
    d_out = numbers(batch * kv_heads, time * groups, dim, seed=3)
    exact = [tensor.double().requires_grad_() for tensor in (q, k, v)]
    expected = reference(begins, *exact)
    expected.backward(d_out.double())  # type: ignore[no-untyped-call]
    made = kind()
    read = Read(begins, q, k, v)
    out, state = made.forward(read)
    result = made.backward(read, out, state, d_out)
    for computed, correct in zip((out, *result), (expected, *(tensor.grad for tensor in exact)), strict=True):
        assert correct is not None
        difference = (computed.double() - correct.detach()).norm()
        # A few roundings to bfloat16, one after the other, also of terms that cancel.
        assert difference < 0.012 * correct.norm() + 0.004 * d_out.float().norm()


def test_which_products_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(dot: bool, tiles: bool, dtype: torch.dtype, sizes: tuple[int, ...] = (64, 130)) -> type:
        monkeypatch.setattr(products, "has_bfloat_dot", lambda: dot)
        monkeypatch.setattr(products, "has_bfloat_tiles", lambda: tiles)
        result = products_for(dtype, sizes)
        assert isinstance(result, PairedProducts) == isinstance(attention_for(result), PairedAttention)
        return type(result)

    assert chosen(True, False, torch.bfloat16) is PairedProducts
    assert chosen(True, True, torch.bfloat16) is PlainProducts, "whole tiles are faster than pairs"
    assert chosen(False, False, torch.bfloat16) is PlainProducts
    assert chosen(True, False, torch.float32) is PlainProducts
    assert chosen(True, False, torch.bfloat16, (64, 131)) is PlainProducts, "131 has no pairs"


# Runs each program of its arguments, after a directory of modules, in a process of its own, one after the other.
# They are forked from one that has imported what they all need of other packages, which takes seconds.
SUCCESSION = """
import os, sys
import numba, torch, torch.optim
sys.path.insert(0, sys.argv[1])
for program in sys.argv[2:]:
    process = os.fork()
    if process == 0:
        exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})
        sys.stdout.flush()
        os._exit(0)
    if os.waitpid(process, 0)[1]:
        sys.exit(1)
"""
STEPS = """
import hashlib, torch
from tercet.model.config import ModelConfig
from tercet.model.transformer import Transformer
from tercet.train.cpu import attention, kernels, muon as written_out, products, step
from tercet.train.batch import Batch
from tercet.train.optimizer import Muon

step.products_for = lambda *_: products.PairedProducts()
torch.manual_seed(0)
config = ModelConfig(
    family="qwen3", vocab_size=130, hidden_size=128, intermediate_size=96, num_layers=1, num_heads=2,
    num_kv_heads=2, head_dim=64, max_positions=200, qk_norm="head", tie_embeddings=True,
)
model = Transformer(config, compute_dtype=torch.bfloat16)
Muon._by_pairs = lambda *_: True
matrices = [parameter for parameter in model.parameters() if parameter.dim() == 2]
muon = Muon(matrices, 0.02, row_decay=0.95)
work = step.Stepper(model, 1)


def versions():
    return {
        name: len(value.signatures)
        for module in (attention, kernels, written_out, products)
        for name, value in vars(module).items()
        if hasattr(value, "signatures")
    }


ready = versions()
tokens = torch.randint(0, 130, (2, 200))
digest = hashlib.sha256()
for _ in range(2):
    loss, _ = work.gradients([Batch(tokens, tokens.roll(-1, 1))])
    muon.step()
    digest.update(repr(loss).encode())
segments = torch.zeros(2, 200, dtype=torch.long)
segments[:, 40:] = 1
work.gradients([
    Batch(tokens[:1], tokens[:1]), Batch(tokens, tokens, torch.arange(200).repeat(2, 1), segments),
    Batch(tokens[:1], torch.full((1, 200), -100)),
])
late = [name for name, count in versions().items() if count != ready[name]]
assert not late, f"compiled when steps had begun: {late}"
for parameter in model.parameters():
    digest.update(parameter.grad.numpy().tobytes() + parameter.detach().numpy().tobytes())
print(sum(products.product.stats.cache_hits.values()), digest.hexdigest())
"""
CHANGE = """
import sys, pathlib
source = pathlib.Path(sys.argv[1], "tercet", "train", "cpu", "kernels.py")
source.write_text(source.read_text() + "\\n# changed\\n")
"""
ONE = """
import numpy as np
from tercet.data.batches import IGNORED
from tercet.model.config import ModelConfig
from tercet.model.transformer import Transformer
from tercet.train.cpu import attention, kernels, products
from tercet.train.cpu import muon as muon_module
products.pair_columns(np.zeros((4, 2), np.uint16), np.zeros((1, 1, 64), np.uint32), 0)
print(sum(products.pair_columns.stats.cache_hits.values()))
"""


@pytest.mark.long
def test_code_just_compiled_and_stored_code_give_the_same_bits(tmp_path: Path) -> None:
    # A run that compiles and the run that resumes it must not differ. They do differ where a function whose sums
    # may be reordered is called by a compiled function: it is compiled twice then, and either version may run.
    # Also, nothing may be compiled once steps have begun, or calibration would measure a slow machine. The model
    # has as many key heads as query heads, since the single row that is compiled for has another layout then.
    package = tmp_path / "tercet"
    shutil.copytree(Path(tercet.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))

    # Code is compiled again when any source changes, also that of a function it calls in another file.
    command = [sys.executable, "-c", SUCCESSION, str(tmp_path), STEPS, STEPS, CHANGE, ONE]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    fresh, stored, changed = (line.split() for line in done.stdout.splitlines())
    assert (fresh[0], stored[0]) == ("0", "1"), "the first compiled, the second didn't"
    assert fresh[1] == stored[1]
    assert changed == ["0"]
