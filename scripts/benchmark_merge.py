"""Measure merging beside PEFT's way and beside `cp`: a random Llama of 1.2 billion parameters, alternating.

    python scripts/benchmark_merge.py [--rounds 3] [--layers 20] [--keep DIR]

Each runs in a process of its own; seconds are of the whole process, imports and writing included, and memory is its
peak. The base is in bfloat16 in four files, the adapter is of rank 16 on every linear layer. Needs 10 GB of disk.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

OURS = [sys.executable, "-m", "lora_accel.cli", "merge"]
PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
base = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
PeftModel.from_pretrained(base, sys.argv[2]).merge_and_unload().save_pretrained(sys.argv[3], max_shard_size="700MB")
AutoTokenizer.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[3])
"""
MAKE = """
import sys, torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
base, adapter, layers, like = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
torch.manual_seed(0)
config = AutoConfig.for_model("llama", vocab_size=49152, hidden_size=2048, intermediate_size=5632,
    num_hidden_layers=layers, num_attention_heads=32, num_key_value_heads=32, tie_word_embeddings=True)
model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
model.save_pretrained(base, max_shard_size="700MB")
AutoTokenizer.from_pretrained(like).save_pretrained(base)
model.name_or_path = base
lora = LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear", init_lora_weights=False)
get_peft_model(model, lora).save_pretrained(adapter, save_embedding_layers=False)
"""


def run(words: list[str], out: Path) -> tuple[float, int]:
    """Run a command that makes a folder; return seconds and the peak of its resident memory, in bytes."""
    shutil.rmtree(out, ignore_errors=True)
    os.sync()  # what the last one wrote is its own affair
    began = time.perf_counter()
    child = subprocess.Popen(words)
    _, status, used = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - began
    if status:
        raise SystemExit(f"{words[:2]} failed")
    return seconds, used.ru_maxrss * 1024


def main() -> None:
    """Make model and adapter, measure in turn, print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=22, help="of the model; 22 make 1.2 billion parameters")
    parser.add_argument("--tokenizer", default="models/SmolLM2-135M-Instruct", metavar="DIR")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="work here, and leave what was made")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="benchmark-merge-") as temporary:
        place = asked.keep or Path(temporary)
        base, adapter, out = place / "base", place / "adapter", place / "out"
        if not adapter.exists():
            words = [sys.executable, "-c", MAKE, str(base), str(adapter), str(asked.layers), asked.tokenizer]
            subprocess.run(words, check=True)
        cases = {
            "lora-accel merge --no-verify": [*OURS, str(adapter), str(out), "--no-verify"],
            "PEFT, merge_and_unload": [sys.executable, "-c", PEFT, str(base), str(adapter), str(out)],
            "cp -r": ["cp", "-r", str(base), str(out)],
        }
        found: dict[str, list[tuple[float, int]]] = {name: [] for name in cases}
        for _ in range(asked.rounds):
            for name, words in cases.items():
                found[name].append(run(words, out))
                print(name, found[name][-1], file=sys.stderr, flush=True)
        peft = [seconds for seconds, _ in found["PEFT, merge_and_unload"]]
        print("| | seconds: median (least to most) | as a share of PEFT's | peak memory |\n| --- | --- | --- | --- |")
        for name, runs in found.items():
            seconds = [each for each, _ in runs]
            shares = [mine / other for mine, other in zip(seconds, peft, strict=True)]
            print(
                f"| {name} | {statistics.median(seconds):.1f} ({min(seconds):.1f} to {max(seconds):.1f}) | "
                f"{statistics.median(shares):.2f} ({min(shares):.2f} to {max(shares):.2f}) | "
                f"{statistics.median(memory for _, memory in runs) / 1e9:.2f} GB |"
            )


if __name__ == "__main__":
    main()
