"""What models are asked from the command line: words and files of prompts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_accel.data.formats import Conversation, Message, parse_row
from lora_accel.errors import ConfigError

if TYPE_CHECKING:
    from lora_accel.data.chat import ChatTemplate


def read_prompts(words: Sequence[str], file: Path | None) -> list[Conversation]:
    """Return the prompts of a command line, and after them those of a file.

    Args:
        file: .txt: one prompt a line; .jsonl: a text, `{"prompt": text}` or `{"messages": […]}` a line. Of messages the
            answers at the end are left out. Empty lines are passed over.

    Raises:
        ConfigError: there is no prompt at all, or the file or a line of it cannot be used.
    """
    prompts = [Conversation((Message("user", word),)) for word in words]
    if file is not None:
        if file.suffix not in (".txt", ".jsonl"):
            raise ConfigError(f"--prompts: {file}: give a .txt file, one prompt a line, or a .jsonl file")
        try:
            lines = file.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
        except OSError as error:
            raise ConfigError(f"--prompts: {file}: cannot be read: {error.strerror}") from None
        for number, line in enumerate(lines, start=1):
            if line.strip():
                prompts.append(_prompt_in(line.rstrip(b"\r"), file, number))
    if not prompts:
        raise ConfigError("no prompt: give PROMPT …, or --prompts FILE with one a line")
    return prompts


def _prompt_in(line: bytes, file: Path, number: int) -> Conversation:
    try:
        text = line.decode("utf-8")
        row = json.loads(text) if file.suffix == ".jsonl" else text
        json.dumps(row, ensure_ascii=False).encode("utf-8")
        return _prompt_of(row)
    except UnicodeDecodeError:
        reason = "not UTF-8; save it as UTF-8"
    except UnicodeEncodeError:
        reason = "holds half of a surrogate pair, which is no character"
    except json.JSONDecodeError as error:
        reason = f"not valid JSON: {error.msg} at column {error.colno}"
    except (ValueError, RecursionError) as error:  # MalformedRow and UnusableRow among them
        reason = str(error)
    raise ConfigError(f"--prompts: {file}, line {number}: {reason}")


def _prompt_of(row: Any) -> Conversation:
    if isinstance(row, dict) and isinstance(row.get("prompt"), str):
        row = row["prompt"]
    if isinstance(row, str):
        if not row.strip():
            raise ValueError("the prompt is empty")
        return Conversation((Message("user", row),))
    if not isinstance(row, dict) or "messages" not in row:
        raise ValueError('should be a text, {"prompt": text} or {"messages": […]}')
    turns = row["messages"]
    if isinstance(turns, list):
        turns = [*turns, {"role": "assistant", "content": "."}]  # a row without an answer is no row of training
    conversation = parse_row({**row, "messages": turns}, "messages")
    assert isinstance(conversation, Conversation)
    messages = list(conversation.messages)
    while messages and messages[-1].role == "assistant":
        messages.pop()
    if not messages or messages[-1].role == "system":
        raise ValueError("messages asks nothing; give a message of the user")
    return conversation._replace(messages=tuple(messages))


def last_words(prompt: str | Conversation) -> str:
    """Return the message that is to be answered."""
    return prompt if isinstance(prompt, str) else prompt.messages[-1].content


def encoded(prompts: Sequence[str | Conversation], template: ChatTemplate, system: str | None) -> list[list[int]]:
    """Return the token ids that ask for a reply to each prompt.

    Args:
        system: a system message for what has none.
    """
    asked = []
    for prompt in prompts:
        messages, tools, _ = Conversation((Message("user", prompt),)) if isinstance(prompt, str) else prompt
        if system and messages[0].role != "system":
            messages = (Message("system", system), *messages)
        asked.append(template.encode_prompt(messages, tools))
    return asked
