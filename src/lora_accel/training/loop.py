"""The training loop: batches in, optimizer steps out. It is handed everything and knows no file and no prompt."""

from __future__ import annotations

import dataclasses
import math
import signal
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object

from lora_accel.config.plan import Plan, derive
from lora_accel.config.schema import TrainingSection
from lora_accel.errors import Interrupted, TrainingError
from lora_accel.faults import reach
from lora_accel.saving import zero
from lora_accel.training.loss import summed_token_loss
from lora_accel.training.loss_scale import LossScale
from lora_accel.training.metrics import Metrics
from lora_accel.training.optimizer import learning_rate, set_learning_rate
from lora_accel.training.stopping import Stop


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
    @property
    def rows(self) -> str: ...


class TokenKeys(Protocol):
    """A place for the keys of the tokens in hand."""

    keys: torch.Tensor | None  # [B, T] int32


@dataclasses.dataclass
class Progress:
    """How far a run is. A checkpoint holds it."""

    step: int = 0
    skipped: int = 0
    """Steps so far without an update, since loss or gradient norm was not finite."""
    overflowed: int = 0
    """Steps so far without an update, since the loss scale was too large."""


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
    save: Callable[[Progress], None]
    """Save a checkpoint; every rank calls it."""
    metrics: Metrics
    stop: Stop
    """Whether this rank has been asked to stop."""
    loss_scale: LossScale | None = None
    """In float16 only."""


@dataclasses.dataclass(frozen=True)
class StepResult:
    """What one step did."""

    loss: float
    """Mean per supervised token, before the update."""
    grad_norm: float
    learning_rate: float
    stops: bool
    """Whether any rank has been asked to stop."""
    batch: StepBatch
    overflowed: bool = False
    """Whether the loss scale was too large, so that the update was skipped."""

    @property
    def is_finite(self) -> bool:
        """Whether the update was made: loss and gradient norm are finite."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


def train(run: Run, progress: Progress) -> None:
    """Make the steps from `progress` to the plan's last. A resumed run takes the same path as a fresh one.

    Raises:
        TrainingError: one more step than `training.skip_nonfinite` is not finite; the weights are as before it.
        Interrupted: a rank was asked to stop; a checkpoint is saved.
    """
    # A step is saved before it is evaluated, so that nothing is lost meanwhile; a resumed run evaluates first.
    evaluate_if_due(run, progress.step)
    run.model.train()
    for step in range(progress.step, run.plan.total_steps):
        result = train_step(run, step)
        done = progress.step = step + 1
        run.metrics.count(done, result)
        if result.overflowed:
            progress.overflowed += 1
            log_overflow(run, done)
        elif not result.is_finite:
            progress.skipped += 1
            skip(run, done, result, progress.skipped)
        elif run.plan.logs_after(done):
            run.metrics.log_step(done, result)
        if run.plan.saves_after(done) or result.stops:
            run.save(progress)
        if result.stops:
            raise interrupted(run, done)
        evaluate_if_due(run, done)


def evaluate_if_due(run: Run, done: int) -> None:
    """Evaluate after `done` steps if the plan says so."""
    if run.plan.evaluates_after(done):
        reach("evaluate.begin")
        run.metrics.log_evaluation(done, run.evaluate())
        run.model.train()


def train_step(run: Run, step: int) -> StepResult:
    """Make one optimizer step in which every supervised token of every rank weighs the same.

    If loss or gradient norm is not finite, on whatever rank, the weights stay as they were.
    """
    reach("step.begin")
    accelerator, batch = run.accelerator, run.batch_of(step)
    rate = learning_rate(step, run.training, run.plan)
    set_learning_rate(run.optimizer, rate)
    torch.manual_seed(derive(run.seed, step))  # for dropout of the base itself, where a model has some
    accelerator.step, accelerator.gradient_accumulation_steps = 0, len(batch.micro_batches)

    # The mean over the step's supervised tokens. DDP and ZeRO average over ranks, and Accelerate (but for
    # DeepSpeed) divides by the micro-batches: both are undone.
    weight = accelerator.num_processes / batch.num_supervised_tokens
    scale, sharded = run.loss_scale, accelerator.distributed_type == DistributedType.DEEPSPEED
    if not sharded:
        weight *= len(batch.micro_batches) * (scale.value if scale else 1.0)
    elif scale:
        zero.set_loss_scale(run.optimizer, scale.value)

    loss_sum = torch.zeros((), device=accelerator.device)
    for number, micro_batch in enumerate(batch.micro_batches, start=1):
        with accelerator.accumulate(run.model):  # ranks exchange gradients in the last micro-batch only
            micro_batch = micro_batch.to(accelerator.device)
            run.dropout.keys = micro_batch.token_keys
            loss = summed_token_loss(run.model, micro_batch)
            accelerator.backward(loss * weight)
            loss_sum += loss.detach()  # stays on the device: no synchronisation per micro-batch
        run.metrics.note_micro_batch(number, len(batch.micro_batches))
    reach("step.after_backward")
    if scale and not sharded:
        scale.unscale(run.trainable)
    norm = accelerator.clip_grad_norm_(run.trainable, run.training.max_grad_norm)
    # The one synchronisation of the step: nothing may be updated before loss and norm are known to be finite. (A
    # DeepSpeed engine has clipped and stepped within the last backward; it makes no step with a gradient that is not.)
    # A rank's wish to stop travels with its loss, so that all stop after the same step at no further cost.
    asked = torch.full_like(loss_sum, run.stop.cause() is not None)
    sums = accelerator.reduce(torch.stack([loss_sum, asked]))
    norm = torch.as_tensor(norm, dtype=sums.dtype, device=sums.device)
    loss, stops, norm = torch.cat([sums, norm[None]]).tolist()

    overflowed = scale is not None and scale.overflowed(loss, norm)
    result = StepResult(loss / batch.num_supervised_tokens, norm, rate, stops > 0, batch, overflowed)
    if result.is_finite:
        run.optimizer.step()
    if scale and (overflowed or result.is_finite):
        scale.update(overflowed=overflowed)
    run.optimizer.zero_grad()
    reach("step.after_optimizer")
    return result


def log_overflow(run: Run, done: int) -> None:
    """Log a step that the loss scale has skipped: the next one is computed at half the scale."""
    assert run.loss_scale is not None
    run.metrics.log_event(done, "overflow", loss_scale=run.loss_scale.value)
    run.metrics.say(f"step {done}: float16 gradients overflowed; skipped, loss scale now {run.loss_scale.value:g}")


def skip(run: Run, done: int, result: StepResult, skipped: int) -> None:
    """Note a step that was left out.

    Raises:
        TrainingError: it is one more than `training.skip_nonfinite`.
    """
    rate, allowed = result.learning_rate, run.training.skip_nonfinite
    what = f"step {done}: loss {result.loss}, gradient norm {result.grad_norm} at learning rate {rate:.3g}"
    if skipped > allowed:
        raise TrainingError(
            f"{what}, on the rows {result.batch.rows}. The weights are as before this step and the newest checkpoint "
            "is kept; look at these rows, lower training.learning_rate in another output_dir, or leave such steps out "
            f"with training.skip_nonfinite={skipped}"
        )
    values = {"loss": str(result.loss), "grad_norm": str(result.grad_norm), "rows": result.batch.rows}
    run.metrics.log_event(done, "skipped", learning_rate=rate, **values)
    run.metrics.say(f"{what}: left out ({skipped} of {allowed} that training.skip_nonfinite allows)")


def interrupted(run: Run, done: int) -> Interrupted:
    """Return the error that ends a run which was asked to stop, the same on every rank."""
    causes = {rank: cause for rank, cause in enumerate(gather_object([run.stop.cause()])) if cause is not None}
    rank, cause = next(iter(causes.items()))
    run.metrics.log_event(done, "stopped", cause=cause)
    return Interrupted(
        f"stopped by {cause} (rank {rank}) after step {done}; a checkpoint is saved, and the same command goes on",
        exit_code=128 + (signal.SIGINT if cause == "SIGINT" else signal.SIGTERM),
    )
