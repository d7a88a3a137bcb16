"""status.json: the state of a run, its current step and its newest checkpoint."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from lora_accel.errors import Interrupted, LoraAccelError
from lora_accel.saving.atomic import read_json, write_json
from lora_accel.saving.output_dir import FolderIdentity

Note = Callable[[int, "Path | None"], None]
"""Records the current step and the newest checkpoint in status.json."""


@contextlib.contextmanager
def track_status(
    folder: Path, step: int, checkpoint: Path | None, *, total_steps: int, pids: Sequence[int], enabled: bool
) -> Iterator[Note]:
    """Write status.json during a run: its state is running, then done, preempted (asked to stop) or failed.

    Args:
        total_steps: of the plan. A run that stopped early is done after fewer steps.
        pids: process ids of all ranks in order, each on the machine that the rank runs on.
        enabled: whether this process writes; True on the main process.

    Yields:
        A function that records the current step and the newest checkpoint.

    Raises:
        TrainingError: the run folder was moved or deleted in the meantime.
    """
    latest, identity = (step, checkpoint), FolderIdentity.of(folder) if enabled else None

    def write(state: str) -> None:
        if identity is not None:
            identity.check()
            values = {"state": state, "step": latest[0], "total_steps": total_steps}
            values |= {"checkpoint": latest[1] and str(latest[1]), "pids": list(pids), "host": socket.gethostname()}
            write_json(folder / "status.json", values)

    def note(step: int, checkpoint: Path | None) -> None:
        nonlocal latest
        latest = (step, checkpoint)
        write("running")

    write("running")
    try:
        yield note
    except BaseException as error:
        with contextlib.suppress(OSError, LoraAccelError):  # a full disk must not hide the original error
            write("preempted" if isinstance(error, (KeyboardInterrupt, Interrupted)) else "failed")
        raise
    write("done")


def write_state(folder: Path, state: str) -> None:
    """Change the state in status.json, for a process that ends while its main thread waits in a collective.

    Raises:
        ArtifactError: there is no valid status.json.
    """
    file = folder / "status.json"
    write_json(file, read_json(file) | {"state": state})
