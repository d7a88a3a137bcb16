"""Prints what a training step would cost on a GPU, by decoder layer: this package, PEFT, and TRL with Liger-Kernel.

Modeled, not measured: kernels are counted on fake tensors (tests/device/layers.py), and seconds follow from a cost
model (tests/device/cost_model.py).

    python -m tests.device.budget [--sizes 8B] [--dropout 0] [--top 20]
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

os.environ["ACCELERATE_TORCH_DEVICE"] = "cuda:0"

from tests.device import fake_cuda
from tests.device.controls import CONTROLS
from tests.device.cost_model import GPUS, step_time
from tests.device.layers import NUM_LAYERS, SIZES, TOKENS, WAYS, Case, Costs, measure
from tests.device.library import build_library


def main() -> None:
    """Print the tables in Markdown, or the figures of layers in JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--dropout", nargs="+", type=float, default=[0.05, 0.0])
    parser.add_argument("--top", type=int, default=0, help="also print the kernels of a layer with most traffic")
    parser.add_argument("--control", choices=CONTROLS, help="also measure this mistake, at the last size")
    parser.add_argument("--json", action="store_true", help="print figures only; those of peers at the first size")
    arguments = parser.parse_args()
    mode = start()
    cases = [
        Case(way, size, is_quantized, dropout)
        for is_quantized in (False, True)
        for dropout in arguments.dropout
        for size in arguments.sizes
        for way in arguments.ways
        if not arguments.json or way == WAYS[0] or size == arguments.sizes[0]
    ]
    if arguments.control:
        cases.append(Case(WAYS[0], arguments.sizes[-1], control=arguments.control))
    costs = {case: measure(case, mode) for case in cases}
    if arguments.json:
        print(
            json.dumps([vars(case) | figures(cost) | {"seconds": seconds(case, cost)} for case, cost in costs.items()])
        )
        return
    print(f"Modeled, not measured: {TOKENS:,} tokens, rank 16 on all linear layers, no activation checkpointing.\n")
    print_rows(layer_rows(costs))
    if set(arguments.ways) == set(WAYS):
        print_rows(speed_rows(costs))
    for case, cost in costs.items() if arguments.top else ():
        print(f"{label(case)}, {case.way}:\n")
        print_rows(profile_rows(cost, arguments.top))


def start() -> Any:
    """Let torch believe that it has a GPU of capability 9.0; return the mode in which tensors exist on it."""
    library = str(build_library())
    if os.environ.get("LD_PRELOAD") != library:
        os.execve(sys.executable, sys.orig_argv, os.environ | {"LD_PRELOAD": library})
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    mode = fake_cuda.install(library)
    fake_cuda.set_capability((9, 0))
    gc.collect()
    gc.freeze()  # `measure` collects garbage: not what was imported
    return mode


def label(case: Case) -> str:
    """Return a case's size, base and dropout."""
    return f"{case.size} {'nf4' if case.is_quantized else 'LoRA'}, dropout {case.dropout:g}"


def figures(cost: Costs) -> dict[str, float]:
    """Return what budgets limit, per layer."""
    return {
        "forward kernels": cost.kernels(is_backward=False),
        "backward kernels": cost.kernels(is_backward=True),
        "copies": cost.copies,
        "element-wise MB": round(cost.elementwise_bytes / 1e6, 1),
        "MB of all kernels": round(cost.total_bytes / 1e6, 1),
        "saved MB": round(cost.saved_bytes / 1e6, 1),
        "TFLOP": round(cost.flop / 1e12, 3),
    }


def seconds(case: Case, cost: Costs) -> dict[str, float]:
    """Return the modeled seconds of forward and backward, by GPU. The optimizer is left out."""
    return {gpu.name: step_time(cost.step(NUM_LAYERS[case.size]), gpu).seconds for gpu in GPUS}


def layer_rows(costs: dict[Case, Costs]) -> Iterator[Sequence[Any]]:
    """Yield the figures of a layer, and of all that is outside of layers: embedding, head and loss."""
    outside = ("kernels outside", "element-wise MB outside", "TFLOP outside")
    yield ("per layer", "way", *figures(next(iter(costs.values()))), *outside)
    for case, cost in costs.items():
        rest = cost.outside
        yield (label(case), case.way, *(f"{value:,}" for value in (*figures(cost).values(), *rest)))


def speed_rows(costs: dict[Case, Costs]) -> Iterator[Sequence[Any]]:
    """Yield the modeled speed of forward and backward, and the ratios to the peers'. The optimizer is left out."""
    yield ("modeled tokens/s", "GPU", *WAYS, *(f"ours : {way}" for way in WAYS[1:]))
    for first in costs:
        if first.way != WAYS[0]:
            continue
        for gpu in GPUS:
            cases = [Case(way, first.size, first.is_quantized, first.dropout) for way in WAYS]
            times = [step_time(costs[case].step(NUM_LAYERS[case.size]), gpu) for case in cases]
            speeds = [f"{TOKENS / time.seconds:,.0f}{' (host)' if time.is_host_bound else ''}" for time in times]
            ratios = [f"{time.seconds / times[0].seconds:.2f}" for time in times[1:]]
            yield (label(first), gpu.name, *speeds, *ratios)


def profile_rows(cost: Costs, top: int) -> Iterator[Sequence[Any]]:
    """Yield the kernels of a layer with most traffic."""
    yield ("kernel", "forward", "backward", "MB forward", "MB backward", "TFLOP")
    counts: dict[bool, Counter[str]] = {False: Counter(), True: Counter()}
    nbytes: dict[bool, Counter[str]] = {False: Counter(), True: Counter()}
    flop: Counter[str] = Counter()
    for kernel, count in cost.layer.items():
        counts[kernel.is_backward][kernel.name] += count
        nbytes[kernel.is_backward][kernel.name] += count * kernel.nbytes
        flop[kernel.name] += count * kernel.flop
    for name, _ in (nbytes[False] + nbytes[True]).most_common(top):
        megabytes = (f"{nbytes[is_backward][name] / 1e6:,.0f}" for is_backward in (False, True))
        yield (name, counts[False][name], counts[True][name], *megabytes, f"{flop[name] / 1e12:.3f}")


def print_rows(rows: Iterator[Sequence[Any]]) -> None:
    """Print rows as a table in Markdown; the first one is its head."""
    for number, row in enumerate(rows):
        print("|", " | ".join(map(str, row)), "|")
        if number == 0:
            print("|", " | ".join("---" for _ in row), "|")
    print()


if __name__ == "__main__":
    main()
