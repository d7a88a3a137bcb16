"""What a person sees of a command: tables, one clear message for an error, and less noise of other libraries."""

from __future__ import annotations

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

from lora_accel.errors import Aborted, Interrupted, LoraAccelError, TrainingError, is_full_disk

PATIENCE_SECONDS = 5
"""A launcher looks after its processes several times a second, and ends all when one has failed."""
QUIET_SECONDS = 2.0
"""A stage that takes longer than this is shown while it runs."""
NAME_WIDTH = 32
"""Longest name in the first column of a table, so that the rest fits 80 columns."""
CLEAR_LINE = "\r\x1b[K"
NOISE = (
    "Setting accelerator to CPU",  # DeepSpeed, on every import without a GPU
    "Failed to load CPU gemm_4bit_forward",  # bitsandbytes without its optional `kernels` package
)


def print_table(title: str, rows: Iterable[tuple[str, ...]], heads: tuple[str, ...] | None = None) -> None:
    """Print rows under a title; without heads, as names and values."""
    rows = list(rows)
    table = Table(title=Text(title), title_justify="left", show_header=heads is not None)
    names_fit = all(len(row[0]) <= NAME_WIDTH for row in rows)
    for number, head in enumerate(heads or ("", "")):
        table.add_column(head, overflow="fold", no_wrap=number == 0 and names_fit)
    for row in rows:
        table.add_row(*map(Text, row))  # anybody's words, a path with brackets say, and no markup
    Stage.hide()
    Console(soft_wrap=False).print(table)


def short_names(paths: Sequence[str]) -> list[str]:
    """Return a short name for each path: its last components, as many as tell it from the others.

    A name that is still longer than `NAME_WIDTH` is cut in the middle. Equal paths have equal names.
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
    """Return a text of at most so many characters: the middle of a longer one is replaced by an ellipsis."""
    if len(text) <= width:
        return text
    end = (width - 1) // 2
    return f"{text[: width - 1 - end]}…{text[len(text) - end :]}"


def format_seconds(seconds: float) -> str:
    """Return a duration for a person: `4.2 s`, `26 s`, `3 min 20 s`, `1 h 18 min`, `2 d 3 h`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    minutes = round(seconds / 60)
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24} h"


class Stage:
    """A stage of a command that may take long; it is shown on stderr while it runs.

    On a terminal one line shows what is done and for how long, and disappears at the end. Elsewhere one line is written
    once the stage has taken `QUIET_SECONDS`. A short stage shows nothing.
    """

    def __init__(self, what: str, *, enabled: bool = True) -> None:
        self._what, self._detail = what, ""
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._show, daemon=True) if enabled else None

    _is_shown = False

    @classmethod
    def hide(cls) -> None:
        """Clear the line of the stage that is shown, if there is one, before something else is printed."""
        if cls._is_shown:
            print(CLEAR_LINE, end="", file=sys.stderr, flush=True)

    def note(self, detail: str) -> None:
        """Set what is shown after the name of the stage, such as a count."""
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
            print(self._what, file=sys.stderr, flush=True)
            return
        Stage._is_shown = True
        while True:
            line = f"{self._what}{self._detail} … {format_seconds(time.monotonic() - began)}"
            print(f"{CLEAR_LINE}{shorten(line, 79)}", end="", file=sys.stderr, flush=True)
            if self._end.wait(1):
                Stage.hide()
                Stage._is_shown = False
                return


def run_command(
    command: Callable[[], object], *, rank: int = 0, reports: bool = True, error_file: str | None = None
) -> int:
    """Run a command and return its exit code; an error of ours is a message on stderr, without a traceback.

    Of the processes of a machine the first tells it. What all meet (a wrong config) is told once: the launcher ends the
    others as soon as the first has failed. What one of the others meets alone it tells itself, a little later.

    Args:
        rank: of this process among those launched.
        reports: whether it is the first on its machine.
        error_file: where torchrun (which `accelerate launch` uses) looks for an error, to show it last.
    """
    try:
        command()
    except Interrupted as stopped:
        if reports:
            print(stopped, file=sys.stderr, flush=True)
        return stopped.exit_code
    except Aborted as aborted:
        if reports:
            print(aborted, file=sys.stderr, flush=True)
        return aborted.exit_code
    except KeyboardInterrupt:
        if reports:
            print("interrupted; the same command goes on from the newest checkpoint", file=sys.stderr, flush=True)
        return 130
    except Exception as caught:
        error: Exception = caught
        if is_full_disk(caught):
            error = TrainingError(f"{caught}. What was saved before is as it was; make room, and say it again")
        if not isinstance(error, LoraAccelError):
            _leave_message(traceback.format_exc(), error_file)
            raise
        if not reports:
            time.sleep(PATIENCE_SECONDS)
        message = f"error on rank {rank}: {error}" if rank > 0 else f"error: {error}"
        print(message, file=sys.stderr, flush=True)
        _leave_message(message, error_file)
        return error.exit_code
    return 0


def silence_libraries() -> None:
    """Keep warnings and bars of other libraries away that tell a user of this package nothing."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for name in ("DeepSpeed", "bitsandbytes", "bitsandbytes.backends.cpu.ops"):
        logging.getLogger(name).addFilter(_is_no_noise)
    warnings.filterwarnings("ignore", module=r"(torch|transformers|peft|accelerate|deepspeed|bitsandbytes)\b")


def _leave_message(message: str, error_file: str | None) -> None:
    if error_file:
        text = json.dumps({"message": message, "timestamp": int(time.time())})
        Path(error_file).write_text(text, encoding="utf-8")
        time.sleep(1.1)  # times are in whole seconds: what others suffer from our end must be dated later


def _is_no_noise(record: logging.LogRecord) -> bool:
    return not any(text in record.getMessage() for text in NOISE)
