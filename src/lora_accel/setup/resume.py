"""Start a run at step 0, or resume it from a checkpoint, which every rank loads."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from pydantic import ValidationError

from lora_accel.config.plan import Plan
from lora_accel.config.recorded import with_defaults
from lora_accel.config.schema import RunConfig
from lora_accel.config.selection import Selection
from lora_accel.errors import ArtifactError, ConfigError
from lora_accel.logs import logger
from lora_accel.paths import real_path
from lora_accel.saving.atomic import recover_all
from lora_accel.saving.checkpoint import check_changes, load_checkpoint
from lora_accel.saving.discovery import STATE, Checkpoint, find_checkpoint, quarantine
from lora_accel.saving.provenance import Provenance, changes, changes_table
from lora_accel.setup.model import PreparedModel
from lora_accel.training.loss_scale import LossScale
from lora_accel.training.progress import Progress


@dataclasses.dataclass(frozen=True)
class ResumePoint:
    """The state that a run begins from."""

    progress: Progress
    loss_scale: LossScale | None
    """In float16 only."""
    checkpoint: Path | None = None
    """None = step 0."""
    parent_hash: str | None = None
    """Manifest hash of the checkpoint that `checkpoint.resume` named, now or when the run began."""
    parent_path: str | None = None
    """Where that checkpoint was."""


def resume_run(
    config: RunConfig, accelerator: Accelerator, prepared: PreparedModel, provenance: Provenance, plan: Plan
) -> ResumePoint:
    """Clean up after a crash, and load the checkpoint to resume from, if there is one.

    Raises:
        ArtifactError: the checkpoint cannot be used, or has different inputs.
        ConfigError: ranks disagree, or the plan ends before the checkpoint.
    """
    folder = Path(config.output_dir)
    if accelerator.is_main_process:
        recover_all(folder)
        recover_all(folder / "checkpoints")
    accelerator.wait_for_everyone()
    selection = find_checkpoint(folder / "checkpoints", config.checkpoint.resume)
    checkpoint = selection.checkpoint
    check_ranks_agree(provenance, None if checkpoint is None else checkpoint.step)
    allowed_changes: list[str] = []
    if checkpoint is not None:
        allowed_changes = check_changes(checkpoint, provenance, config.checkpoint.allow_changes)
        _check_derived(checkpoint, config.seed if not allowed_changes else None, plan)
        if checkpoint.step > plan.total_steps:
            raise ConfigError(
                f"training: the run has {plan.total_steps} steps, but {checkpoint.folder} is after step "
                f"{checkpoint.step}; raise epochs or max_steps, or name an earlier checkpoint in checkpoint.resume"
            )
        load_checkpoint(
            accelerator,
            prepared.model,
            prepared.optimizer,
            checkpoint,
            optimizer_name=config.training.optimizer,
        )
    if accelerator.is_main_process:
        for line in quarantine(selection, folder / "metrics.jsonl"):
            logger.info(line)
    is_fp16 = accelerator.mixed_precision == "fp16"
    if checkpoint is None:
        return ResumePoint(Progress(), LossScale() if is_fp16 else None)
    logger.info(f"resuming after step {checkpoint.step} from {checkpoint.folder}")
    for line in allowed_changes:
        logger.info(f"changed, allowed by checkpoint.allow_changes:{line}")
    # The checkpoints that another run evaluated are not in this one.
    is_own = real_path(checkpoint.folder.parent) == real_path(folder / "checkpoints")
    evaluations = checkpoint.evaluations if is_own and _kept_same_best(checkpoint, config) else []
    return ResumePoint(
        Progress(checkpoint.step, checkpoint.skipped, checkpoint.overflowed, evaluations),
        LossScale.from_state(checkpoint.state.get("loss_scale")) if is_fp16 else None,
        checkpoint.folder,
        selection.parent_hash,
        selection.parent_path,
    )


def _kept_same_best(checkpoint: Checkpoint, config: RunConfig) -> bool:
    """Whether the run kept the best checkpoint by the same metric until now, so that it exists."""
    now = Selection.from_config(config)
    if not now.keeps_best:
        return True
    try:
        recorded = RunConfig.model_validate(with_defaults(checkpoint.state["provenance"]["config"]))
    except (ValidationError, KeyError, TypeError):
        return False
    then = Selection.from_config(recorded)
    return (then.keeps_best, then.metric, then.is_larger_better) == (True, now.metric, now.is_larger_better)


def _check_derived(checkpoint: Checkpoint, seed: int | None, plan: Plan) -> None:
    """Check what follows from the step of a checkpoint, and from the plan that it was saved with.

    Args:
        seed: of this run; None = it may have another one than the checkpoint, as other inputs.

    Raises:
        ArtifactError: its state has another epoch, number of examples or seed.
    """
    step, recorded_plan = checkpoint.step, checkpoint.state["provenance"].get("plan")
    values = recorded_plan if isinstance(recorded_plan, dict) else {}
    sizes: dict[str, Any] = {name: values.get(name) for name in ("num_examples", "batch_size", "steps_per_epoch")}
    derived = {} if seed is None else {"seed": seed}
    if all(type(size) is int and size > 0 for size in sizes.values()):  # older checkpoints do not record all
        plan = dataclasses.replace(plan, **sizes)
        derived |= {"epoch": plan.position(step)[0], "examples": plan.examples_after(step)}
    for name, expected in derived.items():
        recorded = checkpoint.state.get(name)
        if recorded is not None and recorded != expected:
            raise ArtifactError(
                f"{checkpoint.folder / STATE}: {name}={recorded}, but after step {step} of this run it is {expected}; "
                "name an earlier checkpoint in checkpoint.resume"
            )


def check_ranks_agree(provenance: Provenance, step: int | None) -> None:
    """Check that all ranks have the same config, data, base and checkpoint: machines may see different files.

    Args:
        step: of the checkpoint that this rank would resume from.

    Raises:
        ConfigError: they disagree. Raised on every rank; the message lists the differences.
    """
    mine, *others = gather_object([(provenance, step)])
    for rank, (other, other_step) in enumerate(others, start=1):
        differences = changes(mine[0], other)
        if other_step != mine[1]:
            differences.append(("checkpoint", mine[1], other_step))
        if differences:
            raise ConfigError(
                f"ranks 0 and {rank} disagree (rank 0 -> rank {rank}):\n{changes_table(differences)}\n"
                "Start all ranks with the same command, and give all machines the same files and the same output_dir."
            )
