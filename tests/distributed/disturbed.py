"""Compare an interrupted and resumed run with an uninterrupted one, bit for bit."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any, NamedTuple

from lora_accel.config.files import config_to_yaml
from lora_accel.config.schema import RunConfig
from lora_accel.saving.atomic import why_invalid
from lora_accel.saving.discovery import FILES, step_folders
from tests.conftest import read_metrics
from tests.distributed.forked import Forks


class Result(NamedTuple):
    """What must be equal bit for bit."""

    lines: list[tuple[Any, ...]]
    adapter: bytes
    optimizer: bytes


def result_of(folder: Path) -> Result:
    train = [
        (line["step"], *(float(line[key]).hex() for key in ("loss", "grad_norm", "learning_rate")))
        for line in read_metrics(folder)
    ]
    evaluation = [(line["step"], float(line["eval_loss"]).hex()) for line in read_metrics(folder, "eval")]
    last = step_folders(folder / "checkpoints")[-1]
    return Result(
        [*train, *evaluation],
        (folder / "adapter" / "adapter_model.safetensors").read_bytes(),
        (last / "optimizer.safetensors").read_bytes(),
    )


class Runs:
    """A training command, its uninterrupted result on each backend, and ways to interrupt it."""

    def __init__(self, forks: Forks, config: RunConfig, folder: Path) -> None:
        self.forks, self.output = forks, Path(config.output_dir)
        self._file = folder / "config.yaml"
        self._file.write_text(config_to_yaml(config), encoding="utf-8")
        self._uninterrupted: dict[str, Result] = {}

    def train(self, preset: str, **environment: str) -> list[int]:
        return self.forks.run(preset, self.args, **environment)

    def uninterrupted(self, preset: str) -> Result:
        """Return the result of an uninterrupted run, and delete the run folder."""
        if preset not in self._uninterrupted:
            shutil.rmtree(self.output, ignore_errors=True)
            assert set(self.train(preset)) == {0}, self.forks.log()
            self._uninterrupted[preset] = result_of(self.output)
        shutil.rmtree(self.output, ignore_errors=True)
        return self._uninterrupted[preset]

    @property
    def args(self) -> list[str]:
        return ["--config", str(self._file)]

    def kill_and_resume(self, preset: str, point: str, occurrence: int, sabotage: str = "none") -> None:
        """Kill a run at a fault point, resume it, and compare with the uninterrupted run."""
        expected = self.uninterrupted(preset)
        self.kill(preset, point, occurrence, sabotage)
        self.check_resumed(expected, preset, sabotage)

    def kill(self, preset: str, point: str, occurrence: int, sabotage: str = "none") -> None:
        """Start or resume a run, kill it at a fault point, and check that its checkpoints are complete."""
        codes = self.train(preset, LORA_ACCEL_FAULT=f"{point}@{occurrence}=kill", SABOTAGE=sabotage)
        assert -signal.SIGKILL in codes, f"{point}: {codes}: was not killed\n{self.forks.log()}"
        self._check_complete()

    def _check_complete(self) -> None:
        invalid = [path for path in step_folders(self.output / "checkpoints") if why_invalid(path, required=FILES)]
        assert not invalid, "a partial checkpoint is left"

    def check_resumed(self, expected: Result, preset: str, sabotage: str = "none") -> None:
        """Run the same command again, and compare the result with that of the uninterrupted run."""
        self._check_complete()
        codes = self.train(preset, SABOTAGE=sabotage)
        assert set(codes) == {0}, f"{codes}\n{self.forks.log()}"
        resumed = result_of(self.output)
        assert resumed.lines == expected.lines
        assert resumed.adapter == expected.adapter
        assert resumed.optimizer == expected.optimizer
        hidden = [path for folder in (self.output, self.output / "checkpoints") for path in folder.glob(".*")]
        assert not hidden, "leftovers of the crash"
        assert json.loads((self.output / "status.json").read_text())["state"] == "done"
