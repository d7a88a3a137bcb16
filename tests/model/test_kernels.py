"""Patched norms and gates: bitwise equal results, gradients equal up to rounding, and less saved for backward."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lora_accel.config.schema import AdapterSection
from lora_accel.model.adapter import add_adapter, trainable_parameters
from lora_accel.model.kernels import norms, patch_base
from lora_accel.model.kernels.adapters import patch_adapters
from tests.families import INSTALLED, PATCHED, model_of

IDS = torch.arange(1, 25).view(2, 12)


@pytest.fixture(autouse=True)
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use few rows at once, so that there are several groups and the last is partial."""
    monkeypatch.setattr(norms, "ROWS", 7)


def patched_classes(model: nn.Module) -> set[str]:
    return {type(module).__name__ for module in model.modules() if "forward" in vars(module)}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", PATCHED)
def test_results_are_bitwise_equal(family: str, dtype: torch.dtype, autocast: bool) -> None:
    model = model_of(family).to(dtype).requires_grad_(False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(torch.rand_like(parameter) + 0.5)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        before = model(IDS, use_cache=False).logits
        patch_base(model)
        assert torch.equal(model(IDS, use_cache=False).logits, before)


def test_every_listed_class_is_tested() -> None:
    patched: set[str] = set()
    for family in PATCHED:
        model = model_of(family).requires_grad_(False)
        patch_base(model)
        patched |= patched_classes(model)
    listed = {name for family in INSTALLED.values() for name in (family.norm, family.gemma_norm, family.gate)}
    assert patched == listed - {None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_gradients_are_equal_up_to_rounding(family: str, dtype: torch.dtype) -> None:
    model = model_of(family).to(dtype).requires_grad_(False)
    x = torch.randn(2, 12, 32, dtype=dtype, requires_grad=True)
    before = x.detach().clone()
    exact = torch.autograd.grad(model.double()(inputs_embeds=x.double(), use_cache=False).logits.square().sum(), x)[0]
    model = model_of(family).to(dtype).requires_grad_(False)
    original = torch.autograd.grad(model(inputs_embeds=x, use_cache=False).logits.square().sum(), x)[0]
    patch_base(model)
    patched = torch.autograd.grad(model(inputs_embeds=x, use_cache=False).logits.square().sum(), x)[0]
    assert torch.equal(x, before), "the input is not modified"
    assert (patched - exact).norm() <= 1.2 * (original - exact).norm()


def test_less_memory_is_saved_for_backward() -> None:
    def saved_bytes(model: nn.Module) -> int:
        sizes: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(inputs_embeds=torch.randn(2, 64, 32).bfloat16().requires_grad_(), use_cache=False).logits.sum()
        weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        return sum(size for pointer, size in sizes.items() if pointer not in weights)

    model = model_of("llama").to(torch.bfloat16).requires_grad_(False)
    before = saved_bytes(model)
    patch_base(model)
    assert saved_bytes(model) < 0.75 * before


@pytest.mark.parametrize("name", ["input_layernorm", "q_norm", "norm"])
def test_norms_that_peft_trains_get_gradients(name: str) -> None:
    """It trains copies of modules that are patched already."""
    base = model_of("qwen3").requires_grad_(False)
    patch_base(base)
    section = AdapterSection(target_modules=["q_proj"], modules_to_save=[name])
    model = add_adapter(base, section, seed=0, autocast=False)
    model(input_ids=IDS, use_cache=False).logits.sum().backward()
    norms = {key: p.grad for key, p in trainable_parameters(model).items() if f"{name}.modules_to_save" in key}
    assert norms
    assert all(grad is not None and grad.abs().max() > 0 for grad in norms.values())


@pytest.mark.parametrize("family", ["olmo", "olmoe"])
def test_outputs_may_be_clipped_in_place(family: str) -> None:
    results = []
    for patch in (False, True):
        base = model_of(family, clip_qkv=0.01).requires_grad_(False)
        if patch:
            patch_base(base)
        model = add_adapter(base, AdapterSection(target_modules=["q_proj", "v_proj"]), seed=0, autocast=False)
        if patch:
            patch_adapters(model)
        embeddings = base.get_input_embeddings()(IDS).detach().requires_grad_()
        model(inputs_embeds=embeddings, use_cache=False).logits.square().sum().backward()
        results.append(embeddings.grad)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)


def test_trained_norm_is_not_patched() -> None:
    model = model_of("llama").requires_grad_(False)
    model.model.norm.requires_grad_(True)
    patch_base(model)
    assert "forward" not in vars(model.model.norm)
    assert "forward" in vars(model.model.layers[0].input_layernorm)
