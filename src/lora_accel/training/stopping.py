"""Stopping in time. A signal, or the end of the hours, only sets a word; the loop asks for it at each step's end."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
"""Preempted, Ctrl-C, Slurm's warning before the end, and a terminal that was closed."""
TWICE_SECONDS = 1.0
"""A terminal and a launcher may both pass one Ctrl-C on; one that comes later is meant."""


class Stop:
    """Whether this process has been asked to stop, and by what."""

    def __init__(self, max_hours: float | None = None) -> None:
        self._cause: str | None = None
        self._since = 0.0
        self._ends = None if max_hours is None else time.monotonic() + 3600 * max_hours

    def cause(self) -> str | None:
        """Return what asked this process to stop, None so far."""
        if self._cause is None and self._ends is not None and time.monotonic() >= self._ends:
            self._cause, self._since = "training.max_hours", self._ends
        return self._cause

    def take(self, number: int, frame: FrameType | None = None) -> None:
        """Take a signal; Ctrl-C aborts what has been asked to stop already."""
        now = time.monotonic()
        if number == signal.SIGINT and self._cause is not None and now - self._since > TWICE_SECONDS:
            raise KeyboardInterrupt
        if self._cause is None:
            self._cause, self._since = signal.Signals(number).name, now


@contextlib.contextmanager
def listening(max_hours: float | None) -> Iterator[Stop]:
    """Take signals for the length of a block. Outside the main thread Python delivers none, and only hours count."""
    stop = Stop(max_hours)
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        for number in SIGNALS:
            if number != signal.SIGHUP or before[number] is not signal.SIG_IGN:  # nohup wants it unheard
                signal.signal(number, stop.take)
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
