"""Calibration: a plan repeats while the machine is as fast as before, and changes when it is not."""

import json
from pathlib import Path

import pytest
import torch

from tercet.errors import UserError
from tercet.model.device import find_device
from tercet.model.transformer import Transformer
from tercet.pretrain.plan import network
from tercet.train import calibrate
from tercet.train.batch import Batch
from tercet.train.calibrate import Speed
from tercet.train.compilation import compile_blocks
from tercet.train.gradients import Autograd

CONFIG = network(1, 32, 300, 32)


def answer(monkeypatch: pytest.MonkeyPatch, speed: float) -> Speed:
    monkeypatch.setattr(calibrate, "_measure", lambda *_: Speed(speed, "float32", 1))
    return calibrate.calibrate(Transformer(CONFIG), 2, 32)


def test_a_measurement_that_agrees_keeps_the_plan_and_one_that_does_not_replaces_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert answer(monkeypatch, 1000).tokens_per_second == 1000
    assert answer(monkeypatch, 1100).tokens_per_second == 1000
    assert answer(monkeypatch, 900).tokens_per_second == 1000
    assert answer(monkeypatch, 1200).tokens_per_second == 1200, "a plan predicts the time within 15%"
    assert answer(monkeypatch, 1000).tokens_per_second == 1000
    assert answer(monkeypatch, 300).tokens_per_second == 300
    assert answer(monkeypatch, 320).tokens_per_second == 300


def test_each_shape_has_its_own_cached_speed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    answer(monkeypatch, 1000)
    calibrate.calibrate(Transformer(CONFIG), 4, 32)
    assert len(json.loads((tmp_path / "tercet" / "speed.json").read_text())) == 2


@pytest.mark.parametrize("content", ["not json", "[1]", '{"a": 1}', '{"a": {"b": 1}}'])
def test_a_broken_cache_is_replaced_by_a_measurement(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "tercet").mkdir()
    (tmp_path / "tercet" / "speed.json").write_text(content)
    assert answer(monkeypatch, 1000).tokens_per_second == 1000


def test_a_real_measurement_is_plausible_and_leaves_the_model_alone(real_measurement: None) -> None:
    threads = torch.get_num_threads()
    model = Transformer(CONFIG)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    try:
        speed = calibrate._measure(model, 2, 32, "adamw")
    finally:
        torch.set_num_threads(threads)
    assert model.compute_dtype is None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), (
        "the weights do not change"
    )
    assert 100 < speed.tokens_per_second != 3_000
    assert speed.compute_dtype in ("float32", "bfloat16")
    assert 1 <= speed.threads <= calibrate.available_cores()
    # Two significant digits: a plan should not depend on noise.
    assert float(f"{speed.tokens_per_second:.2g}") == speed.tokens_per_second


def test_a_busy_moment_does_not_decide_between_types(
    monkeypatch: pytest.MonkeyPatch, real_measurement: None
) -> None:
    monkeypatch.setattr(calibrate, "available_cores", lambda: 2)
    monkeypatch.setattr(calibrate, "emulates_bfloat", lambda: False)
    busy = [("float32", 0.2), ("bfloat16", 0.5), ("float32", 0.2), ("bfloat16", 0.1)]

    def pace(model: Transformer, batch: Batch, kind: str, threads: int, patience: float) -> list[float]:
        dtype = str(model.compute_dtype).removeprefix("torch.")
        if threads == 1:
            assert dtype == "bfloat16"
            return [0.4] * 3
        assert busy[0][0] == dtype
        return [busy.pop(0)[1]] * 3

    monkeypatch.setattr(calibrate, "_pace", pace)
    threads = torch.get_num_threads()
    try:
        speed = calibrate._measure(Transformer(CONFIG), 2, 32, "adamw")
    finally:
        torch.set_num_threads(threads)
    # Half of the steps took five times as long, so the median is that slow, and two threads are still faster.
    assert (speed.compute_dtype, speed.threads, speed.tokens_per_second) == ("bfloat16", 2, 210)
    assert not busy


@pytest.mark.parametrize("known", [False, True])
def test_an_emulated_type_is_tried_once_at_most(
    known: bool, monkeypatch: pytest.MonkeyPatch, real_measurement: None
) -> None:
    """On the real SmolLM2 a single emulated step took more than two minutes."""
    monkeypatch.setattr(calibrate, "available_cores", lambda: 1)
    monkeypatch.setattr(calibrate, "emulates_bfloat", lambda: known)
    attempts = []

    def pace(model: Transformer, batch: Batch, kind: str, threads: int, patience: float) -> list[float]:
        attempts.append(model.compute_dtype)
        return [0.01 if model.compute_dtype == torch.float32 else 4.0]

    monkeypatch.setattr(calibrate, "_pace", pace)
    threads = torch.get_num_threads()
    try:
        speed = calibrate._measure(Transformer(CONFIG), 2, 32, "adamw")
    finally:
        torch.set_num_threads(threads)
    assert (speed.compute_dtype, speed.tokens_per_second) == ("float32", 6400)
    assert attempts == [torch.float32, *([] if known else [torch.bfloat16]), torch.float32]


# Measurement on a GPU, as far as a CPU can test it.


def gradients(model: Transformer, batch: Batch) -> dict[str, torch.Tensor]:
    Autograd(model).gradients([batch])
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}  # type: ignore[union-attr]


@pytest.mark.parametrize("packed", [False, True])
def test_compiled_blocks_are_one_program_each_and_give_the_same_gradients(packed: bool) -> None:
    torch.manual_seed(0)
    model = Transformer(CONFIG)
    batch = calibrate._random_batch(model, 2, 16, packed)
    plain = gradients(model, batch)
    compile_blocks(model, backend="eager")
    compiled = gradients(model, batch)
    assert all(torch.allclose(compiled[name], value, atol=1e-6) for name, value in plain.items())


@pytest.mark.parametrize(("compiler", "compiled"), [("works", {True, False}), ("is not there", {False})])
def test_an_accelerator_is_measured_compiled_where_that_works(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    compiler: str,
    compiled: set[bool],
) -> None:
    attempts = []

    def compile_them(model: Transformer) -> None:
        attempts.append(model)
        if compiler == "is not there":
            raise RuntimeError("no C compiler")
        compile_blocks(model, backend="eager")

    monkeypatch.setattr(calibrate, "compile_blocks", compile_them)
    model = Transformer(CONFIG)
    batch = calibrate._random_batch(model, 2, 32, packed=True)
    speed = calibrate.measure_accelerator(model, batch, "muon", True)
    assert len(attempts) == 1
    assert attempts[0] is not model
    assert ("torch.compile does not work here" in capsys.readouterr().err) == (compiler != "works")
    assert (speed.compute_dtype, speed.compiled in compiled) == ("bfloat16", True)
    assert not calibrate.measure_accelerator(model, batch, "muon", False).compiled
    assert len(attempts) == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cuda:9", "`device` is 'cuda:9', but this machine only has cpu"),
        ("gpu", "`device` is 'gpu'; it must be cuda, mps or cpu"),
    ],
)
def test_a_device_that_is_not_there_is_refused(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_device(name)
