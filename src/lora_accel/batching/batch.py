"""The batch types that training, evaluation and the loss share."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lora_accel.data.audit import name_rows
from lora_accel.data.chat import Example


@dataclasses.dataclass(frozen=True)
class Segments:
    """Lengths in tokens of the segments of a packed row, in order: an example each, unless examples share tokens.

    A class, since torch.compile does not trace into it: for a tuple it would recompile for each number of examples.
    """

    lengths: tuple[int, ...]
    parents: tuple[int | None, ...] = ()
    """Of each segment: which earlier one holds the tokens before its own, None if it begins an example. Empty = all."""
    num_padding: int = 0
    """Tokens of the last segment, if it is padding; see `pack`."""
    cu_seqlens: torch.Tensor | None = dataclasses.field(default=None, compare=False)
    """[N + 1] int32: where each example begins, and the end of the last one, on the device of the forward."""
    seen_until: torch.Tensor | None = dataclasses.field(default=None, compare=False)
    """[T] int32, if segments share tokens: the position after the last token that attends to each token. Those from
    there on do not; a segment and all that continue it are consecutive."""
    cache: dict[Any, Any] = dataclasses.field(default_factory=dict, compare=False, repr=False)
    """Blocks and masks of attention, which the layers of a forward share."""

    def __iter__(self) -> Iterator[int]:
        return iter(self.lengths)

    @property
    def num_tokens(self) -> int:
        """The tokens of all examples, without padding: those that several share count for each."""
        ends: list[int] = []
        for index, length in enumerate(self.lengths):
            parent = self.parents[index] if self.parents else None
            ends.append(length + (0 if parent is None else ends[parent]))
        parents = set(self.parents)
        return sum(end for index, end in enumerate(ends) if index not in parents) - self.num_padding

    @property
    def is_shared(self) -> bool:
        """Whether a segment continues another one."""
        return any(parent is not None for parent in self.parents)

    def find_ends(self) -> npt.NDArray[np.int32]:
        """Return `seen_until`."""
        ends = np.cumsum(self.lengths, dtype=np.int32)
        for index, parent in reversed([*enumerate(self.parents)]):
            if parent is not None:
                ends[parent] = max(ends[parent], ends[index])
        return np.repeat(ends, self.lengths)


@dataclasses.dataclass(frozen=True)
class MicroBatch:
    """The tensors of one forward. B rows, T tokens, P logit positions."""

    input_ids: torch.Tensor
    """[B, T]: padded, one example per row, padding on the right; packed, one row of all examples."""
    attention_mask: torch.Tensor
    """Padded: [B, T], 1 = real token. Packed: [1, 1, 1, 1], NaN; see `pack`."""
    logit_positions: torch.Tensor
    """[P]: positions at which a row predicts a supervised token. Logits are needed only there."""
    targets: torch.Tensor
    """[B, P]: the token that follows each logit position; `IGNORE_INDEX` where it is not supervised."""
    token_keys: torch.Tensor
    """[B, T] int32, odd: keys of dropout, a function of (seed, step, the tokens up to it)."""
    position_ids: torch.Tensor | None = None
    """[1, T], packed only: positions within each example."""
    segments: Segments | None = None
    """Packed only."""
    cu_seqlens: torch.Tensor | None = None
    """[N + 1] int32, packed only: see `Segments`. A field, so that it moves to the device with the other tensors."""
    seen_until: torch.Tensor | None = None
    """[T] int32: see `Segments`."""

    @property
    def inputs(self) -> dict[str, Any]:
        """Return the keyword arguments of the model's forward."""
        inputs: dict[str, Any] = {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
        if self.segments is not None:
            segments = dataclasses.replace(
                self.segments, cu_seqlens=self.cu_seqlens, seen_until=self.seen_until, cache={}
            )
            inputs |= {"position_ids": self.position_ids, "segments": segments}
        return inputs

    @property
    def example_lengths(self) -> torch.Tensor:
        """Return the length of each token's example, [B, T] float32; of padding, that of its row's example."""
        if self.segments is not None:
            lengths = torch.tensor(self.segments.lengths)
            return lengths.repeat_interleave(lengths)[None].to(self.input_ids.device, torch.float32)
        return self.attention_mask.sum(dim=1, keepdim=True).expand_as(self.input_ids).float()

    def to(self, device: torch.device) -> MicroBatch:
        """Return a copy on a device. Copies to a GPU go through pinned memory, so the host does not wait for them.

        To other devices it waits: MPS would read memory that may be freed by then
        (https://github.com/pytorch/pytorch/issues/189690).
        """
        tensors = {name: x for name, x in vars(self).items() if isinstance(x, torch.Tensor)}
        is_gpu = device.type == "cuda"
        if is_gpu:
            tensors = {name: x.pin_memory() for name, x in tensors.items()}
        moved: dict[str, Any] = {name: x.to(device, non_blocking=is_gpu) for name, x in tensors.items()}
        return dataclasses.replace(self, **moved)


@dataclasses.dataclass(frozen=True)
class StepBatch:
    """One rank's micro-batches of a step or of an evaluation source, and the counts over all ranks."""

    micro_batches: Sequence[MicroBatch]
    """Those of this rank; every rank has the same number of them."""
    num_examples: int
    """Over all ranks, like the counts below."""
    num_tokens: int
    """Without padding."""
    num_supervised_tokens: int
    num_computed_tokens: int
    """Without padding: fewer than `num_tokens` if examples share the tokens with which they begin."""
    examples: Sequence[Example]
    """The examples of all ranks."""

    @property
    def rows(self) -> str:
        """The input rows of the step's examples, formatted for a message."""
        return name_rows(sorted({example.row for example in self.examples}), most=20)
