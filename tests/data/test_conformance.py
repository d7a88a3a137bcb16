"""Every row format with every chat template and every kind of tokenizer: exactly the answers are supervised.

The expected texts are rendered by transformers, and the positions of tokens are found here, from the bytes of each
token. So the tests do not depend on the code under test.
"""

from __future__ import annotations

import copy
import functools
import itertools
import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jinja2
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from lora_accel.data.chat import Example, encode_record
from lora_accel.data.formats import FORMATS, detect_format, parse_row
from lora_accel.data.records import Conversation, MalformedRow, Message, UnusableRow
from lora_accel.data.spans import Span
from lora_accel.data.template import BUILT_IN_TEMPLATES, ChatTemplate, template_source
from lora_accel.data.tokens import FIRST_ALIAS
from lora_accel.errors import DataError
from lora_accel.labels import IGNORE_INDEX
from tests.data.tokenizers import train_sentencepiece, train_unigram

# Tokenizers.

SPECIALS = [
    *("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
]
SPECIAL = re.compile("|".join(map(re.escape, SPECIALS)))
THINK_TAGS = ("<think>", "</think>")
"""Added tokens that are not special, as in Qwen3."""
LINES = [
    "user assistant system hello world the answer is one two three: the question, and its answer.",
    "[INST] [/INST] USER: ASSISTANT: ### Instruction: ### Response: <think> </think> 日本 é 😀 (x|y) #",
    "ABCDEFGHIJKLMNOPQRSTUVWXYZ abcdefghijklmnopqrstuvwxyz 0123456789 .,;:!?()[]{}<>|/\\_-+*='\"`~@#$%^&",
] * 5
NEWLINES = ["so:\n\n", "so.\n\n\n", "\n\n", "\n###\n\n"] * 9
"""For tokens that a template and an answer may share. Not for GPT-2's pre-tokenizer, which splits off newlines."""
LLAMA_3_PATTERN = (  # keeps newlines together, as Qwen's does
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level(*, trims: bool = False, qwen: bool = False) -> Tokenizer:
    """Train a tokenizer like GPT-2's (offsets may exclude leading spaces), or like Qwen's (NFC, think tags)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if qwen:
        tokenizer.normalizer = normalizers.NFC()
        split = pre_tokenizers.Split(Regex(LLAMA_3_PATTERN), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trims)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIALS, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(LINES + NEWLINES * qwen, trainer)
    if qwen:
        tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in THINK_TAGS])
    return tokenizer


def sentencepiece(scheme: str) -> Tokenizer:
    return train_sentencepiece(scheme, LINES + NEWLINES, SPECIALS, vocab_size=300, limit_alphabet=60)


def unigram() -> Tokenizer:
    return train_unigram(["\n".join(LINES[:3])] * 5, SPECIALS, vocab_size=250)


FAMILIES: dict[str, Callable[[], Tokenizer]] = {
    "bytes": byte_level,
    "bytes, trimmed offsets": functools.partial(byte_level, trims=True),
    "bytes, NFC": functools.partial(byte_level, qwen=True),
    "sentencepiece, first": functools.partial(sentencepiece, "first"),
    "sentencepiece, always": functools.partial(sentencepiece, "always"),
    "sentencepiece, llama-2": functools.partial(sentencepiece, "llama-2"),
    "unigram": unigram,
}
BEGINS = ("pad = eos", "no BOS", "BOS added", "BOS written")
"""BOS exists but is never written; there is none; the tokenizer adds it; tokenizer and template both write it."""


@functools.cache
def tokenizer_of(family: str, begin: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer of a family; `begin` is one of `BEGINS`."""
    backend = Tokenizer.from_str(trained_json(family))
    if begin in ("BOS added", "BOS written"):
        adds = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)])
        existing = backend.post_processor
        backend.post_processor = processors.Sequence([existing, adds]) if existing else adds
    bos = {} if begin == "no BOS" else {"bos_token": "<s>"}
    pad = "<unk>" if begin == "no BOS" else "</s>"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", unk_token="<unk>", pad_token=pad, **bos
    )
    assert tokenizer("a").input_ids.count(1) == (begin in ("BOS added", "BOS written"))
    return tokenizer


@functools.cache
def trained_json(family: str) -> str:
    """Train a tokenizer of a family and return it as JSON."""
    return FAMILIES[family]().to_str()


# Which characters a token covers, from its bytes.


class Unit(NamedTuple):
    """The smallest part of a text that a token covers: a byte, an added token, or an unknown character."""

    value: int | str
    chars: frozenset[int]


def covered(
    family: str, begin: str, ids: Sequence[int], text: str, specials: Iterable[tuple[int, int]]
) -> list[set[int]]:
    """Return the characters that each token covers.

    Args:
        ids: the tokens of the text, without a BOS token before it.
        specials: spans of the special tokens. No other token may be special.
    """
    tokenizer = tokenizer_of(family, begin)
    units = _units(family, text, specials)
    covered_chars, position = [], 0
    for token in ids:
        piece = tokenizer.convert_ids_to_tokens(token)
        if token == 0 and units[position].value == "unknown":
            count = sum(1 for _ in itertools.takewhile(lambda unit: unit.value == "unknown", units[position:]))
            values: list[int | str] = ["unknown"] * count
        elif piece in (*SPECIALS, *THINK_TAGS):
            values = [piece]
        else:
            values = [*_bytes(family, piece)]
        token_units = units[position : position + len(values)]
        assert [unit.value for unit in token_units] == values, f"{piece!r} is not at unit {position} of {text[:40]!r}…"
        covered_chars.append(set().union(*(unit.chars for unit in token_units)))
        position += len(values)
    assert position == len(units), "the tokens do not cover the text to its end"
    return covered_chars


def _bytes(family: str, piece: str) -> bytes:
    if family.startswith("bytes"):
        return bytes(byte_level_table()[character] for character in piece)
    byte = re.fullmatch("<0x([0-9A-F]{2})>", piece)
    return bytes.fromhex(byte[1]) if byte else piece.encode()


@functools.cache
def byte_level_table() -> dict[str, int]:
    """Return the byte of each character of a byte-level token (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _units(family: str, text: str, specials: Iterable[tuple[int, int]]) -> list[Unit]:
    added = sorted(specials)
    if family == "bytes, NFC":
        edges = [0, *itertools.chain(*added), len(text)]
        for start, end in zip(edges[::2], edges[1::2], strict=True):
            added += [match.span() for match in re.compile("</?think>").finditer(text, start, end)]
    units, position = [], 0
    for start, end in [*sorted(added), (len(text), len(text))]:
        units += _section(family, text[position:start], position)
        if start < end:
            units.append(Unit(text[start:end], frozenset(range(start, end))))
        position = end
    return units


def _section(family: str, text: str, offset: int) -> list[Unit]:
    """Return the units of the text between two added tokens. A prepended space belongs to the first character."""
    units: list[Unit] = []
    if family == "bytes, NFC":
        for start, piece in _composed(text):
            composed = unicodedata.normalize("NFC", piece)
            all_chars = frozenset(range(offset + start, offset + start + len(piece)))
            for i, character in enumerate(composed, start=offset + start):
                chars = frozenset([i]) if composed == piece else all_chars
                units += [Unit(byte, chars) for byte in character.encode()]
        return units
    if not family.startswith("bytes"):
        text = text.replace(" ", "▁")
        prepends = {"first": offset == 0 and text[:1] != "▁", "llama-2": True}
        if text and prepends.get(family.removeprefix("sentencepiece, "), text[:1] != "▁"):
            units += [Unit(byte, frozenset([offset])) for byte in "▁".encode()]
    for i, character in enumerate(text, start=offset):
        is_known = family != "unigram" or character in _unigram_alphabet()
        values: Iterable[int | str] = character.encode() if is_known else ["unknown"]
        units += [Unit(value, frozenset([i])) for value in values]
    return units


def as_decoded(family: str, text: str) -> str:
    """Return a text after encoding and decoding."""
    if family == "unigram":
        text = text.replace("▁", " ")
        return re.sub("␀+", "<unk>", "".join(a if a == " " or a in _unigram_alphabet() else "␀" for a in text))
    if family == "sentencepiece, llama-2":  # a space is added after each special token
        text = re.sub(f"({SPECIAL.pattern})(?=.)", r"\1 ", text)
    if family == "bytes, NFC":
        return unicodedata.normalize("NFC", text)
    return text if family.startswith("bytes") else text.replace("▁", " ")


@functools.cache
def _unigram_alphabet() -> set[str]:
    return {character for piece, _ in json.loads(trained_json("unigram"))["model"]["vocab"] for character in piece}


def _composed(text: str) -> list[tuple[int, str]]:
    """Return (start, piece) of the pieces that NFC composes independently."""
    pieces: list[tuple[int, str]] = []
    for i, character in enumerate(text):
        start, before = pieces[-1] if pieces else (0, "")
        joint = unicodedata.normalize("NFC", before + character)
        if pieces and (unicodedata.combining(character) or joint != unicodedata.normalize("NFC", before) + character):
            pieces[-1] = (start, before + character)
        else:
            pieces.append((i, character))
    return pieces


# Templates.

TURN = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
GENERATION_PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
OPEN, CLOSE = "{% for m in messages %}", "{% endfor %}"

MISTRAL = """
{%- set system = messages[0].content if messages[0].role == 'system' else '' -%}
{%- for m in (messages[1:] if system else messages) -%}
    {%- if m.role == 'user' -%}
        {{ '[INST] ' + (system + '\n\n' if system and loop.first else '') + m.content + '[/INST]' }}
    {%- elif m.role == 'assistant' -%}
        {{ ' ' + m.content + eos_token }}
    {%- else -%}
        {{ raise_exception('a ' + m.role + ' message is not supported here') }}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{%- endif -%}"""

RAISES = """
{%- if messages[0].role == 'system' -%}{{ raise_exception('System role not supported') }}{%- endif -%}
{%- for m in messages -%}
    {%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif -%}
    {{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
{%- endfor -%}
""" + GENERATION_PROMPT  # fmt: skip

QWEN_3 = """
{%- set ns = namespace(looks=true, last_query_index=messages | length - 1) -%}
{%- for m in messages[::-1] -%}
    {%- if ns.looks and m.role == 'user' -%}
        {%- set ns.looks = false -%}
        {%- set ns.last_query_index = messages | length - 1 - loop.index0 -%}
    {%- endif -%}
{%- endfor -%}
{%- for m in messages -%}
    {%- set content = m.content -%}
    {%- if m.role == 'assistant' -%}
        {%- set reasoning_content = '' -%}
        {%- if m.reasoning_content is string -%}
            {%- set reasoning_content = m.reasoning_content -%}
        {%- elif '</think>' in content -%}
            {%- set reasoning_content = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') -%}
            {%- set content = content.split('</think>')[-1].lstrip('\n') -%}
        {%- endif -%}
        {{ '<|im_start|>assistant\n' }}
        {%- if loop.index0 > ns.last_query_index and (loop.last or reasoning_content) -%}
            {{ '<think>\n' + reasoning_content.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
        {%- else -%}
            {{ content }}
        {%- endif -%}
    {%- else -%}
        {{ '<|im_start|>' + m.role + '\n' + content }}
    {%- endif -%}
    {{ '<|im_end|>\n' }}
{%- endfor -%}
""" + GENERATION_PROMPT  # fmt: skip


class Style(NamedTuple):
    """A chat template, and what it writes around an answer."""

    source: str
    header: str = "<|im_start|>assistant\n"
    """The end of an answer's prompt."""
    before: str = ""
    """What the model generates before the answer's content."""
    end: str = "<|im_end|>"
    """The end of turn."""
    strips: bool = False


STYLES = {
    "alpaca": Style(template_source("alpaca"), "### Response:", end="</s>"),
    "chatml": Style(template_source("chatml")),
    "gemma": Style(template_source("gemma"), "<start_of_turn>model\n", end="<end_of_turn>", strips=True),
    "llama-2": Style(template_source("llama-2"), " [/INST]", before=" ", end=" </s>", strips=True),
    "llama-3": Style(
        template_source("llama-3"),
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        end="<|eot_id|>",
        strips=True,
    ),
    "vicuna_v1.1": Style(template_source("vicuna_v1.1"), "ASSISTANT:", before=" ", end="</s>"),
    "zephyr": Style(template_source("zephyr"), "<|assistant|>\n", end="</s>"),
    # Similar to well-known models.
    "strips": Style(OPEN + TURN.replace("m.content", "m.content | trim") + CLOSE + GENERATION_PROMPT, strips=True),
    "system in the question": Style(MISTRAL, "[/INST]", before=" ", end="</s>"),
    "no system": Style(OPEN + "{% if m.role != 'system' %}" + TURN + "{% endif %}" + CLOSE + GENERATION_PROMPT),
    "strips reasoning": Style(QWEN_3),
    "prompts for reasoning": Style(
        OPEN + TURN + CLOSE + GENERATION_PROMPT.replace("{% endif %}", "<think>\n{% endif %}"),
        "<|im_start|>assistant\n<think>\n",
    ),
    "raises": Style(RAISES),
    "tail": Style(
        OPEN
        + TURN
        + CLOSE
        + "{% if not add_generation_prompt %}<|im_start|>over<|im_end|>{% endif %}"
        + GENERATION_PROMPT
    ),
    "text markers": Style(
        OPEN
        + "## {{ m.role }}:\n{{ m.content }}\n###\n\n"
        + CLOSE
        + "{% if add_generation_prompt %}## assistant:\n{% else %}The end.{% endif %}",
        "## assistant:\n",
        end="\n###",
    ),
    "generation blocks": Style(
        OPEN
        + "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>"
        + "{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n"
        + CLOSE
        + GENERATION_PROMPT
    ),
    "contents only": Style(OPEN + "{{ m.content }}" + CLOSE, header="", end=""),
    "no generation prompt": Style(OPEN + TURN + CLOSE),
    "writes BOS": Style("{{ bos_token }}" + OPEN + TURN + CLOSE + GENERATION_PROMPT),
}


@functools.cache
def template_of(family: str, style: str, begin: str) -> ChatTemplate:
    """Return a style's template with a tokenizer of its own."""
    source = STYLES[style].source
    if begin == "BOS written" and "{{ bos_token }}" not in source:
        source = "{{ bos_token }}" + source
    elif style in BUILT_IN_TEMPLATES:
        return ChatTemplate(tokenizer_of(family, begin), style)
    tokenizer = copy.copy(tokenizer_of(family, begin))
    tokenizer.chat_template = source
    return ChatTemplate(tokenizer)


# Rows.


def chat(*turns: str) -> tuple[Message, ...]:
    """Return messages by first letters: `chat("s: Be.", "u: q", "a: an answer", "x: an unsupervised answer")`."""
    roles = {"s": "system", "u": "user", "a": "assistant", "x": "assistant", "t": "tool"}
    return tuple(Message(roles[turn[0]], turn[3:], supervised=turn[0] != "x") for turn in turns)


def openai(*turns: str, **more: Any) -> dict[str, Any]:
    """Return a row in OpenAI's format."""
    return {"messages": [{"role": m.role, "content": m.content} for m in chat(*turns)], **more}


TWO_ROUNDS = ("u: First question?", "a: First answer.", "u: Second one?", "a: Second answer.")
REASONED_ANSWERS = (
    "<think>\nA first thought.\n</think>\n\nFirst answer.",
    "<think>\nOne more thought.\n</think>\n\nSecond answer.",
)
SPACES = ("u:  First question? \n", "a: \n  First answer. ", "u: \tSecond one?", "a: Second\n\n answer.\n")
ROWS: dict[str, tuple[dict[str, Any], tuple[Message, ...]]] = {
    "sharegpt": (
        {"conversations": [{"from": role, "value": f"{role} speaks."} for role in ("human", "gpt", "user", "chatgpt")]},
        chat("u: human speaks.", "a: gpt speaks.", "u: user speaks.", "a: chatgpt speaks."),
    ),
    "sharegpt, synonyms": (
        {
            "system": "Be brief.",
            "conversations": [
                {"role": role, "content": f"{role} speaks."} for role in ("Prompter", "BOT", "human", "assistant")
            ],
        },
        chat("s: Be brief.", "u: Prompter speaks.", "a: BOT speaks.", "u: human speaks.", "a: assistant speaks."),
    ),
    "sharegpt, untidy": (
        {
            "conversations": [
                {"from": role, "value": f"{role} {i}."} for i, role in enumerate(["gpt", "human", "user", "bard", "ai"])
            ]
        },
        chat("u: human 1.\n\nuser 2.", "a: bard 3.\n\nai 4."),
    ),
    "messages": (openai("s: Be brief.", *TWO_ROUNDS), chat("s: Be brief.", *TWO_ROUNDS)),
    "messages, parts": (
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "First "}, {"type": "text", "text": "question?"}],
                },
                {"role": "assistant", "content": ["First ", {"text": "answer."}]},
                {"role": "user", "content": "Second one?"},
                {"role": "assistant", "content": [{"type": "text", "text": "Second answer."}]},
            ]
        },
        chat(*TWO_ROUNDS),
    ),
    "messages, flags": (
        {
            "messages": [
                {"role": "user", "content": "First question?", "weight": 1},
                {"role": "assistant", "content": "First answer.", "weight": 0},
                {"role": "user", "content": "Second one?"},
                {"role": "assistant", "content": "Second answer.", "weight": 1.0},
                {"role": "user", "content": "Third one?"},
                {"role": "assistant", "content": "Third answer.", "train": False},
                {"role": "user", "content": "Fourth one?"},
                {"role": "assistant", "content": "Fourth answer.", "train": True},
            ]
        },
        chat(
            *("u: First question?", "x: First answer.", "u: Second one?", "a: Second answer."),
            *("u: Third one?", "x: Third answer.", "u: Fourth one?", "a: Fourth answer."),
        ),
    ),
    "messages, spaces": (openai(*SPACES), chat(*SPACES)),
    "messages, no question": (openai("a: A greeting.", *TWO_ROUNDS), chat("a: A greeting.", *TWO_ROUNDS)),
    "messages, two answers": (openai(*TWO_ROUNDS, "a: One more."), chat(*TWO_ROUNDS, "a: One more.")),
    "messages, an empty answer": (openai("u: Hm?", "a: ", *TWO_ROUNDS), chat("u: Hm?", "x: ", *TWO_ROUNDS)),
    "messages, a tool": (
        openai(*TWO_ROUNDS[:2], "t: A result.", "a: So it is."),
        chat(*TWO_ROUNDS[:2], "t: A result.", "a: So it is."),
    ),
    "messages, late system": (
        openai(*TWO_ROUNDS[:2], "s: Be kind.", *TWO_ROUNDS[2:]),
        chat(*TWO_ROUNDS[:2], "s: Be kind.", *TWO_ROUNDS[2:]),
    ),
    "messages, reasoning": (
        openai("u: First question?", f"a: {REASONED_ANSWERS[0]}", "u: Second one?", f"a: {REASONED_ANSWERS[1]}"),
        chat("u: First question?", f"a: {REASONED_ANSWERS[0]}", "u: Second one?", f"a: {REASONED_ANSWERS[1]}"),
    ),
    "messages, separate reasoning": (
        {
            "messages": [
                {"role": "user", "content": "First question?"},
                {"role": "assistant", "content": "First answer.", "reasoning_content": "A first thought."},
                {"role": "user", "content": "Second one?"},
                {"role": "assistant", "content": "Second answer.", "reasoning_content": "One more thought."},
            ]
        },
        tuple(
            message._replace(reasoning={1: "A first thought.", 3: "One more thought."}.get(i, ""))
            for i, message in enumerate(chat(*TWO_ROUNDS))
        ),
    ),
    "messages, letters": (
        openai("u: 日本 is é 😀?", "a: É e\u0301 👩‍👩‍👧 is 日本.", "u: «x»\u00a0y\u200b", "a: ☃\u2028 z"),
        chat("u: 日本 is é 😀?", "a: É e\u0301 👩‍👩‍👧 is 日本.", "u: «x»\u00a0y\u200b", "a: ☃\u2028 z"),
    ),
    "alpaca": (
        {"instruction": "First question?", "output": "First answer."},
        chat("u: First question?", "a: First answer."),
    ),
    "alpaca, input": (
        {"instruction": "First question?", "input": "With this.", "output": "First answer."},
        chat("u: First question?\n\n### Input:\nWith this.", "a: First answer."),
    ),
    "alpaca, system and history": (
        {
            "instruction": "Second one?",
            "input": "",
            "output": "Second answer.",
            "system": "Be brief.",
            "history": [["First question?", "First answer."]],
        },
        chat("s: Be brief.", *TWO_ROUNDS),
    ),
    "prompt_completion": (
        {
            "prompt": openai(*TWO_ROUNDS[:3])["messages"],
            "completion": [{"role": "assistant", "content": "Second answer."}],
        },
        chat(TWO_ROUNDS[0], "x: First answer.", *TWO_ROUNDS[2:]),
    ),
}

WITH_SYSTEM = ("sharegpt, synonyms", "messages", "alpaca, system and history")
TWO_ANSWERS, NO_QUESTION = "messages, two answers", "messages, no question"
OTHER_ROLES = ("messages, a tool", "messages, late system")
REJECTED = "the chat template rejects it: "
UNSUPPORTED_ROLE = rf"{REJECTED}.*\ba (tool|system|assistant) message .*here"
ALTERNATE = f"{REJECTED}Conversation roles must alternate"
SEPARATE_REASONING = "messages, separate reasoning"
NO_REASONING = {SEPARATE_REASONING: "the chat template .*leaves out the reasoning of message [24]"}
LEFT_OUT: dict[str, dict[str, str]] = {
    **dict.fromkeys(STYLES, NO_REASONING),
    "alpaca": NO_REASONING | dict.fromkeys(OTHER_ROLES, UNSUPPORTED_ROLE),
    "gemma": NO_REASONING | dict.fromkeys((*WITH_SYSTEM, NO_QUESTION, TWO_ANSWERS, *OTHER_ROLES), UNSUPPORTED_ROLE),
    "llama-2": NO_REASONING | dict.fromkeys((NO_QUESTION, TWO_ANSWERS, *OTHER_ROLES), UNSUPPORTED_ROLE),
    "vicuna_v1.1": NO_REASONING | dict.fromkeys(OTHER_ROLES, UNSUPPORTED_ROLE),
    "zephyr": NO_REASONING | {"messages, a tool": UNSUPPORTED_ROLE},
    "system in the question": NO_REASONING | dict.fromkeys(OTHER_ROLES, UNSUPPORTED_ROLE),
    "strips reasoning": {},
    "prompts for reasoning": {},
    "raises": NO_REASONING
    | dict.fromkeys(WITH_SYSTEM, f"{REJECTED}System role not supported")
    | dict.fromkeys((NO_QUESTION, TWO_ANSWERS, *OTHER_ROLES), ALTERNATE),
}
"""Rows with answers that a template does not support, with the reason; all others are supervised."""


# What the rule requires.


class Text(NamedTuple):
    """A rendered text."""

    text: str
    specials: list[tuple[int, int]]
    """Spans of the special tokens that the template wrote."""
    untrusted: list[tuple[int, int]]
    """Spans of message text that may look like special tokens."""

    def has_special_as_text(self) -> bool:
        return any(SPECIAL.search(self.text, start, end) for start, end in self.untrusted)

    def encode(self, template: ChatTemplate) -> list[int]:
        """Return the tokens as transformers makes them. It cannot if message text looks like a special token."""
        if self.has_special_as_text():
            return template.tokens.encode(self.text, [Span(*span) for span in self.untrusted]).ids
        ids: list[int] = template.tokenizer(self.text, add_special_tokens=False).input_ids
        return ids


def trusted(text: str) -> Text:
    """Return a text in which only the template wrote special tokens."""
    return Text(text, [match.span() for match in SPECIAL.finditer(text)], [])


class Answer(NamedTuple):
    """A supervised answer of a row."""

    number: int
    """0-based index of its message."""
    prompt: Text
    """What inference feeds."""
    complete: Text
    """The prompt, and what the model has to generate: the answer and its end of turn."""
    is_in_row: bool
    """Whether the text of the row begins with `complete`."""

    @property
    def generated(self) -> str:
        return self.complete.text[len(self.prompt.text) :]


def check_examples(
    template: ChatTemplate,
    kind: tuple[str, str, str],
    examples: Sequence[Example],
    messages: Sequence[Message],
    row: Text | None,
    answers: Sequence[Answer],
) -> set[int]:
    """Check that the examples of a row are exactly those that the rule requires; return the answers that they have.

    The tokens that inference feeds are a prefix, and everything after them to the end of the turn is supervised. An
    answer is in the example of its row if the tokens of the row begin with its prompt, else in one of its own.

    Args:
        kind: style, family and begin of the template.
        row: the complete row; None if the template rejects it.
    """
    style, family, begin = kind
    prefix = bos_before(style, begin)
    prompts: dict[int, list[int]] = {}
    for answer in answers:
        assert template.prompt(Conversation(tuple(messages[: answer.number]))) == answer.prompt.text
        prompts[answer.number] = prefix + answer.prompt.encode(template)
        assert answer.number == 0 or prompts[answer.number] == template.encode_prompt(messages[: answer.number])
        covered(family, begin, prompts[answer.number][len(prefix) :], answer.prompt.text, answer.prompt.specials)
    row_ids = prefix + row.encode(template) if row is not None else []
    in_row = [a for a in answers if a.is_in_row and row_ids[: len(prompts[a.number])] == prompts[a.number]]
    found: list[int] = []
    last_numbers = []
    for example in examples:
        ids = example.input_ids
        if row is not None and in_row and ids == row_ids:
            chars = covered(family, begin, ids[len(prefix) :], row.text, row.specials)
            present = [a for a in in_row if example.labels[max(1, len(prompts[a.number]))] != IGNORE_INDEX]
            spans = []
            for answer in present:
                end = sum(min(token_chars) < len(answer.complete.text) for token_chars in chars) + len(prefix)
                spans.append((len(prompts[answer.number]), end))
        else:
            own = (a for a in answers if a not in in_row and ids[: len(prompts[a.number])] == prompts[a.number])
            present = [next(a for a in own if _covers(family, begin, ids[len(prefix) :], a.complete))]
            spans = [(len(prompts[present[0].number]), len(ids))]
            if family == "bytes" and not present[0].complete.has_special_as_text():
                rest = template.tokenizer(present[0].generated, add_special_tokens=False).input_ids
                assert ids[spans[0][0] :] == rest
        labels = [IGNORE_INDEX] * len(ids)
        for (start, end), answer in zip(spans, present, strict=True):
            labels[start:end] = ids[start:end]
            ends_unknown = family == "unigram" and answer.prompt.text[-1:] not in {*_unigram_alphabet(), " "}
            if not answer.complete.has_special_as_text() and not ends_unknown:
                decoded = template.tokenizer.decode(ids[start:end])
                assert decoded.strip() == as_decoded(family, answer.generated).strip()
        assert example.labels == [IGNORE_INDEX, *labels[1:]]  # nothing predicts the first token
        assert example.answer == (spans[-1] if spans[-1][0] else None)  # None: nothing is before it
        assert ids[: len(prefix)] == prefix
        assert ids[:2] != [1, 1]
        found += [answer.number for answer in present]
        last_numbers.append(present[-1].number)
    assert len(found) == len(set(found))
    assert last_numbers == sorted(last_numbers), "the last example of a row has its last answer"
    return set(found)


def bos_before(style: str, begin: str) -> list[int]:
    """Return the token that the tokenizer adds before the text of a template."""
    return [1] if begin == "BOS added" and style in BUILT_IN_TEMPLATES else []


def _covers(family: str, begin: str, ids: Sequence[int], text: Text) -> bool:
    try:
        covered(family, begin, ids, text.text, text.specials)
    except (AssertionError, IndexError):
        return False
    return True


def is_closed(style: str) -> bool:
    """Whether a special token ends the answers of a template. Otherwise EOS is added."""
    return STYLES[style].end.endswith(tuple(SPECIALS))


def generated_by(style: str, messages: Sequence[Message]) -> str:
    """Return what the model generates for the last message, its end of turn included."""
    message, template = messages[-1], STYLES[style]
    content = message.content.strip() if template.strips else message.content
    if style == "strips reasoning" and has_question(messages):
        reasoning = message.reasoning
        if "</think>" in content:
            reasoning, content = content.removeprefix("<think>\n").split("\n</think>\n\n")
        content = f"<think>\n{reasoning}\n</think>\n\n" + content.lstrip("\n")
    if style == "prompts for reasoning":  # the prompt opens a thought
        is_thought = content.startswith("<think>\n")
        content = content.removeprefix("<think>\n") if is_thought else f"{message.reasoning}\n</think>\n\n{content}"
    return template.before + content + template.end


def answers_of(
    style: str, template: ChatTemplate, name: str, messages: Sequence[Message], loss_on: str = "assistant"
) -> tuple[Text | None, list[Answer]]:
    """Return the text of a row and its answers, as transformers renders them. Those that it rejects are left out."""

    def apply(count: int, **options: Any) -> str | None:
        values = [message.for_template() for message in messages[:count]]
        try:
            text: str = template.tokenizer.apply_chat_template(
                values, chat_template=template.source, tokenize=False, **options
            )
        except jinja2.TemplateError:
            return None
        return text

    numbers = [i for i, message in enumerate(messages) if message.role == "assistant"]
    numbers = [i for i in numbers[-1 if loss_on == "last_assistant" else 0 :] if messages[i].supervised]
    if name in NO_REASONING and LEFT_OUT[style].get(name) == NO_REASONING[name]:
        numbers = []
    text, answers = apply(len(messages)), []
    end = "" if is_closed(style) else "</s>"
    for number in numbers:
        rendered = apply(number + 1)
        if rendered is None:
            continue
        generated = generated_by(style, messages[: number + 1])
        has_prompt = "add_generation_prompt" in template.source and number > 0
        prompt = apply(number, add_generation_prompt=True) if has_prompt else None
        if prompt is None:  # the text before the answer; the empty thought of one template is only in its prompt
            written = generated.removeprefix("\n</think>\n\n")
            prompt = rendered[: rendered.rindex(written)] + ("<think>\n" if written != generated else "")
        is_in_row = bool(text and text.startswith(prompt + generated)) and (not end or number == len(messages) - 1)
        answers.append(Answer(number, trusted(prompt), trusted(prompt + generated + end), is_in_row))
    if end and answers and answers[-1].is_in_row:
        return answers[-1].complete, answers
    return trusted(text) if text else None, answers


def has_question(messages: Sequence[Message]) -> bool:
    """Whether there is a user or a tool message."""
    return any(message.role in ("user", "tool") for message in messages)


def supervised_runs(example: Example) -> list[list[int]]:
    """Return the runs of supervised tokens."""
    numbers = range(len(example.labels))
    runs = itertools.groupby(numbers, lambda i: example.labels[i] != IGNORE_INDEX)
    return [[example.input_ids[i] for i in run] for supervised, run in runs if supervised]


def test_every_format_is_detected_and_parsed() -> None:
    for row, messages in ROWS.values():
        record = parse_row(row, detect_format(row))
        assert isinstance(record, Conversation)
        assert record.messages == messages
    assert {detect_format(row) for row, _ in ROWS.values()} == set(FORMATS) - {"text", "tokens"}


@pytest.mark.sample(240)
@pytest.mark.parametrize("begin", BEGINS)
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("family", FAMILIES)
def test_exactly_the_answers_and_their_ends_are_supervised(family: str, style: str, begin: str) -> None:
    template = template_of(family, style, begin)
    for name, (row, messages) in ROWS.items():
        record = parse_row(row, detect_format(row))
        reason = LEFT_OUT[style].get(name)
        for loss_on in ("assistant", "last_assistant"):
            text, answers = answers_of(style, template, name, messages, loss_on)
            if not answers:
                with pytest.raises(UnusableRow, match=f"^{reason}"):
                    encode_record(record, template, loss_on)
                continue
            examples = encode_record(record, template, loss_on)
            found = check_examples(template, (style, family, begin), examples, messages, text, answers)
            assert found == {answer.number for answer in answers}
            left_out = [note for note in examples[0].notes if note.startswith("an answer is left out: ")]
            assert bool(left_out) == (reason is not None and loss_on == "assistant")
            assert all(re.match(f"an answer is left out: {reason}", note) for note in left_out)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("family", FAMILIES)
def test_everything_but_the_excluded_answers_is_supervised_with_loss_on_all(family: str, style: str) -> None:
    begin = "BOS added"
    template = template_of(family, style, begin)
    for name, (row, messages) in ROWS.items():
        text, answers = answers_of(style, template, name, messages, "last_assistant")
        if not answers:
            continue
        (example,) = encode_record(parse_row(row, detect_format(row)), template, "all")
        (last,) = encode_record(parse_row(row, detect_format(row)), template, "last_assistant")
        assert example.input_ids == last.input_ids
        assert example.answer == last.answer
        assert last.answer is not None
        is_row = text is not None and answers[0].is_in_row
        trained = text.text if text and is_row else answers[0].complete.text
        # Excluded is at least the text of an answer, and at most what is between the messages next to it.
        excluded, turns = set[int](), set[int]()
        for number, message in enumerate(messages):
            if message.role == "assistant" and not (message.supervised and message.content):
                before, after = (m.content for m in (messages[number - 1], messages[number + 1]))
                first = trained.index(before) + len(before)
                last_end = trained.index(after, first)
                turns |= set(range(first, last_end))
                start = trained.index(message.content, first, last_end)
                excluded |= set(range(start, start + len(message.content)))
        prefix = bos_before(style, begin)
        ids, labels = example.input_ids[len(prefix) :], example.labels[len(prefix) :]
        chars = covered(family, begin, ids, trained, trusted(trained).specials)
        for i in range(0 if prefix else 1, len(ids)):
            if chars[i] & excluded:
                assert labels[i] == IGNORE_INDEX
            elif not chars[i] & turns:
                assert labels[i] == ids[i]


@pytest.mark.parametrize("begin", BEGINS)
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_without_messages_do_not_depend_on_the_template(family: str, begin: str) -> None:
    prefix = [1] if begin in ("BOS added", "BOS written") else []
    pairs = (("", "A text."), ("So </s> it", " is."), ("a:\n", "\n b "), ("Answer: ", "one"), ("Answer:", " one"))
    for style, (prompt, completion) in itertools.product(STYLES, pairs):
        template = template_of(family, style, begin)
        row = {"prompt": prompt, "completion": completion} if prompt else {"text": completion}
        (example,) = encode_record(parse_row(row, detect_format(row)), template, "assistant")
        text = prompt + completion + "</s>"
        assert example.input_ids[: len(prefix)] == prefix
        tokens = example.input_ids[len(prefix) :]
        covered(family, begin, tokens, text, [(len(prompt + completion), len(text))])
        fed = template.encode_text(prompt) if prompt else prefix
        assert example.input_ids[: len(fed)] == fed
        assert example.labels == [IGNORE_INDEX, *([IGNORE_INDEX] * len(fed) + example.input_ids[len(fed) :])[1:]]
        assert example.answer == ((len(fed), len(example.input_ids)) if prompt else None)
        assert example.labels[-1] == 2
        if "</s>" not in prompt:
            tokenizer = template.tokenizer
            assert fed == prefix + tokenizer(prompt, add_special_tokens=False).input_ids
            together = prefix + tokenizer(text, add_special_tokens=False).input_ids
            is_prefix = together[: len(fed)] == fed
            assert is_prefix == (example.input_ids == together)
            if not is_prefix and family == "bytes":
                assert example.input_ids == fed + tokenizer(completion + "</s>", add_special_tokens=False).input_ids
        tokens_row = {"input_ids": example.input_ids, "labels": example.labels}
        assert encode_record(parse_row(tokens_row, "tokens"), template, "assistant") == [
            example._replace(notes=(), answer=None)
        ]


# Random conversations.


class Piece(NamedTuple):
    """Consecutive characters of a rendered text."""

    text: str
    message: int | None = None
    """The message whose text this is; None: the template wrote it."""
    answer: int | None = None
    """The answer as part of which the model generates it."""


def chatml_pieces(messages: Sequence[Message], *, strips: bool = False, end: str = "<|im_end|>") -> list[Piece]:
    pieces = []
    for i, message in enumerate(messages):
        answer = i if message.role == "assistant" else None
        content = message.content.strip() if strips else message.content
        pieces += [Piece("<|im_start|>"), Piece(f"{message.role}\n"), Piece(content, i, answer)]
        pieces += [Piece("<|im_end|>", answer=answer), Piece("\n")]
    return pieces


def text_markers_pieces(messages: Sequence[Message]) -> list[Piece]:
    pieces = []
    for i, message in enumerate(messages):
        answer = i if message.role == "assistant" else None
        pieces += [Piece(f"## {message.role}:\n"), Piece(message.content, i, answer)]
        pieces += [Piece("\n###", answer=answer), Piece("\n\n")]
    return [*pieces, Piece("The end.")]


def contents_only_pieces(messages: Sequence[Message]) -> list[Piece]:
    return [Piece(m.content, i, i if m.role == "assistant" else None) for i, m in enumerate(messages)]


def llama_2_pieces(messages: Sequence[Message]) -> list[Piece] | None:
    first = int(messages[0].role == "system")
    if any(message.role != ("user", "assistant")[i % 2] for i, message in enumerate(messages[first:])):
        return None
    pieces = []
    for i, message in enumerate(messages[first:], start=first):
        content = message.content.strip()
        if message.role == "user":
            pieces += [Piece("<s>")] * (i > first) + [Piece("[INST] ")]
            if first and i == 1:
                pieces += [Piece("<<SYS>>\n"), Piece(messages[0].content, 0), Piece("\n<</SYS>>\n\n")]
            pieces += [Piece(content, i), Piece(" [/INST]")]
        else:
            pieces += [Piece(" ", answer=i), Piece(content, i, i), Piece(" ", answer=i), Piece("</s>", answer=i)]
    return pieces


def mistral_pieces(messages: Sequence[Message]) -> list[Piece] | None:
    system = messages[0].content if messages[0].role == "system" else ""
    pieces = []
    for i, message in enumerate(messages):
        if i == 0 and system:
            continue
        if message.role == "user":
            pieces += [Piece("[INST] ")]
            if system and i == 1:
                pieces += [Piece(system, 0), Piece("\n\n")]
            pieces += [Piece(message.content, i), Piece("[/INST]")]
        elif message.role == "assistant":
            pieces += [Piece(" ", answer=i), Piece(message.content, i, i), Piece("</s>", answer=i)]
        else:
            return None
    return pieces


def vicuna_pieces(messages: Sequence[Message]) -> list[Piece] | None:
    default_system = template_source("vicuna_v1.1").split('{{ "')[1].split('" }}')[0]
    pieces = [] if messages[0].role == "system" else [Piece(default_system)]
    for i, message in enumerate(messages):
        if message.role == "user":
            pieces += [Piece("USER: "), Piece(message.content, i), Piece(" ")]
        elif message.role == "assistant":
            pieces += [Piece("ASSISTANT:"), Piece(" ", answer=i), Piece(message.content, i, i), Piece("</s>", answer=i)]
        elif message.role == "system" and i == 0:
            pieces += [Piece(message.content, i), Piece(" ")]
        else:
            return None
    return pieces


def qwen_3_pieces(messages: Sequence[Message]) -> list[Piece]:
    queries = [i for i, message in enumerate(messages) if message.role == "user"]
    last_query = queries[-1] if queries else len(messages) - 1
    pieces = []
    for i, message in enumerate(messages):
        pieces += [Piece("<|im_start|>"), Piece(f"{message.role}\n")]
        if message.role != "assistant":
            pieces += [Piece(message.content, i), Piece("<|im_end|>"), Piece("\n")]
            continue
        reasoning, content = message.reasoning, message.content
        if not reasoning and "</think>" in content:
            reasoning = content.split("</think>")[0].rstrip("\n").split("<think>")[-1].lstrip("\n")
            content = content.split("</think>")[-1].lstrip("\n")
        if i > last_query and (i == len(messages) - 1 or reasoning):
            pieces += [Piece("<think>\n", answer=i), Piece(reasoning.strip("\n"), i, i)]
            pieces += [Piece("\n</think>\n\n", answer=i)]
            content = content.lstrip("\n")
        pieces += [Piece(content, i, i), Piece("<|im_end|>", answer=i), Piece("\n")]
    return pieces


EXPECTED_PIECES: dict[str, Callable[[Sequence[Message]], list[Piece] | None]] = {
    "chatml": chatml_pieces,
    "strips": functools.partial(chatml_pieces, strips=True),
    "text markers": text_markers_pieces,
    "contents only": contents_only_pieces,
    "llama-2": llama_2_pieces,
    "system in the question": mistral_pieces,
    "vicuna_v1.1": vicuna_pieces,
    "strips reasoning": qwen_3_pieces,
}
"""The expected text of each style, piece by piece; None if the template does not support the conversation."""
UNTRUSTED = [
    *("<|im_start|>", "<|im_end|>", "<|im_end|>\n<|im_start|>assistant\n", "</s>", "<s>", "<unk>", "<|eot_id|>"),
    *("assistant\n", "user\n", "ASSISTANT: ", "USER: ", "[INST] ", " [/INST]", "<<SYS>>\n", "\n###", "## user:\n"),
    *("<think>", "</think>", "<think>\nso\n</think>\n\n", "<tool_call>", "{{ x }}", "{% endfor %}", "The end."),
    *(" ", "  ", "\n", "\n\n", "\t", "\r\n", "\u00a0", "\u2028", "\u200b", "\ufeff", "\x00", "\x85", "▁", "▁▁"),
    *("😀", "👩‍👩‍👧", "日本", "e\u0301", "\u0301", "가", "\u1100\u1161", "\ud7ff", "\ue000", "\U000f0000", "\ufffd"),
    *("the answer", "question", "a", "word ", " word", ".", "\U00108000" * 4),
]
RESERVED = "\U00100000"
"""First character that a row must not have."""
CONTENTS = st.lists(st.sampled_from(UNTRUSTED) | st.text(max_size=3), max_size=4).map("".join)
ROUNDS = st.integers(1, 3).map(lambda count: ["user", "assistant"] * count)
ROLES = st.one_of(
    ROUNDS,
    ROUNDS,
    ROUNDS.map(lambda roles: ["system", *roles]),
    st.lists(st.sampled_from(["system", "user", "assistant", "assistant", "tool"]), min_size=1, max_size=5),
)
FLAGS = st.sampled_from([{}, {}, {}, {"weight": 0}, {"weight": 1}, {"train": False}, {"train": True}])


@st.composite
def untrusted_rows(draw: st.DrawFn) -> dict[str, Any]:
    """Draw rows in OpenAI's format, with contents as strings or parts."""
    messages = []
    for role in draw(ROLES):
        content = draw(CONTENTS)
        parts = [{"type": "text", "text": letter} for letter in content]
        flags = draw(FLAGS) if role == "assistant" else {}
        messages.append({"role": role, "content": draw(st.sampled_from([content, content, parts])), **flags})
    return {"messages": messages}


@pytest.mark.sample(6)
@pytest.mark.parametrize(
    ("style", "family", "begin"),
    [
        ("chatml", "bytes, trimmed offsets", "BOS added"),
        ("strips", "sentencepiece, llama-2", "BOS written"),
        ("text markers", "unigram", "pad = eos"),
        ("text markers", "bytes, NFC", "BOS added"),
        ("contents only", "bytes", "pad = eos"),
        ("contents only", "sentencepiece, first", "BOS written"),
        ("llama-2", "sentencepiece, first", "BOS added"),
        ("system in the question", "bytes, NFC", "no BOS"),
        ("vicuna_v1.1", "sentencepiece, always", "BOS added"),
        ("vicuna_v1.1", "bytes", "no BOS"),
        ("strips reasoning", "sentencepiece, llama-2", "BOS written"),
        ("strips reasoning", "bytes, NFC", "pad = eos"),
    ],
)
def test_no_conversation_can_move_a_mask_or_write_a_special_token(style: str, family: str, begin: str) -> None:
    template = template_of(family, style, begin)
    outcomes: list[bool] = []

    @given(row=untrusted_rows())
    @settings(derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    def check(row: dict[str, Any]) -> None:
        outcomes.append(check_row(template, style, family, begin, row))

    check()
    assert sum(outcomes) > len(outcomes) / 4, "most rows are dropped, so the test proves little"


def text_of(pieces: Iterable[Piece]) -> Text:
    """Return the text of some pieces."""
    text, specials, untrusted = "", [], []
    for piece in pieces:
        start, text = len(text), text + piece.text
        if piece.message is None:
            specials += [(start + match.start(), start + match.end()) for match in SPECIAL.finditer(piece.text)]
        elif piece.text:
            untrusted.append((start, len(text)))
    return Text(text, specials, untrusted)


def expected_answer(style: str, messages: Sequence[Message], first: list[Piece]) -> tuple[Text, Text] | None:
    """Return the prompt of the last message, and the prompt with it; None if the template does not support it.

    Args:
        first: what the template writes before the messages.
    """
    pieces = EXPECTED_PIECES[style](messages)
    if pieces is None:
        return None
    number = len(messages) - 1
    start = next(i for i, piece in enumerate(pieces) if piece.answer == number)
    generated = [piece for piece in pieces if piece.answer == number]
    prompt = pieces[:start]
    if style == "strips reasoning":  # the last message before the answer may be another answer
        prompt = [*qwen_3_pieces(messages[:-1]), Piece("<|im_start|>"), Piece("assistant\n")]
    if not is_closed(style):
        generated.append(Piece("</s>"))
    return text_of([*first, *prompt]), text_of([*first, *prompt, *generated])


def check_row(template: ChatTemplate, style: str, family: str, begin: str, row: dict[str, Any]) -> bool:
    """Check the examples of a row; return whether there are any."""
    try:
        record = parse_row(row, "messages")
    except (UnusableRow, MalformedRow) as error:
        if not re.search("no assistant turn|empty answer|empty conversation", str(error)):
            raise
        return False
    assert isinstance(record, Conversation)
    messages, first = record.messages, [Piece("<s>")] * (begin == "BOS written")

    def may_fail(end: int) -> bool:
        """Whether the first messages may be impossible to render, or changed by the template."""
        contents = [message.content for message in messages[:end]]
        only_reasoning = any(re.fullmatch(r"\s*<think>.*</think>\s*", content, re.DOTALL) for content in contents)
        splits_content = style == "strips reasoning" and any("think>" in content for content in contents)
        is_supported = EXPECTED_PIECES[style](messages[:end]) is not None
        return not is_supported or only_reasoning or splits_content or max("".join(contents), default="") >= RESERVED

    def fails(end: int, use: Callable[[Sequence[Message]], Any]) -> bool:
        try:
            use(messages[:end])
        except (UnusableRow, DataError):
            assert may_fail(end)
            return True
        return False

    pieces = EXPECTED_PIECES[style](messages)
    is_usable = not fails(len(messages), template.render) and pieces is not None
    text = text_of([*first, *pieces]) if is_usable and pieces is not None else None
    answers = []
    for number, message in enumerate(messages):
        can_ask = number == 0 or not fails(number, template.encode_prompt)
        if message.role == "assistant" and message.supervised and can_ask:
            expected = expected_answer(style, messages[: number + 1], first)
            if expected is not None:
                ends_row = number == len(messages) - 1
                is_in_row = text is not None and (
                    text.text.startswith(expected[1].text) if is_closed(style) else ends_row
                )
                answers.append(Answer(number, *expected, is_in_row))
    if answers and answers[-1].is_in_row and not is_closed(style):
        text = answers[-1].complete

    try:
        examples = encode_record(record, template, "assistant")
    except UnusableRow as error:
        examples, reasons = [], [str(error)]
    else:
        start = "an answer is left out: "
        notes = examples[0].notes if examples else ()
        reasons = [note.removeprefix(start) for note in notes if note.startswith(start)]
    found = check_examples(template, (style, family, begin), examples, messages, text, answers)
    supervised = {i for i, message in enumerate(messages) if message.role == "assistant" and message.supervised}
    missing = supervised - found
    assert bool(missing) == bool(reasons) or not supervised
    assert all(may_fail(number + 1) for number in missing)
    documented = (REJECTED, "private use area B", r"the chat template (changes|leaves out)( the (text|reasoning))?")
    assert all(any(re.search(reason, note) for reason in documented) for note in reasons), reasons
    return bool(examples)


# Regressions.


def test_the_reasoning_of_an_answer_without_a_question_is_supervised() -> None:
    template = template_of("bytes", "chatml", "no BOS")
    (example,) = encode_record(Conversation(chat(f"a: {REASONED_ANSWERS[0]}")), template, "assistant")
    assert [template.tokenizer.decode(run) for run in supervised_runs(example)] == [f"{REASONED_ANSWERS[0]}<|im_end|>"]


@pytest.mark.parametrize("style", ["alpaca", "vicuna_v1.1"])
def test_bos_is_added_before_a_text_that_starts_like_bos(style: str) -> None:
    template = template_of("bytes", style, "BOS added")
    (example,) = encode_record(Conversation(chat("s: <s>Be brief.", *TWO_ROUNDS)), template, "assistant")
    assert example.input_ids[0] == 1
    assert example.input_ids.count(1) == 1


@pytest.mark.parametrize("key", ["text", "completion"])
def test_no_text_can_write_a_special_token(key: str) -> None:
    template = template_of("bytes", "chatml", "pad = eos")
    for number, token in itertools.product(range(len(SPECIALS)), SPECIALS):
        row = {"prompt": "So", key: chr(FIRST_ALIAS + number) * len(token)}
        try:
            (example,) = encode_record(parse_row(row, detect_format(row)), template, "assistant")
        except UnusableRow:
            continue
        assert min(example.input_ids[:-1]) >= len(SPECIALS)


def test_a_prompt_that_ends_with_newlines_has_the_tokens_of_training() -> None:
    backend = Tokenizer.from_str(trained_json("bytes"))
    config = json.loads(backend.to_str())
    config["model"]["vocab"]["ĊĊ"] = len(config["model"]["vocab"])
    config["model"]["merges"].append(["Ċ", "Ċ"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(config)), eos_token="</s>")
    template = ChatTemplate(tokenizer, "llama-3")
    examples = encode_record(Conversation(chat(*TWO_ROUNDS)), template, "assistant")
    for number, example in zip((1, 3), examples, strict=True):
        prompt = template.encode_prompt(chat(*TWO_ROUNDS[:number]))
        assert tokenizer.convert_ids_to_tokens(prompt[-1]) == "ĊĊ"
        assert example.input_ids[: len(prompt)] == prompt
        assert tokenizer.decode(example.input_ids[len(prompt) :]) == f"{TWO_ROUNDS[number][3:]}<|eot_id|>"
        assert example.labels == [IGNORE_INDEX] * len(prompt) + example.input_ids[len(prompt) :]


def test_an_answer_that_joins_its_prompt_to_one_token_is_an_example_of_its_own() -> None:
    """Training on the joined token would teach what inference never feeds."""
    template = template_of("bytes, NFC", "prompts for reasoning", "no BOS")
    tokenizer = template.tokenizer
    messages = chat("u: First?", "a: <think>\n\n</think>\n\nOne.", "u: Second?", "a: <think>\nHm.\n</think>\n\nTwo.")
    assert tokenizer("<think>\n\n</think>").tokens() == ["<think>", "ĊĊ", "</think>"]
    prompts = [template.encode_prompt(messages[:number]) for number in (1, 3)]
    own, row = encode_record(Conversation(messages), template, "assistant")
    assert own.input_ids[: len(prompts[0])] == prompts[0]
    assert own.labels == [IGNORE_INDEX] * len(prompts[0]) + own.input_ids[len(prompts[0]) :]
    assert tokenizer.decode(own.input_ids[len(prompts[0]) :]) == "\n</think>\n\nOne.<|im_end|>"
    assert row.input_ids == tokenizer(template.apply(messages), add_special_tokens=False).input_ids
    assert row.input_ids[: len(prompts[1])] == prompts[1]
    assert [tokenizer.decode(run) for run in supervised_runs(row)] == ["Hm.\n</think>\n\nTwo.<|im_end|>"]


def test_the_header_of_an_answer_is_not_supervised_after_an_empty_one() -> None:
    """This template writes an empty answer differently in the prompt, and with the same header."""
    template = template_of("bytes", "strips reasoning", "no BOS")
    messages = chat("u: q", "x: ", "a: An answer.")
    (example,) = encode_record(Conversation(messages), template, "assistant")
    prompt = template.encode_prompt(messages[:2])
    assert example.input_ids[: len(prompt)] == prompt
    runs = [template.tokenizer.decode(run) for run in supervised_runs(example)]
    assert runs == ["<think>\n\n</think>\n\nAn answer.<|im_end|>"]


def test_a_special_token_that_starts_with_another_is_distinguished_from_it() -> None:
    backend = Tokenizer.from_str(trained_json("bytes"))
    backend.add_special_tokens(["</s></s>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    tokenizer.chat_template = OPEN + "{{ m.content }}</s></s>" + CLOSE
    (example,) = encode_record(Conversation(chat("u: a</s></s>", "a: b")), ChatTemplate(tokenizer), "assistant")
    end = tokenizer.convert_tokens_to_ids("</s></s>")
    assert example.input_ids.count(end) == 2
    assert example.input_ids.count(2) == 0
    assert example.input_ids[-1] == example.labels[-1] == end


def test_characters_do_not_merge_into_a_special_token() -> None:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    backend.train_from_iterator(["<s> </s> ab"] * 9, trainers.BpeTrainer(special_tokens=["<unk>"]))
    assert "</s>" in backend.encode("</s>").tokens, "the vocabulary merges the characters"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", bos_token="<s>")
    (example,) = encode_record(parse_row({"text": "<s>ab </s>"}, "text"), ChatTemplate(tokenizer), "assistant")
    assert example.input_ids.count(tokenizer.bos_token_id) == 0
    assert example.input_ids.count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(example.input_ids).replace(" ", "") == "<s>ab</s></s>"


@pytest.mark.parametrize(
    ("turns", "supervised"),
    [
        (TWO_ROUNDS, [["First answer.<|im_end|>"], ["Second answer.<|im_end|>"]]),
        (
            ("u: q", "a: First answer.", "u: ", "a: Second answer."),
            [["First answer.<|im_end|>"], ["Second answer.<|im_end|>"]],
        ),
        (("u: q", "x: ", "u: q", "a: Second answer."), [["Second answer.<|im_end|>"]]),
    ],
)
def test_the_end_of_another_turn_is_not_supervised(turns: tuple[str, ...], supervised: list[list[str]]) -> None:
    """An answer that only ends where it is the last message is an example of its own."""
    tokenizer = copy.copy(tokenizer_of("bytes", "pad = eos"))
    turn = TURN.replace("<|im_end|>", "{% if m.role == 'user' or loop.last %}<|im_end|>{% endif %}")
    tokenizer.chat_template = OPEN + turn + CLOSE + GENERATION_PROMPT
    examples = encode_record(Conversation(chat(*turns)), ChatTemplate(tokenizer), "assistant")
    runs = [[tokenizer.decode(run) for run in supervised_runs(example)] for example in examples]
    assert runs == supervised
