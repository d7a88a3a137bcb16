"""Tokenize records, and mark the tokens that are supervised.

One rule holds for training and inference: the tokens that inference feeds are a prefix of the tokens of training, and
everything after that prefix up to the end of the turn is supervised. A row usually gives one example. An answer gets an
example of its own if its prompt is not a prefix of the row's tokens: because the template renders it differently there
(`data/turns.py`), or because one token would cover the end of the prompt and the beginning of the answer.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import NamedTuple

from lora_accel.data.formats import (
    Completion,
    Conversation,
    MalformedRow,
    Message,
    PlainText,
    Pretokenized,
    Record,
    UnusableRow,
)
from lora_accel.data.spans import RESERVED, Span
from lora_accel.data.template import SPECIAL_AS_TEXT, ChatTemplate
from lora_accel.data.tokens import Tokens
from lora_accel.data.turns import Turn, find_turn_alone, find_turn_in_row
from lora_accel.labels import IGNORE_INDEX

NOT_TOKENIZED = "an answer cannot be tokenized after its prompt"
"""Reason in the ledger."""


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
    answer: tuple[int, int] | None = None
    """First and end token of its last supervised answer: inference feeds what is before it, and should get it.
    None = the row has no answer to a prompt, or only a part of it."""

    @property
    def num_supervised(self) -> int:
        """Return the number of supervised tokens."""
        return len(self.labels) - self.labels.count(IGNORE_INDEX)


def encode_record(record: Record, template: ChatTemplate, loss_on: str) -> list[Example]:
    """Tokenize a record in full and mark its supervised tokens.

    Args:
        loss_on: assistant, last_assistant or all (`data.loss_on`).

    Returns:
        The examples, each with supervised tokens; none if nothing of the record is supervised.

    Raises:
        UnusableRow: the template rejects the record, or no answer can be supervised.
        MalformedRow: a token id is outside the vocabulary.
    """
    if isinstance(record, Pretokenized):
        examples = [_encode_pretokenized(record, len(template.tokenizer))]
    elif isinstance(record, Conversation):
        examples = _encode_conversation(record, template, loss_on)
    else:
        examples = [_encode_text(record, template, loss_on)]
    notes = dict.fromkeys((*record.notes, *(note for example in examples for note in example.notes)))
    return [example._replace(notes=tuple(notes)) for example in examples if example.num_supervised]


def _encode_pretokenized(record: Pretokenized, vocab_size: int) -> Example:
    unknown = next((token for token in record.input_ids if not 0 <= token < vocab_size), None)
    if unknown is not None:
        raise MalformedRow(f"input_ids contains {unknown}, but the tokenizer has {vocab_size} tokens")
    return Example(record.input_ids, [IGNORE_INDEX, *record.labels[1:]])


def _encode_text(record: Completion | PlainText, template: ChatTemplate, loss_on: str) -> Example:
    """Tokenize a text, or a prompt with its completion: no template is applied."""
    prompt, completion = (record.prompt, record.completion) if isinstance(record, Completion) else ("", record.text)
    untrusted = prompt + completion
    if RESERVED.search(untrusted):
        raise UnusableRow("the text contains characters of Unicode private use area B")
    notes = (SPECIAL_AS_TEXT,) if template.tokens.find_special(untrusted) else ()
    text = untrusted + _missing_end(untrusted, template)
    prefix = template.tokens.bos_prefix(text)
    if isinstance(record, PlainText):
        ids = prefix + template.tokens.encode(text, [Span(0, len(untrusted))]).ids
        return Example(ids, [IGNORE_INDEX, *ids[1:]], notes=notes)
    spans, span = [Span(0, len(untrusted))], Span(len(prompt), len(text))
    turn = Turn(text, spans, span, content=None, is_closed=True, message_spans=[], is_rendered=False)
    return _encode_turn(turn, template, is_all=loss_on == "all")._replace(notes=notes)


def _missing_end(text: str, template: ChatTemplate) -> str:
    """Return the EOS token, or nothing if a text already ends with an end token that is parsed."""
    eos: str = template.tokenizer.eos_token or ""
    is_parsed = not template.tokens.find_special(text)
    return "" if is_parsed and text.rstrip().endswith(tuple({*template.end_tokens, eos} - {""})) else eos


def encode_context(record: Conversation, template: ChatTemplate) -> Example:
    """Tokenize a conversation of which nothing is supervised.

    Raises:
        UnusableRow: the template rejects it.
    """
    rendered = template.render(record.messages, record.tools, record.template_kwargs)
    ids = template.bos_prefix(rendered.text) + template.tokens.encode(rendered.text, rendered.untrusted).ids
    return Example(ids, [IGNORE_INDEX] * len(ids))


def _encode_conversation(record: Conversation, template: ChatTemplate, loss_on: str) -> list[Example]:
    """Tokenize a conversation: one example for the answers in the text of the row, one for each other answer."""
    numbers = [i for i, message in enumerate(record.messages) if message.role == "assistant"]
    is_all = loss_on == "all"
    if loss_on != "assistant":
        numbers = numbers[-1:]
    numbers = [number for number in numbers if record.messages[number].supervised]
    in_row: dict[int, Turn] = {}
    alone: dict[int, Example] = {}
    problems: list[UnusableRow] = []

    def add_alone(number: int) -> None:
        turn = in_row.get(number) or find_turn_alone(template, record, number)
        excluded = _excluded_spans(record.messages[:number], turn.message_spans) if is_all else ()
        alone[number] = _encode_turn(turn, template, record.messages[number], is_all=is_all, excluded=excluded)

    template.check_tools(record)
    rendered = None
    try:
        rendered = template.render(record.messages, record.tools, record.template_kwargs)
    except UnusableRow as error:  # an earlier answer may be usable
        problems.append(error)
    untrusted = rendered.untrusted if rendered else []
    for number in numbers:
        try:
            turn = find_turn_in_row(template, record, rendered, untrusted, number) if rendered else None
            if turn is None:
                add_alone(number)
                continue
            if rendered:
                rendered.check_calls(record.messages, max(in_row, default=0), number)
            in_row[number] = turn
        except UnusableRow as error:
            problems.append(error)
    row = _RowTokens(template, rendered.text, untrusted, list(in_row.values())) if rendered else None
    for number, turn in in_row.items():
        try:
            if row and not row.add(turn, record.messages[number]):
                add_alone(number)
        except UnusableRow as error:
            problems.append(error)
    examples = [alone[number] for number in sorted(alone)]
    if row and row.answer is not None and not is_all:
        # The last example of a row has its last answer.
        position = sum(number < max(in_row.keys() - alone.keys()) for number in alone)
        examples.insert(position, row.example())
    elif rendered and row and is_all and not alone and not problems:
        examples = [row.example_of_all(_excluded_spans(record.messages, rendered.message_spans))]
    if problems and not examples:
        raise problems[0]
    left_out = problems if rendered else problems[1:]  # the first one is that of the complete row
    notes = (*(rendered.notes if rendered else ()), *(f"an answer is left out: {problem}" for problem in left_out))
    return [example._replace(notes=(*example.notes, *notes)) for example in examples]


class _RowTokens:
    """The tokens of a row, and labels for the answers that are supervised in it."""

    def __init__(self, template: ChatTemplate, text: str, untrusted: list[Span], turns: Sequence[Turn]) -> None:
        """Tokenize a rendered row.

        Args:
            untrusted: spans of message text, in order.
            turns: the answers in this text, in order. EOS is added if the last one ends the text without an end token.
        """
        if turns and not turns[-1].is_closed:
            text = text[: turns[-1].span.end] + (template.tokenizer.eos_token or "")
        self.answer: tuple[int, int] | None = None
        """First and end token of the last supervised answer."""
        self._template, self._text, self._untrusted = template, text, untrusted
        self._tokens = template.tokens.encode(text, untrusted)
        self._labels = [IGNORE_INDEX] * len(self._tokens.ids)
        self._specials: list[int] | None = None

    def add(self, turn: Turn, message: Message) -> bool:
        """Supervise an answer. Return False if the tokens of its prompt are not a prefix of the tokens of the row."""
        tokens, start = self._tokens, turn.span.start
        special = self._last_special(start)
        for tail in dict.fromkeys((self._template.tokens.split_before(self._text, special, start), special)):
            first = self._first_token(turn, tail)
            if first is not None:
                break
        else:
            return False
        end = len(tokens.ids) if not turn.is_closed else tokens.token_after(turn.span.end)
        self._labels[first:end] = tokens.ids[first:end]
        _exclude(_unsupervised_spans(turn, message), self._labels, tokens)
        self.answer = (first, end)
        return True

    def _last_special(self, end: int) -> int:
        """Return the start of the last special token that the template wrote before a position; 0 if there is none.

        Special tokens split a text before it is tokenized, so only the text after it has to be compared.
        """
        number = bisect.bisect_left(self._untrusted, (end,))
        message_end = self._untrusted[number - 1].end if number else 0
        specials = self._template.tokens.find_specials(self._text[message_end:end])
        if specials:
            return message_end + specials[-1].start
        if self._specials is None:
            found = self._template.tokens.find_specials(self._text, self._untrusted)
            self._specials = [span.start for span in found]
        number = bisect.bisect_left(self._specials, end)
        return self._specials[number - 1] if number else 0

    def _first_token(self, turn: Turn, tail: int) -> int | None:
        """Return the first token of an answer; None if its prompt, from `tail` on, has other tokens than the row."""
        start = turn.span.start
        first, last = (bisect.bisect_left(self._untrusted, (position,)) for position in (tail, start))
        if first and self._untrusted[first - 1].end > tail:
            first -= 1
        spans = [Span(max(0, a - tail), b - tail) for a, b in self._untrusted[first:last]]
        ids = self._template.tokens.encode_tail(self._text[tail:start], spans)
        first = self._tokens.token_at(tail) if tail else 0
        return first + len(ids) if self._tokens.ids[first : first + len(ids)] == ids else None

    def example(self) -> Example:
        """Return the example of the supervised answers."""
        return _make_example(self._prefix, self._tokens.ids, self._labels, self.answer)

    def example_of_all(self, excluded: Sequence[Span]) -> Example:
        """Return the example in which everything is supervised but the `excluded` spans."""
        labels = list(self._tokens.ids)
        _exclude(excluded, labels, self._tokens)
        return _make_example(self._prefix, self._tokens.ids, labels, self.answer)

    @property
    def _prefix(self) -> list[int]:
        return self._template.bos_prefix(self._text)


def _encode_turn(
    turn: Turn,
    template: ChatTemplate,
    message: Message | None = None,
    *,
    is_all: bool = False,
    excluded: Sequence[Span] = (),
) -> Example:
    """Return the example of one answer.

    Args:
        message: the answer's message; None = no part of it is excluded from the loss.
        is_all: supervise the prompt, too, but not the `excluded` spans.

    Raises:
        UnusableRow: the answer cannot be tokenized after its prompt.
    """
    text, start = turn.text[: turn.span.end], turn.span.start
    if not turn.is_closed:
        text += template.tokenizer.eos_token or ""
    untrusted = [span for span in turn.untrusted if span.start < turn.span.end]
    tokens = template.tokens.encode(text, untrusted)
    in_prompt = [Span(a, min(b, start)) for a, b in untrusted if a < start]
    prompt_tokens = template.tokens.encode(text[:start], in_prompt)
    prompt, first = prompt_tokens.ids, len(prompt_tokens.ids)
    unsupervised = _unsupervised_spans(turn, message) if message is not None else []
    if tokens.ids[:first] == prompt:
        ids = tokens.ids
    else:
        in_answer = [Span(max(0, a - start), b - start) for a, b in untrusted if b > start]
        rest = template.tokens.encode_after(prompt, text[start:], in_answer, template.tokens.decode(tokens.ids))
        if rest is None or unsupervised:
            raise UnusableRow(NOT_TOKENIZED)
        ids = prompt + rest
    labels = list(ids) if is_all else [IGNORE_INDEX] * first + ids[first:]
    _exclude(excluded, labels, prompt_tokens)
    _exclude(unsupervised, labels, tokens)
    prefix = template.bos_prefix(text) if turn.is_rendered else template.tokens.bos_prefix(text)
    return _make_example(prefix, ids, labels, (first, len(ids)), turn.notes)


def _exclude(spans: Sequence[Span], labels: list[int], tokens: Tokens) -> None:
    """Remove the labels of the tokens that cover some spans."""
    for span in spans:
        covered = tokens.within(span)
        labels[covered.start : covered.stop] = [IGNORE_INDEX] * len(covered)


def _excluded_spans(messages: Sequence[Message], message_spans: list[list[Span]]) -> list[Span]:
    """Return the spans of the answers that the row excludes from the loss."""
    excluded = [i for i, message in enumerate(messages) if message.role == "assistant" and not message.supervised]
    return [span for i in excluded for span in message_spans[i]]


def _unsupervised_spans(turn: Turn, message: Message) -> list[Span]:
    """Return the spans of a text that the row excludes from the loss of an answer."""
    if not message.unsupervised or turn.content is None:
        return []
    written = turn.text[turn.content.start : turn.content.end]
    shift = turn.content.start - message.content.find(written)  # the template may have stripped white space
    spans = [(max(a + shift, turn.content.start), min(b + shift, turn.content.end)) for a, b in message.unsupervised]
    return [Span(a, b) for a, b in spans if a < b]


def _make_example(
    prefix: list[int], ids: list[int], labels: list[int], answer: tuple[int, int] | None, notes: tuple[str, ...] = ()
) -> Example:
    """Return an example with BOS before it, if there is one."""
    labels = [IGNORE_INDEX] * len(prefix) + labels
    if answer is not None:
        start, end = answer[0] + len(prefix), answer[1] + len(prefix)
        answer = (start, end) if start else None  # after an empty prompt, nothing can be generated
    return Example(prefix + ids, [IGNORE_INDEX, *labels[1:]], answer=answer, notes=notes)
