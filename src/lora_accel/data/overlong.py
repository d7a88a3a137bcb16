"""Shorten or drop rows of more than `data.max_length` tokens, as `data.overlong` specifies."""

from __future__ import annotations

from collections.abc import Iterator

from lora_accel.config.schema import DataSection
from lora_accel.data.audit import SPLIT, TRUNCATED
from lora_accel.data.chat import ChatTemplate, Example, encode_record
from lora_accel.data.formats import Completion, Conversation, Message, Record, UnusableRow
from lora_accel.labels import IGNORE_INDEX


class TooLong(ValueError):
    """A row is too long, and `data.overlong` is `error`."""


def apply_overlong(
    record: Record, example: Example, template: ChatTemplate, options: DataSection
) -> tuple[str, list[Example], int]:
    """Apply `data.overlong` to a row that is too long.

    Args:
        example: the record, tokenized in full.

    Returns:
        Its bucket, the remaining examples (each with supervised tokens), and the number of tokens cut off, including
        pieces that have no supervised token.

    Raises:
        UnusableRow: no supervised token remains, or the row is dropped.
        TooLong: `data.overlong` is `error`.
    """
    if options.overlong == "error":
        raise TooLong(
            f"{len(example.input_ids):,} tokens, over data.max_length={options.max_length}; "
            "raise it, or set data.overlong to truncate, drop or split"
        )
    if options.overlong == "drop":
        raise UnusableRow("longer than data.max_length")
    pieces = list(_split(record, example, template, options)) if options.overlong == "split" else [example]
    kept = [cut for cut in (_truncate(piece, options.max_length) for piece in pieces) if cut.num_supervised]
    if not kept:
        raise UnusableRow("no supervised token within data.max_length")
    num_cut = sum(len(piece.input_ids) for piece in pieces) - sum(len(cut.input_ids) for cut in kept)
    return (SPLIT if len(pieces) > 1 else TRUNCATED), kept, num_cut


def _split(record: Record, example: Example, template: ChatTemplate, options: DataSection) -> Iterator[Example]:
    """Split text into blocks, and a conversation at its user messages; each piece repeats the system text."""
    length = options.max_length
    if isinstance(record, Completion):
        raise UnusableRow("a completion longer than data.max_length cannot be split")
    if not isinstance(record, Conversation):
        for start in range(0, len(example.input_ids), length):
            block = example.input_ids[start : start + length]
            # No token precedes the first one of a block, so nothing predicts it.
            labels = [IGNORE_INDEX, *example.labels[start + 1 : start + length]]
            yield example._replace(input_ids=block, labels=labels)
        return

    def encode(*messages: Message) -> Example:
        return encode_record(record._replace(messages=messages), template, options.loss_on)

    system = [message for message in record.messages[:1] if message.role == "system"]
    piece: list[Message] = []
    for round_ in _rounds(record.messages[len(system) :]):
        if piece and len(encode(*system, *piece, *round_).input_ids) > length:
            yield encode(*system, *piece)
            piece = []
        piece += round_
    yield encode(*system, *piece)


def _rounds(messages: tuple[Message, ...]) -> Iterator[tuple[Message, ...]]:
    """Split a conversation before each user message."""
    starts = [i for i, message in enumerate(messages) if message.role == "user" or i == 0]
    for start, end in zip(starts, [*starts[1:], len(messages)], strict=True):
        yield messages[start:end]


def _truncate(example: Example, length: int) -> Example:
    return example._replace(input_ids=example.input_ids[:length], labels=example.labels[:length])
