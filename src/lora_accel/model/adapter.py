"""The LoRA adapter, created with PEFT, and its trainable parameters."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel

from lora_accel.config.adapter_options import subtracts_initial_adapter
from lora_accel.config.schema import AdapterSection
from lora_accel.errors import ConfigError
from lora_accel.model.dropout import DropoutKeys, KeyedDropout
from lora_accel.model.initial_adapter import add_initial_adapter, initial_names


def add_adapter(
    base: PreTrainedModel,
    section: AdapterSection,
    *,
    seed: int,
    autocast: bool,
    masters: bool = False,
) -> PeftModel:
    """Add a new adapter to a frozen base.

    A quantized base keeps its norms, embeddings and head in its dtype, like any other base. (PEFT's
    `prepare_model_for_kbit_training` would cast them, and so all hidden states, to float32.)

    Args:
        seed: seed of the initial weights, which are the same on every rank.
        autocast: whether forwards run under autocast.
        masters: whether a DeepSpeed engine in 16 bits trains the adapter. It keeps float32 masters itself and needs all
            parameters in the base's dtype.

    Raises:
        ConfigError: no module matches target_modules, PEFT rejects a field, a layer does not support an option, or a
            bias would be trained in 16 bits.
    """
    torch.manual_seed(seed)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = get_peft_model(base, lora_config(section), autocast_adapter_dtype=True)
    except (ValueError, TypeError, KeyError, AttributeError, ImportError, AssertionError) as error:
        raise ConfigError(f"adapter: PEFT rejects the config: {error}{_hint(base, error)}") from None
    messages = [str(warning.message) for warning in caught]
    _check_patterns(section, messages)
    if any("tie_word_embeddings" in message for message in messages):
        raise ConfigError(
            "adapter.target_modules: this model's input and output embeddings are one tensor, so LoRA on either cannot "
            "be merged correctly. Remove lm_head and embed_tokens, or set adapter.ensure_weight_tying=true"
        )
    if subtracts_initial_adapter(section.init_lora_weights):
        is_mixed = autocast or masters
        add_initial_adapter(model, str(section.init_lora_weights), base.dtype if is_mixed else torch.float32)
    _check_layers(model, section)
    if masters:
        for parameter in (*trainable_parameters(model).values(), *map(model.get_parameter, initial_names(model))):
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


def key_dropout(model: PeftModel, *, fused_loss: bool = True) -> DropoutKeys:
    """Replace the dropout of every LoRA layer by keyed dropout (model/dropout.py).

    Args:
        fused_loss: whether the loss is fused (model/fused_loss.py): it passes the head's dropout the keys of the
            supervised tokens.

    Returns:
        Where the dropout layers read the keys of the current tokens.

    Raises:
        ConfigError: the head would have dropout, and the loss is not fused.
    """
    token_keys, head = DropoutKeys(), model.get_base_model().get_output_embeddings()
    if not fused_loss and isinstance(head, LoraLayer) and model.active_peft_config.lora_dropout:
        raise ConfigError(
            "adapter.dropout: LoRA on lm_head with dropout is not supported for this model family; set it to 0.0, or "
            "remove lm_head from adapter.target_modules"
        )
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for number, layer in enumerate(layers):
        for name, dropout in layer.lora_dropout.items():
            if isinstance(dropout, torch.nn.Dropout):
                keyed = KeyedDropout(dropout.p, number, layer.in_features, token_keys)
                layer.lora_dropout[name] = keyed.to(layer.get_base_layer().weight.device)
    return token_keys


def skipped_experts(model: PeftModel, section: AdapterSection) -> str:
    """Return a note about the weights of experts that all-linear does not include; empty if there are none.

    The experts of a layer are one tensor with three dimensions, which no linear module holds.
    """
    if section.target_modules != "all-linear":
        return ""
    names = {
        ".".join(name.split(".")[-3:])
        for name, parameter in model.get_base_model().named_parameters()
        if "experts" in name.split(".") and "base_layer" not in name.split(".") and _full_ndim(parameter) == 3
    }
    if not names:
        return ""
    return (
        f"; without the experts' weights, which all-linear does not include. To adapt them, too, set "
        f"'adapter.target_parameters=[{', '.join(sorted(names))}]' and adapter.dropout=0.0"
    )


def _full_ndim(parameter: torch.nn.Parameter) -> int:
    return len(getattr(parameter, "ds_shape", parameter.shape))  # under ZeRO-3, the parameter is a flat shard


def lora_config(section: AdapterSection) -> LoraConfig:
    """Return the section as PEFT's LoraConfig, without an initialization that would change the base's weights."""
    fields = section.peft_fields()
    if subtracts_initial_adapter(section.init_lora_weights):
        fields["init_lora_weights"] = True
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=section.r,
        lora_alpha=section.alpha,
        lora_dropout=section.dropout,
        target_modules=section.target_modules,
        bias=section.bias,
        **fields,
    )


def trainable_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Return the trainable parameters by name, in the model's order."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def embedding_parameters(model: PeftModel) -> set[str]:
    """Return the names of the trainable parameters in the input embeddings and the head."""
    base = model.get_base_model()
    modules = [module for module in (base.get_input_embeddings(), base.get_output_embeddings()) if module is not None]
    inside = {parameter for module in modules for parameter in module.parameters()}
    return {name for name, parameter in trainable_parameters(model).items() if parameter in inside}


def count_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """Return the number of (trainable, all) parameters. Quantized weights count with their original shape."""

    def numel(parameter: torch.nn.Parameter) -> int:
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            return int(state.shape.numel())
        return int(getattr(parameter, "ds_numel", parameter.numel()))  # under ZeRO-3, numel() is that of the shard

    counts = [(numel(parameter), parameter.requires_grad) for parameter in model.parameters()]
    return sum(count for count, trainable in counts if trainable), sum(count for count, _ in counts)


def _check_patterns(section: AdapterSection, warnings_of_peft: Sequence[str]) -> None:
    """Check that every key of rank_pattern and alpha_pattern matches a module; PEFT would ignore it with a warning."""
    for option in ("rank_pattern", "alpha_pattern"):
        for key in getattr(section, option) or {}:
            if any("did not match any" in text and repr(key) in text for text in warnings_of_peft):
                raise ConfigError(f"adapter.{option}: {key!r} matches no module of adapter.target_modules; remove it")


def _check_layers(model: PeftModel, section: AdapterSection) -> None:
    """Check that every adapted layer can be trained and merged.

    Raises:
        ConfigError: with the first layer that cannot.
    """
    for name, layer in model.get_base_model().named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        if section.lora_bias and getattr(layer.get_base_layer(), "bias", None) is None:
            raise ConfigError(f"adapter.lora_bias: {name} has no bias, so the adapter could not be merged; remove it")
        if section.dropout and ".experts." in f".{name}.":
            # An expert gets the tokens that are routed to it, so their dropout keys are unknown.
            raise ConfigError(f"adapter.dropout: {name} is an expert, which does not support dropout; set it to 0.0")


def _train_in_fp32(model: PeftModel, autocast: bool) -> None:
    """Cast the trainable parameters to float32, whatever the base's dtype: 16 bits would round small updates to zero.

    PEFT has cast the LoRA matrices. A bias is an operand of the base's own matrix product, which needs one dtype unless
    autocast casts it.
    """
    of_base = {n: p for n, p in trainable_parameters(model).items() if p.dtype != torch.float32}
    for name, parameter in of_base.items():
        if not autocast:
            raise ConfigError(
                f"adapter: {name} would be trained in {str(parameter.dtype).removeprefix('torch.')}; set "
                "training.mixed_precision=bf16 or model.dtype=float32"
            )
        parameter.data = parameter.data.float()
    if of_base:
        _cast_layer_norms(model)


def _cast_layer_norms(model: PeftModel) -> None:
    """Cast all layer norms to float32, for trained biases of theirs and for float32 activations.

    `layer_norm` needs its weight and its bias in one dtype: float32, or that of its input. On a CPU, autocast does not
    cast them; elsewhere it computes all of `layer_norm` in float32, so this changes no value.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.float()


def _hint(base: PreTrainedModel, error: Exception) -> str:
    if "lora_dropout" in str(error):
        return " LoRA on the parameters of experts does not support dropout; set adapter.dropout=0.0."
    if "not found in the base model" not in str(error):
        return ""
    names = {name.split(".")[-1] for name, module in base.named_modules() if isinstance(module, torch.nn.Linear)}
    return f" Its linear modules are {', '.join(sorted(names))}; all-linear selects all of them except the head."
