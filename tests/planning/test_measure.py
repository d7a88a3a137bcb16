"""Measuring a run: which micro-batches, what is written, and what happens when memory runs out."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from lora_accel.config.schema import RunConfig
from lora_accel.errors import LoraAccelError
from lora_accel.planning import measure as module
from lora_accel.planning.estimate import make_estimate
from lora_accel.planning.measure import OUT_OF_MEMORY, Measurement, main, measure, measure_in_child
from lora_accel.planning.micro_batches import choose_micro_batches
from lora_accel.setup.data import prepare_data
from tests.conftest import write_jsonl


def test_measuring_runs_the_largest_micro_batch_and_writes_nothing(make_config: Callable[..., RunConfig]) -> None:
    config = make_config(training={"neftune_alpha": 5.0, "label_smoothing": 0.1})
    largest, typical, _ = choose_micro_batches(config, prepare_data(config), packed=True, min_saving=None)
    measured = measure(config)
    assert measured.tokens == [largest.input_ids.numel(), typical.input_ids.numel()]
    assert measured.tokens_per_second == measured.tokens[1] / measured.seconds[1] > 0
    assert not Path(config.output_dir).exists()


def test_the_longest_example_is_in_the_largest_micro_batch(
    make_config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_accel.planning.micro_batches.MAX_STEPS", 1)
    rows = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b " * n}]} for n in [1] * 30
    ]
    rows[17]["messages"][1]["content"] = "b " * 80
    path = write_jsonl(tmp_path / "long.jsonl", rows)
    config = make_config(data={"train": [{"path": str(path)}]}, training={"micro_batch_tokens": 8})
    data = prepare_data(config)
    longest = max(ledger.longest for ledger in data.dataset.ledgers)
    assert choose_micro_batches(config, data, packed=True, min_saving=None).largest.input_ids.numel() == longest


@pytest.mark.parametrize(
    ("error", "code"),
    [(MemoryError(), OUT_OF_MEMORY), (RuntimeError("DefaultCPUAllocator: can't allocate memory"), OUT_OF_MEMORY)],
)
def test_a_failed_allocation_has_its_own_exit_code(
    monkeypatch: pytest.MonkeyPatch,
    make_config: Callable[..., RunConfig],
    config_file: Any,
    error: Exception,
    code: int,
) -> None:
    def fail(_: RunConfig) -> Measurement:
        raise error

    monkeypatch.setattr(module, "measure", fail)
    assert main(["--config", str(config_file(make_config()))]) == code


def test_other_errors_are_not_taken_for_it(
    monkeypatch: pytest.MonkeyPatch, make_config: Callable[..., RunConfig], config_file: Any
) -> None:
    def fail(_: RunConfig) -> Measurement:
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(module, "measure", fail)
    with pytest.raises(RuntimeError, match="shapes differ"):
        main(["--config", str(config_file(make_config()))])


def ended(code: int, stdout: str = "", stderr: str = "") -> Callable[..., Any]:
    return lambda *_, **__: subprocess.CompletedProcess([], code, stdout, stderr)


def test_results_of_the_child_process(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = Measurement(3, 2, [5, 4], [0.5, 0.5], "cpu", 7)
    monkeypatch.setattr(module.subprocess, "run", ended(0, "a line\n" + json.dumps(vars(measured)) + "\n"))
    assert measure_in_child(Path("run.yaml"), []) == measured
    for code in (OUT_OF_MEMORY, -signal.SIGKILL):
        monkeypatch.setattr(module.subprocess, "run", ended(code))
        assert measure_in_child(Path("run.yaml"), []) is None
    monkeypatch.setattr(module.subprocess, "run", ended(2, stderr="a warning\nerror: model.dtype is wrong\n"))
    with pytest.raises(LoraAccelError, match="--measure: model"):
        measure_in_child(Path("run.yaml"), [])


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_estimate_is_within_a_tenth_of_the_measured_memory(
    make_config: Callable[..., RunConfig],
    config_file: Any,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    family: str,
) -> None:
    """In a process of its own, by the kernel's count of resident memory."""
    sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8}
    gpt2 = {"n_embd": 512, "n_layer": 8, "n_head": 8, "resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0}
    config = AutoConfig.for_model(family, vocab_size=16_000, **(gpt2 if family == "gpt2" else sizes))
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "medium")
    tokenizer.save_pretrained(tmp_path / "medium")
    run = make_config(
        model={"name_or_path": str(tmp_path / "medium")}, training={"batch_size": 64, "micro_batch_tokens": 1024}
    )
    measured = measure_in_child(config_file(run), [])
    option = make_estimate(run, prepare_data(run), "no", 1, with_4_bits=False).options[0]
    assert measured is not None
    assert option.memory is not None
    assert option.memory.total == pytest.approx(measured.peak_bytes, rel=0.1)
