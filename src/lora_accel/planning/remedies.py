"""What makes a run fit into memory: options of the config, each with the memory that it would take."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

from lora_accel.config.schema import RunConfig
from lora_accel.planning.estimate import Estimate, is_supported, make_estimate, with_4_bits
from lora_accel.setup.data import PreparedData
from lora_accel.setup.memory import with_tokens


class Remedy(NamedTuple):
    """Options that change the memory of a run on one device, not its result apart from rounding, except 4 bits."""

    overrides: list[str]
    total: int
    """Bytes on one device."""
    spare: int
    """Bytes that remain of the memory that is free; below 0 if it does not fit."""

    @property
    def fits(self) -> bool:
        """Whether the run fits with these options."""
        return self.spare >= 0


def find_remedies(config: RunConfig, data: PreparedData, mixed_precision: str, estimate: Estimate) -> list[Remedy]:
    """Return the options that would fit, from the mildest to the strongest; if none does, the one with least memory."""
    remedies = []
    for overrides, changed in _changes(config, longest=_longest(data)):
        if not is_supported(changed):
            continue
        changed_estimate = make_estimate(changed, data, mixed_precision, 1, has_4_bits=False)
        option = changed_estimate.options[0]
        if option.memory is not None and changed_estimate.untraced is None:
            needed = dataclasses.replace(changed_estimate, available=estimate.available).needed_bytes(option)
            remedies.append(Remedy(overrides, option.memory.total, estimate.available.bytes - needed))
    fitting = [remedy for remedy in remedies if remedy.fits]
    return fitting or sorted(remedies, key=lambda remedy: remedy.total)[:1]


def cheaper_options(config: RunConfig, data: PreparedData, mixed_precision: str) -> list[tuple[list[str], int]]:
    """Return overrides that would take less memory, from the mildest to the strongest, each with the bytes less."""
    estimate = make_estimate(config, data, mixed_precision, 1, has_4_bits=False)
    own = _total(estimate)
    if own is None:
        return []
    totals = [
        (overrides, _total(make_estimate(changed, data, mixed_precision, 1, has_4_bits=False)))
        for overrides, changed in _changes(with_tokens(config, estimate.micro_batch_tokens), longest=_longest(data))
        if is_supported(changed)
    ]
    return [(overrides, own - total) for overrides, total in totals if total is not None and total < own]


def _total(estimate: Estimate) -> int | None:
    """Return the bytes on one device; None = unknown."""
    memory = estimate.options[0].memory
    return None if memory is None or estimate.untraced else memory.total


def _longest(data: PreparedData) -> int:
    return max(ledger.longest for ledger in data.dataset.ledgers)


def _changes(config: RunConfig, *, longest: int) -> Iterator[tuple[list[str], RunConfig]]:
    """Yield overrides and the config with them: smaller micro-batches, recomputed activations, 4 bits, and all."""
    training = config.training
    limit = training.micro_batch_tokens
    assert limit != "auto"
    smaller = max(longest, limit // 4)
    changes: list[str] = []
    if training.micro_batch_size is None and smaller < limit:
        changes.append(f"training.micro_batch_tokens={smaller}")
        training = training.model_copy(update={"micro_batch_tokens": smaller})
        yield [*changes], config.model_copy(update={"training": training})
    if training.activation_checkpointing is not True:
        changes.append("training.activation_checkpointing=true")
        training = training.model_copy(update={"activation_checkpointing": True})
        yield [*changes], config.model_copy(update={"training": training})
    if (four_bits := with_4_bits(config)) is not None:
        yield [*changes, "quantization.bits=4"], four_bits.model_copy(update={"training": training})
