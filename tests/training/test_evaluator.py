"""Evaluation is exact, and batched replies equal those of each prompt alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from lora_accel import RunConfig, load_adapter, run_training
from lora_accel.batching.batches import BatchOptions, step_batch
from lora_accel.config.schema import TrainingSection
from lora_accel.data.chat import Example
from lora_accel.data.records import Message
from lora_accel.model.generation import generate_replies
from lora_accel.setup.data import prepare_data
from lora_accel.training.evaluator import evaluate
from tests.conftest import chat_rows, read_metrics, write_jsonl

FAMILIES = ["llama", "gpt2", "opt", "qwen2"]


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture
def examples(make_config: Callable[..., RunConfig]) -> list[Example]:
    """Return examples of different lengths."""
    examples = prepare_data(make_config(), num_ranks=1).dataset.examples
    assert len({len(x.input_ids) for x in examples}) > 5
    return examples


def brute_force(model: Any, examples: list[Example]) -> float:
    """Return the mean loss per supervised token, computed example by example in float64, without padding."""
    total, tokens = 0.0, 0
    for example in examples:
        with torch.no_grad():
            logits = model(torch.tensor([example.input_ids])).logits[0].double()
        for position, label in enumerate(example.labels):
            if label != -100:
                total -= torch.log_softmax(logits[position - 1], dim=-1)[label].item()
                tokens += 1
    return total / tokens


@pytest.mark.parametrize("limits", [{"micro_batch_tokens": 1}, {"micro_batch_tokens": 300}, {"micro_batch_size": 7}])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_equals_that_of_single_examples(
    tiny_model: Callable[..., Path], examples: list[Example], family: str, limits: dict[str, int]
) -> None:
    model = load(tiny_model(family))
    batch = step_batch(examples, BatchOptions.from_config(TrainingSection(**limits), pad_id=4))
    loss = evaluate(Accelerator(), model, batch)
    assert loss == pytest.approx(brute_force(model, examples), rel=1e-6)


@pytest.mark.parametrize("num_ranks", [2, 3, 8])
def test_losses_of_ranks_add_up(tiny_model: Callable[..., Path], examples: list[Example], num_ranks: int) -> None:
    model, accelerator = load(tiny_model()), Accelerator()
    training = TrainingSection(micro_batch_tokens=400)
    shares = [
        step_batch(examples, BatchOptions.from_config(training, rank=r, num_ranks=num_ranks, pad_id=4))
        for r in range(num_ranks)
    ]
    assert len({len(share.micro_batches) for share in shares}) == 1, "every rank runs each forward"
    total = sum(evaluate(accelerator, model, share) for share in shares)
    assert total == pytest.approx(brute_force(model, examples), rel=1e-6)


def test_eval_loss_of_a_run_is_that_of_its_adapter(
    make_config: Callable[..., RunConfig], tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """Dropout is disabled in evaluation and enabled after it."""
    held_out = write_jsonl(tmp_path / "eval.jsonl", chat_rows(9)[4:])
    evaluated = make_config(
        output_dir=str(tmp_path / "evaluated"), data={"eval": [{"path": str(held_out)}]}, evaluation={"every_steps": 1}
    )
    adapter = run_training(evaluated)
    data = prepare_data(evaluated, num_ranks=1)
    model = load_adapter(load(tiny_model()), adapter)
    lines = read_metrics(tmp_path / "evaluated", "eval")
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4, 5, 6]
    (examples,) = data.eval_sources.values()
    assert lines[-1]["eval_loss"] == pytest.approx(brute_force(model, examples), rel=1e-6)
    assert lines[-1]["eval_tokens"] == sum(x.num_supervised for x in examples)
    assert "sources" not in lines[-1]

    run_training(make_config(output_dir=str(tmp_path / "plain")))
    losses = [[line["loss"] for line in read_metrics(tmp_path / name)] for name in ("evaluated", "plain")]
    assert losses[0] == losses[1], "evaluation does not change training"


def test_each_source_has_its_own_loss(
    make_config: Callable[..., RunConfig], tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """A path that is listed twice is one source."""
    short, long = (
        write_jsonl(tmp_path / f"{name}.jsonl", chat_rows(21)[part])
        for name, part in (("short", slice(0, 2)), ("long", slice(14, 21)))
    )
    sources = [{"path": str(short)}, {"path": str(long), "limit": 3}, {"path": str(long)}]
    config = make_config(data={"eval": sources}, logging={"trackers": ["tensorboard"]})
    model = load_adapter(load(tiny_model()), run_training(config))
    eval_sources = prepare_data(config, num_ranks=1).eval_sources
    assert {name: len(examples) for name, examples in eval_sources.items()} == {str(short): 2, str(long): 10}
    _, line = read_metrics(tmp_path / "run", "eval")
    all_examples = [example for examples in eval_sources.values() for example in examples]
    assert line["eval_loss"] == pytest.approx(brute_force(model, all_examples), rel=1e-6)
    for name, examples in eval_sources.items():
        assert line["sources"][name]["eval_loss"] == pytest.approx(brute_force(model, examples), rel=1e-6)
        assert line["sources"][name]["eval_tokens"] == sum(x.num_supervised for x in examples)


def test_held_out_examples_are_not_trained_on(make_config: Callable[..., RunConfig]) -> None:
    config = make_config(data={"eval_fraction": 0.3})
    data = prepare_data(config, num_ranks=1)
    trained = {tuple(x.input_ids) for x in data.dataset.examples}
    (examples,) = data.eval_sources.values()
    held_out = {tuple(x.input_ids) for x in examples}
    assert (len(data.dataset.examples), len(examples)) == (15, 6)
    assert not trained & held_out


# Replies

PROMPTS = ["one", "hello world the answer is", "two three one two three", "assistant"]


def greedy_reply(model: Any, tokenizer: PreTrainedTokenizerFast, prompt: str, max_new_tokens: int) -> str:
    """Return the greedy reply, computed with one full forward per token, without cache and padding."""
    ids = tokenizer(prompt, add_special_tokens=False).input_ids
    reply: list[int] = []
    for _ in range(max_new_tokens):
        with torch.no_grad():
            token = int(model(torch.tensor([ids + reply])).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        reply.append(token)
    text: str = tokenizer.decode(reply, skip_special_tokens=True)
    return text


@pytest.mark.parametrize("family", FAMILIES)
def test_batched_replies_equal_those_of_single_prompts(
    tiny_model: Callable[..., Path], tokenizer: PreTrainedTokenizerFast, family: str
) -> None:
    model = load(tiny_model(family))
    replies = generate_replies(model, tokenizer, tokenizer(PROMPTS).input_ids, max_new_tokens=12)
    assert replies == [greedy_reply(model, tokenizer, prompt, 12) for prompt in PROMPTS]
    assert len(set(replies)) > 1
    assert generate_replies(model, tokenizer, tokenizer(PROMPTS[:1]).input_ids, max_new_tokens=12) == replies[:1]


def test_reply_ends_before_the_end_token(
    make_config: Callable[..., RunConfig], tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    rows = [{"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "one two three"}]}]
    config = make_config(
        data={"train": [{"path": str(write_jsonl(tmp_path / "one.jsonl", rows))}]},
        adapter={"r": 16, "alpha": 64, "dropout": 0.0},
        training={"batch_size": 1, "max_steps": 60, "learning_rate": 2e-2},
    )
    adapter = run_training(config)
    data = prepare_data(config, num_ranks=1)
    model = load_adapter(load(tiny_model()), adapter)
    prompts = [data.template.encode_prompt((Message("user", "hello"),))] * 2
    assert generate_replies(model, data.template.tokenizer, prompts, max_new_tokens=30) == ["one two three"] * 2

    # Even if the base has a different end token than the chat template.
    model.generation_config.eos_token_id = 2
    assert generate_replies(model, data.template.tokenizer, prompts, max_new_tokens=30) == ["one two three"] * 2


def test_replies_are_logged(make_config: Callable[..., RunConfig]) -> None:
    config = make_config(
        evaluation={"prompts": ["repeat alpha", "hello"], "max_new_tokens": 3}, training={"max_steps": 2}
    )
    run_training(config)
    text = (Path(config.output_dir) / "metrics.jsonl").read_text(encoding="utf-8")
    replies = [line for line in map(json.loads, text.splitlines()) if line.get("event") == "reply"]
    assert [(line["step"], line["prompt"]) for line in replies] == [
        (step, prompt) for step in (0, 2) for prompt in ("repeat alpha", "hello")
    ]
    assert all(isinstance(line["reply"], str) for line in replies)
