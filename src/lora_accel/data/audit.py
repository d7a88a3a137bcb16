"""The ledger: counts every input row in exactly one bucket, for `inspect` and the run folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from lora_accel.config.counts import scale
from lora_accel.console import short_names
from lora_accel.errors import DataError

USED, TRUNCATED, SPLIT = "used", "truncated", "split"
DROPPED = "dropped:"
TEMPLATE = "the chat template"
"""Names a chat template in the reason of a dropped row."""
MAX_CUT = 0.05
"""Share of a source's tokens that may be cut off before its summary begins with it."""


@dataclasses.dataclass
class SourceLedger:
    """The rows of one source by bucket, and counts over its examples.

    A row is identified by (file, number): the line number in a JSONL file, else the position in the file, from 1.
    """

    path: str
    format: str | None = None
    sha256: dict[str, str] = dataclasses.field(default_factory=dict)
    """Hash of the bytes of each file (for a Hub dataset, its fingerprint)."""
    buckets: dict[str, list[tuple[str, int]]] = dataclasses.field(default_factory=dict)
    num_examples: int = 0
    num_tokens: int = 0
    num_supervised_tokens: int = 0
    longest: int = 0
    num_ended: int = 0
    """Examples in which the end of an answer is supervised. From these a model learns to stop."""
    num_raw: int = 0
    """Examples that were tokenized without a chat template."""
    num_cut_tokens: int = 0
    """Tokens cut off by data.max_length."""
    tokens_sha256: str = ""
    """Hash of all tokens and masks. Detects a template that inserts the date, or a library that changed."""
    notes: dict[str, int] = dataclasses.field(default_factory=dict)
    """Changes made to rows -> number of rows."""

    @property
    def num_rows(self) -> int:
        """Return the number of rows read."""
        return sum(map(len, self.buckets.values()))

    @property
    def can_split(self) -> bool:
        """Whether `data.overlong: split` can divide these rows: not a prompt and completion without a template."""
        return self.format != "prompt_completion" or not self.num_raw

    @property
    def dropped(self) -> dict[str, list[tuple[str, int]]]:
        """Return the dropped rows by reason."""
        return {
            bucket.removeprefix(DROPPED): rows for bucket, rows in self.buckets.items() if bucket.startswith(DROPPED)
        }

    def count(self, row: tuple[str, int], bucket: str, lengths: list[int], supervised: list[int]) -> None:
        """Count a row in its bucket, with the lengths and supervised tokens of its examples."""
        self.buckets.setdefault(bucket, []).append(row)
        self.num_examples += len(lengths)
        self.num_tokens += sum(lengths)
        self.num_supervised_tokens += sum(supervised)
        self.longest = max(self.longest, *lengths, 0)

    def note(self, notes: Mapping[str, int]) -> None:
        """Add notes, with the number of rows of each."""
        for note, num_rows in notes.items():
            self.notes[note] = self.notes.get(note, 0) + num_rows

    def check(self, max_dropped: float) -> None:
        """Check that enough rows are usable.

        Args:
            max_dropped: largest allowed fraction of dropped rows (`data.max_dropped`).

        Raises:
            DataError: no row is usable, or too many are dropped.
        """
        num_dropped = sum(map(len, self.dropped.values()))
        if self.num_rows == 0:
            raise DataError(f"{self.path}: has no rows; use a file with rows, or remove this source")
        if num_dropped <= scale(max_dropped, self.num_rows) and num_dropped < self.num_rows:
            return
        reasons = "\n".join(
            f"  {name_rows(rows)}: {reason}"
            for reason, rows in sorted(self.dropped.items(), key=lambda item: -len(item[1]))
        )
        limit, alternative = "", ""
        if num_dropped < self.num_rows:
            limit = f"; data.max_dropped allows {max_dropped:.1%}"
            alternative = ", or raise data.max_dropped to train without them"
        raise DataError(
            f"{self.path}: {num_dropped} of {self.num_rows} rows cannot be used{limit}\n{reasons}\n"
            f"{_remedy(self.dropped)}{alternative}."
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the ledger for JSON. Rows of a bucket are grouped by file, as ranges such as `1-398 400`."""
        values = dataclasses.asdict(self) | {"num_rows": self.num_rows}
        values["buckets"] = {
            bucket: {"num_rows": len(rows), "rows": _format_ranges(rows)} for bucket, rows in self.buckets.items()
        }
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], path: str, sha256: dict[str, str]) -> SourceLedger:
        """Return the ledger of an `as_dict`, for a source with the same bytes at another path.

        Args:
            values: what `as_dict` returned.
            path: the source's path now.
            sha256: hash of each file by its name now, in the same order.
        """
        new_names = dict(zip(values["sha256"], sha256, strict=True))
        buckets = {
            name: [(new_names[file], row) for file, ranges in bucket["rows"].items() for row in _parse_ranges(ranges)]
            for name, bucket in values["buckets"].items()
        }
        fields = {field.name: values[field.name] for field in dataclasses.fields(cls)}
        return cls(**(fields | {"path": path, "sha256": sha256, "buckets": buckets}))


def name_rows(rows: list[tuple[str, int]], most: int = 5) -> str:
    """Return the first rows by file, for a message: `a.jsonl, rows 1, 7; b.jsonl, row 3 and 12 more`."""
    more = f" and {len(rows) - most} more" if len(rows) > most else ""
    numbers: dict[str, list[str]] = {}
    for file, number in rows[:most]:
        numbers.setdefault(file, []).append(str(number))
    names = [f"{file}, row{'s' * (len(n) > 1)} {', '.join(n)}" for file, n in numbers.items()]
    return "; ".join(names) + more


def total(ledgers: Sequence[SourceLedger]) -> dict[str, Any]:
    """Return the counts summed over all sources."""
    counts = ("num_rows", "num_examples", "num_tokens", "num_supervised_tokens", "num_ended", "num_cut_tokens")
    sums: dict[str, Any] = {name: sum(getattr(ledger, name) for ledger in ledgers) for name in counts}
    sums["num_dropped"] = sum(len(rows) for ledger in ledgers for rows in ledger.dropped.values())
    sums["longest"] = max((ledger.longest for ledger in ledgers), default=0)
    sums["supervised_share"] = sums["num_supervised_tokens"] / max(1, sums["num_tokens"])
    sums["ended_share"] = sums["num_ended"] / max(1, sums["num_examples"])
    return sums


def ledger_lines(ledgers: list[SourceLedger]) -> list[tuple[str, str]]:
    """Return (short name, summary) of each source."""
    lines = []
    for name, ledger in zip(short_names([ledger.path for ledger in ledgers]), ledgers, strict=True):
        others = [
            f"{len(rows):,} {bucket}"
            for bucket, rows in sorted(ledger.buckets.items())
            if bucket not in (USED, *(DROPPED + reason for reason in ledger.dropped))
        ]
        others += [f"{len(rows):,} dropped ({reason})" for reason, rows in ledger.dropped.items()]
        others += [f"{num_rows:,} rows: {note}" for note, num_rows in ledger.notes.items()]
        share = ledger.num_supervised_tokens / max(1, ledger.num_tokens)
        ended = ledger.num_ended / max(1, ledger.num_examples)
        cut = f" ({ledger.num_cut_tokens:,} more cut off)" if ledger.num_cut_tokens else ""
        num_kept = len(ledger.buckets.get(USED, [])) + len(ledger.buckets.get(TRUNCATED, []))
        has_own = SPLIT not in ledger.buckets and ledger.num_examples > num_kept
        own = " (answers that the template renders differently in the row have their own)" if has_own else ""
        tokens = f"{ledger.num_tokens:,} tokens{cut}, {share:.1%} supervised"
        lines.append(
            (
                name,
                _cut_warning(ledger)
                + f"{ledger.format}, {ledger.num_rows:,} rows: {len(ledger.buckets.get(USED, [])):,} used"
                + "".join(f", {item}" for item in others)
                + f"; {ledger.num_examples:,} examples{own}, {tokens}, "
                f"end of turn in {ended:.1%} of examples, longest {ledger.longest:,}",
            )
        )
    return lines


def _remedy(reasons: Collection[str]) -> str:
    """Return what to do about dropped rows."""
    blamed = [reason for reason in reasons if TEMPLATE in reason]
    template = "set model.chat_template to a template that supports these rows (or set model.chat_template_kwargs)"
    if not blamed:
        return "Fix these rows"
    return f"Fix these rows, or {template}" if len(blamed) < len(reasons) else f"S{template[1:]}, or change the rows"


def _cut_warning(ledger: SourceLedger) -> str:
    """Return a warning if truncation cuts off many tokens, or nothing. Split rows lose only what is not supervised."""
    share = ledger.num_cut_tokens / max(1, ledger.num_tokens + ledger.num_cut_tokens)
    if share <= MAX_CUT or TRUNCATED not in ledger.buckets:
        return ""
    split = ", or set data.overlong: split" if ledger.can_split else ""
    return f"{share:.0%} of the tokens are cut off at data.max_length (raise it{split}); "


def _parse_ranges(ranges: str) -> Iterator[int]:
    for part in ranges.split():
        first, _, last = part.partition("-")
        yield from range(int(first), int(last or first) + 1)


def _format_ranges(rows: list[tuple[str, int]]) -> dict[str, str]:
    ranges: dict[str, list[list[int]]] = {}
    for file, number in rows:
        pairs = ranges.setdefault(file, [])
        if pairs and number == pairs[-1][1] + 1:
            pairs[-1][1] = number
        else:
            pairs.append([number, number])
    return {file: " ".join(str(a) if a == b else f"{a}-{b}" for a, b in pairs) for file, pairs in ranges.items()}
