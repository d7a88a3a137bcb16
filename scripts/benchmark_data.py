"""Measure how fast rows become tokens, and what memory it takes, beside TRL's SFTTrainer on the same rows.

    python scripts/benchmark_data.py --model models/SmolLM2-135M-Instruct [--rows 200000] [--rounds 3]

Makes conversations by a formula, then lets both prepare them in turn, each in a process of its own: TRL as it comes,
TRL with as many processes as there are cores, this package, and this package again with its cache. Prints one table.
Needs the extra `bench`.
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
    """Write conversations of one to four rounds, about 300 tokens each."""
    chance = random.Random(0)

    def words(most: int) -> str:
        return " ".join(chance.choices(WORDS, k=chance.randint(5, most))).capitalize() + "."

    with file.open("w", encoding="utf-8") as lines:
        for _ in range(rows):
            messages = []
            for _ in range(chance.randint(1, 4)):
                messages.append({"role": "user", "content": words(50)})
                messages.append({"role": "assistant", "content": f"{words(100)}\n\n{words(100)}"})
            lines.write(json.dumps({"messages": messages}) + "\n")


def prepare_here(model: str, file: Path, cache: Path) -> tuple[int, int]:
    """Prepare with this package; return examples and tokens."""
    from lora_accel.config.schema import RunConfig
    from lora_accel.data.dataset import load_dataset
    from lora_accel.setup.recipe import make_recipe

    data = {"train": [{"path": str(file)}], "max_length": 1024, "cache_dir": str(cache)}
    config = RunConfig.model_validate({"output_dir": "unused", "model": {"name_or_path": model}, "data": data})
    dataset = load_dataset(config.data.train, make_recipe(config), config.data)
    return dataset.num_examples, int(dataset.sources[0].examples.lengths.sum())


def prepare_trl(model: str, file: Path, cache: Path, processes: int | None) -> tuple[int, int]:
    """Prepare with TRL, up to the moment before training; return examples and tokens."""
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


def one(kind: str, model: str, file: Path, cache: Path) -> None:
    """Be one measured process; print its seconds. Imports and the model are not counted, reading the file is."""
    if kind.startswith("TRL"):
        import datasets
        import trl

        spent = 0.0

        def timed(inner: Any) -> Any:
            def outer(*words: Any, **more: Any) -> Any:
                nonlocal spent
                began = time.perf_counter()
                result = inner(*words, **more)
                spent += time.perf_counter() - began
                return result

            return outer

        trl.SFTTrainer._prepare_dataset = timed(trl.SFTTrainer._prepare_dataset)
        datasets.load_dataset = timed(datasets.load_dataset)
        examples, tokens = prepare_trl(model, file, cache, None if kind == TRL else os.cpu_count())
    else:
        import transformers  # noqa: F401

        began = time.perf_counter()
        examples, tokens = prepare_here(model, file, cache)
        spent = time.perf_counter() - began
    print(json.dumps({"seconds": spent, "examples": examples, "tokens": tokens}))


def measured(kind: str, model: str, file: Path, cache: Path) -> dict[str, Any]:
    """Run one in a process of its own; add the most memory that it and its children held at once, file pages apart."""
    words = [sys.executable, __file__, "--one", kind, "--model", model, "--file", str(file), "--cache", str(cache)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = psutil.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    peak, peak_pss = 0, 0
    done = threading.Event()

    def watch() -> None:
        nonlocal peak, peak_pss
        while not done.wait(0.5):
            rss = pss = 0
            for each in [process, *process.children(recursive=True)]:
                try:
                    held = each.memory_full_info()
                    rss, pss = rss + held.rss, pss + held.pss
                except psutil.Error:
                    continue
            peak, peak_pss = max(peak, rss), max(peak_pss, pss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    out, errors = process.communicate()
    done.set()
    watcher.join()
    if process.returncode:
        raise SystemExit(f"{kind} failed:\n{errors[-3000:]}")
    told: dict[str, Any] = json.loads(out.splitlines()[-1])
    return told | {"rss": peak, "pss": peak_pss}


TRL, TRL_ALL, HERE, AGAIN = "TRL", "TRL, all cores", "lora_accel", "lora_accel, second start"


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--cache", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        one(asked.one, asked.model, asked.file, asked.cache)
        return
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in (TRL, TRL_ALL, HERE, AGAIN)}
    with tempfile.TemporaryDirectory(prefix="benchmark-data-") as folder:
        file = Path(folder) / "rows.jsonl"
        make_rows(file, asked.rows)
        for number in range(asked.rounds):
            for kind in (HERE, AGAIN, TRL, TRL_ALL):
                cache = Path(folder) / f"{kind.split(',')[0]}-{kind == TRL_ALL}-{number}"
                found[kind].append(measured(kind, asked.model, file, cache))
                print(kind, found[kind][-1], file=sys.stderr, flush=True)
    print("| | seconds | rows/s | tokens | peak RSS, all processes | of these, pages counted once |")
    print("| --- | --- | --- | --- | --- | --- |")
    for kind, rounds in found.items():
        seconds = statistics.median(each["seconds"] for each in rounds)
        rss, pss = (max(each[name] for each in rounds) / 1e9 for name in ("rss", "pss"))
        tokens = rounds[0]["tokens"]
        print(f"| {kind} | {seconds:.1f} | {asked.rows / seconds:,.0f} | {tokens:,} | {rss:.2f} GB | {pss:.2f} GB |")


if __name__ == "__main__":
    main()
