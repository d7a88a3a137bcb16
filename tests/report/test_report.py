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
from lora_accel.report.charts import charts_of
from lora_accel.report.curves import curve_of, smooth, thin_out
from lora_accel.report.figures import draw_svg
from lora_accel.report.metrics_log import Series, read_metrics_log
from lora_accel.report.page import MAX_REPLY_STEPS, comparison_page, run_names, run_page
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


def test_smoothing_is_the_weighted_linear_fit_around_each_value() -> None:
    values, distance = np.array([4.0, np.nan, 2.0, 2.5, 7.0]), 3
    known = np.flatnonzero(np.isfinite(values))
    expected = np.full(5, np.nan)
    for index in known:
        weights = np.exp(-np.abs(known - index) / distance)
        expected[index] = np.polyfit(known - index, values[known], 1, w=np.sqrt(weights))[1]
    np.testing.assert_allclose(smooth(values, distance), expected, rtol=1e-12)
    np.testing.assert_allclose(smooth(np.array([np.nan, 4.0]), distance), [np.nan, 4.0], rtol=1e-12)


def test_smoothing_does_not_lag() -> None:
    line = 5 - 0.1 * np.arange(50.0)
    np.testing.assert_allclose(smooth(line, 3), line, rtol=1e-9)


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
    assert re.search(r"<td[^>]*>training.learning_rate</td><td[^>]*>0.001</td><td[^>]*>0.002</td>", text)
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


def eval_line(step: int, loss: Any, **values: Any) -> dict[str, Any]:
    return {"kind": "eval", "step": step, "eval_loss": loss, "eval_tokens": 9} | values


@pytest.mark.parametrize(
    ("losses", "notes"),
    [
        ([2.0], []),
        ([2.0, 1.0], ["evaluation loss: the last of 2 evaluations is the lowest"]),
        (
            [2.0, 1.0, "NaN", 1.5],
            ["evaluation loss: lowest after step 10, and higher since: 1 after step 10, 1.5000 after step 30"],
        ),
        (
            [2.0, 3.0],
            ["evaluation loss: lowest before training, and higher since: 2 before training, 3 after step 10"],
        ),
    ],
)
def test_page_reports_where_the_evaluation_loss_is_lowest(tmp_path: Path, losses: list[Any], notes: list[str]) -> None:
    lines = [train_line(1), *(eval_line(10 * number, loss) for number, loss in enumerate(losses))]
    assert run_page(read_run(write_run(tmp_path / "run", lines)))["notes"] == notes


def test_facts_show_the_change_by_training(tmp_path: Path) -> None:
    """The last training loss is a mean: that of one step is noise."""
    lines = [train_line(step, loss=loss) for step, loss in enumerate([4.0] * 18 + [1.0, 2.0], start=1)]
    lines += [eval_line(0, 3.25, eval_json_equal=0.0), eval_line(20, 0.123456, eval_json_equal=0.75)]
    facts = dict(run_page(read_run(write_run(tmp_path / "run", lines)))["facts"])
    assert facts == {"eval loss": "3.25 → 0.123", "eval json equal": "0 → 0.75", "training loss": "4 → 1.5"}


def run_of(folder: Path, loss: float, **training: Any) -> Path:
    config = {"output_dir": folder.name, "logging": {"run_name": folder.name}, "training": training}
    return write_run(folder, [train_line(1), eval_line(1, loss)], provenance={"config": config})


def test_compared_runs_are_named_with_what_differs(tmp_path: Path) -> None:
    """A value that most runs have is not named; a label that is too long is the name alone."""
    options = {"a": {}, "b": {}, "c": {"batch_size": 16}, "d": {"scheduler": "x" * 50}}
    defaults = {"batch_size": 8, "scheduler": "cosine"}
    runs = [read_run(run_of(tmp_path / name, 1.0, **(defaults | each))) for name, each in options.items()]
    assert run_names(runs) == ["a", "b", "c: batch_size 16", "d"]
    assert run_names(runs[1:3]) == ["b: batch_size 8", "c: batch_size 16"]


def test_comparison_begins_with_the_best_run(tmp_path: Path) -> None:
    runs = [read_run(run_of(tmp_path / name, loss, learning_rate=loss)) for name, loss in (("a", 0.5), ("b", 0.25))]
    page = comparison_page(runs, run_names(runs))
    assert page["subtitle"] == "Lowest evaluation loss: 0.2500, b: learning_rate 0.25"
    (_, _, _, [(_, figures)]), (_, _, _, [(_, differences)]) = page["first_sections"]
    assert [row[5] for row in figures.rows] == ["0.5000", "0.2500 (best)"]
    assert list(differences.rows) == [["training.learning_rate", "0.5", "0.25"]]


def test_charts_show_the_same_steps(tmp_path: Path) -> None:
    lines = [*(train_line(step) for step in range(1, 101)), eval_line(50, 1.0)]
    charts = charts_of([read_run(write_run(tmp_path / "run", lines))], ["run"])
    assert {chart.title: chart.last_step for chart in charts} == {
        "Training loss": 100,
        "Evaluation: loss": 100,
        "Learning rate": 100,
        "Gradient norm, before clipping": 100,
    }
    assert all(re.search(r"<text [^>]*>100</text>", draw_svg(chart)) for chart in charts)


def test_small_rates_have_labels_without_a_power_above_the_axis(tmp_path: Path) -> None:
    lines = [train_line(step, learning_rate=2e-4 * step) for step in range(1, 11)]
    (chart,) = [c for c in charts_of([read_run(write_run(tmp_path / "run", lines))], ["run"]) if "rate" in c.title]
    assert re.search(r"<text [^>]*>0.002</text>", draw_svg(chart))


def test_axis_of_a_metric_that_stays_zero_begins_at_zero(tmp_path: Path) -> None:
    lines = [train_line(1), *(eval_line(step, 1.0, eval_json_equal=0.0) for step in (0, 1))]
    charts = charts_of([read_run(write_run(tmp_path / "run", lines))], ["run"])
    (svg,) = [draw_svg(chart) for chart in charts if chart.title == "Evaluation: json equal"]
    assert not re.search(r"<text [^>]*>[\u2212-]0", svg)
