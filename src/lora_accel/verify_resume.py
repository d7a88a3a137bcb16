"""`lora-accel verify-resume`: proof, on the machine that will train, that a killed run goes on exactly."""

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
from lora_accel.saving.atomic import sha256_of
from lora_accel.saving.discovery import OPTIMIZER, WEIGHTS

COMPARED = {"train": ("loss", "grad_norm", "learning_rate", "supervised_tokens"), "eval": ("eval_loss", "eval_tokens")}
"""What must be equal in each line of metrics.jsonl; times and speeds are not."""


class Verdict(NamedTuple):
    """What two runs have come to."""

    steps: int
    killed_after: int
    differences: list[str]
    """Empty = equal to the last bit."""
    folder: Path
    """Where both runs stay if they differ."""


def verify_resume(config: Path, overrides: Sequence[str], *, steps: int, launcher: str | None) -> Verdict:
    """Train some steps; train them again, killed half-way by SIGKILL and started again; compare.

    Args:
        steps: of each of the two runs.
        launcher: the words that start a run, before `-m lora_accel.train`; None = `accelerate launch`.

    Raises:
        ConfigError: the config is wrong, or the folder of an earlier proof is there.
        LoraAccelError: a run did not come to its end, or was not killed.
    """
    output = Path(read_config(config, overrides).output_dir)
    folder = output.absolute().with_name(f"{output.absolute().name}-verify-resume")
    if folder.exists():
        raise ConfigError(f"output_dir: {folder} is there from an earlier proof; delete it")
    half = steps // 2
    try:
        words = shlex.split(launcher) if launcher else [sys.executable, "-m", "accelerate.commands.launch"]
    except ValueError as error:
        raise ConfigError(f"--launcher: {error}") from None
    if shutil.which(words[0]) is None:
        raise ConfigError(f"--launcher: there is no program {words[0]!r}")
    words += ["-m", "lora_accel.train", "--config", str(config), *overrides]
    words += [f"training.max_steps={steps}", f"checkpoint.every_steps={half}", "checkpoint.resume=auto"]
    words += ["evaluation.every_steps=null", "logging.every_steps=1", "logging.trackers=[]"]

    _run("straight", [*words, f"output_dir={json.dumps(str(folder / 'straight'))}"])
    resumed = [*words, f"output_dir={json.dumps(str(folder / 'resumed'))}"]
    _run("killed half-way", resumed, fault=f"step.begin@{half + 1}=kill")
    if not (folder / "resumed" / "checkpoints" / f"step-{half:08d}").is_dir():
        raise LoraAccelError(f"{folder}: the run that should go on has no checkpoint after step {half}")
    _run("resumed", resumed)

    differences = compare(folder / "straight", folder / "resumed")
    if not differences:
        shutil.rmtree(folder)
    return Verdict(steps, half, differences, folder)


def compare(one: Path, other: Path) -> list[str]:
    """Return how two run folders differ, in losses to the last bit and in the bytes of adapter and moments."""
    lines, other_lines = _lines(one), _lines(other)
    other_values = [
        f"{kind} line of step {step}: {lines.get((kind, step))} -> {other_lines.get((kind, step))}"
        for step, kind in sorted((step, kind) for kind, step in lines.keys() | other_lines.keys())
        if lines.get((kind, step)) != other_lines.get((kind, step))
    ]
    last = max(path.name for path in (one / "checkpoints").glob("step-*"))
    other_bytes = [
        f"{file}: other bytes"
        for file in (f"adapter/{WEIGHTS}", f"checkpoints/{last}/{OPTIMIZER}")
        if not (other / file).is_file() or sha256_of(one / file) != sha256_of(other / file)
    ]
    return other_values + other_bytes


def _lines(folder: Path) -> dict[tuple[str, int], dict[str, Any]]:
    try:
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{folder / 'metrics.jsonl'}: cannot be read: {error}") from None
    return {
        (line["kind"], line["step"]): {key: line[key] for key in COMPARED[line["kind"]]}
        for line in lines
        if line["kind"] in COMPARED
    }


def _run(what: str, words: Sequence[str], fault: str = "") -> None:
    print(f"{what}: {shlex.join(words)}", file=sys.stderr, flush=True)
    environment = os.environ | {"LORA_ACCEL_FAULT": fault}
    ran = subprocess.run(words, env=environment, capture_output=True, text=True, errors="replace", check=False)
    if (ran.returncode != 0) != bool(fault):
        told = "\n".join((ran.stdout + ran.stderr).splitlines()[-30:])
        raise LoraAccelError(f"the {what} run ended with exit code {ran.returncode}; its last words:\n{told}")
