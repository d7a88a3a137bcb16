"""Propagate an error of one rank to all ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from accelerate import Accelerator
from accelerate.utils import gather_object

from lora_accel.errors import TrainingError, is_full_disk


@contextlib.contextmanager
def on_all_ranks(accelerator: Accelerator, what: str) -> Iterator[None]:
    """Run a block that may fail on a single rank; if it does, raise on all ranks, so that none waits forever.

    The block must not contain collectives. It ends with one.

    Args:
        what: what the block does, for the message.

    Raises:
        TrainingError: a disk is full or cannot be written to, or another rank failed. Other errors are re-raised
            unchanged on the rank where they occurred.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    full = failure is not None and is_full_disk(failure)
    reports = gather_object([None if failure is None else (f"{type(failure).__name__}: {failure}", full)])
    if failure is not None and not full:
        raise failure
    for rank, report in enumerate(reports):
        if report is not None:
            message, full = report
            remedy = "Free up space and run" if full else "Run"
            raise TrainingError(
                f"{what} failed on rank {rank}: {message}. Earlier files are unchanged. {remedy} the same command to "
                "resume."
            ) from failure
