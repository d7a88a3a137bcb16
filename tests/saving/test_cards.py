"""Model cards: base, data by name, settings, evaluation, losses and license; no path of this machine."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_accel import RunConfig, merge_adapter, run_training
from lora_accel.saving.cards import data_name, license_of, model_card
from lora_accel.saving.results import RunResults, evaluation_rows, loss_curve, read_results
from tests.conftest import write_jsonl


def rows_of(card: str, header: str) -> list[list[str]]:
    """Return the rows of the table in a card that begins with a header."""
    lines = card[card.index(header) :].split("\n\n")[0].splitlines()
    return [line.strip("| ").split(" | ") for line in lines if not line.startswith("| ---")]


def test_the_cards_of_a_run_and_its_merge(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    """One real run: both cards have its settings, its last evaluation and the losses of metrics.jsonl."""
    config = make_config(
        data={"eval": [{"path": str(write_jsonl(tmp_path / "held|out.jsonl", [{"text": "one two three"}] * 3))}]},
        evaluation={"every_steps": 3},
    )
    run_training(config)
    run = Path(config.output_dir)
    merge_adapter(run / "adapter", tmp_path / "merged", verify=False)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last, losses = [x for x in lines if x["kind"] == "eval"][-1], [x["loss"] for x in lines if x["kind"] == "train"]
    for folder in (run / "adapter", tmp_path / "merged"):
        card = (folder / "README.md").read_text(encoding="utf-8")
        assert str(tmp_path) not in card
        assert "\n- rows.jsonl\n" in card
        settings = dict(rows_of(card, "| setting | value |"))
        assert (settings["rank"], settings["alpha"], settings["learning rate"]) == ("4", "8.0", "0.03")
        assert (settings["steps"], settings["training examples"]) == (str(len(losses)), "21")
        assert f"Evaluation after step {last['step']}:" in card
        header, values = rows_of(card, "| data | loss ")
        assert dict(zip(header, values, strict=True))["loss"] == f"{last['eval_loss']:.5g}"
        assert f"Loss, steps 1 to {len(losses)}: {losses[0]:.3g} {'█'}" in card
        assert f" {losses[-1]:.3g}\n" in card


def test_the_card_of_minimal_provenance(make_config: Callable[..., RunConfig]) -> None:
    provenance = {
        "config": make_config().model_dump(mode="json"),
        "plan": {"total_steps": 1, "batch_size": 4},
        "base": {"name_or_path": "owner/base", "revision": None, "sha256": {}},
        "packages": {"lora-accel": "1"},
        "data": [{"path": "owner/rows"}, {"path": "/a/b/c.jsonl"}],
    }
    saved = {"r": 4, "lora_alpha": 8}
    card = model_card(provenance, saved, "")
    assert "loss.png" not in card
    assert "- owner/rows\n- c.jsonl\n" in card
    best = provenance | {"exported": {"step": 1, "selected": "best", "metric": "eval_loss", "value": 2.5}}
    assert "1 steps (of 1; eval_loss was best there: 2.5)" in model_card(best, saved, "")
    unnamed = provenance | {"exported": {"step": 1, "selected": "best"}}  # of another version
    assert "1 steps (of 1; its best one)" in model_card(unnamed, saved, "")


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("owner/rows", "owner/rows"),
        ("/home/ann/rows.jsonl", "rows.jsonl"),
        ("data/rows.jsonl", "rows.jsonl"),
        ("../rows", "rows"),
        ("a|b\nc", "a\\|b c"),
    ],
)
def test_data_has_a_name_without_folders(path: str, name: str) -> None:
    assert data_name(path) == name


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlicense: apache-2.0\nbase_model: x\n---\n# x", "apache-2.0"),
        ("---\nbase_model: x\nlicense: 'llama3.2'\n---\n", "llama3.2"),
        ("---\nbase_model: x\n---\nlicense: mit\n", None),
        ("# x\nlicense: mit\n", None),
        (None, None),
    ],
)
def test_the_license_is_that_of_the_bases_card(tmp_path: Path, card: str | None, expected: str | None) -> None:
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert license_of(str(tmp_path), None) == expected


def test_results_are_those_up_to_a_step(tmp_path: Path) -> None:
    lines: list[Any] = [{"kind": "train", "step": step, "loss": 4.0 - step} for step in (1, 2, 3)]
    lines += [{"kind": "eval", "step": step, "eval_loss": step / 2} for step in (0, 2, 3)]
    lines += [{"kind": "train", "step": 2, "loss": 1.5}, {"kind": "train", "step": 4, "loss": None}, [], "broken"]
    text = "\n".join(map(json.dumps, lines)) + '\n{"kind": "tr'
    (tmp_path / "metrics.jsonl").write_text(text)
    results = read_results(tmp_path, 2)
    assert results.losses == ((1, 3.0), (2, 1.5)), "the later line of a repeated step counts"
    assert results.evaluation == {"kind": "eval", "step": 2, "eval_loss": 1.0}
    assert read_results(tmp_path).evaluation == {"kind": "eval", "step": 3, "eval_loss": 1.5}
    assert read_results(tmp_path / "none") == RunResults()


def test_a_loss_curve_has_a_bar_per_step_or_per_group() -> None:
    assert loss_curve(RunResults(None, ((1, 8.0), (2, 4.5), (3, 1.0)))) == "█▅▁"
    assert loss_curve(RunResults(None, ((1, 2.0),))) == "▁"
    assert loss_curve(RunResults()) == ""
    long = loss_curve(RunResults(None, tuple((step, 1.0 / step) for step in range(1, 1001))))
    assert re.fullmatch("█▂+▁+", long)
    assert len(long) == 40


def test_an_evaluation_has_a_row_per_source() -> None:
    sources = {"a": {"eval_loss": 1.0, "eval_rouge_l": 0.5}, "b": {"eval_loss": 3.0}}
    evaluation = {"kind": "eval", "step": 9, "eval_loss": 2.0, "eval_ok": True, "sources": sources}
    assert evaluation_rows(evaluation) == [
        ("all", {"loss": 2.0}),
        ("a", {"loss": 1.0, "rouge_l": 0.5}),
        ("b", {"loss": 3.0}),
    ]
    assert evaluation_rows(evaluation | {"sources": {"a": sources["a"]}}) == [("all", {"loss": 2.0})]
