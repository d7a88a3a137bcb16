"""The models that inference runs: base, base + adapters, and a merged model.

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
from lora_accel.inference.bases import check_rope_scaling

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


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
    from lora_accel.saving.attach import check_adapter_files
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
    from lora_accel.saving.attach import keeps_base_weights, load_adapter

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
    from lora_accel.merging.trained_on import check_trained_on

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
    from lora_accel.saving.attach import keeps_base_weights
    from lora_accel.saving.names import plain_name
    from lora_accel.saving.tensor_files import read_adapter

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
