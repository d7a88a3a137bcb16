"""Fit a run into memory before its first step: the tokens of a micro-batch, and which activations are recomputed."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from lora_accel.batching.batch import MicroBatch
from lora_accel.batching.batches import Batches, BatchOptions, step_batch
from lora_accel.batching.token_limit import choose_token_limit
from lora_accel.config.schema import RunConfig
from lora_accel.console import Stage
from lora_accel.data.chat import Example
from lora_accel.logs import logger
from lora_accel.model.recompute import can_recompute, recompute_layers
from lora_accel.processes import return_freed_memory
from lora_accel.setup.data import PreparedData
from lora_accel.setup.model import PreparedModel
from lora_accel.training.memory import (
    ActivationCost,
    free_bytes,
    num_layers_to_recompute,
    saved_activation_bytes,
    update_bytes,
)

PROBE_TOKENS = 256
"""Tokens of the smaller of two forwards that measure activation memory."""


def fit_into_memory(
    config: RunConfig,
    data: PreparedData,
    accelerator: Accelerator,
    prepared: PreparedModel,
    num_local_ranks: int,
    *,
    kept_tokens: int | None = None,
) -> RunConfig:
    """Choose what the config leaves to `auto`, the same on every rank; return the config with the tokens chosen.

    Neither choice changes results, apart from rounding.

    Args:
        num_local_ranks: processes that share this machine's memory.
        kept_tokens: `micro_batch_tokens` of the checkpoint to resume from: with other micro-batches the resumed run
            would round differently.
    """
    recompute, model = config.training.activation_checkpointing, accelerator.unwrap_model(prepared.model)
    if recompute is True:
        recompute_layers(model)
    meter = _Meter(config, data, accelerator, prepared, num_local_ranks)
    if config.training.micro_batch_tokens == "auto":
        limit = kept_tokens or _token_limit(config, data, accelerator, prepared, meter)
        config = with_tokens(config, limit)
    if recompute == "auto" and not config.adapter.alora_invocation_tokens:  # see RunConfig's checks
        recompute = _recompute_what_does_not_fit(config, accelerator, model, meter)
    if recompute is True:
        return_freed_memory()  # else glibc's heap would keep what is saved here
    return config


def with_tokens(config: RunConfig, limit: int) -> RunConfig:
    """Return a config with a number of tokens in place of `micro_batch_tokens: auto`."""
    return config.model_copy(update={"training": config.training.model_copy(update={"micro_batch_tokens": limit})})


def token_limit_by_data(config: RunConfig, data: PreparedData, *, packed: bool, min_saving: float | None) -> int:
    """Return the tokens of a micro-batch on a CPU; see batching/token_limit.py.

    Args:
        packed, min_saving: see `BatchOptions`.
    """
    options = BatchOptions.from_config(
        config.training, pad_id=data.pad_id, packed=packed, min_saving=min_saving, num_ranks=data.plan.num_ranks
    )
    batches = Batches(data.dataset, data.plan, options, seed=config.seed, group_by_prefix=config.data.group_by_prefix)
    return choose_token_limit(batches, options, data.plan.total_steps)


def longest_example(data: PreparedData) -> int:
    """Return the tokens of the longest training example."""
    return max(int(source.examples.lengths.max()) for source in data.dataset.sources)


def probe_batches(data: PreparedData, *, packed: bool) -> tuple[MicroBatch, MicroBatch]:
    """Return micro-batches of one and of two examples of `PROBE_TOKENS`, or of as many tokens as the longest has.

    They repeat the tokens of an example: in a short one, what does not grow with its length would count for each token.
    """
    example, size = data.dataset.example(0), min(PROBE_TOKENS, longest_example(data))
    times = -(-size // len(example.input_ids))
    probe = Example((example.input_ids * times)[:size], (example.labels * times)[:size])
    options = BatchOptions(data.pad_id, packed, max_tokens=2 * size)
    small, large = (step_batch([probe] * count, options).micro_batches[0] for count in (1, 2))
    return small, large


class _Meter:
    """Measures activation memory on this rank."""

    def __init__(
        self,
        config: RunConfig,
        data: PreparedData,
        accelerator: Accelerator,
        prepared: PreparedModel,
        num_local_ranks: int,
    ) -> None:
        self._accelerator, self._prepared, self._num_local_ranks = accelerator, prepared, num_local_ranks
        self._data, self._optimizer = data, config.training.optimizer

    def cost(self) -> ActivationCost:
        """Return what a micro-batch saves for backward, from two forwards."""
        prepared, measured = self._prepared, []
        prepared.model.train()
        batches = probe_batches(self._data, packed=prepared.packed)
        with Stage("measuring activation memory", enabled=self._accelerator.is_local_main_process):
            for batch in batches:
                batch = batch.to(self._accelerator.device)
                prepared.dropout_keys.keys, prepared.dropout_keys.lengths = batch.token_keys, batch.example_lengths
                measured.append(saved_activation_bytes(prepared.model, batch))
        return ActivationCost.through(measured[0], measured[1], batches[0].input_ids.numel())

    def free(self) -> int:
        """Return the memory that is left when gradients and moments are allocated, in bytes."""
        free = free_bytes(self._accelerator.device, self._num_local_ranks)
        return free - update_bytes(self._prepared.trainable, self._optimizer)

    def most_tokens(self, config: RunConfig) -> int:
        """Return the tokens of the largest micro-batch, padding included."""
        longest, per_forward = longest_example(self._data), config.training.micro_batch_size
        limit = config.training.micro_batch_tokens
        assert limit != "auto"
        return per_forward * longest if per_forward else max(longest, limit)


def _token_limit(
    config: RunConfig, data: PreparedData, accelerator: Accelerator, prepared: PreparedModel, meter: _Meter
) -> int:
    """Return the tokens of a micro-batch: on a CPU by the data, else what fits on every rank, by measurement."""
    if accelerator.device.type == "cpu" or config.training.micro_batch_size is not None:
        limit = token_limit_by_data(config, data, packed=prepared.packed, min_saving=prepared.min_saving)
        reason = ""
    else:
        cost, free = meter.cost(), meter.free()
        ranks = gather_object([(cost.token_limit(free), cost.per_token, free)])
        rank, (limit, per_token, least) = min(enumerate(ranks), key=lambda entry: entry[1][0])
        reason = f": a token saves {per_token / 1e6:.1f} MB for backward, {_gb(least)} free{_on(rank)}"
    if config.training.micro_batch_size is None:
        logger.info(f"micro-batches: at most {limit:,} tokens{reason}")
    return limit


def _recompute_what_does_not_fit(
    config: RunConfig, accelerator: Accelerator, model: torch.nn.Module, meter: _Meter
) -> bool:
    """Recompute the activations of as many layers as lack memory.

    Returns:
        Whether any layer recomputes its activations.
    """
    tokens, free = meter.most_tokens(config), meter.free()
    kept = meter.cost().num_bytes(tokens)
    rank, (most, least) = max(enumerate(gather_object([(kept, free)])), key=lambda entry: entry[1][0] - entry[1][1])
    lacks_memory = most > least and can_recompute(model)
    needed = f"activation memory: {_gb(most)} needed, {_gb(least)} free{_on(rank)}"
    if not lacks_memory:
        logger.info(f"{needed}: no activation checkpointing")
        return False
    total = recompute_layers(model)
    recomputed = meter.cost().num_bytes(tokens)
    count = max(gather_object([num_layers_to_recompute(kept, recomputed, free, total)]))
    recompute_layers(model, count)
    layers = f"{count} of {total} layers" if total else "all layers"
    logger.info(f"{needed}: enabling activation checkpointing in {layers}")
    return True


def _on(rank: int) -> str:
    return f" on rank {rank}" if rank else ""


def _gb(num_bytes: float) -> str:
    return f"{max(0, num_bytes) / 1e9:.1f} GB"
