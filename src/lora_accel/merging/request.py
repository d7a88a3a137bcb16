"""The arguments of `lora-accel merge`, and the lines that it prints. Imports no torch."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lora_accel.errors import ConfigError
from lora_accel.saving.lineage import trained_quantized

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
USAGE = "lora-accel merge ADAPTER OUT"
ALL = "merged-all"
"""The folder in a run to which `--all` writes. Nothing else is written there; RUN/merged may be a merged adapter."""


class MergeRequest(NamedTuple):
    """What to merge, and where to write it."""

    adapters: list[tuple[str, float]]
    """Folder and weight of each; empty if `run` is set."""
    out: Path
    run: Path | None
    """A run: merge all of its checkpoints and its adapter, into `out`."""
    max_shard_bytes: int | None


def parse_merge(
    args: Sequence[str],
    weighted_adapters: Sequence[str],
    run: Path | None,
    lora_path: str | None,
    target_model_path: Path | None,
    max_shard_size: str | None,
) -> MergeRequest:
    """Parse ADAPTER OUT | --adapter A=0.7 --adapter B=0.3 OUT | --all RUN, or FastChat's option names.

    Args:
        args: positional arguments.
        weighted_adapters: values of `--adapter`, DIR=WEIGHT.
        run: `--all`.
        lora_path, target_model_path: FastChat's names of ADAPTER and OUT.
        max_shard_size: bytes with an optional unit, `5GB` for example.

    Raises:
        ConfigError: an argument is missing, given twice, or not a number.
    """
    max_shard_bytes = None if max_shard_size is None else _parse_size(max_shard_size)
    adapters = [_parse_weighted(arg) for arg in weighted_adapters]
    if run is not None:
        if args or adapters or lora_path or target_model_path:
            raise ConfigError(f"merge --all RUN: takes neither ADAPTER nor OUT; models are written to RUN/{ALL}/")
        return MergeRequest([], run / ALL, run, max_shard_bytes)
    remaining = list(args)
    if lora_path is not None:
        adapters.append((lora_path, 1.0))
    if not adapters and remaining:
        adapters.append((remaining.pop(0), 1.0))
    if target_model_path is not None:
        remaining.append(str(target_model_path))
    if not adapters:
        raise ConfigError(f"merge: ADAPTER is missing; use {USAGE}, or --all RUN")
    if len(remaining) != 1:
        problem = f"unexpected argument {remaining[1]!r}" if remaining else "OUT is missing"
        raise ConfigError(f"merge: {problem}; use {USAGE}, or --adapter A=0.7 --adapter B=0.3 OUT")
    return MergeRequest(adapters, Path(remaining[0]), None, max_shard_bytes)


def merge_lines(provenances: Sequence[dict[str, Any]], request: MergeRequest) -> list[str]:
    """Return the lines to print: where each merged model is, how it was verified, and what could not be checked.

    Args:
        provenances: of the merged models.
    """
    lines = []
    for provenance in provenances:
        merged = provenance["merged"]
        out = request.out if request.run is None else request.out / Path(merged["adapter"]).name
        agreement = merged["agreement"]
        if provenance.get("already"):
            lines.append(f"already merged: {out}")
            continue
        if agreement is None:
            verification = "not compared with base + adapter: --no-verify, or not enough memory"
        else:
            verification = (
                f"logits differ by {agreement['mean_moved']:.2g} standard deviations on average, "
                f"limit {agreement['limit']:.2g}; "
                f"same top token at {agreement['top1']:.1%} of {agreement['num_tokens']} positions"
            )
        lines.append(f"merged: {out} ({verification})")
        if not merged.get("has_tokenizer", True):
            lines.append("note: neither the adapter nor the base has a tokenizer, so the merged model has none")
        if tokens := merged.get("tokens_without_embedding"):
            named = f"{', '.join(map(repr, tokens[:3]))}{', …' if len(tokens) > 3 else ''}"
            lines.append(
                f"note: the model has no embedding for {len(tokens):,} token(s) of its tokenizer ({named}): a prompt "
                "that contains one fails, and so does padding with it; set another pad_token in tokenizer_config.json"
            )
        if merged["same_base"] is None:
            lines.append("note: the adapter has no hashes of its base: only names and shapes were checked")
        elif not merged["same_base"] and trained_quantized(provenance.get("adapter")):
            lines.append(
                f"note: the adapter was trained on quantized weights; whether {merged['base']} is the same model in 16 "
                "or 32 bits was not checked (only names and shapes)"
            )
        elif not merged["same_base"]:
            lines.append(f"note: --force: {merged['base']} is not the base that the adapter was trained on")
        with contextlib.suppress(KeyError, TypeError):  # provenance.json is untrusted
            if provenance["adapter"]["config"]["quantization"]["bits"] == 4 and merged["base_weights"] == "original":
                lines.append("note: trained on 4-bit weights; --base-weights dequantized merges into those instead")
    return lines


def _parse_weighted(arg: str) -> tuple[str, float]:
    folder, equals, weight = arg.rpartition("=")
    if not equals:
        return arg, 1.0
    try:
        number = float(weight)
    except ValueError:
        number = math.nan
    if not math.isfinite(number) or not folder:
        raise ConfigError(f"--adapter {arg}: expected DIR=WEIGHT with a finite weight, such as 0.7")
    return folder, number


def _parse_size(size: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMGT]?i?B?)", size.strip(), flags=re.IGNORECASE)
    unit = match and match[2].upper()
    if match is None or unit not in UNITS or float(match[1]) * UNITS[unit] < 1:
        raise ConfigError(f"--max-shard-size {size}: expected a size such as 5GB or 500MB")
    return int(float(match[1]) * UNITS[unit])
