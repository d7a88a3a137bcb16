"""Interactive chat in the terminal with base + adapter, a merged model, or the base alone."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_accel.config.schema import GREEDY, Dtype, GenerationSection, ModelSection, QuantizationSection
from lora_accel.data.records import Conversation, Message
from lora_accel.errors import ConfigError, DataError
from lora_accel.inference.generation import ReplyWriter, check_streaming, section_of, stream_reply
from lora_accel.inference.models import find_adapters, load_candidates
from lora_accel.inference.prompts import encode_prompts
from lora_accel.inference.templates import load_base_template, load_template

if TYPE_CHECKING:
    import torch

    from lora_accel.data.template import ChatTemplate


def chat(
    *,
    adapter: Path | None = None,
    base: str | None = None,
    merged: Path | None = None,
    system: str | None = None,
    raw: bool | None = None,
    max_new_tokens: int = 512,
    sampling: GenerationSection = GREEDY,
    dtype: Dtype = "auto",
    trust_remote_code: bool = False,
    force: bool = False,
) -> None:
    """Chat with base + adapter, a merged model or the base alone.

    It reads one message per line of stdin, until `/quit` or end of file.

    Args:
        adapter: adapter folder. Together with `merged`, only its chat template is used.
        base: Hub id or folder to use instead of the base that the adapter names, or without an adapter.
        merged: folder of a merged model.
        system: system message.
        raw: whether messages are passed without a chat template, each without those before it; None = as in training.
        max_new_tokens: maximum length of a reply.
        sampling: how tokens are chosen. Each message of the session has other draws.
        dtype, trust_remote_code, force: as in `generate`.

    Raises:
        ConfigError: no model is given, or `base` with a merged model, or a system message without a template, or
            `sampling` has beams.
        ArtifactError: the adapter or a model cannot be used.
        DataError: the chat template rejects the system message.
    """
    if merged and base:
        raise ConfigError("--base, --merged: a merged model needs no base; pass only one of them")
    check_streaming(sampling)
    found = find_adapters([adapter] if adapter else [], merged, force=force)
    if not found and not merged and not base:
        raise ConfigError("nothing to chat with: pass --adapter DIR, --merged DIR, or --base MODEL for the base alone")
    if merged:
        section = ModelSection(name_or_path=str(merged), dtype=dtype, trust_remote_code=trust_remote_code)
    else:
        section = section_of(found, base, dtype, trust_remote_code=trust_remote_code)
    folders = [*found, *([merged] if merged else [])]
    template = load_template(folders[0], section) if folders else load_base_template(section, raw=raw)
    raw = template.is_raw if raw is None else raw
    if raw and system:
        raise ConfigError("--system: needs the chat template, and the adapter was trained without one; pass --template")
    first_messages = (Message("system", system),) if system else ()
    prompt = Conversation((*first_messages, Message("user", "hello")))
    encode_prompts([prompt], template, None, raw)  # raises before a model is loaded
    adapters = {} if merged else dict(zip(["adapter"], found, strict=False))
    for _, model, _ in load_candidates(
        section, QuantizationSection(), adapters, merged, with_base=not folders, force=force
    ):
        _run_chat(model, template, first_messages, max_new_tokens, sampling, raw=raw)


def _run_chat(
    model: torch.nn.Module,
    template: ChatTemplate,
    first_messages: tuple[Message, ...],
    max_new_tokens: int,
    sampling: GenerationSection,
    *,
    raw: bool,
) -> None:
    print("/reset starts a new conversation, /quit exits; Ctrl-C stops a reply")
    messages, num_replies = first_messages, 0
    while (line := _read_line()) is not None and line != "/quit":
        if line == "/reset":
            messages = first_messages
        elif line:
            prompt = (*messages, Message("user", line))
            try:
                (ids,) = encode_prompts([Conversation(prompt)], template, None, raw)
                limit = _reply_limit(model, template, ids, max_new_tokens)
            except DataError as error:
                print(f"error: {error}", file=sys.stderr)
                continue
            writer = ReplyWriter(template)
            try:
                stream_reply(model, template, ids, limit, writer, sampling, num_replies)
            except KeyboardInterrupt:
                writer.end()
            num_replies += 1
            if writer.text and not raw:  # a message without a reply is dropped
                messages = (*prompt, Message("assistant", writer.text))


def _read_line() -> str | None:
    """Return the next line of stdin, None at end of file. Ctrl-C discards the current line."""
    while True:
        try:
            return input("> ").strip()
        except EOFError:
            print()
            return None
        except KeyboardInterrupt:
            print("\n/quit exits")
        except UnicodeDecodeError:
            raise DataError("standard input is not UTF-8; set the terminal or the file to UTF-8") from None


def _reply_limit(model: Any, template: ChatTemplate, ids: list[int], max_new_tokens: int) -> int:
    """Return how many tokens a reply may have, so that the conversation fits the model's context.

    Raises:
        DataError: the context is full, or the model lacks a token of the conversation.
    """
    from lora_accel.model.sizes import sizes_of_model

    sizes = sizes_of_model(model)
    unknown = [token for token in ids if token >= sizes.vocab_size]
    if unknown:
        text = template.tokenizer.convert_ids_to_tokens(unknown[0])
        raise DataError(f"the model has no embedding for the token {text!r}, id {unknown[0]}; leave it out")
    max_positions = sizes.max_positions or sys.maxsize
    if len(ids) >= max_positions:
        raise DataError(
            f"the conversation has {len(ids)} tokens, but the model supports {max_positions} positions; "
            "/reset starts a new one"
        )
    return min(max_new_tokens, max_positions - len(ids))
