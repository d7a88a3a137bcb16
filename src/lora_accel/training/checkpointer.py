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
from lora_accel.distributed.collectives import on_all_ranks
from lora_accel.saving.checkpoint import save_checkpoint
from lora_accel.saving.provenance import Provenance
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

    @property
    def folder(self) -> Path:
        """The folder of the checkpoints."""
        return Path(self.config.output_dir) / "checkpoints"

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
            protected=section.resume,
        )
        self.note(progress.step, saved)
