"""`lora-accel inspect`: it shows what training would learn, to the token, and rows are never more than words."""

from __future__ import annotations

import io
import itertools
import json
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lora_accel import cli
from lora_accel.config.files import read_config
from lora_accel.data.chat import Example
from lora_accel.labels import IGNORE_INDEX
from lora_accel.preview import (
    LEARNED,
    SPECIAL,
    UNLEARNED,
    coloured,
    histogram,
    load_parts,
    marked,
    pieces,
    show_examples,
    visible,
)
from lora_accel.setup.data import prepare_data
from lora_accel.setup.recipe import make_recipe
from tests.conftest import PATIENCE_SECONDS, ROOT, SHARED_DATA, SMOLLM, chat_rows, run_module, write_jsonl

CONFIG = """\
output_dir: run
model: {name_or_path: MODEL}
data:
  train: [{path: rows.jsonl}, {path: others.jsonl}]
  eval: [{path: eval.jsonl}]
  max_length: 60
"""
ONE_ROW = [{"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "one two"}]}]
HOSTILE = (
    "[red]red[/red] [link=file:///x]y[/link] :smile:",
    "\x1b[31mred \x1b]0;title\x07 \x9b2J \u202eback \u2028 \x00 \x7f",
    "<script>alert(1)</script> & <b title='\"'></mark></pre>",
    "👍🏽 é 漢字 👩\u200d👧 \ufffd",
    "⟦fake⟧ ⏎ ⇥ ⟨U+0041⟩ │",
    "a\r\nb\tc\n\nother.jsonl (train), row 9, 1 tokens, 1 supervised",
)


class Told(NamedTuple):
    """What the command answered."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[dict[str, Any]]:
        """Return the objects of its JSON."""
        return [json.loads(line) for line in self.out.splitlines()]


Inspect = Callable[..., Told]


@pytest.fixture
def folder(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the command runs: a config, three files of rows, and a model of which there is only the tokenizer."""
    monkeypatch.chdir(tmp_path)
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "run.yaml").write_text(CONFIG.replace("MODEL", str(tmp_path / "model")), encoding="utf-8")
    write_jsonl(tmp_path / "rows.jsonl", chat_rows(8))
    write_jsonl(tmp_path / "others.jsonl", [{"text": "hello world"}, {"text": "one two three " * 30}])
    write_jsonl(tmp_path / "eval.jsonl", ONE_ROW)
    return tmp_path


@pytest.fixture
def inspect(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Inspect:
    """Run `lora-accel inspect --config run.yaml …` within this process."""

    def run(*words: str | Path) -> Told:
        monkeypatch.setattr(sys, "argv", ["lora-accel", "inspect", "--config", "run.yaml", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return Told(int(stopped.value.code or 0), *capsys.readouterr())

    return run


def write_rows(folder: Path, *contents: str) -> None:
    """Let rows.jsonl hold conversations in which both sides say the same."""
    rows = [{"messages": [{"role": r, "content": c} for r in ("user", "assistant")]} for c in contents]
    write_jsonl(folder / "rows.jsonl", rows)


# JSON


@pytest.mark.parametrize("overlong", ["truncate", "split", "drop"])
def test_json_tells_every_example_and_sums_that_agree(
    inspect: Inspect, tokenizer: PreTrainedTokenizerFast, overlong: str
) -> None:
    told = inspect("--json", f"data.overlong={overlong}", "data.max_dropped=1")
    assert (told.code, told.err) == (0, "")
    *examples, last = told.lines
    assert list(last) == ["audit"]
    fields = ["source", "split", "held_out", "file", "row", "text", "input_ids", "labels"]
    assert all(list(x) == fields for x in examples)
    assert not any(x["held_out"] for x in examples)
    for example in examples:
        assert example["file"] == example["source"]
        assert len(example["labels"]) == len(example["input_ids"])
        assert all(label in (-100, i) for i, label in zip(example["input_ids"], example["labels"], strict=True))
        assert example["text"] == tokenizer.decode(example["input_ids"], skip_special_tokens=False)
    audit = last["audit"]
    assert [ledger["path"] for ledger in audit["train"]] == ["rows.jsonl", "others.jsonl"]
    assert [ledger["path"] for ledger in audit["eval"]] == ["eval.jsonl"]
    for split in ("train", "eval"):
        for ledger in audit[split]:
            mine = [x for x in examples if (x["split"], x["source"]) == (split, ledger["path"])]
            agree(ledger, mine)
            assert ledger["num_rows"] == sum(bucket["num_rows"] for bucket in ledger["buckets"].values())
    agree(audit["total"], examples)
    assert audit["total"]["num_rows"] == 8 + 2 + 1
    used = {(x["source"], x["row"]) for x in examples}
    assert audit["total"]["num_rows"] == len(used) + audit["total"]["num_dropped"]


def agree(sums: dict[str, Any], examples: list[dict[str, Any]]) -> None:
    assert sums["num_examples"] == len(examples)
    assert sums["num_tokens"] == sum(len(x["input_ids"]) for x in examples)
    assert sums["num_supervised_tokens"] == sum(label != -100 for x in examples for label in x["labels"])
    assert sums["longest"] == max((len(x["input_ids"]) for x in examples), default=0)


def test_json_is_text_that_no_terminal_obeys(inspect: Inspect, folder: Path) -> None:
    write_rows(folder, *HOSTILE)
    told = inspect("--json", "data.max_length=400")
    assert told.code == 0
    assert re.fullmatch(r"[\n -~]*", told.out)
    for line, content in zip(told.lines, HOSTILE, strict=False):
        assert line["text"] == (f"<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n{content}<|im_end|>\n")


def test_rows_and_source_choose(inspect: Inspect) -> None:
    *examples, last = inspect("--json", "--rows", "1").lines
    assert [(x["source"], x["row"]) for x in examples] == [("rows.jsonl", 1), ("others.jsonl", 1), ("eval.jsonl", 1)]
    assert last["audit"]["total"]["num_rows"] == 11, "the audit is of all rows"
    *examples, last = inspect("--json", "--source", "rows.jsonl").lines
    assert [(x["source"], x["row"]) for x in examples] == [("rows.jsonl", row) for row in range(1, 9)]
    assert (last["audit"]["total"]["num_rows"], last["audit"]["eval"]) == (8, [])
    text = inspect("--source", "rows.jsonl").out
    assert headings(text) == [f"rows.jsonl (train), row {row}" for row in (1, 2, 3)]
    assert len(headings(inspect("--source", "rows.jsonl", "--rows", "5").out)) == 5


HOLDING_OUT = ("data.eval=[]", "data.eval_fraction=0.3")


def test_held_out_examples_are_those_of_training(inspect: Inspect, folder: Path) -> None:
    """In JSON, text and the page, whichever source is looked at; every row is in one ledger still."""
    write_jsonl(folder / "rows.jsonl", [*chat_rows(4), {"messages": []}, *chat_rows(12)[4:]])
    words = (*HOLDING_OUT, "data.overlong=split", "data.max_dropped=0.1", "seed=1")
    *examples, last = inspect("--json", *words).lines
    held = [x for x in examples if x["held_out"]]
    data = prepare_data(read_config(folder / "run.yaml", words), num_ranks=1)
    expected = [(*x.row, x.input_ids) for x in data.eval_sources["data.eval_fraction"]]
    assert [(x["file"], x["row"], x["input_ids"]) for x in held] == expected
    trained = [(*x.row, x.input_ids) for x in data.dataset.examples]
    assert [(x["file"], x["row"], x["input_ids"]) for x in examples if not x["held_out"]] == trained
    assert {(x["split"], x["held_out"]) for x in examples} == {("train", False), ("eval", True)}
    assert {x["source"] for x in held} == {"rows.jsonl", "others.jsonl"}
    agree(last["audit"]["total"], examples)
    assert last["audit"]["total"]["num_rows"] == 13 + 2
    assert ([x["path"] for x in last["audit"]["train"]], last["audit"]["eval"]) == (["rows.jsonl", "others.jsonl"], [])

    *alone, _ = inspect("--json", *words, "--source", "data.eval_fraction").lines
    assert alone == held
    *of_file, last = inspect("--json", *words, "--source", "rows.jsonl").lines
    assert of_file == [x for x in examples if x["source"] == "rows.jsonl"], "held out of all sources, then chosen"
    assert [x["path"] for x in last["audit"]["train"]] == ["rows.jsonl"]

    out = inspect(*words, "--rows", "50", "--html", "page.html").out
    marked_rows = re.findall(r"^(\S+) \(eval\), row (\d+), .*, held out by data.eval_fraction$", out, re.MULTILINE)
    assert marked_rows == [(x["file"], str(x["row"])) for x in held]
    assert out.count("held out by") == len(held)
    assert f"{len(held)} of them held out" in out
    assert "tokens per example (eval)" in out
    assert (folder / "page.html").read_text(encoding="utf-8").count("held out by data.eval_fraction") == len(held)


def test_what_cannot_be_held_out_is_refused(inspect: Inspect, folder: Path) -> None:
    told = inspect(*HOLDING_OUT, "data.train=[{path: eval.jsonl}]")
    assert (told.code, told.out) == (2, "")
    assert "data.eval_fraction=0.3 leaves no training example of 1" in told.err
    write_jsonl(folder / "rows.jsonl", [{"messages": []}])
    told = inspect(*HOLDING_OUT, "data.train=[{path: rows.jsonl}]")
    assert told.code == 2
    assert "rows.jsonl, row 1: empty conversation" in told.err, "the reason why there is nothing to hold out"
    assert "known are rows.jsonl, others.jsonl, eval.jsonl\n" in inspect("--source", "data.eval_fraction").err


def headings(out: str) -> list[str]:
    return re.findall(r"^(\S+ \(\w+\), row \d+), [\d,]+ tokens, [\d,]+ supervised", out, re.MULTILINE)


# Text


def test_a_file_shows_supervised_runs_exactly(inspect: Inspect) -> None:
    told = inspect("--source", "eval.jsonl")
    assert told.code == 0
    assert (
        "\neval.jsonl (eval), row 1, 33 tokens, 4 supervised\n"
        "│ <|im_start|>user⏎\n"
        "│ hello<|im_end|>⏎\n"
        "│ <|im_start|>assistant⏎\n"
        "│ ⟦one two<|im_end|>⟧⏎\n"
        "\n"
    ) in re.sub(r"row 1, \d+ tokens, \d+", "row 1, 33 tokens, 4", told.out)
    assert "messages, 1 rows: 1 used" in told.out
    assert "\x1b" not in told.out


def test_text_and_json_tell_the_same(inspect: Inspect, tokenizer: PreTrainedTokenizerFast) -> None:
    out, lines = inspect("--rows", "8").out, inspect("--json", "--rows", "8").lines[:-1]
    learned = []
    for line in lines:
        for supervised, run in itertools.groupby(line["labels"], lambda label: label != -100):
            learned += [tokenizer.decode(list(run))] if supervised else []
    assert len(learned) > 11
    rows = out[out.index("row 1") :].replace("\n│ ", "\n").replace("⏎", "")
    assert re.findall("⟦(.*?)⟧", rows, re.DOTALL) == learned


def test_what_was_cut_is_told(inspect: Inspect, tokenizer: PreTrainedTokenizerFast) -> None:
    whole = len(tokenizer("one two three " * 30).input_ids) + 1
    assert whole == 121
    out = inspect("--source", "others.jsonl").out
    assert "others.jsonl (train), row 2, 60 tokens, 59 supervised, truncated\n" in out
    assert "\n│ … cut at data.max_length=60: 61 tokens left out\n" in out
    assert out.count("… cut at") == 1
    split = inspect("--source", "others.jsonl", "--rows", "9", "data.overlong=split").out
    assert "… cut at data.max_length=60: 1 tokens left out" in split, "a block of one token teaches nothing"
    assert len(re.findall("row 2, .* supervised, split\n", split)) == 2


def test_a_source_without_examples_and_several_files(inspect: Inspect, folder: Path) -> None:
    (folder / "many").mkdir()
    write_jsonl(folder / "many" / "a.jsonl", ONE_ROW)
    write_jsonl(folder / "many" / "b.jsonl", ONE_ROW)
    write_jsonl(folder / "rows.jsonl", [{"messages": []}])
    out = inspect("data.train=[{path: many}, {path: rows.jsonl, format: messages}]").out
    assert "\nmany (train), many/a.jsonl, row 1, " in out
    assert "\nmany (train), many/b.jsonl, row 1, " in out
    assert "\nrows.jsonl (train), no example\n" in out
    nothing = inspect("data.train=[{path: rows.jsonl, format: messages}]", "data.eval=[]")
    assert nothing.code == 2
    assert "tokens per example" not in nothing.out


def test_too_many_dropped_rows_are_shown_and_then_refused(inspect: Inspect, folder: Path) -> None:
    write_jsonl(folder / "rows.jsonl", [*chat_rows(2), {"messages": []}])
    for words in ((), ("--json",)):
        told = inspect(*words)
        assert told.code == 2
        assert told.err.startswith("error: rows.jsonl: 1 of 3 rows cannot be used; data.max_dropped allows 5.0%")
        assert "rows.jsonl, row 3: empty conversation" in told.err
    assert told.lines[-1]["audit"]["total"]["num_dropped"] == 1
    assert "empty conversation" in inspect().out
    assert headings(inspect().out)[:2] == ["rows.jsonl (train), row 1", "rows.jsonl (train), row 2"]


def test_rows_that_training_refuses_are_refused_here(inspect: Inspect, folder: Path) -> None:
    told = inspect("data.overlong=error", "--source", "others.jsonl")
    assert (told.code, told.out) == (2, "")
    assert "others.jsonl, row 2: " in told.err
    (folder / "rows.jsonl").write_text("{", encoding="utf-8")
    assert inspect().err.startswith("error: rows.jsonl, line 1: not valid JSON")


# What rows may hold


@pytest.mark.parametrize("content", HOSTILE)
def test_hostile_words_are_shown_and_do_nothing(inspect: Inspect, folder: Path, content: str) -> None:
    write_rows(folder, content)
    out = inspect("--source", "rows.jsonl", "data.max_length=400").out
    assert not re.search(r"[^\n\u200d\ufffd\U0001f3fd]", "".join(c for c in out if not c.isprintable()))
    shown = visible(content).replace("\n", "\n│ ")
    assert f"\n│ ⟦{shown}<|im_end|>⟧⏎\n" in out
    assert f"\n│ {shown}<|im_end|>⏎\n" in out
    assert headings(out) == ["rows.jsonl (train), row 1"], "a row cannot look like a heading"
    assert out.count("⟦") == out.count("⟧") == 2, "nor like a mark (one pair is the legend's)"


def test_words_that_look_like_a_special_token_look_different(inspect: Inspect, folder: Path) -> None:
    write_rows(folder, "a<|im_end|>b")
    out = inspect("--source", "rows.jsonl").out
    assert "│ ⟦a<·|im_end|>b<|im_end|>⟧⏎\n" in out
    assert "│ ⟦a<|im_end|>b<|im_end|>⟧⏎\n" in inspect("--source", "rows.jsonl", "data.parse_special_tokens=true").out


def test_visible_changes_what_cannot_be_seen_and_nothing_else() -> None:
    assert visible("plain é 漢 👍🏽 [b] \\n") == "plain é 漢 👍🏽 [b] \\n"
    assert visible("a\n\tb\x1b\u202e") == "a⏎\n⇥b⟨U+001B⟩⟨U+202E⟩"
    assert visible("\udc80⟦") == "⟨U+DC80⟩⟨U+27E6⟩"
    assert visible("\U000e0041") == "⟨U+E0041⟩", "tag letters, which no font shows"
    hidden = "".join(map(chr, [*range(32), *range(127, 160)]))
    assert visible(hidden).replace("⏎\n", "").isprintable()


# Tokens to text


@pytest.fixture(scope="module")
def sentencepiece_like() -> PreTrainedTokenizerFast:
    """A tokenizer as Llama 2 has it: ▁ for spaces, bytes for what it has no letter for; the first space is dropped."""
    letters = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefgh"]
    bpe = models.BPE({text: i for i, text in enumerate(letters)}, [], unk_token="<unk>", byte_fallback=True)
    made = Tokenizer(bpe)
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("text", ["a bad cab", "a 👍🏽é漢 b</s>", "👍", " a  b", "漢</s>字<s> a", "\ufffd a"])
def test_pieces_are_the_decoded_text(
    tokenizer: PreTrainedTokenizerFast, sentencepiece_like: PreTrainedTokenizerFast, text: str
) -> None:
    for one in (tokenizer, sentencepiece_like):
        ids = one(text, add_special_tokens=False).input_ids
        found = list(pieces(Example(ids, [IGNORE_INDEX] * len(ids)), one))
        assert "".join(piece.text for piece in found) == one.decode(ids, skip_special_tokens=False)
        assert [i for piece in found for i in piece.ids] == ids
        assert all("\ufffd" not in piece.text for piece in found) or "\ufffd" in text
        assert {p.text for p in found if p.special} == {"<s>", "</s>"} & set(re.findall("</?s>", text))


def test_an_unfinished_character_is_shown_as_one(tokenizer: PreTrainedTokenizerFast) -> None:
    (*head, _), (letter,) = (tokenizer(text).input_ids for text in ("漢", "a"))
    broken = [*head, letter]
    assert [p.text for p in pieces(Example(head, [IGNORE_INDEX] * len(head)), tokenizer)] == ["\ufffd"]
    assert "".join(p.text for p in pieces(Example(broken, [IGNORE_INDEX] * len(broken)), tokenizer)) == "\ufffda"
    many = head * 20
    assert max(len(p.ids) for p in pieces(Example(many, [IGNORE_INDEX] * len(many)), tokenizer)) <= 16


def test_no_piece_crosses_a_border_of_the_mask(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer("漢").input_ids
    found = list(pieces(Example(ids, [IGNORE_INDEX, *ids[1:]]), tokenizer))
    assert [i for piece in found for i in piece.ids] == ids
    assert [piece.supervised for piece in found for _ in piece.ids] == [False, True, True]
    assert re.fullmatch("\ufffd⟦\ufffd+⟧", marked(found, {"</s>"}))


# Colours


def test_colours_say_what_is_learned(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer("<|im_start|>user\n[red]👍<|im_end|>").input_ids
    for labels in ([IGNORE_INDEX] * len(ids), ids):
        found = list(pieces(Example(ids, labels), tokenizer))
        text = coloured(found)
        assert text.plain == "<|im_start|>user⏎\n[red]👍<|im_end|>"
        shades = LEARNED if labels is ids else UNLEARNED
        styles = [str(span.style) for span in text.spans]
        assert len(styles) == len(found)
        assert styles[1:-1] == [shades[number % 2] for number in range(1, len(found) - 1)]
        assert all("bold" in style for style in (styles[0], styles[-1]))
        assert (styles[0] == SPECIAL) == (labels is not ids)


def test_a_terminal_gets_colours_and_folded_lines(folder: Path) -> None:
    config = read_config(folder / "run.yaml", ["data.train=[{path: others.jsonl}]", "data.eval=[]"])
    recipe = make_recipe(config)
    parts = load_parts(config, recipe, None)
    outs = []
    for no_color in (False, True):
        out = io.StringIO()
        console = Console(file=out, force_terminal=True, color_system="256", width=40, no_color=no_color)
        show_examples(parts, config.data, recipe, 2, console)
        outs.append(re.sub(r"\x1b\[[\d;]*m", "", out.getvalue()))
        assert ("48;5;120m" in out.getvalue()) != no_color
    inside = [line for line in outs[0].splitlines() if line.startswith("│")]
    assert len(inside) > 5
    assert max(map(len, inside)) <= 40
    assert ("⟦" in outs[0], "⟦" in outs[1]) == (False, True), "without colours there are marks"


# The histogram


def test_the_histogram_counts_every_example() -> None:
    for lengths in ([5], [1, 1, 1, 2], list(range(1, 2049)), [3] * 70 + [2048], [7, 10**7]):
        bins = histogram(np.array(lengths, np.int64))
        assert sum(int(count.replace(",", "")) for _, count, _ in bins) == len(lengths)
        assert len(bins) <= 12
        assert max(len(bar) for *_, bar in bins) == 40
        for name, count, bar in bins:
            low, _, high = name.replace(",", "").partition("-")
            assert sum(int(low) <= length <= int(high or low) for length in lengths) == int(count.replace(",", ""))
            assert bool(bar) == (count.strip() != "0"), "one example among many is seen, too"
    assert len(histogram(np.arange(1, 2049))) == 11
    assert histogram(np.array([100, 512]))[-1][0] == "500-512"


# The page


TAGS = {"html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "b", "em", "table", "tr", "td"}
TAGS |= {"pre", "mark", "span"}


class Page(HTMLParser):
    """Marked and unmarked text of each row's tokens, and the names of all tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.rows: list[list[tuple[str, str, str]]] = []
        self.outside = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag == "pre":
            self.rows.append([])
        elif self.open and self.open[-1] == "pre":
            self.rows[-1].append((tag, dict(attrs)["title"] or "", ""))
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "pre" in self.open:
            tag, ids, text = self.rows[-1][-1]
            self.rows[-1][-1] = (tag, ids, text + data)
        else:
            self.outside += data


def test_the_page_marks_what_is_learned(inspect: Inspect, folder: Path) -> None:
    write_rows(folder, *HOSTILE)
    words = ("--rows", "9", "--html", "page.html", "data.max_length=400")
    told, lines = inspect(*words), inspect("--json", *words).lines[:-1]
    assert told.code == 0
    assert told.out == inspect("--rows", "9", "data.max_length=400").out, "the page comes in addition"
    source = (folder / "page.html").read_text(encoding="utf-8")
    page = Page(source)
    assert page.open == []
    assert page.tags <= TAGS
    assert not re.search(r"src=|href=|url\(|@import", re.sub(r"&lt;.*?&gt;", "", source))
    assert "default-src 'none'" in source
    assert len(page.rows) == len(lines)
    for row, line in zip(page.rows, lines, strict=True):
        assert [int(i) for _, ids, _ in row for i in ids.split()] == line["input_ids"]
        learned = [int(i) for tag, ids, _ in row if tag == "mark" for i in ids.split()]
        assert learned == [label for label in line["labels"] if label != -100]
        assert "".join(text for *_, text in row) == visible(line["text"])
    for row, content in zip(page.rows, HOSTILE, strict=False):
        assert "".join(text for tag, _, text in row if tag == "mark") == f"{visible(content)}<|im_end|>"
    assert "rows.jsonl (train), row 1, " in page.outside
    assert "messages, 6 rows: 6 used" in page.outside


def test_the_page_tells_what_was_cut(inspect: Inspect, folder: Path) -> None:
    assert inspect("--html", folder / "page.html", "--json").code == 0
    page = Page((folder / "page.html").read_text(encoding="utf-8"))
    assert "… cut at data.max_length=60: " in page.outside
    assert len(page.rows) == 3 + 2 + 1, "a page holds few rows though JSON holds all"


@pytest.mark.parametrize(("file", "said"), [(".", "is a folder"), ("no/page.html", "there is no folder no")])
def test_a_page_that_cannot_be_is_refused_first(inspect: Inspect, file: str, said: str) -> None:
    told = inspect("--html", file)
    assert (told.code, told.out) == (2, "")
    assert said in told.err
    assert not Path("no").exists()


def test_a_page_that_may_not_be_written(inspect: Inspect, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("lora_accel.preview.write_text", refuse)
    told = inspect("--html", "page.html")
    assert (told.code, told.out) == (2, "")
    assert "page.html cannot be written: Permission denied" in told.err


# From outside


def test_an_unknown_source_names_the_known_ones(inspect: Inspect) -> None:
    told = inspect("--source", "row.jsonl")
    assert (told.code, told.out) == (2, "")
    assert told.err == (
        "error: --source: 'row.jsonl' is no source of this config (did you mean rows.jsonl?); "
        "known are rows.jsonl, others.jsonl, eval.jsonl\n"
    )


@pytest.mark.parametrize("words", [("--json",), ("--rows", "600")], ids=["json", "text"])
@pytest.mark.parametrize("rows", [1, 600], ids=["fits the buffer", "does not"])
def test_a_reader_who_leaves_is_no_error(folder: Path, words: tuple[str, ...], rows: int) -> None:
    write_jsonl(folder / "rows.jsonl", chat_rows(rows))
    command = [sys.executable, "-m", "lora_accel.cli", "inspect", "--config", "run.yaml", "data.max_length=200", *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=folder)
    assert process.stdout is not None
    if rows > 1:
        assert process.stdout.readline()
    process.stdout.close()
    _, err = process.communicate(timeout=PATIENCE_SECONDS)
    assert err == b""
    assert process.returncode in (0, 1)


def test_a_terminal_without_these_characters_gets_their_numbers(folder: Path) -> None:
    told = run_module(
        *("lora_accel.cli", "inspect", "--config", folder / "run.yaml", f"data.train=[{{path: {folder}/rows.jsonl}}]"),
        "data.eval=[]",
        env={"PYTHONIOENCODING": "ascii"},
        fresh=True,
    )
    assert told.returncode == 0, told.stderr
    assert "\\u27e6" in told.stdout


def test_help_imports_no_torch() -> None:
    probe = (
        "import sys; from lora_accel.cli import app\n"
        "try: app(['inspect', '--help'])\n"
        "except SystemExit as end: print('LOADED', end.code, sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    told = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, cwd=ROOT, check=True)
    assert told.stdout.splitlines()[-1] == "LOADED 0 []"


@pytest.mark.smollm
@pytest.mark.skipif(not SMOLLM.is_dir(), reason="needs scripts/fetch_model.py")
@pytest.mark.parametrize("name", ["dummy_conversation.json", "alpaca_en_demo.json", "c4_demo.jsonl"])
def test_the_real_rows_add_up(inspect: Inspect, name: str) -> None:
    if not (SHARED_DATA / name).is_file():
        pytest.skip("the shared data are not here")
    train = f"data.train=[{{path: {SHARED_DATA / name}}}]"
    told = inspect("--json", f"model.name_or_path={SMOLLM}", train, "data.eval=[]", "data.max_length=512")
    assert told.code == 0, told.err
    *examples, last = told.lines
    agree(last["audit"]["total"], examples)
    assert last["audit"]["total"]["num_rows"] == {"d": 500, "a": 999, "c": 300}[name[0]]
