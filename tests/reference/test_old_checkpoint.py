"""A checkpoint that an earlier version of this package wrote still resumes, with the losses of that version."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from lora_accel import RunConfig, run_training
from lora_accel.batching import batches, packing
from lora_accel.errors import ArtifactError
from lora_accel.randomness import derive_seed
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


@pytest.fixture
def old_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Key dropout by (seed, step, position in the step, position in the example), as version 0.1.0 did."""
    num_examples: dict[int, int] = {}

    def example_key(seed: int, step: int) -> int:
        num_examples[step] = num_examples.get(step, -1) + 1
        return derive_seed(seed, step, num_examples[step])

    def token_keys(key: int, input_ids: Sequence[int]) -> npt.NDArray[np.int32]:
        z = np.uint64(key) + np.arange(1, len(input_ids) + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ z >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ z >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
        return (z >> np.uint64(32)).astype(np.uint32).view(np.int32) | np.int32(1)

    monkeypatch.setattr(batches, "derive_seed", example_key)
    monkeypatch.setattr(packing, "token_keys", token_keys)


@pytest.mark.usefixtures("old_dropout")
def test_an_old_checkpoint_resumes(make_config: Callable[..., RunConfig]) -> None:
    """With the schedule of its version, which had no `training.warmup_from_zero`."""
    config = config_of(make_config, share_prefixes=False)
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
