"""The base model with its adapter and optimizer, prepared for this machine and backend."""

from __future__ import annotations

import dataclasses

import torch
from accelerate import Accelerator
from peft import PeftModel
from transformers import PreTrainedModel

from lora_accel.batching.batches import BatchOptions, step_batch
from lora_accel.config.optimizers import OPTIMIZERS
from lora_accel.config.schema import AdapterSection, RunConfig
from lora_accel.console import Stage, short_names
from lora_accel.data.chat import Example
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
from lora_accel.model.attention import can_pack, check_flash_dtype, pack_attention, pad_attention, why_padded
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
from lora_accel.model.recompute import can_recompute, recompute_layers
from lora_accel.model.sharing import min_saving_of
from lora_accel.model.tokenizer import load_tokenizer
from lora_accel.processes import return_freed_memory
from lora_accel.saving.adapter import saved_config, unwrap_peft_model
from lora_accel.saving.attach import begin_with_adapter
from lora_accel.saving.names import check_all_trained_is_saved, saved_shapes
from lora_accel.saving.serving import serving_note
from lora_accel.setup.data import PreparedData
from lora_accel.setup.initial import InitialAdapter, check_vocabulary, fits_base
from lora_accel.training.memory import (
    estimate_activation_bytes,
    free_bytes,
    num_layers_to_recompute,
    update_bytes,
)
from lora_accel.training.optimizer import learning_rate_factors, make_optimizer

PROBE_TOKENS = 256
"""Length of the forward that measures activation memory."""


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
    return PreparedModel(model, optimizer, trainable, backend, dropout_keys, packed, min_saving)


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


def enable_activation_checkpointing(
    config: RunConfig, data: PreparedData, accelerator: Accelerator, prepared: PreparedModel, num_local_ranks: int
) -> None:
    """Recompute activations in the backward pass if the config asks for it; with `auto`, those that do not fit.

    Args:
        num_local_ranks: processes that share this machine's memory.
    """
    option, model = config.training.activation_checkpointing, accelerator.unwrap_model(prepared.model)
    if option == "auto" and not config.adapter.alora_invocation_tokens:  # see RunConfig's checks
        option = _recompute_what_does_not_fit(config, data, accelerator, prepared, num_local_ranks)
    elif option is True:
        recompute_layers(model)
    if option is True:
        return_freed_memory()  # else glibc's heap would keep what is saved here


def _recompute_what_does_not_fit(
    config: RunConfig, data: PreparedData, accelerator: Accelerator, prepared: PreparedModel, num_local_ranks: int
) -> bool:
    """Measure the memory of activations, and recompute those of as many layers as lack it, the same on every rank.

    Returns:
        Whether any layer recomputes its activations.
    """
    longest = max(int(source.examples.lengths.max()) for source in data.dataset.sources)
    options = BatchOptions.from_config(config.training, pad_id=data.pad_id, packed=prepared.packed)
    probe = step_batch([_probe(data.dataset.example(0), longest)], options).micro_batches[0].to(accelerator.device)
    prepared.dropout_keys.keys, prepared.dropout_keys.lengths = probe.token_keys, probe.example_lengths
    prepared.model.train()
    per_forward = config.training.micro_batch_size
    tokens = per_forward * longest if per_forward else max(longest, config.training.micro_batch_tokens)
    model = accelerator.unwrap_model(prepared.model)
    free = free_bytes(accelerator.device, num_local_ranks) - update_bytes(prepared.trainable, config.training.optimizer)
    with Stage("measuring activation memory", enabled=accelerator.is_local_main_process):
        kept = estimate_activation_bytes(prepared.model, probe, tokens)
        ranks = accelerator.gather(torch.tensor([[float(kept), float(free)]], device=accelerator.device)).tolist()
        rank, (most, least) = max(enumerate(ranks), key=lambda entry: entry[1][0] - entry[1][1])
        lacks_memory = most > least and can_recompute(model)
        total = recompute_layers(model) if lacks_memory else 0
        recomputed = estimate_activation_bytes(prepared.model, probe, tokens) if lacks_memory else kept
    where = f" on rank {rank}" if rank else ""
    needed = f"activation memory: {_gb(most)} needed, {_gb(least)} free{where}"
    if not lacks_memory:
        logger.info(f"{needed}: no activation checkpointing")
        return False
    count = num_layers_to_recompute(kept, recomputed, free, total)
    count = int(accelerator.gather(torch.tensor([count], device=accelerator.device)).max())
    recompute_layers(model, count)
    layers = f"{count} of {total} layers" if total else "all layers"
    logger.info(f"{needed}: enabling activation checkpointing in {layers}")
    return True


def _probe(example: Example, longest: int) -> Example:
    """Repeat the tokens of an example: in a short one, what does not grow with its length would count for each token.

    Args:
        longest: tokens of the longest example, which the model supports.
    """
    size = min(PROBE_TOKENS, longest)
    times = -(-size // len(example.input_ids))
    return Example((example.input_ids * times)[:size], (example.labels * times)[:size])


def _gb(num_bytes: float) -> str:
    return f"{max(0, num_bytes) / 1e9:.1f} GB"
