"""One command, its straight result, and what becomes of it when it is disturbed."""

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
    """What two runs must have in common to the last bit."""

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
    """One command, its straight result on each backend, and ways to disturb it."""

    def __init__(self, forks: Forks, config: RunConfig, folder: Path) -> None:
        self.forks, self.output = forks, Path(config.output_dir)
        self._file = folder / "config.yaml"
        self._file.write_text(config_to_yaml(config), encoding="utf-8")
        self._straight: dict[str, Result] = {}

    def train(self, preset: str, **environment: str) -> list[int]:
        return self.forks.run(preset, self.words, **environment)

    def straight(self, preset: str) -> Result:
        if preset not in self._straight:
            shutil.rmtree(self.output, ignore_errors=True)
            assert set(self.train(preset)) == {0}, self.forks.log()
            self._straight[preset] = result_of(self.output)
        shutil.rmtree(self.output, ignore_errors=True)
        return self._straight[preset]

    @property
    def words(self) -> list[str]:
        return ["--config", str(self._file)]

    def killed_and_resumed(self, preset: str, point: str, occurrence: int, sabotage: str = "none") -> None:
        straight = self.straight(preset)
        codes = self.train(preset, LORA_ACCEL_FAULT=f"{point}@{occurrence}=kill", SABOTAGE=sabotage)
        assert -signal.SIGKILL in codes, f"{codes}: was not killed\n{self.forks.log()}"
        self.resumes_to(straight, preset, sabotage)

    def resumes_to(self, straight: Result, preset: str, sabotage: str = "none") -> None:
        """Start the same command again, and compare its end with that of the straight run."""
        damaged = [path for path in step_folders(self.output / "checkpoints") if why_invalid(path, required=FILES)]
        assert not damaged, "a folder was there in part"
        codes = self.train(preset, SABOTAGE=sabotage)
        assert set(codes) == {0}, f"{codes}\n{self.forks.log()}"
        resumed = result_of(self.output)
        assert resumed.lines == straight.lines
        assert resumed.adapter == straight.adapter
        assert resumed.optimizer == straight.optimizer
        hidden = [path for folder in (self.output, self.output / "checkpoints") for path in folder.glob(".*")]
        assert not hidden, "left over from the run that died"
        assert json.loads((self.output / "status.json").read_text())["state"] == "done"
