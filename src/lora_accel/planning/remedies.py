"""What makes a run fit into memory: options of the config, each with the memory that it would take."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

from lora_accel.config.schema import RunConfig
from lora_accel.planning.estimate import Estimate, make_estimate
from lora_accel.setup.data import PreparedData


class Remedy(NamedTuple):
    """Options that change the memory of a run on one device, not its result apart from rounding, except 4 bits."""

    overrides: list[str]
    total: int
    """Bytes on one device."""
    fits: bool


def find_remedies(config: RunConfig, data: PreparedData, mixed_precision: str, estimate: Estimate) -> list[Remedy]:
    """Return the options that would fit, from the mildest to the strongest; if none does, the one with least memory."""
    remedies = []
    for overrides, changed in _changes(config, longest=max(x.longest for x in data.dataset.ledgers)):
        changed_estimate = make_estimate(changed, data, mixed_precision, 1, with_4_bits=False)
        option = changed_estimate.options[0]
        if option.memory is not None:
            fits = dataclasses.replace(changed_estimate, available=estimate.available).fits(option)
            remedies.append(Remedy(overrides, option.memory.total, bool(fits)))
    fitting = [remedy for remedy in remedies if remedy.fits]
    return fitting or sorted(remedies, key=lambda remedy: remedy.total)[:1]


def _changes(config: RunConfig, *, longest: int) -> Iterator[tuple[list[str], RunConfig]]:
    """Yield overrides and the config with them: smaller micro-batches, recomputed activations, 4 bits, and all."""
    training = config.training
    smaller = max(longest, training.micro_batch_tokens // 4)
    changes: list[str] = []
    if training.micro_batch_size is None and smaller < training.micro_batch_tokens:
        changes.append(f"training.micro_batch_tokens={smaller}")
        training = training.model_copy(update={"micro_batch_tokens": smaller})
        yield [*changes], config.model_copy(update={"training": training})
    if training.activation_checkpointing is not True:
        changes.append("training.activation_checkpointing=true")
        training = training.model_copy(update={"activation_checkpointing": True})
        yield [*changes], config.model_copy(update={"training": training})
    if config.quantization.bits is None and not config.adapter.modules_to_save:
        quantization = config.quantization.model_copy(update={"bits": 4})
        yield (
            [*changes, "quantization.bits=4"],
            config.model_copy(update={"training": training, "quantization": quantization}),
        )
