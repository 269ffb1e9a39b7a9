"""The settings of a climb: the task, the model, the rungs and the time."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from tercet.errors import UserError, check_seed, nearest
from tercet.settings import check_positive, setting, settings

if TYPE_CHECKING:
    from tercet.evaluate.task import Task
    from tercet.prompt.llm import LLM

RungName = Literal["majority", "tfidf", "nearest", "zero-shot", "few-shot", "lora", "full", "scratch"]
LADDER: tuple[str, ...] = get_args(RungName)  # from the cheapest rung to the most expensive


def parse_rungs(text: str) -> list[str]:
    """Return the names in a comma-separated list."""
    return [name.strip() for name in text.split(",") if name.strip()]


@settings
class ClimbSettings:
    """The settings of `tercet.climb`.

    Raises:
        UserError: a rung that does not exist, or a value out of its range.
    """

    task: "Task | str | Path" = setting(
        metavar="TASK",
        argument=True,
        type=str,
        kw_only=False,
        help="Task file (YAML), or builtin:docs-routing.",
    )
    model: "LLM | str | Path | None" = setting(
        default=None,
        metavar="REF",
        type=str,
        help="Model for the prompting and tuning rungs, such as builtin:smollm2; without it the climb builds a "
        "base model first.",
    )
    rungs: Sequence[str] | None = setting(
        default=None,
        metavar="A,B,C",
        type=str,
        parse=parse_rungs,
        help=f"Comma-separated rungs to measure: {', '.join(LADDER)}; default: all.",
    )
    minutes: float = setting(default=10.0, metavar="N", help="Time budget for the whole climb.")
    seed: int = setting(default=0, metavar="N", help="Random seed of training, shots and statistics.")
    out: str | Path | None = setting(
        default=None, metavar="DIR", type=Path, help="Run directory; default runs/TASK."
    )

    def __post_init__(self) -> None:
        check_seed(self.seed)
        check_positive(self, "minutes")
        if self.rungs is None:
            return
        for name in self.rungs:
            if name not in LADDER:
                hint = "".join(f"; did you mean {match}?" for match in nearest(name, LADDER))
                raise UserError(f"there is no rung {name!r}{hint} (the ladder has {', '.join(LADDER)})")
        if not self.rungs:
            raise UserError(f"`rungs` is empty; the ladder has {', '.join(LADDER)}")

    @property
    def rung_names(self) -> list[str]:
        """The requested rungs, in the order of the ladder."""
        return [name for name in LADDER if self.rungs is None or name in self.rungs]
