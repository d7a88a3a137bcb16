"""Launched by tests: train, and let one thing go wrong on rank 1.

accelerate launch … tests/distributed/faults.py raise|kill|user|nan|differ CONFIG [section.key=value …]
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from safetensors.torch import save_file

from lora_accel import train
from lora_accel.distributed.launch import exit_process
from lora_accel.errors import DataError
from lora_accel.saving.adapter import gather_adapter
from lora_accel.setup import data as setup_data
from lora_accel.training import loop
from lora_accel.training import step as step_module
from lora_accel.training.progress import StepResult
from lora_accel.training.step import Run, train_step

BAD_STEP = 2
summed_token_loss, prepare_data = step_module.summed_token_loss, setup_data.prepare_data


def main(fault: str, config: str, *words: str) -> int:
    """Train until it goes wrong."""
    at_fault = os.environ.get("RANK", "1") == "1"  # or alone
    bad = False

    def step_with_fault(run: Run, step: int) -> StepResult:
        nonlocal bad
        bad = at_fault and step + 1 == BAD_STEP
        result = train_step(run, step)
        if not result.is_finite:  # what did the step leave of the weights?
            state = gather_adapter(run.accelerator, run.model)
            if run.accelerator.is_main_process:
                save_file(state, run.accelerator.project_dir + "/after.safetensors")
        return result

    def loss_with_fault(model: Any, batch: Any) -> Any:
        loss = summed_token_loss(model, batch)
        if bad and fault == "raise":
            raise RuntimeError("rank 1 has a fault of its own")
        if bad and fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        return loss * float("nan") if bad else loss

    def data_with_fault(*words: Any) -> Any:
        if at_fault and fault == "user":
            raise DataError("rows.jsonl: only rank 1 cannot read it")
        return prepare_data(*words)

    loop.train_step, step_module.summed_token_loss = step_with_fault, loss_with_fault
    setup_data.prepare_data = data_with_fault
    differs = ["seed=1", "data.max_length=100"] if at_fault and fault == "differ" else []
    return train.main(["--config", config, *words, *differs])


if __name__ == "__main__":
    exit_process(main(*sys.argv[1:]))
