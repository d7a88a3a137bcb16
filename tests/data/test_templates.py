"""Rows through one template of each structure (tests/data/templates.py): what is supervised, and after which prompt.

The expected texts follow from one rule: the tokens that inference feeds are a prefix of the tokens of training, and
everything after that prefix is supervised, up to the end of the turn. They are written by hand.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from lora_accel.data.chat import Example, encode_record
from lora_accel.data.formats import parse_row
from lora_accel.data.records import Conversation, UnusableRow
from lora_accel.data.template import ChatTemplate
from lora_accel.labels import IGNORE_INDEX
from tests.data.templates import TEMPLATES, tokenizer_of

KINDS = ("bytes", "spaces")
"""Kinds of tokenizers."""

WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def reply(text: str, reasoning: str = "") -> dict[str, Any]:
    return {"role": "assistant", "content": text} | ({"reasoning_content": reasoning} if reasoning else {})


def call(reasoning: str = "") -> dict[str, Any]:
    return reply("", reasoning) | {"content": None, "tool_calls": [CALL]}


def result(text: str) -> dict[str, Any]:
    return {"role": "tool", "content": text, "name": "weather"}


def row(*messages: dict[str, Any], tools: bool = False) -> dict[str, Any]:
    return {"messages": list(messages)} | ({"tools": [WEATHER]} if tools else {})


SYSTEM = {"role": "system", "content": "be brief"}
BLUE, RED, SKY, ROSE = user("why blue"), user("and red"), reply("the sky"), reply("a rose")
SUNNY = reply("it is sunny")

ROWS = {
    "plain": row(BLUE, SKY),
    "system": row(SYSTEM, BLUE, SKY),
    "line breaks": row(BLUE, reply("\n\nthe sky")),
    "indented": row(BLUE, reply("  the sky")),
    "turns": row(BLUE, SKY, RED, ROSE),
    "system, turns": row(SYSTEM, BLUE, SKY, RED, ROSE),
    "thought in content": row(BLUE, reply("<think>\nhmm light\n</think>\n\nthe sky")),
    "reasoning": row(BLUE, reply("the sky", "hmm light")),
    "reasoning, turns": row(BLUE, reply("the sky", "hmm light"), RED, reply("a rose", "hmm dark")),
    "reasoning, first turn": row(BLUE, reply("the sky", "hmm light"), RED, ROSE),
    "tools": row(BLUE, SKY, tools=True),
    "call": row(BLUE, call(), tools=True),
    "result": row(BLUE, call(), result('sunny "now"'), SUNNY, tools=True),
    "JSON result": row(BLUE, call(), result('{"temp": 20}'), SUNNY, tools=True),
    "system, tools": row(SYSTEM, BLUE, call(), result("sunny"), SUNNY, tools=True),
    "reasoning, call": row(BLUE, call("hmm call"), result("sunny"), reply("it is sunny", "hmm dark"), tools=True),
}

PROMPT = "<|turn|>assistant\n"
CALL_TEXT = '<call>{"name": "weather", "arguments": {"city": "Paris"}}</call>'
EMPTY_THOUGHT = "<think>\n\n</think>\n\n"
THOUGHT = "<think>\nhmm light\n</think>\n\n"

Expected = list[tuple[str, str]]
"""Of each answer: the end of its prompt, and the supervised text."""


def after(prompt: str, *texts: str) -> Expected:
    """Return the expected answers that all have the same end of the prompt."""
    return [(prompt, text) for text in texts]


PLAIN: dict[str, Expected] = {
    "plain": after(PROMPT, "the sky<|end|>"),
    "system": after("be brief<|end|>\n<|turn|>user\nwhy blue<|end|>\n" + PROMPT, "the sky<|end|>"),
    "line breaks": after(PROMPT, "\n\nthe sky<|end|>"),
    "indented": after(PROMPT, "  the sky<|end|>"),
    "turns": after(PROMPT, "the sky<|end|>", "a rose<|end|>"),
}
WITH_TOOLS: dict[str, Expected] = {
    **PLAIN,
    "tools": after(PROMPT, "the sky<|end|>"),
    "call": after(PROMPT, f"{CALL_TEXT}<|end|>"),
    "result": [
        ("why blue<|end|>\n" + PROMPT, f"{CALL_TEXT}<|end|>"),
        ('sunny "now"<|end|>\n' + PROMPT, "it is sunny<|end|>"),
    ],
    "JSON result": [
        ("why blue<|end|>\n" + PROMPT, f"{CALL_TEXT}<|end|>"),
        ('{"temp": 20}<|end|>\n' + PROMPT, "it is sunny<|end|>"),
    ],
    "system, tools": [
        ("<|turn|>system\nbe brief<|end|>\n<|turn|>user\nwhy blue<|end|>\n" + PROMPT, f"{CALL_TEXT}<|end|>"),
        ("sunny<|end|>\n" + PROMPT, "it is sunny<|end|>"),
    ],
}

EXPECTED: dict[str, dict[str, Expected]] = {
    "plain": {**PLAIN, "thought in content": after(PROMPT, THOUGHT + "the sky<|end|>")},
    "tools": WITH_TOOLS,
    "no_generation_prompt": {
        "plain": after("why blue<|text|>", "the sky</s>"),
        "system": after("be brief<|text|><|turn|>user\nwhy blue<|text|>", "the sky</s>"),
        "line breaks": after("why blue<|text|>", "\n\nthe sky</s>"),
        "indented": after("why blue<|text|>", "  the sky</s>"),
        "turns": [("why blue<|text|>", "the sky</s>"), ("and red<|text|>", "a rose</s>")],
    },
    "space_before_answer": {
        "plain": after("[Q] why blue [/Q]", " the sky</s>"),
        "system": after("[Q] be brief [/Q][Q] why blue [/Q]", " the sky</s>"),
        "line breaks": after("[Q] why blue [/Q]", " \n\nthe sky</s>"),
        "indented": after("[Q] why blue [/Q]", "   the sky</s>"),
        "turns": [("[Q] why blue [/Q]", " the sky</s>"), ("the sky</s>[Q] and red [/Q]", " a rose</s>")],
    },
    "strips_content": {
        **PLAIN,
        "line breaks": after(PROMPT, "the sky<|end|>"),
        "indented": after(PROMPT, "the sky<|end|>"),
    },
    "system_in_first_user": {
        **PLAIN,
        "system": after("be brief\n\nwhy blue<|end|>\n" + PROMPT, "the sky<|end|>"),
        "system, turns": [
            ("<|turn|>user\nbe brief\n\nwhy blue<|end|>\n" + PROMPT, "the sky<|end|>"),
            ("the sky<|end|>\n<|turn|>user\nand red<|end|>\n" + PROMPT, "a rose<|end|>"),
        ],
    },
    "system_in_last_user": {
        **PLAIN,
        "system": after("<|turn|>user\nbe brief\n\nwhy blue<|end|>\n" + PROMPT, "the sky<|end|>"),
        "system, turns": [
            ("<|turn|>user\nbe brief\n\nwhy blue<|end|>\n" + PROMPT, "the sky<|end|>"),
            ("the sky<|end|>\n<|turn|>user\nbe brief\n\nand red<|end|>\n" + PROMPT, "a rose<|end|>"),
        ],
    },
    "date_in_system": PLAIN,
    "closes_thought": {
        "plain": after(PROMPT + EMPTY_THOUGHT, "the sky<|end|>"),
        "system": after("be brief<|end|>\n<|turn|>user\nwhy blue<|end|>\n" + PROMPT + EMPTY_THOUGHT, "the sky<|end|>"),
        "line breaks": after(PROMPT + EMPTY_THOUGHT, "\n\nthe sky<|end|>"),
        "indented": after(PROMPT + EMPTY_THOUGHT, "  the sky<|end|>"),
        "turns": [
            ("why blue<|end|>\n" + PROMPT + EMPTY_THOUGHT, "the sky<|end|>"),
            # The model will see its earlier answers as the template renders them: without the thought.
            (PROMPT + "the sky<|end|>\n<|turn|>user\nand red<|end|>\n" + PROMPT + EMPTY_THOUGHT, "a rose<|end|>"),
        ],
    },
    "closes_thought_before_wrapped_answer": {
        "plain": after("why blue<|end|>\n<|turn|>assistant<|part|><|stop|>", "<|text|>the sky<|text_end|><|end|>"),
        "turns": after(
            "<|turn|>assistant<|part|><|stop|>",
            "<|text|>the sky<|text_end|><|end|>",
            "<|text|>a rose<|text_end|><|end|>",
        ),
    },
    "opens_thought": {
        "plain": after(PROMPT + "<think>\n", "\n</think>\n\nthe sky<|end|>"),
        "reasoning": after(PROMPT + "<think>\n", "hmm light\n</think>\n\nthe sky<|end|>"),
        "thought in content": after(PROMPT + "<think>\n", "hmm light\n</think>\n\nthe sky<|end|>"),
        "turns": after(PROMPT + "<think>\n", "\n</think>\n\nthe sky<|end|>", "\n</think>\n\na rose<|end|>"),
        "reasoning, turns": [
            (PROMPT + "<think>\n", "hmm light\n</think>\n\nthe sky<|end|>"),
            (
                PROMPT + "the sky<|end|>\n<|turn|>user\nand red<|end|>\n" + PROMPT + "<think>\n",
                "hmm dark\n</think>\n\na rose<|end|>",
            ),
        ],
    },
    "opens_thought_of_reasoning": {
        "plain": after(PROMPT + "<think>\n", "\n</think>\n\nthe sky<|end|>"),
        "reasoning": after(PROMPT + "<think>\n", "hmm light\n</think>\n\nthe sky<|end|>"),
        "thought in content": after(PROMPT + "<think>\n", "hmm light\n</think>\n\nthe sky<|end|>"),
        "turns": after(PROMPT + "<think>\n", "\n</think>\n\nthe sky<|end|>", "\n</think>\n\na rose<|end|>"),
        "reasoning, turns": after(
            PROMPT + "<think>\n", "hmm light\n</think>\n\nthe sky<|end|>", "hmm dark\n</think>\n\na rose<|end|>"
        ),
        "reasoning, first turn": after(
            PROMPT + "<think>\n", "hmm light\n</think>\n\nthe sky<|end|>", "\n</think>\n\na rose<|end|>"
        ),
        "call": after(PROMPT + "<think>\n", f"\n</think>\n\n{CALL_TEXT}<|end|>"),
        "reasoning, call": after(
            PROMPT + "<think>\n",
            f"hmm call\n</think>\n\n{CALL_TEXT}<|end|>",
            "hmm dark\n</think>\n\nit is sunny<|end|>",
        ),
    },
    "opens_thought_written_differently": {
        "plain": after(PROMPT + "<think>\n", "\n</think>\nthe sky<|end|>"),
        "reasoning": after(PROMPT + "<think>\n", "hmm light\n</think>\nthe sky<|end|>"),
        "turns": [
            (PROMPT + "<think>\n", "\n</think>\nthe sky<|end|>"),
            (
                PROMPT + "<think></think>the sky<|end|>\n<|turn|>user\nand red<|end|>\n" + PROMPT + "<think>\n",
                "\n</think>\na rose<|end|>",
            ),
        ],
        "reasoning, turns": after(
            PROMPT + "<think>\n", "hmm light\n</think>\nthe sky<|end|>", "hmm dark\n</think>\na rose<|end|>"
        ),
        "call": after(PROMPT + "<think>\n", f"\n</think>\n{CALL_TEXT}<|end|>"),
    },
    "opens_thought_of_last_answer": {
        "plain": after(PROMPT + "<think>\n", "\n</think>\n\nthe sky<|end|>"),
        "thought in content": after(PROMPT + "<think>\n", "hmm light\n</think>\n\nthe sky<|end|>"),
        "turns": [
            (PROMPT + "<think>\n", "\n</think>\n\nthe sky<|end|>"),
            (
                PROMPT + "the sky<|end|>\n<|turn|>user\nand red<|end|>\n" + PROMPT + "<think>\n",
                "\n</think>\n\na rose<|end|>",
            ),
        ],
    },
    "opens_thought_and_writes_an_empty_one": {
        "plain": after(PROMPT + "<think>\n", "\n</think>\n\nthe sky<|end|>"),
        "reasoning": after(PROMPT + "<think>\n", "hmm light\n</think>\n\nthe sky<|end|>"),
        "thought in content": after(PROMPT + "<think>\n", "hmm light\n</think>\n\nthe sky<|end|>"),
        "turns": after(PROMPT + "<think>\n", "\n</think>\n\nthe sky<|end|>", "\n</think>\n\na rose<|end|>"),
        "reasoning, turns": after(
            PROMPT + "<think>\n", "hmm light\n</think>\n\nthe sky<|end|>", "hmm dark\n</think>\n\na rose<|end|>"
        ),
    },
    "opens_thought_in_words": {
        "plain": after(PROMPT + "it is why\n", "\nso\nthe sky<|end|>"),
        "thought in content": after(PROMPT + "it is why\n", "hmm light\nso\nthe sky<|end|>"),
        "reasoning": after(PROMPT + "it is why\n", "hmm light\nso\nthe sky<|end|>"),
        "reasoning, turns": after(
            PROMPT + "it is why\n", "hmm light\nso\nthe sky<|end|>", "hmm dark\nso\na rose<|end|>"
        ),
    },
    "swaps_thought_tags": {
        "plain": after(PROMPT + "<think>", "</think>the sky<|end|>"),
        "reasoning": after(PROMPT + "<think>", "hmm light</think>the sky<|end|>"),
        "line breaks": after(PROMPT + "<think>", "</think>\n\nthe sky<|end|>"),
        "turns": after(PROMPT + "<think>", "</think>the sky<|end|>", "</think>a rose<|end|>"),
        "reasoning, turns": after(
            PROMPT + "<think>", "hmm light</think>the sky<|end|>", "hmm dark</think>a rose<|end|>"
        ),
        "call": after(PROMPT + "<think>", f"</think>{CALL_TEXT}<|end|>"),
        "reasoning, call": after(
            PROMPT + "<think>", f"hmm call</think>{CALL_TEXT}<|end|>", "hmm dark</think>it is sunny<|end|>"
        ),
    },
    "opens_thought_in_special_tokens": {
        "plain": after("<|turn|>assistant<|part|>", "<|stop|><|text|>the sky<|text_end|><|end|>"),
        "reasoning": after("<|turn|>assistant<|part|>", "hmm light<|stop|><|text|>the sky<|text_end|><|end|>"),
        "thought in content": after("<|turn|>assistant<|part|>", "hmm light<|stop|><|text|>the sky<|text_end|><|end|>"),
        "reasoning, turns": after(
            "<|turn|>assistant<|part|>",
            "hmm light<|stop|><|text|>the sky<|text_end|><|end|>",
            "hmm dark<|stop|><|text|>a rose<|text_end|><|end|>",
        ),
    },
    "thought_only_last": {
        "plain": after(PROMPT, EMPTY_THOUGHT + "the sky<|end|>"),
        "reasoning": after(PROMPT, THOUGHT + "the sky<|end|>"),
        "turns": [
            (PROMPT, EMPTY_THOUGHT + "the sky<|end|>"),
            (PROMPT + "the sky<|end|>\n<|turn|>user\nand red<|end|>\n" + PROMPT, EMPTY_THOUGHT + "a rose<|end|>"),
        ],
        "reasoning, turns": [
            (PROMPT, THOUGHT + "the sky<|end|>"),
            (
                PROMPT + "the sky<|end|>\n<|turn|>user\nand red<|end|>\n" + PROMPT,
                "<think>\nhmm dark\n</think>\n\na rose<|end|>",
            ),
        ],
        "result": [
            ("why blue<|end|>\n" + PROMPT, f"{EMPTY_THOUGHT}{CALL_TEXT}<|end|>"),
            (
                f'{PROMPT}{CALL_TEXT}<|end|>\n<|turn|>tool\nsunny "now"<|end|>\n' + PROMPT,
                EMPTY_THOUGHT + "it is sunny<|end|>",
            ),
        ],
        "reasoning, call": [
            ("why blue<|end|>\n" + PROMPT, f"<think>\nhmm call\n</think>\n\n{CALL_TEXT}<|end|>"),
            (
                f"{PROMPT}<think>\nhmm call\n</think>\n\n{CALL_TEXT}<|end|>\n<|turn|>tool\nsunny<|end|>\n" + PROMPT,
                "<think>\nhmm dark\n</think>\n\nit is sunny<|end|>",
            ),
        ],
    },
    "opens_thought_only_last": {
        "plain": after(PROMPT + "<think>\n", "\n</think>\n\nthe sky<|end|>"),
        "reasoning": after(PROMPT + "<think>\n", "hmm light\n</think>\n\nthe sky<|end|>"),
        "turns": [
            (PROMPT + "<think>\n", "\n</think>\n\nthe sky<|end|>"),
            (
                PROMPT + "the sky<|end|>\n<|turn|>user\nand red<|end|>\n" + PROMPT + "<think>\n",
                "\n</think>\n\na rose<|end|>",
            ),
        ],
        "reasoning, turns": after(
            PROMPT + "<think>\n", "hmm light\n</think>\n\nthe sky<|end|>", "hmm dark\n</think>\n\na rose<|end|>"
        ),
        "reasoning, call": [
            ("why blue<|end|>\n" + PROMPT + "<think>\n", f"hmm call\n</think>\n\n{CALL_TEXT}<|end|>"),
            (
                f"hmm call\n</think>\n\n{CALL_TEXT}<|end|>\n<|turn|>tool\nsunny<|end|>\n" + PROMPT + "<think>\n",
                "hmm dark\n</think>\n\nit is sunny<|end|>",
            ),
        ],
    },
    "kwargs_enable_thinking": {
        **PLAIN,
        "reasoning": after(PROMPT, THOUGHT + "the sky<|end|>"),
        "reasoning, first turn": after(PROMPT, THOUGHT + "the sky<|end|>", "a rose<|end|>"),
    },
    "reasoning_channel": {
        "plain": after("<|turn|>assistant", "<|part|>final<|text|>the sky<|stop|>"),
        "line breaks": after("<|turn|>assistant", "<|part|>final<|text|>\n\nthe sky<|stop|>"),
        "turns": [
            ("why blue<|end|><|turn|>assistant", "<|part|>final<|text|>the sky<|stop|>"),
            (
                "final<|text|>the sky<|end|><|turn|>user<|text|>and red<|end|><|turn|>assistant",
                "<|part|>final<|text|>a rose<|stop|>",
            ),
        ],
        "reasoning, turns": [
            (
                "why blue<|end|><|turn|>assistant",
                "<|part|>think<|text|>hmm light<|end|><|turn|>assistant<|part|>final<|text|>the sky<|stop|>",
            ),
            (
                "why blue<|end|><|turn|>assistant<|part|>final<|text|>the sky<|end|>"
                "<|turn|>user<|text|>and red<|end|><|turn|>assistant",
                "<|part|>think<|text|>hmm dark<|end|><|turn|>assistant<|part|>final<|text|>a rose<|stop|>",
            ),
        ],
    },
    "other_end_in_history": {
        "plain": after(PROMPT, "the sky<|stop|>"),
        "turns": [
            ("why blue<|end|>\n" + PROMPT, "the sky<|stop|>"),
            ("the sky<|end|>\n<|turn|>user\nand red<|end|>\n" + PROMPT, "a rose<|stop|>"),
        ],
    },
    "eos_after_last_turn": PLAIN,
    "no_closing_token": {
        "plain": after(PROMPT, "the sky</s>"),
        "line breaks": after(PROMPT, "\n\nthe sky</s>"),
        "turns": [
            ("why blue" + PROMPT, "the sky<|turn|>"),
            ("the sky<|turn|>user\nand red" + PROMPT, "a rose</s>"),
        ],
    },
    "closing_token_in_history": {
        "plain": after(PROMPT, "the sky<|end|>"),
        "turns": after(PROMPT, "the sky<|end|>", "a rose<|end|>"),
    },
    "several_closing_tokens": {
        "plain": after(PROMPT, "the sky<|text_end|>use<|end|>"),
        "turns": after(PROMPT, "the sky<|text_end|>use<|end|>", "a rose<|text_end|>use<|end|>"),
    },
    "next_prompt_after_answer": WITH_TOOLS,
    "json_tool_results": {
        **WITH_TOOLS,
        "result": [
            ("why blue<|end|>\n" + PROMPT, f"{CALL_TEXT}<|end|>"),
            (r'"sunny \"now\""' + "<|end|>\n" + PROMPT, "it is sunny<|end|>"),
        ],
        "JSON result": [
            ("why blue<|end|>\n" + PROMPT, f"{CALL_TEXT}<|end|>"),
            (r'"{\"temp\": 20}"' + "<|end|>\n" + PROMPT, "it is sunny<|end|>"),
        ],
        "system, tools": [
            ("why blue<|end|>\n" + PROMPT, f"{CALL_TEXT}<|end|>"),
            ('"sunny"<|end|>\n' + PROMPT, "it is sunny<|end|>"),
        ],
    },
    "arguments_as_text": {
        **PLAIN,
        "tools": after(PROMPT, "the sky<|end|>"),
        "call": after(PROMPT, '<call>weather {"city": "Paris"}</call><|end|>'),
        "result": [
            ("why blue<|end|>\n" + PROMPT, '<call>weather {"city": "Paris"}</call><|end|>'),
            ('sunny "now"<|end|>\n' + PROMPT, "it is sunny<|end|>"),
        ],
    },
    "content_none_with_calls": WITH_TOOLS,
    "answer_continues_after_result": {
        "plain": after(PROMPT, "the sky<|end|>"),
        "call": after(PROMPT, f"{CALL_TEXT}<|call|>"),
        "result": [
            ("why blue<|end|>" + PROMPT, f"{CALL_TEXT}<|call|>"),
            (f'{CALL_TEXT}<|call|><|part|>sunny "now"<|part|>', "it is sunny<|end|>"),
        ],
    },
    "line_break_after_earlier_result": WITH_TOOLS,
    "named_tool_use": {
        **PLAIN,
        "tools": after(
            "<|turn|>system\nuse weather<|end|>\n<|turn|>user\nwhy blue<|end|>\n" + PROMPT, "the sky<|end|>"
        ),
        "result": WITH_TOOLS["result"],
    },
    "drops_last_answer": {},
}
"""Of each template: the rows that are used in full."""

ONE_EXAMPLE = [
    ("plain", "turns"),
    ("no_generation_prompt", "turns"),
    ("space_before_answer", "turns"),
    ("strips_content", "line breaks"),
    ("eos_after_last_turn", "turns"),
    ("no_closing_token", "turns"),
    ("closing_token_in_history", "turns"),
    ("json_tool_results", "result"),
    ("arguments_as_text", "result"),
    ("opens_thought_of_reasoning", "reasoning, turns"),
    ("answer_continues_after_result", "result"),
]
"""Rows whose answers are all in one example, since each prompt is in the text of the row."""

DROPPED = [
    ("plain", "tools", "a tool"),
    ("plain", "call", "tool"),
    ("system_in_first_user", "result", "leaves a tool out"),
    ("drops_last_answer", "plain", "(message|answer) 2"),
    ("closes_thought", "reasoning", "reasoning"),
    ("plain", "reasoning", "reasoning of message 2"),
]


def cases() -> Iterator[tuple[str, str]]:
    return ((name, kind) for name, rows in EXPECTED.items() for kind in rows)


def record_of(kind: str) -> Conversation:
    record = parse_row(ROWS[kind], "messages")
    assert isinstance(record, Conversation)
    return record


def answers_of(
    template: ChatTemplate, record: Conversation, examples: list[Example]
) -> dict[int, tuple[list[int], list[int]]]:
    """Return the fed and the supervised tokens of each answer, by the index of its message.

    Every run of supervised tokens must follow exactly the tokens that `generate` feeds for one answer.
    """
    prompts = {
        number: template.encode_prompt(record.messages[:number], record.tools, record.template_kwargs)
        for number, message in enumerate(record.messages)
        if message.role == "assistant"
    }
    found = {}
    for example in examples:
        labels = example.labels
        starts = [i for i in range(1, len(labels)) if labels[i] != IGNORE_INDEX and labels[i - 1] == IGNORE_INDEX]
        for start in starts:
            end = next((i for i in range(start, len(labels)) if labels[i] == IGNORE_INDEX), len(labels))
            assert labels[start:end] == example.input_ids[start:end]
            (number,) = [number for number, prompt in prompts.items() if prompt == example.input_ids[:start]]
            assert number not in found, "an answer is supervised twice"
            found[number] = (prompts[number], example.input_ids[start:end])
    return found


def as_decoded(text: str, tokenizer_kind: str) -> str:
    """Return a text as compared: SentencePiece's marks add spaces after special tokens."""
    return text.replace(" ", "") if tokenizer_kind == "spaces" else text


@pytest.mark.parametrize("tokenizer_kind", KINDS)
@pytest.mark.parametrize(("name", "kind"), cases())
def test_answers_are_supervised_after_the_prompt_that_is_fed(name: str, kind: str, tokenizer_kind: str) -> None:
    template = ChatTemplate(tokenizer_of(name, tokenizer_kind))
    record = record_of(kind)
    found = answers_of(template, record, encode_record(record, template, "assistant"))
    decode = template.tokenizer.decode
    texts = [as_decoded(decode(supervised), tokenizer_kind) for _, (_, supervised) in sorted(found.items())]
    assert texts == [as_decoded(text, tokenizer_kind) for _, text in EXPECTED[name][kind]]
    for (prompt, _), (_, (fed, _)) in zip(EXPECTED[name][kind], sorted(found.items()), strict=True):
        assert as_decoded(decode(fed), tokenizer_kind).endswith(as_decoded(prompt, tokenizer_kind))


@pytest.mark.parametrize(("name", "kind"), cases())
def test_the_last_answer_alone_is_supervised_after_the_same_prompt(name: str, kind: str) -> None:
    template = ChatTemplate(tokenizer_of(name))
    record = record_of(kind)
    found = answers_of(template, record, encode_record(record, template, "last_assistant"))
    ((number, (_, supervised)),) = found.items()
    assert number == len(record.messages) - 1
    assert template.tokenizer.decode(supervised) == EXPECTED[name][kind][-1][1]


@pytest.mark.parametrize(("name", "kind"), ONE_EXAMPLE)
def test_one_example_where_the_row_contains_every_prompt(name: str, kind: str) -> None:
    template = ChatTemplate(tokenizer_of(name))
    record = record_of(kind)
    assert len(encode_record(record, template, "assistant")) == 1


@pytest.mark.parametrize(("name", "kind", "reason"), DROPPED)
def test_rows_that_the_template_cannot_write_are_dropped(name: str, kind: str, reason: str) -> None:
    template = ChatTemplate(tokenizer_of(name))
    with pytest.raises(UnusableRow, match=reason):
        encode_record(record_of(kind), template, "assistant")


def test_only_the_answer_that_cannot_be_trained_is_left_out() -> None:
    """The template does not write reasoning, and the model would be trained to answer at once."""
    template = ChatTemplate(tokenizer_of("plain"))
    record = record_of("reasoning, first turn")
    examples = encode_record(record, template, "assistant")
    ((number, (_, supervised)),) = answers_of(template, record, examples).items()
    assert (number, template.tokenizer.decode(supervised)) == (3, "a rose<|end|>")
    assert any("an answer is left out" in note and "reasoning of message 2" in note for note in examples[0].notes)


@pytest.mark.parametrize("name", ["opens_thought", "opens_thought_of_reasoning"])
def test_a_note_names_empty_thoughts(name: str) -> None:
    template = ChatTemplate(tokenizer_of(name))
    notes = {
        kind: [note for example in encode_record(record_of(kind), template, "assistant") for note in example.notes]
        for kind in ("plain", "reasoning")
    }
    assert ["empty" in " ".join(found) for found in notes.values()] == [True, False]


NO_THOUGHT = {"enable_thinking": False}


@pytest.mark.parametrize(
    ("of_model", "of_row", "is_closed"),
    [({}, {}, False), (NO_THOUGHT, {}, True), ({}, NO_THOUGHT, True), (NO_THOUGHT, {"enable_thinking": True}, False)],
)
def test_variables_of_the_template_apply_to_prompts_and_answers(
    of_model: dict[str, Any], of_row: dict[str, Any], is_closed: bool
) -> None:
    template = ChatTemplate(tokenizer_of("kwargs_enable_thinking"), variables=of_model)
    record = parse_row(ROWS["turns"] | ({"chat_template_kwargs": of_row} if of_row else {}), "messages")
    assert isinstance(record, Conversation)
    answers = answers_of(template, record, encode_record(record, template, "assistant"))
    decode = template.tokenizer.decode
    assert [decode(supervised) for _, supervised in answers.values()] == ["the sky<|end|>", "a rose<|end|>"]
    ending = PROMPT + (EMPTY_THOUGHT if is_closed else "")
    assert all(decode(fed).endswith(ending) for fed, _ in answers.values())


@pytest.mark.parametrize("kind", ["reasoning", "thought in content"])
def test_reasoning_after_a_prompt_that_closes_the_thought_is_left_out_and_the_reason_names_the_option(
    kind: str,
) -> None:
    template = ChatTemplate(tokenizer_of("kwargs_enable_thinking"), variables=NO_THOUGHT)
    with pytest.raises(UnusableRow, match="chat_template_kwargs"):
        encode_record(record_of(kind), template, "assistant")


def test_every_template_is_tested() -> None:
    assert list(EXPECTED) == list(TEMPLATES)
