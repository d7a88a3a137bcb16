"""The tokens of a micro-batch that `training.micro_batch_tokens: auto` chooses on a CPU.

There, small micro-batches are as fast as large ones and take less memory. But examples share the tokens with which they
begin within a micro-batch only: the smaller it is, the more often these are computed.
"""

from __future__ import annotations

import dataclasses

from lora_accel.batching.batches import Batches, BatchOptions, num_computed_tokens

CANDIDATES = (1024, 2048, 4096)
MAX_EXTRA = 0.05
"""Share of further tokens that may be computed to save memory."""
MAX_STEPS = 16
MAX_TOKENS = 1_000_000
"""Limits of what is looked at: steps, and their tokens."""


def choose_token_limit(batches: Batches, options: BatchOptions, total_steps: int) -> int:
    """Return the smallest of `CANDIDATES` that computes about as few tokens as the largest one.

    It is the same on every rank, since it depends on the data, the plan and `options` only.

    Args:
        batches: of the run.
        total_steps: of the run; up to `MAX_STEPS` of them, spread over it, are compared.
    """
    smallest, *_, largest = CANDIDATES
    if options.min_saving is None or options.max_examples is not None:
        return smallest
    computed = dict.fromkeys(CANDIDATES, 0)
    num_tokens = 0
    for step in sorted({number * total_steps // MAX_STEPS for number in range(MAX_STEPS)}):
        if num_tokens > MAX_TOKENS:
            break
        examples = batches.examples(step)
        num_tokens += sum(len(example.input_ids) for example in examples)
        for limit in CANDIDATES:
            computed[limit] += num_computed_tokens(examples, dataclasses.replace(options, max_tokens=limit))
    return next(limit for limit in CANDIDATES if computed[limit] <= (1 + MAX_EXTRA) * computed[largest])
