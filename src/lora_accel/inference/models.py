"""The models that are asked: base, base + adapters, merged model, each with the template of its training.

However many adapters are asked, the base is read once: each is put on it in turn, and the base taken back as it was.
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
    """A model to ask, under the name that tables show."""

    name: str
    model: torch.nn.Module
    packed: bool
    """Whether it takes rows with examples end to end."""


def name_adapters(adapters: Sequence[Path]) -> dict[str, Path]:
    """Return adapters by their names in tables: of several, the shortest end of the path that no other has.

    Raises:
        ConfigError: one is given twice.
    """
    if len(adapters) == 1:
        return {"base + adapter": adapters[0]}
    named = {}
    paths = [Path(os.path.abspath(folder)).parts for folder in adapters]
    for number, own in enumerate(paths):
        others = paths[:number] + paths[number + 1 :]
        if own in others:
            raise ConfigError(f"--adapter: {adapters[number]} is given twice; once is enough")
        size = next(n for n in range(1, len(own) + 1) if all(own[-n:] != other[-n:] for other in others))
        named[f"base + {'/'.join(own[-size:])}"] = adapters[number]
    return named


def check_adapters(adapters: Sequence[Path], merged: Path | None) -> None:
    """Refuse what can be seen to be no adapter and no model before one is loaded.

    Raises:
        ArtifactError: a file is missing, cannot be read, or is out of bounds.
    """
    from lora_accel.saving.adapter import read_adapter
    from lora_accel.saving.discovery import CONFIG
    from lora_accel.saving.untrusted import check_untrusted_config

    for adapter in adapters:
        read_adapter(adapter)
        check_untrusted_config(adapter / CONFIG, ())
    if merged and not (merged / "config.json").is_file():
        raise ArtifactError(f"{merged}: no config.json in it, so it is no merged model")


def candidates(
    section: ModelSection,
    quantization: QuantizationSection,
    adapters: Mapping[str, Path],
    merged: Path | None,
    *,
    with_base: bool,
) -> Iterator[Candidate]:
    """Load and give one candidate after the other; base and adapters share one copy of the base."""
    from lora_accel.model.fused_loss import patch_fused_loss
    from lora_accel.saving.adapter import keeps_base_weights, load_adapter

    if with_base or adapters:
        base, packed = _load(section, quantization)
        for folder in adapters.values():  # one that does not fit is told before the first is asked
            if keeps_base_weights(folder):  # others take long to put on
                with _lent(base, folder):
                    load_adapter(base, folder)
        if with_base:
            with _lent(base):
                patch_fused_loss(base)
                yield Candidate("base", base, packed)
        for name, folder in adapters.items():
            with _lent(base, folder):
                model = load_adapter(base, folder)
                patch_fused_loss(base)  # after the adapter, which may train the head
                yield Candidate(name, model, packed)
                del model
        del base
    if merged:
        whole, packed = _load(ModelSection(name_or_path=str(merged), dtype=section.dtype), QuantizationSection())
        patch_fused_loss(whole)
        yield Candidate("merged", whole, packed)


def _load(section: ModelSection, quantization: QuantizationSection) -> tuple[PreTrainedModel, bool]:
    """Load a model onto this machine's device; second, whether it takes packed rows."""
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
def _lent(base: PreTrainedModel, adapter: Path | None = None) -> Iterator[None]:
    """Take a base back as it was, to the last bit, whatever an adapter has done to it.

    PEFT's `unload()` would leave trained biases, the copies that were trained in place of `modules_to_save`, replicated
    layers, another vocabulary, and what PiSSA and OLoRA leave of the weights; and on a CPU bitsandbytes packs weights
    otherwise at their first use, which what looks at them afterwards (DoRA, OLoRA) would not read.
    """
    from lora_accel.saving.adapter import PREFIX, keeps_base_weights, read_adapter

    parameters = list(base.parameters())
    packings = [parameter.quant_state for parameter in parameters if hasattr(parameter, "quant_state")]
    holders: list[Any] = [*base.modules(), base.config, *parameters, *packings]
    attributes = [
        {key: copy.copy(value) if isinstance(value, (dict, set)) else value for key, value in vars(holder).items()}
        for holder in holders
    ]
    weights = [(parameter, parameter.data, parameter.requires_grad) for parameter in parameters]
    try:
        if adapter is not None:
            # Most weights are replaced, if at all; these are written to where they lie.
            written = {key.removeprefix(PREFIX).replace(".base_layer.", ".") for key in read_adapter(adapter)}
            all_of_it = not keeps_base_weights(adapter)
            for name, parameter in base.named_parameters(remove_duplicate=False):
                if all_of_it or name in written:
                    parameter.data = parameter.data.clone()
        yield
    finally:
        for holder, kept in zip(holders, attributes, strict=True):
            vars(holder).clear()
            vars(holder).update(kept)
        for parameter, data, trained in weights:
            parameter.data = data
            parameter.requires_grad = trained


def base_of(adapters: Sequence[Path], base: str | None) -> str:
    """Return the one base that adapters are for.

    Raises:
        ArtifactError: one names none.
        ConfigError: they name different ones.
    """
    from lora_accel.saving.atomic import read_json
    from lora_accel.saving.discovery import CONFIG

    if base:
        return base
    first = ""
    for adapter in adapters:
        name = read_json(adapter / CONFIG).get("base_model_name_or_path")
        if not name or not isinstance(name, str):
            raise ArtifactError(f"{adapter}: names no base model; say --base")
        first = first or name
        if os.path.abspath(name) != os.path.abspath(first):
            raise ConfigError(
                f"--adapter: {adapters[0]} is for {first}, {adapter} for {name}; say --base if both are one model, "
                "else ask them one by one"
            )
    return first


def template_of(adapter: Path, section: ModelSection) -> ChatTemplate:
    """Return the template of training, on its tokenizer.

    It stands beside a finished adapter. Of a checkpoint it stands in its run: beside the adapter, or if there is none
    yet, in the run's config. A bare PEFT adapter has none, so its base's is taken.
    """
    from lora_accel.config.files import read_config
    from lora_accel.data.chat import ChatTemplate
    from lora_accel.model.tokenizer import load_tokenizer
    from lora_accel.setup.recipe import make_recipe

    folders = [adapter]
    if adapter.resolve().parent.name == "checkpoints":
        folders.append(adapter.resolve().parent.parent / "adapter")
    for folder in folders:
        if (folder / "tokenizer_config.json").is_file():
            return _saved_template(folder)
    config = folders[-1].parent / "config.yaml"
    if len(folders) > 1 and config.is_file():
        asked = read_config(config)
        # The folder may be a stranger's: no more than the template is taken from its config.
        model = section.model_copy(update={"chat_template": asked.model.chat_template})
        return make_recipe(asked.model_copy(update={"model": model})).template()
    return ChatTemplate(load_tokenizer(section))


def _saved_template(folder: Path) -> ChatTemplate:
    """Return the template that was saved with a tokenizer, and take it for a built-in one if it was: these leave the
    begin token to the tokenizer."""
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
