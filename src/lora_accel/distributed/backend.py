"""The `Backend` protocol: average and scale the loss, and read and write full tensors.

The loop and the checkpoint code use only these methods. To add a backend, implement `Backend` in a
module of its own and return it from `backend_of`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

Moments = Mapping[torch.nn.Parameter, Mapping[str, torch.Tensor]]
"""The optimizer's state tensors by parameter and name, in full."""


class Backend(Protocol):
    """The operations that differ between backends.

    Methods that move tensors are collective: every rank calls them, in the same order.
    """

    keeps_fp32_masters: bool
    """Under mixed precision it casts the trained parameters to 16 bits and keeps float32 masters itself. Otherwise
    parameters stay in float32 and forwards run under autocast."""
    default_gather: str
    """`checkpoint.gather: auto`: state_dict or parameters."""
    shards_parameters: bool
    """Whether a forward gathers parameters from all ranks, so that all ranks have to run it."""

    def begin_step(self, optimizer: torch.optim.Optimizer, num_micro_batches: int, loss_scale: float | None) -> float:
        """Return the factor that turns a micro-batch's loss into its part of the sum over all ranks.

        It undoes what the backend averages over (micro-batches, ranks) and applies the loss scale.

        Args:
            loss_scale: of this step; None outside float16.
        """

    def unscale_gradients(self, parameters: Iterable[torch.nn.Parameter], loss_scale: float) -> None:
        """Divide gradients by the loss scale, if the backend does not do it itself."""

    def has_master(self, parameter: torch.nn.Parameter) -> bool:
        """Whether the backend keeps a float32 master of a parameter."""

    def full_shape(self, parameter: torch.nn.Parameter) -> torch.Size:
        """Return the shape of a parameter that may be sharded."""

    def full_parameters(self, parameters: Mapping[str, torch.nn.Parameter]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield each parameter in full, its float32 master if it has one. Each is valid until the next is yielded."""

    def full_moment(
        self, optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter, name: str
    ) -> torch.Tensor | None:
        """Return a state tensor of the optimizer in full; None before the first update."""

    def write_parameter(self, parameter: torch.nn.Parameter, value: torch.Tensor) -> None:
        """Copy a full tensor into a parameter and into its master."""

    def init_moments(
        self, optimizer: torch.optim.Optimizer, names: Sequence[str], *, has_int_step: bool = False
    ) -> None:
        """Prepare the optimizer's state, so that it can be saved and written before the first update."""

    def write_moments(
        self, optimizer: torch.optim.Optimizer, num_updates: int, moments: Moments, *, has_int_step: bool = False
    ) -> None:
        """Write the optimizer's state, for every trained parameter.

        Args:
            num_updates: number of optimizer updates in the moments.
            has_int_step: whether the optimizer counts updates in an int instead of a tensor.
        """


class ReplicatedBackend:
    """One process, or DDP: every rank holds every tensor, so reading and writing need no communication."""

    keeps_fp32_masters = False
    default_gather = "state_dict"
    shards_parameters = False

    def __init__(self, num_ranks: int = 1) -> None:
        self._num_ranks = num_ranks

    def begin_step(self, optimizer: torch.optim.Optimizer, num_micro_batches: int, loss_scale: float | None) -> float:
        """Undo the means that DDP takes over ranks and Accelerate over micro-batches."""
        return self._num_ranks * num_micro_batches * (1.0 if loss_scale is None else loss_scale)

    def unscale_gradients(self, parameters: Iterable[torch.nn.Parameter], loss_scale: float) -> None:
        """Divide gradients in place."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        torch._foreach_mul_(gradients, 1 / loss_scale)

    def has_master(self, parameter: torch.nn.Parameter) -> bool:
        """Return False: parameters are in float32 themselves."""
        return False

    def full_shape(self, parameter: torch.nn.Parameter) -> torch.Size:
        """Return the parameter's shape."""
        return parameter.shape

    def full_parameters(self, parameters: Mapping[str, torch.nn.Parameter]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the parameters."""
        for name, parameter in parameters.items():
            yield name, parameter.detach()

    def full_moment(
        self, optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter, name: str
    ) -> torch.Tensor | None:
        """Return the optimizer's own tensor; None before the first update."""
        moment: torch.Tensor | None = optimizer.state.get(parameter, {}).get(name)
        return moment

    def write_parameter(self, parameter: torch.nn.Parameter, value: torch.Tensor) -> None:
        """Copy in place."""
        with torch.no_grad():
            parameter.copy_(value.to(parameter.device))

    def init_moments(
        self, optimizer: torch.optim.Optimizer, names: Sequence[str], *, has_int_step: bool = False
    ) -> None:
        """Do nothing: optimizers create their state at the first update, and it can be written before."""

    def write_moments(
        self, optimizer: torch.optim.Optimizer, num_updates: int, moments: Moments, *, has_int_step: bool = False
    ) -> None:
        """Replace the optimizer's state."""
        _init_bitsandbytes(optimizer)
        for parameter, values in moments.items():
            state: dict[str, Any] = optimizer.state[parameter]
            state["step"] = num_updates if has_int_step else torch.tensor(float(num_updates), device=parameter.device)
            for name, value in values.items():
                if name in state:
                    state[name].copy_(value)
                else:
                    state[name] = value.to(parameter.device, copy=True)


def _init_bitsandbytes(optimizer: torch.optim.Optimizer) -> None:
    """Create the state of an optimizer of bitsandbytes: paged memory, and the tables of 8-bit codes."""
    inner: Any = getattr(optimizer, "optimizer", optimizer)  # in Accelerate's wrapper
    if hasattr(inner, "init_state"):
        for number, group in enumerate(inner.param_groups):
            for position, parameter in enumerate(group["params"]):
                inner.init_state(group, parameter, number, position)


def backend_of(accelerator: Accelerator) -> Backend:
    """Return the backend that an Accelerator runs on."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        from lora_accel.distributed.deepspeed import DeepSpeedBackend

        stage = accelerator.state.deepspeed_plugin.zero_stage
        return DeepSpeedBackend(accelerator.num_processes, shards_parameters=stage == 3)
    return ReplicatedBackend(accelerator.num_processes)
