"""The settings of a build."""

from __future__ import annotations

from tercet.pretrain.settings import BuildSettings


def test_none_stands_for_no_pairs_tokenizers_and_excluded_texts() -> None:
    settings = BuildSettings("text.txt", "run", pairs=None, compare_tokenizers=None, exclude=None)  # type: ignore[arg-type]
    assert settings == BuildSettings("text.txt", "run")
