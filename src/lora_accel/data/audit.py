"""The ledger: every input row in exactly one bucket, and what `inspect` and the run folder tell of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lora_accel.console import short_names
from lora_accel.errors import DataError

USED, TRUNCATED, SPLIT = "used", "truncated", "split"
DROPPED = "dropped:"


@dataclasses.dataclass
class SourceLedger:
    """The rows of one source.

    A row is named by file and number, `orders.jsonl:17`: the line of a JSONL file, else its place from 1.
    """

    path: str
    format: str | None = None
    sha256: dict[str, str] = dataclasses.field(default_factory=dict)
    """Hash of the bytes of each file read (of a Hub data set, its fingerprint)."""
    buckets: dict[str, list[tuple[str, int]]] = dataclasses.field(default_factory=dict)
    num_examples: int = 0
    num_tokens: int = 0
    num_supervised_tokens: int = 0
    longest: int = 0
    num_ended: int = 0
    """Examples in which the end of an answer is supervised: from these a model learns to stop."""
    num_cut_tokens: int = 0
    """Tokens that data.max_length cut off."""
    tokens_sha256: str = ""
    """Hash of all tokens and masks: a template may ask for the date, or a library change its ways."""
    notes: dict[str, int] = dataclasses.field(default_factory=dict)
    """What was done to rows that a person should know, with the number of rows."""

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

    def note(self, notes: Mapping[str, int]) -> None:
        """Add to the notes."""
        for what, rows in notes.items():
            self.notes[what] = self.notes.get(what, 0) + rows

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

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], path: str, sha256: dict[str, str]) -> SourceLedger:
        """Return the ledger that `as_dict` told of, of the same bytes at another path.

        Args:
            sha256: of each file, in the same order.
        """
        renamed = dict(zip(values["sha256"], sha256, strict=True))
        buckets = {
            bucket: [(renamed[file], row) for file, ranges in told["rows"].items() for row in _rows(ranges)]
            for bucket, told in values["buckets"].items()
        }
        kept = {field.name: values[field.name] for field in dataclasses.fields(cls)}
        return cls(**(kept | {"path": path, "sha256": sha256, "buckets": buckets}))


def name_rows(rows: list[tuple[str, int]], most: int = 5) -> str:
    """Return the first rows by file: `a.jsonl, rows 1, 7; b.jsonl, row 3 and 12 more`."""
    more = f" and {len(rows) - most} more" if len(rows) > most else ""
    of_file: dict[str, list[str]] = {}
    for file, number in rows[:most]:
        of_file.setdefault(file, []).append(str(number))
    named = [f"{file}, row{'s' * (len(n) > 1)} {', '.join(n)}" for file, n in of_file.items()]
    return "; ".join(named) + more


def total(ledgers: Sequence[SourceLedger]) -> dict[str, Any]:
    """Return the sums over sources, which scripts and people look at first."""
    counts = ("num_rows", "num_examples", "num_tokens", "num_supervised_tokens", "num_ended", "num_cut_tokens")
    sums: dict[str, Any] = {name: sum(getattr(ledger, name) for ledger in ledgers) for name in counts}
    sums["num_dropped"] = sum(len(rows) for ledger in ledgers for rows in ledger.dropped.values())
    sums["longest"] = max((ledger.longest for ledger in ledgers), default=0)
    sums["supervised_share"] = sums["num_supervised_tokens"] / max(1, sums["num_tokens"])
    sums["ended_share"] = sums["num_ended"] / max(1, sums["num_examples"])
    return sums


def ledger_lines(ledgers: list[SourceLedger]) -> list[tuple[str, str]]:
    """Return for each source what a person reads of it: (short name, summary)."""
    lines = []
    for name, ledger in zip(short_names([ledger.path for ledger in ledgers]), ledgers, strict=True):
        rest = [
            f"{len(rows):,} {bucket}"
            for bucket, rows in sorted(ledger.buckets.items())
            if bucket not in (USED, *(DROPPED + reason for reason in ledger.dropped))
        ]
        rest += [f"{len(rows):,} dropped ({reason})" for reason, rows in ledger.dropped.items()]
        rest += [f"{rows:,} rows: {note}" for note, rows in ledger.notes.items()]
        share = ledger.num_supervised_tokens / max(1, ledger.num_tokens)
        ended = ledger.num_ended / max(1, ledger.num_examples)
        cut = f" ({ledger.num_cut_tokens:,} more cut off)" if ledger.num_cut_tokens else ""
        lines.append(
            (
                name,
                f"{ledger.format}, {ledger.num_rows:,} rows: {len(ledger.buckets.get(USED, [])):,} used"
                + "".join(f", {item}" for item in rest)
                + f"; {ledger.num_examples:,} examples, {ledger.num_tokens:,} tokens{cut}, {share:.1%} supervised, "
                f"end of turn in {ended:.1%} of examples, longest {ledger.longest:,}",
            )
        )
    return lines


def _rows(ranges: str) -> Iterator[int]:
    for part in ranges.split():
        first, _, last = part.partition("-")
        yield from range(int(first), int(last or first) + 1)


def _ranges(rows: list[tuple[str, int]]) -> dict[str, str]:
    ranges: dict[str, list[list[int]]] = {}
    for file, number in rows:
        of_file = ranges.setdefault(file, [])
        if of_file and number == of_file[-1][1] + 1:
            of_file[-1][1] = number
        else:
            of_file.append([number, number])
    return {file: " ".join(str(a) if a == b else f"{a}-{b}" for a, b in of_file) for file, of_file in ranges.items()}
