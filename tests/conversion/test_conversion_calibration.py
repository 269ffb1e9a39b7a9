"""Columns are weighted by the mean squared activation that they multiply."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tercet.conversion import calibration as calibration_module
from tercet.conversion.calibration import calibrate
from tercet.conversion.check import relative_error
from tercet.conversion.export import export
from tercet.conversion.gguf_network import GGUFNetwork
from tercet.data.measured_text import token_rows
from tercet.errors import UserError
from tercet.model.tokenizer import Tokenizer
from tercet.model.weights import Weights
from tiny_checkpoints import reload

Checkpoint = Callable[..., Path]
TEXT = "Once upon a time there was a king, and the king had 3 daughters.\n\n"


@pytest.fixture(autouse=True)
def _few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration_module, "TOKENS", 900)
    monkeypatch.setattr(calibration_module, "HELD_OUT", 100)


def test_importance_is_the_mean_square_that_transformers_multiplies(
    checkpoint: Checkpoint, tokenizer: Tokenizer
) -> None:
    directory = checkpoint("llama")
    done = calibrate(Weights(directory), tokenizer, [TEXT * 100])
    model = reload(directory)
    sums: dict[str, Any] = {}

    def hook(name: str) -> Any:
        return lambda module, given: sums.setdefault(name, []).append(given[0].detach().flatten(0, 1))

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(hook(name))
    rows = token_rows(tokenizer, [TEXT * 100], 1000, 64, tokenizer.vocab_size)
    with torch.no_grad():
        model(rows[: len(rows) - len(done.held_out)])
    assert {f"{name}.weight" for name in sums} == set(done.importance)
    for name, inputs in sums.items():
        expected = torch.cat(inputs).square().mean(0).numpy()
        np.testing.assert_allclose(done.importance[f"{name}.weight"], expected, rtol=1e-4)
    assert done.tokens == (len(rows) - len(done.held_out)) * 64
    assert torch.equal(done.held_out, rows[len(rows) - len(done.held_out) :])


def test_an_expert_that_saw_nothing_has_the_mean_of_the_others(
    checkpoint: Checkpoint, tokenizer: Tokenizer
) -> None:
    directory = checkpoint("mixtral", num_local_experts=4, num_experts_per_tok=1)
    weights = Weights(directory)
    original = weights.__call__

    class Biased:
        config = weights.config

        def __call__(self, name: str) -> Any:
            values = original(name)
            if name.endswith("mlp.gate.weight"):
                values = values.copy()
                values[3] = -values[:3].sum(0) * 100  # far from what the others are chosen for
                values[2] = 0
            return values

    done = calibrate(Biased(), tokenizer, [TEXT * 100])
    experts = [name for name in done.importance if ".experts." in name]
    assert len(experts) == 2 * 4 * 3
    assert all(np.isfinite(values).all() and values.sum() > 0 for values in done.importance.values())
    assert 0 <= done.unseen_experts < len(experts)


def test_weighted_columns_lose_less(checkpoint: Checkpoint, tmp_path: Path) -> None:
    directory = checkpoint("llama")
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 100)
    export(str(directory), "gguf", tmp_path / "plain.gguf", "q4_0")
    done = export(str(directory), "gguf", tmp_path / "weighted.gguf", "q4_0", calibrate=text)
    assert done.calibration_tokens is not None and done.calibration_tokens > 500
    assert done.check is not None and "calibration text" in done.check.text
    weights = Weights(directory)
    importance = calibrate(weights, Tokenizer.load(directory), [TEXT * 100]).importance
    name = "model.layers.0.mlp.down_proj.weight"
    scale = np.sqrt(importance[name])
    plain, weighted = (
        relative_error(GGUFNetwork(tmp_path / f"{kind}.gguf")(name) * scale, weights(name) * scale)
        for kind in ("plain", "weighted")
    )
    assert weighted < plain


def test_too_little_text_and_types_that_are_not_quantised_are_refused(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    directory, text = checkpoint("llama"), tmp_path / "text.txt"
    text.write_text(TEXT)
    with pytest.raises(UserError, match=r"`calibrate` has \d+ tokens; at least 500"):
        export(str(directory), "gguf", tmp_path / "m.gguf", "q4_0", calibrate=text)
    with pytest.raises(UserError, match="use it with `format=gguf` and a quantised `type`"):
        export(str(directory), "gguf", tmp_path / "m.gguf", "f16", calibrate=text)
    with pytest.raises(UserError, match=r"missing\.txt"):
        export(str(directory), "gguf", tmp_path / "m.gguf", "q4_0", calibrate=tmp_path / "missing.txt")
