"""Every test has caches of its own, and training plans that do not depend on how busy the machine is."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tercet.train import calibrate

if TYPE_CHECKING:
    from tiny_checkpoints import Make

# Compiled kernels alone are kept from run to run, for subprocesses too: making them takes fifteen seconds.
os.environ.setdefault("TERCET_KERNELS", str(Path(__file__).parents[1] / ".pytest_cache" / "kernels"))


@pytest.fixture(autouse=True)
def own_caches(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Caches in a directory that goes away with the tests."""
    directory = tmp_path_factory.getbasetemp() / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(directory))
    return directory


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """``make("llama", attention_bias=True)``: a model of transformers, and the directory it is saved in."""
    from tiny_checkpoints import save_theirs

    def build(family: str, **fields: Any) -> tuple[Any, Path]:
        directory = tmp_path / f"theirs-{family}"
        return save_theirs(directory, family, **fields), directory

    return build


MEASURE = calibrate._measure


@pytest.fixture
def real_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the test of calibration itself."""
    monkeypatch.setattr(calibrate, "_measure", MEASURE)


@pytest.fixture(autouse=True, scope="session")
def a_machine_of_known_speed() -> None:
    """Calibration answers at once, and always the same; its own tests call the real one."""
    calibrate._measure = lambda *_: calibrate.Speed(3_000.0, "float32", 1)
