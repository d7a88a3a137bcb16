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
from tests.distributed.test_signals import wait_for

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(24000)]


@pytest.mark.parametrize("times", [10, pytest.param(200, marks=pytest.mark.slow)])
def test_killed_at_random_times_a_run_finishes_with_the_same_bytes(
    forks: Forks, make_config: Callable[..., RunConfig], tmp_path: Path, times: int
) -> None:
    """So many SIGKILLs, each followed by the same command; no restart needs a hand."""
    # A life is given 6 steps on average and makes some more: three times as many are there for all of them.
    config = make_config(
        training={"max_steps": 25 * times}, checkpoint={"every_steps": 3}, logging={"every_steps": 1, "trackers": []}
    )
    file = tmp_path / "config.yaml"
    file.write_text(config_to_yaml(config), encoding="utf-8")
    words, output = ["--config", str(file)], Path(config.output_dir)
    assert forks.finish(forks.start("cpu", words)) == [0], forks.log()
    straight = result_of(output)
    shutil.rmtree(output)

    chance, saved = random.Random(0), [0]
    for kill in range(times):
        (process,) = forks.start("cpu", words)
        if saves := chance.randint(0, 4):
            enough = saved[-1] + 3 * saves
            wait_for(lambda enough=enough: newest_step(output) >= enough, f"no checkpoint of step {enough}")
            time.sleep(chance.uniform(0, 0.03))  # a step with its save takes 20 ms
        else:
            time.sleep(chance.uniform(0, 0.8))  # a start takes about half a second
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, f"kill {kill}: it ended by itself\n{forks.log()}"
        saved.append(newest_step(output))
    assert forks.finish(forks.start("cpu", words)) == [0], forks.log()
    again = result_of(output)
    assert (again.adapter, again.optimizer) == (straight.adapter, straight.optimizer)
    assert again.lines == straight.lines
    print(f"{times} kills, after checkpoints of {len(set(saved))} steps")


def newest_step(run: Path) -> int:
    return max((int(path.name[5:]) for path in (run / "checkpoints").glob("step-*")), default=0)
