"""What happens to a row that makes more than `data.max_length` tokens."""

from __future__ import annotations

from collections.abc import Iterator

from lora_accel.config.schema import DataSection
from lora_accel.data.audit import SPLIT, TRUNCATED
from lora_accel.data.chat import ChatTemplate, Example, encode_record
from lora_accel.data.formats import Completion, Conversation, Message, Record, UnusableRow
from lora_accel.labels import IGNORE_INDEX


class TooLong(ValueError):
    """A row is too long, and the config says that this is an error."""


def shorten(
    record: Record, whole: Example, template: ChatTemplate, options: DataSection
) -> tuple[str, list[Example], int]:
    """Do what `data.overlong` says with a row that is too long.

    Returns:
        Its bucket, the examples that are left, each with supervised tokens, and how many tokens were cut off or left
        with a piece that has none.

    Raises:
        UnusableRow: nothing to learn is left.
        TooLong: the config says error.
    """
    if options.overlong == "error":
        raise TooLong(
            f"{len(whole.input_ids):,} tokens, over data.max_length={options.max_length}; "
            "raise it, or set data.overlong to truncate, drop or split"
        )
    if options.overlong == "drop":
        raise UnusableRow("longer than data.max_length")
    pieces = list(_split(record, whole, template, options)) if options.overlong == "split" else [whole]
    kept = [cut for cut in (_cut(piece, options.max_length) for piece in pieces) if cut.num_supervised]
    if not kept:
        raise UnusableRow("no supervised token within data.max_length")
    num_cut = sum(len(piece.input_ids) for piece in pieces) - sum(len(cut.input_ids) for cut in kept)
    return (SPLIT if len(pieces) > 1 else TRUNCATED), kept, num_cut


def _split(record: Record, whole: Example, template: ChatTemplate, options: DataSection) -> Iterator[Example]:
    """Cut text into blocks, and a conversation at its turns; the system text is repeated in each piece."""
    length = options.max_length
    if isinstance(record, Completion):
        raise UnusableRow("a completion longer than data.max_length cannot be split")
    if not isinstance(record, Conversation):
        for start in range(0, len(whole.input_ids), length):
            labels = whole.labels[start : start + length]
            # Nothing stands before the first token of a block that could predict it.
            yield whole._replace(input_ids=whole.input_ids[start : start + length], labels=[IGNORE_INDEX, *labels[1:]])
        return

    def encoded(*messages: Message) -> Example:
        return encode_record(record._replace(messages=messages), template, options.loss_on)

    system = [message for message in record.messages[:1] if message.role == "system"]
    piece: list[Message] = []
    for round_ in _rounds(record.messages[len(system) :]):
        if piece and len(encoded(*system, *piece, *round_).input_ids) > length:
            yield encoded(*system, *piece)
            piece = []
        piece += round_
    yield encoded(*system, *piece)


def _rounds(messages: tuple[Message, ...]) -> Iterator[tuple[Message, ...]]:
    """Cut a conversation before each user message."""
    starts = [i for i, message in enumerate(messages) if message.role == "user" or i == 0]
    for start, end in zip(starts, [*starts[1:], len(messages)], strict=True):
        yield messages[start:end]


def _cut(example: Example, length: int) -> Example:
    return example._replace(input_ids=example.input_ids[:length], labels=example.labels[:length])
