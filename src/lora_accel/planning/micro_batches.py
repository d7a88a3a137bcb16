"""The micro-batches that decide what a run needs: the largest, which decides memory, and a typical one."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from lora_accel.batching.batch import MicroBatch
from lora_accel.batching.batches import Batches, BatchOptions
from lora_accel.config.schema import RunConfig
from lora_accel.setup.data import PreparedData

MAX_STEPS = 200
"""Steps that are looked at. They are spread over the run; the step with the longest example is one of them."""


class MicroBatches(NamedTuple):
    """Two micro-batches of a run, and the share of its tokens that are computed."""

    largest: MicroBatch
    typical: MicroBatch
    """The median by number of tokens, padding included."""
    computed_share: float
    """Without padding; below 1 if examples share the tokens with which they begin."""


def choose_micro_batches(
    config: RunConfig, data: PreparedData, *, packed: bool, min_saving: float | None
) -> MicroBatches:
    """Return the largest of a run's micro-batches on one rank, and a typical one.

    Args:
        packed, min_saving: see `BatchOptions`.
    """
    options = BatchOptions.from_config(
        config.training, pad_id=data.pad_id, packed=packed, min_saving=min_saving, num_ranks=data.plan.num_ranks
    )
    batches = Batches(data.dataset, data.plan, options, seed=config.seed, group_by_prefix=config.data.group_by_prefix)
    num_steps = min(data.plan.total_steps, data.plan.steps_per_epoch)
    spread = {number * num_steps // MAX_STEPS for number in range(MAX_STEPS)}
    steps = sorted(spread | {min(batches.step_of(_longest(data)), num_steps - 1)})
    built = [batches.step(step) for step in steps]
    found = [micro_batch for batch in built for micro_batch in batch.micro_batches]
    found.sort(key=lambda batch: (batch.input_ids.numel(), batch.targets.numel()))
    share = sum(batch.num_computed_tokens for batch in built) / sum(batch.num_tokens for batch in built)
    return MicroBatches(found[-1], found[len(found) // 2], share)


def _longest(data: PreparedData) -> int:
    """Return the index of the longest example."""
    return int(np.concatenate([source.examples.lengths for source in data.dataset.sources]).argmax())
