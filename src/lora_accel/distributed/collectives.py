"""What one process cannot do, none does."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from accelerate import Accelerator
from accelerate.utils import gather_object

from lora_accel.errors import TrainingError, is_full_disk


@contextlib.contextmanager
def on_all_ranks(accelerator: Accelerator, what: str) -> Iterator[None]:
    """Run a block that may fail on one process alone: then it fails on all, and none waits for ever.

    No collective may stand in the block. It ends with one.

    Args:
        what: is done, for the message.

    Raises:
        TrainingError: a disk is full or cannot be written to, or another process has failed. Other errors stay as
            they are where they happened.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    full = failure is not None and is_full_disk(failure)
    told = gather_object([None if failure is None else (f"{type(failure).__name__}: {failure}", full)])
    if failure is not None and not full:
        raise failure
    for rank, told_by in enumerate(told):
        if told_by is not None:
            message, full = told_by
            way_out = "make room, and the" if full else "the"
            raise TrainingError(
                f"{what} failed on rank {rank}: {message}. What was saved before is as it was; {way_out} same command "
                "goes on"
            ) from failure
