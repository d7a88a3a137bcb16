"""What is told on the way: progress bar, metrics.jsonl, trackers. Only the main process writes."""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from tqdm import tqdm

from lora_accel.config.plan import Plan
from lora_accel.saving.commit import write_bytes

if TYPE_CHECKING:
    from lora_accel.training.loop import StepResult


class Metrics:
    """The run's log. A line is written whole and flushed, so a killed run leaves at most one torn line."""

    def __init__(self, accelerator: Accelerator, folder: Path, plan: Plan, start: int) -> None:
        """Open the log and cut off what lies after the step that the run goes on from."""
        self._accelerator = accelerator
        self._plan = plan
        self._began = self._logged = time.perf_counter()
        self._tokens = 0  # real tokens since the last line, over all ranks
        self._main = accelerator.is_main_process
        self._path = folder / "metrics.jsonl"
        if self._main:
            keep_until(self._path, start, again=plan.evaluates_after(start))
        self._bar = tqdm(
            total=plan.total_steps,
            initial=start,
            desc="train",
            unit="step",
            disable=not self._main,
            dynamic_ncols=True,
        )

    def count(self, step: int, result: StepResult) -> None:
        """Move the bar on by a step."""
        self._tokens += result.batch.num_tokens
        self._bar.update(step - self._bar.n)

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
        self._bar.set_postfix_str(
            f"loss {result.loss:.4f}, lr {result.learning_rate:.2e}, {tokens_per_second:,.0f} tokens/s"
        )

    def log_evaluation(self, step: int, values: dict[str, Any]) -> None:
        """Log an eval line, and the replies to prompts as events."""
        replies = values.pop("replies", [])
        if "eval_loss" in values:
            values["eval_perplexity"] = math.exp(min(values["eval_loss"], 700.0))
            self._write({"kind": "eval", "step": step, **values})
            self.say(f"step {step}: eval loss {values['eval_loss']:.4f}")
            for name, of_source in values.get("sources", {}).items():
                self.say(f"step {step}: eval loss {of_source['eval_loss']:.4f} on {name}")
        for prompt, reply in replies:
            if isinstance(reply, Exception):
                error = f"{type(reply).__name__}: {reply}"
                self._write({"kind": "event", "event": "reply_failed", "step": step, "prompt": prompt, "error": error})
                self.say(f"step {step}: no reply to {prompt!r}: {error}")
            else:
                self._write({"kind": "event", "event": "reply", "step": step, "prompt": prompt, "reply": reply})
                self.say(f"step {step}: {prompt!r} -> {reply!r}")

    def log_event(self, step: int, event: str, **values: Any) -> None:
        """Log that something happened."""
        self._write({"kind": "event", "event": event, "step": step, **values})

    def say(self, text: str) -> None:
        """Print a line without breaking the bar."""
        if self._main:
            self._bar.write(text)

    def sync(self) -> None:
        """Bring the log to the disk, so that it is never behind a checkpoint."""
        if self._main:
            with self._path.open("ab") as file:
                os.fsync(file.fileno())

    def close(self) -> None:
        """End the bar and the trackers."""
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
