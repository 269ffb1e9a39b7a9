"""The plan of a build: size, length and rates by the budget, the text and the machine."""

from pathlib import Path

import pytest

from tercet.pretrain.plan import LADDER, network, shape_for
from tercet.pretrain.planning import fit_to_text, make_plan
from tercet.pretrain.settings import PretrainSettings


def test_more_budget_gives_a_larger_network() -> None:
    sizes = [shape_for(seconds=60 * minutes).config.matmul_parameters for minutes in (1, 5, 30, 240)]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]
    assert [network(layers, width, 2048, 512).hidden_size for layers, width in LADDER] == [
        width for _, width in LADDER
    ]


def test_a_budget_in_minutes_is_at_most_four_epochs_of_a_small_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a" * 60_000)
    large = make_plan(PretrainSettings(text, minutes=30, device="cpu"))  # 3,000 tokens a second, so 5 million
    assert 0.9 < large.tokens / (4 * 60_000 / 3.3) <= 1
    assert "the text has about 18,182 tokens: training stops after 4 epochs" in capsys.readouterr().err
    # The network fits the number of tokens, not the time.
    assert large.width == shape_for(tokens=4 * 18_182, context=large.context).config.hidden_size
    assert make_plan(PretrainSettings(text, minutes=0.4, device="cpu")).tokens < large.tokens
    assert capsys.readouterr().err == ""
    # Weights decay against overfitting, unless another decay is configured.
    steps_an_epoch = large.steps / (large.tokens / 18_182)
    assert large.rates["weight_decay"] == pytest.approx(min(0.2, 1 / (0.02 * 2 * steps_an_epoch)), rel=0.05)
    assert make_plan(PretrainSettings(text, tokens=10_000, device="cpu")).rates["weight_decay"] == 0
    undecayed = make_plan(PretrainSettings(text, minutes=30, weight_decay=0.0, device="cpu"))
    assert undecayed.rates["weight_decay"] == 0
    # A budget in tokens is used up.
    assert make_plan(PretrainSettings(text, tokens=1_000_000, device="cpu")).tokens > 990_000
    # So is a budget in operations, by a larger network rather than by hundreds of epochs.
    by_flops = make_plan(PretrainSettings(text, flops=1e14, device="cpu"))
    assert by_flops.width == shape_for(flops=1e14, context=by_flops.context).config.hidden_size > large.width
    # An hour is no reason for a long context where the text is trained on in a minute.
    assert make_plan(PretrainSettings(text, minutes=60, device="cpu")).context == 256
    # Python modules take long to read, and that time is subtracted from training.
    files, builtin = (
        make_plan(PretrainSettings(data, minutes=0.5, read_bytes=30_000_000, device="cpu"))
        for data in (text, "builtin:python-docs")
    )
    assert builtin.seconds is not None and files.seconds is not None
    assert files.seconds - builtin.seconds > 5
    capsys.readouterr()
    limited = make_plan(PretrainSettings(text, minutes=30, read_bytes=30_000, device="cpu"))
    assert "the part of the text that is read has about 9,091 tokens" in capsys.readouterr().err
    assert limited.tokens < large.tokens


def test_a_plan_is_adapted_to_the_text_once_it_is_read(capsys: pytest.CaptureFixture[str]) -> None:
    # The size of the built-in text is not known before it is read.
    requested = PretrainSettings("builtin:python-docs", minutes=5, device="cpu")
    plan = make_plan(requested)
    assert plan.rates["weight_decay"] == 0
    assert fit_to_text(plan, requested, plan.tokens) == plan
    capsys.readouterr()
    short = fit_to_text(plan, requested, plan.tokens // 10)
    assert short.tokens == pytest.approx(0.4 * plan.tokens, rel=0.01)
    assert short.rates["weight_decay"] > 0
    assert "training stops after 4 epochs" in capsys.readouterr().err
    by_tokens = PretrainSettings("builtin:python-docs", tokens=plan.tokens, device="cpu")
    assert (
        fit_to_text(make_plan(by_tokens), by_tokens, plan.tokens // 10).tokens == make_plan(by_tokens).tokens
    )
