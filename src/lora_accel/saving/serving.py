"""Whether a server that knows only plain LoRA, W + alpha / r * B A, answers as an adapter does; what to do if not."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from peft.utils.other import get_pattern_key

from lora_accel.config.adapter_options import BASE_PRESERVING_INITS
from lora_accel.saving.names import PREFIX

VLLM_RANKS = (16, 32, 64, 128, 256, 320, 512)
"""The values of vLLM's `--max-lora-rank` from its default on."""
OPTIONS = {
    "use_dora": "DoRA",
    "kasa_config": "KaSA",
    "use_bdlora": "BD-LoRA",
    "use_qalora": "QA-LoRA",
    "arrow_config": "Arrow",
    "target_parameters": "target_parameters",
    "modules_to_save": "modules_to_save",
    "trainable_token_indices": "trained tokens",
}
"""Option of a PEFT config that no server would notice -> its name in a message."""
NEVER_MERGED = {
    "alora_invocation_tokens": ("aLoRA", "it changes only the tokens from its invocation on"),
    "layer_replication": ("an adapter of replicated layers", "several layers share one weight of the base"),
    "monteclora_config": ("MonteCLoRA", "it samples its weights"),
}
"""Option -> name, and why base and adapter are not the sum of two weights, which could be merged."""
TENSORS = {
    "lora_magnitude_vector": "DoRA",
    "lora_diag": "KaSA",
    "lora_embedding_A": "LoRA on embeddings",
    "lora_embedding_B": "LoRA on embeddings",
    "trainable_tokens_delta": "trained tokens",
}
"""Part of a tensor's name -> what it belongs to. More parts are handled in `_of_tensor`."""


def serving_note(
    config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]], model: Mapping[str, Any] | None = None
) -> str:
    """Return how to serve an adapter with vLLM: directly, or after merging.

    Of the config vLLM reads r, lora_alpha and use_rslora, and of the file the matrices A and B (its checks, as of
    2026-11: https://docs.vllm.ai/en/latest/api/vllm/lora/peft_helper/). It rejects some other options and ignores the
    rest, and then its answers are wrong.

    Args:
        config: the PEFT config with which the adapter is saved.
        shapes: of the adapter's tensors by their names in the file.
        model: the section `model` of the run config; None = unknown.
    """
    never = [name for option, (name, _) in NEVER_MERGED.items() if config.get(option)]
    if never:
        return f"vLLM does not support {', '.join(never)}, and it cannot be merged; use base and adapter with PEFT"
    unsupported, rank = differences_from_plain_lora(config, shapes), max_rank(config, shapes)
    model = model or {}
    if model.get("rope_scaling"):
        unsupported.append("RoPE scaling that the base's config.json lacks")
    if model.get("add_tokens"):
        unsupported.append("added tokens")
    if rank > VLLM_RANKS[-1]:
        unsupported.append(f"ranks over {VLLM_RANKS[-1]}")
    if unsupported:
        return f"merge the adapter first: vLLM does not support {', '.join(unsupported)}"
    option = "" if rank <= VLLM_RANKS[0] else f" --max-lora-rank {next(size for size in VLLM_RANKS if size >= rank)}"
    return f"vLLM can load this adapter directly: vllm serve BASE --enable-lora{option} --lora-modules NAME=DIR"


def differences_from_plain_lora(config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> list[str]:
    """Return what makes an adapter differ from W + s B A, with s = alpha / r, or alpha / sqrt(r) with use_rslora.

    Args:
        config, shapes: see `serving_note`.

    Returns:
        Names for messages, none twice; empty if the adapter is plain LoRA.
    """
    found = [name for option, (name, _) in NEVER_MERGED.items() if config.get(option)]
    found += [name for option, name in OPTIONS.items() if config.get(option)]
    if config.get("bias", "none") != "none":  # servers reject the option even if the model has no biases
        found.append("biases")
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init not in BASE_PRESERVING_INITS:
        found.append(f"init_lora_weights={init}, which changed the base's weights")
    found += _of_patterns(config, shapes)
    found += [name for key in shapes if (name := _of_tensor(key))]
    return list(dict.fromkeys(found))


def max_rank(config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> int:
    """Return the largest rank of an adapter's matrices."""
    rank: int = config["r"]
    return max([rank, *(shapes[key][0] for key in shapes if key.endswith(".lora_A.weight"))])


def _of_patterns(config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> Iterable[str]:
    """Yield the patterns because of which the scaling of a module is not the one that r and lora_alpha give."""
    rank, alpha = config["r"], config["lora_alpha"]
    alphas, power = config.get("alpha_pattern") or {}, 0.5 if config.get("use_rslora") else 1
    for key, shape in shapes.items():
        if not key.endswith(".lora_A.weight") or "experts" in key.split("."):
            continue
        module = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        own_alpha = alphas.get(get_pattern_key(alphas.keys(), module), alpha)
        if not math.isclose(own_alpha / shape[0] ** power, alpha / rank**power, rel_tol=1e-9):
            yield "alpha_pattern" if shape[0] == rank else "rank_pattern"


def _of_tensor(key: str) -> str | None:
    """Return what a tensor belongs to, by its name in the file; None = it is A or B of a layer that is no expert."""
    parts = key.split(".")
    if key.endswith((".lora_A.weight", ".lora_B.weight")):
        return "LoRA on experts" if "experts" in parts else None
    if key.endswith(".lora_B.bias"):
        return "lora_bias"
    if name := next((name for part, name in TENSORS.items() if part in parts), None):
        return name
    return "biases" if parts[-1] == "bias" else "modules_to_save"
