"""Several processes that train one model, started by ``torchrun``: their ranks, and what they agree on.

Each process takes its own rows of every step, and the gradients are summed. So the step equals that of a
single process except for the order of summation. All processes compute the same updates. Decisions that
could differ between them (the clock, a signal) are taken for all: by the first process, or by any.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tercet.errors import UserError
from tercet.model.device import find_device
from tercet.train.batch import Batch
from tercet.train.gradients import Gradients

T = TypeVar("T")

TIMEOUT = timedelta(days=2)  # the other processes wait while the first one reads the corpus


@dataclass(frozen=True)
class Ranks:
    """This process among all processes. A single process needs no process group and pays no cost here."""

    rank: int = 0
    size: int = 1
    machines: int = 1
    launched: bool = False  # by torchrun, even as the only process

    @property
    def first(self) -> bool:
        """Whether this process writes files and prints messages."""
        return self.rank == 0

    def workers(self, on_gpu: bool) -> int:
        """Return how many GPUs, or else machines, train in parallel, each at the speed measured for one."""
        return self.size if on_gpu else self.machines

    def device(self, name: str | None) -> torch.device:
        """Return the device called ``name``, or the best available; each process gets a GPU of its own.

        Raises:
            UserError: This machine has no such device.
        """
        device = find_device(name)
        if device.type == "cuda" and name in (None, "cuda"):
            device = find_device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if self.launched else "cuda:0")
            torch.cuda.set_device(device)
        return device

    def threads(self, cores: int) -> int:
        """Return the threads of each process, where processes share machines of ``cores`` cores."""
        return max(1, cores * self.machines // self.size)

    def summed(self, values: Sequence[float]) -> list[float]:
        """Return the sums of ``values`` over all processes, in float64."""
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def agree(self, stop: bool, seconds: float, save: bool) -> tuple[bool, float, bool]:
        """Return the decisions that hold for all processes.

        Returns:
            Whether any process must stop; the first process's clock; whether the first process saves.
        """
        if self.size == 1:
            return stop, seconds, save
        stops, clock, saves = self.summed([float(stop), seconds * self.first, float(save and self.first)])
        return stops > 0, clock, saves > 0

    def first_then_all(self, action: Callable[[], T]) -> T:
        """Run ``action`` in the first process, then in the others, which find the first one's files.

        Raises:
            UserError: In the other processes, where the first one failed.
        """
        if self.size == 1:
            return action()
        if self.first:
            failed = 1.0
            try:
                result = action()
                failed = 0.0
            finally:
                self.summed([failed])
            return result
        if self.summed([0.0])[0]:
            raise UserError("the first process failed; its message gives the reason")
        return action()

    def barrier(self) -> None:
        """Wait until every process has reached this call."""
        if self.size > 1:
            dist.barrier()


@contextlib.contextmanager
def open_ranks() -> Iterator[Ranks]:
    """Yield this process among those that ``torchrun`` started, or a single process without ``torchrun``.

    Only the first process prints. Data and run directory must be the same files for all processes.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Ranks(launched="WORLD_SIZE" in os.environ)
        return
    # Processes exchange decisions as numbers on the CPU (gloo), and gradients of GPUs by NCCL.
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=TIMEOUT)
    try:
        rank = dist.get_rank()
        with contextlib.ExitStack() as stack:
            if rank:
                silent = stack.enter_context(open(os.devnull, "w"))  # noqa: PTH123 - os.devnull is a name
                stack.enter_context(contextlib.redirect_stderr(silent))
                stack.enter_context(contextlib.redirect_stdout(silent))
            here = int(os.environ.get("LOCAL_WORLD_SIZE", size))
            yield Ranks(rank, size, max(1, size // here), launched=True)
        dist.barrier()  # no process destroys the group while another still needs it
    finally:
        dist.destroy_process_group()


def exit_process(status: int) -> NoReturn:
    """Exit one process of several immediately, without Python's cleanup.

    During that cleanup a thread of the process group is sometimes still running; then C++ aborts a process
    that has completed all of its work, and torchrun reports the run as failed.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


class SummedGradients:
    """Gradients of a step whose rows are distributed over processes that each hold all weights (DDP).

    One message per step sums all gradients: small models lose more time to many messages than they would
    gain from sending during the computation.
    """

    def __init__(self, inner: Gradients, parameters: Sequence[nn.Parameter], ranks: Ranks) -> None:
        self.inner, self.parameters, self.ranks = inner, list(parameters), ranks
        self._buffer: Tensor | None = None

    def gradients(self, batches: Sequence[Batch]) -> tuple[float, int]:
        """Implement `Gradients.gradients`, over the micro-batches of all processes."""
        loss, tokens = self.inner.gradients(batches)
        total_loss, total = self.ranks.summed([float(loss) * tokens if tokens else 0.0, float(tokens)])
        if self._buffer is None:
            size, device = sum(parameter.numel() for parameter in self.parameters), self.parameters[0].device
            self._buffer = torch.empty(size, device=device)
        pieces = torch.split(self._buffer, [parameter.numel() for parameter in self.parameters])
        for parameter, piece in zip(self.parameters, pieces, strict=True):
            if parameter.grad is None or not tokens:
                piece.zero_()
            else:
                torch.mul(parameter.grad.reshape(-1), tokens / total, out=piece)
        dist.all_reduce(self._buffer)
        for parameter, piece in zip(self.parameters, pieces, strict=True):
            parameter.grad = piece.view_as(parameter)
        return total_loss / max(1.0, total), int(total)
