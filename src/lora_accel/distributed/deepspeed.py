"""DeepSpeed ZeRO as a `Backend`: read full tensors from its partitions, and write them back.

ZeRO keeps a float32 master of each trained parameter and the optimizer's moments, flattened and partitioned over the
ranks; ZeRO-3 partitions the parameters themselves too. Reading uses DeepSpeed's `safe_get_…` functions. Writing moments
into a new engine needs internals, since the optimizer's state does not exist before the first step: `init_moments`
creates it. tests/distributed/test_deepspeed.py fails if a version of DeepSpeed changes these internals.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

PARTITIONS = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition")
"""Attributes that hold the float32 masters: of ZeRO-3, of ZeRO-1 and 2, of ZeRO-1 in bf16."""
GATHER_NUMEL = 2**24
"""Values gathered at once: a gather takes 64 MiB in float32 in addition to the model."""


class DeepSpeedBackend:
    """ZeRO stages 1 to 3, with and without offload. Pass the optimizer that `accelerator.prepare` returned."""

    keeps_fp32_masters = True
    default_gather = "parameters"

    def __init__(self, num_ranks: int, *, shards_parameters: bool = False) -> None:
        self._num_ranks, self.shards_parameters = num_ranks, shards_parameters

    def begin_step(self, optimizer: Any, num_micro_batches: int, loss_scale: float | None) -> float:
        """The engine averages over ranks. Its own gradient accumulation stays at 1, so it divides by nothing else.

        DeepSpeed 0.19 would raise the loss scale after the norm and before unscaling, which halves that step's update.
        So that rule is disabled (config/launch.py), and so is the error that DeepSpeed raises at the smallest scale.
        """
        if loss_scale is not None:
            scaler = optimizer.optimizer.loss_scaler
            scaler.cur_scale, scaler.raise_error_at_min_scale = loss_scale, False
        return self._num_ranks

    def unscale_gradients(self, parameters: Iterable[torch.nn.Parameter], loss_scale: float) -> None:
        """Do nothing: the engine unscales before it clips."""

    def has_master(self, parameter: Any) -> bool:
        """Whether the parameter was given to the engine's optimizer."""
        if hasattr(parameter, "_z3_optimizer"):
            return parameter.ds_id in parameter._z3_optimizer.grad_position
        return hasattr(parameter, "_hp_mapping")

    def full_shape(self, parameter: torch.nn.Parameter) -> torch.Size:
        """Return the shape before partitioning."""
        return torch.Size(getattr(parameter, "ds_shape", parameter.shape))

    def full_parameters(self, parameters: Mapping[str, torch.nn.Parameter]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield masters one by one, then parameters without a master, gathered in groups."""
        rest = {}
        for name, parameter in parameters.items():
            if self.has_master(parameter):
                yield name, _master(parameter)
            else:
                rest[name] = parameter
        for group in self._groups(rest):
            with _gathered([rest[name] for name in group]):
                for name in group:
                    yield name, rest[name].detach()

    def full_moment(self, optimizer: Any, parameter: torch.nn.Parameter, name: str) -> torch.Tensor:
        """Gather a moment."""
        from deepspeed.utils import safe_get_full_optimizer_state

        value: torch.Tensor = safe_get_full_optimizer_state(parameter, name)
        return value

    def write_parameter(self, parameter: torch.nn.Parameter, value: torch.Tensor) -> None:
        """Write the float32 master, and the parameter that the forward reads."""
        if self.has_master(parameter):
            _write_partition(parameter, value)
        with _gathered([parameter], modifier_rank=0), torch.no_grad():
            parameter.copy_(value.to(parameter.device))

    def init_moments(self, optimizer: Any, names: Sequence[str], *, has_int_step: bool = False) -> None:
        """Create the moments of a new engine, all zero: the state that its first step would create.

        Otherwise ZeRO-1 and 2 of DeepSpeed 0.19 link the moments of all parameter groups when only the first group has
        stepped, and never find those of the other groups (biases besides matrices).
        """
        for flat, state in _states(optimizer):
            state.update({name: torch.zeros_like(flat) for name in names})
        _set_update_count(optimizer, 0, has_int_step)
        zero = optimizer.optimizer
        if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):  # ZeRO-1 and 2: links each parameter to its part
            zero._lazy_init_hp_params_optimizer_state()

    def write_moments(
        self,
        optimizer: Any,
        num_updates: int,
        moments: Mapping[torch.nn.Parameter, Mapping[str, torch.Tensor]],
        *,
        has_int_step: bool = False,
    ) -> None:
        """Write into the moments that `init_moments` created."""
        _set_update_count(optimizer, num_updates, has_int_step)
        for parameter, values in moments.items():
            for name, value in values.items():
                _write_partition(parameter, value, name)

    def _groups(self, parameters: Mapping[str, torch.nn.Parameter]) -> Iterator[list[str]]:
        """Yield names in the same order on every rank, as many at a time as fit into GATHER_NUMEL values."""
        group: list[str] = []
        numel = 0
        for name, parameter in parameters.items():
            size = self.full_shape(parameter).numel()
            if group and numel + size > GATHER_NUMEL:
                yield group
                group, numel = [], 0
            group.append(name)
            numel += size
        if group:
            yield group


def _states(optimizer: Any) -> list[tuple[torch.Tensor, dict[str, Any]]]:
    """Return each flat float32 partition of this rank with its Adam state."""
    zero = optimizer.optimizer
    partitions = next(getattr(zero, name) for name in PARTITIONS if hasattr(zero, name))
    return [(flat, zero.optimizer.state[flat]) for flat in partitions]


def _set_update_count(optimizer: Any, num_updates: int, has_int_step: bool) -> None:
    # DeepSpeed's CPU Adam for offloaded states counts in an int, torch's optimizers in a tensor.
    plain = has_int_step or type(optimizer.optimizer.optimizer).__name__ == "DeepSpeedCPUAdam"
    for flat, state in _states(optimizer):
        state["step"] = num_updates if plain else torch.tensor(float(num_updates), device=flat.device)


def _master(parameter: torch.nn.Parameter) -> torch.Tensor:
    from deepspeed.utils import safe_get_full_fp32_param

    # DeepSpeed returns it only for parameters that require a gradient; a script may have frozen them before saving.
    frozen = not parameter.requires_grad
    parameter.requires_grad_(True)
    value: torch.Tensor = safe_get_full_fp32_param(parameter)
    parameter.requires_grad_(not frozen)
    return value


def _write_partition(parameter: Any, value: torch.Tensor, moment: str | None = None) -> None:
    """Write this rank's partition of a float32 master, or of one of its moments."""
    from deepspeed import utils

    value = value.to(parameter.device, torch.float32)
    if not hasattr(parameter, "ds_id"):
        if moment is None:
            utils.safe_set_full_fp32_param(parameter, value)
        else:
            utils.safe_set_full_optimizer_state(parameter, value, moment)
        return
    # DeepSpeed 0.19 slices past the end of a value whose size the number of ranks does not divide. Pad it.
    group = parameter.ds_process_group
    size, world = parameter.ds_tensor.ds_numel, torch.distributed.get_world_size(group)
    padded = torch.nn.functional.pad(value.flatten(), (0, size * world - value.numel()))
    part = padded.narrow(0, size * torch.distributed.get_rank(group), size)
    if moment is None:
        utils.safe_set_local_fp32_param(parameter, part)
    else:
        utils.safe_set_local_optimizer_state(parameter, part, moment)


def _gathered(parameters: Sequence[torch.nn.Parameter], modifier_rank: int | None = None) -> Any:
    """Return a context in which partitioned parameters are gathered; changes by `modifier_rank` reach all ranks."""
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=modifier_rank)
