"""Render messages with a chat template, tokenize the text, and mark the supervised tokens.

An answer is supervised from where its prompt ends (the prompt that `generate` passes to the model) to the token that
ends its turn. For every supervised answer, the training text is checked to start with exactly that prompt. Masks come
from character spans, so they do not depend on token ids.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from lora_accel.data.formats import Completion, Conversation, MalformedRow, Message, Pretokenized, Record, UnusableRow
from lora_accel.data.spans import RESERVED, Span, locate, mark
from lora_accel.data.tokens import TextTokenizer, Tokens, special_tokens
from lora_accel.errors import DataError, did_you_mean
from lora_accel.labels import IGNORE_INDEX

BUILT_IN_TEMPLATES = ("alpaca", "chatml", "gemma", "llama-2", "llama-3", "vicuna_v1.1", "zephyr")
SPECIAL_AS_TEXT = "special tokens in the text are tokenized as plain text"
"""Note in the ledger."""


class Rendered(NamedTuple):
    """A rendered conversation, with the span of each message."""

    text: str
    spans: list[Span | None]
    """The span of each message's content; None if it is empty, or the template left it out."""
    message_spans: list[list[Span]]
    """The spans of each message's text, reasoning included. All other text was written by the template."""
    values: list[dict[str, Any]]
    """The messages as passed to the template."""
    notes: tuple[str, ...] = ()
    """Changes that the template made to the messages, for the ledger."""

    @property
    def untrusted(self) -> list[Span]:
        """Return the spans of all message text, in order."""
        return sorted(span for spans in self.message_spans for span in spans)

    def check_tools(self, messages: Sequence[Message], tools: Any) -> None:
        """Check that the template wrote every tool and every tool call.

        Raises:
            UnusableRow: one is missing. Message text that mentions it does not count.
        """
        edges = [0, *(edge for span in self.untrusted for edge in span), len(self.text)]
        written = "\0".join(self.text[start:end] for start, end in zip(edges[::2], edges[1::2], strict=True))
        for tool in tools or ():
            _check_contains(written, tool.get("function", tool).get("name") or tool.get("type"), "a tool")
        for number, message in enumerate(messages):
            if message.tool_calls:
                start = max((s.end for spans in self.message_spans[: number + 1] for s in spans), default=0)
                following = (s.start for spans in self.message_spans[number + 1 :] for s in spans)
                until_next = self.text[start : min(following, default=len(self.text))]
                calls = [call["function"] for call in message.tool_calls]
                _check_contains(until_next, calls, f"a tool call of message {number + 1}")


class Example(NamedTuple):
    """One training sequence."""

    input_ids: list[int]
    labels: list[int]
    """The token itself where it is supervised, else -100. The first is always -100: nothing predicts it."""
    key: int = 0
    """64-bit key from which the dropout masks of its tokens are derived; set when a step uses the example."""
    row: tuple[str, int] = ("", 0)
    """File and number of the row that it comes from."""
    notes: tuple[str, ...] = ()
    """Changes made to the row, for the ledger."""

    @property
    def num_supervised(self) -> int:
        """Return the number of supervised tokens."""
        return len(self.labels) - self.labels.count(IGNORE_INDEX)


class ChatTemplate:
    """A chat template and its tokenizer. Renders conversations and finds each message in the text."""

    def __init__(self, tokenizer: Any, name: str | None = None, *, parse_special_tokens: bool = False) -> None:
        """Load a template.

        Args:
            tokenizer: a fast transformers tokenizer (character offsets are needed).
            name: None = the tokenizer's own template, a built-in name, or the path of a .jinja file.
            parse_special_tokens: parse special tokens in the text of messages, too.

        Raises:
            DataError: the template does not exist, or the tokenizer has no offsets.
        """
        self.tokenizer = tokenizer
        self.tokens = TextTokenizer(tokenizer, parse_special_tokens=parse_special_tokens)
        self._is_built_in = name in BUILT_IN_TEMPLATES
        self.source = template_source(name) or _own_template(tokenizer)
        self._special_tokens_map: dict[str, Any] = dict(tokenizer.special_tokens_map)
        self._has_generation_prompt = "add_generation_prompt" in self.source
        self.end_of_turn = self._find_end_of_turn() if self.source else ""

    @property
    def end_ids(self) -> set[int]:
        """Return the tokens that end an answer: the end-of-turn token, if it is a special one, and EOS."""
        ends = {self.tokenizer.eos_token, self.end_of_turn.strip()} & special_tokens(self.tokenizer)
        return {self.tokenizer.convert_tokens_to_ids(token) for token in ends}

    def render(
        self, messages: Sequence[Message], tools: Any = None, *, add_generation_prompt: bool = False
    ) -> Rendered:
        """Render a conversation and find each message in the text.

        Args:
            tools: JSON schemas of functions, for templates that support them.
            add_generation_prompt: end the text where the assistant's next answer begins.

        Raises:
            UnusableRow: the template rejects the conversation, or changes a message so that its span cannot be
                verified.
        """
        values = [message.for_template() for message in messages]
        plain = self._apply_template(values, tools, add_generation_prompt)
        marked, parts = mark(messages, values)
        self._check_tool_text(messages, tools)
        spans = locate(plain, self._apply_template(marked, tools, add_generation_prompt), parts, messages)
        contents: list[Span | None] = [None] * len(messages)
        message_spans: list[list[Span]] = [[] for _ in messages]
        notes = []
        for part, span in zip(parts, spans, strict=True):
            if not part.is_reasoning:
                contents[part.message] = span
            if span is not None:
                message_spans[part.message].append(span)
            else:
                what = "reasoning of an earlier answer" if part.is_reasoning else "system text"
                notes.append(f"the template leaves out the {what}")
        rendered = Rendered(plain, contents, message_spans, values)
        rendered.check_tools(messages, tools)
        if self.tokens.find_special("\n".join(message.content + message.reasoning for message in messages)):
            notes.append(SPECIAL_AS_TEXT)
        return rendered._replace(notes=tuple(dict.fromkeys(notes)))

    def prompt(self, messages: Sequence[Message], tools: Any = None) -> str:
        """Return the text after which the assistant's next answer is generated.

        For a template without `add_generation_prompt`, it is the text before an answer.

        Raises:
            UnusableRow: the template rejects the conversation.
        """
        if self._has_generation_prompt:
            values = [message.for_template() for message in messages]
            return self._apply_template(values, tools, add_generation_prompt=True)
        return self._before_answer(messages, tools)

    def _before_answer(self, messages: Sequence[Message], tools: Any) -> str:
        """Return the text that the template writes before an answer."""
        probe = self.render((*messages, Message("assistant", "answer")), tools)
        assert probe.spans[-1] is not None
        return probe.text[: probe.spans[-1].start]

    def encode_prompt(self, messages: Sequence[Message], tools: Any = None) -> list[int]:
        """Return the tokens after which the assistant's next answer is generated, the same as in training.

        Raises:
            DataError: the template rejects the conversation.
        """
        try:
            prompt = self.prompt(messages, tools)
            rendered = self.render(messages, tools, add_generation_prompt=self._has_generation_prompt)
        except UnusableRow as error:
            last = messages[-1].content if messages else ""
            raise DataError(f"prompt {last!r:.60}: {error}; fix the prompt or the template") from None
        return self.bos_prefix(prompt) + self.tokens.encode_prompt(prompt, rendered.untrusted)

    def encode_text(self, text: str) -> list[int]:
        """Return the tokens of a prompt without a template: the prompt of a completion."""
        return self.tokens.bos_prefix(text) + self.tokens.encode_prompt(text, [Span(0, len(text))])

    def bos_prefix(self, text: str) -> list[int]:
        """Return the tokens before a rendered text: BOS if the template does not write it, else nothing.

        A tokenizer's own template, or a file, writes what its model needs. The built-in templates serve many models and
        leave BOS to the tokenizer, as FastChat does.
        """
        return self.tokens.bos_prefix(text) if self._is_built_in else []

    def answer_span(self, messages: Sequence[Message], number: int, rendered: Rendered, tools: Any = None) -> Span:
        """Return the span that the model has to generate for an answer, from the end of its prompt to its end of turn.

        Args:
            number: 0-based index of the answer in `messages`.

        Raises:
            UnusableRow: the text before the answer is not the prompt of `generate`, or the answer's end cannot be
                verified.
        """
        text, content = rendered.text, rendered.spans[number]
        if self._has_generation_prompt and any(message.role in ("user", "tool") for message in messages[:number]):
            prompt = self._apply_template(rendered.values[:number], tools, add_generation_prompt=True)
        else:
            prompt = self._before_answer(messages[:number], tools)
        if not text.startswith(prompt):
            raise UnusableRow(
                f"the text before message {number + 1} is not the prompt that the chat template makes for it"
            )
        start = len(prompt)
        text_end = max([start, *(span.end for span in rendered.message_spans[number])])
        next_start = min((span.start for span in rendered.untrusted if span.end > text_end), default=len(text))
        end = text.find(self.end_of_turn, text_end, next_start) if self.end_of_turn else -1
        if (
            end >= 0
            and number + 1 < len(messages)
            and not rendered.message_spans[number + 1]
            and not self._ends_turn(messages, number, rendered, tools, end + len(self.end_of_turn))
        ):
            end = -1
        if not messages[number].tool_calls:
            # The model must also generate what a template adds to an empty answer, such as an empty think block.
            is_closed = content is None or end == text_end or text[text_end:end].isspace()
            return Span(start, end + len(self.end_of_turn) if is_closed and end >= 0 else text_end)
        if end < 0:
            raise UnusableRow(f"nothing ends message {number + 1}, so the span of its tool calls cannot be verified")
        return Span(start, end + len(self.end_of_turn))

    def _ends_turn(self, messages: Sequence[Message], number: int, rendered: Rendered, tools: Any, end: int) -> bool:
        """Whether the end-of-turn token before `end` belongs to this answer, if the next message has no text.

        With tool calls, it does if the text up to it is the same when the answer is the last message. Otherwise, it
        does if the token also follows another content in place of the answer's.
        """
        if messages[number].tool_calls:
            alone = self._apply_template(rendered.values[: number + 1], tools, add_generation_prompt=False)
            return alone[:end] == rendered.text[:end]
        probe = self.render([*messages[:number], Message("assistant", "answer"), *messages[number + 1 :]], tools)
        span = probe.spans[number]
        return span is not None and probe.text.startswith(self.end_of_turn, span.end)

    def _apply_template(self, messages: Sequence[dict[str, Any]], tools: Any, add_generation_prompt: bool) -> str:
        if not self.source:
            raise DataError(
                "the tokenizer has no chat template; set model.chat_template to one of "
                f"{', '.join(BUILT_IN_TEMPLATES)} or to a .jinja file"
            )
        try:
            text = self._jinja.render(
                messages=messages,
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens_map,
            )
        except jinja2.TemplateSyntaxError as error:
            raise DataError(f"model.chat_template: not valid Jinja, line {error.lineno}: {error.message}") from None
        except Exception as error:  # templates are untrusted programs that may raise anything
            raise UnusableRow(f"the chat template rejects it: {error}") from None
        return text

    @property
    def _jinja(self) -> jinja2.Template:
        """The template as transformers compiles it: sandboxed, and cached.

        The public `render_jinja_template` copies every message at every rendering, for messages that are rich objects.
        Messages here are plain, and are rendered once per answer.
        """
        from transformers.utils.chat_template_utils import _compile_jinja_template

        template: jinja2.Template = _compile_jinja_template(self.source)
        return template

    def _find_end_of_turn(self) -> str:
        """Return what ends an assistant turn: a special token with the white space before it, if there is one.

        Otherwise, the text that the template writes after every answer, whether or not it is the last message.
        """
        probe = (Message("user", "question"), Message("assistant", "answer"))
        try:
            tails = []
            for messages in (probe, (*probe, Message("user", "another"))):
                rendered = self.render(messages)
                assert rendered.spans[1] is not None
                tails.append(rendered.text[rendered.spans[1].end :])
        except UnusableRow:
            return ""
        after_last = tails[0]
        for token in sorted(special_tokens(self.tokenizer), key=len, reverse=True):
            if after_last.lstrip().startswith(token):
                return after_last[: len(after_last) - len(after_last.lstrip()) + len(token)]
        common = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(*tails, strict=False))
        return "".join(letter for letter, _ in common).rstrip()

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


def encode_record(record: Record, template: ChatTemplate, loss_on: str) -> Example:
    """Tokenize a record in full and mark its supervised tokens (there may be none).

    Args:
        loss_on: assistant, last_assistant or all (`data.loss_on`).

    Raises:
        UnusableRow: the template rejects the record, or its mask cannot be verified.
        MalformedRow: a token id is outside the vocabulary.
    """
    if isinstance(record, Pretokenized):
        return _encode_pretokenized(record, len(template.tokenizer))
    if isinstance(record, Conversation):
        return _encode_conversation(record, template, loss_on)
    prompt, completion = record if isinstance(record, Completion) else ("", record.text)
    untrusted = prompt + completion
    if RESERVED.search(untrusted):
        raise UnusableRow("the text contains characters of Unicode private use area B")
    text = untrusted + (template.tokenizer.eos_token or "")
    start = 0 if loss_on == "all" else len(prompt)
    tokens = template.tokens.encode(text, [Span(0, len(untrusted))])
    supervised = tokens.within(Span(start, len(text)), [Span(0, start)] if start else [])
    notes = (SPECIAL_AS_TEXT,) if template.tokens.find_special(untrusted) else ()
    return _make_example(tokens, [supervised], template.tokens.bos_prefix(text), notes)


def question_of(record: Record, template: ChatTemplate) -> tuple[list[int], str] | None:
    """Return the prompt tokens of a record's last answer, and the answer; None for records without an answer."""
    if isinstance(record, Completion):
        return template.encode_text(record.prompt), record.completion
    if not isinstance(record, Conversation):
        return None
    last = max(i for i, message in enumerate(record.messages) if message.role == "assistant")
    return template.encode_prompt(record.messages[:last], record.tools), record.messages[last].content


def _encode_conversation(record: Conversation, template: ChatTemplate, loss_on: str) -> Example:
    messages = record.messages
    rendered = template.render(messages, record.tools)
    tokens = template.tokens.encode(rendered.text, rendered.untrusted)
    prefix, notes = template.bos_prefix(rendered.text), (*record.notes, *rendered.notes)
    if loss_on == "all":
        return _make_example(tokens, [range(len(tokens.ids))], prefix, notes)
    answers = [i for i, message in enumerate(messages) if message.role == "assistant"]
    if loss_on == "last_assistant":
        answers = answers[-1:]
    answers = [i for i in answers if messages[i].supervised]
    answer_spans = [template.answer_span(messages, i, rendered, record.tools) for i in answers]
    excluded = [span for i, spans in enumerate(rendered.message_spans) if i not in answers for span in spans]
    return _make_example(tokens, [tokens.within(span, excluded) for span in answer_spans], prefix, notes)


def _encode_pretokenized(record: Pretokenized, vocab_size: int) -> Example:
    unknown = next((token for token in record.input_ids if not 0 <= token < vocab_size), None)
    if unknown is not None:
        raise MalformedRow(f"input_ids contains {unknown}, but the tokenizer has {vocab_size} tokens")
    return Example(record.input_ids, [IGNORE_INDEX, *record.labels[1:]])


def _make_example(tokens: Tokens, supervised: Sequence[range], prefix: list[int], notes: tuple[str, ...]) -> Example:
    labels = [IGNORE_INDEX] * len(tokens.ids)
    for run in supervised:
        labels[run.start : run.stop] = tokens.ids[run.start : run.stop]
    input_ids, labels = prefix + tokens.ids, [IGNORE_INDEX] * len(prefix) + labels
    return Example(input_ids, [IGNORE_INDEX, *labels[1:]], notes=notes)


def _check_contains(text: str, value: Any, what: str) -> None:
    """Check that a text contains every string and number of a value, as it is or in JSON."""
    for leaf in _leaves(value):
        encoded = json.dumps(leaf, ensure_ascii=False)
        if str(leaf) not in text and encoded.strip('"') not in text:
            raise UnusableRow(f"the chat template leaves {what} out, or writes {leaf!r:.40} differently")


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for item in value.values():
            yield from _leaves(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, (str, int, float)) and not isinstance(value, bool):
        yield value


def _own_template(tokenizer: Any) -> str:
    own = tokenizer.chat_template
    return own if isinstance(own, str) else (own or {}).get("default", "")


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
        text = Path(name).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(
            f"model.chat_template: {name}: no such file; paths are relative to the working directory"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"model.chat_template: {name} cannot be read as UTF-8 text: {error}") from None
    if not text.strip():
        raise DataError(f"model.chat_template: {name} is empty; use a template, or null for the tokenizer's own")
    return text
