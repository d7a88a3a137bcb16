"""Replies during training: in batches, divided among ranks, and a prompt that fails does not stop the others."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from lora_accel.config.schema import GenerationSection
from lora_accel.errors import TrainingError
from lora_accel.model.generation import generate_replies


class FailedReply(NamedTuple):
    """A reply that could not be generated."""

    error: str
    """Type and message of the exception."""


Reply: TypeAlias = str | FailedReply


@dataclasses.dataclass(frozen=True)
class ReplyGenerator:
    """Generates replies in the precision of training. Every rank calls `generate`, and gets all replies."""

    accelerator: Accelerator
    model: torch.nn.Module
    tokenizer: Any
    ends: Collection[int]
    """Ids of the tokens that end a reply."""
    max_new_tokens: int
    sampling: GenerationSection
    max_tokens: int
    """Tokens in a batch, with padding, the longest reply and all beams: several micro-batches' worth."""
    is_sharded: bool
    """Whether a forward gathers weights from all ranks (ZeRO-3). Then every rank generates all replies."""

    def generate(self, prompts: Sequence[list[int]]) -> list[Reply]:
        """Return the reply to each prompt, or the error that generation raised.

        The batches do not depend on the number of ranks, so neither do the replies.

        Args:
            prompts: token ids.
        """
        batches = group_prompts(prompts, self.max_tokens // self.sampling.num_beams, self.max_new_tokens)
        rank, num_ranks = self.accelerator.process_index, self.accelerator.num_processes
        own = batches if self.is_sharded else batches[rank::num_ranks]
        replies = {number: reply for batch in own for number, reply in self._generate_or_retry(prompts, batch).items()}
        gathered: dict[int, Reply] = {}
        for part in gather_object([replies]):
            gathered = part | gathered  # of the lowest rank, if several have generated it
        return [gathered[number] for number in range(len(prompts))]

    def _generate_or_retry(self, prompts: Sequence[list[int]], batch: Sequence[int]) -> dict[int, Reply]:
        """Generate the replies to a batch; if that fails, to each of its prompts alone."""
        try:
            return dict(zip(batch, self._generate_batch(prompts, batch), strict=True))
        except Exception as error:
            if self.is_sharded and self.accelerator.num_processes > 1:
                # The other ranks wait for this one's shards within the same forward: it cannot try again.
                reason = f"{type(error).__name__}: {error}"
                raise TrainingError(
                    f"generating replies failed: {reason}. The newest checkpoint is kept; lower "
                    "training.micro_batch_tokens or evaluation.max_new_tokens, and run the same command to resume"
                ) from error
            if len(batch) == 1:
                return {batch[0]: FailedReply(f"{type(error).__name__}: {error}")}
        return {number: reply for x in batch for number, reply in self._generate_or_retry(prompts, [x]).items()}

    def _generate_batch(self, prompts: Sequence[list[int]], batch: Sequence[int]) -> list[str]:
        with self.accelerator.autocast():  # Accelerate wraps only the outer forward; `generate` calls the inner one
            return generate_replies(
                self.accelerator.unwrap_model(self.model),
                self.tokenizer,
                [prompts[number] for number in batch],
                ends=self.ends,
                sampling=self.sampling,
                numbers=batch,
                max_new_tokens=self.max_new_tokens,
            )


def group_prompts(prompts: Sequence[list[int]], max_tokens: int, max_new_tokens: int) -> list[list[int]]:
    """Return the numbers of prompts in batches: prompts of similar length, which need little padding.

    Args:
        max_tokens: in a batch: its number of prompts, times the tokens of the longest one with its reply. A batch has
            at least one prompt.
    """
    batches: list[list[int]] = []
    for number in sorted(range(len(prompts)), key=lambda number: len(prompts[number])):
        length = len(prompts[number]) + max_new_tokens
        if not batches or (len(batches[-1]) + 1) * length > max_tokens:
            batches.append([])
        batches[-1].append(number)
    return batches
