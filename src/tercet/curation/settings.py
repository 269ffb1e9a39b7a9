"""The settings of a curation: what can be chosen, its defaults, and the forms that values may have."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, get_args

from tercet.curation.weights import Weight, parse_weights
from tercet.errors import UserError, check_seed
from tercet.settings import check_choice, check_positive, named_numbers, setting, settings

Preset = Literal["none", "light", "web"]
Engine = Literal["local", "ray"]
BANDS, ROWS = 14, 8  # of MinHash; `tercet.curation.dedup` has the probabilities and the source
LARGEST_SHARD_MB = 1000


def parse_rules(pairs: Sequence[str]) -> dict[str, float]:
    """Return numbers by the name of their rule, from texts such as ``min_words=20``."""
    return named_numbers(pairs, "rules", "min_words=20")


@settings
class CurateSettings:
    """The settings of `tercet.curate`.

    Raises:
        UserError: a value out of its range.
    """

    data: str | Path | Sequence[str | Path] = setting(
        metavar="PATH",
        type=list[str],
        kw_only=False,
        help="File, directory or Hub data set; may be repeated.",
    )
    out: str | Path = setting(
        metavar="DIR", type=Path, kw_only=False, help="Run directory; the corpus is written to DIR/data."
    )
    preset: Preset = setting(
        default="web", option="rules", metavar="none|light|web", help="Set of quality rules."
    )
    rules: Mapping[str, float] | None = setting(
        default=None,
        option="set",
        metavar="NAME=N",
        type=list[str],
        parse=parse_rules,
        help="Change the limit of a rule; may be repeated.",
    )
    languages: Sequence[str] | None = setting(
        default=None,
        option="language",
        metavar="CODE",
        type=list[str],
        help="Keep only this language; may be repeated.",
    )
    mask_personal_data: bool = setting(
        default=False, help="Replace e-mail addresses, telephone numbers and the like."
    )
    near_duplicates: bool = setting(
        default=True, help="Remove near-copies too; exact copies are always removed."
    )
    bands: int = setting(default=BANDS, metavar="N", help="MinHash bands: more bands find more near-copies.")
    rows: int = setting(default=ROWS, metavar="N", help="Values in a MinHash band: more rows are stricter.")
    decontaminate: Mapping[str, Sequence[str]] | Sequence[str | Path] = setting(
        default=(),
        metavar="TASK",
        type=list[str],
        help="Remove the test texts of a task, or of a file (text, prompt, question, input or sentence); may be repeated.",
    )
    weights: Mapping[str, Weight | float] | None = setting(
        default=None,
        option="weight",
        metavar="SOURCE=W",
        type=list[str],
        parse=parse_weights,
        help="How often a source is written (2, 0.5), or its share of the corpus (30%); may be repeated.",
    )
    allow_partial: bool = setting(
        default=False, help="Go on when more than half of a directory, archive or data set can't be used."
    )
    seed: int = setting(default=0, metavar="N", help="Seed of the order and of the sample.")
    shard_mb: float = setting(default=100, metavar="N", help="Megabytes of text in a shard, approximately.")
    processes: int | None = setting(
        default=None, metavar="N", help="Number of processes; default: one for each core."
    )
    engine: Engine = setting(
        default="local",
        option="ray",
        type=bool,
        parse=lambda ray: "ray" if ray else "local",
        help="Run on Ray Data: on the cluster of RAY_ADDRESS, or on this machine.",
    )

    def __post_init__(self) -> None:
        check_seed(self.seed)
        check_choice(self, "preset", get_args(Preset))
        check_choice(self, "engine", get_args(Engine))
        check_positive(self, "bands", "rows", "processes")
        if not 0 < self.shard_mb <= LARGEST_SHARD_MB:
            raise UserError(
                f"`shard_mb` is {self.shard_mb:g}; it must be above 0 and at most {LARGEST_SHARD_MB}"
            )

    @property
    def sources(self) -> list[str]:
        """The data as a list of paths and references."""
        return (
            [str(self.data)] if isinstance(self.data, str | Path) else [str(source) for source in self.data]
        )
