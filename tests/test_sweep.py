"""`scripts/sweep.py`: which runs a sweep makes, that it resumes, and its table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from scripts import sweep


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Replace training: the overrides of each run are recorded; the loss is its learning rate, and 9 fails."""
    recorded: list[list[str]] = []

    def train(config: Path, overrides: Sequence[str], folder: Path) -> int:
        recorded.append([*overrides])
        rate = float(dict(override.split("=", 1) for override in overrides)["training.learning_rate"])
        if rate == 9:
            return 3
        folder.mkdir(parents=True)
        lines = [{"kind": "train", "step": n, "loss": 20 - n, "elapsed_seconds": n} for n in range(1, 21)]
        evaluations = [{"kind": "eval", "step": 10, "eval_loss": 7}, {"kind": "eval", "step": 20, "eval_loss": rate}]
        text = "".join(json.dumps(line) + "\n" for line in [*lines, *evaluations])
        (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
        return 0

    monkeypatch.setattr(sweep, "train", train)
    return recorded


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    (tmp_path / "c.yaml").write_text("seed: 0\n")
    return ["--config", str(tmp_path / "c.yaml"), "--out", str(tmp_path / "out"), "seed=1"]


def test_every_combination_runs_once(
    runs: list[list[str]], arguments: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    rates = ["--vary", "training.learning_rate=2", "training.learning_rate=1"]
    ranks = ["--vary", "adapter.r=2 adapter.alpha=4", "adapter.r=8 adapter.alpha=16"]
    assert sweep.main([*arguments, "--max-runs", "1", *rates, *ranks]) == 0
    assert runs == [["seed=1", "training.learning_rate=2", "adapter.r=2", "adapter.alpha=4"]]
    assert sweep.main([*arguments, *rates, *ranks]) == 0
    assert len(runs) == 4, "the first run is not repeated"
    assert len({*map(tuple, runs)}) == 4
    results = sweep.read_results(tmp_path / "out")
    assert [(result.eval_loss, result.train_loss, result.steps, result.seconds) for result in results[-1:]] == [
        (1, 0.5, 20, 20)  # the last evaluation, and the mean of the last two steps
    ]
    table = capsys.readouterr().out.splitlines()[-6:]
    assert [line.split(" | ")[1] for line in table[2:]] == ["1.0000", "1.0000", "2.0000", "2.0000"]


def test_a_failed_run_ends_the_sweep_with_its_exit_code(runs: list[list[str]], arguments: list[str]) -> None:
    rates = ["--vary", "training.learning_rate=9", "training.learning_rate=1"]
    assert sweep.main([*arguments, *rates]) == 3
    assert len(runs) == 1


def test_an_unfinished_run_has_the_same_folder(arguments: list[str], tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    first = sweep.run_folder(tmp_path, config, ["a=1"], ["b=2"])
    assert first == sweep.run_folder(tmp_path, config, ["a=1"], ["b=2"])
    assert first != sweep.run_folder(tmp_path, config, ["a=1"], ["b=3"])
    config.write_text("seed: 2\n")
    assert first != sweep.run_folder(tmp_path, config, ["a=1"], ["b=2"])
