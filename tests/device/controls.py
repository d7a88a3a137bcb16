"""Mistakes that the tests on a fake GPU must find."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def _none(model: nn.Module) -> None:
    pass


def buffer_on_the_cpu(model: nn.Module) -> None:
    """A constant that was created on the CPU and not registered as a buffer."""
    constant = torch.ones(())
    _first_mlp(model).register_forward_hook(lambda module, inputs, output: output + constant.expand(output.shape[-1:]))


def value_on_the_host(model: nn.Module) -> None:
    """A decision of Python on a tensor's value."""
    _first_mlp(model).register_forward_hook(lambda module, inputs, output: output if output.sum() > 0 else output * 2)


def copy_per_layer(model: nn.Module) -> None:
    """A constant that each layer copies from the host."""

    def hook(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output * torch.tensor([2.0]).to(output.device)

    for module in model.modules():
        if type(module).__name__ == "LlamaMLP":
            module.register_forward_hook(hook)


def kernel_per_layer(model: nn.Module) -> None:
    """An operation in each layer, which has one kernel in forward and one in backward."""
    for module in model.modules():
        if type(module).__name__ == "LlamaMLP":
            module.register_forward_hook(lambda module, inputs, output: output * 2)


def _first_mlp(model: nn.Module) -> nn.Module:
    return next(module for module in model.modules() if type(module).__name__ == "LlamaMLP")


CONTROLS: dict[str, Callable[[nn.Module], None]] = {
    "none": _none,
    "buffer_on_the_cpu": buffer_on_the_cpu,
    "value_on_the_host": value_on_the_host,
    "copy_per_layer": copy_per_layer,
    "kernel_per_layer": kernel_per_layer,
}
