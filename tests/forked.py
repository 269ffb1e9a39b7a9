"""Run programs in processes that are forked from one which has imported torch and Tercet already.

Importing torch and what its optimizers need takes seconds, which a test that kills and resumes a run would pay
for every process. A forked process is as separate as any other: it has its own memory and dies of its own signals.
"""

from __future__ import annotations

import functools
import multiprocessing
import multiprocessing.context
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

PRELOADED = [
    "torch",
    "torch._dynamo",
    "torch.distributed.checkpoint.state_dict",
    "torch.nn.parallel",
    "tercet.train.sharded",
    "tercet.finetune.sft",
    "tercet.pretrain.chat",
    "tercet.ladder.climb",
]


@functools.cache
def _server() -> multiprocessing.context.ForkServerContext:
    """Start the process that the others are forked from, once for each process that runs tests."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def _execute(
    code: str, arguments: Sequence[str], environment: Mapping[str, str], files: Sequence[str]
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for descriptor, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    sys.argv = ["-c", *arguments]
    exec(compile(code, "<program>", "exec"), {"__name__": "__main__"})


class Program:
    """A running program: Python code and its arguments.

    Args:
        code: what ``python -c`` would run.
        *arguments: its ``sys.argv[1:]``.
        environment: its environment; None: that of this process.
    """

    def __init__(self, code: str, *arguments: str, environment: Mapping[str, str] | None = None) -> None:
        self._directory = tempfile.TemporaryDirectory()
        self._files = [str(Path(self._directory.name) / name) for name in ("stdout", "stderr")]
        variables = dict(os.environ if environment is None else environment)
        self._process = _server().Process(target=_execute, args=(code, arguments, variables, self._files))
        self._process.start()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid or 0

    @property
    def returncode(self) -> int | None:
        """The exit status, or None while it runs; a signal's number is negative."""
        return self._process.exitcode

    def wait(self, timeout: float = 120) -> int:
        """Wait for its end and return the exit status."""
        self._process.join(timeout)
        status = self._process.exitcode
        if status is None:
            self._process.kill()
            raise TimeoutError(f"the program takes longer than {timeout} s: {self.stderr}")
        return status

    @property
    def stdout(self) -> str:
        """What it has written to standard output."""
        return self._written(0)

    @property
    def stderr(self) -> str:
        """What it has written to standard error."""
        return self._written(1)

    def _written(self, number: int) -> str:
        file = Path(self._files[number])
        return file.read_text() if file.exists() else ""


def run(code: str, *arguments: str, environment: Mapping[str, str] | None = None) -> Program:
    """Run a program to its end and return it."""
    program = Program(code, *arguments, environment=environment)
    program.wait()
    return program
