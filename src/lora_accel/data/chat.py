"""Tokenize records, and mark the tokens that are supervised.

One rule holds for training and inference: the tokens that inference feeds are a prefix of the tokens of training, and
everything after that prefix up to the end of the turn is supervised. A row usually gives one example. An answer gets an
example of its own if its prompt is not a prefix of the row's tokens: because the template renders it differently there
(`data/turns.py`), or because one token would cover the end of the prompt and the beginning of the answer.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from lora_accel.data.records import (
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
from lora_accel.data.template import SPECIAL_AS_TEXT, ChatTemplate, Rendered
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
    numbers = numbers if loss_on == "assistant" else numbers[-1:]
    numbers = [number for number in numbers if record.messages[number].supervised]
    is_all = loss_on == "all"
    template.check_tools(record)
    rendered, rejected = None, None
    try:
        rendered = template.render(record.messages, record.tools, record.template_kwargs)
    except UnusableRow as error:  # an earlier answer may be usable
        rejected = error
    in_row, problems = _find_turns_in_row(template, record, rendered, numbers)
    row = _RowTokens(template, rendered, list(in_row.values())) if rendered else None
    alone: dict[int, Example] = {}
    for number in numbers:
        message, turn = record.messages[number], in_row.get(number)
        if number in problems or (row and turn and row.add(turn, message)):
            continue
        try:
            turn = turn or find_turn_alone(template, record, number)
            text = turn.text[: turn.span.start]
            excluded = _excluded_spans(record.messages[:number], text, turn.message_spans, {}) if is_all else ()
            alone[number] = _encode_turn(turn, template, message, is_all=is_all, excluded=excluded)
        except UnusableRow as error:
            problems[number] = error
    examples = [alone[number] for number in sorted(alone)]
    if rendered and row and is_all and not alone and not problems:
        others = [i for i, m in enumerate(record.messages) if m.role == "assistant" and not m.supervised]
        turns, _ = _find_turns_in_row(template, record, rendered, others)
        excluded = _excluded_spans(record.messages, rendered.text, rendered.message_spans, turns)
        examples = [row.example_of_all(excluded)]
    elif row and row.answer is not None and not is_all:
        # The last example of a row has its last answer.
        position = sum(number < max(in_row.keys() - alone.keys()) for number in alone)
        examples.insert(position, row.example())
    if not examples and (rejected or problems):
        raise rejected or next(iter(problems.values()))
    notes = (*(rendered.notes if rendered else ()), *(f"an answer is left out: {e}" for e in problems.values()))
    return [example._replace(notes=(*example.notes, *notes)) for example in examples]


def _find_turns_in_row(
    template: ChatTemplate, record: Conversation, rendered: Rendered | None, numbers: Sequence[int]
) -> tuple[dict[int, Turn], dict[int, UnusableRow]]:
    """Return the answers that can be trained in the text of the row, and why some cannot be trained at all.

    Args:
        rendered: the row; None = the template rejects it.
        numbers: 0-based indices of the answers.
    """
    turns: dict[int, Turn] = {}
    problems: dict[int, UnusableRow] = {}
    untrusted = rendered.untrusted if rendered else []
    for number in numbers if rendered else ():
        assert rendered is not None
        try:
            turn = find_turn_in_row(template, record, rendered, untrusted, number)
            if turn is not None:
                rendered.check_calls(record.messages, max(turns, default=0), number)
                turns[number] = turn
        except UnusableRow as error:
            problems[number] = error
    return turns, problems


class _RowTokens:
    """The tokens of a row, and labels for the answers that are supervised in it."""

    def __init__(self, template: ChatTemplate, rendered: Rendered, turns: Sequence[Turn]) -> None:
        """Tokenize a rendered row.

        Args:
            turns: the answers in this text, in order. EOS is added if the last one ends the text without an end token.
        """
        text, untrusted = rendered.text, rendered.untrusted
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


def _excluded_spans(
    messages: Sequence[Message], text: str, message_spans: Sequence[Sequence[Span]], turns: Mapping[int, Turn]
) -> list[Span]:
    """Return the spans of a text that the row excludes from the loss: complete turns, or characters of answers.

    Args:
        message_spans: of each message's text.
        turns: turns that are known. Any other one reaches from the message before it to the one after it.
    """
    excluded = []
    for number, message in enumerate(messages):
        if message.role != "assistant":
            continue
        if not message.supervised and number in turns:
            excluded.append(turns[number].span)
        elif not message.supervised:
            start = max((span.end for spans in message_spans[:number] for span in spans), default=0)
            following = (span.start for spans in message_spans[number + 1 :] for span in spans)
            excluded.append(Span(start, min(following, default=len(text))))
        elif message.unsupervised and message_spans[number]:
            excluded += _characters(text, max(message_spans[number]), message)
    return excluded


def _unsupervised_spans(turn: Turn, message: Message) -> list[Span]:
    """Return the spans of a text that the row excludes from the loss of an answer."""
    return _characters(turn.text, turn.content, message) if turn.content and message.unsupervised else []


def _characters(text: str, content: Span, message: Message) -> list[Span]:
    """Return where the characters of a message that carry no loss are in a text.

    Args:
        content: where the message's content is.
    """
    shift = content.start - message.content.find(text[content.start : content.end])  # white space may be stripped
    spans = [(max(a + shift, content.start), min(b + shift, content.end)) for a, b in message.unsupervised]
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
