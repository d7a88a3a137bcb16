"""`lora-accel inspect`: shows every token and its loss mask, and the ledger of all rows. Loads no model.

Data is untrusted: its text is never interpreted as markup, HTML or terminal control codes.
"""

from __future__ import annotations

import itertools
import json
import re
import sys
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
from lora_accel.data.dataset import Dataset, Recipe, find_rows, load_dataset, tokenize_chunk
from lora_accel.data.splits import HELD_OUT, split_train
from lora_accel.data.store import Examples
from lora_accel.data.tokens import special_tokens
from lora_accel.errors import ConfigError, did_you_mean
from lora_accel.labels import IGNORE_INDEX
from lora_accel.pages import check_page_path, make_visible, write_page
from lora_accel.setup.recipe import complete_config, make_recipe

ROWS = 3
"""Examples shown per source by default, except in JSON."""
MAX_BINS, BAR_WIDTH = 12, 40
"""Maximum number of bins of a histogram, and the length of its longest bar in characters."""
REPLACEMENT, MAX_PENDING = "\ufffd", 16
"""The character for bytes that are not (yet) valid UTF-8, and how many tokens are combined to complete a character."""
GUTTER = "│ "
"""Prefix of each line of a row, so that no row can look like a heading."""
LEGEND = "⏎ line break, ⇥ tab, ⟨U+…⟩ an invisible character"
SUPERVISED, UNSUPERVISED = ("color(16) on color(120)", "color(16) on color(114)"), ("color(243)", "color(247)")
"""Two alternating shades each: black on green, and grays that are readable on white and on black."""
SPECIAL = "bold color(133)"


class Part(NamedTuple):
    """The examples of one source that belong to one split."""

    split: str
    """train or eval."""
    section: SourceSection
    ledger: SourceLedger
    """Ledger of the source; its training and held-out examples share it."""
    examples: Examples
    held_out: bool = False
    """Whether data.eval_fraction holds the examples out of a training source."""


class Piece(NamedTuple):
    """The text of one token, or of the few tokens that share a character."""

    text: str
    ids: list[int]
    supervised: bool
    special: bool


class RenderedExample(NamedTuple):
    """An example, ready to be shown."""

    heading: str
    pieces: list[Piece]
    truncation_note: str
    """How many tokens max_length cut off; empty if none."""


def inspect(
    config: RunConfig,
    *,
    rows: int | None = None,
    source: str | None = None,
    html: Path | None = None,
    as_json: bool = False,
) -> None:
    """Print examples and the ledger of a run config's data, as text or JSON.

    Args:
        rows: number of examples per source; None = 3, in JSON all.
        source: `path` of the only source to show, or `data.eval_fraction` for the held-out examples; None = all.
        html: file of an HTML page to write as well.
        as_json: print one JSON object per example, then one with the ledgers.

    Raises:
        ConfigError: there is no such source, or the page cannot be written.
        DataError: training would raise it too. If too many rows are unusable, it is raised after everything is printed.
    """
    if html is not None:
        check_page_path(html, "--html")
    config = complete_config(config)
    recipe = make_recipe(config)
    parts = load_parts(config, recipe, source)
    tokenizer = recipe.template().tokenizer
    if html is not None:
        write_page(html, render_page(parts, config.data, recipe, rows or ROWS), "--html")
    if as_json:
        for line in json_lines(parts, tokenizer, rows):
            print(json.dumps(line))
        sys.stdout.flush()  # here, since a closed pipe must not raise at the end of the process
    else:
        show_examples(parts, config.data, recipe, rows or ROWS, Console())
        show_audit(parts)
    for ledger in _ledgers(parts):
        ledger.check(config.data.max_dropped)


def load_parts(config: RunConfig, recipe: Recipe, source: str | None) -> list[Part]:
    """Load the selected sources, and hold out the same examples as training.

    Args:
        source: as in `inspect`.

    Raises:
        ConfigError: no source has this path.
        DataError: see `load_dataset` and `split_train`.
    """
    data = config.data
    known = list(dict.fromkeys(section.path for section in (*data.train, *data.eval)))
    known += [HELD_OUT] if data.eval_fraction else []
    if source is not None and source not in known:
        raise ConfigError(
            f"--source: {source!r} is not a source of this config{did_you_mean(source, known)}; known are "
            + ", ".join(known)
        )

    def select(sections: Sequence[SourceSection]) -> list[SourceSection]:
        return [section for section in sections if source in (None, section.path)]

    # Which examples are held out depends on all training sources.
    train_sections = data.train if data.eval_fraction else select(data.train)
    full = load_dataset(train_sections, recipe, data)
    train, held_out = split_train(full, data, config.seed)
    parts = _make_parts("train", train_sections, full.ledgers, train)
    if held_out is not None:
        parts += _make_parts("eval", train_sections, full.ledgers, held_out, held_out=True)
    eval_sections = select(data.eval)
    evaluation = load_dataset(eval_sections, recipe, data)
    parts += _make_parts("eval", eval_sections, evaluation.ledgers, evaluation)
    if source == HELD_OUT:
        return [part for part in parts if part.held_out]
    return [part for part in parts if source in (None, part.section.path)]


def _make_parts(
    split: str,
    sections: Sequence[SourceSection],
    ledgers: Sequence[SourceLedger],
    dataset: Dataset,
    *,
    held_out: bool = False,
) -> list[Part]:
    return [
        Part(split, section, ledger, source.examples, held_out)
        for section, ledger, source in zip(sections, ledgers, dataset.sources, strict=True)
    ]


def json_lines(parts: Sequence[Part], tokenizer: Any, rows: int | None) -> Iterator[dict[str, Any]]:
    """Yield each example as plain values, then the ledgers.

    Args:
        rows: maximum number of examples per source; None = all.
    """
    for part in parts:
        for example in itertools.islice(part.examples, rows):
            yield {
                "source": part.section.path,
                "split": part.split,
                "held_out": part.held_out,
                "file": example.row[0],
                "row": example.row[1],
                "text": _decode(tokenizer, example.input_ids),
                "input_ids": example.input_ids,
                "labels": example.labels,
                "answer": example.answer,
            }
    eval_parts = [part for part in parts if part.split == "eval" and not part.held_out]
    audit: dict[str, Any] = {
        "train": [ledger.as_dict() for ledger in _ledgers([part for part in parts if part not in eval_parts])],
        "eval": [ledger.as_dict() for ledger in _ledgers(eval_parts)],
    }
    yield {"audit": audit | {"total": total(_ledgers(parts))}}


def render_examples(
    parts: Sequence[Part], options: DataSection, recipe: Recipe, rows: int
) -> Iterator[RenderedExample]:
    """Yield the first `rows` examples of each source."""
    tokenizer = recipe.template().tokenizer
    for part in parts:
        examples = part.examples[:rows]
        buckets = {row: bucket for bucket in (TRUNCATED, SPLIT) for row in part.ledger.buckets.get(bucket, ())}
        overlong = {example.row for example in examples} & buckets.keys()
        num_cut = _count_cut_tokens(overlong, part, recipe, options)
        if not examples and not part.held_out:
            yield RenderedExample(f"{make_visible(part.section.path)} ({part.split}), no examples", [], "")
        for example in examples:
            heading = _heading(example, part, buckets.get(example.row))
            truncation_note = ""
            if num_cut.get(example.row) and len(example.input_ids) == options.max_length:
                truncation_note = (
                    f"… cut at data.max_length={options.max_length}: {num_cut[example.row]:,} tokens left out"
                )
            yield RenderedExample(heading, list(split_pieces(example, tokenizer)), truncation_note)


def _heading(example: Example, part: Part, bucket: str | None) -> str:
    file, row = example.row
    prefix = f"{file}, " if file != part.section.path else ""
    counts = f"{len(example.input_ids):,} tokens, {example.num_supervised:,} supervised"
    remarks = [bucket] if bucket else []
    if example.answer is not None:
        remarks.append(f"last answer after {example.answer[0]:,} tokens of prompt")
    remarks += [f"held out by {HELD_OUT}"] if part.held_out else []
    return make_visible(", ".join([f"{part.section.path} ({part.split}), {prefix}row {row}, {counts}", *remarks]))


def _count_cut_tokens(
    rows: set[tuple[str, int]], part: Part, recipe: Recipe, options: DataSection
) -> dict[tuple[str, int], int]:
    """Return how many tokens of each row were cut off. The ledger has only the sum, so the rows are tokenized again."""
    section = part.section.model_copy(update={"format": part.ledger.format})
    num_cut = {}
    for chunk in find_rows(part.section, rows):
        tokenized = tokenize_chunk(chunk, template=recipe.template(), section=section, options=options)
        num_cut[chunk.file, chunk.numbers[0]] = tokenized.num_cut_tokens
    return num_cut


# Tokens to text.


def split_pieces(example: Example, tokenizer: Any) -> Iterator[Piece]:
    """Yield the tokens of an example as text. Supervised and other tokens are never in one piece."""
    specials = {tokenizer.convert_tokens_to_ids(text): text for text in special_tokens(tokenizer)}
    before: list[int] = []

    def kind(pair: tuple[int, int]) -> tuple[bool, bool]:
        return pair[1] != IGNORE_INDEX, pair[0] in specials

    for (supervised, special), run in itertools.groupby(zip(example.input_ids, example.labels, strict=True), kind):
        pending: list[int] = []
        tokens = [token for token, _ in run]
        for position, token in enumerate(tokens, start=1):
            pending.append(token)
            text = specials[token] if special else _decode_after(tokenizer, before, pending)
            if text.endswith(REPLACEMENT) and len(pending) < MAX_PENDING and position < len(tokens):
                continue  # the next token may complete the character
            yield Piece(text, pending, supervised, special)
            if not text.endswith(REPLACEMENT):  # an incomplete character would combine with the next piece
                before = pending
            pending = []


def _decode_after(tokenizer: Any, before: list[int], tokens: list[int]) -> str:
    """Decode tokens as a continuation of others, since some decoders drop the first space of a text."""
    prefix, text = _decode(tokenizer, before), _decode(tokenizer, before + tokens)
    return text.removeprefix(prefix) if text.startswith(prefix) else _decode(tokenizer, tokens)


def _decode(tokenizer: Any, tokens: list[int]) -> str:
    return str(tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False))


# Text, with colors on a terminal.


def show_examples(parts: Sequence[Part], options: DataSection, recipe: Recipe, rows: int, console: Console) -> None:
    """Print the first `rows` examples of each source, in color if the console supports it."""
    has_color = console.color_system is not None and not console.no_color
    specials = special_tokens(recipe.template().tokenizer)
    console.print(_legend(has_color), soft_wrap=True)
    for example in render_examples(parts, options, recipe, rows):
        console.print()
        console.print(Text(example.heading, style="bold"), soft_wrap=True)
        if not example.pieces:
            continue
        text = color_pieces(example.pieces) if has_color else Text(mark_pieces(example.pieces, specials))
        if example.truncation_note:
            text.append("" if text.plain.endswith("\n") else "\n").append(example.truncation_note, style="bold")
        for line in text.split("\n"):
            # On a terminal, long lines are folded here, so that each part gets a gutter. A file gets complete lines.
            width = console.width - len(GUTTER)
            folded = line.wrap(console, width, overflow="fold") if console.is_terminal else [line]
            for part in folded:
                console.print(Text.assemble((GUTTER, "dim"), part), soft_wrap=True)


def _legend(has_color: bool) -> Text:
    if not has_color:
        return Text(f"supervised tokens are between ⟦ and ⟧; {LEGEND}")
    legend = Text.assemble(
        ("supervised", SUPERVISED[0]), " ", ("not supervised", UNSUPERVISED[0]), " ", ("special", SPECIAL)
    )
    return legend.append(f"; shades alternate between tokens; {LEGEND}")


def color_pieces(pieces: Sequence[Piece]) -> Text:
    """Return pieces in color. Shades alternate, which shows where tokens end."""
    text = Text()
    for number, piece in enumerate(pieces):
        style = (SUPERVISED if piece.supervised else UNSUPERVISED)[number % 2]
        if piece.special:
            style = f"bold {style}" if piece.supervised else SPECIAL
        text.append(make_visible(piece.text), style)
    return text


def mark_pieces(pieces: Sequence[Piece], specials: set[str]) -> str:
    """Return pieces as plain text, supervised ones between ⟦ and ⟧.

    Ordinary text that looks like a special token gets a dot after its first character, `<·/s>`.

    Args:
        specials: the texts of all special tokens.
    """
    longest_first = sorted(map(re.escape, specials), key=len, reverse=True)
    lookalike = re.compile("|".join(longest_first) or r"(?!)")
    parts = []
    for supervised, run in itertools.groupby(pieces, lambda piece: piece.supervised):
        parts.append("⟦" if supervised else "")
        for special, part in itertools.groupby(run, lambda piece: piece.special):
            text = "".join(piece.text for piece in part)
            parts.append(make_visible(text if special else lookalike.sub(lambda m: f"{m[0][0]}·{m[0][1:]}", text)))
        parts.append("⟧" if supervised else "")
    return "".join(parts)


def show_audit(parts: Sequence[Part]) -> None:
    """Print the ledgers, their sums, and histograms of example lengths."""
    print()
    print_table("rows", _visible_lines(_ledgers(parts)))
    print_table("total", total_lines(parts))
    for name, bins in _histograms(parts):
        print_table(name, bins, headers=("tokens", "examples", ""))


def total_lines(parts: Sequence[Part]) -> list[tuple[str, str]]:
    """Return the sums over all sources as (name, value)."""
    sums = total(_ledgers(parts))
    num_held_out = sum(len(part.examples) for part in parts if part.held_out)
    return [
        ("rows", f"{sums['num_rows']:,}, {sums['num_dropped']:,} dropped"),
        (
            "examples",
            f"{sums['num_examples']:,}"
            + (f", {num_held_out:,} of them held out for evaluation" if num_held_out else ""),
        ),
        ("tokens", f"{sums['num_tokens']:,}, {sums['num_cut_tokens']:,} more cut off"),
        ("supervised", f"{sums['num_supervised_tokens']:,} tokens, {sums['supervised_share']:.1%}"),
        ("end of turn", f"supervised in {sums['ended_share']:.1%} of examples"),
        ("longest", f"{sums['longest']:,} tokens"),
    ]


def histogram(lengths: npt.NDArray[np.int64]) -> list[tuple[str, str, str]]:
    """Return at most `MAX_BINS` bins of equal, round width: (tokens, number of examples, bar).

    Args:
        lengths: [E], tokens of each example; not empty.
    """
    first, last = int(lengths.min()), int(lengths.max())
    widths = (digit * 10**power for power in itertools.count() for digit in (1, 2, 5))
    width = next(width for width in widths if last // width - first // width < MAX_BINS)
    start = first // width * width
    counts = np.bincount((lengths - start) // width)
    bins = []
    for number, count in enumerate(counts.tolist()):
        low, high = start + number * width, min(last, start + (number + 1) * width - 1)
        eighths = -(-count * BAR_WIDTH * 8 // int(counts.max()))  # rounded up, so that a single example is visible
        bar = "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()
        bins.append((f"{low:,}" if low == high else f"{low:,}-{high:,}", f"{count:>8,}", bar))
    return bins


def _visible_lines(ledgers: list[SourceLedger]) -> list[tuple[str, str]]:
    return [(make_visible(path), make_visible(summary)) for path, summary in ledger_lines(ledgers)]


def _histograms(parts: Sequence[Part]) -> Iterator[tuple[str, list[tuple[str, str, str]]]]:
    for split in ("train", "eval"):
        lengths = [part.examples.lengths for part in parts if part.split == split and len(part.examples)]
        if lengths:
            yield f"tokens per example ({split})", histogram(np.concatenate(lengths))


def _ledgers(parts: Sequence[Part]) -> list[SourceLedger]:
    """Return the ledger of each source once, even if some of its examples are held out."""
    return list({id(part.ledger): part.ledger for part in parts}.values())


# HTML.

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


def render_page(parts: Sequence[Part], options: DataSection, recipe: Recipe, rows: int) -> str:
    """Return a self-contained HTML page with the first `rows` examples of each source, and the ledgers."""
    legend = (
        '<p><mark>supervised</mark> tokens are trained on, <b class="special">special</b> tokens are bold; '
        f"{LEGEND}. Hover over a token to see its id.</p>"
    )
    blocks = [
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">",
        f"<title>lora-accel inspect</title><style>{STYLE}</style></head><body><h1>lora-accel inspect</h1>{legend}",
    ]
    for example in render_examples(parts, options, recipe, rows):
        text = "".join(map(_tag, example.pieces))
        blocks.append(f"<h2>{escape(example.heading)}</h2>")
        blocks.append(f"<pre>{text}</pre>")
        blocks.append(f"<p><em>{escape(example.truncation_note)}</em></p>" if example.truncation_note else "")
    tables: list[tuple[str, Sequence[tuple[str, ...]]]] = [
        ("rows", _visible_lines(_ledgers(parts))),
        ("total", total_lines(parts)),
        *_histograms(parts),
    ]
    blocks += [_html_table(title, lines) for title, lines in tables]
    return "\n".join([*blocks, "</body></html>\n"])


def _tag(piece: Piece) -> str:
    tag, kind = "mark" if piece.supervised else "span", ' class="special"' if piece.special else ""
    return f'<{tag}{kind} title="{" ".join(map(str, piece.ids))}">{escape(make_visible(piece.text))}</{tag}>'


def _html_table(title: str, lines: Sequence[tuple[str, ...]]) -> str:
    rows = "\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in line) + "</tr>" for line in lines)
    return f"<h2>{escape(title)}</h2>\n<table>\n{rows}\n</table>"
