"""Messages to text by a template, and text to tokens, each supervised or not.

What is learned of an answer is what the model will have to write: all that follows the prompt which `generate` feeds
for it, up to the token that ends its turn. That this prompt, to the letter, begins the text of training is checked for
every answer that is learned. Masks come from character spans, so they cannot depend on token ids.
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
from lora_accel.data.spans import OURS, Span, locate, mark
from lora_accel.data.tokens import TextTokenizer, Tokens, special_tokens
from lora_accel.errors import DataError, did_you_mean
from lora_accel.labels import IGNORE_INDEX

BUILT_IN_TEMPLATES = ("alpaca", "chatml", "gemma", "llama-2", "llama-3", "vicuna_v1.1", "zephyr")


class Rendered(NamedTuple):
    """A text, and where each message stands in it."""

    text: str
    spans: list[Span | None]
    """Of each message its content; None: it is empty, or the template left it out."""
    words: list[list[Span]]
    """Of each message all of its words, reasoning among them. What is none's the template wrote."""
    values: list[dict[str, Any]]
    """The messages as the template saw them."""
    notes: tuple[str, ...] = ()
    """What the template did to the messages that a person should know."""

    @property
    def data(self) -> list[Span]:
        """Return where anybody's words stand, in order."""
        return sorted(span for spans in self.words for span in spans)

    def check_nothing_left_out(self, messages: Sequence[Message], tools: Any) -> None:
        """Refuse a text in which the template wrote nothing of a tool or of a call.

        Raises:
            UnusableRow: it did so. What stands in anybody's words does not count.
        """
        edges = [0, *(edge for span in self.data for edge in span), len(self.text)]
        written = "\0".join(self.text[start:end] for start, end in zip(edges[::2], edges[1::2], strict=True))
        for tool in tools or ():
            _check_nothing_left_out(tool.get("function", tool).get("name") or tool.get("type"), written, "a tool")
        for number, message in enumerate(messages):
            if message.tool_calls:
                after = max((s.end for spans in self.words[: number + 1] for s in spans), default=0)
                until = min((s.start for spans in self.words[number + 1 :] for s in spans), default=len(self.text))
                what = f"a tool call of message {number + 1}"
                _check_nothing_left_out([c["function"] for c in message.tool_calls], self.text[after:until], what)


class Example(NamedTuple):
    """One training sequence."""

    input_ids: list[int]
    labels: list[int]
    """The token itself where it is supervised, else -100. The first is always -100: nothing predicts it."""
    key: int = 0
    """64 bits from which the dropout of its tokens is derived; given when a step takes the example."""
    row: tuple[str, int] = ("", 0)
    """The file and the number of the row it comes from."""
    notes: tuple[str, ...] = ()
    """What a person should know of how it came about; for the ledger."""

    @property
    def num_supervised(self) -> int:
        """Return the number of supervised tokens."""
        return len(self.labels) - self.labels.count(IGNORE_INDEX)


class ChatTemplate:
    """A chat template on its tokenizer: renders conversations and knows where each message stands."""

    def __init__(self, tokenizer: Any, name: str | None = None, *, parse_special_tokens: bool = False) -> None:
        """Choose a template.

        Args:
            tokenizer: a fast tokenizer of transformers (offsets are needed).
            name: None = the tokenizer's own, a built-in name, or the path of a .jinja file.
            parse_special_tokens: whether the text of a special token counts as one in messages, too.

        Raises:
            DataError: there is no such template, or the tokenizer has no offsets.
        """
        self.tokenizer = tokenizer
        self.tokens = TextTokenizer(tokenizer, parse_special_tokens=parse_special_tokens)
        self._built_in = name in BUILT_IN_TEMPLATES
        self.source = template_source(name) or _own_template(tokenizer)
        self._specials: dict[str, Any] = dict(tokenizer.special_tokens_map)
        self._asks = "add_generation_prompt" in self.source
        self.end_of_turn = self._find_end_of_turn() if self.source else ""

    @property
    def end_ids(self) -> set[int]:
        """Return the tokens at which an answer ends: that of its turn, and that of a text."""
        ends = {self.tokenizer.eos_token, self.end_of_turn.strip()} & special_tokens(self.tokenizer)
        return {self.tokenizer.convert_tokens_to_ids(token) for token in ends}

    def render(self, messages: Sequence[Message], tools: Any = None, *, asks: bool = False) -> Rendered:
        """Render a conversation and find each message in it.

        Args:
            tools: JSON schemas of functions, for templates that have a place for them.
            asks: whether the text ends where the assistant's next words begin.

        Raises:
            UnusableRow: the template refuses the conversation, or changes a message so that its place
                cannot be proven.
        """
        values = [message.for_template() for message in messages]
        plain = self._apply(values, tools, asks)
        marked, parts = mark(messages, values)
        self._refuse_hidden_specials(messages, tools)
        spans = locate(plain, self._apply(marked, tools, asks), parts, messages)
        contents: list[Span | None] = [None] * len(messages)
        words: list[list[Span]] = [[] for _ in messages]
        notes = []
        for part, span in zip(parts, spans, strict=True):
            if not part.is_reasoning:
                contents[part.message] = span
            if span is not None:
                words[part.message].append(span)
            else:
                what = "reasoning of an earlier answer" if part.is_reasoning else "system text"
                notes.append(f"the template leaves out the {what}")
        rendered = Rendered(plain, contents, words, values)
        rendered.check_nothing_left_out(messages, tools)
        if self.tokens.find_special("\n".join(message.content + message.reasoning for message in messages)):
            notes.append("the text of a special token is read as text")
        return rendered._replace(notes=tuple(dict.fromkeys(notes)))

    def prompt(self, messages: Sequence[Message], tools: Any = None) -> str:
        """Return the text after which the assistant's next words are generated.

        A template that knows no `add_generation_prompt` shows it in what it writes before an answer.

        Raises:
            UnusableRow: the template refuses the conversation.
        """
        if self._asks:
            return self._apply([message.for_template() for message in messages], tools, asks=True)
        return self._before_answer(messages, tools)

    def _before_answer(self, messages: Sequence[Message], tools: Any) -> str:
        """Return what the template writes before an answer."""
        probed = self.render((*messages, Message("assistant", "answer")), tools)
        assert probed.spans[-1] is not None
        return probed.text[: probed.spans[-1].start]

    def encode_prompt(self, messages: Sequence[Message], tools: Any = None) -> list[int]:
        """Return the tokens after which the assistant's next words are generated, the same as in training.

        Raises:
            DataError: the template refuses the conversation.
        """
        try:
            prompt = self.prompt(messages, tools)
            asks = self.render(messages, tools, asks=self._asks)
        except UnusableRow as error:
            shown = messages[-1].content if messages else ""
            raise DataError(f"prompt {shown!r:.60}: {error}; mend the prompt or the template") from None
        return self.begin(prompt) + self.tokens.encode_prompt(prompt, asks.data)

    def encode_text(self, text: str) -> list[int]:
        """Return the tokens of a text that no template wrote: the prompt of a completion."""
        return self.tokens.begin(text) + self.tokens.encode_prompt(text, [Span(0, len(text))])

    def begin(self, text: str) -> list[int]:
        """Return the tokens before a rendered text: the begin token where it is missing.

        A tokenizer's own template, or a file, writes what its model wants. The built-in ones serve many models and
        leave it to the tokenizer, as FastChat does.
        """
        return self.tokens.begin(text) if self._built_in else []

    def answer_span(self, messages: Sequence[Message], number: int, rendered: Rendered, tools: Any = None) -> Span:
        """Return where that stands which the model has to write as the message of this number, from 0.

        Raises:
            UnusableRow: `generate` would feed something else than what stands before it, or its end cannot be proven.
        """
        text, content = rendered.text, rendered.spans[number]
        if self._asks and any(message.role in ("user", "tool") for message in messages[:number]):
            prompt = self._apply(rendered.values[:number], tools, asks=True)
        else:
            prompt = self._before_answer(messages[:number], tools)
        if not text.startswith(prompt):
            raise UnusableRow(
                f"the text before message {number + 1} is not the prompt that the chat template makes for it"
            )
        start = len(prompt)
        written = max([start, *(span.end for span in rendered.words[number])])
        following = min((span.start for span in rendered.data if span.end > written), default=len(text))
        end = text.find(self.end_of_turn, written, following) if self.end_of_turn else -1
        if end >= 0 and number + 1 < len(messages) and not rendered.words[number + 1]:
            end = end if self._ends_its_turn(messages, number, rendered, tools, end + len(self.end_of_turn)) else -1
        if not messages[number].tool_calls:
            # What a template writes into an empty answer (an empty thought, say) the model has to write, too.
            closed = content is None or end == written or text[written:end].isspace()
            return Span(start, end + len(self.end_of_turn) if closed and end >= 0 else written)
        if end < 0:
            raise UnusableRow(f"nothing ends message {number + 1}, so the place of its tool calls cannot be proven")
        return Span(start, end + len(self.end_of_turn))

    def _ends_its_turn(
        self, messages: Sequence[Message], number: int, rendered: Rendered, tools: Any, end: int
    ) -> bool:
        """Whether a turn ends where its end token was found, when no words of the next message stand behind it.

        One with calls does if it ends there as the last one, too; one with words or none, if words in their place are
        followed by the end token.
        """
        if messages[number].tool_calls:
            return self._apply(rendered.values[: number + 1], tools, asks=False)[:end] == rendered.text[:end]
        probed = self.render([*messages[:number], Message("assistant", "answer"), *messages[number + 1 :]], tools)
        span = probed.spans[number]
        return span is not None and probed.text.startswith(self.end_of_turn, span.end)

    def _apply(self, messages: Sequence[dict[str, Any]], tools: Any, asks: bool) -> str:
        if not self.source:
            raise DataError(
                "the tokenizer has no chat template; set model.chat_template to one of "
                f"{', '.join(BUILT_IN_TEMPLATES)} or to a .jinja file"
            )
        try:
            text = self._jinja.render(
                messages=messages, tools=tools, documents=None, add_generation_prompt=asks, **self._specials
            )
        except jinja2.TemplateSyntaxError as error:
            raise DataError(f"model.chat_template: not valid Jinja, line {error.lineno}: {error.message}") from None
        except Exception as error:  # a template is somebody's program and may raise anything
            raise UnusableRow(f"the chat template refuses it: {error}") from None
        return text

    @property
    def _jinja(self) -> jinja2.Template:
        """The template as transformers compiles it, sandboxed.

        Its public `render_jinja_template` copies every message at every rendering, as rich objects might need; ours are
        plain already, and are rendered once for each answer. (It keeps what it has compiled.)
        """
        from transformers.utils.chat_template_utils import _compile_jinja_template

        template: jinja2.Template = _compile_jinja_template(self.source)
        return template

    def _find_end_of_turn(self) -> str:
        """Return what closes an assistant turn: a special token, with any white space before it, or else the text that
        the template writes after every answer, the last one and others."""
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

    def _refuse_hidden_specials(self, messages: Sequence[Message], tools: Any) -> None:
        """Refuse the text of a special token where a template writes data that cannot be marked."""
        for where in (tools, *((m.tool_calls, m.name, m.tool_call_id) for m in messages)):
            if not where or not any(where):
                continue
            text = json.dumps(where, ensure_ascii=False)
            if OURS.search(text):
                raise UnusableRow("a tool, or a call of one, holds characters of private use area B")
            if found := self.tokens.find_special(text):
                raise UnusableRow(f"a tool, or a call of one, holds the text of the special token {found}")


def encode_record(record: Record, template: ChatTemplate, loss_on: str) -> Example:
    """Tokenise a record, whole, and mark what is supervised (which may be nothing).

    Raises:
        UnusableRow: the template refuses it, or its masks cannot be proven.
    """
    if isinstance(record, Pretokenized):
        return _pretokenized(record, len(template.tokenizer))
    if isinstance(record, Conversation):
        return _encode_conversation(record, template, loss_on)
    prompt, text = record if isinstance(record, Completion) else ("", record.text)
    if OURS.search(prompt + text):
        raise UnusableRow("the text holds characters of private use area B")
    whole, words = prompt + text + (template.tokenizer.eos_token or ""), len(prompt) + len(text)
    start = 0 if loss_on == "all" else len(prompt)
    tokens = template.tokens.encode(whole, [Span(0, words)])
    learned = tokens.within(Span(start, len(whole)), [Span(0, start)] if start else [])
    notes = ("the text of a special token is read as text",) if template.tokens.find_special(whole[:words]) else ()
    return _example(tokens, [learned], template.tokens.begin(whole), notes)


def question_of(record: Record, template: ChatTemplate) -> tuple[list[int], str] | None:
    """Return the tokens before a record's last answer, and that answer; None where there is none in words."""
    if isinstance(record, Completion):
        return template.encode_text(record.prompt), record.completion
    if not isinstance(record, Conversation):
        return None
    last = max(i for i, message in enumerate(record.messages) if message.role == "assistant")
    return template.encode_prompt(record.messages[:last], record.tools), record.messages[last].content


def _encode_conversation(record: Conversation, template: ChatTemplate, loss_on: str) -> Example:
    messages = record.messages
    rendered = template.render(messages, record.tools)
    tokens = template.tokens.encode(rendered.text, rendered.data)
    prefix, notes = template.begin(rendered.text), (*record.notes, *rendered.notes)
    if loss_on == "all":
        return _example(tokens, [range(len(tokens.ids))], prefix, notes)
    answers = [i for i, message in enumerate(messages) if message.role == "assistant"]
    if loss_on == "last_assistant":
        answers = answers[-1:]
    answers = [i for i in answers if messages[i].learned]
    spans = [template.answer_span(messages, i, rendered, record.tools) for i in answers]
    foreign = [span for i, words in enumerate(rendered.words) if i not in answers for span in words]
    return _example(tokens, [tokens.within(span, foreign) for span in spans], prefix, notes)


def _pretokenized(record: Pretokenized, vocabulary: int) -> Example:
    beyond = next((token for token in record.input_ids if not 0 <= token < vocabulary), None)
    if beyond is not None:
        raise MalformedRow(f"input_ids holds {beyond}, but the tokenizer has {vocabulary} tokens")
    return Example(record.input_ids, [IGNORE_INDEX, *record.labels[1:]])


def _example(tokens: Tokens, learned: Sequence[range], prefix: list[int], notes: tuple[str, ...]) -> Example:
    labels = [IGNORE_INDEX] * len(tokens.ids)
    for places in learned:
        labels[places.start : places.stop] = tokens.ids[places.start : places.stop]
    input_ids, labels = prefix + tokens.ids, [IGNORE_INDEX] * len(prefix) + labels
    return Example(input_ids, [IGNORE_INDEX, *labels[1:]], notes=notes)


def _check_nothing_left_out(value: Any, text: str, what: str) -> None:
    """Refuse a text that does not hold every string and number of a value."""
    for leaf in _leaves(value):
        shown = json.dumps(leaf, ensure_ascii=False)
        if str(leaf) not in text and shown.strip('"') not in text:
            raise UnusableRow(f"the chat template leaves {what} out, or writes {leaf!r:.40} otherwise")


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
        DataError: there is no such template.
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
            f"model.chat_template: {name}: no such file; paths are taken from the folder the command runs in"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"model.chat_template: {name} cannot be read as UTF-8 text: {error}") from None
    if not text.strip():
        raise DataError(f"model.chat_template: {name} is empty; give a template, or null for the tokenizer's own")
    return text
