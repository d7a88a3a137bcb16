"""Saving during training: the checkpoint of a step, and status.json, which names it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from lora_accel.config.plan import Plan
from lora_accel.config.schema import RunConfig
from lora_accel.config.selection import Selection
from lora_accel.distributed.backend import backend_of
from lora_accel.distributed.collectives import on_all_ranks
from lora_accel.errors import TrainingError
from lora_accel.logs import logger
from lora_accel.saving.adapter import unwrap_peft_model
from lora_accel.saving.atomic import why_invalid
from lora_accel.saving.attach import restore_adapter
from lora_accel.saving.checkpoint import save_checkpoint
from lora_accel.saving.discovery import FILES, step_folder
from lora_accel.saving.provenance import Exported, Provenance
from lora_accel.saving.status import Note
from lora_accel.training.loss_scale import LossScale
from lora_accel.training.progress import Progress


@dataclasses.dataclass(frozen=True)
class Checkpointer:
    """Saves a run's checkpoints. Every rank calls `save`; the main process writes."""

    accelerator: Accelerator
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    loss_scale: LossScale | None
    config: RunConfig
    plan: Plan
    provenance: Provenance
    parent_hash: str | None
    parent_path: str | None
    sync_log: Callable[[], None]
    """Flushes metrics.jsonl to disk: the log is never behind a checkpoint."""
    note: Note
    """Writes status.json."""
    reported: set[int] = dataclasses.field(default_factory=set)
    """Steps whose checkpoint was reported as the best one, but unusable."""

    @property
    def folder(self) -> Path:
        """The folder of the checkpoints."""
        return Path(self.config.output_dir) / "checkpoints"

    @property
    def selection(self) -> Selection:
        """Which checkpoint is the best."""
        return Selection.from_config(self.config)

    def protected(self, progress: Progress) -> list[Path]:
        """Return the checkpoints that are not deleted: the one that the run began from, and the best."""
        best = self.selection.step_to_keep(progress.evaluations)
        return [Path(self.config.checkpoint.resume), *([] if best is None else [step_folder(self.folder, best)])]

    def report_unusable_best(self, progress: Progress, *, hashes: bool) -> None:
        """Warn once if the best checkpoint was deleted or damaged: at the end of the run it may be too late.

        The run continues, since a later step may be better.

        Args:
            hashes: whether to read its files and compare their SHA-256, too.
        """
        step = self.selection.step_to_keep(progress.evaluations)
        if not self.accelerator.is_main_process or step is None or step in {progress.step, *self.reported}:
            return
        folder = step_folder(self.folder, step)
        if reason := why_invalid(folder, required=FILES, hashes=hashes):
            self.reported.add(step)
            way_out = "restore the folder from a copy"
            if self.config.checkpoint.export == "best":
                way_out += ", or stop the run and continue with checkpoint.export=last; else it ends without adapter/"
            logger.warning(
                f"note: {folder} has the best {self.selection.metric} so far, but cannot be used: {reason}. Unless a "
                f"later evaluation is better: {way_out}"
            )

    def restore_exported(self, progress: Progress) -> Exported:
        """Restore the weights that adapter/ gets: of the best checkpoint, or of the last step. Every rank calls this.

        Returns:
            Where they are from.

        Raises:
            TrainingError: the best checkpoint was deleted or damaged.
        """
        exported: Exported = {"step": progress.step, "selected": "last"}
        best = self.selection.best(progress.evaluations) if self.config.checkpoint.export == "best" else None
        if best is None:
            return exported
        metric, step = self.selection.metric, int(best["step"])
        if step < progress.step:
            folder = step_folder(self.folder, step)
            with on_all_ranks(self.accelerator, "checking the best checkpoint"):
                if reason := why_invalid(folder, required=FILES):
                    raise TrainingError(
                        f"checkpoint.export=best: {folder} has the best {metric}, but cannot be used: {reason}. To "
                        "export the weights of the last step, run the same command with checkpoint.export=last"
                    )
            restore_adapter(unwrap_peft_model(self.accelerator, self.model), folder, backend_of(self.accelerator))
        return exported | {"step": step, "selected": "best", "metric": metric, "value": best[metric]}

    def save(self, progress: Progress) -> None:
        """Save the state after `progress.step` steps, then delete checkpoints that are no longer needed.

        Raises:
            TrainingError: the disk is full, the run folder was moved or deleted, or a rank failed.
        """
        with on_all_ranks(self.accelerator, "writing metrics.jsonl"):
            self.sync_log()
        section = self.config.checkpoint
        state: dict[str, Any] = {
            "step": progress.step,
            "epoch": self.plan.position(progress.step)[0],
            "examples": self.plan.examples_after(progress.step),
            "skipped": progress.skipped,
            "overflowed": progress.overflowed,
            "loss_scale": None if self.loss_scale is None else self.loss_scale.state(),
            "evaluations": progress.evaluations,
            "seed": self.config.seed,
            "begun_from": self.parent_hash,  # the stored names of parent_hash and parent_path
            "begun_at": self.parent_path,
            "provenance": self.provenance,
        }
        saved = save_checkpoint(
            self.accelerator,
            self.model,
            self.optimizer,
            self.folder,
            state,
            optimizer_name=self.config.training.optimizer,
            keep_last=section.keep_while_training,
            gather=section.gather,
            protected=self.protected(progress),
        )
        self.note(progress.step, saved)
        self.report_unusable_best(progress, hashes=False)
