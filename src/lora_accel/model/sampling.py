"""Decoding options for transformers' `generate`: penalties of repetition, and sampling with reproducible draws.

A draw depends on the seed, the number of the prompt and the position in the reply, not on the other prompts of the
batch, the device or torch's generator. So a reply is the same for any batch size, as far as the logits are, and
generation during training changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import LogitsProcessorList
from transformers.generation import (
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lora_accel.config.schema import GenerationSection
from lora_accel.randomness import derive_seed


def logits_processors(
    options: GenerationSection, prompts: Sequence[Sequence[int]], numbers: Sequence[int]
) -> LogitsProcessorList:
    """Return what changes the logits before the next token is chosen greedily, in transformers' order.

    Args:
        prompts: token ids of a batch, which is padded on the left.
        numbers: the number of each prompt, from which its draws are derived.
    """
    processors = LogitsProcessorList()
    if options.repetition_penalty is not None:
        penalty = RepetitionPenaltyLogitsProcessor(options.repetition_penalty)
        processors.append(_WithoutPadding(penalty, prompts, [ids[0] for ids in prompts]))
    if options.no_repeat_ngram_size is not None:
        ngrams, size = NoRepeatNGramLogitsProcessor(options.no_repeat_ngram_size), options.no_repeat_ngram_size
        # Longer sequences are looked up by the tokens before their last one, and no token is -1.
        processors.append(_WithoutPadding(ngrams, prompts, [ids[0] if size == 1 else -1 for ids in prompts]))
    if options.temperature > 0:
        processors.append(TemperatureLogitsWarper(options.temperature))
        if options.top_k is not None:
            processors.append(TopKLogitsWarper(options.top_k))
        if options.top_p is not None:
            processors.append(TopPLogitsWarper(options.top_p))
        processors.append(_KeyedDraw(options.seed, numbers, max(map(len, prompts))))
    return processors


class _WithoutPadding:
    """Hides padding from a penalty of repetition: otherwise a padded prompt would have used the pad token often."""

    def __init__(self, penalty: Any, prompts: Sequence[Sequence[int]], fillers: Sequence[int]) -> None:
        """Prepare the mask.

        Args:
            fillers: for each prompt, a token without effect, which replaces padding.
        """
        self._penalty = penalty
        width = max(map(len, prompts))
        self._is_padding = torch.tensor([[True] * (width - len(ids)) + [False] * len(ids) for ids in prompts])
        self._fillers = torch.tensor(fillers)[:, None]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Apply the penalty. input_ids [B x beams, T], scores [B x beams, V]."""
        num_beams = len(input_ids) // len(self._fillers)
        is_padding = self._is_padding.to(input_ids.device).repeat_interleave(num_beams, dim=0)
        fillers = self._fillers.to(input_ids.device).repeat_interleave(num_beams, dim=0)
        ids, width = input_ids.clone(), is_padding.shape[1]
        ids[:, :width] = torch.where(is_padding, fillers, ids[:, :width])
        changed: torch.Tensor = self._penalty(ids, scores)
        return changed


class _KeyedDraw:
    """Draws the next token of each prompt by inverse transform sampling, and leaves only that token possible."""

    def __init__(self, seed: int, numbers: Sequence[int], width: int) -> None:
        self._seed, self._numbers, self._width = seed, numbers, width

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Draw. input_ids [B, T], scores [B, V]."""
        position = input_ids.shape[1] - self._width
        draws = [derive_seed(self._seed, number, position) >> 11 for number in self._numbers]
        dtype = torch.float32 if scores.device.type == "mps" else torch.float64
        cumulative = scores.to(dtype).softmax(-1).cumsum(-1)
        uniform = torch.tensor([draw / 2**53 for draw in draws], dtype=dtype, device=scores.device)[:, None]  # [0, 1)
        tokens = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
        return torch.full_like(scores, -torch.inf).scatter(1, tokens.clamp(max=scores.shape[-1] - 1), 0.0)
