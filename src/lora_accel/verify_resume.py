"""`lora-accel verify-resume`: verify on the training machine that a killed run resumes exactly."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lora_accel.config.files import read_config
from lora_accel.errors import ArtifactError, ConfigError, LoraAccelError
from lora_accel.paths import why_not_writable
from lora_accel.saving.atomic import sha256_of
from lora_accel.saving.discovery import OPTIMIZER, WEIGHTS

COMPARED = {
    "train": ("loss", "grad_norm", "learning_rate", "supervised_tokens"),
    "eval": ("eval_loss", "eval_tokens", "eval_neutral_loss"),
}
"""The values in metrics.jsonl that must be equal, by kind of line. Times and throughput differ."""


class Verdict(NamedTuple):
    """The result of comparing two runs."""

    steps: int
    killed_after: int
    differences: list[str]
    """Empty = bitwise equal."""
    folder: Path
    """Where both runs are kept if they differ."""


def verify_resume(config: Path, overrides: Sequence[str], *, steps: int, launcher: str | None) -> Verdict:
    """Train a few steps twice, the second time killed half-way by SIGKILL and resumed, and compare both runs.

    Args:
        config: run config file.
        overrides: `section.key=value` options that override it.
        steps: number of steps of each run.
        launcher: command that starts a run, without `-m lora_accel.train`; None = `accelerate launch`.

    Raises:
        ConfigError: the config is wrong, or the folder of an earlier verification exists.
        LoraAccelError: a run failed, or was not killed.
    """
    output = Path(read_config(config, overrides).output_dir)
    folder = output.absolute().with_name(f"{output.absolute().name}-verify-resume")
    if reason := why_not_writable(folder / "uninterrupted", "folder"):
        raise ConfigError(f"output_dir: {reason}")
    if folder.exists():
        raise ConfigError(f"output_dir: {folder} exists from an earlier verification; delete it")
    half = steps // 2
    try:
        command = shlex.split(launcher) if launcher else [sys.executable, "-m", "accelerate.commands.launch"]
    except ValueError as error:
        raise ConfigError(f"--launcher: {error}") from None
    program = command[0] if command else ""
    if shutil.which(program) is None:
        raise ConfigError(f"--launcher: program {program!r} not found")
    command += ["-m", "lora_accel.train", "--config", str(config), *overrides]
    command += [f"training.max_steps={steps}", f"checkpoint.every_steps={half}", "checkpoint.resume=auto"]
    command += ["checkpoint.every_epochs=null", "checkpoint.keep_best=null", "checkpoint.export=last"]
    command += ["checkpoint.best_is=auto", "evaluation.every_steps=null", "evaluation.every_epochs=null"]
    command += ["evaluation.patience=null", "evaluation.min_delta=0", "evaluation.at_start=false"]
    command += ["evaluation.metrics=[]", "evaluation.prompts=[]"]
    command += ["logging.every_steps=1", "logging.trackers=[]", "logging.report=false"]

    _run("uninterrupted", [*command, f"output_dir={json.dumps(str(folder / 'uninterrupted'))}"])
    resumed = [*command, f"output_dir={json.dumps(str(folder / 'resumed'))}"]
    _run("killed", resumed, fault=f"step.begin@{half + 1}=kill")
    if not (folder / "resumed" / "checkpoints" / f"step-{half:08d}").is_dir():
        raise LoraAccelError(f"{folder}: the killed run has no checkpoint after step {half}")
    _run("resumed", resumed)

    differences = compare(folder / "uninterrupted", folder / "resumed")
    if not differences:
        shutil.rmtree(folder)
    return Verdict(steps, half, differences, folder)


def compare(one: Path, other: Path) -> list[str]:
    """Return the differences between two run folders: logged values, and the bytes of adapter and optimizer state."""
    lines, other_lines = _read_lines(one), _read_lines(other)
    value_differences = [
        f"{kind} line of step {step}: {lines.get((kind, step))} -> {other_lines.get((kind, step))}"
        for step, kind in sorted((step, kind) for kind, step in lines.keys() | other_lines.keys())
        if lines.get((kind, step)) != other_lines.get((kind, step))
    ]
    last = max(path.name for path in (one / "checkpoints").glob("step-*"))
    file_differences = [
        f"{file}: different bytes"
        for file in (f"adapter/{WEIGHTS}", f"checkpoints/{last}/{OPTIMIZER}")
        if not (other / file).is_file() or sha256_of(one / file) != sha256_of(other / file)
    ]
    return value_differences + file_differences


def _read_lines(folder: Path) -> dict[tuple[str, int], dict[str, Any]]:
    try:
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{folder / 'metrics.jsonl'}: cannot be read: {error}") from None
    return {
        (line["kind"], line["step"]): {key: line[key] for key in COMPARED[line["kind"]] if key in line}
        for line in lines
        if line["kind"] in COMPARED
    }


def _run(name: str, command: Sequence[str], fault: str = "") -> None:
    """Run a command; it must fail if a fault is injected, and succeed otherwise."""
    print(f"{name}: {shlex.join(command)}", file=sys.stderr, flush=True)
    environment = os.environ | {"LORA_ACCEL_FAULT": fault}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace", check=False)
    if (result.returncode != 0) != bool(fault):
        output = "\n".join((result.stdout + result.stderr).splitlines()[-30:])
        raise LoraAccelError(f"the {name} run ended with exit code {result.returncode}; its last output:\n{output}")
