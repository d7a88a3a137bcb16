"""A conversation in the terminal with base + adapter, or with a merged model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_accel.config.schema import Dtype, ModelSection, QuantizationSection
from lora_accel.data.formats import Message
from lora_accel.errors import ConfigError, DataError
from lora_accel.inference.generation import ReplyWriter, stream_reply
from lora_accel.inference.models import base_of, candidates, check_adapters, template_of

if TYPE_CHECKING:
    import torch

    from lora_accel.data.chat import ChatTemplate


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
    check_adapters([adapter] if adapter else [], merged)
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
            writer = ReplyWriter(template)
            try:
                stream_reply(model, template, ids, room, writer)
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
