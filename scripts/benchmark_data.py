"""Compare the time and memory of tokenization with TRL's SFTTrainer on the same rows.

    python scripts/benchmark_data.py --model models/SmolLM2-135M-Instruct [--rows 200000] [--rounds 3]

Generates conversations and tokenizes them in four ways, each in a separate process: with TRL, with TRL and one process
per core, with this package, and with this package from its cache. Prints one table. Needs the extra `bench`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pyarrow.compute as pc

WORDS = """
the of and to in is that for it as was with be by on not he his but at are this have from or had an they which one you
were all her she there would their we him been has when who will no more if out so up said what its about than into
them can only other time new some could these two may first then do any like my now over such our man me even most made
""".split()  # noqa: SIM905  a list would fill a page


def make_rows(file: Path, rows: int) -> None:
    """Write conversations of one to four turns, about 300 tokens each."""
    rng = random.Random(0)

    def sentence(most: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(5, most))).capitalize() + "."

    with file.open("w", encoding="utf-8") as lines:
        for _ in range(rows):
            messages = []
            for _ in range(rng.randint(1, 4)):
                messages.append({"role": "user", "content": sentence(50)})
                messages.append({"role": "assistant", "content": f"{sentence(100)}\n\n{sentence(100)}"})
            lines.write(json.dumps({"messages": messages}) + "\n")


def tokenize_with_lora_accel(model: str, file: Path, cache: Path) -> tuple[int, int]:
    """Tokenize with this package and return the numbers of examples and tokens."""
    from lora_accel.config.schema import RunConfig
    from lora_accel.data.dataset import load_dataset
    from lora_accel.setup.recipe import make_recipe

    data = {"train": [{"path": str(file)}], "max_length": 1024, "cache_dir": str(cache)}
    config = RunConfig.model_validate({"output_dir": "unused", "model": {"name_or_path": model}, "data": data})
    dataset = load_dataset(config.data.train, make_recipe(config), config.data)
    return dataset.num_examples, int(dataset.sources[0].examples.lengths.sum())


def tokenize_with_trl(model: str, file: Path, cache: Path, processes: int | None) -> tuple[int, int]:
    """Prepare a training with TRL and return the numbers of examples and tokens."""
    import datasets
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    datasets.disable_progress_bars()
    rows = datasets.load_dataset("json", data_files=str(file), split="train", cache_dir=str(cache))
    options: dict[str, Any] = {"max_length": 1024, "dataset_num_proc": processes, "report_to": [], "use_cpu": True}
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(model),
        args=SFTConfig(output_dir=str(cache / "out"), **options),
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(model),
    )
    prepared = trainer.train_dataset
    lengths = pc.list_value_length(prepared.data.column("input_ids"))
    return len(prepared), pc.sum(lengths).as_py()


def measure_here(kind: str, model: str, file: Path, cache: Path) -> None:
    """Tokenize in this process and print the seconds, including reading the file, without imports and the model."""
    if kind.startswith("TRL"):
        import datasets
        import trl

        seconds = 0.0

        def timed(function: Any) -> Any:
            def wrapper(*args: Any, **options: Any) -> Any:
                nonlocal seconds
                start = time.perf_counter()
                result = function(*args, **options)
                seconds += time.perf_counter() - start
                return result

            return wrapper

        trl.SFTTrainer._prepare_dataset = timed(trl.SFTTrainer._prepare_dataset)
        datasets.load_dataset = timed(datasets.load_dataset)
        examples, tokens = tokenize_with_trl(model, file, cache, None if kind == TRL else os.cpu_count())
    else:
        import transformers  # noqa: F401

        start = time.perf_counter()
        examples, tokens = tokenize_with_lora_accel(model, file, cache)
        seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "examples": examples, "tokens": tokens}))


def measure(kind: str, model: str, file: Path, cache: Path) -> dict[str, Any]:
    """Run `measure_here` in a separate process and add the peak memory of it and its children, without file pages."""
    command = [sys.executable, __file__, "--one", kind, "--model", model, "--file", str(file), "--cache", str(cache)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = psutil.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    peak, peak_pss = 0, 0
    done = threading.Event()

    def sample_memory() -> None:
        nonlocal peak, peak_pss
        while not done.wait(0.5):
            rss = pss = 0
            for each in [process, *process.children(recursive=True)]:
                try:
                    memory = each.memory_full_info()
                    rss, pss = rss + memory.rss, pss + memory.pss
                except psutil.Error:
                    continue
            peak, peak_pss = max(peak, rss), max(peak_pss, pss)

    sampler = threading.Thread(target=sample_memory)
    sampler.start()
    out, errors = process.communicate()
    done.set()
    sampler.join()
    if process.returncode:
        raise SystemExit(f"{kind} failed:\n{errors[-3000:]}")
    result: dict[str, Any] = json.loads(out.splitlines()[-1])
    return result | {"rss": peak, "pss": peak_pss}


TRL, TRL_ALL, LORA_ACCEL, CACHED = "TRL", "TRL, all cores", "lora_accel", "lora_accel, from its cache"


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--cache", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        measure_here(args.one, args.model, args.file, args.cache)
        return
    results: dict[str, list[dict[str, Any]]] = {kind: [] for kind in (TRL, TRL_ALL, LORA_ACCEL, CACHED)}
    with tempfile.TemporaryDirectory(prefix="benchmark-data-") as folder:
        file = Path(folder) / "rows.jsonl"
        make_rows(file, args.rows)
        for number in range(args.rounds):
            for kind in (LORA_ACCEL, CACHED, TRL, TRL_ALL):
                cache = Path(folder) / f"{kind.split(',')[0]}-{kind == TRL_ALL}-{number}"
                results[kind].append(measure(kind, args.model, file, cache))
                print(kind, results[kind][-1], file=sys.stderr, flush=True)
    print("| | seconds | rows/s | tokens | peak RSS, all processes | peak PSS (shared pages counted once) |")
    print("| --- | --- | --- | --- | --- | --- |")
    for kind, rounds in results.items():
        seconds = statistics.median(each["seconds"] for each in rounds)
        rss, pss = (max(each[name] for each in rounds) / 1e9 for name in ("rss", "pss"))
        tokens = rounds[0]["tokens"]
        print(f"| {kind} | {seconds:.1f} | {args.rows / seconds:,.0f} | {tokens:,} | {rss:.2f} GB | {pss:.2f} GB |")


if __name__ == "__main__":
    main()
