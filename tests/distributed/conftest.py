"""Fixtures of the tests with several processes."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import pytest

from lora_accel.config.schema import RunConfig
from tests.distributed.disturbed import Runs
from tests.distributed.forked import Forks


@pytest.fixture(scope="session")
def shared_runs() -> dict[str, Runs]:
    """Return the cache of `runs`: all tests share one command."""
    return {}


@pytest.fixture
def runs(
    forks: Forks,
    shared_runs: dict[str, Runs],
    make_config: Callable[..., RunConfig],
    tmp_path_factory: pytest.TempPathFactory,
) -> Runs:
    """Return a run of 6 steps that saves after each step and evaluates after every second one."""
    if not shared_runs:
        folder = tmp_path_factory.mktemp("kills")
        config = make_config(
            output_dir=str(folder / "run"),
            checkpoint={"every_steps": 1},
            data={"eval_fraction": 0.1},
            evaluation={"every_steps": 2},
            training={"max_steps": 6, "epochs": 2},
        )
        rows = folder / "rows.jsonl"
        shutil.copy(config.data.train[0].path, rows)  # the file of the fixture is deleted after the test
        values = config.model_dump()
        values["data"]["train"][0]["path"] = str(rows)
        config = RunConfig.model_validate(values)
        shared_runs["only"] = Runs(forks, config, folder)
    return shared_runs["only"]
