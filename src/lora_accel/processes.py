"""Process utilities: exit with the parent, detect a launcher, keep or return freed memory."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
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


def return_freed_memory() -> None:
    """Return freed tensors to the kernel at once, at the cost of page faults. The heap would keep the gaps between
    blocks, which can be larger than all tensors. (glibc only, mallopt(3): M_MMAP_THRESHOLD.)"""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-3, 2**16)


def end_on_interrupt() -> None:
    """Let Ctrl-C end a command while it imports, instead of raising an error in the middle of some module.

    Only if Python runs a command of this package.
    """
    is_command = Path(getattr(sys, "argv", [""])[0]).name in ("-m", "lora-accel")  # -m: python -m lora_accel.…
    if is_command and _handles_interrupts(signal.default_int_handler):
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def raise_interrupts() -> None:
    """Let Ctrl-C raise KeyboardInterrupt again."""
    if _handles_interrupts(signal.SIG_DFL):
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _handles_interrupts(handler: object) -> bool:
    """Whether this thread may change the handler of Ctrl-C, which is the given one."""
    return threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is handler


def is_python(pid: int) -> bool:
    """Whether a process is a Python program: launchers are, init (which adopts orphans) is not. True off Linux."""
    if sys.platform != "linux":
        return True
    try:
        program = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0]
    except OSError:
        return False
    return Path(os.fsdecode(program)).name.startswith(("python", "accelerate", "torchrun", "deepspeed"))
