"""Verify that a merged model gives the logits of base + adapter, up to rounding."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

TEXTS = (
    "The quick brown fox jumps over the lazy dog, and then it sleeps until noon.",
    "Question: what is 17 times 23? Answer: 391, because 17 times 20 is 340 and 17 times 3 is 51.",
    "def add(a, b):\n    return a + b\n",
    '{"name": "Ada", "born": 1815, "fields": ["mathematics", "poetry"]}',
    "Der Zug fährt um 7:45 Uhr ab. 東京は日本の首都です。 La casa è grande.",
)
"""The inputs on which logits are compared: prose, arithmetic, code, JSON, other scripts."""
MAX_TOKENS = 64
"""Maximum number of tokens per text."""
LIMITS = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Largest allowed mean difference of logits, in standard deviations of the logits, by dtype of the merged weights.

Both models compute in float32; only the merged weights are rounded, to 24, 11 or 8 bits. The quickstart's model differs
by 2e-6 in float32 and by 8e-3 in bfloat16. The maximum difference is reported and has no limit: rounding alone can move
the logits of a single token far."""


class Agreement(NamedTuple):
    """How much the merged model's logits differ from those of base + adapter."""

    moved: float
    """Maximum difference of a logit, in standard deviations of the logits."""
    mean_moved: float
    kl: float
    """Mean Kullback-Leibler divergence of the next token's distribution, in nats."""
    top1: float
    """Fraction of positions at which both models have the same most likely token."""
    num_tokens: int
    limit: float
    """Largest allowed value of `mean_moved`."""

    @property
    def is_within_limit(self) -> bool:
        """Whether the merged model may be used; False if a difference is NaN."""
        return self.mean_moved <= self.limit


def token_ids(tokenizer: Any, vocab_size: int) -> list[list[int]]:
    """Return the inputs for both models: the tokens of `TEXTS`, without those outside the model's vocabulary.

    Args:
        tokenizer: None = the model has none.
    """
    texts = () if tokenizer is None else TEXTS
    rows = [[id for id in tokenizer.encode(text)[:MAX_TOKENS] if id < vocab_size] for text in texts]
    return [row for row in rows if row] or [list(range(min(32, vocab_size)))]


@torch.no_grad()
def logits_of(model: torch.nn.Module, rows: Sequence[list[int]]) -> list[torch.Tensor]:
    """Return the logits of each row, [tokens, vocab_size], float32, on CPU."""
    device = next(model.parameters()).device
    model.eval()
    return [model(torch.tensor([row], device=device)).logits[0].float().cpu() for row in rows]


def logits_of_folder(folder: Path, rows: Sequence[list[int]], *, trust_remote_code: bool = False) -> list[torch.Tensor]:
    """Return the logits of a model folder, loaded with `from_pretrained` in float32.

    Args:
        trust_remote_code: whether to run Python code in the folder.
    """
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=trust_remote_code
    )
    return logits_of(model, rows)


def compare(expected: Sequence[torch.Tensor], actual: Sequence[torch.Tensor], dtype: torch.dtype) -> Agreement:
    """Compare the logits of base + adapter with those of the merged model.

    Args:
        expected: logits of base + adapter, [tokens, vocab_size] for each row.
        actual: logits of the merged model.
        dtype: dtype of the merged weights, which determines the limit.
    """
    before, after = torch.cat(list(expected)), torch.cat(list(actual))
    difference = (before - after).abs() / before.std()
    kl = torch.nn.functional.kl_div(after.log_softmax(-1), before.log_softmax(-1), log_target=True, reduction="none")
    return Agreement(
        moved=difference.max().item(),
        mean_moved=difference.mean().item(),
        kl=kl.sum(-1).mean().item(),
        top1=(before.argmax(-1) == after.argmax(-1)).double().mean().item(),
        num_tokens=len(before),
        limit=LIMITS.get(dtype, LIMITS[torch.bfloat16]),
    )
