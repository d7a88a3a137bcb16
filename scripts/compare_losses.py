"""Say whether two runs have the same losses: for a change that should change nothing.

    python scripts/compare_losses.py OLD NEW

Each is a metrics.jsonl, or a file of `step loss` lines such as tests/reference/tiny_llama_float32.txt. Prints
`identical`, or the largest relative difference; the exit code is 0 or 1. Files that cannot be compared: exit code 2.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path


class NotLosses(ValueError):
    """A file that holds no losses; the message says why."""


def read_losses(path: Path) -> dict[int, float]:
    """Return the loss of each step.

    Raises:
        NotLosses: the file cannot be read, or is neither a metrics.jsonl nor `step loss` lines.
    """
    losses: dict[int, float] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise NotLosses(f"{path}: cannot be read: {error}") from None
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
            raise NotLosses(
                f"{path}, line {number}: neither a line of metrics.jsonl nor `step loss`: {error}"
            ) from None
        if step in losses:
            raise NotLosses(f"{path}, line {number}: step {step} stands there twice")
        losses[step] = loss
    if not losses:
        raise NotLosses(f"{path}: holds no loss")
    return losses


def worst_step(old: dict[int, float], new: dict[int, float]) -> tuple[int, float]:
    """Return the step whose losses differ most, and the difference as a share of the old one.

    Raises:
        NotLosses: the two have not the same steps.
    """
    if old.keys() != new.keys():
        apart = sorted(old.keys() ^ new.keys())
        raise NotLosses(f"{len(apart)} steps are in one of the two only, step {apart[0]} among them")
    differences = {step: relative_difference(old[step], new[step]) for step in old}
    step = max(differences, key=lambda step: differences[step])
    return step, differences[step]


def relative_difference(old: float, new: float) -> float:
    """Return |new - old| / |old|; 0 where they are equal, infinite where one is not a number or old is 0."""
    if old == new:
        return 0.0
    difference = abs(new - old) / abs(old) if old else float("inf")
    return difference if difference == difference else float("inf")  # NaN is no small difference


def main() -> int:
    """Compare as the command line says; return the exit code."""
    parser = argparse.ArgumentParser(description="Say whether two runs have the same losses.")
    parser.add_argument("old", type=Path, metavar="OLD")
    parser.add_argument("new", type=Path, metavar="NEW")
    asked = parser.parse_args()
    try:
        old, new = read_losses(asked.old), read_losses(asked.new)
        step, difference = worst_step(old, new)
    except NotLosses as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if difference == 0:
        print(f"identical: {len(old)} steps")
        return 0
    print(f"differ: {len(old)} steps, most at step {step}: {old[step]!r} -> {new[step]!r} (relative {difference:.2e})")
    return 1


if __name__ == "__main__":
    sys.exit(main())
