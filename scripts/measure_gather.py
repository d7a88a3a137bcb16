"""Measure time and peak memory of both ways to gather an adapter.

    accelerate launch --config_file accelerate_configs/cpu_zero3.yaml --zero3_save_16bit_model true \\
        scripts/measure_gather.py models/SmolLM2-135M-Instruct

Under ZeRO-3, `state_dict` gathers the full model on the main process, and `parameters` only what is saved. They
alternate; the table shows the median and the range. Memory is the main process's peak resident memory above that before
the gather (Linux only).
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

METHODS = ("state_dict", "parameters")


def resident_mib(field: str) -> float:
    """Return VmRSS (current resident memory) or VmHWM (its peak) in MiB."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    line = next(line for line in lines if line.startswith(field))
    return int(line.split()[1]) / 1024


def measure(accelerator: Accelerator, model: torch.nn.Module, method: str) -> tuple[float, float]:
    """Return the seconds of a gather and its peak memory in MiB."""
    accelerator.wait_for_everyone()
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # reset the peak
    before, start = resident_mib("VmRSS"), time.perf_counter()
    gather_adapter(accelerator, model, gather=method)
    return time.perf_counter() - start, resident_mib("VmHWM") - before


def main() -> int:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description="Measure both ways to gather an adapter.")
    parser.add_argument("model", metavar="DIR")
    parser.add_argument("--rank", type=int, default=16, help="rank of the adapter, which is on all linear layers")
    parser.add_argument("--times", type=int, default=7)
    args = parser.parse_args()

    on_cpu = not torch.accelerator.is_available()
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")] if on_cpu else None)
    accelerator.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 1
    base = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
    model = get_peft_model(base, LoraConfig(r=args.rank, target_modules="all-linear", task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model, optimizer = accelerator.prepare(model, optimizer)

    results: dict[str, list[tuple[float, float]]] = {method: [] for method in METHODS}
    for number in range(args.times + 1):
        for method in METHODS:
            result = measure(accelerator, model, method)
            if number:  # the first round warms up
                results[method].append(result)
    accelerator.print("| gather | seconds | peak MiB |\n| --- | --- | --- |")
    for method, values in results.items():
        cells = []
        for column, spec in zip(zip(*values, strict=True), (".2f", ".0f"), strict=True):
            cells.append(f"{statistics.median(column):{spec}} ({min(column):{spec}}-{max(column):{spec}})")
        accelerator.print(f"| {method} | {' | '.join(cells)} |")
    return 0


if __name__ == "__main__":
    exit_process(main())
