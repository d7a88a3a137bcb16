"""What is learned of the data, to look at: every token, supervised or not, every row in the ledger. Loads no model.

Rows are anybody's words. They are shown as words: never as markup, HTML, or codes that a terminal obeys.
"""

from __future__ import annotations

import io
import itertools
import json
import re
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.text import Text

from lora_accel.config.schema import DataSection, RunConfig, SourceSection
from lora_accel.console import print_table
from lora_accel.data.audit import SPLIT, TRUNCATED, SourceLedger, ledger_lines, total
from lora_accel.data.chat import IGNORED, Example
from lora_accel.data.dataset import Dataset, Recipe, load_dataset, prepare
from lora_accel.data.rows import Chunk, find_input
from lora_accel.data.tokens import special_tokens
from lora_accel.errors import ConfigError, did_you_mean
from lora_accel.recipe import make_recipe
from lora_accel.saving.commit import write_text

ROWS = 3
"""Examples of each source that a person is shown."""
MOST_BINS, BAR = 12, 40
"""Lines that a histogram has at most (and seldom less than half of), and characters of its longest bar."""
BROKEN, MOST_TOKENS = "\ufffd", 16
"""What stands for bytes that are no character (yet), and how many tokens are waited for to make one."""
HIDDEN, JOINERS, MARKS = ("Cc", "Cf", "Cs", "Zl", "Zp"), "\u200c\u200d", "⟦⟧⟨⏎⇥"
"""Kinds of characters that a reader would not see; two that emoji and scripts need; and our own marks."""
GUTTER = "│ "
"""Before each line of a row, so that no row can look like a heading."""
SIGNS = "⏎ line break, ⇥ tab, ⟨U+…⟩ a character that would not show"
LEARNED, UNLEARNED = ("color(16) on color(120)", "color(16) on color(114)"), ("color(243)", "color(247)")
"""Two shades each, in turn: black on greens, and greys that can be read on white and on black."""
SPECIAL = "bold color(133)"


class Split(NamedTuple):
    """The sources of `data.train` or of `data.eval`."""

    name: str
    sections: list[SourceSection]
    dataset: Dataset


class Piece(NamedTuple):
    """Tokens that are text together: one, or the few that the bytes of a character are spread over."""

    text: str
    ids: list[int]
    supervised: bool
    special: bool


class Shown(NamedTuple):
    """An example as a person sees it."""

    heading: str
    pieces: list[Piece]
    ending: str
    """What max_length cut off, in words; empty if nothing."""


def inspect(
    config: RunConfig,
    *,
    rows: int | None = None,
    source: str | None = None,
    html: Path | None = None,
    as_json: bool = False,
) -> None:
    """Print examples and the ledger of a run config's data, as a person or a script reads them.

    Args:
        rows: how many examples of each source; None = 3, in JSON all.
        source: `path` of the one source to look at; None = all.
        html: a page to write as well.
        as_json: print one JSON object for each example, and one for the ledger.

    Raises:
        ConfigError: there is no such source, or the page cannot be written there.
        DataError: as training would; if too many rows are unusable, after all has been shown.
    """
    if html is not None:
        _refuse_page(html)
    recipe = make_recipe(config)
    splits = load_splits(config.data, recipe, source)
    tokenizer = recipe.template().tokenizer
    if html is not None:
        _write_page(html, page(splits, config.data, recipe, rows or ROWS))
    if as_json:
        for line in json_lines(splits, tokenizer, rows):
            print(json.dumps(line))
        sys.stdout.flush()  # here, where a reader who has left is no error, and not at the end of the process
    else:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # for a terminal that has not all characters
        show_examples(splits, config.data, recipe, rows or ROWS, Console())
        show_audit(splits)
    for split in splits:
        split.dataset.check(config.data.max_dropped)


def load_splits(options: DataSection, recipe: Recipe, source: str | None) -> list[Split]:
    """Load the sources that are asked for.

    Raises:
        ConfigError: no source has this path.
        DataError: see `load_dataset`.
    """
    known = list(dict.fromkeys(section.path for section in (*options.train, *options.eval)))
    if source is not None and source not in known:
        raise ConfigError(
            f"--source: {source!r} is no source of this config{did_you_mean(source, known)}; known are "
            + ", ".join(known)
        )
    splits = []
    for name, sections in (("train", options.train), ("eval", options.eval)):
        wanted = [section for section in sections if source in (None, section.path)]
        splits.append(Split(name, wanted, load_dataset(wanted, recipe, options)))
    return splits


def json_lines(splits: Sequence[Split], tokenizer: Any, rows: int | None) -> Iterator[dict[str, Any]]:
    """Yield each example, at most so many of a source, and then the ledgers, as plain values."""
    for split in splits:
        for section, source in zip(split.sections, split.dataset.sources, strict=True):
            for example in itertools.islice(source.examples, rows):
                yield {
                    "source": section.path,
                    "split": split.name,
                    "file": example.row[0],
                    "row": example.row[1],
                    "text": _decoded(tokenizer, example.input_ids),
                    "input_ids": example.input_ids,
                    "labels": example.labels,
                }
    audit: dict[str, Any] = {split.name: [x.as_dict() for x in split.dataset.ledgers] for split in splits}
    yield {"audit": audit | {"total": total(_ledgers(splits))}}


def shown_examples(splits: Sequence[Split], options: DataSection, recipe: Recipe, rows: int) -> Iterator[Shown]:
    """Yield the first examples of each source."""
    tokenizer = recipe.template().tokenizer
    for split in splits:
        for section, source, ledger in zip(split.sections, *split.dataset, strict=True):
            examples = source.examples[:rows]
            fates = {row: bucket for bucket in (TRUNCATED, SPLIT) for row in ledger.buckets.get(bucket, ())}
            long = {example.row for example in examples} & fates.keys()
            cut = _cut_tokens(long, section, ledger, recipe, options)
            if not examples:
                yield Shown(f"{visible(section.path)} ({split.name}), no example", [], "")
            for example in examples:
                heading = _heading(example, section.path, split.name, fates.get(example.row))
                ending = ""
                if cut.get(example.row) and len(example.input_ids) == options.max_length:
                    ending = f"… cut at data.max_length={options.max_length}: {cut[example.row]:,} tokens left out"
                yield Shown(heading, list(pieces(example, tokenizer)), ending)


def _heading(example: Example, path: str, split: str, fate: str | None) -> str:
    file, row = example.row
    within = f"{file}, " if file != path else ""
    counts = f"{len(example.input_ids):,} tokens, {example.num_supervised:,} supervised"
    return visible(f"{path} ({split}), {within}row {row}, {counts}" + (f", {fate}" if fate else ""))


def _cut_tokens(
    rows: set[tuple[str, int]], section: SourceSection, ledger: SourceLedger, recipe: Recipe, options: DataSection
) -> dict[tuple[str, int], int]:
    """Return how many tokens each of these rows lost. The ledger holds their sum, so they are tokenised again."""
    named, found = section.model_copy(update={"format": ledger.format}), {}
    for chunk in find_input(section).chunks(section.limit) if rows else ():
        for place, number in enumerate(chunk.numbers):
            if (chunk.file, number) in rows:
                alone = Chunk(chunk.file, [number], chunk.rows[place : place + 1])
                done = prepare(alone, template=recipe.template(), section=named, options=options)
                found[chunk.file, number] = done.num_cut_tokens
        if len(found) == len(rows):
            break
    return found


# From tokens to text.


def pieces(example: Example, tokenizer: Any) -> Iterator[Piece]:
    """Yield the tokens of an example as text. None goes together with one that has another label."""
    specials = {tokenizer.convert_tokens_to_ids(text): text for text in special_tokens(tokenizer)}
    before: list[int] = []

    def kind(pair: tuple[int, int]) -> tuple[bool, bool]:
        return pair[1] != IGNORED, pair[0] in specials

    for (supervised, special), run in itertools.groupby(zip(example.input_ids, example.labels, strict=True), kind):
        waiting: list[int] = []
        tokens = [token for token, _ in run]
        for place, token in enumerate(tokens, start=1):
            waiting.append(token)
            text = specials[token] if special else _decoded_after(tokenizer, before, waiting)
            if text.endswith(BROKEN) and len(waiting) < MOST_TOKENS and place < len(tokens):
                continue  # the next token may hold the rest of a character
            yield Piece(text, waiting, supervised, special)
            if not text.endswith(BROKEN):  # half a character would melt with what follows it
                before = waiting
            waiting = []


def _decoded_after(tokenizer: Any, before: list[int], tokens: list[int]) -> str:
    """Return the text of tokens after others: some decoders drop a space before the first of all."""
    known, both = _decoded(tokenizer, before), _decoded(tokenizer, before + tokens)
    return both.removeprefix(known) if both.startswith(known) else _decoded(tokenizer, tokens)


def _decoded(tokenizer: Any, tokens: list[int]) -> str:
    return str(tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False))


class _Visible(dict[int, str]):
    """What each character is shown as, by its number; filled as it is asked."""

    def __missing__(self, number: int) -> str:
        letter = chr(number)
        hidden = unicodedata.category(letter) in HIDDEN and letter not in JOINERS
        self[number] = f"⟨U+{number:04X}⟩" if hidden or letter in MARKS else letter
        return self[number]


_VISIBLE = _Visible({ord("\n"): "⏎\n", ord("\t"): "⇥"})


def visible(text: str) -> str:
    """Return a text in which each character can be seen, and none steers a terminal.

    Line breaks stay, each behind a mark. Characters that look like our marks are shown by number as well.
    """
    return text.translate(_VISIBLE)


# On a terminal, or in a file without colours.


def show_examples(splits: Sequence[Split], options: DataSection, recipe: Recipe, rows: int, console: Console) -> None:
    """Print the first examples of each source, in colours where there are any."""
    colours = console.color_system is not None and not console.no_color
    specials = special_tokens(recipe.template().tokenizer)
    console.print(_legend(colours), soft_wrap=True)
    for shown in shown_examples(splits, options, recipe, rows):
        console.print()
        console.print(Text(shown.heading, style="bold"), soft_wrap=True)
        if not shown.pieces:
            continue
        text = coloured(shown.pieces) if colours else Text(marked(shown.pieces, specials))
        if shown.ending:
            text.append("" if text.plain.endswith("\n") else "\n").append(shown.ending, style="bold")
        for line in text.split("\n"):
            # A file gets lines as they are; on a terminal the gutter goes on where a line is folded.
            width = console.width - len(GUTTER)
            folded = line.wrap(console, width, overflow="fold") if console.is_terminal else [line]
            for part in folded:
                console.print(Text.assemble((GUTTER, "dim"), part), soft_wrap=True)


def _legend(colours: bool) -> Text:
    if not colours:
        return Text(f"supervised tokens stand between ⟦ and ⟧; {SIGNS}")
    legend = Text.assemble(("supervised", LEARNED[0]), " ", ("not supervised", UNLEARNED[0]), " ", ("special", SPECIAL))
    return legend.append(f"; shades change from token to token; {SIGNS}")


def coloured(pieces: Sequence[Piece]) -> Text:
    """Return pieces in colours: two shades in turn, so that one sees where tokens end."""
    text = Text()
    for number, piece in enumerate(pieces):
        style = (LEARNED if piece.supervised else UNLEARNED)[number % 2]
        if piece.special:
            style = f"bold {style}" if piece.supervised else SPECIAL
        text.append(visible(piece.text), style)
    return text


def marked(pieces: Sequence[Piece], specials: set[str]) -> str:
    """Return pieces as plain text: supervised ones between ⟦ and ⟧.

    Words that only look like a special token have a dot after the first letter, `<·/s>`.
    """
    longest_first = sorted(map(re.escape, specials), key=len, reverse=True)
    alike = re.compile("|".join(longest_first) or r"(?!)")
    shown = []
    for supervised, run in itertools.groupby(pieces, lambda piece: piece.supervised):
        shown.append("⟦" if supervised else "")
        for special, part in itertools.groupby(run, lambda piece: piece.special):
            text = "".join(piece.text for piece in part)
            shown.append(visible(text if special else alike.sub(lambda found: f"{found[0][0]}·{found[0][1:]}", text)))
        shown.append("⟧" if supervised else "")
    return "".join(shown)


def show_audit(splits: Sequence[Split]) -> None:
    """Print the ledgers, their sums, and how long examples are."""
    print()
    print_table("rows", [(visible(path), visible(told)) for path, told in ledger_lines(_ledgers(splits))])
    print_table("total", total_lines(_ledgers(splits)))
    for name, bins in _histograms(splits):
        print_table(name, bins, heads=("tokens", "examples", ""))


def total_lines(ledgers: Sequence[SourceLedger]) -> list[tuple[str, str]]:
    """Return the sums over sources as names and values."""
    sums = total(ledgers)
    return [
        ("rows", f"{sums['num_rows']:,}, {sums['num_dropped']:,} dropped"),
        ("examples", f"{sums['num_examples']:,}"),
        ("tokens", f"{sums['num_tokens']:,}, {sums['num_cut_tokens']:,} more cut off"),
        ("supervised", f"{sums['num_supervised_tokens']:,} tokens, {sums['supervised_share']:.1%}"),
        ("end of turn", f"supervised in {sums['ended_share']:.1%} of examples"),
        ("longest", f"{sums['longest']:,} tokens"),
    ]


def histogram(lengths: npt.NDArray[np.int64]) -> list[tuple[str, str, str]]:
    """Return about ten bins of equal, round width: (tokens, number of examples, bar).

    Args:
        lengths: [E], at least one.
    """
    first, last = int(lengths.min()), int(lengths.max())
    widths = (digit * 10**power for power in itertools.count() for digit in (1, 2, 5))
    width = next(width for width in widths if last // width - first // width < MOST_BINS)
    start = first // width * width
    counts = np.bincount((lengths - start) // width)
    bins = []
    for number, count in enumerate(counts.tolist()):
        low, high = start + number * width, min(last, start + (number + 1) * width - 1)
        eighths = -(-count * BAR * 8 // int(counts.max()))  # rounded up: one example is seen, too
        bar = "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()
        bins.append((f"{low:,}" if low == high else f"{low:,}-{high:,}", f"{count:>8,}", bar))
    return bins


def _histograms(splits: Sequence[Split]) -> Iterator[tuple[str, list[tuple[str, str, str]]]]:
    for split in splits:
        lengths = [source.examples.lengths for source in split.dataset.sources if len(source.examples)]
        if lengths:
            yield f"tokens per example ({split.name})", histogram(np.concatenate(lengths))


def _ledgers(splits: Sequence[Split]) -> list[SourceLedger]:
    return [ledger for split in splits for ledger in split.dataset.ledgers]


# In a browser.

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem;
       color: #222; background: #fff; }
h2 { font-size: 1rem; margin: 2rem 0 .3rem; overflow-wrap: anywhere; }
pre { margin: 0; padding: .6rem .8rem; border-left: 3px solid #ccc; white-space: pre-wrap; overflow-wrap: anywhere;
      font: 13px/1.7 ui-monospace, monospace; }
pre > span { color: #777; } pre > span:nth-child(even) { background: #f1f1f1; }
mark { color: #000; background: #b5e8b0; } mark:nth-child(even) { background: #93d98c; }
.special { font-weight: bold; } span.special { color: #8e3a8e !important; }
em { font-weight: bold; }
table { border-collapse: collapse; margin: .3rem 0 1.5rem; }
td, th { border: 1px solid #ccc; padding: .2rem .6rem; text-align: left; vertical-align: top; overflow-wrap: anywhere; }
"""


def page(splits: Sequence[Split], options: DataSection, recipe: Recipe, rows: int) -> str:
    """Return a page of HTML that needs nothing else: the first examples of each source, and the ledger."""
    legend = (
        '<p><mark>supervised</mark> tokens are learned, <b class="special">special</b> tokens are bold; '
        f"{SIGNS}. Point at a token to see its id.</p>"
    )
    parts = [
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">",
        f"<title>lora-accel inspect</title><style>{STYLE}</style></head><body><h1>lora-accel inspect</h1>{legend}",
    ]
    for shown in shown_examples(splits, options, recipe, rows):
        text = "".join(map(_tag, shown.pieces))
        parts.append(f"<h2>{escape(shown.heading)}</h2>")
        parts.append(f"<pre>{text}</pre>")
        parts.append(f"<p><em>{escape(shown.ending)}</em></p>" if shown.ending else "")
    ledgers = _ledgers(splits)
    tables: list[tuple[str, Sequence[tuple[str, ...]]]] = [
        ("rows", [(visible(path), visible(told)) for path, told in ledger_lines(ledgers)]),
        ("total", total_lines(ledgers)),
        *_histograms(splits),
    ]
    parts += [_html_table(title, lines) for title, lines in tables]
    return "\n".join([*parts, "</body></html>\n"])


def _tag(piece: Piece) -> str:
    tag, kind = "mark" if piece.supervised else "span", ' class="special"' if piece.special else ""
    return f'<{tag}{kind} title="{" ".join(map(str, piece.ids))}">{escape(visible(piece.text))}</{tag}>'


def _html_table(title: str, lines: Sequence[tuple[str, ...]]) -> str:
    rows = "\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in line) + "</tr>" for line in lines)
    return f"<h2>{escape(title)}</h2>\n<table>\n{rows}\n</table>"


def _refuse_page(file: Path) -> None:
    if file.is_dir():
        raise ConfigError(f"--html: {file} is a folder; name a file in it")
    if not file.parent.is_dir():
        raise ConfigError(f"--html: there is no folder {file.parent} to write {file.name} into; make it first")


def _write_page(file: Path, text: str) -> None:
    try:
        write_text(file, text)
    except PermissionError as error:
        raise ConfigError(f"--html: {file} cannot be written: {error.strerror}; name another place") from None
