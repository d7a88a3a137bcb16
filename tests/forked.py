"""Run commands in processes that need no seconds for imports: forks of a process that has imported everything.

Each is a process of its own, with its environment, its output and its death. Where imports are what a test is about, or
what they print or read from the environment, it starts a fresh process.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path

ROOT = Path(__file__).parent.parent
PRELOAD = [
    "lora_accel.cli",
    "lora_accel.train",
    "lora_accel.inference.inference",
    "lora_accel.verify_resume",
    "lora_accel.merging.request",
]
PRELOAD += ["lora_accel.saving.checkpoint", "lora_accel.merging.merge", "lora_accel.training.loop"]
PRELOAD += ["lora_accel.data.dataset", "lora_accel.batching.batches", "lora_accel.model.adapter", "deepspeed", "pandas"]
PRELOAD += ["accelerate.commands.launch", "torch.distributed.run"]


def context() -> ForkServerContext:
    """Return the server's context."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(PRELOAD)
    return server


def start(words: list[str], environment: dict[str, str], stdout: Path, stderr: Path) -> BaseProcess:
    """Start `python -m MODULE …` or `python SCRIPT …` in a fork.

    Args:
        words: `-m` and a module, or a script, and its arguments.
        environment: all of it.
        stdout, stderr: files for what it prints; may be the same.
    """
    process = context().Process(target=_main, args=(words, environment, str(stdout), str(stderr)))
    process.start()
    return process


def run(words: list[str], environment: dict[str, str], timeout: float) -> subprocess.CompletedProcess[str]:
    """Run one to its end; its exit code is negative where a signal killed it.

    Raises:
        AssertionError: it hangs.
    """
    with tempfile.TemporaryDirectory(prefix="lora-accel-fork-") as folder:
        stdout, stderr = Path(folder, "stdout"), Path(folder, "stderr")
        process = start(words, environment, stdout, stderr)
        process.join(timeout)
        hangs = process.is_alive()
        process.kill()
        process.join()
        printed = [path.read_text(encoding="utf-8") if path.exists() else "" for path in (stdout, stderr)]
    assert not hangs, f"{words} still ran after {timeout} seconds\n{printed[0][-2000:]}\n{printed[1][-4000:]}"
    return subprocess.CompletedProcess(words, process.exitcode or 0, *printed)


def become(environment: dict[str, str], stdout: str, stderr: str) -> None:
    """Make of a fork what a fresh process is: folder, environment, output, what signals do."""
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, path in ((1, stdout), (2, stderr)):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, number)
        os.close(descriptor)


def _main(words: list[str], environment: dict[str, str], stdout: str, stderr: str) -> None:
    become(environment, stdout, stderr)
    if words[0] == "-m":
        sys.argv = words[1:]
        sys.modules.pop(words[1], None)  # runpy warns of a module that is imported already
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")
