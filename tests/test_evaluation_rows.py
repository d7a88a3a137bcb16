"""Training and `lora-accel evaluate` evaluate the same rows: those that the ledger counts as used."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_accel import RunConfig, run_training
from lora_accel.errors import DataError
from lora_accel.inference.evaluation import evaluate
from tests.conftest import CommandResult, chat_rows, read_metrics, write_jsonl

QUESTION = {"role": "user", "content": "red"}


def conversation(answer: str, *before: dict[str, str], **flags: Any) -> dict[str, Any]:
    return {"messages": [*before, QUESTION, {"role": "assistant", "content": answer, **flags}]}


EVALUATIONS: dict[str, tuple[dict[str, Any], list[dict[str, Any]], int, int]] = {
    "the template rejects a row": (
        {"model": {"chat_template": "TEMPLATE"}},
        [conversation("blue"), conversation("green", {"role": "system", "content": "s"})],
        1,
        1,
    ),
    "an answer is not supervised": ({}, [conversation("BAD", weight=0), conversation("blue")], 1, 1),
    "a row is cut before its answer": (
        {},
        [conversation("blue"), conversation("green", {"role": "user", "content": "one two three " * 200})],
        1,
        1,
    ),
    "an answer is cut": ({}, [conversation("blue"), conversation("one two three " * 200)], 2, 1),
}
"""Changes of the config, evaluation rows, and how many of them count for the loss and for the exact match."""


@pytest.mark.parametrize("case", EVALUATIONS)
def test_training_and_evaluate_use_the_same_rows(
    make_config: Callable[..., RunConfig], tmp_path: Path, command: Callable[..., CommandResult], case: str
) -> None:
    changes, rows, num_evaluated, num_scored = EVALUATIONS[case]
    template = tmp_path / "template.jinja"
    template.write_text(
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system message') }}{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    changes = json.loads(json.dumps(changes).replace("TEMPLATE", str(template)))
    path = write_jsonl(tmp_path / "eval.jsonl", rows)
    data = {"eval": [{"path": str(path)}], "max_dropped": 0.5}
    config = make_config(data=data, training={"max_steps": 1}, **changes)
    folder = run_training(config).parent
    ledger = json.loads((folder / "data_ledger.json").read_text())["eval"][0]
    assert ledger["num_examples"] == num_evaluated
    _, trained = read_metrics(folder, "eval")

    arguments = ("evaluate", "--config", folder / "config.yaml", "--adapter", folder / "adapter", "--max-new-tokens", 2)
    result = command(*map(str, arguments), "--json")
    assert result.returncode == 0, result.stderr
    _, score = json.loads(result.stdout)
    assert (score["rows"], score["eval_tokens"]) == (num_scored, trained["eval_tokens"])
    assert score["eval_loss"] == pytest.approx(trained["eval_loss"], rel=1e-5)

    # With a lower limit both raise, with the same message.
    if num_evaluated < len(rows):
        stricter = make_config(data=data | {"max_dropped": 0.4}, training={"max_steps": 1}, **changes)
        with pytest.raises(DataError) as caught:
            run_training(stricter)
        result = command(*map(str, arguments), "data.max_dropped=0.4")
        assert result.returncode == 2
        assert str(caught.value) in result.stderr
        assert f"{path}, row " in result.stderr


def test_evaluate_scores_all_rows_that_training_held_out(
    make_config: Callable[..., RunConfig], tmp_path: Path, command: Callable[..., CommandResult]
) -> None:
    """With `overlong: split` too: a row is held out with all its pieces."""
    turns = [
        {"role": role, "content": f"{role} {number} one two three"}
        for number in range(6)
        for role in ("user", "assistant")
    ]
    rows = write_jsonl(tmp_path / "long.jsonl", [{"messages": turns}] * 4 + chat_rows(6))
    data = {"train": [{"path": str(rows)}], "eval_fraction": 0.4, "overlong": "split", "max_length": 100}
    folder = run_training(make_config(data=data, training={"max_steps": 1})).parent
    _, trained = read_metrics(folder, "eval")
    result = command(
        *("evaluate", "--config", str(folder / "config.yaml"), "--adapter", str(folder / "adapter")),
        *("--max-new-tokens", "2", "--json"),
    )
    assert result.returncode == 0, result.stderr
    _, score = json.loads(result.stdout)
    assert (score["rows"], score["eval_tokens"]) == (4, trained["eval_tokens"])


def test_a_row_of_two_sources_is_scored_in_each(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    path = str(write_jsonl(tmp_path / "eval.jsonl", [conversation("blue")]))
    config = make_config(data={"eval": [{"path": path}, {"path": path}]})
    (score,) = evaluate(config, max_new_tokens=2)
    assert score.rows == 2
