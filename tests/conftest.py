"""Every test has caches of its own, and training plans that do not depend on how busy the machine is."""

from pathlib import Path

import pytest

from tercet.train import calibrate


@pytest.fixture(autouse=True)
def own_caches(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Caches in a directory that goes away with the tests."""
    directory = tmp_path_factory.getbasetemp() / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(directory))
    return directory


MEASURE = calibrate._measure


@pytest.fixture
def real_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the test of calibration itself."""
    monkeypatch.setattr(calibrate, "_measure", MEASURE)


@pytest.fixture(autouse=True, scope="session")
def a_machine_of_known_speed() -> None:
    """Calibration answers at once, and always the same; its own tests call the real one."""
    calibrate._measure = lambda *_: calibrate.Speed(20_000.0, "float32", 1)
