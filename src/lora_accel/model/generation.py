"""Replies to prompts by transformers' `generate`, cut at the end of the turn."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from transformers import GenerationConfig

from lora_accel.config.schema import GREEDY, GenerationSection
from lora_accel.model.sampling import logits_processors
from lora_accel.model.sizes import sizes_of_model
from lora_accel.model.tokenizer import padding_id


@torch.no_grad()
def generate_replies(
    model: torch.nn.Module,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    *,
    ends: Collection[int] = (),
    sampling: GenerationSection = GREEDY,
    numbers: Sequence[int] | None = None,
    **options: Any,
) -> list[str]:
    """Return the text that the model generates for each prompt, without the end token.

    Args:
        prompts: token ids, padded on the left to one batch.
        ends: ids of end tokens, in addition to those of the tokenizer and of the model.
        sampling: how the next token is chosen; greedy by default.
        numbers: the number of each prompt, from which its draws are derived; None = its position in the batch.
        options: keyword arguments of transformers' `generate`. `max_new_tokens` is reduced if the model's table of
            positions ends earlier.
    """
    model.eval()
    width, device = max(map(len, prompts)), next(model.parameters()).device
    sizes = sizes_of_model(model)
    pad = padding_id(tokenizer, sizes.vocab_size)
    if sizes.num_positions is not None and width + options.get("max_new_tokens", 0) > sizes.num_positions:
        if len(prompts) > 1:  # alone, a shorter prompt has room for more
            order = range(len(prompts)) if numbers is None else numbers
            one: dict[str, Any] = {"ends": ends, "sampling": sampling, **options}
            pairs = zip(prompts, order, strict=True)
            return [text for ids, n in pairs for text in generate_replies(model, tokenizer, [ids], numbers=[n], **one)]
        options["max_new_tokens"] = max(1, sizes.num_positions - width)
    model.generation_config = config = generation_config(model.generation_config, sampling)
    ends = {*ends, *(config.eos_token_id or []), tokenizer.eos_token_id} - {None}
    output = model.generate(  # type: ignore[operator]
        input_ids=torch.tensor([[pad] * (width - len(ids)) + ids for ids in prompts], device=device),
        attention_mask=torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=device),
        pad_token_id=pad,
        eos_token_id=sorted(ends) or None,
        use_cache=True,
        do_sample=False,  # sampling is one of the processors
        logits_processor=logits_processors(sampling, prompts, range(len(prompts)) if numbers is None else numbers),
        **options,
    )
    return [decode_reply(tokenizer, ids, ends) for ids in output[:, width:].tolist()]


def generation_config(config: Any, sampling: GenerationSection) -> GenerationConfig:
    """Return a generation config with the end tokens of a base's generation_config.json and with the requested beams.

    The rest of that file is not used: replies do not depend on it, and an untrusted file may request a million beams.

    Args:
        config: transformers' GenerationConfig of the base.
    """
    ends = config.eos_token_id if isinstance(config.eos_token_id, (list, tuple)) else [config.eos_token_id]
    ends = [token for token in ends if type(token) is int and token >= 0]
    beams: dict[str, float] = {"num_beams": sampling.num_beams} if sampling.num_beams > 1 else {}
    if sampling.length_penalty is not None:
        beams["length_penalty"] = sampling.length_penalty
    return GenerationConfig(eos_token_id=ends or None, **beams)


def decode_reply(tokenizer: Any, ids: Sequence[int], ends: Collection[int]) -> str:
    """Return the text of a reply, up to its first end or pad token."""
    stops = {*ends, tokenizer.eos_token_id, tokenizer.pad_token_id}
    length = next((i for i, token in enumerate(ids) if token in stops), len(ids))
    text: str = tokenizer.decode(ids[:length], skip_special_tokens=True)
    return text
