"""`save_adapter` works in any Accelerate script, on every backend."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.distributed.forked import Forks

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("preset", ["cpu", "cpu_ddp", "cpu_zero2", "cpu_zero3"])
def test_script_saves_the_full_adapter(
    forks: Forks, tiny_model: Callable[..., Path], tmp_path: Path, preset: str
) -> None:
    result = forks.launch("tests/distributed/plain_script.py", tiny_model("gpt2"), tmp_path, preset=preset)
    assert result.returncode == 0, result.stderr[-3000:]

    def saved(name: str) -> dict[str, torch.Tensor]:
        return dict(load_file(tmp_path / name / "adapter_model.safetensors"))

    adapter = saved("auto")
    assert sum(name.endswith(".bias") for name in adapter) == 4
    assert all(tensor.numel() and tensor.abs().max() > 0 for tensor in adapter.values())
    variants = ["parameters"] if preset == "cpu_zero3" else ["parameters", "state_dict"]
    for other in variants:
        assert saved(other).keys() == adapter.keys()
        assert all(torch.equal(tensor, adapter[name]) for name, tensor in saved(other).items())
    assert saved("none").keys() == {name for name in adapter if not name.endswith(".bias")}
    # `all` adds biases that were not trained: under ZeRO-3 they have no master and are gathered in groups.
    base = AutoModelForCausalLM.from_pretrained(tiny_model("gpt2"))
    before = {f"base_model.model.{name}": value.detach().clone() for name, value in base.named_parameters()}
    extra = saved("all").keys() - adapter.keys()
    assert len(extra) == 2 * 2 + 2 * 2 + 1  # two c_proj and two norms in each of two layers, and the last norm
    assert all(torch.equal(saved("all")[name], before[name]) for name in extra)

    model = PeftModel.from_pretrained(base, tmp_path / "auto").eval()
    with torch.no_grad():
        logits = model(input_ids=torch.arange(5, 37)[None]).logits
    assert torch.allclose(logits, load_file(tmp_path / "logits.safetensors")["logits"], atol=1e-5)


def test_full_disk_on_the_main_process_ends_all_ranks(
    forks: Forks, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    result = forks.launch(
        "tests/distributed/plain_script.py", tiny_model("gpt2"), tmp_path, "full-disk", preset="cpu_ddp"
    )
    assert result.returncode != 0
    assert "saving auto failed on rank 0" in result.stderr
    assert not list(tmp_path.iterdir()), "no partial files are left"
