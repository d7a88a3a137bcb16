"""Early stopping on several ranks: all stop after the same step, and a killed run exports the same bytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from lora_accel.config.schema import RunConfig
from tests.conftest import read_metrics, write_jsonl
from tests.distributed.disturbed import Runs
from tests.distributed.forked import Forks

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize(
    "preset",
    ["cpu_zero2", pytest.param("cpu_ddp", marks=pytest.mark.slow), pytest.param("cpu_zero3", marks=pytest.mark.slow)],
)
def test_ranks_stop_at_the_same_step_and_a_killed_run_exports_the_same_bytes(
    forks: Forks, make_config: Callable[..., RunConfig], tmp_path: Path, preset: str
) -> None:
    """The evaluation loss is best after step 4, and worse after steps 6 and 8."""
    sources = {}
    for name, end in (("train", "alpha"), ("eval", "bravo")):
        rows = [{"prompt": f"repeat {x}", "completion": f"{x} {end}"} for x in ("alpha", "bravo", "charlie")]
        sources[name] = [{"path": str(write_jsonl(tmp_path / f"{name}.jsonl", rows))}]
    config = make_config(
        data=sources,
        checkpoint={"every_steps": 100, "keep_last": 1, "export": "best"},
        evaluation={"every_steps": 2, "patience": 2},
        training={"max_steps": 20, "batch_size": 3, "learning_rate": 5e-2, "scheduler": "constant"},
    )
    runs = Runs(forks, config, tmp_path)
    expected = runs.uninterrupted(preset)
    runs.train(preset, LORA_ACCEL_FAULT="evaluate.begin@5=kill")
    assert not (runs.output / "adapter").exists()
    runs.check_resumed(expected, preset)
    assert [line["step"] for line in read_metrics(runs.output, "eval")] == [0, 2, 4, 6, 8]
    assert json.loads((runs.output / "adapter" / "provenance.json").read_text())["exported"]["step"] == 4
    assert sorted(path.name for path in (runs.output / "checkpoints").iterdir()) == ["step-00000004", "step-00000008"]
