"""One training of a benchmark, in its own process: what benchmark.py and check_gpu.py share."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lora_accel.distributed.devices import HIDDEN

SCRIPTS = Path(__file__).resolve().parent
PRESETS = SCRIPTS.parent / "accelerate_configs"


class Case(NamedTuple):
    """One training to measure."""

    name: str
    trainer: str
    """lora_accel, trl, trainer or fastchat."""
    config: dict[str, Any]
    """A run config without `output_dir`."""
    options: dict[str, Any] | None = None
    """Additional arguments of another trainer."""
    candidates: Sequence[dict[str, Any]] = ()
    """Further arguments, of which the ones that are fastest in a short run are used."""
    preset: str | None = None
    """A file of accelerate_configs/; None = one process without a launcher."""
    threads: int = os.cpu_count() or 1
    """Threads of each process."""
    device: str = "cpu"
    """cpu, which hides GPUs, or cuda, which shows one."""
    profile: bool = False
    """Whether to list the operators of the second step."""
    probe: bool = False
    """Whether to count the kernels of the second step and the synchronizations of the third, and to estimate memory."""
    compared: dict[str, Any] | None = None
    """Config of a second run of lora_accel in the same process: both make each step in turn, and only steps are
    measured."""


class Finished(NamedTuple):
    """What the processes of a training wrote."""

    ranks: list[dict[str, Any]]
    """The measurements of each process; see `Monitor.measurements` in benchmark_case.py."""
    profile: str


class CaseError(Exception):
    """A training failed. The message is the end of its output."""


def run_case(case: Case, timeout: float | None = None) -> Finished:
    """Run one training and return its measurements.

    Args:
        timeout: in seconds; None = no limit.

    Raises:
        CaseError: it failed.
        subprocess.TimeoutExpired: it took longer, and was killed.
    """
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        request = case._asdict() | {"options": case.options or {}, "folder": folder}
        command = [sys.executable, str(SCRIPTS / "benchmark_case.py"), json.dumps(request)]
        if case.preset:
            accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--quiet"]
            command = [*accelerate, "--config_file", str(PRESETS / f"{case.preset}.yaml"), *command[1:]]
        environment = os.environ | {
            "OMP_NUM_THREADS": str(case.threads),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            **_visible_devices(case.device),
        }
        process = run_process(command, environment, timeout)
        if process.returncode:
            raise CaseError(f"{process.stdout[-1500:]}\n{process.stderr[-3000:]}")
        operators = (Path(folder) / "profile.txt").read_text() if case.profile else ""
        return Finished([json.loads(file.read_text()) for file in sorted(Path(folder).glob("rank-*.json"))], operators)


def run_process(
    command: Sequence[str], environment: Mapping[str, str], timeout: float | None = None, *, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command and capture its output. If it is interrupted or takes too long, it and its children are killed.

    Args:
        timeout: in seconds; None = no limit.
        cwd: working directory; None = this one.

    Raises:
        subprocess.TimeoutExpired: it took longer; has its output.
    """
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "errors": "replace"}
    with subprocess.Popen(command, env=environment, cwd=cwd, start_new_session=True, **pipes) as process:
        try:
            output, errors = process.communicate(timeout=timeout)
        except BaseException as error:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                error.stdout, error.stderr = process.communicate()
            raise
    return subprocess.CompletedProcess([*command], process.returncode, output, errors)


def _visible_devices(device: str) -> dict[str, str]:
    """Return the variables that hide GPUs, or all but the first: transformers' Trainer would use all."""
    if device == "cpu":
        return HIDDEN
    return {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]}


def token_rows(folder: Path, length: int, count: int) -> Path:
    """Write rows of random tokens, all supervised, and return the file."""
    file, rng = folder / f"rows-{length}.jsonl", random.Random(length)
    with file.open("w", encoding="utf-8") as lines:
        for _ in range(count):
            ids = rng.choices(range(1000, 8000), k=length)
            lines.write(json.dumps({"input_ids": ids, "labels": ids}) + "\n")
    return file


def spread(values: Iterable[float], spec: str) -> str:
    """Return `median (min-max)`."""
    values = list(values)
    return f"{statistics.median(values):{spec}} ({min(values):{spec}}-{max(values):{spec}})"


def write_between_markers(file: Path, part: str, lines: list[str]) -> None:
    """Write lines between `<!-- part -->` and `<!-- /part -->`.

    Raises:
        SystemExit: the file has no such markers.
    """
    text = file.read_text(encoding="utf-8")
    start, end = f"<!-- {part} -->", f"<!-- /{part} -->"
    pattern = re.compile(f"{start}.*?{end}", re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise SystemExit(f"{file}: has no {start} … {end}")
    block = "\n".join([start, *lines, end])
    file.write_text(pattern.sub(lambda _: block, text), encoding="utf-8")
