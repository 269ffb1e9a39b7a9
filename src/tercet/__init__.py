"""Tercet: prompt, tune or build a large language model, and measure which one your task needs.

Every public name is imported when it is first used, so that ``import tercet`` is instant.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tercet.curation.pipeline import curate as curate
    from tercet.engine.request import Sampling as Sampling
    from tercet.errors import UserError as UserError
    from tercet.evaluate.task import Task as Task
    from tercet.finetune.sft import tune as tune
    from tercet.ladder.climb import climb as climb
    from tercet.pretrain.pretrain import build as build
    from tercet.prompt.llm import LLM as LLM

__all__ = ["LLM", "Sampling", "Task", "UserError", "__version__", "build", "climb", "curate", "tune"]

_MODULES = {
    "LLM": "tercet.prompt.llm",
    "Sampling": "tercet.engine.request",
    "Task": "tercet.evaluate.task",
    "UserError": "tercet.errors",
    "build": "tercet.pretrain.pretrain",
    "climb": "tercet.ladder.climb",
    "curate": "tercet.curation.pipeline",
    "tune": "tercet.finetune.sft",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("tercet")
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'tercet' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
