"""The package's own step and evaluation on a fake GPU: devices, waits of the host, and copies from it.

One process runs all cases. It preloads a library that makes torch believe in a GPU (fake_cuda.cpp).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import PATIENCE_SECONDS, ROOT, chat_rows, write_jsonl
from tests.families import model_of

FAMILIES = ("llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "mixtral", "gpt2", "opt")
SETTINGS: dict[str, dict[str, Any]] = {
    "packed": {},
    "padded": {"data": {"packing": False}},
    "checkpointed": {"training": {"activation_checkpointing": True}},
    "fp32": {"training": {"mixed_precision": "no"}},
    "fp16": {"training": {"mixed_precision": "fp16"}},
    "nf4": {"quantization": {"bits": 4}},
    "T4": {"training": {"mixed_precision": "fp16"}},
}
CASES = [(family, "packed") for family in FAMILIES]
CASES += [("llama", setting) for setting in SETTINGS if setting != "packed"]
CASES += [
    ("gemma2", "T4"),
    ("gemma2", "padded"),
    ("mixtral", "padded"),
    ("gemma3_text", "checkpointed"),
    ("gpt2", "nf4"),
]
CAPABILITIES = {"llama-T4": (7, 5), "gemma2-T4": (7, 5)}
"""Compute capability of the fake GPU; 9.0 elsewhere."""
CONTROLS = ("buffer_on_the_cpu", "value_on_the_host", "copy_per_layer")

Result = Mapping[str, Any]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="preloads a library")


@pytest.fixture(scope="module")
def results(library: Path, tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> dict[str, Result]:
    """Run all cases in one process; return the result of each."""
    root = tmp_path_factory.mktemp("device")
    rows = write_jsonl(root / "rows.jsonl", chat_rows(21))
    for family in FAMILIES:
        model_of(family, vocab_size=400, max_position_embeddings=512, hidden_size=64, head_dim=16).save_pretrained(
            root / family
        )
        tokenizer.save_pretrained(root / family)

    def case(name: str, family: str, setting: Mapping[str, Any], control: str = "none") -> dict[str, Any]:
        config: dict[str, Any] = {
            "output_dir": str(root / "run"),
            "model": {"name_or_path": str(root / family)},
            # PEFT's LoRA on experts has no dropout.
            "adapter": {"target_modules": "all-linear", "dropout": 0.0 if family == "mixtral" else 0.1},
            "data": {"train": [{"path": str(rows)}], "eval": [{"path": str(rows), "limit": 8}], "max_length": 200},
            "training": {"epochs": 1, "batch_size": 4, "micro_batch_tokens": 160, "mixed_precision": "bf16"}
            | {"activation_checkpointing": False},
            "logging": {"trackers": [], "report": False},
        }
        for key, change in setting.items():
            config[key] = config.get(key, {}) | change
        return {"id": name, "config": config, "control": control, "capability": CAPABILITIES.get(name, (9, 0))}

    cases = [case(f"{family}-{setting}", family, SETTINGS[setting]) for family, setting in CASES]
    cases += [case(control, "llama", {}, control) for control in CONTROLS]
    request, answer = root / "cases.json", root / "results.json"
    request.write_text(json.dumps({"library": str(library), "cases": cases}), encoding="utf-8")
    environment = os.environ | {"LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.device.worker", str(request), str(answer)]
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE_SECONDS
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return {entry["id"]: entry for entry in json.loads(answer.read_text(encoding="utf-8"))}


@pytest.mark.parametrize(("family", "setting"), CASES)
def test_a_step_waits_once_and_copies_only_its_batch(results: dict[str, Result], family: str, setting: str) -> None:
    result = results[f"{family}-{setting}"]
    assert "error" not in result, (result["error"], result["frames"])
    assert result["packed"] is (setting != "padded")
    assert result["micro_batches"] > 1
    assert result["syncs"] == ["step.py:train_step"], "one wait per step, none per micro-batch"
    assert result["prepared_after"] == [[1, 0]], "the next step's batch is built before the wait"
    assert result["to_device"] == ["batch.py:<dictcomp>"] * result["fields"] * result["micro_batches"]
    assert result["blocking"] == []
    assert result["evaluation_syncs"] == ["evaluator.py:evaluate"], "one wait per evaluation source"


def test_mistakes_are_found(results: dict[str, Result]) -> None:
    """The checks above would fail for each of them."""
    assert "found at least two devices, cuda:0 and cpu" in results["buffer_on_the_cpu"]["error"]
    assert "DataDependentOutputException" in results["value_on_the_host"]["error"]
    assert results["copy_per_layer"]["blocking"].count("controls.py:hook") >= 4


@pytest.mark.parametrize(
    ("case", "kernel"),
    [
        ("llama-packed", "_varlen_attn"),
        ("gemma3_text-packed", "_varlen_attn"),
        ("llama-fp32", "_efficient_attention"),
        ("llama-T4", "_efficient_attention"),
        ("gemma2-packed", "flex_attention"),
        ("gemma2-T4", "flex_attention"),
    ],
)
def test_packed_attention_is_one_kernel_per_layer(results: dict[str, Result], case: str, kernel: str) -> None:
    """Instead of a loop over blocks, which would start a dozen kernels for each."""
    assert "error" not in results[case], (results[case]["error"], results[case]["frames"])
    kernels = results[case]["kernels"]
    assert "_softmax_backward_data" not in kernels, "of the loop"
    forward = {"_efficient_attention": "_efficient_attention_forward"}.get(kernel, kernel)
    expected = 2 * results[case]["micro_batches"]  # of two layers
    assert (kernels.get(forward), kernels.get(f"{kernel}_backward")) == (expected, expected)
