"""Evaluation: the exact mean loss per supervised token over all examples and ranks, and replies to prompts."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator

from lora_accel.batching.batch import StepBatch
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


@torch.no_grad()
def generate_replies(
    model: torch.nn.Module, tokenizer: Any, prompts: Sequence[list[int]], *, ends: Collection[int] = (), **options: Any
) -> list[str]:
    """Return the text that the model generates for each prompt, without the end token.

    Args:
        prompts: token ids, padded on the left to one batch.
        ends: ids of end tokens, in addition to those of the tokenizer and of the model.
        options: keyword arguments of transformers' `generate`; greedy by default.
    """
    model.eval()
    width, pad, device = max(map(len, prompts)), tokenizer.pad_token_id, next(model.parameters()).device
    config: Any = model.generation_config
    model_ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    ends = {*ends, *model_ends, tokenizer.eos_token_id} - {None}
    output = model.generate(  # type: ignore[operator]
        input_ids=torch.tensor([[pad] * (width - len(ids)) + ids for ids in prompts], device=device),
        attention_mask=torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=device),
        pad_token_id=pad,
        eos_token_id=sorted(ends) or None,
        use_cache=True,
        **({"do_sample": False} | options),
    )
    return [decode_reply(tokenizer, ids, ends) for ids in output[:, width:].tolist()]


def decode_reply(tokenizer: Any, ids: Sequence[int], ends: Collection[int]) -> str:
    """Return the text of a reply, up to its first end or pad token."""
    stops = {*ends, tokenizer.eos_token_id, tokenizer.pad_token_id}
    length = next((i for i, token in enumerate(ids) if token in stops), len(ids))
    text: str = tokenizer.decode(ids[:length], skip_special_tokens=True)
    return text
