"""The training loop: batches in, optimizer steps out. It is handed everything and knows no file and no prompt."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from lora_accel.config.plan import Plan, derive
from lora_accel.config.schema import TrainingSection
from lora_accel.errors import TrainingError
from lora_accel.training.loss import summed_token_loss
from lora_accel.training.metrics import Metrics
from lora_accel.training.optimizer import learning_rate, set_learning_rate


class StepBatch(Protocol):
    """One rank's micro-batches of a step, and the counts of the whole step over all ranks."""

    @property
    def micro_batches(self) -> Sequence[Any]: ...
    @property
    def num_examples(self) -> int: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def num_supervised_tokens(self) -> int: ...


class TokenKeys(Protocol):
    """A place for the keys of the tokens in hand."""

    keys: torch.Tensor | None  # [B, T] int32


@dataclasses.dataclass(frozen=True)
class Run:
    """All that the loop needs, ready to use."""

    accelerator: Accelerator
    model: torch.nn.Module
    trainable: list[torch.nn.Parameter]
    optimizer: torch.optim.Optimizer
    dropout: TokenKeys
    """Where the adapter's dropout reads the keys of the tokens in hand."""
    training: TrainingSection
    plan: Plan
    seed: int
    batch_of: Callable[[int], StepBatch]
    """The 0-based step's batch on this rank."""
    evaluate: Callable[[], dict[str, Any]]
    save: Callable[[int], None]
    """Save a checkpoint after so many steps; every rank calls it."""
    metrics: Metrics


@dataclasses.dataclass(frozen=True)
class StepResult:
    """What one step did."""

    loss: float
    """Mean per supervised token, before the update."""
    grad_norm: float
    learning_rate: float
    batch: StepBatch


def train(run: Run, start: int) -> None:
    """Make the steps from `start` (0-based) to the plan's last. A resumed run takes the same road as a fresh one."""
    run.model.train()
    for step in range(start, run.plan.total_steps):
        result = train_step(run, step)
        done = step + 1
        run.metrics.count(done, result)
        if run.plan.logs_after(done):
            run.metrics.log_step(done, result)
        if run.plan.evaluates_after(done):
            run.metrics.log_evaluation(done, run.evaluate())
            run.model.train()
        if run.plan.saves_after(done):
            run.save(done)


def train_step(run: Run, step: int) -> StepResult:
    """Make one optimizer step in which every supervised token of every rank weighs the same.

    Raises:
        TrainingError: the loss or the gradient is not finite; the weights are as before the step.
    """
    accelerator, batch = run.accelerator, run.batch_of(step)
    rate = learning_rate(step, run.training, run.plan)
    set_learning_rate(run.optimizer, rate)
    torch.manual_seed(derive(run.seed, step))  # for dropout of the base itself, where a model has some
    accelerator.step, accelerator.gradient_accumulation_steps = 0, len(batch.micro_batches)

    # The mean over the step's supervised tokens. DDP and ZeRO average over ranks, and Accelerate (but for
    # DeepSpeed) divides by the micro-batches: both are undone.
    weight = accelerator.num_processes / batch.num_supervised_tokens
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        weight *= len(batch.micro_batches)

    loss_sum = torch.zeros((), device=accelerator.device)
    for micro_batch in batch.micro_batches:
        with accelerator.accumulate(run.model):  # ranks exchange gradients in the last micro-batch only
            micro_batch = micro_batch.to(accelerator.device)
            run.dropout.keys = micro_batch.token_keys
            loss = summed_token_loss(run.model, micro_batch)
            accelerator.backward(loss * weight)
            loss_sum += loss.detach()  # stays on the device: no synchronisation per micro-batch
    norm = accelerator.clip_grad_norm_(run.trainable, run.training.max_grad_norm)
    # The one synchronisation of the step: nothing may be updated before both are known to be finite. (A DeepSpeed
    # engine has clipped and stepped within the last backward; it makes no step with a gradient that is not finite.)
    norm = torch.as_tensor(norm, dtype=loss_sum.dtype, device=loss_sum.device)
    loss, norm = torch.stack([accelerator.reduce(loss_sum), norm]).tolist()
    loss /= batch.num_supervised_tokens

    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise TrainingError(f"step {step + 1}: loss {loss}, gradient norm {norm} at learning rate {rate:.3g}")
    run.optimizer.step()
    run.optimizer.zero_grad()
    return StepResult(loss=loss, grad_norm=norm, learning_rate=rate, batch=batch)
