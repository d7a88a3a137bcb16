"""Keys of messages: loss flags, `train_detail`, reasoning, contents, tools and calls."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lora_accel.data.formats import detect_format, parse_row
from lora_accel.data.records import Conversation, MalformedRow, Message

USER = {"role": "user", "content": "q"}
FLAGS = ["weight", "train", "training", "trainable", "loss"]
ON = [True, 1, 1.0, "1", "1.0", "true", "True"]
OFF = [False, 0, 0.0, "0", "0.0", "false", "False"]


def parse(*messages: Any, **row: Any) -> Conversation:
    record = parse_row({"messages": list(messages), **row}, "messages")
    assert isinstance(record, Conversation)
    return record


def answer(content: Any = "a", **more: Any) -> Message:
    """Parse an answer with these keys; in ShareGPT's format it must be the same."""
    record = parse(USER, {"role": "assistant", "content": content, **more})
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": content, **more}]
    assert parse_row({"conversations": turns}, "sharegpt") == record
    return record.messages[-1]


def test_messages_may_be_json_text() -> None:
    record = parse({"role": "user", "content": "q"}, {"role": "assistant", "content": "a"})
    text = json.dumps([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}])
    assert parse_row({"messages": text}, "messages") == record
    with pytest.raises(MalformedRow, match="key 'messages' should be JSON"):
        parse_row({"messages": "hello"}, "messages")


# Loss flags.


@pytest.mark.parametrize("key", [*FLAGS, "mask"])
def test_a_flag_is_a_boolean_a_number_or_text(key: str) -> None:
    assert {answer(**{key: value}).supervised for value in ON} == {key != "mask"}
    assert {answer(**{key: value}).supervised for value in OFF} == {key == "mask"}
    assert all(answer(**{key: value}).supervised for value in (None, "", " ", [], {}))
    for value in (0.5, 2, "no", [1]):
        with pytest.raises(MalformedRow, match=f"message 2: '{key}' should be 0 or 1, true or false, not "):
            answer(**{key: value})


def test_flags_that_contradict_each_other_are_an_error() -> None:
    for flags in ({"loss": True, "train": False}, {"weight": 1, "mask": 1}, {"training": "0", "mask": 0}):
        with pytest.raises(MalformedRow, match=r"message 2: '\w+' and '\w+' contradict each other"):
            answer(**flags)
    with pytest.raises(MalformedRow, match="'loss', 'train' and 'weight' contradict each other"):
        answer(weight=1, train=True, loss=False)
    assert not answer(weight=0, train=False, mask=True, loss=None).supervised


def test_flags_of_other_roles_have_no_effect() -> None:
    note = "loss flags of messages that are not answers are not used"
    assistant = {"role": "assistant", "content": "a"}
    assert parse(USER | {"train": False}, assistant).notes == ()
    assert parse(USER | {"train": True}, assistant).notes == (note,)
    assert parse(USER | {"train_detail": [detail(0, 0, True)]}, assistant).notes == (note,)
    assert parse(USER, assistant, loss_mask=[1, 1]).notes == (note,)


# Axolotl's train_detail.


def detail(begin: Any, end: Any, train: Any) -> dict[str, Any]:
    return {"begin_offset": begin, "end_offset": end, "train": train}


@pytest.mark.parametrize(
    ("details", "unsupervised"),
    [
        ([detail(0, 4, False), detail(5, 9, True)], ((0, 5),)),
        ([detail(5, 9, 1), detail(0, 4, "0")], ((0, 5),)),
        ([detail(0, 2, True), detail(3, 5, False), detail(6, 9, True)], ((3, 6),)),
        ([detail(0, 2, False), detail(3, 5, True), detail(6, 9, False)], ((0, 3), (6, 10))),
        ([detail(0, 2, False), detail(3, 5, False), detail(6, 9, True)], ((0, 6),)),
        ([detail(0, 4, True), detail(5, 9, True)], ()),
        ([detail(9, 9, False), detail(0, 8, True)], ((9, 10),)),
    ],
)
def test_train_detail_excludes_characters(details: list[Any], unsupervised: tuple[tuple[int, int], ...]) -> None:
    message = answer("0123456789", train_detail=details)
    assert (message.supervised, message.unsupervised) == (True, unsupervised)
    assert answer("0123456789", train_detail=details, train=False) == Message("assistant", "0123456789", False)


def test_characters_that_train_detail_does_not_cover_are_not_supervised() -> None:
    turn = {"role": "assistant", "content": "0123456789", "train_detail": [detail(3, 5, True)]}
    record = parse(USER, turn)
    assert record.messages[1].unsupervised == ((0, 3), (6, 10))
    assert record.notes == ("characters of an answer that train_detail does not cover are not supervised",)


def test_an_answer_without_a_supervised_character_is_not_supervised() -> None:
    assert answer("0123456789", train_detail=[]).supervised
    for details in ([detail(0, 9, False)], [detail(0, 3, False)]):
        message = answer("0123456789", train_detail=details)
        assert (message.supervised, message.unsupervised) == (False, ())
    # Its calls are supervised nevertheless.
    message = answer("0123456789", train_detail=[detail(0, 9, 0)], tool_calls=[{"name": "f"}])
    assert (message.supervised, message.unsupervised) == (True, ((0, 10),))
    assert answer(train_detail=None) == Message("assistant", "a")


@pytest.mark.parametrize(
    ("details", "reason"),
    [
        ("x", "'train_detail' should be a list of begin_offset, end_offset and train, not 'x'"),
        ([5], "should contain objects of begin_offset"),
        ([detail(0, 10, True)], r"\(the last character\) should be from 0 to 9 in order, not 0 and 10"),
        ([detail(-1, 2, True)], "not -1 and 2"),
        ([detail(3, 2, True)], "not 3 and 2"),
        ([detail(0.0, 2, True)], "not 0.0 and 2"),
        ([detail(True, 2, True)], "not True and 2"),
        ([detail(None, 2, True)], "not None and 2"),
        ([detail(0, 2, "x")], "'train' should be 0 or 1"),
        ([{"begin_offset": 0, "end_offset": 2}], "'train' is missing"),
        ([detail(0, 5, False), detail(5, 9, True)], "two entries cover character 5; end_offset is the last character"),
    ],
)
def test_a_malformed_train_detail_is_an_error(details: Any, reason: str) -> None:
    with pytest.raises(MalformedRow, match=f"message 2: 'train_detail'.*{reason}" if reason[0] != "'" else reason):
        answer("0123456789", train_detail=details)


def test_turns_with_excluded_characters_are_not_joined() -> None:
    turn = {"from": "gpt", "value": "abc", "train_detail": [detail(0, 0, False), detail(1, 2, True)]}
    record = parse_row({"conversations": [{"from": "human", "value": "q"}, turn, turn]}, "sharegpt")
    assert isinstance(record, Conversation)
    assert [m.unsupervised for m in record.messages] == [(), ((0, 1),), ((0, 1),)]


# Contents, reasoning and unknown keys.


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "x"}},
        {"type": "image"},
        {"type": "image", "text": None},
        {"type": "image", "text": "a cat"},
        {"type": "input_audio", "input_audio": {"data": "x"}},
        {"type": "video", "video": "x"},
        {"type": "tool_use", "name": "f", "input": {}},
        {"type": "file", "file": {}},
        {"type": 5, "text": "x"},
        {"type": []},
    ],
)
def test_a_content_part_of_another_type_is_named(part: dict[str, Any]) -> None:
    with pytest.raises(
        MalformedRow, match=r"message 2: '(content|value)' has a part of type .*; only text is supported"
    ):
        answer([{"type": "text", "text": "a"}, part])


def test_text_parts_may_have_openais_types() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "output_text", "text": "b"}, {"type": None, "text": "c"}, "d"]
    assert answer(parts) == Message("assistant", "abcd")
    for part in (None, 5, ["a"], {"type": "text"}, {"type": "text", "text": None}, {}):
        with pytest.raises(MalformedRow, match="has a part that is not text"):
            answer(["a", part])


@pytest.mark.parametrize("content", [None, 5, {"text": "a"}, True])
def test_a_content_that_is_not_text_is_an_error(content: Any) -> None:
    for message in ({"role": "assistant", "content": content}, {"role": "assistant", "content": content, "id": 1}):
        with pytest.raises(MalformedRow, match="message 1: 'content' should be text, not "):
            parse(message)
    with pytest.raises(MalformedRow, match="message 1: 'content' should be text, not None"):
        parse({"role": "assistant"})


def test_reasoning_has_three_names_and_one_value() -> None:
    assert answer(reasoning_content="", thinking="t").reasoning == "t"
    assert answer(reasoning="t", thinking="t", reasoning_content=None).reasoning == "t"
    assert answer(reasoning=[{"type": "text", "text": "t"}]).reasoning == "t"
    with pytest.raises(MalformedRow, match="message 2: 'reasoning' and 'thinking' differ; keep one"):
        answer(reasoning="t", thinking="u")
    with pytest.raises(MalformedRow, match="message 2: 'thinking' should be text, not True"):
        answer(thinking=True)


def test_the_name_with_a_value_is_used() -> None:
    turns = [{"from": None, "role": "user", "value": None, "content": "q"}, {"from": "gpt", "value": "a"}]
    assert parse_row({"conversations": turns}, "sharegpt") == parse(USER, {"role": "assistant", "content": "a"})


def test_a_note_names_every_other_key_of_a_message() -> None:
    assistant = {"role": "assistant", "content": "a"}
    record = parse(USER | {"date": "x", "id": 0, "rating": None, "audio": None}, assistant | {"id": 1, "tags": []})
    assert record.notes == ("message key 'date' is not used", "message key 'id' is not used")
    assert record.messages == parse(USER, assistant).messages
    assert parse(USER | {"name": 5, "tool_call_id": ["x"]}, assistant).notes == (
        "message key 'name' is not used",
        "message key 'tool_call_id' is not used",
    )
    with pytest.raises(MalformedRow, match="message 1: key 'images' is not supported: images, video and audio"):
        parse(USER | {"images": ["cat.png"]}, assistant)


# Tools and calls.

SEARCH = {"type": "function", "function": {"name": "search", "parameters": {"type": "object", "properties": {}}}}


@pytest.mark.parametrize(
    ("tools", "parsed"),
    [
        ([SEARCH], [SEARCH]),
        (json.dumps([SEARCH]), [SEARCH]),
        ([json.dumps(SEARCH)], [SEARCH]),
        ([SEARCH["function"]], [SEARCH["function"]]),
        ([{"type": "function", "name": "search"}], [{"type": "function", "name": "search"}]),
        ([{"type": "code_interpreter"}], [{"type": "code_interpreter"}]),
        ([{"name": "f", "parameters": None}], [{"name": "f", "parameters": None}]),
        ([{"name": "f", "parameters": '{"a": {}}'}], [{"name": "f", "parameters": {"a": {}}}]),
        ([{"type": "function", "function": {"name": "f", "parameters": " "}}],
         [{"type": "function", "function": {"name": "f", "parameters": {}}}]),
        ([], None),
        ("", None),
        ("[]", None),
        (" ", None),
        (None, None),
    ],
)  # fmt: skip
def test_tools_are_objects_or_their_json(tools: Any, parsed: list[dict[str, Any]] | None) -> None:
    assert parse(USER, {"role": "assistant", "content": "a"}, tools=tools).tools == parsed


@pytest.mark.parametrize(
    ("tools", "reason"),
    [
        ([{"type": "function", "function": "search"}], "tool 1: 'function' should be an object .* a str: 'search'"),
        ([{"type": "function", "function": None}], "tool 1: 'function' should be an object .* not null"),
        ([{"type": "function", "function": [SEARCH]}], "tool 1: 'function' should be an object .* not a list"),
        ([{"type": "code_interpreter", "function": None}], "'function' should be an object .* not null"),
        ([SEARCH, {"type": "function", "function": {}}], "tool 2: 'function': 'name' is missing"),
        ([{"type": "function", "function": {"name": 5}}], "'function': 'name' should be text, not 5"),
        ([{"type": "function", "function": {"name": ""}}], "'function': 'name' should be text, not ''"),
        ([{"type": "function", "function": {"name": None}}], "'function': 'name' should be text, not None"),
        ([{"name": ["f"]}], "tool 1: 'name' should be text"),
        ([{"type": "function"}], "tool 1: 'name' is missing"),
        ([{}], "tool 1: 'name' is missing"),
        ([{"type": 5, "name": "f"}], "tool 1: 'type' should be text, not 5"),
        ([{"type": "", "description": "x"}], "tool 1: 'name' is missing"),
        ([{"name": "f", "parameters": []}], "tool 1: 'parameters' should be an object .* not a list"),
        ([{"name": "f", "parameters": 5}], "tool 1: 'parameters' should be an object .* not a int"),
        ([{"name": "f", "parameters": "[]"}], "tool 1: 'parameters' should be an object"),
        ([{"name": "f", "parameters": "{"}], "tool 1: 'parameters' should be JSON"),
        ([None], "tool 1: should be an object with name and parameters, not null"),
        (["search"], "tool 1 should be JSON"),
        (['"search"'], "tool 1: should be an object with name and parameters, not a str"),
        ([[SEARCH]], "tool 1: should be an object with name and parameters, not a list"),
        (SEARCH, "key 'tools' should be a list of functions' JSON schemas, not a dict"),
        (json.dumps(SEARCH), "key 'tools' should be a list of functions' JSON schemas, not a dict"),
        ("search", "key 'tools' should be JSON"),
        (5, "key 'tools' should be a list"),
    ],
)
def test_a_malformed_tool_is_an_error(tools: Any, reason: str) -> None:
    with pytest.raises(MalformedRow, match=f"key 'tools'.*{reason}" if not reason.startswith("key") else reason):
        parse(USER, {"role": "assistant", "content": "a"}, tools=tools)


@pytest.mark.parametrize("arguments", [{}, None, "", " ", "{}", "null"])
def test_a_call_without_arguments_has_an_empty_object(arguments: Any) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    for content in (None, ""):
        assert answer(content, tool_calls=[{"name": "f", "arguments": arguments}]).tool_calls == (call,)
    assert answer("", function_call={"name": "f"}).tool_calls == (call,)
    assert answer("", tool_calls='[{"function": {"name": "f"}}]', function_call=None).tool_calls == (call,)


@pytest.mark.parametrize(
    ("calls", "reason"),
    [
        ([None], "a tool call should be an object with name and arguments, not None"),
        (["f"], "a tool call should be an object"),
        ([[]], "a tool call should be an object"),
        ([{"function": "f"}], "a tool call should be an object"),
        ([{"function": None}], "a tool call should be an object"),
        ([{"function": {"name": ""}}], "a tool call should be an object .*: 'name' should be text, not ''"),
        ([{"type": "function", "arguments": {}}], "a tool call should be an object .*: 'name' is missing"),
        ([{"name": "f", "arguments": [1]}], r"the arguments of a tool call should be an object, not a list: \[1\]"),
        ([{"name": "f", "arguments": 5}], "the arguments of a tool call should be an object, not a int"),
        ([{"name": "f", "arguments": "[1]"}], "the arguments of a tool call should be an object, not a list"),
        ([{"name": "f", "arguments": '"{}"'}], "the arguments of a tool call should be an object, not a str"),
        ([{"name": "f", "arguments": "{x"}], "the arguments of a tool call should be JSON"),
        ({"name": "f"}, "'tool_calls' should be a list"),
        ("f()", "'tool_calls' should be JSON"),
    ],
)
def test_a_malformed_call_is_an_error(calls: Any, reason: str) -> None:
    with pytest.raises(MalformedRow, match=f"message 2: {reason}"):
        answer("a", tool_calls=calls)


def test_calls_in_both_notations_are_an_error() -> None:
    with pytest.raises(MalformedRow, match="message 2: has 'tool_calls' and 'function_call'"):
        answer("", tool_calls=[{"name": "f"}], function_call={"name": "f"})
    with pytest.raises(MalformedRow, match="message 2: a tool call should be an object"):
        answer("a", function_call="f")


def test_the_format_is_detected_beside_other_keys() -> None:
    assert detect_format({"messages": [], "functions": [], "prompt": "p"}) == "messages"
