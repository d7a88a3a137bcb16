"""`save_adapter` works in anybody's Accelerate script, on every backend."""

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
def test_an_adapter_is_saved_whole_from_a_script_of_its_own(
    forks: Forks, tiny_model: Callable[..., Path], tmp_path: Path, preset: str
) -> None:
    ran = forks.launch("tests/distributed/plain_script.py", tiny_model("gpt2"), tmp_path, preset=preset)
    assert ran.returncode == 0, ran.stderr[-3000:]

    def saved(name: str) -> dict[str, torch.Tensor]:
        return dict(load_file(tmp_path / name / "adapter_model.safetensors"))

    whole = saved("auto")
    assert sum(name.endswith(".bias") for name in whole) == 4
    assert all(tensor.numel() and tensor.abs().max() > 0 for tensor in whole.values())
    others = ["parameters"] if preset == "cpu_zero3" else ["parameters", "state_dict"]
    for other in others:
        assert saved(other).keys() == whole.keys()
        assert all(torch.equal(tensor, whole[name]) for name, tensor in saved(other).items())
    assert saved("none").keys() == {name for name in whole if not name.endswith(".bias")}
    # `all` adds biases that nobody trained here: under ZeRO-3 they have no master and are gathered in groups.
    base = AutoModelForCausalLM.from_pretrained(tiny_model("gpt2"))
    before = {f"base_model.model.{name}": value.detach().clone() for name, value in base.named_parameters()}
    extra = saved("all").keys() - whole.keys()
    assert len(extra) == 2 * 2 + 2 * 2 + 1  # c_proj twice and two norms in each of two layers, and the last norm
    assert all(torch.equal(saved("all")[name], before[name]) for name in extra)

    model = PeftModel.from_pretrained(base, tmp_path / "auto").eval()
    with torch.no_grad():
        logits = model(input_ids=torch.arange(5, 37)[None]).logits
    assert torch.allclose(logits, load_file(tmp_path / "logits.safetensors")["logits"], atol=1e-5)


def test_where_the_first_cannot_write_no_other_waits(
    forks: Forks, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    ran = forks.launch("tests/distributed/plain_script.py", tiny_model("gpt2"), tmp_path, "no-room", preset="cpu_ddp")
    assert ran.returncode != 0
    assert "saving auto failed on rank 0" in ran.stderr
    assert not list(tmp_path.iterdir()), "nothing half-made stays"
