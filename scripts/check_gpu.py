"""Check this package on a GPU: its tests, the CPU's losses, kernels, memory and speed. One table, ten minutes.

    python scripts/check_gpu.py [--minutes 10] [--output docs/gpu.md] [--parts tests parity step speed]
    python scripts/check_gpu.py --dry-run       # the same code on the CPU, with tiny models; its figures mean nothing

| part | rows |
| --- | --- |
| tests | `pytest tests/cuda`, one row for each test |
| parity | losses of five steps in float32, relative to the CPU's |
| step | kernels, waits of the host and peak memory of a step |
| speed | tokens/s of this package, compiled or not, and of TRL with packing, with Liger or not |

The table is written to the file after each row, between its markers if it has them. What cannot run is a row with the
reason. Exit code: 0, 1 if a row failed, 2 without a usable GPU. Every training runs in a process of its own. Models
have random weights and are deleted afterwards. Needs the extras `test` and `bench`; Liger is used if it is installed.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import os
import re
import runpy
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmark_run import (
    Case,
    CaseError,
    Finished,
    run_case,
    run_process,
    spread,
    token_rows,
    write_between_markers,
)
from lora_accel.config.launch import read_launch
from lora_accel.distributed.devices import NVIDIA_DRIVER, device_row, why_no_gpu
from lora_accel.errors import ConfigError
from lora_accel.model.device import PRECISIONS, detect_device, has_package, native_precision
from random_llama import TINY, Shape, choose_shape, make_llama

ROOT = Path(__file__).resolve().parent.parent
SMOLLM = ROOT / "models" / "SmolLM2-135M-Instruct"
MARKER = "check_gpu"
DRY_RUN = "**A dry run on the CPU with tiny models: its figures mean nothing.**"
PARITY = 1e-4
"""Largest accepted difference of a float32 loss from the CPU's, relative to it."""
TESTS_SHARE = 0.4
"""Share of the time that the tests may take."""
MAX_ROUNDS = 3
WARM_UP = 3
"""First steps of a training that are not timed: they allocate, choose kernels and compile."""
ROW_TOKENS = 512
"""Tokens of an example in the parts step and speed."""
MICRO_BATCHES = 2
"""Of a step there."""
BASES: dict[str, int | None] = {"LoRA": None, "QLoRA nf4": 4}
DROPOUTS = (0.05, 0.0)
TRAINERS = ("lora_accel", "lora_accel, compiled", "TRL", "TRL + Liger")
REFERENCE = TRAINERS[0]
PASSED, FAILED, MEASURED, NOT_RUN = "passed", "failed", "measured", "not run"


class Row(NamedTuple):
    """A line of the table."""

    part: str
    name: str
    status: str
    """passed | failed | measured | not run."""
    text: str
    """A figure, or the reason."""


class Table:
    """The results so far, in a file as soon as they are known.

    Args:
        file: Markdown file; None = none.
        heading: lines above the table.
    """

    def __init__(self, file: Path | None, heading: list[str]) -> None:
        self._file, self._heading = file, heading
        self._rows: dict[tuple[str, str], Row] = {}

    @property
    def rows(self) -> list[Row]:
        """Return the rows in the order in which they came."""
        return list(self._rows.values())

    def put(self, part: str, name: str, status: str, text: str) -> None:
        """Add a row, or replace the one with the same part and name, and write the file."""
        self._rows[part, name] = row = Row(part, name, status, text)
        print(" · ".join(row), file=sys.stderr, flush=True)
        if self._file is not None:
            self._write(self._file)

    def lines(self) -> list[str]:
        """Return the table as Markdown."""
        cells = [tuple(cell.replace("|", "\\|").replace("\n", " ") for cell in row) for row in self.rows]
        return [*self._heading, "", "| part | | result | |", "| --- " * 4 + "|", *map(_markdown, cells)]

    def _write(self, file: Path) -> None:
        if file.exists():
            write_between_markers(file, MARKER, self.lines())
        else:
            lines = ["# GPU check", "", f"<!-- {MARKER} -->", *self.lines(), f"<!-- /{MARKER} -->", ""]
            file.write_text("\n".join(lines), encoding="utf-8")


def _markdown(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


@dataclasses.dataclass(frozen=True)
class Check:
    """What all parts need."""

    table: Table
    device: str
    """cuda, or cpu in a dry run."""
    precision: str
    """Mixed precision of the speed part: no, bf16 or fp16."""
    shape: Shape
    minutes: float
    end: float
    """When the time is up, by `time.monotonic`."""
    folder: Path
    """For models and rows."""

    @property
    def is_dry_run(self) -> bool:
        """Whether there is no GPU."""
        return self.device == "cpu"

    @property
    def seconds_left(self) -> float:
        """Return the time that is left; a dry run has no limit."""
        return float("inf") if self.is_dry_run else self.end - time.monotonic()


def train(check: Check, part: str, case: Case) -> Finished | None:
    """Run a training. If it does not finish, add a row that names the case and the reason, and return None.

    Errors of other trainers are no failures of this package, and neither is a lack of memory.
    """
    left = check.seconds_left
    if left <= 0:
        check.table.put(part, case.name, NOT_RUN, f"the {check.minutes:g} minutes are up")
        return None
    try:
        return run_case(case, None if left == float("inf") else left)
    except subprocess.TimeoutExpired:
        check.table.put(part, case.name, NOT_RUN, f"the {check.minutes:g} minutes are up; stopped after {left:.0f} s")
    except CaseError as error:
        reason = error_line(str(error))
        is_failure = case.trainer == "lora_accel" and "out of memory" not in reason
        check.table.put(part, case.name, FAILED if is_failure else NOT_RUN, reason)
    return None


def error_line(output: str) -> str:
    """Return the line of a program's output that names its error, or the last one."""
    lines = [line.strip() for line in output.splitlines() if line.strip()] or ["no output"]
    named = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Interrupt|Exit)\b", line)]
    return [*lines[-1:], *named][-1][:300]


# Parts


def cuda_test_rows(check: Check) -> None:
    """Run tests/cuda, and add a row for each test."""
    missing = [name for name in ("pytest", "hypothesis") if not has_package(name)]
    if missing:
        check.table.put("tests", "tests/cuda", NOT_RUN, f"{', '.join(missing)} not installed (pip install '.[test]')")
        return
    command = [sys.executable, "-m", "pytest", "tests/cuda", "-v", "-rfE", "--tb=short", "--no-showlocals"]
    command += ["-p", "no:cacheprovider"]
    limit = None if check.is_dry_run else min(check.seconds_left, 60 * check.minutes * TESTS_SHARE)
    # Of wide lines, since pytest shortens the reasons in its summary to the terminal.
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "COLUMNS": "300"}
    stopped = ""
    try:
        result = run_process(command, environment, limit, cwd=ROOT)
        output, code = result.stdout, result.returncode
    except subprocess.TimeoutExpired as error:
        output, code, stopped = str(error.stdout), 0, f"; stopped after {limit:.0f} s"
    tests = parse_tests(output)
    for name, cases in tests.items():
        check.table.put("tests", name, *summarize_cases(cases))
    if stopped:
        check.table.put("tests", "the other tests", NOT_RUN, f"the time of the tests is up{stopped}")
    elif code not in (0, 1) or not tests:  # 1: tests failed, each has its row
        check.table.put("tests", "tests/cuda", FAILED, f"pytest: exit code {code}: {error_line(output)}")


def parse_tests(output: str) -> dict[str, dict[str, tuple[str, str]]]:
    """Return the result and the reason of each case by test, from the output of `pytest -v -rfE`."""
    tests: dict[str, dict[str, tuple[str, str]]] = defaultdict(dict)
    reasons = dict(re.findall(r"^(?:FAILED|ERROR) \S+::(\S+) - (.*)$", output, re.MULTILINE))
    pattern = r"^tests/cuda/\S+?::((\w+)\S*) (PASSED|FAILED|SKIPPED|ERROR)(?: \((.*)\))?"
    for case, name, outcome, reason in re.findall(pattern, output, re.MULTILINE):
        tests[name][case] = outcome, reason or reasons.get(case, "")
    return tests


def summarize_cases(cases: dict[str, tuple[str, str]]) -> tuple[str, str]:
    """Return status and text of a test."""
    bad = {case: reason for case, (outcome, reason) in cases.items() if outcome in ("FAILED", "ERROR")}
    skipped = [reason for outcome, reason in cases.values() if outcome == "SKIPPED"]
    num_passed = len(cases) - len(bad) - len(skipped)
    parts = [f"{num_passed} passed"] if num_passed else []
    parts += [f"{len(bad)} failed: " + "; ".join(f"{case}: {reason}" for case, reason in bad.items())] if bad else []
    parts += [f"{len(skipped)} skipped: {', '.join(dict.fromkeys(skipped))}"] if skipped else []
    status = FAILED if bad else PASSED if num_passed else NOT_RUN
    return status, ", ".join(parts)[:600]


def parity_rows(check: Check) -> None:
    """Train the same steps in float32 on the GPU and on the CPU, and compare the losses."""
    models = {"tiny Llama": make_llama(check.folder, TINY), "SmolLM2-135M": SMOLLM}
    for name, model in models.items():
        if not model.is_dir():
            check.table.put("parity", name, NOT_RUN, f"{model.name} is not there (python scripts/fetch_model.py)")
            continue
        if check.is_dry_run and model == SMOLLM:
            check.table.put("parity", name, NOT_RUN, "too slow for a dry run")
            continue
        steps = 2 if check.is_dry_run else 5
        config = run_config(check.folder, model, steps=steps, row_tokens=128, rows_per_step=4, precision="no")
        losses = []
        for device in (check.device, "cpu"):
            finished = train(check, "parity", Case(name, "lora_accel", config, device=device))
            if finished is None:
                break
            losses.append(finished.ranks[0]["losses"])
        if len(losses) == 2:
            check.table.put("parity", name, *compare_losses(*losses))


def compare_losses(actual: Sequence[float], expected: Sequence[float]) -> tuple[str, str]:
    """Return status and text of the largest relative difference."""
    differences = [abs(x - y) / abs(y) for x, y in zip(actual, expected, strict=True)]
    worst = max(differences)
    text = f"largest relative difference {worst:.1e} in {len(expected)} steps, losses {expected[0]:.4f} to "
    text += f"{expected[-1]:.4f}"
    return (PASSED, text) if worst <= PARITY else (FAILED, f"{text}; at most {PARITY:g} is expected")


def step_rows(check: Check) -> None:
    """Count the kernels and the waits of one step, and compare its peak memory with the estimate."""
    for base, bits in BASES.items():
        config = speed_config(check, bits=bits, dropout=0.05, steps=WARM_UP)
        finished = train(check, "step", Case(base, "lora_accel", config, device=check.device, probe=True))
        if finished is not None:
            (rank,) = finished.ranks
            check.table.put("step", f"{base}, kernels", *kernels_text(check, rank, is_quantized=bits is not None))
            check.table.put("step", f"{base}, waits of the host", *syncs_text(rank.get("syncs")))
            error = rank["peak"] / rank["estimate"] - 1
            text = f"peak {rank['peak'] / 1e9:.2f} GB, estimate {rank['estimate'] / 1e9:.2f} GB ({error:+.0%})"
            check.table.put("step", f"{base}, memory", MEASURED, text)


def kernels_text(check: Check, rank: dict[str, Any], *, is_quantized: bool) -> tuple[str, str]:
    """Return status and text of the number of kernels in a step, beside the budget of the model's layers."""
    total, micro_batches = sum(rank["kernels"].values()), rank["micro_batches"]
    if not total:
        return NOT_RUN, "the profiler recorded no kernel; it may lack the permission (CUPTI)"
    budgets = runpy.run_path(str(ROOT / "tests" / "device" / "budgets.py"))["BUDGETS"]
    budget = budgets.get((check.shape.name, is_quantized))
    layers = check.shape.config["num_hidden_layers"]
    most = sorted(rank["kernels"].items(), key=lambda item: -item[1])[:3]
    names = ", ".join(f"`{name[:40]}` {count}" for name, count in most)
    what = "operators" if check.is_dry_run else "kernels"
    text = f"{total / micro_batches:,.0f} {what} in a micro-batch"
    if budget is not None:
        text += f", head and optimizer included; the budget of its {layers} layers is {layers * sum(budget[:2]):,}"
    return MEASURED, f"{text}; most in the step: {names}"


def syncs_text(syncs: list[str] | None) -> tuple[str, str]:
    """Return status and text of the waits of the host in a step, of which there should be one."""
    if syncs is None:
        return NOT_RUN, "needs a GPU"
    text = f"{len(syncs)} in a step: {', '.join(syncs) or 'none'}"
    return (PASSED, text) if len(syncs) == 1 else (FAILED, f"{text[:300]}; 1 is expected")


def speed_rows(check: Check) -> None:
    """Measure all trainers in turn, as often as the time allows."""
    groups = [(base, dropout) for base in BASES for dropout in DROPOUTS]
    rates: dict[str, list[list[float]]] = defaultdict(list)
    unusable: set[str] = set()
    for number in range(1 if check.is_dry_run else MAX_ROUNDS):
        for base, dropout in groups:
            for trainer in TRAINERS:
                name = f"{trainer}, {base}, dropout {dropout:g}"
                if name in unusable or (number and check.seconds_left <= 0):
                    continue
                if (reason := why_not_installed(trainer, check)) is not None:
                    check.table.put("speed", name, NOT_RUN, reason)
                    unusable.add(name)
                    continue
                case = speed_case(check, trainer, name, bits=BASES[base], dropout=dropout)
                finished = _train_again(check, case) if number else train(check, "speed", case)
                if finished is None:
                    unusable.add(name)
                    continue
                rates[name].append(timed_rates(finished))
                reference = rates.get(f"{REFERENCE}, {base}, dropout {dropout:g}", [])
                check.table.put("speed", name, MEASURED, speed_text(rates[name], reference, finished.ranks[0]["peak"]))


def _train_again(check: Check, case: Case) -> Finished | None:
    """Run a training of a later round; None if the time does not suffice, which keeps the row of the earlier ones."""
    try:
        return run_case(case, check.seconds_left)
    except (subprocess.TimeoutExpired, CaseError):
        return None


def why_not_installed(trainer: str, check: Check) -> str | None:
    """Return why a trainer cannot run here; None if it can."""
    if trainer.startswith("TRL") and not has_package("trl"):
        return "TRL is not installed (pip install '.[bench]')"
    if "Liger" in trainer and not has_package("liger_kernel"):
        return "Liger is not installed (pip install liger-kernel)"
    if "Liger" in trainer and check.is_dry_run:
        return "Liger's kernels need a GPU"
    if "compiled" in trainer and not check.is_dry_run and not has_package("triton"):
        return "Triton is not installed"
    return None


def speed_case(check: Check, trainer: str, name: str, *, bits: int | None, dropout: float) -> Case:
    """Return the training of a trainer: the same rows, adapter, precision and tokens per step for all."""
    steps = 2 if check.is_dry_run else WARM_UP + 8
    config = speed_config(check, bits=bits, dropout=dropout, steps=steps)
    if trainer == "lora_accel, compiled":
        config["training"]["compile"] = True
    if not trainer.startswith("TRL"):
        return Case(name, "lora_accel", config, device=check.device)
    loading = {
        "dtype": str(PRECISIONS[check.precision]).removeprefix("torch."),
        "attn_implementation": peer_attention(),
    }
    options = {
        "packing": True,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": MICRO_BATCHES,
        "gradient_checkpointing": False,
        "bf16": check.precision == "bf16",
        "fp16": check.precision == "fp16",
        "use_liger_kernel": "Liger" in trainer,
        "model_init_kwargs": loading,
    }
    return Case(name, "trl", config, options, device=check.device)


def peer_attention() -> str:
    """Return the attention that transformers has here: FlashAttention if its package is installed."""
    packages = {"flash_attn_interface": "flash_attention_3", "flash_attn": "flash_attention_2"}
    return next((name for package, name in packages.items() if has_package(package)), "sdpa")


def timed_rates(finished: Finished) -> list[float]:
    """Return the tokens/s of each step of a training after the warm-up."""
    (rank,) = finished.ranks
    first = min(WARM_UP, len(rank["seconds"]) - 1)
    return [tokens / seconds for tokens, seconds in zip(rank["tokens"], rank["seconds"], strict=True)][first:]


def speed_text(rates: list[list[float]], reference: list[list[float]], peak: int) -> str:
    """Return the text of a trainer's rounds.

    Args:
        rates, reference: tokens/s of the steps of each round, of the trainer and of this package.
        peak: bytes.
    """
    text = f"{spread([rate for steps in rates for rate in steps], ',.0f')} tokens/s in {len(rates)} round"
    text += "s" * (len(rates) > 1)
    if rates is not reference and reference:
        ratios = [statistics.median(x) / statistics.median(y) for x, y in zip(rates, reference, strict=False)]
        text += f", {statistics.median(ratios):.2f} of {REFERENCE}'s"
    return f"{text}, peak memory {peak / 1e9:.2f} GB"


# Configs


def run_config(
    folder: Path, model: Path, *, steps: int, row_tokens: int, rows_per_step: int, precision: str
) -> dict[str, Any]:
    """Return the config of a training of random tokens: rank 16 on all linear layers."""
    rows = token_rows(folder, row_tokens, steps * rows_per_step)
    return {
        "model": {"name_or_path": str(model)},
        "adapter": {"r": 16, "alpha": 32, "dropout": 0.05, "target_modules": "all-linear"},
        "data": {"train": [{"path": str(rows)}], "cache_dir": str(folder / "cache"), "max_length": row_tokens},
        "training": {
            "max_steps": steps,
            "batch_size": rows_per_step,
            "micro_batch_tokens": 1024,
            "learning_rate": 1e-3,
            "warmup_steps": 0,
            "mixed_precision": precision,
            "activation_checkpointing": False,
        },
        "logging": {"trackers": [], "report": False},
    }


def speed_config(check: Check, *, bits: int | None, dropout: float, steps: int) -> dict[str, Any]:
    """Return the config of a training of the speed part."""
    tokens = check.shape.micro_batch_tokens
    config = run_config(
        check.folder,
        make_llama(check.folder, check.shape),
        steps=steps,
        row_tokens=ROW_TOKENS,
        rows_per_step=MICRO_BATCHES * tokens // ROW_TOKENS,
        precision=check.precision,
    )
    config["adapter"]["dropout"] = dropout
    config["quantization"] = {"bits": bits}
    config["data"]["max_length"] = tokens  # to which TRL packs
    config["training"]["micro_batch_tokens"] = tokens
    return config


# Start


def versions() -> str:
    """Return the versions of the libraries that matter, and which are missing."""
    names = ["transformers", "peft", "accelerate", "bitsandbytes", "trl", "liger-kernel", "triton", "flash-attn"]
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    return ", ".join(f"{name} {version}" for name, version in found.items())


def driver_version() -> str:
    """Return the version of NVIDIA's driver. (Linux)"""
    text = NVIDIA_DRIVER.read_text(encoding="utf-8") if NVIDIA_DRIVER.exists() else ""
    found = re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", text)
    return found[0] if found else "unknown"


def device_rows(check: Check) -> None:
    """Add the rows that name the device, the libraries and the measured model."""
    import torch

    name = device_row(torch.device(check.device), read_launch({}))[1]
    driver = "" if check.is_dry_run else f", driver {driver_version()}"
    check.table.put("device", "device", MEASURED, name + driver)
    check.table.put("device", "libraries", MEASURED, versions())
    text = f"Llama of the {check.shape.name} shape, random weights, {MICRO_BATCHES} micro-batches of "
    text += f"{check.shape.micro_batch_tokens:,} tokens in rows of {ROW_TOKENS}, rank 16 on all linear layers, mixed "
    text += f"precision {check.precision}, no activation checkpointing; TRL: packing, {peer_attention()}"
    check.table.put("device", "model of step and speed", MEASURED, text)


PARTS: dict[str, Callable[[Check], None]] = {
    "tests": cuda_test_rows,
    "parity": parity_rows,
    "step": step_rows,
    "speed": speed_rows,
}


def run_parts(check: Check, names: Sequence[str]) -> None:
    """Run parts. One that fails is a row, and the next one runs."""
    device_rows(check)
    for name in names:
        try:
            PARTS[name](check)
        except Exception as error:  # whatever it is, the other parts are worth running
            check.table.put(name, "this part", FAILED, f"{type(error).__name__}: {error}"[:300])


def make_check(options: argparse.Namespace, folder: Path) -> Check:
    """Return what the parts need: the device, and the model that fits it."""
    import torch

    end, now = time.monotonic() + 60 * options.minutes, time.strftime("%Y-%m-%d")
    if options.dry_run:
        print(DRY_RUN, file=sys.stderr, flush=True)  # before the first figure
        table = Table(options.output, [DRY_RUN])
        return Check(table, "cpu", "no", TINY, options.minutes, end, folder)
    table = Table(options.output, [f"`scripts/check_gpu.py`, {now}, within {options.minutes:g} minutes."])
    memory, disk = torch.cuda.get_device_properties(0).total_memory / 1e9, shutil.disk_usage(folder).free / 1e9
    precision, _ = native_precision(detect_device(torch.device("cuda:0")))
    return Check(table, "cuda", precision, choose_shape(memory, options.minutes, disk), options.minutes, end, folder)


def check_request(options: argparse.Namespace) -> None:
    """Check that there is a GPU, and that the table can be written.

    Raises:
        ConfigError: there is none that torch can use, or the file exists without markers.
    """
    import torch

    if not options.dry_run and not torch.cuda.is_available():
        raise ConfigError(f"no usable GPU: {why_no_gpu()}. --dry-run runs on the CPU what runs without one")
    file: Path | None = options.output
    if file is not None and not file.absolute().parent.is_dir():
        raise ConfigError(f"--output {file}: its folder does not exist; create it, or name another file")
    if file is not None and file.exists() and f"<!-- {MARKER} -->" not in file.read_text("utf-8", errors="replace"):
        raise ConfigError(f"--output {file} has no <!-- {MARKER} --> … <!-- /{MARKER} -->; name another file")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10, help="time for everything (default: %(default)s)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: docs/gpu.md; a dry run writes no file")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    parser.add_argument("--dry-run", action="store_true", help="run what runs without a GPU, on the CPU")
    options = parser.parse_args(arguments)
    if options.output is None and not options.dry_run:
        options.output = ROOT / "docs" / "gpu.md"
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts, and print the table; return the exit code."""
    options = parse(arguments)
    try:
        check_request(options)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    with tempfile.TemporaryDirectory(prefix="check-gpu-") as folder:
        check = make_check(options, Path(folder))
        try:
            run_parts(check, options.parts)
        except KeyboardInterrupt:
            return 130
        finally:
            print("\n".join(check.table.lines()), flush=True)
    failed = [f"{row.part}: {row.name}" for row in check.table.rows if row.status == FAILED]
    if failed:
        print(f"failed: {'; '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the running process is killed, too
    sys.exit(main())
