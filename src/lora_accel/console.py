"""Console output: tables, progress of long stages, and one message per error."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePath
from types import TracebackType

from rich.console import Console
from rich.table import Table
from rich.text import Text
from tqdm import tqdm

from lora_accel.errors import Aborted, ConfigError, Interrupted, LoraAccelError, TrainingError, is_full_disk
from lora_accel.logs import logger
from lora_accel.processes import raise_interrupts
from lora_accel.streams import safe_output

ERROR_DELAY_SECONDS = 5
"""How long a rank other than local rank 0 waits before it reports an error. If local rank 0 failed too, the launcher
ends this rank before that, so the error is printed once."""
QUIET_SECONDS = 2.0
"""Time after which a running stage is shown."""
NAME_WIDTH = 32
"""Maximum width of the first column of a table, so that the rest fits into 80 columns."""
CLEAR_LINE = "\r\x1b[K"
UNUSABLE_PATH = (errno.ENAMETOOLONG, errno.ELOOP)
"""Errors of a path that names nothing: most of Python's `is_file` and `exists` raise them."""
NOISE = (
    "Setting accelerator to CPU",  # DeepSpeed, on every import without a GPU
    "Failed to load CPU gemm_4bit_forward",  # bitsandbytes without its optional `kernels` package
)


def format_table(title: str, rows: Iterable[tuple[str, ...]], headers: tuple[str, ...] | None = None) -> str:
    """Return a table as lines that fit the terminal.

    Args:
        headers: column headers; None = two columns, names and values, without headers.
    """
    rows = list(rows)
    table = Table(title=Text(title), title_justify="left", show_header=headers is not None)
    names_fit = all(len(row[0]) <= NAME_WIDTH for row in rows)
    for number, header in enumerate(headers or ("", "")):
        table.add_column(header, overflow="fold", no_wrap=number == 0 and names_fit)
    for row in rows:
        table.add_row(*map(Text, row))  # a path may contain [brackets]: not markup
    console = Console(soft_wrap=False)
    with console.capture() as capture:
        console.print(table)
    return capture.get().rstrip("\n")


def print_table(title: str, rows: Iterable[tuple[str, ...]], headers: tuple[str, ...] | None = None) -> None:
    """Print a table to stdout; see `format_table`."""
    Stage.hide()
    print(format_table(title, rows, headers), flush=True)


def short_names(paths: Sequence[str]) -> list[str]:
    """Return a short, unique name for each path: itself if it fits, else as few of its last components as possible.

    A name that is still longer than `NAME_WIDTH` is shortened in the middle. Equal paths have equal names.
    """
    names = []
    for path in paths:
        parts = PurePath(path).parts
        suffixes = ["/".join(parts[-count:]) for count in range(1, len(parts) + 1)]
        others = [PurePath(other).parts for other in paths if other != path]
        unique = (
            suffix
            for count, suffix in enumerate(suffixes, start=1)
            if not any(other[-count:] == parts[-count:] for other in others)
        )
        names.append(path if len(path) <= NAME_WIDTH else shorten(next(unique, path), NAME_WIDTH))
    return names


def shorten(text: str, width: int) -> str:
    """Return a text of at most `width` characters: an ellipsis replaces the middle of a longer one."""
    if len(text) <= width:
        return text
    end = (width - 1) // 2
    return f"{text[: width - 1 - end]}…{text[len(text) - end :]}"


def format_seconds(seconds: float) -> str:
    """Return a duration in one or two units: `4.2 s`, `26 s`, `3 min 20 s`, `1 h 18 min`, `2 d 3 h`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    rounded = round(seconds)
    if rounded < 60:
        return f"{rounded} s"
    if rounded < 3600:
        return f"{rounded // 60} min {rounded % 60} s"
    minutes = round(seconds / 60)
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24} h"


class Stage:
    """Context manager that shows a long stage of a command on stderr while it runs.

    On a terminal, one line shows the name of the stage and the elapsed time, and is cleared at the end. Elsewhere, one
    line is printed after `QUIET_SECONDS`. A short stage prints nothing.
    """

    def __init__(self, name: str, *, enabled: bool = True) -> None:
        self._name, self._detail = name, ""
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._show, daemon=True) if enabled else None

    _is_shown = False

    @classmethod
    def hide(cls) -> None:
        """Clear the line of the current stage, if one is shown. Call this before printing anything else."""
        if cls._is_shown:
            print(CLEAR_LINE, end="", file=sys.stderr, flush=True)

    def note(self, detail: str) -> None:
        """Set the text after the name of the stage, such as a count."""
        self._detail = f" {detail}"

    def __enter__(self) -> Stage:
        if self._thread is not None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        if self._thread is not None:
            self._thread.join()

    def _show(self) -> None:
        began, is_terminal = time.monotonic(), sys.stderr.isatty()
        if self._end.wait(QUIET_SECONDS / 4 if is_terminal else QUIET_SECONDS):
            return
        if not is_terminal:
            print(self._name, file=sys.stderr, flush=True)
            return
        Stage._is_shown = True
        while True:
            line = f"{self._name}{self._detail} … {format_seconds(time.monotonic() - began)}"
            print(f"{CLEAR_LINE}{shorten(line, 79)}", end="", file=sys.stderr, flush=True)
            if self._end.wait(1):
                Stage.hide()
                Stage._is_shown = False
                return


def run_command(
    command: Callable[[], object],
    *,
    rank: int = 0,
    reports: bool = True,
    error_file: str | None = None,
    should_continue: bool = False,
) -> int:
    """Run a command and return its exit code. An error of this package is printed to stderr without a traceback.

    An error that occurs on all ranks, such as a wrong config, is printed once per machine: local rank 0 reports it, and
    the launcher ends the other ranks. A rank that fails alone reports its error after `ERROR_DELAY_SECONDS`.

    Args:
        rank: rank of this process.
        reports: whether this process is local rank 0.
        error_file: file in which torchrun (used by `accelerate launch`) expects the error.
        should_continue: whether the command continues if nobody reads its output, because it writes files.
    """
    raise_interrupts()
    with safe_output(should_continue=should_continue):
        return _run(command, rank, reports, error_file)


def _run(command: Callable[[], object], rank: int, reports: bool, error_file: str | None) -> int:
    try:
        try:
            command()
        finally:
            sys.stdout.flush()  # here, so that an error of it is reported
    except Interrupted as stopped:
        if reports:
            _report(stopped)
        return stopped.exit_code
    except Aborted as aborted:
        if reports:
            _report(aborted)
        return aborted.exit_code
    except KeyboardInterrupt:
        if reports:
            _report("interrupted; run the same command to resume from the newest checkpoint")
        return 130
    except Exception as caught:
        error = _own_error(caught)
        if not isinstance(error, LoraAccelError):
            _write_error_file(traceback.format_exc(), error_file)
            raise
        if not reports:
            time.sleep(ERROR_DELAY_SECONDS)
        message = f"error on rank {rank}: {error}" if rank > 0 else f"error: {error}"
        _report(message)
        _write_error_file(message, error_file)
        return error.exit_code
    return 0


def _report(message: object) -> None:
    """Print a message to stderr. If its disk is full, too, the exit code alone has to do."""
    with contextlib.suppress(OSError):
        print(message, file=sys.stderr, flush=True)


def _own_error(error: Exception) -> Exception:
    """Return the error of this package for a full disk, or a path that cannot be used; other errors as they are."""
    if is_full_disk(error):
        return TrainingError(
            f"{error}. Files saved earlier are intact; free up disk space and run the same command again"
        )
    if isinstance(error, PermissionError):
        return ConfigError(
            f"{error.filename or 'a file'}: {error.strerror}: this user may not read or write it; change its "
            "permissions, or choose another path"
        )
    if isinstance(error, OSError) and error.errno in UNUSABLE_PATH and isinstance(error.filename, (str, Path)):
        return ConfigError(f"{shorten(str(error.filename), 200)}: {error.strerror}; check this path")
    if isinstance(error, UnicodeEncodeError) and error.reason == "surrogates not allowed":
        return ConfigError(f"{shorten(ascii(error.object), 200)}: is not UTF-8; rename this file or folder")
    return error


def show_logs() -> None:
    """Print the package's messages: information to stdout, warnings to stderr, without a prefix."""
    if not any(isinstance(handler, _LogHandler) for handler in logger.handlers):
        logger.addHandler(_LogHandler())
        logger.setLevel(logging.INFO)
        logger.propagate = False


class _LogHandler(logging.Handler):
    """Prints messages without breaking a progress bar or the line of a stage."""

    def emit(self, record: logging.LogRecord) -> None:
        stream = sys.stderr if record.levelno >= logging.WARNING else sys.stdout
        try:
            Stage.hide()
            tqdm.write(self.format(record), file=stream)
            stream.flush()
        except Exception:
            self.handleError(record)


def silence_libraries() -> None:
    """Turn off warnings and progress bars of other libraries that do not help users of this package."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for name in ("DeepSpeed", "bitsandbytes", "bitsandbytes.backends.cpu.ops"):
        logging.getLogger(name).addFilter(_is_not_noise)
    warnings.filterwarnings("ignore", module=r"(torch|transformers|peft|accelerate|deepspeed|bitsandbytes)\b")


def _write_error_file(message: str, error_file: str | None) -> None:
    if error_file:
        text = json.dumps({"message": message, "timestamp": int(time.time())})
        with contextlib.suppress(OSError):  # the disk is full, perhaps: the message has been printed
            Path(error_file).write_text(text, encoding="utf-8")
        # torchrun reports the rank that failed first, by these timestamps in seconds: ranks that fail as a consequence
        # must have later ones.
        time.sleep(1.1)


def _is_not_noise(record: logging.LogRecord) -> bool:
    return not any(text in record.getMessage() for text in NOISE)
