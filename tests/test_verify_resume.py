"""`lora-accel verify-resume` and `lora-accel checkpoints`, as a person runs them."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lora_accel import run_training
from lora_accel.config.schema import RunConfig
from lora_accel.saving.discovery import OPTIMIZER
from lora_accel.verify_resume import compare
from tests.conftest import ROOT, run_module
from tests.distributed.launching import PRESETS, free_port

pytestmark = pytest.mark.distributed

FORGETFUL = """
import sys
from lora_accel import train
from lora_accel.distributed.launch import leave
from lora_accel.saving import checkpoint
checkpoint._restore_moments = lambda *_: None
leave(train.main(sys.argv[3:]))  # after -m lora_accel.train
"""


@pytest.fixture
def file(make_config: Callable[..., RunConfig], config_file: Callable[[RunConfig], Path]) -> Path:
    return config_file(make_config(training={"warmup_steps": 0}))


def launcher(preset: str) -> str:
    words = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", PRESETS / f"{preset}.yaml"]
    return shlex.join(map(str, [*words, "--main_process_port", free_port()]))


@pytest.mark.parametrize("preset", ["cpu", pytest.param("cpu_zero2", marks=pytest.mark.slow)])
def test_a_killed_run_is_proven_equal_and_nothing_stays(file: Path, tmp_path: Path, preset: str) -> None:
    """In a folder whose name needs quotes, too."""
    words = ("--launcher", launcher(preset), f"output_dir='{tmp_path / 'my #1'}'")
    ran = run_module("lora_accel.cli", "verify-resume", "--config", file, *words)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == "equal to the last bit: 4 steps straight, and with a SIGKILL after 2\n"
    assert [line.split(":")[0] for line in ran.stderr.splitlines()] == ["straight", "killed half-way", "resumed"]
    assert not [*tmp_path.glob("run*"), *tmp_path.glob("my*")]


def test_a_run_that_forgets_its_moments_is_found_out(file: Path, tmp_path: Path) -> None:
    (tmp_path / "forgetful.py").write_text(FORGETFUL)
    words = shlex.join([sys.executable, str(tmp_path / "forgetful.py")])
    ran = run_module("lora_accel.cli", "verify-resume", "--config", file, "--launcher", words, "--json", "--steps", "5")
    assert ran.returncode == 1
    told = json.loads(ran.stdout)
    assert (told["equal"], told["steps"], told["killed_after"]) == (False, 5, 2)
    assert [line.split(":")[0] for line in told["differences"]] == [
        *("train line of step 4", "train line of step 5"),
        *("adapter/adapter_model.safetensors", "checkpoints/step-00000005/optimizer.safetensors"),
    ]
    assert (tmp_path / "run-verify-resume" / "resumed" / "adapter").is_dir()
    assert "error: the resumed run differs from the straight one" in ran.stderr
    again = run_module("lora_accel.cli", "verify-resume", "--config", file)
    assert again.returncode == 2
    assert "is there from an earlier proof; delete it" in again.stderr


def test_a_run_that_fails_is_told_with_its_last_words(file: Path, tmp_path: Path) -> None:
    words = ("--launcher", sys.executable, "model.name_or_path=/nowhere")
    ran = run_module("lora_accel.cli", "verify-resume", "--config", file, *words)
    assert ran.returncode == 1
    assert "the straight run ended with exit code 2; its last words:" in ran.stderr
    assert "model.name_or_path" in ran.stderr


def test_other_metrics_or_bytes_are_differences(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
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


def test_checkpoints_are_listed_with_what_is_wrong(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    config = make_config(checkpoint={"every_steps": 1, "keep_last": 4})
    run_training(config)
    folder = tmp_path / "run" / "checkpoints"
    spoiled = folder / "step-00000005" / OPTIMIZER
    data = bytearray(spoiled.read_bytes())
    data[-1] ^= 1
    spoiled.write_bytes(data)
    (folder / "step-00000003" / OPTIMIZER).unlink()
    (folder / "step-00000006").rename(folder / "corrupt-step-00000006")

    def listed(*words: str) -> list[tuple[str, str | None]]:
        ran = run_module("lora_accel.cli", "checkpoints", tmp_path / "run", "--json", *words)
        assert ran.returncode == 0, ran.stderr
        entries = json.loads(ran.stdout)
        assert all(entry["bytes"] > 10_000 and 0 <= entry["age_seconds"] < 600 for entry in entries)
        assert [entry["step"] for entry in entries] == [3, 4, 5, 6]
        return [(entry["name"], entry["reason"]) for entry in entries]

    missing = ("step-00000003", f"{OPTIMIZER} is missing")
    aside = ("corrupt-step-00000006", "set aside")
    assert listed() == [missing, ("step-00000004", None), ("step-00000005", None), aside]
    changed = f"{OPTIMIZER} is not what was written (size or SHA-256 differs)"
    assert listed("--verify") == [missing, ("step-00000004", None), ("step-00000005", changed), aside]
    table = run_module("lora_accel.cli", "checkpoints", tmp_path / "run", env={"COLUMNS": "200"}, fresh=True)
    assert "step-00000004" in table.stdout
    assert "valid" in table.stdout


def test_a_folder_without_checkpoints_is_refused(tmp_path: Path) -> None:
    ran = run_module("lora_accel.cli", "checkpoints", tmp_path)
    assert ran.returncode == 2
    assert "give the output_dir of a run" in ran.stderr


def test_a_merge_that_is_killed_is_done_again_to_the_same_bytes(
    make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    adapter = run_training(make_config())
    words = ("lora_accel.cli", "merge", adapter, tmp_path / "merged")
    for point in ("merge.mid", "save.before_manifest", "save.before_rename"):
        killed = run_module(*words, env={"LORA_ACCEL_FAULT": f"{point}@1=kill"})
        assert killed.returncode == -9
        assert not (tmp_path / "merged").exists()
        assert [path.name for path in tmp_path.glob(".*")] == [".merged.writing"]
    assert run_module(*words).returncode == 0
    whole = (tmp_path / "merged" / "model.safetensors").read_bytes()
    assert not list(tmp_path.glob(".*"))
    killed = run_module(*words, "--overwrite", env={"LORA_ACCEL_FAULT": "save.before_rename@1=kill"})
    assert killed.returncode == -9
    assert run_module(*words, "--overwrite").returncode == 0
    assert (tmp_path / "merged" / "model.safetensors").read_bytes() == whole
    full = run_module(*words, "--overwrite", env={"LORA_ACCEL_FAULT": "merge.mid@1=enospc"})
    assert full.returncode == 3
    assert "No space left on device" in full.stderr
    assert (tmp_path / "merged" / "model.safetensors").read_bytes() == whole
    assert str(ROOT) not in full.stderr or "Traceback" not in full.stderr


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--launcher", "nosuchcmd launch"], "--launcher: there is no program 'nosuchcmd'"),
        (["--launcher", 'a "b'], "--launcher: No closing quotation"),
    ],
)
def test_a_launcher_that_cannot_be_started_is_said(file: Path, words: list[str], reason: str) -> None:
    ran = run_module("lora_accel.cli", "verify-resume", "--config", file, *words)
    assert (ran.returncode, ran.stderr) == (2, f"error: {reason}\n")
