"""Killed at random times, again and again, a run still finishes, and with the bytes of one that was never killed."""

from __future__ import annotations

import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lora_accel.config.files import config_to_yaml
from lora_accel.config.schema import RunConfig
from tests.distributed.disturbed import result_of
from tests.distributed.forked import Forks

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(2400)]


@pytest.mark.parametrize("times", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_killed_at_random_times_a_run_finishes_with_the_same_bytes(
    forks: Forks, make_config: Callable[..., RunConfig], tmp_path: Path, times: int
) -> None:
    """So many SIGKILLs, each followed by the same command; no restart needs a hand."""
    # Steps enough that a run which is killed so often is not done before the last kill.
    config = make_config(
        training={"max_steps": 15 * times}, checkpoint={"every_steps": 3}, logging={"every_steps": 1, "trackers": []}
    )
    file = tmp_path / "config.yaml"
    file.write_text(config_to_yaml(config), encoding="utf-8")
    words, output = ["--config", str(file)], Path(config.output_dir)
    assert forks.finish(forks.start("cpu", words), timeout=900) == [0], forks.log()
    straight = result_of(output)
    shutil.rmtree(output)

    moment = random.Random(0)
    kills = 0
    newest: list[Path | None] = []
    while kills < times:
        (process,) = forks.start("cpu", words)
        time.sleep(moment.uniform(0.2, 1.6))  # a start takes about half a second, a step with its save 20 ms
        process.kill()
        process.join()
        if process.exitcode == 0:
            break  # done too early: seen below
        assert process.exitcode == -signal.SIGKILL, forks.log()
        kills += 1
        newest.append(max((output / "checkpoints").glob("step-*"), default=None))
    assert kills == times, "the run was done before all kills"
    assert forks.finish(forks.start("cpu", words), timeout=900) == [0], forks.log()
    again = result_of(output)
    assert (again.adapter, again.optimizer) == (straight.adapter, straight.optimizer)
    assert again.lines == straight.lines
    progress = len(set(newest))
    print(f"{kills} kills at {progress} places")
    assert progress > times / 4, "most kills hit before the first step: nothing was tried"
