"""Combined adapters equal PEFT's combination on a loaded base; adapters with more than LoRA matrices raise."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from lora_accel import cli
from lora_accel.errors import ArtifactError, ConfigError
from lora_accel.merging.merge import merge_weighted

WEIGHTS = (0.7, 0.3)


@pytest.fixture
def adapters(tiny_model: Callable[..., Path], tmp_path: Path) -> Callable[..., list[Path]]:
    """Return a function that saves two adapters of one base."""

    def make(**options: Any) -> list[Path]:
        folders = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            base = AutoModelForCausalLM.from_pretrained(tiny_model())
            settings = {"r": 4, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False} | options
            model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **settings))
            model.save_pretrained(tmp_path / f"adapter{seed}", save_embedding_layers=False)
            folders.append(tmp_path / f"adapter{seed}")
        return folders

    return make


@pytest.mark.parametrize("how", ["linear", "svd", "ties", "dare_linear"])
def test_combination_equals_peft(
    adapters: Callable[..., list[Path]], tiny_model: Callable[..., Path], tmp_path: Path, how: str
) -> None:
    folders, density = adapters(), None if how in ("linear", "svd") else 0.5
    pairs = list(zip(folders, WEIGHTS, strict=True))
    merged = merge_weighted(pairs, tmp_path / "merged", how=how, density=density)["merged"]
    assert merged["adapter"] == {str(folder): weight for folder, weight in pairs}
    assert merged["agreement"]["moved"] < 1e-4

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model()), folders[0], "one")
    model.load_adapter(folders[1], "two")
    torch.manual_seed(0)
    model.base_model.add_weighted_adapter(["one", "two"], list(WEIGHTS), "both", combination_type=how, density=density)
    model.set_adapter("both")
    expected = model.merge_and_unload().state_dict()
    actual = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    assert not torch.equal(
        expected["model.layers.0.self_attn.q_proj.weight"],
        AutoModelForCausalLM.from_pretrained(tiny_model()).state_dict()["model.layers.0.self_attn.q_proj.weight"],
    )
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{"bias": "all"}, {"modules_to_save": ["lm_head"]}, {"use_dora": True}])
def test_adapters_with_more_than_lora_matrices_raise(
    adapters: Callable[..., list[Path]], tmp_path: Path, options: dict[str, Any]
) -> None:
    with pytest.raises(ArtifactError, match="only the matrices of plain LoRA can be combined"):
        merge_weighted(list(zip(adapters(**options), WEIGHTS, strict=True)), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_invalid_method_or_density_raises(adapters: Callable[..., list[Path]], tmp_path: Path) -> None:
    pairs = list(zip(adapters(), WEIGHTS, strict=True))
    out, base = tmp_path / "merged", str(tmp_path / "absent")  # checked before the base, which may be downloaded
    with pytest.raises(ConfigError, match="use linear, svd"):
        merge_weighted(pairs, out, how="median", base=base)
    with pytest.raises(ConfigError, match="needs a density above 0 and up to 1"):
        merge_weighted(pairs, out, how="ties", base=base)
    with pytest.raises(ConfigError, match="an adapter is given twice"):
        merge_weighted([pairs[0], pairs[1], pairs[0]], out, base=base)
    with pytest.raises(ConfigError, match="takes no density"):
        merge_weighted(pairs, out, how="linear", density=0.5, base=base)
    single: list[dict[str, Any]] = [{"density": 0.5}, {"combine": "ties"}]
    for options in single:
        with pytest.raises(ConfigError, match=r"--combine, --density: need several adapters"):
            cli.merge(str(pairs[0][0]), out, **options)


def test_adapters_of_different_bases_raise_before_the_base_is_loaded(
    adapters: Callable[..., list[Path]], tmp_path: Path
) -> None:
    folders = adapters()
    for folder in folders:
        base = {"name_or_path": "base", "revision": None, "sha256": {"model.safetensors": folder.name}}
        (folder / "provenance.json").write_text(json.dumps({"base": base}))
    pairs, out, base = list(zip(folders, WEIGHTS, strict=True)), tmp_path / "merged", str(tmp_path / "absent")
    with pytest.raises(ArtifactError, match=r"--adapter: .*adapter1 and .*adapter2 were trained on different bases"):
        merge_weighted(pairs, out, base=base)
    with pytest.raises(ArtifactError, match="there is no such folder"):
        merge_weighted(pairs, out, base=base, force=True)
