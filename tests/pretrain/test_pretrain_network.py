"""The initial weights: their variance, and the heads that attend to the last tokens."""

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tercet.model.loading import save_model
from tercet.model.transformer import Transformer
from tercet.pretrain.initialize import CONSTANT, initialize, look_nearby
from tercet.pretrain.plan import network


def test_initial_weights_have_the_documented_variance_and_depend_on_the_seed() -> None:
    model, other = (Transformer(network(4, 128, 512, 64)) for _ in range(2))
    initialize(model, 0)
    initialize(other, 1)
    assert abs(float(model.model.embed_tokens.weight.detach().std()) - 0.02) < 0.001
    last = model.model.layers[0].mlp.down_proj.weight.detach()
    assert abs(float(last.std()) - 128**-0.5 / math.sqrt(8)) < 0.001
    first = model.model.layers[0].mlp.up_proj.weight.detach()
    assert abs(float(first.std()) - 128**-0.5) < 0.002
    assert not torch.equal(last, other.model.layers[0].mlp.down_proj.weight)


@pytest.mark.parametrize(("width", "layers"), [(96, 2), (128, 2), (384, 1)])
def test_two_heads_of_a_layer_initially_attend_to_the_last_tokens(
    tmp_path: Path, width: int, layers: int
) -> None:
    """Measured in transformers: the tokens that they attend to, and that the constant changes no logit."""
    config = network(layers, width, 300, 64)
    model = Transformer(config)
    initialize(model, 0)
    look_nearby(model)
    save_model(model, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    tokens = torch.randint(0, 300, (8, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        output = theirs(tokens, output_attentions=True)
        for attention in output.attentions:
            for head, back in ((0, 1), (1, 2)):
                weights = [attention[:, head].diagonal(-distance, 1, 2).mean() for distance in range(8)]
                assert max(range(8), key=lambda distance: weights[distance]) == back
                assert weights[back] > 3 / 64, "chance"
        theirs.model.embed_tokens.weight[:, 0] += 1
        shifted = theirs.lm_head(theirs.model(inputs_embeds=model.model.embed_tokens.weight[tokens])[0])
    assert (
        CONSTANT == model.model.embed_tokens.weight[:, 0].max() == model.model.embed_tokens.weight[:, 0].min()
    )
    assert torch.allclose(output.logits, shifted, atol=1e-5)
