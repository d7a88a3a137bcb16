"""status.json: whether a run lives, how far it came, and where its newest checkpoint is."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from lora_accel.saving.commit import write_json

Note = Callable[[int, "Path | None"], None]


@contextlib.contextmanager
def running(folder: Path, step: int, *, enabled: bool) -> Iterator[Note]:
    """Keep status.json while a run lives: running, then done, preempted (Ctrl-C) or failed.

    Args:
        enabled: whether this process writes; the main process does.

    Yields:
        A function to note a step and the checkpoint that holds it.
    """
    latest: tuple[int, Path | None] = (step, None)

    def write(state: str) -> None:
        if enabled:
            values = {"state": state, "step": latest[0], "checkpoint": latest[1] and str(latest[1])}
            write_json(folder / "status.json", values | {"pids": [os.getpid()]})

    def note(step: int, checkpoint: Path | None) -> None:
        nonlocal latest
        latest = (step, checkpoint)
        write("running")

    write("running")
    try:
        yield note
    except BaseException as error:
        write("preempted" if isinstance(error, KeyboardInterrupt) else "failed")
        raise
    write("done")
