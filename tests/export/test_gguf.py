"""GGUF files: transformers' reader gives the logits of the exported model; base + LoRA file is the merged model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from tokenizers import Regex, normalizers, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from lora_accel import merge_adapter, save_adapter
from lora_accel.cli import main
from lora_accel.errors import ArtifactError, ConfigError, UserError
from lora_accel.export import gguf_file
from lora_accel.export.export import export_adapter
from lora_accel.export.gguf_tokenizer import SPLITS, read_vocabulary
from lora_accel.saving.atomic import why_invalid
from tests.conftest import CHATML, SMOLLM
from tests.data.tokenizers import train_sentencepiece
from tests.families import model_of

IDS = torch.arange(5, 29).reshape(2, 12)
GEMMA = {"head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 6}
"""The values that transformers' reader assumes: a GGUF file does not store the second."""
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False, "attention_bias": True},
    "llama, tied": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": None},
    "qwen2": {"use_sliding_window": False},
    "qwen3": {},
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
}
TEXTS = ["hello world 12345", "the answer is three\n\n1 user's", "Grüße — 你好 ", " two  spaces", "x<|im_end|>y"]


def family_model(family: str, tokenizer: PreTrainedTokenizerFast, **options: Any) -> Any:
    """Return a tiny model with the tokenizer's vocabulary; no tensor is constant."""
    options = FAMILIES.get(family, {}) | {"vocab_size": len(tokenizer), "bos_token_id": 1, "eos_token_id": 4} | options
    model = model_of(family.partition(",")[0], **options)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.data += torch.linspace(-0.3, 0.4, len(parameter)) if "norm" in name else 0.1
    return model


@pytest.fixture
def make_model(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Callable[..., Path]:
    """Return a function that saves a tiny model of a family with its tokenizer."""

    def make(family: str = "llama", dtype: torch.dtype = torch.float32, name: str = "model", **options: Any) -> Path:
        folder = tmp_path / name
        family_model(family, tokenizer, **options).to(dtype).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits.float()


def read_tensors(file: Path) -> dict[str, np.ndarray]:
    """Return the tensors of a GGUF file in float32."""
    return {x.name: np.array(gguf.dequantize(x.data, x.tensor_type)) for x in gguf.GGUFReader(file).tensors}


def read_fields(file: Path) -> dict[str, Any]:
    return {key: field.contents() for key, field in gguf.GGUFReader(file).fields.items()}


def patched(tokenizer: PreTrainedTokenizerFast, change: Callable[[Any], None]) -> PreTrainedTokenizerFast:
    """Return a copy of a tokenizer whose backend was changed."""
    copy = PreTrainedTokenizerFast(
        tokenizer_object=type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str()),
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
    )
    change(copy.backend_tokenizer)
    return copy


# Models


@pytest.mark.sample(4)
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_reads_a_model_with_the_same_logits(
    make_model: Callable[..., Path], tmp_path: Path, family: str
) -> None:
    model = make_model(family)
    summary = export_adapter(model, tmp_path / "out", format="gguf")
    assert summary["outtype"] == "f32"
    assert summary["files"] == ["Modelfile", "manifest.json", "model-f32.gguf"]
    assert why_invalid(tmp_path / "out") is None
    options: dict[str, Any] = {"gguf_file": "model-f32.gguf", "dtype": torch.float32}
    if family == "llama":  # transformers' reader does not set attention_bias
        options["config"] = AutoConfig.from_pretrained(model)
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "out", **options)
    expected = logits(AutoModelForCausalLM.from_pretrained(model))
    assert torch.allclose(logits(read), expected, atol=2e-5), (logits(read) - expected).abs().max()


def test_gemma_1_is_stored_with_the_offset_of_its_norms(make_model: Callable[..., Path], tmp_path: Path) -> None:
    """transformers does not read Gemma 1 from GGUF."""
    model = AutoModelForCausalLM.from_pretrained(folder := make_model("gemma"))
    export_adapter(folder, tmp_path / "out", format="gguf")
    tensors = read_tensors(tmp_path / "out" / "model-f32.gguf")
    assert "output.weight" not in tensors
    assert np.array_equal(tensors["blk.1.attn_norm.weight"], model.model.layers[1].input_layernorm.weight.detach() + 1)
    assert np.array_equal(tensors["blk.1.attn_q.weight"], model.model.layers[1].self_attn.q_proj.weight.detach())


def test_a_model_in_bf16_is_stored_without_loss(make_model: Callable[..., Path], tmp_path: Path) -> None:
    model = make_model("qwen2", torch.bfloat16)
    assert export_adapter(model, tmp_path / "out", format="gguf")["outtype"] == "bf16"
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file="model-bf16.gguf", dtype=torch.bfloat16)
    for name, tensor in AutoModelForCausalLM.from_pretrained(model).state_dict().items():
        assert torch.equal(read.state_dict()[name], tensor), name


@pytest.mark.parametrize(("outtype", "tolerance"), [("f16", 2**-11), ("bf16", 2**-8), ("q8_0", 1 / 254)])
def test_other_types_round_each_weight(
    make_model: Callable[..., Path], tmp_path: Path, outtype: str, tolerance: float
) -> None:
    """q8_0 rounds to 1/127 of the largest value of a block of 32; rows of other lengths become f16."""
    folder = make_model("qwen2", intermediate_size=48)
    export_adapter(folder, tmp_path / "f32", format="gguf")
    export_adapter(folder, tmp_path / "out", format="gguf", outtype=outtype)
    exact, file = read_tensors(tmp_path / "f32" / "model-f32.gguf"), tmp_path / "out" / f"model-{outtype}.gguf"
    for name, tensor in read_tensors(file).items():
        assert np.abs(tensor - exact[name]).max() <= tolerance * np.abs(exact[name]).max() * 1.01, name
    types = {x.name: x.tensor_type.name.lower() for x in gguf.GGUFReader(file).tensors}
    assert types["token_embd.weight"] == outtype
    assert types["blk.0.ffn_down.weight"] == ("f16" if outtype == "q8_0" else outtype)
    assert types["output_norm.weight"] == types["blk.0.attn_q.bias"] == "f32"


def test_rope_scaling_of_llama_3_gives_the_frequencies_of_the_model(
    make_model: Callable[..., Path], tmp_path: Path
) -> None:
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"original_max_position_embeddings": 100, "rope_theta": 500.0}
    folder = make_model("llama", rope_parameters=scaling)
    export_adapter(folder, tmp_path / "out", format="gguf")
    factors = torch.from_numpy(read_tensors(tmp_path / "out" / "model-f32.gguf")["rope_freqs.weight"])
    plain = 500.0 ** (-torch.arange(0, 8, 2) / 8)  # as llama.cpp computes them
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.allclose(plain / factors, model.model.rotary_emb.inv_freq)
    assert factors.unique().numel() > 2


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"rope_type": "linear", "factor": 2.0}, {"type": "linear", "factor": 2.0}),
        (
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 16.0},
            {
                "type": "yarn",
                "factor": 4.0,
                "original_context_length": 16,
                "yarn_beta_fast": 16.0,
                "yarn_beta_slow": 1.0,
            },
        ),
    ],
)
def test_other_rope_scaling_is_metadata(
    make_model: Callable[..., Path], tmp_path: Path, rope: dict[str, Any], expected: dict[str, Any]
) -> None:
    export_adapter(make_model("qwen3", rope_parameters={"rope_theta": 500.0} | rope), tmp_path / "o", format="gguf")
    fields = read_fields(tmp_path / "o" / "model-f32.gguf")
    start = "qwen3.rope.scaling."
    assert {key.removeprefix(start): fields[key] for key in fields if key.startswith(start)} == expected
    assert fields["qwen3.rope.freq_base"] == 500.0


@pytest.mark.parametrize(
    ("family", "options", "problem"),
    [
        ("gpt2", {}, r"does not support model_type='gpt2', only llama, mistral, .* convert_hf_to_gguf.py of llama.cpp"),
        ("llama", {"hidden_act": "gelu"}, "the activation 'gelu' in this family"),
        ("gemma2", GEMMA | {"query_pre_attn_scalar": 8}, r"query_pre_attn_scalar=8 \(llama.cpp assumes 256\)"),
        ("gemma3_text", GEMMA | {"layer_types": ["full_attention"] * 2}, r"layer_types\[0\]='full_attention'"),
        ("qwen3", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "'dynamic'"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_an_error(
    make_model: Callable[..., Path], tmp_path: Path, family: str, options: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ArtifactError, match=problem):
        export_adapter(make_model(family, **options), tmp_path / "out", format="gguf")
    assert not (tmp_path / "out").exists()


def test_a_sliding_window_that_llama_cpp_ignores_is_noted(
    make_model: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export_adapter(make_model("mistral", sliding_window=6), tmp_path / "out", format="gguf")
    assert "llama.cpp ignores sliding_window=6" in capsys.readouterr().err


def test_the_file_names_license_and_base_and_no_path(make_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_model()
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    base = {"name_or_path": "owner/base", "revision": None, "sha256": {}}
    (folder / "provenance.json").write_text(json.dumps({"base": base, "merged": {}, "adapter": None}))
    export_adapter(folder, tmp_path / "out", format="gguf")
    fields = read_fields(tmp_path / "out" / "model-f32.gguf")
    general = {key.removeprefix("general."): fields[key] for key in fields if key.startswith("general.")}
    assert (general["name"], general["license"]) == ("model", "apache-2.0")
    assert general["base_model.0.repo_url"] == "https://huggingface.co/owner/base"
    base["name_or_path"] = str(tmp_path / "base")
    (folder / "provenance.json").write_text(json.dumps({"base": base, "merged": {}, "adapter": None}))
    export_adapter(folder, tmp_path / "out", format="gguf", overwrite=True)
    assert "general.base_model.count" not in read_fields(tmp_path / "out" / "model-f32.gguf")


def test_a_value_beyond_float16_is_an_error(make_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_model()
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = -70_000
    model.save_pretrained(folder)
    with pytest.raises(ArtifactError, match=r"blk.1.ffn_up.weight: has values up to 7e\+04, .* --outtype bf16"):
        export_adapter(folder, tmp_path / "out", format="gguf", outtype="f16")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("what", ["tensor", "metadata"])
def test_a_file_that_is_not_what_was_written_is_an_error(
    make_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    def damaged(writer: Any, data: np.ndarray, write: Any = gguf.GGUFWriter.write_tensor_data) -> None:
        data = data.copy()
        data.reshape(-1)[-1] += 1
        write(writer, data)

    def damaged_header(writer: Any, write: Any = gguf.GGUFWriter.write_kv_data_to_file) -> None:
        writer.add_key_value("llama.block_count", 3, gguf.GGUFValueType.UINT32)
        write(writer)

    name = "write_tensor_data" if what == "tensor" else "write_kv_data_to_file"
    monkeypatch.setattr(gguf.GGUFWriter, name, damaged if what == "tensor" else damaged_header)
    with pytest.raises(ArtifactError, match="does not match what was written"):
        export_adapter(make_model(), tmp_path / "out", format="gguf")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"outtype": "q4_0"}, "--outtype=q4_0: unknown; use auto, f32, f16, bf16, q8_0"),
        ({"alpha": 8.0}, "--alpha=8.0: only allowed for a bare loralib file"),
        ({"format": "peft", "outtype": "f16"}, "--outtype=f16: only allowed with --format gguf"),
        ({"format": "gguff"}, r"--format=gguff: unknown; use peft, .*, gguf \(did you mean gguf\?\)"),
    ],
)
def test_wrong_options_are_errors(
    make_model: Callable[..., Path], tmp_path: Path, options: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem):
        export_adapter(make_model(), tmp_path / "out", **{"format": "gguf"} | options)


def test_a_missing_package_is_named(
    make_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_file.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs the package gguf: pip install 'lora-accel\[gguf\]'"):
        export_adapter(make_model(), tmp_path / "out", format="gguf")


# Tokenizers


def test_a_byte_level_tokenizer_is_read_back(
    make_model: Callable[..., Path], tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    export_adapter(make_model(vocab_size=len(tokenizer) + 3), tmp_path / "out", format="gguf")
    file = tmp_path / "out" / "model-f32.gguf"
    read = AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file=file.name)
    for text in TEXTS:
        assert read(text)["input_ids"] == tokenizer(text)["input_ids"], text
    assert (read.eos_token, read.chat_template) == ("<|im_end|>", CHATML)
    fields = read_fields(file)
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    assert fields["tokenizer.ggml.token_type"][:5] == [3] * 5, "special tokens are control tokens"
    assert fields["tokenizer.ggml.token_type"][-4:] == [1, 5, 5, 5], "rows without a token are unused"
    assert not fields["tokenizer.ggml.add_bos_token"]
    assert fields["llama.vocab_size"] == len(fields["tokenizer.ggml.tokens"]) == len(tokenizer) + 3


def byte_level(*steps: Any) -> Callable[[Any], None]:
    def change(backend: Any) -> None:
        backend.pre_tokenizer = pre_tokenizers.Sequence(list(steps))

    return change


LLAMA_3, QWEN_2 = SPLITS
ISOLATED = [pre_tokenizers.Split(Regex(regex), "isolated") for regex in SPLITS]
NO_REGEX = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
WITH_REGEX = pre_tokenizers.ByteLevel(add_prefix_space=False)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (byte_level(pre_tokenizers.Digits(individual_digits=True), WITH_REGEX), "smollm"),
        (byte_level(ISOLATED[0], NO_REGEX), "smaug-bpe"),
        (byte_level(ISOLATED[1], NO_REGEX), "qwen2"),
        (byte_level(WITH_REGEX), "gpt-2"),
        (byte_level(ISOLATED[1], WITH_REGEX), None),
        (byte_level(pre_tokenizers.Digits(individual_digits=False), WITH_REGEX), None),
        (byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True)), None),
        (lambda backend: setattr(backend, "normalizer", normalizers.Lowercase()), None),
    ],
)
def test_how_text_is_split_has_llama_cpps_name(
    tokenizer: PreTrainedTokenizerFast, change: Callable[[Any], None], expected: str | None
) -> None:
    changed = patched(tokenizer, change)
    if expected is None:
        with pytest.raises(ArtifactError, match="splits text in a way that is not known here"):
            read_vocabulary("model", changed, len(changed))
    else:
        assert read_vocabulary("model", changed, len(changed)).split == expected


def test_llama_3_is_recognized_by_its_ignored_merges(tokenizer: PreTrainedTokenizerFast) -> None:
    changed = patched(tokenizer, byte_level(ISOLATED[0], NO_REGEX))
    changed.backend_tokenizer.model.ignore_merges = True
    assert read_vocabulary("model", changed, len(changed)).split == "llama-bpe"


def test_a_token_without_an_embedding_is_left_out(
    make_model: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_model()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)
    export_adapter(folder, tmp_path / "out", format="gguf")
    assert "left out [PAD]: tokens for which the model has no embeddings" in capsys.readouterr().err
    fields = read_fields(tmp_path / "out" / "model-f32.gguf")
    assert len(fields["tokenizer.ggml.tokens"]) == len(tokenizer) - 1
    assert "tokenizer.ggml.padding_token_id" not in fields


def test_sentencepiece_is_read_back(make_model: Callable[..., Path], tmp_path: Path) -> None:
    """Scores follow the order of merges; BOS, bytes and a token of two spaces have their types."""
    backend = train_sentencepiece(
        "llama-2",
        ["hello world the answer is three user"] * 9,
        ["<unk>", "<s>", "</s>"],
        vocab_size=330,
        limit_alphabet=40,
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.add_tokens(["▁▁"])
    folder = make_model("llama", vocab_size=len(fast))
    fast.save_pretrained(folder)
    export_adapter(folder, tmp_path / "out", format="gguf")
    read = AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file="model-f32.gguf", add_bos_token=False)
    for text in ["hello world", "the answers", "wor ldé 你"]:
        assert read(text)["input_ids"] == fast(text)["input_ids"], text
    fields, vocab = read_fields(tmp_path / "out" / "model-f32.gguf"), fast.get_vocab()
    types, scores = fields["tokenizer.ggml.token_type"], fields["tokenizer.ggml.scores"]
    assert fields["tokenizer.ggml.model"] == "llama"
    assert fields["tokenizer.ggml.add_space_prefix"]
    assert [types[vocab[x]] for x in ("<unk>", "<s>", "<0x41>", "▁hello", "▁▁")] == [2, 3, 6, 1, 4]
    assert fields["tokenizer.ggml.tokens"][vocab["▁▁"]] == "  "
    merges = ["".join(pair) for pair in json.loads(backend.to_str())["model"]["merges"]]
    assert [scores[vocab[text]] for text in merges] == sorted((-merges.index(x) for x in merges), reverse=True)


# Adapters


def make_adapter(model: Path, folder: Path, **options: Any) -> Path:
    """Save an adapter with random values on a saved model."""
    torch.manual_seed(0)
    options = {"target_modules": "all-linear", "r": 4, "lora_alpha": 10} | options
    config = LoraConfig(task_type="CAUSAL_LM", **{"init_lora_weights": False} | options)
    save_adapter(Accelerator(cpu=True), get_peft_model(AutoModelForCausalLM.from_pretrained(model), config), folder)
    return folder


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("qwen2", {"use_rslora": True}),
        ("gemma2", {}),
        ("llama", {"rank_pattern": {"k_proj": 2, "down_proj": 7}, "target_modules": ["k_proj", "down_proj", "v_proj"]}),
    ],
)
def test_base_and_lora_file_are_the_merged_model(
    make_model: Callable[..., Path], tmp_path: Path, family: str, options: dict[str, Any]
) -> None:
    """Added in llama.cpp's layout as llama.cpp adds it: W + alpha / r · B A, with the rank of each pair."""
    model = make_model(family)
    adapter = make_adapter(model, tmp_path / "adapter", **options)
    merge_adapter(adapter, tmp_path / "merged", verify=False)
    for name in ("model", "merged", "adapter"):
        export_adapter(tmp_path / name, tmp_path / "gguf" / name, format="gguf")
    base, merged = (read_tensors(tmp_path / "gguf" / name / "model-f32.gguf") for name in ("model", "merged"))
    lora, fields = (read(tmp_path / "gguf/adapter/adapter-f32.gguf") for read in (read_tensors, read_fields))
    assert (fields["general.type"], fields["adapter.type"]) == ("adapter", "lora")
    assert fields["general.architecture"] == family
    for name, a in lora.items():
        if name.endswith(".lora_a"):
            b = lora[name.removesuffix("a") + "b"]
            base[name.removesuffix(".lora_a")] += fields["adapter.lora.alpha"] / len(a) * (b @ a)
    assert len(lora) >= 12
    for name, tensor in merged.items():
        assert np.allclose(base[name], tensor, atol=1e-6), name


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"use_dora": True}, "cannot hold DoRA; merge the adapter, and export the merged folder"),
        ({"bias": "all"}, "cannot hold biases"),
        ({"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]}, "cannot hold modules_to_save"),
        ({"target_modules": ["embed_tokens"]}, "cannot hold LoRA on embeddings"),
        ({"target_modules": ["q_proj", "v_proj"], "alpha_pattern": {"q_proj": 3}}, "and alpha_pattern give several"),
        (
            {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 3}, "use_rslora": True},
            "and use_rslora, rank_pattern give several",
        ),
    ],
)
def test_what_a_lora_file_cannot_hold_is_named(
    make_model: Callable[..., Path], tmp_path: Path, options: dict[str, Any], problem: str
) -> None:
    adapter = make_adapter(make_model("llama"), tmp_path / "adapter", **options)
    with pytest.raises(ArtifactError, match=problem):
        export_adapter(adapter, tmp_path / "out", format="gguf")
    assert not (tmp_path / "out").exists()


def test_lora_on_a_tied_head_and_added_tokens_are_named(make_model: Callable[..., Path], tmp_path: Path) -> None:
    adapter = make_adapter(make_model("llama, tied"), tmp_path / "adapter", target_modules=["q_proj", "v_proj"])
    model_section = {"add_tokens": {"tokens": ["<a>"]}, "rope_scaling": {"rope_type": "linear", "factor": 2}}
    provenance = {"base": {"name_or_path": str(tmp_path / "model"), "revision": None, "sha256": {}}}
    (adapter / "provenance.json").write_text(json.dumps(provenance | {"config": {"model": model_section}}))
    with pytest.raises(ArtifactError, match=r"cannot hold model.rope_scaling, .*, model.add_tokens;"):
        export_adapter(adapter, tmp_path / "out", format="gguf", force=True)


def test_the_command_writes_a_folder_and_keeps_an_existing_one(
    make_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["lora-accel", "export", str(make_model("qwen2")), str(tmp_path / "out"), "--format", "gguf"]
    monkeypatch.setattr("sys.argv", [*arguments, "--outtype", "f16", "--json"])
    with pytest.raises(SystemExit, match="0"):
        main()
    assert json.loads(capsys.readouterr().out)["files"] == ["Modelfile", "manifest.json", "model-f16.gguf"]
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "already exists" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"is neither an adapter .* nor a model folder"):
        export_adapter(tmp_path, tmp_path / "other", format="gguf")


@pytest.mark.slow
@pytest.mark.smollm
def test_the_real_model_has_the_same_logits(tmp_path: Path) -> None:
    export_adapter(SMOLLM, tmp_path / "out", format="gguf")
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file="model-bf16.gguf", dtype=torch.float32)
    expected = logits(AutoModelForCausalLM.from_pretrained(SMOLLM, dtype=torch.float32))
    assert torch.equal(logits(read), expected)
    assert read_fields(tmp_path / "out" / "model-bf16.gguf")["tokenizer.ggml.pre"] == "smollm"
