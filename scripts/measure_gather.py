"""Measure both ways of gathering an adapter: seconds, and what the main process's memory grows to meanwhile.

    accelerate launch --config_file accelerate_configs/cpu_zero3.yaml --zero3_save_16bit_model true \\
        scripts/measure_gather.py models/SmolLM2-135M-Instruct

`state_dict` collects the whole model on the main process under ZeRO-3, `parameters` only what is saved. They alternate;
the table shows the median and the range. Memory is the peak of resident memory (Linux only), above what was resident
before the gather began.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from lora_accel.distributed.launch import exit_process
from lora_accel.saving.adapter import gather_adapter

ROADS = ("state_dict", "parameters")


def memory(field: str) -> float:
    """Return VmRSS (resident now) or VmHWM (its peak), in MiB."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    line = next(line for line in lines if line.startswith(field))
    return int(line.split()[1]) / 1024


def measure(accelerator: Accelerator, model: torch.nn.Module, road: str) -> tuple[float, float]:
    """Return seconds, and MiB above the start at the peak."""
    accelerator.wait_for_everyone()
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # forget the peak so far
    before, began = memory("VmRSS"), time.perf_counter()
    gather_adapter(accelerator, model, gather=road)
    return time.perf_counter() - began, memory("VmHWM") - before


def main() -> int:
    """Measure as the command line says."""
    parser = argparse.ArgumentParser(description="Measure both ways of gathering an adapter.")
    parser.add_argument("model", metavar="DIR")
    parser.add_argument("--rank", type=int, default=16, help="of the adapter, on all linear layers")
    parser.add_argument("--times", type=int, default=7)
    asked = parser.parse_args()

    on_cpu = not torch.accelerator.is_available()
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")] if on_cpu else None)
    accelerator.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 1
    base = AutoModelForCausalLM.from_pretrained(asked.model, dtype=torch.bfloat16)
    model = get_peft_model(base, LoraConfig(r=asked.rank, target_modules="all-linear", task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model, optimizer = accelerator.prepare(model, optimizer)

    results: dict[str, list[tuple[float, float]]] = {road: [] for road in ROADS}
    for number in range(asked.times + 1):
        for road in ROADS:
            result = measure(accelerator, model, road)
            if number:  # the first round warms up
                results[road].append(result)
    accelerator.print("| gather | seconds | MiB at the peak |\n| --- | --- | --- |")
    for road, values in results.items():
        cells = []
        for number, form in enumerate((".2f", ".0f")):
            of_kind = [value[number] for value in values]
            cells.append(f"{statistics.median(of_kind):{form}} ({min(of_kind):{form}} to {max(of_kind):{form}})")
        accelerator.print(f"| {road} | {' | '.join(cells)} |")
    return 0


if __name__ == "__main__":
    exit_process(main())
