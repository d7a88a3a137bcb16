"""What a chat template writes, found by rendering short conversations: how a turn ends, how it takes tool calls."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from lora_accel.data.records import Conversation, Message, UnusableRow
from lora_accel.data.tokens import special_tokens

if TYPE_CHECKING:
    from lora_accel.data.template import ChatTemplate

QUESTION, ANSWER = Message("user", "question"), Message("assistant", "answer")
ANOTHER = Message("user", "another")
TOOLS = [{"type": "function", "function": {"name": "probe_tool", "description": "probe", "parameters": {}}}]
CALLS: list[dict[str, Any]] = [
    {"type": "function", "id": call_id, "function": {"name": "probe_function", "arguments": {"key": value}}}
    for call_id, value in (("a1b2c3d4e", "value"), ("f6g7h8i9j", "other"))  # Mistral's templates need such ids
]


def conversations(tools: Any) -> list[Conversation]:
    """Return conversations that a template should render in little time: with one message, several and many.

    Args:
        tools: of each conversation.
    """
    answer = Message("assistant", "A longer answer, of two sentences. It is written once more. " * 20, reasoning="why")
    system, question = Message("system", "system"), Message("user", "A longer question? " * 20)
    calling, result = Message("assistant", "", tool_calls=(CALLS[0],)), Message("tool", "{}", tool_call_id="a1b2c3d4e")
    rows = [
        (QUESTION,),
        (QUESTION, ANSWER, ANOTHER, ANSWER),
        (system, *(question, answer) * 20),
        (system, question, calling, result, answer, QUESTION),
    ]
    return [Conversation(row, tools) for row in rows]


class CallStyle(NamedTuple):
    """How a template takes messages with tool calls."""

    has_text_arguments: bool
    """Whether the arguments are JSON text. Most templates take an object, as transformers documents it."""
    has_null_content: bool
    """Whether an empty content is None, as OpenAI's API returns it."""

    def apply(self, value: dict[str, Any]) -> dict[str, Any]:
        """Return a message in this style."""
        if "tool_calls" not in value:
            return value
        calls = value["tool_calls"]
        if self.has_text_arguments:
            texts = [json.dumps(call["function"]["arguments"], ensure_ascii=False) for call in calls]
            calls = [
                call | {"function": call["function"] | {"arguments": text}}
                for call, text in zip(calls, texts, strict=True)
            ]
        content = None if self.has_null_content and not value["content"] else value["content"]
        return value | {"tool_calls": calls, "content": content}


CALL_STYLES = [CallStyle(text, null) for text in (False, True) for null in (False, True)]
"""In the order in which they are tried."""


def find_call_style(template: ChatTemplate, tools: Any) -> CallStyle:
    """Return how a template takes tool calls: the first form in which it writes the call of a probe.

    Args:
        tools: of the row.
    """
    probe = Conversation((QUESTION, Message("assistant", "", tool_calls=(CALLS[0],))), tools)
    values = [message.for_template() for message in probe.messages]
    function = CALLS[0]["function"]
    for style in CALL_STYLES:
        try:
            text = template.render_values([style.apply(value) for value in values], probe)
        except UnusableRow:
            continue
        if function["name"] in text and str(function["arguments"]) not in text:  # not as Python prints it
            return style
    return CALL_STYLES[0]


def find_end_of_turn(template: ChatTemplate) -> str:
    """Return the text that ends an assistant turn: up to EOS, else to the end of the first special tokens.

    Without any, the text that the template writes after every answer, whether or not it is the last message.
    """
    tails = []
    try:
        for messages in ((QUESTION, ANSWER), (QUESTION, ANSWER, ANOTHER)):
            rendered = template.render(messages)
            if rendered.spans[1] is None:
                return ""
            tails.append(rendered.text[rendered.spans[1].end :])
    except UnusableRow:
        return ""
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(*tails, strict=False))
    common = "".join(letter for letter, _ in pairs)
    eos: str = template.tokenizer.eos_token or ""
    if eos and eos in common:
        return common[: common.index(eos) + len(eos)]
    prompt = next(_prompts(template, (QUESTION,), None), "")
    if not template.tokens.find_specials(common) and prompt.endswith(QUESTION.content + tails[0]):
        return ""  # it is the beginning of the next prompt, which the template writes after every text
    end = template.end_of_specials(tails[0], 0)
    return common.rstrip() if end is None else tails[0][:end]


def find_end_tokens(template: ChatTemplate) -> frozenset[str]:
    """Return the special tokens that end an answer: EOS, the one after an answer, and the one after tool calls.

    In a template that ends no turn, the token that opens the turn after an answer ends it.
    """
    specials = special_tokens(template.tokenizer)
    ends = {template.tokenizer.eos_token} & specials
    ends |= {token for token in specials if template.end_of_turn.endswith(token)}
    if not template.end_of_turn:
        for text in _texts(template, (QUESTION, ANSWER, QUESTION)):
            following = text[text.rfind(ANSWER.content) + len(ANSWER.content) :].lstrip()
            ends |= {token for token in specials if following.startswith(token)}
    calling = Message("assistant", "", tool_calls=tuple(CALLS))
    for text in _texts(template, (QUESTION, calling), TOOLS):
        start = max((len(prompt) for prompt in _prompts(template, (QUESTION,), TOOLS)), default=0)
        last = next((token for token in specials if text.rstrip().endswith(token)), "")
        # A token that ends each call is written twice.
        if last and text[start:].count(last) == 1 and CALLS[0]["function"]["name"] in text[start:]:
            ends.add(last)
    return frozenset(ends)


def keeps_answers(template: ChatTemplate) -> bool:
    """Whether an earlier answer is rendered as it is when it is the last message, up to the end of its turn.

    Tried with plain answers, with and without a system message. Then one rendering shows all answers of a plain row.
    """
    rounds = (QUESTION, ANSWER, ANOTHER, ANSWER, QUESTION, ANSWER)
    is_kept = False
    for system in ((), (Message("system", "system"),)):
        for text in _texts(template, (*system, *rounds)):
            for size in (2, 4):
                (last,) = _texts(template, (*system, *rounds[:size])) or ("",)
                end = last.rfind(ANSWER.content) + len(ANSWER.content)
                turn_end = end + len(template.end_of_turn)
                is_kept = bool(template.end_of_turn) and last.startswith(template.end_of_turn, end)
                if not (is_kept and text.startswith(last[:turn_end])):
                    return False
    return is_kept


def find_thought_end(template: ChatTemplate, conversation: Conversation) -> str:
    """Return the text between the reasoning and the text of an answer; empty if the template writes no reasoning.

    Args:
        conversation: the tools and variables of the template.
    """
    messages = (QUESTION, ANSWER._replace(reasoning="reasoning"))
    try:
        rendered = template.render(messages, conversation.tools, conversation.template_kwargs)
    except UnusableRow:
        return ""
    if rendered.altered or len(rendered.message_spans[1]) != 2:
        return ""
    reasoning, content = rendered.message_spans[1]
    return rendered.text[reasoning.end : content.start]


def _texts(template: ChatTemplate, messages: tuple[Message, ...], tools: Any = None) -> list[str]:
    """Return the rendered text, in a list that is empty if the template rejects the conversation."""
    try:
        return [template.apply(messages, tools)]
    except UnusableRow:
        return []


def _prompts(template: ChatTemplate, messages: tuple[Message, ...], tools: Any) -> Iterator[str]:
    try:
        yield template.prompt(Conversation(messages, tools))
    except UnusableRow:
        return
