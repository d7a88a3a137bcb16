"""Exact evaluation: one token-weighted mean over all examples and all ranks; and replies to prompts."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

import torch
from accelerate import Accelerator

from lora_accel.training.loss import summed_token_loss


class Share(Protocol):
    """What evaluation reads of a source: this rank's share of it, and its size over all ranks."""

    @property
    def micro_batches(self) -> Sequence[Any]: ...
    @property
    def num_supervised_tokens(self) -> int: ...


def evaluate_sources(accelerator: Accelerator, model: torch.nn.Module, sources: Mapping[str, Share]) -> dict[str, Any]:
    """Return the values of an eval line: mean loss per supervised token over all sources, and of each of several."""
    losses = {
        name: evaluate(accelerator, model, share.micro_batches, share.num_supervised_tokens)
        for name, share in sources.items()
    }
    tokens = {name: share.num_supervised_tokens for name, share in sources.items()}
    total = sum(tokens.values())
    values: dict[str, Any] = {"eval_loss": sum(losses[name] * tokens[name] for name in sources) / total}
    values["eval_tokens"] = total
    if len(sources) > 1:
        values["sources"] = {name: {"eval_loss": losses[name], "eval_tokens": tokens[name]} for name in sources}
    return values


@torch.no_grad()
def evaluate(
    accelerator: Accelerator,
    model: torch.nn.Module,
    micro_batches: Sequence[Any],
    num_supervised_tokens: int,
) -> float:
    """Return the mean loss per supervised token.

    Args:
        micro_batches: this rank's share; every rank has as many.
        num_supervised_tokens: over all ranks.
    """
    model.eval()
    # Summed in float64, so that the sum does not depend on how many ranks shared it. (Apple's GPUs have none.)
    dtype = torch.float32 if accelerator.device.type == "mps" else torch.float64
    loss_sum = torch.zeros((), dtype=dtype, device=accelerator.device)
    for micro_batch in micro_batches:
        loss_sum += summed_token_loss(model, micro_batch.to(accelerator.device))
    total: torch.Tensor = accelerator.reduce(loss_sum)
    return total.item() / num_supervised_tokens


def sample_replies(
    accelerator: Accelerator, model: torch.nn.Module, tokenizer: Any, prompts: Sequence[list[int]], **options: Any
) -> list[str | Exception]:
    """Return the reply to each prompt, generated in the precision of training, or the error that it ended in.

    A sample is for a person to look at: if one cannot be generated, neither the run nor its export fails. Every rank
    generates all of them, since ZeRO-3 gathers weights in each forward.
    """
    unwrapped = accelerator.unwrap_model(model)
    replies: list[str | Exception] = []
    for prompt in prompts:
        try:
            with accelerator.autocast():  # accelerate wraps the model's own forward only, which `generate` goes around
                replies += replies_to(unwrapped, tokenizer, [prompt], **options)
        except Exception as error:
            replies.append(error)
    return replies


@torch.no_grad()
def replies_to(
    model: torch.nn.Module, tokenizer: Any, prompts: Sequence[list[int]], *, ends: Collection[int] = (), **options: Any
) -> list[str]:
    """Return for each prompt the text that the model writes after it, up to and without the end token.

    Args:
        prompts: token ids; they are padded on the left to one batch.
        ends: tokens that end a reply, beside those that the tokenizer and the model itself know.
        options: of transformers' `generate`; greedy unless it says otherwise.
    """
    model.eval()
    width, pad, device = (
        max(map(len, prompts)),
        tokenizer.pad_token_id,
        next(model.parameters()).device,
    )
    config: Any = model.generation_config
    own = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    ends = {*ends, *own, tokenizer.eos_token_id} - {None}
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
    """Return the text of a reply's tokens, up to and without the first that ends it or pads."""
    stops = {*ends, tokenizer.eos_token_id, tokenizer.pad_token_id}
    end = next((i for i, token in enumerate(ids) if token in stops), len(ids))
    text: str = tokenizer.decode(ids[:end], skip_special_tokens=True)
    return text
