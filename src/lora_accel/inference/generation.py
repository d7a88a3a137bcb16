"""Replies to prompts, greedy, with the chat template of training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_accel.config.schema import Dtype, ModelSection, QuantizationSection
from lora_accel.console import Stage
from lora_accel.data.formats import Conversation
from lora_accel.inference.models import base_of, candidates, check_adapters, name_adapters, template_of
from lora_accel.inference.prompts import encoded, last_words

if TYPE_CHECKING:
    import torch

    from lora_accel.data.chat import ChatTemplate


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
    check_adapters(adapters, merged)
    section = ModelSection(name_or_path=base_of(adapters, base), dtype=dtype)
    templates = {name: template_of(folder, section) for name, folder in named.items()}
    asked = {name: encoded(prompts, template, system) for name, template in templates.items()}
    first = next(iter(named))
    answers: list[dict[str, str]] = [{} for _ in prompts]
    for name, model, _ in candidates(section, QuantizationSection(), named, merged, with_base=compare):
        of = name if name in named else first
        for answer, reply in zip(
            answers, reply_in_batches(name, model, templates[of], asked[of], batch_size, max_new_tokens), strict=True
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
    check_adapters([adapter], None)
    section = ModelSection(name_or_path=base_of([adapter], base), dtype=dtype)
    template = template_of(adapter, section)
    asked = encoded(prompts, template, system)
    for _, model, _ in candidates(section, QuantizationSection(), {"adapter": adapter}, None, with_base=False):
        for prompt, ids in zip(prompts, asked, strict=True):
            print(f"> {last_words(prompt)}")
            stream_reply(model, template, ids, max_new_tokens, ReplyWriter(template))


class ReplyWriter:
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
        from lora_accel.training.evaluator import decode_reply

        return decode_reply(self._template.tokenizer, self._ids or [], self._template.end_ids)

    def _print(self) -> None:
        text = self._decoded()
        print(text[len(self.text) :], end="", flush=True)
        self.text = text


def stream_reply(
    model: torch.nn.Module, template: ChatTemplate, ids: list[int], max_new_tokens: int, writer: ReplyWriter
) -> None:
    from lora_accel.training.evaluator import replies_to

    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "streamer": writer}
    replies_to(model, template.tokenizer, [ids], ends=template.end_ids, **options)


def reply_in_batches(
    name: str,
    model: torch.nn.Module,
    template: ChatTemplate,
    prompts: Sequence[list[int]],
    batch_size: int,
    max_new_tokens: int,
) -> list[str]:
    """Reply to prompts, several at once: those of like length, which takes little padding."""
    from lora_accel.training.evaluator import replies_to

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
