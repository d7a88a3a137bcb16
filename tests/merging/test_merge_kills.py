"""A merge killed at any moment leaves nothing that looks like a model, and the same command completes it."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from lora_accel.saving.atomic import LEFTOVER, why_invalid
from tests.conftest import ROOT

MERGE = """
import sys
from lora_accel.merging.merge import merge_adapter
print("begins", flush=True)
merge_adapter(sys.argv[1], sys.argv[2], verify=False, overwrite=True, max_shard_bytes=4_000_000)
"""


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """An adapter on a base of 90 MB: its merge takes a while."""
    place = tmp_path_factory.mktemp("kills")
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
    base.save_pretrained(place / "base")
    tokenizer.save_pretrained(place / "base")
    base = AutoModelForCausalLM.from_pretrained(place / "base")
    lora = LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(base, lora).save_pretrained(place / "adapter", save_embedding_layers=False)
    return place / "adapter"


def begun(adapter: Path, out: Path, **environment: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", MERGE, str(adapter), str(out)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "begins\n"
    return process


def seen(path: Path, process: subprocess.Popen[str]) -> None:
    """Wait until a path is there, or the process has ended."""
    while not path.exists() and process.poll() is None:
        time.sleep(0.001)


@pytest.mark.parametrize("times", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_at_random_moments(adapter: Path, tmp_path: Path, times: int) -> None:
    """Half of them over the whole of the merge, half while files are written; the first one certainly."""
    chance, straight, out = random.Random(times), tmp_path / "straight", tmp_path / "merged"
    with begun(adapter, straight) as process:
        began = time.monotonic()
        seen(tmp_path / ".straight.writing", process)
        writes = time.monotonic()
        seen(straight, process)
        ends = time.monotonic()
        assert process.wait() == 0
    expected = {file.name: load_file(file) for file in straight.glob("*.safetensors")}
    assert len(expected) > 5

    in_the_middle, mark = 0, tmp_path.with_name(f"{tmp_path.name}-mark")
    pauses = {"LORA_ACCEL_FAULT": "merge.mid@3=pause", "LORA_ACCEL_FAULT_MARK": str(mark)}
    for number in range(times):
        with begun(adapter, out, **(pauses if number == 0 else {})) as process:
            if number == 0:
                seen(mark.with_name(f"{mark.name}-0"), process)
            elif number % 2:
                time.sleep(chance.uniform(0, ends - began))
            else:
                seen(tmp_path / ".merged.writing", process)
                time.sleep(chance.uniform(0, ends - writes))
            process.send_signal(signal.SIGKILL)
            process.wait()
        in_the_middle += any(LEFTOVER.fullmatch(path.name) for path in tmp_path.iterdir())
        if out.exists():  # it was quicker, and then it is whole
            assert why_invalid(out) is None
    assert in_the_middle, "at least one of the kills came while something was written"
    with begun(adapter, out) as process:
        assert process.wait() == 0
    assert why_invalid(out) is None
    assert {path.name for path in tmp_path.iterdir()} == {"straight", "merged"}
    for name, tensors in expected.items():
        found = load_file(out / name)
        assert all(torch.equal(found[key], tensor) for key, tensor in tensors.items())


@pytest.mark.parametrize(
    "place",
    [
        "merge.mid@1",
        pytest.param("merge.mid@7", marks=pytest.mark.slow),
        pytest.param("save.before_manifest@1", marks=pytest.mark.slow),
        "save.before_rename@1",
    ],
)
def test_killed_where_it_hurts(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    out: Path = tmp_path / "merged"
    monkeypatch.setenv("LORA_ACCEL_FAULT", f"{place}=kill")
    with begun(adapter, out) as process:
        assert process.wait() == -signal.SIGKILL
    assert not out.exists()
    monkeypatch.delenv("LORA_ACCEL_FAULT")
    with begun(adapter, out) as process:
        assert process.wait() == 0
    assert why_invalid(out) is None
