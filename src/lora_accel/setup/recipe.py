"""The recipe that tokenizes a run's rows: its tokenizer, its chat template, and a hash that identifies both."""

from __future__ import annotations

import functools
import hashlib
import json

from lora_accel.config.schema import RunConfig
from lora_accel.data.chat import ChatTemplate, template_source
from lora_accel.data.dataset import Recipe
from lora_accel.model.tokenizer import load_tokenizer, tokenizer_fingerprint


def make_recipe(config: RunConfig) -> Recipe:
    """Return the recipe of a run config. The tokenizer is loaded at its first use.

    Raises:
        DataError: there is no such template.
    """
    name = config.model.chat_template

    @functools.cache
    def template() -> ChatTemplate:
        tokenizer = load_tokenizer(config.model)
        return ChatTemplate(tokenizer, name, parse_special_tokens=config.data.parse_special_tokens)

    source = template_source(name)
    fingerprint = tokenizer_fingerprint(config.model)
    if fingerprint is None:
        fingerprint = template().tokenizer.backend_tokenizer.to_str()  # loaded from the Hub just now
    return Recipe(hashlib.sha256(json.dumps([fingerprint, name, source]).encode()).hexdigest(), template)
