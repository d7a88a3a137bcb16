"""Replies during training: batches within the limit, and an error costs only the reply that raises it."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from lora_accel import RunConfig, run_training
from lora_accel.config.schema import GenerationSection
from lora_accel.errors import ConfigError, TrainingError
from lora_accel.inference.evaluation import Score, evaluate, scores_as_table
from lora_accel.setup.data import prepare_data
from lora_accel.training import replies as module
from lora_accel.training.replies import FailedReply, ReplyGenerator, group_prompts
from tests.conftest import CommandResult, chat_rows, read_metrics, write_jsonl


def test_batches_hold_similar_prompts_within_the_limit() -> None:
    prompts = [[1] * length for length in (9, 2, 50, 3, 8, 2)]
    assert group_prompts(prompts, 24, 4) == [[1, 5, 3], [4], [0], [2]]
    assert group_prompts(prompts, 1, 4) == [[1], [5], [3], [4], [0], [2]]
    assert group_prompts([], 10, 4) == []


class Calls:
    """Records the batches that are generated, and raises for some prompts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, failing: Sequence[int] = ()) -> None:
        self.batches: list[list[int]] = []
        original = module.generate_replies

        def generate(*args: Any, numbers: list[int], **options: Any) -> list[str]:
            self.batches.append(numbers)
            if set(failing) & set(numbers):
                raise RuntimeError(f"{len(numbers)} prompt(s)")
            return original(*args, numbers=numbers, **options)

        monkeypatch.setattr(module, "generate_replies", generate)


def make_generator(
    model: Path, tokenizer: PreTrainedTokenizerFast, accelerator: Any = None, **changes: Any
) -> ReplyGenerator:
    options: dict[str, Any] = {
        "ends": [4],
        "max_new_tokens": 4,
        "sampling": GenerationSection(),
        "max_tokens": 40,
        "is_sharded": False,
    }
    loaded = AutoModelForCausalLM.from_pretrained(model)
    return ReplyGenerator(accelerator or Accelerator(), loaded, tokenizer, **(options | changes))


PROMPTS = [[5, 6], [7] * 30, [8, 9, 10], [11], [12] * 5]


def test_only_the_prompt_that_fails_has_no_reply(
    tiny_model: Callable[..., Path], tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = make_generator(tiny_model(), tokenizer)
    expected = generator.generate(PROMPTS)
    assert all(isinstance(reply, str) for reply in expected)
    calls = Calls(monkeypatch, failing=[2])
    expected[2] = FailedReply("RuntimeError: 1 prompt(s)")
    assert generator.generate(PROMPTS) == expected
    assert calls.batches == [[3, 0, 2, 4], [3], [0], [2], [4], [1]]


@pytest.mark.parametrize("is_sharded", [False, True])
def test_ranks_divide_the_same_batches(
    tiny_model: Callable[..., Path],
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    is_sharded: bool,
) -> None:
    """With sharded weights, every rank generates all."""
    calls = Calls(monkeypatch)
    expected = make_generator(tiny_model(), tokenizer, max_tokens=20).generate(PROMPTS)
    batches, parts = [*calls.batches], []
    monkeypatch.setattr(module, "gather_object", lambda part: [*parts, *part])

    class Rank(Accelerator):
        process_index, num_processes = 0, 2

    for rank in (0, 1):
        calls.batches.clear()
        Rank.process_index = rank
        generator = make_generator(tiny_model(), tokenizer, Rank(), max_tokens=20, is_sharded=is_sharded)
        if rank == 0:
            parts.append({number: str(expected[number]) for batch in batches[1::2] for number in batch})
        assert generator.generate(PROMPTS) == expected
        assert calls.batches == (batches if is_sharded else batches[rank::2])
        parts[:] = [{number: str(expected[number]) for batch in batches[0::2] for number in batch}]


def test_failed_reply_under_sharded_weights_ends_the_run(
    tiny_model: Callable[..., Path], tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other ranks wait within the same forward: this one must not start another."""

    class Rank(Accelerator):
        process_index, num_processes = 1, 2

    calls = Calls(monkeypatch, failing=[2])
    generator = make_generator(tiny_model(), tokenizer, Rank(), is_sharded=True)
    with pytest.raises(TrainingError, match=r"generating replies failed: RuntimeError: 4 prompt\(s\)\. The newest"):
        generator.generate(PROMPTS)
    assert calls.batches == [[3, 0, 2, 4]]


def nothing(prompts: list[str], replies: list[str], references: list[str]) -> float:
    """Return a metric, but only for references."""
    return 1 / (replies == references)


def answers(prompts: list[str], replies: list[str], references: list[str]) -> dict[str, float]:
    assert all(prompt.endswith("<|im_start|>assistant\n") for prompt in prompts)
    return {"num_replies": len(replies), "words": sum(len(reply.split()) for reply in replies)}


def test_training_and_evaluate_compute_the_same_metrics(
    make_config: Callable[..., RunConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_jsonl(tmp_path / "eval.jsonl", chat_rows(12))
    metrics = ["bits_per_byte", "exact_match", "token_f1", "rouge_l", "json_valid", f"{__name__}:answers"]
    config = make_config(
        data={"eval": [{"path": str(rows)}]},
        evaluation={"metrics": metrics, "neutral": "auto", "max_new_tokens": 5},
        training={"max_steps": 3},
    )
    adapter = run_training(config)
    _, line = read_metrics(tmp_path / "run", "eval")
    assert line["eval_num_replies"] == 12
    base, score = evaluate(config, adapters=[adapter], max_new_tokens=5)
    values = score.metrics | {"eval_exact_match": score.exact_match, "eval_loss": score.eval_loss}
    assert {key: line[key] for key in values} == pytest.approx(values, rel=1e-5)
    assert base.metrics["eval_neutral_loss"] != score.metrics["eval_neutral_loss"]
    assert f"neutral loss {line['eval_neutral_loss']:.4f}" in capsys.readouterr().out

    # The loss is that of the bytes of the answers, without the end tokens.
    (examples,) = prepare_data(config).eval_sources.values()
    num_bytes = sum(
        len(message["content"])
        for row in chat_rows(12)
        for message in row["messages"]
        if message["role"] == "assistant"
    )
    loss_sum = line["eval_loss"] * sum(example.num_supervised for example in examples)
    assert line["eval_bits_per_byte"] == pytest.approx(loss_sum / 0.6931471805599453 / num_bytes)


def test_a_metric_that_fails_does_not_stop_the_run(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    name = f"{__name__}:nothing"
    config = make_config(
        data={"eval_fraction": 0.3}, evaluation={"metrics": [name], "at_start": False}, training={"max_steps": 1}
    )
    assert run_training(config).is_dir()
    (line,) = read_metrics(tmp_path / "run", "eval")
    (event,) = [line for line in read_metrics(tmp_path / "run", "event") if line["event"] == "metric_failed"]
    assert "eval_nothing" not in line
    assert (
        event["error"] == f"evaluation.metrics: {name} raised ZeroDivisionError: division by zero; fix it, or remove it"
    )
    with pytest.raises(ConfigError, match="raised ZeroDivisionError"):
        evaluate(config, max_new_tokens=2)


def varying(prompts: list[str], replies: list[str], references: list[str]) -> dict[str, float]:
    """Return values whose names depend on the replies."""
    return {"always": 1.0, f"replies_{zlib.crc32(repr(replies).encode())}": 0.5}


def test_a_function_whose_values_have_other_names_for_each_model(
    make_config: Callable[..., RunConfig],
    config_file: Callable[[RunConfig], Path],
    tmp_path: Path,
    command: Callable[..., CommandResult],
) -> None:
    """Of two sources, too. The table has a column for each name, and empty cells."""
    sources = [{"path": str(write_jsonl(tmp_path / f"{n}.jsonl", chat_rows(n)))} for n in (2, 4)]
    config = make_config(data={"eval": sources}, training={"max_steps": 2})
    model = ("--config", config_file(config), "--adapter", run_training(config))
    result = command("evaluate", *model, "--metric", f"{__name__}:varying", "--max-new-tokens", "3", "--json")
    assert result.returncode == 0, result.stderr
    scores = json.loads(result.stdout)
    names = [[name for name in score["metrics"] if name.startswith("eval_replies_")] for score in scores]
    assert [len(own) for own in names] == [1, 1]
    assert names[0] != names[1]
    assert all(values["eval_always"] == 1.0 for score in scores for values in score["sources"].values())
    header, *rows = scores_as_table([Score(**score) for score in scores])
    columns = [header.index(own.removeprefix("eval_").replace("_", " ")) for (own,) in names]
    assert [[row[column] for column in columns] for row in rows] == [["0.5000", ""], ["", "0.5000"]]


def broken(prompts: list[str], replies: list[str], references: list[str]) -> float:
    raise KeyError("score")


@pytest.mark.parametrize(
    ("metrics", "rows", "message"),
    [
        ([f"{__name__}:broken"], chat_rows(2), "broken raised KeyError: 'score'"),
        (["token_f1"], [{"text": "no answer"}], "token_f1 compares replies with answers, but no evaluation row has"),
        (["no_such_module:score"], chat_rows(2), "no_such_module:score cannot be imported"),
    ],
)
def test_metrics_that_cannot_be_computed_are_errors_before_the_model_is_loaded(
    make_config: Callable[..., RunConfig], tmp_path: Path, metrics: list[str], rows: list[Any], message: str
) -> None:
    data = {"eval": [{"path": str(write_jsonl(tmp_path / "eval.jsonl", rows))}]}
    config = make_config(data=data, evaluation={"metrics": metrics})
    with pytest.raises(ConfigError, match=message):
        run_training(config)
    assert not (tmp_path / "run").exists()


def test_the_seed_selects_some_rows_of_each_source(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    sources = [{"path": str(write_jsonl(tmp_path / f"{n}.jsonl", chat_rows(n)))} for n in (3, 15)]
    data, options = {"eval": sources}, {"metrics": ["exact_match"], "num_replies": 6}
    prompts = prepare_data(make_config(data=data, evaluation=options)).scored_prompts
    assert [prompt.source for prompt in prompts] == [sources[0]["path"]] * 3 + [sources[1]["path"]] * 6
    again = prepare_data(make_config(data=data, evaluation=options, seed=1)).scored_prompts
    assert again[:3] == prompts[:3]
    assert again[3:] != prompts[3:]
