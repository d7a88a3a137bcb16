"""Compare the losses of two runs, to check that a refactor does not change them.

    python scripts/compare_losses.py OLD NEW

Each file is a metrics.jsonl, or has `step loss` lines as tests/reference/tiny_llama_float32.txt. Prints `identical` and
exits with 0, or prints the largest relative difference and exits with 1. Exits with 2 if files cannot be compared.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path


class LossFileError(ValueError):
    """A file cannot be read or compared. The message gives the reason."""


def read_losses(path: Path) -> dict[int, float]:
    """Return the loss of each step by step number.

    Raises:
        LossFileError: the file cannot be read, or is neither a metrics.jsonl nor `step loss` lines.
    """
    losses: dict[int, float] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise LossFileError(f"{path}: cannot be read: {error}") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("#"):
            continue
        try:
            if line.startswith("{"):
                values = json.loads(line)
                if values["kind"] != "train":
                    continue
                step, loss = int(values["step"]), float(values["loss"])
            else:
                first, second = line.split()
                step, loss = int(first), float(second)
        except (ValueError, KeyError) as error:
            raise LossFileError(
                f"{path}, line {number}: neither a line of metrics.jsonl nor `step loss`: {error}"
            ) from None
        if step in losses:
            raise LossFileError(f"{path}, line {number}: step {step} occurs twice")
        losses[step] = loss
    if not losses:
        raise LossFileError(f"{path}: contains no loss")
    return losses


def worst_step(old: dict[int, float], new: dict[int, float]) -> tuple[int, float]:
    """Return the step whose losses differ most, and their relative difference.

    Raises:
        LossFileError: the steps are not the same.
    """
    if old.keys() != new.keys():
        unmatched = sorted(old.keys() ^ new.keys())
        raise LossFileError(f"{len(unmatched)} steps are only in one of the files, such as step {unmatched[0]}")
    differences = {step: relative_difference(old[step], new[step]) for step in old}
    step = max(differences, key=lambda step: differences[step])
    return step, differences[step]


def relative_difference(old: float, new: float) -> float:
    """Return |new - old| / |old|; 0 if they are equal, infinity if one is NaN or only `old` is 0."""
    if old == new:
        return 0.0
    difference = abs(new - old) / abs(old) if old else float("inf")
    return float("inf") if math.isnan(difference) else difference


def main() -> int:
    """Compare two files and return the exit code."""
    parser = argparse.ArgumentParser(description="Compare the losses of two runs.")
    parser.add_argument("old", type=Path, metavar="OLD")
    parser.add_argument("new", type=Path, metavar="NEW")
    args = parser.parse_args()
    try:
        old, new = read_losses(args.old), read_losses(args.new)
        step, difference = worst_step(old, new)
    except LossFileError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if difference == 0:
        print(f"identical: {len(old)} steps")
        return 0
    print(f"differ: {len(old)} steps, most at step {step}: {old[step]!r} -> {new[step]!r} (relative {difference:.2e})")
    return 1


if __name__ == "__main__":
    sys.exit(main())
