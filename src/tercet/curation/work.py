"""The working directory of a curation, which its stages share.

The stages (`filtering`, `matching`, `writing`) are functions of a `Work`. They write files atomically, and a
marker (JSON) last. So an interrupted stage resumes, and any number of processes can share a stage, on this
machine or on others that see the same directory.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tercet.curation.dedup import MinHash
from tercet.curation.weights import Weight


@dataclass(frozen=True)
class StageSettings:
    """The settings of the stages; hashable, so that workers can cache by them."""

    preset: str = "web"
    languages: tuple[str, ...] | None = None
    rules: tuple[tuple[str, float], ...] = ()
    mask_personal_data: bool = False
    minhash: MinHash | None = None
    tests: str | None = None  # fingerprint of the test texts
    weights: tuple[tuple[str, Weight], ...] = ()
    seed: int = 0
    shard_bytes: int = 100_000_000
    allow_partial: bool = False


@dataclass(frozen=True)
class Work:
    """A curation's working directory and its settings."""

    directory: Path
    settings: StageSettings

    def path(self, name: str) -> Path:
        """Return the path of a file in the working directory."""
        return self.directory / name

    def parts(self) -> list[str]:
        """Return the names of the parts that were read, in order."""
        return sorted(path.name.removesuffix(".read.json") for path in self.directory.glob("*.read.json"))

    def hash_names(self) -> list[str]:
        """Return the names of the columns of hashes, in the order of the files of hashes."""
        bands = self.settings.minhash.bands if self.settings.minhash else 0
        return ["exact0", "exact1", *(f"band{band}" for band in range(bands))]
