"""Say whether the number of processes, the ZeRO stage and the cut of a step change anything but the speed.

    python scripts/check_invariance.py --model models/SmolLM2-135M-Instruct --data recipes/data/orders_train.jsonl

Trains the same few steps (adapter dropout 0.1, biases by --bias) on one process with several cuts, and with two under
DDP and each ZeRO stage, every run by its own `accelerate launch` with a preset of accelerate_configs/. Prints one row
for each: the largest relative difference from the first run, over the steps in loss and in gradient norm, and over the
final adapter's tensors in norm. In float32 these are roundings; --loss-limit and --adapter-limit make larger ones an
error, exit code 1. In bf16 (--precision bf16) the table shows the spread that 16 bits leave.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
PRESETS = ROOT / "accelerate_configs"
Launch = Callable[..., "subprocess.CompletedProcess[str]"]


class Way(NamedTuple):
    """One way to make the same steps."""

    name: str
    preset: str
    overrides: tuple[str, ...] = ()
    launcher: tuple[str, ...] = ()


class Outcome(NamedTuple):
    """What a run left: (loss, gradient norm) of each step, and the adapter's tensors."""

    steps: list[tuple[float, float]]
    adapter: dict[str, list[float]]


def ways(batch_size: int, long_cut: int, short_cut: int) -> list[Way]:
    """Return the reference and what is compared with it.

    Args:
        batch_size: examples a step, divisible by 4.
        long_cut, short_cut: two limits of a micro-batch, in tokens.
    """

    def per_device(size: int) -> tuple[str, ...]:
        return (
            "training.batch_size=null",
            f"training.micro_batch_size={size}",
            f"training.gradient_accumulation_steps={batch_size // size}",
        )

    by_tokens = (f"training.micro_batch_tokens={short_cut}",)
    gathers = ("--zero3_save_16bit_model", "true")
    zero1 = ("--num_processes", "2")
    return [
        Way("1 process, micro-batches by tokens", "cpu", (f"training.micro_batch_tokens={long_cut}",)),
        Way("1 process, shorter micro-batches", "cpu", by_tokens),
        *(Way(f"1 process, micro-batches of {size}", "cpu", per_device(size)) for size in (1, 2, 4)),
        Way("2 processes, DDP", "cpu_ddp", by_tokens),
        Way("2 processes, ZeRO-1", "zero1", by_tokens, zero1),
        Way("2 processes, ZeRO-2", "cpu_zero2", by_tokens),
        Way("2 processes, ZeRO-3 without gather-16-bit", "cpu_zero3", by_tokens),
        Way(
            "2 processes, ZeRO-3, gather=state_dict", "cpu_zero3", (*by_tokens, "checkpoint.gather=state_dict"), gathers
        ),
    ]


def launch(preset: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Run `accelerate launch` with a preset to its end."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(PRESETS / f"{preset}.yaml")]
    command += ["--main_process_port", "0", *words]
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | threads)


def run(way: Way, config: Path, folder: Path, precision: str, launch: Launch = launch) -> Outcome:
    """Train one way in processes of its own.

    Args:
        launch: takes a preset and what follows `accelerate launch --config_file …`.

    Raises:
        SystemExit: the run failed; its output is shown.
    """
    from safetensors.torch import load_file

    words = ["--mixed_precision", precision, *way.launcher]
    words += ["-m", "lora_accel.train", "--config", str(config), f"output_dir={folder}", *way.overrides]
    done = launch(way.preset, *words)
    if done.returncode:
        raise SystemExit(f"{way.name}: exit code {done.returncode}\n{done.stderr[-4000:]}")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    return Outcome(
        [(line["loss"], line["grad_norm"]) for line in lines if line["kind"] == "train"],
        {name: tensor.double().flatten().tolist() for name, tensor in adapter.items()},
    )


def differences(reference: Outcome, other: Outcome) -> tuple[float, float, float]:
    """Return the largest relative difference of a loss, of a gradient norm, and of an adapter tensor."""
    if len(reference.steps) != len(other.steps) or reference.adapter.keys() != other.adapter.keys():
        return (float("inf"),) * 3
    loss, norm = (
        max(abs(b[i] - a[i]) / abs(a[i]) for a, b in zip(reference.steps, other.steps, strict=True)) for i in (0, 1)
    )
    adapter = max(_distance(tensor, other.adapter[name]) for name, tensor in reference.adapter.items())
    return loss, norm, adapter


def _distance(a: list[float], b: list[float]) -> float:
    size = sum(x * x for x in a) ** 0.5
    apart: float = sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) ** 0.5
    return apart / size if size else float(apart > 0)


def make_config(asked: argparse.Namespace) -> str:
    """Return the run config that all ways share, as YAML."""
    return json.dumps(  # every JSON is YAML
        {
            "output_dir": "replaced",
            "model": {"name_or_path": str(asked.model.resolve())},
            "adapter": {"r": 4, "alpha": 8, "dropout": 0.1, "target_modules": "all-linear", "bias": asked.bias},
            "data": {"train": [{"path": str(asked.data.resolve()), "limit": asked.rows}], "max_length": 200},
            "training": {"epochs": 1, "batch_size": asked.batch_size, "learning_rate": asked.learning_rate},
            "logging": {"trackers": []},
        }
    )


def main(words: list[str] | None = None, launch: Launch = launch) -> int:
    """Compare as the command line says; return the exit code."""
    parser = argparse.ArgumentParser(description="Say whether processes, ZeRO stage and cut change only the speed.")
    parser.add_argument("--model", type=Path, required=True, metavar="DIR")
    parser.add_argument("--data", type=Path, required=True, metavar="FILE")
    parser.add_argument("--rows", type=int, default=21, help="21 = 6 steps of 4, the last one short (default)")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--micro-batch-tokens", type=int, nargs=2, default=(256, 100), metavar=("LONG", "SHORT"))
    parser.add_argument("--bias", default="none", choices=("none", "all", "lora_only"))
    parser.add_argument("--precision", default="no", choices=("no", "bf16"))
    parser.add_argument("--loss-limit", type=float, default=float("inf"), help="for losses and gradient norms")
    parser.add_argument("--adapter-limit", type=float, default=float("inf"))
    asked = parser.parse_args(words)

    failed = False
    with tempfile.TemporaryDirectory() as temporary:
        config = Path(temporary) / "config.yaml"
        config.write_text(make_config(asked), encoding="utf-8")
        reference = None
        for number, way in enumerate(ways(asked.batch_size, *asked.micro_batch_tokens)):
            outcome = run(way, config, Path(temporary) / str(number), asked.precision, launch)
            if reference is None:
                reference = outcome
                print(f"{asked.model.name}, {asked.precision}, {len(outcome.steps)} steps", end="; ")
                print(f"losses {', '.join(f'{loss:.4f}' for loss, _ in outcome.steps)}\n")
                print("| run | loss | gradient norm | adapter |\n| --- | --- | --- | --- |")
                print(f"| {way.name} | reference | reference | reference |", flush=True)
                continue
            loss, norm, adapter = differences(reference, outcome)
            within = max(loss, norm) <= asked.loss_limit and adapter <= asked.adapter_limit
            failed |= not within
            print(
                f"| {way.name} | {loss:.1e} | {norm:.1e} | {adapter:.1e} |{'' if within else ' TOO MUCH'}", flush=True
            )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
