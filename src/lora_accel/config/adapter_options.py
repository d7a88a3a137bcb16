"""Which options of PEFT's LoraConfig a run supports. A run must not train what cannot be used afterwards."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

PLAIN_INITS = ("gaussian", "orthogonal", "mica")
"""Values of init_lora_weights, besides true and false, that leave the base's weights unchanged. A run supports them."""
BASE_PRESERVING_INITS = (*PLAIN_INITS, "eva")
"""Values that leave them unchanged, also those of adapters that other tools trained."""
REPEATABLE_INITS = ("pissa", "olora")
"""Values that change them, as a function of the weights alone: PEFT repeats the change when it attaches the adapter."""
SUBTRACTED_INITS = re.compile(r"pissa|pissa_niter_\d{1,4}|olora")
"""Values whose initial adapter is not zero. PEFT subtracts it from the base's weights; a run subtracts it by a second
adapter, which is frozen (model/initial_adapter.py)."""
_NO_DATA = "needs {} before training starts, which a run does not compute"
UNSUPPORTED_INITS = {
    "eva": _NO_DATA.format("activations of training data"),
    "corda": _NO_DATA.format("activations of training data"),
    "lora_ga": _NO_DATA.format("gradients of training data"),
    "loftq": "replaces the base's weights by others, so the adapter would fit no base that you have; to train on a "
    "quantized base set quantization.bits=4",
}
"""Value of init_lora_weights -> why it is not supported."""
UNSUPPORTED_OPTIONS = {
    "arrow_config": "routes between existing adapters, which a run does not load",
    "corda_config": "is for init_lora_weights=corda, which is not supported",
    "eva_config": "is for init_lora_weights=eva, which is not supported",
    "layer_replication": "makes several layers share weights, so the adapter could not be merged",
    "loftq_config": "is for init_lora_weights=loftq, which is not supported",
    "lora_ga_config": "is for init_lora_weights=lora_ga, which is not supported",
    "megatron_config": "is for Megatron's layers, which transformers' models do not have",
    "monteclora_config": "samples its weights, so the adapter could not be merged",
    "runtime_config": "is for inference",
    "use_qalora": "needs a GPTQ base, which a run does not load; without one it would have no effect",
}
"""Option -> why it is not supported."""
VARIANTS = ("use_dora", "use_bdlora", "kasa_config", "velora_config", "alora_invocation_tokens", "target_parameters")
"""Options that change how A and B are applied."""


def subtracts_initial_adapter(init: object) -> bool:
    """Whether a value of init_lora_weights begins with an adapter that is not zero and is subtracted from the base."""
    return isinstance(init, str) and SUBTRACTED_INITS.fullmatch(init) is not None


def unsupported_adapter_options(options: Mapping[str, Any]) -> list[str]:
    """Return why a run cannot train with the options of a section `adapter`; empty if it can.

    Args:
        options: the section, as a dict.
    """
    problems = [f"{name}: {why}; remove it" for name, why in UNSUPPORTED_OPTIONS.items() if options[name]]
    init = options["init_lora_weights"]
    if isinstance(init, str) and init not in PLAIN_INITS and not subtracts_initial_adapter(init):
        why = UNSUPPORTED_INITS.get(init, "is not a known initialization")
        known = ", ".join(["true", "false", *PLAIN_INITS, "pissa", "pissa_niter_N", "olora"])
        problems.append(f"init_lora_weights={init}: {why}. Supported: {known}")
    if subtracts_initial_adapter(init):
        problems += [
            f"init_lora_weights={init} with {name} is not supported: the result would not be plain LoRA; remove one"
            for name in (*VARIANTS, "ensure_weight_tying", "lora_bias")
            if options[name]
        ]
    velora = options["velora_config"]
    if velora is not None and velora.get("init_type") != "random":
        problems.append(
            "velora_config: its projections depend on the batches since the process started, which a checkpoint does "
            "not contain; set adapter.velora_config.init_type=random"
        )
    if options["alora_invocation_tokens"] and options["dropout"]:
        problems.append("alora_invocation_tokens: dropout is not supported with aLoRA; set adapter.dropout=0.0")
    return problems
