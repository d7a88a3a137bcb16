"""The package's few exceptions, each with the exit code of the command that meets it.

    LoraAccelError                1   something here went wrong
    ├── UserError                 2   the config, the data or the request is wrong; nothing was written
    │   ├── ConfigError               an option or the file that holds it
    │   ├── DataError                 a data file, a row, a template
    │   └── ArtifactError             an adapter, a checkpoint or a base model that cannot be used
    ├── TrainingError             3   training cannot go on; the last good checkpoint is kept
    └── Interrupted         143/130  asked to stop, by Ctrl-C (130) or otherwise; a checkpoint is saved
    Aborted (KeyboardInterrupt)  143/130  a signal before training started; there is nothing to save

A message says which option, file, line or row is wrong, and the way out. It is shown without a traceback.
"""

from __future__ import annotations

import difflib
import errno
import signal
from collections.abc import Iterable


class LoraAccelError(Exception):
    """Base of every error that this package raises on purpose."""

    exit_code = 1


class UserError(LoraAccelError):
    """The person at the keyboard can mend this."""

    exit_code = 2


class ConfigError(UserError):
    """The run config, or a word that overrides it, is wrong."""


class DataError(UserError):
    """A data file, a row of it, or a chat template cannot be used."""


class ArtifactError(UserError):
    """An adapter, a checkpoint or a base model is damaged, missing, or belongs to something else."""


class TrainingError(LoraAccelError):
    """Training cannot go on (a loss that is not finite, say)."""

    exit_code = 3


class Interrupted(LoraAccelError):
    """Something asked the run to stop; its state is saved, and the same command goes on."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Aborted(KeyboardInterrupt):
    """A signal ended the command before training started. No `Exception`: nothing on the way swallows it."""

    def __init__(self, number: int) -> None:
        name = signal.Signals(number).name
        super().__init__(f"stopped by {name} before training started; run the same command to start again")
        self.exit_code = exit_code_of(number)


def exit_code_of(number: int) -> int:
    """Return the exit code of a run that a signal stopped: 130 for Ctrl-C, 143 for all others."""
    return 128 + (signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ` (did you mean X?)` for the nearest known name, or an empty string."""
    nearest = difflib.get_close_matches(word, sorted(known), n=1, cutoff=0.55)
    return f" (did you mean {nearest[0]}?)" if nearest else ""


def join_or(words: Iterable[str]) -> str:
    """Return `A, B or C`."""
    *rest, last = words
    return f"{', '.join(rest)} or {last}" if rest else last


def is_full_disk(error: BaseException) -> bool:
    """Whether an error says that a disk is full, over its quota, or cannot be written to."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
    # Libraries written in Rust (safetensors, tokenizers) give the number in words.
    return any(f"os error {number})" in str(error) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
