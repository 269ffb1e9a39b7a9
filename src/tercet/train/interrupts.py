"""Stop a run by a signal where nothing is half done."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """Whether SIGINT or SIGTERM has arrived.

    A signal is only noted, so that the update of the weights and a save are always completed. Inside
    `interruptible` it raises KeyboardInterrupt at once.
    """

    def __init__(self, at_once: bool) -> None:
        self._at_once, self._inside, self._arrived = at_once, False, False

    def is_set(self) -> bool:
        """Return whether a signal has arrived."""
        return self._arrived

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Mark work that changes nothing that lasts, such as the gradients of a step or an evaluation.

        Raises:
            KeyboardInterrupt: a signal arrives during the work, or arrived before it. Nothing is raised where
                ``at_once`` is False: processes that train together stop after the same step.
        """
        self._inside = self._at_once
        try:
            if self._inside and self._arrived:
                raise KeyboardInterrupt
            yield
        finally:
            self._inside = False

    def note(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal."""
        self._arrived = True
        if self._inside:
            self._inside = False  # a second signal must not interrupt what is done because of the first
            raise KeyboardInterrupt


@contextmanager
def stop_signals(at_once: bool = True) -> Iterator[StopSignals]:
    """Note SIGINT and SIGTERM instead of being ended by them; the handlers before are restored at the end.

    Args:
        at_once: whether `StopSignals.interruptible` work is interrupted.
    """
    stop = StopSignals(at_once)
    if threading.current_thread() is not threading.main_thread():
        yield stop  # Python lets only the main thread set handlers
        return
    previous = {number: signal.signal(number, stop.note) for number in SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
