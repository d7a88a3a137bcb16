"""Render conversations with a chat template, and find each message in the text."""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from lora_accel.data import probes
from lora_accel.data.records import Conversation, Message, UnusableRow
from lora_accel.data.spans import RESERVED, Span, locate, mark
from lora_accel.data.tokens import TextTokenizer
from lora_accel.data.tools import check_call, check_contains
from lora_accel.errors import DataError, did_you_mean
from lora_accel.paths import open_to_read
from lora_accel.sandbox import check_template

BUILT_IN_TEMPLATES = ("alpaca", "chatml", "gemma", "llama-2", "llama-3", "vicuna_v1.1", "zephyr")
SPECIAL_AS_TEXT = (
    "special tokens in the text are tokenized as plain text (data.parse_special_tokens: true parses them, for text to "
    "which a template is already applied)"
)
"""Note in the ledger."""
TOOL_USE = "tool_use"
"""Name of the template, among several that a tokenizer has, that is used where tools are given."""


class Rendered(NamedTuple):
    """A rendered conversation, with the span of each message."""

    text: str
    spans: list[Span | None]
    """The span of each message's content; None if it is empty, or the template left it out."""
    message_spans: list[list[Span]]
    """The spans of each message's text, reasoning included. All other text was written by the template."""
    altered: dict[int, str]
    """Messages that the template wrote in another way, in part or not at all -> how, for a reason in the ledger."""
    values: list[dict[str, Any]]
    """The messages as passed to the template."""
    notes: tuple[str, ...] = ()
    """Changes that the template made to the messages, for the ledger."""

    @property
    def untrusted(self) -> list[Span]:
        """Return the spans of all message text, in order."""
        return sorted(span for spans in self.message_spans for span in spans)

    def end_of(self, number: int) -> int:
        """Return where the text of a message ends; 0 if it has none."""
        return max((span.end for span in self.message_spans[number]), default=0)

    def end_before(self, number: int) -> int:
        """Return where the text of the messages before a message ends; 0 if they have none."""
        return next((end for i in range(number - 1, -1, -1) if (end := self.end_of(i))), 0)

    def check_calls(self, messages: Sequence[Message], first: int, end: int) -> None:
        """Check that the template wrote the tool calls of some messages, after the text of each.

        Args:
            first, end: the messages [first, end).

        Raises:
            UnusableRow: one is missing. Message text that mentions it does not count.
        """
        for number in range(first, end):
            if messages[number].tool_calls:
                start = self.end_before(number + 1)
                following = (s.start for spans in self.message_spans[number + 1 :] for s in spans)
                check_call(messages[number], number, self.text[start : next(following, None)])


class ChatTemplate:
    """A chat template and its tokenizer."""

    def __init__(
        self,
        tokenizer: Any,
        name: str | None = None,
        *,
        parse_special_tokens: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> None:
        """Load a template.

        Args:
            tokenizer: a fast transformers tokenizer (character offsets are needed).
            name: None = the tokenizer's own template, a built-in name, or the path of a .jinja file.
            parse_special_tokens: parse special tokens in the text of messages, too.
            variables: further variables of the template (`model.chat_template_kwargs`).

        Raises:
            DataError: the template does not exist, or takes too much time or memory, or the tokenizer has no offsets.
        """
        self.tokenizer = tokenizer
        self.tokens = TextTokenizer(tokenizer, parse_special_tokens=parse_special_tokens)
        self.label = f"the chat template {name}" if name else "the chat template"
        """How messages name it."""
        self.variables = dict(variables or {})
        self.is_raw = False
        """Whether the adapter was trained on prompts to which no template is applied. Then inference applies none."""
        self._is_built_in = name in BUILT_IN_TEMPLATES
        own = tokenizer.chat_template
        named = own if isinstance(own, dict) and name is None else {}
        self.source = template_source(name) or (own if isinstance(own, str) else (own or {}).get("default", ""))
        self._tool_source = named.get(TOOL_USE) or self.source
        self._constants = {"documents": None} | dict(tokenizer.special_tokens_map) | self.variables
        self._call_styles: dict[bool, probes.CallStyle] = {}
        self._thought_ends: dict[tuple[bool, str], str] = {}
        self.end_of_turn = ""
        """The text that ends an assistant turn; empty if the template does not end it."""
        if self.source:
            self._try_probes()
            self.end_of_turn = probes.find_end_of_turn(self)

    def _try_probes(self) -> None:
        """Check that the template renders conversations in time, before it is used in this process.

        Raises:
            DataError: it does not.
        """
        if self._is_built_in:
            return
        for source, tools in {self.source: None, self._tool_source: probes.TOOLS}.items():
            conversations = probes.conversations(tools)
            variables = [
                self._variables([message.for_template() for message in conversation.messages], conversation, ask)
                for conversation in conversations
                for ask in (True, False)
            ]
            check_template(self._where, source, variables)

    @property
    def _where(self) -> str:
        """How to name the template and its origin in messages."""
        origin = getattr(self.tokenizer, "name_or_path", "")
        return f"{self.label} of {origin}" if origin and self.label == "the chat template" else self.label

    @functools.cached_property
    def keeps_answers(self) -> bool:
        """Whether an earlier answer is rendered as it is when it is the last message, up to the end of its turn."""
        return probes.keeps_answers(self)

    @functools.cached_property
    def end_tokens(self) -> frozenset[str]:
        """The special tokens that end an answer: EOS, the one after an answer, and the one after tool calls."""
        return probes.find_end_tokens(self) if self.source else frozenset({self.tokenizer.eos_token} - {None})

    @property
    def end_ids(self) -> set[int]:
        """Return the ids of the tokens that end an answer."""
        return {self.tokenizer.convert_tokens_to_ids(token) for token in self.end_tokens}

    def thought_end(self, conversation: Conversation) -> str:
        """Return the text between the reasoning and the text of an answer; empty if the template writes no reasoning.

        Args:
            conversation: the tools and variables of the template. The messages are not used.
        """
        key = (bool(conversation.tools), json.dumps(conversation.template_kwargs, default=str))
        if key not in self._thought_ends:
            self._thought_ends[key] = probes.find_thought_end(self, conversation)
        return self._thought_ends[key]

    def render(self, messages: Sequence[Message], tools: Any = None, variables: Any = None) -> Rendered:
        """Render a conversation and find each message in the text.

        Args:
            tools: JSON schemas of functions, for templates that support them.
            variables: further variables of the template, from the row.

        Raises:
            UnusableRow: the template rejects the conversation, or changes a message so that spans cannot be verified.
        """
        conversation = Conversation(tuple(messages), tools, template_kwargs=variables)
        return self._render(conversation, add_generation_prompt=False)

    def _render(self, conversation: Conversation, *, add_generation_prompt: bool) -> Rendered:
        messages = conversation.messages
        self._check_tool_text(messages, conversation.tools)
        values = self._values(conversation)
        plain = self._apply(values, conversation, add_generation_prompt)
        marked, parts = mark(messages, values)
        located = locate(plain, self._apply(marked, conversation, add_generation_prompt), parts, messages)
        contents: list[Span | None] = [None] * len(messages)
        message_spans: list[list[Span]] = [[] for _ in messages]
        altered, notes = {}, []
        for index, (part, span) in enumerate(zip(parts, located.spans, strict=True)):
            what = "reasoning" if part.is_reasoning else "text"
            if not part.is_reasoning:
                contents[part.message] = span
            if span is not None:
                message_spans[part.message].append(span)
                if index in located.altered:
                    altered[part.message] = f"changes the {what} of"
            else:
                altered[part.message] = f"leaves out the {what} of"
                is_answer = messages[part.message].role == "assistant"
                what = f"{what} of an earlier answer" if is_answer else "system text"
                notes.append(f"the template leaves out the {what}")
        for index, span in located.repeated:
            message_spans[parts[index].message].append(span)
        rendered = Rendered(plain, contents, message_spans, altered, values)
        if self.tokens.find_special("\n".join(message.content + message.reasoning for message in messages)):
            notes.append(SPECIAL_AS_TEXT)
        return rendered._replace(notes=tuple(dict.fromkeys(notes)))

    def apply(self, messages: Sequence[Message], tools: Any = None, variables: Any = None) -> str:
        """Return the text of a conversation, without looking for its messages.

        Raises:
            UnusableRow: the template rejects the conversation.
        """
        conversation = Conversation(tuple(messages), tools, template_kwargs=variables)
        return self._apply(self._values(conversation), conversation, add_generation_prompt=False)

    def prompt(self, conversation: Conversation, values: Sequence[dict[str, Any]] | None = None) -> str:
        """Return the text after which the assistant's next answer is generated.

        For a template without `add_generation_prompt` it is the text before an answer, without the spaces that the
        template writes between the two: a space and the first word of an answer are often one token. Some of these
        templates render a conversation differently when an answer follows (Mistral's write the system text only into a
        last question). Inference renders it without an answer, so then that text is returned.

        Args:
            values: the messages as passed to the template, if they are known.

        Raises:
            UnusableRow: the template rejects the conversation.
        """
        values = self._values(conversation) if values is None else values
        if self._asks(conversation.tools):
            try:
                return self._apply(values, conversation, add_generation_prompt=True)
            except UnusableRow:
                if any(message.role in ("user", "tool") for message in conversation.messages):
                    raise
        number = len(conversation.messages)
        probe = self._render(
            conversation._replace(messages=(*conversation.messages, probes.ANSWER)), add_generation_prompt=False
        )
        span = probe.spans[number]
        if span is None:
            raise UnusableRow(f"{self.label} leaves out the answer")
        text = probe.text[: max(probe.end_before(number), len(probe.text[: span.start].rstrip(" ")))]
        try:
            alone = self._apply(values, conversation, add_generation_prompt=False)
        except UnusableRow:
            return text
        ends = tuple({self.tokenizer.eos_token, self.end_of_turn} - {"", None})
        return text if text.startswith(alone.rstrip()) or alone.rstrip().endswith(ends) else alone

    def render_prompt(self, conversation: Conversation) -> Rendered:
        """Render a prompt and find its messages.

        Raises:
            UnusableRow: the template rejects the conversation, or changes a message so that spans cannot be verified.
        """
        prompt, number = self.prompt(conversation), len(conversation.messages)
        rendered = self._render(conversation, add_generation_prompt=self._asks(conversation.tools))
        if not prompt.startswith(rendered.text.rstrip()):
            messages = (*conversation.messages, probes.ANSWER)
            rendered = self._render(conversation._replace(messages=messages), add_generation_prompt=False)
        return rendered._replace(
            text=prompt, spans=rendered.spans[:number], message_spans=rendered.message_spans[:number]
        )

    def encode_prompt(self, messages: Sequence[Message], tools: Any = None, variables: Any = None) -> list[int]:
        """Return the tokens after which the assistant's next answer is generated, the same as in training.

        Raises:
            DataError: the template rejects the conversation.
        """
        conversation = Conversation(tuple(messages), tools, template_kwargs=variables)
        if self.source and not self._is_built_in:
            source = self._tool_source if tools else self.source
            check_template(self._where, source, [self._variables(self._values(conversation), conversation, True)])
        try:
            prompt = self.render_prompt(conversation)
            self.check_tools(conversation)
        except UnusableRow as error:
            last = messages[-1].content if messages else ""
            raise DataError(f"prompt {last!r:.60}: {error}; fix the prompt or the template") from None
        return self.bos_prefix(prompt.text) + self.tokens.encode(prompt.text, prompt.untrusted).ids

    def encode_text(self, text: str) -> list[int]:
        """Return the tokens of a prompt without a template: the prompt of a completion."""
        return self.tokens.bos_prefix(text) + self.tokens.encode(text, [Span(0, len(text))]).ids

    def bos_prefix(self, text: str) -> list[int]:
        """Return the tokens before a rendered text: BOS if the template does not write it, else nothing.

        A tokenizer's own template, or a file, writes what its model needs. The built-in templates serve many models and
        leave BOS to the tokenizer, as FastChat does.
        """
        return self.tokens.bos_prefix(text) if self._is_built_in else []

    def _asks(self, tools: Any) -> bool:
        """Whether the template has a generation prompt."""
        return "add_generation_prompt" in (self._tool_source if tools else self.source)

    def _values(self, conversation: Conversation) -> list[dict[str, Any]]:
        """Return the messages as passed to the template."""
        values = [message.for_template() for message in conversation.messages]
        if any(message.tool_calls for message in conversation.messages):
            has_tools = bool(conversation.tools)  # some templates write calls only then
            if has_tools not in self._call_styles:
                self._call_styles[has_tools] = probes.find_call_style(self, conversation.tools)
            style = self._call_styles[has_tools]
            values = [style.apply(value) for value in values]
        return values

    def render_values(self, values: Sequence[dict[str, Any]], conversation: Conversation) -> str:
        """Return the text of messages as they are passed to the template.

        Args:
            conversation: its tools and variables are used.

        Raises:
            UnusableRow: the template rejects them.
        """
        return self._apply(values, conversation, add_generation_prompt=False)

    def _apply(self, values: Sequence[dict[str, Any]], conversation: Conversation, add_generation_prompt: bool) -> str:
        source = self._tool_source if conversation.tools else self.source
        if not source:
            raise DataError(
                "the tokenizer has no chat template; set model.chat_template to one of "
                f"{', '.join(BUILT_IN_TEMPLATES)} or to a .jinja file"
            )
        try:
            return _compiled(source).render(self._variables(values, conversation, add_generation_prompt))
        except jinja2.TemplateSyntaxError as error:
            raise DataError(f"model.chat_template: not valid Jinja, line {error.lineno}: {error.message}") from None
        except Exception as error:  # templates are untrusted programs that may raise anything
            raise UnusableRow(f"the chat template rejects it: {error}") from None

    def _variables(
        self, values: Sequence[dict[str, Any]], conversation: Conversation, add_generation_prompt: bool
    ) -> dict[str, Any]:
        """Return all variables of the template."""
        variables = {**self._constants, **(conversation.template_kwargs or {})}
        variables |= {"messages": values, "tools": conversation.tools, "add_generation_prompt": add_generation_prompt}
        return variables

    def end_of_specials(self, text: str, start: int) -> int | None:
        """Return where the first special tokens after a position end, up to EOS; None if there are none."""
        span = self.tokens.first_special(text, start)
        end = None
        while span is not None and end in (None, span.start):
            end = span.end
            if text[span.start : span.end] == self.tokenizer.eos_token:
                break
            span = self.tokens.first_special(text, span.end)
        return end

    def check_tools(self, conversation: Conversation) -> None:
        """Check that the template writes every tool into the prompt of the first answer, where no call mentions it.

        Raises:
            UnusableRow: one is missing. Message text that mentions it does not count.
        """
        if not conversation.tools:
            return
        messages = conversation.messages
        first = next((i for i, message in enumerate(messages) if message.role == "assistant"), len(messages))
        try:
            rendered = self.render_prompt(conversation._replace(messages=messages[:first]))
        except UnusableRow:
            if first:
                raise
            rendered = self._render(conversation, add_generation_prompt=False)
        edges = [0, *(edge for span in rendered.untrusted for edge in span), len(rendered.text)]
        written = "\0".join(rendered.text[start:end] for start, end in zip(edges[::2], edges[1::2], strict=True))
        for tool in conversation.tools:
            check_contains(written, tool.get("function", tool).get("name") or tool.get("type"), "a tool")

    def _check_tool_text(self, messages: Sequence[Message], tools: Any) -> None:
        """Check that tools and calls contain no special token: templates write them where no marks can be added."""
        for data in (tools, *((m.tool_calls, m.name, m.tool_call_id) for m in messages)):
            if not data or not any(data):
                continue
            text = json.dumps(data, ensure_ascii=False)
            if RESERVED.search(text):
                raise UnusableRow("a tool or tool call contains characters of Unicode private use area B")
            if token := self.tokens.find_special(text):
                raise UnusableRow(f"a tool or tool call contains the text of the special token {token}")


def _compiled(source: str) -> jinja2.Template:
    """Return the template as transformers compiles it: sandboxed, and cached.

    The public `render_jinja_template` copies every message at every rendering, for messages that are rich objects.
    Messages here are plain, and are rendered several times per answer.
    """
    from transformers.utils.chat_template_utils import _compile_jinja_template

    template: jinja2.Template = _compile_jinja_template(source)
    return template


def template_source(name: str | None) -> str:
    """Return the text of a built-in template or a file; empty for None, the tokenizer's own.

    Raises:
        DataError: the template does not exist, is empty, or is not UTF-8.
    """
    if name is None:
        return ""
    if name in BUILT_IN_TEMPLATES:
        return (resources.files("lora_accel.data") / "templates" / f"{name}.jinja").read_text(encoding="utf-8")
    if not name.endswith((".jinja", ".jinja2")):
        raise DataError(
            f"model.chat_template: unknown template {name!r}{did_you_mean(name, BUILT_IN_TEMPLATES)}; "
            f"built in are {', '.join(BUILT_IN_TEMPLATES)}; a file ends in .jinja"
        )
    try:
        with io.TextIOWrapper(open_to_read(Path(name)), encoding="utf-8") as file:
            text = file.read()
    except FileNotFoundError:
        raise DataError(
            f"model.chat_template: {name}: no such file; paths are relative to the working directory"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"model.chat_template: {name} cannot be read as UTF-8 text: {error}") from None
    if not text.strip():
        raise DataError(f"model.chat_template: {name} is empty; use a template, or null for the tokenizer's own")
    return text
