"""Every family computes what transformers computes, and is read and written as transformers reads and writes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tercet.model.checkpoint import read_config
from tercet.model.families import FAMILIES
from tercet.model.loading import join_rows, load_model, save_model
from tercet.model.tensor_names import split_rows
from tiny_checkpoints import CASES, LONGROPE, TWO_WINDOWS, Make, reload


class DenseCache:
    """Keys and values of every layer in one tensor each, grown as positions come."""

    def __init__(self) -> None:
        self.stored: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def update(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor, length: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        batch, heads, _, dim = keys.shape
        empty = torch.zeros(batch, heads, 64, dim)
        stored = self.stored.setdefault(layer, (empty.clone(), empty.clone()))
        rows = torch.arange(batch)[:, None]
        for new, old in zip((keys, values), stored, strict=True):
            old[rows, :, positions] = new.transpose(1, 2)
        return stored[0][:, :, :length], stored[1][:, :, :length]


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_logits_equal_those_of_transformers(
    case: str, make: Make, tokens: torch.Tensor, tmp_path: Path
) -> None:
    family, fields = CASES[case]
    theirs, directory = make(family, **fields)
    ours = load_model(directory)
    expected = theirs(tokens).logits
    assert expected.std() > 0.1  # large enough for 1e-4 to mean something
    torch.testing.assert_close(ours(tokens), expected, atol=1e-4, rtol=0)

    padding = torch.ones_like(tokens)
    padding[0, :7] = 0  # on the left, as transformers generates
    positions = (padding.cumsum(1) - 1).clamp(min=0)
    expected = theirs(tokens, attention_mask=padding, position_ids=positions).logits
    if ours.config.rope_scaling is not None and ours.config.rope_scaling.by_length:
        # Theirs takes the longest row's length for all of them; ours are independent of the batch.
        expected[0, 7:] = reload(directory)(tokens[:1, 7:]).logits
    padded = ours(tokens, positions=positions, segments=padding)
    torch.testing.assert_close(padded[padding == 1], expected[padding == 1], atol=1e-4, rtol=0)

    save_model(ours, tmp_path / "ours")
    torch.testing.assert_close(
        reload(tmp_path / "ours")(tokens).logits, theirs(tokens).logits, atol=1e-4, rtol=0
    )
    assert read_config(tmp_path / "ours") == ours.config


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_token_by_token_gives_the_logits_of_a_single_pass(
    case: str, make: Make, tokens: torch.Tensor
) -> None:
    family, fields = CASES[case]
    theirs, directory = make(family, **fields)
    ours = load_model(directory)
    cache, begin = DenseCache(), 9
    steps = [ours(tokens[:, :begin], cache=cache)]
    for place in range(begin, 30):
        at = torch.full((2, 1), place)
        steps.append(ours(tokens[:, place : place + 1], positions=at, cache=cache))
    expected = theirs(tokens).logits
    if ours.config.rope_scaling is not None and ours.config.rope_scaling.by_length:
        # Frequencies change while keys stay as they were: theirs has to be fed the same way.
        theirs, past, parts = reload(directory), None, []
        for piece in (tokens[:, :begin], *tokens[:, begin:].split(1, dim=1)):
            out = theirs(piece, past_key_values=past, use_cache=True)
            past = out.past_key_values
            parts.append(out.logits)
        expected = torch.cat(parts, dim=1)
    torch.testing.assert_close(torch.cat(steps, dim=1), expected, atol=1e-4, rtol=0)


PACKED: dict[str, dict[str, Any]] = {
    "llama": {}, "mistral": {"sliding_window": 5}, "qwen2": {}, "qwen3": {}, "gemma2": {"sliding_window": 5},
    "gemma3_text": {"sliding_window": 5, "layer_types": TWO_WINDOWS}, "phi3": {"rope_parameters": LONGROPE},
    "gpt_neox": {}, "olmo2": {}, "smollm3": {"no_rope_layers": [1, 0, 1]}, "mixtral": {}, "qwen3_moe": {}, "gpt2": {},
}  # fmt: skip


@pytest.mark.parametrize("family", PACKED)
@torch.no_grad()
def test_packed_documents_are_computed_as_if_alone(family: str, make: Make, tokens: torch.Tensor) -> None:
    theirs, directory = make(family, **PACKED[family])
    ours = load_model(directory)
    lengths = [11, 1, 18]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    segments = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None]
    packed = ours(tokens[:1], positions=positions, segments=segments)[0]
    for document, logits in zip(tokens[0].split(lengths), packed.split(lengths), strict=True):
        torch.testing.assert_close(logits, theirs(document[None]).logits[0], atol=1e-4, rtol=0)


# Mixtures


@pytest.mark.parametrize("normalize", [False, True])
def test_gradients_of_a_mixture_are_those_of_transformers(
    normalize: bool, make: Make, tokens: torch.Tensor
) -> None:
    theirs, directory = make("qwen3_moe", norm_topk_prob=normalize)
    ours = load_model(directory, trainable=True)
    for logits in (theirs(tokens).logits, ours(tokens)):
        F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    for block, layer in zip(theirs.model.layers, ours.model.layers, strict=True):
        pairs = [(layer.mlp.gate.weight.grad, block.mlp.gate.weight.grad)]
        experts = zip(
            layer.mlp.experts,
            block.mlp.experts.gate_up_proj.grad,
            block.mlp.experts.down_proj.grad,
            strict=True,
        )
        for mine, gate_up, down in experts:
            pairs += zip(
                (mine.gate_proj.weight.grad, mine.up_proj.weight.grad), gate_up.chunk(2), strict=True
            )
            pairs.append((mine.down_proj.weight.grad, down))
        for mine, expected in pairs:
            mine = torch.zeros_like(expected) if mine is None else mine  # no token was sent there
            torch.testing.assert_close(mine, expected, atol=1e-6, rtol=1e-4)


@torch.no_grad()
def test_an_expert_that_no_token_is_sent_to_is_not_computed(make: Make, tokens: torch.Tensor) -> None:
    theirs, directory = make("mixtral")
    ours = load_model(directory)
    for parameter in ours.model.layers[0].mlp.experts[3].parameters():
        parameter.data = torch.full_like(parameter, float("nan"))
    with torch.no_grad():
        chosen = theirs.model.layers[0].mlp.gate(_input_of(theirs.model.layers[0].mlp, theirs, tokens))[2]
    assert 3 in chosen
    assert ours(tokens).isnan().any()
    alone = (chosen.view(2, 30, 2)[0] == 3).any(-1)
    first = int(alone.nonzero()[0])  # the tokens before it never meet the expert
    torch.testing.assert_close(ours(tokens)[0, :first], theirs(tokens).logits[0, :first], atol=1e-4, rtol=0)


def _input_of(module: torch.nn.Module, model: Any, tokens: torch.Tensor) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    hook = module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(tokens)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_matmul_parameters_are_the_matrices_a_token_meets(family: str, make: Make) -> None:
    fields = {"qwen3_moe": {"mlp_only_layers": [1]}}.get(family, {})
    _, directory = make(family, **fields)
    model = load_model(directory)
    matrices = {
        name: p.numel() for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name
    }
    if model.config.tie_embeddings:
        matrices["lm_head"] = model.lm_head.weight.numel()
    # Of E experts a token meets k: 2 of 5 in each Mixtral layer, 3 of 6 in each layer of Qwen3 but one.
    share = {"mixtral": 2 / 5, "qwen3_moe": 3 / 6}.get(family, 1)
    expected = sum(count * (share if ".experts." in name else 1) for name, count in matrices.items())
    assert model.config.matmul_parameters == pytest.approx(expected, rel=1e-12)


def test_rows_of_a_joint_tensor_are_split_alike_in_numpy_and_torch() -> None:
    whole = np.arange(12).repeat(2).reshape(12, 2)
    by_head = split_rows(whole, [4, 4, 4], groups=2)
    assert [part[:, 0].tolist() for part in by_head] == [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]]
    tensors = split_rows(torch.from_numpy(whole), [4, 4, 4], groups=2)
    assert torch.equal(join_rows(tensors, groups=2), torch.from_numpy(whole))
    assert [len(part) for part in split_rows(whole, [8, 2, 2])] == [8, 2, 2]
