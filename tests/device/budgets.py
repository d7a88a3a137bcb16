"""The budgets of tests/device/test_budgets.py. A table without imports: scripts/check_gpu.py reads it, too."""

from __future__ import annotations

COLUMNS = ("forward kernels", "backward kernels", "copies", "element-wise MB", "saved MB")
BUDGETS: dict[tuple[str, bool], tuple[float, ...]] = {
    # size, nf4
    ("8B", False): (110, 141, 41, 18_313, 1_145),
    ("1B", False): (110, 141, 41, 9_636, 502),
    ("135M", False): (110, 141, 41, 2_373, 97),
    ("8B", True): (138, 162, 48, 20_224, 818),
    ("1B", True): (138, 162, 48, 10_358, 411),
    ("135M", True): (138, 162, 48, 2_478, 92),
}
"""4,096 tokens in 8 examples, LoRA of rank 16 with dropout 0.05 on all linear layers, no activation checkpointing."""
