"""What `lora-accel merge` was asked for, and what it tells of its work. Imports no torch."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lora_accel.errors import ConfigError

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class MergeRequest(NamedTuple):
    """What is merged, and where to."""

    adapters: list[tuple[str, float]]
    """Folder and weight of each."""
    out: Path
    run: Path | None
    """A run of which everything is merged; then there are no adapters."""
    max_shard_bytes: int | None


def parse_merge(
    words: Sequence[str],
    weighted: Sequence[str],
    run: Path | None,
    lora_path: str | None,
    target_model_path: Path | None,
    max_shard_size: str | None,
) -> MergeRequest:
    """Bring the ways to say it together: ADAPTER OUT | --adapter A=0.7 --adapter B=0.3 OUT | --all RUN | FastChat's.

    Raises:
        ConfigError: something is missing, said twice, or no number.
    """
    size = None if max_shard_size is None else _bytes(max_shard_size)
    adapters = [_weighted(word) for word in weighted]
    if run is not None:
        if words or adapters or lora_path or target_model_path:
            raise ConfigError("merge --all RUN: takes neither ADAPTER nor OUT; models are made in RUN/merged/")
        return MergeRequest([], run / "merged", run, size)
    left = list(words)
    if lora_path is not None:
        adapters.append((lora_path, 1.0))
    if not adapters and left:
        adapters.append((left.pop(0), 1.0))
    if target_model_path is not None:
        left.append(str(target_model_path))
    if not adapters:
        raise ConfigError("merge: ADAPTER is missing; say lora-accel merge ADAPTER OUT, or --all RUN")
    if len(left) != 1:
        told = "OUT is missing" if not left else f"{left[1]!r} is one word too many"
        raise ConfigError(f"merge: {told}; say lora-accel merge ADAPTER OUT, or --adapter A=0.7 --adapter B=0.3 OUT")
    return MergeRequest(adapters, Path(left[0]), None, size)


def merge_lines(made: Sequence[dict[str, Any]], asked: MergeRequest) -> list[str]:
    """Return what is told of merged models: where each is, how near it is to base + adapter, what was not checked."""
    lines = []
    for provenance in made:
        merged = provenance["merged"]
        out = asked.out if asked.run is None else asked.out / Path(merged["adapter"]).name
        agreement = merged["agreement"]
        if provenance.get("already"):
            lines.append(f"merged already: {out}")
            continue
        if agreement is None:
            told = "not compared with base + adapter: --no-verify, or too little memory for it"
        else:
            told = (
                f"logits moved by {agreement['mean_moved']:.2g} of their spread on average, "
                f"limit {agreement['limit']:.2g}; "
                f"same first choice for {agreement['top1']:.1%} of {agreement['num_tokens']} tokens"
            )
        lines.append(f"merged: {out} ({told})")
        if merged["same_base"] is None:
            lines.append("note: the adapter tells nothing of its base: only names and shapes could be checked")
        elif not merged["same_base"]:
            lines.append(f"note: forced: {merged['base']} is not the base that the adapter was trained on")
        with contextlib.suppress(KeyError, TypeError):  # a stranger's provenance
            if provenance["adapter"]["config"]["quantization"]["bits"] == 4 and merged["base_weights"] == "original":
                lines.append("note: it was trained on 4-bit weights; --base-weights dequantized is nearer to these")
    return lines


def _weighted(word: str) -> tuple[str, float]:
    folder, equals, weight = word.rpartition("=")
    if not equals:
        return word, 1.0
    try:
        number = float(weight)
    except ValueError:
        number = math.nan
    if not math.isfinite(number) or not folder:
        raise ConfigError(f"--adapter {word}: say DIR=WEIGHT, 0.7 for instance")
    return folder, number


def _bytes(size: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMGT]?i?B?)", size.strip(), flags=re.IGNORECASE)
    unit = match and match[2].upper()
    if match is None or unit not in UNITS or float(match[1]) * UNITS[unit] < 1:
        raise ConfigError(f"--max-shard-size {size}: say 5GB or 500MB, for instance")
    return int(float(match[1]) * UNITS[unit])
