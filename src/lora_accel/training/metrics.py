"""Logging: progress bar, metrics.jsonl and trackers. Only the main process writes."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from tqdm import tqdm

from lora_accel.config.plan import Plan
from lora_accel.config.schema import RunConfig
from lora_accel.console import format_seconds
from lora_accel.errors import TrainingError, first_line
from lora_accel.paths import open_to_append, open_to_read
from lora_accel.saving.atomic import write_bytes
from lora_accel.saving.metrics_file import METRICS_FILE
from lora_accel.saving.output_dir import FolderIdentity
from lora_accel.training.loss import perplexity
from lora_accel.training.progress import StepResult
from lora_accel.training.replies import FailedReply
from lora_accel.training.trackers import log_replies, start_trackers

EVALUATION_EVENTS = ("reply", "reply_failed", "metric_failed")
"""Events of an evaluation, which a resumed run repeats."""
REFRESH_SECONDS = 1.0
"""Interval at which the progress bar is redrawn within a step."""
LONG_STEP_SECONDS = 5.0
"""If the first step is estimated to take longer, the estimate is printed."""
WINDOW = 50
"""Number of recent steps from which the remaining time is computed."""


class Pace:
    """Measures the time per step and estimates the remaining time. The first step, a warm-up, does not count."""

    def __init__(self, start: int, total_steps: int, now: float) -> None:
        self._total, self._estimate = total_steps, 0.0
        self._ends: deque[tuple[int, float]] = deque([(start, now)], maxlen=WINDOW + 1)
        self._is_warm = False

    def end_step(self, step: int, now: float) -> None:
        """Record the end of a step."""
        if not self._is_warm:
            self._estimate = now - self._ends[-1][1]
            self._ends.clear()
            self._is_warm = True
        self._ends.append((step, now))

    def begin_first_step(self, now: float) -> None:
        """Record that the first step begins now. Later calls have no effect."""
        if not self._is_warm:
            self._ends[0] = (self._ends[0][0], now)

    def estimate(self, seconds: float) -> None:
        """Set the estimated time per step. Used until the first step ends."""
        if not self._is_warm:
            self._estimate = seconds

    @property
    def seconds_per_step(self) -> float | None:
        """Return the mean time of recent steps, including saving and evaluation between them; None = not known yet."""
        (first, start), (last, end) = self._ends[0], self._ends[-1]
        if self._is_warm and last > first:
            return (end - start) / (last - first)
        return self._estimate or None

    def seconds_left(self, now: float) -> float | None:
        """Return the estimated time of the remaining steps; None = not known yet."""
        last, end = self._ends[-1]
        per_step = self.seconds_per_step
        return None if per_step is None else max(0.0, (self._total - last) * per_step - min(now - end, per_step))


def format_clock(seconds: float | None) -> str:
    """Return a duration as `0:07`, `3:20` or `1:18:00`; None as `?`."""
    if seconds is None:
        return "?"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def format_step_estimate(step: int, total_steps: int, done: int, count: int, seconds: float) -> str:
    """Return the estimate to print for a long first step.

    Args:
        done: micro-batches of the step that are done.
        count: micro-batches of the step.
        seconds: time since the step began.
    """
    per_step = seconds * count / done
    steps = total_steps - step + 1
    return (
        f"step {step}: micro-batch {done} of {count} took {format_seconds(seconds)}; "
        f"about {format_seconds(per_step)} per step, {format_seconds(per_step * steps)} for {steps:,} steps"
    )


class Bar:
    """The progress bar: step, loss, remaining time. Not shown if stderr is not a terminal.

    A thread redraws it, so that the remaining time counts down within a long step.
    """

    def __init__(self, plan: Plan, start: int, pace: Pace) -> None:
        self._total, self._pace, self._step = plan.total_steps, pace, start
        self.loss: float | None = None
        self.activity = ""
        """Shown instead of the remaining time."""
        self._closing = threading.Event()
        self._bar = tqdm(
            total=plan.total_steps,
            initial=start,
            disable=None,  # = unless stderr is a terminal
            ncols=_bar_width(),
            bar_format=self._format(),
        )
        self.is_shown = not self._bar.disable
        self._thread = threading.Thread(target=self._redraw, daemon=True)
        if self.is_shown:
            self._thread.start()

    def move(self, step: int, fraction: float = 0.0) -> None:
        """Move to the end of a step, plus a fraction of the next one."""
        self._step, self._bar.n = step, step + fraction
        self._draw()

    def close(self) -> None:
        """Stop redrawing."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join()
            self._draw()
        self._bar.close()

    def _redraw(self) -> None:
        while not self._closing.wait(REFRESH_SECONDS):
            self._draw()

    def _draw(self) -> None:
        if not self.is_shown:
            return
        self._bar.ncols, self._bar.bar_format = _bar_width(), self._format()
        self._bar.refresh()  # takes tqdm's lock

    def _format(self) -> str:
        loss = "" if self.loss is None else f"loss {self.loss:.4f}  "
        left = self.activity or f"left {format_clock(self._pace.seconds_left(time.perf_counter()))}"
        return f"step {self._step:,}/{self._total:,} |{{bar}}| {loss}{left}"


def _bar_width() -> int:
    return shutil.get_terminal_size().columns - len(" ^C")  # which the terminal prints after the bar


class Metrics:
    """The log of a run. Each line is written in one call, so a killed run leaves at most one incomplete line.

    A log that cannot be written ends the run with a message; a tracker that fails is left out, with a note.
    """

    def __init__(self, accelerator: Accelerator, folder: Path, plan: Plan, start: int) -> None:
        """Open the log and remove the lines after the step that the run resumes from.

        Args:
            folder: the run folder.
            start: step to resume from, 0 = a new run.

        Raises:
            TrainingError: the log cannot be written.
        """
        self._accelerator = accelerator
        self._plan = plan
        self._start_time = self._log_time = self._step_time = time.perf_counter()  # of the run, last line, last step
        self._tokens = 0  # real tokens since the last line, over all ranks
        self._is_main = accelerator.is_main_process
        self._path = folder / METRICS_FILE
        self._identity = FolderIdentity.of(folder) if self._is_main else None
        if self._is_main:
            with self._writing():
                truncate_log(self._path, start, drop_evaluation=plan.evaluates_after(start))
        self._start = self._step = start
        self._pace = Pace(start, plan.total_steps, self._start_time)
        self._bar = Bar(plan, start, self._pace) if self._is_main else None
        self.loss: float | None = None
        """Loss of the last step that was logged."""
        self.eval_loss: float | None = None
        """Loss of the last evaluation."""

    @property
    def elapsed_seconds(self) -> float:
        """Return the time since this process started training."""
        return time.perf_counter() - self._start_time

    def begin(self) -> None:
        """Record that the next step begins now."""
        self._step_time = time.perf_counter()
        self._pace.begin_first_step(self._step_time)

    def note_micro_batch(self, done: int, count: int) -> None:
        """Move the bar within a step. After the first micro-batch of the run, estimate the time per step (CPU only).

        Args:
            done: micro-batches of the step that are done.
            count: micro-batches of the step.
        """
        if self._bar is None:
            return
        self._bar.move(self._step, min(done / count, 0.999))
        # On other devices the micro-batch is launched, but not computed yet.
        if done == 1 and self._step == self._start and self._accelerator.device.type == "cpu":
            seconds = time.perf_counter() - self._step_time
            self._pace.estimate(seconds * count)
            if seconds * count >= LONG_STEP_SECONDS:
                estimate = format_step_estimate(self._step + 1, self._plan.total_steps, done, count, seconds)
                tqdm.write(estimate, file=sys.stderr)

    def finish_step(self, step: int, result: StepResult) -> None:
        """Record the end of a step and move the bar."""
        self._tokens += result.batch.num_tokens
        self._step, self._step_time = step, time.perf_counter()
        self._pace.end_step(step, self._step_time)
        if self._bar is not None:
            self._bar.loss = result.loss
            self._bar.move(step)

    @contextlib.contextmanager
    def activity(self, name: str) -> Iterator[None]:
        """Show an activity other than training, such as `evaluating`, within the block."""
        if self._bar is not None:
            self._bar.activity = name
            if not self._bar.is_shown:
                print(f"step {self._step:,}: {name}", file=sys.stderr, flush=True)
        began = time.perf_counter()
        try:
            yield
        finally:
            if self._bar is not None:
                self._bar.activity = ""
            self.begin()
            self._log_time += self._step_time - began  # throughput is that of training

    def log_step(self, step: int, result: StepResult) -> None:
        """Log a train line. Its throughput covers the steps since the last line."""
        now = time.perf_counter()
        tokens_per_second = self._tokens / (now - self._log_time)
        self._log_time, self._tokens = now, 0
        batch = result.batch
        self._write(
            {
                "kind": "train",
                "step": step,
                "epoch": step / self._plan.steps_per_epoch,
                "loss": result.loss,
                "learning_rate": result.learning_rate,
                "grad_norm": result.grad_norm,
                "examples": batch.num_examples,
                "tokens": batch.num_tokens,
                "computed_tokens": batch.num_computed_tokens,
                "supervised_tokens": batch.num_supervised_tokens,
                "tokens_per_second": tokens_per_second,
                "elapsed_seconds": now - self._start_time,
                "peak_memory_bytes": peak_memory_bytes(self._accelerator.device),
                "peak_process_bytes": peak_memory_bytes(torch.device("cpu")),
            }
        )
        self.loss = result.loss
        if self._bar is not None and not self._bar.is_shown:
            left = format_clock(self._pace.seconds_left(time.perf_counter()))
            print(
                f"step {step:,}/{self._plan.total_steps:,}  loss {result.loss:.4f}  lr {result.learning_rate:.1e}  "
                f"{tokens_per_second:,.0f} tokens/s  left {left}",
                file=sys.stderr,
                flush=True,
            )

    def log_evaluation(self, step: int, values: dict[str, Any]) -> None:
        """Log an eval line, and each reply to a prompt as an event.

        Args:
            values: as returned by `Evaluator.evaluate`; modified.
        """
        replies, failure = values.pop("replies", []), values.pop("metric_failed", None)
        if "eval_loss" in values:
            self.eval_loss = values["eval_loss"]
            values["eval_perplexity"] = perplexity(values["eval_loss"])
        if values:
            self._write({"kind": "eval", "step": step, **values})
            self.print(f"step {step}: {_format_evaluation(values)}")
            for name, source in values.get("sources", {}).items():
                self.print(f"step {step}: {_format_evaluation(source)} on {name}")
        if failure is not None:
            self.log_event(step, "metric_failed", error=failure)
            self.print(f"step {step}: {failure}")
        for prompt, reply in replies:
            if isinstance(reply, FailedReply):
                self.log_event(step, "reply_failed", prompt=prompt, error=reply.error)
                self.print(f"step {step}: no reply to {prompt!r}: {reply.error}")
            else:
                self._write({"kind": "event", "event": "reply", "step": step, "prompt": prompt, "reply": reply})
                self.print(f"step {step}: {prompt!r} -> {reply!r}")
        texts = [(prompt, reply) for prompt, reply in replies if isinstance(reply, str)]
        if texts:
            with self._tracking():
                log_replies(self._accelerator.trackers if self._is_main else [], step, texts)

    def log_event(self, step: int, event: str, **values: Any) -> None:
        """Log an event."""
        self._write({"kind": "event", "event": event, "step": step, **values})

    def print(self, text: str) -> None:
        """Print a line without breaking the bar."""
        if self._is_main:
            tqdm.write(text)

    def sync(self) -> None:
        """Flush the log to disk, so that it is never behind a checkpoint.

        Raises:
            TrainingError: the log cannot be written, or the run folder was moved or deleted.
        """
        if self._is_main:
            with self._writing(), open_to_append(self._path) as file:
                os.fsync(file.fileno())

    def start_trackers(self, config: RunConfig) -> None:
        """Start the trackers of `logging.trackers`.

        Raises:
            TrainingError: one cannot be started.
        """
        threading.excepthook = _hide_writer_errors
        start_trackers(self._accelerator, config, self._start)

    def close(self) -> None:
        """Close the bar and the trackers."""
        if self._bar is not None:
            self._bar.close()
        # Accelerator.end_training would also destroy the process group.
        for tracker in self._accelerator.trackers:
            try:
                tracker.finish()
            except Exception as error:
                self._drop_trackers(error)
        threading.excepthook = threading.__excepthook__

    def _write(self, line: dict[str, Any]) -> None:
        if not self._is_main:
            return
        with self._writing(), open_to_append(self._path) as file:
            file.write((json.dumps(line, ensure_ascii=False) + "\n").encode())
        if line["kind"] != "event":
            with self._tracking():
                self._accelerator.log(_flat(line["kind"], line), step=line["step"])

    @contextlib.contextmanager
    def _tracking(self) -> Iterator[None]:
        """Continue without trackers if one fails within the block."""
        try:
            yield
        except Exception as error:  # each library raises its own
            self._drop_trackers(error)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Raise `TrainingError` in place of an error while the log is written, or if the run folder was moved."""
        assert self._identity is not None
        self._identity.check()
        try:
            yield
        except OSError as error:
            self._identity.check()
            raise TrainingError(
                f"{self._path}: cannot be written: {error.strerror or error}. Checkpoints are intact; make room or "
                "allow the write, and run the same command to resume"
            ) from error

    def _drop_trackers(self, error: Exception) -> None:
        """Continue without trackers."""
        self._accelerator.trackers = []
        note = f"note: a tracker of logging.trackers failed: {first_line(error)}; training continues without it"
        tqdm.write(note, file=sys.stderr)


def _format_evaluation(values: Mapping[str, Any]) -> str:
    """Return the values of an eval line as text: `eval loss 1.2345, exact_match 0.5000`."""
    names = [key for key in values if key not in ("eval_tokens", "eval_perplexity", "sources", "fingerprint")]
    return "eval " + ", ".join(f"{_title(name)} {values[name]:.4f}" for name in names)


def _title(key: str) -> str:
    return key.removeprefix("eval_").replace("neutral_loss", "neutral loss")


def _hide_writer_errors(args: threading.ExceptHookArgs) -> None:
    """Print no traceback if TensorBoard's writing thread fails: its error is raised again at the next line."""
    if not isinstance(args.exc_value, OSError) or not type(args.thread).__module__.startswith("tensorboard"):
        threading.__excepthook__(args)


def _flat(prefix: str, values: Mapping[str, Any]) -> dict[str, float]:
    """Return the values of a line under their tracker names, such as train/loss or eval/sources/PATH/eval_loss."""
    flat: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(f"{prefix}/{key}", value)
        elif key not in ("kind", "step", "fingerprint"):
            flat[f"{prefix}/{key}"] = value
    return flat


def truncate_log(path: Path, step: int, *, drop_evaluation: bool = False) -> None:
    """Remove the lines after `step`, which the resumed run logs again, and invalid lines, such as an incomplete one.

    Args:
        drop_evaluation: whether to remove the evaluation of `step` too, because it is repeated.
    """
    if not path.exists():
        return
    with open_to_read(path) as file:
        lines = file.read().split(b"\n")
    kept = []
    for text in lines:  # bytes: an incomplete line may end within a character
        try:
            line = json.loads(text)
            is_evaluation = line["kind"] == "eval" or line.get("event") in EVALUATION_EVENTS
            keep = line["step"] < step + (not (drop_evaluation and is_evaluation))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue
        if keep:
            kept.append(text + b"\n")
    write_bytes(path, b"".join(kept))


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak memory so far, in bytes: allocated on the device, or of the process on the CPU and MPS."""
    if device.type not in ("cpu", "mps"):
        return int(torch.get_device_module(device).max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
