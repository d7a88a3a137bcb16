"""The report: what it reads from a run folder, and that nothing of it is markup or a request."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lora_accel import run_training
from lora_accel.config.schema import RunConfig
from lora_accel.errors import ArtifactError
from lora_accel.report import write
from lora_accel.report.curves import curve_of, smooth, thin_out
from lora_accel.report.metrics_log import Series, read_metrics_log
from lora_accel.report.page import MAX_REPLY_STEPS, run_page
from lora_accel.report.read import read_run
from lora_accel.report.write import write_report
from tests.conftest import CommandResult, read_metrics

EVIL = '<script>alert(1)</script>\x00\x1b[31m\u202e \ud800 & "quoted" <img src=http://example.org/x.png>'
"""A prompt or reply of HTML, control characters, a right-to-left override and an unpaired surrogate."""


def train_line(step: int, **values: Any) -> dict[str, Any]:
    return {"kind": "train", "step": step, "loss": 3 / step, "learning_rate": 1e-3, "grad_norm": 1.0} | values


def write_run(folder: Path, lines: list[Any], **files: Any) -> Path:
    """Write a run folder: metrics.jsonl, and one JSON file for each keyword."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    return folder


def reply(step: int, prompt: str, text: str) -> dict[str, Any]:
    return {"kind": "event", "event": "reply", "step": step, "prompt": prompt, "reply": text}


class Page(HTMLParser):
    """The tags of a page, its text, and the attributes that could load something."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        names = ("src", "href", "xlink:href", "data", "action", "srcset")
        self.loads += [value for name, value in attrs if name in names and value and not value.startswith("#")]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_run_ends_with_its_report(make_config: Callable[..., RunConfig], capsys: pytest.CaptureFixture[str]) -> None:
    config = make_config(
        data={"eval_fraction": 0.3},
        evaluation={"every_steps": 2, "prompts": ["repeat alpha"], "max_new_tokens": 4},
        logging={"report": True},
    )
    folder = run_training(config).parent
    assert f"report: {folder}/report.html" in capsys.readouterr().out
    text = (folder / "report.html").read_text(encoding="utf-8")
    for expected in ("Training loss", "Evaluation: loss", "repeat alpha", "step-00000004", "mixed precision"):
        assert expected in text
    assert f"lora-accel merge {folder}/adapter {folder}/merged" in text
    assert Image.open(folder / "loss.png").size == (960, 465)
    page = run_page(read_run(folder))
    assert page["state"] == "done"
    losses = read_metrics(folder, "eval")
    assert [row[:2] for row in {s[0]: s[3] for s in page["sections"]}["evaluation"][0][1].rows] == [
        [f"{line['step']}", f"{line['eval_loss']:.4f}"] for line in losses
    ]


def test_failed_report_is_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    run = write_run(tmp_path / "run", [train_line(1)])
    monkeypatch.setattr(write, "write_page", full)
    write.report_finished_run(run)
    assert "note: the report cannot be written: [Errno 28] No space left on device" in capsys.readouterr().err


def test_untrusted_text_is_escaped_and_the_page_loads_nothing(tmp_path: Path) -> None:
    evaluation = {
        "kind": "eval",
        "step": 1,
        "eval_loss": 1.0,
        "sources": {EVIL: {"eval_loss": 1.0}, "b": {"eval_loss": 2}},
    }
    config = {"model": {"name_or_path": EVIL}, "data": {"train": [{"path": EVIL}]}}
    lines = [
        train_line(1),
        evaluation,
        reply(0, EVIL, EVIL),
        reply(1, EVIL, "مرحبا"),
        {"kind": "event", "event": EVIL, "step": 1},
    ]
    run = write_run(tmp_path / "run", lines, provenance={"config": config}, data_ledger={EVIL: [{"path": EVIL}]})
    text = write_report([run]).read_text(encoding="utf-8")
    page = Page(text)
    assert "script" not in page.tags
    assert "img" not in page.tags
    assert page.loads == []
    assert "url(http" not in text
    assert "@import" not in text
    assert '<script>alert(1)</script>⟨U+0000⟩⟨U+001B⟩[31m⟨U+202E⟩ ⟨U+D800⟩ & "quoted"' in "".join(page.texts)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\u202e]", text)


def test_report_is_the_same_each_time(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [train_line(step) for step in range(1, 30)])
    first = write_report([run]).read_bytes(), (run / "loss.png").read_bytes()
    assert first == (write_report([run]).read_bytes(), (run / "loss.png").read_bytes())


def test_ids_are_unique_on_the_page(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [train_line(step, tokens_per_second=5.0) for step in range(1, 30)])
    text = write_report([run]).read_text(encoding="utf-8")
    ids = re.findall(r' id="([^"]*)"', text)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:xlink:href="#|url\(#)([^")]*)', text)) <= set(ids)


def test_labels_of_a_logarithmic_axis_are_numbers(tmp_path: Path) -> None:
    lines = [train_line(step, grad_norm=1000.0 if step == 9 else 1.0) for step in range(1, 30)]
    text = write_report([write_run(tmp_path / "run", lines)]).read_text(encoding="utf-8")
    assert "mathdefault" not in text
    assert re.search(r"<text [^>]*>1000</text>", text)


def test_damaged_log_is_read(tmp_path: Path) -> None:
    folder = write_run(
        tmp_path / "run", [train_line(1), train_line(2, loss="NaN"), [], {"kind": "train"}, train_line(3)]
    )
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(
            b'{"kind": "train", "step": 4, "loss": NaN}\n\n\xff\xfe\n{"kind": "train", "step": -1}\n{"kind": "tr'
        )
    log = read_metrics_log(folder / "metrics.jsonl")
    assert list(log.train["loss"].steps) == [1, 2, 3, 4]
    assert log.train["loss"].last == 1.0
    assert math.isnan(log.train["loss"].values[1])
    assert log.num_unreadable == 5
    assert "unreadable lines of metrics.jsonl, which are left out: 5" in write_report([folder]).read_text(
        encoding="utf-8"
    )


def test_other_files_may_be_missing_or_damaged(tmp_path: Path) -> None:
    folder = write_run(
        tmp_path / "run", [train_line(1)], plan=[1], status={"step": "x", "pids": "y"}, provenance={"base": 1}
    )
    (folder / "data_ledger.json").write_text("{")
    (folder / "checkpoints" / "step-00000001").mkdir(parents=True)
    assert "Training loss" in write_report([folder]).read_text(encoding="utf-8")


@pytest.mark.parametrize("lines", [None, []], ids=["no log", "empty log"])
def test_run_without_metrics_is_an_error(
    tmp_path: Path, command: Callable[..., CommandResult], lines: list[Any] | None
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    if lines is not None:
        write_run(folder, lines)
    result = command("report", folder)
    assert result.returncode == 2
    assert "metrics" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (folder / "report.html").exists()


def test_report_replaces_no_other_file(tmp_path: Path, command: Callable[..., CommandResult]) -> None:
    run, other = write_run(tmp_path / "run", [train_line(1)]), tmp_path / "notes.txt"
    other.write_text("mine")
    result = command("report", run, "--out", other)
    assert (result.returncode, other.read_text()) == (2, "mine")
    assert "exists and is not an HTML page" in result.stderr
    assert command("report", run, run).returncode == 2


def test_thinned_curve_keeps_extremes() -> None:
    values = np.sin(np.arange(100_000) / 7)
    values[[31_234, 77_777]] = 50, -40
    values[5000:9000] = np.nan
    steps, thinned = thin_out((np.arange(100_000.0), values), most=400)
    assert len(steps) <= 400
    assert (steps[0], steps[-1]) == (0, 99_999)
    assert (np.nanmax(thinned), np.nanmin(thinned)) == (50, -40)
    assert np.isnan(thinned[(steps >= 5000) & (steps < 8700)]).all(), "a gap stays a gap"


def test_smoothing_is_the_corrected_average() -> None:
    values = np.array([4.0, np.nan, 2.0, 2.0])
    decay = math.exp(-1 / 5)
    expected = [4.0, math.nan, (decay * 4 + 2) / (decay + 1), (decay**2 * 4 + decay * 2 + 2) / (decay**2 + decay + 1)]
    np.testing.assert_allclose(smooth(values, 5), expected, rtol=1e-12)


def test_curve_is_sorted_by_step() -> None:
    series = Series()
    for step, value in ((3, 1.0), (1, math.inf), (2, 5.0)):
        series.add(step, value)
    steps, values = curve_of(series)
    np.testing.assert_array_equal(steps, [1, 2, 3])
    np.testing.assert_array_equal(values, [np.nan, 5.0, 1.0])


def test_replies_are_a_row_per_prompt_and_a_column_per_evaluation(tmp_path: Path) -> None:
    lines = [train_line(1), reply(0, "a", "x"), reply(0, "b", "y"), reply(10, "a", "x"), reply(10, "b", "z")]
    lines += [{"kind": "event", "event": "reply_failed", "step": 20, "prompt": "b", "error": "OOM"}]
    replies = run_page(read_run(write_run(tmp_path / "run", lines)))["replies"]
    assert list(replies.columns) == ["step 0 (before training)", "step 10", "step 20"]
    cells = {
        prompt: [cell and (cell.text, cell.is_same, cell.is_error) for cell in row] for prompt, row in replies.rows
    }
    assert cells == {
        "a": [("x", False, False), ("x", True, False), None],
        "b": [("y", False, False), ("z", False, False), ("OOM", False, True)],
    }


def test_many_evaluations_are_a_bounded_number_of_columns(tmp_path: Path) -> None:
    lines = [train_line(1), *(reply(step, "a", str(step)) for step in range(100))]
    replies = run_page(read_run(write_run(tmp_path / "run", lines)))["replies"]
    assert len(replies.columns) == MAX_REPLY_STEPS
    assert (replies.columns[0], replies.columns[-1]) == ("step 0 (before training)", "step 99")
    assert replies.note == "75 of 100 evaluations are left out; metrics.jsonl has all."


def test_launch_settings_are_those_of_the_newest_launch(tmp_path: Path) -> None:
    starts = [("start", 0, "1"), ("resume", 5, "2")]
    lines: list[Any] = [
        {"kind": "event", "event": event, "step": step, "settings": [["processes", count, "torchrun"]]}
        for event, step, count in starts
    ]
    run = read_run(write_run(tmp_path / "run", [*lines, train_line(6)]))
    assert run.launch_settings == [("processes", "2", "torchrun")]
    assert run_page(run)["notes"] == ["resumed after step 5"]


def test_training_time_adds_up_over_resumes(tmp_path: Path) -> None:
    seconds = [1.0, 5.0, 2.0, 4.0]
    lines = [train_line(step, elapsed_seconds=value) for step, value in enumerate(seconds, start=1)]
    assert read_run(write_run(tmp_path / "run", lines)).training_seconds == 9.0


def test_run_whose_processes_have_died_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "here")
    states = {}
    for host, pid in (("here", 2**22 + 1), ("here", 1), ("elsewhere", 2**22 + 1)):
        status = {"state": "running", "step": 1, "host": host, "pids": [pid]}
        states[host, pid] = read_run(write_run(tmp_path / f"{host}{pid}", [train_line(1)], status=status)).state
    assert list(states.values()) == ["killed", "running", "running"]


def test_several_runs_are_compared(tmp_path: Path, command: Callable[..., CommandResult]) -> None:
    runs = []
    for name, rate in (("a", 1e-3), ("b", 2e-3)):
        config = {"output_dir": name, "seed": 0, "training": {"learning_rate": rate}}
        lines = [train_line(step) for step in range(1, 30)] + [reply(29, "hello", f"from {name}")]
        runs.append(write_run(tmp_path / name, lines, provenance={"config": config}))
    result = command("report", *runs)
    assert (result.returncode, result.stdout.strip()) == (0, str(runs[0] / "comparison.html"))
    text = (runs[0] / "comparison.html").read_text(encoding="utf-8")
    assert "2 runs compared" in text
    assert "<td>training.learning_rate</td><td>0.001</td><td>0.002</td>" in text
    assert "<td>seed</td>" not in text
    assert "from a" in text
    assert "from b" in text
    assert not (runs[0] / "loss.png").exists()


def test_not_a_run_folder(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="is not a folder; pass the output_dir of a run"):
        read_run(tmp_path / "missing")


def test_checkpoints_have_the_metric_that_selects_the_best(
    make_config: Callable[..., RunConfig], command: Callable[..., CommandResult]
) -> None:
    config = make_config(
        data={"eval_fraction": 0.3},
        evaluation={"every_steps": 2, "metrics": ["token_f1"], "max_new_tokens": 2},
        checkpoint={"keep_best": "eval_token_f1"},
        training={"max_steps": 4},
    )
    folder = run_training(config).parent
    ((_, table),) = {s[0]: s[3] for s in run_page(read_run(folder))["sections"]}["checkpoints"]
    values = {line["step"]: line["eval_token_f1"] for line in read_metrics(folder, "eval")}
    column = list(table.headers).index("eval token f1")
    assert table.headers[column - 1] == "eval loss"
    assert [float(row[column]) for row in table.rows] == [pytest.approx(values[step], abs=1e-4) for step in (2, 4)]
