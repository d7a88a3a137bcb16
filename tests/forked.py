"""Run commands in forks of a process that has imported everything, which saves seconds of imports.

Each fork is a separate process with its own environment, output and exit code. Tests of the imports themselves, or of
what they print or read from the environment, start a new interpreter instead.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

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


def skip_fsync() -> None:
    """Let `os.fsync` do nothing in this process. It matters only when power fails, and takes a third of a short run."""
    os.fsync = lambda descriptor: None


def context() -> ForkServerContext:
    """Return the context of the fork server."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(PRELOAD)
    return server


def start(args: list[str], environment: dict[str, str], stdout: Path, stderr: Path, folder: Path = ROOT) -> BaseProcess:
    """Start `python -m MODULE …` or `python SCRIPT …` in a fork.

    Args:
        args: `-m` and a module, or a script; then its arguments.
        environment: the complete environment.
        stdout, stderr: output files; may be the same.
        folder: the working directory.
    """
    process = context().Process(target=_main, args=(args, environment, str(stdout), str(stderr), str(folder)))
    process.start()
    return process


def run_process(
    command: Sequence[str], environment: Mapping[str, str], timeout: float | None = None, **_: Any
) -> subprocess.CompletedProcess[str]:
    """Run a command as `benchmark_run.run_process` does, as a fork."""
    from tests.conftest import PATIENCE_SECONDS  # which imports this module

    return run([*command[1:]], dict(environment), timeout or PATIENCE_SECONDS)


def run(
    args: list[str], environment: dict[str, str], timeout: float, folder: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    """Run a command and wait for it. The exit code is negative if a signal killed it.

    Args:
        timeout: in seconds.
        folder: the working directory.

    Raises:
        AssertionError: the command ran longer.
    """
    with tempfile.TemporaryDirectory(prefix="lora-accel-fork-") as outputs:
        stdout, stderr = Path(outputs, "stdout"), Path(outputs, "stderr")
        process = start(args, environment, stdout, stderr, folder)
        process.join(timeout)
        timed_out = process.is_alive()
        process.kill()
        process.join()
        output = [path.read_text(encoding="utf-8") if path.exists() else "" for path in (stdout, stderr)]
    assert not timed_out, f"{args} still ran after {timeout} seconds\n{output[0][-2000:]}\n{output[1][-4000:]}"
    return subprocess.CompletedProcess(args, process.exitcode or 0, *output)


def measure(
    arguments: list[str], folder: Path, environment: dict[str, str], timeout: int, stdout: Path, stderr: Path
) -> tuple[int, float, float]:
    """Run `lora-accel …` in a folder, in a fork; return its exit code, CPU seconds and peak memory in MB.

    The memory includes that of the imports; a fork without arguments does nothing and has only this.

    Args:
        timeout: in seconds, after which a signal ends the fork.
    """
    with tempfile.TemporaryDirectory(prefix="lora-accel-fork-") as results:
        result = Path(results, "usage.json")
        process = context().Process(
            target=_measure, args=(arguments, str(folder), environment, timeout, str(stdout), str(stderr), str(result))
        )
        process.start()
        process.join()
        code, seconds, megabytes = json.loads(result.read_text(encoding="utf-8"))
    return code, seconds, megabytes


def _measure(
    arguments: list[str],
    folder: str,
    environment: dict[str, str],
    timeout: int,
    stdout: str,
    stderr: str,
    result: str,
) -> None:
    pid = os.fork()
    if pid == 0:
        become(environment, stdout, stderr)
        os.chdir(folder)
        signal.alarm(timeout)
        if arguments:
            sys.argv = ["lora_accel.cli", *arguments]
            sys.modules.pop("lora_accel.cli", None)  # runpy warns about modules that are already imported
            runpy.run_module("lora_accel.cli", run_name="__main__", alter_sys=True)
        return
    _, status, usage = os.wait4(pid, 0)
    Path(result).write_text(json.dumps([os.waitstatus_to_exitcode(status), *used(usage)]), encoding="utf-8")


def used(usage: resource.struct_rusage) -> tuple[float, float]:
    """Return CPU seconds and peak memory in MB. Children that the process waited for count, too."""
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e6


def become(environment: dict[str, str], stdout: str, stderr: str) -> None:
    """Give a fork the working directory, environment, output and signal handlers of a new process."""
    skip_fsync()
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, path in ((1, stdout), (2, stderr)):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, number)
        os.close(descriptor)


def _main(args: list[str], environment: dict[str, str], stdout: str, stderr: str, folder: str) -> None:
    become(environment, stdout, stderr)
    os.chdir(folder)
    if args[0] == "-m":
        sys.argv = args[1:]
        sys.modules.pop(args[1], None)  # runpy warns about modules that are already imported
        runpy.run_module(args[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = args
        runpy.run_path(args[0], run_name="__main__")
