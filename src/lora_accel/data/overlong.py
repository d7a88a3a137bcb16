"""Shorten or drop rows of more than `data.max_length` tokens, as `data.overlong` specifies."""

from __future__ import annotations

from collections.abc import Iterator

from lora_accel.config.schema import DataSection
from lora_accel.data.audit import SPLIT, TRUNCATED
from lora_accel.data.chat import Example, encode_context, encode_record
from lora_accel.data.records import Completion, Conversation, Message, Record, UnusableRow
from lora_accel.data.template import ChatTemplate
from lora_accel.labels import IGNORE_INDEX


class TooLong(ValueError):
    """A row is too long, and `data.overlong` is `error`."""


def apply_overlong(
    record: Record, examples: list[Example], template: ChatTemplate, options: DataSection
) -> tuple[str, list[Example], int]:
    """Apply `data.overlong` to a row that is too long.

    Args:
        examples: the record, tokenized in full.
        options: `overlong` is not `auto`.

    Returns:
        Its bucket, the remaining examples (each with supervised tokens), and the number of tokens cut off, including
        pieces that have no supervised token.

    Raises:
        UnusableRow: no supervised token remains, or the row is dropped.
        TooLong: `data.overlong` is `error`.
    """
    if options.overlong == "error":
        longest = max(len(example.input_ids) for example in examples)
        raise TooLong(
            f"{longest:,} tokens, over data.max_length={options.max_length}; "
            "raise it, or set data.overlong to truncate, drop or split"
        )
    if options.overlong == "drop":
        raise UnusableRow("longer than data.max_length")
    is_split = options.overlong == "split"
    pieces = list(_split(record, examples, template, options)) if is_split else examples
    kept = [cut for cut in (_truncate(piece, options.max_length) for piece in pieces) if cut.num_supervised]
    if not kept:
        raise UnusableRow("no supervised token within data.max_length")
    if is_split:
        num_cut = sum(len(piece.input_ids) for piece in pieces) - sum(len(cut.input_ids) for cut in kept)
    else:  # the examples of a row begin with the same tokens, which count once
        num_cut = max(len(piece.input_ids) for piece in pieces) - max(len(cut.input_ids) for cut in kept)
    if _truncate(pieces[-1], options.max_length).answer is None:  # not scored by an earlier answer instead
        kept = [cut._replace(answer=None) for cut in kept]
    return (SPLIT if is_split and len(pieces) > 1 else TRUNCATED), kept, num_cut


def _split(record: Record, examples: list[Example], template: ChatTemplate, options: DataSection) -> Iterator[Example]:
    """Split text into blocks, and a conversation at its user messages; each piece repeats the system text."""
    if isinstance(record, Completion):
        raise UnusableRow("a completion longer than data.max_length cannot be split")
    if isinstance(record, Conversation):
        yield from _split_conversation(record, template, options)
        return
    length = options.max_length
    for example in examples:
        for start in range(0, len(example.input_ids), length):
            block = example.input_ids[start : start + length]
            # No token precedes the first one of a block, so nothing predicts it.
            labels = [IGNORE_INDEX, *example.labels[start + 1 : start + length]]
            yield example._replace(input_ids=block, labels=labels)


def _split_conversation(record: Conversation, template: ChatTemplate, options: DataSection) -> Iterator[Example]:
    last = max(i for i, message in enumerate(record.messages) if message.role == "assistant")
    if options.loss_on == "last_assistant":  # the last answer of the row, not of each piece
        others = [m._replace(supervised=m.supervised and i == last) for i, m in enumerate(record.messages)]
        record = record._replace(messages=tuple(others))

    def encode(messages: list[Message]) -> list[Example]:
        piece = record._replace(messages=(*system, *messages))
        return encode_record(piece, template, options.loss_on) or [encode_context(piece, template)]

    system = [message for message in record.messages[:1] if message.role == "system"]
    piece: list[Message] = []
    for round_ in _rounds(record.messages[len(system) :]):
        following = encode([*piece, *round_])
        if piece and max(len(example.input_ids) for example in following) > options.max_length:
            yield from encode(piece)
            piece = []
        piece += round_
    yield from encode(piece)


def _rounds(messages: tuple[Message, ...]) -> Iterator[tuple[Message, ...]]:
    """Split a conversation before each user message."""
    starts = [i for i, message in enumerate(messages) if message.role == "user" or i == 0]
    for start, end in zip(starts, [*starts[1:], len(messages)], strict=True):
        yield messages[start:end]


def _truncate(example: Example, length: int) -> Example:
    is_complete = example.answer is not None and example.answer[1] <= length
    return example._replace(
        input_ids=example.input_ids[:length],
        labels=example.labels[:length],
        answer=example.answer if is_complete else None,
    )
