"""Map each step to its examples, and the examples to micro-batches.

Which examples a step uses depends only on the seed and the step. How they are divided among ranks and micro-batches
depends on their lengths, the limits and the number of ranks. Neither resuming nor another number of ranks
changes the order or the mathematics.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lora_accel.batching.batch import MicroBatch, StepBatch
from lora_accel.batching.grouping import (
    balance_by_tokens,
    group_packed,
    group_padded,
    group_shared,
    keep_prefixes_together,
)
from lora_accel.batching.order import epoch_order, group_order
from lora_accel.batching.packing import empty_example, pack, pad
from lora_accel.batching.prefixes import (
    Node,
    PrefixedExample,
    num_computed,
    prefix_ranks,
    separate_nodes,
    shared_nodes,
)
from lora_accel.config.plan import Plan
from lora_accel.config.schema import TrainingSection
from lora_accel.data.chat import Example
from lora_accel.data.dataset import Dataset
from lora_accel.randomness import Order, derive_seed

DEFAULT_TOKENS = 4096
"""Tokens in a micro-batch where nothing else chooses them: in `lora-accel evaluate`, which saves no activations."""


@dataclasses.dataclass(frozen=True)
class BatchOptions:
    """Options for building one rank's micro-batches."""

    pad_id: int
    packed: bool
    """One packed row per micro-batch; False = one padded row per example."""
    max_tokens: int
    """Tokens in a micro-batch (`training.micro_batch_tokens`)."""
    max_examples: int | None = None
    """Examples in a micro-batch instead (`training.micro_batch_size`)."""
    min_saving: float | None = None
    """Share of a micro-batch's tokens that has to be saved for examples to share those with which they begin
    (batching/prefixes.py); packed only. None = they never do."""
    rank: int = 0
    num_ranks: int = 1
    row_multiple: int = 1
    """Of the tokens of a packed row, which is padded."""

    @classmethod
    def from_config(
        cls,
        training: TrainingSection,
        *,
        pad_id: int,
        packed: bool = False,
        min_saving: float | None = None,
        row_multiple: int = 1,
        rank: int = 0,
        num_ranks: int = 1,
    ) -> BatchOptions:
        """Return the options that a run config sets; `micro_batch_tokens: auto` counts as `DEFAULT_TOKENS`."""
        tokens, examples = training.micro_batch_tokens, training.micro_batch_size
        tokens = DEFAULT_TOKENS if tokens == "auto" else tokens
        return cls(pad_id, packed, tokens, examples, min_saving if packed else None, rank, num_ranks, row_multiple)


class Batches:
    """The training examples, step by step."""

    def __init__(
        self, dataset: Dataset, plan: Plan, options: BatchOptions, *, seed: int, group_by_prefix: bool = False
    ) -> None:
        """Compute the order of the first epoch.

        Args:
            group_by_prefix: whether a step uses examples that begin alike (`data.group_by_prefix`). Reads all of them.
        """
        self._dataset = dataset
        self._plan = plan
        self._options = options
        self._seed = seed
        self._sizes = [len(source.examples) for source in dataset.sources]
        self._weights = [source.weight for source in dataset.sources]
        self._ranks = prefix_ranks(map(dataset.example, range(dataset.num_examples))) if group_by_prefix else None
        self._epoch, self._order = 0, self._order_of(0)
        self._prepared: dict[int, StepBatch] = {}
        """The batch of at most one step."""

    def step(self, step: int) -> StepBatch:
        """Return this rank's micro-batches of the 0-based step."""
        batch = self._prepared.pop(step, None)
        return self._build(step) if batch is None else batch

    def prepare(self, step: int) -> None:
        """Build the batch of a step that may follow, so that `step` returns it at once.

        After the last step there is none. If it cannot be built, `step` tries again and raises the error.
        """
        self._prepared.clear()
        if step < self._plan.total_steps:
            with contextlib.suppress(Exception):
                self._prepared[step] = self._build(step)

    def _build(self, step: int) -> StepBatch:
        return step_batch(self.examples(step), self._options)

    def step_of(self, index: int) -> int:
        """Return the first step that uses an example; of one that the first epoch omits, 0."""
        positions = np.flatnonzero(self._order_of(0) == index)
        return int(positions[0]) // self._plan.batch_size if len(positions) else 0

    def examples(self, step: int) -> list[Example]:
        """Return the examples of the 0-based step, of all ranks."""
        epoch, step_in_epoch = self._plan.position(step)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._order_of(epoch)
        start = step_in_epoch * self._plan.batch_size
        indices = self._order[start : start + self._plan.batch_size]
        return [self._dataset.example(index)._replace(key=derive_seed(self._seed, step)) for index in indices]

    def _order_of(self, epoch: int) -> Order:
        order = epoch_order(self._sizes, self._weights, self._seed, epoch)
        if self._ranks is None:
            return order
        return group_order(order, self._ranks, self._plan.batch_size, self._seed, epoch)


def step_batch(examples: Sequence[Example], options: BatchOptions) -> StepBatch:
    """Divide examples among ranks, and this rank's share into micro-batches.

    Every rank gets the same number of micro-batches; the last ones may be placeholders without a target. Forward and
    backward may run collectives, which all ranks must join.
    """
    groups = _groups_of_ranks(examples, options)
    own = groups[options.rank]
    placeholders = [[empty_example(options.pad_id)]] * (max(map(len, groups)) - len(own))
    own = own + [_Group(part, separate_nodes(part)) for part in placeholders]
    return StepBatch(
        [_micro_batch(group, options) for group in own],
        num_examples=len(examples),
        num_tokens=sum(len(example.input_ids) for example in examples),
        num_supervised_tokens=sum(example.num_supervised for example in examples),
        num_computed_tokens=_num_computed(groups),
        examples=examples,
    )


def _micro_batch(group: _Group, options: BatchOptions) -> MicroBatch:
    if not options.packed:
        return pad(group.examples, options.pad_id)
    return pack(*group, pad_id=options.pad_id, multiple=options.row_multiple)


def num_computed_tokens(examples: Sequence[Example], options: BatchOptions) -> int:
    """Return `StepBatch.num_computed_tokens` without building tensors."""
    return _num_computed(_groups_of_ranks(examples, options))


class _Group(NamedTuple):
    """The examples of a micro-batch, and what a packed row holds of them."""

    examples: Sequence[Example]
    nodes: Sequence[Node]


def _groups_of_ranks(examples: Sequence[Example], options: BatchOptions) -> list[list[_Group]]:
    """Return the micro-batches of each rank."""
    # With a limit in examples, ranks get equally many examples; with a limit in tokens, about equally many tokens.
    most = len(examples) if options.max_examples is None else -(-len(examples) // options.num_ranks)
    prefixed = examples if options.min_saving is None else [PrefixedExample(*example) for example in examples]
    shares = balance_by_tokens(prefixed, options.num_ranks, most)
    if options.min_saving is not None and options.num_ranks > 1:

        def busiest(shares: Sequence[Sequence[Example]]) -> int:
            return max(num_computed(_nodes(share, options)) for share in shares)

        # Whichever gives the busiest rank less to compute.
        shares = min(shares, keep_prefixes_together(prefixed, options.num_ranks, most), key=busiest)
    return [_groups(share, options) for share in shares]


def _groups(examples: Sequence[Example], options: BatchOptions) -> list[_Group]:
    """Return the micro-batches of a rank."""
    limits = options.max_tokens, options.max_examples
    if options.min_saving is not None:
        groups = [_Group(part, _nodes(part, options)) for part in group_shared(examples, *limits)]
        if options.max_examples is not None or options.min_saving == 0:
            return groups
        # Groups that share nothing after all hold more tokens than the limit, so their examples are grouped again.
        shared = [group for group in groups if len(group.nodes) > len(group.examples)]
        separate = [x for group in groups if len(group.nodes) == len(group.examples) for x in group.examples]
        return shared + [_Group(part, separate_nodes(part)) for part in group_packed(separate, *limits)]
    group = group_packed if options.packed else group_padded
    return [_Group(part, separate_nodes(part)) for part in group(examples, *limits)]


def _nodes(examples: Sequence[Example], options: BatchOptions) -> list[Node]:
    """Return what a packed micro-batch holds: shared tokens once, if that saves enough."""
    separate = separate_nodes(examples)
    if options.min_saving is None:
        return separate
    shared = shared_nodes(examples)
    return shared if num_computed(shared) <= (1 - options.min_saving) * num_computed(separate) else separate


def _num_computed(groups: Sequence[Sequence[_Group]]) -> int:
    """Return the tokens of the micro-batches of all ranks, without padding."""
    return sum(num_computed(group.nodes) for share in groups for group in share)
