"""The recipe that tokenizes a run's rows: its tokenizer, its chat template, and a hash that identifies both."""

from __future__ import annotations

import functools
import hashlib
import json

from lora_accel.config.schema import RunConfig
from lora_accel.data.dataset import Recipe
from lora_accel.data.template import ChatTemplate, template_source
from lora_accel.model.tokenizer import check_model_folder, load_tokenizer, tokenizer_fingerprint


def complete_config(config: RunConfig) -> RunConfig:
    """Return a run config with the options of the adapter with which its run begins, if its data depends on them.

    For commands that read the data of a run. The config in a run folder has these options.

    Raises:
        ConfigError, ArtifactError: see `setup.initial.prepare_initial_adapter`.
    """
    if config.adapter.init_from is None:
        return config
    from lora_accel.setup.initial import resolve_initial_adapter
    from lora_accel.setup.sizes import resolve_rope_scaling

    return resolve_initial_adapter(resolve_rope_scaling(config))[0]


def make_recipe(config: RunConfig) -> Recipe:
    """Return the recipe of a run config. The tokenizer is loaded at its first use.

    Raises:
        DataError: there is no such template.
        ArtifactError: the model does not exist.
        ConfigError: it is an adapter.
    """
    check_model_folder(config.model)
    name, variables = config.model.chat_template, config.model.chat_template_kwargs

    @functools.cache
    def template() -> ChatTemplate:
        tokenizer = load_tokenizer(config.model)
        parse_special_tokens = config.data.parse_special_tokens
        return ChatTemplate(tokenizer, name, parse_special_tokens=parse_special_tokens, variables=variables)

    source = template_source(name)
    fingerprint = tokenizer_fingerprint(config.model)
    if fingerprint is None:
        fingerprint = template().tokenizer.backend_tokenizer.to_str()  # loaded from the Hub just now
    added = config.model.add_tokens and config.model.add_tokens.model_dump(include={"tokens", "special"})
    inputs = json.dumps([fingerprint, name, source, variables, added])
    return Recipe(hashlib.sha256(inputs.encode()).hexdigest(), template)
