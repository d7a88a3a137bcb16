"""(seed, epoch, step) to examples, and a step's examples to micro-batches. Nothing here has a state.

Which examples a step takes depends on the seed and the step alone. How they are dealt to ranks and cut into
micro-batches depends on their lengths, the limits and the number of ranks; so resuming, or another number of ranks,
changes neither the order nor the mathematics.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lora_accel.config.plan import Plan, derive
from lora_accel.config.schema import TrainingSection
from lora_accel.data.audit import name_rows
from lora_accel.data.chat import IGNORED, Example
from lora_accel.data.dataset import Dataset
from lora_accel.data.order import epoch_order


@dataclasses.dataclass(frozen=True)
class Segments:
    """Lengths of examples that lie end to end, in order.

    An object, which torch.compile does not look into: of a tuple it would compile a layer for each number of examples.
    """

    lengths: tuple[int, ...]

    def __iter__(self) -> Iterator[int]:
        return iter(self.lengths)


@dataclasses.dataclass(frozen=True)
class MicroBatch:
    """What one forward takes. B rows, T tokens, C columns."""

    input_ids: torch.Tensor
    """[B, T]: an example a row, padded on the right; or one row, examples end to end."""
    attention_mask: torch.Tensor
    """[B, T]: 1 = real token. Of packed rows [1, 1, 1, 1], NaN: see `pack`."""
    columns: torch.Tensor
    """[C]: the positions from which some row predicts a supervised token. Logits are needed there only."""
    targets: torch.Tensor
    """[B, C]: the token after each of these positions, -100 where it is not supervised."""
    token_keys: torch.Tensor
    """[B, T] int32, odd: what dropout hashes; a function of (seed, step, example, position)."""
    position_ids: torch.Tensor | None = None
    """[1, T], if packed: each example's from 0."""
    segments: Segments | None = None
    """None = padded."""

    @property
    def inputs(self) -> dict[str, Any]:
        """Return what the model's forward takes."""
        inputs: dict[str, Any] = {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
        if self.segments is not None:
            inputs |= {"position_ids": self.position_ids, "segments": self.segments}
        return inputs

    def to(self, device: torch.device) -> MicroBatch:
        """Return the same on a device. To a GPU it is copied from pinned memory, so that the host need not wait."""
        tensors = {name: x for name, x in vars(self).items() if isinstance(x, torch.Tensor)}
        if device.type == "cuda":
            tensors = {name: x.pin_memory() for name, x in tensors.items()}
        moved: dict[str, Any] = {name: x.to(device, non_blocking=True) for name, x in tensors.items()}
        return dataclasses.replace(self, **moved)


@dataclasses.dataclass(frozen=True)
class StepBatch:
    """One rank's share of a step, and the size of the whole step."""

    micro_batches: list[MicroBatch]
    num_examples: int
    """Over all ranks, as are the counts below."""
    num_tokens: int
    num_supervised_tokens: int
    examples: Sequence[Example]

    @property
    def rows(self) -> str:
        """The rows that the step's examples come from, for a person."""
        return name_rows(sorted({example.row for example in self.examples}), most=20)


class Batches:
    """The training examples, step by step."""

    def __init__(
        self,
        dataset: Dataset,
        training: TrainingSection,
        plan: Plan,
        *,
        seed: int,
        rank: int,
        pad_id: int,
        packed: bool = False,
    ) -> None:
        self._dataset = dataset
        self._sizes = [len(source.examples) for source in dataset.sources]
        self._weights = [source.weight for source in dataset.sources]
        self._training = training
        self._plan = plan
        self._seed = seed
        self._rank = rank
        self._pad_id = pad_id
        self._packed = packed
        self._epoch, self._order = -1, np.empty(0, dtype=np.intp)

    def step(self, step: int) -> StepBatch:
        """Return this rank's micro-batches of the 0-based step."""
        epoch, step_in_epoch = self._plan.place(step)
        if epoch != self._epoch:
            self._epoch, self._order = (
                epoch,
                epoch_order(self._sizes, self._weights, self._seed, epoch),
            )
        start = step_in_epoch * self._plan.batch_size
        chosen = self._order[start : start + self._plan.batch_size]
        return step_batch(
            [self._dataset.example(i)._replace(key=derive(self._seed, step, place)) for place, i in enumerate(chosen)],
            self._training,
            rank=self._rank,
            num_ranks=self._plan.num_ranks,
            pad_id=self._pad_id,
            packed=self._packed,
        )


def step_batch(
    examples: Sequence[Example],
    training: TrainingSection,
    *,
    rank: int,
    num_ranks: int,
    pad_id: int,
    packed: bool = False,
) -> StepBatch:
    """Deal examples to ranks, cut each share into micro-batches, and keep this rank's.

    Every rank gets the same number of micro-batches, empty ones at the end if need be: a collective of one rank alone
    would wait for ever.
    """
    # Who counts examples a device wants as many on each; who counts tokens wants as much work on each.
    most = len(examples) if training.micro_batch_size is None else -(-len(examples) // num_ranks)
    divide, lay = (cut_packed, pack) if packed else (cut_padded, pad)
    cuts = [
        divide(share, training.micro_batch_tokens, training.micro_batch_size)
        for share in deal(examples, num_ranks, most)
    ]
    groups = cuts[rank] + [[]] * (max(map(len, cuts)) - len(cuts[rank]))
    return StepBatch(
        [lay(group or nothing(pad_id), pad_id) for group in groups],
        num_examples=len(examples),
        num_tokens=sum(len(example.input_ids) for example in examples),
        num_supervised_tokens=sum(example.num_supervised for example in examples),
        examples=examples,
    )


def deal(examples: Sequence[Example], num_shares: int, most: int) -> list[list[Example]]:
    """Deal examples to ranks, or to micro-batches, at most so many to each, so that each has about as many tokens.

    The longest first, each to the share with the fewest tokens so far (Graham, Bounds on multiprocessing timing
    anomalies, 1969: where `most` does not bind, no share gets more than 4/3 of what is best possible).
    """
    shares: list[list[Example]] = [[] for _ in range(num_shares)]
    tokens = [0] * num_shares
    for example in sorted(examples, key=lambda example: -len(example.input_ids)):
        share = min((share for share in range(num_shares) if len(shares[share]) < most), key=tokens.__getitem__)
        shares[share].append(example)
        tokens[share] += len(example.input_ids)
    return shares


def cut_packed(examples: Sequence[Example], most_tokens: int, most_examples: int | None) -> list[list[Example]]:
    """Group examples, as few groups as may be and of about as many tokens, each within a limit: so many examples, or
    so many tokens.

    Where an example alone is longer than `most_tokens`, groups of others may be as long as it.
    """
    if most_examples is not None:
        return deal(examples, -(-len(examples) // most_examples), most_examples)
    total, longest = sum(len(example.input_ids) for example in examples), _longest(examples)
    for count in range(min(-(-total // most_tokens), len(examples)), len(examples) + 1):
        groups = deal(examples, count, len(examples))
        if max((sum(len(x.input_ids) for x in group) for group in groups), default=0) <= max(most_tokens, longest):
            return groups
    return []


def cut_padded(examples: Sequence[Example], most_tokens: int, most_examples: int | None) -> list[list[Example]]:
    """Group examples of like length, each group within a limit: so many examples, or so many padded tokens.

    A single example longer than `most_tokens` is a group of its own.
    """
    groups: list[list[Example]] = []
    width = 0
    for example in sorted(examples, key=lambda example: -len(example.input_ids)):
        size = len(groups[-1]) + 1 if groups else 0
        fits = size <= most_examples if most_examples is not None else size * width <= most_tokens
        if groups and fits:
            groups[-1].append(example)
        else:
            groups.append([example])
            width = len(example.input_ids)
    return groups


def nothing(pad_id: int) -> list[Example]:
    """Return what stands in where a rank has no example: one token without a target, which adds exactly nothing."""
    return [Example([pad_id], [IGNORED])]


def pack(examples: Sequence[Example], _pad_id: int) -> MicroBatch:
    """Lay examples end to end in one row."""
    lengths = tuple(len(example.input_ids) for example in examples)
    input_ids = np.concatenate([np.asarray(example.input_ids, np.int64) for example in examples])
    # What an example's last token would predict is the next one's first, whose label is -100.
    targets = np.concatenate([np.asarray([*example.labels[1:], IGNORED], np.int64) for example in examples])
    keys = np.concatenate([token_keys(example.key, length) for example, length in zip(examples, lengths, strict=True)])
    # transformers takes a mask of four dimensions for a ready one and builds none. Nobody reads it, for attention goes
    # by `segments`; a layer that did would make all NaN.
    mask = np.full((1, 1, 1, 1), np.nan, np.float32)
    positions = torch.from_numpy(np.concatenate([np.arange(length) for length in lengths])[None])
    packed = _micro_batch(input_ids[None], mask, targets[None], keys[None])
    return dataclasses.replace(packed, position_ids=positions, segments=Segments(lengths))


def pad(examples: Sequence[Example], pad_id: int) -> MicroBatch:
    """Lay examples side by side."""
    shape = (len(examples), _longest(examples))
    input_ids = np.full(shape, pad_id, dtype=np.int64)
    attention_mask = np.zeros(shape, dtype=np.int64)
    targets = np.full(shape, IGNORED, dtype=np.int64)
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
    columns = np.flatnonzero((targets != IGNORED).any(axis=0))
    if not len(columns):
        columns = np.zeros(1, dtype=np.int64)
    return MicroBatch(
        input_ids=torch.from_numpy(input_ids),
        attention_mask=torch.from_numpy(attention_mask),
        columns=torch.from_numpy(columns),
        targets=torch.from_numpy(targets[:, columns]),
        token_keys=torch.from_numpy(keys),
    )


def _longest(examples: Sequence[Example]) -> int:
    return max((len(example.input_ids) for example in examples), default=0)


def token_keys(key: int, length: int) -> npt.NDArray[np.int32]:
    """Return an odd 32-bit key for each position of an example: the top half of SplitMix64."""
    z = np.uint64(key) + np.arange(1, length + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ z >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ z >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    keys: npt.NDArray[np.int32] = (z >> np.uint64(32)).astype(np.uint32).view(np.int32)
    keys |= 1
    return keys
