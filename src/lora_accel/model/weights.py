"""Check that a base's weight files hold the model that its config.json describes.

transformers initializes at random what its files lack and only warns. Here that is an error, found before any weight is
read: transformers loads the declared tensors on the meta device, with all its renaming and fusing, and reports what is
missing, left over or of another shape.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import functools
import logging
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from lora_accel.errors import ArtifactError, first_line
from lora_accel.logs import logger
from lora_accel.model.headers import StoredTensor
from lora_accel.model.sizes import unknown_name

ORDINARY_LAYERS = 200
"""A model of so many layers is built on the meta device in a second; one of more must have as many tensors."""
ATTENTION = "eager"
"""Every model has it. What config.json names may not be installed here, and `model.attention` may replace it."""
MAX_COMPUTED_BYTES = 1e9
"""Limit of the masks and sines that a model smaller than that computes from its config. GPT-2's take 12 MB."""
MAX_NAMED = 3
"""Maximum number of tensors in a message."""


def check_weights(name: str, config: PretrainedConfig, tensors: Mapping[str, StoredTensor]) -> None:
    """Check that weight files hold the model that a config describes, without reading a weight.

    Args:
        name: of the base, for messages.
        config: without quantization.
        tensors: from `read_headers`.

    Raises:
        ArtifactError: a tensor of the model is missing, has another shape or holds integers; tensors inside the model's
            layers would be ignored; or the config describes no model.
    """
    config = copy.deepcopy(config)
    num_layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    if type(num_layers) is int and num_layers > max(len(tensors), ORDINARY_LAYERS):
        raise ArtifactError(
            f"{name}: config.json: num_hidden_layers={num_layers}, but the weight files hold {len(tensors):,} tensors"
        )
    declared = {key: torch.empty(x.shape, dtype=torch.float32, device="meta") for key, x in tensors.items()}
    try:
        kind: Any = type(_build(name, config, tensors))
        with without_zero3(), _quiet():
            model, info = kind.from_pretrained(
                None,
                config=config,
                state_dict=declared,
                device_map={"": "meta"},
                dtype=torch.float32,
                attn_implementation=ATTENTION,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except ArtifactError:
        raise
    except Exception as error:  # an invalid config raises many types
        if experts := _missing_experts(tensors):
            raise _missing_error(name, experts) from None
        reason = unknown_name(config) or describe_error(error)
        raise ArtifactError(f"{name}: no model can be built from config.json and the weight files: {reason}") from None
    check_loading_info(name, model, info, tensors)


def _build(name: str, config: PretrainedConfig, tensors: Mapping[str, StoredTensor]) -> PreTrainedModel:
    """Return the model of a config on the meta device; check what it would compute, since loading it computes that."""
    with without_zero3(), torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, attn_implementation=ATTENTION, trust_remote_code=False
        )
    computed = {key: buffer.numel() * buffer.element_size() for key, buffer in model.named_buffers()}
    total, limit = sum(computed.values()), sum(4 * math.prod(tensor.shape) for tensor in tensors.values())
    if total > max(limit, MAX_COMPUTED_BYTES):
        largest = max(computed, key=lambda key: computed[key])
        raise ArtifactError(
            f"{name}: config.json: the model would compute tables of {total / 1e9:,.0f} GB, such as {largest} of shape "
            f"{list(model.get_buffer(largest).shape)}"
        )
    return model


def check_loading_info(
    name: str, model: PreTrainedModel, info: Mapping[str, Any], tensors: Mapping[str, StoredTensor]
) -> None:
    """Check what transformers reports about a model that it loaded.

    Args:
        name: of the base, for messages.
        info: what `from_pretrained(..., output_loading_info=True)` returned.
        tensors: from `read_headers`.

    Raises:
        ArtifactError: see `check_weights`.
    """
    if mismatched := sorted(info["mismatched_keys"]):
        key, stored, expected = mismatched[0]
        more = f" (and {len(mismatched) - 1:,} more tensors)" if len(mismatched) > 1 else ""
        raise ArtifactError(
            f"{name}: {key} has shape {list(stored)} in the weight files and {list(expected)} by config.json{more}; "
            "use the config.json that belongs to these weights"
        )
    if missing := sorted(info["missing_keys"]):
        unused = [key for key in sorted(info["unexpected_keys"]) if not _is_computed(key, tensors.get(key))]
        raise _missing_error(name, missing, unused)
    inside, outside = _split_unexpected(model, info["unexpected_keys"], tensors)
    if inside:
        raise ArtifactError(
            f"{name}: the model of config.json does not use {_count(inside)} of the weight files: {_some(inside)}; "
            "its results would not be those of the weights. Use the config.json that belongs to these weights"
        )
    if not getattr(model, "is_quantized", False):
        _check_floating_point(name, model, tensors)
    if outside:
        _note(f"{name}: {_count(outside)} of the weight files are not used: {_some(outside)}")


@contextlib.contextmanager
def without_zero3() -> Iterator[None]:
    """Build models as without ZeRO-3, which would allocate the parameters of a model on the meta device too."""
    from transformers.integrations import deepspeed

    active = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed._hf_deepspeed_config_weak_ref = None
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = active


def describe_error(error: Exception) -> str:
    """Return the first line of an error of a library; with its type if the message alone is short."""
    text = first_line(error)
    return text if text.count(" ") > 1 else f"{type(error).__name__}: {text}"


def _split_unexpected(
    model: PreTrainedModel, unexpected: Collection[str], tensors: Mapping[str, StoredTensor]
) -> tuple[list[str], list[str]]:
    """Split the tensors that a model does not use: those inside its layers, and those of other parts.

    Other parts are another head, a vision tower, or layers for the prediction of several tokens. Old files also store
    masks and frequencies, which the model computes: neither.
    """
    modules, buffers = dict(model.named_modules()), {name for name, _ in model.named_buffers()}
    inside, outside = [], []
    text = model.config.get_text_config()
    num_layers, num_extra = getattr(text, "num_hidden_layers", 0), getattr(text, "num_nextn_predict_layers", None) or 0
    for key in sorted(unexpected):
        if key in buffers or f"{model.base_model_prefix}.{key}" in buffers or _is_computed(key, tensors.get(key)):
            continue
        parts = key.split(".")
        depth = max(n for n in range(len(parts)) if n == 0 or ".".join(parts[:n]) in modules)
        owner, rest = ".".join(parts[:depth]), parts[depth:]
        if rest[0].isdigit() and num_layers <= int(rest[0]) < num_layers + num_extra:
            outside.append(key)
        elif owner and (
            len(rest) <= 2
            or rest[0].isdigit()
            or any(part.isdigit() for part in parts[:depth])
            or not any(modules[owner].children())
        ):
            inside.append(key)
        else:
            outside.append(key)
    return inside, outside


def _is_computed(name: str, stored: StoredTensor | None) -> bool:
    """Whether a stored tensor is a mask or a table of rotary embeddings, which models compute."""
    if name.endswith(("inv_freq", "cos_cached", "sin_cached")):
        return True
    if stored is None:
        return False
    is_mask = len(stored.shape) == 4 and stored.shape[:2] == (1, 1)  # GPT-J's are stored as numbers in some files
    return is_mask or not stored.is_floating_point or math.prod(stored.shape) <= 1


def _check_floating_point(name: str, model: PreTrainedModel, tensors: Mapping[str, StoredTensor]) -> None:
    expected = model.state_dict()
    integers = [
        key
        for key, stored in tensors.items()
        if not stored.is_floating_point
        and (key in expected or f"{model.base_model_prefix}.{key}" in expected or ".experts." in key)
        and not (key in expected and not expected[key].is_floating_point())
    ]
    if integers:
        dtype = str(tensors[integers[0]].dtype).removeprefix("torch.")
        raise ArtifactError(
            f"{name}: {_count(integers)} of the weight files hold {dtype} instead of floating-point numbers: "
            f"{_some(integers)}; config.json has no quantization_config that explains them. Use the model in 16 or 32 "
            "bits"
        )


@functools.cache
def _note(text: str) -> None:
    """Log a note, once for all times that a base is checked and loaded."""
    logger.info(f"note: {text}")


def _missing_error(name: str, missing: Sequence[str], unused: Sequence[str] = ()) -> ArtifactError:
    """Return the error for missing tensors.

    Args:
        unused: tensors that the files have and the model lacks, such as `_orig_mod.` and the name of a missing one.
    """
    others = f"The files have {_some(unused)} instead. " if unused else ""
    are, they = ("is", "it") if len(missing) == 1 else ("are", "they")
    return ArtifactError(
        f"{name}: {_count(missing)} of the model {are} not in its weight files: {_some(missing)}; {they} would be "
        f"random. {others}Use complete weights, and the config.json that belongs to them"
    )


def _missing_experts(tensors: Collection[str]) -> list[str]:
    """Return the tensors that some experts of a layer lack and others have."""
    groups: dict[tuple[str, str], set[int]] = collections.defaultdict(set)
    for name in tensors:
        if match := re.fullmatch(r"(.*experts\.)(\d+)(\..*)", name):
            groups[match[1], match[3]].add(int(match[2]))
    numbers = set().union(*groups.values())
    return sorted(f"{before}{n}{after}" for (before, after), own in groups.items() for n in numbers - own)


def _count(names: Sequence[str]) -> str:
    return "1 tensor" if len(names) == 1 else f"{len(names):,} tensors"


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_NAMED:,} more" if len(names) > MAX_NAMED else ""
    return f"{', '.join(names[:MAX_NAMED])}{more}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Log nothing of transformers' report, which `check_loading_info` makes an error, and show no progress bar."""
    log = logging.getLogger("transformers.modeling_utils")
    was_disabled, has_bar = log.disabled, transformers_logging.is_progress_bar_enabled()
    log.disabled = True
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        log.disabled = was_disabled
        if has_bar:
            transformers_logging.enable_progress_bar()
