"""Which changes of an evaluation make its values incomparable with earlier ones."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from lora_accel.config.schema import RunConfig
from lora_accel.setup.data import prepare_data
from lora_accel.setup.fingerprint import evaluation_fingerprint
from tests.conftest import chat_rows, write_jsonl


def score(prompts: list[str], replies: list[str], references: list[str]) -> float:
    """Return a metric of a user."""
    return 0.0


@pytest.mark.parametrize(
    ("metric", "change", "is_same"),
    [
        ("eval_loss", {"rows": chat_rows(7)}, False),
        ("eval_loss", {"max_new_tokens": 9, "num_replies": 2, "generation": {"temperature": 1.0}}, True),
        ("eval_loss", {"metrics": ["exact_match", "token_f1"], "every_steps": 3, "prompts": ["hello"]}, True),
        ("eval_bits_per_byte", {"rows": chat_rows(7)}, False),
        ("eval_exact_match", {"rows": chat_rows(7)}, False),
        ("eval_exact_match", {"max_new_tokens": 9}, False),
        ("eval_exact_match", {"num_replies": 2}, False),
        ("eval_exact_match", {"generation": {"temperature": 1.0}}, False),
        ("eval_exact_match", {"neutral": "other"}, True),
        ("eval_neutral_loss", {"neutral": "other"}, False),
        ("eval_neutral_loss", {"rows": chat_rows(7), "max_new_tokens": 9}, True),
        ("eval_score", {"metrics": ["tests.setup.other_scores:score"]}, False),
        ("eval_score", {"max_new_tokens": 9}, False),
    ],
)
def test_a_change_of_the_inputs_of_the_metric_is_seen(
    make_config: Callable[..., RunConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    metric: str,
    change: dict[str, Any],
    is_same: bool,
) -> None:
    module = ModuleType("tests.setup.other_scores")
    monkeypatch.setattr(module, "score", score, raising=False)
    monkeypatch.setitem(sys.modules, module.__name__, module)

    def fingerprint(rows: list[Any], neutral: str = "neutral", **evaluation: Any) -> int:
        text, held_out = tmp_path / f"{neutral}.txt", tmp_path / "eval.jsonl"
        text.write_text(f"the {neutral} text")
        own = [f"{__name__}:score"] if metric == "eval_score" else []
        metrics = ["bits_per_byte", "exact_match", *own] if metric != "eval_score" else own
        values = {"metrics": metrics, "neutral": str(text), "every_steps": 1} | evaluation
        config = make_config(
            data={"eval": [{"path": str(write_jsonl(held_out, rows))}]},
            evaluation=values,
            checkpoint={"keep_best": metric, "best_is": "max"},
        )
        return evaluation_fingerprint(config, prepare_data(config))

    first = fingerprint(chat_rows(6))
    assert fingerprint(chat_rows(6)) == first < 2**48
    changed: dict[str, Any] = {"rows": chat_rows(6)} | change
    assert (fingerprint(**changed) == first) is is_same
