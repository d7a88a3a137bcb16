"""Check that processes, ZeRO stage and micro-batches change the speed of a training, and nothing else.

    python scripts/check_invariance.py --model models/SmolLM2-135M-Instruct --data recipes/data/orders_train.jsonl

Trains the same few steps with adapter dropout 0.1: on one process with several micro-batch sizes, and on two processes
with DDP and each ZeRO stage. Each run has its own `accelerate launch` with a preset of accelerate_configs/. Prints one
row per run: the largest relative difference from the first run in loss and gradient norm over the steps, and in norm
over the tensors of the final adapter. In float32 only rounding differs; exits with 1 if a difference exceeds
--loss-limit or --adapter-limit. With --precision bf16 the table shows the spread of 16-bit training.

    python scripts/check_invariance.py --model models/SmolLM2-135M-Instruct --grid

compares every combination of processes, packed and padded rows, adapter dropout, and levels of shared prefixes with one
process that shares none. Packed rows that share nothing are a failure there.
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
    """The result of a run."""

    steps: list[tuple[float, float]]
    """(loss, gradient norm) of each step."""
    adapter: dict[str, list[float]]
    computed: float
    """Share of the tokens that were computed; the others were shared."""


class Group(NamedTuple):
    """Variants that train on the same rows with the same adapter; the first one is the reference."""

    name: str
    data: Path
    dropout: float
    variants: list[Variant]


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


def grid(folder: Path, batch_tokens: int, depths: tuple[int, ...] = (1, 2, 3)) -> list[Group]:
    """Return all combinations of processes, layout and dropout, for rows whose prefixes have so many levels."""
    presets = {"1 process": "cpu", "2 processes, DDP": "cpu_ddp"}
    presets |= {f"2 processes, ZeRO-{stage}": f"cpu_zero{stage}" for stage in (2, 3)}
    by_tokens = f"training.micro_batch_tokens={batch_tokens}"
    variants = [Variant("1 process, packed, not shared", "cpu", (by_tokens, "training.share_prefixes=false"))]
    for name, preset in presets.items():
        variants.append(Variant(f"{name}, packed, shared", preset, (by_tokens, "training.share_prefixes=true")))
        variants.append(Variant(f"{name}, padded", preset, (by_tokens, "data.packing=false")))
    groups = []
    for depth in depths:
        data = folder / f"depth_{depth}.jsonl"
        data.write_text("".join(f"{json.dumps(row)}\n" for row in rows_of_depth(depth)), encoding="utf-8")
        groups += [Group(f"{depth} levels, dropout {p}", data, p, variants) for p in (0.0, 0.1)]
    return groups


def rows_of_depth(depth: int, count: int = 17) -> list[dict[str, object]]:
    """Return conversations that begin with an instruction, then one of two documents, then one of two questions."""
    words = "which begins here and is long enough to be shared by all that continue it"
    kinds = ("Instruction", "Document", "Question")[:depth]
    rows: list[dict[str, object]] = []
    for number in range(count):
        branches = (0, number % 2, number // 2 % 2)[:depth]
        parts = [f"{kind} {branch}, {words}." for kind, branch in zip(kinds, branches, strict=True)]
        messages = [{"role": "system", "content": " ".join(parts)}, {"role": "user", "content": f"repeat {number % 5}"}]
        rows.append({"messages": [*messages, {"role": "assistant", "content": f"{number} " * (1 + number % 3)}]})
    return rows


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
    steps = [line for line in lines if line["kind"] == "train"]
    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    return Outcome(
        [(line["loss"], line["grad_norm"]) for line in steps],
        {name: tensor.double().flatten().tolist() for name, tensor in adapter.items()},
        sum(line["computed_tokens"] for line in steps) / sum(line["tokens"] for line in steps),
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


def make_config(args: argparse.Namespace, group: Group) -> str:
    """Return the run config that all variants of a group share, as YAML."""
    return json.dumps(  # JSON is valid YAML
        {
            "output_dir": "replaced",
            "model": {"name_or_path": str(args.model.resolve())},
            "adapter": {
                "r": 4,
                "alpha": 8,
                "dropout": group.dropout,
                "target_modules": "all-linear",
                "bias": args.bias,
            },
            "data": {"train": [{"path": str(group.data.resolve()), "limit": args.rows}], "max_length": args.max_length},
            "training": {"epochs": 1, "batch_size": args.batch_size, "learning_rate": args.learning_rate}
            | {"optimizer": args.optimizer},
            "logging": {"trackers": [], "report": False},
        }
    )


def main(arguments: list[str] | None = None, launch: Launch = launch) -> int:
    """Compare all variants and return the exit code."""
    parser = argparse.ArgumentParser(
        description="Check that processes, ZeRO stage and micro-batches change the speed and nothing else."
    )
    parser.add_argument("--model", type=Path, required=True, metavar="DIR")
    chosen = parser.add_mutually_exclusive_group(required=True)
    chosen.add_argument("--data", type=Path, metavar="FILE")
    chosen.add_argument("--grid", action="store_true", help="all combinations, on rows that this script writes")
    parser.add_argument("--rows", type=int, default=21, help="default: 21 = 5 steps of 4 and one of 1")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--optimizer", default="adamw", help="sgd does not amplify the rounding of small gradients")
    parser.add_argument("--micro-batch-tokens", type=int, nargs=2, default=(256, 100), metavar=("LONG", "SHORT"))
    parser.add_argument("--max-length", type=int, default=200, help="tokens of an example")
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
        folder = Path(temporary)
        if args.grid:
            groups = grid(folder, args.micro_batch_tokens[0])
        else:
            groups = [Group("", args.data, 0.1, variants(args.batch_size, *args.micro_batch_tokens))]
        for group in groups:
            failed |= not compare(group, args, folder / group.name.replace(" ", "_"), launch)
    return int(failed)


def compare(group: Group, args: argparse.Namespace, folder: Path, launch: Launch) -> bool:
    """Train the variants of a group, print how they differ from the first, and return whether that is little enough."""
    folder.mkdir(exist_ok=True)
    config = folder / "config.yaml"
    config.write_text(make_config(args, group), encoding="utf-8")
    is_within, reference = True, None
    for number, variant in enumerate(group.variants):
        outcome = run(variant, config, folder / str(number), args.precision, launch)
        if reference is None:
            reference = outcome
            print(f"{args.model.name}, {args.precision}, {len(outcome.steps)} steps", end="; ")
            print(f"{group.name}; " * bool(group.name) + f"losses {', '.join(f'{x:.4f}' for x, _ in outcome.steps)}\n")
            print("| run | loss | gradient norm | adapter | computed |\n| --- | --- | --- | --- | --- |")
            print(f"| {variant.name} | reference | reference | reference | {outcome.computed:.0%} |", flush=True)
            continue
        loss, norm, adapter = differences(reference, outcome)
        is_equal = max(loss, norm) <= args.loss_limit and adapter <= args.adapter_limit
        shares = outcome.computed < 1 or "training.share_prefixes=true" not in variant.overrides
        print(
            f"| {variant.name} | {loss:.1e} | {norm:.1e} | {adapter:.1e} | {outcome.computed:.0%} |"
            f"{'' if is_equal else ' TOO MUCH'}{'' if shares else ' NOTHING SHARED'}",
            flush=True,
        )
        is_within &= is_equal and shares
    print()
    return is_within


if __name__ == "__main__":
    sys.exit(main())
