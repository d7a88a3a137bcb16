"""Compare the time and memory of merging with PEFT's `merge_and_unload` and with `cp`.

    python scripts/benchmark_merge.py [--rounds 3] [--layers 20] [--keep DIR]

The model is a random Llama of 1.2 billion parameters in bfloat16 in four files, the adapter has rank 16 on all linear
layers. The cases alternate, each in a separate process. Seconds are those of the complete process, including imports
and writing; memory is its peak. Needs 10 GB of disk.
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

LORA_ACCEL = [sys.executable, "-m", "lora_accel.cli", "merge"]
PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
base = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
PeftModel.from_pretrained(base, sys.argv[2]).merge_and_unload().save_pretrained(sys.argv[3], max_shard_size="700MB")
AutoTokenizer.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[3])
"""
CREATE_MODEL = """
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


def run(command: list[str], out: Path) -> tuple[float, int]:
    """Run a command that writes a folder; return seconds and its peak resident memory in bytes."""
    shutil.rmtree(out, ignore_errors=True)
    os.sync()  # otherwise this command waits for what the last one wrote
    start = time.perf_counter()
    child = subprocess.Popen(command)
    _, status, used = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        raise SystemExit(f"{command[:2]} failed")
    return seconds, used.ru_maxrss * 1024


def main() -> None:
    """Create the model and the adapter, measure, print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=22, help="layers of the model; 22 = 1.2 billion parameters")
    parser.add_argument("--tokenizer", default="models/SmolLM2-135M-Instruct", metavar="DIR")
    parser.add_argument(
        "--keep", type=Path, metavar="DIR", help="work in this folder, and keep the model and the adapter"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="benchmark-merge-") as temporary:
        folder = args.keep or Path(temporary)
        base, adapter, out = folder / "base", folder / "adapter", folder / "out"
        if not adapter.exists():
            command = [sys.executable, "-c", CREATE_MODEL, str(base), str(adapter), str(args.layers), args.tokenizer]
            subprocess.run(command, check=True)
        cases = {
            "lora-accel merge --no-verify": [*LORA_ACCEL, str(adapter), str(out), "--no-verify"],
            "PEFT, merge_and_unload": [sys.executable, "-c", PEFT, str(base), str(adapter), str(out)],
            "cp -r": ["cp", "-r", str(base), str(out)],
        }
        results: dict[str, list[tuple[float, int]]] = {name: [] for name in cases}
        for _ in range(args.rounds):
            for name, command in cases.items():
                results[name].append(run(command, out))
                print(name, results[name][-1], file=sys.stderr, flush=True)
        peft = [seconds for seconds, _ in results["PEFT, merge_and_unload"]]
        print("| | seconds: median (min-max) | relative to PEFT | peak memory |\n| --- | --- | --- | --- |")
        for name, runs in results.items():
            seconds = [duration for duration, _ in runs]
            shares = [mine / other for mine, other in zip(seconds, peft, strict=True)]
            print(
                f"| {name} | {statistics.median(seconds):.1f} ({min(seconds):.1f}-{max(seconds):.1f}) | "
                f"{statistics.median(shares):.2f} ({min(shares):.2f}-{max(shares):.2f}) | "
                f"{statistics.median(memory for _, memory in runs) / 1e9:.2f} GB |"
            )


if __name__ == "__main__":
    main()
