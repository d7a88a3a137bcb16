"""Whole tensors out of DeepSpeed's partitions, and back into them. The only place that knows how ZeRO holds them.

ZeRO keeps a float32 master of each trained parameter, and Adam's moments, flat and cut over the ranks; ZeRO-3 cuts the
parameters themselves too. Reading goes through DeepSpeed's `safe_get_…` functions. Writing moments into a fresh engine
needs internals, since Adam's state does not exist before the first step: `begin_moments` makes it. When a version of
DeepSpeed changes them, tests/distributed/test_zero.py tells. Every function is collective: all ranks call it with the
same parameters in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Adam's two, as torch and DeepSpeed both name them."""
PARTITIONS = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition")
"""Where DeepSpeed's optimizers keep the masters: of ZeRO-3, of ZeRO-1 and 2, of ZeRO-1 in bf16."""
GROUP_NUMEL = 2**24
"""Values gathered at once: 64 MiB in float32 is what a gather takes beside the model."""


def has_master(parameter: Any) -> bool:
    """Whether ZeRO holds a float32 master of this parameter: whether it was given to the engine's optimizer."""
    if hasattr(parameter, "_z3_optimizer"):
        return parameter.ds_id in parameter._z3_optimizer.grad_position
    return hasattr(parameter, "_hp_mapping")


def is_partitioned(parameter: torch.nn.Parameter) -> bool:
    """Whether each rank holds only a part of this parameter (ZeRO-3)."""
    return hasattr(parameter, "ds_id")


def whole_shape(parameter: torch.nn.Parameter) -> torch.Size:
    """Return the shape of a parameter, whole, whether it is partitioned or not."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def whole_parameters(parameters: Mapping[str, torch.nn.Parameter]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield each parameter whole: its float32 master where it has one. A tensor holds until the next is asked for."""
    rest = {}
    for name, parameter in parameters.items():
        if has_master(parameter):
            yield name, _master(parameter)
        else:
            rest[name] = parameter
    for group in _groups(rest):
        with _gathered([rest[name] for name in group]):
            for name in group:
                yield name, rest[name].detach()


def whole_moment(parameter: torch.nn.Parameter, moment: str) -> torch.Tensor:
    """Return one of Adam's moments (exp_avg, exp_avg_sq) of a trained parameter, whole, in float32."""
    from deepspeed.utils import safe_get_full_optimizer_state

    value: torch.Tensor = safe_get_full_optimizer_state(parameter, moment)
    return value


def write_parameter(parameter: torch.nn.Parameter, value: torch.Tensor) -> None:
    """Put a whole tensor into a parameter: into its float32 master, and into what forwards read."""
    if has_master(parameter):
        _write_master(parameter, value)
    with _gathered([parameter], modifier_rank=0), torch.no_grad():
        parameter.copy_(value.to(parameter.device))


def begin_moments(optimizer: Any) -> None:
    """Make Adam's moments, all zero, for an engine that has made no step yet: what its first step would begin with.

    Left to themselves, DeepSpeed 0.19's ZeRO-1 and 2 look for the moments of all groups of parameters when only the
    first group has stepped, and never find those of the others (biases, beside matrices).

    Args:
        optimizer: what `accelerator.prepare` made of the optimizer.
    """
    for flat, state in _states(optimizer):
        state.update({name: torch.zeros_like(flat) for name in MOMENTS})
    _count_steps(optimizer, 0)
    zero = optimizer.optimizer
    if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):  # ZeRO-1 and 2: tell each parameter where its part is
        zero._lazy_init_hp_params_optimizer_state()


def write_moments(optimizer: Any, step: int, moments: Mapping[torch.nn.Parameter, Mapping[str, torch.Tensor]]) -> None:
    """Put whole tensors into Adam's moments, which `begin_moments` has made.

    Args:
        optimizer: what `accelerator.prepare` made of the optimizer.
        step: how many updates the moments have seen.
        moments: by name, for every trained parameter.
    """
    _count_steps(optimizer, step)
    for parameter, values in moments.items():
        for name, value in values.items():
            _write_master(parameter, value, name)


def set_loss_scale(optimizer: Any, value: float) -> None:
    """Set the factor by which a float16 engine scales the loss of the next step.

    DeepSpeed 0.19 would raise the scale after the norm and before it unscales: that step's update would be half of what
    it should be. So its own rule never raises it (config/reconcile.py), and at the smallest scale does not end the run.
    """
    scaler = optimizer.optimizer.loss_scaler
    scaler.cur_scale, scaler.raise_error_at_min_scale = value, False


def _states(optimizer: Any) -> list[tuple[torch.Tensor, dict[str, Any]]]:
    """Return each flat float32 partition of this rank with its Adam state."""
    zero = optimizer.optimizer
    partitions = next(getattr(zero, name) for name in PARTITIONS if hasattr(zero, name))
    return [(flat, zero.optimizer.state[flat]) for flat in partitions]


def _count_steps(optimizer: Any, step: int) -> None:
    # DeepSpeed's own Adam for offloaded states counts in a plain integer, torch's in a tensor.
    plain = type(optimizer.optimizer.optimizer).__name__ == "DeepSpeedCPUAdam"
    for flat, state in _states(optimizer):
        state["step"] = step if plain else torch.tensor(float(step), device=flat.device)


def _master(parameter: torch.nn.Parameter) -> torch.Tensor:
    from deepspeed.utils import safe_get_full_fp32_param

    # DeepSpeed answers for what requires a gradient only; the owner of a script may have frozen it before saving.
    frozen = not parameter.requires_grad
    parameter.requires_grad_(True)
    value: torch.Tensor = safe_get_full_fp32_param(parameter)
    parameter.requires_grad_(not frozen)
    return value


def _write_master(parameter: Any, value: torch.Tensor, moment: str | None = None) -> None:
    """Write this rank's part of a parameter's float32 master, or of one of its moments."""
    from deepspeed import utils

    value = value.to(parameter.device, torch.float32)
    if not is_partitioned(parameter):
        if moment is None:
            utils.safe_set_full_fp32_param(parameter, value)
        else:
            utils.safe_set_full_optimizer_state(parameter, value, moment)
        return
    # DeepSpeed 0.19's own cut of a whole value runs over its end where the ranks do not divide it; parts are padded.
    group = parameter.ds_process_group
    size, world = parameter.ds_tensor.ds_numel, torch.distributed.get_world_size(group)
    padded = torch.nn.functional.pad(value.flatten(), (0, size * world - value.numel()))
    part = padded.narrow(0, size * torch.distributed.get_rank(group), size)
    if moment is None:
        utils.safe_set_local_fp32_param(parameter, part)
    else:
        utils.safe_set_local_optimizer_state(parameter, part, moment)


def _gathered(parameters: Sequence[torch.nn.Parameter], modifier_rank: int | None = None) -> Any:
    """Return a context in which partitioned parameters are whole; changes of `modifier_rank` go to all ranks."""
    import contextlib

    if not any(map(is_partitioned, parameters)):
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=modifier_rank)


def _groups(parameters: Mapping[str, torch.nn.Parameter]) -> Iterator[list[str]]:
    """Yield names in the same order on every rank, so many at a time as fit into GROUP_NUMEL values."""
    group: list[str] = []
    numel = 0
    for name, parameter in parameters.items():
        size = whole_shape(parameter).numel()
        if group and numel + size > GROUP_NUMEL:
            yield group
            group, numel = [], 0
        group.append(name)
        numel += size
    if group:
        yield group
