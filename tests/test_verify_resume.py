"""The commands `lora-accel verify-resume` and `lora-accel checkpoints`, and merges that are killed."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lora_accel import run_training, verify_resume
from lora_accel.config.files import read_config
from lora_accel.config.schema import RunConfig
from lora_accel.saving.discovery import OPTIMIZER, WEIGHTS
from lora_accel.verify_resume import compare
from tests import forked
from tests.conftest import PATIENCE_SECONDS, ROOT, CommandResult, run_module, write_jsonl
from tests.distributed.launching import PRESETS, free_port

pytestmark = pytest.mark.distributed

FORGETFUL = """
import sys
from lora_accel import train
from lora_accel.distributed.launch import exit_process
from lora_accel.saving import checkpoint
checkpoint._restore_moments = lambda *_: None
exit_process(train.main(sys.argv[3:]))  # after -m lora_accel.train
"""


@pytest.fixture
def file(make_config: Callable[..., RunConfig], config_file: Callable[[RunConfig], Path]) -> Path:
    return config_file(make_config(training={"warmup_steps": 0}))


def launcher(preset: str) -> str:
    args = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", PRESETS / f"{preset}.yaml"]
    return shlex.join(map(str, [*args, "--main_process_port", free_port()]))


@pytest.mark.parametrize("preset", ["cpu", pytest.param("cpu_zero2", marks=pytest.mark.slow)])
def test_a_resumed_run_is_equal_and_its_folder_is_deleted(file: Path, tmp_path: Path, preset: str) -> None:
    """Even in a folder whose name must be quoted."""
    args = ("--launcher", launcher(preset), f"output_dir='{tmp_path / 'my #1'}'")
    result = run_module("lora_accel.cli", "verify-resume", "--config", file, *args)
    assert result.returncode == 0, result.stderr
    assert result.stdout == ("bitwise equal: 4 steps uninterrupted, and killed by SIGKILL after step 2 and resumed\n")
    assert [line.split(":")[0] for line in result.stderr.splitlines()] == ["uninterrupted", "killed", "resumed"]
    assert not [*tmp_path.glob("run*"), *tmp_path.glob("my*")]


def test_a_run_without_its_optimizer_state_differs(
    file: Path, tmp_path: Path, command: Callable[..., CommandResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The runs are forks instead of new interpreters, as they are in the test above."""

    def run(name: str, arguments: list[str], fault: str = "") -> None:
        environment = os.environ | {"LORA_ACCEL_FAULT": fault, "OMP_NUM_THREADS": "1"}
        result = forked.run(arguments[1:], environment, PATIENCE_SECONDS)
        assert (result.returncode != 0) == bool(fault), result.stderr

    monkeypatch.setattr(verify_resume, "_run", run)
    (tmp_path / "forgetful.py").write_text(FORGETFUL)
    launch_command = shlex.join([sys.executable, str(tmp_path / "forgetful.py")])
    args = ("--launcher", launch_command, "--json", "--steps", "5")
    result = command("verify-resume", "--config", file, *args)
    assert result.returncode == 1
    verdict = json.loads(result.stdout)
    assert (verdict["equal"], verdict["steps"], verdict["killed_after"]) == (False, 5, 2)
    assert [line.split(":")[0] for line in verdict["differences"]] == [
        *("train line of step 4", "train line of step 5"),
        *("adapter/adapter_model.safetensors", "checkpoints/step-00000005/optimizer.safetensors"),
    ]
    assert (tmp_path / "run-verify-resume" / "resumed" / "adapter").is_dir()
    assert "error: the resumed run differs from the uninterrupted one" in result.stderr
    repeated = command("verify-resume", "--config", file)
    assert repeated.returncode == 2
    assert "exists from an earlier verification; delete it" in repeated.stderr


def test_a_failed_run_is_an_error_with_its_output(file: Path, tmp_path: Path) -> None:
    args = ("--launcher", sys.executable, "model.name_or_path=/nowhere")
    result = run_module("lora_accel.cli", "verify-resume", "--config", file, *args)
    assert result.returncode == 1
    assert "the uninterrupted run ended with exit code 2; its last output:" in result.stderr
    assert "model.name_or_path" in result.stderr


def test_different_metrics_or_bytes_are_reported(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    run_training(make_config())
    one, other = tmp_path / "run", tmp_path / "other"
    shutil.copytree(one, other)
    assert compare(one, other) == []
    lines = (other / "metrics.jsonl").read_text().splitlines()
    (other / "metrics.jsonl").write_text("\n".join(line for line in lines if '"step": 3' not in line))
    (other / "checkpoints" / "step-00000006" / OPTIMIZER).unlink()
    assert [line.split(":")[0] for line in compare(one, other)] == [
        "train line of step 3",
        "checkpoints/step-00000006/optimizer.safetensors",
    ]


def test_run_whose_only_evaluation_is_that_of_neutral_text(
    make_config: Callable[..., RunConfig],
    config_file: Callable[[RunConfig], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It has eval lines without eval_loss."""
    text = tmp_path / "neutral.txt"
    text.write_text("the answer is one two three")
    file = config_file(make_config(evaluation={"neutral": str(text), "every_steps": 1}))
    logs: list[Path] = []

    def run(name: str, command: list[str], fault: str = "") -> None:
        if not fault:  # the killed run is replaced by a complete one
            logs.append(run_training(read_config(file, command[command.index(str(file)) + 1 :])).parent)
        else:
            shutil.copytree(logs[0], logs[0].with_name("resumed"))

    monkeypatch.setattr(verify_resume, "_run", run)
    verdict = verify_resume.verify_resume(file, [], steps=2, launcher=None)
    assert (verdict.steps, verdict.differences) == (2, [])

    lines = [{"kind": "eval", "step": 2, "eval_neutral_loss": loss} for loss in (1.0, 1.5)]
    for name, line in zip(("one", "other"), lines, strict=True):
        folder = shutil.copytree(make_run(tmp_path), tmp_path / name)
        write_jsonl(folder / "metrics.jsonl", [line])
    (difference,) = compare(tmp_path / "one", tmp_path / "other")
    assert difference.startswith("eval line of step 2: {'eval_neutral_loss': 1.0} -> ")


def make_run(folder: Path) -> Path:
    """Return a folder with the files that are compared."""
    for name in (f"adapter/{WEIGHTS}", f"checkpoints/step-00000002/{OPTIMIZER}"):
        file = folder / "files" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"tensors")
    return folder / "files"


def test_checkpoints_are_listed_with_their_defects(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    config = make_config(checkpoint={"every_steps": 1, "keep_last": 4})
    run_training(config)
    folder = tmp_path / "run" / "checkpoints"
    corrupt = folder / "step-00000005" / OPTIMIZER
    data = bytearray(corrupt.read_bytes())
    data[-1] ^= 1
    corrupt.write_bytes(data)
    (folder / "step-00000003" / OPTIMIZER).unlink()
    (folder / "step-00000006").rename(folder / "corrupt-step-00000006")

    def list_as_json(*args: str) -> list[tuple[str, str | None]]:
        result = run_module("lora_accel.cli", "checkpoints", tmp_path / "run", "--json", *args)
        assert result.returncode == 0, result.stderr
        entries = json.loads(result.stdout)
        assert all(entry["bytes"] > 10_000 and 0 <= entry["age_seconds"] < 600 for entry in entries)
        assert [entry["step"] for entry in entries] == [3, 4, 5, 6]
        return [(entry["name"], entry["reason"]) for entry in entries]

    missing = ("step-00000003", f"{OPTIMIZER} is missing")
    quarantined = ("corrupt-step-00000006", "quarantined")
    assert list_as_json() == [missing, ("step-00000004", None), ("step-00000005", None), quarantined]
    changed = f"{OPTIMIZER} is corrupt (size or SHA-256 differs)"
    assert list_as_json("--verify") == [missing, ("step-00000004", None), ("step-00000005", changed), quarantined]
    table = run_module("lora_accel.cli", "checkpoints", tmp_path / "run", env={"COLUMNS": "200"}, fresh=True)
    assert "step-00000004" in table.stdout
    assert "valid" in table.stdout


def test_a_folder_without_checkpoints_is_an_error(tmp_path: Path) -> None:
    result = run_module("lora_accel.cli", "checkpoints", tmp_path)
    assert result.returncode == 2
    assert "pass the output_dir of a run" in result.stderr


def test_a_killed_merge_can_be_repeated_with_the_same_bytes(
    make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    adapter = run_training(make_config())
    args = ("lora_accel.cli", "merge", adapter, tmp_path / "merged")
    for point in ("merge.mid", "save.before_manifest", "save.before_rename"):
        killed = run_module(*args, env={"LORA_ACCEL_FAULT": f"{point}@1=kill"})
        assert killed.returncode == -9
        assert not (tmp_path / "merged").exists()
        assert [path.name for path in tmp_path.glob(".*")] == [".merged.lora-accel-writing"]
    assert run_module(*args).returncode == 0
    expected = (tmp_path / "merged" / "model.safetensors").read_bytes()
    assert not list(tmp_path.glob(".*"))
    killed = run_module(*args, "--overwrite", env={"LORA_ACCEL_FAULT": "save.before_rename@1=kill"})
    assert killed.returncode == -9
    assert run_module(*args, "--overwrite").returncode == 0
    assert (tmp_path / "merged" / "model.safetensors").read_bytes() == expected
    disk_full = run_module(*args, "--overwrite", env={"LORA_ACCEL_FAULT": "merge.mid@1=enospc"})
    assert disk_full.returncode == 3
    assert "No space left on device" in disk_full.stderr
    assert (tmp_path / "merged" / "model.safetensors").read_bytes() == expected
    assert str(ROOT) not in disk_full.stderr or "Traceback" not in disk_full.stderr


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (["--launcher", "nosuchcmd launch"], "--launcher: program 'nosuchcmd' not found"),
        (["--launcher", 'a "b'], "--launcher: No closing quotation"),
        (["--launcher", " "], "--launcher: program '' not found"),
    ],
)
def test_an_invalid_launcher_is_an_error(file: Path, args: list[str], reason: str) -> None:
    result = run_module("lora_accel.cli", "verify-resume", "--config", file, *args)
    assert (result.returncode, result.stderr) == (2, f"error: {reason}\n")
