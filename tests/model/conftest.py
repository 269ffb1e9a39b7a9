"""Fixtures of the network's tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_checkpoints import GPT2_SIZES, MORE, SIZES, Make


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """``make("llama", attention_bias=True)``: a model of transformers, and the directory it is saved in."""

    def build(family: str, **fields: Any) -> tuple[Any, Path]:
        sizes = GPT2_SIZES if family == "gpt2" else SIZES | MORE.get(family, {})
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(family, **{**sizes, **fields})
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        with torch.no_grad():
            for parameter in model.parameters():  # norms and biases too: ones and zeros hide mistakes
                parameter.normal_(std=0.3)
        directory = tmp_path / f"theirs-{family}"
        model.save_pretrained(directory)
        return model, directory

    return build


@pytest.fixture
def tokens() -> torch.Tensor:
    """Two rows of 30 token ids."""
    return torch.randint(0, 61, (2, 30), generator=torch.Generator().manual_seed(1))
