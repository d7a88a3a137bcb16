"""A run that is killed repeatedly at random times finishes with the result of an uninterrupted one."""

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


@pytest.mark.parametrize("times", [3, pytest.param(200, marks=pytest.mark.slow)])
def test_repeatedly_killed_run_finishes_bit_for_bit(
    forks: Forks, make_config: Callable[..., RunConfig], tmp_path: Path, times: int
) -> None:
    """Each SIGKILL is followed by the same command, without manual cleanup."""
    # A process makes about 6 steps before it is killed, so 25 steps per kill are enough.
    config = make_config(
        training={"max_steps": 25 * times}, checkpoint={"every_steps": 3}, logging={"every_steps": 1, "trackers": []}
    )
    file = tmp_path / "config.yaml"
    file.write_text(config_to_yaml(config), encoding="utf-8")
    args, output = ["--config", str(file)], Path(config.output_dir)
    assert forks.finish(forks.start("cpu", args)) == [0], forks.log()
    expected = result_of(output)
    shutil.rmtree(output)

    generator, saved = random.Random(0), [0]
    for kill in range(times):
        (process,) = forks.start("cpu", args)
        if saves := generator.randint(0, 4):
            target = saved[-1] + 3 * saves
            wait_for(lambda target=target: newest_step(output) >= target, f"no checkpoint of step {target}")
            time.sleep(generator.uniform(0, 0.03))  # a step with its save takes 20 ms
        else:
            time.sleep(generator.uniform(0, 0.8))  # a start takes about half a second
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, f"kill {kill}: the process had exited\n{forks.log()}"
        saved.append(newest_step(output))
    assert forks.finish(forks.start("cpu", args)) == [0], forks.log()
    actual = result_of(output)
    assert (actual.adapter, actual.optimizer) == (expected.adapter, expected.optimizer)
    assert actual.lines == expected.lines
    print(f"{times} kills, after checkpoints of {len(set(saved))} steps")


def newest_step(run: Path) -> int:
    return max((int(path.name[5:]) for path in (run / "checkpoints").glob("step-*")), default=0)
