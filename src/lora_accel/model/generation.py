"""Replies to prompts by transformers' `generate`, cut at the end of the turn."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

import torch
from transformers import GenerationConfig

from lora_accel.errors import ArtifactError
from lora_accel.model.sizes import sizes_of_model
from lora_accel.model.tokenizer import padding_id


@torch.no_grad()
def generate_replies(
    model: torch.nn.Module, tokenizer: Any, prompts: Sequence[list[int]], *, ends: Collection[int] = (), **options: Any
) -> list[str]:
    """Return the text that the model generates for each prompt, without the end token.

    Args:
        prompts: token ids, padded on the left to one batch.
        ends: ids of end tokens, in addition to those of the tokenizer and of the model.
        options: keyword arguments of transformers' `generate`; greedy by default. `max_new_tokens` is reduced if the
            model's table of positions ends earlier.
    """
    model.eval()
    width, device = max(map(len, prompts)), next(model.parameters()).device
    sizes = sizes_of_model(model)
    pad = padding_id(tokenizer, sizes.vocab_size)
    if sizes.num_positions is not None and width + options.get("max_new_tokens", 0) > sizes.num_positions:
        options["max_new_tokens"] = max(1, sizes.num_positions - width)
    model.generation_config = config = greedy_config(model.generation_config)
    ends = {*ends, *(config.eos_token_id or []), tokenizer.eos_token_id} - {None}
    output = model.generate(  # type: ignore[operator]
        input_ids=torch.tensor([[pad] * (width - len(ids)) + ids for ids in prompts], device=device),
        attention_mask=torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=device),
        pad_token_id=pad,
        eos_token_id=sorted(ends) or None,
        use_cache=True,
        **({"do_sample": False} | options),
    )
    return [decode_reply(tokenizer, ids, ends) for ids in output[:, width:].tolist()]


def greedy_config(config: Any) -> GenerationConfig:
    """Return what greedy replies use of a base's generation_config.json: its end tokens and penalties of repetition.

    The rest is for sampling and beams, and an untrusted file may request a million of them.

    Args:
        config: transformers' GenerationConfig of the base.

    Raises:
        ArtifactError: a penalty is not a number that transformers can apply.
    """
    ends = config.eos_token_id if isinstance(config.eos_token_id, (list, tuple)) else [config.eos_token_id]
    penalty, size = config.repetition_penalty, config.no_repeat_ngram_size
    if penalty is not None and not (isinstance(penalty, (int, float)) and 0 < penalty < math.inf):
        raise ArtifactError(f"generation_config.json: repetition_penalty={penalty!r} should be a positive number")
    if size is not None and (type(size) is not int or size < 0):
        raise ArtifactError(f"generation_config.json: no_repeat_ngram_size={size!r} should be an integer of at least 0")
    ends = [token for token in ends if type(token) is int and token >= 0]
    return GenerationConfig(eos_token_id=ends or None, repetition_penalty=penalty, no_repeat_ngram_size=size)


def decode_reply(tokenizer: Any, ids: Sequence[int], ends: Collection[int]) -> str:
    """Return the text of a reply, up to its first end or pad token."""
    stops = {*ends, tokenizer.eos_token_id, tokenizer.pad_token_id}
    length = next((i for i, token in enumerate(ids) if token in stops), len(ids))
    text: str = tokenizer.decode(ids[:length], skip_special_tokens=True)
    return text
