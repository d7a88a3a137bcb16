"""Checks of untrusted adapters: loading one must not run code, exhaust memory or hang."""

from __future__ import annotations

import json
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lora_accel.errors import ArtifactError, first_line
from lora_accel.saving.atomic import read_json

MAX_CONFIG_BYTES = 1_000_000
MAX_RANK = 1024
MAX_LAYERS = 1024
PATTERN_SECONDS = 10
"""Limit for matching all patterns with the module names; some regular expressions take exponential time."""
MATCH_PROGRAM = """
import json, re, sys
patterns, names = json.load(sys.stdin)
for pattern in patterns:
    for name in names:
        re.fullmatch(pattern, name)
        re.match(rf"(.*\\.)?({pattern})$", name)
        re.match(rf".*\\.{pattern}\\.(\\d+)\\.", name)
"""
"""Program that matches patterns with module names in the three ways that PEFT 0.21 does."""


def check_untrusted_config(path: Path, module_names: Iterable[str]) -> None:
    """Check that an adapter_config.json describes a LoRA of ordinary size.

    Args:
        module_names: of the base; PEFT matches the config's patterns with them.

    Raises:
        ArtifactError: it is not a LoRA config, or a value is not allowed; the message names the key.
    """
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise ArtifactError(f"{path}: over {MAX_CONFIG_BYTES:,} bytes; is this an adapter's config?")
    config = read_json(path)
    for key, is_allowed, problem in CHECKS:
        if not is_allowed(config.get(key, DEFAULTS.get(key))):
            raise ArtifactError(f"{path}: {key}={str(config.get(key))[:60]!r} {problem}")
    _check_patterns(path, _patterns(config), module_names)


def _is_object(value: Any) -> bool:
    return isinstance(value or {}, dict)


def _is_rank(value: Any) -> bool:
    return type(value) is int and 1 <= value <= MAX_RANK


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_layer_list(value: Any) -> bool:
    if value is None:
        return True
    if not isinstance(value, list):
        return False
    if not all(isinstance(s, list) and len(s) == 2 and all(type(n) is int and n >= 0 for n in s) for s in value):
        return False
    num_layers = sum(max(0, int(end) - int(first)) for first, end in value)
    return 0 < num_layers <= MAX_LAYERS


def _is_module_list(value: Any) -> bool:
    names = value or []
    return isinstance(names, str) or (isinstance(names, list) and all(isinstance(name, str) for name in names))


MODULE_KEYS = ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save")
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
    ("megatron_config", lambda value: value is None, "would import a module that the adapter names"),
    ("layer_replication", _is_layer_list, f"is not a list of [first, end] of at most {MAX_LAYERS} layers"),
    *((key, _is_module_list, "is neither a pattern nor a list of names") for key in MODULE_KEYS),
)
"""(key, check of its value, message if the check fails)."""


def _patterns(config: Mapping[str, Any]) -> list[str]:
    """Return the regular expressions of a config. Plain names are not among them."""
    patterns = [*(config.get("rank_pattern") or {}), *(config.get("alpha_pattern") or {})]
    for key in MODULE_KEYS:
        value = config.get(key) or []
        if isinstance(value, str):
            patterns.append(value)
        elif key == "layers_pattern":
            patterns += value
    return [pattern for pattern in patterns if re.escape(pattern) != pattern]


def _check_patterns(path: Path, patterns: Sequence[str], module_names: Iterable[str]) -> None:
    """Check that patterns compile, and match in time. A subprocess matches them: Python cannot interrupt a match."""
    if not patterns:
        return
    for pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise ArtifactError(f"{path}: {pattern[:60]!r} is not a valid pattern: {error}") from None
    try:
        subprocess.run(
            [sys.executable, "-I", "-c", MATCH_PROGRAM],
            input=json.dumps([patterns, list(module_names)]),
            text=True,
            capture_output=True,
            timeout=PATTERN_SECONDS,
            check=True,
        )
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError):
        raise ArtifactError(
            f"{path}: matching its patterns ({patterns[0][:60]!r} …) with the base's modules takes over "
            f"{PATTERN_SECONDS} seconds; set target_modules to a list of names"
        ) from None


def read_pickle(file: Path) -> dict[str, torch.Tensor]:
    """Read a file that torch.save wrote from a dict of tensors, without running code in it.

    Raises:
        ArtifactError: it cannot be read, or contains anything but tensors by name.
    """
    try:
        try:
            tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # the format before torch 1.6 cannot be memory-mapped
            tensors = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ArtifactError(f"{file}: contains more than tensors; code in a pickle is not run") from None
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, AttributeError, TypeError, IndexError) as error:
        reason = first_line(error)
        raise ArtifactError(f"{file}: cannot be read: {reason}") from None
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in tensors.items()
    ):
        raise ArtifactError(f"{file}: should contain a dict of tensors by name")
    return dict(tensors)
