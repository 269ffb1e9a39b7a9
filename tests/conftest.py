"""Settings of all tests: caches of their own, training plans independent of the machine's load, no deadlines."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest

if TYPE_CHECKING:
    from tercet.train.calibrate import Speed
    from tiny_checkpoints import Make

# One thread for the matrix products of torch, numpy and scikit-learn, also in subprocesses: networks of these sizes
# gain nothing from a second one, and threads of several test processes on few cores wait for each other.
for library in ("OMP", "OPENBLAS", "MKL"):
    os.environ.setdefault(f"{library}_NUM_THREADS", "1")

# A test passes or fails in the same way each time: its examples follow from its name, and a busy machine
# may take as long as it needs for one of them.
hypothesis.settings.register_profile("tercet", deadline=None, derandomize=True)
hypothesis.settings.load_profile("tercet")

# Only compiled kernels are kept between runs, and shared with subprocesses: compiling them takes 15 seconds.
os.environ.setdefault("TERCET_KERNELS", str(Path(__file__).parents[1] / ".pytest_cache" / "kernels"))


@pytest.fixture(autouse=True)
def own_caches(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a cache directory that is deleted with the tests' other files."""
    directory = tmp_path_factory.getbasetemp() / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(directory))
    return directory


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """``make("llama", attention_bias=True)`` returns a transformers model and the directory it is saved in."""
    from tiny_checkpoints import save_random

    def make_checkpoint(family: str, **fields: Any) -> tuple[Any, Path]:
        directory = tmp_path / f"transformers-{family}"
        return save_random(directory, family, **fields), directory

    return make_checkpoint


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the longest tests first, so that no worker waits for another one's last test."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


@pytest.fixture
def real_measurement(constant_speed: Callable[..., Speed], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a test of calibration measure the machine."""
    from tercet.train import calibrate

    monkeypatch.setattr(calibrate, "_measure", constant_speed)


@pytest.fixture(autouse=True, scope="session")
def constant_speed() -> Callable[..., Speed]:
    """Let calibration return a constant at once; return the function that measures."""
    # Imports torch, which the process that starts the workers does not need.
    from tercet.train import calibrate

    measure = calibrate._measure
    calibrate._measure = lambda *_: calibrate.Speed(3_000.0, "float32", 1)
    return measure
