"""The base model with its adapter and optimizer, prepared for this machine and backend."""

from __future__ import annotations

import dataclasses

import torch
from accelerate import Accelerator
from peft import PeftModel
from transformers import PreTrainedModel

from lora_accel.config.optimizers import OPTIMIZERS
from lora_accel.config.schema import AdapterSection, RunConfig
from lora_accel.console import Stage, short_names
from lora_accel.distributed.backend import Backend, backend_of
from lora_accel.errors import ConfigError
from lora_accel.logs import logger
from lora_accel.model.adapter import (
    add_adapter,
    count_parameters,
    embedding_parameters,
    key_dropout,
    skipped_experts,
    trainable_parameters,
)
from lora_accel.model.attention import (
    can_pack,
    check_flash_dtype,
    pack_attention,
    pad_attention,
    tile_size,
    why_padded,
)
from lora_accel.model.base import check_zero3_dtype, load_base_model
from lora_accel.model.compile import compile_layers
from lora_accel.model.device import detect_device, has_fused_adamw
from lora_accel.model.dropout import DropoutKeys
from lora_accel.model.fused_loss import patch_fused_loss
from lora_accel.model.kernels import patch_base
from lora_accel.model.kernels.adapters import patch_adapters
from lora_accel.model.new_tokens import extend_vocabulary, train_new_tokens
from lora_accel.model.noise import add_embedding_noise
from lora_accel.model.prequantized import check_modules_to_save
from lora_accel.model.sharing import min_saving_of, why_not_shared
from lora_accel.model.tokenizer import load_tokenizer
from lora_accel.saving.adapter import saved_config, unwrap_peft_model
from lora_accel.saving.attach import begin_with_adapter
from lora_accel.saving.names import check_all_trained_is_saved, saved_shapes
from lora_accel.saving.serving import serving_note
from lora_accel.setup.initial import InitialAdapter, check_vocabulary, fits_base
from lora_accel.training.optimizer import learning_rate_factors, make_optimizer


@dataclasses.dataclass(frozen=True)
class PreparedModel:
    """The model and the optimizer that `accelerator.prepare` returned, and objects that belong to them."""

    model: torch.nn.Module
    """The PeftModel in the backend's wrapper."""
    optimizer: torch.optim.Optimizer
    trainable: list[torch.nn.Parameter]
    backend: Backend
    dropout_keys: DropoutKeys
    """Where the adapter's dropout reads the keys of the current tokens."""
    packed: bool
    """Whether examples are packed: the config asks for it and the model supports it."""
    min_saving: float | None
    """Share of the tokens of a micro-batch that has to be saved for examples to share them; None = they never do."""
    row_multiple: int = 1
    """See `BatchOptions`."""


def prepare_model(
    config: RunConfig,
    accelerator: Accelerator,
    *,
    checkpoint_dtype: str | None = None,
    initial: InitialAdapter | None = None,
) -> PreparedModel:
    """Load the base, add the adapter, patch the modules that this package reimplements, and prepare both.

    Args:
        checkpoint_dtype: dtype of the base in the checkpoint to resume from; None = a new run.
        initial: the adapter of adapter.init_from, whose options `config` has; None = a new one.

    Raises:
        ArtifactError: the base cannot be read, or a trained tensor would not be saved.
        ConfigError: the base or the adapter does not support an option.
    """
    backend, adapter = backend_of(accelerator), config.adapter
    base = _load_base(config, accelerator, checkpoint_dtype)
    if config.model.add_tokens is not None:
        extend_vocabulary(base, config.model)
        adapter = train_new_tokens(adapter, base, config.model.add_tokens, load_tokenizer(config.model))
    check_vocabulary(base, initial, backend)
    check_flash_dtype(base, accelerator.mixed_precision)
    packed = config.data.packing and can_pack(base)
    if packed:
        pack_attention(base)
    elif can_pack(base):
        pad_attention(base)
    elif config.data.packing:
        logger.info(f"note: padding rows of {base.config.model_type}: {why_padded(base)}")
    min_saving = min_saving_of(config.training, base, accelerator.device, packed=packed)
    reason = why_not_shared(config.training, base, packed=packed)
    if packed and reason is not None and config.training.share_prefixes == "auto":
        logger.info(f"note: examples share no prefixes: {reason}")
    dtype = base.dtype if accelerator.mixed_precision == "no" else torch.bfloat16  # float16 has the same size
    row_multiple = tile_size(dtype, accelerator.device)
    if config.training.compile:
        compile_layers(base, accelerator.device)
    else:  # torch.compile fuses the same operations itself
        patch_base(base)
    check_modules_to_save(base, adapter)
    with fits_base(initial, base):
        model = _add_adapter(config, adapter, base, backend, is_mixed=accelerator.mixed_precision != "no")
    is_fused = patch_fused_loss(model.get_base_model())
    trained = trainable_parameters(model)
    optimizer = make_optimizer(
        trained,
        config.training,
        factors=learning_rate_factors(trained, embedding_parameters(model), config),
        fused=has_fused_adamw(detect_device(accelerator.device)),
    )
    dropout_keys = key_dropout(model, fused_loss=is_fused)
    if not config.training.compile:
        patch_adapters(model)
    if config.training.neftune_alpha is not None:
        add_embedding_noise(model, config.training.neftune_alpha, dropout_keys)
    model, optimizer = accelerator.prepare(model, optimizer)
    spec = OPTIMIZERS[config.training.optimizer]
    backend.init_moments(optimizer, spec.moments, has_int_step=spec.has_int_step)
    if initial is not None and initial.data is not None:
        begin_with_adapter(unwrap_peft_model(accelerator, model), initial.data, initial.name, backend)
    trainable = list(trainable_parameters(model).values())
    return PreparedModel(model, optimizer, trainable, backend, dropout_keys, packed, min_saving, row_multiple)


def _load_base(config: RunConfig, accelerator: Accelerator, checkpoint_dtype: str | None) -> PreTrainedModel:
    """Load the base, if the backend supports what the config asks for."""
    if getattr(accelerator.state.deepspeed_plugin, "zero_stage", 0) == 3:
        if config.model.add_tokens is not None:
            raise ConfigError(
                "model.add_tokens is not supported under ZeRO-3; use ZeRO-2, or a backend without DeepSpeed"
            )
        if accelerator.mixed_precision == "no":
            check_zero3_dtype(config.model, accelerator.device, checkpoint_dtype)
    with Stage(f"loading {short_names([config.model.name_or_path])[0]}", enabled=accelerator.is_local_main_process):
        return load_base_model(
            config.model,
            config.quantization,
            mixed_precision=accelerator.mixed_precision,
            device=accelerator.device,
            recorded_dtype=checkpoint_dtype,
        )


def _add_adapter(
    config: RunConfig, adapter: AdapterSection, base: PreTrainedModel, backend: Backend, *, is_mixed: bool
) -> PeftModel:
    """Add the adapter, and log how many parameters it trains and how it can be served.

    Args:
        adapter: section of the config, with what added tokens need.
        is_mixed: whether training is in mixed precision.
    """
    model = add_adapter(
        base,
        adapter,
        seed=config.seed,
        autocast=is_mixed and not backend.keeps_fp32_masters,
        masters=is_mixed and backend.keeps_fp32_masters,
    )
    recorded = model.active_peft_config
    recorded.base_model_name_or_path, recorded.revision = config.model.name_or_path, config.model.revision
    trained, total = count_parameters(model)
    share = f"{trained:,} of {total:,} parameters ({trained / total:.3%})"
    logger.info(f"trainable: {share}{skipped_experts(model, adapter)}")
    serving = serving_note(saved_config(model), saved_shapes(model, backend), config.model.model_dump())
    logger.info(f"serving: {serving}")
    check_all_trained_is_saved(model)
    return model
