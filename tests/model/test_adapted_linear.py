"""LoRA on a linear layer as one operation: PEFT's results up to rounding, less memory, and PEFT's forward elsewhere."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch.utils._python_dispatch import TorchDispatchMode

from lora_accel.config.schema import AdapterSection, ModelSection, QuantizationSection
from lora_accel.model.adapter import add_adapter, key_dropout, trainable_parameters
from lora_accel.model.base import load_base_model
from lora_accel.model.dropout import feature_keys
from lora_accel.model.kernels.adapters import _AdaptedLinear, patch_adapters
from tests.families import model_of

IDS = torch.arange(1, 41).view(2, 20)


def adapted(base: Any, *, patch: bool, autocast: bool = False, seed: int = 0, **section: Any) -> PeftModel:
    """Return a model in training whose B matrices are not zero, and whose dropout has keys."""
    base.requires_grad_(False)
    options = {"target_modules": "all-linear", "r": 4, "dropout": 0.1} | section
    model = add_adapter(base, AdapterSection.model_validate(options), seed=seed, autocast=autocast)
    keys = key_dropout(model)
    keys.keys = feature_keys(IDS.numel(), 7).view(IDS.shape)
    if patch:
        patch_adapters(model)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in trainable_parameters(model).items():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 0.1
    return model.train()


def step(model: PeftModel, *, autocast: bool = False) -> dict[str, torch.Tensor]:
    """Return logits, and the gradients of the input embeddings and of the adapter."""
    embeddings = model.get_base_model().get_input_embeddings()(IDS).detach().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = model(inputs_embeds=embeddings, use_cache=False).logits
    logits.float().square().sum().backward()
    gradients = {name: p.grad for name, p in trainable_parameters(model).items() if p.grad is not None}
    return {"logits": logits.detach(), "input": embeddings.grad} | gradients  # type: ignore[dict-item]


def errors(results: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> list[float]:
    assert results.keys() == exact.keys()
    return [float((results[name].double() - x).norm() / x.double().norm()) for name, x in exact.items()]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Return a list with an entry for each layer that ran as one operation."""
    made: list[None] = []
    original = _AdaptedLinear.apply
    monkeypatch.setattr(_AdaptedLinear, "apply", lambda *args: made.append(None) or original(*args))
    return made


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("family", ["llama", "qwen2", "opt", "mixtral"])
def test_results_are_those_of_peft(calls: list[None], family: str, dropout: float) -> None:
    options = {"dropout": dropout, "target_modules": ["q_proj", "k_proj", "v_proj", "gate_proj", "down_proj", "fc1"]}
    if family == "mixtral":
        options["target_modules"] = ["q_proj", "v_proj"]
    expected = step(adapted(model_of(family), patch=False, **options))
    assert not calls
    assert max(errors(step(adapted(model_of(family), patch=True, **options)), expected)) < 1e-5
    assert calls


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_results_on_4_bit_weights_are_those_of_peft(tmp_path: Path, calls: list[None], dropout: float) -> None:
    model_of("llama", hidden_size=64, intermediate_size=64, head_dim=16).save_pretrained(tmp_path)
    section = ModelSection(name_or_path=str(tmp_path), dtype="float32")
    expected, results = (
        step(adapted(load_base_model(section, QuantizationSection(bits=4)), patch=patch, dropout=dropout))
        for patch in (False, True)
    )
    assert max(errors(results, expected)) < 1e-5
    assert len(calls) == 2 * 7


def test_a_float32_input_of_a_4_bit_layer_is_computed_in_16_bits(tmp_path: Path, calls: list[None]) -> None:
    """Under autocast on CUDA, LayerNorm returns float32, and bitsandbytes the dtype of its input."""
    model_of("llama", hidden_size=64, intermediate_size=64, head_dim=16).save_pretrained(tmp_path)
    section = ModelSection(name_or_path=str(tmp_path))
    base = load_base_model(section, QuantizationSection(bits=4), mixed_precision="bf16")
    layer = adapted(base, patch=True, autocast=True).get_base_model().model.layers[0].self_attn.q_proj
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(torch.ones(*IDS.shape, 64, requires_grad=True))
    assert output.dtype == torch.bfloat16
    output.sum().backward()
    assert len(calls) == 1


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_rounding_in_bfloat16_is_that_of_peft(calls: list[None], dropout: float) -> None:
    """A sum is rounded once, where PEFT rounds the product of B, the scaled product and the sum."""

    def results(dtype: torch.dtype, seed: int, *, patch: bool) -> dict[str, torch.Tensor]:
        base, is_mixed = model_of("llama").bfloat16().to(dtype), dtype == torch.bfloat16
        return step(adapted(base, patch=patch, autocast=is_mixed, dropout=dropout, seed=seed), autocast=is_mixed)

    of_peft = of_package = 0.0
    for seed in range(8):
        exact = results(torch.float32, seed, patch=False)
        of_peft += sum(errors(results(torch.bfloat16, seed, patch=False), exact))
        of_package += sum(errors(results(torch.bfloat16, seed, patch=True), exact))
    assert len(calls) == 8 * 2 * 7
    assert of_package <= 1.15 * of_peft


def saved_bytes(model: PeftModel) -> int:
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    sizes: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(input_ids=IDS, use_cache=False).logits.sum()
    return sum(storage.nbytes() for storage in sizes.values())


def test_inputs_are_saved_once_and_not_once_per_layer() -> None:
    before, after = (saved_bytes(adapted(model_of("llama"), patch=patch)) for patch in (False, True))
    # Instead of seven dropped inputs: three inputs (of q, k, v; of o; of gate, up, down are two), and three less.
    assert after < 0.85 * before


class Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts matrix products."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run and count an operation."""
        self.count[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def test_gradients_that_nobody_needs_are_not_computed() -> None:
    """The first layer's input is the output of frozen embeddings, so q, k and v need no product with their weights."""

    def products(**inputs: Any) -> int:
        model = adapted(model_of("llama", num_hidden_layers=1), patch=True, dropout=0.0)
        loss = model(use_cache=False, **inputs).logits.sum()
        with Products() as backward:
            loss.backward()
        return sum(backward.count[name] for name in ("mm", "addmm", "addmm_"))

    embeddings = model_of("llama").get_input_embeddings()(IDS).detach()
    assert products(inputs_embeds=embeddings.requires_grad_()) - products(inputs_embeds=embeddings.detach()) == 3 * 2


def hook_lora_a(model: PeftModel) -> None:
    """As ZeRO-3 gathers sharded weights."""
    for name, module in model.named_modules():
        if name.endswith("lora_A.default"):
            module.register_forward_pre_hook(lambda module, inputs: None)


def hook_base_layers(model: PeftModel) -> None:
    for name, module in model.named_modules():
        if name.endswith("base_layer"):
            module.register_forward_hook(lambda module, inputs, output: output * 2)


def add_second_adapter(model: PeftModel) -> None:
    model.add_adapter("second", model.peft_config["default"])
    model.base_model.set_adapter(["default", "second"])
    key_dropout(model).keys = feature_keys(IDS.numel(), 7).view(IDS.shape)


KEPT: dict[str, tuple[str, dict[str, Any], Callable[[PeftModel], Any]]] = {
    "dora": ("llama", {"use_dora": True}, lambda model: None),
    "trained biases": ("qwen2", {"bias": "all", "target_modules": ["q_proj", "k_proj"]}, lambda model: None),
    "bias of B": ("qwen2", {"lora_bias": True, "target_modules": ["q_proj", "k_proj"]}, lambda model: None),
    "Conv1D": ("gpt2", {"target_modules": ["c_attn", "c_fc"]}, lambda model: None),
    "hooks": ("llama", {}, hook_lora_a),
    "disabled": ("llama", {}, lambda model: model.base_model.disable_adapter_layers()),
    "no adapter": ("llama", {}, lambda model: [m.set_adapter([]) for m in model.modules() if isinstance(m, LoraLayer)]),
    "base hooks": ("llama", {}, lambda model: hook_base_layers(model)),
    "merged": ("llama", {}, lambda model: model.merge_adapter()),
    "two adapters": ("llama", {"dropout": 0.0}, add_second_adapter),
}


@pytest.mark.parametrize("case", KEPT)
def test_other_layers_keep_pefts_forward(calls: list[None], case: str) -> None:
    family, options, change = KEPT[case]
    results = []
    for patch in (False, True):
        model = adapted(model_of(family), patch=patch, **options)
        change(model)
        with torch.no_grad():
            results.append(model(input_ids=IDS, use_cache=False).logits)
    assert torch.equal(*results)
    assert not calls
