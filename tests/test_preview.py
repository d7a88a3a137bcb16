"""`lora-accel inspect`: it shows exactly the tokens and loss masks of training, and never interprets text of rows."""

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
from transformers import AutoConfig, PreTrainedTokenizerFast

from lora_accel import cli
from lora_accel.config.files import read_config
from lora_accel.data.chat import Example
from lora_accel.labels import IGNORE_INDEX
from lora_accel.preview import (
    SPECIAL,
    SUPERVISED,
    UNSUPERVISED,
    color_pieces,
    histogram,
    load_parts,
    make_visible,
    mark_pieces,
    show_examples,
    split_pieces,
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
UNTRUSTED = (
    "[red]red[/red] [link=file:///x]y[/link] :smile:",
    "\x1b[31mred \x1b]0;title\x07 \x9b2J \u202eback \u2028 \x00 \x7f",
    "<script>alert(1)</script> & <b title='\"'></mark></pre>",
    "👍🏽 é 漢字 👩\u200d👧 \ufffd",
    "⟦fake⟧ ⏎ ⇥ ⟨U+0041⟩ │",
    "a\r\nb\tc\n\nother.jsonl (train), row 9, 1 tokens, 1 supervised",
)


class CommandResult(NamedTuple):
    """Exit code and output of the command."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[dict[str, Any]]:
        """Return the objects of the JSON output."""
        return [json.loads(line) for line in self.out.splitlines()]


Inspect = Callable[..., CommandResult]


@pytest.fixture
def folder(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Create the working folder: a config, three data files, and a model folder with a tokenizer only."""
    monkeypatch.chdir(tmp_path)
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "run.yaml").write_text(CONFIG.replace("MODEL", str(tmp_path / "model")), encoding="utf-8")
    write_jsonl(tmp_path / "rows.jsonl", chat_rows(8))
    write_jsonl(tmp_path / "others.jsonl", [{"text": "hello world"}, {"text": "one two three " * 30}])
    write_jsonl(tmp_path / "eval.jsonl", ONE_ROW)
    return tmp_path


@pytest.fixture
def inspect(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Inspect:
    """Return a function that runs `lora-accel inspect --config run.yaml …` within this process."""

    def run(*args: str | Path) -> CommandResult:
        monkeypatch.setattr(sys, "argv", ["lora-accel", "inspect", "--config", "run.yaml", *map(str, args)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return CommandResult(int(stopped.value.code or 0), *capsys.readouterr())

    return run


def write_rows(folder: Path, *contents: str) -> None:
    """Write rows.jsonl with conversations in which both messages have the same text."""
    rows = [{"messages": [{"role": r, "content": c} for r in ("user", "assistant")]} for c in contents]
    write_jsonl(folder / "rows.jsonl", rows)


# JSON


@pytest.mark.parametrize("overlong", ["truncate", "split", "drop"])
def test_json_has_every_example_and_matching_sums(
    inspect: Inspect, tokenizer: PreTrainedTokenizerFast, overlong: str
) -> None:
    result = inspect("--json", f"data.overlong={overlong}", "data.max_dropped=1")
    assert (result.code, result.err) == (0, "")
    *examples, last = result.lines
    assert list(last) == ["audit"]
    fields = ["source", "split", "held_out", "file", "row", "text", "input_ids", "labels", "answer"]
    assert all(list(x) == fields for x in examples)
    assert not any(x["held_out"] for x in examples)
    for example in examples:
        assert example["file"] == example["source"]
        assert len(example["labels"]) == len(example["input_ids"])
        assert all(label in (-100, i) for i, label in zip(example["input_ids"], example["labels"], strict=True))
        assert example["text"] == tokenizer.decode(example["input_ids"], skip_special_tokens=False)
        if example["answer"] is not None:
            start, end = example["answer"]
            assert example["labels"][start - 1] == -100
            assert example["labels"][start:end] == example["input_ids"][start:end]
    assert {x["source"] for x in examples if x["answer"] is not None} >= {"rows.jsonl", "eval.jsonl"}
    assert all(x["answer"] is None for x in examples if x["source"] == "others.jsonl"), "text has no prompt"
    audit = last["audit"]
    assert [ledger["path"] for ledger in audit["train"]] == ["rows.jsonl", "others.jsonl"]
    assert [ledger["path"] for ledger in audit["eval"]] == ["eval.jsonl"]
    for split in ("train", "eval"):
        for ledger in audit[split]:
            of_source = [x for x in examples if (x["split"], x["source"]) == (split, ledger["path"])]
            check_sums(ledger, of_source)
            assert ledger["num_rows"] == sum(bucket["num_rows"] for bucket in ledger["buckets"].values())
    check_sums(audit["total"], examples)
    assert audit["total"]["num_rows"] == 8 + 2 + 1
    used = {(x["source"], x["row"]) for x in examples}
    assert audit["total"]["num_rows"] == len(used) + audit["total"]["num_dropped"]


def check_sums(sums: dict[str, Any], examples: list[dict[str, Any]]) -> None:
    """Check that a ledger has the sums of these examples."""
    assert sums["num_examples"] == len(examples)
    assert sums["num_tokens"] == sum(len(x["input_ids"]) for x in examples)
    assert sums["num_supervised_tokens"] == sum(label != -100 for x in examples for label in x["labels"])
    assert sums["longest"] == max((len(x["input_ids"]) for x in examples), default=0)


def test_json_output_is_printable_ascii(inspect: Inspect, folder: Path) -> None:
    write_rows(folder, *UNTRUSTED)
    result = inspect("--json", "data.max_length=400")
    assert result.code == 0
    assert re.fullmatch(r"[\n -~]*", result.out)
    for line, content in zip(result.lines, UNTRUSTED, strict=False):
        assert line["text"] == (f"<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n{content}<|im_end|>\n")


def test_rows_and_source_options_select_examples(inspect: Inspect) -> None:
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


def test_held_out_examples_match_training(inspect: Inspect, folder: Path) -> None:
    """In JSON, text and the HTML page, with any `--source`. Every row is still in exactly one ledger."""
    write_jsonl(folder / "rows.jsonl", [*chat_rows(4), {"messages": []}, *chat_rows(12)[4:]])
    args = (*HOLDING_OUT, "data.overlong=split", "data.max_dropped=0.1", "seed=3")
    *examples, last = inspect("--json", *args).lines
    held_out = [x for x in examples if x["held_out"]]
    AutoConfig.for_model("llama", vocab_size=1000).save_pretrained(folder / "model")  # training needs its sizes
    data = prepare_data(read_config(folder / "run.yaml", args), num_ranks=1)
    expected = [(*x.row, x.input_ids) for x in data.eval_sources["data.eval_fraction"]]
    assert [(x["file"], x["row"], x["input_ids"]) for x in held_out] == expected
    trained = [(*x.row, x.input_ids) for x in data.dataset.examples]
    assert [(x["file"], x["row"], x["input_ids"]) for x in examples if not x["held_out"]] == trained
    assert {(x["split"], x["held_out"]) for x in examples} == {("train", False), ("eval", True)}
    assert {x["source"] for x in held_out} == {"rows.jsonl", "others.jsonl"}
    check_sums(last["audit"]["total"], examples)
    assert last["audit"]["total"]["num_rows"] == 13 + 2
    assert ([x["path"] for x in last["audit"]["train"]], last["audit"]["eval"]) == (["rows.jsonl", "others.jsonl"], [])

    *only_held_out, _ = inspect("--json", *args, "--source", "data.eval_fraction").lines
    assert only_held_out == held_out
    *of_file, last = inspect("--json", *args, "--source", "rows.jsonl").lines
    assert of_file == [x for x in examples if x["source"] == "rows.jsonl"], (
        "held out of all sources before one is selected"
    )
    assert [x["path"] for x in last["audit"]["train"]] == ["rows.jsonl"]

    out = inspect(*args, "--rows", "50", "--html", "page.html").out
    marked_rows = re.findall(r"^(\S+) \(eval\), row (\d+), .*, held out by data.eval_fraction$", out, re.MULTILINE)
    assert marked_rows == [(x["file"], str(x["row"])) for x in held_out]
    assert out.count("held out by") == len(held_out)
    assert f"{len(held_out)} of them held out" in out
    assert "tokens per example (eval)" in out
    assert (folder / "page.html").read_text(encoding="utf-8").count("held out by data.eval_fraction") == len(held_out)


def test_holding_out_too_much_is_an_error(inspect: Inspect, folder: Path) -> None:
    result = inspect(*HOLDING_OUT, "data.train=[{path: eval.jsonl}]")
    assert (result.code, result.out) == (2, "")
    assert "data.eval_fraction=0.3 leaves no training row of 1" in result.err
    write_jsonl(folder / "rows.jsonl", [{"messages": []}])
    result = inspect(*HOLDING_OUT, "data.train=[{path: rows.jsonl}]")
    assert result.code == 2
    assert "rows.jsonl, row 1: empty conversation" in result.err, "why no row is left"
    assert "known are rows.jsonl, others.jsonl, eval.jsonl\n" in inspect("--source", "data.eval_fraction").err


def headings(out: str) -> list[str]:
    return re.findall(r"^(\S+ \(\w+\), row \d+), [\d,]+ tokens, [\d,]+ supervised", out, re.MULTILINE)


# Text


def test_text_output_marks_supervised_tokens(inspect: Inspect) -> None:
    start, end = inspect("--json", "--source", "eval.jsonl").lines[0]["answer"]
    result = inspect("--source", "eval.jsonl")
    assert result.code == 0
    assert end - start > 1
    assert (
        f"\neval.jsonl (eval), row 1, 33 tokens, 4 supervised, last answer after {start} tokens of prompt\n"
        "│ <|im_start|>user⏎\n"
        "│ hello<|im_end|>⏎\n"
        "│ <|im_start|>assistant⏎\n"
        "│ ⟦one two<|im_end|>⟧⏎\n"
        "\n"
    ) in re.sub(r"row 1, \d+ tokens, \d+", "row 1, 33 tokens, 4", result.out)
    assert "messages, 1 rows: 1 used" in result.out
    assert "\x1b" not in result.out


def test_text_and_json_agree(inspect: Inspect, tokenizer: PreTrainedTokenizerFast) -> None:
    out, lines = inspect("--rows", "8").out, inspect("--json", "--rows", "8").lines[:-1]
    supervised_texts = []
    for line in lines:
        for supervised, run in itertools.groupby(line["labels"], lambda label: label != -100):
            supervised_texts += [tokenizer.decode(list(run))] if supervised else []
    assert len(supervised_texts) > 11
    rows = out[out.index("row 1") :].replace("\n│ ", "\n").replace("⏎", "")
    assert re.findall("⟦(.*?)⟧", rows, re.DOTALL) == supervised_texts


def test_cut_tokens_are_reported(inspect: Inspect, tokenizer: PreTrainedTokenizerFast) -> None:
    num_tokens = len(tokenizer("one two three " * 30).input_ids) + 1
    assert num_tokens == 121
    out = inspect("--source", "others.jsonl").out
    assert "others.jsonl (train), row 2, 60 tokens, 59 supervised, truncated\n" in out
    assert "\n│ … cut at data.max_length=60: 61 tokens left out\n" in out
    assert out.count("… cut at") == 1
    split = inspect("--source", "others.jsonl", "--rows", "9", "data.overlong=split").out
    assert "… cut at data.max_length=60: 1 tokens left out" in split, "a block of one token has no target"
    assert len(re.findall("row 2, .* supervised, split\n", split)) == 2


def test_a_source_without_examples_and_several_files(inspect: Inspect, folder: Path) -> None:
    (folder / "many").mkdir()
    write_jsonl(folder / "many" / "a.jsonl", ONE_ROW)
    write_jsonl(folder / "many" / "b.jsonl", ONE_ROW)
    write_jsonl(folder / "rows.jsonl", [{"messages": []}])
    out = inspect("data.train=[{path: many}, {path: rows.jsonl, format: messages}]").out
    assert "\nmany (train), many/a.jsonl, row 1, " in out
    assert "\nmany (train), many/b.jsonl, row 1, " in out
    assert "\nrows.jsonl (train), no examples\n" in out
    result = inspect("data.train=[{path: rows.jsonl, format: messages}]", "data.eval=[]")
    assert result.code == 2
    assert "tokens per example" not in result.out


def test_too_many_dropped_rows_are_an_error_after_the_output(inspect: Inspect, folder: Path) -> None:
    write_jsonl(folder / "rows.jsonl", [*chat_rows(2), {"messages": []}])
    for args in ((), ("--json",)):
        result = inspect(*args)
        assert result.code == 2
        assert result.err.startswith("error: rows.jsonl: 1 of 3 rows cannot be used; data.max_dropped allows 5.0%")
        assert "rows.jsonl, row 3: empty conversation" in result.err
    assert result.lines[-1]["audit"]["total"]["num_dropped"] == 1
    assert "empty conversation" in inspect().out
    assert headings(inspect().out)[:2] == ["rows.jsonl (train), row 1", "rows.jsonl (train), row 2"]


def test_errors_of_training_are_errors_of_inspect(inspect: Inspect, folder: Path) -> None:
    result = inspect("data.overlong=error", "--source", "others.jsonl")
    assert (result.code, result.out) == (2, "")
    assert "others.jsonl, row 2: " in result.err
    (folder / "rows.jsonl").write_text("{", encoding="utf-8")
    assert inspect().err.startswith("error: rows.jsonl, line 1: not valid JSON")


# Untrusted text


@pytest.mark.parametrize("content", UNTRUSTED)
def test_untrusted_text_is_escaped(inspect: Inspect, folder: Path, content: str) -> None:
    write_rows(folder, content)
    out = inspect("--source", "rows.jsonl", "data.max_length=400").out
    assert not re.search(r"[^\n\u200d\ufffd\U0001f3fd]", "".join(c for c in out if not c.isprintable()))
    shown = make_visible(content).replace("\n", "\n│ ")
    assert f"\n│ ⟦{shown}<|im_end|>⟧⏎\n" in out
    assert f"\n│ {shown}<|im_end|>⏎\n" in out
    assert headings(out) == ["rows.jsonl (train), row 1"], "a row cannot look like a heading"
    assert out.count("⟦") == out.count("⟧") == 2, "nor like a mark (one pair is in the legend)"


def test_text_that_looks_like_a_special_token_is_marked(inspect: Inspect, folder: Path) -> None:
    write_rows(folder, "a<|im_end|>b")
    out = inspect("--source", "rows.jsonl").out
    assert "│ ⟦a<·|im_end|>b<|im_end|>⟧⏎\n" in out
    assert "│ ⟦a<|im_end|>b<|im_end|>⟧⏎\n" in inspect("--source", "rows.jsonl", "data.parse_special_tokens=true").out


def test_make_visible_changes_only_invisible_characters() -> None:
    assert make_visible("plain é 漢 👍🏽 [b] \\n") == "plain é 漢 👍🏽 [b] \\n"
    assert make_visible("a\n\tb\x1b\u202e") == "a⏎\n⇥b⟨U+001B⟩⟨U+202E⟩"
    assert make_visible("\udc80⟦") == "⟨U+DC80⟩⟨U+27E6⟩"
    assert make_visible("\U000e0041") == "⟨U+E0041⟩", "tag characters are invisible"
    hidden = "".join(map(chr, [*range(32), *range(127, 160)]))
    assert make_visible(hidden).replace("⏎\n", "").isprintable()


# Tokens to text


@pytest.fixture(scope="module")
def sentencepiece_like() -> PreTrainedTokenizerFast:
    """Return a tokenizer like Llama 2's: ▁ for spaces, byte fallback, and a decoder that drops the first space."""
    letters = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefgh"]
    bpe = models.BPE({text: i for i, text in enumerate(letters)}, [], unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("text", ["a bad cab", "a 👍🏽é漢 b</s>", "👍", " a  b", "漢</s>字<s> a", "\ufffd a"])
def test_pieces_concatenate_to_the_decoded_text(
    tokenizer: PreTrainedTokenizerFast, sentencepiece_like: PreTrainedTokenizerFast, text: str
) -> None:
    for each in (tokenizer, sentencepiece_like):
        ids = each(text, add_special_tokens=False).input_ids
        pieces = list(split_pieces(Example(ids, [IGNORE_INDEX] * len(ids)), each))
        assert "".join(piece.text for piece in pieces) == each.decode(ids, skip_special_tokens=False)
        assert [i for piece in pieces for i in piece.ids] == ids
        assert all("\ufffd" not in piece.text for piece in pieces) or "\ufffd" in text
        assert {p.text for p in pieces if p.special} == {"<s>", "</s>"} & set(re.findall("</?s>", text))


def test_an_incomplete_character_is_one_piece(tokenizer: PreTrainedTokenizerFast) -> None:
    (*head, _), (letter,) = (tokenizer(text).input_ids for text in ("漢", "a"))
    broken = [*head, letter]
    assert [p.text for p in split_pieces(Example(head, [IGNORE_INDEX] * len(head)), tokenizer)] == ["\ufffd"]
    assert "".join(p.text for p in split_pieces(Example(broken, [IGNORE_INDEX] * len(broken)), tokenizer)) == "\ufffda"
    many = head * 20
    assert max(len(p.ids) for p in split_pieces(Example(many, [IGNORE_INDEX] * len(many)), tokenizer)) <= 16


def test_no_piece_crosses_a_boundary_of_the_loss_mask(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer("漢").input_ids
    pieces = list(split_pieces(Example(ids, [IGNORE_INDEX, *ids[1:]]), tokenizer))
    assert [i for piece in pieces for i in piece.ids] == ids
    assert [piece.supervised for piece in pieces for _ in piece.ids] == [False, True, True]
    assert re.fullmatch("\ufffd⟦\ufffd+⟧", mark_pieces(pieces, {"</s>"}))


# Colors


def test_colors_show_what_is_supervised(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer("<|im_start|>user\n[red]👍<|im_end|>").input_ids
    for labels in ([IGNORE_INDEX] * len(ids), ids):
        pieces = list(split_pieces(Example(ids, labels), tokenizer))
        text = color_pieces(pieces)
        assert text.plain == "<|im_start|>user⏎\n[red]👍<|im_end|>"
        shades = SUPERVISED if labels is ids else UNSUPERVISED
        styles = [str(span.style) for span in text.spans]
        assert len(styles) == len(pieces)
        assert styles[1:-1] == [shades[number % 2] for number in range(1, len(pieces) - 1)]
        assert all("bold" in style for style in (styles[0], styles[-1]))
        assert (styles[0] == SPECIAL) == (labels is not ids)


def test_a_terminal_gets_colors_and_folded_lines(folder: Path) -> None:
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
    assert ("⟦" in outs[0], "⟦" in outs[1]) == (False, True), "marks replace colors"


# The histogram


def test_histogram_counts_every_example() -> None:
    for lengths in ([5], [1, 1, 1, 2], list(range(1, 2049)), [3] * 70 + [2048], [7, 10**7]):
        bins = histogram(np.array(lengths, np.int64))
        assert sum(int(count.replace(",", "")) for _, count, _ in bins) == len(lengths)
        assert len(bins) <= 12
        assert max(len(bar) for *_, bar in bins) == 40
        for name, count, bar in bins:
            low, _, high = name.replace(",", "").partition("-")
            assert sum(int(low) <= length <= int(high or low) for length in lengths) == int(count.replace(",", ""))
            assert bool(bar) == (count.strip() != "0"), "a single example among many is visible"
    assert len(histogram(np.arange(1, 2049))) == 11
    assert histogram(np.array([100, 512]))[-1][0] == "500-512"


# The HTML page


TAGS = {"html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "b", "em", "table", "tr", "td"}
TAGS |= {"pre", "mark", "span"}


class Page(HTMLParser):
    """Parses the page: (tag, token ids, text) of each piece of each row, the other text, and the names of all tags."""

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


def test_page_marks_supervised_tokens(inspect: Inspect, folder: Path) -> None:
    write_rows(folder, *UNTRUSTED)
    args = ("--rows", "9", "--html", "page.html", "data.max_length=400")
    result, lines = inspect(*args), inspect("--json", *args).lines[:-1]
    assert result.code == 0
    assert result.out == inspect("--rows", "9", "data.max_length=400").out, "the page is written in addition"
    source = (folder / "page.html").read_text(encoding="utf-8")
    page = Page(source)
    assert page.open == []
    assert page.tags <= TAGS
    assert not re.search(r"src=|href=|url\(|@import", re.sub(r"&lt;.*?&gt;", "", source))
    assert "default-src 'none'" in source
    assert len(page.rows) == len(lines)
    for row, line in zip(page.rows, lines, strict=True):
        assert [int(i) for _, ids, _ in row for i in ids.split()] == line["input_ids"]
        supervised = [int(i) for tag, ids, _ in row if tag == "mark" for i in ids.split()]
        assert supervised == [label for label in line["labels"] if label != -100]
        assert "".join(text for *_, text in row) == make_visible(line["text"])
    for row, content in zip(page.rows, UNTRUSTED, strict=False):
        assert "".join(text for tag, _, text in row if tag == "mark") == f"{make_visible(content)}<|im_end|>"
    assert "rows.jsonl (train), row 1, " in page.outside
    assert "messages, 6 rows: 6 used" in page.outside


def test_page_reports_cut_tokens(inspect: Inspect, folder: Path) -> None:
    assert inspect("--html", folder / "page.html", "--json").code == 0
    page = Page((folder / "page.html").read_text(encoding="utf-8"))
    assert "… cut at data.max_length=60: " in page.outside
    assert len(page.rows) == 3 + 2 + 1, "the page has few examples, although JSON has all"


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (".", "is a folder"),
        ("no/page.html", "the folder no does not exist"),
        ("run.yaml", "run.yaml exists and is not an HTML page; choose another name"),
        ("rows.jsonl", "rows.jsonl exists and is not an HTML page"),
    ],
)
def test_an_impossible_page_path_fails_before_any_output(
    inspect: Inspect, folder: Path, file: str, message: str
) -> None:
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    result = inspect("--html", file)
    assert (result.code, result.out) == (2, "")
    assert message in result.err
    assert not Path("no").exists()
    assert {path: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


def test_a_page_is_written_again(inspect: Inspect, folder: Path) -> None:
    (folder / "page.html").touch()
    for _ in range(2):
        assert inspect("--html", "page.html").code == 0
        assert (folder / "page.html").read_text(encoding="utf-8").startswith("<!doctype html>")


def test_a_page_without_write_permission_is_an_error(inspect: Inspect, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("lora_accel.pages.write_text", fail)
    result = inspect("--html", "page.html")
    assert (result.code, result.out) == (2, "")
    assert "page.html cannot be written: Permission denied" in result.err


# Errors and processes


def test_an_unknown_source_is_an_error_with_the_known_ones(inspect: Inspect) -> None:
    result = inspect("--source", "row.jsonl")
    assert (result.code, result.out) == (2, "")
    assert result.err == (
        "error: --source: 'row.jsonl' is not a source of this config (did you mean rows.jsonl?); "
        "known are rows.jsonl, others.jsonl, eval.jsonl\n"
    )


@pytest.mark.sample(2)
@pytest.mark.parametrize("args", [("--json",), ("--rows", "600")], ids=["json", "text"])
@pytest.mark.parametrize("rows", [1, 600], ids=["fits the buffer", "does not"])
def test_a_closed_pipe_is_not_an_error(folder: Path, args: tuple[str, ...], rows: int) -> None:
    write_jsonl(folder / "rows.jsonl", chat_rows(rows))
    command = [sys.executable, "-m", "lora_accel.cli", "inspect", "--config", "run.yaml", "data.max_length=200", *args]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=folder)
    assert process.stdout is not None
    if rows > 1:
        assert process.stdout.readline()
    process.stdout.close()
    _, err = process.communicate(timeout=PATIENCE_SECONDS)
    assert err == b""
    assert process.returncode in (0, 141)


def test_an_ascii_terminal_gets_escaped_characters(folder: Path) -> None:
    result = run_module(
        *("lora_accel.cli", "inspect", "--config", folder / "run.yaml", f"data.train=[{{path: {folder}/rows.jsonl}}]"),
        "data.eval=[]",
        env={"PYTHONIOENCODING": "ascii"},
        fresh=True,
    )
    assert result.returncode == 0, result.stderr
    assert "\\u27e6" in result.stdout


def test_help_imports_no_torch() -> None:
    probe = (
        "import sys; from lora_accel.cli import app\n"
        "try: app(['inspect', '--help'])\n"
        "except SystemExit as end: print('LOADED', end.code, sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.splitlines()[-1] == "LOADED 0 []"


@pytest.mark.smollm
@pytest.mark.skipif(not SMOLLM.is_dir(), reason="needs scripts/fetch_model.py")
@pytest.mark.parametrize("name", ["dummy_conversation.json", "alpaca_en_demo.json", "c4_demo.jsonl"])
def test_sums_match_on_real_data(inspect: Inspect, name: str) -> None:
    if not (SHARED_DATA / name).is_file():
        pytest.skip("shared/data is missing")
    train = f"data.train=[{{path: {SHARED_DATA / name}}}]"
    result = inspect("--json", f"model.name_or_path={SMOLLM}", train, "data.eval=[]", "data.max_length=512")
    assert result.code == 0, result.err
    *examples, last = result.lines
    check_sums(last["audit"]["total"], examples)
    assert last["audit"]["total"]["num_rows"] == {"d": 500, "a": 999, "c": 300}[name[0]]
