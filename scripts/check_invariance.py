"""Check that processes, ZeRO stage and micro-batches change the speed of a training, and nothing else.

    python scripts/check_invariance.py --model models/SmolLM2-135M-Instruct --data recipes/data/orders_train.jsonl

Trains the same few steps with adapter dropout 0.1: on one process with several micro-batch sizes, and on two processes
with DDP and each ZeRO stage. Each run has its own `accelerate launch` with a preset of accelerate_configs/. Prints one
row per run: the largest relative difference from the first run in loss and gradient norm over the steps, and in norm
over the tensors of the final adapter. In float32 only rounding differs; exits with 1 if a difference exceeds
--loss-limit or --adapter-limit. With --precision bf16 the table shows the spread of 16-bit training.
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


class Variant(NamedTuple):
    """One setup that makes the same steps."""

    name: str
    preset: str
    overrides: tuple[str, ...] = ()
    launcher: tuple[str, ...] = ()


class Outcome(NamedTuple):
    """The result of a run: (loss, gradient norm) of each step, and the adapter's tensors."""

    steps: list[tuple[float, float]]
    adapter: dict[str, list[float]]


def variants(batch_size: int, long_tokens: int, short_tokens: int) -> list[Variant]:
    """Return the reference and the variants to compare with it.

    Args:
        batch_size: examples per step, divisible by 4.
        long_tokens, short_tokens: two limits of a micro-batch, in tokens.
    """

    def per_device(size: int) -> tuple[str, ...]:
        return (
            "training.batch_size=null",
            f"training.micro_batch_size={size}",
            f"training.gradient_accumulation_steps={batch_size // size}",
        )

    by_tokens = (f"training.micro_batch_tokens={short_tokens}",)
    gathers = ("--zero3_save_16bit_model", "true")
    zero1 = ("--num_processes", "2")
    return [
        Variant("1 process, micro-batches by tokens", "cpu", (f"training.micro_batch_tokens={long_tokens}",)),
        Variant("1 process, shorter micro-batches", "cpu", by_tokens),
        Variant("1 process, no shared prefixes", "cpu", (*by_tokens, "training.share_prefixes=false")),
        *(Variant(f"1 process, micro-batches of {size}", "cpu", per_device(size)) for size in (1, 2, 4)),
        Variant("2 processes, DDP", "cpu_ddp", by_tokens),
        Variant("2 processes, ZeRO-1", "zero1", by_tokens, zero1),
        Variant("2 processes, ZeRO-2", "cpu_zero2", by_tokens),
        Variant("2 processes, ZeRO-3 without gather-16-bit", "cpu_zero3", by_tokens),
        Variant(
            "2 processes, ZeRO-3, gather=state_dict", "cpu_zero3", (*by_tokens, "checkpoint.gather=state_dict"), gathers
        ),
    ]


def launch(preset: str, *args: str) -> subprocess.CompletedProcess[str]:
    """Run `accelerate launch` with a preset and wait for it."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(PRESETS / f"{preset}.yaml")]
    command += ["--main_process_port", "0", *args]
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | threads)


def run(variant: Variant, config: Path, folder: Path, precision: str, launch: Launch = launch) -> Outcome:
    """Train one variant in separate processes.

    Args:
        launch: called with a preset and the arguments after `accelerate launch --config_file …`.

    Raises:
        SystemExit: the run failed. The message contains its output.
    """
    from safetensors.torch import load_file

    args = [*variant.launcher, "-m", "lora_accel.train", "--config", str(config), f"output_dir={folder}"]
    args += [f"training.mixed_precision={precision}", *variant.overrides]
    process = launch(variant.preset, *args)
    if process.returncode:
        raise SystemExit(f"{variant.name}: exit code {process.returncode}\n{process.stderr[-4000:]}")
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
    adapter = max(_relative_distance(tensor, other.adapter[name]) for name, tensor in reference.adapter.items())
    return loss, norm, adapter


def _relative_distance(a: list[float], b: list[float]) -> float:
    size = sum(x * x for x in a) ** 0.5
    distance: float = sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) ** 0.5
    return distance / size if size else float(distance > 0)


def make_config(args: argparse.Namespace) -> str:
    """Return the run config that all variants share, as YAML."""
    return json.dumps(  # JSON is valid YAML
        {
            "output_dir": "replaced",
            "model": {"name_or_path": str(args.model.resolve())},
            "adapter": {"r": 4, "alpha": 8, "dropout": 0.1, "target_modules": "all-linear", "bias": args.bias},
            "data": {"train": [{"path": str(args.data.resolve()), "limit": args.rows}], "max_length": 200},
            "training": {"epochs": 1, "batch_size": args.batch_size, "learning_rate": args.learning_rate},
            "logging": {"trackers": [], "report": False},
        }
    )


def main(arguments: list[str] | None = None, launch: Launch = launch) -> int:
    """Compare all variants and return the exit code."""
    parser = argparse.ArgumentParser(
        description="Check that processes, ZeRO stage and micro-batches change the speed and nothing else."
    )
    parser.add_argument("--model", type=Path, required=True, metavar="DIR")
    parser.add_argument("--data", type=Path, required=True, metavar="FILE")
    parser.add_argument("--rows", type=int, default=21, help="default: 21 = 5 steps of 4 and one of 1")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--micro-batch-tokens", type=int, nargs=2, default=(256, 100), metavar=("LONG", "SHORT"))
    parser.add_argument("--bias", default="none", choices=("none", "all", "lora_only"))
    parser.add_argument("--precision", default="no", choices=("no", "bf16"))
    parser.add_argument(
        "--loss-limit", type=float, default=float("inf"), help="largest difference of losses and gradient norms"
    )
    parser.add_argument(
        "--adapter-limit", type=float, default=float("inf"), help="largest difference of adapter tensors"
    )
    args = parser.parse_args(arguments)

    failed = False
    with tempfile.TemporaryDirectory() as temporary:
        config = Path(temporary) / "config.yaml"
        config.write_text(make_config(args), encoding="utf-8")
        reference = None
        for number, variant in enumerate(variants(args.batch_size, *args.micro_batch_tokens)):
            outcome = run(variant, config, Path(temporary) / str(number), args.precision, launch)
            if reference is None:
                reference = outcome
                print(f"{args.model.name}, {args.precision}, {len(outcome.steps)} steps", end="; ")
                print(f"losses {', '.join(f'{loss:.4f}' for loss, _ in outcome.steps)}\n")
                print("| run | loss | gradient norm | adapter |\n| --- | --- | --- | --- |")
                print(f"| {variant.name} | reference | reference | reference |", flush=True)
                continue
            loss, norm, adapter = differences(reference, outcome)
            within = max(loss, norm) <= args.loss_limit and adapter <= args.adapter_limit
            failed |= not within
            print(
                f"| {variant.name} | {loss:.1e} | {norm:.1e} | {adapter:.1e} |{'' if within else ' TOO MUCH'}",
                flush=True,
            )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
