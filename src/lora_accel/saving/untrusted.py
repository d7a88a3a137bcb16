"""What a folder from a stranger may ask for. An adapter is data: it may not take the machine's memory, time or code."""

from __future__ import annotations

import json
import math
import pickle
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from lora_accel.errors import ArtifactError
from lora_accel.saving.atomic import read_json

MAX_CONFIG_BYTES = 1_000_000
MAX_RANK = 1024
MAX_LAYERS = 1024
PATTERN_SECONDS = 10
"""A pattern that needs longer for a model's module names is built to hang."""
MATCH = """
import json, re, sys
patterns, names = json.load(sys.stdin)
for pattern in patterns:
    for name in names:
        re.fullmatch(pattern, name)
        re.match(rf"(.*\\.)?({pattern})$", name)
        re.match(rf".*\\.{pattern}\\.(\\d+)\\.", name)
"""
"""The three ways in which PEFT 0.21 matches a pattern with a module's name."""


def check_untrusted_config(path: Path, module_names: Iterable[str]) -> None:
    """Refuse an adapter_config.json that asks for anything but a LoRA of ordinary size.

    Args:
        module_names: of the base, which patterns will be matched with.

    Raises:
        ArtifactError: it is no LoRA config, or something in it is out of bounds; the message names the key.
    """
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise ArtifactError(f"{path}: over {MAX_CONFIG_BYTES:,} bytes; is this an adapter's config?")
    config = read_json(path)

    def refuse(key: str, why: str) -> None:
        raise ArtifactError(f"{path}: {key}={str(config.get(key))[:60]!r} {why}")

    if config.get("peft_type") != "LORA":
        refuse("peft_type", "is not LORA, the only kind that is read here")
    ranks = config.get("rank_pattern") or {}
    alphas = config.get("alpha_pattern") or {}
    for key, table in (("rank_pattern", ranks), ("alpha_pattern", alphas)):
        if not isinstance(table, dict):
            refuse(key, "should be an object")
    if not all(type(r) is int and 1 <= r <= MAX_RANK for r in (config.get("r", 8), *ranks.values())):
        refuse("rank_pattern" if ranks else "r", f"is no rank from 1 to {MAX_RANK}")
    if not all(_is_number(alpha) for alpha in (config.get("lora_alpha", 8), *alphas.values())):
        refuse("alpha_pattern" if alphas else "lora_alpha", "is no finite number")
    if config.get("megatron_config") is not None:
        refuse("megatron_config", "would import a module that the adapter names")
    replication = config.get("layer_replication")
    if replication is not None and not _is_small(replication):
        refuse("layer_replication", f"is no list of [first, end] of at most {MAX_LAYERS} layers")

    patterns = [*ranks, *alphas]
    for key in ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save"):
        value = config.get(key)
        names = [value] if isinstance(value, str) else value or []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            refuse(key, "is neither a pattern nor a list of names")
        if isinstance(value, str) or key == "layers_pattern":
            patterns += names
    _match_in_time(path, [p for p in patterns if re.escape(p) != p], module_names)


def _match_in_time(path: Path, patterns: Sequence[str], names: Iterable[str]) -> None:
    """Match in a process of its own: Python's matching cannot be interrupted from without."""
    if not patterns:
        return
    for pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise ArtifactError(f"{path}: {pattern[:60]!r} is no pattern: {error}") from None
    try:
        subprocess.run(
            [sys.executable, "-I", "-c", MATCH],
            input=json.dumps([patterns, list(names)]),
            text=True,
            capture_output=True,
            timeout=PATTERN_SECONDS,
            check=True,
        )
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError):
        raise ArtifactError(
            f"{path}: matching its patterns ({patterns[0][:60]!r} …) with the base's modules takes over "
            f"{PATTERN_SECONDS} seconds; give a list of names in target_modules"
        ) from None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_small(replication: Any) -> bool:
    if not isinstance(replication, list):
        return False
    if not all(isinstance(s, list) and len(s) == 2 and all(type(n) is int and n >= 0 for n in s) for s in replication):
        return False
    num_layers = sum(max(0, int(end) - int(first)) for first, end in replication)
    return 0 < num_layers <= MAX_LAYERS


def read_pickle(file: Path) -> dict[str, torch.Tensor]:
    """Read a file of torch.save that holds tensors by name and nothing else.

    Raises:
        ArtifactError: it holds anything else, code for instance, which is not run.
    """
    try:
        try:
            tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # written before torch 1.6: cannot be mapped
            tensors = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ArtifactError(f"{file}: holds more than tensors; code in a pickle is not run, so it is refused") from None
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, AttributeError, TypeError, IndexError) as error:
        raise ArtifactError(f"{file}: cannot be read: {str(error).strip().splitlines()[:1]}") from None
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in tensors.items()
    ):
        raise ArtifactError(f"{file}: should hold tensors by their names")
    return dict(tensors)
