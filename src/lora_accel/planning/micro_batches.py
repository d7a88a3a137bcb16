"""The micro-batches that decide what a run needs: the largest, which decides memory, and a typical one."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from lora_accel.batching.batch import MicroBatch
from lora_accel.batching.batches import Batches, BatchOptions
from lora_accel.batching.order import epoch_order
from lora_accel.config.schema import RunConfig
from lora_accel.setup.data import PreparedData

MAX_STEPS = 200
"""Steps that are looked at. They are spread over the run; the step with the longest example is one of them."""


class MicroBatches(NamedTuple):
    """Two micro-batches of a run."""

    largest: MicroBatch
    typical: MicroBatch
    """The median by number of tokens, padding included."""


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
    batches = Batches(data.dataset, data.plan, options, seed=config.seed)
    num_steps = min(data.plan.total_steps, data.plan.steps_per_epoch)
    spread = {number * num_steps // MAX_STEPS for number in range(MAX_STEPS)}
    steps = sorted(spread | {min(_step_of_longest(config, data), num_steps - 1)})
    found = [batch for step in steps for batch in batches.step(step).micro_batches]
    found.sort(key=lambda batch: (batch.input_ids.numel(), batch.targets.numel()))
    return MicroBatches(found[-1], found[len(found) // 2])


def _step_of_longest(config: RunConfig, data: PreparedData) -> int:
    """Return the first step that uses the longest example; of an example that the first epoch omits, 0."""
    sources = data.dataset.sources
    order = epoch_order([len(x.examples) for x in sources], [x.weight for x in sources], config.seed, 0)
    longest = int(np.concatenate([source.examples.lengths for source in sources]).argmax())
    positions = np.flatnonzero(np.asarray(order) == longest)
    return int(positions[0]) // data.plan.batch_size if len(positions) else 0
