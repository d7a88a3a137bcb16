"""What a person sees of a command: tables, one clear message for an error, and less noise of other libraries."""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lora_accel.errors import Interrupted, LoraAccelError, TrainingError, is_full_disk

PATIENCE_SECONDS = 5
"""A launcher looks after its processes several times a second, and ends all when one has failed."""
NOISE = (
    "Setting accelerator to CPU",  # DeepSpeed, on every import without a GPU
    "Failed to load CPU gemm_4bit_forward",  # bitsandbytes without its optional `kernels` package
)


def print_table(title: str, rows: Iterable[tuple[str, ...]], heads: tuple[str, ...] | None = None) -> None:
    """Print rows under a title; without heads, as names and values."""
    table = Table(title=Text(title), title_justify="left", show_header=heads is not None)
    for head in heads or ("", ""):
        table.add_column(head, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))  # anybody's words, a path with brackets say, and no markup
    Console(soft_wrap=False).print(table)


def run_command(
    command: Callable[[], object], *, rank: int = 0, speaks: bool = True, error_file: str | None = None
) -> int:
    """Run a command and return its exit code; an error of ours is a message on stderr, without a traceback.

    Of the processes of a machine the first tells it. What all meet (a wrong config) is told once: the launcher ends the
    others as soon as the first has failed. What one of the others meets alone it tells itself, a little later.

    Args:
        rank: of this process among those launched.
        speaks: whether it is the first on its machine.
        error_file: where torchrun (which `accelerate launch` uses) looks for an error, to show it last.
    """
    try:
        command()
    except Interrupted as stopped:
        if speaks:
            print(stopped, file=sys.stderr, flush=True)
        return stopped.exit_code
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the newest checkpoint", file=sys.stderr)
        return 130
    except Exception as caught:
        error: Exception = caught
        if is_full_disk(caught):
            error = TrainingError(f"{caught}. What was saved before is as it was; make room, and say it again")
        if not isinstance(error, LoraAccelError):
            _leave_message(traceback.format_exc(), error_file)
            raise
        if not speaks:
            time.sleep(PATIENCE_SECONDS)
        message = f"error on rank {rank}: {error}" if rank > 0 else f"error: {error}"
        print(message, file=sys.stderr, flush=True)
        _leave_message(message, error_file)
        return error.exit_code
    return 0


def hush_libraries() -> None:
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
