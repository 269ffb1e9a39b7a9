"""What is asked of a curation, and where its files on the way are.

The stages (`filtering`, `matching`, `writing`) are functions over a `Work`. Each leaves files that are whole
or not there; a marker (JSON) is written last. So a stage that was cut off is gone on with, and any
number of processes, on this machine or on others that see the same directory, can share one.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tercet.curation.dedup import MinHash
from tercet.curation.weights import Weight


@dataclass(frozen=True)
class Settings:
    """What decides the output, besides the documents. Hashable, so that workers keep what they make of it."""

    preset: str = "web"
    languages: tuple[str, ...] | None = None
    rules: tuple[tuple[str, float], ...] = ()
    mask_personal_data: bool = False
    minhash: MinHash | None = None
    tests: str | None = None  # fingerprint of the test texts
    weights: tuple[tuple[str, Weight], ...] = ()
    seed: int = 0
    shard_bytes: int = 100_000_000


@dataclass(frozen=True)
class Work:
    """A curation's working directory and its settings."""

    directory: Path
    settings: Settings

    def path(self, name: str) -> Path:
        return self.directory / name

    def parts(self) -> list[str]:
        """The names of the parts that were read, in order."""
        return sorted(path.name.removesuffix(".read.json") for path in self.directory.glob("*.read.json"))

    def hash_names(self) -> list[str]:
        bands = self.settings.minhash.bands if self.settings.minhash else 0
        return ["exact0", "exact1", *(f"band{band}" for band in range(bands))]
