"""The place and form of each weight in a model's packed memory.

The layout follows from the configuration and the quantisation alone, so a packed model is one block of
bytes without a header. Heads are padded with zeros to 16 rows, and rows of activations to 64 columns.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from tercet.engine.cpu import Quantization
from tercet.engine.cpu import table as at
from tercet.engine.cpu.table import GROUP4, GROUP8
from tercet.model.config import ModelConfig

ALIGN = 64


def padded(size: int, multiple: int) -> int:
    """Round ``size`` up to a multiple."""
    return -(-size // multiple) * multiple


@dataclass(frozen=True)
class Matrix:
    """A matrix in blocks of 16 rows: its kind (see `table`), padded shape and byte offsets; bias -1: none."""

    kind: int
    rows: int
    columns: int
    weights: int
    scales: int
    bias: int


def _matrix_bytes(kind: int, count: int) -> tuple[int, int]:
    """Return the bytes of ``count`` weights and of their scales."""
    return {
        at.FLOAT32: (4 * count, 0),
        at.BFLOAT16: (2 * count, 0),
        at.INT8: (count, 2 * count // GROUP8),
        at.INT4: (count // 2, 4 * count // GROUP4),
    }[kind]


@dataclass
class Layout:
    """Places of matrices and float32 vectors by name, and the total ``size`` in bytes."""

    matrices: dict[str, Matrix] = field(default_factory=dict)
    vectors: dict[str, tuple[int, int]] = field(default_factory=dict)  # offset, length
    size: int = 0

    def _take(self, size: int) -> int:
        begin, self.size = self.size, self.size + padded(size, ALIGN)
        return begin

    def vector(self, name: str, length: int) -> None:
        """Add a vector of ``length`` float32."""
        self.vectors[name] = (self._take(4 * length), length)

    def read_bytes(self, config: ModelConfig) -> int:
        """Return the bytes of weights that one token reads: not an untied embedding, nor idle experts."""
        idle = 0
        if not config.tie_embeddings:
            idle += self._matrix_bytes(self.matrices["embedding"])
        for layer in range(config.num_layers):
            if config.is_mixture(layer):
                expert = sum(
                    self._matrix_bytes(self.matrices[f"{layer}.0.{part}"]) for part in ("gate_up", "down")
                )
                idle += (config.num_experts - config.experts_per_token) * expert
        return self.size - idle

    def _matrix_bytes(self, matrix: Matrix) -> int:
        return sum(_matrix_bytes(matrix.kind, matrix.rows * matrix.columns))

    def matrix(self, name: str, kind: int, rows: int, columns: int, bias: bool = False) -> None:
        """Add a matrix of padded shape [rows, columns], with its scales and bias."""
        count = rows * columns
        weights, scales = _matrix_bytes(kind, count)
        self.matrices[name] = Matrix(
            kind,
            rows,
            columns,
            self._take(weights),
            self._take(scales),
            self._take(4 * rows) if bias else -1,
        )


@dataclass(frozen=True)
class Shape:
    """Padded sizes of a model: of hidden rows, heads, inner rows and attention outputs."""

    hidden: int
    dim: int
    inner: int
    attention: int

    @classmethod
    def of(cls, config: ModelConfig) -> Shape:
        """Return the padded sizes for a configuration."""
        dim = padded(config.head_dim, 16)
        inner = max(
            config.intermediate_size,
            config.moe_intermediate_size if config.num_experts else 0,
        )
        return cls(padded(config.hidden_size, 64), dim, padded(inner, 64), padded(config.num_heads * dim, 64))


def layout(config: ModelConfig, quantization: Quantization, stored: str) -> Layout:
    """Lay out a model.

    With "int4" the embedding and the head are int8: they lose most from quantisation.

    Args:
        config: The network.
        quantization: How matrices are stored; "none" keeps the checkpoint's type.
        stored: The type of the checkpoint's weights ("BF16", "F32").
    """
    kind = {
        "int8": at.INT8,
        "int4": at.INT4,
        "bf16": at.BFLOAT16,
        "none": at.BFLOAT16 if stored == "BF16" else at.FLOAT32,
    }[quantization]
    outer = at.INT8 if kind == at.INT4 else kind
    shape, heads, kv_heads = Shape.of(config), config.num_heads, config.num_kv_heads
    result = Layout()
    halves = 2 if config.gated_mlp else 1
    vocabulary = padded(config.vocab_size, 16)
    result.matrix("embedding", outer, vocabulary, shape.hidden)
    if config.positions == "learned":
        result.vector("positions", config.max_positions * shape.hidden)
    for layer in range(config.num_layers):
        name = f"{layer}."
        for norm in norms(config):
            result.vector(name + norm, shape.hidden)
            if config.norm == "layer":
                result.vector(name + norm + ".bias", shape.hidden)
        result.matrix(
            name + "qkv", kind, (heads + 2 * kv_heads) * shape.dim, shape.hidden, config.attention_bias
        )
        if config.qk_norm != "none":
            whole = config.qk_norm == "projection"
            result.vector(name + "q_norm", shape.dim * (heads if whole else 1))
            result.vector(name + "k_norm", shape.dim * (kv_heads if whole else 1))
        result.matrix(name + "o", kind, shape.hidden, shape.attention, config.output_bias)
        mlps = [name]
        if config.is_mixture(layer):
            result.matrix(name + "router", at.FLOAT32, padded(config.num_experts, 16), shape.hidden)
            mlps = [f"{name}{expert}." for expert in range(config.num_experts)]
        for mlp in mlps:
            result.matrix(mlp + "gate_up", kind, halves * shape.inner, shape.hidden, config.mlp_bias)
            result.matrix(mlp + "down", kind, shape.hidden, shape.inner, config.mlp_bias)
    result.vector("norm", shape.hidden)
    if config.norm == "layer":
        result.vector("norm.bias", shape.hidden)
    if not config.tie_embeddings:
        result.matrix("head", outer, vocabulary, shape.hidden)
    return result


def norms(config: ModelConfig) -> list[str]:
    """Return our module names of a layer's norms."""
    before = ["input_layernorm", "post_attention_layernorm"] if config.pre_norm else []
    return before + (["attention_output_norm", "mlp_output_norm"] if config.post_norm else [])
