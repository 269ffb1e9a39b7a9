"""Fine-tuning the model of a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from gguf_files import exported
from tercet.finetune.sft import tune
from tercet.model.adapter import load_adapter, merge_lora
from tercet.model.checkpoint import read_config
from tercet.model.gguf_directory import gguf_directory
from tercet.model.loading import load_model
from tercet.model.source import source_in
from tercet.model.weights import Weights

ROWS: list[dict[str, Any]] = [{"prompt": f"{n} is", "completion": " the king"} for n in range(40)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return a quantised model as a GGUF file."""
    return exported(tmp_path, "qwen3", "q8_0", head_dim=16, hidden_size=64, intermediate_size=64)[1]


def test_an_adapter_is_trained_on_the_files_own_weights(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned = tune(path, ROWS, tmp_path / "run", epochs=1, rank=2)
    assert (
        "is a GGUF file: its weights are dequantised to float32, and the result is an adapter"
        in capsys.readouterr().err
    )
    source = source_in(tuned.model)
    assert source.base == gguf_directory(path) and source.adapter == Path(tuned.model)
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["model"] == str(path)
    model = load_model(source.base, torch.float32)
    load_adapter(model, tuned.model)
    merge_lora(model)
    weights, plain = Weights(source.base, source.adapter), Weights(source.base)
    changed = 0
    for name, parameter in model.state_dict().items():
        torch.testing.assert_close(torch.from_numpy(weights(name).copy()), parameter, atol=1e-6, rtol=0)
        if (weights(name) != plain(name)).any():
            changed += 1
            assert weights.blocks(name) is None and plain.blocks(name) is not None
    assert changed > 0
    assert (weights.dtype, plain.dtype) == ("F32", "F32")


def test_full_tuning_makes_a_checkpoint(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = path.read_bytes()
    tuned = tune(path, ROWS, tmp_path / "run", epochs=1, method="full")
    assert "dequantised to float32, and the result is a checkpoint" in capsys.readouterr().err
    assert path.read_bytes() == before
    config = read_config(tuned.model)
    assert config.hidden_size == 64
    assert config.eos_token_ids == read_config(gguf_directory(path)).eos_token_ids
    name = "model.layers.0.mlp.up_proj.weight"
    assert (Weights(tuned.model)(name) != Weights(gguf_directory(path))(name)).any()
