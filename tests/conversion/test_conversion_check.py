"""Every export is compared with its checkpoint: a file that computes something else is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tercet.cli.main import main as cli
from tercet.conversion import check as check_module
from tercet.conversion.check import CheckFailed, relative_error
from tercet.conversion.export import export
from tercet.model import gguf as gguf_module
from tercet.model import gguf_architecture
from tercet.model.gguf_architecture import ARCHITECTURES

Checkpoint = Callable[..., Path]
SMALL = 200  # tokens; the real number takes a second for each test


@pytest.fixture(autouse=True)
def _few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_module, "TOKENS", SMALL)


@pytest.mark.parametrize("type_name", ["f32", "q8_0", "q4_0", "q4_k_m"])
def test_a_correct_file_passes_with_figures(type_name: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    done = export(str(checkpoint("llama")), "gguf", tmp_path / "m.gguf", type_name)
    assert done.check is not None
    assert done.check.tokens >= SMALL * 0.6
    assert 0 <= done.check.kl < done.check.kl_limit
    assert done.check.strings > 20
    assert (done.check.kl == 0) == (type_name == "f32")


def refused(directory: Path, tmp_path: Path, type_name: str = "q8_0") -> str:
    with pytest.raises(CheckFailed) as caught:
        export(str(directory), "gguf", tmp_path / "m.gguf", type_name)
    assert not list(tmp_path.glob("*.gguf")) + list(tmp_path.glob(".*gguf*"))
    return str(caught.value)


@pytest.mark.parametrize("type_name", ["f32", "q4_0"])
def test_rows_of_queries_in_the_wrong_order_are_caught(
    type_name: str, checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where reader and writer agree on the mistake, since the table of graphs has it."""
    directory = checkpoint("llama")
    monkeypatch.setitem(ARCHITECTURES, "llama", replace(ARCHITECTURES["llama"], interleaved=False))
    assert "self_attn.q_proj.weight is 1" in refused(directory, tmp_path, type_name)


def test_a_lost_offset_of_norms_is_caught(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = checkpoint("gemma3_text", head_dim=16, sliding_window=64)
    original = gguf_architecture.targets
    monkeypatch.setattr(
        gguf_module, "targets", lambda *given: [replace(target, offset=0.0) for target in original(*given)]
    )
    assert "norm" in refused(directory, tmp_path)


@pytest.mark.parametrize("type_name", ["q4_0", "q4_1"])
def test_swapped_nibbles_are_caught(
    type_name: str, checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = gguf_module.quantize

    def swapped(values: Any, kind: str, importance: Any = None) -> Any:
        rows = original(values, kind, importance).copy()
        if kind.startswith("Q4"):
            size, head = (18, 2) if kind == "Q4_0" else (20, 4)
            blocks = rows.reshape(-1, size)
            blocks[:, head:] = (blocks[:, head:] >> 4) | (blocks[:, head:] << 4)
        return rows

    monkeypatch.setattr(gguf_module, "quantize", swapped)
    assert "off the checkpoint's; rounding to Q4" in refused(checkpoint("llama"), tmp_path, type_name)


def test_a_wrong_number_in_the_metadata_is_caught_by_the_predictions(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gguf

    directory = checkpoint("llama", initializer_range=0.3)
    original = gguf.GGUFWriter.add_rope_freq_base
    monkeypatch.setattr(gguf.GGUFWriter, "add_rope_freq_base", lambda self, base: original(self, base * 100))
    assert "nats a token" in refused(directory, tmp_path, "f32")


def test_another_tokenizer_is_caught(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = gguf_module.gguf_tokenizer

    def other(*given: Any) -> Any:
        return replace(original(*given), pre="gpt-2")

    monkeypatch.setattr(gguf_module, "gguf_tokenizer", other)
    assert "tokenizer encodes" in refused(checkpoint("llama"), tmp_path)


def test_a_missing_bias_is_caught(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = checkpoint("llama", attention_bias=True)
    original = gguf_architecture.targets
    monkeypatch.setattr(
        gguf_module,
        "targets",
        lambda *given: [target for target in original(*given) if not target.name.endswith(".bias")],
    )
    assert "no tensor for model.layers.0.self_attn.k_proj.bias" in refused(directory, tmp_path)


def test_a_few_wrong_rows_of_a_large_tensor_are_seen() -> None:
    values = np.random.default_rng(0).normal(size=(6400, 32)).astype(np.float32)
    other = values.copy()
    other[640:704] = values[704:768]
    assert relative_error(other, values) > 1.2
    assert relative_error(values, values) == 0
    assert relative_error(values[:, :16], values) == np.inf
    other[0, 0] = np.nan
    assert relative_error(other, values) == np.inf


def test_the_command_prints_the_figures_and_fails_with_status_1(
    checkpoint: Checkpoint,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = ["export", str(checkpoint("llama")), "--format", "gguf", "--type", "Q4_0", "--json"]
    assert cli([*arguments, "--out", str(tmp_path / "m.gguf")]) == 0
    captured = capsys.readouterr()
    done = json.loads(captured.out)
    assert done["type"] == "q4_0"
    assert done["check"]["kl"] <= done["check"]["kl_limit"]
    assert "check: " in captured.err and "the likeliest token agrees after" in captured.err
    assert cli([*arguments, "--no-check", "--out", str(tmp_path / "n.gguf")]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["check"] is None
    assert "not compared with the checkpoint (--no-check)" in captured.err
    monkeypatch.setitem(ARCHITECTURES, "llama", replace(ARCHITECTURES["llama"], interleaved=False))
    assert cli([*arguments, "--out", str(tmp_path / "o.gguf")]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"error: the check of {tmp_path / 'o.gguf'} failed, so it was removed: tensor " in captured.err
    assert not (tmp_path / "o.gguf").exists()
