"""`tercet.build`: the one public function that combines two packages of the same layer, curation and pre-training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tercet.pretrain.settings import BuildSettings
from tercet.settings import keyword_form

if TYPE_CHECKING:
    from tercet.pretrain.result import Built


def build_with(settings: BuildSettings) -> Built:
    """Train a tokenizer and a Qwen3-shaped network on text and write them to ``out/model``.

    The parameters are the fields of `BuildSettings`. An interrupted build resumes with the same call, and
    ends with the same weights bit for bit.

    Returns:
        The built model's path, sizes, held-out bits per byte, samples and measurements.

    Raises:
        UserError: bad data or settings, or ``out`` belongs to another run.
        KeyboardInterrupt: the build was interrupted; the same call resumes it.
    """
    from tercet.pretrain.pretrain import pretrain

    return pretrain(settings, clean=_curated)


def _curated(settings: BuildSettings, directory: Path) -> Sequence[str]:
    """Curate the data of a build into ``directory`` and return the sources to train on."""
    from tercet.curation.pipeline import curate

    assert settings.curate is not None
    curated = curate(
        settings.sources,
        directory,
        preset=settings.curate,
        seed=settings.seed,
        allow_partial=settings.allow_partial,
    )
    return [curated.data]


build = keyword_form(BuildSettings, build_with, "build")
