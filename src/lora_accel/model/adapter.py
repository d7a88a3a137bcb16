"""LoRA on the base through PEFT, and what of it is trainable."""

from __future__ import annotations

import warnings

import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel

from lora_accel.config.schema import AdapterSection
from lora_accel.errors import ConfigError
from lora_accel.model.dropout import DropoutKeys, KeyedDropout


def add_adapter(
    base: PreTrainedModel,
    section: AdapterSection,
    *,
    seed: int,
    autocast: bool,
    masters: bool = False,
) -> PeftModel:
    """Put a fresh adapter on a frozen base.

    Args:
        seed: the adapter's first weights are a function of it; every rank draws the same.
        autocast: whether forwards run under mixed precision.
        masters: whether a DeepSpeed engine in 16 bits will train it: it keeps float32 masters of its own, and wants
            all parameters in the base's dtype.

    Raises:
        ConfigError: no module has such a name, PEFT refuses a field, or a 16-bit bias would be trained in 16 bits.
    """
    if getattr(base, "is_quantized", False):
        base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    torch.manual_seed(seed)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = get_peft_model(base, lora_config(section), autocast_adapter_dtype=True)
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"adapter: PEFT refuses it: {error}{_linear_names(base, error)}") from None
    if any("tie_word_embeddings" in str(warning.message) for warning in caught):
        raise ConfigError(
            "adapter.target_modules: this model's input and output embeddings are one tensor; LoRA on either merges "
            "wrong. Leave lm_head and embed_tokens out, or set adapter.ensure_weight_tying=true"
        )
    if masters:
        for parameter in trainable_parameters(model).values():
            parameter.data = parameter.data.to(base.dtype)
    else:
        _hold_in_fp32(model, autocast)
    if autocast:
        # Autocast casts what a product needs. PEFT would first cast every activation up to the adapter's float32, and
        # dropout would run in it: more than half of a step on CPU.
        for module in model.modules():
            if isinstance(module, BaseTunerLayer):
                module.cast_input_dtype_enabled = False
    return model


def key_dropout(model: PeftModel) -> DropoutKeys:
    """Replace the dropout of every LoRA layer by one that knows no cut of the step.

    Returns:
        The place where it reads the keys of the tokens in hand; see model/dropout.py.
    """
    tokens = DropoutKeys()
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for number, layer in enumerate(layers):
        for name, dropout in layer.lora_dropout.items():
            if isinstance(dropout, torch.nn.Dropout):
                keyed = KeyedDropout(dropout.p, number, layer.in_features, tokens)
                layer.lora_dropout[name] = keyed.to(layer.get_base_layer().weight.device)
    return tokens


def lora_config(section: AdapterSection) -> LoraConfig:
    """Return the section in PEFT's words."""
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=section.r,
        lora_alpha=section.alpha,
        lora_dropout=section.dropout,
        target_modules=section.target_modules,
        bias=section.bias,
        **section.peft_fields(),
    )


def trainable_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Return what is trained, by name, in the model's order."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def count_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """Return (trainable, all). Packed 4-bit weights count as the weights they stand for."""

    def size(parameter: torch.nn.Parameter) -> int:
        state = getattr(parameter, "quant_state", None)
        whole = getattr(parameter, "ds_numel", parameter.numel())  # ZeRO-3 leaves a part of it here
        return int(state.shape.numel()) if state is not None else int(whole)

    counts = [(size(parameter), parameter.requires_grad) for parameter in model.parameters()]
    return sum(count for count, trained in counts if trained), sum(count for count, _ in counts)


def _hold_in_fp32(model: PeftModel, autocast: bool) -> None:
    """Train in float32 whatever the base is held in: 16 bits would swallow small updates.

    PEFT has done so for LoRA's own matrices. A bias enters the base's own product, which wants one dtype unless
    autocast sees to it.
    """
    for name, parameter in trainable_parameters(model).items():
        if parameter.dtype == torch.float32:
            continue
        if not autocast:
            raise ConfigError(
                f"adapter: {name} would be trained in {str(parameter.dtype).removeprefix('torch.')}; set "
                "training.mixed_precision=bf16 or model.dtype=float32"
            )
        parameter.data = parameter.data.float()


def _linear_names(base: PreTrainedModel, error: Exception) -> str:
    if "not found in the base model" not in str(error):
        return ""
    names = {name.split(".")[-1] for name, module in base.named_modules() if isinstance(module, torch.nn.Linear)}
    return f" Its linear modules are {', '.join(sorted(names))}; all-linear takes them all but the head."
