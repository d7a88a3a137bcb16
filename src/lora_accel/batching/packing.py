"""Build the tensors of a micro-batch: examples packed into one row, or padded to one row each."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lora_accel.batching.batch import MicroBatch, Segments
from lora_accel.batching.grouping import longest
from lora_accel.data.chat import Example
from lora_accel.labels import IGNORE_INDEX
from lora_accel.randomness import token_keys


def empty_example(pad_id: int) -> Example:
    """Return the example of a rank that has none: one token without a target. It adds exactly zero to the loss."""
    return Example([pad_id], [IGNORE_INDEX])


def pack(examples: Sequence[Example]) -> MicroBatch:
    """Concatenate examples into one row."""
    lengths = tuple(len(example.input_ids) for example in examples)
    input_ids = np.concatenate([np.asarray(example.input_ids, np.int64) for example in examples])
    # The last token of an example would predict the first of the next one: it has no target.
    targets = np.concatenate([np.asarray([*example.labels[1:], IGNORE_INDEX], np.int64) for example in examples])
    keys = np.concatenate([token_keys(example.key, length) for example, length in zip(examples, lengths, strict=True)])
    # transformers passes a 4-D mask through unchanged. Packed attention ignores it and uses `segments`; if any layer
    # did read it, the loss would be NaN.
    mask = np.full((1, 1, 1, 1), np.nan, np.float32)
    positions = torch.from_numpy(np.concatenate([np.arange(length) for length in lengths])[None])
    packed = _micro_batch(input_ids[None], mask, targets[None], keys[None])
    cu_seqlens = torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32))
    return dataclasses.replace(packed, position_ids=positions, segments=Segments(lengths), cu_seqlens=cu_seqlens)


def pad(examples: Sequence[Example], pad_id: int) -> MicroBatch:
    """Put each example into a row of its own, padded on the right."""
    shape = (len(examples), longest(examples))
    input_ids = np.full(shape, pad_id, dtype=np.int64)
    attention_mask = np.zeros(shape, dtype=np.int64)
    targets = np.full(shape, IGNORE_INDEX, dtype=np.int64)
    keys = np.ones(shape, dtype=np.int32)
    for i, example in enumerate(examples):
        length = len(example.input_ids)
        input_ids[i, :length] = example.input_ids
        attention_mask[i, :length] = 1
        targets[i, : length - 1] = example.labels[1:]
        keys[i, :length] = token_keys(example.key, length)
    return _micro_batch(input_ids, attention_mask, targets, keys)


def _micro_batch(
    input_ids: npt.NDArray[np.int64],
    attention_mask: npt.NDArray[Any],
    targets: npt.NDArray[np.int64],
    keys: npt.NDArray[np.int32],
) -> MicroBatch:
    positions = np.flatnonzero((targets != IGNORE_INDEX).any(axis=0))
    if not len(positions):
        positions = np.zeros(1, dtype=np.int64)
    return MicroBatch(
        input_ids=torch.from_numpy(input_ids),
        attention_mask=torch.from_numpy(attention_mask),
        logit_positions=torch.from_numpy(positions),
        targets=torch.from_numpy(targets[:, positions]),
        token_keys=torch.from_numpy(keys),
    )
