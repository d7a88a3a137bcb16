"""Use what was trained: replies and scores of base, base + adapter and merged model, with the template of training."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lora_accel.config.schema import ModelSection, QuantizationSection, RunConfig
from lora_accel.errors import ArtifactError, ConfigError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from lora_accel.data.chat import ChatTemplate


class Candidate(NamedTuple):
    """A model to ask, under the name that tables show."""

    name: str
    model: torch.nn.Module
    packed: bool
    """Whether it takes rows with examples end to end."""


class Score(NamedTuple):
    """How a model did on evaluation rows."""

    name: str
    eval_loss: float
    eval_tokens: int
    exact_match: float | None
    """Share of rows whose greedy reply is the last answer to the letter; None where rows have no answer."""
    rows: int


def generate(
    prompts: Sequence[str],
    *,
    adapter: Path,
    base: str | None = None,
    merged: Path | None = None,
    compare: bool = False,
    system: str | None = None,
    max_new_tokens: int = 128,
) -> list[dict[str, str]]:
    """Reply to user messages greedily.

    Args:
        compare: also ask the base alone, and the merged model if one is given.
        base: a Hub id or folder instead of the one that the adapter names.

    Returns:
        For each prompt the replies, by candidate: `base`, `base + adapter`, `merged`.
    """
    from lora_accel.data.chat import ChatTemplate
    from lora_accel.data.formats import Message
    from lora_accel.model.tokenizer import load_tokenizer
    from lora_accel.training.evaluate import replies_to

    section = ModelSection(name_or_path=_base_of(adapter, base))
    own = (adapter / "tokenizer_config.json").is_file()
    template = ChatTemplate(load_tokenizer(ModelSection(name_or_path=str(adapter)) if own else section))
    turns = (Message("system", system),) if system else ()
    asked = [template.encode_prompt((*turns, Message("user", prompt))) for prompt in prompts]
    answers: list[dict[str, str]] = [{} for _ in prompts]
    for name, model, _ in _candidates(section, QuantizationSection(), adapter, merged, with_base=compare):
        replies = replies_to(model, template.tokenizer, asked, max_new_tokens=max_new_tokens)
        for answer, reply in zip(answers, replies, strict=True):
            answer[name] = reply
    return answers


def evaluate(
    config: RunConfig,
    *,
    adapter: Path | None = None,
    merged: Path | None = None,
    batch_size: int = 25,
    max_new_tokens: int = 128,
) -> list[Score]:
    """Score the base, base + adapter and a merged model on the evaluation rows of a run config.

    Raises:
        ConfigError: the config names no evaluation rows.
    """
    from accelerate import Accelerator

    from lora_accel.data.batches import step_batch
    from lora_accel.data.chat import question_of
    from lora_accel.data.dataset import load_dataset, load_records
    from lora_accel.recipe import make_recipe
    from lora_accel.training import evaluate as evaluation

    if not config.data.eval:
        raise ConfigError("data.eval: names no rows to evaluate on")
    accelerator = Accelerator(cpu=None)
    recipe = make_recipe(config)
    template, dataset = recipe.template(), load_dataset(config.data.eval, recipe, config.data)
    dataset.check(config.data.max_dropped)
    cut: dict[str, Any] = {"rank": 0, "num_ranks": 1, "pad_id": template.tokenizer.pad_token_id}
    records = [record for source in config.data.eval for record in load_records(source)]
    questions = [question for record in records if (question := question_of(record, template))]

    scores = []
    for name, model, packed in _candidates(config.model, config.quantization, adapter, merged, with_base=True):
        model.to(accelerator.device)
        batch = step_batch(dataset.examples, config.training, **cut, packed=packed and config.data.packing)
        loss = evaluation.evaluate(accelerator, model, batch.micro_batches, batch.num_supervised_tokens)
        matches = _exact_matches(model, template, questions, batch_size, max_new_tokens)
        share = matches / len(questions) if questions else None
        scores.append(Score(name, loss, batch.num_supervised_tokens, share, len(questions)))
    return scores


def _exact_matches(
    model: torch.nn.Module,
    template: ChatTemplate,
    questions: list[tuple[list[int], str]],
    batch_size: int,
    max_new_tokens: int,
) -> int:
    from lora_accel.training.evaluate import replies_to

    ordered = sorted(questions, key=lambda question: len(question[0]))  # of like length: little padding
    matches = 0
    for start in range(0, len(ordered), batch_size):
        part = ordered[start : start + batch_size]
        replies = replies_to(model, template.tokenizer, [prompt for prompt, _ in part], max_new_tokens=max_new_tokens)
        matches += sum(reply == answer for reply, (_, answer) in zip(replies, part, strict=True))
    return matches


def _candidates(
    section: ModelSection,
    quantization: QuantizationSection,
    adapter: Path | None,
    merged: Path | None,
    *,
    with_base: bool,
) -> Iterator[Candidate]:
    """Load and give one candidate after the other; base and adapter share one copy of the base."""
    from lora_accel.model.attention import can_pack, pack_attention
    from lora_accel.model.base import load_base_model
    from lora_accel.saving.weights import load_adapter, read_adapter
    from lora_accel.training.loss import return_loss

    def load(section: ModelSection, quantization: QuantizationSection) -> tuple[PreTrainedModel, bool]:
        model = load_base_model(section, quantization)
        packed = can_pack(model)
        if packed:
            pack_attention(model)
        return_loss(model)
        return model, packed

    # What is missing is told before a model is loaded.
    if adapter:
        read_adapter(adapter)
    if merged and not (merged / "config.json").is_file():
        raise ArtifactError(f"{merged}: no config.json in it, so it is no merged model")

    if with_base or adapter:
        model, packed = load(section, quantization)
        if adapter is None:
            yield Candidate("base", model, packed)
        else:
            peft_model = load_adapter(model, adapter)
            if with_base:
                with peft_model.disable_adapter():
                    yield Candidate("base", peft_model, packed)
            yield Candidate("base + adapter", peft_model, packed)
            del peft_model
        del model
    if merged:
        yield Candidate("merged", *load(ModelSection(name_or_path=str(merged)), QuantizationSection()))


def _base_of(adapter: Path, base: str | None) -> str:
    if base:
        return base
    from lora_accel.saving.commit import read_json

    with contextlib.suppress(ArtifactError):
        name = read_json(adapter / "adapter_config.json").get("base_model_name_or_path")
        if name:
            return str(name)
    raise ArtifactError(f"{adapter}: is no adapter, or names no base model; say --base")


def scores_as_json(scores: list[Score]) -> str:
    """Return scores for a script to read."""
    values: list[dict[str, Any]] = [score._asdict() for score in scores]
    return json.dumps(values, indent=2)
