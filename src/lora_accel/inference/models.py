"""The models that inference runs: base, base + adapters, merged model, and the chat template of each.

The base is loaded once for all adapters: each adapter is added to it in turn, and the base is restored afterwards.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lora_accel.config.schema import ModelSection, QuantizationSection
from lora_accel.console import Stage, short_names
from lora_accel.errors import ArtifactError, ConfigError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from lora_accel.data.chat import ChatTemplate


class Candidate(NamedTuple):
    """A model to run, and its name in tables."""

    name: str
    model: torch.nn.Module
    packed: bool
    """Whether the model supports sequence packing."""


def name_adapters(adapters: Sequence[Path]) -> dict[str, Path]:
    """Return adapters by their names in tables: `base + adapter`, or `base + ` and the shortest unique end of the path.

    Raises:
        ConfigError: an adapter is given twice.
    """
    if len(adapters) == 1:
        return {"base + adapter": adapters[0]}
    folders = {}
    paths = [Path(os.path.abspath(folder)).parts for folder in adapters]
    for number, own in enumerate(paths):
        others = paths[:number] + paths[number + 1 :]
        if own in others:
            raise ConfigError(f"--adapter: {adapters[number]} is given twice; remove one of them")
        size = next(n for n in range(1, len(own) + 1) if all(own[-n:] != other[-n:] for other in others))
        folders[f"base + {'/'.join(own[-size:])}"] = adapters[number]
    return folders


def check_adapters(adapters: Sequence[Path], merged: Path | None) -> None:
    """Check adapters and a merged model as far as possible without loading a model.

    Raises:
        ArtifactError: a file is missing or unreadable, or a value in adapter_config.json is not allowed.
    """
    from lora_accel.saving.adapter import read_adapter
    from lora_accel.saving.discovery import CONFIG
    from lora_accel.saving.untrusted import check_untrusted_config

    for adapter in adapters:
        read_adapter(adapter)
        check_untrusted_config(adapter / CONFIG, ())
    if merged and not (merged / "config.json").is_file():
        raise ArtifactError(f"{merged}: not a merged model: config.json is missing")


def load_candidates(
    section: ModelSection,
    quantization: QuantizationSection,
    adapters: Mapping[str, Path],
    merged: Path | None,
    *,
    with_base: bool,
) -> Iterator[Candidate]:
    """Load and yield one candidate after the other. The base and all adapters share one copy of the base.

    Args:
        section, quantization: the base model.
        adapters: adapter folders by name.
        merged: folder of a merged model; None = no such candidate.
        with_base: whether the base alone is a candidate.

    Raises:
        ArtifactError: a model cannot be loaded, or an adapter does not fit the base.
    """
    from lora_accel.model.fused_loss import patch_fused_loss
    from lora_accel.saving.adapter import keeps_base_weights, load_adapter

    if with_base or adapters:
        base, packed = _load(section, quantization)
        for folder in adapters.values():  # check that every adapter fits before the first one runs
            if keeps_base_weights(folder):  # loading the others is slow
                with _preserve_base(base, folder):
                    load_adapter(base, folder)
        if with_base:
            with _preserve_base(base):
                patch_fused_loss(base)
                yield Candidate("base", base, packed)
        for name, folder in adapters.items():
            with _preserve_base(base, folder):
                model = load_adapter(base, folder)
                patch_fused_loss(base)  # after the adapter, which may train the head
                yield Candidate(name, model, packed)
                del model
        del base
    if merged:
        merged_section = ModelSection(name_or_path=str(merged), dtype=section.dtype)
        merged_model, packed = _load(merged_section, QuantizationSection())
        patch_fused_loss(merged_model)
        yield Candidate("merged", merged_model, packed)


def _load(section: ModelSection, quantization: QuantizationSection) -> tuple[PreTrainedModel, bool]:
    """Load a model onto this machine's device. Return it, and whether it supports sequence packing."""
    from accelerate import PartialState

    from lora_accel.model.attention import can_pack, pack_attention
    from lora_accel.model.base import load_base_model

    device = PartialState().device
    with Stage(f"loading {short_names([section.name_or_path])[0]}"):
        model = load_base_model(section, quantization, device=device)
        if quantization.bits is None:
            model.to(device)
    packed = can_pack(model)
    if packed:
        pack_attention(model)
    return model, packed


@contextlib.contextmanager
def _preserve_base(base: PreTrainedModel, adapter: Path | None = None) -> Iterator[None]:
    """Restore the base bitwise at the end of the block, including everything that an adapter changes.

    PEFT's `unload()` does not undo everything: trained biases, the trained copies of `modules_to_save`, replicated
    layers, a resized vocabulary, and the weights that PiSSA and OLoRA change would remain. And on CPU, bitsandbytes
    repacks 4-bit weights at their first use into a layout that DoRA and OLoRA cannot read.
    """
    from lora_accel.saving.adapter import PREFIX, keeps_base_weights, read_adapter

    parameters = list(base.parameters())
    quant_states = [parameter.quant_state for parameter in parameters if hasattr(parameter, "quant_state")]
    objects: list[Any] = [*base.modules(), base.config, *parameters, *quant_states]
    attributes = [
        {key: copy.copy(value) if isinstance(value, (dict, set)) else value for key, value in vars(x).items()}
        for x in objects
    ]
    weights = [(parameter, parameter.data, parameter.requires_grad) for parameter in parameters]
    try:
        if adapter is not None:
            # An adapter replaces most tensors that it changes; only those written in place must be cloned.
            in_place = {key.removeprefix(PREFIX).replace(".base_layer.", ".") for key in read_adapter(adapter)}
            changes_base = not keeps_base_weights(adapter)
            for name, parameter in base.named_parameters(remove_duplicate=False):
                if changes_base or name in in_place:
                    parameter.data = parameter.data.clone()
        yield
    finally:
        for x, original in zip(objects, attributes, strict=True):
            vars(x).clear()
            vars(x).update(original)
        for parameter, data, requires_grad in weights:
            parameter.data = data
            parameter.requires_grad = requires_grad


def resolve_base(adapters: Sequence[Path], base: str | None) -> str:
    """Return `base` if it is given, else the base model that all adapters name.

    Raises:
        ArtifactError: an adapter does not name its base.
        ConfigError: adapters name different bases.
    """
    from lora_accel.saving.discovery import named_base

    if base:
        return base
    first = ""
    for adapter in adapters:
        name = named_base(adapter)
        first = first or name
        if os.path.abspath(name) != os.path.abspath(first):
            raise ConfigError(
                f"--adapter: {adapters[0]} is for {first}, {adapter} for {name}; pass --base if both are the "
                "same model, else run the adapters separately"
            )
    return first


def load_template(adapter: Path, section: ModelSection) -> ChatTemplate:
    """Return the chat template of training, with its tokenizer.

    A finished adapter has it in its own folder. For a checkpoint it is read from the adapter of the same run or, in an
    unfinished run, from the run's config. A plain PEFT adapter has none: the template of the base is used.

    Args:
        section: the base model.
    """
    from lora_accel.config.files import read_config
    from lora_accel.data.chat import ChatTemplate
    from lora_accel.model.tokenizer import load_tokenizer
    from lora_accel.saving.discovery import run_of
    from lora_accel.setup.recipe import make_recipe

    folders = [adapter]
    if (run := run_of(adapter)) is not None:
        folders.append(run / "adapter")
    for folder in folders:
        if (folder / "tokenizer_config.json").is_file():
            return _saved_template(folder)
    config = folders[-1].parent / "config.yaml"
    if len(folders) > 1 and config.is_file():
        run_config = read_config(config)
        # The config may be untrusted: of its model section only the template is used.
        model = section.model_copy(update={"chat_template": run_config.model.chat_template})
        return make_recipe(run_config.model_copy(update={"model": model})).template()
    return ChatTemplate(load_tokenizer(section))


def _saved_template(folder: Path) -> ChatTemplate:
    """Return the chat template in an adapter folder, as a built-in template if training used one.

    With a built-in template the tokenizer adds the BOS token; any other template writes it itself.
    """
    from lora_accel.data.chat import BUILT_IN_TEMPLATES, ChatTemplate, template_source
    from lora_accel.model.tokenizer import load_tokenizer
    from lora_accel.saving.atomic import read_json

    tokenizer = load_tokenizer(ModelSection(name_or_path=str(folder)))
    name = None
    with contextlib.suppress(ArtifactError, KeyError, TypeError, AttributeError):
        provenance = read_json(folder / "provenance.json")
        name = (provenance.get("adapter") or provenance)["config"]["model"]["chat_template"]
    built_in = name in BUILT_IN_TEMPLATES and template_source(name) == tokenizer.chat_template
    return ChatTemplate(tokenizer, name if built_in else None)
