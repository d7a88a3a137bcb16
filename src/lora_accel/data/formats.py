"""A row of any known format to a record: a conversation, a prompt with its completion, or plain text.

To add a format: a `_parse_…` function and one line in `FORMATS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

from lora_accel.config.schema import DataFormat


class Message(NamedTuple):
    """One turn of a conversation."""

    role: str
    """system, user, assistant or tool."""
    content: str


class Conversation(NamedTuple):
    """Turns, to be rendered by a chat template."""

    messages: tuple[Message, ...]


class Completion(NamedTuple):
    """A prompt and what should follow it, without a template."""

    prompt: str
    completion: str


class PlainText(NamedTuple):
    """Text that is learned whole."""

    text: str


Record: TypeAlias = Conversation | Completion | PlainText
Row: TypeAlias = Mapping[str, Any]


class MalformedRow(ValueError):
    """A row is not what its format says. The message is the reason, without file and row."""


class UnusableRow(ValueError):
    """A well-formed row from which nothing can be learned. The message is the ledger's reason."""


ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "tool": "tool",
    "observation": "tool",
}


def detect_format(row: Row) -> DataFormat:
    """Return the format that the row's keys show.

    Raises:
        MalformedRow: no known format has these keys.
    """
    for name, (keys, _) in FORMATS.items():
        if all(key in row for key in keys):
            return name
    known = "; ".join(f"{name}: {' + '.join(keys)}" for name, (keys, _) in FORMATS.items())
    raise MalformedRow(
        f"no known format has the keys {sorted(row)}; known are {known}. "
        "Map other names with columns: {known name: name in the file}"
    )


def parse_row(row: Row, data_format: DataFormat) -> Record:
    """Turn a row of this format into a record.

    Raises:
        MalformedRow: a key is missing, a value has the wrong type, a role is unknown.
        UnusableRow: there is nothing in it to learn.
    """
    keys, parse = FORMATS[data_format]
    for key in keys:
        if key not in row:
            raise MalformedRow(
                f"key {key!r} of format {data_format} is missing; the row has {sorted(row)}. "
                "Mend the row, or map other names with columns: {known name: name in the file}"
            )
    return parse(row)


def _parse_sharegpt(row: Row) -> Conversation:
    turns = _messages(row["conversations"], "conversations", role_key="from", content_key="value")
    system = _text(row, "system", default="")
    return Conversation((Message("system", system), *turns) if system else turns)


def _parse_messages(row: Row) -> Conversation:
    return Conversation(_messages(row["messages"], "messages", role_key="role", content_key="content"))


def _parse_alpaca(row: Row) -> Conversation:
    """The input, where there is one, follows the instruction under Alpaca's own heading."""
    question, extra = _text(row, "instruction"), _text(row, "input", default="")
    if extra:
        question += f"\n\n### Input:\n{extra}"
    system = _text(row, "system", default="")
    turns = [Message("system", system)] if system else []
    history = row.get("history") or []
    if not isinstance(history, list):
        raise MalformedRow(f"history should be a list of [question, answer] pairs, not {history!r:.60}")
    for pair in history:
        if not (isinstance(pair, (list, tuple)) and len(pair) == 2 and all(isinstance(x, str) for x in pair)):
            raise MalformedRow(f"history should hold [question, answer] pairs, not {pair!r:.60}")
        turns += [Message("user", pair[0]), Message("assistant", pair[1])]
    turns += [Message("user", question), Message("assistant", _text(row, "output"))]
    return Conversation(_usable(tuple(turns)))


def _parse_prompt_completion(row: Row) -> Record:
    if isinstance(row["prompt"], list) and isinstance(row["completion"], list):
        both = row["prompt"] + row["completion"]
        return Conversation(_messages(both, "prompt + completion", role_key="role", content_key="content"))
    prompt, completion = _text(row, "prompt"), _text(row, "completion")
    if not completion:
        raise UnusableRow("empty completion")
    return Completion(prompt, completion)


def _parse_text(row: Row) -> PlainText:
    text = _text(row, "text")
    if not text.strip():
        raise UnusableRow("empty text")
    return PlainText(text)


# The first format whose keys a row has is the row's format, so the more telling keys stand first.
FORMATS: dict[DataFormat, tuple[tuple[str, ...], Callable[[Row], Record]]] = {
    "sharegpt": (("conversations",), _parse_sharegpt),
    "messages": (("messages",), _parse_messages),
    "alpaca": (("instruction", "output"), _parse_alpaca),
    "prompt_completion": (("prompt", "completion"), _parse_prompt_completion),
    "text": (("text",), _parse_text),
}


def _messages(value: Any, key: str, *, role_key: str, content_key: str) -> tuple[Message, ...]:
    if not isinstance(value, list):
        raise MalformedRow(f"{key} should be a list of messages, not a {type(value).__name__}")
    messages = []
    for number, item in enumerate(value, start=1):
        where = f"{key}, message {number}"
        if not isinstance(item, Mapping):
            raise MalformedRow(f"{where}: should be an object, not a {type(item).__name__}")
        role, content = item.get(role_key), item.get(content_key)
        if role_key not in item:
            raise MalformedRow(f"{where}: key {role_key!r} is missing; the message has {sorted(item)}")
        if not isinstance(role, str) or role not in ROLES:
            raise MalformedRow(f"{where}: unknown role {role!r}; known are {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise MalformedRow(f"{where}: {content_key!r} should be text, not {content!r:.40}")
        messages.append(Message(ROLES[role], content))
    return _usable(tuple(messages))


def _usable(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    if not messages:
        raise UnusableRow("empty conversation")
    if not any(message.role == "assistant" and message.content.strip() for message in messages):
        raise UnusableRow("no assistant turn")
    return messages


def _text(row: Row, key: str, default: str | None = None) -> str:
    value = row.get(key)
    if value is None and default is not None:
        return default
    if not isinstance(value, str):
        raise MalformedRow(f"key {key!r} should be text, not {value!r:.40}")
    return value
