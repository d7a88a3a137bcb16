"""Limits on an adapter_config.json of unknown origin: its types and sizes, and in a process with limits its patterns.

They are checked before anything is computed from it.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_accel.errors import ArtifactError
from lora_accel.logs import logger
from lora_accel.sandbox import check_patterns
from lora_accel.saving.atomic import read_json

MAX_CONFIG_BYTES = 1_000_000
MAX_RANK = 1024
MAX_NAMES = 1000
"""Names or patterns in one option. A base with more modules than this allows as many as it has modules."""
MAX_PATTERN_LENGTH = 20_000
PLAIN_NAME = re.compile(r"\^?[\w.-]+\$?")
"""A pattern without repetition, such as a module's name in rank_pattern: always valid, and matched in time."""
MAX_REPLICATION = 4
"""Layers of `layer_replication`, as a multiple of the base's layers."""
MAX_LAYERS = 1024
"""Limit of `layer_replication` where the base is not known yet."""


def check_untrusted_config(path: Path, module_names: Iterable[str]) -> None:
    """Check that an adapter_config.json describes a LoRA of ordinary size.

    Args:
        module_names: of the base; PEFT matches the config's patterns with them. Empty = the base is not known yet.

    Raises:
        ArtifactError: it is not a LoRA config, or a value is not allowed; the message names the key.
    """
    config, names = _read_config(path), list(module_names)
    for key, is_allowed, problem in CHECKS:
        if not is_allowed(config.get(key, DEFAULTS.get(key))):
            raise ArtifactError(f"{path}: {key}={_short(config.get(key))} {problem}")
    _check_sizes(path, config, names)
    _check_patterns(path, _patterns(config), names)


def check_known_options(path: Path, *, force: bool = False, way_out: str = "pass --force") -> None:
    """Check that the installed PEFT knows every option that is set in an adapter_config.json.

    PEFT ignores the others with a warning, but they may change what the adapter computes.

    Args:
        force: whether to ignore them, with a note.
        way_out: how to set `force`, for messages.

    Raises:
        ArtifactError: it does not, and `force` is False.
    """
    from peft import LoraConfig  # takes seconds, and only this function needs it

    known = {field.name for field in dataclasses.fields(LoraConfig)}
    config = _read_config(path)
    # null, false, 0 and empty values are those of an option that is not used.
    unknown = [f"{key}={_short(value)}" for key, value in sorted(config.items()) if key not in known and value]
    if unknown and force:
        option = way_out.removeprefix("pass ").removeprefix("set ")
        _note_ignored(f"{path}: {option}: ignored {', '.join(unknown[:5])}, which the installed PEFT does not know")
    elif unknown:
        version = config.get("peft_version")
        saved_by = f" (saved by PEFT {version})" if isinstance(version, str) else ""
        raise ArtifactError(
            f"{path}: {', '.join(unknown[:5])}: the installed PEFT does not know this option{saved_by}, and without it "
            f"the adapter may compute something else; upgrade peft, or {way_out} to ignore the option"
        )


@functools.cache
def _note_ignored(note: str) -> None:
    """Log a note once: an adapter is checked before its base is loaded, and again when it is added."""
    logger.warning(note)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        size = path.stat().st_size if path.is_file() else 0  # a pipe would never end; read_json names what is missing
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read: {error.strerror}") from None
    if size > MAX_CONFIG_BYTES:
        raise ArtifactError(f"{path}: over {MAX_CONFIG_BYTES:,} bytes; is this an adapter's config?")
    if path.exists() and not path.is_file():
        raise ArtifactError(f"{path}: is not a file")
    return read_json(path)


def _short(value: Any) -> str:
    """Return a value as text of at most 60 characters. An integer of 400 digits is not converted to decimal."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > 10**60:
        return f"an integer of {value.bit_length()} bits"
    return repr(value)[:60]


def _is_object(value: Any) -> bool:
    return isinstance(value or {}, dict)


def _is_flag(value: Any) -> bool:
    return value is None or isinstance(value, bool)


def _is_rank(value: Any) -> bool:
    return type(value) is int and 1 <= value <= MAX_RANK


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_probability(value: Any) -> bool:
    return value is None or (_is_number(value) and 0 <= value <= 1)


def _is_index_list(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**31 for n in value)


def _is_layer_choice(value: Any) -> bool:
    return value is None or _is_index_list([value] if type(value) is int else value)


def _is_token_choice(value: Any) -> bool:
    lists = list(value.values()) if isinstance(value, dict) else [[] if value is None else value]
    return all(_is_index_list(tokens) for tokens in lists)


def _is_layer_list(value: Any) -> bool:
    if value is None:
        return True
    if not isinstance(value, list):
        return False
    if not all(isinstance(s, list) and len(s) == 2 and all(type(n) is int and n >= 0 for n in s) for s in value):
        return False
    return 0 < _num_replicated(value) <= MAX_LAYERS


def _num_replicated(value: list[list[int]]) -> int:
    return sum(max(0, end - first) for first, end in value)


def _is_module_list(value: Any) -> bool:
    names = value or []
    return isinstance(names, str) or (isinstance(names, list) and all(isinstance(name, str) for name in names))


MODULE_KEYS = ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save", "target_parameters")
PATTERN_KEYS = ("rank_pattern", "alpha_pattern")
FLAGS = (
    "ensure_weight_tying",
    "fan_in_fan_out",
    "inference_mode",
    "lora_bias",
    "use_dora",
    "use_qalora",
    "use_rslora",
)
DEFAULTS = {"r": 8, "lora_alpha": 8}
_RANK = f"is not a rank from 1 to {MAX_RANK}"
CHECKS: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("peft_type", lambda value: value == "LORA", "is not LORA, the only supported type"),
    ("rank_pattern", _is_object, "should be an object"),
    ("alpha_pattern", _is_object, "should be an object"),
    ("r", _is_rank, _RANK),
    ("rank_pattern", lambda value: all(map(_is_rank, (value or {}).values())), _RANK),
    ("lora_alpha", _is_number, "is not a finite number"),
    ("alpha_pattern", lambda value: all(map(_is_number, (value or {}).values())), "is not a finite number"),
    ("lora_dropout", _is_probability, "is not a number from 0 to 1"),
    ("bias", lambda value: value in (None, "none", "all", "lora_only"), "is not none, all or lora_only"),
    (
        "init_lora_weights",
        lambda value: _is_flag(value) or isinstance(value, str),
        "is neither a name nor true or false",
    ),
    ("megatron_config", lambda value: value is None, "would import a module that the adapter names"),
    ("layer_replication", _is_layer_list, f"is not a list of [first, end] of at most {MAX_LAYERS} layers"),
    ("layers_to_transform", _is_layer_choice, "is neither a layer's number nor a list of them"),
    ("trainable_token_indices", _is_token_choice, "is neither a list of token ids nor one for each module"),
    *((key, _is_module_list, "is neither a pattern nor a list of names") for key in MODULE_KEYS),
    *((key, _is_flag, "is not true or false") for key in FLAGS),
)
"""(key, check of its value, message if the check fails). Whatever reads these options later relies on their types."""


def _check_sizes(path: Path, config: Mapping[str, Any], module_names: Sequence[str]) -> None:
    """Check that a config names no more modules and layers than its base has, before PEFT tries each."""
    limit = max(MAX_NAMES, len(module_names))
    for key in (*MODULE_KEYS, *PATTERN_KEYS):
        value = config.get(key) or []
        if not isinstance(value, str) and len(value) > limit:
            raise ArtifactError(f"{path}: {key} has {len(value):,} entries, more than the base has modules")
    num_layers = len({name for name in module_names if re.fullmatch(r".*\.\d+", name)})
    replication = config.get("layer_replication")
    if replication and num_layers and _num_replicated(replication) > MAX_REPLICATION * num_layers:
        raise ArtifactError(
            f"{path}: layer_replication makes {_num_replicated(replication):,} layers, more than {MAX_REPLICATION} "
            f"times the base's {num_layers}"
        )


def _patterns(config: Mapping[str, Any]) -> list[str]:
    """Return the regular expressions of a config. Plain names are not among them."""
    patterns = [pattern for key in PATTERN_KEYS for pattern in config.get(key) or {}]
    for key in MODULE_KEYS:
        value = config.get(key) or []
        if isinstance(value, str):
            patterns.append(value)
        elif key == "layers_pattern":
            patterns += value
    return [pattern for pattern in patterns if not PLAIN_NAME.fullmatch(pattern)]


def _check_patterns(path: Path, patterns: Sequence[str], module_names: Sequence[str]) -> None:
    """Check that patterns are valid, and match in time."""
    longest = max(patterns, key=len, default="")
    if len(longest) > MAX_PATTERN_LENGTH:
        raise ArtifactError(f"{path}: {longest[:60]!r} … is a pattern of over {MAX_PATTERN_LENGTH:,} characters")
    check_patterns(str(path), patterns, module_names)
