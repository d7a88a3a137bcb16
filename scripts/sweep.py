"""Train one config with several sets of overrides, and compare the evaluation losses.

    python scripts/sweep.py --config recipes/quickstart.yaml --out runs/sweep training.epochs=0.25 \\
        --vary training.learning_rate=5e-4 training.learning_rate=2e-3 \\
        --vary "adapter.r=2 adapter.alpha=4" "adapter.r=8 adapter.alpha=16"

Each `--vary` lists alternatives; every combination is a run. An alternative is one or several overrides, separated by
spaces. Results are appended to OUT/results.jsonl. Run the same command again to resume: finished runs are skipped, and
an unfinished one resumes from its newest checkpoint. The tables show all runs of OUT, the best first.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Result(NamedTuple):
    """One finished run of a sweep."""

    fixed: list[str]
    """Overrides that all runs of the command share."""
    varied: list[str]
    """Overrides of this run."""
    eval_loss: float
    train_loss: float
    """Mean over the last tenth of the steps."""
    steps: int
    seconds: float


def combinations(alternatives: Sequence[Sequence[str]]) -> Iterator[list[str]]:
    """Yield the overrides of each run: one alternative of each `--vary`."""
    for chosen in itertools.product(*alternatives):
        yield [override for alternative in chosen for override in shlex.split(alternative)]


def run_folder(out: Path, config: Path, fixed: Sequence[str], varied: Sequence[str]) -> Path:
    """Return the folder of a run: the same for the same config and overrides, so that the run resumes."""
    key = json.dumps([config.read_text(encoding="utf-8"), [*fixed], [*varied]])
    return out / hashlib.sha256(key.encode()).hexdigest()[:12]


def train(config: Path, overrides: Sequence[str], folder: Path) -> int:
    """Run `lora-accel train` and return its exit code."""
    command = [sys.executable, "-m", "lora_accel.cli", "train", "--config", str(config), *overrides]
    return subprocess.run([*command, f"output_dir={folder}"], check=False).returncode


def read_result(folder: Path, fixed: Sequence[str], varied: Sequence[str]) -> Result:
    """Return the result of a finished run.

    Raises:
        SystemExit: the run has no evaluation.
    """
    lines: list[dict[str, Any]] = []
    with (folder / "metrics.jsonl").open(encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    losses = [line["eval_loss"] for line in lines if line["kind"] == "eval" and "eval_loss" in line]
    steps = [line for line in lines if line["kind"] == "train"]
    if not losses:
        raise SystemExit(f"{folder}: no evaluation; set data.eval or data.eval_fraction")
    last = [line["loss"] for line in steps[-max(1, len(steps) // 10) :]]
    return Result([*fixed], [*varied], losses[-1], sum(last) / len(last), len(steps), steps[-1]["elapsed_seconds"])


def read_results(out: Path) -> list[Result]:
    """Return the finished runs of a sweep."""
    file = out / "results.jsonl"
    if not file.is_file():
        return []
    return [Result(**json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()]


def tables(results: Sequence[Result]) -> str:
    """Return results as Markdown: a table for each set of shared overrides, the best run first."""
    lines: list[str] = []
    for fixed in dict.fromkeys(tuple(result.fixed) for result in results):
        lines += [" ".join(fixed), "", "| overrides | eval loss | last training loss | steps | s |", "| --- " * 5 + "|"]
        lines += [
            f"| {' '.join(result.varied)} | {result.eval_loss:.4f} | {result.train_loss:.4f} | {result.steps} "
            f"| {result.seconds:.0f} |"
            for result in sorted(results, key=lambda result: result.eval_loss)
            if tuple(result.fixed) == fixed
        ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is not finished yet, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder for runs and results")
    parser.add_argument("--vary", nargs="+", action="append", default=[], metavar="OVERRIDES")
    parser.add_argument("--max-runs", type=int, help="stop after this many new runs")
    parser.add_argument("fixed", nargs="*", metavar="section.key=value")
    options = parser.parse_args(arguments)
    finished = {(*result.fixed, *result.varied) for result in read_results(options.out)}
    todo = [varied for varied in combinations(options.vary) if (*options.fixed, *varied) not in finished]
    for varied in todo[: options.max_runs]:
        folder = run_folder(options.out, options.config, options.fixed, varied)
        if code := train(options.config, [*options.fixed, *varied], folder):
            return code
        result = read_result(folder, options.fixed, varied)
        with (options.out / "results.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(result._asdict()) + "\n")
    print(tables(read_results(options.out)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
