"""The adapter's file: exactly the right tensors, as they are in the live model; and a loader that accounts for each."""

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
from lora_accel.saving.adapter import check_all_trained_is_saved, read_adapter, write_adapter
from lora_accel.saving.atomic import why_invalid
from lora_accel.saving.discovery import WEIGHTS

TARGETS = {
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "opt": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    "qwen2": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "llama": ["q_proj", "v_proj"],
}
# Layers that carry LoRA here and have a bias; Qwen2's o_proj and MLP have none.
BIASED = {
    "gpt2": ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"],
    "opt": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "fc1", "fc2"],
    "qwen2": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
}
# The biases of the rest: norms (RMSNorm has none).
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


def train_some(accelerator: Accelerator, model: PeftModel, steps: int = 4) -> torch.nn.Module:
    """A stranger's plain Accelerate script: nothing of ours in it."""
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
    """The names that the file must hold beside LoRA's own, written down by hand from the families' layers."""
    layers = [f"{LAYERS[family]}.{i}.{name}" for i in (0, 1) for name in BIASED[family]]
    # PEFT's file leaves `base_layer` in the name of a bias that LoRA wraps.
    own = {f"base_model.model.{name}.base_layer.bias" for name in layers}
    rest = {f"base_model.model.{name}.bias" for name in NORM_BIASES[family]}
    return {"none": set(), "lora_only": own, "all": own | rest}[bias]


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
@pytest.mark.parametrize("family", ["gpt2", "opt", "qwen2"])
def test_a_trained_adapter_is_saved_by_the_bias_rule_and_comes_back(
    tiny_model: Callable[..., Path], tmp_path: Path, family: str, bias: str
) -> None:
    accelerator = Accelerator()
    model = adapted(tiny_model(family), TARGETS[family], bias=bias)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    train_some(accelerator, model)
    save_adapter(accelerator, model, tmp_path / "adapter")

    saved = load_file(tmp_path / "adapter" / WEIGHTS)
    lora = {name for name in saved if re.search(r"\.lora_[AB]\.weight$", name)}
    assert len(lora) == 2 * 2 * len(TARGETS[family]) + (4 if family == "gpt2" else 0)  # c_proj stands twice in a layer
    assert saved.keys() - lora == bias_names(family, bias)

    live = {name.replace(".default", ""): parameter for name, parameter in model.named_parameters()}
    was = {name.replace(".default", ""): value for name, value in before.items()}
    for name, tensor in saved.items():
        assert torch.equal(tensor, live[name]), name
        # OPT's key bias moves all scores of a query alike, so softmax hides it: its gradient is 0 but for rounding.
        assert not torch.equal(tensor, was[name]) or (family == "opt" and "k_proj.base_layer.bias" in name), name
    trained = {name for name, parameter in live.items() if parameter.requires_grad}
    assert saved.keys() == trained, "what was trained and what was saved"

    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model(family)), tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))
    assert not torch.allclose(logits(again), logits(AutoModelForCausalLM.from_pretrained(tiny_model(family))))
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["bias"] == bias


def test_the_bias_rule_may_be_given_for_one_save(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    accelerator = Accelerator()
    model = adapted(tiny_model("gpt2"), TARGETS["gpt2"], bias="all")
    train_some(accelerator, model)
    for bias in ("none", "lora_only", "all"):
        save_adapter(accelerator, model, tmp_path / bias, bias=bias)
        saved = load_file(tmp_path / bias / WEIGHTS)
        assert {name for name in saved if "lora_" not in name} == bias_names("gpt2", bias)
        assert json.loads((tmp_path / bias / "adapter_config.json").read_text())["bias"] == bias


def test_a_module_whose_name_holds_the_word_bias_is_no_bias(tmp_path: Path) -> None:
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
def test_other_forms_of_lora_come_back(
    tiny_model: Callable[..., Path], tmp_path: Path, options: dict[str, Any]
) -> None:
    folder, accelerator = tiny_model("qwen2"), Accelerator()
    model = adapted(folder, **({"targets": TARGETS["qwen2"]} | options))
    train_some(accelerator, model)
    save_adapter(accelerator, model, tmp_path / "adapter")
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(load_file(tmp_path / "adapter" / WEIGHTS)) == len(trained)
    for load in (PeftModel.from_pretrained, load_adapter):
        again = load(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter")
        assert torch.equal(logits(again), logits(model))


def test_a_strangers_script_saves_a_committed_folder(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    accelerator = Accelerator(mixed_precision="bf16")
    model = train_some(accelerator, adapted(tiny_model(), TARGETS["llama"]))
    save_adapter(accelerator, model, tmp_path / "new" / "adapter")
    assert why_invalid(tmp_path / "new" / "adapter") is None
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["adapter"]
    assert {path.name for path in (tmp_path / "new" / "adapter").iterdir()} == {
        WEIGHTS,
        "adapter_config.json",
        "manifest.json",
    }
    save_adapter(accelerator, model, tmp_path / "new" / "adapter")  # again, over itself
    assert why_invalid(tmp_path / "new" / "adapter") is None


def test_a_model_without_an_adapter_is_refused(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model())
    with pytest.raises(ArtifactError, match="LlamaForCausalLM has no adapter"):
        save_adapter(Accelerator(), model, tmp_path / "adapter")
    assert not list(tmp_path.glob("*adapter*"))


def test_an_empty_tensor_is_refused(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """ZeRO-3 leaves shape (0,) in the place of what was not gathered; plain PEFT writes that with a warning."""
    accelerator = Accelerator()
    model = adapted(tiny_model(), TARGETS["llama"])
    name, parameter = next((n, p) for n, p in model.named_parameters() if "lora_B" in n)
    parameter.data = torch.empty(0)
    with pytest.raises(ArtifactError, match="1 tensors are empty") as refused:
        save_adapter(accelerator, model, tmp_path / "adapter")
    assert name in str(refused.value)
    assert not list(tmp_path.glob("*adapter*")), "nothing half-made stays"


def test_a_weight_that_is_not_finite_is_not_saved(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    model = adapted(tiny_model(), TARGETS["llama"])
    name, parameter = next((n, p) for n, p in model.named_parameters() if "lora_B" in n)
    with torch.no_grad():
        parameter[0, 0] = float("nan")
    with pytest.raises(TrainingError, match="is not finite after the update, so it is not saved") as refused:
        save_adapter(Accelerator(), model, tmp_path / "adapter")
    assert name in str(refused.value)
    assert not list(tmp_path.glob("*adapter*")), "nothing half-made stays"


def test_a_tensor_that_peft_would_leave_out_is_refused(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    model = adapted(tiny_model(), TARGETS["llama"])
    state = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    state["base_model.model.model.norm.weight"] = torch.ones(32)
    with pytest.raises(ArtifactError, match=f"PEFT saves {len(state) - 1} of {len(state)} tensors"):
        write_adapter(model, state, tmp_path)


def test_a_file_that_is_not_what_was_written_is_noticed(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_accel.saving import adapter as weights

    whole = weights.write_tensors

    def torn(path: Path, tensors: dict[str, torch.Tensor]) -> None:
        whole(path, tensors)
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)

    monkeypatch.setattr(weights, "write_tensors", torn)
    model = adapted(tiny_model(), TARGETS["llama"])
    with pytest.raises(ArtifactError, match="does not hold what was written"):
        save_adapter(Accelerator(), model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


# Loading


@pytest.fixture
def saved_adapter(tiny_model: Callable[..., Path], tmp_path: Path) -> Path:
    accelerator = Accelerator()
    model = adapted(tiny_model(), TARGETS["llama"])
    train_some(accelerator, model)
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
    ("spoil", "reason"),
    [
        (missing, r"1 tensors are missing \(such as .*lora_A.weight\), 0 do not belong"),
        (unexpected, r"0 tensors are missing, 1 do not belong to this adapter \(such as .*norm.weight\)"),
        (renamed, r"1 tensors are missing .*, 1 do not belong"),
        (wrong_shape, r"lora_A.weight has shape \(4, 31\), the model expects \(4, 32\)"),
        (not_finite, r"lora_A.weight holds values that are not finite"),
        (infinite, r"lora_A.weight holds values that are not finite"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_tensors_that_are_not_the_adapters_are_refused(
    tiny_model: Callable[..., Path],
    saved_adapter: Path,
    spoil: Callable[[dict[str, torch.Tensor], str], None],
    reason: str,
) -> None:
    state = load_file(saved_adapter / WEIGHTS)
    spoil(state, "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight")
    save_file(state, saved_adapter / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=reason):
        load_adapter(AutoModelForCausalLM.from_pretrained(tiny_model()), saved_adapter)


def test_an_adapter_with_base_tensors_does_not_touch_the_base(
    tiny_model: Callable[..., Path], saved_adapter: Path
) -> None:
    """PEFT loads them over the base without a word."""
    state = load_file(saved_adapter / WEIGHTS)
    unexpected(state, "")
    save_file(state, saved_adapter / WEIGHTS, metadata={"format": "pt"})
    base = AutoModelForCausalLM.from_pretrained(tiny_model())
    norm = base.model.norm.weight.detach().clone()
    with pytest.raises(ArtifactError):
        load_adapter(base, saved_adapter)
    assert torch.equal(base.model.norm.weight, norm)


def test_a_base_with_fewer_layers_is_refused(tiny_model: Callable[..., Path], saved_adapter: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_model(), num_hidden_layers=1)
    with pytest.raises(ArtifactError, match="4 do not belong"):
        load_adapter(base, saved_adapter)


def test_another_family_as_base_is_refused(tiny_model: Callable[..., Path], saved_adapter: Path) -> None:
    with pytest.raises(ArtifactError, match="does not fit this base"):
        load_adapter(AutoModelForCausalLM.from_pretrained(tiny_model("gpt2")), saved_adapter)


@pytest.mark.parametrize("gone", [WEIGHTS, "adapter_config.json"])
def test_a_folder_without_an_adapter_is_refused(
    tiny_model: Callable[..., Path], saved_adapter: Path, gone: str
) -> None:
    (saved_adapter / gone).unlink()
    with pytest.raises(ArtifactError, match=f"no {gone} in it, so it is no adapter"):
        load_adapter(AutoModelForCausalLM.from_pretrained(tiny_model()), saved_adapter)


def test_a_truncated_file_is_refused(saved_adapter: Path) -> None:
    data = (saved_adapter / WEIGHTS).read_bytes()
    (saved_adapter / WEIGHTS).write_bytes(data[: len(data) // 2])
    with pytest.raises(ArtifactError, match="cannot be read"):
        read_adapter(saved_adapter)


def test_a_loaded_adapter_can_be_trained_on(tiny_model: Callable[..., Path], saved_adapter: Path) -> None:
    frozen = load_adapter(AutoModelForCausalLM.from_pretrained(tiny_model()), saved_adapter)
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    model = load_adapter(AutoModelForCausalLM.from_pretrained(tiny_model()), saved_adapter, trainable=True)
    before = logits(model)
    train_some(Accelerator(), model, steps=1)
    assert not torch.equal(logits(model), before)


# What a stranger's script may do.


def test_the_active_adapter_is_saved_whatever_its_name_and_neighbours(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
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
        fresh = AutoModelForCausalLM.from_pretrained(folder)
        assert torch.equal(logits(PeftModel.from_pretrained(fresh, tmp_path / name)), logits(model))


def test_a_folder_with_other_things_is_not_replaced(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, accelerator = adapted(tiny_model("llama"), TARGETS["llama"]), Accelerator()
    save_adapter(accelerator, model, tmp_path / "mine")
    save_adapter(accelerator, model, tmp_path / "mine")  # one's own of before
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ArtifactError, match=r"mine: holds other things, thesis\.txt among them"):
        save_adapter(accelerator, model, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    with pytest.raises(ArtifactError, match="is a file; name a new folder"):
        save_adapter(accelerator, model, tmp_path / "mine" / "thesis.txt")

    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for itself in (".", "../here"):
        with pytest.raises(ArtifactError, match="is where this runs"):
            save_adapter(accelerator, model, itself)

    (tmp_path / "far").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "far")
    save_adapter(accelerator, model, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "far" / WEIGHTS).is_file()


@pytest.mark.parametrize("options", [{"bias": "lora-only"}, {"gather": "full"}])
def test_what_cannot_be_asked_for_is_refused(
    tiny_model: Callable[..., Path], tmp_path: Path, options: dict[str, str]
) -> None:
    model = adapted(tiny_model("llama"), TARGETS["llama"])
    with pytest.raises(ArtifactError, match=r"say .*, .* or "):
        save_adapter(Accelerator(), model, tmp_path / "out", **options)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_a_saved_module_with_a_bias_comes_back_beside_trained_biases(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """The frozen original of a module that is saved whole is no part of the adapter."""
    model = adapted(tiny_model("gpt2"), TARGETS["gpt2"], bias="all", modules_to_save=["ln_f"])
    prepared = train_some(accelerator := Accelerator(), model)
    save_adapter(accelerator, prepared, tmp_path / "out")
    assert not any("original_module" in name for name in read_adapter(tmp_path / "out"))
    fresh = AutoModelForCausalLM.from_pretrained(tiny_model("gpt2"))
    assert torch.allclose(logits(PeftModel.from_pretrained(fresh, tmp_path / "out")), logits(prepared), atol=1e-6)


@pytest.mark.skipif(
    Version(accelerate.__version__) < Version("1.15"),
    reason="Accelerate 1.10 raises KeyError when it unwraps a compiled model; which release fixed it was not checked",
)
def test_a_compiled_model_is_saved_under_its_own_names(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    model, accelerator = adapted(tiny_model("llama"), TARGETS["llama"]), Accelerator()
    save_adapter(accelerator, model, tmp_path / "plain")
    save_adapter(accelerator, torch.compile(model, backend="eager"), tmp_path / "compiled")  # type: ignore[arg-type]
    assert read_adapter(tmp_path / "compiled").keys() == read_adapter(tmp_path / "plain").keys()

    layers = model.get_base_model().model.layers
    layers[0] = torch.compile(layers[0], backend="eager")
    with pytest.raises(ArtifactError, match="were replaced by compiled ones"):
        save_adapter(accelerator, model, tmp_path / "torn")
    assert not (tmp_path / "torn").exists()


def test_what_is_trained_and_would_not_be_saved_is_known_before_the_first_step(tiny_model: Callable[..., Path]) -> None:
    model = adapted(tiny_model("gpt2"), TARGETS["gpt2"], bias="lora_only")
    check_all_trained_is_saved(model)
    model.get_base_model().transformer.ln_f.bias.requires_grad_(True)
    with pytest.raises(ArtifactError, match=r"1 parameters would be trained and not saved, .*ln_f\.bias among them"):
        check_all_trained_is_saved(model)
