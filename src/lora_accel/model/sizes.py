"""The sizes in a model's config.json: rows of the embeddings and number of positions. No weights are read.

torch and transformers are imported inside functions: the plan of a run needs the sizes and no model.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from lora_accel.config.schema import ModelSection
from lora_accel.errors import ArtifactError, ConfigError, did_you_mean, first_line, join_or
from lora_accel.model.tokenizer import check_model_folder, load_error_message, local_file

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

ROPE_MODELS = ("gemma", "gemma2", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "smollm3", "starcoder2")
"""Model types with rotary embeddings and no table of positions, whose sizes are all in config.json."""
POSITION_TABLE = re.compile(r"pos|wpe")
"""In the names of modules and buffers with one row per position."""
FIXED_POSITIONS = {"mpt": "max_seq_len", "ctrl": "max_position_embeddings"}
"""Model types with a fixed number of positions that is neither a module nor a buffer -> its name in config.json."""
EXTENDED_TYPES = ("llama3", "longrope")
"""RoPE types with which max_position_embeddings is the length after scaling."""
SUPPORTED_TYPES = ("linear", "llama3", "yarn")
"""RoPE types for `model.rope_scaling`."""
BATCH_DEPENDENT_TYPES = ("dynamic", "longrope")
"""RoPE types whose frequencies change with the longest row of a forward."""
KEPT_PARAMETERS = ("rope_theta", "partial_rotary_factor")
"""RoPE parameters that `model.rope_scaling` does not replace."""


class ModelSizes(NamedTuple):
    """How many tokens and positions a model has."""

    vocab_size: int
    """Rows of the embeddings."""
    num_positions: int | None
    """Rows of the table of positions. A longer example raises in the model. None = no such table."""
    rope_positions: int | None
    """Positions that a model with rotary embeddings (RoPE) was trained for. None = no rotary embeddings, or unknown."""

    @property
    def max_positions(self) -> int | None:
        """Return the number of positions that the model supports; None = unlimited, or unknown."""
        return self.num_positions or self.rope_positions


def load_config(section: ModelSection) -> PretrainedConfig:
    """Return a base's config, with the rotary embeddings of `model.rope_scaling`.

    Raises:
        ArtifactError: the model does not exist, or its config cannot be used.
        ConfigError: the model does not support `model.rope_scaling`.
    """
    from transformers import AutoConfig

    check_model_folder(section)
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(
            section.name_or_path, revision=section.revision, trust_remote_code=section.trust_remote_code
        )
    except Exception as error:  # an invalid config raises many types
        raise ArtifactError(load_error_message(section, "config", error)) from None
    if section.rope_scaling is not None:
        scale_rope(config, section.rope_scaling)
    return config


def model_sizes(section: ModelSection) -> ModelSizes:
    """Return the sizes of a base from its config.json.

    Raises:
        ArtifactError: the model does not exist, or its padding token is not in its vocabulary.
        ConfigError: the model does not support `model.rope_scaling`.
    """
    if (sizes := _common_sizes(section)) is not None:
        return sizes
    config = load_config(section)
    sizes = sizes_of(config)
    pad_id = getattr(config.get_text_config(), "pad_token_id", None)
    if isinstance(pad_id, int) and pad_id >= sizes.vocab_size:
        raise ArtifactError(
            f"{section.name_or_path}: config.json: pad_token_id is {pad_id}, but the model has only the token ids "
            f"below vocab_size={sizes.vocab_size}, so transformers cannot build it; set pad_token_id to null in its "
            "config.json"
        )
    return sizes


def _common_sizes(section: ModelSection) -> ModelSizes | None:
    """Return the sizes of a common model with rotary embeddings; None if config.json alone does not show them.

    Reads the file without transformers, whose import takes seconds: the plan of cached data needs nothing else.
    """
    file = local_file(section, "config.json")
    if file is None or section.rope_scaling is not None:
        return None
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    rope = config.get("rope_parameters") or {}
    vocab_size, positions, pad_id = (config.get(k) for k in ("vocab_size", "max_position_embeddings", "pad_token_id"))
    is_plain_rope = config.get("rope_scaling") is None and rope.get("rope_type", "default") == "default"
    if (
        config.get("model_type") not in ROPE_MODELS
        or not is_plain_rope
        or not isinstance(vocab_size, int)
        or not isinstance(positions, int)
        or (pad_id is not None and not (isinstance(pad_id, int) and pad_id < vocab_size))
    ):
        return None
    return ModelSizes(vocab_size, None, positions)


def sizes_of(config: PretrainedConfig) -> ModelSizes:
    """Return the sizes of a model from its config."""
    text = config.get_text_config()
    table = None if getattr(text, "rope_parameters", None) else _num_table_positions(config)
    return ModelSizes(text.vocab_size, table, _rope_positions(text))


def sizes_of_model(model: Any) -> ModelSizes:
    """Return the sizes of a model whose vocabulary may have been resized. It may be on the meta device, or sharded."""
    text = model.config.get_text_config()
    return ModelSizes(text.vocab_size, num_table_positions(model), _rope_positions(text))


def resolve_factor(section: ModelSection, max_length: int) -> ModelSection:
    """Return a model section with the factor of linear RoPE scaling, if `model.rope_scaling` does not give it.

    It is FastChat's: max_length / max_position_embeddings, rounded up. If the model has enough positions, nothing is
    scaled.

    Args:
        max_length: `data.max_length`.

    Raises:
        ArtifactError: the model does not exist.
        ConfigError: the model has no rotary embeddings.
    """
    scaling = section.rope_scaling
    if scaling is None or scaling["rope_type"] != "linear" or scaling.get("factor") is not None:
        return section
    config = load_config(section.model_copy(update={"rope_scaling": None}))
    _own_rope(config)
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if not positions:
        raise ConfigError(
            "model.rope_scaling: factor is missing, and the model's config has no max_position_embeddings to derive "
            "it from; set factor"
        )
    factor = float(math.ceil(max_length / positions))
    return section.model_copy(update={"rope_scaling": scaling | {"factor": factor} if factor > 1 else None})


def scale_rope(config: PretrainedConfig, scaling: Mapping[str, Any]) -> None:
    """Replace the parameters of a model's rotary embeddings, in its config.

    Args:
        scaling: `model.rope_scaling`, in transformers' names.

    Raises:
        ConfigError: the model, or transformers, does not support these parameters.
    """
    from transformers.modeling_rope_utils import RopeParameters

    rope_type = str(scaling["rope_type"])
    text, own = config.get_text_config(), _own_rope(config)
    if rope_type in BATCH_DEPENDENT_TYPES:
        raise ConfigError(
            f"model.rope_scaling: rope_type={rope_type} changes the frequencies with the longest row of a batch, so a "
            f"row's loss would depend on the other rows; use {join_or(SUPPORTED_TYPES)}"
        )
    if rope_type not in SUPPORTED_TYPES:
        raise ConfigError(
            f"model.rope_scaling: rope_type {rope_type!r} is not supported{did_you_mean(rope_type, SUPPORTED_TYPES)}; "
            f"use {join_or(SUPPORTED_TYPES)}"
        )
    for key in scaling:
        if key not in RopeParameters.__annotations__:
            hint = did_you_mean(key, RopeParameters.__annotations__)
            raise ConfigError(f"model.rope_scaling: transformers has no RoPE parameter {key!r}{hint}")
    text.rope_parameters = {key: own[key] for key in KEPT_PARAMETERS if key in own} | dict(scaling)
    with _collected_warnings() as problems:
        try:
            text.standardize_rope_params()
            text.validate_rope()
        except (KeyError, ValueError, TypeError, ArithmeticError) as error:
            problems.append(first_line(error).strip('"'))
    if problems:
        raise ConfigError(f"model.rope_scaling: transformers rejects it: {problems[0]}")
    _check_used(config, rope_type)


def _own_rope(config: PretrainedConfig) -> dict[str, Any]:
    """Return the parameters of a model's rotary embeddings, which must be the same in all layers."""
    text = config.get_text_config()
    own: dict[str, Any] | None = getattr(text, "rope_parameters", None)
    if not own:
        raise ConfigError(
            f"model.rope_scaling: {text.model_type} has no rotary embeddings (RoPE) to scale; set it to null"
        )
    by_layer = [key for key, value in own.items() if isinstance(value, dict)]
    if by_layer:
        raise ConfigError(
            f"model.rope_scaling: {text.model_type} has its own rotary embeddings for each type of layer "
            f"({', '.join(by_layer)}), which one scaling cannot replace; set it to null"
        )
    return own


def _check_used(config: PretrainedConfig, rope_type: str) -> None:
    """Check that a model's code uses the RoPE type in its config: a few families ignore it."""
    from lora_accel.model.base import build_on_meta_device

    types = {module.rope_type for module in build_on_meta_device(config).modules() if hasattr(module, "rope_type")}
    if types != {rope_type}:
        model_type = config.get_text_config().model_type
        raise ConfigError(f"model.rope_scaling: the code of {model_type} does not support it; set it to null")


@contextlib.contextmanager
def _collected_warnings() -> Iterator[list[str]]:
    """Yield a list that collects the warnings of transformers' RoPE validation, which are not logged."""
    logger, messages = logging.getLogger("transformers.modeling_rope_utils"), []

    def collect(record: logging.LogRecord) -> bool:
        messages.append(record.getMessage())
        return False

    level = logger.level
    logger.setLevel(logging.WARNING)
    logger.addFilter(collect)
    try:
        yield messages
    finally:
        logger.removeFilter(collect)
        logger.setLevel(level)


def _rope_positions(config: PretrainedConfig) -> int | None:
    """Return the number of positions for which rotary embeddings were trained or scaled, as vLLM derives it."""
    rope, positions = getattr(config, "rope_parameters", None), getattr(config, "max_position_embeddings", None)
    if not rope or not positions:
        return None
    rope_type, factor = rope.get("rope_type"), rope.get("factor")
    if rope_type in EXTENDED_TYPES or not isinstance(factor, (int, float)):  # also: parameters for each type of layer
        return int(positions)
    original = rope.get("original_max_position_embeddings") or positions
    return max(int(positions), int(original * factor))


def _num_table_positions(config: PretrainedConfig) -> int | None:
    from lora_accel.model.base import build_on_meta_device

    if getattr(config, "auto_map", None):  # its code is not part of transformers
        return None
    return num_table_positions(build_on_meta_device(config))


def num_table_positions(model: torch.nn.Module) -> int | None:
    """Return the number of positions of a model with a table of positions; None = it has none."""
    config: Any = model.config
    if config.model_type in FIXED_POSITIONS:
        return int(getattr(config, FIXED_POSITIONS[config.model_type]))
    lengths = list(_table_lengths(model))
    return min(lengths) if lengths else None


def _table_lengths(model: torch.nn.Module) -> Iterator[int]:
    """Yield the usable rows of each table of positions of a model's text part."""
    import torch

    for path, module in model.named_modules():
        names = path.removesuffix(".original_module").removesuffix(".base_layer").split(".")  # PEFT's wrappers
        if any("vision" in name or "image" in name for name in names):
            continue
        if isinstance(module, torch.nn.Embedding) and POSITION_TABLE.search(names[-1]):
            # OPT, BART and BioGPT skip `offset` rows; RoBERTa's first position follows the padding token's id.
            unused = getattr(module, "offset", 0 if module.padding_idx is None else module.padding_idx + 1)
            yield module.num_embeddings - unused
        for leaf, buffer in module.named_buffers(recurse=False):
            if leaf == "embed_positions":  # GPT-J and CodeGen: a table of sines
                yield len(buffer)
