"""The LoRA adapter, created with PEFT, and its trainable parameters."""

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
    """Add a new adapter to a frozen base.

    Args:
        seed: seed of the initial weights, which are the same on every rank.
        autocast: whether forwards run under autocast.
        masters: whether a DeepSpeed engine in 16 bits trains the adapter. It keeps float32 masters itself and needs all
            parameters in the base's dtype.

    Raises:
        ConfigError: no module matches target_modules, PEFT rejects a field, or a bias would be trained in 16 bits.
    """
    if getattr(base, "is_quantized", False):
        base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    torch.manual_seed(seed)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = get_peft_model(base, lora_config(section), autocast_adapter_dtype=True)
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"adapter: PEFT rejects the config: {error}{_linear_names(base, error)}") from None
    if any("tie_word_embeddings" in str(warning.message) for warning in caught):
        raise ConfigError(
            "adapter.target_modules: this model's input and output embeddings are one tensor, so LoRA on either cannot "
            "be merged correctly. Remove lm_head and embed_tokens, or set adapter.ensure_weight_tying=true"
        )
    if masters:
        for parameter in trainable_parameters(model).values():
            parameter.data = parameter.data.to(base.dtype)
    else:
        _train_in_fp32(model, autocast)
    if autocast:
        # Autocast casts the inputs of each matrix product. PEFT would also cast all activations to the adapter's
        # float32 before dropout, which takes more than half of the step time on CPU.
        for module in model.modules():
            if isinstance(module, BaseTunerLayer):
                module.cast_input_dtype_enabled = False
    return model


def key_dropout(model: PeftModel) -> DropoutKeys:
    """Replace the dropout of every LoRA layer by keyed dropout (model/dropout.py).

    Returns:
        Where the dropout layers read the keys of the current tokens.
    """
    token_keys = DropoutKeys()
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for number, layer in enumerate(layers):
        for name, dropout in layer.lora_dropout.items():
            if isinstance(dropout, torch.nn.Dropout):
                keyed = KeyedDropout(dropout.p, number, layer.in_features, token_keys)
                layer.lora_dropout[name] = keyed.to(layer.get_base_layer().weight.device)
    return token_keys


def lora_config(section: AdapterSection) -> LoraConfig:
    """Return the section as PEFT's LoraConfig."""
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
    """Return the trainable parameters by name, in the model's order."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def count_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """Return the number of (trainable, all) parameters. Quantized weights count with their original shape."""

    def numel(parameter: torch.nn.Parameter) -> int:
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            return int(state.shape.numel())
        return int(getattr(parameter, "ds_numel", parameter.numel()))  # under ZeRO-3, numel() is that of the shard

    counts = [(numel(parameter), parameter.requires_grad) for parameter in model.parameters()]
    return sum(count for count, trainable in counts if trainable), sum(count for count, _ in counts)


def _train_in_fp32(model: PeftModel, autocast: bool) -> None:
    """Cast the trainable parameters to float32, whatever the base's dtype: 16 bits would round small updates to zero.

    PEFT has cast the LoRA matrices. A bias is an operand of the base's own matrix product, which needs one dtype unless
    autocast casts it.
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
    return f" Its linear modules are {', '.join(sorted(names))}; all-linear selects all of them except the head."
