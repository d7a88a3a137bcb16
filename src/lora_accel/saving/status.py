"""status.json: whether a run lives, how far it came, and where its newest checkpoint is."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from lora_accel.errors import Interrupted
from lora_accel.saving.atomic import write_json

Note = Callable[[int, "Path | None"], None]


@contextlib.contextmanager
def running(folder: Path, step: int, checkpoint: Path | None, *, pids: Sequence[int], enabled: bool) -> Iterator[Note]:
    """Keep status.json while a run lives: running, then done, preempted (it was asked to stop) or failed.

    Args:
        pids: of all ranks, in their order; each is one of the machine that it runs on.
        enabled: whether this process writes; the main process does.

    Yields:
        A function to note a step and the checkpoint that holds it.
    """
    latest = (step, checkpoint)

    def write(state: str) -> None:
        if enabled:
            values = {"state": state, "step": latest[0], "checkpoint": latest[1] and str(latest[1])}
            write_json(folder / "status.json", values | {"pids": list(pids), "host": socket.gethostname()})

    def note(step: int, checkpoint: Path | None) -> None:
        nonlocal latest
        latest = (step, checkpoint)
        write("running")

    write("running")
    try:
        yield note
    except BaseException as error:
        with contextlib.suppress(OSError):  # on a full disk the error itself matters more
            write("preempted" if isinstance(error, (KeyboardInterrupt, Interrupted)) else "failed")
        raise
    write("done")
