"""Whether an adapter is plain LoRA: the note agrees with the distance between W + s B A and base + adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import peft
import pytest
import torch
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lora_accel.config.schema import AdapterSection
from lora_accel.model.adapter import add_adapter, skipped_experts
from lora_accel.model.initial_adapter import initial_names
from lora_accel.saving.adapter import write_adapter
from lora_accel.saving.attach import load_adapter
from lora_accel.saving.names import adapter_names
from lora_accel.saving.serving import PREFIX, differences_from_plain_lora, serving_note
from lora_accel.saving.tensor_files import read_adapter
from tests.families import model_of

DIRECTLY = "vLLM can load this adapter directly"


class Kind(NamedTuple):
    """A kind of adapter, and what the note about it contains."""

    options: dict[str, Any]
    note: str
    family: str = "llama"
    by_peft: bool = False
    """Whether PEFT adds the adapter, instead of this package."""


KINDS = {
    "plain": Kind({}, DIRECTLY),
    "float alpha": Kind({"lora_alpha": 6.5}, DIRECTLY),
    "rslora": Kind({"use_rslora": True}, DIRECTLY),
    "gaussian": Kind({"init_lora_weights": "gaussian"}, DIRECTLY),
    "orthogonal": Kind({"init_lora_weights": "orthogonal"}, DIRECTLY),
    "mica": Kind({"init_lora_weights": "mica"}, DIRECTLY),
    "pissa": Kind({"init_lora_weights": "pissa"}, DIRECTLY),
    "pissa_niter": Kind({"init_lora_weights": "pissa_niter_2"}, DIRECTLY),
    "olora": Kind({"init_lora_weights": "olora"}, DIRECTLY),
    "olora and rslora": Kind({"init_lora_weights": "olora", "use_rslora": True}, DIRECTLY),
    "olora of Conv1D": Kind({"init_lora_weights": "olora", "target_modules": ["c_attn", "c_proj"]}, DIRECTLY, "gpt2"),
    "pissa of Conv1D": Kind({"init_lora_weights": "pissa", "target_modules": ["c_attn", "c_proj"]}, DIRECTLY, "gpt2"),
    "pissa of PEFT": Kind({"init_lora_weights": "pissa"}, "init_lora_weights=pissa", by_peft=True),
    "olora of PEFT": Kind({"init_lora_weights": "olora"}, "init_lora_weights=olora", by_peft=True),
    "kasa": Kind({"kasa_config": {}}, "KaSA"),
    "bdlora": Kind({"use_bdlora": {"target_modules_bd_b": ["_proj"], "nblocks": 2}}, "BD-LoRA"),
    "velora": Kind({"velora_config": {"init_type": "random"}}, DIRECTLY),
    "alpha_pattern": Kind({"alpha_pattern": {"v_proj": 64}}, "alpha_pattern"),
    "rank_pattern": Kind({"rank_pattern": {"v_proj": 2}}, "rank_pattern"),
    "patterns that cancel out": Kind({"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 4}}, DIRECTLY),
    "dora": Kind({"use_dora": True}, "DoRA"),
    "lora_bias": Kind({"lora_bias": True}, "lora_bias", "qwen2"),
    "bias of all": Kind({"bias": "all"}, "biases", "qwen2"),
    "bias of LoRA": Kind({"bias": "lora_only"}, "biases", "qwen2"),
    "modules_to_save": Kind({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "tokens": Kind({"trainable_token_indices": [3, 5]}, "trained tokens"),
    "head": Kind({"target_modules": ["q_proj", "lm_head"]}, DIRECTLY),
    "embeddings": Kind({"target_modules": ["q_proj", "embed_tokens"]}, "LoRA on embeddings"),
    "experts": Kind({"target_parameters": ["mlp.experts.gate_up_proj"]}, "target_parameters", "mixtral"),
    "experts by old names": Kind({"target_modules": ["q_proj", "w1", "w2", "w3"]}, "LoRA on experts", "mixtral"),
    "replication": Kind({"layer_replication": [[0, 2], [1, 2]]}, "cannot be merged", by_peft=True),
    "alora": Kind({"alora_invocation_tokens": [7]}, "aLoRA, and it cannot be merged"),
}
SINCE_PEFT_021 = ("mica", "kasa", "bdlora", "velora", "experts by old names")


def save_kind(kind: Kind, folder: Path) -> None:
    """Save a base, and a trained adapter of a kind."""
    base = model_of(kind.family)
    base.save_pretrained(folder / "base")
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]} | kind.options
    if kind.by_peft:
        model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **options))
    else:
        options["alpha"] = float(options.pop("lora_alpha"))
        model = add_adapter(base, AdapterSection(dropout=0.0, **options), seed=1, autocast=False)
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    (folder / "adapter").mkdir()
    parameters = dict(model.named_parameters())
    names = adapter_names(model, model.active_peft_config.bias) + initial_names(model)
    write_adapter(model, {name: parameters[name].detach() for name in names}, folder / "adapter")


def add_plain_lora(base: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Add s B A as a server does that reads only r, lora_alpha, use_rslora, and the matrices A and B."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    tensors = load_file(folder / "adapter_model.safetensors")
    scaling = config["lora_alpha"] / config["r"] ** (0.5 if config["use_rslora"] else 1)
    modules = dict(base.named_modules())
    for key in (key for key in tensors if key.endswith(".lora_A.weight")):
        first, second = tensors[key], tensors[key.replace("lora_A", "lora_B")]
        module: Any = modules.get(key.removeprefix(PREFIX).removesuffix(".lora_A.weight"))
        if hasattr(module, "weight") and second.shape[1] == first.shape[0]:
            delta = scaling * second @ first
            module.weight.data += delta.T if isinstance(module, Conv1D) else delta
    return base


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.tensor([[5, 9, 31, 7, 60, 8, 41, 77, 12]])
    result: torch.Tensor = model.eval()(input_ids=ids).logits
    return result


@pytest.mark.parametrize("name", KINDS)
def test_note_agrees_with_the_distance_of_plain_lora(name: str, tmp_path: Path) -> None:
    if name in SINCE_PEFT_021 and Version(peft.__version__) < Version("0.21"):
        pytest.skip(f"PEFT {peft.__version__} has no such adapter")
    kind = KINDS[name]
    save_kind(kind, tmp_path)
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    trained = logits(load_adapter(AutoModelForCausalLM.from_pretrained(base), adapter))
    plain = logits(add_plain_lora(AutoModelForCausalLM.from_pretrained(base), adapter))
    moved = (trained - logits(AutoModelForCausalLM.from_pretrained(base))).abs().mean()
    assert moved > 1e-4 * trained.std(), "the adapter has an effect"

    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    shapes = {key: tensor.shape for key, tensor in read_adapter(adapter).items()}
    note = serving_note(config, shapes)
    assert kind.note in note
    is_plain = bool((trained - plain).abs().mean() < 1e-5 * trained.std())
    assert is_plain == note.startswith(DIRECTLY)
    assert is_plain == (not differences_from_plain_lora(config, shapes))


@pytest.mark.parametrize(
    ("rank", "option"),
    [(16, ""), (17, " --max-lora-rank 32"), (64, " --max-lora-rank 64"), (300, " --max-lora-rank 320")],
)
def test_note_names_the_next_rank_that_vllm_takes(rank: int, option: str) -> None:
    shapes = {f"{PREFIX}q_proj.lora_A.weight": (rank, 8), f"{PREFIX}q_proj.lora_B.weight": (8, rank)}
    note = serving_note({"r": rank, "lora_alpha": 8}, shapes)
    assert note == f"{DIRECTLY}: vllm serve BASE --enable-lora{option} --lora-modules NAME=DIR"
    too_large = {name: tuple(600 if size == rank else size for size in shape) for name, shape in shapes.items()}
    assert "ranks over 512" in serving_note({"r": 600, "lora_alpha": 8}, too_large)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "RoPE scaling that the base's config.json lacks"),
        ({"add_tokens": {"tokens": ["<tool>"]}}, "added tokens"),
    ],
)
def test_note_about_a_changed_base(model: dict[str, object], reason: str) -> None:
    note = serving_note({"r": 8, "lora_alpha": 8}, {}, model)
    assert note == f"merge the adapter first: vLLM does not support {reason}"


@pytest.mark.parametrize(("family", "is_skipped"), [("qwen2_moe", True), ("llama", False)])
def test_note_about_all_linear_without_experts(family: str, is_skipped: bool) -> None:
    section = AdapterSection(target_modules="all-linear", dropout=0.0)
    note = skipped_experts(add_adapter(model_of(family), section, seed=0, autocast=False), section)
    assert ("adapter.target_parameters=[mlp.experts.down_proj, mlp.experts.gate_up_proj]" in note) == is_skipped
    if is_skipped:
        section = AdapterSection(
            target_modules="all-linear",
            target_parameters=["mlp.experts.down_proj", "mlp.experts.gate_up_proj"],
            dropout=0.0,
        )
        assert not skipped_experts(add_adapter(model_of(family), section, seed=0, autocast=False), section)
