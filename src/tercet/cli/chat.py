"""``tercet chat [REF]``: a conversation in the terminal, or from a file piped in."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tercet.cli import options
from tercet.cli.command import Parameter, in_options
from tercet.errors import UserError

if TYPE_CHECKING:
    from tercet.prompt.chat import ChatSession

EXAMPLE = "tercet chat builtin:smollm2"
DEFAULT = "builtin:smollm2"
# A chat answer is longer than the completions for which the default of Sampling is chosen; Ctrl-C stops it.
CHAT_TOKENS = 1024


def chat(
    context: typer.Context,
    ref: Annotated[
        str | None,
        typer.Argument(
            metavar="REF",
            help=options.REFERENCE_HELP + " Default: the newest model under ./runs, else builtin:smollm2.",
        ),
    ] = None,
    system: options.System = None,
    max_tokens: options.MaxTokens = None,
    sampling: options.SamplingHow = None,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    min_p: options.MinP = None,
    seed: options.Seed = None,
    stop: options.Stop = None,
    quantize: options.Quantize = None,
    speculation: options.Speculation = None,
    control_tokens: options.ControlTokens = None,
    price: options.PriceOption = None,
) -> None:
    """Chat with a model.

    /help lists the commands, Ctrl-C stops an answer, Ctrl-D exits.
    """
    from tercet.prompt.chat import ChatSession

    llm = options.load_llm(ref or _newest(), quantize, speculation, price, control_tokens)
    if max_tokens is None and llm.is_local and llm.has_chat_template:
        max_tokens = CHAT_TOKENS
    fields = options.sampling_fields(
        sampling=sampling,
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
            "(each message is a prompt of its own). /help lists the commands."
        )
    else:
        _note(f"Chatting with {llm.name}. /help lists the commands.")
    parameters: list[Any] = context.command.params
    if sys.stdin.isatty():
        with _line_editing():
            _talk(session, parameters)
    elif not _talk(session, parameters):
        raise typer.Exit(2)  # report to a script that an answer failed


def _newest() -> str:
    from tercet.model.reference import models_under

    models = models_under("runs")
    if not models:
        _note(f"There is no model under ./runs: chatting with {DEFAULT}; name another with tercet chat REF.")
        return DEFAULT
    rest = f" of {len(models)}; choose another with tercet chat REF" if len(models) > 1 else ""
    _note(f"{models[0]} is the newest model under ./runs{rest}.")
    return str(models[0])


def _talk(session: ChatSession, parameters: Sequence[Parameter]) -> bool:
    """Read lines and answer them until the input ends or /exit; return whether every line succeeded.

    ``parameters`` are those of the command, which its error messages name.
    """
    succeeded = True
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
            succeeded = False
            _note(f"error: {in_options(str(problem), parameters)}")
    return succeeded


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
            _note("(Ctrl-D or /exit ends the chat)")
        except UnicodeDecodeError as problem:
            raise UserError(f"the input is not UTF-8 text (byte {problem.start})") from problem


def _show(session: ChatSession, answer: Iterator[str]) -> None:
    """Print an answer as it is generated; Ctrl-C stops it, and its text stays in the conversation."""
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
            _note("(stopped; the text is kept, and /undo removes it)")
            return
        except UserError:
            print()
            raise
    print()
    if sys.stdin.isatty() and session.last is not None:
        _note(f"({spent(session.last)})")


@contextlib.contextmanager
def _noting_interrupts() -> Iterator[threading.Event]:
    """Yield an event that Ctrl-C sets, beside raising KeyboardInterrupt.

    A library may swallow an exception that is raised in its callback; the next piece of the answer then finds
    the event set.
    """
    pressed = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield pressed  # Python lets only the main thread set handlers
        return

    def note(*_: object) -> None:
        pressed.set()
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGINT, note)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, previous)


def _note(text: str) -> None:
    sys.stdout.flush()
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def history_file() -> Path:
    """Return the file of the lines typed before, for the arrow keys."""
    home = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(home) / "tercet" / "chat_history"


@contextlib.contextmanager
def _line_editing() -> Iterator[None]:
    """Offer arrow keys, search and a history of 1,000 lines, where Python has readline."""
    try:
        import readline
    except ImportError:
        yield
        return
    path = history_file()
    with contextlib.suppress(OSError):  # there is no history yet, or it cannot be read: start without one
        readline.read_history_file(path)
    readline.set_history_length(1000)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # a history that cannot be written must not fail the chat
            path.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(path)
            path.chmod(0o600)  # it holds the user's messages
