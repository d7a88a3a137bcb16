"""Parse a row of any supported format into a record: a conversation, a prompt with its completion, text or tokens.

To add a format, write a `_parse_…` function and add it to `FORMATS`; keys that it may also have go to `OPTIONAL_KEYS`.
No key is ignored silently: it is used, it is an error, or the record has a note that it is not used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lora_accel.data.messages import (
    SHAREGPT_KEYS,
    check_media,
    has_value,
    parse_flag,
    parse_messages,
    unused_keys,
)
from lora_accel.data.records import (
    Completion,
    Conversation,
    MalformedRow,
    Message,
    PlainText,
    Pretokenized,
    Record,
    Row,
    UnusableRow,
)
from lora_accel.data.tools import parse_json, parse_tools
from lora_accel.errors import ConfigError, did_you_mean, join_or


def detect_format(row: Row) -> str:
    """Return the format whose keys the row has.

    Raises:
        MalformedRow: no supported format has these keys.
    """
    with_value = {key for key, value in row.items() if value is not None}
    for given in (with_value, row.keys()):  # in a table, a row has the keys of all rows
        for name, (keys, _) in FORMATS.items():
            if given >= {*keys}:
                return name
    if len(row) == 1 and (separator := next((mark for mark in ";\t|" if mark in next(iter(row))), None)):
        raise MalformedRow(
            f"the only column is {next(iter(row))!r}: its names are separated by {separator!r}, but a csv file needs "
            "commas; save it with commas, or with tabs as .tsv"
        )
    known = "; ".join(f"{name}: {' + '.join(keys)}" for name, (keys, _) in FORMATS.items())
    raise MalformedRow(
        f"no known format has the keys {sorted(row)}; known are {known}. "
        f"Map other names with columns: {{known name: name in the file}}{_suggest_columns(row)}"
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
        MalformedRow: a key is missing, a value has the wrong type, a role is unknown, two values contradict each other,
            or a key that changes the meaning of the row is not supported.
        UnusableRow: the row has nothing to train on.
    """
    keys, parse = FORMATS[data_format]
    for key in keys:
        if key not in row:
            other = next((name for name, (keys, _) in FORMATS.items() if row.keys() >= {*keys}), None)
            hint = f". This row is of format: {other}" if other else _suggest_columns(row)
            raise MalformedRow(
                f"key {key!r} of format {data_format} is missing; the row has {sorted(row)}. Fix the row, or map "
                f"other names with columns: {{known name: name in the file}}{hint}"
            )
    if data_format not in ("text", "tokens"):
        check_media(row)
        _check_label(row)
    record = parse(row)
    unknown = row.keys() - OPTIONAL_KEYS.get(data_format, frozenset()).union(keys)
    if isinstance(record, Conversation):
        unknown -= CONVERSATION_KEYS
    if has_value(row.get("loss_mask")) and ("loss_mask" in unknown or data_format == "alpaca"):
        raise MalformedRow(
            f"key 'loss_mask' is not supported in format {data_format}, only beside a list of messages; remove it"
        )
    if unknown:
        record = record._replace(notes=(*record.notes, *unused_keys(row, unknown)))
    return record


def _parse_sharegpt(row: Row) -> Conversation:
    """Parse scraped turns: drop answers before the first question, and join consecutive turns of one role."""
    notes: list[str] = []
    mask = _loss_mask(row, row["conversations"])
    messages = parse_messages(row["conversations"], "conversations", notes, SHAREGPT_KEYS, mask)
    first = next((i for i, message in enumerate(messages) if message.role in ("user", "tool")), len(messages))
    kept = [m for i, m in enumerate(messages) if m.role != "assistant" or i > first]
    if len(kept) < len(messages):
        if first == len(messages):
            raise UnusableRow("no user message")
        notes.append("answers before the first question are left out")
    joined: list[Message] = []
    for message in _add_system(row, kept):
        last = joined[-1] if joined else None
        if last and last.role != "tool" and last == message._replace(content=last.content) and _is_plain(last):
            texts = [text for text in (last.content, message.content) if text.strip()]
            joined[-1] = last._replace(content="\n\n".join(texts))
            notes.append("consecutive turns of one role are joined with an empty line")
        else:
            joined.append(message)
    return _conversation(row, joined, notes)


def _is_plain(message: Message) -> bool:
    return not (message.tool_calls or message.unsupervised)


def _parse_messages(row: Row) -> Conversation:
    notes: list[str] = []
    messages = parse_messages(row["messages"], "messages", notes, loss_mask=_loss_mask(row, row["messages"]))
    return _conversation(row, _add_system(row, messages), notes)


def _parse_alpaca(row: Row) -> Conversation:
    """Parse an instruction; its input, if there is one, follows it under Alpaca's heading."""
    question, extra = _text(row, "instruction"), _text(row, "input", default="")
    if extra.strip():
        question = f"{question}\n\n### Input:\n{extra}" if question.strip() else extra
    turns = []
    history = row.get("history")
    if isinstance(history, str):  # a column of a csv file
        history = parse_json(history, "key 'history'") if history.strip() else None
    if not isinstance(history or [], list):
        raise MalformedRow(f"history should be a list of [question, answer] pairs, not {history!r:.60}")
    for pair in history or []:
        if not (isinstance(pair, (list, tuple)) and len(pair) == 2 and all(isinstance(x, str) for x in pair)):
            raise MalformedRow(f"history should contain [question, answer] pairs, not {pair!r:.60}")
        turns += [Message("user", pair[0]), Message("assistant", pair[1])]
    turns += [Message("user", question), Message("assistant", _text(row, "output"))]
    return _conversation(row, _add_system(row, turns), [])


def _parse_prompt_completion(row: Row) -> Record:
    """Parse strings, or lists of messages, in which only the completion's answers are supervised."""
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        notes: list[str] = []
        mask = _loss_mask(row, [*prompt, *completion]) or []
        context = parse_messages(prompt, "prompt", notes, loss_mask=mask[: len(prompt)])
        context = [m._replace(supervised=m.role != "assistant") for m in context]
        answer = parse_messages(completion, "completion", notes, loss_mask=mask[len(prompt) :])
        if context or answer:
            _check_answers(answer)
        return _conversation(row, [*_add_system(row, context), *answer], notes)
    prompt, completion = _text(row, "prompt"), _text(row, "completion")
    if not completion.strip():
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
    if has_value(mask := row.get("attention_mask")) and mask != [1] * len(input_ids):
        raise MalformedRow("attention_mask should be 1 for every token of input_ids; remove the padding from the row")
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
OPTIONAL_KEYS = {"alpaca": frozenset(("input", "history")), "tokens": frozenset(("attention_mask",))}
"""Keys that a row of the format may also have."""
SYSTEM_KEYS = ("system", "system_prompt")
CONVERSATION_KEYS = frozenset((*SYSTEM_KEYS, "tools", "functions", "loss_mask", "chat_template_kwargs"))
"""Keys that a row of messages may also have, in any format."""
PROMPT_NAMES = ("instruction", "prompt", "question", "query", "problem")
ANSWER_NAMES = ("output", "completion", "response", "answer", "solution", "chosen")
"""Names of public datasets for a question and its answer, to suggest `columns`."""
RENDERING_KEYS = frozenset(("messages", "tools", "add_generation_prompt"))
"""Variables of a chat template that a row cannot set, since rendering does."""


def _conversation(row: Row, messages: list[Message], notes: list[str]) -> Conversation:
    """Return the conversation of a row: its messages, and the keys beside them."""
    if not messages:
        raise UnusableRow("empty conversation")
    if messages[-1].role != "assistant" and has_value(row.get("chosen")):
        raise MalformedRow(
            "the answer to the last message is in 'chosen': preference data is not supported; append the chosen "
            "answer to the messages"
        )
    _check_answers(messages)
    for number, message in enumerate(messages):
        if message.role == "assistant" and message.supervised and _is_empty(message):
            messages[number] = message._replace(supervised=False)
            notes.append("an empty answer is not supervised")
    return Conversation(tuple(messages), parse_tools(row), tuple(dict.fromkeys(notes)), _template_kwargs(row))


def _is_empty(message: Message) -> bool:
    return not (message.content.strip() or message.tool_calls or message.reasoning)


def _check_answers(messages: Sequence[Message]) -> None:
    """Check that the messages contain an answer that is not empty."""
    answers = [message for message in messages if message.role == "assistant"]
    if not answers:
        raise UnusableRow("no assistant turn")
    if all(map(_is_empty, answers)):
        raise UnusableRow("empty answer")


def _add_system(row: Row, messages: Sequence[Message]) -> list[Message]:
    """Put the system text of a row before its messages."""
    texts = {key: text for key in SYSTEM_KEYS if key in row and (text := _text(row, key, default="")).strip()}
    if len(set(texts.values())) > 1:
        raise MalformedRow("keys 'system' and 'system_prompt' differ; keep one of them")
    if not texts:
        return list(messages)
    key, text = next(iter(texts.items()))
    own = messages[0].content if messages and messages[0].role == "system" else None
    if own is not None and own.strip() not in ("", text.strip()):
        raise MalformedRow(
            f"key {key!r} is {text!r:.60}, but the messages begin with the system text {own!r:.60}; keep one of them"
        )
    return [Message("system", text), *messages[0 if own is None else 1 :]]


def _loss_mask(row: Row, messages: Any) -> list[bool] | None:
    """Return for each message whether the row includes it in the loss; None without a `loss_mask`."""
    mask = row.get("loss_mask")
    if not has_value(mask):
        return None
    if not isinstance(mask, list) or not isinstance(messages, list) or len(mask) != len(messages):
        raise MalformedRow(
            f"key 'loss_mask' should be a list of 0 or 1, one for each of the messages, not {mask!r:.60}; other masks "
            "are not supported"
        )
    flags = [parse_flag(flag, "each item of 'loss_mask'") for flag in mask]
    if None in flags:
        raise MalformedRow(f"each item of 'loss_mask' should be 0 or 1, not null: {mask!r:.60}")
    return [bool(flag) for flag in flags]


def _template_kwargs(row: Row) -> dict[str, Any] | None:
    """Return the variables that a row sets for its chat template, given as an object or as its JSON text."""
    kwargs = row.get("chat_template_kwargs")
    if isinstance(kwargs, str) and kwargs.strip():
        kwargs = parse_json(kwargs, "key 'chat_template_kwargs'")
    if not kwargs or not has_value(kwargs):
        return None
    if not isinstance(kwargs, Mapping):
        raise MalformedRow(f"key 'chat_template_kwargs' should be an object, not {kwargs!r:.60}")
    if reserved := RENDERING_KEYS & kwargs.keys():
        raise MalformedRow(f"key 'chat_template_kwargs' may not set {sorted(reserved)}; remove it from there")
    return dict(kwargs)


def _check_label(row: Row) -> None:
    """Check that the row is no example of what a model should not answer."""
    for key in ("label", "kto_tag"):
        if row.get(key) is False:
            raise MalformedRow(
                f"key {key!r} is false, which marks an answer as undesirable in preference data (KTO); such answers "
                "are not supported: remove these rows, or the key if it means something else"
            )


def _suggest_columns(row: Row) -> str:
    """Return how to read a row whose names are not of the format, or an empty string."""
    named = [key for key, value in row.items() if _is_message_list(value)]
    texts = [key for key, value in row.items() if isinstance(value, str)]
    prompts = [key for key in PROMPT_NAMES if key in texts] or [key for key in texts if key == "input"]
    answers = [key for key in ANSWER_NAMES if key in texts]
    if "chosen" in named and "prompt" in named:
        columns = "columns: {completion: chosen}"
    elif "chosen" in named or len(named) == 1:
        key = "chosen" if "chosen" in named else named[0]
        columns = _columns({"conversations" if "from" in row[key][0] else "messages": key})
    elif len(prompts) == len(answers) == 1:
        chat = _columns({"instruction": prompts[0], "output": answers[0]})
        raw = _columns({"prompt": prompts[0], "completion": answers[0]})
        columns = f"{chat} with the chat template, {raw} without"
    elif len(row) == len(texts) == 2:
        question, answer = sorted(
            texts, key=lambda key: key in answers or -(key in prompts)
        )  # else in the file's order
        columns = f"{_columns({'instruction': question, 'output': answer})}, if {answer!r} is the answer"
    else:
        columns = ""
    if "chosen" in row and "rejected" in row:
        how = f"to train on the chosen answers, use {columns}" if columns else "only the chosen answers can be used"
        return f". Preference data is not supported; {how}"
    return f". For this row: {columns}" if columns else ""


def _is_message_list(value: Any) -> bool:
    first = value[0] if isinstance(value, list) and value else None
    return isinstance(first, Mapping) and any(
        {*pair} <= first.keys() for pair in (("role", "content"), ("from", "value"))
    )


def _columns(names: dict[str, str]) -> str:
    renamed = ", ".join(f"{name}: {key}" for name, key in names.items() if name != key)
    return f"columns: {{{renamed}}}"


def _integers(value: Any, key: str) -> list[int]:
    if not isinstance(value, list) or not all(type(item) is int for item in value):
        raise MalformedRow(f"key {key!r} should be a list of integers, not {value!r:.60}")
    return value


def _text(row: Row, key: str, default: str | None = None) -> str:
    value = row.get(key)
    if value is None and default is not None:
        return default
    if not isinstance(value, str):
        raise MalformedRow(f"key {key!r} should be text, not {value!r:.40}")
    return value
