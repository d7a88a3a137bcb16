"""Rows of each format: valid, unusual and malformed."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_accel.data.formats import (
    FORMATS,
    Completion,
    Conversation,
    MalformedRow,
    Message,
    PlainText,
    Pretokenized,
    Record,
    UnusableRow,
    detect_format,
    parse_row,
)


def conversation(*turns: tuple[str, str]) -> Conversation:
    return Conversation(tuple(Message(role, content) for role, content in turns))


def sharegpt(*turns: tuple[str, str], **more: Any) -> dict[str, Any]:
    return {"conversations": [{"from": role, "value": text} for role, text in turns], **more}


def messages(*turns: tuple[str, str], **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": text} for role, text in turns], **more}


QUESTION_AND_ANSWER = conversation(("user", "q"), ("assistant", "a"))


@pytest.mark.parametrize(
    ("row", "data_format", "record"),
    [
        (sharegpt(("human", "q"), ("gpt", "a"), id="x1"), "sharegpt", QUESTION_AND_ANSWER),
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
            messages(("system", "s"), ("user", ""), ("assistant", ""), ("user", "q"), ("assistant", "a")),
            "messages",
            conversation(("system", "s"), ("user", ""), ("assistant", ""), ("user", "q"), ("assistant", "a")),
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
        ({"prompt": "", "completion": " "}, "prompt_completion", Completion("", " ")),
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
        # The more specific key decides; other keys are ignored.
        (
            messages(("user", "q"), ("assistant", "a"), text="t", prompt="p", completion="c"),
            "messages",
            QUESTION_AND_ANSWER,
        ),
        ({"prompt": "p", "text": "t"}, "text", PlainText("t")),
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
        (messages(("user", "q"), ("assistant", " \n")), "no assistant turn"),
        ({"instruction": "q", "output": ""}, "no assistant turn"),
        ({"prompt": [], "completion": []}, "empty conversation"),
        ({"prompt": "p", "completion": ""}, "empty completion"),
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
        ({"messages": [["user", "q"]]}, "message 1: should be an object, not a list"),
        ({"instruction": "q", "output": None}, "key 'output' should be text, not None"),
        ({"instruction": "q", "output": "a", "input": 3}, "key 'input' should be text, not 3"),
        ({"instruction": "q", "output": "a", "history": "x"}, "history should be a list .* not 'x'"),
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
]
INNER = ["from", "value", "role", "content", "tool_calls", "function", "name", "arguments", "weight", "text"]
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
    elif isinstance(record, Pretokenized):
        assert len(record.input_ids) == len(record.labels)
    else:
        assert all(isinstance(text, str) for text in record)


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
