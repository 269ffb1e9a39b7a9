"""Tercet: prompt, tune or build a large language model, and measure which one your task needs.

Public names: LLM, Sampling, Task, UserError, and the functions build, tune and climb. Each is
imported when it is first used, so that ``import tercet`` is instant.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tercet.build.pretrain import build as build
    from tercet.climb.climb import climb as climb
    from tercet.climb.task import Task as Task
    from tercet.engine.request import Sampling as Sampling
    from tercet.errors import UserError as UserError
    from tercet.prompt.llm import LLM as LLM
    from tercet.tune.sft import tune as tune

__all__ = ["LLM", "Sampling", "Task", "UserError", "__version__", "build", "climb", "tune"]

_HOMES = {
    "LLM": "tercet.prompt.llm",
    "Sampling": "tercet.engine.request",
    "Task": "tercet.climb.task",
    "UserError": "tercet.errors",
}
_ACTIONS = {"build": "tercet.build.pretrain", "tune": "tercet.tune.sft", "climb": "tercet.climb.climb"}


class _ActionPackage(ModuleType):
    """A package that is also the function of its name.

    ``tercet.build`` is where building lives, and ``tercet.build(...)`` does it. Python binds a
    package to its parent whenever something inside is imported, which would hide a plain function.
    """

    def __call__(self, *args: Any, **options: Any) -> Any:
        name = self.__name__.rpartition(".")[2]
        return getattr(importlib.import_module(_ACTIONS[name]), name)(*args, **options)


for _name in _ACTIONS:  # these packages are empty but for their docstring
    importlib.import_module(f"tercet.{_name}").__class__ = _ActionPackage


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("tercet")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'tercet' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
