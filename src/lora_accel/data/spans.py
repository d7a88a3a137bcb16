"""Find where each message is in a rendered text, and verify it.

A conversation is rendered twice: unchanged, and with each content between two marks that occur nowhere else. Without
its marks, the marked text must equal the plain text from the first character to the last. Then the marks give the
spans, whatever the template writes around them. White space around a content may be stripped. Any other change is
reported: a message that is not supervised may be written in another way, an answer may not.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lora_accel.data.records import Message, UnusableRow

# Supplementary private use area B: no tokenizer, template or well-formed text gives these a meaning.
FIRST_MARK = 0x100000
MAX_PARTS = 0x4000
MARK = re.compile(f"([{chr(FIRST_MARK)}-{chr(FIRST_MARK + 2 * MAX_PARTS - 1)}])")
RESERVED = re.compile(f"[{chr(FIRST_MARK)}-{chr(0x10FFFF)}]")
"""Characters that a row must not contain: marks, and aliases of special tokens (`data/tokens.py`)."""

REASONING = re.compile(r"(\s*<think>\s*)(.*?)(\s*</think>\s*)(.*)", re.DOTALL)


def split_reasoning(content: str) -> tuple[str, str]:
    """Return the reasoning that an answer begins with, without its tags, and the rest; empty if there is none."""
    match = REASONING.fullmatch(content)
    return (match[2], match[4]) if match else ("", content)


class Span(NamedTuple):
    """Characters [start, end) of a rendered text."""

    start: int
    end: int


class Part(NamedTuple):
    """A marked part of a message: its content, or the reasoning before the answer."""

    message: int
    """0-based index of the message."""
    text: str
    is_reasoning: bool = False


def mark(messages: Sequence[Message], values: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], list[Part]]:
    """Return the template's messages with marks, and the parts in the order of their marks.

    An empty content is not marked, since templates test whether it is empty. After reasoning it is marked, to find
    where the reasoning ends.

    Args:
        values: the template's messages without marks.

    Raises:
        UnusableRow: a message contains reserved characters, or there are more parts than marks.
    """
    parts: list[Part] = []

    def add_marks(part: Part, *, even_empty: bool = False) -> str:
        if not part.text and not even_empty:
            return ""
        parts.append(part)
        opening, closing = _marks(len(parts) - 1)
        return f"{opening}{part.text}{closing}"

    marked = []
    for i, message in enumerate(messages):
        marked_message = dict(values[i])
        if RESERVED.search(message.content) or RESERVED.search(message.reasoning):
            raise UnusableRow("a message contains characters of Unicode private use area B")
        if message.reasoning:
            reasoning = add_marks(Part(i, message.reasoning, is_reasoning=True))
            marked_message |= {"reasoning_content": reasoning, "thinking": reasoning}
        match = REASONING.fullmatch(message.content) if message.role == "assistant" else None
        if match:
            opening_tag, reasoning, closing_tag, answer = match.groups()
            reasoning = add_marks(Part(i, reasoning, is_reasoning=True))
            answer = add_marks(Part(i, answer), even_empty=True)
            marked_message["content"] = opening_tag + reasoning + closing_tag + answer
        elif message.content:
            marked_message["content"] = add_marks(Part(i, message.content))
        marked.append(marked_message)
    if len(parts) > MAX_PARTS:
        raise UnusableRow(f"more than {MAX_PARTS} messages")
    return marked, parts


class Located(NamedTuple):
    """Where the parts of the messages are in a rendered text."""

    spans: list[Span | None]
    """The span of each part; None if the template left it out."""
    repeated: list[tuple[int, Span]]
    """(part, span) of each further copy of a part."""
    altered: frozenset[int]
    """Parts that the template wrote differently, or more than once. Their spans cover what it wrote."""


def locate(plain: str, marked: str, parts: Sequence[Part], messages: Sequence[Message]) -> Located:
    """Find each part in `plain`, the text rendered without marks.

    Walks `plain` along the pieces of the marked text. The walk must reach the end of `plain`, so every returned span is
    verified. A template may rewrite a part (such as a tool's result, as JSON): that part is reported as altered.

    Raises:
        UnusableRow: the text around a part changes with the part, or a user or tool message is left out.
    """
    pieces = MARK.split(marked)  # literal, mark, content, mark, literal, …
    literals, opens, contents, closes = (pieces[i::4] for i in range(4))
    spans: list[Span | None] = [None] * len(parts)
    repeated: list[tuple[int, Span]] = []
    altered = set()
    position = len(literals[0]) if plain.startswith(literals[0]) else -1
    for opening, content, closing, literal in zip(opens, contents, closes, literals[1:], strict=False):
        index = (ord(opening) - FIRST_MARK) // 2
        number = parts[index].message + 1
        if (opening, closing) != _marks(index):
            raise UnusableRow(f"the chat template changes message {number} with its content")
        text = next((text for text in _stripped(content) if plain.startswith(text + literal, position)), None)
        if position < 0 or text is None:
            raise UnusableRow(f"the chat template changes the text around message {number}")
        span = Span(position, position + len(text))
        if spans[index] is None:
            spans[index] = span
        else:
            repeated.append((index, span))
            altered.add(index)
        if content != parts[index].text:
            altered.add(index)
        position += len(text) + len(literal)
    if position != len(plain):
        raise UnusableRow("the chat template changes with the content, so spans cannot be verified")
    for part, found in zip(parts, spans, strict=True):
        if found is None and messages[part.message].role in ("user", "tool"):
            raise UnusableRow(f"the chat template leaves message {part.message + 1} out")
    return Located(spans, repeated, frozenset(altered))


def _stripped(content: str) -> tuple[str, ...]:
    """Return the content as templates may write it: unchanged first, then with white space stripped."""
    if not content[:1].isspace() and not content[-1:].isspace():
        return (content,)
    stripped = (content.strip(), content.strip("\n"), content.lstrip(), content.rstrip())
    return (content, *stripped, content.lstrip("\n"), content.rstrip("\n"))


def _marks(index: int) -> tuple[str, str]:
    return chr(FIRST_MARK + 2 * index), chr(FIRST_MARK + 2 * index + 1)
