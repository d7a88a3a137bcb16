"""Parse a row of any supported format into a record: a conversation, a prompt with its completion, text or tokens.

To add a format, write a `_parse_…` function and add it to `FORMATS`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from lora_accel.errors import ConfigError, did_you_mean, join_or


class Message(NamedTuple):
    """One turn of a conversation."""

    role: str
    """system, user, assistant or tool."""
    content: str
    supervised: bool = True
    """False = the row excludes this answer from the loss. Ignored for other roles."""
    tool_calls: tuple[dict[str, Any], ...] = ()
    """`{"type": "function", "function": {"name", "arguments"}}`, as chat templates expect them."""
    reasoning: str = ""
    """The reasoning before an answer, if the row stores it separately."""
    name: str = ""
    """Name of the tool whose result this is, or of the speaker."""
    tool_call_id: str = ""

    def for_template(self) -> dict[str, Any]:
        """Return the message as passed to a chat template, without empty values."""
        values = {"role": self.role, "content": self.content, "tool_calls": list(self.tool_calls)}
        values |= {"reasoning_content": self.reasoning, "thinking": self.reasoning}  # two names that templates read
        values |= {"name": self.name, "tool_call_id": self.tool_call_id}
        return {key: value for key, value in values.items() if value or key in ("role", "content")}


class Conversation(NamedTuple):
    """Messages, to be rendered by a chat template."""

    messages: tuple[Message, ...]
    tools: list[dict[str, Any]] | None = None
    """JSON schemas of the functions that the assistant may call."""
    notes: tuple[str, ...] = ()
    """Changes made to the row's turns, for the ledger."""


class Completion(NamedTuple):
    """A prompt and its completion, used without a template."""

    prompt: str
    completion: str


class PlainText(NamedTuple):
    """Text in which every token is supervised."""

    text: str


class Pretokenized(NamedTuple):
    """Token ids and labels, used as they are."""

    input_ids: list[int]
    labels: list[int]
    """The token itself, or -100."""


Record: TypeAlias = Conversation | Completion | PlainText | Pretokenized
Row: TypeAlias = Mapping[str, Any]


class MalformedRow(ValueError):
    """A row does not match its format. The message is the reason, without file and row."""


class UnusableRow(ValueError):
    """A well-formed row that cannot be trained on. The message is the reason in the ledger."""


ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "ai", "chatgpt", "bing", "bard"), "assistant"),
    **dict.fromkeys(("function_call", "tool_call"), "assistant"),  # an answer that is a tool call
    **dict.fromkeys(("tool", "observation", "function", "function_response", "tool_response", "ipython"), "tool"),
}
"""Role names found in datasets, in lower case, and the four roles they map to."""
CALL_ROLES = ("function_call", "tool_call")


def detect_format(row: Row) -> str:
    """Return the format whose keys the row has.

    Raises:
        MalformedRow: no supported format has these keys.
    """
    for name, (keys, _) in FORMATS.items():
        if all(key in row for key in keys):
            return name
    known = "; ".join(f"{name}: {' + '.join(keys)}" for name, (keys, _) in FORMATS.items())
    raise MalformedRow(
        f"no known format has the keys {sorted(row)}; known are {known}. "
        "Map other names with columns: {known name: name in the file}"
    )


def check_format(name: str | None, where: str) -> None:
    """Check that a format exists.

    Args:
        name: the format; None is valid.
        where: the option that sets it, for the message.

    Raises:
        ConfigError: there is no such format.
    """
    if name is not None and name not in FORMATS:
        raise ConfigError(
            f"{where}: should be {join_or(map(repr, FORMATS))}, not {name!r}{did_you_mean(name, FORMATS)}"
        )


def parse_row(row: Row, data_format: str) -> Record:
    """Parse a row of a format into a record.

    Raises:
        MalformedRow: a key is missing, a value has the wrong type, or a role is unknown.
        UnusableRow: the row has nothing to train on.
    """
    keys, parse = FORMATS[data_format]
    for key in keys:
        if key not in row:
            raise MalformedRow(
                f"key {key!r} of format {data_format} is missing; the row has {sorted(row)}. "
                "Fix the row, or map other names with columns: {known name: name in the file}"
            )
    return parse(row)


def _parse_sharegpt(row: Row) -> Conversation:
    """Parse scraped turns: drop answers before the first question, and join consecutive turns of one role."""
    turns = _messages(row["conversations"], "conversations", ("from", "role"), ("value", "content"))
    system = _text(row, "system", default="")
    messages, notes = list(turns), []
    if system:
        messages.insert(0, Message("system", system))
    first = next((i for i, message in enumerate(messages) if message.role in ("user", "tool")), len(messages))
    kept = [m for i, m in enumerate(messages) if m.role != "assistant" or i > first]
    if len(kept) < len(messages):
        if first == len(messages):
            raise UnusableRow("no user message")
        notes.append("answers before the first question are left out")
    joined: list[Message] = []
    for message in kept:
        last = joined[-1] if joined else None
        if last and last.role != "tool" and last == message._replace(content=last.content) and not last.tool_calls:
            joined[-1] = last._replace(content=f"{last.content}\n\n{message.content}")
            notes.append("consecutive turns of one role are joined with an empty line")
        else:
            joined.append(message)
    return Conversation(_check_usable(joined), _tools(row), tuple(dict.fromkeys(notes)))


def _parse_messages(row: Row) -> Conversation:
    return Conversation(_check_usable(_messages(row["messages"], "messages")), _tools(row))


def _parse_alpaca(row: Row) -> Conversation:
    """Parse an instruction; its input, if there is one, follows it under Alpaca's heading."""
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
            raise MalformedRow(f"history should contain [question, answer] pairs, not {pair!r:.60}")
        turns += [Message("user", pair[0]), Message("assistant", pair[1])]
    turns += [Message("user", question), Message("assistant", _text(row, "output"))]
    return Conversation(_check_usable(turns))


def _parse_prompt_completion(row: Row) -> Record:
    """Parse strings, or lists of messages, in which only the completion's answers are supervised."""
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        context = [m._replace(supervised=m.role != "assistant") for m in _messages(prompt, "prompt")]
        return Conversation(_check_usable([*context, *_messages(completion, "completion")]), _tools(row))
    prompt, completion = _text(row, "prompt"), _text(row, "completion")
    if not completion:
        raise UnusableRow("empty completion")
    return Completion(prompt, completion)


def _parse_text(row: Row) -> PlainText:
    text = _text(row, "text")
    if not text.strip():
        raise UnusableRow("empty text")
    return PlainText(text)


def _parse_tokens(row: Row) -> Pretokenized:
    input_ids, labels = (_integers(row[key], key) for key in ("input_ids", "labels"))
    if len(input_ids) != len(labels):
        raise MalformedRow(
            f"input_ids has {len(input_ids)} tokens, but labels has {len(labels)}; give one label per token"
        )
    if any(label not in (-100, token) for token, label in zip(input_ids, labels, strict=True)):
        raise MalformedRow("each label should be the token at its position or -100; labels are not shifted")
    if not input_ids:
        raise UnusableRow("no tokens")
    return Pretokenized(input_ids, labels)


# The first format whose keys a row has is the row's format, so the more specific keys come first.
FORMATS: dict[str, tuple[tuple[str, ...], Callable[[Row], Record]]] = {
    "tokens": (("input_ids", "labels"), _parse_tokens),
    "sharegpt": (("conversations",), _parse_sharegpt),
    "messages": (("messages",), _parse_messages),
    "alpaca": (("instruction", "output"), _parse_alpaca),
    "prompt_completion": (("prompt", "completion"), _parse_prompt_completion),
    "text": (("text",), _parse_text),
}


def _messages(
    value: Any, key: str, role_keys: tuple[str, ...] = ("role",), content_keys: tuple[str, ...] = ("content",)
) -> list[Message]:
    if not isinstance(value, list):
        raise MalformedRow(f"{key} should be a list of messages, not a {type(value).__name__}")
    messages = []
    for number, item in enumerate(value, start=1):
        where = f"{key}, message {number}"
        if not isinstance(item, Mapping):
            raise MalformedRow(f"{where}: should be an object, not a {type(item).__name__}")
        role_key = next((key for key in role_keys if key in item), None)
        if role_key is None:
            raise MalformedRow(f"{where}: key {role_keys[0]!r} is missing; the message has {sorted(item)}")
        role = item[role_key]
        if not isinstance(role, str) or role.lower() not in ROLES:
            raise MalformedRow(f"{where}: unknown role {role!r}; known are {', '.join(ROLES)}")
        content_key = next((key for key in content_keys if key in item), content_keys[0])
        messages.append(_message(item, role.lower(), content_key, where))
    return messages


def _message(item: Mapping[str, Any], role: str, content_key: str, where: str) -> Message:
    content, calls = item.get(content_key), item.get("tool_calls")
    if not calls and isinstance(item.get("function_call"), Mapping):  # OpenAI's older name
        calls = [item["function_call"]]
    if role in CALL_ROLES and isinstance(content, str):
        calls, content = _json(content, f"{where}: {content_key!r}"), ""
        calls = calls if isinstance(calls, list) else [calls]
    if calls and not isinstance(calls, list):
        raise MalformedRow(f"{where}: 'tool_calls' should be a list, not {calls!r:.60}")
    if calls and content is None:
        content = ""
    if calls and ROLES[role] != "assistant":
        raise MalformedRow(f"{where}: only an assistant may have tool_calls")
    reasoning_keys = ("reasoning_content", "reasoning", "thinking")
    reasoning = next((item[key] for key in reasoning_keys if isinstance(item.get(key), str)), "")
    name, call_id = item.get("name"), item.get("tool_call_id")
    return Message(
        ROLES[role],
        _content(content, f"{where}: {content_key!r}"),
        supervised=_is_supervised(item, where),
        tool_calls=tuple(_tool_call(call, where) for call in calls or ()),
        reasoning=reasoning,
        name=name if isinstance(name, str) else "",
        tool_call_id=call_id if isinstance(call_id, str) else "",
    )


def _content(value: Any, where: str) -> str:
    """Return the text of a content: a string, or OpenAI's list of text parts, joined without a separator."""
    if isinstance(value, list):
        parts = [part.get("text") if isinstance(part, Mapping) else part for part in value]
        texts = [part for part in parts if isinstance(part, str)]
        if len(texts) < len(parts):
            raise MalformedRow(f"{where} has a part that is not text: {value!r:.60}")
        return "".join(texts)
    if not isinstance(value, str):
        raise MalformedRow(f"{where} should be text, not {value!r:.40}")
    return value


def _is_supervised(item: Mapping[str, Any], where: str) -> bool:
    """Whether the message may be supervised: OpenAI's `weight` of 0 or 1, or `train`."""
    for key in ("weight", "train"):
        value = item.get(key)
        if value is not None:
            if value not in (0, 1):
                raise MalformedRow(f"{where}: {key!r} should be 0 or 1, true or false, not {value!r:.40}")
            return bool(value)
    return True


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise MalformedRow(f"{where}: a tool call should be an object with name and arguments, not {call!r:.60}")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):  # OpenAI stores them as JSON text; templates expect an object
        arguments = _json(arguments or "{}", f"{where}: the arguments of a tool call")
    call_id = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return {"type": "function", **call_id, "function": {"name": function["name"], "arguments": arguments}}


def _tools(row: Row) -> list[dict[str, Any]] | None:
    """Return the row's tools, given as a list or as its JSON."""
    tools = row.get("tools")
    if isinstance(tools, str):
        tools = _json(tools, "key 'tools'") if tools.strip() else None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise MalformedRow(f"key 'tools' should be a list of functions' JSON schemas, not {tools!r:.60}")
    return [dict(tool) for tool in tools]


def _json(text: str, where: str) -> Any:
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise MalformedRow(f"{where} contains an unpaired surrogate, which is not a character") from None
    except (ValueError, RecursionError) as error:
        raise MalformedRow(f"{where} should be JSON: {error}") from None
    return value


def _integers(value: Any, key: str) -> list[int]:
    if not isinstance(value, list) or not all(type(item) is int for item in value):
        raise MalformedRow(f"key {key!r} should be a list of integers, not {value!r:.60}")
    return value


def _check_usable(messages: Sequence[Message]) -> tuple[Message, ...]:
    """Check that the messages contain an answer, and return them."""
    if not messages:
        raise UnusableRow("empty conversation")
    answers = [m for m in messages if m.role == "assistant" and (m.content.strip() or m.tool_calls)]
    if not answers:
        raise UnusableRow("no assistant turn")
    return tuple(messages)


def _text(row: Row, key: str, default: str | None = None) -> str:
    value = row.get(key)
    if value is None and default is not None:
        return default
    if not isinstance(value, str):
        raise MalformedRow(f"key {key!r} should be text, not {value!r:.40}")
    return value
