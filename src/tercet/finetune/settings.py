"""The settings of a fine-tuning run: what can be chosen, its defaults, and which choices contradict each other."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from tercet.data.rows import OverLength
from tercet.errors import UserError, check_seed
from tercet.model.control_text import CONTROL_TOKEN_MODES, ControlTokenMode
from tercet.settings import check_choice, check_positive, setting, settings

Method = Literal["lora", "full"]
Rows = Sequence[dict[str, Any]]


@settings
class TuneSettings:
    """The settings of `tercet.tune`. A learning rate of None follows from the size of the model.

    Raises:
        UserError: a value out of its range, or settings that contradict each other.
    """

    model: str | Path = setting(
        metavar="REF",
        argument=True,
        type=str,
        kw_only=False,
        help="Checkpoint or run directory, GGUF file, builtin:smollm2, org/name[:QUANTISATION] on the Hub, or "
        "another local model reference.",
    )
    data: str | Path | Rows = setting(
        metavar="PATH",
        type=Path,
        kw_only=False,
        help="File of examples: rows of messages, prompt and completion, instruction and output, or text.",
    )
    out: str | Path = setting(
        metavar="DIR", type=Path, kw_only=False, help="Run directory; the result is written to DIR/model."
    )
    dev: str | Path | Rows | None = setting(
        default=None,
        metavar="PATH",
        type=Path,
        help="File of held-out rows; default: a twentieth of the data.",
    )
    method: Method = setting(
        default="lora", metavar="lora|full", help="Train a low-rank adapter, or all weights."
    )
    epochs: float = setting(default=3.0, metavar="N", help="Number of epochs.")
    minutes: float | None = setting(
        default=None,
        metavar="N",
        help="Time limit; if the epochs would take longer, the run takes fewer steps.",
    )
    patience: int | None = setting(
        default=None,
        metavar="N",
        help="End the run after N held-out evaluations in a row without a lower loss; default: never. The result has "
        "the weights with the lowest loss in either case.",
    )
    batch_size: int = setting(default=16, metavar="N", help="Examples in an optimizer step.")
    learning_rate: float | None = setting(
        default=None,
        metavar="R",
        help="Peak learning rate; default: derived from the model's size and the method.",
    )
    weight_decay: float = setting(default=0.0, metavar="W", help="Weight decay of AdamW.")
    rank: int | None = setting(default=None, metavar="N", help="Rank of the adapter; default 16.")
    alpha: float | None = setting(
        default=None, metavar="A", help="Alpha of the adapter; default twice the rank."
    )
    # Kalajdzievski 2023, arXiv:2312.03732
    rank_stabilised: bool = setting(
        default=False, option="rslora", help="Scale the adapter by alpha / sqrt(rank) (rsLoRA)."
    )
    merge: bool = setting(default=False, help="Write a merged checkpoint instead of an adapter.")
    max_tokens: int | None = setting(
        default=None,
        metavar="N",
        help="Longest example in tokens; default: the context of the model, at most 2048.",
    )
    over_length: OverLength = setting(
        default="drop", metavar="drop|truncate|error", help="What to do with longer examples."
    )
    chat_template: str | Path | None = setting(
        default=None, metavar="FILE", type=Path, help="Jinja template for rows with messages."
    )
    control_tokens: ControlTokenMode = setting(
        default="text",
        metavar="text|control",
        help="What control tokens that messages spell become: ordinary text, or these tokens.",
    )
    device: str | None = setting(
        default=None, metavar="D", help="cuda, cuda:1, mps or cpu; default: a GPU if the machine has one."
    )
    seed: int = setting(default=0, metavar="N", help="Seed of the adapter's weights and of the data order.")

    def __post_init__(self) -> None:
        check_choice(self, "method", get_args(Method))
        check_choice(self, "over_length", get_args(OverLength))
        check_choice(self, "control_tokens", CONTROL_TOKEN_MODES)
        check_positive(
            self,
            "epochs",
            "batch_size",
            "learning_rate",
            "rank",
            "alpha",
            "max_tokens",
            "minutes",
            "patience",
        )
        if not (self.weight_decay >= 0 and math.isfinite(self.weight_decay)):
            raise UserError(
                f"`weight_decay` is {self.weight_decay}; it must be a finite number of at least 0"
            )
        if self.method == "full":
            adapter = {
                "rank": self.rank,
                "alpha": self.alpha,
                "rank_stabilised": self.rank_stabilised or None,
                "merge": self.merge or None,
            }
            given = [f"`{name}`" for name, value in adapter.items() if value is not None]
            if given:
                verb = "needs" if len(given) == 1 else "need"
                raise UserError(f"{' and '.join(given)} {verb} `method=lora`; full tuning has no adapter")
        check_seed(self.seed)

    def to_config(self, source: Path) -> dict[str, Any]:
        """Return what config.yaml holds; ``source`` is the checkpoint directory of the model."""
        config = {field: value for field, value in vars(self).items() if field != "out"}
        return config | {
            "model": str(source),
            "data": _path(self.data),
            "dev": None if self.dev is None else _path(self.dev),
            "chat_template": str(self.chat_template) if self.chat_template else None,
        }


def _path(rows: str | Path | Rows) -> str:
    return str(rows) if isinstance(rows, str | Path) else "rows given in Python"
