"""The loop: gradients weighted by token, runs that resume bit for bit, deadlines, and refusals."""

import json
import math
import signal
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import forked
from tercet.data.batches import IGNORED as IGNORE
from tercet.errors import UserError
from tercet.model.config import ModelConfig
from tercet.model.transformer import Transformer
from tercet.train import head
from tercet.train import loop as loop_module
from tercet.train.batch import Batch
from tercet.train.loop import STATE, Recipe, train
from tercet.train.loss import loss_sum
from tercet.train.schedule import Schedule
from tercet.train.state import load_progress

CONFIG = ModelConfig(
    family="qwen3", vocab_size=64, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=2,
    num_kv_heads=1, head_dim=16, max_positions=32, qk_norm="head", tie_embeddings=True,
)  # fmt: skip


def make_model(seed: int = 0) -> Transformer:
    torch.manual_seed(seed)
    return Transformer(CONFIG)


def batch_of(step: int, rows: int = 4, width: int = 12) -> Batch:
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, 64, (rows, width), generator=generator)
    return Batch(tokens, torch.randint(0, 64, (rows, width), generator=generator))


def recipe(steps: int, **changes: object) -> Recipe:
    return Recipe(Schedule.of(steps), learning_rate=1e-2, **changes)  # type: ignore[arg-type]


def weights(model: Transformer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_loss_is_the_cross_entropy_of_the_supervised_tokens() -> None:
    model, batch = make_model(), batch_of(0)
    targets = batch.targets.clone()
    targets[0, :5] = IGNORE
    expected = F.cross_entropy(
        model(batch.tokens).flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum"
    )
    assert torch.allclose(loss_sum(model, Batch(batch.tokens, targets)), expected, rtol=1e-6)


def test_a_head_computed_in_chunks_gives_the_same_loss_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, chunked, batch = make_model(), make_model(), batch_of(0)
    loss_sum(whole, batch).backward()
    monkeypatch.setattr(head, "LARGEST_LOGITS", 64 * 5)
    loss_sum(chunked, batch).backward()
    for (name, a), b in zip(whole.named_parameters(), chunked.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None
        assert torch.allclose(a.grad, b.grad, atol=1e-5), name


def test_accumulated_micro_batches_of_unequal_length_give_the_gradient_of_one_batch(tmp_path: Path) -> None:
    long, short = batch_of(1, rows=3, width=12), batch_of(2, rows=1, width=4)
    joined_tokens = torch.zeros(4, 12, dtype=torch.long)
    joined_targets = torch.full((4, 12), IGNORE)
    joined_tokens[:3], joined_targets[:3] = long.tokens, long.targets
    joined_tokens[3, :4], joined_targets[3, :4] = short.tokens, short.targets
    results = []
    for name, batches in (("micro", [long, short]), ("joined", [Batch(joined_tokens, joined_targets)])):
        model = make_model().double()
        train(model, recipe(3), lambda step, b=batches: b, tmp_path / name, fingerprint="x", title="test")  # type: ignore[misc]
        results.append(weights(model))
    for name, value in results[0].items():
        # Adam divides by the root of the squared gradient, so equal weights mean equal gradients.
        assert torch.allclose(value, results[1][name], atol=1e-6), name


def test_a_micro_batch_without_supervised_tokens_changes_nothing(tmp_path: Path) -> None:
    empty = Batch(torch.zeros(2, 5, dtype=torch.long), torch.full((2, 5), IGNORE))
    a, b = make_model(), make_model()
    train(a, recipe(2), lambda step: [batch_of(step)], tmp_path / "a", fingerprint="x", title="test")
    train(b, recipe(2), lambda step: [batch_of(step), empty], tmp_path / "b", fingerprint="x", title="test")
    assert all(torch.equal(x, y) for x, y in zip(weights(a).values(), weights(b).values(), strict=True))


SCRIPT = """
import os, signal, sys, torch
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_train_loop import batch_of, make_model, recipe, weights
from tercet.train.loop import train
from safetensors.torch import save_file
torch.set_num_threads(1)
kill_at = int(sys.argv[2])
def batches(step):
    if step == kill_at:
        os.kill(os.getpid(), getattr(signal, sys.argv[3]))
    return [batch_of(step)]
model = make_model()
measure = lambda: {{"loss": float(model(batch_of(99).tokens).square().mean())}}
train(model, recipe(40, save_seconds=0, evaluate_every=7), batches, Path(sys.argv[1]), fingerprint="x", title="t",
      evaluate=measure, keep_best=True)
final = {{k: v.contiguous() for k, v in weights(model).items() if k != "lm_head.weight"}}
save_file(final, sys.argv[1] + "/final.safetensors")
"""


def run_script(directory: Path, kill_at: int, sign: str = "SIGKILL") -> forked.Program:
    script = textwrap.dedent(SCRIPT.format(tests=str(Path(__file__).parent)))
    return forked.run(script, str(directory), str(kill_at), sign)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    directory = tmp_path_factory.mktemp("whole")
    assert run_script(directory, -1).returncode == 0
    return directory


@pytest.mark.parametrize("sign", ["SIGKILL", "SIGTERM"])
def test_a_killed_and_resumed_run_ends_bit_for_bit_like_an_uninterrupted_one(
    whole: Path, tmp_path: Path, sign: str
) -> None:
    killed = tmp_path / "killed"
    first = run_script(killed, 17, sign)
    assert first.returncode != 0
    if sign == "SIGTERM":
        assert "run the same command to resume" in first.stderr.lower()
    second = run_script(killed, -1)
    assert second.returncode == 0, second.stderr
    assert "resuming at step" in second.stderr
    assert (whole / "final.safetensors").read_bytes() == (killed / "final.safetensors").read_bytes()

    def losses(directory: Path) -> list[tuple[int, float]]:
        rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
        return [(row["step"], row["loss"]) for row in rows if "loss" in row]

    def measured(directory: Path) -> list[tuple[int, float]]:
        rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
        return [(row["step"], row["heldout_loss"]) for row in rows if "heldout_loss" in row]

    assert losses(whole) == losses(killed)
    assert measured(whole) == measured(killed)
    assert [step for step, _ in measured(killed)] == [7, 14, 21, 28, 35, 40]
    assert [step for step, _ in losses(killed)] == list(range(1, 41))


def test_a_run_is_not_resumed_with_other_settings(tmp_path: Path) -> None:
    train(make_model(), recipe(2), lambda step: [batch_of(step)], tmp_path, fingerprint="first", title="test")
    with pytest.raises(UserError, match="other data or settings"):
        train(
            make_model(),
            recipe(2),
            lambda step: [batch_of(step)],
            tmp_path,
            fingerprint="second",
            title="test",
        )


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_state(tmp_path: Path) -> None:
    model = make_model()

    def batches(step: int) -> list[Batch]:
        if step == 3:
            with torch.no_grad():
                model.model.embed_tokens.weight[0, 0] = math.nan
        return [batch_of(step)]

    with pytest.raises(
        UserError, match=r"skipped 5 steps in a row, .* the loss is nan; .* lower `learning_rate`"
    ):
        train(model, recipe(9, save_seconds=0), batches, tmp_path, fingerprint="x", title="test")
    assert load_progress(tmp_path / STATE, "x").step == 3  # type: ignore[union-attr]


def test_the_run_is_evaluated_where_requested_and_ends_with_the_best_weights(tmp_path: Path) -> None:
    model = make_model()
    evaluated: list[dict[str, torch.Tensor]] = []
    script = iter([3.0, 1.0, 2.0])

    def evaluate() -> dict[str, float]:
        evaluated.append(weights(model))
        return {"loss": next(script)}

    trained = train(model, recipe(6, evaluate_every=2), lambda step: [batch_of(step)], tmp_path,
                    fingerprint="x", title="test", evaluate=evaluate, keep_best=True)  # fmt: skip
    assert (trained.best, trained.best_step) == (1.0, 4)
    assert all(torch.equal(value, evaluated[1][name]) for name, value in weights(model).items())
    assert not torch.equal(evaluated[1]["model.norm.weight"], evaluated[2]["model.norm.weight"])


def test_a_state_without_one_of_the_weights_is_refused(tmp_path: Path) -> None:
    tied, untied = make_model(), Transformer(replace(CONFIG, tie_embeddings=False))

    def run(model: Transformer, steps: int) -> None:
        def batches_at(step: int) -> list[Batch]:
            if step == steps:
                raise ZeroDivisionError
            return [batch_of(step)]

        train(model, recipe(4, save_seconds=0.0), batches_at, tmp_path, fingerprint="x", title="test")

    with pytest.raises(ZeroDivisionError):
        run(tied, 2)
    with pytest.raises(UserError, match=r"has no lm_head.weight: another version of Tercet began this run"):
        run(untied, 9)


def test_the_update_equals_adamw_by_hand(tmp_path: Path) -> None:
    model = make_model()
    name = "model.layers.0.mlp.up_proj.weight"
    before = weights(model)[name]
    batch = batch_of(0)
    (loss_sum(model, batch) / batch.supervised).backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.sqrt(sum((g.square().sum() for g in gradients), torch.zeros(())))
    gradient = dict(model.named_parameters())[name].grad
    assert gradient is not None
    clipped = gradient / max(1.0, float(norm) + 1e-6)
    model.zero_grad()
    train(model, Recipe(Schedule(1, 1, 0), 1e-2, weight_decay=0.5), lambda step: [batch], tmp_path,
          fingerprint="x", title="test")  # fmt: skip
    # At the first step the moments, corrected for their bias, are the gradient and its square.
    expected = before * (1 - 1e-2 * 0.5) - 1e-2 * clipped / (clipped.abs() + 1e-8)
    assert torch.allclose(weights(model)[name], expected, atol=1e-6)


def test_embeddings_and_norms_are_not_decayed(tmp_path: Path) -> None:
    model = make_model()
    unseen = torch.ones(4, 12, dtype=torch.long)
    before = weights(model)
    untied = Transformer(ModelConfig(**{**CONFIG.__dict__, "tie_embeddings": False}))
    untied.load_state_dict({**before, "lm_head.weight": before["model.embed_tokens.weight"].clone()})
    train(untied, Recipe(Schedule(1, 1, 0), 1e-2, weight_decay=0.5), lambda step: [Batch(unseen, unseen)], tmp_path,
          fingerprint="x", title="test")  # fmt: skip
    # Token 7 does not occur, so only decay could have changed its embedding.
    assert torch.equal(
        weights(untied)["model.embed_tokens.weight"][7], before["model.embed_tokens.weight"][7]
    )


def test_the_schedule_rises_holds_and_falls() -> None:
    schedule = Schedule(steps=10, warmup=2, cooldown=4)
    assert [round(schedule.rate(step), 3) for step in range(10)] == [0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2]


def test_a_shortened_schedule_cools_down_to_its_new_end() -> None:
    planned = Schedule(steps=1000, warmup=10, cooldown=500)
    shorter = planned.ending(step=100, remaining=50, planned=planned)
    assert shorter.steps == 150 and shorter.cooldown == 50
    rates = [shorter.rate(step) for step in range(100, 150)]
    assert rates == sorted(rates, reverse=True) and rates[-1] < 0.03


def test_a_schedule_shortened_in_its_cool_down_continues_from_its_current_rate() -> None:
    schedule = Schedule(steps=100, warmup=5, cooldown=90)
    shorter = schedule.ending(step=60, remaining=20, planned=schedule)
    assert shorter.steps == 80
    assert abs(shorter.rate(60) - schedule.rate(60)) < 0.02
    rates = [shorter.rate(step) for step in range(60, 80)]
    assert rates == sorted(rates, reverse=True) and rates[-1] < 0.03


@pytest.mark.parametrize(("cut_at", "back_at"), [(50, 60), (300, 400)])
def test_a_shortened_schedule_grows_again_from_its_current_rate(cut_at: int, back_at: int) -> None:
    planned = Schedule(steps=1000, warmup=10, cooldown=800)
    cut = planned.ending(step=cut_at, remaining=400, planned=planned)
    back = cut.ending(step=back_at, remaining=5000, planned=planned)
    assert back.steps == 1000, "no longer than planned"
    assert abs(back.rate(back_at) - cut.rate(back_at)) < 0.01
    rates = [back.rate(step) for step in range(back_at, 1000)]
    assert rates == sorted(rates, reverse=True) and rates[-1] < 0.03


def test_a_run_that_was_slow_for_a_while_uses_its_remaining_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0

    def batches(step: int) -> list[Batch]:
        nonlocal now
        now += 4.0 if step < 10 else 1.0
        return [batch_of(step)]

    monkeypatch.setattr(loop_module.time, "monotonic", lambda: now)
    trained = train(
        make_model(), recipe(100, deadline=100.0), batches, tmp_path, fingerprint="x", title="test"
    )
    # 10 slow steps take 40 seconds; 60 more fit. With the first shortened schedule it would end after 25.
    assert 94.0 <= trained.seconds <= 100.0 and trained.shortened


def test_a_late_run_ends_near_its_deadline(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    now = 0.0

    def batches(step: int) -> list[Batch]:
        nonlocal now
        now += 2.0  # each step takes two seconds of this clock
        return [batch_of(step)]

    monkeypatch.setattr(loop_module.time, "monotonic", lambda: now)
    trained = train(model, recipe(1000, deadline=60.0), batches, tmp_path, fingerprint="x", title="test")
    assert trained.steps == 30 and trained.seconds == 60.0
    assert "slower than when it was measured" in capsys.readouterr().err
    rates = [
        json.loads(line)["learning_rate"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ]
    assert rates[-1] < 0.15 * max(rates), "a shortened run still cools down"


def test_python_handles_sigint_outside_a_run(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    train(make_model(), recipe(1), lambda step: [batch_of(step)], tmp_path, fingerprint="x", title="test")
    assert signal.getsignal(signal.SIGINT) is before


def test_patience_ends_a_run_whose_loss_does_not_fall_and_keeps_the_best_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = iter([3.0, 2.0, 2.5, 2.1, 1.0])
    model, kept = make_model(), {}

    def measure() -> dict[str, float]:
        loss = next(losses)
        if loss == 2.0:
            kept.update(weights(model))
        return {"loss": loss}

    trained = train(
        model, recipe(100, evaluate_every=3, patience=2), lambda step: [batch_of(step)], tmp_path,
        fingerprint="x", title="test", evaluate=measure, keep_best=True,
    )  # fmt: skip
    assert (trained.steps, trained.best, trained.best_step) == (12, 2.0, 6)
    assert not trained.shortened
    assert "has not fallen in 2 evaluations; ending at step 12" in capsys.readouterr().err
    assert all(torch.equal(value, kept[name]) for name, value in weights(model).items())
    again = train(
        make_model(), recipe(100, evaluate_every=3, patience=2), lambda step: [batch_of(step)], tmp_path,
        fingerprint="x", title="test", evaluate=measure, keep_best=True,
    )  # fmt: skip
    assert again.steps == 12, "a finished run stays finished"
