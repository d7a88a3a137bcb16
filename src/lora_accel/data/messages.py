"""Parse the messages of a conversation: roles, contents, and which answers carry loss."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from lora_accel.data.records import MalformedRow, Message
from lora_accel.data.tools import parse_json, parse_tool_call

ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "ai", "chatgpt", "bing", "bard"), "assistant"),
    **dict.fromkeys(("function_call", "tool_call"), "assistant"),  # an answer that is a tool call
    **dict.fromkeys(("tool", "observation", "function", "function_response", "tool_response", "ipython"), "tool"),
}
"""Role names found in datasets, in lower case, and the four roles they map to."""
CALL_ROLES = ("function_call", "tool_call")

FLAG_KEYS = frozenset(("weight", "train", "training", "trainable", "loss", "mask"))
"""Whether an answer carries loss: `weight` of OpenAI, `train` and `training` of axolotl, `loss` of ms-swift; `mask`
excludes it."""
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
MEDIA_KEYS = frozenset(("image", "images", "video", "videos", "audio", "audios"))
TEXT_PARTS = (None, "text", "input_text", "output_text")
"""The types of content parts that are text."""


class MessageKeys(NamedTuple):
    """The names of a message's keys. Of several names, the first one that has a value is used."""

    role: tuple[str, ...]
    content: tuple[str, ...]


OPENAI_KEYS = MessageKeys(("role",), ("content",))
SHAREGPT_KEYS = MessageKeys(("from", "role"), ("value", "content"))
OTHER_KEYS = FLAG_KEYS.union(REASONING_KEYS, ("tool_calls", "function_call", "name", "tool_call_id", "train_detail"))
"""All other keys of a message that are used."""


def parse_messages(
    value: Any, key: str, notes: list[str], keys: MessageKeys = OPENAI_KEYS, loss_mask: Sequence[bool] | None = None
) -> list[Message]:
    """Parse a list of messages.

    Args:
        key: the key of the list in its row, for errors.
        notes: gets a note for each kind of key that is not used.
        loss_mask: for each message whether it carries loss; None = the messages decide.

    Raises:
        MalformedRow: a role is unknown, a value has the wrong type, or two values contradict each other.
    """
    if isinstance(value, str):  # a column of a CSV file
        value = parse_json(value, f"key {key!r}")
    if not isinstance(value, list):
        raise MalformedRow(f"{key} should be a list of messages, not a {type(value).__name__}")
    messages = []
    for number, item in enumerate(value, start=1):
        where = f"{key}, message {number}"
        if not isinstance(item, Mapping):
            raise MalformedRow(f"{where}: should be an object, not a {type(item).__name__}")
        messages.append(_message(item, keys, where, notes, loss_mask[number - 1] if loss_mask else None))
    return messages


def _message(
    item: Mapping[str, Any], keys: MessageKeys, where: str, notes: list[str], row_flag: bool | None
) -> Message:
    role, content_key = _role(item, keys, where), _first(item, keys.content)
    content = item.get(content_key)
    if len(item) == 2 and isinstance(content, str) and row_flag is None and role not in CALL_ROLES:
        return Message(ROLES[role], content)  # as most messages are
    if unknown := item.keys() - OTHER_KEYS.union(*keys):
        check_media(item, f"{where}: ")
        notes += [f"message {note}" for note in unused_keys(item, unknown)]
    calls = _tool_calls(item, where)
    if role in CALL_ROLES and isinstance(content, str):
        calls, content = parse_json(content, f"{where}: {content_key!r}"), ""
        calls = calls if isinstance(calls, list) else [calls]
    if calls and content is None:
        content = ""
    if calls and ROLES[role] != "assistant":
        raise MalformedRow(f"{where}: only an assistant may have tool_calls")
    texts = {}
    for key in ("name", "tool_call_id"):
        texts[key] = item.get(key) or ""
        if not isinstance(texts[key], str):
            texts[key] = ""
            notes.append(f"message key {key!r} is not used")
    text = parse_content(content, f"{where}: {content_key!r}")
    flag = _loss_flag(item, where, row_flag)
    unsupervised: tuple[tuple[int, int], ...] = ()
    if ROLES[role] == "assistant":
        unsupervised = _unsupervised(item, text, where, notes)
    elif flag or has_value(item.get("train_detail")):
        notes.append("loss flags of messages that are not answers are not used")
    is_excluded = flag is False or (unsupervised == ((0, len(text)),) and not calls)
    return Message(
        ROLES[role],
        text,
        supervised=not is_excluded,
        tool_calls=tuple(parse_tool_call(call, where) for call in calls),
        reasoning=_reasoning(item, where),
        **texts,
        unsupervised=() if is_excluded else unsupervised,
    )


def _first(item: Mapping[str, Any], keys: Sequence[str]) -> str:
    """Return the first of the keys that has a value, else the first one that is there, else the first one."""
    for key in keys:
        if item.get(key) is not None:
            return key
    return next((key for key in keys if key in item), keys[0])


def _role(item: Mapping[str, Any], keys: MessageKeys, where: str) -> str:
    key = _first(item, keys.role)
    if key not in item:
        hint = ""
        if "from" in item and "value" in item:
            hint = "; messages of 'from' and 'value' are read by format: sharegpt, columns: {conversations: messages}"
        raise MalformedRow(f"{where}: key {key!r} is missing; the message has {sorted(item)}{hint}")
    role = item[key]
    if not isinstance(role, str) or role.lower() not in ROLES:
        raise MalformedRow(f"{where}: unknown role {role!r}; known are {', '.join(ROLES)}")
    return role.lower()


def _tool_calls(item: Mapping[str, Any], where: str) -> list[Any]:
    """Return the calls of a message: `tool_calls`, or `function_call`, which is OpenAI's older name of a single one."""
    calls, call = item.get("tool_calls"), item.get("function_call")
    if isinstance(calls, str) and calls.strip():
        calls = parse_json(calls, f"{where}: 'tool_calls'")
    if calls and call:
        raise MalformedRow(f"{where}: has 'tool_calls' and 'function_call'; keep one of them")
    if calls and not isinstance(calls, list):
        raise MalformedRow(f"{where}: 'tool_calls' should be a list, not {calls!r:.60}")
    return calls or ([call] if call else [])


def _reasoning(item: Mapping[str, Any], where: str) -> str:
    texts = {key: parse_content(item[key], f"{where}: {key!r}") for key in REASONING_KEYS if item.get(key)}
    texts = {key: text for key, text in texts.items() if text.strip()}
    if len(set(texts.values())) > 1:
        raise MalformedRow(f"{where}: {_join_and(texts)} differ; keep one of them")
    return next(iter(texts.values()), "")


def parse_content(value: Any, where: str) -> str:
    """Return the text of a content: a string, or OpenAI's list of text parts, joined without a separator.

    Raises:
        MalformedRow: it is not text.
    """
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise MalformedRow(f"{where} should be text, not {value!r:.40}")
    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in TEXT_PARTS:
            raise MalformedRow(
                f"{where} has a part of type {kind!r:.40}; only text is supported, not images, video, audio or other "
                "parts; remove these rows, or the parts that the text does not need"
            )
        text = part.get("text") if isinstance(part, Mapping) else part
        if not isinstance(text, str):
            raise MalformedRow(f"{where} has a part that is not text: {part!r:.60}")
        texts.append(text)
    return "".join(texts)


def parse_flag(value: Any, where: str) -> bool | None:
    """Return a flag that is 0 or 1, true or false, as a number or as text; None for null and for an empty value.

    Raises:
        MalformedRow: it is something else.
    """
    if isinstance(value, str):
        as_text = {"0": False, "0.0": False, "false": False, "1": True, "1.0": True, "true": True}
        value = as_text.get(value.strip().lower(), value.strip())
    value = value if has_value(value) else None
    if value is not None and value not in (0, 1):
        raise MalformedRow(f"{where} should be 0 or 1, true or false, not {value!r:.40}")
    return None if value is None else bool(value)


def _loss_flag(item: Mapping[str, Any], where: str, row_flag: bool | None) -> bool | None:
    """Return whether the flags of the message and its row include it in the loss; None without a flag."""
    given = {} if row_flag is None else {"loss_mask": row_flag}
    for key in sorted(FLAG_KEYS & item.keys()):
        flag = parse_flag(item[key], f"{where}: {key!r}")
        if flag is not None:
            given[key] = not flag if key == "mask" else flag
    if len(set(given.values())) > 1:
        raise MalformedRow(f"{where}: {_join_and(given)} contradict each other; keep one of them")
    return next(iter(given.values()), None)


def _unsupervised(item: Mapping[str, Any], content: str, where: str, notes: list[str]) -> tuple[tuple[int, int], ...]:
    """Return the characters [start, end) of the content that `train_detail`, axolotl's key, excludes from the loss.

    As in axolotl, `end_offset` is the last character, and characters that no entry covers carry no loss.
    """
    details = item.get("train_detail")
    if not has_value(details):
        return ()
    where = f"{where}: 'train_detail'"
    if not isinstance(details, list):
        raise MalformedRow(f"{where} should be a list of begin_offset, end_offset and train, not {details!r:.60}")
    ranges = sorted(_detail(detail, len(content), where) for detail in details)
    for (_, end, _), (start, _, _) in itertools.pairwise(ranges):
        if start < end:
            raise MalformedRow(f"{where}: two entries cover character {start}; end_offset is the last character")
    if sum(end - start for start, end, _ in ranges) < len(content):
        notes.append("characters of an answer that train_detail does not cover are not supervised")
    supervised = [(start, end) for start, end, is_trained in ranges if is_trained]
    starts, ends = [0, *(end for _, end in supervised)], [*(start for start, _ in supervised), len(content)]
    return tuple((start, end) for start, end in zip(starts, ends, strict=True) if start < end)


def _detail(detail: Any, length: int, where: str) -> tuple[int, int, bool]:
    """Return the characters [start, end) of an entry of `train_detail`, and whether they carry loss."""
    if not isinstance(detail, Mapping):
        raise MalformedRow(f"{where} should contain objects of begin_offset, end_offset and train, not {detail!r:.60}")
    begin, last = detail.get("begin_offset"), detail.get("end_offset")
    if type(begin) is not int or type(last) is not int or not 0 <= begin <= last < length:
        raise MalformedRow(
            f"{where}: begin_offset and end_offset (the last character) should be from 0 to {length - 1} in order, "
            f"not {begin!r:.20} and {last!r:.20}"
        )
    is_trained = parse_flag(detail.get("train"), f"{where}: 'train'")
    if is_trained is None:
        raise MalformedRow(f"{where}: 'train' is missing in {dict(detail)!r:.80}")
    return begin, last + 1, is_trained


def check_media(item: Mapping[str, Any], where: str = "") -> None:
    """Check that a row or a message has no images, videos or audio.

    Args:
        where: beginning of the error.

    Raises:
        MalformedRow: it has.
    """
    for key in sorted(MEDIA_KEYS & item.keys()):
        if has_value(item[key]):
            raise MalformedRow(
                f"{where}key {key!r} is not supported: images, video and audio cannot be trained on; remove these "
                "rows, or the key where the text does not need it"
            )


def has_value(value: Any) -> bool:
    """Whether a value is more than null, an empty text, an empty object, or a list of such values."""
    if isinstance(value, list):
        return any(map(has_value, value))
    return value is not None and value not in ("", {})


def unused_keys(item: Mapping[str, Any], unknown: Collection[str]) -> list[str]:
    """Return a note for each of the unknown keys that has a value."""
    return [f"key {key!r:.60} is not used" for key in sorted(unknown) if has_value(item[key])]


def _join_and(names: Collection[str]) -> str:
    """Return `'a', 'b' and 'c'`."""
    *rest, last = map(repr, names)
    return f"{', '.join(rest)} and {last}"
