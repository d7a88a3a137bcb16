"""The sizes in a model's config.json: rows of the embeddings and number of positions. No weights are read.

torch and transformers are imported inside functions: the plan of a run needs the sizes and no model.
"""

from __future__ import annotations

import contextlib
import logging
import math
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from lora_accel.config.schema import ModelSection
from lora_accel.errors import ArtifactError, ConfigError, did_you_mean, first_line, join_or
from lora_accel.model.json_files import read_object
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


LAYER_KEYS = frozenset({"num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"})
SIZE_KEYS = frozenset(
    {
        *("vocab_size", "hidden_size", "n_embd", "d_model", "intermediate_size", "ffn_dim", "n_inner"),
        *("num_attention_heads", "n_head", "n_heads", "num_key_value_heads", "max_position_embeddings"),
        *("n_positions", "n_ctx", "word_embed_proj_dim"),
    }
)
"""Keys of config.json with a size, in the names of all families."""
EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts")
ROPE_KEYS = ("rope_parameters", "rope_scaling")
MAX_LAYERS = 1_000
MAX_SIZE = 2**31 - 1
MAX_EXPERTS = 1_000_000
"""Experts of all layers. The largest models have 30,000, and one with tiny experts 500,000."""


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
    name = section.name_or_path
    check_config(read_config_file(section) or {}, name)  # before transformers, which builds lists of that many layers
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(
            section.name_or_path, revision=section.revision, trust_remote_code=section.trust_remote_code
        )
    except Exception as error:  # an invalid config raises many types
        raise ArtifactError(load_error_message(section, "config", error)) from None
    check_config(config.to_dict(), name)
    if section.rope_scaling is not None:
        scale_rope(config, section.rope_scaling)
    return config


def read_config_file(section: ModelSection) -> dict[str, Any] | None:
    """Return the content of a model's config.json; None if it is not on this machine, or is not an object."""
    return read_object(local_file(section, "config.json"))


def check_config(config: Mapping[str, Any], name: str) -> None:
    """Check that the numbers of a config.json are those of a model, before anything of their size is made.

    The sizes of the weights are compared with the weight files later.

    Args:
        config: the content of config.json.
        name: of the model, for messages.

    Raises:
        ArtifactError: one is not; the message names the key.
    """
    for part in (config, config.get("text_config")):
        if not isinstance(part, Mapping):
            continue
        for parameters in (part, *(x for k in ROPE_KEYS for x in _rope_parameters(part.get(k)))):
            for key, value in parameters.items():
                for number in value if isinstance(value, (list, tuple)) and len(value) <= MAX_LAYERS else (value,):
                    if problem := _number_problem(str(key), number):
                        raise ArtifactError(f"{name}: config.json: {key}={str(number)[:40]} {problem}")
        heads, groups = part.get("num_attention_heads"), part.get("num_key_value_heads")
        if type(heads) is int and type(groups) is int and heads % groups:
            raise ArtifactError(
                f"{name}: config.json: num_attention_heads={heads} is not a multiple of num_key_value_heads={groups}"
            )
        layers = max((v for k in LAYER_KEYS if type(v := part.get(k)) is int), default=1)
        experts = max((v for k in EXPERT_KEYS if type(v := part.get(k)) is int), default=1)
        per_token = part.get("num_experts_per_tok")
        if layers * experts > MAX_EXPERTS:
            raise ArtifactError(
                f"{name}: config.json: {layers:,} layers of {experts:,} experts are more than any model has"
            )
        if type(per_token) is int and experts > 1 and not 1 <= per_token <= experts:
            raise ArtifactError(f"{name}: config.json: num_experts_per_tok={per_token} is not 1 to {experts}")


def _number_problem(key: str, value: Any) -> str:
    """Return what is wrong with a number of a config.json; empty if nothing is."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return ""
    is_integer = isinstance(value, int) or value.is_integer()
    if key in LAYER_KEYS and value > MAX_LAYERS:
        return f"is more than any model has (at most {MAX_LAYERS:,} layers)"
    if key in SIZE_KEYS and value > MAX_SIZE:
        return f"is more than any model has (at most {MAX_SIZE:,})"
    if key in SIZE_KEYS or key in LAYER_KEYS:
        return "" if value >= 1 and is_integer else "should be an integer of at least 1"
    if key in EXPERT_KEYS or key == "head_dim":
        if value > MAX_SIZE:
            return f"is more than any model has (at most {MAX_SIZE:,})"
        return "" if value >= 0 and is_integer else "should be an integer of at least 0"
    if key.endswith(("dropout", "_pdrop")):
        return "" if 0 <= value <= 1 else "should be from 0 to 1"
    if key in ("rope_theta", "rotary_emb_base", "factor"):
        return "" if 0 < value < math.inf else "should be a positive number"
    if key == "partial_rotary_factor":
        return "" if 0 < value <= 1 else "should be a factor of at most 1"
    if key.endswith(("norm_eps", "norm_epsilon")):
        return "" if 0 <= value < math.inf else "should be a positive number"
    return ""


def unknown_name(config: PretrainedConfig) -> str:
    """Return which function that a config names transformers lacks, to explain why no model can be built; or empty."""
    from transformers.activations import ACT2FN
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    text = config.get_text_config()
    for key in ("hidden_act", "hidden_activation", "activation_function"):
        value = getattr(text, key, None)
        if isinstance(value, str) and value not in ACT2FN:
            return f"{key}={value!r} is not an activation function of transformers{did_you_mean(value, ACT2FN)}"
    for parameters in _rope_parameters(getattr(text, "rope_parameters", None)):
        rope_type = str(parameters.get("rope_type", "default"))
        if rope_type not in ("default", *ROPE_INIT_FUNCTIONS):
            hint = did_you_mean(rope_type, ROPE_INIT_FUNCTIONS)
            return f"rope_type={rope_type!r} is not a type of rotary embeddings of transformers{hint}"
    return ""


def _rope_parameters(rope: Any) -> list[Mapping[str, Any]]:
    """Return the parameters of rotary embeddings in a config: one mapping, or also one for each type of layer."""
    if not isinstance(rope, Mapping):
        return []
    return [rope, *(value for value in rope.values() if isinstance(value, Mapping))]


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
    config = read_config_file(section)
    if config is None or section.rope_scaling is not None:
        return None
    check_config(config, section.name_or_path)
    rope = config.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        return None
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
