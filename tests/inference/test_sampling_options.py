"""The options of `generate`, `chat` and `evaluate`: sampling, the base alone, metrics and neutral text."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from lora_accel import RunConfig
from lora_accel.data.records import Message
from lora_accel.data.template import ChatTemplate
from lora_accel.model import base as base_module
from lora_accel.model.generation import generate_replies
from tests.conftest import CommandResult, chat_rows, write_jsonl

Command = Callable[..., CommandResult]
PROMPTS = ["repeat alpha", "repeat bravo charlie and more than that", "one", "two three"]
SAMPLED = ("--temperature", "1.5", "--top-p", "0.95", "--top-k", "200", "--repetition-penalty", "1.1")


def test_base_replies_alone(
    command: Command, tiny_model: Callable[..., Path], tokenizer: PreTrainedTokenizerFast
) -> None:
    result = command("generate", "--base", tiny_model(), "--max-new-tokens", 6, "--json", *PROMPTS)
    assert result.returncode == 0, result.stderr
    template = ChatTemplate(tokenizer)
    ids = [template.encode_prompt((Message("user", prompt),)) for prompt in PROMPTS]
    model = AutoModelForCausalLM.from_pretrained(tiny_model())
    replies = generate_replies(model, tokenizer, ids, max_new_tokens=6)
    assert json.loads(result.stdout) == [{"prompt": p, "base": r} for p, r in zip(PROMPTS, replies, strict=True)]
    streamed = command("generate", "--base", tiny_model(), "--max-new-tokens", 6, "--stream", PROMPTS[0])
    assert streamed.stdout == f"> {PROMPTS[0]}\n{replies[0]}\n"

    raw = generate_replies(model, tokenizer, [tokenizer(PROMPTS[0]).input_ids], max_new_tokens=6)
    result = command("generate", "--base", tiny_model(), "--max-new-tokens", 6, "--json", "--raw", PROMPTS[0])
    assert json.loads(result.stdout) == [{"prompt": PROMPTS[0], "base": raw[0]}]


def test_chat_with_the_base(command: Command, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Sampled: the same message after /reset gets another reply, and a second session the same ones."""
    sessions = []
    for _ in range(2):
        lines = iter(["repeat alpha", "/reset", "repeat alpha", "/quit"])
        monkeypatch.setattr("builtins.input", lambda _, lines=lines: next(lines))
        result = command("chat", "--base", tiny_model(), "--temperature", 2, "--max-new-tokens", 8)
        assert result.returncode == 0, result.stderr
        sessions.append(result.stdout.splitlines()[1:])
    assert sessions[0] == sessions[1]
    assert sessions[0][: len(sessions[0]) // 2] != sessions[0][len(sessions[0]) // 2 :]


def test_base_without_a_template(
    command: Command, tiny_model: Callable[..., Path], tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    base = Path(shutil.copytree(tiny_model(), tmp_path / "base"))
    (base / "chat_template.jinja").unlink()
    result = command("generate", "--base", base, "hello")
    assert result.returncode == 2
    assert f"{base}: its tokenizer has no chat template; pass --raw for plain text" in result.stderr
    assert command("generate", "--base", base, "--raw", "--max-new-tokens", 2, "hello").returncode == 0


def test_sampled_replies_do_not_depend_on_the_batch_size(command: Command, tiny_model: Callable[..., Path]) -> None:
    def replies(*options: object) -> list[str]:
        result = command("generate", "--base", tiny_model(), "--max-new-tokens", 8, "--json", *options, *PROMPTS)
        assert result.returncode == 0, result.stderr
        return [reply["base"] for reply in json.loads(result.stdout)]

    sampled = replies(*SAMPLED)
    assert sampled == replies(*SAMPLED, "--batch-size", 1)
    assert sampled != replies(*SAMPLED, "--seed", 1)
    assert sampled != replies()
    assert replies("--num-beams", 3, "--no-repeat-ngram-size", 2) != replies()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", "hello"), "no model: pass --adapter DIR, or --base MODEL for the base alone"),
        (("generate", "--top-p", "0.5"), "--top-p needs sampling; set --temperature above 0 too"),
        (("generate", "--top-p", "1.5"), "--top-p: should be less than or equal to 1, not 1.5"),
        (("generate", "--num-beams", "2", "--temperature", "1"), "--num-beams and --temperature are two ways"),
        (("generate", "--num-beams", "2", "--stream"), "--num-beams: a reply of beam search cannot be streamed"),
        (("chat", "--num-beams", "2"), "--num-beams: a reply of beam search cannot be streamed"),
        (("chat", "--length-penalty", "2"), "--length-penalty needs beam search; set --num-beams above 1 too"),
        (("evaluate", "--top-k", "2"), "evaluation.generation: top_k needs sampling; set temperature above 0 too"),
        (("evaluate", "--metric", "tokenf1"), "--metric: 'tokenf1' is not a metric (did you mean token_f1?)"),
        (("evaluate", "--metric", "nothing:here"), "evaluation.metrics: nothing:here cannot be imported"),
    ],
)
def test_wrong_options_are_errors_before_a_model_is_loaded(
    command: Command,
    make_config: Callable[..., RunConfig],
    config_file: Callable[[RunConfig], Path],
    tiny_model: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.setattr(base_module, "load_base_model", lambda *_, **__: pytest.fail("a model was loaded first"))
    name, *rest = arguments
    if name == "evaluate":
        rest += ["--config", str(config_file(make_config(data={"eval_fraction": 0.3})))]
    elif "hello" not in rest:
        rest += ["--base", str(tiny_model()), *(["hello"] if name == "generate" else [])]
    result = command(name, *rest)
    assert result.returncode == 2
    assert message in result.stderr
    assert result.stdout == ""


def test_evaluate_computes_the_requested_metrics(
    command: Command,
    make_config: Callable[..., RunConfig],
    config_file: Callable[[RunConfig], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = write_jsonl(tmp_path / "eval.jsonl", chat_rows(4))
    config = config_file(make_config(data={"eval": [{"path": str(rows)}]}))
    arguments = ("evaluate", "--config", config, "--max-new-tokens", 4, "--metric", "bits_per_byte", "--forgetting")
    (score,) = json.loads(command(*arguments, "--json").stdout)
    assert set(score["metrics"]) == {"eval_bits_per_byte", "eval_neutral_loss"}
    assert (score["exact_match"], score["rows"]) == (None, 0)

    arguments = (*arguments, "--metric", "token_f1", "--metric", "exact_match")
    (sampled,) = json.loads(command(*arguments, "--json", *SAMPLED).stdout)
    (greedy,) = json.loads(command(*arguments, "--json").stdout)
    assert (greedy["exact_match"], greedy["rows"]) == (0.0, 4)
    assert greedy["metrics"].keys() == sampled["metrics"].keys() == {*score["metrics"], "eval_token_f1"}
    monkeypatch.setenv("COLUMNS", "1000")
    table = command(*arguments).stdout
    for text in ("bits per byte", "token f1", "neutral loss", f"{greedy['metrics']['eval_neutral_loss']:.4f}"):
        assert text in table


@pytest.mark.parametrize("name", ["generate", "chat", "evaluate"])
def test_help_shows_the_sampling_options(command: Command, name: str) -> None:
    text = command(name, "--help").stdout
    assert all(option in text for option in ("--temperature", "--top-p", "--num-beams", "--length-penalty"))
    assert "--sampling" not in text
