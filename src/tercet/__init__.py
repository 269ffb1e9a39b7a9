"""Tercet: prompt, tune or build a large language model, and measure which one your task needs.

Every public name is imported when it is first used, so that ``import tercet`` is instant.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tercet.compose import build as build
    from tercet.curation.pipeline import Curated as Curated
    from tercet.curation.pipeline import curate as curate
    from tercet.curation.settings import CurateSettings as CurateSettings
    from tercet.engine.request import Completion as Completion
    from tercet.engine.request import Sampling as Sampling
    from tercet.engine.request import Score as Score
    from tercet.errors import ContextOverflow as ContextOverflow
    from tercet.errors import UserError as UserError
    from tercet.evaluate.task import Task as Task
    from tercet.finetune.result import Tuned as Tuned
    from tercet.finetune.settings import TuneSettings as TuneSettings
    from tercet.finetune.sft import tune as tune
    from tercet.ladder.check import TaskCheck as TaskCheck
    from tercet.ladder.check import check_task as check_task
    from tercet.ladder.climb import climb as climb
    from tercet.ladder.result import Report as Report
    from tercet.ladder.settings import ClimbSettings as ClimbSettings
    from tercet.model.store import StoredModel as StoredModel
    from tercet.model.store import models as models
    from tercet.pretrain.result import Built as Built
    from tercet.pretrain.settings import BuildSettings as BuildSettings
    from tercet.prompt.errors import BatchError as BatchError
    from tercet.prompt.errors import HostedError as HostedError
    from tercet.prompt.errors import OutputError as OutputError
    from tercet.prompt.llm import LLM as LLM

_MODULES = {
    # Use a model.
    "LLM": "tercet.prompt.llm",
    "Sampling": "tercet.engine.request",
    "Completion": "tercet.engine.request",
    "Score": "tercet.engine.request",
    # Make one, and measure which one a task needs: function, settings, result.
    "build": "tercet.compose",
    "BuildSettings": "tercet.pretrain.settings",
    "Built": "tercet.pretrain.result",
    "tune": "tercet.finetune.sft",
    "TuneSettings": "tercet.finetune.settings",
    "Tuned": "tercet.finetune.result",
    "curate": "tercet.curation.pipeline",
    "CurateSettings": "tercet.curation.settings",
    "Curated": "tercet.curation.pipeline",
    "climb": "tercet.ladder.climb",
    "ClimbSettings": "tercet.ladder.settings",
    "Report": "tercet.ladder.result",
    "Task": "tercet.evaluate.task",
    "check_task": "tercet.ladder.check",
    "TaskCheck": "tercet.ladder.check",
    # Models on this machine.
    "models": "tercet.model.store",
    "StoredModel": "tercet.model.store",
    # Mistakes; the others are subclasses of UserError.
    "UserError": "tercet.errors",
    "ContextOverflow": "tercet.errors",
    "OutputError": "tercet.prompt.errors",
    "BatchError": "tercet.prompt.errors",
    "HostedError": "tercet.prompt.errors",
}

__all__ = [
    "LLM",
    "BatchError",
    "BuildSettings",
    "Built",
    "ClimbSettings",
    "Completion",
    "ContextOverflow",
    "CurateSettings",
    "Curated",
    "HostedError",
    "OutputError",
    "Report",
    "Sampling",
    "Score",
    "StoredModel",
    "Task",
    "TaskCheck",
    "TuneSettings",
    "Tuned",
    "UserError",
    "__version__",
    "build",
    "check_task",
    "climb",
    "curate",
    "models",
    "tune",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("tercet")
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'tercet' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
