"""Use what was trained: replies, conversations and scores, with the template of training."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lora_accel.candidates import base_of, candidates, name_adapters, refuse_unusable, template_of
from lora_accel.config.schema import Dtype, ModelSection, QuantizationSection, RunConfig
from lora_accel.console import Stage
from lora_accel.data.formats import Conversation, Message
from lora_accel.errors import ConfigError, DataError
from lora_accel.prompts import encoded, last_words

if TYPE_CHECKING:
    import torch

    from lora_accel.data.chat import ChatTemplate


class Score(NamedTuple):
    """How a model did on evaluation rows."""

    name: str
    eval_loss: float
    """Mean per supervised token, in nats."""
    eval_perplexity: float
    eval_tokens: int
    """How many tokens were supervised."""
    exact_match: float | None
    """Share of rows whose greedy reply is the last answer to the letter; None where rows have no answer."""
    rows: int
    """How many rows have an answer."""
    sources: dict[str, dict[str, Any]]
    """Loss and tokens of each source of rows, where there are several."""


# Replies


def generate(
    prompts: Sequence[str | Conversation],
    *,
    adapters: Sequence[Path],
    base: str | None = None,
    merged: Path | None = None,
    compare: bool = False,
    system: str | None = None,
    batch_size: int = 8,
    max_new_tokens: int = 128,
    dtype: Dtype = "auto",
) -> list[dict[str, str]]:
    """Reply to prompts greedily, each adapter with the template that it was trained with.

    Args:
        prompts: user messages, or whole conversations.
        adapters: folders; the first one's template asks the base and the merged model, too.
        base: a Hub id or folder instead of the one that the adapters name.
        compare: also ask the base alone, and the merged model if one is given.
        system: a system message for what has none.
        batch_size: how many prompts are answered at once.
        max_new_tokens: length of the longest reply.
        dtype: what models compute in; auto = as stored, or float32 where the device only emulates that.

    Returns:
        For each prompt the replies, by candidate: `base`, `base + adapter` (of several: `base + FOLDER`), `merged`.

    Raises:
        ConfigError: an adapter is given twice, or two are for different bases.
        ArtifactError: an adapter or a model cannot be used.
        DataError: a template refuses a prompt.
    """
    named = name_adapters(adapters)
    refuse_unusable(adapters, merged)
    section = ModelSection(name_or_path=base_of(adapters, base), dtype=dtype)
    templates = {name: template_of(folder, section) for name, folder in named.items()}
    asked = {name: encoded(prompts, template, system) for name, template in templates.items()}
    first = next(iter(named))
    answers: list[dict[str, str]] = [{} for _ in prompts]
    for name, model, _ in candidates(section, QuantizationSection(), named, merged, with_base=compare):
        of = name if name in named else first
        for answer, reply in zip(
            answers, _replies(name, model, templates[of], asked[of], batch_size, max_new_tokens), strict=True
        ):
            answer[name] = reply
        del model  # makes room for the merged one
    return answers


def stream(
    prompts: Sequence[str | Conversation],
    *,
    adapter: Path,
    base: str | None = None,
    system: str | None = None,
    max_new_tokens: int = 128,
    dtype: Dtype = "auto",
) -> None:
    """Print the reply to each prompt while it is written, one after the other.

    Raises:
        ArtifactError: the adapter or its base cannot be used.
        DataError: the template refuses a prompt.
    """
    refuse_unusable([adapter], None)
    section = ModelSection(name_or_path=base_of([adapter], base), dtype=dtype)
    template = template_of(adapter, section)
    asked = encoded(prompts, template, system)
    for _, model, _ in candidates(section, QuantizationSection(), {"adapter": adapter}, None, with_base=False):
        for prompt, ids in zip(prompts, asked, strict=True):
            print(f"> {last_words(prompt)}")
            _say(model, template, ids, max_new_tokens, _Writer(template))


def chat(
    *,
    adapter: Path | None = None,
    base: str | None = None,
    merged: Path | None = None,
    system: str | None = None,
    max_new_tokens: int = 512,
    dtype: Dtype = "auto",
) -> None:
    """Talk with base + adapter, or with a merged model, line by line, until `/quit` or the end of input.

    Args:
        adapter: a folder; beside a merged model it only tells the template.
        base: a Hub id or folder instead of the one that the adapter names.
        max_new_tokens: length of the longest reply.
        dtype: as in `generate`.

    Raises:
        ConfigError: neither adapter nor merged model is given.
        ArtifactError: one of them cannot be used.
        DataError: the template refuses the system message.
    """
    told_by = adapter or merged
    if told_by is None:
        raise ConfigError("say whom to talk to: --adapter DIR, or --merged DIR")
    refuse_unusable([adapter] if adapter else [], merged)
    name = str(merged) if merged or adapter is None else base_of([adapter], base)
    section = ModelSection(name_or_path=name, dtype=dtype)
    template = template_of(told_by, section)
    begin = (Message("system", system),) if system else ()
    template.encode_prompt((*begin, Message("user", "hello")))  # what it refuses is told before a model is loaded
    adapters = {} if merged or adapter is None else {"adapter": adapter}
    for _, model, _ in candidates(section, QuantizationSection(), adapters, merged, with_base=False):
        _talk(model, template, begin, max_new_tokens)


def _talk(model: torch.nn.Module, template: ChatTemplate, begin: tuple[Message, ...], max_new_tokens: int) -> None:
    print("/reset begins anew, /quit ends; Ctrl-C stops a reply")
    turns = begin
    while (line := _next_line()) is not None and line != "/quit":
        if line == "/reset":
            turns = begin
        elif line:
            asked = (*turns, Message("user", line))
            try:
                ids = template.encode_prompt(asked)
                room = _room(model, ids, max_new_tokens)
            except DataError as error:
                print(f"error: {error}", file=sys.stderr)
                continue
            writer = _Writer(template)
            try:
                _say(model, template, ids, room, writer)
            except KeyboardInterrupt:
                writer.end()
            # What was stopped before its first word was not said.
            turns = (*asked, Message("assistant", writer.text)) if writer.text else turns


def _next_line() -> str | None:
    """Return what is typed; None at the end of input. Ctrl-C here gives up the line."""
    while True:
        try:
            return input("> ").strip()
        except EOFError:
            print()
            return None
        except KeyboardInterrupt:
            print("\n/quit ends")
        except UnicodeDecodeError:
            raise DataError("standard input: not UTF-8; set the terminal, or the file, to UTF-8") from None


def _room(model: Any, ids: list[int], max_new_tokens: int) -> int:
    """Return how many tokens a reply may have, so that a long conversation ends before the model's last place.

    Raises:
        DataError: there is no room.
    """
    places = getattr(model.config, "max_position_embeddings", None) or sys.maxsize
    if len(ids) >= places:
        raise DataError(f"the conversation has {len(ids)} tokens, and the model {places} places; /reset begins anew")
    return min(max_new_tokens, places - len(ids))


class _Writer:
    """Prints a reply while it is written: transformers' `generate` hands it the prompt, then token after token."""

    def __init__(self, template: ChatTemplate) -> None:
        self.text = ""
        """The reply so far."""
        self._template = template
        self._ids: list[int] | None = None

    def put(self, ids: torch.Tensor) -> None:
        if self._ids is None:  # the prompt
            self._ids = []
            return
        self._ids += ids.flatten().tolist()
        if not self._decoded().endswith("\N{REPLACEMENT CHARACTER}"):  # half a character, whose rest is to come
            self._print()

    def end(self) -> None:
        self._print()
        print()

    def _decoded(self) -> str:
        from lora_accel.training.evaluate import decode_reply

        return decode_reply(self._template.tokenizer, self._ids or [], self._template.end_ids)

    def _print(self) -> None:
        text = self._decoded()
        print(text[len(self.text) :], end="", flush=True)
        self.text = text


def _say(model: torch.nn.Module, template: ChatTemplate, ids: list[int], max_new_tokens: int, writer: _Writer) -> None:
    from lora_accel.training.evaluate import replies_to

    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "streamer": writer}
    replies_to(model, template.tokenizer, [ids], ends=template.end_ids, **options)


def _replies(
    name: str,
    model: torch.nn.Module,
    template: ChatTemplate,
    prompts: Sequence[list[int]],
    batch_size: int,
    max_new_tokens: int,
) -> list[str]:
    """Reply to prompts, several at once: those of like length, which takes little padding."""
    from lora_accel.training.evaluate import replies_to

    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    replies = [""] * len(prompts)
    with Stage(f"{name}: replies to {len(prompts):,} prompts") as stage:
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            asked = [prompts[number] for number in part]
            found = replies_to(model, template.tokenizer, asked, ends=template.end_ids, max_new_tokens=max_new_tokens)
            for number, reply in zip(part, found, strict=True):
                replies[number] = reply
            stage.note(f"({start + len(part):,} done)")
    return replies


# Scores


def evaluate(
    config: RunConfig,
    *,
    adapters: Sequence[Path] = (),
    merged: Path | None = None,
    batch_size: int = 25,
    max_new_tokens: int = 128,
) -> list[Score]:
    """Score the base, base + each adapter and a merged model on the evaluation rows of a run config.

    Args:
        batch_size: how many rows are answered at once.
        max_new_tokens: length of the longest reply.

    Raises:
        ConfigError: the config names no evaluation rows, or an adapter is given twice.
        ArtifactError: an adapter or a model cannot be used.
        DataError: rows cannot be used.
    """
    if not config.data.eval and not config.data.eval_fraction:
        raise ConfigError("data.eval: no rows to evaluate on; set data.eval, or data.eval_fraction as in training")
    named = name_adapters(adapters)
    refuse_unusable(adapters, merged)

    from accelerate import Accelerator

    from lora_accel.data.batches import step_batch
    from lora_accel.data.chat import question_of
    from lora_accel.data.splits import examples_by_name, load_evaluation
    from lora_accel.recipe import make_recipe
    from lora_accel.training.evaluate import evaluate_sources

    accelerator = Accelerator(cpu=None)
    recipe = make_recipe(config)
    template, sources = recipe.template(), load_evaluation(config.data, config.seed, recipe)
    examples = examples_by_name(sources)
    records = [record for source in sources for record in source.records()]
    questions = [question for record in records if (question := question_of(record, template))]
    prompts, answers = [prompt for prompt, _ in questions], [answer for _, answer in questions]

    scores = []
    for name, model, packed in candidates(config.model, config.quantization, named, merged, with_base=True):
        cut: dict[str, Any] = {"rank": 0, "num_ranks": 1, "pad_id": template.tokenizer.pad_token_id}
        cut["packed"] = packed and config.data.packing
        batches = {path: step_batch(found, config.training, **cut) for path, found in examples.items()}
        with Stage(f"{name}: loss"):
            values = evaluate_sources(accelerator, model, batches)
        replies = _replies(name, model, template, prompts, batch_size, max_new_tokens)
        matches = sum(reply == answer for reply, answer in zip(replies, answers, strict=True))
        scores.append(
            Score(
                name,
                eval_loss=values["eval_loss"],
                eval_perplexity=math.exp(min(values["eval_loss"], 700.0)),
                eval_tokens=values["eval_tokens"],
                exact_match=matches / len(questions) if questions else None,
                rows=len(questions),
                sources=values.get("sources", {}),
            )
        )
        del model  # makes room for the merged one
    return scores


def scores_as_json(scores: list[Score]) -> str:
    """Return scores for a script to read."""
    values: list[dict[str, Any]] = [score._asdict() for score in scores]
    return json.dumps(values, indent=2)


def scores_as_table(scores: list[Score]) -> list[tuple[str, ...]]:
    """Return scores for a person to read, the heads first; exact match where rows have answers."""
    sources, answered = list(scores[0].sources), scores[0].exact_match is not None
    heads = ("model", "loss", "perplexity", *(["exact match"] if answered else []), *(f"loss on {s}" for s in sources))
    rows = [heads]
    for score in scores:
        matched = [] if score.exact_match is None else [f"{score.exact_match:.0%} of {score.rows}"]
        losses = [f"{score.sources[source]['eval_loss']:.4f}" for source in sources]
        rows.append((score.name, f"{score.eval_loss:.4f}", f"{score.eval_perplexity:,.3f}", *matched, *losses))
    return rows
