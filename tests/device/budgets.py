"""The budgets of tests/device/test_budgets.py. A table without imports: scripts/check_gpu.py reads it, too."""

from __future__ import annotations

COLUMNS = ("forward kernels", "backward kernels", "copies", "element-wise MB", "saved MB")
BUDGETS: dict[tuple[str, bool], tuple[float, ...]] = {
    # size, nf4
    ("8B", False): (35, 54, 14, 2_161, 1_010),
    ("1B", False): (35, 54, 14, 1_149, 435),
    ("135M", False): (35, 54, 14, 276, 78),
    ("8B", True): (56, 75, 14, 3_368, 683),
    ("1B", True): (56, 75, 14, 1_485, 344),
    ("135M", True): (56, 75, 14, 296, 73),
}
"""4,096 tokens in 8 examples, LoRA of rank 16 with dropout 0.05 on all linear layers, no activation checkpointing."""
