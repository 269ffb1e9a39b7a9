"""A build in two processes, as torchrun starts them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

import forked
from tercet.compose import build
from tercet.errors import UserError

SHAPE = ["--layers", "1", "--width", "32", "--vocab-size", "300", "--context", "32", "--batch-tokens", "256"]
# The data type must not depend on the measured speed of a busy machine.
START = (
    "import tercet.train.calibrate as calibrate\n"
    "calibrate._measure = lambda *a: calibrate.Speed(3_000.0, 'float32', 1)\n"
    "import runpy\n"
    "runpy.run_module('tercet', run_name='__main__')\n"
)


def run(path: Path, count: int, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    (path / "start.py").write_text(START)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    return subprocess.run(
        [*launch, str(path / "start.py"), "build", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.mark.long
def test_two_processes_build_the_same_model_as_a_single_process(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    words = ["the", "small", "red", "cat", "dog", "runs", "sleeps", "under", "tree", "house"]
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": " ".join(rng.choice(words, 90))}) + "\n" for _ in range(200)))
    common = ["--data", str(text), "--tokens", "20000", *SHAPE]
    done = run(tmp_path, 2, [*common, "--parallel", "fsdp", "--out", str(tmp_path / "two"), "--json"])
    assert done.returncode == 0, done.stderr[-3000:]
    two = json.loads(done.stdout)  # of the first process alone
    alone = build(
        text,
        tmp_path / "alone",
        tokens=20_000,
        layers=1,
        width=32,
        vocab_size=300,
        context=32,
        batch_tokens=256,
    )
    assert two["bits_per_byte"] == pytest.approx(alone.bits_per_byte, rel=1e-3)
    assert two["tokens"] == alone.tokens
    assert AutoModelForCausalLM.from_pretrained(two["model"]).num_parameters() == alone.parameters
    assert {path.name for path in (tmp_path / "two").iterdir()} == {
        path.name for path in (tmp_path / "alone").iterdir()
    }
    wrong = [
        forked.Program(
            START,
            "build",
            *[*common[:2], "--tokens", "-1", "--out", str(tmp_path / "three")],
            environment={**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"},
        )
        for rank in range(2)
    ]
    assert all(program.wait() == 2 for program in wrong)
    assert "--tokens is -1" in wrong[0].stderr
    with pytest.raises(UserError, match="`parallel` needs several processes"):
        build(text, tmp_path / "four", tokens=20_000, parallel="ddp")
