"""Reasoning settings of the protocols, as variables of a model's chat template.

Templates have two kinds of switches: ``enable_thinking`` (Qwen 3, SmolLM3, GLM) and ``reasoning_effort``
(gpt-oss). A model without them has nothing to switch, so the settings are hints for it.
"""

from __future__ import annotations

import re
from typing import Any

from tercet.serve.api.field_table import Ignored
from tercet.serve.models import Served

OFF = ("none", "disabled", "minimal")
_NO_SWITCH = "this model's chat template has no such setting"


def knows(served: Served, name: str) -> bool:
    """Return whether a chat template of the model mentions a variable. False for a hosted model."""
    if served.local is None:
        return False
    templates = "\n".join(served.tokenizer.templates.values())
    return re.search(rf"\b{re.escape(name)}\b", templates) is not None


def reasoning_variables(
    served: Served, effort: str | None, path: str, ignored: Ignored, *, levels_only: bool = False
) -> dict[str, Any]:
    """Return the template's variables for a level of effort; None: the template's default.

    Args:
        served: the model.
        effort: the level, such as low or high; none turns reasoning off.
        path: the place of the level in the request.
        ignored: receives the path where the template has no such setting.
        levels_only: another field of the request turns reasoning on and off.
    """
    if effort is None:
        return {}
    switch = not levels_only and knows(served, "enable_thinking")
    if effort in OFF and switch:
        return {"enable_thinking": False}
    if knows(served, "reasoning_effort"):
        return {"reasoning_effort": effort}
    if effort in OFF[:2]:
        return {}  # a model that does not reason follows this anyway
    if switch:
        return {"enable_thinking": True}
    ignored.add(path, _NO_SWITCH)
    return {}


def thinking_variables(served: Served, kind: str, path: str, ignored: Ignored) -> dict[str, Any]:
    """Return the template's variables for Anthropic's ``thinking``, whose type is ``kind``."""
    if knows(served, "enable_thinking"):
        return {"enable_thinking": kind not in OFF}
    if kind not in OFF:
        ignored.add(path, "this model does not think, or has no switch for it")
    return {}
