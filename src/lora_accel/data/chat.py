"""Messages to text by a template, and text to tokens, each supervised or not.

Where a message stands in the rendered text is proven, not guessed. The conversation is rendered twice: once as it is,
and once with each content between two marks that occur nowhere else. The marked text without its marks must be the
plain text; then the marks give the spans, whatever the template does around them. A token is supervised when it covers
a character of a supervised span, so no token arithmetic is needed and masks cannot depend on token ids.
"""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from lora_accel.data.formats import Completion, Conversation, Message, Record, UnusableRow
from lora_accel.errors import DataError, did_you_mean

IGNORED = -100
"""The label of a token that carries no loss."""

BUILT_IN_TEMPLATES = ("alpaca", "chatml", "vicuna_v1.1")

# Supplementary private use area B: no tokenizer, template or well-formed text gives these a meaning.
FIRST_MARK = 0x100000
MAX_MESSAGES = 0x8000
MARK = re.compile(f"([{chr(FIRST_MARK)}-{chr(FIRST_MARK + 2 * MAX_MESSAGES - 1)}])")


class Span(NamedTuple):
    """Characters [start, end) of a rendered text."""

    start: int
    end: int


class Rendered(NamedTuple):
    """A text, and for each message where its content stands (None: the template left it out)."""

    text: str
    spans: list[Span | None]


class Example(NamedTuple):
    """One training sequence."""

    input_ids: list[int]
    labels: list[int]
    """The token itself where it is supervised, else -100. The first is always -100: nothing predicts it."""
    key: int = 0
    """64 bits from which the dropout of its tokens is derived; given when a step takes the example."""
    row: tuple[str, int] = ("", 0)
    """The file and the number of the row it comes from."""

    @property
    def num_supervised(self) -> int:
        """Return the number of supervised tokens."""
        return len(self.labels) - self.labels.count(IGNORED)


class ChatTemplate:
    """A chat template on its tokenizer: renders conversations and knows where each message stands."""

    def __init__(self, tokenizer: Any, name: str | None = None) -> None:
        """Choose a template.

        Args:
            tokenizer: a fast tokenizer of transformers (offsets are needed).
            name: None = the tokenizer's own, a built-in name, or the path of a .jinja file.

        Raises:
            DataError: there is no such template, or the tokenizer has no offsets.
        """
        if not tokenizer.is_fast:
            raise DataError(
                f"the tokenizer {type(tokenizer).__name__} gives no character offsets, so masks cannot be proven; "
                "use a model with a tokenizer.json"
            )
        self.tokenizer = tokenizer
        self._built_in = name in BUILT_IN_TEMPLATES
        self.source = _template_source(tokenizer, name)
        self.end_of_turn = self._find_end_of_turn() if self.source else ""

    def render(self, messages: tuple[Message, ...]) -> Rendered:
        """Render a conversation and find each message in it.

        Raises:
            UnusableRow: the template refuses the conversation, or changes a message so that its place
                cannot be proven.
        """
        if len(messages) > MAX_MESSAGES:
            raise UnusableRow(f"more than {MAX_MESSAGES} messages")
        plain = self._apply(messages)
        if any(MARK.search(message.content) for message in messages):
            raise UnusableRow("a message holds characters of private use area B")
        marked = self._apply(
            tuple(message._replace(content=message.content.join(_marks(i))) for i, message in enumerate(messages))
        )
        return Rendered(plain, _locate(plain, marked, messages))

    def prompt(self, messages: tuple[Message, ...]) -> str:
        """Return the text after which the assistant's next words are generated.

        Raises:
            DataError: the template refuses the conversation.
        """
        try:
            return self._apply(messages, add_generation_prompt=True)
        except UnusableRow as error:
            shown = messages[-1].content if messages else ""
            raise DataError(f"prompt {shown!r:.60}: {error}; mend the prompt or the template") from None

    def begin(self, text: str) -> list[int]:
        """Return the tokens before a rendered text: the begin token where it is missing.

        A tokenizer's own template, or a file, writes what its model wants. The built-in ones serve many models and
        leave it to the tokenizer, as FastChat does.
        """
        return _bos(self.tokenizer, text) if self._built_in else []

    def encode_prompt(self, text: str, *, rendered: bool = True) -> list[int]:
        """Return the tokens of a prompt, the same as in training.

        Args:
            rendered: whether the template wrote it; if not, it is the prompt of a completion.
        """
        ids: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        return (self.begin(text) if rendered else _bos(self.tokenizer, text)) + ids

    def _apply(self, messages: tuple[Message, ...], *, add_generation_prompt: bool = False) -> str:
        if not self.source:
            raise DataError(
                "the tokenizer has no chat template; set model.chat_template to one of "
                f"{', '.join(BUILT_IN_TEMPLATES)} or to a .jinja file"
            )
        try:
            rendered: str = self.tokenizer.apply_chat_template(
                [message._asdict() for message in messages],
                chat_template=self.source,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
            )
        except jinja2.TemplateSyntaxError as error:
            raise DataError(f"model.chat_template: not valid Jinja, line {error.lineno}: {error.message}") from None
        except Exception as error:  # a template is somebody's program and may raise anything
            raise UnusableRow(f"the chat template refuses it: {error}") from None
        return rendered

    def _find_end_of_turn(self) -> str:
        """Return the special token that closes an assistant turn, with any white space before it.

        It is what the template writes after the last assistant message; empty if that is no special token.
        """
        probe = (Message("user", "question"), Message("assistant", "answer"))
        try:
            rendered = self.render(probe)
        except UnusableRow:
            return ""
        span = rendered.spans[1]
        tail = rendered.text[span.end :] if span else ""
        for token in sorted(special_tokens(self.tokenizer), key=len, reverse=True):
            if tail.lstrip().startswith(token):
                return tail[: len(tail) - len(tail.lstrip()) + len(token)]
        return ""


def special_tokens(tokenizer: Any) -> set[str]:
    """Return the texts of the tokenizer's special tokens, its end token among them."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return added | ({tokenizer.eos_token} if tokenizer.eos_token else set())


def encode_record(record: Record, template: ChatTemplate, loss_on: str) -> Example:
    """Tokenise a record, whole, and mark what is supervised (which may be nothing).

    Raises:
        UnusableRow: the template refuses it.
    """
    if isinstance(record, Conversation):
        rendered = template.render(record.messages)
        if loss_on == "all":
            spans = [Span(0, len(rendered.text))]
        else:
            spans = _assistant_spans(rendered, record.messages, template.end_of_turn, loss_on)
        return _encode(template.tokenizer, rendered.text, spans, template.begin(rendered.text))
    prompt, text = record if isinstance(record, Completion) else ("", record.text)
    whole = prompt + text + (template.tokenizer.eos_token or "")
    start = 0 if loss_on == "all" else len(prompt)
    return _encode(template.tokenizer, whole, [Span(start, len(whole))], _bos(template.tokenizer, whole))


def question_of(record: Record, template: ChatTemplate) -> tuple[list[int], str] | None:
    """Return the tokens before a record's last answer, and that answer; None for plain text."""
    if isinstance(record, Completion):
        return template.encode_prompt(record.prompt, rendered=False), record.completion
    if not isinstance(record, Conversation):
        return None
    last = max(i for i, message in enumerate(record.messages) if message.role == "assistant")
    return template.encode_prompt(template.prompt(record.messages[:last])), record.messages[last].content


def _assistant_spans(rendered: Rendered, messages: tuple[Message, ...], end_of_turn: str, loss_on: str) -> list[Span]:
    """Return the assistant's words, each with the end-of-turn token that follows."""
    spans = []
    for message, span in zip(messages, rendered.spans, strict=True):
        if message.role != "assistant":
            continue
        assert span is not None  # only system messages may be left out
        closed = rendered.text.startswith(end_of_turn, span.end)
        spans.append(Span(span.start, span.end + len(end_of_turn) if closed else span.end))
    return spans[-1:] if loss_on == "last_assistant" else spans


def _bos(tokenizer: Any, text: str) -> list[int]:
    """Return the begin token's id where the tokenizer puts one before a text that has none."""
    bos = tokenizer.bos_token_id
    if bos is None or text.startswith(tokenizer.bos_token) or tokenizer("a").input_ids[0] != bos:
        return []
    return [bos]


def _encode(tokenizer: Any, text: str, spans: list[Span], prefix: list[int]) -> Example:
    tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    labels = [IGNORED] * len(tokens.input_ids)
    reached = 0  # the end of the text covered so far
    remaining = iter(span for span in spans if span.start < span.end)
    span = next(remaining, None)
    for i, (start, end) in enumerate(tokens.offset_mapping):
        # Offsets of byte-level tokens leave out leading spaces; what lies before a token belongs to it.
        start = min(start, reached)
        reached = max(reached, end)
        while span is not None and span.end <= start:
            span = next(remaining, None)
        if span is None:
            break
        if end > span.start:
            labels[i] = tokens.input_ids[i]
    input_ids, labels = prefix + tokens.input_ids, [IGNORED] * len(prefix) + labels
    return Example(input_ids, [IGNORED, *labels[1:]])


def _locate(plain: str, marked: str, messages: tuple[Message, ...]) -> list[Span | None]:
    """Walk along `plain` by the pieces of the marked text and return where each message's content stands.

    The walk must consume `plain` to its end, so a span that is returned is proven. Most modern templates strip
    contents; that is followed, any other change is not.
    """
    pieces = MARK.split(marked)  # literal, mark, content, mark, literal, …
    literals, opens, contents, closes = (pieces[i::4] for i in range(4))
    spans: list[Span | None] = [None] * len(messages)
    place = len(literals[0]) if plain.startswith(literals[0]) else -1
    for opening, content, closing, literal in zip(opens, contents, closes, literals[1:], strict=False):
        index = (ord(opening) - FIRST_MARK) // 2
        repeats = spans[index] is not None
        if repeats or (opening, closing) != _marks(index) or content != messages[index].content:
            raise UnusableRow(f"the chat template changes or repeats message {index + 1}")
        text = content if plain.startswith(content + literal, place) else content.strip()
        if place < 0 or not plain.startswith(text + literal, place):
            raise UnusableRow(f"the chat template changes the text around message {index + 1}")
        spans[index] = Span(place, place + len(text))
        place += len(text) + len(literal)
    left_out = [i for i, span in enumerate(spans) if span is None and messages[i].role != "system"]
    if left_out:
        raise UnusableRow(f"the chat template leaves message {left_out[0] + 1} out")
    if place != len(plain):
        raise UnusableRow("the chat template changes with the content, so that places cannot be proven")
    return spans


def _marks(index: int) -> tuple[str, str]:
    return chr(FIRST_MARK + 2 * index), chr(FIRST_MARK + 2 * index + 1)


def _template_source(tokenizer: Any, name: str | None) -> str:
    if name is None:
        own = tokenizer.chat_template
        return own if isinstance(own, str) else (own or {}).get("default", "")
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
