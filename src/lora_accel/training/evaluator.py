"""Evaluation: the exact mean loss per supervised token over all examples and ranks, and replies to prompts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator

from lora_accel.batching.batch import StepBatch
from lora_accel.model.generation import generate_replies
from lora_accel.training.loss import summed_token_loss
from lora_accel.training.metrics import Metrics


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """Evaluates a run. Every rank calls `evaluate`."""

    accelerator: Accelerator
    model: torch.nn.Module
    sources: Mapping[str, StepBatch]
    """This rank's micro-batches of each evaluation source, by name."""
    tokenizer: Any
    prompts: Sequence[str]
    """`evaluation.prompts`."""
    prompt_ids: Sequence[list[int]]
    """Their token ids."""
    max_new_tokens: int

    def evaluate(self, metrics: Metrics) -> dict[str, Any]:
        """Return the values to log: the losses, and under `replies` (prompt, reply or error) pairs."""
        values: dict[str, Any] = {}
        if self.sources:
            with metrics.activity("evaluating"):
                values = evaluate_sources(self.accelerator, self.model, self.sources)
        if self.prompts:
            with metrics.activity("replying to evaluation.prompts"):
                replies = sample_replies(
                    self.accelerator,
                    self.model,
                    self.tokenizer,
                    self.prompt_ids,
                    max_new_tokens=self.max_new_tokens,
                )
            values["replies"] = list(zip(self.prompts, replies, strict=True))
        return values


def evaluate_sources(
    accelerator: Accelerator, model: torch.nn.Module, sources: Mapping[str, StepBatch]
) -> dict[str, Any]:
    """Return the loss and token count over all sources and, if there are several, of each source."""
    losses = {name: evaluate(accelerator, model, batch) for name, batch in sources.items()}
    tokens = {name: batch.num_supervised_tokens for name, batch in sources.items()}
    total = sum(tokens.values())
    values: dict[str, Any] = {"eval_loss": sum(losses[name] * tokens[name] for name in sources) / total}
    values["eval_tokens"] = total
    if len(sources) > 1:
        values["sources"] = {name: {"eval_loss": losses[name], "eval_tokens": tokens[name]} for name in sources}
    return values


@torch.no_grad()
def evaluate(accelerator: Accelerator, model: torch.nn.Module, batch: StepBatch) -> float:
    """Return the mean loss per supervised token over all ranks.

    Args:
        batch: this rank's micro-batches of the examples.
    """
    model.eval()
    # In float64 the sum does not depend on the number of ranks. (MPS has no float64.)
    dtype = torch.float32 if accelerator.device.type == "mps" else torch.float64
    loss_sum = torch.zeros((), dtype=dtype, device=accelerator.device)
    for micro_batch in batch.micro_batches:
        loss_sum += summed_token_loss(model, micro_batch.to(accelerator.device))
    total: torch.Tensor = accelerator.reduce(loss_sum)
    return total.item() / batch.num_supervised_tokens


def sample_replies(
    accelerator: Accelerator, model: torch.nn.Module, tokenizer: Any, prompts: Sequence[list[int]], **options: Any
) -> list[str | Exception]:
    """Return the reply to each prompt, or the error that generation raised: a failed reply must not stop the run.

    Generates in the precision of training. Every rank generates all replies, because ZeRO-3 gathers weights in each
    forward.
    """
    unwrapped = accelerator.unwrap_model(model)
    replies: list[str | Exception] = []
    for prompt in prompts:
        try:
            with accelerator.autocast():  # Accelerate wraps only the outer forward; `generate` calls the inner one
                replies += generate_replies(unwrapped, tokenizer, [prompt], **options)
        except Exception as error:
            replies.append(error)
    return replies
