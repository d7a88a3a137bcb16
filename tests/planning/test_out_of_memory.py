"""A run that is out of memory: exit 3, what would take less, and the newest checkpoint to resume from."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_accel import RunConfig, run_training
from lora_accel.errors import TrainingError, is_out_of_memory
from lora_accel.planning import out_of_memory
from lora_accel.training import step as module
from tests.conftest import read_metrics, reset_accelerator


def fail_in_step(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Allocate four petabytes in one step: the real error of torch's allocator."""
    original, calls = module.train_step, []

    def train_step(run: Any, step: int) -> Any:
        calls.append(step)
        if step + 1 == number:
            monkeypatch.setattr(module, "summed_token_loss", lambda *_: torch.empty(2**50))
        return original(run, step)

    monkeypatch.setattr("lora_accel.training.loop.train_step", train_step)


def test_a_step_out_of_memory_ends_the_run_and_names_what_takes_less(
    make_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(training={"max_steps": 4, "micro_batch_tokens": 800})
    uninterrupted = run_training(config.model_copy(update={"output_dir": f"{config.output_dir}-complete"}))
    reset_accelerator()
    with monkeypatch.context() as patched:
        fail_in_step(patched, 4)
        with pytest.raises(TrainingError) as caught:
            run_training(config)
    first, second, *options, already, last = str(caught.value).splitlines()
    assert re.match(r"out of memory: .*DefaultCPUAllocator: can't allocate memory: you tried to allocate 4503", first)
    assert first.endswith("The newest checkpoint is kept.")
    assert second == "These options take less on each device, by the estimate of `lora-accel plan`:"
    smaller = "training.micro_batch_tokens=200"
    names = [smaller, f"{smaller} training.activation_checkpointing=true"]
    assert [option.split(":")[0].strip() for option in options[:2]] == names
    saved = [float(re.search(r": (\d+) MB less$", option)[1]) for option in options]  # type: ignore[index]
    assert saved == sorted(saved)
    assert saved[0] > 0
    assert already.startswith("What activation_checkpointing=auto has saved already")
    assert last.startswith("The same command with them resumes")

    reset_accelerator()
    resumed = config.model_copy(update={"training": config.training.model_copy(update={"micro_batch_tokens": 200})})
    run_training(resumed)
    folder = Path(config.output_dir)
    assert [line["step"] for line in read_metrics(folder, "event") if line["event"] == "resume"] == [2]
    losses = [[line["loss"] for line in read_metrics(run)] for run in (folder, uninterrupted.parent)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_another_error_is_not_explained(make_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(module, "summed_token_loss", fail)
    with pytest.raises(RuntimeError, match=r"^shape mismatch$"):
        run_training(make_config())


def test_without_an_estimate_the_options_are_named(
    make_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(out_of_memory, "cheaper_options", fail)
    explained = out_of_memory.explained_out_of_memory(make_config(), None, "no")  # type: ignore[arg-type]
    with pytest.raises(TrainingError, match=r"What takes less: training\.micro_batch_tokens, training"), explained:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has …\nmore")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 5 GB)"), True),
        (MemoryError(), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_errors_of_allocators(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected
