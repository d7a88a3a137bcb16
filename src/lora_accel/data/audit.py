"""The ledger: every input row in exactly one bucket, and what `inspect` and the run folder tell of it."""

from __future__ import annotations

import dataclasses
from typing import Any

from lora_accel.config.schema import DataFormat
from lora_accel.errors import DataError

USED, TRUNCATED, SPLIT = "used", "truncated", "split"
DROPPED = "dropped:"


@dataclasses.dataclass
class SourceLedger:
    """The rows of one source.

    A row is named by file and number, `orders.jsonl:17`: the line of a JSONL file, else its place from 1.
    """

    path: str
    format: DataFormat | None = None
    sha256: dict[str, str] = dataclasses.field(default_factory=dict)
    """Hash of the bytes of each file read (of a Hub data set, its fingerprint)."""
    buckets: dict[str, list[tuple[str, int]]] = dataclasses.field(default_factory=dict)
    num_examples: int = 0
    num_tokens: int = 0
    num_supervised_tokens: int = 0
    longest: int = 0

    @property
    def num_rows(self) -> int:
        """Return the number of rows met."""
        return sum(map(len, self.buckets.values()))

    @property
    def dropped(self) -> dict[str, list[tuple[str, int]]]:
        """Return the unused rows by reason."""
        return {
            bucket.removeprefix(DROPPED): rows for bucket, rows in self.buckets.items() if bucket.startswith(DROPPED)
        }

    def count(self, row: tuple[str, int], bucket: str, lengths: list[int], supervised: list[int]) -> None:
        """Put a row into its bucket, with the examples that came of it."""
        self.buckets.setdefault(bucket, []).append(row)
        self.num_examples += len(lengths)
        self.num_tokens += sum(lengths)
        self.num_supervised_tokens += sum(supervised)
        self.longest = max(self.longest, *lengths, 0)

    def add_file(self, path: str, sha256: str) -> None:
        """Note a file that is read, with the hash of its bytes."""
        self.sha256[path] = sha256

    def check(self, max_dropped: float) -> None:
        """Refuse a source that loses too much.

        Raises:
            DataError: no row is usable, or more than `max_dropped` of them are not.
        """
        num_dropped = sum(map(len, self.dropped.values()))
        if self.num_rows == 0:
            raise DataError(f"{self.path}: holds no rows; give a file with rows, or leave it out")
        if num_dropped <= max_dropped * self.num_rows and num_dropped < self.num_rows:
            return
        reasons = "\n".join(
            f"  {name_rows(rows)}: {reason}"
            for reason, rows in sorted(self.dropped.items(), key=lambda item: -len(item[1]))
        )
        allowed, without = "", ""
        if num_dropped < self.num_rows:
            allowed = f"; data.max_dropped allows {max_dropped:.1%}"
            without = ", or raise data.max_dropped to train without them"
        raise DataError(
            f"{self.path}: {num_dropped} of {self.num_rows} rows cannot be used{allowed}\n{reasons}\n"
            f"Mend these rows{without}."
        )

    def as_dict(self) -> dict[str, Any]:
        """Return plain values; the rows of each bucket by file, as ranges such as `1-398 400`."""
        values = dataclasses.asdict(self) | {"num_rows": self.num_rows}
        values["buckets"] = {
            bucket: {"num_rows": len(rows), "rows": _ranges(rows)} for bucket, rows in self.buckets.items()
        }
        return values


def name_rows(rows: list[tuple[str, int]], most: int = 5) -> str:
    """Return the first rows by file: `a.jsonl, rows 1, 7; b.jsonl, row 3 and 12 more`."""
    more = f" and {len(rows) - most} more" if len(rows) > most else ""
    of_file: dict[str, list[str]] = {}
    for file, number in rows[:most]:
        of_file.setdefault(file, []).append(str(number))
    named = [f"{file}, row{'s' * (len(n) > 1)} {', '.join(n)}" for file, n in of_file.items()]
    return "; ".join(named) + more


def ledger_lines(ledgers: list[SourceLedger]) -> list[tuple[str, str]]:
    """Return for each source what a person reads of it: (path, summary)."""
    lines = []
    for ledger in ledgers:
        rest = [
            f"{len(rows):,} {bucket}"
            for bucket, rows in sorted(ledger.buckets.items())
            if bucket not in (USED, *(DROPPED + reason for reason in ledger.dropped))
        ]
        rest += [f"{len(rows):,} dropped ({reason})" for reason, rows in ledger.dropped.items()]
        share = ledger.num_supervised_tokens / max(1, ledger.num_tokens)
        lines.append(
            (
                ledger.path,
                f"{ledger.format}, {ledger.num_rows:,} rows: {len(ledger.buckets.get(USED, [])):,} used"
                + "".join(f", {item}" for item in rest)
                + f"; {ledger.num_tokens:,} tokens, {share:.1%} supervised, longest {ledger.longest:,}",
            )
        )
    return lines


def _ranges(rows: list[tuple[str, int]]) -> dict[str, str]:
    ranges: dict[str, list[list[int]]] = {}
    for file, number in rows:
        of_file = ranges.setdefault(file, [])
        if of_file and number == of_file[-1][1] + 1:
            of_file[-1][1] = number
        else:
            of_file.append([number, number])
    return {file: " ".join(str(a) if a == b else f"{a}-{b}" for a, b in of_file) for file, of_file in ranges.items()}
