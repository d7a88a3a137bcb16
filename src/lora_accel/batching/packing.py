"""Build the tensors of a micro-batch: examples packed into one row, or padded to one row each."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lora_accel.batching.batch import MicroBatch, Segments
from lora_accel.batching.grouping import longest
from lora_accel.batching.prefixes import Node, separate_nodes
from lora_accel.data.chat import Example
from lora_accel.labels import IGNORE_INDEX
from lora_accel.randomness import token_keys


def empty_example(pad_id: int) -> Example:
    """Return the example of a rank that has none: one token without a target. It adds exactly zero to the loss."""
    return Example([pad_id], [IGNORE_INDEX])


def pack(
    examples: Sequence[Example], nodes: Sequence[Node] | None = None, *, pad_id: int = 0, multiple: int = 1
) -> MicroBatch:
    """Concatenate examples into one row.

    Args:
        nodes: of batching/prefixes.py, what the row holds of them; None = each as it is.
        pad_id: token of the padding.
        multiple: of the row's tokens, and of its logit positions. The rest is padding: one more segment, and positions
            without a supervised token.
    """
    nodes = list(separate_nodes(examples) if nodes is None else nodes)
    num_padding = -sum(node.last - node.first for node in nodes) % multiple
    if num_padding:
        nodes.append(Node(len(examples), 0, num_padding, None))
        examples = [*examples, Example([pad_id] * num_padding, [IGNORE_INDEX] * num_padding)]
    lengths = [node.last - node.first for node in nodes]
    starts = [0, *itertools.accumulate(lengths)]
    slices = [(examples[node.example], slice(node.first, node.last)) for node in nodes]
    keys = {number: token_keys(example.key, example.input_ids) for number, example in enumerate(examples)}
    is_shared = any(node.parent is not None for node in nodes)
    columns, targets = _columns(examples, nodes, starts, multiple)
    parents = tuple(node.parent for node in nodes) if is_shared else ()
    segments = Segments(tuple(lengths), parents, num_padding)
    # transformers passes a 4-D mask through unchanged. Packed attention ignores it and uses `segments`; if any layer
    # did read it, the loss would be NaN.
    mask = np.full((1, 1, 1, 1), np.nan, np.float32)
    return MicroBatch(
        input_ids=torch.from_numpy(np.concatenate([example.input_ids[part] for example, part in slices])[None]),
        attention_mask=torch.from_numpy(mask),
        logit_positions=torch.from_numpy(columns),
        targets=torch.from_numpy(targets[None]),
        token_keys=torch.from_numpy(np.concatenate([keys[n.example][n.first : n.last] for n in nodes])[None]),
        position_ids=torch.from_numpy(np.concatenate([np.arange(node.first, node.last) for node in nodes])[None]),
        segments=segments,
        cu_seqlens=torch.tensor(starts, dtype=torch.int32),
        seen_until=torch.from_numpy(segments.find_ends()) if is_shared else None,
    )


def _columns(
    examples: Sequence[Example], nodes: Sequence[Node], starts: Sequence[int], multiple: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the positions in the row that predict supervised tokens, and these tokens.

    A position predicts once for each example that continues there.
    """
    pairs: list[tuple[int, int]] = []
    parents = {node.parent for node in nodes}
    for index, node in enumerate(nodes):
        if index in parents:
            continue
        labels = examples[node.example].labels
        # A leaf's first token is predicted from the last token of its parent.
        before = None if node.parent is None else starts[node.parent + 1] - 1
        for position in range(max(node.first, 1), node.last):
            if labels[position] != IGNORE_INDEX:
                column = before if position == node.first else starts[index] + position - node.first - 1
                pairs.append((column, labels[position]))  # type: ignore[arg-type]
    pairs.sort(key=lambda pair: pair[0])
    num_padding = -len(pairs) % multiple if pairs else multiple
    columns, targets = np.array(pairs + [(0, IGNORE_INDEX)] * num_padding, dtype=np.int64).T
    return np.ascontiguousarray(columns), np.ascontiguousarray(targets)


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
        keys[i, :length] = token_keys(example.key, example.input_ids)
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
