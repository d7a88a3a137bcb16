"""The loss scale follows torch's GradScaler, and a checkpoint's is taken only if it is one."""

from __future__ import annotations

import math
import random

import pytest
import torch

from lora_accel.distributed.backend import ReplicatedBackend
from lora_accel.errors import ArtifactError
from lora_accel.training.loss_scale import GROWTH_STEPS, INITIAL, LossScale


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3])
def test_the_rules_are_those_of_gradscaler(share: float) -> None:
    """Value and counter after each of 5,000 steps, overflows at random."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.0)
    theirs, ours, draw = torch.amp.GradScaler("cpu"), LossScale(), random.Random(0)
    for _ in range(5000):
        overflowed = draw.random() < share and ours.value > 1
        theirs.scale(torch.zeros(()))
        parameter.grad = torch.tensor([math.inf if overflowed else 1.0])
        theirs.step(optimizer)
        theirs.update()
        ours.update(overflowed=overflowed)
        state = theirs.state_dict()
        assert (ours.value, ours.good_steps) == (state["scale"], state["_growth_tracker"])


def test_unscaling_changes_no_bit() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(100)) for _ in range(3)]
    torch.manual_seed(0)
    gradients = [torch.randn(100), torch.randn(100), None]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = None if gradient is None else gradient * INITIAL
    ReplicatedBackend().unscale_gradients(parameters, LossScale().value)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        assert parameter.grad is None if gradient is None else torch.equal(parameter.grad, gradient)


def test_only_a_finite_loss_overflows_and_only_while_there_is_a_scale() -> None:
    scale = LossScale()
    assert scale.overflowed(1.0, math.inf)
    assert scale.overflowed(1.0, math.nan)
    assert not scale.overflowed(math.nan, math.nan), "no scale makes this loss finite"
    assert not scale.overflowed(1.0, 2.0)
    assert not LossScale(1.0).overflowed(1.0, math.inf), "nothing is scaled, so it is a step that is not finite"


def test_a_checkpoint_gives_back_what_it_took() -> None:
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
def test_what_is_no_scale_is_an_error(state: object) -> None:
    with pytest.raises(ArtifactError, match=r"loss_scale .* is not a power of two"):
        LossScale.from_state(state)
