"""A checkpoint that an earlier version of this package wrote still resumes, with the losses of that version."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_accel import RunConfig, run_training
from lora_accel.errors import ArtifactError
from tests.conftest import read_metrics

STORED = Path(__file__).parent / "checkpoint_0_1.json"
"""Step 2 of 4 of the run below, as version 0.1.0 wrote it before `training.optimizer` existed; and its losses."""
TRAINING: dict[str, Any] = {"max_steps": 4, "warmup_steps": 1, "learning_rate": 5e-3}


def restore(config: RunConfig) -> dict[str, float]:
    """Write the stored checkpoint into a new run folder, and return the losses by step."""
    stored = json.loads(STORED.read_text(encoding="utf-8"))
    checkpoint = Path(config.output_dir) / "checkpoints" / "step-00000002"
    checkpoint.mkdir(parents=True)
    (checkpoint.parent.parent / "plan.json").write_text("{}")
    for name, content in stored["files"].items():
        (checkpoint / name).write_bytes(base64.b64decode(content))
    losses: dict[str, float] = stored["losses"]
    return losses


def config_of(make_config: Callable[..., RunConfig], **training: Any) -> RunConfig:
    return make_config(
        model={"dtype": "float32"},
        training=TRAINING | training,
        # Other versions of transformers write other config and tokenizer files.
        checkpoint={"allow_changes": ["model"]},
    )


def test_an_old_checkpoint_resumes(make_config: Callable[..., RunConfig]) -> None:
    """With the schedule of its version, which had no `training.warmup_from_zero`."""
    config = config_of(make_config)
    expected = restore(config)
    run_training(config)
    folder = Path(config.output_dir)
    steps = read_metrics(folder)
    assert {line["step"]: line["loss"] for line in steps} == pytest.approx(
        {step: expected[str(step)] for step in (3, 4)}, rel=1e-6
    )
    assert [line["learning_rate"] for line in steps] == pytest.approx([5e-3 * 0.75, 5e-3 * 0.25])
    (event,) = [line for line in read_metrics(folder, "event") if line["event"] == "resume"]
    assert event["step"] == 2
    recorded = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))
    assert recorded["config"]["training"]["warmup_from_zero"] is True, "the next resume keeps it too"


def test_an_old_checkpoint_does_not_resume_with_another_schedule(make_config: Callable[..., RunConfig]) -> None:
    config = config_of(make_config, warmup_from_zero=False)
    restore(config)
    with pytest.raises(ArtifactError, match=r"training\.warmup_from_zero: True -> False") as caught:
        run_training(config)
    assert "'checkpoint.allow_changes=[training.warmup_from_zero]'" in str(caught.value)
