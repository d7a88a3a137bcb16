"""The error of a run that is out of memory: the options that would take less, and how much less."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from lora_accel.config.schema import RunConfig
from lora_accel.console import Stage
from lora_accel.errors import TrainingError, first_line, is_out_of_memory
from lora_accel.planning.remedies import cheaper_options
from lora_accel.setup.data import PreparedData

FALLBACK = "training.micro_batch_tokens, training.activation_checkpointing=true, quantization.bits=4, ZeRO-3"
"""Named if the estimate fails, too."""
MIN_BYTES = 500_000
"""Options that save less are not named: 0 MB."""


@contextlib.contextmanager
def explained_out_of_memory(config: RunConfig, data: PreparedData, mixed_precision: str) -> Iterator[None]:
    """Raise a failed allocation in the block as an error that names the options that would take less memory.

    Raises:
        TrainingError: an allocation failed.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = first_line(error)
    else:
        return
    # After the handler: the traceback of the error, which keeps the tensors of the failed step, is gone.
    raise TrainingError(_message(reason, config, data, mixed_precision))


def _message(reason: str, config: RunConfig, data: PreparedData, mixed_precision: str) -> str:
    has_checkpoint = any(Path(config.output_dir).glob("checkpoints/step-*"))
    lines = [f"out of memory: {reason}.{' The newest checkpoint is kept.' * has_checkpoint}"]
    try:
        with Stage("estimating what would take less memory"):
            options = cheaper_options(config, data, mixed_precision)
    except Exception:  # memory is short, and the estimate is only a help
        options = []
    options = [(overrides, less) for overrides, less in options if less >= MIN_BYTES]
    if not options:
        return f"{lines[0]} What takes less: {FALLBACK}. The same command with one of them resumes"
    lines.append("These options take less on each device, by the estimate of `lora-accel plan`:")
    lines += [f"  {' '.join(overrides)}: {_size(less)} less" for overrides, less in options]
    if config.training.activation_checkpointing == "auto":
        lines.append("What activation_checkpointing=auto has saved already counts as less")
    lines.append("The same command with them resumes; quantization.bits=4 trains another base, in another output_dir")
    return "\n".join(lines)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.0f} MB"
