"""Run commands in forks of a process that has imported everything, which saves seconds of imports.

Each fork is a separate process with its own environment, output and exit code. Tests of the imports themselves, or of
what they print or read from the environment, start a new interpreter instead.
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
    """Return the context of the fork server."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(PRELOAD)
    return server


def start(args: list[str], environment: dict[str, str], stdout: Path, stderr: Path) -> BaseProcess:
    """Start `python -m MODULE …` or `python SCRIPT …` in a fork.

    Args:
        args: `-m` and a module, or a script; then its arguments.
        environment: the complete environment.
        stdout, stderr: output files; may be the same.
    """
    process = context().Process(target=_main, args=(args, environment, str(stdout), str(stderr)))
    process.start()
    return process


def run(args: list[str], environment: dict[str, str], timeout: float) -> subprocess.CompletedProcess[str]:
    """Run a command and wait for it. The exit code is negative if a signal killed it.

    Args:
        timeout: in seconds.

    Raises:
        AssertionError: the command ran longer.
    """
    with tempfile.TemporaryDirectory(prefix="lora-accel-fork-") as folder:
        stdout, stderr = Path(folder, "stdout"), Path(folder, "stderr")
        process = start(args, environment, stdout, stderr)
        process.join(timeout)
        timed_out = process.is_alive()
        process.kill()
        process.join()
        output = [path.read_text(encoding="utf-8") if path.exists() else "" for path in (stdout, stderr)]
    assert not timed_out, f"{args} still ran after {timeout} seconds\n{output[0][-2000:]}\n{output[1][-4000:]}"
    return subprocess.CompletedProcess(args, process.exitcode or 0, *output)


def become(environment: dict[str, str], stdout: str, stderr: str) -> None:
    """Give a fork the working directory, environment, output and signal handlers of a new process."""
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, path in ((1, stdout), (2, stderr)):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, number)
        os.close(descriptor)


def _main(args: list[str], environment: dict[str, str], stdout: str, stderr: str) -> None:
    become(environment, stdout, stderr)
    if args[0] == "-m":
        sys.argv = args[1:]
        sys.modules.pop(args[1], None)  # runpy warns about modules that are already imported
        runpy.run_module(args[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = args
        runpy.run_path(args[0], run_name="__main__")
