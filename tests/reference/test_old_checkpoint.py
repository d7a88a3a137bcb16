"""A checkpoint that an earlier version of this package wrote still resumes, with the losses of that version."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from lora_accel import RunConfig, run_training
from tests.conftest import read_metrics

STORED = Path(__file__).parent / "checkpoint_0_1.json"
"""Step 2 of 4 of the run below, as version 0.1.0 wrote it before `training.optimizer` existed; and its losses."""


def test_an_old_checkpoint_resumes(make_config: Callable[..., RunConfig]) -> None:
    stored = json.loads(STORED.read_text(encoding="utf-8"))
    training = {"max_steps": 4, "warmup_steps": 1, "learning_rate": 5e-3}
    config = make_config(
        model={"dtype": "float32"},
        training=training,
        # Other versions of transformers write other config and tokenizer files.
        checkpoint={"allow_changes": ["model"]},
    )
    folder = Path(config.output_dir)
    checkpoint = folder / "checkpoints" / "step-00000002"
    checkpoint.mkdir(parents=True)
    (folder / "plan.json").write_text("{}")
    for name, content in stored["files"].items():
        (checkpoint / name).write_bytes(base64.b64decode(content))
    run_training(config)
    losses = {line["step"]: line["loss"] for line in read_metrics(folder)}
    assert losses == pytest.approx({step: stored["losses"][str(step)] for step in (3, 4)}, rel=1e-6)
    (event,) = [line for line in read_metrics(folder, "event") if line["event"] == "resume"]
    assert event["step"] == 2
