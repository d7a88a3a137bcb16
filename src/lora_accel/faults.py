"""Fault injection for tests: points at which a test can kill or pause a process, or simulate a full disk.

Off unless LORA_ACCEL_FAULT is set:

    LORA_ACCEL_FAULT=NAME@N=kill|enospc|exit|sleep|pause|hang[:rank=R]

The fault occurs the N-th time (from 1) that the process reaches the point NAME, on every rank unless `rank` is set.
`pause` creates the file LORA_ACCEL_FAULT_MARK-RANK and waits for a signal that this process handles, or until that file
is deleted; `hang` waits forever.
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import os
import re
import select
import signal
import socket
import time
from pathlib import Path

from lora_accel.errors import ConfigError, did_you_mean

POINTS = (
    *("step.begin", "step.after_backward", "step.after_optimizer", "evaluate.begin"),
    *("save.begin", "save.mid_file", "save.before_manifest", "save.after_manifest"),
    *("save.before_rename", "save.after_rename", "save.before_fsync_dir", "rotate.mid", "export.mid", "merge.mid"),
)
SLEEP_SECONDS = 5
"""Duration of `sleep`: long enough for a test to act on the waiting process."""


@dataclasses.dataclass
class Fault:
    """A fault to inject."""

    point: str
    occurrence: int
    action: str
    rank: int | None
    """None = every rank."""
    passed: int = 0
    """How often this process has reached the point."""


@functools.cache
def active_fault() -> Fault | None:
    """Return the fault to inject into this process, None without one.

    Raises:
        ConfigError: LORA_ACCEL_FAULT is invalid.
    """
    text = os.environ.get("LORA_ACCEL_FAULT", "")
    if not text:
        return None
    match = re.fullmatch(r"([a-z_.]+)@([1-9]\d*)=(kill|enospc|exit|sleep|pause|hang)(?::rank=(\d+))?", text)
    if match is None:
        raise ConfigError(
            f"LORA_ACCEL_FAULT={text!r}: use NAME@N=kill|enospc|exit|sleep|pause|hang[:rank=R], or unset it"
        )
    point, occurrence, action, rank = match.groups()
    if point not in POINTS:
        raise ConfigError(
            f"LORA_ACCEL_FAULT: {point!r} is not a fault point{did_you_mean(point, POINTS)}: {', '.join(POINTS)}"
        )
    return Fault(point, int(occurrence), action, None if rank is None else int(rank))


def fault_point(point: str) -> None:
    """Mark a point of the code; inject the fault here if it is active."""
    fault = active_fault()
    if fault is None or fault.point != point or fault.rank not in (None, int(os.environ.get("RANK", "0"))):
        return
    fault.passed += 1
    if fault.passed != fault.occurrence:
        return
    if fault.action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault.action == "exit":
        os._exit(1)
    elif fault.action == "sleep":
        time.sleep(SLEEP_SECONDS)
    elif fault.action in ("pause", "hang"):
        _pause(forever=fault.action == "hang")
    else:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), f"injected at {point}")


def _pause(forever: bool) -> None:
    """Create the mark file and wait. Python's wakeup socket reports every signal, so none is missed."""
    mark = Path(f"{os.environ['LORA_ACCEL_FAULT_MARK']}-{os.environ.get('RANK', '0')}")
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    with receiver, sender:
        before = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
        mark.touch()
        while forever or (mark.exists() and not select.select([receiver], [], [], 0.02)[0]):
            time.sleep(0.01)
        signal.set_wakeup_fd(before)
