"""What a person sees of a command: tables, one clear message for an error, and less noise of other libraries."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Iterable

from rich.console import Console
from rich.table import Table

from lora_accel.errors import LoraAccelError

NOISE = (
    "Setting accelerator to CPU",  # DeepSpeed, on every import without a GPU
    "Failed to load CPU gemm_4bit_forward",  # bitsandbytes without its optional `kernels` package
)


def print_table(title: str, rows: Iterable[tuple[str, ...]], heads: tuple[str, ...] | None = None) -> None:
    """Print rows under a title; without heads, as names and values."""
    table = Table(title=title, title_justify="left", show_header=heads is not None)
    for head in heads or ("", ""):
        table.add_column(head, overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console(soft_wrap=False).print(table)


def run_command(command: Callable[[], object]) -> int:
    """Run a command and return its exit code; an error of ours is a message on stderr, without a traceback."""
    try:
        command()
    except LoraAccelError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the newest checkpoint", file=sys.stderr)
        return 130
    return 0


def hush_libraries() -> None:
    """Keep warnings and bars of other libraries away that tell a user of this package nothing."""
    import datasets
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    for name in ("DeepSpeed", "bitsandbytes", "bitsandbytes.backends.cpu.ops"):
        logging.getLogger(name).addFilter(_is_no_noise)
    warnings.filterwarnings("ignore", module=r"(torch|transformers|peft|accelerate|deepspeed|bitsandbytes)\b")


def _is_no_noise(record: logging.LogRecord) -> bool:
    return not any(text in record.getMessage() for text in NOISE)
