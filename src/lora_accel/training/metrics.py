"""What is told on the way: progress bar, metrics.jsonl, trackers. Only the main process writes."""

from __future__ import annotations

import contextlib
import json
import math
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
from lora_accel.console import format_seconds
from lora_accel.saving.atomic import write_bytes
from lora_accel.training.progress import StepResult

REFRESH_SECONDS = 1.0
"""The bar moves this often within a long step."""
LONG_STEP_SECONDS = 5.0
"""Before a step that takes longer, its duration is estimated from its first micro-batch."""
WINDOW = 50
"""The time left follows from so many of the last steps."""


class Pace:
    """How long a step takes, and so how long is left. The first step since the start warms up and is not counted."""

    def __init__(self, start: int, total_steps: int, now: float) -> None:
        self._total, self._estimate = total_steps, 0.0
        self._ends: deque[tuple[int, float]] = deque([(start, now)], maxlen=WINDOW + 1)
        self._is_warm = False

    def end_step(self, step: int, now: float) -> None:
        """Note the end of a step."""
        if not self._is_warm:
            self._estimate = now - self._ends[-1][1]
            self._ends.clear()
            self._is_warm = True
        self._ends.append((step, now))

    def restart(self, now: float) -> None:
        """Note that the first step has not begun before now."""
        if not self._is_warm:
            self._ends[0] = (self._ends[0][0], now)

    def estimate(self, seconds: float) -> None:
        """Note how long a step will take, before one has ended."""
        if not self._is_warm:
            self._estimate = seconds

    @property
    def seconds_per_step(self) -> float | None:
        """Return the mean over the last steps, saving and evaluation between them included; None = not known yet."""
        (first, began), (last, ended) = self._ends[0], self._ends[-1]
        if self._is_warm and last > first:
            return (ended - began) / (last - first)
        return self._estimate or None

    def seconds_left(self, now: float) -> float | None:
        """Return how long the remaining steps will take; None = not known yet."""
        last, ended = self._ends[-1]
        each = self.seconds_per_step
        return None if each is None else max(0.0, (self._total - last) * each - min(now - ended, each))


def format_clock(seconds: float | None) -> str:
    """Return a duration as `0:07`, `3:20` or `1:18:00`; None as `?`."""
    if seconds is None:
        return "?"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def format_step_estimate(step: int, total_steps: int, done: int, count: int, seconds: float) -> str:
    """Return what is shown of a long first step.

    Args:
        done, count: micro-batches of the step so far, and all.
        seconds: since the step began.
    """
    each = seconds * count / done
    steps = total_steps - step + 1
    return (
        f"step {step}: micro-batch {done} of {count} took {format_seconds(seconds)}; "
        f"about {format_seconds(each)} per step, {format_seconds(each * steps)} for {steps:,} steps"
    )


class Bar:
    """The line at the bottom of a terminal: step, part of the step, loss, time left. Elsewhere there is none.

    A thread redraws it, so that it moves within a long step.
    """

    def __init__(self, plan: Plan, start: int, pace: Pace) -> None:
        self._total, self._pace, self._step = plan.total_steps, pace, start
        self.loss: float | None = None
        self.doing = ""
        self._end = threading.Event()
        self._bar = tqdm(
            total=plan.total_steps,
            initial=start,
            disable=None,  # where stderr is no terminal
            ncols=_bar_width(),
            bar_format=self._format(),
        )
        self.is_shown = not self._bar.disable
        self._thread = threading.Thread(target=self._keep_moving, daemon=True)
        if self.is_shown:
            self._thread.start()

    def move(self, step: int, part: float = 0.0) -> None:
        """Move on to the end of a step, or to a part of the next one."""
        self._step, self._bar.n = step, step + part
        self._draw()

    def close(self) -> None:
        """Leave the bar as it is."""
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()
            self._draw()
        self._bar.close()

    def _keep_moving(self) -> None:
        while not self._end.wait(REFRESH_SECONDS):
            self._draw()

    def _draw(self) -> None:
        if not self.is_shown:
            return
        self._bar.ncols, self._bar.bar_format = _bar_width(), self._format()
        self._bar.refresh()  # takes tqdm's lock

    def _format(self) -> str:
        loss = "" if self.loss is None else f"loss {self.loss:.4f}  "
        left = self.doing or f"left {format_clock(self._pace.seconds_left(time.perf_counter()))}"
        return f"step {self._step:,}/{self._total:,} |{{bar}}| {loss}{left}"


def _bar_width() -> int:
    return shutil.get_terminal_size().columns - len(" ^C")  # which a terminal writes after it


class Metrics:
    """The run's log. A line is written whole and flushed, so a killed run leaves at most one torn line."""

    def __init__(self, accelerator: Accelerator, folder: Path, plan: Plan, start: int) -> None:
        """Open the log and cut off what lies after the step that the run goes on from."""
        self._accelerator = accelerator
        self._plan = plan
        self._began = self._logged = self._step_began = time.perf_counter()
        self._tokens = 0  # real tokens since the last line, over all ranks
        self._main = accelerator.is_main_process
        self._path = folder / "metrics.jsonl"
        if self._main:
            keep_until(self._path, start, again=plan.evaluates_after(start))
        self._start = self._step = start
        self._pace = Pace(start, plan.total_steps, self._began)
        self._bar = Bar(plan, start, self._pace) if self._main else None
        self.loss: float | None = None
        """Of the last step that was logged."""
        self.eval_loss: float | None = None

    @property
    def elapsed_seconds(self) -> float:
        """Return the time since training started here."""
        return time.perf_counter() - self._began

    def begin(self) -> None:
        """Note that the next step begins now, and not before."""
        self._step_began = time.perf_counter()
        self._pace.restart(self._step_began)

    def note_micro_batch(self, done: int, count: int) -> None:
        """Move the bar within a step; of the first one estimate how long it takes, if it is a long one."""
        if self._bar is None:
            return
        self._bar.move(self._step, min(done / count, 0.999))
        # Elsewhere than on the CPU a micro-batch has only been launched by now.
        if done == 1 and self._step == self._start and self._accelerator.device.type == "cpu":
            seconds = time.perf_counter() - self._step_began
            self._pace.estimate(seconds * count)
            if seconds * count >= LONG_STEP_SECONDS:
                estimate = format_step_estimate(self._step + 1, self._plan.total_steps, done, count, seconds)
                tqdm.write(estimate, file=sys.stderr)

    def finish_step(self, step: int, result: StepResult) -> None:
        """Move the bar on by a step."""
        self._tokens += result.batch.num_tokens
        self._step, self._step_began = step, time.perf_counter()
        self._pace.end_step(step, self._step_began)
        if self._bar is not None:
            self._bar.loss = result.loss
            self._bar.move(step)

    @contextlib.contextmanager
    def activity(self, what: str) -> Iterator[None]:
        """Show what is done instead of steps for the length of a block."""
        if self._bar is not None:
            self._bar.doing = what
            if not self._bar.is_shown:
                print(f"step {self._step:,}: {what}", file=sys.stderr, flush=True)
        try:
            yield
        finally:
            if self._bar is not None:
                self._bar.doing = ""
            self.begin()

    def log_step(self, step: int, result: StepResult) -> None:
        """Log a train line; its speed is that of the steps since the last one."""
        now = time.perf_counter()
        tokens_per_second = self._tokens / (now - self._logged)
        self._logged, self._tokens = now, 0
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
                "supervised_tokens": batch.num_supervised_tokens,
                "tokens_per_second": tokens_per_second,
                "elapsed_seconds": now - self._began,
                "peak_memory_bytes": peak_memory_bytes(self._accelerator.device),
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
        """Log an eval line, and the replies to prompts as events."""
        replies = values.pop("replies", [])
        if "eval_loss" in values:
            self.eval_loss = values["eval_loss"]
            values["eval_perplexity"] = math.exp(min(values["eval_loss"], 700.0))
            self._write({"kind": "eval", "step": step, **values})
            self.print(f"step {step}: eval loss {values['eval_loss']:.4f}")
            for name, of_source in values.get("sources", {}).items():
                self.print(f"step {step}: eval loss {of_source['eval_loss']:.4f} on {name}")
        for prompt, reply in replies:
            if isinstance(reply, Exception):
                error = f"{type(reply).__name__}: {reply}"
                self._write({"kind": "event", "event": "reply_failed", "step": step, "prompt": prompt, "error": error})
                self.print(f"step {step}: no reply to {prompt!r}: {error}")
            else:
                self._write({"kind": "event", "event": "reply", "step": step, "prompt": prompt, "reply": reply})
                self.print(f"step {step}: {prompt!r} -> {reply!r}")

    def log_event(self, step: int, event: str, **values: Any) -> None:
        """Log that something happened."""
        self._write({"kind": "event", "event": event, "step": step, **values})

    def print(self, text: str) -> None:
        """Print a line without breaking the bar."""
        if self._main:
            tqdm.write(text)

    def sync(self) -> None:
        """Bring the log to the disk, so that it is never behind a checkpoint."""
        if self._main:
            with self._path.open("ab") as file:
                os.fsync(file.fileno())

    def close(self) -> None:
        """End the bar and the trackers."""
        if self._bar is not None:
            self._bar.close()
        # end_training would end the process group too, for whoever comes next.
        for tracker in self._accelerator.trackers:
            tracker.finish()

    def _write(self, line: dict[str, Any]) -> None:
        if not self._main:
            return
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
        if line["kind"] != "event":
            self._accelerator.log(_flat(line["kind"], line), step=line["step"])


def _flat(prefix: str, values: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a line under the names that trackers show: train/loss, eval/sources/PATH/eval_loss."""
    flat: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(f"{prefix}/{key}", value)
        elif key not in ("kind", "step"):
            flat[f"{prefix}/{key}"] = value
    return flat


def keep_until(path: Path, step: int, *, again: bool = False) -> None:
    """Drop the lines after `step`, and a torn last one: the run goes on from there and writes them again.

    Args:
        again: whether `step` itself will be evaluated again.
    """
    if not path.exists():
        return
    kept = []
    for text in path.read_bytes().split(b"\n"):  # bytes: a line may be torn within a character
        try:
            line = json.loads(text)
            evaluated = line["kind"] == "eval" or line.get("event") in ("reply", "reply_failed")
            keep = line["step"] < step + (not (again and evaluated))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue
        if keep:
            kept.append(text + b"\n")
    write_bytes(path, b"".join(kept))


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory held so far: of the device, or of the process where the device is the CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux kilobytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
