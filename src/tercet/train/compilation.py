"""PyTorch's compiler for a network's blocks, on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tercet.model.transformer import Transformer


def compile_blocks(model: Transformer, backend: str = "inductor") -> None:
    """Compile each block, and the loss, into one program, in place.

    A program is specific to one batch shape, and another shape gets another program. So the programs do
    not depend on what ran before, such as a calibration.

    All blocks are alike, so compiling block by block compiles only one of them, which takes seconds, and
    leaves the code around them (rotary tables, masks) as it is. A block that can't be a single program
    (a mixture of experts reads how many tokens each expert gets) raises at its first call.
    """
    for block in model.model.layers:
        block.compile(backend=backend, dynamic=False, fullgraph=True)
    model.compiler = backend


@contextmanager
def uncompiled(model: Transformer) -> Iterator[None]:
    """Run the blocks without their compiled programs, for batches of many shapes.

    Each new shape would otherwise be compiled, for half a minute.
    """
    blocks = list(model.model.layers)
    compiled = [block._compiled_call_impl for block in blocks]
    for block in blocks:
        block._compiled_call_impl = None
    try:
        yield
    finally:
        for block, program in zip(blocks, compiled, strict=True):
            block._compiled_call_impl = program
