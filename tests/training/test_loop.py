"""The training loop: steps do not depend on micro-batches, skipped steps, graceful stops, evaluation and resuming."""

from __future__ import annotations

import itertools
import json
import math
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lora_accel import RunConfig, faults, run_training
from lora_accel.errors import Interrupted, TrainingError
from lora_accel.randomness import derive_seed
from lora_accel.saving.atomic import why_invalid
from lora_accel.saving.discovery import OPTIMIZER, STATE, WEIGHTS
from lora_accel.training import step as step_module
from tests.conftest import chat_rows, read_metrics, write_jsonl

BATCH_OPTIONS = {
    "1 at once": {"micro_batch_size": 1, "gradient_accumulation_steps": 4},
    "2 at once": {"micro_batch_size": 2, "gradient_accumulation_steps": 2},
    "4 at once": {"micro_batch_size": 4, "gradient_accumulation_steps": 1},
    "few tokens": {"batch_size": 4, "micro_batch_tokens": 1},
    "some tokens": {"batch_size": 4, "micro_batch_tokens": 90},
    "all tokens": {"batch_size": 4, "micro_batch_tokens": 10_000},
}


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_loss_and_gradient_do_not_depend_on_micro_batches(
    make_config: Callable[..., RunConfig], tiny_model: Callable[..., Path], tmp_path: Path, family: str
) -> None:
    losses, norms, adapters, shapes = {}, {}, {}, {}
    for name, options in BATCH_OPTIONS.items():
        values = json.loads(make_config().model_dump_json())
        training = {"learning_rate": 1e-3, "warmup_steps": 1, "max_steps": 6, "mixed_precision": "no"} | options
        config = RunConfig.model_validate(
            values
            | {
                "output_dir": str(tmp_path / name),
                "model": {"name_or_path": str(tiny_model(family)), "dtype": "float32"},
                "adapter": {"r": 4, "alpha": 8, "dropout": 0.1, "target_modules": "all-linear"},
                "training": training,
            }
        )
        adapters[name] = load_file(run_training(config) / WEIGHTS)
        lines = read_metrics(tmp_path / name)
        losses[name] = [line["loss"] for line in lines]
        norms[name] = [line["grad_norm"] for line in lines]
        shapes[name] = [(line["examples"], line["tokens"], line["supervised_tokens"]) for line in lines]

    reference = "all tokens"
    assert len(losses[reference]) == 6
    assert {count for count, _, _ in shapes[reference]} == {4, 1}, "the last step of an epoch is short"
    for name in BATCH_OPTIONS:
        assert shapes[name] == shapes[reference]
        assert losses[name] == pytest.approx(losses[reference], rel=1e-6), name
        assert norms[name] == pytest.approx(norms[reference], rel=1e-5), name
        for tensor, expected in adapters[reference].items():
            difference = (adapters[name][tensor] - expected).norm() / expected.norm()
            assert difference < 1e-4, (name, tensor)
    assert losses["few tokens"] != losses["all tokens"], "other micro-batches, other rounding"


def test_step_loss_is_the_mean_over_tokens(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    """The first step's loss, at the initial weights, is the mean over its tokens of each example's loss."""
    single = make_config(
        output_dir=str(tmp_path / "single"),
        adapter={"dropout": 0.0},
        training={"batch_size": 1, "max_steps": 4, "learning_rate": 1e-30},
    )
    batched = make_config(
        output_dir=str(tmp_path / "batched"),
        adapter={"dropout": 0.0},
        training={"batch_size": 4, "max_steps": 1, "learning_rate": 1e-30},
    )
    run_training(single)
    run_training(batched)
    lines = read_metrics(tmp_path / "single")
    tokens = [line["supervised_tokens"] for line in lines]
    losses = [line["loss"] for line in lines]
    (step,) = read_metrics(tmp_path / "batched")
    by_token = sum(n * loss for n, loss in zip(tokens, losses, strict=True)) / sum(tokens)
    by_example = sum(losses) / 4
    assert step["supervised_tokens"] == sum(tokens)
    assert step["loss"] == pytest.approx(by_token, rel=1e-6)
    assert abs(by_example - by_token) > 1e-4 * by_token, "the two means differ"


def test_gradient_norm_is_logged_before_clipping(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    first = {}
    for limit in (1e-3, 1e3):
        config = make_config(output_dir=str(tmp_path / str(limit)), training={"max_grad_norm": limit, "max_steps": 2})
        run_training(config)
        first[limit] = read_metrics(tmp_path / str(limit))[0]["grad_norm"]
    assert first[1e-3] == first[1e3] > 1e-3


def test_step_seeds_are_stable() -> None:
    """Golden values: resumed runs need the same seeds."""
    assert derive_seed(0, 0) == 0xE220A8397B1DCDAF  # SplitMix64's published first output for seed 0
    assert derive_seed(0, 1) == 0x6E789E6AA1B965F4
    assert derive_seed(0, 2) == 0x06C45D188009454F


def test_step_seeds_are_distinct() -> None:
    seeds = [derive_seed(seed, step) for seed in (0, 1, 2, 7, 2**32 - 1) for step in range(2000)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**64 for seed in seeds)


def test_dropout_differs_between_steps_and_is_reproducible(
    make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """With one row and a learning rate of nearly 0, only the dropout mask differs between steps."""
    rows = tmp_path / "one.jsonl"
    rows.write_text(json.dumps({"messages": [
        {"role": "user", "content": "repeat alpha bravo charlie"},
        {"role": "assistant", "content": "alpha bravo charlie delta echo"},
    ]}) + "\n")  # fmt: skip

    def losses(name: str, seed: int) -> list[float]:
        config = make_config(
            output_dir=str(tmp_path / name),
            seed=seed,
            adapter={"dropout": 0.5, "init_lora_weights": False},
            data={"train": [{"path": str(rows)}]},
            training={"batch_size": 1, "max_steps": 4, "learning_rate": 1e-30},
        )
        run_training(config)
        return [line["loss"] for line in read_metrics(tmp_path / name)]

    first = losses("first", 0)
    assert len(set(first)) == 4
    assert losses("again", 0) == first
    assert losses("other", 1) != first


# Skipped steps, and graceful stops

ONE_FORWARD = {"micro_batch_tokens": 10_000, "warmup_steps": 0}
EXACT = ("step", "epoch", "loss", "learning_rate", "grad_norm", "examples", "tokens", "supervised_tokens")

At = Callable[..., None]


@pytest.fixture
def handlers() -> Iterator[dict[signal.Signals, Any]]:
    """Install handlers that do nothing, since pytest may run under nohup, and restore its own after the test."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
    own = {number: signal.signal(number, lambda *_: None) for number in numbers}
    yield {number: signal.getsignal(number) for number in numbers}
    for number, handler in own.items():
        signal.signal(number, handler)


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> At:
    """Return a function that injects events: `at({3: "nan"}, stop_in=4)`.

    Step 3 has a loss that is not finite, and in step 4 the process gets a signal. `start` is the step that the run
    resumes from.
    """
    original = step_module.summed_token_loss

    def plan(events: dict[int, str], start: int = 0, stop_in: int = 0, number: int = signal.SIGTERM) -> None:
        steps = itertools.count(start + 1)

        def patched(*args: Any) -> torch.Tensor:
            step = next(steps)
            if step == stop_in:
                signal.raise_signal(number)
            loss, event = original(*args), events.get(step)
            if event == "gradient":  # finite loss, infinite gradient: d sqrt(x)/dx at 0
                return loss + (loss * 0).sqrt()
            return loss if event is None else loss * float(event)

        monkeypatch.setattr(step_module, "summed_token_loss", patched)

    return plan


def exact(folder: Path) -> list[tuple[object, ...]]:
    return [tuple(line[key] for key in EXACT) for line in read_metrics(folder)]


def event_steps(folder: Path, event: str) -> list[int]:
    return [line["step"] for line in read_metrics(folder, "event") if line["event"] == event]


def saved_state(folder: Path, step: int) -> tuple[bytes, bytes]:
    """Return the bytes of a checkpoint's weights and moments."""
    checkpoint = folder / "checkpoints" / f"step-{step:08d}"
    assert why_invalid(checkpoint) is None
    return (checkpoint / WEIGHTS).read_bytes(), (checkpoint / OPTIMIZER).read_bytes()


@pytest.mark.parametrize("event", ["nan", "inf", "-inf", "gradient"])
def test_nonfinite_step_is_skipped_without_an_update(make_config: Callable[..., RunConfig], at: At, event: str) -> None:
    config = make_config(training=ONE_FORWARD | {"skip_nonfinite": 1}, checkpoint={"every_steps": 1, "keep_last": 10})
    folder = Path(config.output_dir)
    at({3: event})
    adapter = run_training(config)
    assert saved_state(folder, 3) == saved_state(folder, 2), "neither weights nor moments change"
    assert saved_state(folder, 4) != saved_state(folder, 3)
    states = [json.loads(path.read_text()) for path in sorted(folder.glob(f"checkpoints/*/{STATE}"))]
    assert [(state["step"], state["skipped"]) for state in states] == [(1, 0), (2, 0), (3, 1), (4, 1), (5, 1), (6, 1)]
    assert [line["step"] for line in read_metrics(folder)] == [1, 2, 4, 5, 6], "no train line for a skipped step"
    (skipped,) = [line for line in read_metrics(folder, "event") if line["event"] == "skipped"]
    assert skipped["step"] == 3
    assert not math.isfinite(float(skipped["loss"] if event != "gradient" else skipped["grad_norm"]))
    assert json.loads((folder / "status.json").read_text())["state"] == "done"
    assert all(tensor.isfinite().all() for tensor in load_file(adapter / WEIGHTS).values())


def test_too_many_nonfinite_steps_stop_the_run_and_list_the_rows(
    make_config: Callable[..., RunConfig], at: At, rows_file: Path
) -> None:
    config = make_config(training=ONE_FORWARD | {"skip_nonfinite": 1}, checkpoint={"every_steps": 2})
    folder = Path(config.output_dir)
    at({2: "nan", 5: "nan"})
    with pytest.raises(TrainingError, match="step 5: loss nan, gradient norm nan at learning rate") as stopped:
        run_training(config)
    assert re.search(rf"on the rows {re.escape(str(rows_file))}, rows \d+, \d+, \d+, \d+\. ", str(stopped.value))
    assert "training.skip_nonfinite=2" in str(stopped.value)
    assert stopped.value.exit_code == 3
    assert event_steps(folder, "skipped") == [2]
    assert [path.name for path in sorted((folder / "checkpoints").iterdir())] == ["step-00000002", "step-00000004"]

    # A resumed run counts the skipped steps of its checkpoint.
    at({5: "nan"}, start=4)
    with pytest.raises(TrainingError, match="step 5: loss nan"):
        run_training(config)
    assert json.loads((folder / "checkpoints" / "step-00000004" / STATE).read_text())["skipped"] == 1


def test_skipped_events_list_the_rows_of_the_step(
    make_config: Callable[..., RunConfig], at: At, rows_file: Path, tmp_path: Path
) -> None:
    """All steps of the second epoch are skipped; their events list every row of both files once."""
    other = write_jsonl(tmp_path / "other.jsonl", chat_rows(4))
    config = make_config(
        data={"train": [{"path": str(rows_file)}, {"path": str(other)}]},
        training=ONE_FORWARD | {"skip_nonfinite": 7, "epochs": 2},
    )
    at(dict.fromkeys(range(8, 15), "nan"))
    run_training(config)
    all_rows = []
    for line in read_metrics(Path(config.output_dir), "event"):
        if line["event"] == "skipped":
            parts = [re.fullmatch(r"(\S+), rows? ([\d, ]+)", part) for part in line["rows"].split("; ")]
            rows = [(part[1], int(number)) for part in parts if part for number in part[2].split(", ")]
            assert len(rows) == (4 if line["step"] < 14 else 1)
            all_rows += rows
    assert sorted(all_rows) == [(str(other), n) for n in range(1, 5)] + [(str(rows_file), n) for n in range(1, 22)]
    assert [line["step"] for line in read_metrics(Path(config.output_dir))] == list(range(1, 8))


@pytest.mark.parametrize("event", ["saved_state", "stopped"])
def test_first_step_can_be_skipped_and_saved(
    make_config: Callable[..., RunConfig], at: At, tmp_path: Path, event: str
) -> None:
    """Adam has no moments before its first update."""
    options = {"training": ONE_FORWARD | {"skip_nonfinite": 1}, "checkpoint": {"every_steps": 1, "keep_last": 10}}
    at({1: "nan"})
    run_training(make_config(output_dir=str(tmp_path / "uninterrupted"), **options))
    assert why_invalid(tmp_path / "uninterrupted" / "checkpoints" / "step-00000001") is None

    config = make_config(output_dir=str(tmp_path / "stopped"), **options)
    at({1: "nan"}, stop_in=1 if event == "stopped" else 2)
    with pytest.raises(Interrupted):
        run_training(config)
    at({}, start=1 if event == "stopped" else 2)
    run_training(config)
    assert exact(tmp_path / "stopped") == exact(tmp_path / "uninterrupted")
    assert saved_state(tmp_path / "stopped", 6) == saved_state(tmp_path / "uninterrupted", 6)


def test_nonfinite_step_stops_the_run_by_default(make_config: Callable[..., RunConfig], at: At) -> None:
    at({3: "gradient"})
    with pytest.raises(TrainingError, match=r"step 3: loss \d.*, gradient norm nan"):
        run_training(make_config(training=ONE_FORWARD))


def test_run_with_a_skipped_step_resumes_bitwise(make_config: Callable[..., RunConfig], at: At, tmp_path: Path) -> None:
    """Adam's bias correction depends on the number of updates, which must not include skipped steps."""
    options = {"training": ONE_FORWARD | {"skip_nonfinite": 1}, "checkpoint": {"every_steps": 100}}
    uninterrupted = make_config(output_dir=str(tmp_path / "uninterrupted"), **options)
    at({2: "nan"})
    run_training(uninterrupted)
    stopped = make_config(output_dir=str(tmp_path / "stopped"), **options)
    at({2: "nan"}, stop_in=3)
    with pytest.raises(Interrupted):
        run_training(stopped)
    at({}, start=3)
    run_training(stopped)
    assert exact(tmp_path / "stopped") == exact(tmp_path / "uninterrupted")
    assert saved_state(tmp_path / "stopped", 6) == saved_state(tmp_path / "uninterrupted", 6)


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 143), (signal.SIGHUP, 143)],
    ids=lambda value: str(getattr(value, "name", value)),
)
def test_signal_saves_after_the_step_and_the_run_resumes_bitwise(
    make_config: Callable[..., RunConfig],
    at: At,
    tmp_path: Path,
    handlers: dict[signal.Signals, Any],
    number: signal.Signals,
    code: int,
) -> None:
    options = {"training": ONE_FORWARD, "checkpoint": {"every_steps": 100}}
    uninterrupted = make_config(output_dir=str(tmp_path / "uninterrupted"), **options)
    run_training(uninterrupted)
    stopped = make_config(output_dir=str(tmp_path / "stopped"), **options)
    folder = tmp_path / "stopped"
    before = handlers[number]
    at({}, stop_in=3, number=number)
    with pytest.raises(Interrupted) as caught:
        run_training(stopped)
    assert caught.value.exit_code == code
    assert str(caught.value).startswith(f"stopped by {number.name} on rank 0 after step 3; checkpoint saved")
    assert signal.getsignal(number) == before
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000003"]
    assert [line["step"] for line in read_metrics(folder)] == [1, 2, 3]
    (event,) = [line for line in read_metrics(folder, "event") if line["event"] == "stopped"]
    assert (event["step"], event["cause"]) == (3, number.name)
    status = json.loads((folder / "status.json").read_text())
    assert (status["state"], status["step"]) == ("preempted", 3)
    assert not (folder / "adapter").exists()

    at({})
    run_training(stopped)
    assert event_steps(folder, "resume") == [3]
    assert exact(folder) == exact(tmp_path / "uninterrupted")
    assert saved_state(folder, 6) == saved_state(tmp_path / "uninterrupted", 6)
    assert (folder / "adapter" / WEIGHTS).read_bytes() == (
        tmp_path / "uninterrupted" / "adapter" / WEIGHTS
    ).read_bytes()


def test_run_stopped_in_the_last_step_exports_its_adapter_on_resume(
    make_config: Callable[..., RunConfig], at: At
) -> None:
    config = make_config(training=ONE_FORWARD)
    folder = Path(config.output_dir)
    at({}, stop_in=6)
    with pytest.raises(Interrupted):
        run_training(config)
    assert not (folder / "adapter").exists()
    run_training(config)
    assert [line["step"] for line in read_metrics(folder)] == [1, 2, 3, 4, 5, 6]
    assert (folder / "adapter" / WEIGHTS).exists()


def test_stop_after_a_skipped_step(make_config: Callable[..., RunConfig], at: At) -> None:
    config = make_config(training=ONE_FORWARD | {"skip_nonfinite": 1}, checkpoint={"every_steps": 100})
    folder = Path(config.output_dir)
    at({3: "nan"}, stop_in=3)
    with pytest.raises(Interrupted, match="after step 3"):
        run_training(config)
    state = json.loads((folder / "checkpoints" / "step-00000003" / STATE).read_text())
    assert (state["step"], state["skipped"]) == (3, 1)


# Evaluation comes after saving


@pytest.fixture
def with_evaluation(make_config: Callable[..., RunConfig], tmp_path: Path) -> Callable[..., RunConfig]:
    """Return a function that makes a config that evaluates and saves after steps 3 and 6."""
    held_out = write_jsonl(tmp_path / "held_out.jsonl", chat_rows(5))

    def make(name: str, **changes: Any) -> RunConfig:
        values = {
            "data": {"eval": [{"path": str(held_out)}]},
            "evaluation": {"every_steps": 3, "prompts": ["repeat alpha"], "max_new_tokens": 4, "at_start": False},
            "checkpoint": {"every_steps": 3},
            "training": ONE_FORWARD,
        }
        return make_config(output_dir=str(tmp_path / name), **(values | changes))

    return make


def log_lines(folder: Path) -> list[tuple[str, int]]:
    """Return (kind or event, step) of the lines in the log, except for the events of starting and stopping."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kinds = [(line.get("event", line["kind"]), line["step"]) for line in lines]
    return [(kind, step) for kind, step in kinds if kind not in ("start", "stopped", "resume", "done")]


def evaluations(folder: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["eval_loss"]) for line in read_metrics(folder, "eval")]


def test_crash_during_evaluation_repeats_the_evaluation_on_resume(
    with_evaluation: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_training(with_evaluation("uninterrupted"))
    config, folder = with_evaluation("died"), tmp_path / "died"
    fault = faults.Fault("evaluate.begin", 1, "enospc", None)
    monkeypatch.setattr(faults, "active_fault", lambda: fault)
    with pytest.raises(OSError, match=r"injected at evaluate\.begin"):
        run_training(config)
    assert saved_state(folder, 3) == saved_state(tmp_path / "uninterrupted", 3)
    assert evaluations(folder) == []
    run_training(config)
    assert event_steps(folder, "resume") == [3]
    assert log_lines(folder) == log_lines(tmp_path / "uninterrupted")
    assert [kind for kind, step in log_lines(folder) if step == 3] == ["train", "eval", "reply"]
    assert evaluations(folder) == evaluations(tmp_path / "uninterrupted")
    assert exact(folder) == exact(tmp_path / "uninterrupted")


def test_stop_before_an_evaluation_evaluates_on_resume(
    with_evaluation: Callable[..., RunConfig], at: At, tmp_path: Path
) -> None:
    """A run that was asked to stop has little time, so the resumed run evaluates."""
    run_training(with_evaluation("uninterrupted"))
    config, folder = with_evaluation("stopped"), tmp_path / "stopped"
    at({}, stop_in=3)
    with pytest.raises(Interrupted, match="after step 3"):
        run_training(config)
    assert evaluations(folder) == []
    at({})
    run_training(config)
    assert log_lines(folder) == log_lines(tmp_path / "uninterrupted")
    assert evaluations(folder) == evaluations(tmp_path / "uninterrupted")


def test_resumed_run_evaluates_only_if_due(with_evaluation: Callable[..., RunConfig], at: At, tmp_path: Path) -> None:
    config, folder = with_evaluation("stopped"), tmp_path / "stopped"
    at({}, stop_in=4)
    with pytest.raises(Interrupted, match="after step 4"):
        run_training(config)
    at({})
    run_training(config)
    assert [step for step, _ in evaluations(folder)] == [3, 6]
    assert [step for kind, step in log_lines(folder) if kind == "reply"] == [3, 6]


def test_restarted_finished_run_logs_each_evaluation_once(
    with_evaluation: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config, folder = with_evaluation("run"), tmp_path / "run"
    run_training(config)
    before = evaluations(folder), log_lines(folder)
    run_training(config)
    assert (evaluations(folder), log_lines(folder)) == before
