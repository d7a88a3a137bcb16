"""The chat template with which an adapter was trained."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_accel.config.schema import ModelSection
from lora_accel.errors import ArtifactError, ConfigError

if TYPE_CHECKING:
    from lora_accel.data.template import ChatTemplate


def load_template(adapter: Path, section: ModelSection) -> ChatTemplate:
    """Return the chat template of training, with its tokenizer.

    A finished adapter has it in its own folder. For a checkpoint it is read from the adapter of the same run or, in an
    unfinished run, from the run's config. A plain PEFT adapter has none: the template of the base is used.

    Args:
        section: the base model.
    """
    from lora_accel.config.files import read_config
    from lora_accel.data.template import ChatTemplate
    from lora_accel.model.tokenizer import load_tokenizer
    from lora_accel.saving.discovery import run_of
    from lora_accel.setup.recipe import make_recipe

    folders = [adapter]
    run = run_of(adapter)
    if run is not None:
        folders.append(run / "adapter")
    for folder in folders:
        if (folder / "tokenizer_config.json").is_file():
            return _saved_template(folder)
    config = folders[-1].parent / "config.yaml"
    if len(folders) > 1 and config.is_file():
        run_config = read_config(config)
        # The config may be untrusted: of its model section only the template and the added tokens are used.
        used = {key: getattr(run_config.model, key) for key in ("chat_template", "chat_template_kwargs", "add_tokens")}
        model = section.model_copy(update=used)
        template = make_recipe(run_config.model_copy(update={"model": model})).template()
        template.is_raw = _is_raw(_recorded(folders[-1].parent))
        return template
    return ChatTemplate(load_tokenizer(section))


def load_base_template(section: ModelSection, *, raw: bool | None) -> ChatTemplate:
    """Return a base's own chat template, for the base alone.

    Args:
        raw: whether prompts are passed without it.

    Raises:
        ConfigError: the base has no chat template, and prompts are to be passed with it.
    """
    from lora_accel.data.template import ChatTemplate
    from lora_accel.model.tokenizer import load_tokenizer

    template = ChatTemplate(load_tokenizer(section))
    if not template.source and not raw:
        raise ConfigError(f"{section.name_or_path}: its tokenizer has no chat template; pass --raw for plain text")
    return template


def _saved_template(folder: Path) -> ChatTemplate:
    """Return the chat template in an adapter folder, as a built-in template if training used one.

    With a built-in template the tokenizer adds the BOS token; any other template writes it itself.
    """
    from lora_accel.data.template import BUILT_IN_TEMPLATES, ChatTemplate, template_source
    from lora_accel.model.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(ModelSection(name_or_path=str(folder)))
    provenance = _recorded(folder)
    name, variables = None, None
    with contextlib.suppress(KeyError, TypeError):
        name = provenance["config"]["model"]["chat_template"]
        variables = dict(provenance["config"]["model"].get("chat_template_kwargs") or {})
    built_in = name in BUILT_IN_TEMPLATES and template_source(name) == tokenizer.chat_template
    template = ChatTemplate(tokenizer, name if built_in else None, variables=variables)
    template.is_raw = _is_raw(provenance)
    return template


def _recorded(folder: Path) -> dict[str, Any]:
    """Return the provenance of the adapter in a folder of an adapter, a run or a merged model; empty if unknown."""
    from lora_accel.saving.atomic import read_json

    try:
        provenance: dict[str, Any] = read_json(folder / "provenance.json")
    except ArtifactError:
        return {}
    adapter = provenance.get("adapter")
    return adapter if isinstance(adapter, dict) else provenance


def _is_raw(provenance: dict[str, Any]) -> bool:
    """Whether no chat template was applied to the training rows."""
    return provenance.get("prompt_format") == "raw"
