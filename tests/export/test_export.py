"""An exported adapter gives the same logits and round-trips bitwise; what a format does not support raises."""

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


def file_names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / CONFIG).read_text())
    return config


@pytest.fixture
def make_adapter(tiny_model: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """Return a function that saves a PEFT adapter with random tensors on a tiny model."""

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


def add_loralib_adapter(model: torch.nn.Module, folder: Path) -> None:
    """Load an export with `load_state_dict` into a model whose layers compute LoRA as loralib does.

    https://github.com/microsoft/LoRA, loralib/layers.py: x A' B' · lora_alpha / r; an embedding looks x up in A'.
    """
    config = json.loads((folder / "loralib.json").read_text())
    for path in config["target_modules"]:
        layer, settings = model.get_submodule(path), config["modules"].get(path, config)
        transposed = isinstance(layer, (Conv1D, torch.nn.Embedding))
        num_in, num_out = layer.weight.shape if transposed else reversed(layer.weight.shape)
        layer.lora_A = torch.nn.Parameter(torch.zeros(settings["r"], num_in))
        layer.lora_B = torch.nn.Parameter(torch.zeros(num_out, settings["r"]))

        scaling = settings["lora_alpha"] / settings["r"]

        def add_lora(layer: Any, args: Any, output: torch.Tensor, scaling: float = scaling) -> Any:
            if isinstance(layer, torch.nn.Embedding):
                return output + torch.nn.functional.embedding(args[0], layer.lora_A.T) @ layer.lora_B.T * scaling
            return output + args[0] @ layer.lora_A.T @ layer.lora_B.T * scaling

        layer.register_forward_hook(add_lora)
    loaded = model.load_state_dict(torch.load(folder / "lora.pt", weights_only=True), strict=False)
    assert not loaded.unexpected_keys
    assert not [name for name in loaded.missing_keys if "lora_" in name]


@pytest.mark.parametrize(
    "case",  # patterns are matched in a separate process
    [pytest.param(case, marks=pytest.mark.launch) if case == "patterns" else case for case in CASES],
)
def test_loralib_gives_the_same_logits_and_round_trips_bitwise(
    make_adapter: Callable[..., Path], tiny_model: Callable[..., Path], tmp_path: Path, case: str
) -> None:
    family, options = CASES[case]
    adapter, base = make_adapter(family, **options), tiny_model(family)
    expected = logits(PeftModel.from_pretrained(load_base(base), adapter))
    difference = (expected - logits(load_base(base))).abs().max()
    assert difference > 1e-2, "the adapter must change the logits for this test to mean anything"

    result = export_adapter(adapter, tmp_path / "loralib", format="loralib")
    assert why_invalid(tmp_path / "loralib") is None
    assert file_names(tmp_path / "loralib") == {"lora.pt", "loralib.json", "manifest.json"} == set(result["files"])
    model = load_base(base)
    add_loralib_adapter(model, tmp_path / "loralib")
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)

    export_adapter(tmp_path / "loralib", tmp_path / "back", format="peft")
    before, after = load_file(adapter / WEIGHTS), load_file(tmp_path / "back" / WEIGHTS)
    assert after.keys() == before.keys()
    assert result["num_tensors"] == len(before)
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name
    assert config_of(tmp_path / "back")["bias"] == options.get("bias", "none")
    for reloaded in (
        PeftModel.from_pretrained(load_base(base), tmp_path / "back"),
        load_adapter(load_base(base), tmp_path / "back"),
    ):
        torch.testing.assert_close(logits(reloaded), expected, rtol=1e-6, atol=1e-6)


def test_loralib_names_and_shapes(make_adapter: Callable[..., Path], tmp_path: Path) -> None:
    adapter = make_adapter("gpt2", target_modules=["c_attn"], bias="lora_only")
    export_adapter(adapter, tmp_path / "out", format="loralib")
    tensors = torch.load(tmp_path / "out" / "lora.pt", weights_only=True)
    shapes = {"lora_A": (4, 32), "lora_B": (96, 4), "bias": (96,)}
    expected = {f"transformer.h.{i}.attn.c_attn.{part}": shape for i in (0, 1) for part, shape in shapes.items()}
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == expected
    assert type(tensors) is dict
    config = json.loads((tmp_path / "out" / "loralib.json").read_text())
    assert config == {
        "base_model_name_or_path": config_of(adapter)["base_model_name_or_path"],
        "bias": "lora_only",
        "r": 4,
        "lora_alpha": 10,
        "modules": {},
        "target_modules": ["transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_attn"],
    }


def test_loralib_shapes_of_an_embedding(make_adapter: Callable[..., Path], tmp_path: Path, tokenizer: Any) -> None:
    export_adapter(make_adapter("qwen2", target_modules=["embed_tokens"]), tmp_path / "out", format="loralib")
    tensors = torch.load(tmp_path / "out" / "lora.pt", weights_only=True)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert shapes == {"model.embed_tokens.lora_A": (4, len(tokenizer)), "model.embed_tokens.lora_B": (32, 4)}


@pytest.mark.launch
def test_ranks_and_alphas_by_module_become_patterns(make_adapter: Callable[..., Path], tmp_path: Path) -> None:
    family, options = CASES["patterns"]
    export_adapter(make_adapter(family, **options), tmp_path / "loralib", format="loralib")
    loralib_config = json.loads((tmp_path / "loralib" / "loralib.json").read_text())
    assert (loralib_config["r"], loralib_config["lora_alpha"]) == (4, 10)
    assert loralib_config["modules"] == {
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


def test_target_modules_are_full_paths_if_names_match_other_modules(
    make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    export_adapter(make_adapter(**CASES["some layers"][1]), tmp_path / "loralib", format="loralib")
    export_adapter(tmp_path / "loralib", tmp_path / "back", format="peft")
    assert config_of(tmp_path / "back")["target_modules"] == ["model.layers.1.self_attn.q_proj"]


@pytest.mark.parametrize("case", ["gpt2, all biases", "opt, biases of LoRA", "embedding", "patterns", "rslora"])
def test_loralib_itself_loads_and_saves_it(
    make_adapter: Callable[..., Path], tiny_model: Callable[..., Path], tmp_path: Path, case: str
) -> None:
    loralib = pytest.importorskip("loralib")
    family, options = CASES[case]
    adapter, base = make_adapter(family, **options), tiny_model(family)
    expected = logits(PeftModel.from_pretrained(load_base(base), adapter))
    export_adapter(adapter, tmp_path / "loralib", format="loralib")
    config = json.loads((tmp_path / "loralib" / "loralib.json").read_text())
    model = load_base(base)
    for path in config["target_modules"]:
        old, settings = model.get_submodule(path), config["modules"].get(path, config)
        options = {"r": settings["r"], "lora_alpha": settings["lora_alpha"], "merge_weights": False}
        if isinstance(old, torch.nn.Embedding):
            new = loralib.Embedding(old.num_embeddings, old.embedding_dim, padding_idx=old.padding_idx, **options)
        else:
            transposed = isinstance(old, Conv1D)
            sizes = old.weight.shape if transposed else reversed(old.weight.shape)
            new = loralib.Linear(*sizes, bias=old.bias is not None, fan_in_fan_out=transposed, **options)
        new.load_state_dict(old.state_dict(), strict=False)
        model.set_submodule(path, new)
    tensors = torch.load(tmp_path / "loralib" / "lora.pt", weights_only=True)
    assert not model.load_state_dict(tensors, strict=False).unexpected_keys
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)

    saved = loralib.lora_state_dict(model, bias=config["bias"])
    assert saved.keys() == tensors.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in tensors.items())
    if config["modules"]:
        return  # a bare file has one alpha for all modules
    bare = tmp_path / "bare.pt"
    torch.save(saved, bare)
    export_adapter(bare, tmp_path / "back", format="peft", base=str(base), alpha=config["lora_alpha"])
    back = PeftModel.from_pretrained(load_base(base), tmp_path / "back")
    torch.testing.assert_close(logits(back), expected, rtol=1e-6, atol=1e-6)


# Bare loralib files


@pytest.fixture
def state(make_adapter: Callable[..., Path], tmp_path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors that loralib saves for a tiny OPT with LoRA and all biases."""
    export_adapter(make_adapter("opt", target_modules=OPT, bias="all"), tmp_path / "state", format="loralib")
    tensors: dict[str, torch.Tensor] = torch.load(tmp_path / "state" / "lora.pt", weights_only=True)
    return tensors


@pytest.fixture
def export_bare(tiny_model: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """Return a function that saves a bare loralib file and exports it to PEFT's format."""

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
def test_bare_file_becomes_a_peft_adapter(
    state: dict[str, torch.Tensor], export_bare: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    out = export_bare(state, name)
    tensors = load_file(out / WEIGHTS)
    expected = load_file(tmp_path / "adapter" / WEIGHTS)
    assert all(torch.equal(tensors[key], tensor) for key, tensor in expected.items())
    config = config_of(out)
    assert (config["r"], config["lora_alpha"], config["bias"]) == (4, 10, "all")
    assert isinstance(config["lora_alpha"], int)
    assert config["target_modules"] == sorted(OPT)


@pytest.mark.launch
def test_bare_file_ranks_follow_from_shapes(state: dict[str, torch.Tensor], export_bare: Callable[..., Path]) -> None:
    key = "model.decoder.layers.1.fc1"
    state[f"{key}.lora_A"], state[f"{key}.lora_B"] = torch.ones(3, 32), torch.ones(64, 3)
    config = config_of(export_bare({name: tensor.half() for name, tensor in state.items()}, alpha=2.5))
    assert (config["r"], config["lora_alpha"]) == (4, 2.5)
    assert config["rank_pattern"] == {f"^{key}": 3}
    assert config["alpha_pattern"] == {}


def test_export_keeps_bfloat16(state: dict[str, torch.Tensor], export_bare: Callable[..., Path]) -> None:
    out = export_bare({name: torch.nn.Parameter(tensor.bfloat16()) for name, tensor in state.items()})
    assert {tensor.dtype for tensor in load_file(out / WEIGHTS).values()} == {torch.bfloat16}


A, B = "model.decoder.layers.0.fc1.lora_A", "model.decoder.layers.0.fc1.lora_B"
INVALID_TENSORS: dict[str, tuple[dict[str, Any], str]] = {
    "nan": ({A: torch.full((4, 32), torch.nan)}, f"{A} has values that are not finite"),
    "integers": ({A: torch.ones(4, 32, dtype=torch.int32)}, f"{A} is stored as int32"),
    "empty": ({A: torch.ones(0, 32), B: torch.ones(64, 0)}, f"{A} is not a dense floating-point tensor"),
    "one value, expanded": ({A: torch.ones(1).expand(2**40, 32)}, f"{A} is not a dense floating-point tensor"),
    "meta device": ({A: torch.ones(4, 32, device="meta")}, f"{A} is not a dense floating-point tensor"),
    "sparse": ({A: torch.ones(4, 32).to_sparse()}, f"{A} is not a dense floating-point tensor"),
    "without B": ({B: None}, f"{A} is incomplete"),
    "shape of A": ({A: torch.ones(4, 31)}, r"wrong shape: lora_A \(4, 31\)"),
    "shape of B": ({B: torch.ones(63, 4)}, r"lora_B \(63, 4\); the base expects \(r, 32\), \(64, r\)"),
    "no matrix": ({A: torch.tensor(1.0)}, r"wrong shape: lora_A \(\)"),
    "another module": ({"model.decoder.layers.0.fc3.lora_A": torch.ones(4, 32)}, r"fc3\.lora_A belongs to no module"),
    "no module": ({"lora_A": torch.ones(4, 32)}, "lora_A belongs to a OPTForCausalLM"),
    "norm": (
        {f"model.decoder.final_layer_norm.lora_{part}": torch.ones(4, 32) for part in "AB"},
        r"final_layer_norm\.lora_A belongs to a LayerNorm",
    ),
    "shifted embedding": (
        {"model.decoder.embed_positions.lora_A": torch.ones(4, 258)},
        r"embed_positions\.lora_A belongs to a OPTLearnedPositionalEmbedding",
    ),
    "weight": ({"model.decoder.layers.0.fc1.weight": torch.ones(64, 32)}, r"fc1\.weight is not <module>"),
    "PEFT name": ({f"base_model.model.{A}.weight": torch.ones(4, 32)}, r"lora_A\.weight is not <module>"),
    "missing bias": ({"model.decoder.layers.0.fc2.bias": None}, "has .* biases, .*PEFT needs all"),
    "bias of another shape": ({"model.decoder.layers.0.fc2.bias": torch.ones(3)}, r"fc2\.bias has shape \(3,\)"),
    "rank too high": (
        {A: torch.ones(2000, 32), B: torch.ones(64, 2000)},
        "rank_pattern.* is not a rank from 1 to 1024",
    ),
}


@pytest.mark.parametrize("case", INVALID_TENSORS)
def test_invalid_tensor_raises(
    state: dict[str, torch.Tensor], export_bare: Callable[..., Path], tmp_path: Path, case: str
) -> None:
    changes, message = INVALID_TENSORS[case]
    with pytest.raises(ArtifactError, match=message):
        export_bare({name: tensor for name, tensor in (state | changes).items() if tensor is not None})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "tensors", [{}, {"model.decoder.layers.0.fc2.bias": torch.ones(32)}, [torch.ones(3)], {1: torch.ones(3)}, {"a": {}}]
)
def test_file_without_lora_raises(export_bare: Callable[..., Path], tmp_path: Path, tensors: Any) -> None:
    with pytest.raises(ArtifactError, match=r"bare\.pt"):
        export_bare(tensors)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("groups", "shapes"), [(1, ((4, 32), (32, 4))), (2, ((8, 32), (64, 4))), (3, ((12, 32), (96, 4)))]
)
def test_merged_linear_raises(
    export_bare: Callable[..., Path], tiny_model: Callable[..., Path], groups: int, shapes: tuple[tuple[int, int], ...]
) -> None:
    """`enable_lora` for one, two or three of GPT-2's query, key and value."""
    try:
        import loralib
    except ImportError:
        pass
    else:
        layer = loralib.MergedLinear(32, 96, r=4, enable_lora=[number < groups for number in range(3)])
        assert (tuple(layer.lora_A.shape), tuple(layer.lora_B.shape)) == shapes
    name = "transformer.h.0.attn.c_attn"
    with pytest.raises(ArtifactError, match=rf"{name}\.lora_A .*MergedLinear"):
        export_bare(
            {f"{name}.lora_{part}": torch.ones(shape) for part, shape in zip("AB", shapes, strict=True)},
            base=tiny_model("gpt2"),
        )


# PEFT's older pickle


def test_peft_bin_round_trip_keeps_all_files_of_a_run(
    make_config: Callable[..., RunConfig], tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    adapter = run_training(make_config())
    out, back = tmp_path / "bin", tmp_path / "back"
    result = export_adapter(adapter, out, format="peft-bin")
    before = load_file(adapter / WEIGHTS)
    tensors = torch.load(out / "adapter_model.bin", weights_only=True)
    assert type(tensors) is dict
    assert tensors.keys() == before.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in before.items())
    assert file_names(out) == (file_names(adapter) - {WEIGHTS}) | {"adapter_model.bin"} == set(result["files"])
    for name in ("provenance.json", "README.md", "tokenizer.json", CONFIG):
        assert (out / name).read_bytes() == (adapter / name).read_bytes()
    assert AutoTokenizer.from_pretrained(out).chat_template == AutoTokenizer.from_pretrained(adapter).chat_template
    expected = logits(PeftModel.from_pretrained(load_base(tiny_model()), adapter))
    assert torch.equal(logits(PeftModel.from_pretrained(load_base(tiny_model()), out)), expected)

    export_adapter(out, back, format="peft")
    assert file_names(back) == file_names(adapter)
    assert (back / WEIGHTS).read_bytes() == (adapter / WEIGHTS).read_bytes()
    assert torch.equal(logits(load_adapter(load_base(tiny_model()), back)), expected)

    export_adapter(out, tmp_path / "loralib", format="loralib")
    assert {"tokenizer.json", "provenance.json"} <= file_names(tmp_path / "loralib")
    assert "README.md" not in file_names(tmp_path / "loralib")


def test_peft_bin_supports_every_lora_variant(
    make_adapter: Callable[..., Path], tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    adapter = make_adapter(use_dora=True, modules_to_save=["lm_head"])
    export_adapter(adapter, tmp_path / "out", format="peft-bin", base=str(tiny_model()))
    expected = logits(PeftModel.from_pretrained(load_base(tiny_model()), adapter))
    assert torch.equal(logits(PeftModel.from_pretrained(load_base(tiny_model()), tmp_path / "out")), expected)
    with pytest.raises(ArtifactError, match="adapter"):
        export_adapter(adapter, tmp_path / "wrong", format="peft-bin", base=str(tiny_model("gpt2")))
    assert not (tmp_path / "wrong").exists()


@pytest.mark.parametrize("make", [plain_pickle, torch_pickle])
@pytest.mark.parametrize("file", ["adapter_model.bin", "lora.pt", "bare"])
def test_code_in_a_pickle_is_not_run(
    make_adapter: Callable[..., Path], tmp_path: Path, make: Callable[[Path], bytes], file: str
) -> None:
    adapter, canary, source = make_adapter(), tmp_path / "canary", tmp_path / "source"
    export_adapter(adapter, source, format="loralib" if file == "lora.pt" else "peft-bin")
    if file == "bare":
        source, alpha, pickled = source / "adapter_model.bin", 8.0, source / "adapter_model.bin"
    else:
        alpha, pickled = None, source / file
    pickled.write_bytes(make(canary))
    with pytest.raises(ArtifactError, match=pickled.name):
        export_adapter(
            source,
            tmp_path / "out",
            format="peft",
            alpha=alpha,
            base=str(config_of(adapter)["base_model_name_or_path"]),
        )
    assert not canary.exists()
    assert not (tmp_path / "out").exists()


# Errors. Nothing is written


@pytest.mark.parametrize(
    "option",
    [
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [3]},
        {"target_parameters": ["mlp.experts.gate_up_proj"]},
        {"lora_bias": True},
        {"layer_replication": [[0, 2], [0, 2]]},
        {"ensure_weight_tying": True},
        {"alora_invocation_tokens": [3]},
        {"unknown_option": 3},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "pissa_niter_4"},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "loftq"},
        {"init_lora_weights": "corda"},
    ],
    ids=str,
)
def test_options_without_loralib_support_raise(
    make_adapter: Callable[..., Path], tmp_path: Path, option: dict[str, Any]
) -> None:
    adapter = make_adapter()
    (adapter / CONFIG).write_text(json.dumps(config_of(adapter) | option))
    with pytest.raises(ArtifactError, match=rf"loralib does not support {next(iter(option))}=.*; merge the adapter"):
        export_adapter(adapter, tmp_path / "out", format="loralib")
    assert not (tmp_path / "out").exists()


def test_initializations_that_keep_the_base_are_supported(make_adapter: Callable[..., Path], tmp_path: Path) -> None:
    adapter = make_adapter()
    for init in (True, "gaussian", "eva"):
        (adapter / CONFIG).write_text(json.dumps(config_of(adapter) | {"init_lora_weights": init}))
        export_adapter(adapter, tmp_path / "out", format="loralib", overwrite=True)


@pytest.mark.parametrize("format", ["peft", "peft-bin", "loralib"])
def test_invalid_adapter_raises(make_adapter: Callable[..., Path], tmp_path: Path, format: str) -> None:
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
    with pytest.raises(ArtifactError, match="is not an adapter"):
        export_adapter(adapter, tmp_path / "out", format=format)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("format", ["peft", "peft-bin"])
def test_formats_of_peft_are_checked_against_a_base_that_is_here(
    make_adapter: Callable[..., Path], tmp_path: Path, format: str, caplog: pytest.LogCaptureFixture
) -> None:
    adapter = make_adapter()
    tensors = load_file(adapter / WEIGHTS)
    name = next(iter(tensors))
    save_file(tensors | {name: tensors[name][:, :-1].contiguous()}, adapter / WEIGHTS)
    with pytest.raises(ArtifactError, match="shape"):
        export_adapter(adapter, tmp_path / "out", format=format)
    assert not (tmp_path / "out").exists()
    (adapter / CONFIG).write_text(json.dumps(config_of(adapter) | {"base_model_name_or_path": "elsewhere/base"}))
    export_adapter(adapter, tmp_path / "out", format=format)
    assert "elsewhere/base is not here, so names and shapes were not checked" in caplog.text


def test_tensors_that_do_not_match_the_config_raise(make_adapter: Callable[..., Path], tmp_path: Path) -> None:
    """PEFT saves the base's embeddings if LoRA is applied to them."""
    adapter = make_adapter("qwen2", target_modules=["embed_tokens"])
    tensors = load_file(adapter / WEIGHTS)
    name = "base_model.model.model.embed_tokens.base_layer.weight"
    lora_matrix = next(iter(tensors.values()))
    save_file(tensors | {name: torch.zeros(max(lora_matrix.shape), 32)}, adapter / WEIGHTS)
    with pytest.raises(ArtifactError, match=r"embed_tokens\.weight is not a LoRA tensor.* merge"):
        export_adapter(adapter, tmp_path / "out", format="loralib")
    (adapter / CONFIG).write_text(json.dumps(config_of(adapter) | {"r": 8}))
    save_file(tensors, adapter / WEIGHTS)
    with pytest.raises(ArtifactError, match="has shape"):
        export_adapter(adapter, tmp_path / "out", format="loralib")


@pytest.mark.parametrize(
    "entry", [{}, {"lora_alpha": "16"}, {"lora_alpha": float("nan")}, {"lora_alpha": True}, {"lora_alpha": 1, "r": 5}]
)
def test_invalid_loralib_json_raises(
    make_adapter: Callable[..., Path], tiny_model: Callable[..., Path], tmp_path: Path, entry: dict[str, Any]
) -> None:
    export_adapter(make_adapter(), tmp_path / "loralib", format="loralib")
    by_module = {"modules": {"model.layers.0.self_attn.q_proj": entry}, "lora_alpha": 8}
    for config in (entry, {"modules": 3} | entry, by_module):
        (tmp_path / "loralib" / "loralib.json").write_text(json.dumps(config))
        with pytest.raises(ArtifactError, match=r"loralib\.json: r="):
            export_adapter(tmp_path / "loralib", tmp_path / "out", format="peft", base=str(tiny_model()))
    assert not (tmp_path / "out").exists()


def test_missing_or_invalid_arguments_raise(
    make_adapter: Callable[..., Path], tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    adapter, out = make_adapter(), tmp_path / "out"
    export_adapter(adapter, tmp_path / "loralib", format="loralib")
    bare = tmp_path / "loralib" / "lora.pt"
    with pytest.raises(
        ConfigError, match=r"--format=loralip: unknown; use peft, peft-bin, loralib, gguf \(did you mean loralib\?\)"
    ):
        export_adapter(adapter, out, format="loralip")
    for alpha in (None, 0, float("nan")):
        with pytest.raises(ConfigError, match=f"--alpha={alpha}: .*does not store lora_alpha"):
            export_adapter(bare, out, format="peft", base=str(tiny_model()), alpha=alpha)
    for source in (adapter, tmp_path / "loralib"):
        with pytest.raises(ConfigError, match="--alpha=8: only allowed for a bare loralib file"):
            export_adapter(source, out, format="peft", alpha=8)
    with pytest.raises(ArtifactError, match="does not name its base model; pass --base"):
        export_adapter(bare, out, format="peft", alpha=8)
    with pytest.raises(UserError, match="cannot be loaded: there is no such folder"):
        export_adapter(bare, out, format="peft", alpha=8, base=str(tmp_path / "absent"))
    config = json.loads((tiny_model() / "config.json").read_text())
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(config | {"hidden_size": -1}))
    with pytest.raises(ArtifactError, match=r"hidden_size=-1") as raised:
        export_adapter(bare, out, format="peft", alpha=8, base=str(tmp_path / "base"))
    assert "cannot be loaded" not in str(raised.value), "the reason is not hidden in a message about a missing model"
    for absent in (tmp_path / "absent", tmp_path):
        with pytest.raises(ArtifactError, match="is not an adapter"):
            export_adapter(absent, out, format="peft-bin")
    bare.unlink()
    with pytest.raises(ArtifactError, match=r"lora\.pt"):
        export_adapter(tmp_path / "loralib", out, format="peft")
    assert not out.exists()


def test_existing_folder_is_replaced_only_with_overwrite_and_never_the_source(
    make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    adapter, out = make_adapter(), tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="pass --overwrite"):
        export_adapter(adapter, out, format="loralib")
    with pytest.raises(ArtifactError, match=r"files that were not written here, and would be lost: mine\.txt"):
        export_adapter(adapter, out, format="loralib", overwrite=True)
    assert file_names(out) == {"mine.txt"}
    (out / "mine.txt").unlink()
    export_adapter(adapter, out, format="peft")
    export_adapter(adapter, out, format="loralib", overwrite=True)
    assert file_names(out) == {"lora.pt", "loralib.json", "manifest.json"}
    for source, alpha in ((adapter, None), (out / "lora.pt", 8)):
        before = file_names(source.parent)
        for target in (source.parent, *([source] if source.is_dir() else [])):
            with pytest.raises(ArtifactError, match="contains the adapter"):
                export_adapter(source, target, format="peft-bin", alpha=alpha, overwrite=True)
        assert file_names(source.parent) == before


def test_failed_write_leaves_nothing(
    make_adapter: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = make_adapter()

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lora_accel.export.export.write_json", fail)
    with pytest.raises(OSError, match="No space left"):
        export_adapter(adapter, tmp_path / "out", format="peft-bin")
    assert file_names(tmp_path) == {"adapter"}


# The command


def test_command_line(
    make_adapter: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    adapter = make_adapter()

    def run(*args: object) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["lora-accel", "export", *map(str, args)])
        with pytest.raises(SystemExit) as exited:
            main()
        return exited.value.code, *capsys.readouterr()

    code, stdout, _ = run(adapter, tmp_path / "loralib", "--format", "loralib", "--json")
    assert code in (0, None)
    assert json.loads(stdout)["files"] == ["lora.pt", "loralib.json", "manifest.json"]
    code, _, stderr = run(tmp_path / "loralib" / "lora.pt", tmp_path / "out", "--format", "peft", "--alpha", "10")
    assert code == 2
    assert "does not name its base model; pass --base" in stderr
    base = config_of(adapter)["base_model_name_or_path"]
    args = ("--format", "peft", "--alpha", "10", "--base", base)
    code, stdout, _ = run(tmp_path / "loralib" / "lora.pt", tmp_path / "out", *args)
    assert code in (0, None)
    assert stdout.split() == ["peft:", str(tmp_path / "out"), "(8", "tensors)"]


def test_help_imports_no_torch() -> None:
    result = run_code(
        "import sys; sys.argv = ['lora-accel', 'export', '--help']\n"
        "from lora_accel.cli import main\n"
        "try: main()\n"
        "except SystemExit: print('torch' in sys.modules)"
    )
    assert "microsoft/LoRA" in result.stdout
    assert result.stdout.split()[-1] == "False"
