"""A merge killed at any time leaves no output folder, and running it again completes it."""

from __future__ import annotations

import os
import random
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from lora_accel.saving.atomic import LEFTOVER, why_invalid
from tests import forked

pytestmark = pytest.mark.launch

MERGE = """
import sys
from lora_accel.merging.merge import merge_adapter
merge_adapter(sys.argv[1], sys.argv[2], verify=False, overwrite=True, max_shard_bytes=4_000_000)
"""


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """Return an adapter on a base of 90 MB, whose merge takes long enough to be killed."""
    folder = tmp_path_factory.mktemp("kills")
    config = AutoConfig.for_model(
        "llama",
        vocab_size=len(tokenizer),
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config)
    base.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    lora = LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(base, lora).save_pretrained(folder / "adapter", save_embedding_layers=False)
    return folder / "adapter"


def start_merge(adapter: Path, out: Path, **environment: str) -> BaseProcess:
    script, log = adapter.with_name("merge.py"), adapter.with_name("log")
    script.write_text(MERGE, encoding="utf-8")
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    return forked.start([str(script), str(adapter), str(out)], environment, log, log)


def exit_code(process: BaseProcess) -> int | None:
    """Wait for the end of a process; return its exit code."""
    process.join()
    return process.exitcode


def wait_for(path: Path, process: BaseProcess) -> None:
    """Wait until a path exists or the process has ended."""
    while not path.exists() and process.is_alive():
        time.sleep(0.001)


@pytest.mark.parametrize("times", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_at_random_times(adapter: Path, tmp_path: Path, times: int) -> None:
    """Half of the kills are at any time, half while files are written. The first one waits for a fault point."""
    rng, reference, out = random.Random(times), tmp_path / "reference", tmp_path / "merged"
    process, start = start_merge(adapter, reference), time.monotonic()
    wait_for(tmp_path / ".reference.lora-accel-writing", process)
    start_writing = time.monotonic()
    wait_for(reference, process)
    end = time.monotonic()
    assert exit_code(process) == 0
    expected = {file.name: load_file(file) for file in reference.glob("*.safetensors")}
    assert len(expected) > 5

    num_interrupted, mark = 0, tmp_path.with_name(f"{tmp_path.name}-mark")
    pauses = {"LORA_ACCEL_FAULT": "merge.mid@3=pause", "LORA_ACCEL_FAULT_MARK": str(mark)}
    for number in range(times):
        process = start_merge(adapter, out, **(pauses if number == 0 else {}))
        if number == 0:
            wait_for(mark.with_name(f"{mark.name}-0"), process)
        elif number % 2:
            time.sleep(rng.uniform(0, end - start))
        else:
            wait_for(tmp_path / ".merged.lora-accel-writing", process)
            time.sleep(rng.uniform(0, end - start_writing))
        process.kill()
        process.join()
        num_interrupted += any(LEFTOVER.fullmatch(path.name) for path in tmp_path.iterdir())
        if out.exists():  # the merge completed before the kill
            assert why_invalid(out) is None
    assert num_interrupted, "at least one kill must interrupt a write"
    assert exit_code(start_merge(adapter, out)) == 0
    assert why_invalid(out) is None
    assert {path.name for path in tmp_path.iterdir()} == {"reference", "merged"}
    for name, tensors in expected.items():
        actual = load_file(out / name)
        assert all(torch.equal(actual[key], tensor) for key, tensor in tensors.items())


@pytest.mark.parametrize(
    "fault",
    [
        "merge.mid@1",
        pytest.param("merge.mid@7", marks=pytest.mark.slow),
        pytest.param("save.before_manifest@1", marks=pytest.mark.slow),
        "save.before_rename@1",
    ],
)
def test_killed_at_fault_points(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    out: Path = tmp_path / "merged"
    monkeypatch.setenv("LORA_ACCEL_FAULT", f"{fault}=kill")
    assert exit_code(start_merge(adapter, out)) == -signal.SIGKILL
    assert not out.exists()
    monkeypatch.delenv("LORA_ACCEL_FAULT")
    assert exit_code(start_merge(adapter, out)) == 0
    assert why_invalid(out) is None
