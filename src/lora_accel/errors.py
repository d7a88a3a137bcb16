"""The exceptions of this package, and the exit code that each one gives a command.

    LoraAccelError                1   any other failure
    ├── UserError                 2   the config, the data or the request is wrong; nothing was written
    │   ├── ConfigError               an option or the config file
    │   ├── DataError                 a data file, a row or a chat template
    │   └── ArtifactError             an adapter, a checkpoint or a base model that cannot be used
    ├── TrainingError             3   training cannot continue; the last good checkpoint is kept
    └── Interrupted     143/131/130   stopped by Ctrl-C (130), Ctrl-\\ (131) or a signal (143); a checkpoint is saved
    Aborted (KeyboardInterrupt)       same: a signal before training started; there is nothing to save

A message names the option, file, line or row that is wrong, and how to fix it. It is printed without a traceback.
"""

from __future__ import annotations

import difflib
import errno
import signal
from collections.abc import Iterable


class LoraAccelError(Exception):
    """Base class of the exceptions that this package raises."""

    exit_code = 1


class UserError(LoraAccelError):
    """An error that the user can fix."""

    exit_code = 2


class ConfigError(UserError):
    """The run config, a command-line override or another option is wrong."""


class DataError(UserError):
    """A data file, one of its rows or a chat template cannot be used."""


class ArtifactError(UserError):
    """An adapter, a checkpoint or a base model is missing, corrupt or does not match."""


class TrainingError(LoraAccelError):
    """Training cannot continue, for example because the loss is not finite."""

    exit_code = 3


class Interrupted(LoraAccelError):
    """The run was stopped and its state saved. The same command resumes it."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Aborted(KeyboardInterrupt):
    """A signal ended the command before training started. Not an `Exception`, so that no handler hides it."""

    def __init__(self, number: int) -> None:
        name = signal.Signals(number).name
        super().__init__(f"stopped by {name} before training started; run the same command to start again")
        self.exit_code = exit_code_of(number)


def exit_code_of(number: int) -> int:
    """Return the exit code of a run that a signal stopped: 130 for Ctrl-C, 131 for Ctrl-\\, 143 for any other."""
    return 128 + (number if number in (signal.SIGINT, signal.SIGQUIT) else signal.SIGTERM)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ` (did you mean X?)` with the most similar known name, or an empty string."""
    matches = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.55)
    return f" (did you mean {matches[0]}?)" if matches else ""


def join_or(names: Iterable[str]) -> str:
    """Return `A, B or C`."""
    *rest, last = names
    return f"{', '.join(rest)} or {last}" if rest else last


def join_and(names: Iterable[str]) -> str:
    """Return `A, B and C`."""
    *rest, last = names
    return f"{', '.join(rest)} and {last}" if rest else last


def first_line(error: BaseException) -> str:
    """Return the first line of a library's error message, without a final period; two if the first only announces."""
    first, *rest = str(error).strip().split("\n")
    if first.endswith(":") and rest:
        first += f" {rest[0].strip()}"
    return first.rstrip(".")


ALLOCATION_ERRORS = ("can't allocate memory", "not enough memory", "out of memory")
"""In the messages of errors that torch's allocators raise; that of the CPU raises RuntimeError."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or in the machine's memory."""
    is_runtime = isinstance(error, RuntimeError) and any(text in str(error) for text in ALLOCATION_ERRORS)
    return isinstance(error, MemoryError) or is_runtime


def is_full_disk(error: BaseException) -> bool:
    """Whether an error means that a disk is full, over its quota or not writable."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
    # Libraries written in Rust (safetensors, tokenizers) give the number in the message only.
    return any(f"os error {number})" in str(error) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
