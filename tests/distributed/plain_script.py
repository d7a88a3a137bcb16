"""Script that tests launch: a plain Accelerate script that uses only `save_adapter` of this package.

accelerate launch … tests/distributed/plain_script.py MODEL OUT [full-disk]

With `full-disk`, the main process cannot write more than 1000 bytes to a file.
"""

from __future__ import annotations

import os
import resource
import signal
import sys

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from lora_accel import save_adapter
from lora_accel.distributed.launch import exit_process


def main(name: str, out: str, disk: str = "") -> int:
    """Train for two steps, and save with each way to gather and each bias mode."""
    is_distributed, deepspeed = "WORLD_SIZE" in os.environ, "ACCELERATE_USE_DEEPSPEED" in os.environ
    gloo = [InitProcessGroupKwargs(backend="gloo")] if is_distributed else None
    accelerator = Accelerator(cpu=not deepspeed, kwargs_handlers=gloo)
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["c_attn", "c_fc"], bias="lora_only", task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(name), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    loader = DataLoader([torch.arange(5 + i, 21 + i) for i in range(8)], batch_size=2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for batch in loader:
        accelerator.backward(model(input_ids=batch, labels=batch).loss)
        optimizer.step()
        optimizer.zero_grad()
    if disk == "full-disk" and accelerator.is_main_process:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    save_adapter(accelerator, model, f"{out}/auto")
    save_adapter(accelerator, model, f"{out}/parameters", gather="parameters")
    save_adapter(accelerator, model, f"{out}/none", bias="none")
    save_adapter(accelerator, model, f"{out}/all", bias="all", gather="parameters")
    is_zero3 = accelerator.deepspeed_plugin is not None and accelerator.deepspeed_plugin.zero_stage == 3
    if not is_zero3:  # get_state_dict needs zero3_save_16bit_model
        save_adapter(accelerator, model, f"{out}/state_dict", gather="state_dict")
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=torch.arange(5, 37, device=accelerator.device)[None]).logits
    if accelerator.is_main_process:
        save_file({"logits": logits.cpu()}, f"{out}/logits.safetensors")
    return 0


if __name__ == "__main__":
    exit_process(main(*sys.argv[1:]))
