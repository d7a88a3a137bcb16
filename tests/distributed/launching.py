"""Start processes with `accelerate launch`."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

from tests import forked
from tests.conftest import PATIENCE_SECONDS, ROOT

PRESETS = ROOT / "accelerate_configs"
TRAIN = ("-m", "lora_accel.train", "--config")


def free_port() -> str:
    """Return an unused port of this machine."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def start(*args: str | Path, preset: str = "cpu_ddp", **environment: str) -> subprocess.Popen[str]:
    """Start `accelerate launch` with a preset.

    Args:
        args: further options of the launcher, a script or `-m` and a module, and its arguments.
        environment: changes to the environment.
    """
    return subprocess.Popen(
        [sys.executable, *_launcher(preset), *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=_environment() | environment,
        cwd=ROOT,
    )


def finish(process: subprocess.Popen[str], timeout: float = PATIENCE_SECONDS) -> subprocess.CompletedProcess[str]:
    """Wait for a launcher. If it hangs, end it and its children, and raise AssertionError."""
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its children
        stdout, stderr = process.communicate(timeout=60)
        raise AssertionError(f"still running after {timeout} seconds\n{stdout[-2000:]}\n{stderr[-4000:]}") from None
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def launch(
    *args: str | Path, preset: str = "cpu_ddp", timeout: float = PATIENCE_SECONDS
) -> subprocess.CompletedProcess[str]:
    """Run `accelerate launch` to its end on an unused port. The launcher is a fork; the ranks are new processes."""
    command = [*_launcher(preset), "--main_process_port", free_port(), *map(str, args)]
    return forked.run(command, _environment(), timeout)


def _launcher(preset: str) -> list[str]:
    return ["-m", "accelerate.commands.launch", "--config_file", str(PRESETS / f"{preset}.yaml")]


def _environment() -> dict[str, str]:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(paths)}
