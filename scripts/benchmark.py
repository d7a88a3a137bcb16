"""Measure training beside other trainers, on the same rows, alternating, each in a process of its own.

    python scripts/benchmark.py --model models/SmolLM2-135M-Instruct --data rows.json [--rows 256] [--rounds 3]
        [--parts trainers processes …] [--cases NAME …] [--json results.json] [--docs docs/benchmarks.md]

Prints a table for each part; `--docs` also puts it between that part's marks in a Markdown file. A ratio is that of two
runs of one round, so a machine that slows down for a while slows both. Needs the extra `bench`. Everything runs on CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from benchmark_case import matmul_rate, step_flops

SCRIPTS = Path(__file__).resolve().parent
PRESETS = SCRIPTS.parent / "accelerate_configs"


class Case(NamedTuple):
    """One training to be measured."""

    name: str
    trainer: str
    config: dict[str, Any]
    """A run config, `output_dir` apart."""
    options: dict[str, Any] | None = None
    """Arguments of another trainer."""
    preset: str | None = None
    """A file of accelerate_configs; None = one process, started as it is."""
    threads: int = os.cpu_count() or 1
    """Of each process."""
    profile: bool = False


class Result(NamedTuple):
    """What one training took, over all its processes."""

    tokens_per_second: float
    """Real tokens, first step apart."""
    supervised_per_second: float
    first_step: float
    """Seconds."""
    above: int
    """Bytes above the loaded model at the most, summed over processes."""
    losses: list[float]
    profile: str


class Table(NamedTuple):
    """A part of the benchmark."""

    cases: list[Case]
    reference: str
    """Name of the case that others are compared with."""


def run_config(asked: argparse.Namespace, **changes: Any) -> dict[str, Any]:
    """Return the run that is compared: SmolLM2's own recipe in FastChat's shape (r 8 on q and v, dropout 0.05)."""
    config: dict[str, Any] = {
        "model": {"name_or_path": asked.model},
        "adapter": {"r": 8, "alpha": 16, "dropout": 0.05, "target_modules": ["q_proj", "v_proj"]},
        "data": {"train": [{"path": asked.data, "limit": asked.rows}], "max_length": 512, "max_dropped": 1.0},
        "training": {
            "epochs": 1,
            "batch_size": 16,
            "micro_batch_tokens": 2048,
            "learning_rate": 2e-4,
            "mixed_precision": "bf16",
        },
        "logging": {"trackers": []},
    }
    for section, values in changes.items():
        config[section] = config.get(section, {}) | values
    return config


def trainers(asked: argparse.Namespace, _: Path) -> Table:
    """Return this package and the others, each as a person would use it; 16 examples a step."""
    config, packed = run_config(asked), {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}
    keep, compiled = {"gradient_checkpointing": False}, run_config(asked, training={"compile": True})
    return Table(
        [
            Case("lora_accel", "lora_accel", config),
            Case("lora_accel, compiled", "lora_accel", compiled),
            Case("TRL, packing", "trl", config, {"packing": True} | packed),
            Case("TRL, packing, activations kept", "trl", config, {"packing": True} | packed | keep),
            Case("TRL", "trl", config),
            Case("TRL, activations kept", "trl", config, keep),
            Case("HF Trainer", "trainer", config),
            Case("FastChat's way", "fastchat", config),
        ],
        "lora_accel",
    )


def processes(asked: argparse.Namespace, _: Path) -> Table:
    """Return one process with all cores, and several with their share."""
    config, cores = run_config(asked), os.cpu_count() or 1
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


def quantised(asked: argparse.Namespace, _: Path) -> Table:
    """Return LoRA on a 16-bit base and on one in nf4."""
    nf4 = run_config(asked, quantization={"bits": 4, "double_quant": True})
    return Table([Case("LoRA", "lora_accel", run_config(asked)), Case("QLoRA", "lora_accel", nf4)], "LoRA")


def lengths(asked: argparse.Namespace, folder: Path) -> Table:
    """Return rows of one length each, 16,384 tokens of them, packed and padded."""
    cases = []
    for length in (128, 512, 1024, 2048):
        data = {
            "train": [{"path": str(token_rows(folder, length, 16384 // length))}],
            "max_length": length,
            "max_dropped": 1.0,
        }
        training = {"batch_size": max(1, 4096 // length)}
        for packing in (True, False):
            config = run_config(asked, data=data | {"packing": packing}, training=training)
            cases.append(Case(f"{length} tokens, {'packed' if packing else 'padded'}", "lora_accel", config))
    return Table(cases, "512 tokens, packed")


def vocabulary(asked: argparse.Namespace, folder: Path) -> Table:
    """Return models that differ in their vocabulary alone; 4,096 tokens at once, every one supervised."""
    rows = token_rows(folder, 512, 32)
    cases = []
    for size in (8_192, 49_152, 131_072):
        model = llama(folder, asked.model, vocab_size=size, num_hidden_layers=12)
        data = {"train": [{"path": str(rows)}], "max_length": 512, "max_dropped": 1.0}
        config = run_config(
            asked, data=data, training={"batch_size": 8, "micro_batch_tokens": 4096}, model={"name_or_path": model}
        )
        cases.append(Case(f"vocabulary of {size:,}", "lora_accel", config))
    return Table(cases, "vocabulary of 8,192")


def depth(asked: argparse.Namespace, folder: Path) -> Table:
    """Return models that differ in their number of layers alone."""
    cases = []
    for layers in (8, 16, 32):
        model = llama(folder, asked.model, num_hidden_layers=layers)
        config = run_config(asked, training={"max_steps": 4}, model={"name_or_path": model})
        cases.append(Case(f"{layers} layers", "lora_accel", config))
    return Table(cases, "8 layers")


def curves(asked: argparse.Namespace, _: Path) -> Table:
    """Return two trainings whose losses should be the same: TRL without packing, no dropout."""
    config = run_config(asked, adapter={"dropout": 0.0})
    return Table([Case("lora_accel", "lora_accel", config), Case("TRL", "trl", config)], "lora_accel")


def profile(asked: argparse.Namespace, _: Path) -> Table:
    """Return one step to be looked into."""
    config = run_config(asked, training={"max_steps": 2})
    return Table([Case("lora_accel", "lora_accel", config, profile=True)], "lora_accel")


PARTS: dict[str, Callable[[argparse.Namespace, Path], Table]] = {
    make.__name__: make for make in (trainers, processes, quantised, lengths, vocabulary, depth, curves, profile)
}


def token_rows(folder: Path, length: int, count: int) -> Path:
    """Write rows of random tokens, every one supervised; return the file."""
    file, chance = folder / f"rows-{length}.jsonl", random.Random(length)
    with file.open("w", encoding="utf-8") as lines:
        for _ in range(count):
            ids = chance.choices(range(1000, 8000), k=length)
            lines.write(json.dumps({"input_ids": ids, "labels": ids}) + "\n")
    return file


def llama(folder: Path, like: str, **shape: Any) -> str:
    """Save a model of random weights in bfloat16 with another's tokenizer; return its folder."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    place = folder / "-".join(map(str, shape.values()))
    if not place.exists():
        torch.manual_seed(0)
        config = AutoConfig.from_pretrained(like)
        for name, value in shape.items():
            setattr(config, name, value)
        config.layer_types = None
        AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(place)
        AutoTokenizer.from_pretrained(like).save_pretrained(place)
    return str(place)


def measure(case: Case) -> Result:
    """Train once."""
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        told = case._asdict() | {"options": case.options or {}, "folder": folder}
        words = [sys.executable, str(SCRIPTS / "benchmark_case.py"), json.dumps(told)]
        if case.preset:
            accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--quiet"]
            words = [*accelerate, "--config_file", str(PRESETS / f"{case.preset}.yaml"), *words[1:]]
        environment = os.environ | {
            "OMP_NUM_THREADS": str(case.threads),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        done = subprocess.run(words, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{case.name} failed:\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}")
        seen = Path(folder) / "profile.txt"
        operators = seen.read_text() if case.profile else ""
        ranks = [json.loads(file.read_text()) for file in sorted(Path(folder).glob("told-*.json"))]
    share = supervised_share(case.config)
    seconds = max(sum(rank["seconds"][1:]) for rank in ranks)
    rate = sum(sum(rank["tokens"][1:]) for rank in ranks) / seconds
    first = max(rank["seconds"][0] for rank in ranks)
    return Result(rate, rate * share, first, sum(rank["above"] for rank in ranks), ranks[0]["losses"], operators)


def supervised_share(config: dict[str, Any]) -> float:
    """Return which part of a run's tokens is supervised."""
    from lora_accel import RunConfig
    from lora_accel.setup.data import prepare_data

    plan = prepare_data(RunConfig.model_validate(config | {"output_dir": "unused"}), num_ranks=1).plan
    return plan.num_supervised_tokens / plan.num_tokens


def table_lines(table: Table, found: dict[str, list[Result]]) -> list[str]:
    """Return a part's results in Markdown."""
    lines = [
        f"| | real tokens/s: median (least to most) | as a share of {table.reference} | supervised tokens/s | "
        "memory above the loaded model | first step |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for case in table.cases:
        runs = found[case.name]
        rates = [run.tokens_per_second for run in runs]
        ratios = [
            mine.tokens_per_second / other.tokens_per_second
            for mine, other in zip(runs, found[table.reference], strict=True)
        ]
        supervised = statistics.median(run.supervised_per_second for run in runs)
        above = statistics.median(run.above for run in runs) / 1e9
        first = statistics.median(run.first_step for run in runs)
        lines.append(
            f"| {case.name} | {spread(rates, '.0f')} | {spread(ratios, '.2f')} | {supervised:.0f} | {above:.2f} GB | "
            f"{first:.1f} s |"
        )
    return lines


def curve_lines(found: dict[str, list[Result]]) -> list[str]:
    """Return the losses of two trainers side by side, in Markdown."""
    lines = ["| step | lora_accel | TRL | difference |", "| --- | --- | --- | --- |"]
    for step, (mine, other) in enumerate(
        zip(found["lora_accel"][0].losses, found["TRL"][0].losses, strict=True), start=1
    ):
        lines.append(f"| {step} | {mine:.4f} | {other:.4f} | {mine - other:+.4f} |")
    return lines


def spread(values: Iterable[float], form: str) -> str:
    """Return the median, and the least and the most in brackets."""
    values = list(values)
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def write_between_marks(file: Path, part: str, lines: list[str]) -> None:
    """Put lines between `<!-- part -->` and `<!-- /part -->`."""
    text = file.read_text(encoding="utf-8")
    marks = f"<!-- {part} -->", f"<!-- /{part} -->"
    new, count = re.subn(f"{marks[0]}.*?{marks[1]}", "\n".join([marks[0], *lines, marks[1]]), text, flags=re.DOTALL)
    if count != 1:
        raise SystemExit(f"{file}: has no {marks[0]} … {marks[1]}")
    file.write_text(new, encoding="utf-8")


def main() -> None:
    """Parse, measure in turn, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", required=True, metavar="DIR")
    parser.add_argument("--data", required=True, metavar="FILE")
    parser.add_argument("--rows", type=int, default=256, help="take only the first so many")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=["trainers"])
    parser.add_argument("--cases", nargs="+", metavar="NAME", help="only these of each part, beside the reference")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all that was measured")
    parser.add_argument("--docs", type=Path, metavar="FILE", help="put the tables between its marks")
    asked = parser.parse_args()
    whole: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        for part in asked.parts:
            table = PARTS[part](asked, Path(folder))
            wanted = {table.reference, *(asked.cases or [case.name for case in table.cases])}
            table = table._replace(cases=[case for case in table.cases if case.name in wanted])
            found: dict[str, list[Result]] = {case.name: [] for case in table.cases}
            ceilings = []
            for _ in range(1 if part in ("curves", "profile") else asked.rounds):
                ceilings.append(matmul_rate(asked.model))
                for case in table.cases:
                    found[case.name].append(measure(case))
                    print(part, case.name, found[case.name][-1][:4], file=sys.stderr, flush=True)
            if part == "profile":
                lines = ["```", found["lora_accel"][0].profile, "```"]
            else:
                lines = curve_lines(found) if part == "curves" else table_lines(table, found)
            if part == "trainers":
                share = supervised_share(table.cases[0].config)
                lines += ["", ceiling_line(asked.model, ceilings, share, found["lora_accel"])]
            print("\n".join([f"\n{part}", *lines]), flush=True)
            whole[part] = {
                "matmul": ceilings,
                **{name: [run._asdict() for run in runs] for name, runs in found.items()},
            }
            if asked.json:
                asked.json.write_text(json.dumps(whole, indent=1))
            if asked.docs:
                write_between_marks(asked.docs, part, lines)


def ceiling_line(model: str, ceilings: list[float], share: float, runs: list[Result]) -> str:
    """Say how near the machine's own limit this package came."""
    per_token = step_flops(model, 10_000, round(10_000 * share)) / 10_000
    reached = [run.tokens_per_second * per_token / rate for run, rate in zip(runs, ceilings, strict=True)]
    rate = statistics.median(ceilings)
    return (
        f"The machine multiplied bfloat16 matrices of these shapes at {rate / 1e9:.0f} GFLOP/s, and a token takes "
        f"{per_token / 1e6:.0f} MFLOP: at most {rate / per_token:.0f} tokens/s. Of that lora_accel reached "
        f"{spread(reached, '.0%')}."
    )


if __name__ == "__main__":
    main()
