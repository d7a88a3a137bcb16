"""Saved adapters contain exactly the right tensors, equal to the live model, and loading checks each of them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from accelerate import Accelerator
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lora_accel import load_adapter, save_adapter
from lora_accel.errors import ArtifactError, TrainingError
from lora_accel.saving.adapter import write_adapter
from lora_accel.saving.atomic import why_invalid
from lora_accel.saving.discovery import WEIGHTS
from lora_accel.saving.names import check_all_trained_is_saved
from lora_accel.saving.tensor_files import read_adapter

TARGETS = {
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "opt": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    "qwen2": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "llama": ["q_proj", "v_proj"],
}
# Layers with LoRA and a bias; Qwen2's o_proj and MLP have no bias.
BIASED = {
    "gpt2": ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"],
    "opt": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "fc1", "fc2"],
    "qwen2": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
}
# Modules without LoRA that have a bias: norms (RMSNorm has none).
NORM_BIASES = {
    "gpt2": ["transformer.ln_f", *(f"transformer.h.{i}.{n}" for i in (0, 1) for n in ("ln_1", "ln_2"))],
    "opt": [
        "model.decoder.final_layer_norm",
        *(f"model.decoder.layers.{i}.{n}" for i in (0, 1) for n in ("self_attn_layer_norm", "final_layer_norm")),
    ],
    "qwen2": [],
}
LAYERS = {"gpt2": "transformer.h", "opt": "model.decoder.layers", "qwen2": "model.layers"}
IDS = torch.arange(5, 29).reshape(2, 12)


def adapted(folder: Path, targets: list[str], **options: Any) -> PeftModel:
    base = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(0)
    return get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=targets, **options))


def train_steps(accelerator: Accelerator, model: PeftModel, steps: int = 4) -> torch.nn.Module:
    """Train in a plain Accelerate loop, without code of this package."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    prepared.train()
    for _ in range(steps):
        loss = prepared(IDS.to(accelerator.device), labels=IDS.to(accelerator.device)).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    return prepared


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def bias_names(family: str, bias: str) -> set[str]:
    """Return the names that the file must contain besides LoRA's own, derived by hand from the families' layers."""
    layers = [f"{LAYERS[family]}.{i}.{name}" for i in (0, 1) for name in BIASED[family]]
    # PEFT keeps `base_layer` in the name of a bias of a wrapped layer.
    own = {f"base_model.model.{name}.base_layer.bias" for name in layers}
    rest = {f"base_model.model.{name}.bias" for name in NORM_BIASES[family]}
    return {"none": set(), "lora_only": own, "all": own | rest}[bias]


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
@pytest.mark.parametrize("family", ["gpt2", "opt", "qwen2"])
def test_trained_adapter_is_saved_with_its_biases_and_loads(
    tiny_model: Callable[..., Path], tmp_path: Path, family: str, bias: str
) -> None:
    accelerator = Accelerator()
    model = adapted(tiny_model(family), TARGETS[family], bias=bias)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    train_steps(accelerator, model)
    save_adapter(accelerator, model, tmp_path / "adapter")

    saved = load_file(tmp_path / "adapter" / WEIGHTS)
    lora = {name for name in saved if re.search(r"\.lora_[AB]\.weight$", name)}
    assert len(lora) == 2 * 2 * len(TARGETS[family]) + (4 if family == "gpt2" else 0)  # a layer has two c_proj
    assert saved.keys() - lora == bias_names(family, bias)

    live = {name.replace(".default", ""): parameter for name, parameter in model.named_parameters()}
    initial = {name.replace(".default", ""): value for name, value in before.items()}
    for name, tensor in saved.items():
        assert torch.equal(tensor, live[name]), name
        # OPT's key bias shifts all scores of a query equally, so softmax cancels it: its gradient is rounding error.
        assert not torch.equal(tensor, initial[name]) or (family == "opt" and "k_proj.base_layer.bias" in name), name
    trained = {name for name, parameter in live.items() if parameter.requires_grad}
    assert saved.keys() == trained

    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model(family)), tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(model))
    assert not torch.allclose(logits(loaded), logits(AutoModelForCausalLM.from_pretrained(tiny_model(family))))
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["bias"] == bias


def test_bias_can_be_set_per_save(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    accelerator = Accelerator()
    model = adapted(tiny_model("gpt2"), TARGETS["gpt2"], bias="all")
    train_steps(accelerator, model)
    for bias in ("none", "lora_only", "all"):
        save_adapter(accelerator, model, tmp_path / bias, bias=bias)
        saved = load_file(tmp_path / bias / WEIGHTS)
        assert {name for name in saved if "lora_" not in name} == bias_names("gpt2", bias)
        assert json.loads((tmp_path / bias / "adapter_config.json").read_text())["bias"] == bias


def test_names_that_contain_bias_are_not_biases(tmp_path: Path) -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias_proj = torch.nn.Linear(4, 4)
            self.head = torch.nn.Linear(4, 4)
            self.attn_bias = torch.nn.Parameter(torch.zeros(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.head(self.bias_proj(x) + self.attn_bias)
            return out

    model = get_peft_model(Net(), LoraConfig(r=2, target_modules=["head"], bias="all"))
    save_adapter(Accelerator(), model, tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / WEIGHTS)
    start = "base_model.model"
    assert saved.keys() == {
        f"{start}.bias_proj.bias",
        f"{start}.head.base_layer.bias",
        f"{start}.head.lora_A.weight",
        f"{start}.head.lora_B.weight",
    }


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"use_rslora": True},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"], "bias": "all"},
        {"use_dora": True, "bias": "lora_only"},
        {"targets": ["embed_tokens", "q_proj"]},
        {"rank_pattern": {"v_proj": 2}},
    ],
    ids=["dora", "rslora", "head", "embeddings", "dora+bias", "lora-embedding", "ranks"],
)
def test_lora_variants_load(tiny_model: Callable[..., Path], tmp_path: Path, options: dict[str, Any]) -> None:
    folder, accelerator = tiny_model("qwen2"), Accelerator()
    model = adapted(folder, **({"targets": TARGETS["qwen2"]} | options))
    train_steps(accelerator, model)
    save_adapter(accelerator, model, tmp_path / "adapter")
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(load_file(tmp_path / "adapter" / WEIGHTS)) == len(trained)
    for load in (PeftModel.from_pretrained, load_adapter):
        loaded = load(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter")
        assert torch.equal(logits(loaded), logits(model))


def test_plain_accelerate_script_saves_a_committed_folder(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    accelerator = Accelerator(mixed_precision="bf16")
    model = train_steps(accelerator, adapted(tiny_model(), TARGETS["llama"]))
    save_adapter(accelerator, model, tmp_path / "new" / "adapter")
    assert why_invalid(tmp_path / "new" / "adapter") is None
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["adapter"]
    assert {path.name for path in (tmp_path / "new" / "adapter").iterdir()} == {
        WEIGHTS,
        "adapter_config.json",
        "manifest.json",
    }
    save_adapter(accelerator, model, tmp_path / "new" / "adapter")  # replaces the existing adapter
    assert why_invalid(tmp_path / "new" / "adapter") is None


def test_saving_a_model_without_an_adapter_raises(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model())
    with pytest.raises(ArtifactError, match="LlamaForCausalLM has no adapter"):
        save_adapter(Accelerator(), model, tmp_path / "adapter")
    assert not list(tmp_path.glob("*adapter*"))


def test_saving_an_empty_tensor_raises(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """Under ZeRO-3 tensors that were not gathered have shape (0,); PEFT would write them with a warning."""
    accelerator = Accelerator()
    model = adapted(tiny_model(), TARGETS["llama"])
    name, parameter = next((n, p) for n, p in model.named_parameters() if "lora_B" in n)
    parameter.data = torch.empty(0)
    with pytest.raises(ArtifactError, match="1 tensors are empty") as caught:
        save_adapter(accelerator, model, tmp_path / "adapter")
    assert name in str(caught.value)
    assert not list(tmp_path.glob("*adapter*")), "no partial folder is left"


def test_saving_a_non_finite_weight_raises(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    model = adapted(tiny_model(), TARGETS["llama"])
    name, parameter = next((n, p) for n, p in model.named_parameters() if "lora_B" in n)
    with torch.no_grad():
        parameter[0, 0] = float("nan")
    with pytest.raises(TrainingError, match="is not finite after the update, so it is not saved") as caught:
        save_adapter(Accelerator(), model, tmp_path / "adapter")
    assert name in str(caught.value)
    assert not list(tmp_path.glob("*adapter*")), "no partial folder is left"


def test_saving_a_tensor_that_peft_would_omit_raises(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    model = adapted(tiny_model(), TARGETS["llama"])
    state = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    state["base_model.model.model.norm.weight"] = torch.ones(32)
    with pytest.raises(ArtifactError, match=f"PEFT saves {len(state) - 1} of {len(state)} tensors"):
        write_adapter(model, state, tmp_path)


def test_corruption_while_saving_is_detected(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_accel.saving import adapter as adapter_module

    write_tensors = adapter_module.write_tensors

    def corrupting_write(path: Path, tensors: dict[str, torch.Tensor]) -> None:
        write_tensors(path, tensors)
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)

    monkeypatch.setattr(adapter_module, "write_tensors", corrupting_write)
    model = adapted(tiny_model(), TARGETS["llama"])
    with pytest.raises(ArtifactError, match="differs from what was written"):
        save_adapter(Accelerator(), model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


# Loading


@pytest.fixture
def saved_adapter(tiny_model: Callable[..., Path], tmp_path: Path) -> Path:
    accelerator = Accelerator()
    model = adapted(tiny_model(), TARGETS["llama"])
    train_steps(accelerator, model)
    save_adapter(accelerator, model, tmp_path / "adapter")
    return tmp_path / "adapter"


def missing(state: dict[str, torch.Tensor], name: str) -> None:
    del state[name]


def unexpected(state: dict[str, torch.Tensor], name: str) -> None:
    state["base_model.model.model.norm.weight"] = torch.zeros(32)


def renamed(state: dict[str, torch.Tensor], name: str) -> None:
    state[name.replace("layers.0", "layers.7")] = state.pop(name)


def wrong_shape(state: dict[str, torch.Tensor], name: str) -> None:
    state[name] = state[name][:, :-1].contiguous()


def not_finite(state: dict[str, torch.Tensor], name: str) -> None:
    state[name][0, 0] = float("nan")


def infinite(state: dict[str, torch.Tensor], name: str) -> None:
    state[name][0, 0] = float("inf")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (missing, r"1 tensors are missing \(such as .*lora_A.weight\), 0 do not belong"),
        (unexpected, r"0 tensors are missing, 1 do not belong to this adapter \(such as .*norm.weight\)"),
        (renamed, r"1 tensors are missing .*, 1 do not belong"),
        (wrong_shape, r"lora_A.weight has shape \(4, 31\), the model expects \(4, 32\)"),
        (not_finite, r"lora_A.weight contains values that are not finite"),
        (infinite, r"lora_A.weight contains values that are not finite"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_loading_wrong_tensors_raises(
    tiny_model: Callable[..., Path],
    saved_adapter: Path,
    damage: Callable[[dict[str, torch.Tensor], str], None],
    reason: str,
) -> None:
    state = load_file(saved_adapter / WEIGHTS)
    damage(state, "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight")
    save_file(state, saved_adapter / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=reason):
        load_adapter(AutoModelForCausalLM.from_pretrained(tiny_model()), saved_adapter)


def test_base_tensors_in_an_adapter_do_not_change_the_base(
    tiny_model: Callable[..., Path], saved_adapter: Path
) -> None:
    """PEFT would load them over the base without a warning."""
    state = load_file(saved_adapter / WEIGHTS)
    unexpected(state, "")
    save_file(state, saved_adapter / WEIGHTS, metadata={"format": "pt"})
    base = AutoModelForCausalLM.from_pretrained(tiny_model())
    norm = base.model.norm.weight.detach().clone()
    with pytest.raises(ArtifactError):
        load_adapter(base, saved_adapter)
    assert torch.equal(base.model.norm.weight, norm)


def test_loading_onto_a_base_with_fewer_layers_raises(tiny_model: Callable[..., Path], saved_adapter: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_model(), num_hidden_layers=1)
    with pytest.raises(ArtifactError, match="4 do not belong"):
        load_adapter(base, saved_adapter)


def test_loading_onto_another_model_family_raises(tiny_model: Callable[..., Path], saved_adapter: Path) -> None:
    with pytest.raises(ArtifactError, match="does not fit this base"):
        load_adapter(AutoModelForCausalLM.from_pretrained(tiny_model("gpt2")), saved_adapter)


@pytest.mark.parametrize("file", [WEIGHTS, "adapter_config.json"])
def test_loading_a_folder_without_an_adapter_raises(
    tiny_model: Callable[..., Path], saved_adapter: Path, file: str
) -> None:
    (saved_adapter / file).unlink()
    with pytest.raises(ArtifactError, match=rf"is not an adapter: {file} is missing$"):
        load_adapter(AutoModelForCausalLM.from_pretrained(tiny_model()), saved_adapter)


def test_a_wrong_folder_is_named(saved_adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"absent: is not an adapter: there is no such folder$"):
        read_adapter(tmp_path / "absent")
    run = tmp_path / "run"
    run.mkdir()
    saved_adapter.rename(run / "adapter")
    with pytest.raises(ArtifactError, match=rf"adapter_config\.json is missing; {re.escape(str(run))}/adapter is one$"):
        read_adapter(run)


def test_loading_a_truncated_file_raises(saved_adapter: Path) -> None:
    data = (saved_adapter / WEIGHTS).read_bytes()
    (saved_adapter / WEIGHTS).write_bytes(data[: len(data) // 2])
    with pytest.raises(ArtifactError, match="cannot be read"):
        read_adapter(saved_adapter)


def test_loaded_adapter_can_be_trained(tiny_model: Callable[..., Path], saved_adapter: Path) -> None:
    frozen = load_adapter(AutoModelForCausalLM.from_pretrained(tiny_model()), saved_adapter)
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    model = load_adapter(AutoModelForCausalLM.from_pretrained(tiny_model()), saved_adapter, trainable=True)
    before = logits(model)
    train_steps(Accelerator(), model, steps=1)
    assert not torch.equal(logits(model), before)


# Saving from other Accelerate scripts


def test_active_adapter_is_saved_under_any_name(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    folder, accelerator = tiny_model("gpt2"), Accelerator()
    base = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["c_attn"], bias="all", lora_bias=True)
    model = get_peft_model(base, config, adapter_name="mine")
    other = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["c_fc"], lora_bias=True)
    model.add_adapter("other", other)
    for name, rank in (("mine", 4), ("other", 2)):
        model.set_adapter(name)
        for key, parameter in model.named_parameters():
            if f".{name}." in key:
                torch.nn.init.normal_(parameter, std=0.1)
        save_adapter(accelerator, model, tmp_path / name)
        saved = read_adapter(tmp_path / name)
        assert not any("mine" in key or "other" in key for key in saved)
        assert {tensor.shape[0] for key, tensor in saved.items() if "lora_A" in key} == {rank}
        base = AutoModelForCausalLM.from_pretrained(folder)
        assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path / name)), logits(model))


def test_folder_with_other_files_is_not_replaced(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, accelerator = adapted(tiny_model("llama"), TARGETS["llama"]), Accelerator()
    save_adapter(accelerator, model, tmp_path / "mine")
    save_adapter(accelerator, model, tmp_path / "mine")  # replaces the existing adapter
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ArtifactError, match=r"mine: contains other files that would be lost, thesis\.txt among them"):
        save_adapter(accelerator, model, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    with pytest.raises(ArtifactError, match="is a file; choose a new folder"):
        save_adapter(accelerator, model, tmp_path / "mine" / "thesis.txt")

    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for path in (".", "../here"):
        with pytest.raises(ArtifactError, match="is the working directory"):
            save_adapter(accelerator, model, path)

    (tmp_path / "far").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "far")
    save_adapter(accelerator, model, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "far" / WEIGHTS).is_file()


@pytest.mark.parametrize("options", [{"bias": "lora-only"}, {"gather": "full"}])
def test_invalid_save_options_raise(tiny_model: Callable[..., Path], tmp_path: Path, options: dict[str, str]) -> None:
    model = adapted(tiny_model("llama"), TARGETS["llama"])
    with pytest.raises(ArtifactError, match=r"use .*, .* or "):
        save_adapter(Accelerator(), model, tmp_path / "out", **options)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_module_to_save_with_a_bias_loads_with_trained_biases(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """The frozen original of a module in modules_to_save is not part of the adapter."""
    model = adapted(tiny_model("gpt2"), TARGETS["gpt2"], bias="all", modules_to_save=["ln_f"])
    prepared = train_steps(accelerator := Accelerator(), model)
    save_adapter(accelerator, prepared, tmp_path / "out")
    assert not any("original_module" in name for name in read_adapter(tmp_path / "out"))
    base = AutoModelForCausalLM.from_pretrained(tiny_model("gpt2"))
    assert torch.allclose(logits(PeftModel.from_pretrained(base, tmp_path / "out")), logits(prepared), atol=1e-6)


@pytest.mark.skipif(
    Version(accelerate.__version__) < Version("1.15"),
    reason="Accelerate 1.10 raises KeyError when it unwraps a compiled model; which release fixed it was not checked",
)
def test_compiled_model_is_saved_with_uncompiled_names(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    model, accelerator = adapted(tiny_model("llama"), TARGETS["llama"]), Accelerator()
    save_adapter(accelerator, model, tmp_path / "plain")
    save_adapter(accelerator, torch.compile(model, backend="eager"), tmp_path / "compiled")  # type: ignore[arg-type]
    assert read_adapter(tmp_path / "compiled").keys() == read_adapter(tmp_path / "plain").keys()

    layers = model.get_base_model().model.layers
    layers[0] = torch.compile(layers[0], backend="eager")
    with pytest.raises(ArtifactError, match="were replaced by compiled ones"):
        save_adapter(accelerator, model, tmp_path / "partial")
    assert not (tmp_path / "partial").exists()


def test_check_all_trained_is_saved(tiny_model: Callable[..., Path]) -> None:
    model = adapted(tiny_model("gpt2"), TARGETS["gpt2"], bias="lora_only")
    check_all_trained_is_saved(model)
    model.get_base_model().transformer.ln_f.bias.requires_grad_(True)
    with pytest.raises(ArtifactError, match=r"1 parameters would be trained and not saved, .*ln_f\.bias among them"):
        check_all_trained_is_saved(model)
