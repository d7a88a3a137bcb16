"""The package's few exceptions, each with the exit code of the command that meets it.

    LoraAccelError                1   something here went wrong
    ├── UserError                 2   the config, the data or the request is wrong; nothing was written
    │   ├── ConfigError               an option or the file that holds it
    │   ├── DataError                 a data file, a row, a template
    │   └── ArtifactError             an adapter, a checkpoint or a base model that cannot be used
    ├── TrainingError             3   training cannot go on; the last good checkpoint is kept
    └── Interrupted        128 + n   stopped by signal n after a checkpoint; the same command resumes

A message says which option, file, line or row is wrong, and the way out. It is shown without a traceback.
"""

from __future__ import annotations

import difflib
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
    """A signal asked the run to stop; its state is saved."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ` (did you mean X?)` for the nearest known name, or an empty string."""
    nearest = difflib.get_close_matches(word, sorted(known), n=1, cutoff=0.55)
    return f" (did you mean {nearest[0]}?)" if nearest else ""
