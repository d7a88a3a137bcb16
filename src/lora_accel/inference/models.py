"""The models that inference runs: base, base + adapters, merged model, and the chat template of each.

The base is loaded once for all adapters: each adapter is added to it in turn, and the base is restored afterwards.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lora_accel.config.schema import Dtype, ModelSection, QuantizationSection
from lora_accel.console import Stage, short_names
from lora_accel.errors import ArtifactError, ConfigError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from lora_accel.data.template import ChatTemplate


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


def find_adapters(adapters: Sequence[Path], merged: Path | None, *, force: bool) -> list[Path]:
    """Return the folders of adapters, and check them and a merged model as far as possible without loading a model.

    Args:
        adapters: folders, or Hub ids, which are downloaded.
        merged: folder of a merged model; None = there is none.
        force: whether to ignore options of adapter_config.json that the installed PEFT does not know.

    Raises:
        ArtifactError: a file is missing or unreadable, or a value in adapter_config.json is not allowed.
    """
    from lora_accel.saving.adapter import check_adapter_files
    from lora_accel.saving.hub import find_adapter

    folders = [find_adapter(adapter) for adapter in adapters]
    for folder in folders:
        check_adapter_files(folder, force=force)
    if merged and not (merged / "config.json").is_file():
        raise ArtifactError(f"{merged}: not a merged model: config.json is missing")
    return folders


def load_candidates(
    section: ModelSection,
    quantization: QuantizationSection,
    adapters: Mapping[str, Path],
    merged: Path | None,
    *,
    with_base: bool,
    force: bool = False,
    way_out: str = "pass the right one with --base",
) -> Iterator[Candidate]:
    """Load and yield one candidate after the other. The base and all adapters share one copy of the base.

    Args:
        section, quantization: the base model.
        adapters: folders that `find_adapters` returned, by name.
        merged: folder of a merged model; None = no such candidate.
        with_base: whether the base alone is a candidate.
        force: whether to accept a base that an adapter was not trained on, with a note, and to ignore options of its
            config that the installed PEFT does not know.
        way_out: how to pass the right base, for the message.

    Raises:
        ArtifactError: a model cannot be loaded, or an adapter was trained on another base or does not fit it.
        ConfigError: an adapter was trained with another RoPE scaling.
    """
    check_rope_scaling(section, list(adapters.values()))
    from lora_accel.model.fused_loss import patch_fused_loss
    from lora_accel.saving.adapter import keeps_base_weights, load_adapter

    if with_base or adapters:
        base, packed = _load_base(section, quantization, list(adapters.values()), force=force, way_out=way_out)
        for folder in adapters.values():  # check that every adapter fits before the first one runs
            if keeps_base_weights(folder):  # loading the others is slow
                with _preserve_base(base, folder):
                    load_adapter(base, folder, force=force)
        if with_base:
            with _preserve_base(base):
                patch_fused_loss(base)
                yield Candidate("base", base, packed)
        for name, folder in adapters.items():
            with _preserve_base(base, folder):
                model = load_adapter(base, folder, force=force)
                patch_fused_loss(base)  # after the adapter, which may train the head
                yield Candidate(name, model, packed and not _looks_for_tokens(folder))
                del model
        del base
    if merged:
        merged_section = ModelSection(
            name_or_path=str(merged), dtype=section.dtype, trust_remote_code=section.trust_remote_code
        )
        merged_model, packed = _load(merged_section, QuantizationSection())
        patch_fused_loss(merged_model)
        yield Candidate("merged", merged_model, packed)


def _looks_for_tokens(adapter: Path) -> bool:
    """Whether an adapter looks for its invocation tokens in each row (aLoRA), so that a row must be one example."""
    from lora_accel.saving.atomic import read_json
    from lora_accel.saving.discovery import CONFIG

    return bool(read_json(adapter / CONFIG).get("alora_invocation_tokens"))


def _load_base(
    section: ModelSection, quantization: QuantizationSection, adapters: Sequence[Path], *, force: bool, way_out: str
) -> tuple[PreTrainedModel, bool]:
    """Load a base, and check that the adapters were trained on it: first, if it need not be downloaded."""
    from lora_accel.merging.base import check_trained_on

    def check() -> None:
        for adapter in adapters:  # reads the base's files the first time
            check_trained_on(adapter, section, force=force, way_out=way_out)

    is_local = Path(section.name_or_path).is_dir()
    if is_local and adapters:
        with Stage(f"checking the weights of {short_names([section.name_or_path])[0]}"):
            check()
    loaded = _load(section, quantization)
    if not is_local:
        check()
    return loaded


def _load(section: ModelSection, quantization: QuantizationSection) -> tuple[PreTrainedModel, bool]:
    """Load a model onto this machine's device. Return it, and whether it supports sequence packing."""
    from accelerate import PartialState

    from lora_accel.model.attention import can_pack, pack_attention
    from lora_accel.model.base import load_base_model
    from lora_accel.model.new_tokens import extend_vocabulary

    device = PartialState().device
    with Stage(f"loading {short_names([section.name_or_path])[0]}"):
        model = load_base_model(section, quantization, device=device)
        if section.add_tokens is not None:
            extend_vocabulary(model, section)
        if not getattr(model, "is_quantized", False):
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
    from lora_accel.saving.adapter import keeps_base_weights, read_adapter
    from lora_accel.saving.matching import plain_name

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
            in_place = {plain_name(key) for key in read_adapter(adapter)}
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


def resolve_section(
    adapters: Sequence[Path], base: str | None, dtype: Dtype, *, trust_remote_code: bool = False
) -> ModelSection:
    """Return the model section of the adapters' base, with the RoPE scaling of their training.

    Args:
        base: Hub id or folder to use instead of the base that all adapters name.
        dtype: compute dtype.
        trust_remote_code: whether to run the base's own code.

    Raises:
        ArtifactError: an adapter does not name its base, the base is not here, or an adapter's provenance is invalid.
        ConfigError: adapters name different bases.
    """
    from lora_accel.merging.base import base_section
    from lora_accel.merging.job import provenance_of
    from lora_accel.saving.provenance import recorded_changes

    if not base:
        _check_same_base(adapters)
    first = adapters[0]
    provenance = provenance_of(first)
    section = base_section(first, provenance, base, trust_remote_code=trust_remote_code, dtype=dtype)
    return section.model_copy(update={"rope_scaling": recorded_changes(provenance, str(first)).rope_scaling})


def _check_same_base(adapters: Sequence[Path]) -> None:
    """Check that all adapters name the same base, in the same revision.

    Raises:
        ArtifactError: an adapter does not name its base.
        ConfigError: adapters name different bases.
    """
    from lora_accel.merging.job import provenance_of
    from lora_accel.saving.discovery import named_base
    from lora_accel.saving.hub import recorded_revision

    bases = []
    for adapter in adapters:
        name, revision = named_base(adapter), recorded_revision(adapter, provenance_of(adapter))
        bases.append((os.path.abspath(name), revision, f"{name} ({revision})" if revision else name))
    for adapter, (path, revision, title) in zip(adapters, bases, strict=True):
        if (path, revision) != bases[0][:2]:
            raise ConfigError(
                f"--adapter: {adapters[0]} is for {bases[0][2]}, {adapter} for {title}; pass --base if both are the "
                "same model, else run the adapters separately"
            )


def check_rope_scaling(section: ModelSection, adapters: Sequence[Path]) -> None:
    """Check that adapters were trained with the RoPE scaling of a model section.

    Raises:
        ConfigError: one was not.
    """
    from lora_accel.merging.job import provenance_of
    from lora_accel.saving.provenance import recorded_changes

    for adapter in adapters:
        provenance = provenance_of(adapter)
        trained = recorded_changes(provenance, str(adapter)).rope_scaling
        if provenance is not None and trained != section.rope_scaling:
            raise ConfigError(
                f"--adapter: {adapter} was trained with model.rope_scaling={json.dumps(trained)}, not "
                f"{json.dumps(section.rope_scaling)}; run it separately, or set model.rope_scaling in the config"
            )


def check_prompts(
    section: ModelSection, adapter: Path | None, template: ChatTemplate, prompts: Sequence[list[int]]
) -> None:
    """Check that a base has the tokens of prompts, and positions for the replies. Reads its config.json.

    Args:
        adapter: the adapter, which may add tokens; None = the base alone.
        prompts: token ids.

    Raises:
        DataError: it has not.
        ArtifactError: the base cannot be used.
    """
    from lora_accel.model.base import build_on_meta_device
    from lora_accel.model.sizes import load_config, sizes_of_model
    from lora_accel.saving.adapter import read_adapter
    from lora_accel.saving.matching import resize_vocabulary
    from lora_accel.setup.sizes import check_prompts as check

    model = build_on_meta_device(load_config(section), trust_remote_code=section.trust_remote_code)
    if adapter is not None:
        resize_vocabulary(model, adapter, read_adapter(adapter))
    sizes = sizes_of_model(model)
    check(section, template.tokenizer, {f"prompt {n}": ids for n, ids in enumerate(prompts, start=1)}, sizes)


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
