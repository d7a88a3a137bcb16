"""Examples and prompts are compared with the sizes of the model before its weights are loaded; RoPE scaling."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from lora_accel import RunConfig, merge_adapter, run_training
from lora_accel.config.schema import ModelSection
from lora_accel.errors import ArtifactError, ConfigError, DataError, UserError
from lora_accel.inference import generation
from lora_accel.inference.evaluation import evaluate
from lora_accel.inference.generation import generate
from lora_accel.model import sizes as sizes_module
from lora_accel.model.base import load_base_model
from lora_accel.model.generation import generate_replies
from lora_accel.model.sizes import (
    ROPE_MODELS,
    load_config,
    model_sizes,
    num_table_positions,
    resolve_factor,
    scale_rope,
    sizes_of,
)
from lora_accel.model.tokenizer import padding_id
from lora_accel.saving.atomic import read_json
from lora_accel.setup import model as setup_model
from lora_accel.setup.data import prepare_data
from tests.conftest import CommandResult, chat_rows, fill_by_formula, write_jsonl

Tokenizers = Callable[..., PreTrainedTokenizerFast]

SHAPE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "n_positions": 64,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "ffn_dim": 48,
    "word_embed_proj_dim": 32,
    "d_model": 32,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 48,
    "encoder_layers": 1,
    "rotary_dim": 4,
    "max_seq_len": 64,
    "n_heads": 4,
    "n_layers": 2,
    "attention_types": [[["global"], 2]],
    "is_decoder": True,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TABLES = {
    **dict.fromkeys(("gpt2", "opt", "gpt_neo", "gpt_bigcode", "openai-gpt", "biogpt", "bart", "bert"), 64),
    **dict.fromkeys(("gptj", "codegen", "mpt", "ctrl"), 64),
    "roberta": 63,
}
"""Model types with a table of positions -> its usable rows."""
WITHOUT_TABLE = ("llama", "gpt_neox", "gemma3_text", "bloom", "mamba", "phi", "xglm")


def config_of(model_type: str) -> Any:
    """Return a tiny config. Families read their own names of the sizes."""
    return AutoConfig.for_model(model_type, **SHAPE)


@pytest.mark.parametrize("model_type", TABLES)
def test_the_table_of_positions_ends_where_the_model_raises(model_type: str) -> None:
    positions = sizes_of(config_of(model_type)).num_positions
    assert positions == TABLES[model_type]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(model_type)).eval()
    assert num_table_positions(model) == positions
    with torch.no_grad():
        model(input_ids=torch.full((1, positions), 5))
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, positions + 1), 5))


@pytest.mark.parametrize("model_type", ROPE_MODELS)
def test_the_sizes_of_common_models_are_read_without_transformers(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(model_type)
    config.save_pretrained(tmp_path)
    section = ModelSection(name_or_path=str(tmp_path))
    assert sizes_of(config).num_positions is None
    monkeypatch.setattr(sizes_module, "load_config", lambda _: pytest.fail("transformers reads the config"))
    assert model_sizes(section) == sizes_of(config)


@pytest.mark.parametrize("key", ["vocab_size", "max_position_embeddings", "rope_type", "rope_scaling", "pad_token_id"])
def test_other_sizes_of_common_models_are_read_by_transformers(key: str, tmp_path: Path) -> None:
    """Defaults of the config class, positions that are scaled, and a padding token that is beyond the vocabulary."""
    config_of("llama").save_pretrained(tmp_path)
    values = read_json(tmp_path / "config.json")
    if key == "rope_type":
        values["rope_parameters"] = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    elif key == "rope_scaling":
        values["rope_scaling"] = {"rope_type": "linear", "factor": 4.0}
    elif key == "pad_token_id":
        values[key] = values["vocab_size"]
    else:
        del values[key]
    (tmp_path / "config.json").write_text(json.dumps(values))
    section = ModelSection(name_or_path=str(tmp_path))
    if key == "pad_token_id":
        with pytest.raises(ArtifactError, match="pad_token_id"):
            model_sizes(section)
    else:
        assert model_sizes(section) == sizes_of(AutoConfig.from_pretrained(tmp_path))
        assert model_sizes(section) != sizes_of(config_of("llama"))


@pytest.mark.parametrize("model_type", WITHOUT_TABLE)
def test_other_models_have_no_table_of_positions(model_type: str) -> None:
    config = config_of(model_type)
    assert sizes_of(config).num_positions is None
    with torch.no_grad():
        AutoModelForCausalLM.from_config(config).eval()(input_ids=torch.full((1, 80), 5))


def save_model(
    folder: Path, tokenizer: Any, model_type: str = "llama", rows: int | None = None, **options: Any
) -> Path:
    """Save a tiny model whose embeddings have the tokenizer's size, or `rows`."""
    heads = {} if model_type == "gpt2" else {"num_attention_heads": 4}
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "intermediate_size": 48,
        "word_embed_proj_dim": 32,
        "ffn_dim": 48,
    }
    sizes |= {"n_embd": 32, "n_layer": 2, "n_head": 4} if model_type == "gpt2" else {}
    sizes |= {"num_key_value_heads": 2, "head_dim": 8} if model_type in ("llama", "gemma3_text") else {}
    sizes |= {"max_position_embeddings": 256, "vocab_size": rows or len(tokenizer)}
    ids = {"bos_token_id": 1, "eos_token_id": 4, "pad_token_id": 4}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **(sizes | heads | ids | options)))
    fill_by_formula(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def word_beyond(tmp_path: Path, tokenizer_factory: Tokenizers) -> Path:
    """A model whose tokenizer has one token more, `<obs>`."""
    tokenizer = tokenizer_factory()
    rows = len(tokenizer)
    tokenizer.add_tokens(["<obs>"])
    return save_model(tmp_path / "word_beyond", tokenizer, rows=rows)


@pytest.fixture
def pad_beyond(tmp_path: Path, tokenizer_factory: Tokenizers) -> Path:
    """A model whose tokenizer has one token more, its pad token."""
    tokenizer = tokenizer_factory()
    rows = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    return save_model(tmp_path / "pad_beyond", tokenizer, rows=rows)


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if weights are loaded."""

    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("weights are loaded")

    monkeypatch.setattr(setup_model, "load_base_model", load)


def obs_rows(path: Path) -> Path:
    rows = chat_rows(3)
    for row in rows[1:]:
        row["messages"][0]["content"] += " <obs>"
    return write_jsonl(path, rows)


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("where", ["train", "eval"])
def test_a_token_beyond_the_embeddings_is_named_with_its_row(
    where: str, word_beyond: Path, make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    path = obs_rows(tmp_path / "obs.jsonl")
    config = make_config(model={"name_or_path": str(word_beyond)}, data={where: [{"path": str(path)}]})
    with pytest.raises(DataError) as caught:
        run_training(config)
    rows = model_sizes(config.model).vocab_size
    for part in (f"{path}, row 2", "and 1 more row", "'<obs>'", f"id {rows}", f"{rows + 1:,} tokens", f"{rows:,}"):
        assert part in str(caught.value)
    assert not Path(config.output_dir).exists()


def test_a_token_beyond_the_embeddings_that_no_row_holds_is_no_error(
    word_beyond: Path, make_config: Callable[..., RunConfig]
) -> None:
    prepare_data(make_config(model={"name_or_path": str(word_beyond)}))


def test_a_held_out_row_is_checked_and_an_unused_one_is_not(
    word_beyond: Path, make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    path, model = obs_rows(tmp_path / "obs.jsonl"), {"name_or_path": str(word_beyond)}
    with pytest.raises(DataError, match="row 2"):
        prepare_data(make_config(model=model, data={"train": [{"path": str(path)}], "eval_fraction": 0.34}))
    prepare_data(make_config(model=model, data={"train": [{"path": str(path), "limit": 1}]}))


def test_token_ids_in_rows_are_checked(
    word_beyond: Path, tmp_path: Path, make_config: Callable[..., RunConfig]
) -> None:
    size = model_sizes(ModelSection(name_or_path=str(word_beyond))).vocab_size
    rows = write_jsonl(tmp_path / "ids.jsonl", [{"input_ids": x, "labels": x} for x in ([5, 6, 7], [5, size, 7])])
    with pytest.raises(DataError, match=rf"row 2: the model has no embedding for the token '<obs>', id {size}"):
        prepare_data(make_config(model={"name_or_path": str(word_beyond)}, data={"train": [{"path": str(rows)}]}))


def test_evaluation_prompts_are_checked(word_beyond: Path, make_config: Callable[..., RunConfig]) -> None:
    with pytest.raises(DataError, match=r"evaluation.prompts\[1\]: the model has no embedding for the token '<obs>'"):
        prepare_data(
            make_config(
                model={"name_or_path": str(word_beyond)}, evaluation={"prompts": ["repeat one", "repeat <obs>"]}
            )
        )


def test_plan_checks_sizes(
    word_beyond: Path,
    make_config: Callable[..., RunConfig],
    config_file: Callable[[RunConfig], Path],
    command: Callable[..., CommandResult],
    tmp_path: Path,
) -> None:
    path = obs_rows(tmp_path / "obs.jsonl")
    config = make_config(model={"name_or_path": str(word_beyond)}, data={"train": [{"path": str(path)}]})
    result = command("plan", "--config", config_file(config))
    assert result.returncode == 2
    assert "'<obs>'" in result.stderr


def test_padding_is_any_token_that_the_model_has(pad_beyond: Path, make_config: Callable[..., RunConfig]) -> None:
    config = make_config(
        model={"name_or_path": str(pad_beyond)},
        data={"packing": False},
        training={"max_steps": 1},
        evaluation={"prompts": ["repeat one", "repeat one two three"], "max_new_tokens": 2},
    )
    assert prepare_data(config).pad_id == 4
    adapter = run_training(config)
    prompts = ["repeat alpha", "repeat alpha bravo charlie", "x"]
    assert len(generate(prompts, adapters=[adapter], max_new_tokens=2, compare=True)) == 3


def test_padding_does_not_change_the_loss(
    pad_beyond: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, make_config: Callable[..., RunConfig]
) -> None:
    from tests.conftest import read_metrics

    plain = save_model(tmp_path / "plain", tokenizer)
    losses = []
    for folder in (plain, pad_beyond):
        config = make_config(
            model={"name_or_path": str(folder)},
            data={"packing": False},
            output_dir=str(tmp_path / f"run-{folder.name}"),
        )
        run_training(config)
        losses.append([line["loss"] for line in read_metrics(Path(config.output_dir))])
    assert losses[0] == losses[1]


@pytest.mark.distributed
def test_two_ranks_with_one_row_pad_with_a_token_of_the_model(
    forks: Any,
    pad_beyond: Path,
    word_beyond: Path,
    make_config: Callable[..., RunConfig],
    config_file: Callable[[RunConfig], Path],
    tmp_path: Path,
) -> None:
    one_row = write_jsonl(tmp_path / "one.jsonl", chat_rows(1))
    config = make_config(
        model={"name_or_path": str(pad_beyond)}, data={"train": [{"path": str(one_row)}]}, training={"max_steps": 1}
    )
    done = forks.launch("-m", "lora_accel.train", "--config", config_file(config))
    assert done.returncode == 0, done.stderr
    path = obs_rows(tmp_path / "obs.jsonl")
    config = make_config(
        model={"name_or_path": str(word_beyond)}, data={"train": [{"path": str(path)}]}, output_dir=str(tmp_path / "b")
    )
    done = forks.launch("-m", "lora_accel.train", "--config", config_file(config))
    assert done.returncode != 0
    messages = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(messages) == 1, "one message, not one per rank"
    assert "'<obs>'" in done.stderr
    assert "IndexError" not in done.stderr


def test_padding_id(tokenizer_factory: Tokenizers) -> None:
    tokenizer = tokenizer_factory()
    assert padding_id(tokenizer, len(tokenizer)) == tokenizer.pad_token_id
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert padding_id(tokenizer, len(tokenizer)) == len(tokenizer) - 1
    assert padding_id(tokenizer, len(tokenizer) - 1) == tokenizer.eos_token_id
    assert padding_id(tokenizer, 2) == 0


def test_a_pad_token_without_embedding_is_a_note_of_the_merge_and_pads_nothing(
    tiny_model: Callable[..., Path],
    tokenizer_factory: Tokenizers,
    tmp_path: Path,
    command: Callable[..., CommandResult],
) -> None:
    adapter = tmp_path / "adapter"
    base = AutoModelForCausalLM.from_pretrained(tiny_model())
    get_peft_model(base, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")).save_pretrained(adapter)
    tokenizer = tokenizer_factory()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})  # as Alpaca-LoRA and the first Vicuna did
    tokenizer.save_pretrained(adapter)
    merged = command("merge", adapter, tmp_path / "out")
    assert merged.returncode == 0
    assert "note: the model has no embedding for 1 token(s) of its tokenizer ('[PAD]')" in merged.stdout
    arguments = ("hello", "hello world the answer", "--adapter", adapter, "--merged", tmp_path / "out")
    assert command("generate", *arguments, "--max-new-tokens", "2").returncode == 0


def test_a_pad_token_in_config_json_beyond_the_vocabulary_is_named(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, make_config: Callable[..., RunConfig]
) -> None:
    folder = save_model(tmp_path / "model", tokenizer)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"pad_token_id": len(tokenizer)}))
    with pytest.raises(ArtifactError, match=f"pad_token_id is {len(tokenizer)}.*set pad_token_id to null"):
        prepare_data(make_config(model={"name_or_path": str(folder)}))


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("model_type", ["gpt2", "opt"])
def test_rows_beyond_the_table_of_positions_are_named(
    model_type: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, make_config: Callable[..., RunConfig]
) -> None:
    folder = save_model(tmp_path / "model", tokenizer, model_type, max_position_embeddings=64)
    config = make_config(model={"name_or_path": str(folder)}, evaluation={"prompts": []})
    with pytest.raises(ConfigError) as caught:
        run_training(config)
    assert "data.max_length=200: " in str(caught.value)
    assert "has only 64 positions; set data.max_length=64" in str(caught.value)
    assert "rows.jsonl, row " in str(caught.value)


@pytest.mark.parametrize("model_type", ["gpt2", "opt"])
@pytest.mark.parametrize("packing", [True, False])
def test_max_length_of_the_table_of_positions_trains(
    model_type: str,
    packing: bool,
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    make_config: Callable[..., RunConfig],
) -> None:
    folder = save_model(tmp_path / "model", tokenizer, model_type, max_position_embeddings=64)
    config = make_config(
        model={"name_or_path": str(folder)},
        data={"max_length": 64, "packing": packing},
        training={"max_steps": 2},
        evaluation={"prompts": ["repeat one"], "max_new_tokens": 500},
    )
    adapter = run_training(config)
    # A prompt with fewer tokens than positions is replied to up to the last position.
    replies = generate(["repeat one", "repeat " + "x" * 30], adapters=[adapter], max_new_tokens=500)
    assert all(replies)
    with pytest.raises(DataError, match=r"prompt 2: has .* tokens, but .* has 64 positions"):
        generate(["repeat one", "x" * 100], adapters=[adapter])


def test_a_reply_ends_at_the_last_position() -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of("gpt2")).eval()
    model.generation_config.eos_token_id = None

    class Ids:
        pad_token_id, eos_token_id = 0, None

        def decode(self, ids: list[int], **_: Any) -> str:
            return " ".join(map(str, ids))

    [reply] = generate_replies(model, Ids(), [[5] * 60], max_new_tokens=50, suppress_tokens=[0])
    assert len(reply.split()) == 4


def test_inference_names_tokens_that_the_model_lacks(
    word_beyond: Path, make_config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(model={"name_or_path": str(word_beyond)}, training={"max_steps": 1})
    adapter = run_training(config)

    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("a model is loaded")

    with monkeypatch.context() as patched:
        patched.setattr(generation, "load_candidates", load)
        with pytest.raises(DataError, match="prompt 2: the model has no embedding for the token '<obs>'"):
            generate(["one", "<obs>"], adapters=[adapter])
        with pytest.raises(DataError, match="prompt 1: the model has no embedding for the token '<obs>'"):
            generation.stream(["<obs>"], adapter=adapter)
    path = obs_rows(tmp_path / "obs.jsonl")
    with pytest.raises(DataError, match=r"obs\.jsonl, row 2"):
        evaluate(make_config(model={"name_or_path": str(word_beyond)}, data={"eval": [{"path": str(path)}]}))


@pytest.mark.launch
def test_chat_names_a_token_that_the_model_lacks(
    word_beyond: Path, make_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from lora_accel.inference.chat import chat

    adapter = run_training(make_config(model={"name_or_path": str(word_beyond)}, training={"max_steps": 1}))
    lines = iter(["repeat <obs>", "repeat one", "/quit"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    chat(adapter=adapter, max_new_tokens=2)
    assert "error: the model has no embedding for the token '<obs>'" in capsys.readouterr().err


# RoPE scaling.


def test_rope_positions() -> None:
    config = config_of("llama")
    assert sizes_of(config).rope_positions == 64
    scale_rope(config, {"rope_type": "linear", "factor": 2.0})
    assert sizes_of(config).rope_positions == 128
    config = config_of("llama")
    scale_rope(config, {"rope_type": "yarn", "factor": 4.0})
    assert sizes_of(config).rope_positions == 256
    assert config.rope_parameters["rope_theta"] == 10000.0
    assert config_of("gpt_neox").rope_parameters["partial_rotary_factor"] == 0.25


def test_a_note_when_rope_extrapolates(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    make_config: Callable[..., RunConfig],
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = save_model(tmp_path / "model", tokenizer, max_position_embeddings=32)
    with caplog.at_level("INFO", logger="lora_accel"):
        data = prepare_data(make_config(model={"name_or_path": str(folder)}))
    longest = max(len(example.input_ids) for example in data.dataset.examples)
    assert f"note: the longest example has {longest} tokens" in caplog.text
    assert "up to 32 (max_position_embeddings)" in caplog.text
    caplog.clear()
    scaling = {"rope_type": "linear", "factor": float(math.ceil(longest / 32))}
    with caplog.at_level("INFO", logger="lora_accel"):
        prepare_data(make_config(model={"name_or_path": str(folder), "rope_scaling": scaling}))
    assert "note: the longest example" not in caplog.text


@pytest.mark.parametrize(
    ("model_type", "scaling", "message"),
    [
        ("gpt2", {"rope_type": "linear", "factor": 2.0}, "gpt2 has no rotary embeddings"),
        ("bloom", {"rope_type": "linear", "factor": 2.0}, "bloom has no rotary embeddings"),
        ("gemma3_text", {"rope_type": "linear", "factor": 2.0}, "for each type of layer"),
        ("llama", {"rope_type": "liner", "factor": 2.0}, "did you mean linear"),
        ("llama", {"rope_type": "dynamic", "factor": 2.0}, "a row's loss would depend on the other rows"),
        ("llama", {"rope_type": "longrope", "factor": 2.0}, "a row's loss would depend on the other rows"),
        ("llama", {"rope_type": "linear", "factr": 2.0}, "did you mean factor"),
        ("llama", {"rope_type": "linear", "factor": 2.0, "beta_fast": 3}, "Unrecognized keys"),
        ("llama", {"rope_type": "yarn"}, "Missing required keys.*factor"),
        ("llama", {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 0}, "transformers rejects"),
        ("llama", {"rope_type": "llama3", "factor": 2.0}, "Missing required keys"),
    ],
)
def test_rope_scaling_that_cannot_be_used_is_named(model_type: str, scaling: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        scale_rope(config_of(model_type), scaling)
    assert str(caught.value).startswith("model.rope_scaling: ")


@pytest.mark.parametrize(
    "scaling",
    [
        {"factor": 2.0},
        {"rope_type": "linear", "factor": 0.5},
        {"rope_type": "linear", "factor": "2"},
        {"rope_type": "linear", "type": "yarn", "factor": 2.0},
    ],
)
def test_rope_scaling_in_the_config_is_validated(
    scaling: dict[str, Any], make_config: Callable[..., RunConfig]
) -> None:
    with pytest.raises(ValueError, match="rope_scaling"):
        make_config(model={"rope_scaling": scaling})


def test_linear_factor_is_derived_as_in_fastchat(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    folder = save_model(tmp_path / "model", tokenizer, max_position_embeddings=64)
    section = ModelSection(name_or_path=str(folder), rope_scaling={"type": "linear"})  # FastChat's name of the type
    assert resolve_factor(section, 200).rope_scaling == {"rope_type": "linear", "factor": 4.0}
    assert resolve_factor(section, 64).rope_scaling is None
    explicit = section.model_copy(update={"rope_scaling": {"rope_type": "linear", "factor": 3.0}})
    assert resolve_factor(explicit, 200) == explicit


@pytest.mark.parametrize("scaling", [{"rope_type": "linear", "factor": 4.0}, {"rope_type": "yarn", "factor": 4.0}])
def test_the_scaled_model_is_that_of_transformers(
    scaling: dict[str, Any], tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    folder = save_model(tmp_path / "model", tokenizer, max_position_embeddings=64)
    section = ModelSection(name_or_path=str(folder), rope_scaling=scaling)
    ids = torch.arange(5, 125).view(1, -1)
    with torch.no_grad():
        model = load_base_model(section, RunConfig.model_fields["quantization"].default).eval()
        config = AutoConfig.from_pretrained(folder, rope_parameters=scaling | {"rope_theta": 10000.0})
        expected = AutoModelForCausalLM.from_pretrained(folder, config=config).eval()
        plain = AutoModelForCausalLM.from_pretrained(folder).eval()
        torch.testing.assert_close(model(input_ids=ids).logits, expected(input_ids=ids).logits)
        assert not torch.allclose(model(input_ids=ids).logits, plain(input_ids=ids).logits)
    assert load_config(section).rope_parameters["factor"] == 4.0


def test_rope_scaling_is_remembered(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    make_config: Callable[..., RunConfig],
    rows_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = save_model(tmp_path / "model", tokenizer, max_position_embeddings=64)
    config = make_config(
        model={"name_or_path": str(folder), "rope_scaling": {"rope_type": "linear"}},
        data={"eval": [{"path": str(rows_file)}]},
        training={"max_steps": 2},
    )
    adapter = run_training(config)
    expected = {"rope_type": "linear", "factor": 4.0}
    assert read_json(adapter / "provenance.json")["config"]["model"]["rope_scaling"] == expected
    assert "RoPE scaling" in (adapter / "README.md").read_text()
    assert run_training(config) == adapter  # finished: nothing is trained again

    merge_adapter(adapter, tmp_path / "merged")
    merged = AutoConfig.from_pretrained(tmp_path / "merged")
    assert {key: merged.rope_parameters[key] for key in expected} == expected
    assert "rope_parameters" in json.loads((tmp_path / "merged" / "config.json").read_text())
    assert AutoConfig.from_pretrained(folder).rope_parameters["rope_type"] == "default"

    prompts = ["repeat one", "repeat " + "two " * 25]
    seen = []
    load = load_base_model

    def record(section: ModelSection, *args: Any, **options: Any) -> Any:
        seen.append((Path(section.name_or_path).name, section.rope_scaling))
        return load(section, *args, **options)

    monkeypatch.setattr("lora_accel.model.base.load_base_model", record)
    for checkpoint in (adapter, tmp_path / "run" / "checkpoints" / "step-00000002"):
        replies = generate(prompts, adapters=[checkpoint], merged=tmp_path / "merged", max_new_tokens=8)
        assert all(reply["base + adapter"] == reply["merged"] for reply in replies)
    assert seen == [("model", expected), ("merged", None)] * 2

    trained, merged_score = evaluate(config, adapters=[adapter], merged=tmp_path / "merged")[1:]
    assert trained.eval_loss == pytest.approx(merged_score.eval_loss, rel=1e-5)
    with pytest.raises(
        ConfigError, match=r"was trained with model.rope_scaling=.*\"factor\": 4.0.*set model.rope_scal"
    ):
        evaluate(
            make_config(model={"name_or_path": str(folder)}, data={"eval": [{"path": str(rows_file)}]}),
            adapters=[adapter],
        )


def test_rope_scaling_may_not_change_on_resume(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, make_config: Callable[..., RunConfig]
) -> None:
    model = {"name_or_path": str(save_model(tmp_path / "model", tokenizer))}
    run_training(make_config(model=model, training={"max_steps": 2}))
    with pytest.raises(UserError, match="rope_scaling"):
        run_training(
            make_config(
                model=model | {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, training={"max_steps": 4}
            )
        )


def test_an_invalid_recorded_rope_scaling_is_named(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, make_config: Callable[..., RunConfig]
) -> None:
    model = {"name_or_path": str(save_model(tmp_path / "model", tokenizer))}
    adapter = run_training(make_config(model=model, training={"max_steps": 1}))
    values = read_json(adapter / "provenance.json")
    values["config"]["model"]["rope_scaling"] = "linear"
    (adapter / "provenance.json").write_text(json.dumps(values))
    with pytest.raises(ArtifactError, match=r"invalid model\.rope_scaling"):
        generate(["one"], adapters=[adapter])
    with pytest.raises(ArtifactError, match=r"invalid model\.rope_scaling"):
        merge_adapter(adapter, tmp_path / "out")
