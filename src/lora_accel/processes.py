"""Process utilities: exit with the parent, detect a launcher, keep freed memory."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path


def end_with_parent(parent: int) -> None:
    """Ask the kernel to send SIGTERM to this process when its parent dies, even by SIGKILL.

    Args:
        parent: its process id, read before it could have died. (Linux only: prctl(2), PR_SET_PDEATHSIG.)
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)
    if os.getppid() != parent:  # it died in the meantime
        os.kill(os.getpid(), signal.SIGTERM)


def keep_freed_memory() -> None:
    """Keep freed memory in this process instead of returning it to the kernel: page faults are expensive, especially in
    virtual machines. (glibc only, mallopt(3): M_MMAP_MAX and M_TRIM_THRESHOLD.)"""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-4, 0)
        mallopt(-1, 2**31 - 1)


def is_python(pid: int) -> bool:
    """Whether a process is a Python program: launchers are, init (which adopts orphans) is not. True off Linux."""
    if sys.platform != "linux":
        return True
    try:
        program = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0]
    except OSError:
        return False
    return Path(os.fsdecode(program)).name.startswith(("python", "accelerate", "torchrun", "deepspeed"))
