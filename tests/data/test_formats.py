"""Rows of each format: valid, unusual and malformed."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_accel.data.formats import FORMATS, detect_format, parse_row
from lora_accel.data.records import (
    Completion,
    Conversation,
    MalformedRow,
    Message,
    PlainText,
    Pretokenized,
    Record,
    UnusableRow,
)


def conversation(*turns: tuple[str, str], notes: tuple[str, ...] = (), **more: Any) -> Conversation:
    return Conversation(tuple(Message(role, content) for role, content in turns), notes=notes, **more)


def sharegpt(*turns: tuple[str, str], **more: Any) -> dict[str, Any]:
    return {"conversations": [{"from": role, "value": text} for role, text in turns], **more}


def messages(*turns: tuple[str, str], **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": text} for role, text in turns], **more}


def unused(*keys: str) -> tuple[str, ...]:
    return tuple(f"key {key!r} is not used" for key in keys)


def parse(row: dict[str, Any]) -> Conversation:
    record = parse_row(row, detect_format(row))
    assert isinstance(record, Conversation)
    return record


QUESTION_AND_ANSWER = conversation(("user", "q"), ("assistant", "a"))
WITH_SYSTEM = conversation(("system", "s"), ("user", "q"), ("assistant", "a"))
ASKED = (("user", "q"), ("assistant", "a"))
USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    ("row", "data_format", "record"),
    [
        (sharegpt(("human", "q"), ("gpt", "a"), id="x1"), "sharegpt", QUESTION_AND_ANSWER._replace(notes=unused("id"))),
        (sharegpt(("user", "q"), ("assistant", "a")), "sharegpt", QUESTION_AND_ANSWER),
        (sharegpt(("human", "q"), ("model", "a"), system=None), "sharegpt", QUESTION_AND_ANSWER),
        (
            sharegpt(("human", "q"), ("gpt", "a"), system="s"),
            "sharegpt",
            conversation(("system", "s"), ("user", "q"), ("assistant", "a")),
        ),
        (
            sharegpt(("human", "q"), ("observation", "o"), ("gpt", "a")),
            "sharegpt",
            conversation(("user", "q"), ("tool", "o"), ("assistant", "a")),
        ),
        (messages(("user", "q"), ("assistant", "a")), "messages", QUESTION_AND_ANSWER),
        (messages(("assistant", " a ")), "messages", conversation(("assistant", " a "))),
        (
            messages(("system", "s"), ("user", ""), ("assistant", "b"), ("user", "q"), ("assistant", "a")),
            "messages",
            conversation(("system", "s"), ("user", ""), ("assistant", "b"), ("user", "q"), ("assistant", "a")),
        ),
        ({"instruction": "q", "output": "a"}, "alpaca", QUESTION_AND_ANSWER),
        ({"instruction": "q", "input": "", "output": "a"}, "alpaca", QUESTION_AND_ANSWER),
        ({"instruction": "q", "input": None, "output": "a", "history": None}, "alpaca", QUESTION_AND_ANSWER),
        (
            {"instruction": "q", "input": "i", "output": "a"},
            "alpaca",
            conversation(("user", "q\n\n### Input:\ni"), ("assistant", "a")),
        ),
        (
            {"instruction": "q", "output": "a", "system": "s", "history": [["q0", "a0"]]},
            "alpaca",
            conversation(("system", "s"), ("user", "q0"), ("assistant", "a0"), ("user", "q"), ("assistant", "a")),
        ),
        ({"prompt": "p", "completion": "c"}, "prompt_completion", Completion("p", "c")),
        ({"prompt": "", "completion": " c"}, "prompt_completion", Completion("", " c")),
        (
            {"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]},
            "prompt_completion",
            QUESTION_AND_ANSWER,
        ),
        ({"text": " t\n"}, "text", PlainText(" t\n")),
        ({"input_ids": [1, 2, 3], "labels": [-100, 2, -100]}, "tokens", Pretokenized([1, 2, 3], [-100, 2, -100])),
        (
            messages(("developer", "s"), ("user", "q"), ("function", "o"), ("ipython", "p"), ("Assistant", "a")),
            "messages",
            conversation(("system", "s"), ("user", "q"), ("tool", "o"), ("tool", "p"), ("assistant", "a")),
        ),
        # Consecutive turns of one role are joined in ShareGPT's format only.
        (
            messages(("user", "q"), ("user", "r"), ("assistant", "a")),
            "messages",
            conversation(("user", "q"), ("user", "r"), ("assistant", "a")),
        ),
        # In a table, keys of other rows are null.
        ({"conversations": None, "messages": [USER, ASSISTANT], "text": None}, "messages", QUESTION_AND_ANSWER),
        ({"messages": None, "prompt": "p", "completion": "c"}, "prompt_completion", Completion("p", "c")),
        # The more specific key decides; a note names the others.
        (
            messages(*ASKED, text="t", prompt="p", completion="c"),
            "messages",
            QUESTION_AND_ANSWER._replace(notes=unused("completion", "prompt", "text")),
        ),
        ({"prompt": "p", "text": "t"}, "text", PlainText("t", unused("prompt"))),
    ],
)
def test_the_format_of_a_row_is_detected_and_parsed(row: dict[str, Any], data_format: str, record: Record) -> None:
    assert detect_format(row) == data_format
    assert parse_row(row, data_format) == record


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (messages(), "empty conversation"),
        (sharegpt(), "empty conversation"),
        (messages(("user", "q")), "no assistant turn"),
        (messages(("user", "q"), ("assistant", " \n")), "empty answer"),
        (messages(("user", "q"), ("assistant", ""), ("user", "q"), ("assistant", "\t")), "empty answer"),
        (sharegpt(("human", "q"), ("gpt", " ")), "empty answer"),
        ({"instruction": "q", "output": ""}, "empty answer"),
        ({"instruction": "q", "output": " \n", "history": [["q0", " "]]}, "empty answer"),
        ({"prompt": [USER], "completion": [{"role": "assistant", "content": ""}]}, "empty answer"),
        ({"prompt": [USER, ASSISTANT], "completion": [{"role": "assistant", "content": ""}]}, "empty answer"),
        ({"prompt": [USER, ASSISTANT], "completion": [USER]}, "no assistant turn"),
        ({"prompt": [], "completion": []}, "empty conversation"),
        ({"prompt": "p", "completion": ""}, "empty completion"),
        ({"prompt": "p", "completion": " \n\u3000"}, "empty completion"),
        ({"text": ""}, "empty text"),
        ({"text": " \n\t"}, "empty text"),
        ({"input_ids": [], "labels": []}, "no tokens"),
        (sharegpt(("gpt", "a")), "no user message"),
        (sharegpt(("system", "s"), ("gpt", "a")), "no user message"),
        (sharegpt(("gpt", "a"), ("human", "q")), "no assistant turn"),
    ],
)
def test_an_unusable_row_has_a_reason(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnusableRow, match=f"^{reason}$"):
        parse_row(row, detect_format(row))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({}, r"no known format has the keys \[\]"),
        ({"prompt": "p"}, r"no known format has the keys \['prompt'\]"),
        ({"conversations": [{"from": "human"}]}, "conversations, message 1: 'value' should be text, not None"),
        (
            {"conversations": [{"content": "q", "speaker": "user"}]},
            r"message 1: key 'from' is missing; .*\['content', 'speaker'\]",
        ),
        ({"conversations": {"from": "human"}}, "conversations should be a list of messages, not a dict"),
        ({"messages": None}, "messages should be a list of messages, not a NoneType"),
        ({"messages": [{"role": "Usr", "content": "q"}]}, "unknown role 'Usr'; known are system, developer, user"),
        ({"messages": [{"role": {}, "content": "q"}]}, "unknown role {}"),
        ({"messages": [{"role": "user", "content": [{"image": "q"}]}]}, "'content' has a part that is not text"),
        ({"messages": [{"from": "human", "value": "q"}]}, "'role' is missing; .* format: sharegpt, columns: {conv"),
        ({"messages": [["user", "q"]]}, "message 1: should be an object, not a list"),
        ({"instruction": "q", "output": None}, "key 'output' should be text, not None"),
        ({"instruction": "q", "output": "a", "input": 3}, "key 'input' should be text, not 3"),
        ({"instruction": "q", "output": "a", "history": "x"}, "key 'history' should be JSON"),
        ({"instruction": "q", "output": "a", "history": [["q", None]]}, "history should contain"),
        ({"prompt": "p", "completion": [{"role": "assistant", "content": "a"}]}, "key 'completion' should be text"),
        ({"text": 5}, "key 'text' should be text, not 5"),
        ({"conversations": [], "system": 5}, "empty conversation|key 'system' should be text"),
    ],
)
def test_a_malformed_row_names_the_error(row: dict[str, Any], reason: str) -> None:
    with pytest.raises((MalformedRow, UnusableRow), match=reason):
        parse_row(row, detect_format(row))


@pytest.mark.parametrize("data_format", FORMATS)
def test_a_missing_key_of_an_explicit_format_is_named(data_format: str) -> None:
    key = FORMATS[data_format][0][0]
    with pytest.raises(MalformedRow, match=rf"key '{key}' of format {data_format} is missing; the row has \['other'\]"):
        parse_row({"other": "x"}, data_format)


KEYS = [
    "conversations",
    "messages",
    "instruction",
    "input",
    "output",
    "system",
    "history",
    "prompt",
    "completion",
    "text",
    "input_ids",
    "labels",
    "tools",
    "functions",
    "loss_mask",
    "chat_template_kwargs",
    "images",
]
INNER = ["from", "value", "role", "content", "tool_calls", "function", "name", "arguments", "weight", "text"]
INNER += ["type", "parameters", "mask", "train_detail", "begin_offset", "end_offset", "train", "thinking", "image"]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(0, 2) | st.floats(0, 1) | st.sampled_from(["", "user", "gpt", "x"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(INNER), inner, max_size=4),
    max_leaves=8,
)


@given(row=st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=5))
@settings(derandomize=True, deadline=None)
def test_any_row_is_parsed_or_raises_a_data_error(row: dict[str, Any]) -> None:
    try:
        record = parse_row(row, detect_format(row))
    except (MalformedRow, UnusableRow):
        return
    if isinstance(record, Conversation):
        assert any(message.role == "assistant" for message in record.messages)
        assert all(message.supervised or not message.unsupervised for message in record.messages)
    elif isinstance(record, Pretokenized):
        assert len(record.input_ids) == len(record.labels)
    else:
        assert all(isinstance(text, str) for text in (*record[:-1], *record.notes))


# Documented rules.


def test_answers_before_the_first_question_are_left_out() -> None:
    row = sharegpt(("gpt", "Hi!"), ("system", "s"), ("gpt", "Well?"), ("human", "q"), ("gpt", "a"))
    record = parse_row(row, "sharegpt")
    assert isinstance(record, Conversation)
    assert record.messages == (Message("system", "s"), *QUESTION_AND_ANSWER.messages)
    assert record.notes == ("answers before the first question are left out",)
    with pytest.raises(UnusableRow, match="no user message"):
        parse_row(sharegpt(("gpt", "Hi!"), ("gpt", "a")), "sharegpt")


def test_consecutive_turns_of_one_role_are_joined() -> None:
    row = sharegpt(("human", "q"), ("user", "r"), ("gpt", "a"), ("chatgpt", "b"), ("observation", "o"), ("tool", "p"))
    record = parse_row(row, "sharegpt")
    assert isinstance(record, Conversation)
    assert record.messages == conversation(
        ("user", "q\n\nr"), ("assistant", "a\n\nb"), ("tool", "o"), ("tool", "p")
    ).messages  # fmt: skip
    assert record.notes == ("consecutive turns of one role are joined with an empty line",)
    # An unsupervised answer is not joined to a supervised one.
    turns = [{"from": "gpt", "value": "a", "weight": 0}, {"from": "gpt", "value": "b"}]
    record = parse_row({"conversations": [{"from": "human", "value": "q"}, *turns]}, "sharegpt")
    assert isinstance(record, Conversation)
    assert [(m.content, m.supervised) for m in record.messages] == [("q", True), ("a", False), ("b", True)]


def test_tool_calls_are_not_joined() -> None:
    call = '{"name": "f", "arguments": {}}'
    row = sharegpt(("human", "q"), ("gpt", "a"), ("function_call", call), ("tool_call", call), ("gpt", "b"))
    record = parse_row(row, "sharegpt")
    assert isinstance(record, Conversation)
    assert [(m.content, len(m.tool_calls)) for m in record.messages[1:]] == [("a", 0), ("", 1), ("", 1), ("b", 0)]
    assert record.notes == ()


def test_a_function_call_turn_may_contain_several_calls() -> None:
    calls = '[{"name": "f"}, {"name": "g", "arguments": {"x": 1}}]'
    record = parse_row(sharegpt(("human", "q"), ("function_call", calls)), "sharegpt")
    assert isinstance(record, Conversation)
    functions = [call["function"] for call in record.messages[1].tool_calls]
    assert functions == [{"name": "f", "arguments": {}}, {"name": "g", "arguments": {"x": 1}}]


@pytest.mark.parametrize("role", ["Human", "prompter", "USER"])
@pytest.mark.parametrize("answers", ["GPT", "bot", "bard", "ai"])
def test_common_role_names_are_supported(role: str, answers: str) -> None:
    assert parse_row(sharegpt((role, "q"), (answers, "a")), "sharegpt") == QUESTION_AND_ANSWER


@pytest.mark.parametrize(
    ("flags", "supervised"),
    [({}, True), ({"weight": 0}, False), ({"weight": 1.0}, True), ({"train": False}, False), ({"train": None}, True)],
)
def test_an_answer_may_be_excluded_from_the_loss(flags: dict[str, Any], supervised: bool) -> None:
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", **flags}]}
    record = parse_row(row, "messages")
    assert isinstance(record, Conversation)
    assert record.messages[1].supervised == supervised


def test_with_lists_of_messages_only_the_completion_is_supervised() -> None:
    turns = [{"role": role, "content": "x"} for role in ("user", "assistant", "user", "assistant")]
    record = parse_row({"prompt": turns[:3], "completion": turns[3:]}, "prompt_completion")
    assert isinstance(record, Conversation)
    assert [m.supervised for m in record.messages if m.role == "assistant"] == [False, True]


def test_text_parts_are_joined_without_a_separator() -> None:
    parts = [{"type": "text", "text": "a "}, "b", {"type": "text", "text": "\nc"}]
    record = parse_row({"messages": [{"role": "assistant", "content": parts}]}, "messages")
    assert record == conversation(("assistant", "a b\nc"))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [{"role": "assistant", "content": "a", "weight": 0.5}]}, "'weight' should be 0 or 1"),
        ({"messages": [{"role": "assistant", "content": "a", "train": "no"}]}, "'train' should be 0 or 1"),
        ({"input_ids": [1, 2], "labels": [1]}, "input_ids has 2 tokens, but labels has 1"),
        ({"input_ids": [1, 2], "labels": [2, -100]}, "each label should be the token at its position or -100"),
        ({"input_ids": "1 2", "labels": [1, 2]}, "key 'input_ids' should be a list of integers"),
        ({"input_ids": [1], "labels": None}, "key 'labels' should be a list of integers, not None"),
        (messages(("user", "q"), ("function_call", "f()")), "message 2: 'content' should be JSON"),
        (messages(("user", "q"), ("function_call", '"f"')), "message 2: a tool call should be an object"),
        (messages(("user", "q"), ("tool_call", "5")), "message 2: a tool call should be an object"),
        ({"messages": [{"role": "assistant", "content": None}]}, "message 1: 'content' should be text, not None"),
        ({"messages": [{"role": "assistant", "content": [{"text": "a"}, {"text": None}]}]}, "a part that is not text"),
        ({"input_ids": [True], "labels": [1]}, "key 'input_ids' should be a list of integers"),
    ],
)
def test_an_invalid_flag_or_token_is_named(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(MalformedRow, match=reason):
        parse_row(row, detect_format(row))


# Keys beside the messages. None is ignored silently.


ALPACA = {"instruction": "q", "output": "a"}
IN_LISTS = {"prompt": [USER], "completion": [ASSISTANT]}
ROWS_OF_MESSAGES = [messages(*ASKED), sharegpt(("human", "q"), ("gpt", "a")), ALPACA, IN_LISTS]


@pytest.mark.parametrize("row", ROWS_OF_MESSAGES)
def test_the_keys_beside_messages_are_used_in_every_format(row: dict[str, Any]) -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    assert parse(row | {"system": "s"}) == parse(row | {"system_prompt": "s"}) == WITH_SYSTEM
    assert parse(row | {"system": "s", "system_prompt": "s"}) == WITH_SYSTEM
    for empty in (None, "", " \n"):
        assert parse(row | {"system": empty, "system_prompt": empty}) == QUESTION_AND_ANSWER
    for key, value in [("tools", [tool]), ("functions", [{"name": "f"}]), ("functions", '[{"name": "f"}]')]:
        assert parse(row | {key: value}) == QUESTION_AND_ANSWER._replace(tools=[tool])
    assert parse(row | {"functions": [{"name": "f"}], "tools": [tool]}).tools == [tool]
    for kwargs in ({"enable_thinking": False}, '{"enable_thinking": false}'):
        record = parse(row | {"chat_template_kwargs": kwargs})
        assert record == QUESTION_AND_ANSWER._replace(template_kwargs={"enable_thinking": False})
    for empty in (None, "", {}, "{}", []):
        assert parse(row | {"chat_template_kwargs": empty, "functions": None}) == QUESTION_AND_ANSWER


@pytest.mark.parametrize("row", ROWS_OF_MESSAGES)
@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"system": "s", "system_prompt": "t"}, "keys 'system' and 'system_prompt' differ"),
        ({"system": ["s"]}, "key 'system' should be text"),
        ({"system_prompt": 5}, "key 'system_prompt' should be text, not 5"),
        ({"functions": {"name": "f"}}, "key 'functions' should be a list of functions' JSON schemas, not a dict"),
        ({"functions": [{"name": "f"}], "tools": [{"name": "g"}]}, "keys 'tools' and 'functions' differ"),
        ({"images": ["cat.png"]}, "^key 'images' is not supported: images, video and audio .* remove these rows"),
        ({"image": {"bytes": b"x", "path": None}}, "key 'image' is not supported"),
        ({"videos": ["a.mp4"]}, "key 'videos' is not supported"),
        ({"audio": {"path": "a.wav"}}, "key 'audio' is not supported"),
        ({"label": False}, "key 'label' is false, .* preference data"),
        ({"kto_tag": False}, "key 'kto_tag' is false"),
        ({"loss_mask": 1}, "key 'loss_mask' (should be a list of 0 or 1|is not supported in format alpaca)"),
        ({"loss_mask": [1]}, "key 'loss_mask' (should be a list of 0 or 1|is not supported in format alpaca)"),
        ({"loss_mask": [0, 1, 1]}, "key 'loss_mask' (should be a list of 0 or 1|is not supported in format alpaca)"),
        ({"chat_template_kwargs": ["x"]}, "'chat_template_kwargs' should be an object"),
        ({"chat_template_kwargs": 5}, "'chat_template_kwargs' should be an object"),
        ({"chat_template_kwargs": "{x"}, "'chat_template_kwargs' should be JSON"),
        ({"chat_template_kwargs": {"tools": [], "x": 1}}, r"may not set \['tools'\]"),
    ],
)
def test_a_key_that_cannot_be_used_is_an_error(row: dict[str, Any], more: dict[str, Any], reason: str) -> None:
    with pytest.raises(MalformedRow, match=reason):
        parse(row | more)


def test_two_different_system_texts_are_an_error() -> None:
    with pytest.raises(MalformedRow, match="key 'system' is 'x', but the messages begin with the system text 's'"):
        parse(messages(("system", "s"), *ASKED, system="x"))
    with pytest.raises(MalformedRow, match="key 'system_prompt' is 'x', but the messages begin with"):
        parse(sharegpt(("system", "s"), ("human", "q"), ("gpt", "a"), system_prompt="x"))
    with pytest.raises(MalformedRow, match="but the messages begin with"):  # after the greeting is left out
        parse(sharegpt(("gpt", "hi"), ("system", "s"), ("human", "q"), ("gpt", "a"), system="x"))
    assert parse(messages(("system", "s\n"), *ASKED, system="s")).messages == WITH_SYSTEM.messages
    assert parse(messages(("developer", " "), *ASKED, system="s")) == WITH_SYSTEM


@pytest.mark.parametrize("row", [*ROWS_OF_MESSAGES, {"prompt": "p", "completion": "c"}, {"text": "t"}])
def test_a_note_names_every_other_key_with_a_value(row: dict[str, Any]) -> None:
    more = {"tool_choice": "auto", "parallel_tool_calls": False, "source": "x", "id": 0, "weight": 0.5, "label": True}
    empty = {"a": None, "b": "", "c": [], "d": {}, "e": [None, ""], "images": [], "videos": None, "loss_mask": None}
    record = parse_row(row | more | empty, detect_format(row))
    assert record == parse_row(row, detect_format(row))._replace(
        notes=unused("id", "label", "parallel_tool_calls", "source", "tool_choice", "weight")
    )


def test_keys_of_messages_are_not_used_beside_text() -> None:
    tools = {"tools": [{"name": "f"}], "system": "s", "chat_template_kwargs": {"x": 1}}
    notes = unused("chat_template_kwargs", "system", "tools")
    assert parse_row({"prompt": "p", "completion": "c"} | tools, "prompt_completion") == Completion("p", "c", notes)
    assert parse_row({"text": "t", "image": "cover.png"}, "text") == PlainText("t", unused("image"))
    ids = {"input_ids": [1, 2], "labels": [1, 2]}
    assert parse_row(ids | {"token_type_ids": [0, 0]}, "tokens").notes == unused("token_type_ids")
    for row in ({"prompt": "p", "completion": "c"}, {"text": "t"}, ids, ALPACA):
        data_format = detect_format(row)
        with pytest.raises(MalformedRow, match=f"'loss_mask' is not supported in format {data_format}, only beside"):
            parse_row(row | {"loss_mask": [0, 1]}, data_format)


def test_an_attention_mask_has_no_zeros() -> None:
    row = {"input_ids": [1, 2], "labels": [1, 2]}
    assert parse_row(row | {"attention_mask": [1, 1]}, "tokens") == Pretokenized([1, 2], [1, 2])
    for mask in ([1, 0], [1], "11"):
        with pytest.raises(MalformedRow, match=r"attention_mask should be 1 for every token .* remove the padding"):
            parse_row(row | {"attention_mask": mask}, "tokens")


@pytest.mark.parametrize("mask", [[0, 0, 0, 1], [False, False, False, True], ["0", "0", "0", "1"], [0.0, 0, 0, 1.0]])
@pytest.mark.parametrize("data_format", ["messages", "sharegpt", "prompt_completion"])
def test_a_loss_mask_has_one_flag_for_each_message(mask: list[Any], data_format: str) -> None:
    turns = [USER, ASSISTANT, USER, ASSISTANT]
    row = {"messages": {"messages": turns}, "sharegpt": {"conversations": turns}}.get(data_format)
    row = row or {"prompt": turns[:1], "completion": turns[1:]}
    record = parse(row | {"loss_mask": mask, "system": "s"})
    assert [m.supervised for m in record.messages if m.role == "assistant"] == [False, True]
    assert record.notes == ()
    turns[-1] = row.get("completion", turns)[-1] = ASSISTANT | {"train": False}
    with pytest.raises(MalformedRow, match=r"message \d: 'loss_mask' and 'train' contradict each other"):
        parse(row | {"loss_mask": mask})
    with pytest.raises(MalformedRow, match="each item of 'loss_mask' should be 0 or 1"):
        parse(row | {"loss_mask": [0, None, 0, 1]})


@pytest.mark.parametrize(
    ("row", "hint"),
    [
        ({"prompt": "p", "response": "r"}, "columns: {instruction: prompt, output: response} with the chat template, "),
        ({"prompt": "p", "response": "r"}, "columns: {completion: response} without"),
        ({"query": "p", "response": "r", "id": "1"}, "columns: {prompt: query, completion: response} without"),
        (
            {"system_prompt": "s", "question": "p", "response": "r"},
            "columns: {instruction: question, output: response}",
        ),
        ({"instruction": "p", "input": "i", "response": "r"}, "columns: {output: response} with"),
        ({"input": "p", "output": "r"}, "columns: {instruction: input} with"),
        ({"message": "m", "category": "c"}, "{instruction: message, output: category}, if 'category' is the answer"),
        ({"category": "c", "question": "m"}, "{instruction: question, output: category}, if 'category' is"),
        ({"answer": "c", "message": "m"}, "{instruction: message, output: answer}, if 'answer' is"),
        ({"conversation": [USER]}, "For this row: columns: {messages: conversation}$"),
        ({"dialog": [{"from": "human", "value": "q"}]}, "For this row: columns: {conversations: dialog}$"),
        ({"prompt": "p", "chosen": "c", "rejected": "r"}, "Preference data is not supported; .*{completion: chosen}"),
        ({"prompt": "p", "chosen": [USER, ASSISTANT], "rejected": [USER]}, "Preference.*columns: {messages: chosen}"),
        ({"prompt": [USER], "chosen": [ASSISTANT], "rejected": [USER]}, "Preference .*columns: {completion: chosen}"),
        ({"chosen": 1, "rejected": 2}, "only the chosen answers can be used"),
    ],
)
def test_a_row_of_no_format_gets_a_suggestion(row: dict[str, Any], hint: str) -> None:
    with pytest.raises(MalformedRow, match=hint):
        detect_format(row)
    with pytest.raises(MalformedRow, match=hint):
        parse_row(row, "text")


def test_a_row_without_an_obvious_meaning_gets_no_suggestion() -> None:
    for row in ({"question": "p", "answer": "x", "solution": "y"}, {"a": "x"}, {"question": 5, "answer": "x"}):
        with pytest.raises(MalformedRow, match=r"name in the file}$"):
            detect_format(row)
    with pytest.raises(MalformedRow, match=r"name in the file}\. This row is of format: messages$"):
        parse_row(messages(*ASKED), "alpaca")


@pytest.mark.parametrize("separator", [";", "\t", "|"])
def test_a_csv_file_with_another_separator(separator: str) -> None:
    with pytest.raises(MalformedRow, match=r"save it with commas, or with tabs as \.tsv") as error:
        detect_format({f"instruction{separator}output": f"q{separator}a"})
    assert repr(separator) in str(error.value)


def test_an_answer_that_is_only_in_chosen_is_an_error() -> None:
    more = {"chosen": ASSISTANT, "rejected": ASSISTANT}
    for turns in ([USER], [USER, ASSISTANT, USER]):
        with pytest.raises(MalformedRow, match="the answer to the last message is in 'chosen'"):
            parse({"messages": turns} | more)
    assert parse({"messages": [USER, ASSISTANT]} | more).notes == unused("chosen", "rejected")


# Empty answers.


@pytest.mark.parametrize("empty", ["", " ", "\n\t"])
def test_an_empty_answer_is_not_supervised(empty: str) -> None:
    note = ("an empty answer is not supervised",)
    record = parse(messages(("user", "q"), ("assistant", empty), *ASKED))
    assert [m.supervised for m in record.messages] == [True, False, True, True]
    assert record.notes == note
    record = parse(ALPACA | {"history": [["q0", empty]]})
    assert ([m.supervised for m in record.messages], record.notes) == ([True, False, True, True], note)
    # An answer that the row excludes needs no note; calls and reasoning are answers.
    turns = [USER, {"role": "assistant", "content": empty, "weight": 0}, USER, ASSISTANT]
    assert parse({"messages": turns}).notes == ()
    for more in ({"tool_calls": [{"name": "f"}]}, {"thinking": "t"}):
        record = parse({"messages": [USER, {"role": "assistant", "content": empty, **more}]})
        assert (record.messages[1].supervised, record.notes) == (True, ())
    # Reasoning of white space is none.
    with pytest.raises(UnusableRow, match="empty answer"):
        parse({"messages": [USER, {"role": "assistant", "content": empty, "thinking": " "}]})


def test_an_empty_turn_adds_no_empty_line() -> None:
    record = parse(sharegpt(("human", "q"), ("gpt", " "), ("gpt", "a"), ("gpt", "\n")))
    assert record.messages == QUESTION_AND_ANSWER.messages


# Alpaca.


@pytest.mark.parametrize(
    ("more", "question"),
    [
        ({"input": " \n"}, "q"),
        ({"input": "\t", "instruction": " q "}, " q "),
        ({"input": " i "}, "q\n\n### Input:\n i "),
        ({"input": "i", "instruction": " "}, "i"),
        ({"input": "i", "instruction": ""}, "i"),
        ({"history": []}, "q"),
        ({"history": None}, "q"),
        ({"history": ""}, "q"),
        ({"history": "[]"}, "q"),
    ],
)
def test_an_input_of_white_space_is_empty(more: dict[str, Any], question: str) -> None:
    assert parse(ALPACA | more) == conversation(("user", question), ("assistant", "a"))


@pytest.mark.parametrize("history", [[None], [[None, None]], [["q"]], {"q": "a"}, 5, '[["q"]]', "x"])
def test_a_malformed_history_is_an_error(history: Any) -> None:
    with pytest.raises(MalformedRow, match="history"):
        parse(ALPACA | {"history": history})
    assert parse(ALPACA | {"history": '[["q0", "a0"]]'}).messages[:2] == (
        Message("user", "q0"),
        Message("assistant", "a0"),
    )
