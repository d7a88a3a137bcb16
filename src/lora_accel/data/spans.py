"""Where each message stands in a rendered text: proven, not guessed.

A conversation is rendered twice: as it is, and with each content between two marks that occur nowhere else. The marked
text without its marks must be the plain text, walked character by character to its end; then the marks give the spans,
whatever the template does around them. Two changes are followed, since modern templates make them: white space around
a content may be stripped, and the reasoning of an answer may be moved or left out. Any other change is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lora_accel.data.formats import Message, UnusableRow

# Supplementary private use area B: no tokenizer, template or well-formed text gives these a meaning.
FIRST_MARK = 0x100000
MAX_PARTS = 0x4000
MARK = re.compile(f"([{chr(FIRST_MARK)}-{chr(FIRST_MARK + 2 * MAX_PARTS - 1)}])")
OURS = re.compile(f"[{chr(FIRST_MARK)}-{chr(0x10FFFF)}]")
"""Characters that a row may not hold: marks, and what stands for special tokens (`data/tokens.py`)."""

REASONING = re.compile(r"(\s*<think>\s*)(.*?)(\s*</think>\s*)(.*)", re.DOTALL)


class Span(NamedTuple):
    """Characters [start, end) of a rendered text."""

    start: int
    end: int


class Part(NamedTuple):
    """A piece of a message that is marked: its content, or, apart from it, the reasoning before an answer."""

    message: int
    text: str
    is_reasoning: bool = False


def mark(messages: Sequence[Message], values: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], list[Part]]:
    """Return the messages for a template, marked, and the parts in the order of their marks.

    An empty content is not marked: templates ask whether there is one. After a thought it is, for the thought's end.

    Args:
        values: the messages for a template, as they are.

    Raises:
        UnusableRow: a message holds characters that serve as marks, or there are more messages than marks.
    """
    parts: list[Part] = []

    def between_marks(part: Part, *, even_empty: bool = False) -> str:
        if not part.text and not even_empty:
            return ""
        parts.append(part)
        opening, closing = _marks(len(parts) - 1)
        return f"{opening}{part.text}{closing}"

    marked = []
    for i, message in enumerate(messages):
        told = dict(values[i])
        if OURS.search(message.content) or OURS.search(message.reasoning):
            raise UnusableRow("a message holds characters of private use area B")
        if message.reasoning:
            reasoning = between_marks(Part(i, message.reasoning, is_reasoning=True))
            told |= {"reasoning_content": reasoning, "thinking": reasoning}
        thinks = REASONING.fullmatch(message.content) if message.role == "assistant" else None
        if thinks:
            before, thought, after, answer = thinks.groups()
            thought, answer = (
                between_marks(Part(i, thought, is_reasoning=True)),
                between_marks(Part(i, answer), even_empty=True),
            )
            told["content"] = before + thought + after + answer
        else:
            told["content"] = between_marks(Part(i, message.content))
        marked.append(told)
    if len(parts) > MAX_PARTS:
        raise UnusableRow(f"more than {MAX_PARTS} messages")
    return marked, parts


def locate(plain: str, marked: str, parts: Sequence[Part], messages: Sequence[Message]) -> list[Span | None]:
    """Walk along `plain` by the pieces of the marked text and return where each part stands (None: left out).

    The walk must consume `plain` to its end, so a span that is returned is proven.

    Raises:
        UnusableRow: the template does something else with a message than strip it, or leaves out what is neither a
            system text nor the reasoning of an earlier answer.
    """
    pieces = MARK.split(marked)  # literal, mark, content, mark, literal, …
    literals, opens, contents, closes = (pieces[i::4] for i in range(4))
    spans: list[Span | None] = [None] * len(parts)
    place = len(literals[0]) if plain.startswith(literals[0]) else -1
    for opening, content, closing, literal in zip(opens, contents, closes, literals[1:], strict=False):
        index = (ord(opening) - FIRST_MARK) // 2
        number = parts[index].message + 1
        if spans[index] is not None or (opening, closing) != _marks(index) or content != parts[index].text:
            raise UnusableRow(f"the chat template changes or repeats message {number}")
        text = next((text for text in _stripped(content) if plain.startswith(text + literal, place)), None)
        if place < 0 or text is None:
            raise UnusableRow(f"the chat template changes the text around message {number}")
        spans[index] = Span(place, place + len(text))
        place += len(text) + len(literal)
    for span, part in zip(spans, parts, strict=True):
        is_last = part.message == len(messages) - 1
        may_go = messages[part.message].role == "system" or (part.is_reasoning and not is_last)
        if span is None and not may_go:
            what = "the reasoning of message" if part.is_reasoning else "message"
            raise UnusableRow(f"the chat template leaves {what} {part.message + 1} out")
    if place != len(plain):
        raise UnusableRow("the chat template changes with the content, so that places cannot be proven")
    return spans


def _stripped(content: str) -> tuple[str, ...]:
    if not content[:1].isspace() and not content[-1:].isspace():
        return (content,)
    cuts = (content.strip(), content.strip("\n"), content.lstrip(), content.rstrip())
    return (content, *cuts, content.lstrip("\n"), content.rstrip("\n"))


def _marks(index: int) -> tuple[str, str]:
    return chr(FIRST_MARK + 2 * index), chr(FIRST_MARK + 2 * index + 1)
