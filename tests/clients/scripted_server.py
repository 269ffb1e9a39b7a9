"""A server of Tercet's own application whose model does what agents ask of it: it calls a tool, then answers.

python tests/clients/scripted_server.py PORT        serves the model "scripted" until it is stopped

The model writes a call where the last turn is the user's and names a path, and there is a tool that can read it.
After a result it answers with the result's last line. Everywhere else it says hello.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "serve"))

from script_engine import ScriptBackend
from tool_templates import HERMES, tokenizer_with

from tercet.engine.engine import Engine
from tercet.model.tokenizer import Tokenizer
from tercet.serve.app import make_app
from tercet.serve.launch import Server, bind, make_server
from tercet.serve.models import Models, Served
from tercet.serve.settings import Settings
from tercet.serve.worker import Worker

CONTEXT = 400_000  # tokens, one a byte: agents send 60,000 bytes of instructions and tools
PAGE = 256
# Tools of agents that can read a file, and the argument that holds its path or a command.
READERS = {"Read": "file_path", "exec_command": "cmd", "read_note": "path", "Notes-read_note": "path"}
HELLO = "Hello from the scripted model."


class AgentBackend(ScriptBackend):
    """A backend whose script depends on the prompt."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer, CONTEXT)
        self.page_size, self.num_pages, self.max_tokens = PAGE, 4 * CONTEXT // PAGE, 8192
        self.slots = np.full((self.num_pages, PAGE, 3), -1, dtype=np.int64)
        self._written: dict[int, str] = {}  # by the length of the prompt: the script

    def logits(self, history: Sequence[int]) -> NDArray[np.float32]:
        begin = max((place for place, token in enumerate(history) if token == self._begin), default=None)
        if begin is None:  # an embedding
            return np.ones(self.vocab_size, np.float32)
        if begin == len(history) - 1:
            self._written[begin] = script(self._tokenizer.decode(list(history), skip_special=False))
        self.says = self._written.get(begin, HELLO)
        return super().logits(history)


def script(prompt: str) -> str:
    """Return what the model writes after a prompt."""
    turns = re.findall(r"<\|(user|assistant|tool|system)\|>(.*?)(?=<\|end\|>)", prompt, re.DOTALL)
    role, text = turns[-1] if turns else ("user", "")
    if role == "tool":
        lines = [line for line in text.splitlines() if line.strip()]
        colours = re.findall(r"The colour is (\w+)", text)
        return f"The note says {colours[-1]}." if colours else f"The tool says {(lines or [''])[-1]}."
    paths = re.findall(r"(/[\w./-]+note\.txt)", prompt.rpartition("<|tools|>")[2] or prompt)
    names = [name for name in READERS if f'"name": "{name}"' in prompt]
    if not names or not paths:
        return HELLO
    argument = READERS[names[0]]
    value = f"cat {paths[-1]}" if argument == "cmd" else paths[-1]
    call = {"name": names[0], "arguments": {argument: value}}
    return f"I will read it.\n<tool_call>\n{json.dumps(call)}\n</tool_call>"


def scripted_server(port: int) -> tuple[Server, list[object]]:
    """Return a server that listens on ``port`` once it runs, and its socket."""
    tokenizer = tokenizer_with(HERMES)
    assert tokenizer.eos_id is not None
    engine = Engine(AgentBackend(tokenizer), tokenizer, [tokenizer.eos_id])
    settings = Settings()
    app = make_app(Models([Served("scripted", Worker(engine))]), settings)
    listening = bind("127.0.0.1", port)
    return make_server(app, settings), [listening]


if __name__ == "__main__":
    server, sockets = scripted_server(int(sys.argv[1]))
    server.run(sockets=sockets)  # type: ignore[arg-type]
