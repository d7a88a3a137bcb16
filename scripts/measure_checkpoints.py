"""Compare size and blocking time of a checkpoint with `accelerator.save_state` on the same run.

    accelerate launch --config_file accelerate_configs/cpu_zero2.yaml scripts/measure_checkpoints.py \\
        --config recipes/quickstart.yaml [section.key=value …]

Trains two steps of a run config in a temporary folder and saves the second several times. `write` is the time of only
writing and syncing the same bytes. Prints one row of a table.
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


def median_seconds(repeats: int, action: Callable[[], object]) -> float:
    """Return the median duration of some calls."""
    durations = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        durations.append(time.perf_counter() - start)
    return statistics.median(durations)


def folder_size(folder: Path) -> int:
    """Return the size of all files of a folder in bytes."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def write_files(data: list[bytes], folder: Path) -> None:
    """Write and sync files."""
    for number, part in enumerate(data):
        with (folder / str(number)).open("wb") as file:
            file.write(part)
            file.flush()
            os.fsync(file.fileno())


def save_and_measure(
    accelerator: Any, model: Any, optimizer: Any, folder: Path, state: dict[str, Any], **options: Any
) -> Path:
    """Save a checkpoint, and print its size and time."""
    saved = save_checkpoint(accelerator, model, optimizer, folder, state, **options)

    def save() -> None:
        save_checkpoint(accelerator, model, optimizer, folder, state, **options)

    save_seconds = median_seconds(7, save)
    data = [path.read_bytes() for path in sorted(saved.iterdir())] if accelerator.is_main_process else []
    write_seconds = median_seconds(7, lambda: write_files(data, folder))
    accelerator.wait_for_everyone()
    state_folder = folder.parent / "save_state"
    state_seconds = median_seconds(3, lambda: accelerator.save_state(str(state_folder)))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        weights = (saved / WEIGHTS).stat().st_size
        kind = f"ZeRO-{accelerator.deepspeed_plugin.zero_stage}" if accelerator.deepspeed_plugin else "no ZeRO"
        cells = [f"{folder_size(saved):,}", f"{folder_size(saved) / weights:.2f}", f"{folder_size(state_folder):,}"]
        times = (save_seconds, write_seconds, save_seconds - write_seconds, state_seconds)
        cells += [f"{seconds:.2f}" for seconds in times]
        print(f"| {accelerator.num_processes} x {kind} | {' | '.join(cells)} |", flush=True)
    return saved


def main() -> int:
    """Measure and print one row."""
    parser = argparse.ArgumentParser(description="Compare a checkpoint with accelerator.save_state.")
    parser.add_argument("--config", required=True)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    vars(checkpointer)["save_checkpoint"] = save_and_measure
    if os.environ.get("RANK", "0") == "0":
        print("| processes | bytes | / adapter | save_state bytes | seconds | write | overhead | save_state seconds |")
    # All ranks need the same name, so it contains the launcher's process id.
    folder = Path(tempfile.gettempdir()) / f"measure-checkpoints-{os.getppid()}"
    overrides = [f"output_dir={folder}", "training.max_steps=2", "checkpoint.every_steps=2", "logging.trackers=[]"]
    overrides += ["logging.report=false"]
    overrides += ["data.eval=[]", "evaluation.prompts=[]", "evaluation.every_steps=null"]
    try:
        train.run_training(read_config(args.config, [*args.overrides, *overrides]))
    finally:
        if os.environ.get("RANK", "0") == "0":
            shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    exit_process(main())
