"""The training loop: batches in, optimizer steps out. Everything it uses is passed in; it reads no files."""

from __future__ import annotations

import math
import signal
from collections.abc import Mapping
from typing import Any

from accelerate.utils import gather_object

from lora_accel.errors import Interrupted, TrainingError, exit_code_of
from lora_accel.faults import fault_point
from lora_accel.saving.metrics_file import eval_metrics
from lora_accel.training.progress import Progress, StepResult
from lora_accel.training.step import Run, train_step


def train(run: Run, progress: Progress) -> None:
    """Run the steps from `progress` to the last one of the plan, or until evaluations stop improving.

    New and resumed runs take the same code path.

    Raises:
        TrainingError: more than `training.skip_nonfinite` steps were not finite; the last one changed no weight.
        Interrupted: a rank was asked to stop; a checkpoint is saved.
    """
    # The loop saves a checkpoint before it evaluates, so a crash during evaluation loses no step. A run that resumes
    # from that checkpoint evaluates first.
    if evaluate_if_due(run, progress):
        return
    run.model.train()
    for step in range(progress.step, run.plan.total_steps):
        result = train_step(run, step)
        done = progress.step = step + 1
        run.metrics.finish_step(done, result)
        if result.overflowed:
            progress.overflowed += 1
            log_overflow(run, done)
        elif not result.is_finite:
            progress.skipped += 1
            log_skipped(run, done, result, progress.skipped)
        elif run.plan.logs_after(done):
            run.metrics.log_step(done, result)
        if run.plan.saves_after(done) or result.should_stop:
            run.checkpointer.save(progress)
        if result.should_stop:
            raise interrupted(run, done)
        if evaluate_if_due(run, progress):
            return


def evaluate_if_due(run: Run, progress: Progress) -> bool:
    """Evaluate after `progress.step` steps if the plan asks for it.

    Returns:
        Whether the run stops early, because the last evaluations did not improve. The same on every rank.
    """
    done = progress.step
    if not run.plan.evaluates_after(done):
        return False
    fault_point("evaluate.begin")
    values = run.evaluator.evaluate(run.metrics)
    run.metrics.log_evaluation(done, values)
    run.model.train()
    if done == 0:
        return False  # it has no checkpoint that could be selected
    selection = run.checkpointer.selection
    kept = {"eval_tokens", selection.metric, *run.checkpointer.config.evaluation.metric_directions}
    metrics = {name: value for name, value in finite_metrics(values).items() if name in kept}
    evaluation: dict[str, float] = {"step": done, "fingerprint": run.evaluator.fingerprint, **metrics}
    progress.evaluations = selection.shorten([*progress.evaluations, evaluation])
    if done == run.plan.total_steps or not selection.has_stalled(progress.evaluations):
        return False
    best = selection.best(progress.evaluations)
    run.metrics.log_event(done, "early_stop", metric=selection.metric, best_step=best and best["step"])
    run.metrics.print(
        f"step {done}: stopping early: {selection.metric} has not improved in the last {selection.patience} evaluations"
    )
    return True


def finite_metrics(values: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics among the values of an evaluation, without those that are not finite."""
    return {name: value for name, value in eval_metrics(values).items() if math.isfinite(value)}


def log_overflow(run: Run, done: int) -> None:
    """Log a step that the loss scale skipped; the next one is computed at half the scale."""
    assert run.loss_scale is not None
    run.metrics.log_event(done, "overflow", loss_scale=run.loss_scale.value)
    run.metrics.print(f"step {done}: float16 gradients overflowed; skipped, loss scale now {run.loss_scale.value:g}")


def log_skipped(run: Run, done: int, result: StepResult, skipped: int) -> None:
    """Log a step without an update.

    Raises:
        TrainingError: more than `training.skip_nonfinite` steps were skipped.
    """
    rate, allowed = result.learning_rate, run.training.skip_nonfinite
    what = f"step {done}: loss {result.loss}, gradient norm {result.grad_norm} at learning rate {rate:.3g}"
    if skipped > allowed:
        raise TrainingError(
            f"{what}, on the rows {result.batch.rows}. The weights are as before this step and the newest checkpoint "
            "is kept; check these rows, lower training.learning_rate in another output_dir, or skip such steps with "
            f"training.skip_nonfinite={skipped}"
        )
    values = {"loss": str(result.loss), "grad_norm": str(result.grad_norm), "rows": result.batch.rows}
    run.metrics.log_event(done, "skipped", learning_rate=rate, **values)
    run.metrics.print(f"{what}: skipped ({skipped} of {allowed} that training.skip_nonfinite allows)")


def interrupted(run: Run, done: int) -> Interrupted:
    """Return the error that ends a run that was asked to stop, the same on every rank."""
    causes = {rank: cause for rank, cause in enumerate(gather_object([run.stop.cause()])) if cause is not None}
    rank, cause = next(iter(causes.items()))
    run.metrics.log_event(done, "stopped", cause=cause)
    return Interrupted(
        f"stopped by {cause} on rank {rank} after step {done}; checkpoint saved. Run the same command to resume",
        exit_code=exit_code_of(signal.Signals.__members__.get(cause, signal.SIGTERM)),
    )
