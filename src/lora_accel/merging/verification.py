"""Whether a merged model answers as base + adapter do, and how nearly."""

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
"""What both are asked: prose, sums, code, JSON, other scripts."""
MAX_TOKENS = 64
"""Of each text."""
LIMITS = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""How far logits may move on average, as a share of their spread. Both models compute in float32; the merged weights
have been rounded to the dtype they are stored in, to 24, 11 and 8 bits. (The quickstart: 2e-6 in float32, 8e-3
in bfloat16. The largest difference is told and not judged: rounding alone can throw a single token far.)"""


class Agreement(NamedTuple):
    """How far the merged model's logits lie from those of base + adapter."""

    moved: float
    """Largest difference of a logit, as a share of the logits' standard deviation."""
    mean_moved: float
    kl: float
    """Mean Kullback-Leibler divergence of the next token's distribution, in nats."""
    top1: float
    """Share of positions at which both hold the same token for the likeliest."""
    num_tokens: int
    limit: float
    """What `mean_moved` may be."""

    @property
    def holds(self) -> bool:
        """Whether the merged model may be used; not if anything is not a number."""
        return self.mean_moved <= self.limit


def token_ids(tokenizer: Any, vocab_size: int) -> list[list[int]]:
    """Return what both models are asked: the texts, as far as the model has their tokens."""
    rows = [[id for id in tokenizer.encode(text)[:MAX_TOKENS] if id < vocab_size] for text in TEXTS]
    return [row for row in rows if row] or [list(range(min(32, vocab_size)))]


@torch.no_grad()
def logits_of(model: torch.nn.Module, rows: Sequence[list[int]]) -> list[torch.Tensor]:
    """Return the logits (tokens x vocabulary, float32, on the CPU) for each row."""
    device = next(model.parameters()).device
    model.eval()
    return [model(torch.tensor([row], device=device)).logits[0].float().cpu() for row in rows]


def logits_of_folder(folder: Path, rows: Sequence[list[int]]) -> list[torch.Tensor]:
    """Return the logits of a model folder, loaded as anybody would load it, computed in float32."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
    return logits_of(model, rows)


def compare(expected: Sequence[torch.Tensor], found: Sequence[torch.Tensor], dtype: torch.dtype) -> Agreement:
    """Compare the logits of base + adapter with those of the merged model.

    Args:
        dtype: what the merged weights are stored in; it says how far they may lie apart.
    """
    before, after = torch.cat(list(expected)), torch.cat(list(found))
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
