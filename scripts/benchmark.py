"""Compare training throughput and memory with other trainers on the same rows.

    python scripts/benchmark.py --model models/SmolLM2-135M-Instruct --data rows.json [--rows 256] [--rounds 3]
        [--parts trainers processes …] [--cases NAME …] [--json results.json] [--docs docs/benchmarks.md]

Prints a table for each part; `--docs` also writes it between that part's markers in a Markdown file. Each training runs
in a separate process, and the trainers alternate. A ratio compares two runs of one round, so a machine that slows down
for a while slows down both. Needs the extra `bench`. Everything runs on the CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from benchmark_case import matmul_rate, step_flops
from benchmark_run import Case, CaseError, run_case, spread, token_rows, write_between_markers


class Result(NamedTuple):
    """The measurements of one training, over all its processes."""

    tokens_per_second: float
    """Real tokens, without the first step."""
    supervised_per_second: float
    first_step: float
    """Seconds."""
    peak_above_model: int
    """Peak memory above the loaded model in bytes, summed over processes."""
    losses: list[float]
    profile: str


class Table(NamedTuple):
    """A part of the benchmark."""

    cases: list[Case]
    reference: str
    """Name of the case that the others are compared with."""


def run_config(args: argparse.Namespace, **changes: Any) -> dict[str, Any]:
    """Return the config of the compared run, with FastChat's adapter: r 8 on q_proj and v_proj, dropout 0.05."""
    config: dict[str, Any] = {
        "model": {"name_or_path": args.model},
        "adapter": {"r": 8, "alpha": 16, "dropout": 0.05, "target_modules": ["q_proj", "v_proj"]},
        "data": {"train": [{"path": args.data, "limit": args.rows}], "max_length": 512, "max_dropped": 1.0},
        "training": {
            "epochs": 1,
            "batch_size": 16,
            "micro_batch_tokens": 2048,
            "learning_rate": 2e-4,
            "warmup_from_zero": True,  # as the other trainers
            "mixed_precision": "bf16",
        },
        "logging": {"trackers": [], "report": False},
    }
    for section, values in changes.items():
        config[section] = config.get(section, {}) | values
    return config


def trainers(args: argparse.Namespace, _: Path) -> Table:
    """Return this package and the other trainers with their usual settings; 16 examples per step."""
    config, packed = run_config(args), {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}
    no_checkpointing, compiled = {"gradient_checkpointing": False}, run_config(args, training={"compile": True})
    return Table(
        [
            Case("lora_accel", "lora_accel", config),
            Case("lora_accel, compiled", "lora_accel", compiled),
            Case("TRL, packing", "trl", config, {"packing": True} | packed),
            Case(
                "TRL, packing, no activation checkpointing",
                "trl",
                config,
                {"packing": True} | packed | no_checkpointing,
            ),
            Case("TRL", "trl", config),
            Case("TRL, no activation checkpointing", "trl", config, no_checkpointing),
            Case("HF Trainer", "trainer", config),
            Case("FastChat's way", "fastchat", config),
        ],
        "lora_accel",
    )


def processes(args: argparse.Namespace, _: Path) -> Table:
    """Return one process with all cores, and two processes with half of them each."""
    config, cores = run_config(args), os.cpu_count() or 1
    share = max(1, cores // 2)
    return Table(
        [
            Case("1 process", "lora_accel", config),
            Case("DDP, 2 processes", "lora_accel", config, preset="cpu_ddp", threads=share),
            Case("ZeRO-2, 2 processes", "lora_accel", config, preset="cpu_zero2", threads=share),
            Case("ZeRO-3, 2 processes", "lora_accel", config, preset="cpu_zero3", threads=share),
        ],
        "1 process",
    )


def quantized(args: argparse.Namespace, _: Path) -> Table:
    """Return LoRA on a 16-bit base and on an nf4 base."""
    nf4 = run_config(args, quantization={"bits": 4, "double_quant": True})
    return Table([Case("LoRA", "lora_accel", run_config(args)), Case("QLoRA", "lora_accel", nf4)], "LoRA")


def lengths(args: argparse.Namespace, folder: Path) -> Table:
    """Return packed and padded rows of four lengths, 16,384 tokens of each."""
    cases = []
    for length in (128, 512, 1024, 2048):
        data = {
            "train": [{"path": str(token_rows(folder, length, 16384 // length))}],
            "max_length": length,
            "max_dropped": 1.0,
        }
        training = {"batch_size": max(1, 4096 // length)}
        for packing in (True, False):
            config = run_config(args, data=data | {"packing": packing}, training=training)
            cases.append(Case(f"{length} tokens, {'packed' if packing else 'padded'}", "lora_accel", config))
    return Table(cases, "512 tokens, packed")


def vocabulary(args: argparse.Namespace, folder: Path) -> Table:
    """Return models with different vocabulary sizes; 4,096 tokens per micro-batch, all supervised."""
    rows = token_rows(folder, 512, 32)
    cases = []
    for size in (8_192, 49_152, 131_072):
        model = llama(folder, args.model, vocab_size=size, num_hidden_layers=12)
        data = {"train": [{"path": str(rows)}], "max_length": 512, "max_dropped": 1.0}
        config = run_config(
            args, data=data, training={"batch_size": 8, "micro_batch_tokens": 4096}, model={"name_or_path": model}
        )
        cases.append(Case(f"vocabulary of {size:,}", "lora_accel", config))
    return Table(cases, "vocabulary of 8,192")


def depth(args: argparse.Namespace, folder: Path) -> Table:
    """Return models with different numbers of layers."""
    cases = []
    for layers in (8, 16, 32):
        model = llama(folder, args.model, num_hidden_layers=layers)
        config = run_config(args, training={"max_steps": 4}, model={"name_or_path": model})
        cases.append(Case(f"{layers} layers", "lora_accel", config))
    return Table(cases, "8 layers")


def curves(args: argparse.Namespace, _: Path) -> Table:
    """Return two trainings with the same expected losses: TRL without packing, no dropout."""
    config = run_config(args, adapter={"dropout": 0.0})
    return Table([Case("lora_accel", "lora_accel", config), Case("TRL", "trl", config)], "lora_accel")


def profile(args: argparse.Namespace, _: Path) -> Table:
    """Return a training whose second step is profiled."""
    config = run_config(args, training={"max_steps": 2})
    return Table([Case("lora_accel", "lora_accel", config, profile=True)], "lora_accel")


PARTS: dict[str, Callable[[argparse.Namespace, Path], Table]] = {
    make.__name__: make for make in (trainers, processes, quantized, lengths, vocabulary, depth, curves, profile)
}


def llama(folder: Path, like: str, **shape: Any) -> str:
    """Save a model with random bfloat16 weights and return its folder.

    Args:
        like: model whose config and tokenizer are used.
        shape: fields of the config to change.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    path = folder / "-".join(map(str, shape.values()))
    if not path.exists():
        torch.manual_seed(0)
        config = AutoConfig.from_pretrained(like)
        for name, value in shape.items():
            setattr(config, name, value)
        config.layer_types = None
        AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(path)
        AutoTokenizer.from_pretrained(like).save_pretrained(path)
    return str(path)


def measure(case: Case) -> Result:
    """Run one training and return its measurements."""
    try:
        ranks, operators = run_case(case)
    except CaseError as error:
        raise SystemExit(f"{case.name} failed:\n{error}") from None
    share = supervised_share(case.config)
    seconds = max(sum(rank["seconds"][1:]) for rank in ranks)
    rate = sum(sum(rank["tokens"][1:]) for rank in ranks) / seconds
    first = max(rank["seconds"][0] for rank in ranks)
    return Result(
        rate, rate * share, first, sum(rank["peak_above_model"] for rank in ranks), ranks[0]["losses"], operators
    )


def supervised_share(config: dict[str, Any]) -> float:
    """Return the share of a run's tokens that is supervised."""
    from lora_accel import RunConfig
    from lora_accel.setup.data import prepare_data

    plan = prepare_data(RunConfig.model_validate(config | {"output_dir": "unused"}), num_ranks=1).plan
    return plan.num_supervised_tokens / plan.num_tokens


def table_lines(table: Table, results: dict[str, list[Result]]) -> list[str]:
    """Return a part's results as a Markdown table."""
    lines = [
        f"| | real tokens/s: median (min-max) | relative to {table.reference} | supervised tokens/s | "
        "memory above the loaded model | first step |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for case in table.cases:
        runs = results[case.name]
        rates = [run.tokens_per_second for run in runs]
        ratios = [
            mine.tokens_per_second / other.tokens_per_second
            for mine, other in zip(runs, results[table.reference], strict=True)
        ]
        supervised = statistics.median(run.supervised_per_second for run in runs)
        memory = statistics.median(run.peak_above_model for run in runs) / 1e9
        first = statistics.median(run.first_step for run in runs)
        lines.append(
            f"| {case.name} | {spread(rates, '.0f')} | {spread(ratios, '.2f')} | {supervised:.0f} | {memory:.2f} GB | "
            f"{first:.1f} s |"
        )
    return lines


def curve_lines(results: dict[str, list[Result]]) -> list[str]:
    """Return the losses of two trainers as a Markdown table."""
    lines = ["| step | lora_accel | TRL | difference |", "| --- | --- | --- | --- |"]
    for step, (mine, other) in enumerate(
        zip(results["lora_accel"][0].losses, results["TRL"][0].losses, strict=True), start=1
    ):
        lines.append(f"| {step} | {mine:.4f} | {other:.4f} | {mine - other:+.4f} |")
    return lines


def main() -> None:
    """Measure the requested parts and print their tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", required=True, metavar="DIR")
    parser.add_argument("--data", required=True, metavar="FILE")
    parser.add_argument("--rows", type=int, default=256, help="number of rows to use, from the first")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=["trainers"])
    parser.add_argument(
        "--cases", nargs="+", metavar="NAME", help="measure only these cases of each part, and its reference"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all measurements")
    parser.add_argument("--docs", type=Path, metavar="FILE", help="write the tables between its markers")
    args = parser.parse_args()
    measurements: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        for part in args.parts:
            table = PARTS[part](args, Path(folder))
            selected = {table.reference, *(args.cases or [case.name for case in table.cases])}
            table = table._replace(cases=[case for case in table.cases if case.name in selected])
            results: dict[str, list[Result]] = {case.name: [] for case in table.cases}
            ceilings = []
            for _ in range(1 if part in ("curves", "profile") else args.rounds):
                ceilings.append(matmul_rate(args.model))
                for case in table.cases:
                    results[case.name].append(measure(case))
                    print(part, case.name, results[case.name][-1][:4], file=sys.stderr, flush=True)
            if part == "profile":
                lines = ["```", results["lora_accel"][0].profile, "```"]
            else:
                lines = curve_lines(results) if part == "curves" else table_lines(table, results)
            if part == "trainers":
                share = supervised_share(table.cases[0].config)
                lines += ["", *textwrap.wrap(ceiling_line(args.model, ceilings, share, results["lora_accel"]), 120)]
            print("\n".join([f"\n{part}", *lines]), flush=True)
            measurements[part] = {
                "matmul": ceilings,
                **{name: [run._asdict() for run in runs] for name, runs in results.items()},
            }
            if args.json:
                args.json.write_text(json.dumps(measurements, indent=1))
            if args.docs:
                write_between_markers(args.docs, part, lines)


def ceiling_line(model: str, ceilings: list[float], share: float, runs: list[Result]) -> str:
    """Return a sentence that compares the measured throughput with that of the machine's matrix products."""
    per_token = step_flops(model, 10_000, round(10_000 * share)) / 10_000
    shares = [run.tokens_per_second * per_token / rate for run, rate in zip(runs, ceilings, strict=True)]
    rate = statistics.median(ceilings)
    return (
        f"Upper bound: this machine multiplies bfloat16 matrices of these shapes at {rate / 1e9:.0f} GFLOP/s, and a "
        f"token takes {per_token / 1e6:.0f} MFLOP, so {rate / per_token:.0f} tokens/s. lora_accel reaches "
        f"{spread(shares, '.0%')} of it."
    )


if __name__ == "__main__":
    main()
