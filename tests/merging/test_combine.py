"""Adapters are combined as PEFT combines them on a whole base; what it would leave out is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from lora_accel.errors import ArtifactError, ConfigError
from lora_accel.merging.merge import merge_weighted

WEIGHTS = (0.7, 0.3)


@pytest.fixture
def adapters(tiny_model: Callable[..., Path], tmp_path: Path) -> Callable[..., list[Path]]:
    """Save two adapters of one base."""

    def make(**options: Any) -> list[Path]:
        folders = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            base = AutoModelForCausalLM.from_pretrained(tiny_model())
            told = {"r": 4, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False} | options
            model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **told))
            model.save_pretrained(tmp_path / f"adapter{seed}", save_embedding_layers=False)
            folders.append(tmp_path / f"adapter{seed}")
        return folders

    return make


@pytest.mark.parametrize("how", ["linear", "svd", "ties", "dare_linear"])
def test_it_is_what_peft_combines(
    adapters: Callable[..., list[Path]], tiny_model: Callable[..., Path], tmp_path: Path, how: str
) -> None:
    folders, density = adapters(), None if how in ("linear", "svd") else 0.5
    told = merge_weighted(list(zip(folders, WEIGHTS, strict=True)), tmp_path / "merged", how=how, density=density)
    assert told["merged"]["adapter"] == {str(folder): w for folder, w in zip(folders, WEIGHTS, strict=True)}
    assert told["merged"]["agreement"]["moved"] < 1e-4

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model()), folders[0], "one")
    model.load_adapter(folders[1], "two")
    torch.manual_seed(0)
    model.base_model.add_weighted_adapter(["one", "two"], list(WEIGHTS), "both", combination_type=how, density=density)
    model.set_adapter("both")
    expected = model.merge_and_unload().state_dict()
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    assert not torch.equal(
        expected["model.layers.0.self_attn.q_proj.weight"],
        AutoModelForCausalLM.from_pretrained(tiny_model()).state_dict()["model.layers.0.self_attn.q_proj.weight"],
    )
    for name, tensor in expected.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{"bias": "all"}, {"modules_to_save": ["lm_head"]}, {"use_dora": True}])
def test_what_is_more_than_matrices_is_refused(
    adapters: Callable[..., list[Path]], tmp_path: Path, options: dict[str, Any]
) -> None:
    with pytest.raises(ArtifactError, match="only matrices of plain LoRA can be combined"):
        merge_weighted(list(zip(adapters(**options), WEIGHTS, strict=True)), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_words_that_fit_no_way_of_combining_are_refused(adapters: Callable[..., list[Path]], tmp_path: Path) -> None:
    pairs = list(zip(adapters(), WEIGHTS, strict=True))
    with pytest.raises(ConfigError, match="say linear, svd"):
        merge_weighted(pairs, tmp_path / "merged", how="median")
    with pytest.raises(ConfigError, match="needs one, over 0 and up to 1"):
        merge_weighted(pairs, tmp_path / "merged", how="ties")
    with pytest.raises(ConfigError, match="has none"):
        merge_weighted(pairs, tmp_path / "merged", how="linear", density=0.5)
