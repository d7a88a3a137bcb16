"""The table of metrics: names, directions, and functions of the user."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from lora_accel.config.metrics import check_metric_name, directions_of, load_metrics
from lora_accel.config.schema import EvaluationSection
from lora_accel.errors import ConfigError

MODULE = """
def accuracy(prompts, replies, references):
    return 0.5

def errors(prompts, replies, references):
    return 0.5

def several(prompts, replies, references):
    return {"cost": 1.0, "gain": 2.0}

number = 3
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Write a module to the current folder and return its name."""
    (tmp_path / "scores_of_mine.py").write_text(MODULE)
    (tmp_path / "faulty_scores.py").write_text("import scores_of_mine\nraise RuntimeError('not today')")
    (tmp_path / "leaving_scores.py").write_text("import sys\nsys.exit(0)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "scores_of_mine", raising=False)
    return "scores_of_mine"


def test_metrics_and_their_directions() -> None:
    assert directions_of([], has_neutral=False) == {"eval_loss": False, "eval_perplexity": False}
    metrics = ["bits_per_byte", "exact_match", "my_scores:accuracy"]
    assert directions_of(metrics, has_neutral=True) == {
        "eval_loss": False,
        "eval_perplexity": False,
        "eval_bits_per_byte": False,
        "eval_exact_match": True,
        "eval_accuracy": None,
        "eval_neutral_loss": False,
    }


def test_modules_of_the_current_folder_are_found(module: str) -> None:
    path = [*sys.path]
    (function,) = load_metrics(["loss", f"{module}:accuracy"]).values()
    assert function([], [], []) == 0.5
    assert sys.path == path


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("scores_of_mine:nothing", "AttributeError: module 'scores_of_mine' has no attribute 'nothing'"),
        ("no_such_module:score", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("faulty_scores:score", "RuntimeError: not today"),
        ("leaving_scores:score", "SystemExit: 0"),
        ("scores_of_mine:number", "scores_of_mine:number is not a function"),
    ],
)
def test_functions_that_cannot_be_imported(module: str, name: str, reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_metrics([name])
    assert str(caught.value).startswith(f"evaluation.metrics: {name}")
    assert reason in str(caught.value)


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"rouge_l needs the package rouge-score; install it with pip install 'lora-"):
        load_metrics(["rouge_l"])


@pytest.mark.parametrize("name", ["token_f2", "a:b:c", "os.path", "my-module:score", ":score", "module:"])
def test_wrong_names(name: str) -> None:
    with pytest.raises(ValueError, match="is not a metric"):
        check_metric_name(name)


@pytest.mark.parametrize(
    ("generation", "message"),
    [
        ({"top_p": 0.9}, "top_p needs sampling; set temperature above 0 too"),
        ({"top_k": 5}, "top_k needs sampling"),
        ({"num_beams": 2, "temperature": 0.5}, "num_beams and temperature are two ways"),
        ({"length_penalty": 2.0}, "length_penalty needs beam search"),
    ],
)
def test_invalid_combinations_of_generation(generation: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EvaluationSection.model_validate({"generation": generation})
