"""Graceful stop: a signal or `training.max_hours` sets a cause, which the loop checks at the end of each step.

Before training starts, a signal ends the command at once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from lora_accel.console import CLEAR_LINE
from lora_accel.errors import Aborted, exit_code_of

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP, signal.SIGQUIT)
"""Preemption, Ctrl-C, Slurm's warning before its time limit, a closed terminal, and Ctrl-\\."""
FROM_KEYBOARD = (signal.SIGINT, signal.SIGQUIT)
"""Signals that abort if they come a second time."""
ABORT_SECONDS = 10.0
"""Time after which a signal before training ends the process, if some import has hidden the error that it raised."""
DEBOUNCE_SECONDS = 1.0
"""SIGINTs within this time are one Ctrl-C: both the terminal and the launcher may send it."""


class Stop:
    """The request to stop this process, if there is one."""

    def __init__(self, max_hours: float | None = None, *, reports: bool = False) -> None:
        self._cause: str | None = None
        self._reports = reports
        self._since = 0.0
        self._deadline = None if max_hours is None else time.monotonic() + 3600 * max_hours

    def cause(self) -> str | None:
        """Return the signal or option that asked this process to stop; None if none did."""
        if self._cause is None and self._deadline is not None and time.monotonic() >= self._deadline:
            self._cause, self._since = "training.max_hours", self._deadline
        return self._cause

    def handle(self, number: int, frame: FrameType | None = None) -> None:
        """Record a signal. A further Ctrl-C or Ctrl-\\ raises KeyboardInterrupt."""
        now = time.monotonic()
        if number in FROM_KEYBOARD and self._cause is not None and now - self._since > DEBOUNCE_SECONDS:
            self._since = now  # the launcher may forward it too, which must not interrupt the abort
            raise KeyboardInterrupt
        if self._cause is None:
            self._cause, self._since = signal.Signals(number).name, now
            if self._reports:
                print_stop(number)


def print_stop(number: int) -> None:
    """Print the effect of a signal, bypassing Python's buffers: the main thread may be in the middle of a write."""
    action = "finishing this step, then saving"
    if number in FROM_KEYBOARD:
        line = f"{action}; press Ctrl-C again to abort\n"
    else:
        line = f"{signal.Signals(number).name}: {action}\n"
    with contextlib.suppress(OSError):  # the terminal may be closed
        os.write(2, ((CLEAR_LINE if os.isatty(2) else "") + line).encode())


class StartupHandler:
    """Raises `Aborted` at the first signal before training starts."""

    def __init__(self) -> None:
        self.is_over = False
        self._since = 0.0
        self._lock = threading.RLock()
        self._timer: threading.Timer | None = None

    def handle(self, number: int, frame: FrameType | None = None) -> None:
        """Abort at the first signal. Ignore later ones, which would interrupt the cleanup, except a second Ctrl-C."""
        now = time.monotonic()
        if not self.is_over:
            self.is_over, self._since = True, now
            self.limit(number)
            raise Aborted(number)
        if self._timer is not None and number in FROM_KEYBOARD and now - self._since > DEBOUNCE_SECONDS:
            self._exit(number)

    def limit(self, number: int) -> None:
        """End the process after `ABORT_SECONDS`, if the abort has not arrived by then."""
        with self._lock:
            if self._timer is None:
                self._timer = threading.Timer(ABORT_SECONDS, self._exit, [number])
                self._timer.daemon = True
                self._timer.start()

    def close(self) -> None:
        """End the time limit of the abort, which has arrived."""
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    def _exit(self, number: int) -> None:
        with contextlib.suppress(OSError):
            os.write(2, f"{Aborted(number)}\n".encode())
        os._exit(exit_code_of(number))


_startup = StartupHandler()


@contextlib.contextmanager
def abort_on_signal() -> Iterator[None]:
    """Raise `Aborted` at a signal, until `handle_stop_signals` takes over. After training, signals are ignored."""
    _startup.is_over = False
    try:
        with signal_handler(_startup.handle), _watch_signals(_startup):
            yield
    finally:
        _startup.close()


@contextlib.contextmanager
def _watch_signals(handler: StartupHandler) -> Iterator[None]:
    """Limit the time of an abort in a thread, too: the main thread may wait for a rank that is stopped.

    Python runs no handler while it waits in a library, but writes the signal to a socket.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    receiver, sender = socket.socketpair()
    sender.setblocking(False)

    def watch() -> None:
        while numbers := receiver.recv(64):
            for number in SIGNALS:
                if number in numbers and not handler.is_over:
                    handler.limit(number)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    before = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        sender.shutdown(socket.SHUT_WR)  # the thread ends, even if a forked process has a copy of this socket
        thread.join()
        sender.close()
        receiver.close()


@contextlib.contextmanager
def handle_stop_signals(max_hours: float | None, *, reports: bool = False) -> Iterator[Stop]:
    """Yield a `Stop` that records signals within the block. Outside the main thread only `max_hours` works.

    Args:
        max_hours: training time after which to stop.
        reports: whether this process prints the effect of a signal.
    """
    stop = Stop(max_hours, reports=reports)
    with signal_handler(stop.handle):
        _startup.is_over = True
        yield stop


@contextlib.contextmanager
def signal_handler(handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    """Handle `SIGNALS` within the block; a no-op outside the main thread, where Python allows no handlers."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        for number in SIGNALS:
            if number != signal.SIGHUP or before[number] is not signal.SIG_IGN:  # nohup ignores SIGHUP
                signal.signal(number, handler)
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous if previous is not None else signal.SIG_DFL)
