"""Places where a test may make a process die, run out of disk, or wait. Inert unless LORA_ACCEL_FAULT is set.

    LORA_ACCEL_FAULT=NAME@N=kill|enospc|exit|sleep|pause|hang[:rank=R]

N counts from 1 how often this process has come to the place NAME; without `rank` every rank has the fault. `pause`
creates the file LORA_ACCEL_FAULT_MARK-RANK and waits for a signal that this process handles, or until that file is
deleted; `hang` waits forever.
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
"""Long enough for a person, or a test, to do something to a process that waits in the middle of something."""


@dataclasses.dataclass
class Fault:
    """What goes wrong, where, and at which time of passing."""

    point: str
    occurrence: int
    action: str
    rank: int | None
    """None = every rank."""
    passed: int = 0


@functools.cache
def active_fault() -> Fault | None:
    """Return the fault that this process has, if any.

    Raises:
        ConfigError: the variable is set and says nothing that is known.
    """
    text = os.environ.get("LORA_ACCEL_FAULT", "")
    if not text:
        return None
    match = re.fullmatch(r"([a-z_.]+)@([1-9]\d*)=(kill|enospc|exit|sleep|pause|hang)(?::rank=(\d+))?", text)
    if match is None:
        raise ConfigError(
            f"LORA_ACCEL_FAULT={text!r}: say NAME@N=kill|enospc|exit|sleep|pause|hang[:rank=R], or unset it"
        )
    point, occurrence, action, rank = match.groups()
    if point not in POINTS:
        raise ConfigError(f"LORA_ACCEL_FAULT: {point!r} is no place{did_you_mean(point, POINTS)}: {', '.join(POINTS)}")
    return Fault(point, int(occurrence), action, None if rank is None else int(rank))


def fault_point(point: str) -> None:
    """Say that this process has come to a place."""
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
    """Wait where a test can see it. Python writes to a socket as soon as a signal comes, so none is missed."""
    mark = Path(f"{os.environ['LORA_ACCEL_FAULT_MARK']}-{os.environ.get('RANK', '0')}")
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    with ours, theirs:
        before = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        mark.touch()
        while forever or (mark.exists() and not select.select([ours], [], [], 0.02)[0]):
            time.sleep(0.01)
        signal.set_wakeup_fd(before)
