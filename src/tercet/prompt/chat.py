"""A conversation with a model, and the commands that change it. It does no input or output itself."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Unpack

from tercet.data.conversation import Message, check_text, read_messages, text_of
from tercet.engine.request import Completion, Sampling, SamplingChoice
from tercet.errors import ContextOverflow, UserError, nearest
from tercet.files import read_json, write_atomic, write_json
from tercet.prompt.llm import LLM, Prompt
from tercet.prompt.settings import SamplingFields

HELP = {
    "/system [TEXT]": "set the system message for the next answers; without TEXT show it",
    "/undo": "remove the last exchange",
    "/retry": "send the last message again",
    "/history": "show the conversation",
    "/save PATH": "write the conversation to PATH, .json or .md",
    "/load PATH": "continue a conversation saved as .json",
    "/clear": "delete the conversation, except the system message",
    "/help": "this list",
    "/exit": "exit (or Ctrl-D)",
}


@dataclass
class Reply:
    """The result of a command.

    note: text to show.
    answer: an answer to stream.
    leave: whether the chat ends.
    """

    note: str = ""
    answer: Iterator[str] | None = None
    leave: bool = False


class ChatSession:
    """The messages of one conversation, and the model that answers them.

    A model without a chat template (a base model) continues text: each message is a prompt of its own,
    and the answer is its continuation.

    Args:
        llm: the model.
        system: the system message; None: none.
        sampling: for every answer, as in `LLM.chat`.
        settings: fields of Sampling for every answer.

    Raises:
        UserError: a system message for a base model, which has no place for one.
    """

    def __init__(
        self,
        llm: LLM,
        system: str | None = None,
        *,
        sampling: Sampling | SamplingChoice | None = None,
        **settings: Unpack[SamplingFields],
    ) -> None:
        self.llm, self.sampling, self.settings = llm, sampling, settings
        self.messages: list[Message] = []
        self.last: Completion | None = None  # of the last answer, unless it was stopped
        self._unanswered: str | None = None  # the message that /retry sends after a failure
        self._files: set[Path] = set()  # written or read by this session, which may overwrite them
        if system is not None:
            self._set_system(system)

    @property
    def is_base(self) -> bool:
        """Whether the model has no chat template, so that it continues text."""
        return not self.llm.has_chat_template

    @property
    def system(self) -> str | None:
        """The system message."""
        first = self.messages[0] if self.messages else None
        return text_of(first) if first and first["role"] == "system" else None

    def say(self, text: str) -> Iterator[str]:
        """Send ``text`` and yield the answer as it comes.

        The exchange joins the conversation when the answer ends. When the caller closes this generator or
        Ctrl-C stops it, the exchange joins with the answer so far. When the answer fails, the conversation
        does not change.

        Raises:
            ContextOverflow: the conversation is longer than the context; nothing is cut off. The message
                contains the counts and a remedy.
            UserError: the model or its server failed.
        """
        check_text(text, "the message")
        prompt: Prompt = text if self.is_base else [*self.messages, {"role": "user", "content": text}]
        self.last, self._unanswered = None, text
        pieces: list[str] = []
        try:
            with self.llm.stream(prompt, sampling=self.sampling, **self.settings) as stream:
                for piece in stream:
                    pieces.append(piece)
                    yield piece
            self.last = stream.completion
        except ContextOverflow as problem:
            remedy = (
                "shorten the text"
                if self.is_base
                else "/undo removes the last exchange, /clear removes all of them"
            )
            raise ContextOverflow(f"{problem}; {remedy}", problem.tokens, problem.limit) from problem
        except (GeneratorExit, KeyboardInterrupt):
            if pieces:
                self._add(text, "".join(pieces))
            raise
        self._add(text, "".join(pieces))

    def _add(self, text: str, answer: str) -> None:
        self.messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
        self._unanswered = None

    def run(self, line: str) -> Reply:
        """Run the command in ``line`` ("/undo", "/save talk.json").

        Raises:
            UserError: an unknown command (the message names the nearest), or a command that fails.
        """
        name, _, argument = line.strip().partition(" ")
        argument = argument.strip()
        actions: dict[str, Callable[[str], Reply]] = {
            "/system": self._command_system,
            "/undo": self._command_undo,
            "/retry": self._command_retry,
            "/history": self._command_history,
            "/save": self._command_save,
            "/load": self._command_load,
            "/clear": self._command_clear,
            "/help": lambda _: Reply("\n".join(f"{usage:<16} {text}" for usage, text in HELP.items())),
            "/exit": lambda _: Reply(leave=True),
        }
        if name not in actions:
            near = nearest(name, actions)
            raise UserError(
                f"there is no {name}; {f'did you mean {near[0]}?' if near else '/help lists the commands'}"
            )
        if argument and name not in ("/system", "/save", "/load"):
            raise UserError(f"{name} takes no argument")
        return actions[name](argument)

    def _set_system(self, text: str) -> None:
        if self.is_base:
            raise UserError(f"{self.llm.name} has no chat template, so it cannot take a system message")
        check_text(text, "the system message")
        rest = self.messages[1:] if self.system is not None else self.messages
        self.messages = [{"role": "system", "content": text}, *rest]

    def _command_system(self, text: str) -> Reply:
        if text:
            self._set_system(text)
            return Reply("system message set")
        return Reply(self.system if self.system is not None else "no system message; /system TEXT sets one")

    def _last_user(self) -> int | None:
        """Return the index of the last exchange's first message; None where there is none."""
        places = [index for index, message in enumerate(self.messages) if message["role"] == "user"]
        return places[-1] if places else None

    def _command_undo(self, _: str) -> Reply:
        place = self._last_user()
        if place is None:
            raise UserError("there is nothing to undo")
        undone = text_of(self.messages[place])
        del self.messages[place:]
        self._unanswered = None
        return Reply(f"removed: {_short(undone)}")

    def _command_retry(self, _: str) -> Reply:
        text, place = self._unanswered, self._last_user()
        if text is None and place is None:
            raise UserError("there is nothing to retry")
        return Reply(answer=self.say(text) if text is not None else self._again(place or 0))

    def _again(self, place: int) -> Iterator[str]:
        """Answer the message at ``place`` again; the old answer stays when no text comes."""
        before, text = list(self.messages), text_of(self.messages[place])
        del self.messages[place:]
        try:
            yield from self.say(text)
        finally:
            if len(self.messages) <= place:
                self.messages, self._unanswered = before, None

    def _command_history(self, _: str) -> Reply:
        if not self.messages:
            return Reply("the conversation is empty")
        return Reply("\n\n".join(f"{message['role']}: {text_of(message)}" for message in self.messages))

    def _command_clear(self, _: str) -> Reply:
        self.messages = self.messages[:1] if self.system is not None else []
        self._unanswered = None
        return Reply("conversation deleted")

    def _command_save(self, argument: str) -> Reply:
        path = _path(argument, "/save", (".json", ".md"))
        if not self.messages:
            raise UserError("the conversation is empty, so there is nothing to save")
        if path.exists() and path.resolve() not in self._files:
            raise UserError(f"{path} exists and was not written by this chat; choose another name")
        if path.suffix == ".json":
            write_json(path, {"messages": self.messages})
        else:
            parts = [f"## {message['role']}\n\n{text_of(message)}\n" for message in self.messages]
            write_atomic(path, "\n".join([f"# Chat with {self.llm.name}\n", *parts]))
        self._files.add(path.resolve())
        return Reply(f"saved {len(self.messages)} messages to {path}")

    def _command_load(self, argument: str) -> Reply:
        path = _path(argument, "/load", (".json",))
        content = read_json(path)
        if not isinstance(content, dict) or "messages" not in content:
            raise UserError(f'{path} is not a saved chat; it must be {{"messages": [...]}}')
        messages = read_messages(content["messages"], f"{path}: messages")
        if self.is_base and any(message["role"] == "system" for message in messages):
            raise UserError(f"{path} has a system message, but {self.llm.name} has no chat template")
        self.messages = messages
        self._unanswered = None
        self._files.add(path.resolve())
        return Reply(f"loaded {len(messages)} messages from {path}")


def _path(argument: str, command: str, endings: tuple[str, ...]) -> Path:
    if not argument:
        raise UserError(f"{command} needs a path that ends in {' or '.join(endings)}")
    path = Path(argument)
    with contextlib.suppress(RuntimeError):  # an unknown user in ~name: keep the name as it is
        path = path.expanduser()
    if path.suffix not in endings:
        raise UserError(f"{command} {argument}: the path must end in {' or '.join(endings)}")
    return path


def _short(text: str) -> str:
    line = json.dumps(text, ensure_ascii=False)[1:-1]
    return line if len(line) <= 60 else line[:57] + "..."
