"""Settings of a server: those of the command, and those that the running server reads."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tercet.engine.request import SamplingChoice
from tercet.errors import UserError
from tercet.model.control_text import CONTROL_TOKEN_MODES, ControlTokenMode
from tercet.settings import check_choice, check_positive, setting, settings

SMALLEST_BODY = 0.001  # MiB
SHORTEST_TIMEOUT = 0.1  # seconds


@settings
class ServeSettings:
    """The settings of `tercet serve`.

    Raises:
        UserError: a value out of its range, or settings that contradict each other.
    """

    refs: Sequence[str] = setting(
        metavar="REF",
        argument=True,
        type=list[str],
        kw_only=False,
        help="Model references (as for tercet prompt); NAME=REF sets the name for clients.",
    )
    adapter: Sequence[str] = setting(
        default=(),
        metavar="NAME=DIR",
        type=list[str],
        help="LoRA adapter, served under its own name on the weights of its base model; may be repeated.",
    )
    host: str = setting(
        default="127.0.0.1",
        metavar="H",
        help="Address to listen on; any address other than loopback requires a key.",
    )
    port: int = setting(default=8000, metavar="P", help="Port; 0 chooses a free one.")
    api_key: Sequence[str] = setting(
        default=(),
        metavar="KEY",
        type=list[str],
        help="API key that clients must send (other users can see it in ps); may be repeated.",
    )
    api_key_file: Path | None = setting(
        default=None,
        metavar="FILE",
        type=Path,
        help="File of API keys, one per line; the variable TERCET_API_KEY also sets a key.",
    )
    max_batch: int | None = setting(
        default=None, metavar="N", help="Largest number of requests in a batch; default: 64."
    )
    max_waiting: int | None = setting(
        default=None,
        metavar="N",
        help="Largest number of waiting requests; further requests get status 429; default: 1024.",
    )
    max_body: float = setting(default=8.0, metavar="MIB", help="Largest size of a request, in MiB.")
    request_timeout: float = setting(
        default=600.0,
        metavar="S",
        help="Time limit of an answer in seconds, including the time in the queue.",
    )
    quantize: str | None = setting(
        default=None,
        metavar="Q",
        help="Weights on a CPU: int8 (the default; of a GGUF file its own bits), int4, bf16 or none.",
    )
    speculation: str | None = setting(
        default=None,
        option="speculate",
        metavar="HOW",
        help="Speculative decoding: ngram (from the text so far), or the REF of a smaller draft model.",
    )
    sampling: SamplingChoice | None = setting(
        default=None,
        metavar="HOW",
        help="Sampling where a request does not say: default (the publisher's settings), greedy or neutral.",
    )
    control_tokens: ControlTokenMode | None = setting(
        default=None,
        metavar="text|control",
        help="What control tokens that messages spell become: ordinary text (the default), or these tokens.",
    )
    allow_origin: Sequence[str] = setting(
        default=(),
        metavar="ORIGIN",
        type=list[str],
        help="Origin of a web page that may call this server; * for all; may be repeated.",
    )
    allow_host: Sequence[str] = setting(
        default=(),
        metavar="NAME",
        type=list[str],
        help="Host name of this server, beside localhost and IP addresses; may be repeated.",
    )
    strict: bool = setting(
        default=False,
        help="Refuse requests with fields that have no effect, instead of naming them in the header x-ignored.",
    )
    allow_pull: bool = setting(
        default=False,
        help="Let clients of Ollama's API fetch models into the cache of this machine (/api/pull).",
    )
    no_page: bool = setting(default=False, help="Serve only the API, without the chat page.")
    data: Path | None = setting(
        default=None,
        metavar="DIR",
        type=Path,
        help="Directory for the page's conversations; default: tercet in $XDG_DATA_HOME.",
    )

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise UserError(f"`port` is {self.port}; it must be from 0 to 65535")
        check_positive(self, "max_batch", "max_waiting")
        if self.control_tokens is not None:
            check_choice(self, "control_tokens", CONTROL_TOKEN_MODES)
        if not SMALLEST_BODY <= self.max_body < math.inf:
            raise UserError(f"`max_body` is {self.max_body}; it must be a number of at least {SMALLEST_BODY}")
        if not self.request_timeout >= SHORTEST_TIMEOUT:
            raise UserError(
                f"`request_timeout` is {self.request_timeout}; it must be at least {SHORTEST_TIMEOUT}"
            )
        if self.no_page and self.data is not None:
            raise UserError(
                "`data` is a setting of the chat page, and `no_page` turns the page off; leave one of them out"
            )


@dataclass(frozen=True)
class Settings:
    """Settings that the running server reads.

    host: address to listen on.
    port: port to listen on.
    keys: SHA-256 of each accepted API key; none: no key is required.
    allowed_hosts: names by which clients may call this server, beside loopback names and IP addresses.
    allowed_origins: origins of other web pages that may call it; "*" for all.
    strict: whether fields that have no effect are refused; otherwise they are named in ``x-ignored``.
    allow_pull: whether clients may fetch models into the cache.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    keys: tuple[bytes, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    max_body: int = 8 << 20  # bytes of a request: a million words of prompt
    max_requests: int = 2048  # being read or answered at the same time; more get 429 at once
    request_timeout: float = 600.0  # seconds for one answer, including the time in the queue
    read_timeout: float = 30.0  # seconds for a client to send its headers, and again for its body
    drain_timeout: float = 60.0  # seconds that a shutdown waits for running requests
    strict: bool = False
    allow_pull: bool = False


def hash_key(key: str) -> bytes:
    """Return the SHA-256 of an API key, which is all the server stores of it."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
