"""Measure a checkpoint beside what `accelerator.save_state` writes for the same run: bytes, and seconds of blocking.

    accelerate launch --config_file accelerate_configs/cpu_zero2.yaml scripts/measure_checkpoints.py \\
        --config recipes/quickstart.yaml [section.key=value …]

Trains two steps of a run config in a temporary folder and saves after the second, several times over. `write` is what
writing and syncing the same bytes takes alone. Prints one row of a table.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lora_accel import train
from lora_accel.config.files import read_config
from lora_accel.distributed.launch import exit_process
from lora_accel.saving.checkpoint import save_checkpoint
from lora_accel.saving.discovery import WEIGHTS
from lora_accel.training import checkpointer


def seconds(times: int, action: Callable[[], object]) -> float:
    """Return the median of so many."""
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        action()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def size(folder: Path) -> int:
    """Return the bytes of all files of a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def write_alone(data: list[bytes], folder: Path) -> None:
    """Write and sync bytes."""
    for number, part in enumerate(data):
        with (folder / str(number)).open("wb") as file:
            file.write(part)
            file.flush()
            os.fsync(file.fileno())


def measured(accelerator: Any, model: Any, optimizer: Any, folder: Path, state: dict[str, Any], **options: Any) -> Path:
    """Save as ever, and print what it costs."""
    saved = save_checkpoint(accelerator, model, optimizer, folder, state, **options)

    def again() -> None:
        save_checkpoint(accelerator, model, optimizer, folder, state, **options)

    ours = seconds(7, again)
    data = [path.read_bytes() for path in sorted(saved.iterdir())] if accelerator.is_main_process else []
    bare = seconds(7, lambda: write_alone(data, folder))
    accelerator.wait_for_everyone()
    theirs_at = folder.parent / "save_state"
    theirs = seconds(3, lambda: accelerator.save_state(str(theirs_at)))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        weights = (saved / WEIGHTS).stat().st_size
        kind = f"ZeRO-{accelerator.deepspeed_plugin.zero_stage}" if accelerator.deepspeed_plugin else "no ZeRO"
        cells = (f"{size(saved):,}", f"{size(saved) / weights:.2f}", f"{size(theirs_at):,}")
        times = (f"{ours:.2f}", f"{bare:.2f}", f"{ours - bare:.2f}", f"{theirs:.2f}")
        print(f"| {accelerator.num_processes} x {kind} | {' | '.join(cells + times)} |", flush=True)
    return saved


def main() -> int:
    """Measure as the command line says."""
    parser = argparse.ArgumentParser(description="Measure a checkpoint beside save_state.")
    parser.add_argument("--config", required=True)
    parser.add_argument("overrides", nargs="*")
    asked = parser.parse_args()
    vars(checkpointer)["save_checkpoint"] = measured
    if os.environ.get("RANK", "0") == "0":
        print("| processes | bytes | / adapter | save_state bytes | s | write s | beyond it s | save_state s |")
    # All ranks need one name; only the first may make it.
    folder = Path(tempfile.gettempdir()) / f"measure-checkpoints-{os.getppid()}"  # the launcher's number
    words = [f"output_dir={folder}", "training.max_steps=2", "checkpoint.every_steps=2", "logging.trackers=[]"]
    words += ["data.eval=[]", "evaluation.prompts=[]", "evaluation.every_steps=null"]
    try:
        train.run_training(read_config(asked.config, [*asked.overrides, *words]))
    finally:
        if os.environ.get("RANK", "0") == "0":
            shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    exit_process(main())
