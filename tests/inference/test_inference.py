"""Generation, evaluation and chat: several adapters on one base give the same results as each adapter alone."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from lora_accel import RunConfig, load_adapter, run_training, save_adapter
from lora_accel.config.files import config_to_yaml
from lora_accel.config.schema import ModelSection
from lora_accel.data.records import Conversation, Message
from lora_accel.data.splits import HELD_OUT
from lora_accel.data.template import ChatTemplate, template_source
from lora_accel.errors import ArtifactError, ConfigError
from lora_accel.inference import generation
from lora_accel.inference.chat import chat
from lora_accel.inference.evaluation import evaluate, scores_as_table
from lora_accel.inference.generation import generate
from lora_accel.inference.models import name_adapters
from lora_accel.inference.prompts import read_prompts
from lora_accel.inference.templates import load_template
from lora_accel.model import base as base_module
from lora_accel.model.generation import generate_replies
from lora_accel.setup.data import prepare_data
from lora_accel.training import evaluator as evaluation
from tests.conftest import (
    CHATML,
    PATIENCE_SECONDS,
    ROOT,
    TINY,
    CommandResult,
    chat_rows,
    fill_by_formula,
    read_metrics,
    run_module,
    write_jsonl,
)
from tests.data.test_chat import add_bos
from tests.test_package import CLI, imported_by
from tests.training.test_evaluator import brute_force

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias-all": {"bias": "all"},
    "bias-lora": {"bias": "lora_only"},
    "head": {"modules_to_save": ["lm_head"]},
    "lora-head": {"target_modules": ["q_proj", "lm_head"]},
    "embeddings": {"modules_to_save": ["embed_tokens"]},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "tokens": {"trainable_token_indices": [5, 6, 7]},
}
"""Kinds of adapters; each changes the base in another way."""


def make_adapter(folder: Path, base: Path, seed: int, new_tokens: int = 0, **fields: Any) -> Path:
    """Save an adapter with random weights.

    Args:
        new_tokens: resize the vocabulary by this number, and save the embeddings with PEFT.
        fields: of LoraConfig.
    """
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base)
    if new_tokens:
        model.resize_token_embeddings(model.config.vocab_size + new_tokens, mean_resizing=False)
    options: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **(options | fields)))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    if new_tokens:
        model.save_pretrained(folder, save_embedding_layers=True)
    else:
        save_adapter(Accelerator(), model, folder)
    return folder


class LoadRecorder:
    """Records the names of loaded base models, and the last model with its original weights and config."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.model: Any = None
        self.weights: dict[str, torch.Tensor] = {}
        self.config: dict[str, Any] = {}

    def is_unchanged(self) -> bool:
        state = self.model.state_dict()
        return list(state) == list(self.weights) and all(torch.equal(state[key], x) for key, x in self.weights.items())


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> LoadRecorder:
    recorder, load = LoadRecorder(), base_module.load_base_model

    def record(section: ModelSection, *args: Any, **options: Any) -> Any:
        recorder.names.append(section.name_or_path)
        recorder.model = load(section, *args, **options)
        recorder.weights = {key: x.clone() for key, x in recorder.model.state_dict().items()}
        recorder.config = {key: x for key, x in recorder.model.config.to_dict().items() if "attn" not in key}
        return recorder.model

    monkeypatch.setattr(base_module, "load_base_model", record)
    return recorder


@pytest.fixture
def no_model_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        pytest.fail("a model was loaded first")

    monkeypatch.setattr(base_module, "load_base_model", fail)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Path]) -> list[Path]:
    """Two LoRA adapters of a llama model, whose replies differ."""
    folder = tmp_path_factory.mktemp("adapters")
    folders = [make_adapter(folder / name, tiny_model(), seed) for seed, name in enumerate(("one", "two"))]
    torch.manual_seed(0)
    return folders


@pytest.fixture
def eval_config(make_config: Callable[..., RunConfig], tmp_path: Path) -> Callable[..., RunConfig]:
    """Return a function that makes a run config with evaluation data."""
    rows = write_jsonl(tmp_path / "eval.jsonl", chat_rows(5))

    def make(**changes: Any) -> RunConfig:
        return make_config(data={"eval": [{"path": str(rows)}]} | changes.pop("data", {}), **changes)

    return make


def check_error(result: CommandResult, *parts: str) -> None:
    """Check that a command failed with one error message that contains all parts."""
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.stderr
    assert all(part in lines[0] for part in parts), lines[0]


# Scores


@pytest.mark.parametrize(
    ("family", "kinds"),
    [
        ("qwen2", KINDS),  # has biases and an untied head
        ("llama", {"layers": {"layer_replication": [[0, 2], [1, 2]]}, "vocabulary": {"new_tokens": 8}, "plain": {}}),
        ("opt", {"bias-all": {"bias": "all"}, "plain": {}}),  # tied embeddings
    ],
)
def test_each_adapter_is_scored_on_the_original_base(
    eval_config: Callable[..., RunConfig],
    tiny_model: Callable[..., Path],
    tmp_path: Path,
    loads: LoadRecorder,
    family: str,
    kinds: dict[str, dict[str, Any]],
) -> None:
    """No adapter affects the next one: neither by biases, nor `modules_to_save`, nor the weights that PiSSA changes."""
    base = tiny_model(family)
    folders = {
        name: make_adapter(tmp_path / name, base, seed, **fields) for seed, (name, fields) in enumerate(kinds.items())
    }
    config = eval_config(model={"name_or_path": str(base)})
    scores = evaluate(config, adapters=list(folders.values()), max_new_tokens=1)
    assert loads.names == [str(base)], "the base is loaded once"
    assert loads.is_unchanged()
    config_now = loads.model.config.to_dict()
    assert {key: config_now[key] for key in loads.config} == loads.config

    (examples,) = prepare_data(config, num_ranks=1).eval_sources.values()
    expected = {"base": brute_force(AutoModelForCausalLM.from_pretrained(base).eval(), examples)}
    for name, folder in folders.items():
        alone = load_adapter(AutoModelForCausalLM.from_pretrained(base), folder)
        expected[f"base + {name}"] = brute_force(alone, examples)
    assert len({round(loss, 4) for loss in expected.values()}) == len(expected), "all differ"
    assert [score.name for score in scores] == list(expected)
    assert {score.name: score.eval_loss for score in scores} == pytest.approx(expected, rel=1e-5)


@pytest.mark.launch  # ten seconds
def test_a_quantized_base_is_restored(
    eval_config: Callable[..., RunConfig], tokenizer: PreTrainedTokenizerFast, tmp_path: Path, loads: LoadRecorder
) -> None:
    """Even though bitsandbytes repacks weights at their first use on some CPUs."""
    sizes = TINY["qwen2"] | {"hidden_size": 64}  # the block size of quantization
    options = {"num_attention_heads": 4, "max_position_embeddings": 256, "eos_token_id": 4, "pad_token_id": 4}
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("qwen2", vocab_size=len(tokenizer), **sizes, **options)
    )
    fill_by_formula(model)
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    folders = [
        make_adapter(tmp_path / name, tmp_path / "base", seed, **KINDS[name])
        for seed, name in enumerate(("bias-all", "olora", "dora", "plain"))
    ]
    config = eval_config(model={"name_or_path": str(tmp_path / "base")}, quantization={"bits": 4})
    all_scores = evaluate(config, adapters=folders, max_new_tokens=1)
    assert len(loads.names) == 1
    assert loads.is_unchanged()
    expected = [score.eval_loss for folder in folders for score in evaluate(config, adapters=[folder])[1:]]
    assert [score.eval_loss for score in all_scores[1:]] == pytest.approx(expected, rel=1e-6)
    assert len({score.eval_loss for score in all_scores}) == 5


def test_a_pissa_adapter_scores_as_in_training(eval_config: Callable[..., RunConfig]) -> None:
    config = eval_config(adapter={"init_lora_weights": "pissa", "dropout": 0.0}, training={"max_steps": 2})
    adapter = run_training(config)
    lines = (Path(config.output_dir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    _, in_training = [line for line in map(json.loads, lines) if line["kind"] == "eval"]
    score = evaluate(config, adapters=[adapter], max_new_tokens=1)[1]
    assert score.name == "base + adapter"
    assert score.eval_loss == pytest.approx(in_training["eval_loss"], rel=1e-5)
    assert score.eval_perplexity == pytest.approx(in_training["eval_perplexity"], rel=1e-5)


def test_padded_and_packed_rows_have_the_same_loss(
    eval_config: Callable[..., RunConfig], adapters: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    is_padded = []
    evaluate_sources = evaluation.evaluate_sources

    def record(accelerator: Any, model: Any, sources: Any, *rest: Any) -> Any:
        is_padded.append({batch.segments is None for share in sources.values() for batch in share.micro_batches})
        return evaluate_sources(accelerator, model, sources, *rest)

    monkeypatch.setattr(evaluation, "evaluate_sources", record)
    results = [
        evaluate(eval_config(data={"packing": on}), adapters=adapters[:1], max_new_tokens=1) for on in (True, False)
    ]
    assert is_padded == [{False}, {False}, {True}, {True}]
    losses = [[score.eval_loss for score in scores] for scores in results]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert losses[0][0] != losses[0][1]


def test_each_source_has_a_loss_in_json_and_in_the_table(
    command: Callable[..., CommandResult],
    eval_config: Callable[..., RunConfig],
    config_file: Callable[[RunConfig], Path],
    adapters: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    more = write_jsonl(tmp_path / "more.jsonl", chat_rows(9)[6:])
    config = eval_config()
    config.data.eval.append(config.data.eval[0].model_copy(update={"path": str(more)}))
    args = ["evaluate", "--config", config_file(config), "--max-new-tokens", "2"]
    args += [arg for adapter in adapters for arg in ("--adapter", str(adapter))]
    result = command(*args, "--json")
    assert result.returncode == 0, result.stderr
    scores = json.loads(result.stdout)
    assert [score["name"] for score in scores] == ["base", "base + one", "base + two"]
    for score in scores:
        fields = {"name", "eval_loss", "eval_perplexity", "eval_tokens", "exact_match", "rows", "sources"}
        assert set(score) == {*fields, "metrics"}
        assert score["eval_perplexity"] == pytest.approx(math.exp(score["eval_loss"]))
        assert score["rows"] == 8
        parts = score["sources"].values()
        assert len(parts) == 2
        assert score["eval_tokens"] == sum(part["eval_tokens"] for part in parts)
        total = sum(part["eval_loss"] * part["eval_tokens"] for part in parts)
        assert score["eval_loss"] == pytest.approx(total / score["eval_tokens"])
        assert {Path(source).name for source in score["sources"]} == {"eval.jsonl", "more.jsonl"}
    monkeypatch.setenv("COLUMNS", "1000")  # a narrow table would wrap the names
    table = command(*args).stdout
    for text in ("perplexity", "exact match", "more.jsonl", "base + two", f"{scores[2]['eval_loss']:.4f}"):
        assert text in table


def test_held_out_rows_score_as_in_training_and_only_they_get_replies(
    make_config: Callable[..., RunConfig], tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """With several sources, weights, limits, dropped rows and split rows.

    The loss is that of the run's own evaluation. No part of a row whose answer is scored was trained on.
    """
    contents: dict[str, list[dict[str, Any]]] = {}
    for name, size in {"a": 16, "b": 14}.items():
        contents[name] = chat_rows(size)
        for i in (2, 9):
            contents[name][i] = {"messages": []}
        for i in (3, 6, 12):  # too long for one example
            contents[name][i]["messages"] = [
                {"role": role, "content": f"{name} {i} {k} one two three"}
                for k in range(6)
                for role in ("user", "assistant")
            ]
    files = {name: tmp_path / f"{name}.jsonl" for name in contents}
    changes: dict[str, Any] = {
        "seed": 1,
        "data": {
            "train": [{"path": str(files["a"]), "limit": 14, "weight": 2.0}, {"path": str(files["b"]), "weight": 0.5}],
            "eval_fraction": 0.4,
            "overlong": "split",
            "max_length": 100,
            "max_dropped": 0.2,
        },
        "training": {"max_steps": 3},
    }
    template = ChatTemplate(AutoTokenizer.from_pretrained(tiny_model()))
    base = AutoModelForCausalLM.from_pretrained(tiny_model())

    def question(row: dict[str, Any]) -> list[int]:
        return template.encode_prompt([Message(m["role"], m["content"]) for m in row["messages"][:-1]])

    # Make the base's own reply the answer of every other row. Which rows are held out does not depend on the answers.
    correct = set()
    for name, rows in contents.items():
        for number, row in enumerate(rows, start=1):
            if number % 2 and len(row["messages"]) == 2:
                (reply,) = generate_replies(
                    base, template.tokenizer, [question(row)], ends=template.end_ids, max_new_tokens=3
                )
                if reply.strip():
                    row["messages"][-1]["content"] = reply
                    correct.add((str(files[name]), number))
        write_jsonl(files[name], rows)

    config = make_config(**changes)
    data = prepare_data(config, num_ranks=1)
    held_out, trained = ({x.row for x in examples} for examples in (data.eval_sources[HELD_OUT], data.dataset.examples))
    assert held_out.isdisjoint(trained)
    assert any(len(contents[Path(file).stem][number - 1]["messages"]) > 2 for file, number in held_out), "none is split"
    scored = {x.row for x in data.eval_sources[HELD_OUT] if len(x.input_ids) < 100}
    assert scored < held_out, "an answer is cut off at max_length"
    assert 2 <= len(scored & correct) < len(scored)

    adapter = run_training(config)
    _, in_training = read_metrics(Path(config.output_dir), "eval")
    scores = evaluate(config, adapters=[adapter], max_new_tokens=3)
    assert [score.name for score in scores] == ["base", "base + adapter"]
    assert scores[1].eval_loss == pytest.approx(in_training["eval_loss"], rel=1e-5)
    assert {score.eval_tokens for score in scores} == {in_training["eval_tokens"]}
    assert {score.rows for score in scores} == {len(scored)}
    assert scores[0].exact_match == len(scored & correct) / len(scored)
    assert scores[0].sources == {}


def test_rows_that_training_drops_get_no_reply(eval_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    """A row that the chat template rejects has neither a loss nor a reply."""
    rows = write_jsonl(
        tmp_path / "few.jsonl", [*chat_rows(3), {"messages": []}, {"messages": [{"role": "user", "content": "?"}]}]
    )
    (tmp_path / "strict.jinja").write_text(
        CHATML.replace(
            "{% for", "{% if 'alpha' in messages[0]['content'] %}{{ raise_exception('no') }}{% endif %}{% for", 1
        )
    )
    config = eval_config(
        data={"eval": [{"path": str(rows)}], "max_dropped": 1.0},
        model={"chat_template": str(tmp_path / "strict.jinja")},
    )
    (score,) = evaluate(config, max_new_tokens=1)
    assert score.rows == sum("alpha" not in row["messages"][0]["content"] for row in chat_rows(3)) > 0


def test_exact_match_needs_rows_with_answers(
    eval_config: Callable[..., RunConfig], adapters: list[Path], tmp_path: Path
) -> None:
    texts = write_jsonl(tmp_path / "texts.jsonl", [{"text": "hello world the answer is one"}])
    scores = evaluate(eval_config(data={"eval": [{"path": str(texts)}]}), adapters=adapters)
    assert [(score.exact_match, score.rows, score.sources) for score in scores] == [(None, 0, {})] * 3
    assert scores_as_table(scores)[0] == ("model", "loss", "perplexity")


# Names and errors


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (["runs/a/adapter"], ["base + adapter"]),
        (["runs/a/checkpoints/step-2", "runs/a/checkpoints/step-4"], ["base + step-2", "base + step-4"]),
        (["runs/a/adapter", "runs/b/adapter"], ["base + a/adapter", "base + b/adapter"]),
        (["runs/a/adapter", "runs/b/adapter/", "x"], ["base + a/adapter", "base + b/adapter", "base + x"]),
        (["runs/../adapter", "/adapter"], [f"base + {Path.cwd().name}/adapter", "base + //adapter"]),
        ([], []),
    ],
)
def test_adapter_names_are_short_and_unique(folders: list[str], names: list[str]) -> None:
    assert list(name_adapters([Path(folder) for folder in folders])) == names


def test_an_adapter_given_twice_is_an_error(
    command: Callable[..., CommandResult], adapters: list[Path], no_model_loads: None
) -> None:
    args = ("--adapter", adapters[0], "--adapter", f"{adapters[0]}/../one")
    check_error(command("generate", *args, "hello"), "--adapter", "twice")


def test_adapters_of_different_bases_need_the_base_option(
    tiny_model: Callable[..., Path], adapters: list[Path], tmp_path: Path, no_model_loads: None
) -> None:
    other = tmp_path / "other"
    shutil.copytree(adapters[1], other)
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "somebody/else"}))
    with pytest.raises(ConfigError, match=r"somebody/else.*--base"):
        generate(["hello"], adapters=[adapters[0], other])


@pytest.mark.parametrize("damage", ["missing", "unreadable", "oversized rank"])
def test_an_invalid_second_adapter_fails_before_a_model_is_loaded(
    eval_config: Callable[..., RunConfig], adapters: list[Path], tmp_path: Path, no_model_loads: None, damage: str
) -> None:
    other = tmp_path / "other"
    shutil.copytree(adapters[1], other)
    if damage == "missing":
        (other / "adapter_model.safetensors").unlink()
    elif damage == "unreadable":
        (other / "adapter_model.safetensors").write_bytes(b"none")
    else:
        config = json.loads((other / "adapter_config.json").read_text())
        (other / "adapter_config.json").write_text(json.dumps(config | {"r": 10**6}))
    with pytest.raises(ArtifactError, match="other"):
        evaluate(eval_config(), adapters=[adapters[0], other])
    with pytest.raises(ArtifactError, match="other"):
        generate(["hello"], adapters=[adapters[0], other])


def test_a_second_adapter_that_does_not_fit_fails_before_the_first_is_scored(
    eval_config: Callable[..., RunConfig],
    adapters: list[Path],
    tiny_model: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other = make_adapter(tmp_path / "other", tiny_model("qwen2"), 0, bias="lora_only")
    monkeypatch.setattr(evaluation, "evaluate_sources", lambda *_: pytest.fail("one was eval_config first"))
    with pytest.raises(ArtifactError, match=r"other: .*base_layer\.bias"):
        evaluate(eval_config(), adapters=[adapters[0], other])


# Replies

PROMPTS = ["one", "hello world the answer is", "repeat two three one two three", "is", "world", "one two three four"]


def test_batched_replies_equal_single_replies(
    adapters: list[Path], tiny_model: Callable[..., Path], tokenizer: PreTrainedTokenizerFast, loads: LoadRecorder
) -> None:
    options: dict[str, Any] = {"adapters": adapters, "compare": True, "system": "hello", "max_new_tokens": 10}
    batched = generate(PROMPTS, **options)
    assert loads.names == [str(tiny_model())]
    assert loads.is_unchanged()
    assert batched == [generate([prompt], **options)[0] for prompt in PROMPTS]
    assert batched == generate(PROMPTS, **options, batch_size=2)
    assert [set(answer) for answer in batched] == [{"base", "base + one", "base + two"}] * len(PROMPTS)
    assert len({answer["base + one"] for answer in batched}) > 1
    assert any(len(set(answer.values())) == 3 for answer in batched)

    template = ChatTemplate(tokenizer)
    for name, adapter in zip(("base + one", "base + two"), adapters, strict=True):
        alone = load_adapter(AutoModelForCausalLM.from_pretrained(tiny_model()), adapter)
        for prompt, answer in zip(PROMPTS, batched, strict=True):
            ids = template.encode_prompt((Message("system", "hello"), Message("user", prompt)))
            assert answer[name] == generate_replies(alone, tokenizer, [ids], max_new_tokens=10)[0]


def test_a_reply_ends_where_the_template_ends_a_turn(
    tiny_model: Callable[..., Path], tokenizer: PreTrainedTokenizerFast
) -> None:
    """The model's own end token may be another one."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model()).eval()
    ids = tokenizer("hello world").input_ids
    tokens = model.generate(input_ids=torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0, len(ids) :].tolist()
    end = next(x for x in tokens if tokens.index(x) >= 2)
    (reply,) = generate_replies(model, tokenizer, [ids], ends=[end], max_new_tokens=8)
    assert reply == tokenizer.decode(tokens[: tokens.index(end)], skip_special_tokens=True)


@pytest.mark.parametrize("name", ["prompts.txt", "prompts.jsonl"])
def test_prompts_are_read_from_a_file(
    command: Callable[..., CommandResult], adapters: list[Path], tmp_path: Path, name: str
) -> None:
    file = tmp_path / name
    if name.endswith("txt"):
        file.write_bytes(b"\xef\xbb\xbfrepeat alpha\r\n\n  two \n")
        expected = ["hello", "repeat alpha", "  two "]
    else:
        turns = [{"role": "user", "content": "repeat"}, {"role": "assistant", "content": "?"}]
        rows = ["repeat alpha", {"prompt": "two", "n": 1}, {"messages": [*turns, *turns]}, {"messages": turns[:1]}]
        write_jsonl(file, rows)
        expected = ["hello", "repeat alpha", "two", "repeat", "repeat"]
        user, answer = Message("user", "repeat"), Message("assistant", "?")
        assert read_prompts([], file)[2:] == [Conversation((user, answer, user)), Conversation((user,))]
    result = command(
        "generate", "--adapter", adapters[0], "--prompts", file, "--json", "--max-new-tokens", "3", "hello"
    )
    assert result.returncode == 0, result.stderr
    answers = json.loads(result.stdout)
    assert [answer["prompt"] for answer in answers] == expected
    assert all(set(answer) == {"prompt", "base + adapter"} for answer in answers)


@pytest.mark.parametrize(
    ("name", "text", "parts"),
    [
        ("p.jsonl", b'"one"\n\n{"prompt": ', ["line 3", "JSON"]),
        ("p.jsonl", b'{"question": "one"}', ["line 1", "messages"]),
        ("p.jsonl", b'{"prompt": 3}', ["line 1"]),
        ("p.jsonl", b'"one"\n""', ["line 2", "empty"]),
        ("p.jsonl", b'"\\ud800"', ["line 1", "surrogate"]),
        ("p.jsonl", b'{"messages": 5}', ["line 1", "list"]),
        ("p.jsonl", b'{"messages": []}', ["line 1", "nothing to reply to"]),
        ("p.jsonl", b'{"messages": [{"role": "king", "content": "one"}]}', ["line 1", "king"]),
        ("p.jsonl", b"[" * 100_000, ["line 1"]),
        ("p.txt", b"one\n\xff\n", ["line 2", "UTF-8"]),
        ("p.csv", b"one\n", [".txt"]),
        ("p.txt", b"\n\n", ["no prompt"]),
        ("p.txt", None, ["cannot be read"]),
    ],
)
def test_an_invalid_prompt_file_is_one_message(
    command: Callable[..., CommandResult],
    adapters: list[Path],
    tmp_path: Path,
    no_model_loads: None,
    name: str,
    text: bytes | None,
    parts: list[str],
) -> None:
    if text is not None:
        (tmp_path / name).write_bytes(text)
    check_error(command("generate", "--adapter", adapters[0], "--prompts", tmp_path / name), *parts)


def test_option_errors_of_generate_do_not_import_torch(adapters: list[Path]) -> None:
    args = ("generate", "--adapter", str(adapters[0]))
    assert imported_by(CLI, *args) == (2, [])
    assert imported_by(CLI, *args, "--stream", "--json", "hello") == (2, [])
    assert imported_by(CLI, *args, "--stream", "--adapter", str(adapters[1]), "hello") == (2, [])
    assert imported_by(CLI, "chat", "--help") == (0, [])


def test_streamed_replies_are_the_same_and_printed_token_by_token(
    command: Callable[..., CommandResult], adapters: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces: list[str] = []
    expected = generate(PROMPTS[:2], adapters=adapters[:1], max_new_tokens=8)
    with monkeypatch.context() as patch:
        patch.setattr(generation, "print", lambda *args, **_: pieces.append("".join(args)), raising=False)
        generation.stream(PROMPTS[:2], adapter=adapters[0], max_new_tokens=8)
    assert len([piece for piece in pieces if piece]) > 4, "token by token"
    result = command("generate", "--adapter", adapters[0], "--stream", "--max-new-tokens", "8", *PROMPTS[:2])
    assert result.returncode == 0, result.stderr
    shown = "".join(
        f"> {prompt}\n{answer['base + adapter']}\n" for prompt, answer in zip(PROMPTS, expected, strict=False)
    )
    assert result.stdout == shown


# The template of training


def test_a_checkpoint_uses_the_template_of_its_run(make_config: Callable[..., RunConfig]) -> None:
    config = make_config(training={"max_steps": 2}, checkpoint={"every_steps": 1}, model={"chat_template": "alpaca"})
    adapter = run_training(config)
    run = adapter.parent
    (run / "config.yaml").write_text(config_to_yaml(config), encoding="utf-8")
    trained = prepare_data(config, num_ranks=1).template
    turns = (Message("user", "repeat alpha"),)
    section = ModelSection(name_or_path=config.model.name_or_path)
    checkpoint = run / "checkpoints" / "step-00000002"

    def is_same(folder: Path) -> bool:
        template = load_template(folder, section)
        return template.source == trained.source and template.encode_prompt(turns) == trained.encode_prompt(turns)

    assert trained.encode_prompt(turns) != ChatTemplate(trained.tokenizer).encode_prompt(turns)
    assert is_same(adapter)
    (run / "config.yaml").rename(run / "config.moved")
    assert is_same(checkpoint), "read from the adapter"
    (run / "config.moved").rename(run / "config.yaml")
    adapter.rename(run / "moved")
    assert is_same(checkpoint), "read from the config of an unfinished run"
    (run / "config.yaml").unlink()
    assert not is_same(checkpoint)


def test_each_adapter_uses_its_own_template(
    adapters: list[Path], tokenizer_factory: Callable[..., PreTrainedTokenizerFast], tmp_path: Path
) -> None:
    """The base uses the template of the first adapter."""
    other = CHATML.replace("{{ m['role'] }}\n", "{{ m['role'] }}: ").replace("assistant\n", "assistant: ")
    assert other.count(": ") == 2
    folders = [tmp_path / adapter.name for adapter in adapters]
    for folder, adapter, template in zip(folders, adapters, (other, CHATML), strict=True):
        shutil.copytree(adapter, folder)
        tokenizer_factory(chat_template=template).save_pretrained(folder)
    options: dict[str, Any] = {"max_new_tokens": 8, "compare": True}
    both = generate(PROMPTS, adapters=folders, **options)
    first, second = (generate(PROMPTS, adapters=[folder], **options) for folder in folders)
    for answer, one, two in zip(both, first, second, strict=True):
        assert answer["base + one"] == one["base + adapter"]
        assert answer["base + two"] == two["base + adapter"]
        assert answer["base"] == one["base"]
    assert first != generate(PROMPTS, adapters=adapters[:1], **options)


@pytest.mark.parametrize("name", ["vicuna_v1.1", None])
def test_a_saved_template_adds_bos_as_in_training(
    tokenizer_factory: Callable[..., PreTrainedTokenizerFast], tmp_path: Path, name: str | None
) -> None:
    """The tokenizer adds it with a built-in template; any other template writes it itself."""
    tokenizer = add_bos(tokenizer_factory(bos_token="<s>", eos_token="</s>", pad_token="</s>"))
    turns = (Message("user", "hello"),)
    trained = ChatTemplate(tokenizer, name)
    prompt_ids = trained.encode_prompt(turns)
    assert (prompt_ids[0] == 1) == (name is not None)
    tokenizer.chat_template = trained.source
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "provenance.json").write_text(json.dumps({"config": {"model": {"chat_template": name}}}))
    loaded = load_template(tmp_path, ModelSection(name_or_path="unused"))
    assert loaded.encode_prompt(turns) == prompt_ids
    assert loaded.source == (template_source(name) or tokenizer.chat_template)


# Conversations


def test_chat_reads_stdin_until_end_of_file(adapters: list[Path]) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "lora_accel.cli", "chat", "--adapter", str(adapters[0]), "--max-new-tokens", "6"],
        input="hello\nrepeat alpha\n",
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        cwd=ROOT,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    (first,) = generate(["hello"], adapters=adapters[:1], max_new_tokens=6)
    reply = first["base + adapter"]
    turns = (Message("user", "hello"), Message("assistant", reply), Message("user", "repeat alpha"))
    (second,) = generate([Conversation(turns)], adapters=adapters[:1], max_new_tokens=6)
    replies = result.stdout[result.stdout.index("> ") :]
    assert replies == f"> {reply}\n> {second['base + adapter']}\n> \n"


@pytest.fixture
def run_chat(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Return a function that runs a chat on some input, and returns the text of each prompt that the model gets."""

    def run(lines: list[Any], **options: Any) -> list[str]:
        prompts: list[str] = []
        inputs = iter(lines)

        def read(_: str) -> str:
            line = next(inputs, EOFError())
            if isinstance(line, str):
                return line
            raise line

        def record(model: Any, tokenizer: Any, prompt_ids: list[list[int]], **kwargs: Any) -> Any:
            prompts.append(tokenizer.decode(prompt_ids[0]))
            return generate_replies(model, tokenizer, prompt_ids, **kwargs)

        monkeypatch.setattr("builtins.input", read)
        monkeypatch.setattr("lora_accel.model.generation.generate_replies", record)
        chat(**({"max_new_tokens": 4} | options))
        return prompts

    return run


def user(text: str) -> str:
    return f"<|im_start|>user\n{text}<|im_end|>\n"


def assistant(text: str) -> str:
    return f"<|im_start|>assistant\n{text}<|im_end|>\n"


REPLY = "<|im_start|>assistant\n"


def test_a_conversation_is_kept_until_it_is_reset(
    run_chat: Callable[..., list[str]], adapters: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    (first,) = generate(["hello"], adapters=adapters[:1], system="one", max_new_tokens=4)
    system, reply = "<|im_start|>system\none<|im_end|>\n", first["base + adapter"]
    prompts = run_chat(["hello", "", " two ", "/reset", "two", "/quit", "never"], adapter=adapters[0], system="one")
    assert prompts == [
        system + user("hello") + REPLY,
        system + user("hello") + assistant(reply) + user("two") + REPLY,
        system + user("two") + REPLY,
    ]
    assert reply in capsys.readouterr().out


def test_ctrl_c_stops_the_reply_but_not_the_conversation(
    run_chat: Callable[..., list[str]], adapters: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore SIGINT
    (full,) = generate(["hello"], adapters=adapters[:1], max_new_tokens=8)
    put, printed = generation.ReplyWriter.put, []

    def interrupt(self: Any, ids: Any) -> None:
        put(self, ids)
        if self.text and not printed:
            printed.append(self.text)
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(generation.ReplyWriter, "put", interrupt)
    try:
        prompts = run_chat(["hello", KeyboardInterrupt(), "two"], adapter=adapters[0], max_new_tokens=8)
    finally:
        signal.signal(signal.SIGINT, before)
    assert printed[0] != full["base + adapter"]
    assert full["base + adapter"].startswith(printed[0])
    assert prompts[1] == user("hello") + assistant(printed[0]) + user("two") + REPLY


def test_a_conversation_longer_than_the_context_is_an_error_and_chat_continues(
    run_chat: Callable[..., list[str]], adapters: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = run_chat(["x" * 400, "hello"], adapter=adapters[0])
    assert prompts == [user("hello") + REPLY]
    assert "256 positions; /reset" in capsys.readouterr().err


def test_chat_with_a_merged_model_and_without_a_model(
    run_chat: Callable[..., list[str]],
    tiny_model: Callable[..., Path],
    adapters: list[Path],
    command: Callable[..., CommandResult],
    loads: LoadRecorder,
) -> None:
    run_chat(["hello"], merged=tiny_model("qwen2"), adapter=adapters[0])
    assert loads.names == [str(tiny_model("qwen2"))]
    check_error(command("chat"), "--adapter", "--merged")
    check_error(command("chat", "--adapter", adapters[0] / "none"), "none")


def test_generate_command_with_several_adapters_and_a_merged_model(
    adapters: list[Path], tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    args = [arg for adapter in adapters for arg in ("--adapter", adapter)]
    result = run_module(
        "lora_accel.cli", "generate", *args, "--merged", tiny_model(), "--json", "--max-new-tokens", "3", "hello"
    )
    assert result.returncode == 0, result.stderr
    (answer,) = json.loads(result.stdout)
    assert list(answer) == ["prompt", "base", "base + one", "base + two", "merged"]
    assert answer["merged"] == answer["base"]
