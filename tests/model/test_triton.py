"""The Triton kernels, forward and backward, in Triton's interpreter: equal to references in float64 up to rounding."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch

from tests.conftest import PATIENCE_SECONDS, ROOT

Results = dict[str, dict[str, float]]

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton"),
    pytest.mark.launch,  # the fixture starts a process
]
CHECKS = ("rms_norm", "gate", "rotate", "low_rank", "cross_entropy")
FAMILIES = ("llama", "gemma2", "qwen3")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Run all kernels in one process, since Triton reads TRITON_INTERPRET when it is imported."""
    target = tmp_path_factory.mktemp("triton") / "results.json"
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.model.interpreter", str(target)]
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE_SECONDS
    )
    assert result.returncode == 0, result.stderr[-4000:]
    measured: Results = json.loads(target.read_text(encoding="utf-8"))
    return measured


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("check", CHECKS)
def test_a_kernel_equals_its_reference(results: Results, check: str, dtype: str) -> None:
    """Up to two roundings to the dtype: the interpreter truncates to bfloat16, where a GPU rounds."""
    errors = results[f"{check}-{dtype}"]
    assert max(errors.values()) < max(2 * torch.finfo(getattr(torch, dtype)).eps, 5e-7), errors


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_with_all_kernels_equals_that_of_peft_and_transformers(results: Results, family: str) -> None:
    errors = results[f"model-{family}"]
    assert len(errors) == 1 + 2 * 7, "the loss, and two matrices of seven layers"
    assert max(errors.values()) < 1e-5, errors


def test_without_a_gpu_no_kernel_is_used() -> None:
    from lora_accel.model.kernels.table import KERNELS, has_kernel

    assert not any(has_kernel(name, torch.ones(2, 2)) for name in KERNELS)
