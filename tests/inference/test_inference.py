"""Many adapters, one base: each is scored and asked as if it were alone, with its own template."""

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
from lora_accel.data.chat import ChatTemplate, template_source
from lora_accel.data.formats import Conversation, Message
from lora_accel.data.splits import HELD_OUT
from lora_accel.errors import ArtifactError, ConfigError
from lora_accel.inference import generation
from lora_accel.inference.chat import chat
from lora_accel.inference.evaluation import evaluate, scores_as_table
from lora_accel.inference.generation import generate
from lora_accel.inference.models import name_adapters, template_of
from lora_accel.inference.prompts import read_prompts
from lora_accel.model import base as base_module
from lora_accel.setup.data import prepare_data
from lora_accel.training import evaluator as evaluation
from lora_accel.training.evaluator import replies_to
from tests.conftest import (
    CHATML,
    PATIENCE_SECONDS,
    ROOT,
    TINY,
    Told,
    chat_rows,
    fill_by_formula,
    read_metrics,
    run_module,
    write_jsonl,
)
from tests.data.test_chat import with_begin_token
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
"""Adapters that would each leave something else behind in their base."""


def make_adapter(folder: Path, base: Path, seed: int, new_tokens: int = 0, **fields: Any) -> Path:
    """Save an adapter that has learned noise; with a larger vocabulary, as PEFT saves it."""
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


class Loads:
    """Counts the base models that are loaded, and keeps the last with the weights that it had."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.model: Any = None
        self.weights: dict[str, torch.Tensor] = {}
        self.config: dict[str, Any] = {}

    def unchanged(self) -> bool:
        state = self.model.state_dict()
        return list(state) == list(self.weights) and all(torch.equal(state[key], x) for key, x in self.weights.items())


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> Loads:
    seen, load = Loads(), base_module.load_base_model

    def loaded(section: ModelSection, *words: Any, **options: Any) -> Any:
        seen.names.append(section.name_or_path)
        seen.model = load(section, *words, **options)
        seen.weights = {key: x.clone() for key, x in seen.model.state_dict().items()}
        seen.config = {key: x for key, x in seen.model.config.to_dict().items() if "attn" not in key}
        return seen.model

    monkeypatch.setattr(base_module, "load_base_model", loaded)
    return seen


@pytest.fixture
def nothing_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object, **__: object) -> None:
        pytest.fail("a model was loaded first")

    monkeypatch.setattr(base_module, "load_base_model", load)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Path]) -> list[Path]:
    """Two plain adapters of a llama, which answer otherwise."""
    folder = tmp_path_factory.mktemp("adapters")
    made = [make_adapter(folder / name, tiny_model(), seed) for seed, name in enumerate(("one", "two"))]
    torch.manual_seed(0)
    return made


@pytest.fixture
def scored(make_config: Callable[..., RunConfig], tmp_path: Path) -> Callable[..., RunConfig]:
    """A config with rows to evaluate on."""
    rows = write_jsonl(tmp_path / "eval.jsonl", chat_rows(5))

    def make(**changes: Any) -> RunConfig:
        return make_config(data={"eval": [{"path": str(rows)}]} | changes.pop("data", {}), **changes)

    return make


def refused(told: Told, *parts: str) -> None:
    assert told.returncode == 2, told.stderr
    assert "Traceback" not in told.stderr
    lines = [line for line in told.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, told.stderr
    assert all(part in lines[0] for part in parts), lines[0]


# Scores


@pytest.mark.parametrize(
    ("family", "kinds"),
    [
        ("qwen2", KINDS),  # has biases, and a head of its own
        ("llama", {"layers": {"layer_replication": [[0, 2], [1, 2]]}, "vocabulary": {"new_tokens": 8}, "plain": {}}),
        ("opt", {"bias-all": {"bias": "all"}, "plain": {}}),  # one tensor for both embeddings
    ],
)
def test_each_adapter_is_scored_on_an_untouched_base(
    scored: Callable[..., RunConfig],
    tiny_model: Callable[..., Path],
    tmp_path: Path,
    loads: Loads,
    family: str,
    kinds: dict[str, dict[str, Any]],
) -> None:
    """Trained biases, copies of whole modules, the rest that PiSSA leaves: nothing goes on to the next row."""
    base = tiny_model(family)
    folders = {
        name: make_adapter(tmp_path / name, base, seed, **fields) for seed, (name, fields) in enumerate(kinds.items())
    }
    config = scored(model={"name_or_path": str(base)})
    scores = evaluate(config, adapters=list(folders.values()), max_new_tokens=1)
    assert loads.names == [str(base)], "one base serves all"
    assert loads.unchanged()
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
def test_a_quantised_base_is_taken_back_too(
    scored: Callable[..., RunConfig], tokenizer: PreTrainedTokenizerFast, tmp_path: Path, loads: Loads
) -> None:
    """Also from the other packing that bitsandbytes gives weights at their first use, on some CPUs."""
    sizes = TINY["qwen2"] | {"hidden_size": 64}  # it packs 64 values together
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
    config = scored(model={"name_or_path": str(tmp_path / "base")}, quantization={"bits": 4})
    together = evaluate(config, adapters=folders, max_new_tokens=1)
    assert len(loads.names) == 1
    assert loads.unchanged()
    expected = [score.eval_loss for folder in folders for score in evaluate(config, adapters=[folder])[1:]]
    assert [score.eval_loss for score in together[1:]] == pytest.approx(expected, rel=1e-6)
    assert len({score.eval_loss for score in together}) == 5


def test_an_adapter_of_a_run_that_began_with_pissa_scores_as_in_training(scored: Callable[..., RunConfig]) -> None:
    config = scored(adapter={"init_lora_weights": "pissa", "dropout": 0.0}, training={"max_steps": 2})
    adapter = run_training(config)
    lines = (Path(config.output_dir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    (in_training,) = [line for line in map(json.loads, lines) if line["kind"] == "eval"]
    score = evaluate(config, adapters=[adapter], max_new_tokens=1)[1]
    assert score.name == "base + adapter"
    assert score.eval_loss == pytest.approx(in_training["eval_loss"], rel=1e-5)
    assert score.eval_perplexity == pytest.approx(in_training["eval_perplexity"], rel=1e-5)


def test_padded_rows_score_as_packed_ones(
    scored: Callable[..., RunConfig], adapters: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    score = evaluation.evaluate_sources

    def watched(accelerator: Any, model: Any, sources: Any) -> Any:
        seen.append({batch.segments is None for share in sources.values() for batch in share.micro_batches})
        return score(accelerator, model, sources)

    monkeypatch.setattr(evaluation, "evaluate_sources", watched)
    found = [evaluate(scored(data={"packing": on}), adapters=adapters[:1], max_new_tokens=1) for on in (True, False)]
    assert seen == [{False}, {False}, {True}, {True}]
    losses = [[score.eval_loss for score in scores] for scores in found]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert losses[0][0] != losses[0][1]


def test_each_source_has_a_loss_in_json_and_in_the_table(
    command: Callable[..., Told],
    scored: Callable[..., RunConfig],
    config_file: Callable[[RunConfig], Path],
    adapters: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    more = write_jsonl(tmp_path / "more.jsonl", chat_rows(9)[6:])
    config = scored()
    config.data.eval.append(config.data.eval[0].model_copy(update={"path": str(more)}))
    words = ["evaluate", "--config", config_file(config), "--max-new-tokens", "2"]
    words += [word for adapter in adapters for word in ("--adapter", str(adapter))]
    told = command(*words, "--json")
    assert told.returncode == 0, told.stderr
    scores = json.loads(told.stdout)
    assert [score["name"] for score in scores] == ["base", "base + one", "base + two"]
    for score in scores:
        fields = {"name", "eval_loss", "eval_perplexity", "eval_tokens", "exact_match", "rows", "sources"}
        assert set(score) == fields
        assert score["eval_perplexity"] == pytest.approx(math.exp(score["eval_loss"]))
        assert score["rows"] == 8
        parts = score["sources"].values()
        assert len(parts) == 2
        assert score["eval_tokens"] == sum(part["eval_tokens"] for part in parts)
        total = sum(part["eval_loss"] * part["eval_tokens"] for part in parts)
        assert score["eval_loss"] == pytest.approx(total / score["eval_tokens"])
        assert {Path(source).name for source in score["sources"]} == {"eval.jsonl", "more.jsonl"}
    monkeypatch.setenv("COLUMNS", "1000")  # a narrow table breaks words
    table = command(*words).stdout
    for shown in ("perplexity", "exact match", "more.jsonl", "base + two", f"{scores[2]['eval_loss']:.4f}"):
        assert shown in table


def test_held_out_rows_score_as_in_training_and_only_they_are_asked(
    make_config: Callable[..., RunConfig], tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """Of several sources, with weights and limits, rows dropped and rows split: the loss is that of the run's own
    evaluation, and the exact match counts the rows of which nothing was trained on, each with its own answer."""
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

    # The base is right about every other row, whichever are held out: answers change no example's number.
    right = set()
    for name, rows in contents.items():
        for number, row in enumerate(rows, start=1):
            if row["messages"] and number % 2:
                (reply,) = replies_to(
                    base, template.tokenizer, [question(row)], ends=template.end_ids, max_new_tokens=3
                )
                if reply.strip():
                    row["messages"][-1]["content"] = reply
                    right.add((str(files[name]), number))
        write_jsonl(files[name], rows)

    config = make_config(**changes)
    data = prepare_data(config, num_ranks=1)
    held, trained = ({x.row for x in examples} for examples in (data.eval_sources[HELD_OUT], data.dataset.examples))
    asked = held - trained
    assert len(asked) < len(held), "training sees a part of one"
    assert 2 <= len(asked & right) < len(asked)

    adapter = run_training(config)
    (in_training,) = read_metrics(Path(config.output_dir), "eval")
    scores = evaluate(config, adapters=[adapter], max_new_tokens=3)
    assert [score.name for score in scores] == ["base", "base + adapter"]
    assert scores[1].eval_loss == pytest.approx(in_training["eval_loss"], rel=1e-5)
    assert {score.eval_tokens for score in scores} == {in_training["eval_tokens"]}
    assert {score.rows for score in scores} == {len(asked)}
    assert scores[0].exact_match == len(asked & right) / len(asked)
    assert scores[0].sources == {}


def test_rows_that_training_drops_are_not_asked(scored: Callable[..., RunConfig], tmp_path: Path) -> None:
    """A row that the template refuses has no loss, and no prompt either."""
    rows = write_jsonl(
        tmp_path / "few.jsonl", [*chat_rows(3), {"messages": []}, {"messages": [{"role": "user", "content": "?"}]}]
    )
    (tmp_path / "strict.jinja").write_text(
        CHATML.replace(
            "{% for", "{% if 'alpha' in messages[0]['content'] %}{{ raise_exception('no') }}{% endif %}{% for", 1
        )
    )
    config = scored(
        data={"eval": [{"path": str(rows)}], "max_dropped": 1.0},
        model={"chat_template": str(tmp_path / "strict.jinja")},
    )
    (score,) = evaluate(config, max_new_tokens=1)
    assert score.rows == sum("alpha" not in row["messages"][0]["content"] for row in chat_rows(3)) > 0


def test_exact_match_is_told_where_rows_have_answers(
    scored: Callable[..., RunConfig], adapters: list[Path], tmp_path: Path
) -> None:
    texts = write_jsonl(tmp_path / "texts.jsonl", [{"text": "hello world the answer is one"}])
    scores = evaluate(scored(data={"eval": [{"path": str(texts)}]}), adapters=adapters)
    assert [(score.exact_match, score.rows, score.sources) for score in scores] == [(None, 0, {})] * 3
    assert scores_as_table(scores)[0] == ("model", "loss", "perplexity")


# Names, and what is refused


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
def test_names_are_the_shortest_that_tell_adapters_apart(folders: list[str], names: list[str]) -> None:
    assert list(name_adapters([Path(folder) for folder in folders])) == names


def test_an_adapter_given_twice_is_one_message(
    command: Callable[..., Told], adapters: list[Path], nothing_loads: None
) -> None:
    words = ("--adapter", adapters[0], "--adapter", f"{adapters[0]}/../one")
    refused(command("generate", *words, "hello"), "--adapter", "twice")


def test_adapters_of_two_bases_are_refused_unless_the_base_is_said(
    tiny_model: Callable[..., Path], adapters: list[Path], tmp_path: Path, nothing_loads: None
) -> None:
    other = tmp_path / "other"
    shutil.copytree(adapters[1], other)
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "somebody/else"}))
    with pytest.raises(ConfigError, match=r"somebody/else.*--base"):
        generate(["hello"], adapters=[adapters[0], other])


@pytest.mark.parametrize("spoil", ["absent", "unreadable", "hostile"])
def test_a_second_adapter_that_is_none_is_told_before_a_model_is_loaded(
    scored: Callable[..., RunConfig], adapters: list[Path], tmp_path: Path, nothing_loads: None, spoil: str
) -> None:
    other = tmp_path / "other"
    shutil.copytree(adapters[1], other)
    if spoil == "absent":
        (other / "adapter_model.safetensors").unlink()
    elif spoil == "unreadable":
        (other / "adapter_model.safetensors").write_bytes(b"none")
    else:
        config = json.loads((other / "adapter_config.json").read_text())
        (other / "adapter_config.json").write_text(json.dumps(config | {"r": 10**6}))
    with pytest.raises(ArtifactError, match="other"):
        evaluate(scored(), adapters=[adapters[0], other])
    with pytest.raises(ArtifactError, match="other"):
        generate(["hello"], adapters=[adapters[0], other])


def test_a_second_adapter_that_does_not_fit_is_told_before_the_first_is_scored(
    scored: Callable[..., RunConfig],
    adapters: list[Path],
    tiny_model: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other = make_adapter(tmp_path / "other", tiny_model("qwen2"), 0, bias="lora_only")
    monkeypatch.setattr(evaluation, "evaluate_sources", lambda *_: pytest.fail("one was scored first"))
    with pytest.raises(ArtifactError, match=r"other: .*base_layer\.bias"):
        evaluate(scored(), adapters=[adapters[0], other])


# Replies

PROMPTS = ["one", "hello world the answer is", "say two three one two three", "is", "world", "one two three four"]


def test_replies_together_are_those_of_each_prompt_alone(
    adapters: list[Path], tiny_model: Callable[..., Path], tokenizer: PreTrainedTokenizerFast, loads: Loads
) -> None:
    options: dict[str, Any] = {"adapters": adapters, "compare": True, "system": "hello", "max_new_tokens": 10}
    together = generate(PROMPTS, **options)
    assert loads.names == [str(tiny_model())]
    assert loads.unchanged()
    assert together == [generate([prompt], **options)[0] for prompt in PROMPTS]
    assert together == generate(PROMPTS, **options, batch_size=2)
    assert [set(answer) for answer in together] == [{"base", "base + one", "base + two"}] * len(PROMPTS)
    assert len({answer["base + one"] for answer in together}) > 1
    assert any(len(set(answer.values())) == 3 for answer in together)

    template = ChatTemplate(tokenizer)
    for name, adapter in zip(("base + one", "base + two"), adapters, strict=True):
        alone = load_adapter(AutoModelForCausalLM.from_pretrained(tiny_model()), adapter)
        for prompt, answer in zip(PROMPTS, together, strict=True):
            ids = template.encode_prompt((Message("system", "hello"), Message("user", prompt)))
            assert answer[name] == replies_to(alone, tokenizer, [ids], max_new_tokens=10)[0]


def test_a_reply_ends_where_the_template_ends_a_turn(
    tiny_model: Callable[..., Path], tokenizer: PreTrainedTokenizerFast
) -> None:
    """Which the model's own end token need not be."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model()).eval()
    ids = tokenizer("hello world").input_ids
    whole = model.generate(input_ids=torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0, len(ids) :].tolist()
    end = next(token for token in whole if whole.index(token) >= 2)
    (reply,) = replies_to(model, tokenizer, [ids], ends=[end], max_new_tokens=8)
    assert reply == tokenizer.decode(whole[: whole.index(end)], skip_special_tokens=True)


@pytest.mark.parametrize("name", ["prompts.txt", "prompts.jsonl"])
def test_prompts_come_from_a_file_too(
    command: Callable[..., Told], adapters: list[Path], tmp_path: Path, name: str
) -> None:
    file = tmp_path / name
    if name.endswith("txt"):
        file.write_bytes(b"\xef\xbb\xbfsay alpha\r\n\n  two \n")
        expected = ["hello", "say alpha", "  two "]
    else:
        turns = [{"role": "user", "content": "say"}, {"role": "assistant", "content": "?"}]
        rows = ["say alpha", {"prompt": "two", "n": 1}, {"messages": [*turns, *turns]}, {"messages": turns[:1]}]
        write_jsonl(file, rows)
        expected = ["hello", "say alpha", "two", "say", "say"]
        user, answer = Message("user", "say"), Message("assistant", "?")
        assert read_prompts([], file)[2:] == [Conversation((user, answer, user)), Conversation((user,))]
    told = command("generate", "--adapter", adapters[0], "--prompts", file, "--json", "--max-new-tokens", "3", "hello")
    assert told.returncode == 0, told.stderr
    answers = json.loads(told.stdout)
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
        ("p.jsonl", b'{"messages": "one"}', ["line 1", "list"]),
        ("p.jsonl", b'{"messages": []}', ["line 1", "asks nothing"]),
        ("p.jsonl", b'{"messages": [{"role": "king", "content": "one"}]}', ["line 1", "king"]),
        ("p.jsonl", b"[" * 100_000, ["line 1"]),
        ("p.txt", b"one\n\xff\n", ["line 2", "UTF-8"]),
        ("p.csv", b"one\n", [".txt"]),
        ("p.txt", b"\n\n", ["no prompt"]),
        ("p.txt", None, ["cannot be read"]),
    ],
)
def test_a_bad_prompt_file_is_one_message(
    command: Callable[..., Told],
    adapters: list[Path],
    tmp_path: Path,
    nothing_loads: None,
    name: str,
    text: bytes | None,
    parts: list[str],
) -> None:
    if text is not None:
        (tmp_path / name).write_bytes(text)
    refused(command("generate", "--adapter", adapters[0], "--prompts", tmp_path / name), *parts)


def test_no_prompt_and_what_cannot_be_streamed_are_told_without_torch(adapters: list[Path]) -> None:
    words = ("generate", "--adapter", str(adapters[0]))
    assert imported_by(CLI, *words) == (2, [])
    assert imported_by(CLI, *words, "--stream", "--json", "hello") == (2, [])
    assert imported_by(CLI, *words, "--stream", "--adapter", str(adapters[1]), "hello") == (2, [])
    assert imported_by(CLI, "chat", "--help") == (0, [])


def test_streamed_replies_are_the_same_and_come_in_pieces(
    command: Callable[..., Told], adapters: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces: list[str] = []
    whole = generate(PROMPTS[:2], adapters=adapters[:1], max_new_tokens=8)
    with monkeypatch.context() as patch:
        patch.setattr(generation, "print", lambda *words, **_: pieces.append("".join(words)), raising=False)
        generation.stream(PROMPTS[:2], adapter=adapters[0], max_new_tokens=8)
    assert len([piece for piece in pieces if piece]) > 4, "token by token"
    told = command("generate", "--adapter", adapters[0], "--stream", "--max-new-tokens", "8", *PROMPTS[:2])
    assert told.returncode == 0, told.stderr
    shown = "".join(f"> {prompt}\n{answer['base + adapter']}\n" for prompt, answer in zip(PROMPTS, whole, strict=False))
    assert told.stdout == shown


# The template of training


def test_a_checkpoint_is_asked_with_the_template_of_its_run(make_config: Callable[..., RunConfig]) -> None:
    config = make_config(training={"max_steps": 2}, checkpoint={"every_steps": 1}, model={"chat_template": "alpaca"})
    adapter = run_training(config)
    run = adapter.parent
    (run / "config.yaml").write_text(config_to_yaml(config), encoding="utf-8")
    trained = prepare_data(config, num_ranks=1).template
    turns = (Message("user", "say alpha"),)
    section = ModelSection(name_or_path=config.model.name_or_path)
    checkpoint = run / "checkpoints" / "step-00000002"

    def same(folder: Path) -> bool:
        found = template_of(folder, section)
        return found.source == trained.source and found.encode_prompt(turns) == trained.encode_prompt(turns)

    assert trained.encode_prompt(turns) != ChatTemplate(trained.tokenizer).encode_prompt(turns)
    assert same(adapter)
    (run / "config.yaml").rename(run / "config.aside")
    assert same(checkpoint), "of the adapter"
    (run / "config.aside").rename(run / "config.yaml")
    adapter.rename(run / "aside")
    assert same(checkpoint), "of the config: the run is not done yet"
    (run / "config.yaml").unlink()
    assert not same(checkpoint)


def test_each_adapter_is_asked_with_its_own_template(
    adapters: list[Path], tokenizer_factory: Callable[..., PreTrainedTokenizerFast], tmp_path: Path
) -> None:
    """The base with that of the first."""
    other = CHATML.replace("{{ m['role'] }}\n", "{{ m['role'] }}: ").replace("assistant\n", "assistant: ")
    assert other.count(": ") == 2
    folders = [tmp_path / adapter.name for adapter in adapters]
    for folder, adapter, template in zip(folders, adapters, (other, CHATML), strict=True):
        shutil.copytree(adapter, folder)
        tokenizer_factory(chat_template=template).save_pretrained(folder)
    options: dict[str, Any] = {"max_new_tokens": 8, "compare": True}
    together = generate(PROMPTS, adapters=folders, **options)
    first, second = (generate(PROMPTS, adapters=[folder], **options) for folder in folders)
    for answer, alone, beside in zip(together, first, second, strict=True):
        assert answer["base + one"] == alone["base + adapter"]
        assert answer["base + two"] == beside["base + adapter"]
        assert answer["base"] == alone["base"]
    assert first != generate(PROMPTS, adapters=adapters[:1], **options)


@pytest.mark.parametrize("name", ["vicuna_v1.1", None])
def test_a_built_in_template_begins_as_in_training(
    tokenizer_factory: Callable[..., PreTrainedTokenizerFast], tmp_path: Path, name: str | None
) -> None:
    """With the begin token where the tokenizer puts one; a tokenizer's own template writes what it wants."""
    tokenizer = with_begin_token(tokenizer_factory(bos_token="<s>", eos_token="</s>", pad_token="</s>"))
    turns = (Message("user", "hello"),)
    trained = ChatTemplate(tokenizer, name)
    asked = trained.encode_prompt(turns)
    assert (asked[0] == 1) == (name is not None)
    tokenizer.chat_template = trained.source
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "provenance.json").write_text(json.dumps({"config": {"model": {"chat_template": name}}}))
    found = template_of(tmp_path, ModelSection(name_or_path="unused"))
    assert found.encode_prompt(turns) == asked
    assert found.source == (template_source(name) or tokenizer.chat_template)


# Conversations


def test_chat_reads_a_pipe_to_its_end(adapters: list[Path]) -> None:
    told = subprocess.run(
        [sys.executable, "-m", "lora_accel.cli", "chat", "--adapter", str(adapters[0]), "--max-new-tokens", "6"],
        input="hello\nsay alpha\n",
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        cwd=ROOT,
        check=False,
    )
    assert told.returncode == 0, told.stderr
    assert "Traceback" not in told.stderr
    (first,) = generate(["hello"], adapters=adapters[:1], max_new_tokens=6)
    reply = first["base + adapter"]
    turns = (Message("user", "hello"), Message("assistant", reply), Message("user", "say alpha"))
    (second,) = generate([Conversation(turns)], adapters=adapters[:1], max_new_tokens=6)
    replies = told.stdout[told.stdout.index("> ") :]
    assert replies == f"> {reply}\n> {second['base + adapter']}\n> \n"


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Type lines into a chat; return the text of each prompt that the model was given."""

    def run(lines: list[Any], **options: Any) -> list[str]:
        fed: list[str] = []
        coming = iter(lines)

        def line(_: str) -> str:
            following = next(coming, EOFError())
            if isinstance(following, str):
                return following
            raise following

        def watched(model: Any, tokenizer: Any, prompts: list[list[int]], **words: Any) -> Any:
            fed.append(tokenizer.decode(prompts[0]))
            return replies_to(model, tokenizer, prompts, **words)

        monkeypatch.setattr("builtins.input", line)
        monkeypatch.setattr(evaluation, "replies_to", watched)
        chat(**({"max_new_tokens": 4} | options))
        return fed

    return run


def user(text: str) -> str:
    return f"<|im_start|>user\n{text}<|im_end|>\n"


def assistant(text: str) -> str:
    return f"<|im_start|>assistant\n{text}<|im_end|>\n"


ASKS = "<|im_start|>assistant\n"


def test_a_conversation_is_kept_until_it_is_reset(
    typed: Callable[..., list[str]], adapters: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    (first,) = generate(["hello"], adapters=adapters[:1], system="one", max_new_tokens=4)
    system, reply = "<|im_start|>system\none<|im_end|>\n", first["base + adapter"]
    fed = typed(["hello", "", " two ", "/reset", "two", "/quit", "never"], adapter=adapters[0], system="one")
    assert fed == [
        system + user("hello") + ASKS,
        system + user("hello") + assistant(reply) + user("two") + ASKS,
        system + user("two") + ASKS,
    ]
    assert reply in capsys.readouterr().out


def test_ctrl_c_stops_a_reply_and_not_the_conversation(
    typed: Callable[..., list[str]], adapters: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    (whole,) = generate(["hello"], adapters=adapters[:1], max_new_tokens=8)
    put, heard = generation.ReplyWriter.put, []

    def interrupted(self: Any, ids: Any) -> None:
        put(self, ids)
        if self.text and not heard:
            heard.append(self.text)
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(generation.ReplyWriter, "put", interrupted)
    try:
        fed = typed(["hello", KeyboardInterrupt(), "two"], adapter=adapters[0], max_new_tokens=8)
    finally:
        signal.signal(signal.SIGINT, before)
    assert heard[0] != whole["base + adapter"]
    assert whole["base + adapter"].startswith(heard[0])
    assert fed[1] == user("hello") + assistant(heard[0]) + user("two") + ASKS


def test_a_conversation_longer_than_the_model_is_told_and_goes_on(
    typed: Callable[..., list[str]], adapters: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    fed = typed(["x" * 400, "hello"], adapter=adapters[0])
    assert fed == [user("hello") + ASKS]
    assert "256 places; /reset" in capsys.readouterr().err


def test_chat_with_a_merged_model_and_with_nobody(
    typed: Callable[..., list[str]],
    tiny_model: Callable[..., Path],
    adapters: list[Path],
    command: Callable[..., Told],
    loads: Loads,
) -> None:
    typed(["hello"], merged=tiny_model("qwen2"), adapter=adapters[0])
    assert loads.names == [str(tiny_model("qwen2"))]
    refused(command("chat"), "--adapter", "--merged")
    refused(command("chat", "--adapter", adapters[0] / "none"), "none")


def test_the_command_line_takes_several_adapters_and_a_merged_model(
    adapters: list[Path], tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    words = [word for adapter in adapters for word in ("--adapter", adapter)]
    told = run_module(
        "lora_accel.cli", "generate", *words, "--merged", tiny_model(), "--json", "--max-new-tokens", "3", "hello"
    )
    assert told.returncode == 0, told.stderr
    (answer,) = json.loads(told.stdout)
    assert list(answer) == ["prompt", "base", "base + one", "base + two", "merged"]
    assert answer["merged"] == answer["base"]
