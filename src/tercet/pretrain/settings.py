"""What can be asked of a build, and what makes no sense."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from tercet.curation import PRESETS
from tercet.errors import UserError, check_seed
from tercet.pretrain.vocabulary import DIGITS, SPECIAL_TOKENS, WHITESPACE
from tercet.train.optimizer import Kind

SMALLEST_VOCABULARY = 256 + len(SPECIAL_TOKENS)


@dataclass(frozen=True)
class Settings:
    """A build. One budget decides its length; what is None follows from it (`build.plan`)."""

    data: tuple[str, ...]  # files, directories or builtin:python-docs
    minutes: float | None = None  # for everything; size, steps and schedule follow
    tokens: int | None = None  # to train on: the same run on any machine
    flops: float | None = None  # of training, 6 a matrix weight and token: the same run on any machine
    layers: int | None = None
    width: int | None = None
    vocab_size: int | None = None
    digits: str = "one"  # of a number that may be one token: one, three, all
    whitespace: str = "word"  # joined to the word behind it, or apart
    compare_tokenizers: tuple[str, ...] = ()  # whose compression is measured on the held-out text
    context: int | None = None  # tokens the model reads at once
    batch_tokens: int | None = None  # an optimizer step
    optimizer: Kind = "muon"  # for the matrices of the blocks
    learning_rate: float | None = None  # peak, of the matrices; AdamW: of everything
    embedding_rate: float | None = None
    weight_decay: float | None = None
    device: str | None = None  # cuda, cuda:1, mps, cpu; None: the first of those that is there
    parallel: str | None = None  # under torchrun: ddp (None), or fsdp, where processes share the weights
    curate: str | None = None  # the rules of a first stage that cleans the data; None: as it is
    pairs: tuple[str, ...] = ()  # files of minimal pairs (BLiMP's form) that the network is measured on
    chat: str | None = None  # a file of conversations: the last stage makes a chat model of the base
    chat_epochs: float | None = None  # passes over them; None: 3
    read_bytes: int | None = None  # of text at most; None: what the budget has use for
    z_loss: float = 0.0  # weight of the squared logarithm of the softmax's normaliser (PaLM: 1e-4)
    seed: int = 0  # of weights and data order

    @staticmethod
    def of(data: Sequence[str | Path] | str | Path, **settings: Any) -> Settings:
        """Checked settings; a budget of five minutes where none is given.

        Raises:
            UserError: something that can't be.
        """
        sources = (data,) if isinstance(data, str | Path) else tuple(data)
        known = {field.name for field in fields(Settings)} - {"data"}
        if unknown := set(settings) - known:
            raise UserError(
                f"build has no setting {', '.join(sorted(unknown))}; there are {', '.join(sorted(known))}"
            )
        if settings.get("chat") is not None:
            settings["chat"] = str(settings["chat"])
        for several in ("compare_tokenizers", "pairs"):
            settings[several] = tuple(map(str, settings.get(several) or ()))
        found = Settings(tuple(map(str, sources)), **settings)
        if found.minutes is None and found.tokens is None and found.flops is None:
            return Settings(**{**asdict(found), "minutes": 5.0})
        return found

    def __post_init__(self) -> None:
        if not self.data:
            raise UserError("no data given; name files, directories or builtin:python-docs")
        if sum(budget is not None for budget in (self.minutes, self.tokens, self.flops)) > 1:
            raise UserError("give one of --minutes, --tokens and --flops: each decides how long the run is")
        positive = (
            "minutes", "tokens", "flops", "layers", "width", "vocab_size", "context", "batch_tokens",
            "learning_rate", "embedding_rate", "chat_epochs", "read_bytes",
        )  # fmt: skip
        for name in positive:
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise UserError(f"{_option(name)} is {value}; it must be a positive number")
        for name in ("weight_decay", "z_loss"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise UserError(f"{_option(name)} is {value}; it must be from 0 to below 1")
        if self.optimizer not in ("muon", "adamw"):
            raise UserError(f"--optimizer is {self.optimizer!r}; it must be muon or adamw")
        if self.optimizer == "adamw" and self.embedding_rate is not None:
            raise UserError("--embedding-rate belongs to --optimizer muon; AdamW has one rate for everything")
        for name, allowed in (("digits", DIGITS), ("whitespace", WHITESPACE)):
            if getattr(self, name) not in allowed:
                raise UserError(f"{_option(name)} is {getattr(self, name)!r}; choose {', '.join(allowed)}")
        if self.parallel not in (None, "ddp", "fsdp"):
            raise UserError(f"--parallel is {self.parallel!r}; it must be ddp or fsdp")
        if self.curate not in (None, *PRESETS):
            raise UserError(f"--curate is {self.curate!r}; choose {', '.join(PRESETS)}")
        if self.chat_epochs is not None and self.chat is None:
            raise UserError("--chat-epochs belongs to --chat DATA, which is not given")
        if self.vocab_size is not None and self.vocab_size < SMALLEST_VOCABULARY:
            raise UserError(
                f"--vocab-size is {self.vocab_size}; it must be at least {SMALLEST_VOCABULARY}: a token for each "
                f"of the 256 bytes and {len(SPECIAL_TOKENS)} special ones"
            )
        if self.width is not None and (self.width < 32 or self.width % 32):
            raise UserError(
                f"--width is {self.width}; it must be a multiple of 32, the size of an attention head"
            )
        if (self.layers is None) != (self.width is None):
            raise UserError("give layers and width together: one without the other is no shape")
        check_seed(self.seed)

    def to_config(self) -> dict[str, Any]:
        """For config.yaml."""
        lists = {name: list(getattr(self, name)) for name in ("compare_tokenizers", "pairs")}
        return {**asdict(self), "data": list(self.data), **lists}


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
