"""The place and form of each weight in a model's packed memory.

The layout follows from the configuration and the types of the weights alone, so a packed model is one block
of bytes without a header. Heads are padded with zeros to 16 rows, and rows of activations to 64 columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tercet.engine.cpu.formats import kind_of, sizes
from tercet.model.config import ModelConfig

ALIGN = 64
Types = Callable[[str], str]  # returns the type that a weight is kept in, by the network's name of it


def padded(size: int, multiple: int) -> int:
    """Round ``size`` up to a multiple."""
    return -(-size // multiple) * multiple


@dataclass(frozen=True)
class Matrix:
    """A matrix in blocks of 16 rows: its type, padded shape and byte offsets; bias -1: none."""

    type: str
    rows: int
    columns: int
    weights: int
    scales: int
    bias: int

    @property
    def bytes(self) -> int:
        """Bytes of the weights and their scales."""
        return sum(sizes(kind_of(self.type), self.rows, self.columns))


@dataclass(frozen=True)
class Stack:
    """Matrices whose products belong together: one below the other, or blocks of two in alternation."""

    matrices: tuple[Matrix, ...]
    alternate: bool = False

    @property
    def bytes(self) -> int:
        """Bytes of the weights and their scales."""
        return sum(matrix.bytes for matrix in self.matrices)


@dataclass
class Layout:
    """Places of matrices and float32 vectors by name, types of weights, and the total ``size`` in bytes."""

    matrices: dict[str, Stack] = field(default_factory=dict)
    types: dict[str, str] = field(default_factory=dict)  # of the weights, by the network's names
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
            idle += self.matrices["embedding"].bytes
        for layer in range(config.num_layers):
            if config.is_mixture(layer):
                expert = sum(self.matrices[f"{layer}.0.{part}"].bytes for part in ("gate_up", "down"))
                idle += (config.num_experts - config.experts_per_token) * expert
        return self.size - idle

    def matrix(self, name: str, type_name: str, rows: int, columns: int, bias: bool = False) -> None:
        """Add a matrix of padded shape [rows, columns], with its scales and bias."""
        self.stack(name, [(type_name, rows)], columns, bias)

    def stack(
        self,
        name: str,
        parts: Sequence[tuple[str, int]],
        columns: int,
        bias: bool = False,
        alternate: bool = False,
    ) -> None:
        """Add matrices of ``parts`` (type, rows) one below the other; neighbours of one type are joined."""
        joined: list[tuple[str, int]] = []
        for type_name, rows in parts:
            if joined and joined[-1][0] == type_name:
                joined[-1] = (type_name, joined[-1][1] + rows)
            else:
                joined.append((type_name, rows))
        matrices = []
        for type_name, rows in joined:
            weights, scales = sizes(kind_of(type_name), rows, columns)
            places = self._take(weights), self._take(scales), self._take(4 * rows) if bias else -1
            matrices.append(Matrix(type_name, rows, columns, *places))
        self.matrices[name] = Stack(tuple(matrices), alternate and len(matrices) > 1)


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


def layout(config: ModelConfig, types: Types) -> Layout:
    """Lay out a model whose weights are kept in the given types (see `types`)."""
    shape, heads, kv_heads = Shape.of(config), config.num_heads, config.num_kv_heads
    result = Layout()

    def type_of(name: str) -> str:
        return result.types.setdefault(name, types(name))

    vocabulary = padded(config.vocab_size, 16)
    result.matrix("embedding", type_of("model.embed_tokens.weight"), vocabulary, shape.hidden)
    if config.positions == "learned":
        result.vector("positions", config.max_positions * shape.hidden)
    for layer in range(config.num_layers):
        name, module = f"{layer}.", f"model.layers.{layer}"
        for norm in norms(config):
            result.vector(name + norm, shape.hidden)
            if config.norm == "layer":
                result.vector(name + norm + ".bias", shape.hidden)
        parts = [
            (type_of(f"{module}.self_attn.{part}_proj.weight"), count * shape.dim)
            for part, count in zip("qkv", (heads, kv_heads, kv_heads), strict=True)
        ]
        result.stack(name + "qkv", parts, shape.hidden, config.attention_bias)
        if config.qk_norm != "none":
            whole = config.qk_norm == "projection"
            result.vector(name + "q_norm", shape.dim * (heads if whole else 1))
            result.vector(name + "k_norm", shape.dim * (kv_heads if whole else 1))
        output = type_of(f"{module}.self_attn.o_proj.weight")
        result.matrix(name + "o", output, shape.hidden, shape.attention, config.output_bias)
        mlps = {name: f"{module}.mlp"}
        if config.is_mixture(layer):
            result.matrix(name + "router", "F32", padded(config.num_experts, 16), shape.hidden)
            mlps = {
                f"{name}{expert}.": f"{module}.mlp.experts.{expert}" for expert in range(config.num_experts)
            }
        for mlp, inner in mlps.items():
            parts = [(type_of(f"{inner}.{part}.weight"), shape.inner) for part in gate_and_up(config)]
            result.stack(mlp + "gate_up", parts, shape.hidden, config.mlp_bias, alternate=True)
            down = type_of(f"{inner}.down_proj.weight")
            result.matrix(mlp + "down", down, shape.hidden, shape.inner, config.mlp_bias)
    result.vector("norm", shape.hidden)
    if config.norm == "layer":
        result.vector("norm.bias", shape.hidden)
    if not config.tie_embeddings:
        result.matrix("head", type_of("lm_head.weight"), vocabulary, shape.hidden)
    return result


def norms(config: ModelConfig) -> list[str]:
    """Return our module names of a layer's norms."""
    before = ["input_layernorm", "post_attention_layernorm"] if config.pre_norm else []
    return before + (["attention_output_norm", "mlp_output_norm"] if config.post_norm else [])


def gate_and_up(config: ModelConfig) -> list[str]:
    """Return our names of the matrices of an MLP that read its input."""
    return ["gate_proj", "up_proj"] if config.gated_mlp else ["up_proj"]
