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
from lora_accel.data.chat import Example
from lora_accel.data.dataset import Recipe, find_rows, load_dataset, prepare
from lora_accel.data.splits import HELD_OUT, split_train
from lora_accel.data.store import Examples
from lora_accel.data.tokens import special_tokens
from lora_accel.errors import ConfigError, did_you_mean
from lora_accel.labels import IGNORE_INDEX
from lora_accel.saving.atomic import write_text
from lora_accel.setup.recipe import make_recipe

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


class Part(NamedTuple):
    """The examples of one source that are trained on, or that are evaluated."""

    split: str
    """train or eval."""
    section: SourceSection
    ledger: SourceLedger
    """Of the source; those of its examples that are held out have the same one."""
    examples: Examples
    held_out: bool = False
    """Whether data.eval_fraction holds them out of a training source."""


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
        source: `path` of the one source to look at, or `data.eval_fraction` for what it holds out; None = all.
        html: a page to write as well.
        as_json: print one JSON object for each example, and one for the ledger.

    Raises:
        ConfigError: there is no such source, or the page cannot be written there.
        DataError: as training would; if too many rows are unusable, after all has been shown.
    """
    if html is not None:
        _refuse_page(html)
    recipe = make_recipe(config)
    parts = load_parts(config, recipe, source)
    tokenizer = recipe.template().tokenizer
    if html is not None:
        _write_page(html, page(parts, config.data, recipe, rows or ROWS))
    if as_json:
        for line in json_lines(parts, tokenizer, rows):
            print(json.dumps(line))
        sys.stdout.flush()  # here, where a reader who has left is no error, and not at the end of the process
    else:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # for a terminal that has not all characters
        show_examples(parts, config.data, recipe, rows or ROWS, Console())
        show_audit(parts)
    for ledger in _ledgers(parts):
        ledger.check(config.data.max_dropped)


def load_parts(config: RunConfig, recipe: Recipe, source: str | None) -> list[Part]:
    """Load the sources that are asked for, and hold out of them what training would.

    Raises:
        ConfigError: no source has this path.
        DataError: see `load_dataset` and `split_train`.
    """
    data = config.data
    known = list(dict.fromkeys(section.path for section in (*data.train, *data.eval)))
    known += [HELD_OUT] if data.eval_fraction else []
    if source is not None and source not in known:
        raise ConfigError(
            f"--source: {source!r} is no source of this config{did_you_mean(source, known)}; known are "
            + ", ".join(known)
        )

    def wanted(sections: Sequence[SourceSection]) -> list[SourceSection]:
        return [section for section in sections if source in (None, section.path)]

    # Which examples are held out depends on all training sources.
    sections = data.train if data.eval_fraction else wanted(data.train)
    whole = load_dataset(sections, recipe, data)
    train, held = split_train(whole, data, config.seed)
    parts = [
        Part("train", *of) for of in zip(sections, whole.ledgers, (x.examples for x in train.sources), strict=True)
    ]
    if held is not None:
        outs = zip(sections, whole.ledgers, (x.examples for x in held.sources), strict=True)
        parts += [Part("eval", *of, held_out=True) for of in outs]
    sections = wanted(data.eval)
    given = load_dataset(sections, recipe, data)
    outs = zip(sections, given.ledgers, (x.examples for x in given.sources), strict=True)
    parts += [Part("eval", *of) for of in outs]
    if source == HELD_OUT:
        return [part for part in parts if part.held_out]
    return [part for part in parts if source in (None, part.section.path)]


def json_lines(parts: Sequence[Part], tokenizer: Any, rows: int | None) -> Iterator[dict[str, Any]]:
    """Yield each example, at most so many of a source, and then the ledgers, as plain values."""
    for part in parts:
        for example in itertools.islice(part.examples, rows):
            yield {
                "source": part.section.path,
                "split": part.split,
                "held_out": part.held_out,
                "file": example.row[0],
                "row": example.row[1],
                "text": _decoded(tokenizer, example.input_ids),
                "input_ids": example.input_ids,
                "labels": example.labels,
            }
    given = [part for part in parts if part.split == "eval" and not part.held_out]
    audit: dict[str, Any] = {
        "train": [ledger.as_dict() for ledger in _ledgers([part for part in parts if part not in given])],
        "eval": [ledger.as_dict() for ledger in _ledgers(given)],
    }
    yield {"audit": audit | {"total": total(_ledgers(parts))}}


def shown_examples(parts: Sequence[Part], options: DataSection, recipe: Recipe, rows: int) -> Iterator[Shown]:
    """Yield the first examples of each source."""
    tokenizer = recipe.template().tokenizer
    for part in parts:
        examples = part.examples[:rows]
        fates = {row: bucket for bucket in (TRUNCATED, SPLIT) for row in part.ledger.buckets.get(bucket, ())}
        long = {example.row for example in examples} & fates.keys()
        cut = _cut_tokens(long, part, recipe, options)
        if not examples and not part.held_out:
            yield Shown(f"{visible(part.section.path)} ({part.split}), no example", [], "")
        for example in examples:
            heading = _heading(example, part, fates.get(example.row))
            ending = ""
            if cut.get(example.row) and len(example.input_ids) == options.max_length:
                ending = f"… cut at data.max_length={options.max_length}: {cut[example.row]:,} tokens left out"
            yield Shown(heading, list(pieces(example, tokenizer)), ending)


def _heading(example: Example, part: Part, fate: str | None) -> str:
    file, row = example.row
    within = f"{file}, " if file != part.section.path else ""
    counts = f"{len(example.input_ids):,} tokens, {example.num_supervised:,} supervised"
    remarks = [fate] if fate else []
    remarks += [f"held out by {HELD_OUT}"] if part.held_out else []
    return visible(", ".join([f"{part.section.path} ({part.split}), {within}row {row}, {counts}", *remarks]))


def _cut_tokens(
    rows: set[tuple[str, int]], part: Part, recipe: Recipe, options: DataSection
) -> dict[tuple[str, int], int]:
    """Return how many tokens each of these rows lost. The ledger holds their sum, so they are tokenised again."""
    named, found = part.section.model_copy(update={"format": part.ledger.format}), {}
    for alone in find_rows(part.section, rows):
        done = prepare(alone, template=recipe.template(), section=named, options=options)
        found[alone.file, alone.numbers[0]] = done.num_cut_tokens
    return found


# From tokens to text.


def pieces(example: Example, tokenizer: Any) -> Iterator[Piece]:
    """Yield the tokens of an example as text. None goes together with one that has another label."""
    specials = {tokenizer.convert_tokens_to_ids(text): text for text in special_tokens(tokenizer)}
    before: list[int] = []

    def kind(pair: tuple[int, int]) -> tuple[bool, bool]:
        return pair[1] != IGNORE_INDEX, pair[0] in specials

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


def show_examples(parts: Sequence[Part], options: DataSection, recipe: Recipe, rows: int, console: Console) -> None:
    """Print the first examples of each source, in colours where there are any."""
    colours = console.color_system is not None and not console.no_color
    specials = special_tokens(recipe.template().tokenizer)
    console.print(_legend(colours), soft_wrap=True)
    for shown in shown_examples(parts, options, recipe, rows):
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


def show_audit(parts: Sequence[Part]) -> None:
    """Print the ledgers, their sums, and how long examples are."""
    print()
    print_table("rows", [(visible(path), visible(told)) for path, told in ledger_lines(_ledgers(parts))])
    print_table("total", total_lines(parts))
    for name, bins in _histograms(parts):
        print_table(name, bins, heads=("tokens", "examples", ""))


def total_lines(parts: Sequence[Part]) -> list[tuple[str, str]]:
    """Return the sums over sources as names and values."""
    sums = total(_ledgers(parts))
    num_held = sum(len(part.examples) for part in parts if part.held_out)
    return [
        ("rows", f"{sums['num_rows']:,}, {sums['num_dropped']:,} dropped"),
        (
            "examples",
            f"{sums['num_examples']:,}" + (f", {num_held:,} of them held out for evaluation" if num_held else ""),
        ),
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


def _histograms(parts: Sequence[Part]) -> Iterator[tuple[str, list[tuple[str, str, str]]]]:
    for split in ("train", "eval"):
        lengths = [part.examples.lengths for part in parts if part.split == split and len(part.examples)]
        if lengths:
            yield f"tokens per example ({split})", histogram(np.concatenate(lengths))


def _ledgers(parts: Sequence[Part]) -> list[SourceLedger]:
    """Return the ledger of each source once, also where some of its examples are held out."""
    return list({id(part.ledger): part.ledger for part in parts}.values())


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


def page(parts: Sequence[Part], options: DataSection, recipe: Recipe, rows: int) -> str:
    """Return a page of HTML that needs nothing else: the first examples of each source, and the ledger."""
    legend = (
        '<p><mark>supervised</mark> tokens are learned, <b class="special">special</b> tokens are bold; '
        f"{SIGNS}. Point at a token to see its id.</p>"
    )
    blocks = [
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">",
        f"<title>lora-accel inspect</title><style>{STYLE}</style></head><body><h1>lora-accel inspect</h1>{legend}",
    ]
    for shown in shown_examples(parts, options, recipe, rows):
        text = "".join(map(_tag, shown.pieces))
        blocks.append(f"<h2>{escape(shown.heading)}</h2>")
        blocks.append(f"<pre>{text}</pre>")
        blocks.append(f"<p><em>{escape(shown.ending)}</em></p>" if shown.ending else "")
    ledgers = _ledgers(parts)
    tables: list[tuple[str, Sequence[tuple[str, ...]]]] = [
        ("rows", [(visible(path), visible(told)) for path, told in ledger_lines(ledgers)]),
        ("total", total_lines(parts)),
        *_histograms(parts),
    ]
    blocks += [_html_table(title, lines) for title, lines in tables]
    return "\n".join([*blocks, "</body></html>\n"])


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
