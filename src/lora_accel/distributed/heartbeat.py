"""Report a stalled rank, for which the others would wait in a collective until it times out.

A thread on each rank writes the position of its training into the store of torch.distributed every few seconds, and a
thread on rank 0 reads all of them. A process that is stopped or swapping writes nothing; one that hangs in its own code
writes an old position. While a rank is stalled, signals end the run: the main thread waits in a collective, where
Python handles no signal, so these threads read them.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import psutil

from lora_accel.errors import exit_code_of
from lora_accel.logs import logger

BEAT_SECONDS = 5.0
"""Interval at which a rank writes its position."""
REPORT_SECONDS = 60.0
"""Time after which a stalled rank is reported."""
SILENT_SECONDS = 20.0
"""The same after a signal, for a rank that does not respond: torchrun kills all ranks 30 seconds after a signal."""
GRACE_SECONDS = 25.0
"""Time after a signal in which a rank that responds may still arrive, so that a checkpoint can be saved."""
AGAIN_SECONDS = 1.0
"""Time after which a further Ctrl-C or Ctrl-\\\\ is a second one."""
ABORT_SECONDS = 5.0
"""Time that the main thread has after the second one."""
STATE_KEY = "stalled"
STOPPED = psutil.STATUS_STOPPED


class Store(Protocol):
    """The methods of torch.distributed's stores that are used here."""

    def set(self, key: str, value: str) -> None:
        """Set a value."""

    def get(self, key: str) -> bytes:
        """Return a value; waits if there is none."""

    def check(self, keys: list[str]) -> bool:
        """Whether all keys have a value."""


class Process(NamedTuple):
    """The process of a rank."""

    pid: int
    host: str

    @staticmethod
    def current() -> Process:
        """Return this process."""
        return Process(os.getpid(), socket.gethostname())


class Position:
    """How far the main thread of this rank has come."""

    def __init__(self) -> None:
        self.value = (0, 0)

    def reach(self, step: int, part: int) -> None:
        """Record a position.

        Args:
            step: 0-based step.
            part: of the step: 0 = begin, 2n - 1 = forward and 2n = backward of micro-batch n.
        """
        self.value = (step, part)


class _Rank:
    """What is known of a rank."""

    def __init__(self, now: float) -> None:
        self.beat, self.position, self.responded, self.moved = "", (0, 0), now, now

    def update(self, text: str, now: float) -> None:
        """Record what the rank has written."""
        if text != self.beat:
            self.beat, self.responded = text, now
            _, *position = json.loads(text)
            if tuple(position) != self.position:
                self.position, self.moved = (position[0], position[1]), now


class Missing(NamedTuple):
    """A rank for which the others wait."""

    rank: int
    seconds: float
    is_silent: bool
    """Whether it writes nothing, as a stopped process."""


def find_missing(ranks: Sequence[_Rank], now: float, limit: float, silent_limit: float) -> list[Missing]:
    """Return the stalled ranks.

    Args:
        limit: seconds after which a rank that has not moved is stalled, if the leading ranks have not moved either:
            as long as they compute, nobody waits.
        silent_limit: seconds after which a rank that does not respond is stalled.
    """
    first = max(rank.position for rank in ranks)
    waiting = now - max(rank.moved for rank in ranks if rank.position == first)
    missing = []
    for number, rank in enumerate(ranks):
        if now - rank.responded >= silent_limit:
            missing.append(Missing(number, now - rank.responded, True))
        elif rank.position < first and min(waiting, now - rank.moved) >= limit:
            missing.append(Missing(number, now - rank.moved, False))
    return missing


class _Signals:
    """The signals that this process has received. Read by a thread, since the main thread may wait in a collective."""

    def __init__(self) -> None:
        self._receiver, self._sender = socket.socketpair()
        self._receiver.setblocking(False)
        self._sender.setblocking(False)
        self._before: int | None = None
        self._lock = threading.Lock()
        self.number, self.first, self.second = 0, 0.0, 0.0
        """The first signal, and the times of it and of a second Ctrl-C; 0 = none."""

    def open(self) -> None:
        """Let Python's signal handler write here. A no-op outside the main thread."""
        if threading.current_thread() is threading.main_thread():
            self._before = signal.set_wakeup_fd(self._sender.fileno(), warn_on_full_buffer=False)

    def close(self) -> None:
        """Restore what was before."""
        if self._before is not None:
            signal.set_wakeup_fd(self._before)
        self._receiver.close()
        self._sender.close()

    def wake(self) -> None:
        """End a wait."""
        self._sender.send(b"\0")

    def wait(self, seconds: float) -> None:
        """Wait for a signal, and record it."""
        select.select([self._receiver], [], [], seconds)
        with self._lock, contextlib.suppress(BlockingIOError):
            for number in self._receiver.recv(4096):
                now = time.monotonic()
                if number and not self.first:
                    self.number, self.first = number, now
                elif number in (signal.SIGINT, signal.SIGQUIT) and now - self.first > AGAIN_SECONDS:
                    self.second = self.second or now


class RankMonitor:
    """The threads of one rank: one exchanges positions with the others, one watches and reads signals."""

    def __init__(
        self,
        store: Store,
        position: Position,
        processes: Sequence[Process],
        rank: int,
        *,
        on_abort: Callable[[str], None],
    ) -> None:
        """Create the threads.

        Args:
            position: of this rank.
            processes: of all ranks.
            on_abort: called with the state of the run before it is ended, on one rank.
        """
        self._store, self._position, self._processes, self._rank = store, position, processes, rank
        self._on_abort = on_abort
        self._signals, self._end = _Signals(), threading.Event()
        self._ranks = [_Rank(time.monotonic()) for _ in processes]
        self._exchanged = time.monotonic()
        self._missing: list[Missing] = []
        self._next_report = REPORT_SECONDS
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._exchange, self._watch)]

    def start(self) -> None:
        """Start to write and to watch."""
        self._signals.open()
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End the threads. The first one may wait for a store that does not respond."""
        self._end.set()
        self._signals.wake()
        self._threads[1].join()
        self._threads[0].join(timeout=1)
        self._signals.close()

    def is_interrupted(self) -> bool:
        """Whether this process has received a second Ctrl-C. Python may have handled two as one, after a collective."""
        self._signals.wait(0)
        return bool(self._signals.second)

    def _exchange(self) -> None:
        """Write this rank's position, and read those of all ranks: on rank 0, and on rank 1 in case it is rank 0.

        The other ranks read what these two found.
        """
        beat, keys = 0, [str(rank) for rank in range(len(self._ranks))]
        while not self._end.is_set():
            beat += 1
            with contextlib.suppress(Exception):  # the store is gone: its owner has exited, and collectives will fail
                self._store.set(str(self._rank), json.dumps([beat, *self._position.value]))
                if self._rank > 1 and self._store.check([STATE_KEY]):
                    self._missing = [Missing(*values) for values in json.loads(self._store.get(STATE_KEY))]
                elif self._rank <= 1 and self._store.check(keys):
                    for rank, key in zip(self._ranks, keys, strict=True):
                        rank.update(self._store.get(key).decode(), time.monotonic())
                    if self._reports():
                        self._store.set(STATE_KEY, json.dumps([(m.rank, 0, m.is_silent) for m in self._missing]))
                self._exchanged = time.monotonic()
            self._end.wait(BEAT_SECONDS)

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._end.is_set():
            now = time.monotonic()
            if now - last > 3 * BEAT_SECONDS:  # this process was stopped itself: it knows nothing of the others
                self._ranks, self._exchanged = [_Rank(now) for _ in self._ranks], now
            last = now
            if self._rank <= 1:
                self._find_missing(now)
            if self._reports():
                self._report()
            self._abort_if_asked(now)
            self._signals.wait(BEAT_SECONDS)

    def _find_missing(self, now: float) -> None:
        silent_limit = SILENT_SECONDS if self._signals.first else REPORT_SECONDS
        if now - self._exchanged < silent_limit / 2:
            self._missing = find_missing(self._ranks, now, REPORT_SECONDS, silent_limit)
        elif self._rank == 1 and now - self._exchanged >= silent_limit and self._is_stopped(0):
            self._missing = [Missing(0, now - self._exchanged, True)]  # it holds the store, which is stopped too

    def _is_stopped(self, rank: int) -> bool:
        process = self._processes[rank]
        with contextlib.suppress(psutil.Error):
            return process.host == socket.gethostname() and psutil.Process(process.pid).status() == STOPPED
        return False

    def _reports(self) -> bool:
        """Whether this rank reports: rank 0, or rank 1 if rank 0 does not respond."""
        return self._rank == 0 or (self._rank == 1 and any(m.rank == 0 and m.is_silent for m in self._missing))

    def _report(self) -> None:
        """Log the stalled ranks: after 60 seconds, then ever more rarely."""
        longest = max((missing.seconds for missing in self._missing), default=0.0)
        if not self._missing and self._next_report > REPORT_SECONDS:
            logger.warning("all ranks respond again; training continues")
            self._next_report = REPORT_SECONDS
        elif longest >= self._next_report:
            self._next_report = 2 * longest
            logger.warning("\n".join(self._describe(missing) for missing in self._missing))

    def _describe(self, missing: Missing) -> str:
        """Return the message about a stalled rank."""
        process, (step, part) = self._processes[missing.rank], self._ranks[missing.rank].position
        first, _ = max(rank.position for rank in self._ranks)
        state = "it does not respond (stopped or swapping?)" if missing.is_silent else "it responds"
        location = f"it was last in step {step + 1}" + (f", micro-batch {(part + 1) // 2}" if part else "")
        return (
            f"rank {missing.rank} (process {process.pid} on {process.host}) has not arrived at the next exchange of "
            f"step {first + 1} for {missing.seconds:.0f} s: {state}; {location}. The other ranks wait for it. "
            "Ctrl-C or SIGTERM ends the run without a checkpoint of this step"
        )

    def _abort_if_asked(self, now: float) -> None:
        """End this process if it was asked to stop and cannot: a rank is stalled, or Ctrl-C was pressed twice."""
        asked, missing = self._signals, self._missing
        is_hanging = any(m.is_silent for m in missing) or (bool(missing) and now - asked.first >= GRACE_SECONDS)
        is_interrupted = bool(asked.second) and now - asked.second >= ABORT_SECONDS
        if self._end.is_set() or not ((asked.first and is_hanging) or is_interrupted):
            return
        if self._reports():
            with contextlib.suppress(Exception):
                self._on_abort("failed" if missing else "preempted")
            ranks = ", ".join(f"rank {m.rank}" for m in missing)
            while_what = f" while {ranks} was stalled" if missing else ""
            text = f"ended by {signal.Signals(asked.number).name}{while_what}; run the same command to resume"
            with contextlib.suppress(OSError):
                os.write(2, f"error: {text} from the newest checkpoint\n".encode())
            self._kill_silent_siblings()
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        os._exit(exit_code_of(asked.number))

    def _kill_silent_siblings(self) -> None:
        """Kill the ranks of this launcher that do not respond: a stopped process takes no other signal."""
        for missing in self._missing:
            process = self._processes[missing.rank]
            if not missing.is_silent or process.host != socket.gethostname():
                continue
            with contextlib.suppress(psutil.Error):
                sibling = psutil.Process(process.pid)
                if sibling.ppid() == os.getppid():
                    sibling.kill()


@contextlib.contextmanager
def watch_ranks(
    store: Any, position: Position, processes: Sequence[Process], rank: int, *, on_abort: Callable[[str], None]
) -> Iterator[None]:
    """Report stalled ranks within the block; see `RankMonitor`.

    Args:
        store: a store that all ranks share; None = one process, nothing to watch.

    Raises:
        KeyboardInterrupt: a collective failed after a second Ctrl-C, at which another rank has exited.
    """
    if store is None:
        yield
        return
    monitor = RankMonitor(store, position, processes, rank, on_abort=on_abort)
    monitor.start()
    try:
        yield
    except Exception as error:
        if monitor.is_interrupted():
            raise KeyboardInterrupt from error
        raise
    finally:
        monitor.stop()
