"""Recipes of types, and recognising weights that were dequantised."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize

from tercet.model.block_quantization import type_bytes
from tercet.model.quantization_recipes import recipe_type, recovered_type

LAYER = "model.layers.0."
NAMES = [
    *(f"{LAYER}self_attn.{part}_proj.weight" for part in "qkvo"),
    *(f"{LAYER}mlp.{part}_proj.weight" for part in ("gate", "up", "down")),
    "model.embed_tokens.weight",
    "lm_head.weight",
]


def matrix() -> Any:
    return (0.03 * np.random.default_rng(1).standard_t(6, (40, 512))).astype(np.float32)


def to_bfloat16(values: Any) -> Any:
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_dequantised_weights_are_recognised_also_in_half_precision(kind: str) -> None:
    stored = GGMLQuantizationType[kind]
    values = dequantize(quantize(matrix(), stored), stored)
    for rounded in (values, to_bfloat16(values), values.astype(np.float16).astype(np.float32)):
        assert recovered_type(rounded) == kind


def test_other_weights_are_not_recognised() -> None:
    values = matrix()
    assert recovered_type(values) is None
    assert recovered_type(to_bfloat16(values)) is None
    # The same model with another scale in each column, as after a norm's weight is multiplied in.
    stored = dequantize(quantize(values, GGMLQuantizationType.Q4_1), GGMLQuantizationType.Q4_1)
    assert recovered_type(stored * np.random.default_rng(2).uniform(0.6, 1.6, 512).astype(np.float32)) is None
    assert recovered_type(np.zeros((4, 64), np.float32)) is None
    assert recovered_type(values[:, :20]) is None


def test_recipes_give_every_matrix_a_type_that_fits() -> None:
    for columns in (64, 576, 640, 2048, 33):
        for name in NAMES:
            kinds = [recipe_type(name, columns, recipe) for recipe in ("int8", "int4")]
            if columns == 33:
                assert kinds == [None, None]
                continue
            small, large = (type_bytes(kind, columns) for kind in reversed(kinds) if kind is not None)
            assert 4.5 / 8 <= small / columns <= large / columns == 8.5 / 8
