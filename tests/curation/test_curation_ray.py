"""The same stages on Ray Data, with a local Ray of two workers: the same files."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tercet.curation import filtering
from tercet.curation.pipeline import curate
from tercet.errors import UserError

pytest.importorskip("ray.data", reason="the extra ray is not installed")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")
TEST = "Which of these nine planets is the one that has the largest number of moons?"


def write_corpus(path: Path, seed: int) -> str:
    generator = random.Random(seed)
    texts = [" ".join(f"w{number}" for number in generator.sample(range(10**9), 40)) for _ in range(40)]
    texts += [texts[3], f"{texts[5]} again", f"{texts[6]}\n\n{TEST}"]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


@pytest.fixture(autouse=True)
def two_workers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    import ray

    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # or Ray leaves a token in the home directory
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def test_ray_writes_the_same_files_as_local_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filtering, "PART_CHARACTERS", 4000)
    data = [write_corpus(tmp_path / f"{seed}.jsonl", seed) for seed in range(3)]
    options = {"preset": "none", "processes": 2, "decontaminate": {"t": [TEST]}, "weights": {data[0]: 1.5}}
    for engine in ("local", "ray"):
        curate(data, tmp_path / engine, engine=engine, shard_mb=0.02, **options)
    local, ray = (
        {path.name: path.read_bytes() for path in (tmp_path / engine / "data").iterdir()}
        for engine in ("local", "ray")
    )
    assert len(local) > 1
    assert local == ray
    accounts = [json.loads((tmp_path / engine / "report.json").read_text()) for engine in ("local", "ray")]
    for account in accounts:
        for timing in ("seconds", "stages", "bytes_per_second"):
            account.pop(timing)
    assert accounts[0] == accounts[1]

    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": \n')
    with pytest.raises(UserError, match=r"broken\.jsonl"):
        curate(broken, tmp_path / "out", preset="none", engine="ray", processes=2)
