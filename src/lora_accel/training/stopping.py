"""Stopping in time. A signal, or the end of the hours, only sets a word; the loop asks for it at each step's end.

Before training starts a signal ends the command at once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from lora_accel.console import CLEAR_LINE
from lora_accel.errors import Aborted

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
"""Preempted, Ctrl-C, Slurm's warning before the end, and a terminal that was closed."""
TWICE_SECONDS = 1.0
"""A terminal and a launcher may both pass one Ctrl-C on; one that comes later is meant."""


class Stop:
    """Whether this process has been asked to stop, and by what."""

    def __init__(self, max_hours: float | None = None, *, reports: bool = False) -> None:
        self._cause: str | None = None
        self._reports = reports
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
            self._since = now  # the launcher may pass this one on, too: it must not disturb the end
            raise KeyboardInterrupt
        if self._cause is None:
            self._cause, self._since = signal.Signals(number).name, now
            if self._reports:
                print_stop(number)


def print_stop(number: int) -> None:
    """Write what a signal will do, past Python's buffers: the main thread may be within a write to them."""
    what = "finishing this step, then saving"
    if number == signal.SIGINT:
        line = f"{what}; press Ctrl-C again to abort\n"
    else:
        line = f"{signal.Signals(number).name}: {what}\n"
    with contextlib.suppress(OSError):  # a terminal that was closed
        os.write(2, ((CLEAR_LINE if os.isatty(2) else "") + line).encode())


class _Starting:
    """Ends the command by an exception, as long as training has not started."""

    def __init__(self) -> None:
        self.is_over = False

    def take(self, number: int, frame: FrameType | None = None) -> None:
        """Take a signal; the first one ends the command, what follows must not disturb its end."""
        if not self.is_over:
            self.is_over = True
            raise Aborted(number)


_starting = _Starting()


@contextlib.contextmanager
def abort_on_signal() -> Iterator[None]:
    """Let a signal end the command with `Aborted` until `handle_stop_signals` takes over; after that it is ignored."""
    _starting.is_over = False
    with signal_handler(_starting.take):
        yield


@contextlib.contextmanager
def handle_stop_signals(max_hours: float | None, *, reports: bool = False) -> Iterator[Stop]:
    """Take signals for the length of a block. Outside the main thread Python delivers none, and only hours count.

    Args:
        reports: whether this process shows at once what a signal will do.
    """
    stop = Stop(max_hours, reports=reports)
    with signal_handler(stop.take):
        _starting.is_over = True
        yield stop


@contextlib.contextmanager
def signal_handler(handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    """Let a handler take `SIGNALS` for the length of a block; outside the main thread Python allows none."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        for number in SIGNALS:
            if number != signal.SIGHUP or before[number] is not signal.SIG_IGN:  # nohup wants it unheard
                signal.signal(number, handler)
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous if previous is not None else signal.SIG_DFL)
