"""Kinds of rows with which `scripts/benchmark.py` compares trainers, some of which begin alike."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import NamedTuple

from make_quickstart_data import DATA, SEED, TRAIN, Messages, make_rows

NUM_ROWS = 320
INSTRUCTION_TOKENS = 500
MIN_EXAMPLE_TOKENS = 130
"""Of orders and answers, about 150 with the last one, without the template's tokens."""

INTRODUCTION = (
    "You read the orders that customers of a furniture and household shop send in short messages. Write one line of "
    "JSON for each order, in the sequence of the message, and nothing before, between or after the lines. Every line "
    "has the keys customer, item, quantity, day and express, in this sequence, without spaces between them. What the "
    "message does not mention is null, except for express, which is true or false. "
)
FIELDS = ("name of the customer", "item", "quantity", "day", "wish for express delivery")
CASES = ("is abbreviated", "is misspelled", "occurs twice", "is in capitals", "is at the end", "has a remark")
ACTIONS = (
    "write its usual full form",
    "copy it once and leave out the rest",
    "compare it with the other parts of the order before you decide",
    "prefer what the customer wrote last",
    "keep the words of the customer, in lower case",
    "use null if two readings are equally likely",
)


class Rows(NamedTuple):
    """A kind of rows."""

    name: str
    path: str
    max_length: int
    """`data.max_length`."""


def write_instruction_rows(file: Path, count: int, count_tokens: Callable[[str], int]) -> None:
    """Write conversations with one system message for all: an instruction of about 500 tokens, then about 150 more.

    The instruction and the orders are generated, the same ones each time.

    Args:
        count_tokens: the tokens of a text.
    """
    rng = Random(SEED)
    instruction = INTRODUCTION
    number = 0
    while count_tokens(instruction) < INSTRUCTION_TOKENS:
        number += 1
        field, case, action = rng.choice(FIELDS), rng.choice(CASES), rng.choice(ACTIONS)
        instruction += f"Rule {number}: if the {field} {case}, {action}. "
    used_texts: set[str] = set()
    with file.open("w", encoding="utf-8") as lines:
        for _ in range(count):
            question = answer = ""
            while count_tokens(question + answer) < MIN_EXAMPLE_TOKENS:
                [order] = make_rows(rng, TRAIN, 1, used_texts)
                question += f"{order[0]['content']}\n"
                answer += f"{order[1]['content']}\n"
            messages: Messages = [
                {"role": "system", "content": instruction.strip()},
                {"role": "user", "content": question.strip()},
                {"role": "assistant", "content": answer.strip()},
            ]
            lines.write(json.dumps({"messages": messages}) + "\n")


def kinds_of_rows(data: str, conversations: str | None, model: str, folder: Path) -> list[Rows]:
    """Return the kinds of rows to compare.

    Args:
        data: file of ordinary rows.
        conversations: file of conversations; None = without them.
        model: folder or Hub id of the tokenizer.
        folder: where to write generated rows.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    generated = folder / "shared-instruction.jsonl"
    write_instruction_rows(generated, NUM_ROWS, lambda text: len(tokenizer(text)["input_ids"]))
    return [
        Rows("shared-instruction", str(generated), 1024),
        Rows(Path(data).name, data, 512),
        Rows("quickstart", str(DATA / "orders_train.jsonl"), 512),
        *([Rows(Path(conversations).name, conversations, 512)] if conversations else []),
    ]
