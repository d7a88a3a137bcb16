"""Script that tests launch: train, with a fault on rank 1.

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


def main(fault: str, config: str, *overrides: str) -> int:
    """Train with a fault in step `BAD_STEP`, or in the data."""
    has_fault = os.environ.get("RANK", "1") == "1"  # also without a launcher
    in_bad_step = False

    def step_with_fault(run: Run, step: int) -> StepResult:
        nonlocal in_bad_step
        in_bad_step = has_fault and step + 1 == BAD_STEP
        result = train_step(run, step)
        if not result.is_finite:  # save the weights after the step
            state = gather_adapter(run.accelerator, run.model)
            if run.accelerator.is_main_process:
                save_file(state, run.accelerator.project_dir + "/after.safetensors")
        return result

    def loss_with_fault(*args: Any) -> Any:
        loss = summed_token_loss(*args)
        if in_bad_step and fault == "raise":
            raise RuntimeError("rank 1 has a fault of its own")
        if in_bad_step and fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        return loss * float("nan") if in_bad_step else loss

    def data_with_fault(*args: Any) -> Any:
        if has_fault and fault == "user":
            raise DataError("rows.jsonl: only rank 1 cannot read it")
        return prepare_data(*args)

    loop.train_step, step_module.summed_token_loss = step_with_fault, loss_with_fault
    setup_data.prepare_data = data_with_fault
    differences = ["seed=1", "data.max_length=100"] if has_fault and fault == "differ" else []
    return train.main(["--config", config, *overrides, *differences])


if __name__ == "__main__":
    exit_process(main(*sys.argv[1:]))
