"""An adapter in another tool's format answers as it did, comes back to the last bit, or is refused with the reason."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D

from lora_accel import RunConfig, load_adapter, run_training, save_adapter
from lora_accel.cli import main
from lora_accel.errors import ArtifactError, ConfigError, UserError
from lora_accel.export.export import export_adapter
from lora_accel.saving.atomic import why_invalid
from lora_accel.saving.discovery import CONFIG, WEIGHTS
from tests.conftest import run_code
from tests.saving.test_untrusted import plain_pickle, torch_pickle

IDS = torch.arange(5, 29).reshape(2, 12)
LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
OPT = ["q_proj", "v_proj", "fc1"]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"target_modules": LLAMA}),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"]}),
    "gpt2, all biases": ("gpt2", {"target_modules": ["c_attn"], "bias": "all"}),
    "opt, biases of LoRA": ("opt", {"target_modules": OPT, "bias": "lora_only"}),
    "opt, all biases": ("opt", {"target_modules": OPT, "bias": "all"}),
    "embedding": ("qwen2", {"target_modules": ["embed_tokens", "q_proj"]}),
    "some layers": ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "rslora": ("llama", {"target_modules": ["q_proj", "v_proj"], "use_rslora": True, "rank_pattern": {"v_proj": 9}}),
    "patterns": (
        "llama",
        {
            "target_modules": LLAMA,
            "rank_pattern": {"q_proj": 2, r"layers\.1\..*\.v_proj": 6},
            "alpha_pattern": {"v_proj": 24, "^model.layers.0.mlp.up_proj": 3},
        },
    ),
}


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def load_base(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


def contents(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / CONFIG).read_text())
    return config


@pytest.fixture
def make_adapter(tiny_model: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """An adapter that does something, of PEFT's, on a tiny model."""

    def make(family: str = "llama", **options: Any) -> Path:
        torch.manual_seed(0)
        options = {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 10} | options
        config = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **options)
        model = get_peft_model(load_base(tiny_model(family)), config)
        for name, parameter in model.named_parameters():
            if name.endswith(".bias") and parameter.requires_grad:
                parameter.data += torch.randn_like(parameter) / 4
        save_adapter(Accelerator(cpu=True), model, tmp_path / "adapter")
        return tmp_path / "adapter"

    return make


def put_loralib_on(model: torch.nn.Module, folder: Path) -> None:
    """Load an export as its user does: tensors by name into a model whose layers add what loralib's add.

    https://github.com/microsoft/LoRA, loralib/layers.py: x A' B' · lora_alpha / r; an embedding looks x up in A'.
    """
    told = json.loads((folder / "loralib.json").read_text())
    for path in told["target_modules"]:
        layer, own = model.get_submodule(path), told["modules"].get(path, told)
        transposed = isinstance(layer, (Conv1D, torch.nn.Embedding))
        num_in, num_out = layer.weight.shape if transposed else reversed(layer.weight.shape)
        layer.lora_A = torch.nn.Parameter(torch.zeros(own["r"], num_in))
        layer.lora_B = torch.nn.Parameter(torch.zeros(num_out, own["r"]))

        def add(layer: Any, args: Any, output: torch.Tensor, scaling: float = own["lora_alpha"] / own["r"]) -> Any:
            if isinstance(layer, torch.nn.Embedding):
                return output + torch.nn.functional.embedding(args[0], layer.lora_A.T) @ layer.lora_B.T * scaling
            return output + args[0] @ layer.lora_A.T @ layer.lora_B.T * scaling

        layer.register_forward_hook(add)
    loaded = model.load_state_dict(torch.load(folder / "lora.pt", weights_only=True), strict=False)
    assert not loaded.unexpected_keys
    assert not [name for name in loaded.missing_keys if "lora_" in name]


@pytest.mark.parametrize(
    "case",  # patterns are matched in a process of its own
    [pytest.param(case, marks=pytest.mark.launch) if case == "patterns" else case for case in CASES],
)
def test_loralib_answers_alike_and_the_adapter_comes_back_to_the_last_bit(
    make_adapter: Callable[..., Path], tiny_model: Callable[..., Path], tmp_path: Path, case: str
) -> None:
    family, options = CASES[case]
    adapter, base = make_adapter(family, **options), tiny_model(family)
    answers = logits(PeftModel.from_pretrained(load_base(base), adapter))
    assert (answers - logits(load_base(base))).abs().max() > 1e-2, "it does something, so agreeing says something"

    told = export_adapter(adapter, tmp_path / "loralib", format="loralib")
    assert why_invalid(tmp_path / "loralib") is None
    assert contents(tmp_path / "loralib") == {"lora.pt", "loralib.json", "manifest.json"} == set(told["files"])
    model = load_base(base)
    put_loralib_on(model, tmp_path / "loralib")
    torch.testing.assert_close(logits(model), answers, rtol=1e-5, atol=1e-5)

    export_adapter(tmp_path / "loralib", tmp_path / "back", format="peft")
    before, after = load_file(adapter / WEIGHTS), load_file(tmp_path / "back" / WEIGHTS)
    assert after.keys() == before.keys()
    assert told["num_tensors"] == len(before)
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name
    assert config_of(tmp_path / "back")["bias"] == options.get("bias", "none")
    for again in (
        PeftModel.from_pretrained(load_base(base), tmp_path / "back"),
        load_adapter(load_base(base), tmp_path / "back"),
    ):
        torch.testing.assert_close(logits(again), answers, rtol=1e-6, atol=1e-6)


def test_names_and_shapes_are_loralibs(make_adapter: Callable[..., Path], tmp_path: Path) -> None:
    adapter = make_adapter("gpt2", target_modules=["c_attn"], bias="lora_only")
    export_adapter(adapter, tmp_path / "out", format="loralib")
    tensors = torch.load(tmp_path / "out" / "lora.pt", weights_only=True)
    shapes = {"lora_A": (4, 32), "lora_B": (96, 4), "bias": (96,)}
    expected = {f"transformer.h.{i}.attn.c_attn.{part}": shape for i in (0, 1) for part, shape in shapes.items()}
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == expected
    assert type(tensors) is dict
    told = json.loads((tmp_path / "out" / "loralib.json").read_text())
    assert told == {
        "base_model_name_or_path": config_of(adapter)["base_model_name_or_path"],
        "bias": "lora_only",
        "r": 4,
        "lora_alpha": 10,
        "modules": {},
        "target_modules": ["transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_attn"],
    }


def test_an_embedding_has_loralibs_shapes(make_adapter: Callable[..., Path], tmp_path: Path, tokenizer: Any) -> None:
    export_adapter(make_adapter("qwen2", target_modules=["embed_tokens"]), tmp_path / "out", format="loralib")
    tensors = torch.load(tmp_path / "out" / "lora.pt", weights_only=True)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert shapes == {"model.embed_tokens.lora_A": (4, len(tokenizer)), "model.embed_tokens.lora_B": (32, 4)}


@pytest.mark.launch
def test_what_differs_is_told_by_module_and_by_pattern(make_adapter: Callable[..., Path], tmp_path: Path) -> None:
    family, options = CASES["patterns"]
    export_adapter(make_adapter(family, **options), tmp_path / "loralib", format="loralib")
    told = json.loads((tmp_path / "loralib" / "loralib.json").read_text())
    assert (told["r"], told["lora_alpha"]) == (4, 10)
    assert told["modules"] == {
        "model.layers.0.self_attn.q_proj": {"r": 2, "lora_alpha": 10},
        "model.layers.0.self_attn.v_proj": {"r": 4, "lora_alpha": 24},
        "model.layers.0.mlp.up_proj": {"r": 4, "lora_alpha": 3},
        "model.layers.1.self_attn.q_proj": {"r": 2, "lora_alpha": 10},
        "model.layers.1.self_attn.v_proj": {"r": 6, "lora_alpha": 24},
    }
    export_adapter(tmp_path / "loralib", tmp_path / "back", format="peft")
    config = config_of(tmp_path / "back")
    assert config["rank_pattern"] == {"q_proj": 2, "^model.layers.1.self_attn.v_proj": 6}
    assert config["alpha_pattern"] == {"v_proj": 24, "^model.layers.0.mlp.up_proj": 3}
    assert config["target_modules"] == sorted(LLAMA)


def test_target_modules_are_whole_paths_where_names_would_select_more(
    make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    export_adapter(make_adapter(**CASES["some layers"][1]), tmp_path / "loralib", format="loralib")
    export_adapter(tmp_path / "loralib", tmp_path / "back", format="peft")
    assert config_of(tmp_path / "back")["target_modules"] == ["model.layers.1.self_attn.q_proj"]


@pytest.mark.parametrize("case", ["gpt2, all biases", "opt, biases of LoRA", "embedding", "patterns", "rslora"])
def test_loralib_itself_takes_it_and_gives_it_back(
    make_adapter: Callable[..., Path], tiny_model: Callable[..., Path], tmp_path: Path, case: str
) -> None:
    loralib = pytest.importorskip("loralib")
    family, options = CASES[case]
    adapter, base = make_adapter(family, **options), tiny_model(family)
    answers = logits(PeftModel.from_pretrained(load_base(base), adapter))
    export_adapter(adapter, tmp_path / "loralib", format="loralib")
    told = json.loads((tmp_path / "loralib" / "loralib.json").read_text())
    model = load_base(base)
    for path in told["target_modules"]:
        old, own = model.get_submodule(path), told["modules"].get(path, told)
        how = {"r": own["r"], "lora_alpha": own["lora_alpha"], "merge_weights": False}
        if isinstance(old, torch.nn.Embedding):
            new = loralib.Embedding(old.num_embeddings, old.embedding_dim, padding_idx=old.padding_idx, **how)
        else:
            transposed = isinstance(old, Conv1D)
            sizes = old.weight.shape if transposed else reversed(old.weight.shape)
            new = loralib.Linear(*sizes, bias=old.bias is not None, fan_in_fan_out=transposed, **how)
        new.load_state_dict(old.state_dict(), strict=False)
        model.set_submodule(path, new)
    tensors = torch.load(tmp_path / "loralib" / "lora.pt", weights_only=True)
    assert not model.load_state_dict(tensors, strict=False).unexpected_keys
    torch.testing.assert_close(logits(model), answers, rtol=1e-5, atol=1e-5)

    given = loralib.lora_state_dict(model, bias=told["bias"])
    assert given.keys() == tensors.keys()
    assert all(torch.equal(given[name], tensor) for name, tensor in tensors.items())
    if told["modules"]:
        return  # a bare file has one alpha for all
    torch.save(given, tmp_path / "given.pt")
    export_adapter(tmp_path / "given.pt", tmp_path / "back", format="peft", base=str(base), alpha=told["lora_alpha"])
    back = PeftModel.from_pretrained(load_base(base), tmp_path / "back")
    torch.testing.assert_close(logits(back), answers, rtol=1e-6, atol=1e-6)


# A bare file of loralib's


@pytest.fixture
def state(make_adapter: Callable[..., Path], tmp_path: Path) -> dict[str, torch.Tensor]:
    """What loralib would save of a tiny OPT with LoRA on two modules of a layer, and all of its biases."""
    export_adapter(make_adapter("opt", target_modules=OPT, bias="all"), tmp_path / "state", format="loralib")
    tensors: dict[str, torch.Tensor] = torch.load(tmp_path / "state" / "lora.pt", weights_only=True)
    return tensors


@pytest.fixture
def take(tiny_model: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """Make a PEFT adapter of a bare file; `None` in the place of a tensor leaves it out."""

    def export(tensors: Any, name: str = "bare.pt", base: Path | None = None, alpha: float | None = 10) -> Path:
        if name.endswith(".safetensors"):
            save_file(tensors, tmp_path / name)
        else:
            torch.save(tensors, tmp_path / name)
        base = tiny_model("opt") if base is None else base
        export_adapter(tmp_path / name, tmp_path / "out", format="peft", base=str(base), alpha=alpha)
        return tmp_path / "out"

    return export


@pytest.mark.parametrize("name", ["bare.pt", "bare.bin", "bare.safetensors"])
def test_a_bare_file_is_taken(
    state: dict[str, torch.Tensor], take: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    out = take(state, name)
    tensors = load_file(out / WEIGHTS)
    expected = load_file(tmp_path / "adapter" / WEIGHTS)
    assert all(torch.equal(tensors[key], tensor) for key, tensor in expected.items())
    config = config_of(out)
    assert (config["r"], config["lora_alpha"], config["bias"]) == (4, 10, "all")
    assert isinstance(config["lora_alpha"], int)
    assert config["target_modules"] == sorted(OPT)


@pytest.mark.launch
def test_ranks_follow_from_shapes_and_one_alpha_is_for_all(
    state: dict[str, torch.Tensor], take: Callable[..., Path]
) -> None:
    key = "model.decoder.layers.1.fc1"
    state[f"{key}.lora_A"], state[f"{key}.lora_B"] = torch.ones(3, 32), torch.ones(64, 3)
    config = config_of(take({name: tensor.half() for name, tensor in state.items()}, alpha=2.5))
    assert (config["r"], config["lora_alpha"]) == (4, 2.5)
    assert config["rank_pattern"] == {f"^{key}": 3}
    assert config["alpha_pattern"] == {}


def test_16_bits_stay_16_bits(state: dict[str, torch.Tensor], take: Callable[..., Path]) -> None:
    out = take({name: torch.nn.Parameter(tensor.bfloat16()) for name, tensor in state.items()})
    assert {tensor.dtype for tensor in load_file(out / WEIGHTS).values()} == {torch.bfloat16}


A, B = "model.decoder.layers.0.fc1.lora_A", "model.decoder.layers.0.fc1.lora_B"
SPOILT: dict[str, tuple[dict[str, Any], str]] = {
    "nan": ({A: torch.full((4, 32), torch.nan)}, f"{A} holds values that are not finite"),
    "integers": ({A: torch.ones(4, 32, dtype=torch.int32)}, f"{A} is no ordinary tensor"),
    "empty": ({A: torch.ones(0, 32), B: torch.ones(64, 0)}, f"{A} is no ordinary tensor"),
    "one number, repeated": ({A: torch.ones(1).expand(2**40, 32)}, f"{A} is no ordinary tensor"),
    "no memory": ({A: torch.ones(4, 32, device="meta")}, f"{A} is no ordinary tensor"),
    "sparse": ({A: torch.ones(4, 32).to_sparse()}, f"{A} is no ordinary tensor"),
    "alone": ({B: None}, f"{A} stands there alone"),
    "shape of A": ({A: torch.ones(4, 31)}, r"wrong shape: lora_A \(4, 31\)"),
    "shape of B": ({B: torch.ones(63, 4)}, r"lora_B \(63, 4\); the base expects \(r, 32\), \(64, r\)"),
    "no matrix": ({A: torch.tensor(1.0)}, r"wrong shape: lora_A \(\)"),
    "another module": ({"model.decoder.layers.0.fc3.lora_A": torch.ones(4, 32)}, r"fc3\.lora_A belongs to no module"),
    "no module": ({"lora_A": torch.ones(4, 32)}, "lora_A is for OPTForCausalLM"),
    "norm": (
        {f"model.decoder.final_layer_norm.lora_{part}": torch.ones(4, 32) for part in "AB"},
        r"final_layer_norm\.lora_A is for LayerNorm",
    ),
    "shifted embedding": (
        {"model.decoder.embed_positions.lora_A": torch.ones(4, 258)},
        r"embed_positions\.lora_A is for OPTLearnedPositionalEmbedding",
    ),
    "weight": ({"model.decoder.layers.0.fc1.weight": torch.ones(64, 32)}, r"fc1\.weight is none of"),
    "a name of PEFT's": ({f"base_model.model.{A}.weight": torch.ones(4, 32)}, r"lora_A\.weight is none of"),
    "one bias less": ({"model.decoder.layers.0.fc2.bias": None}, "holds .* biases, .*PEFT takes all"),
    "bias of another shape": ({"model.decoder.layers.0.fc2.bias": torch.ones(3)}, r"fc2\.bias has shape \(3,\)"),
    "too high a rank": ({A: torch.ones(2000, 32), B: torch.ones(64, 2000)}, "rank_pattern.* is no rank from 1 to 1024"),
}


@pytest.mark.parametrize("spoil", SPOILT)
def test_a_tensor_that_cannot_be_is_named(
    state: dict[str, torch.Tensor], take: Callable[..., Path], tmp_path: Path, spoil: str
) -> None:
    changes, said = SPOILT[spoil]
    with pytest.raises(ArtifactError, match=said):
        take({name: tensor for name, tensor in (state | changes).items() if tensor is not None})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "tensors", [{}, {"model.decoder.layers.0.fc2.bias": torch.ones(32)}, [torch.ones(3)], {1: torch.ones(3)}, {"a": {}}]
)
def test_what_is_no_checkpoint_is_refused(take: Callable[..., Path], tmp_path: Path, tensors: Any) -> None:
    with pytest.raises(ArtifactError, match=r"bare\.pt"):
        take(tensors)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("groups", "shapes"), [(1, ((4, 32), (32, 4))), (2, ((8, 32), (64, 4))), (3, ((12, 32), (96, 4)))]
)
def test_merged_linear_is_refused_with_the_reason(
    take: Callable[..., Path], tiny_model: Callable[..., Path], groups: int, shapes: tuple[tuple[int, int], ...]
) -> None:
    """enable_lora with so many of GPT-2's query, key and value."""
    try:
        import loralib
    except ImportError:
        pass
    else:
        layer = loralib.MergedLinear(32, 96, r=4, enable_lora=[number < groups for number in range(3)])
        assert (tuple(layer.lora_A.shape), tuple(layer.lora_B.shape)) == shapes
    name = "transformer.h.0.attn.c_attn"
    with pytest.raises(ArtifactError, match=rf"{name}\.lora_A .*MergedLinear"):
        take(
            {f"{name}.lora_{part}": torch.ones(shape) for part, shape in zip("AB", shapes, strict=True)},
            base=tiny_model("gpt2"),
        )


# PEFT's older pickle


def test_a_run_goes_into_the_older_pickle_and_back_with_all_that_belongs_to_it(
    make_config: Callable[..., RunConfig], tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    adapter = run_training(make_config())
    out, back = tmp_path / "bin", tmp_path / "back"
    told = export_adapter(adapter, out, format="peft-bin")
    before = load_file(adapter / WEIGHTS)
    tensors = torch.load(out / "adapter_model.bin", weights_only=True)
    assert type(tensors) is dict
    assert tensors.keys() == before.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in before.items())
    assert contents(out) == (contents(adapter) - {WEIGHTS}) | {"adapter_model.bin"} == set(told["files"])
    for name in ("provenance.json", "README.md", "tokenizer.json", CONFIG):
        assert (out / name).read_bytes() == (adapter / name).read_bytes()
    assert AutoTokenizer.from_pretrained(out).chat_template == AutoTokenizer.from_pretrained(adapter).chat_template
    answers = logits(PeftModel.from_pretrained(load_base(tiny_model()), adapter))
    assert torch.equal(logits(PeftModel.from_pretrained(load_base(tiny_model()), out)), answers)

    export_adapter(out, back, format="peft")
    assert contents(back) == contents(adapter)
    assert (back / WEIGHTS).read_bytes() == (adapter / WEIGHTS).read_bytes()
    assert torch.equal(logits(load_adapter(load_base(tiny_model()), back)), answers)

    export_adapter(out, tmp_path / "loralib", format="loralib")
    assert {"tokenizer.json", "provenance.json"} <= contents(tmp_path / "loralib")
    assert "README.md" not in contents(tmp_path / "loralib")


def test_any_lora_goes_into_the_older_pickle(
    make_adapter: Callable[..., Path], tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    adapter = make_adapter(use_dora=True, modules_to_save=["lm_head"])
    export_adapter(adapter, tmp_path / "out", format="peft-bin", base=str(tiny_model()))
    answers = logits(PeftModel.from_pretrained(load_base(tiny_model()), adapter))
    assert torch.equal(logits(PeftModel.from_pretrained(load_base(tiny_model()), tmp_path / "out")), answers)
    with pytest.raises(ArtifactError, match="adapter"):
        export_adapter(adapter, tmp_path / "wrong", format="peft-bin", base=str(tiny_model("gpt2")))
    assert not (tmp_path / "wrong").exists()


@pytest.mark.parametrize("make", [plain_pickle, torch_pickle])
@pytest.mark.parametrize("file", ["adapter_model.bin", "lora.pt", "bare"])
def test_a_hostile_pickle_is_refused_and_not_run(
    make_adapter: Callable[..., Path], tmp_path: Path, make: Callable[[Path], bytes], file: str
) -> None:
    adapter, canary, source = make_adapter(), tmp_path / "canary", tmp_path / "source"
    export_adapter(adapter, source, format="loralib" if file == "lora.pt" else "peft-bin")
    if file == "bare":
        source, alpha, hostile = source / "adapter_model.bin", 8.0, source / "adapter_model.bin"
    else:
        alpha, hostile = None, source / file
    hostile.write_bytes(make(canary))
    with pytest.raises(ArtifactError, match=hostile.name):
        export_adapter(
            source,
            tmp_path / "out",
            format="peft",
            alpha=alpha,
            base=str(config_of(adapter)["base_model_name_or_path"]),
        )
    assert not canary.exists()
    assert not (tmp_path / "out").exists()


# What is refused, and that nothing is half-made


@pytest.mark.parametrize(
    "more",
    [
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [3]},
        {"target_parameters": ["mlp.experts.gate_up_proj"]},
        {"lora_bias": True},
        {"layer_replication": [[0, 2], [0, 2]]},
        {"ensure_weight_tying": True},
        {"alora_invocation_tokens": [3]},
        {"of_a_later_peft": 3},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "pissa_niter_4"},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "loftq"},
        {"init_lora_weights": "corda"},
    ],
    ids=str,
)
def test_what_loralib_cannot_say_is_refused_with_the_way_out(
    make_adapter: Callable[..., Path], tmp_path: Path, more: dict[str, Any]
) -> None:
    adapter = make_adapter()
    (adapter / CONFIG).write_text(json.dumps(config_of(adapter) | more))
    with pytest.raises(ArtifactError, match=rf"{next(iter(more))}=.* no counterpart in loralib; merge the adapter"):
        export_adapter(adapter, tmp_path / "out", format="loralib")
    assert not (tmp_path / "out").exists()


def test_what_begins_otherwise_but_leaves_the_base_alone_is_taken(
    make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    adapter = make_adapter()
    for begun in (True, "gaussian", "eva"):
        (adapter / CONFIG).write_text(json.dumps(config_of(adapter) | {"init_lora_weights": begun}))
        export_adapter(adapter, tmp_path / "out", format="loralib", overwrite=True)


@pytest.mark.parametrize("format", ["peft", "peft-bin", "loralib"])
def test_other_kinds_and_what_is_damaged_are_refused(
    make_adapter: Callable[..., Path], tmp_path: Path, format: str
) -> None:
    adapter = make_adapter()
    config, tensors = config_of(adapter), load_file(adapter / WEIGHTS)
    (adapter / CONFIG).write_text(json.dumps(config | {"peft_type": "PREFIX_TUNING"}))
    with pytest.raises(ArtifactError, match="is not LORA"):
        export_adapter(adapter, tmp_path / "out", format=format)
    (adapter / CONFIG).write_text(json.dumps(config))
    next(iter(tensors.values()))[0, 0] = torch.inf
    save_file(tensors, adapter / WEIGHTS)
    with pytest.raises(ArtifactError, match="not finite"):
        export_adapter(adapter, tmp_path / "out", format=format)
    (adapter / CONFIG).unlink()
    with pytest.raises(ArtifactError, match="so it is no adapter"):
        export_adapter(adapter, tmp_path / "out", format=format)
    assert not (tmp_path / "out").exists()


def test_tensors_that_the_config_does_not_name_are_refused(make_adapter: Callable[..., Path], tmp_path: Path) -> None:
    """PEFT itself saves the base's embeddings beside LoRA on them."""
    adapter = make_adapter("qwen2", target_modules=["embed_tokens"])
    tensors = load_file(adapter / WEIGHTS)
    name = "base_model.model.model.embed_tokens.base_layer.weight"
    some = next(iter(tensors.values()))
    save_file(tensors | {name: torch.zeros(max(some.shape), 32)}, adapter / WEIGHTS)
    with pytest.raises(ArtifactError, match=rf"{name} is no part of LoRA.* merge"):
        export_adapter(adapter, tmp_path / "out", format="loralib")
    (adapter / CONFIG).write_text(json.dumps(config_of(adapter) | {"r": 8}))
    save_file(tensors, adapter / WEIGHTS)
    with pytest.raises(ArtifactError, match="has shape"):
        export_adapter(adapter, tmp_path / "out", format="loralib")


@pytest.mark.parametrize(
    "told", [{}, {"lora_alpha": "16"}, {"lora_alpha": float("nan")}, {"lora_alpha": True}, {"lora_alpha": 1, "r": 5}]
)
def test_a_loralib_json_that_cannot_be_is_refused(
    make_adapter: Callable[..., Path], tiny_model: Callable[..., Path], tmp_path: Path, told: dict[str, Any]
) -> None:
    export_adapter(make_adapter(), tmp_path / "loralib", format="loralib")
    for value in (told, {"modules": 3} | told, {"modules": {"model.layers.0.self_attn.q_proj": told}, "lora_alpha": 8}):
        (tmp_path / "loralib" / "loralib.json").write_text(json.dumps(value))
        with pytest.raises(ArtifactError, match=r"loralib\.json: r="):
            export_adapter(tmp_path / "loralib", tmp_path / "out", format="peft", base=str(tiny_model()))
    assert not (tmp_path / "out").exists()


def test_options_that_are_missing_or_out_of_place(
    make_adapter: Callable[..., Path], tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    adapter, out = make_adapter(), tmp_path / "out"
    export_adapter(adapter, tmp_path / "loralib", format="loralib")
    bare = tmp_path / "loralib" / "lora.pt"
    with pytest.raises(ConfigError, match=r"--format=loralip: say peft, peft-bin, loralib \(did you mean loralib\?\)"):
        export_adapter(adapter, out, format="loralip")
    for alpha in (None, 0, float("nan")):
        with pytest.raises(ConfigError, match=f"--alpha={alpha}: .*does not tell its lora_alpha"):
            export_adapter(bare, out, format="peft", base=str(tiny_model()), alpha=alpha)
    for source in (adapter, tmp_path / "loralib"):
        with pytest.raises(ConfigError, match="--alpha=8: only a bare file"):
            export_adapter(source, out, format="peft", alpha=8)
    with pytest.raises(ArtifactError, match="names no base model; say --base"):
        export_adapter(bare, out, format="peft", alpha=8)
    with pytest.raises(UserError, match="cannot be loaded: there is no such folder"):
        export_adapter(bare, out, format="peft", alpha=8, base=str(tmp_path / "absent"))
    for absent in (tmp_path / "absent", tmp_path):
        with pytest.raises(ArtifactError, match="so it is no adapter"):
            export_adapter(absent, out, format="peft-bin")
    bare.unlink()
    with pytest.raises(ArtifactError, match=r"lora\.pt"):
        export_adapter(tmp_path / "loralib", out, format="peft")
    assert not out.exists()


def test_a_folder_that_is_there_is_replaced_on_request_and_never_the_source(
    make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    adapter, out = make_adapter(), tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="say --overwrite"):
        export_adapter(adapter, out, format="loralib")
    assert contents(out) == {"mine.txt"}
    export_adapter(adapter, out, format="loralib", overwrite=True)
    assert contents(out) == {"lora.pt", "loralib.json", "manifest.json"}
    for source, alpha in ((adapter, None), (out / "lora.pt", 8)):
        before = contents(source.parent)
        for place in (source.parent, *([source] if source.is_dir() else [])):
            with pytest.raises(ArtifactError, match="holds the adapter itself"):
                export_adapter(source, place, format="peft-bin", alpha=alpha, overwrite=True)
        assert contents(source.parent) == before


def test_nothing_is_half_made_when_saving_fails(
    make_adapter: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = make_adapter()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lora_accel.export.export.write_json", full)
    with pytest.raises(OSError, match="No space left"):
        export_adapter(adapter, tmp_path / "out", format="peft-bin")
    assert contents(tmp_path) == {"adapter"}


# The command


def test_the_command(
    make_adapter: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    adapter = make_adapter()

    def run(*words: object) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["lora-accel", "export", *map(str, words)])
        with pytest.raises(SystemExit) as stopped:
            main()
        return stopped.value.code, *capsys.readouterr()

    code, said, _ = run(adapter, tmp_path / "loralib", "--format", "loralib", "--json")
    assert code in (0, None)
    assert json.loads(said)["files"] == ["lora.pt", "loralib.json", "manifest.json"]
    code, _, said = run(tmp_path / "loralib" / "lora.pt", tmp_path / "out", "--format", "peft", "--alpha", "10")
    assert code == 2
    assert "names no base model; say --base" in said
    base = config_of(adapter)["base_model_name_or_path"]
    words = ("--format", "peft", "--alpha", "10", "--base", base)
    code, said, _ = run(tmp_path / "loralib" / "lora.pt", tmp_path / "out", *words)
    assert code in (0, None)
    assert said.split() == ["peft:", str(tmp_path / "out"), "(8", "tensors)"]


def test_help_imports_no_torch() -> None:
    told = run_code(
        "import sys; sys.argv = ['lora-accel', 'export', '--help']\n"
        "from lora_accel.cli import main\n"
        "try: main()\n"
        "except SystemExit: print('torch' in sys.modules)"
    )
    assert "microsoft/LoRA" in told.stdout
    assert told.stdout.split()[-1] == "False"
