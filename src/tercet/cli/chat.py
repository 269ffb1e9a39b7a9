"""``tercet chat [REF]``: a conversation in the terminal, or from a file piped in."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tercet.cli import options
from tercet.errors import UserError

if TYPE_CHECKING:
    from tercet.prompt.chat import ChatSession

EXAMPLE = "tercet chat runs/mine --temperature 0.8"
# A chat answer is longer than the completions the sampling default is for, and Ctrl-C stops it.
CHAT_TOKENS = 1024


def chat(
    ref: Annotated[
        str | None,
        typer.Argument(metavar="REF", help=options.REFERENCE_HELP + " Default: the newest under ./runs."),
    ] = None,
    system: options.System = None,
    max_tokens: options.MaxTokens = None,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    min_p: options.MinP = None,
    seed: options.Seed = None,
    stop: options.Stop = None,
    quantize: options.Quantize = None,
    speculate: options.Speculate = None,
    price: options.PriceOption = None,
) -> None:
    """Chat with a model. /help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves."""
    from tercet.prompt.chat import ChatSession

    llm = options.load_llm(ref or _newest(), quantize, speculate, price)
    if max_tokens is None and llm.is_local and llm.has_chat_template:
        max_tokens = CHAT_TOKENS
    fields = options.sampling_fields(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        seed=seed,
        stop=stop,
    )
    session = ChatSession(llm, system, **fields)
    if session.is_base:
        _note(
            f"{llm.name} is a base model: no chat template; it continues your text "
            "(each message stands alone). /help lists the commands."
        )
    else:
        _note(f"Chatting with {llm.name}. /help lists the commands.")
    if sys.stdin.isatty():
        with _line_editing():
            _talk(session)
    elif not _talk(session):
        raise typer.Exit(2)  # a script should learn that an answer failed


def _newest() -> str:
    from tercet.model.reference import models_under

    found = models_under("runs")
    if not found:
        raise UserError(
            "there is no model under ./runs; name one (tercet chat REF), "
            "or make one: tercet build --data builtin:python-docs --out runs/mine --minutes 5"
        )
    others = f" of {len(found)}; tercet chat REF takes another" if len(found) > 1 else ""
    _note(f"{found[0]} is the newest model under ./runs{others}.")
    return str(found[0])


def _talk(session: ChatSession) -> bool:
    """Read and answer until the input ends or /exit. Whether every line went well."""
    well = True
    for line in _lines():
        if not line.strip():
            continue
        try:
            if line.startswith("/"):
                reply = session.run(line)
                if reply.leave:
                    break
                if reply.note:
                    print(reply.note)
                if reply.answer is not None:
                    _show(session, reply.answer)
            else:
                _show(session, session.say(line))
        except UserError as problem:
            well = False
            _note(f"error: {problem}")
    return well


def _lines() -> Iterator[str]:
    terminal = sys.stdin.isatty()
    while True:
        try:
            yield input("> " if terminal else "")
        except EOFError:
            if terminal:
                print()
            return
        except KeyboardInterrupt:
            if not terminal:
                raise
            print()
            _note("(Ctrl-D or /exit leaves)")
        except UnicodeDecodeError as problem:
            raise UserError(f"the input is not UTF-8 text (byte {problem.start})") from problem


def _show(session: ChatSession, answer: Iterator[str]) -> None:
    """Print an answer as it comes; Ctrl-C stops it and what came stays in the conversation."""
    from tercet.cli.prompt import spent

    with contextlib.closing(answer), _noting_interrupts() as interrupted:  # type: ignore[type-var]  # a generator
        try:
            for piece in answer:
                sys.stdout.write(piece)
                sys.stdout.flush()
                if interrupted.is_set():
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            print()
            _note("(stopped; what came is kept, /undo takes it back)")
            return
        except UserError:
            print()
            raise
    print()
    if sys.stdin.isatty() and session.last is not None:
        _note(f"({spent(session.last)})")


@contextlib.contextmanager
def _noting_interrupts() -> Iterator[threading.Event]:
    """Set by Ctrl-C, which raises KeyboardInterrupt as ever.

    A library in whose callback it happens to be raised may swallow it; the next piece of the answer then
    finds the event.
    """
    came = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield came  # Python lets only the main thread set handlers
        return

    def note(*_: object) -> None:
        came.set()
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGINT, note)
    try:
        yield came
    finally:
        signal.signal(signal.SIGINT, previous)


def _note(text: str) -> None:
    sys.stdout.flush()
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def history_file() -> Path:
    """Where the lines typed before are kept, for the arrow keys."""
    home = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(home) / "tercet" / "chat_history"


@contextlib.contextmanager
def _line_editing() -> Iterator[None]:
    """Arrow keys, search and a history of 1,000 lines, where Python has readline."""
    try:
        import readline
    except ImportError:
        yield
        return
    path = history_file()
    with contextlib.suppress(OSError):  # no history yet, or one that can't be read: start without
        readline.read_history_file(path)
    readline.set_history_length(1000)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # a history that can't be kept is no reason to fail
            path.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(path)
            path.chmod(0o600)  # it holds what was said
