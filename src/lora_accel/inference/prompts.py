"""Prompts from the command line and from files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_accel.data.formats import parse_row
from lora_accel.data.records import Conversation, Message
from lora_accel.errors import ConfigError
from lora_accel.json_text import parse_strictly
from lora_accel.paths import open_to_read

if TYPE_CHECKING:
    from lora_accel.data.template import ChatTemplate


PROMPT_KEYS = ("system", "system_prompt", "tools", "functions", "chat_template_kwargs")
"""Keys that are used beside a prompt."""


def read_prompts(texts: Sequence[str], file: Path | None) -> list[Conversation]:
    """Return the prompts of the command line, then those of a file.

    Args:
        texts: user messages.
        file: .txt: one prompt per line. .jsonl: a string, `{"prompt": string}` or `{"messages": […]}` per line, both
            with `system`, `tools` and `chat_template_kwargs`; assistant messages at the end of `messages` are removed.
            Empty lines are skipped.

    Raises:
        ConfigError: there is no prompt, or the file or one of its lines cannot be used.
    """
    prompts = [Conversation((Message("user", text),)) for text in texts]
    if file is not None:
        if file.suffix not in (".txt", ".jsonl"):
            raise ConfigError(f"--prompts: {file}: use a .txt file with one prompt per line, or a .jsonl file")
        try:
            with open_to_read(file) as stream:
                lines = stream.read().removeprefix(b"\xef\xbb\xbf").split(b"\n")
        except OSError as error:
            raise ConfigError(f"--prompts: {file}: cannot be read: {error.strerror}") from None
        for number, line in enumerate(lines, start=1):
            if line.strip():
                prompts.append(_parse_line(line.rstrip(b"\r"), file, number))
    if not prompts:
        raise ConfigError("no prompt: pass PROMPT …, or --prompts FILE with one prompt per line")
    return prompts


def _parse_line(line: bytes, file: Path, number: int) -> Conversation:
    try:
        text = line.decode("utf-8")
        return _parse_prompt(parse_strictly(text) if file.suffix == ".jsonl" else text)
    except UnicodeDecodeError:
        reason = "not UTF-8; save it as UTF-8"
    except json.JSONDecodeError as error:
        reason = f"not valid JSON: {error.msg} at column {error.colno}"
    except ValueError as error:  # includes MalformedRow and UnusableRow
        reason = str(error)
    raise ConfigError(f"--prompts: {file}, line {number}: {reason}")


def _parse_prompt(row: Any) -> Conversation:
    prompt = row.get("prompt") if isinstance(row, dict) else row
    if isinstance(prompt, str):
        if not prompt.strip():
            raise ValueError("the prompt is empty")
        if isinstance(row, str):
            return Conversation((Message("user", row),))
        others = {key: row[key] for key in PROMPT_KEYS if key in row}  # others are the answer, or not used
        row = {"messages": [{"role": "user", "content": prompt}], **others}
    if not isinstance(row, dict) or "messages" not in row:
        raise ValueError('should be a string, {"prompt": string} or {"messages": […]}')
    values = row["messages"]
    if isinstance(values, list):
        values = [*values, {"role": "assistant", "content": "."}]  # parse_row rejects a conversation without an answer
    conversation = parse_row({**row, "messages": values, "loss_mask": None}, "messages")
    assert isinstance(conversation, Conversation)
    messages = list(conversation.messages)
    while messages and messages[-1].role == "assistant":
        messages.pop()
    if not messages or messages[-1].role == "system":
        raise ValueError("messages has nothing to reply to; add a user message")
    return conversation._replace(messages=tuple(messages))


def last_message(prompt: str | Conversation) -> str:
    """Return the message to reply to."""
    return prompt if isinstance(prompt, str) else prompt.messages[-1].content


def encode_prompts(
    prompts: Sequence[str | Conversation], template: ChatTemplate, system: str | None, raw: bool | None = None
) -> list[list[int]]:
    """Return the token ids of each prompt, up to where the reply begins.

    Args:
        system: system message for prompts without one.
        raw: whether the chat template is not applied; None = as in training.

    Raises:
        DataError: the chat template rejects a prompt.
        ConfigError: a prompt without a template has a system message, tools or several messages.
    """
    prompt_ids = []
    raw = template.is_raw if raw is None else raw
    for prompt in prompts:
        conversation = Conversation((Message("user", prompt),)) if isinstance(prompt, str) else prompt
        messages, tools = conversation.messages, conversation.tools
        if system and messages[0].role != "system":
            messages = (Message("system", system), *messages)
        if not raw:
            prompt_ids.append(template.encode_prompt(messages, tools, conversation.template_kwargs))
            continue
        if len(messages) > 1 or tools:
            raise ConfigError(
                f"prompt {messages[-1].content!r:.60}: a system message, tools or several messages need the chat "
                "template, but the adapter was trained without it; pass one message, or --template"
            )
        prompt_ids.append(template.encode_text(messages[0].content))
    return prompt_ids
