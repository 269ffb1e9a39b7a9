"""The settings of a build: what can be chosen, its defaults, and which choices contradict each other."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, get_args

from tercet.errors import UserError, check_seed
from tercet.pretrain.hardware import HARDWARE
from tercet.settings import check_choice, check_positive, named_numbers, setting, settings

Sources = str | Path | Sequence[str | Path]
Optimizer = Literal["muon", "adamw"]
Digits = Literal["one", "three", "all"]
Whitespace = Literal["word", "apart"]
Parallel = Literal["ddp", "fsdp"]
Rules = Literal["none", "light", "web"]

END_OF_TEXT = "<|endoftext|>"
# ChatML's markers are reserved from the start, so that a chat model can be tuned from any base.
SPECIAL_TOKENS = (END_OF_TEXT, "<|im_start|>", "<|im_end|>")
SMALLEST_VOCABULARY = 256 + len(SPECIAL_TOKENS)
HEAD_SIZE = 32  # dimensions of an attention head
DEFAULT_MINUTES = 5.0


def parse_prices(pairs: Sequence[str]) -> dict[str, float]:
    """Return dollars an hour by the name of the hardware, from texts such as ``h100=2.50``."""
    return {name.lower(): amount for name, amount in named_numbers(pairs, "prices", "h100=2.50").items()}


@settings
class PretrainSettings:
    """The settings of a pre-training run. One budget sets its length; `tercet.pretrain.plan` derives those that are None.

    Raises:
        UserError: a value out of its range, or settings that contradict each other.
    """

    data: Sources = setting(
        help="File, directory, Hub data set or builtin:python-docs; may be repeated.",
        metavar="PATH",
        type=list[str],
        kw_only=False,
    )
    minutes: float | None = setting(
        default=None,
        metavar="N",
        help="Time budget for the whole build; default 5. Size and schedule are derived from it.",
    )
    tokens: int | None = setting(
        default=None,
        metavar="N",
        help="Budget in training tokens instead of minutes; the run is the same on any machine.",
    )
    flops: float | None = setting(
        default=None,
        metavar="N",
        help="Budget in floating point operations instead of minutes, such as 1e15; the run is the same on any machine.",
    )
    layers: int | None = setting(default=None, metavar="N", help="Number of layers; set the width too.")
    width: int | None = setting(default=None, metavar="N", help="Hidden size; set the number of layers too.")
    vocab_size: int | None = setting(default=None, metavar="N", help="Number of tokens in the vocabulary.")
    digits: Digits = setting(
        default="one", metavar="one|three|all", help="How many digits of a number one token may contain."
    )
    whitespace: Whitespace = setting(
        default="word",
        metavar="word|apart",
        help="Join a space to the next word, or keep spaces in separate tokens.",
    )
    context: int | None = setting(
        default=None, metavar="N", help="Context length in tokens; default: derived from the budget."
    )
    batch_tokens: int | None = setting(default=None, metavar="N", help="Tokens in an optimizer step.")
    optimizer: Optimizer = setting(
        default="muon", metavar="muon|adamw", help="Optimizer of the matrices in the transformer blocks."
    )
    learning_rate: float | None = setting(
        default=None, metavar="R", help="Peak learning rate of the matrices (with AdamW: of all weights)."
    )
    embedding_rate: float | None = setting(
        default=None, metavar="R", help="Peak learning rate of the embedding."
    )
    weight_decay: float | None = setting(default=None, metavar="W", help="Weight decay of the matrices.")
    z_loss: float = setting(
        default=0.0,
        metavar="W",
        help="Weight of the z-loss, which keeps the softmax's normaliser near 1 (PaLM: 1e-4).",
    )
    read_bytes: int | None = setting(
        default=None,
        metavar="N",
        help="Largest number of bytes of text to read; default: as many as the budget can use.",
    )
    allow_partial: bool = setting(
        default=False, help="Go on when more than half of a directory, archive or data set can't be used."
    )
    chat: str | Path | None = setting(
        default=None,
        metavar="FILE",
        type=Path,
        help="File of conversations (rows with messages); tuning on them turns the base model into a chat model.",
    )
    device: str | None = setting(
        default=None, metavar="D", help="cuda, cuda:1, mps or cpu; default: a GPU if the machine has one."
    )
    seed: int = setting(default=0, metavar="N", help="Seed of the initial weights and of the data order.")

    def __post_init__(self) -> None:
        self._normalise()
        self._check_budget()
        self._check_values()
        self._check_shape()

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)  # the class is frozen; this is part of its construction

    def _normalise(self) -> None:
        data = (self.data,) if isinstance(self.data, str | Path) else tuple(self.data)
        self._set("data", tuple(str(source) for source in data))
        if self.chat is not None:
            self._set("chat", str(self.chat))
        if self.minutes is None and self.tokens is None and self.flops is None:
            self._set("minutes", DEFAULT_MINUTES)

    def _check_budget(self) -> None:
        if not self.sources:
            raise UserError("`data` is empty; name files, directories or builtin:python-docs")
        if sum(budget is not None for budget in (self.minutes, self.tokens, self.flops)) > 1:
            raise UserError(
                "give only one of `minutes`, `tokens` and `flops`: each is a budget for the whole run"
            )

    def _check_values(self) -> None:
        check_positive(
            self, "minutes", "tokens", "flops", "layers", "width", "vocab_size", "context", "batch_tokens",
            "learning_rate", "embedding_rate", "read_bytes",
        )  # fmt: skip
        for name in ("weight_decay", "z_loss"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise UserError(f"`{name}` is {value}; it must be at least 0 and below 1")
        for name, choices in (("optimizer", Optimizer), ("digits", Digits), ("whitespace", Whitespace)):
            check_choice(self, name, get_args(choices))
        if self.optimizer == "adamw" and self.embedding_rate is not None:
            raise UserError(
                "`embedding_rate` needs `optimizer=muon`; AdamW has one learning rate for all weights"
            )
        check_seed(self.seed)

    def _check_shape(self) -> None:
        if self.vocab_size is not None and self.vocab_size < SMALLEST_VOCABULARY:
            raise UserError(
                f"`vocab_size` is {self.vocab_size}; it must be at least {SMALLEST_VOCABULARY}: one token for each "
                f"of the 256 bytes and {len(SPECIAL_TOKENS)} special tokens"
            )
        if self.width is not None and self.width % HEAD_SIZE:
            raise UserError(
                f"`width` is {self.width}; it must be a multiple of {HEAD_SIZE}, the size of an attention head"
            )
        if (self.layers is None) != (self.width is None):
            raise UserError("give `layers` and `width` together: both are needed to define the shape")

    @property
    def sources(self) -> tuple[str, ...]:
        """The data as a tuple of paths and references."""
        assert isinstance(self.data, tuple)
        return tuple(str(source) for source in self.data)

    def to_config(self) -> dict[str, Any]:
        """Return the settings with lists for tuples, as config.yaml holds them."""
        return {
            name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()
        }


@settings
class BuildSettings(PretrainSettings):
    """The settings of `tercet.build`: a pre-training run with its stages before and after, and its directory.

    Raises:
        UserError: a value out of its range, or settings that contradict each other.
    """

    out: str | Path = setting(
        help="Run directory; the model is written to DIR/model.", metavar="DIR", type=Path, kw_only=False
    )
    compare_tokenizers: Sequence[str] = setting(
        default=(),
        metavar="REF",
        option="compare-tokenizer",
        type=list[str],
        help="Model whose tokenizer the report compares with the new one; may be repeated.",
    )
    parallel: Parallel | None = setting(
        default=None,
        metavar="ddp|fsdp",
        help="Under torchrun: each process holds all weights (ddp, the default), or a shard of them (fsdp).",
    )
    curate: Rules | None = setting(
        default=None,
        metavar="RULES",
        help="Curate the data first by a set of rules: none (copies are removed), light or web.",
    )
    pairs: Sequence[str | Path] = setting(
        default=(),
        metavar="PATH",
        type=list[str],
        help="File of minimal pairs (sentence_good, sentence_bad), to measure grammar; may be repeated.",
    )
    chat_epochs: float | None = setting(
        default=None, metavar="N", help="Number of epochs over the conversations; default 3."
    )
    exclude: Sequence[str] = setting(
        default=(),
        hidden=True,
        help="Texts to remove from the corpus together with near-copies of them (a locked test split).",
    )

    def _normalise(self) -> None:
        super()._normalise()
        for name in ("compare_tokenizers", "pairs", "exclude"):
            self._set(name, tuple(str(value) for value in getattr(self, name) or ()))

    def _check_values(self) -> None:
        super()._check_values()
        check_positive(self, "chat_epochs")
        for name, choices in (("parallel", Parallel), ("curate", Rules)):
            if getattr(self, name) is not None:
                check_choice(self, name, get_args(choices))
        if self.chat_epochs is not None and self.chat is None:
            raise UserError("`chat_epochs` needs `chat`, the file of conversations")

    def to_config(self) -> dict[str, Any]:
        """Return the settings that decide the result, without the directory and the excluded texts."""
        config = super().to_config()
        del config["out"], config["exclude"]
        return config

    @property
    def identity(self) -> dict[str, Any]:
        """The settings that tell this run from another in the same directory."""
        # A run that stopped because of unusable files goes on when they are allowed.
        return {name: value for name, value in self.to_config().items() if name != "allow_partial"}


@settings
class EstimateSettings(PretrainSettings):
    """The settings of `tercet.pretrain.estimate.estimate`: a pre-training run, and the options of the estimate.

    Raises:
        UserError: a value out of its range, or settings that contradict each other.
    """

    fit: bool = setting(
        default=False,
        help="Train four tiny models, and predict the loss with the scaling law fitted to them.",
    )
    prices: Mapping[str, float] | None = setting(
        default=None,
        metavar="NAME=DOLLARS",
        option="price",
        type=list[str],
        parse=parse_prices,
        help="US dollars per hour of h100, h200, a100, l4 or 4090, to estimate the cost; may be repeated.",
    )

    def _check_values(self) -> None:
        super()._check_values()
        for name in self.prices or ():
            if name not in HARDWARE:
                raise UserError(f"`prices` names {name!r}; known names are {', '.join(HARDWARE)}")
