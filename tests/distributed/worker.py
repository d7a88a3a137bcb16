"""Script that tests launch: train several run configs in sequence in the same processes.

    accelerate launch … tests/distributed/worker.py CONFIG …

Next to each adapter it writes `logits.safetensors`: the logits of the live model, sharded or not, for `TOKENS`.
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
save_final_adapter = run_folder.save_final_adapter


@torch.no_grad()
def export_with_logits(folder: Path, template: Any, accelerator: Any, model: Any, *rest: Any) -> None:
    """Export the adapter, and write the live model's logits."""
    save_final_adapter(folder, template, accelerator, model, *rest)
    model.eval()
    logits = model(input_ids=TOKENS.to(accelerator.device), use_cache=False).logits
    if accelerator.is_main_process:
        save_file({"logits": logits.cpu()}, folder.parent / "logits.safetensors")
    model.train()


def main(files: list[str]) -> int:
    """Train each config. Every rank calls this."""
    run_folder.save_final_adapter = export_with_logits
    for file in files:
        train.run_training(read_config(file, []))
        AcceleratorState._reset_state()  # keeps the process group
        GradientState._reset_state()
        unset_hf_deepspeed_config()
    return 0


if __name__ == "__main__":
    exit_process(main(sys.argv[1:]))
