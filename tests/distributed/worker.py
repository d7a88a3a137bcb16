"""Launched by tests: train several run configs one after the other in the same processes, and keep what they computed.

    accelerate launch … tests/distributed/worker.py CONFIG …

Beside each adapter it leaves `logits.safetensors`: what the live model, as it stands sharded over the ranks, makes of a
few tokens.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import save_file
from transformers.integrations import unset_hf_deepspeed_config

from lora_accel import train
from lora_accel.config.files import read_config
from lora_accel.distributed.launch import exit_process
from lora_accel.saving import run_folder

TOKENS = torch.arange(5, 37)[None]
export_adapter = run_folder.export_adapter


@torch.no_grad()
def export_with_logits(folder: Path, tokenizer: Any, template: str, accelerator: Any, model: Any, *rest: Any) -> None:
    """Export as ever, and keep the live model's logits."""
    export_adapter(folder, tokenizer, template, accelerator, model, *rest)
    model.eval()
    logits = model(input_ids=TOKENS.to(accelerator.device), use_cache=False).logits
    if accelerator.is_main_process:
        save_file({"logits": logits.cpu()}, folder.parent / "logits.safetensors")
    model.train()


def main(files: list[str]) -> int:
    """Train each config; every process does."""
    run_folder.export_adapter = export_with_logits
    for file in files:
        train.run_training(read_config(file, []))
        AcceleratorState._reset_state()  # the process group stays
        GradientState._reset_state()
        unset_hf_deepspeed_config()
    return 0


if __name__ == "__main__":
    exit_process(main(sys.argv[1:]))
