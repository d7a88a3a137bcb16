"""Compare training throughput and memory with other trainers on the same rows.

    python scripts/benchmark.py --model models/SmolLM2-135M-Instruct --data rows.json [--rows 256] [--rounds 3]
        [--conversations rows.json] [--parts trainers prefixes pairs memory …] [--cases NAME …] [--precision bf16]
        [--json results.json [--minutes 4]] [--docs docs/benchmarks.md]

Prints a table for each part; `--docs` also writes it between that part's markers in a Markdown file. Each training runs
in a separate process, and the trainers alternate; the part `pairs` has two trainings in one process, which make each
step in turn. A ratio compares two runs of one round, so a machine that slows down for a while slows down both. The
precision is the one that `training.mixed_precision: auto` selects on this CPU. Other trainers use the candidates of
their settings that are fastest in a short run. Needs the extra `bench`. Everything runs on the CPU.

A call continues the measurements in the file of `--json`; with `--minutes`, it begins no round after that time.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmark_case import matmul_rate, step_flops
from benchmark_rows import kinds_of_rows
from benchmark_run import Case, CaseError, Finished, run_case, spread, token_rows, write_between_markers
from lora_accel.config.plan import Plan
from lora_accel.model.device import PRECISIONS, detect_device, native_precision

CPU = detect_device(torch.device("cpu"))
CPU_FLAGS = {"avx2": "avx2", "avx512_f": "avx512f", "avx512_bf16": "avx512_bf16", "amx_bf16": "amx_bf16"}
"""CPU features that matter here, by torch's name -> the operating system's."""
TRIAL = {"max_steps": 3, "batch_size": 4}
"""Training options of a short run that compares candidates."""
BATCHES = [{"per_device_train_batch_size": size} for size in (1, 2, 4)]
"""Candidates for another trainer's batch."""


class Result(NamedTuple):
    """The measurements of one training, over all its processes."""

    tokens_per_second: float
    """Real tokens, without the first step."""
    computed_share: float
    """Computed tokens per real token: more than 1 with padding, less if examples share tokens."""
    supervised_per_second: float
    first_step: float
    """Seconds."""
    peak_above_model: int
    """Peak memory above the loaded model in bytes, summed over processes."""
    process_peak: int
    """Peak resident memory in bytes, with the model and its loading, summed over processes."""
    losses: list[float]
    profile: str


class Table(NamedTuple):
    """A table of the benchmark."""

    cases: list[Case]
    reference: str
    """Name of the case that the others are compared with."""
    title: str = ""
    """What distinguishes it from the part's other tables."""


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
            "mixed_precision": args.precision,
        },
        "logging": {"trackers": [], "report": False},
    }
    for section, values in changes.items():
        config[section] = config.get(section, {}) | values
    dtype = str(PRECISIONS[config["training"]["mixed_precision"]]).removeprefix("torch.")
    config["model"] = {"dtype": dtype} | config["model"]
    return config


def trl(name: str, config: dict[str, Any], *, packing: bool) -> Case:
    """Return TRL with its fastest settings: a base in the compute dtype, SDPA, activations kept, the best batch.

    Args:
        packing: best-fit decreasing, which is padding-free; otherwise padded or padding-free, whichever is faster.
    """
    options: dict[str, Any] = {
        "model_init_kwargs": {"dtype": config["model"]["dtype"], "attn_implementation": "sdpa"},
        "gradient_checkpointing": False,
    }
    if packing:
        return Case(name, "trl", config, options | {"packing": True, "packing_strategy": "bfd"}, BATCHES)
    padding_free = [batch | {"padding_free": True, "max_length": None} for batch in BATCHES]  # rows are truncated
    return Case(name, "trl", config, options, [*BATCHES, *padding_free])


def trainers(args: argparse.Namespace, _: Path) -> list[Table]:
    """Return this package and the other trainers; 16 examples per step."""
    config, compiled = run_config(args), run_config(args, training={"compile": True})
    cases = [
        Case("lora_accel", "lora_accel", config),
        Case("lora_accel, compiled", "lora_accel", compiled),
        trl("TRL, packing", config, packing=True),
        Case("TRL, packing, its defaults", "trl", config, {"packing": True}),
        trl("TRL", config, packing=False),
        Case("HF Trainer", "trainer", config, candidates=BATCHES),
        Case("FastChat's way", "fastchat", config, candidates=BATCHES),
    ]
    return [Table(cases, "lora_accel")]


def prefixes(args: argparse.Namespace, folder: Path) -> list[Table]:
    """Return this package with and without shared prefixes, and TRL, on several kinds of rows."""
    tables = []
    for rows in kinds_of_rows(args.data, args.conversations, args.model, folder):
        data = {"train": [{"path": rows.path}], "max_length": rows.max_length}
        configs = {
            name: first_steps(args, data, micro_batch_tokens=size, share_prefixes=is_shared)
            for name, size, is_shared in (
                ("separate", "auto", False),
                ("shared", "auto", True),
                ("separate, micro-batches of 4,096", 4096, False),
                ("shared, micro-batches of 4,096", 4096, True),
            )
        }
        cases = [Case(name, "lora_accel", config) for name, config in configs.items()]
        cases.append(trl("TRL, packing", first_steps(args, data, batch_size=4), packing=True))
        tables.append(Table(cases, "separate", rows.name))
    return tables


def pairs(args: argparse.Namespace, folder: Path) -> list[Table]:
    """Return the same steps with and without shared prefixes in one process, on several kinds of rows."""
    cases = []
    for rows in kinds_of_rows(args.data, args.conversations, args.model, folder):
        data = {"train": [{"path": rows.path}], "max_length": rows.max_length}
        separate, shared = (
            first_steps(args, data, micro_batch_tokens="auto", share_prefixes=is_shared) for is_shared in (False, True)
        )
        cases.append(Case(rows.name, "lora_accel", separate, compared=shared))
    return [Table(cases, "")]


def memory(args: argparse.Namespace, _: Path) -> list[Table]:
    """Return micro-batches of several sizes, and TRL, in the precision of the other parts and in float32."""
    tables, data = [], {"train": [{"path": args.data}]}
    for precision in dict.fromkeys((args.precision, "no")):
        configs = {
            size: first_steps(args, data, micro_batch_tokens=size, mixed_precision=precision)
            for size in (512, 1024, 2048, 4096)
        }
        cases = [Case(f"micro-batches of {size:,}", "lora_accel", config) for size, config in configs.items()]
        trl_config = first_steps(args, data, batch_size=4, mixed_precision=precision)
        cases.append(trl("TRL, packing", trl_config, packing=True))
        tables.append(Table(cases, "TRL, packing", _name(precision)))
    return tables


def first_steps(args: argparse.Namespace, data: dict[str, Any], **training: Any) -> dict[str, Any]:
    """Return the config of a run of at least 2 steps, with examples from all rows of a file.

    It has as many steps as hold the tokens of `--rows` rows of 512. With a smaller `batch_size`, for trainers whose
    speed does not depend on it, it has twice as many steps.
    """
    config = run_config(args, data=data, training=training)
    plan = plan_of(config)
    steps = max(2, round(512 * args.rows / (plan.num_tokens / plan.num_examples) / 16))
    config["training"]["max_steps"] = steps * (2 if "batch_size" in training else 1)
    return config


def processes(args: argparse.Namespace, _: Path) -> list[Table]:
    """Return one process with all cores, and two processes with half of them each."""
    config, cores = run_config(args), os.cpu_count() or 1
    share = max(1, cores // 2)
    cases = [
        Case("1 process", "lora_accel", config),
        Case("DDP, 2 processes", "lora_accel", config, preset="cpu_ddp", threads=share),
        Case("ZeRO-2, 2 processes", "lora_accel", config, preset="cpu_zero2", threads=share),
        Case("ZeRO-3, 2 processes", "lora_accel", config, preset="cpu_zero3", threads=share),
    ]
    return [Table(cases, "1 process")]


def quantized(args: argparse.Namespace, _: Path) -> list[Table]:
    """Return LoRA on a 16-bit base and on an nf4 base."""
    nf4 = run_config(args, quantization={"bits": 4, "double_quant": True})
    return [Table([Case("LoRA", "lora_accel", run_config(args)), Case("QLoRA", "lora_accel", nf4)], "LoRA")]


def lengths(args: argparse.Namespace, folder: Path) -> list[Table]:
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
    return [Table(cases, "512 tokens, packed")]


def vocabulary(args: argparse.Namespace, folder: Path) -> list[Table]:
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
    return [Table(cases, "vocabulary of 8,192")]


def depth(args: argparse.Namespace, folder: Path) -> list[Table]:
    """Return models with different numbers of layers."""
    cases = []
    for layers in (8, 16, 32):
        model = llama(folder, args.model, num_hidden_layers=layers)
        config = run_config(args, training={"max_steps": 4}, model={"name_or_path": model})
        cases.append(Case(f"{layers} layers", "lora_accel", config))
    return [Table(cases, "8 layers")]


def curves(args: argparse.Namespace, _: Path) -> list[Table]:
    """Return two trainings with the same expected losses: TRL without packing, no dropout."""
    config = run_config(args, adapter={"dropout": 0.0})
    return [Table([Case("lora_accel", "lora_accel", config), Case("TRL", "trl", config)], "lora_accel")]


def profile(args: argparse.Namespace, _: Path) -> list[Table]:
    """Return a training whose second step is profiled."""
    config = run_config(args, training={"max_steps": 2})
    return [Table([Case("lora_accel", "lora_accel", config, profile=True)], "lora_accel")]


PARTS: dict[str, Callable[[argparse.Namespace, Path], list[Table]]] = {
    make.__name__: make
    for make in (trainers, prefixes, pairs, memory, processes, quantized, lengths, vocabulary, depth, curves, profile)
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


def finish(case: Case) -> Finished:
    """Run one training and return what its processes wrote.

    Raises:
        SystemExit: it failed.
    """
    try:
        return run_case(case)
    except CaseError as error:
        raise SystemExit(f"{case.name} failed:\n{error}") from None


def measure(case: Case) -> Result:
    """Run one training and return its measurements."""
    ranks, operators = finish(case)
    share = supervised_share(case.config)
    rate = tokens_per_second(ranks)
    return Result(
        rate,
        sum(sum(rank["computed"]) for rank in ranks) / sum(sum(rank["tokens"]) for rank in ranks),
        rate * share,
        max(rank["seconds"][0] for rank in ranks),
        sum(rank["peak_above_model"] for rank in ranks),
        sum(rank["process_peak"] for rank in ranks),
        ranks[0]["losses"],
        operators,
    )


def measure_pairs(case: Case) -> list[list[dict[str, Any]]]:
    """Run two trainings in turn and return seconds, real and computed tokens of each one's steps, without the first."""
    [rank] = finish(case).ranks
    return [steps[1:] for steps in rank["runs"]]


def tokens_per_second(ranks: list[dict[str, Any]]) -> float:
    """Return the real tokens/s of all processes of a training, without the first step."""
    seconds: float = max(sum(rank["seconds"][1:]) for rank in ranks)
    return float(sum(sum(rank["tokens"][1:]) for rank in ranks)) / seconds


def fastest(case: Case) -> dict[str, Any]:
    """Return which of a case's candidates is fastest in a run of three steps."""
    if not case.candidates:
        return {}
    training = case.config["training"] | TRIAL
    rates = []
    for candidate in case.candidates:
        options = (case.options or {}) | candidate
        trial = case._replace(config=case.config | {"training": training}, options=options)
        rates.append(tokens_per_second(finish(trial).ranks))
        print(f"{case.name}, {candidate}: {rates[-1]:.0f} tokens/s", file=sys.stderr, flush=True)
    return case.candidates[rates.index(max(rates))]


def supervised_share(config: dict[str, Any]) -> float:
    """Return the share of a run's tokens that is supervised."""
    plan = plan_of(config)
    return plan.num_supervised_tokens / plan.num_tokens


def plan_of(config: dict[str, Any]) -> Plan:
    """Return the plan of a run's data: one epoch in one process."""
    return _plan(json.dumps({"model": config["model"], "data": config["data"], "output_dir": "unused"}))


@functools.cache
def _plan(config: str) -> Plan:
    from lora_accel import RunConfig
    from lora_accel.setup.data import prepare_data

    return prepare_data(RunConfig.model_validate_json(config), num_ranks=1).plan


def table_lines(table: Table, rounds: list[dict[str, Result]], settings: dict[str, dict[str, Any]]) -> list[str]:
    """Return a table's results as Markdown: of each case in the rounds that have it.

    Args:
        rounds: the result of each case; the table's reference is in each.
        settings: the fastest candidate of each case that has candidates.
    """
    lines = [
        f"| {table.title} | rounds | real tokens/s: median (min-max) | relative to {table.reference} | "
        "computed / real tokens | supervised tokens/s | peak memory of the process | above the loaded model | "
        "first step |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for case in table.cases:
        runs = [(one[case.name], one[table.reference]) for one in rounds if case.name in one]
        if not runs:
            continue
        rates = [run.tokens_per_second for run, _ in runs]
        ratios = [run.tokens_per_second / reference.tokens_per_second for run, reference in runs]
        computed = statistics.median(run.computed_share for run, _ in runs)
        supervised = statistics.median(run.supervised_per_second for run, _ in runs)
        peak = statistics.median(run.process_peak for run, _ in runs) / 1e9
        above = statistics.median(run.peak_above_model for run, _ in runs) / 1e9
        first = statistics.median(run.first_step for run, _ in runs)
        lines.append(
            f"| {case.name}{settings_text(settings.get(case.name, {}))} | {len(runs)} | {spread(rates, '.0f')} | "
            f"{spread(ratios, '.2f')} | {computed:.2f} | {supervised:.0f} | {peak:.2f} GB | {above:.2f} GB | "
            f"{first:.1f} s |"
        )
    return lines


def pair_lines(table: Table, rounds: list[dict[str, Any]]) -> list[str]:
    """Return the ratios of steps that were made in turn as a Markdown table.

    Args:
        rounds: the steps of each case's two runs; see `measure_pairs`.
    """
    lines = [
        "| rows | pairs of steps | separate, real tokens/s | shared, real tokens/s | relative: median (min-max) | "
        "computed / real tokens |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for case in table.cases:
        steps = [pair for one in rounds if case.name in one for pair in zip(*one[case.name], strict=True)]
        if not steps:
            continue
        rates = [[step["tokens"] / step["seconds"] for step in run] for run in zip(*steps, strict=True)]
        ratios = [shared / separate for separate, shared in zip(*rates, strict=True)]
        computed = sum(shared["computed"] for _, shared in steps) / sum(shared["tokens"] for _, shared in steps)
        separate, shared = (statistics.median(run) for run in rates)
        lines.append(
            f"| {case.name} | {len(steps)} | {separate:.0f} | {shared:.0f} | {spread(ratios, '.2f')} | {computed:.2f} |"
        )
    return lines


def settings_text(candidate: dict[str, Any]) -> str:
    """Return the settings of another trainer that were fastest, for a table."""
    if not candidate:
        return ""
    kind = ", padding-free" if candidate.get("padding_free") else ""
    return f" ({candidate['per_device_train_batch_size']} per device{kind})"


def curve_lines(results: dict[str, Result]) -> list[str]:
    """Return the losses of two trainers as a Markdown table."""
    lines = ["| step | lora_accel | TRL | difference |", "| --- | --- | --- | --- |"]
    for step, (mine, other) in enumerate(
        zip(results["lora_accel"].losses, results["TRL"].losses, strict=True), start=1
    ):
        lines.append(f"| {step} | {mine:.4f} | {other:.4f} | {mine - other:+.4f} |")
    return lines


class Measurements:
    """The results so far, in a file if there is one, whose measurements are continued.

    Args:
        file: JSON file; None = none.
        arguments: what the measurements depend on.

    Raises:
        SystemExit: the file's measurements are of other arguments.
    """

    def __init__(self, file: Path | None, arguments: dict[str, Any]) -> None:
        self._file = file
        self._content: dict[str, Any] = {"arguments": arguments, "tables": {}}
        if file is not None and file.exists():
            self._content = json.loads(file.read_text(encoding="utf-8"))
            if self._content["arguments"] != arguments:
                raise SystemExit(f"{file}: has measurements of other arguments; delete it, or name another file")

    def of(self, part: str, title: str) -> dict[str, Any]:
        """Return a table's measurements: settings, matmul (FLOP/s of each round), and rounds of results by case."""
        empty: dict[str, Any] = {"settings": {}, "matmul": [], "rounds": []}
        table: dict[str, Any] = self._content["tables"].setdefault(f"{part}/{title}", empty)
        return table

    def save(self) -> None:
        """Write the file."""
        if self._file is not None:
            self._file.write_text(json.dumps(self._content, indent=1), encoding="utf-8")


def measure_round(
    table: Table, model: str, dtype: torch.dtype, measured: dict[str, Any], save: Callable[[], None]
) -> None:
    """Measure one round of a table: each case once, after the settings of those that have none yet."""
    for case in table.cases:
        if case.name not in measured["settings"]:
            measured["settings"][case.name] = fastest(case)
            save()
    ceiling = matmul_rate(model, dtype)
    results: dict[str, Any] = {}
    for case in table.cases:
        options = (case.options or {}) | measured["settings"][case.name]
        if case.compared is not None:
            results[case.name] = measure_pairs(case)
        else:
            results[case.name] = measure(case._replace(options=options))._asdict()
        print(table.title, case.name, results[case.name], file=sys.stderr, flush=True)
    measured["matmul"].append(ceiling)
    measured["rounds"].append(results)
    save()


def main() -> None:
    """Measure the requested parts and print their tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", required=True, metavar="DIR")
    parser.add_argument("--data", required=True, metavar="FILE")
    parser.add_argument("--conversations", metavar="FILE", help="further rows for the part prefixes")
    parser.add_argument("--rows", type=int, default=256, help="number of rows to use")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=["trainers"])
    parser.add_argument(
        "--cases", nargs="+", metavar="NAME", help="measure only these cases of each part, and its reference"
    )
    parser.add_argument("--tables", nargs="+", metavar="TITLE", help="measure only these tables of each part")
    parser.add_argument(
        "--precision", choices=("bf16", "no"), help="default: the one that this CPU computes natively; no = float32"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all measurements, and continue those in it")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no round after this time")
    parser.add_argument("--docs", type=Path, metavar="FILE", help="write the tables between its markers")
    args = parser.parse_args()
    start = time.monotonic()
    args.precision = args.precision or native_precision(CPU)[0]
    machine = textwrap.wrap(machine_line(args.precision), 120)
    print("\n".join(machine), flush=True)
    compared = ("model", "data", "conversations", "rows", "precision")
    measurements = Measurements(args.json, {name: getattr(args, name) for name in compared})
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        for part in args.parts:
            lines = []
            for table in PARTS[part](args, Path(folder)):
                if args.tables and table.title not in args.tables:
                    continue
                selected = {table.reference, *(args.cases or [case.name for case in table.cases])}
                table = table._replace(cases=[case for case in table.cases if case.name in selected])
                measured = measurements.of(part, table.title)
                dtype = PRECISIONS[table.cases[0].config["training"]["mixed_precision"]]
                rounds = 1 if part in ("curves", "profile") else args.rounds
                while len(measured["rounds"]) < rounds and time.monotonic() - start < 60 * args.minutes:
                    measure_round(table, args.model, dtype, measured, measurements.save)
                if measured["rounds"]:
                    lines += ["", *part_lines(part, table, args, measured)]
            print("\n".join([f"\n{part}", *lines]), flush=True)
            if args.docs and lines:
                write_between_markers(args.docs, part, [*machine, *lines])


def part_lines(part: str, table: Table, args: argparse.Namespace, measured: dict[str, Any]) -> list[str]:
    """Return the results of a table as Markdown."""
    if part == "pairs":
        return pair_lines(table, measured["rounds"])
    rounds = [{name: Result(**result) for name, result in one.items()} for one in measured["rounds"]]
    if part == "profile":
        return ["```", rounds[0]["lora_accel"].profile, "```"]
    if part == "curves":
        return curve_lines(rounds[0])
    lines = table_lines(table, rounds, measured["settings"])
    if part == "trainers":
        share = supervised_share(table.cases[0].config)
        ceiling = ceiling_line(args, measured["matmul"], share, [one["lora_accel"] for one in rounds])
        lines += ["", *textwrap.wrap(ceiling, 120)]
    return lines


def machine_line(precision: str) -> str:
    """Return a sentence about the precision of the measurements and this CPU."""
    flags = [name for feature, name in CPU_FLAGS.items() if feature in CPU.features] or ["none"]
    return (
        f"Computed in {_name(precision)}; {native_precision(CPU)[1]}. Of the flags {', '.join(CPU_FLAGS.values())} it "
        f"has {', '.join(flags)}. {os.cpu_count()} threads, torch {torch.__version__}."
    )


def _name(precision: str) -> str:
    return str(PRECISIONS[precision]).removeprefix("torch.")


def ceiling_line(args: argparse.Namespace, ceilings: list[float], share: float, runs: list[Result]) -> str:
    """Return a sentence that compares the measured throughput with that of the machine's matrix products."""
    supervised = round(10_000 * share)
    flops = [step_flops(args.model, round(10_000 * run.computed_share), supervised) / 10_000 for run in runs]
    shares = [run.tokens_per_second * each / rate for run, each, rate in zip(runs, flops, ceilings, strict=True)]
    rate, per_token = statistics.median(ceilings), statistics.median(flops)
    return (
        f"Upper bound: this machine multiplies {_name(args.precision)} matrices of these shapes at {rate / 1e9:.0f} "
        f"GFLOP/s, and a token takes {per_token / 1e6:.0f} MFLOP, so {rate / per_token:.0f} tokens/s. lora_accel "
        f"reaches {spread(shares, '.0%')} of it."
    )


if __name__ == "__main__":
    main()
