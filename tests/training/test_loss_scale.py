"""The loss scale follows torch's GradScaler, and an invalid one in a checkpoint is an error."""

from __future__ import annotations

import math
import random

import pytest
import torch

from lora_accel.distributed.backend import ReplicatedBackend
from lora_accel.errors import ArtifactError
from lora_accel.training.loss_scale import GROWTH_STEPS, INITIAL, LossScale


@pytest.mark.parametrize("probability", [0.0, 0.001, 0.3])
def test_update_rules_are_those_of_gradscaler(probability: float) -> None:
    """Compare value and counter after each of 5,000 steps with random overflows."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.0)
    scaler, scale, generator = torch.amp.GradScaler("cpu"), LossScale(), random.Random(0)
    for _ in range(5000):
        overflowed = generator.random() < probability and scale.value > 1
        scaler.scale(torch.zeros(()))
        parameter.grad = torch.tensor([math.inf if overflowed else 1.0])
        scaler.step(optimizer)
        scaler.update()
        scale.update(overflowed=overflowed)
        state = scaler.state_dict()
        assert (scale.value, scale.good_steps) == (state["scale"], state["_growth_tracker"])


def test_unscaling_is_exact() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(100)) for _ in range(3)]
    torch.manual_seed(0)
    gradients = [torch.randn(100), torch.randn(100), None]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = None if gradient is None else gradient * INITIAL
    ReplicatedBackend().unscale_gradients(parameters, LossScale().value)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        assert parameter.grad is None if gradient is None else torch.equal(parameter.grad, gradient)


def test_overflow_needs_a_finite_loss_and_a_scale_above_one() -> None:
    scale = LossScale()
    assert scale.overflowed(1.0, math.inf)
    assert scale.overflowed(1.0, math.nan)
    assert not scale.overflowed(math.nan, math.nan), "a smaller scale cannot help"
    assert not scale.overflowed(1.0, 2.0)
    assert not LossScale(1.0).overflowed(1.0, math.inf), "the step is not finite without scaling"


def test_state_round_trip() -> None:
    assert LossScale.from_state(LossScale(2.0**9, 17).state()) == LossScale(2.0**9, 17)
    assert LossScale.from_state(None) == LossScale()


@pytest.mark.parametrize(
    "state",
    [
        5,
        {},
        {"value": 2.0},
        {"value": 3.0, "good_steps": 0},
        {"value": -2.0, "good_steps": 0},
        {"value": 0.5, "good_steps": 0},
        {"value": math.inf, "good_steps": 0},
        {"value": math.nan, "good_steps": 0},
        {"value": "2", "good_steps": 0},
        {"value": 2.0, "good_steps": -1},
        {"value": 2.0, "good_steps": GROWTH_STEPS},
        {"value": 2.0, "good_steps": 1.0},
        {"value": 2.0, "good_steps": True},
    ],
)
def test_invalid_state_is_an_error(state: object) -> None:
    with pytest.raises(ArtifactError, match=r"loss_scale .* is not a power of two"):
        LossScale.from_state(state)
