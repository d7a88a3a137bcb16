"""Each bias mode on models with biases, on one process and on two under each backend: the right tensors, in full."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lora_accel import run_training
from lora_accel.config.files import config_to_yaml
from lora_accel.config.schema import RunConfig
from tests.conftest import TINY
from tests.distributed.forked import Forks
from tests.distributed.worker import TOKENS

pytestmark = pytest.mark.distributed

FAMILIES = ("gpt2", "opt", "qwen2")
MODES = ("none", "lora_only", "all")


def layers_with_lora(base: torch.nn.Module) -> list[str]:
    """Return the names of all linear layers except the head, as `all-linear` selects them."""
    linear = ("Linear", "Conv1D")
    return [n for n, m in base.named_modules() if type(m).__name__ in linear and not n.endswith("lm_head")]


def expected_tensors(base: torch.nn.Module, mode: str) -> set[str]:
    """Return the names that an adapter file must contain, derived from the base alone."""
    layers, parameters = layers_with_lora(base), dict(base.named_parameters())
    names = {f"base_model.model.{layer}.lora_{x}.weight" for layer in layers for x in "AB"}
    wrapped = {f"{layer}.bias": f"base_model.model.{layer}.base_layer.bias" for layer in layers}
    if mode != "none":
        names |= {saved for own, saved in wrapped.items() if own in parameters}
    if mode == "all":
        names |= {f"base_model.model.{n}" for n in parameters if n.endswith(".bias") and n not in wrapped}
    return names


SLOW = pytest.mark.slow


@pytest.fixture(
    params=["one process", pytest.param("cpu_ddp", marks=SLOW), pytest.param("cpu_zero2", marks=SLOW), "cpu_zero3"],
    scope="module",
)
def runs(
    request: pytest.FixtureRequest,
    forks: Forks,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Callable[..., Path],
) -> Callable[[str, str], Path]:
    """Train every family in every mode for 3 steps on one backend; return a function that returns the run folder."""
    from tests.conftest import chat_rows, write_jsonl

    root = tmp_path_factory.mktemp(request.param.replace(" ", "-"))
    rows, files = write_jsonl(root / "rows.jsonl", chat_rows(12)), []
    for family in FAMILIES:
        for mode in MODES:
            values: dict[str, Any] = {
                "output_dir": str(root / f"{family}-{mode}"),
                "model": {"name_or_path": str(tiny_model(family))},
                "adapter": {"r": 2, "alpha": 4, "dropout": 0.1, "target_modules": "all-linear", "bias": mode},
                "data": {"train": [{"path": str(rows)}], "max_length": 200},
                "training": {"epochs": 1, "batch_size": 4, "micro_batch_tokens": 256, "learning_rate": 1e-2}
                | {"mixed_precision": "no"},  # the logits are compared in float32
                "logging": {"trackers": [], "report": False},
            }
            config = RunConfig.model_validate(values)
            files.append(root / f"{family}-{mode}.yaml")
            files[-1].write_text(config_to_yaml(config), encoding="utf-8")
            if request.param == "one process":
                run_training(config)
    if request.param != "one process":
        result = forks.launch("tests/distributed/worker.py", *files, preset=request.param)
        assert result.returncode == 0, result.stderr[-4000:]
    return lambda family, mode: root / f"{family}-{mode}"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_expected_tensors_are_saved_in_full(
    runs: Callable[[str, str], Path], tiny_model: Callable[..., Path], family: str, mode: str
) -> None:
    folder = runs(family, mode)
    base = AutoModelForCausalLM.from_pretrained(tiny_model(family))
    before = {f"base_model.model.{name}": value.clone() for name, value in base.named_parameters()}
    saved = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert saved.keys() == expected_tensors(base, mode)
    assert len(saved) >= 2 * TINY[family].get("num_hidden_layers", 2) * 4
    for name, tensor in saved.items():
        assert tensor.numel() > 0
        assert tensor.dtype == torch.float32
        assert tensor.abs().max() > 0, f"{name} is zero after training"
        if name.endswith(".bias"):
            assert not torch.equal(tensor, before[name.replace(".base_layer", "")]), f"{name} is unchanged by training"

    model = PeftModel.from_pretrained(base, folder / "adapter").eval()
    with torch.no_grad():
        logits = model(input_ids=TOKENS).logits
    live_logits = folder / "logits.safetensors"
    if live_logits.exists():  # launched runs write them; tests/saving/test_adapter.py compares for one process
        assert torch.allclose(logits, load_file(live_logits)["logits"], atol=1e-5)
    else:
        assert "one-process" in str(folder)
