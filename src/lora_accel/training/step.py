"""One optimizer step."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from accelerate import Accelerator

from lora_accel.batching.batches import Batches
from lora_accel.config.plan import Plan
from lora_accel.config.schema import TrainingSection
from lora_accel.distributed.backend import Backend
from lora_accel.distributed.heartbeat import Position
from lora_accel.faults import fault_point
from lora_accel.model.dropout import DropoutKeys
from lora_accel.randomness import derive_seed
from lora_accel.training.checkpointer import Checkpointer
from lora_accel.training.evaluator import Evaluator
from lora_accel.training.loss import summed_token_loss
from lora_accel.training.loss_scale import LossScale
from lora_accel.training.metrics import Metrics
from lora_accel.training.optimizer import set_learning_rate
from lora_accel.training.progress import StepResult
from lora_accel.training.stopping import Stop


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything the loop needs, ready to use."""

    accelerator: Accelerator
    backend: Backend
    model: torch.nn.Module
    trainable: list[torch.nn.Parameter]
    optimizer: torch.optim.Optimizer
    dropout_keys: DropoutKeys
    """Where the adapter's dropout reads the keys of the current tokens."""
    training: TrainingSection
    plan: Plan
    seed: int
    learning_rate: Callable[[int], float]
    """Of a 0-based step."""
    batches: Batches
    evaluator: Evaluator
    checkpointer: Checkpointer
    metrics: Metrics
    stop: Stop
    """Whether this rank was asked to stop."""
    loss_scale: LossScale | None = None
    """In float16 only."""
    position: Position = dataclasses.field(default_factory=Position)
    """How far this rank has come, for the other ranks."""


def train_step(run: Run, step: int) -> StepResult:
    """Run one optimizer step in which every supervised token of every rank has the same weight.

    If the loss or the gradient norm is not finite on any rank, no rank updates its weights.
    """
    run.position.reach(step, 0)
    fault_point("step.begin")
    accelerator, batch, scale = run.accelerator, run.batches.step(step), run.loss_scale
    rate = run.learning_rate(step)
    set_learning_rate(run.optimizer, rate)
    torch.manual_seed(derive_seed(run.seed, step))  # for dropout in the base model, if it has any
    accelerator.step, accelerator.gradient_accumulation_steps = 0, len(batch.micro_batches)

    # The loss is the mean over the step's supervised tokens: undo the backend's means over ranks and micro-batches.
    factor = run.backend.begin_step(run.optimizer, len(batch.micro_batches), scale.value if scale else None)
    weight = factor / batch.num_supervised_tokens

    loss_sum = torch.zeros((), device=accelerator.device)
    for number, micro_batch in enumerate(batch.micro_batches, start=1):
        with accelerator.accumulate(run.model):  # ranks exchange gradients in the last micro-batch only
            micro_batch = micro_batch.to(accelerator.device)
            run.dropout_keys.keys = micro_batch.token_keys
            if run.training.neftune_alpha is not None:
                run.dropout_keys.lengths = micro_batch.example_lengths
            run.position.reach(step, 2 * number - 1)
            loss = summed_token_loss(run.model, micro_batch, run.training.label_smoothing)
            run.position.reach(step, 2 * number)
            accelerator.backward(loss * weight)
            loss_sum += loss.detach()  # stays on the device: no synchronization per micro-batch
        run.metrics.note_micro_batch(number, len(batch.micro_batches))
    fault_point("step.after_backward")
    if scale:
        run.backend.unscale_gradients(run.trainable, scale.value)
    norm = accelerator.clip_grad_norm_(run.trainable, run.training.max_grad_norm or math.inf)
    # The only synchronization of the step: no weight may change before loss and norm are known to be finite. (A
    # DeepSpeed engine has clipped and stepped in the last backward; it skips a step whose gradient is not finite.)
    # Stop requests are reduced together with the loss, so all ranks stop after the same step at no extra cost.
    stop_requested = torch.full_like(loss_sum, run.stop.cause() is not None)
    sums = accelerator.reduce(torch.stack([loss_sum, stop_requested]))
    norm = torch.as_tensor(norm, dtype=sums.dtype, device=sums.device)
    outcome = torch.cat([sums, norm[None]])
    run.batches.prepare(step + 1)  # while the device still computes this step
    loss, stops, norm = outcome.tolist()

    overflowed = scale is not None and scale.overflowed(loss, norm)
    result = StepResult(loss / batch.num_supervised_tokens, norm, rate, stops > 0, batch, overflowed)
    if result.is_finite:
        run.optimizer.step()
    if scale and (overflowed or result.is_finite):
        scale.update(overflowed=overflowed)
    run.optimizer.zero_grad()
    fault_point("step.after_optimizer")
    return result
