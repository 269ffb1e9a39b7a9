"""Several processes that train one model, as ``torchrun`` starts them: who is who, and what they agree on.

Each takes rows of its own of every step and the gradients are added, so that the step is that of one
process but for the order of sums. All compute the same updates, and the decisions that could differ (the
clock, a signal) are made by the first or by any of them, for all.
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
from tercet.train.loss import Batch, Gradients

T = TypeVar("T")

LONGEST_WAIT = timedelta(days=2)  # the others wait while the first reads the corpus


@dataclass(frozen=True)
class Ranks:
    """This process among all. One process alone needs no process group, and nothing here costs it time."""

    rank: int = 0
    size: int = 1
    machines: int = 1
    launched: bool = False  # by torchrun, be it alone

    @property
    def first(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    def workers(self, on_gpu: bool) -> int:
        """How many train at the same time at the speed that one was measured at: GPUs, or whole machines."""
        return self.size if on_gpu else self.machines

    def device(self, name: str | None) -> torch.device:
        """The device called ``name``, or the best there is; of several GPUs each process has its own.

        Raises:
            UserError: there is no such device here.
        """
        device = find_device(name)
        if device.type == "cuda" and name in (None, "cuda"):
            device = find_device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if self.launched else "cuda:0")
            torch.cuda.set_device(device)
        return device

    def threads(self, cores: int) -> int:
        """Threads for each of the processes that share a machine of so many."""
        return max(1, cores * self.machines // self.size)

    def added(self, values: Sequence[float]) -> list[float]:
        """The sums of ``values`` over all processes, in float64."""
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def in_step(self, stop: bool, seconds: float, due: bool) -> tuple[bool, float, bool]:
        """What holds for all: whether anyone was asked to stop; the first one's clock, and whether it will save."""
        if self.size == 1:
            return stop, seconds, due
        mine = [float(stop), seconds * self.first, float(due and self.first)]
        stops, clock, saves = self.added(mine)
        return stops > 0, clock, saves > 0

    def first_then_all(self, action: Callable[[], T]) -> T:
        """``action`` in the first process, and when it is done in the others, who find what it left on disk.

        Raises:
            UserError: in the others, where the first one failed.
        """
        if self.size == 1:
            return action()
        if self.first:
            failed = 1.0
            try:
                result = action()
                failed = 0.0
            finally:
                self.added([failed])
            return result
        if self.added([0.0])[0]:
            raise UserError("the first process failed; what it says is the reason")
        return action()

    def wait(self) -> None:
        """Until all are here."""
        if self.size > 1:
            dist.barrier()


@contextlib.contextmanager
def open_ranks() -> Iterator[Ranks]:
    """The processes that ``torchrun`` started with this one; alone where it didn't.

    All but the first are silent. Data and run directory must be the same files for all of them.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Ranks(launched="WORLD_SIZE" in os.environ)
        return
    # What processes agree on are numbers on the CPU; gradients on GPUs go by NCCL.
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=LONGEST_WAIT
    )
    try:
        rank = dist.get_rank()
        with contextlib.ExitStack() as stack:
            if rank:
                silent = stack.enter_context(open(os.devnull, "w"))  # noqa: PTH123 - os.devnull is a name
                stack.enter_context(contextlib.redirect_stderr(silent))
                stack.enter_context(contextlib.redirect_stdout(silent))
            here = int(os.environ.get("LOCAL_WORLD_SIZE", size))
            yield Ranks(rank, size, max(1, size // here), launched=True)
        dist.barrier()  # none takes the group apart while another still needs it
    finally:
        dist.destroy_process_group()


def leave(status: int) -> NoReturn:
    """End a process of several at once.

    When Python takes PyTorch apart at its ordinary exit, now and then a thread of the group is still there,
    and C++ aborts a process that has done all of its work: torchrun would call the run failed.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


class AddedGradients:
    """Gradients of a step whose pieces are shared out among processes that each hold all weights (DDP).

    Gradients are added in one message a step: small models lose more to many messages than they would win
    by sending while still computing.
    """

    def __init__(self, inner: Gradients, parameters: Sequence[nn.Parameter], ranks: Ranks) -> None:
        self.inner, self.parameters, self.ranks = inner, list(parameters), ranks
        self._buffer: Tensor | None = None

    def gradients(self, batches: Sequence[Batch]) -> tuple[float, int]:
        """As `tercet.train.loss.Gradients`, over the pieces of all processes."""
        loss, tokens = self.inner.gradients(batches)
        total_loss, total = self.ranks.added([float(loss) * tokens if tokens else 0.0, float(tokens)])
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
