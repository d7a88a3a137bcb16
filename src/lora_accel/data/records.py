"""The records that rows are parsed into, and why a row cannot be one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias


class Message(NamedTuple):
    """One turn of a conversation."""

    role: str
    """system, user, assistant or tool."""
    content: str
    supervised: bool = True
    """False = the row excludes this answer from the loss, or it is empty. Ignored for other roles."""
    tool_calls: tuple[dict[str, Any], ...] = ()
    """`{"type": "function", "function": {"name", "arguments"}}`, as chat templates expect them."""
    reasoning: str = ""
    """The reasoning before an answer, if the row stores it separately."""
    name: str = ""
    """Name of the tool whose result this is, or of the speaker."""
    tool_call_id: str = ""
    unsupervised: tuple[tuple[int, int], ...] = ()
    """Characters [start, end) of the content that carry no loss, in order, without overlap."""

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
    """Changes made to the row, and keys that are not used, for the ledger. The same in every record."""
    template_kwargs: dict[str, Any] | None = None
    """Variables that the row sets for its chat template, such as `enable_thinking`."""


class Completion(NamedTuple):
    """A prompt and its completion, used without a template."""

    prompt: str
    completion: str
    notes: tuple[str, ...] = ()


class PlainText(NamedTuple):
    """Text in which every token is supervised."""

    text: str
    notes: tuple[str, ...] = ()


class Pretokenized(NamedTuple):
    """Token ids and labels, used as they are."""

    input_ids: list[int]
    labels: list[int]
    """The token itself, or -100."""
    notes: tuple[str, ...] = ()


Record: TypeAlias = Conversation | Completion | PlainText | Pretokenized
Row: TypeAlias = Mapping[str, Any]


class MalformedRow(ValueError):
    """A row does not match its format. The message is the reason, without file and row."""


class UnusableRow(ValueError):
    """A well-formed row that cannot be trained on. The message is the reason in the ledger."""
