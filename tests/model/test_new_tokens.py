"""Added tokens: their first embeddings, training, saving, loading with this package and with PEFT, and merging."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from lora_accel import RunConfig, load_adapter, merge_adapter, run_training
from lora_accel.config.schema import AddedTokens, ModelSection
from lora_accel.errors import ArtifactError, ConfigError, DataError, UserError
from lora_accel.inference.evaluation import evaluate
from lora_accel.inference.generation import generate
from lora_accel.merging.streaming import MergedTensors
from lora_accel.model.new_tokens import extend_vocabulary, token_ids
from lora_accel.model.tokenizer import load_tokenizer
from lora_accel.saving.atomic import read_json
from lora_accel.saving.tensor_files import read_adapter
from lora_accel.setup.data import prepare_data
from tests.conftest import read_metrics, run_module, write_jsonl
from tests.model.test_sizes import Tokenizers, save_model

FAMILIES = {
    "llama": {},
    "llama-tied": {"tie_word_embeddings": True},
    "gpt2": {},
    "opt": {},
    "gpt_neox": {},
    "gemma3_text": {"sliding_window": 6, "query_pre_attn_scalar": 8},
}
"""llama and gpt_neox have a head of their own; the others are tied."""
TOOL = "<tool>"


@pytest.fixture
def tool_rows(tmp_path: Path) -> Path:
    rows = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": f"{TOOL} {q}"}]}
        for q in ("one", "two", "three", "hello world", "the answer")
    ]
    return write_jsonl(tmp_path / "tools.jsonl", rows)


@pytest.fixture
def tool_config(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, make_config: Callable[..., RunConfig], tool_rows: Path
) -> Callable[..., RunConfig]:
    """Return a function that makes a run config with an added token."""

    def make(family: str = "llama", added: Any = None, base: Path | None = None, **changes: Any) -> RunConfig:
        folder = base or tmp_path / family
        if not folder.exists():
            save_model(folder, tokenizer, family.removesuffix("-tied"), **FAMILIES[family])
        model = {"name_or_path": str(folder), "add_tokens": added or [TOOL]}
        model |= {"attention": "eager"} if family == "gemma3_text" else {}
        changes["data"] = {"train": [{"path": str(tool_rows)}], "eval": [{"path": str(tool_rows)}]} | changes.get(
            "data", {}
        )
        defaults = {"max_steps": 6, "batch_size": 5, "learning_rate": 1e-2, "warmup_steps": 0}
        changes["training"] = defaults | changes.get("training", {})
        changes["adapter"] = {"dropout": 0.0} | changes.get("adapter", {})
        return make_config(model=model, **changes)

    return make


def rows_of(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return model.get_input_embeddings().weight.detach(), model.get_output_embeddings().weight.detach()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_new_row_begins_as_the_mean_of_its_pieces(
    family: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    folder = save_model(tmp_path / "model", tokenizer, family.removesuffix("-tied"), **FAMILIES[family])
    added = AddedTokens(tokens=[TOOL, "<obs>"], like={"<obs>": "hello world"})
    section = ModelSection(name_or_path=str(folder), add_tokens=added)
    model, old = (AutoModelForCausalLM.from_pretrained(folder) for _ in range(2))
    extend_vocabulary(model, section)
    size = len(tokenizer)
    assert token_ids(added, load_tokenizer(section)) == [size, size + 1]
    assert model.config.vocab_size == size + 2
    for new, before in zip(rows_of(model), rows_of(old), strict=True):
        assert torch.equal(new[:size], before)
        for token, text in ((size, TOOL), (size + 1, "hello world")):
            torch.testing.assert_close(new[token], before[tokenizer(text).input_ids].mean(0))


def test_a_token_that_the_model_has_keeps_its_row(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save_model(tmp_path / "model", tokenizer)
    section = ModelSection(name_or_path=str(folder), add_tokens=AddedTokens(tokens=["user"]))
    model, old = (AutoModelForCausalLM.from_pretrained(folder) for _ in range(2))
    with caplog.at_level("INFO", logger="lora_accel"):
        extend_vocabulary(model, section)
    assert "the model already has 'user'" in caplog.text
    assert all(torch.equal(a, b) for a, b in zip(rows_of(model), rows_of(old), strict=True))
    assert len(load_tokenizer(section)) == len(tokenizer)


def test_unused_rows_of_the_model_are_used_first(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    folder = save_model(tmp_path / "model", tokenizer, rows=len(tokenizer) + 8)
    section = ModelSection(name_or_path=str(folder), add_tokens=AddedTokens(tokens=[TOOL]))
    model, old = (AutoModelForCausalLM.from_pretrained(folder) for _ in range(2))
    extend_vocabulary(model, section)
    assert model.config.vocab_size == len(tokenizer) + 8
    pieces = tokenizer(TOOL).input_ids
    torch.testing.assert_close(rows_of(model)[0][len(tokenizer)], rows_of(old)[0][pieces].mean(0))


def test_a_token_that_only_the_tokenizer_has_is_divided(tmp_path: Path, tokenizer_factory: Tokenizers) -> None:
    tokenizer, plain = tokenizer_factory(), tokenizer_factory()
    tokenizer.add_tokens(["<obs>"])
    folder = save_model(tmp_path / "model", tokenizer, rows=len(plain))
    model, old = (AutoModelForCausalLM.from_pretrained(folder) for _ in range(2))
    extend_vocabulary(model, ModelSection(name_or_path=str(folder), add_tokens=AddedTokens(tokens=["<obs>"])))
    torch.testing.assert_close(rows_of(model)[0][len(plain)], rows_of(old)[0][plain("<obs>").input_ids].mean(0))
    with pytest.raises(ConfigError, match=r"already has '<obs>', which the model lacks.*add it to model\.add_tokens"):
        extend_vocabulary(
            AutoModelForCausalLM.from_pretrained(folder),
            ModelSection(name_or_path=str(folder), add_tokens=AddedTokens(tokens=[TOOL])),
        )


@pytest.mark.parametrize(
    ("family", "train"),
    [
        pytest.param(family, train, marks=pytest.mark.slow if (number + trains_all) % 2 else ())
        for number, family in enumerate(FAMILIES)
        for trains_all, train in enumerate(("rows", "embeddings"))
        if (family, train) != ("gpt2", "embeddings")
    ],
)
def test_added_tokens_are_trained_saved_loaded_and_merged(
    family: str, train: str, tool_config: Callable[..., RunConfig], tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    config = tool_config(family, {"tokens": [TOOL], "train": train})
    base_folder, size = Path(config.model.name_or_path), len(tokenizer)
    adapter = run_training(config)
    losses = [line["loss"] for line in read_metrics(tmp_path / "run")]
    assert losses[-1] < losses[0]
    saved_tokenizer = AutoTokenizer.from_pretrained(adapter)
    assert saved_tokenizer(TOOL, add_special_tokens=False).input_ids == [size]
    names = [name for name in read_adapter(adapter) if "lora" not in name]
    is_tied = family not in ("llama", "gpt_neox")
    if train == "rows":
        assert len(names) == (1 if is_tied else 2), "an untied head has rows of its own"
    assert ("trainable_tokens_delta" in names[0]) == (train == "rows")

    ids = torch.tensor([[size, 5, 9, size, 30]])
    ours = load_adapter(AutoModelForCausalLM.from_pretrained(base_folder), adapter).eval()
    peft_base = AutoModelForCausalLM.from_pretrained(base_folder)
    peft_base.resize_token_embeddings(size + 1, mean_resizing=False)
    theirs = PeftModel.from_pretrained(peft_base, adapter).eval()
    with torch.no_grad():
        expected = ours(input_ids=ids).logits
        assert expected.shape[-1] == size + 1
        torch.testing.assert_close(theirs(input_ids=ids).logits, expected)
        merge_adapter(adapter, tmp_path / "merged")
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
        torch.testing.assert_close(merged(input_ids=ids).logits, expected, rtol=1e-3, atol=1e-4)
        assert merged.config.vocab_size == size + 1
        assert merged.config.tie_word_embeddings == is_tied
        assert AutoTokenizer.from_pretrained(tmp_path / "merged")(TOOL).input_ids == [size]
    start = AutoModelForCausalLM.from_pretrained(base_folder)
    extend_vocabulary(start, config.model)
    for trained, first in zip(rows_of(merged), rows_of(start), strict=True):
        assert not torch.equal(trained[size], first[size]), "the new row is trained"
        assert torch.equal(trained[:size], first[:size]) == (train == "rows")

    prompts = [f"repeat {TOOL}", "one"]
    [first_reply, second_reply] = generate(prompts, adapters=[adapter], merged=tmp_path / "merged", max_new_tokens=5)
    assert first_reply["merged"] == first_reply["base + adapter"]
    assert second_reply["merged"] == second_reply["base + adapter"]
    base_score, trained_score, merged_score = evaluate(config, adapters=[adapter], merged=tmp_path / "merged")
    assert trained_score.eval_loss < base_score.eval_loss
    assert merged_score.eval_loss == pytest.approx(trained_score.eval_loss, rel=1e-4)
    with pytest.raises(DataError, match="no embedding for the token '<tool>'"):
        generate(prompts, adapters=[adapter], compare=True)


def test_embeddings_that_transformers_cannot_keep_raise(tool_config: Callable[..., RunConfig]) -> None:
    config = tool_config("gpt2", {"tokens": [TOOL], "train": "embeddings"})
    with pytest.raises(ConfigError, match=r"cannot keep transformer\.wte and the head.*train=rows"):
        run_training(config)


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2"])
def test_the_merge_is_streamed(family: str, tool_config: Callable[..., RunConfig]) -> None:
    from lora_accel.merging.base import find_base, read_base_config
    from lora_accel.merging.shards import Weights

    adapter = run_training(tool_config(family, training={"max_steps": 1}))
    base = find_base([adapter], [None], None)
    tensors = MergedTensors(adapter, Weights(base.folder), read_base_config(base))
    assert tensors.config.vocab_size == base.config.vocab_size + 1


def test_a_special_token_is_only_written_by_the_template(tool_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    special = prepare_data(tool_config(added={"tokens": [TOOL], "special": True}))
    plain = prepare_data(tool_config(added={"tokens": [TOOL], "special": False}))
    token = plain.template.tokenizer.convert_tokens_to_ids(TOOL)
    assert all(token in example.input_ids for example in plain.dataset.examples)
    assert not any(token in example.input_ids for example in special.dataset.examples)


def test_added_tokens_belong_to_the_cache_key(tool_config: Callable[..., RunConfig], make_config: Any) -> None:
    from lora_accel.setup.recipe import make_recipe

    config = tool_config()
    plain = config.model_copy(update={"model": config.model.model_copy(update={"add_tokens": None})})
    assert make_recipe(config).fingerprint != make_recipe(plain).fingerprint


def test_added_tokens_may_not_change_on_resume(tool_config: Callable[..., RunConfig]) -> None:
    run_training(tool_config(training={"max_steps": 2}))
    with pytest.raises(UserError, match="add_tokens"):
        run_training(tool_config(added=[TOOL, "<obs>"], training={"max_steps": 4}))


def test_a_resumed_run_has_the_same_result(tool_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    def train(name: str, *steps: int) -> dict[str, torch.Tensor]:
        for last in steps:
            config = tool_config(
                output_dir=str(tmp_path / name),
                checkpoint={"allow_changes": ["training.max_steps"]},
                training={"max_steps": last, "scheduler": "constant", "warmup_steps": 0, "batch_size": 2},
            )
            adapter = run_training(config)
        return read_adapter(adapter)

    at_once, resumed = train("a", 6), train("b", 2, 6)
    assert at_once.keys() == resumed.keys()
    assert all(torch.equal(at_once[name], resumed[name]) for name in at_once)


def test_a_checkpoint_of_an_unfinished_run_is_merged_and_served(
    tool_config: Callable[..., RunConfig], tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    import shutil

    run_training(tool_config(training={"max_steps": 2}))
    shutil.rmtree(tmp_path / "run" / "adapter")
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000002"
    merge_adapter(checkpoint, tmp_path / "merged")
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")(TOOL).input_ids == [len(tokenizer)]
    [reply] = generate([TOOL], adapters=[checkpoint], merged=tmp_path / "merged", max_new_tokens=4)
    assert reply["merged"] == reply["base + adapter"]


def test_quantized_bases_train_rows(tool_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    config = tool_config(quantization={"bits": 4}, training={"max_steps": 2})
    adapter = run_training(config)
    assert any("trainable_tokens_delta" in name for name in read_adapter(adapter))
    base_score, score = evaluate(config, adapters=[adapter])
    assert score.eval_loss < base_score.eval_loss
    merge_adapter(adapter, tmp_path / "merged", base_weights="dequantized")
    [reply] = generate([TOOL], adapters=[adapter], merged=tmp_path / "merged", max_new_tokens=3)
    assert set(reply) == {"base + adapter", "merged"}


@pytest.mark.parametrize(
    ("added", "changes", "message"),
    [
        ([], {}, "at least 1 item"),
        ([" "], {}, "different texts that are not empty"),
        (["<a>", "<a>"], {}, "different texts that are not empty"),
        ({"tokens": ["<a>"], "like": {"<b>": "x"}}, {}, "'<b>' is not one of tokens"),
        ({"tokens": ["<a>"], "like": {"<a>": ""}}, {}, "the text for '<a>' is empty"),
        (["<a>"], {"adapter": {"trainable_token_indices": [1]}}, "set one of them"),
        ({"tokens": ["<a>"], "train": "embeddings"}, {"quantization": {"bits": 4}}, "set train=rows"),
    ],
)
def test_invalid_options(
    added: Any, changes: dict[str, Any], message: str, make_config: Callable[..., RunConfig]
) -> None:
    with pytest.raises(ValueError, match=message):
        make_config(model={"add_tokens": added}, **changes)


def test_embeddings_that_the_adapter_already_trains_are_named(tool_config: Callable[..., RunConfig]) -> None:
    for changes in ({"modules_to_save": ["lm_head"]}, {"target_modules": ["q_proj", "embed_tokens"]}):
        with pytest.raises(ConfigError, match=r"model.add_tokens trains the embeddings; remove (lm_head|embed_tokens)"):
            run_training(tool_config(adapter=changes))


def test_a_head_with_a_bias_trains_all_rows(
    tool_config: Callable[..., RunConfig], tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    base = save_model(tmp_path / "phi", tokenizer, "phi")
    with pytest.raises(ConfigError, match=r"head has a bias.*set model\.add_tokens\.train=embeddings"):
        run_training(tool_config(base=base))
    run_training(tool_config(base=base, added={"tokens": [TOOL], "train": "embeddings"}, training={"max_steps": 1}))


def test_token_indices_that_do_not_fit_the_base_are_named(tool_config: Callable[..., RunConfig]) -> None:
    config = tool_config(training={"max_steps": 1})
    adapter = run_training(config)
    values = read_json(adapter / "adapter_config.json")
    values["trainable_token_indices"] = {key: [10**9] for key in values["trainable_token_indices"]}
    (adapter / "adapter_config.json").write_text(json.dumps(values))
    with pytest.raises(ArtifactError, match="does not train all in between"):
        load_adapter(AutoModelForCausalLM.from_pretrained(config.model.name_or_path), adapter)


@pytest.mark.distributed
@pytest.mark.parametrize("preset", ["cpu_ddp", "cpu_zero2"])
def test_ranks_train_the_same_rows(
    forks: Any,
    preset: str,
    tool_config: Callable[..., RunConfig],
    config_file: Callable[[RunConfig], Path],
    tmp_path: Path,
) -> None:
    config = tool_config(training={"max_steps": 2, "batch_size": 4})
    alone = run_module("lora_accel.train", "--config", config_file(config), f"output_dir={tmp_path / 'one'}")
    assert alone.returncode == 0, alone.stderr
    both = forks.launch(
        "-m", "lora_accel.train", "--config", config_file(config), f"output_dir={tmp_path / 'two'}", preset=preset
    )
    assert both.returncode == 0, both.stderr
    one, two = (read_adapter(tmp_path / name / "adapter") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.distributed
def test_zero3_is_named_as_unsupported(
    forks: Any, tool_config: Callable[..., RunConfig], config_file: Callable[[RunConfig], Path]
) -> None:
    result = forks.launch("-m", "lora_accel.train", "--config", config_file(tool_config()), preset="cpu_zero3")
    assert result.returncode != 0
    assert "error: model.add_tokens is not supported under ZeRO-3" in result.stderr
