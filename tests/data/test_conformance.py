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

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from lora_accel.data.chat import BUILT_IN_TEMPLATES, ChatTemplate, Example, encode_record, template_source
from lora_accel.data.formats import (
    FORMATS,
    Conversation,
    MalformedRow,
    Message,
    UnusableRow,
    detect_format,
    parse_row,
)
from lora_accel.data.tokens import FIRST_ALIAS
from lora_accel.errors import DataError
from lora_accel.labels import IGNORE_INDEX

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
    """Train BPE with byte fallback. A space is added before the text, each section, or (Llama 2) by a normalizer."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIALS, limit_alphabet=60)
    tokenizer.train_from_iterator(LINES + NEWLINES, trainer)
    config = json.loads(tokenizer.to_str())
    vocabulary = config["model"]["vocab"]
    vocabulary |= {f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)}
    if scheme == "llama-2":
        config["pre_tokenizer"] = None
    tokenizer = Tokenizer.from_str(json.dumps(config))
    if scheme == "llama-2":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False)
    pieces = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(pieces)
    return tokenizer


def unigram() -> Tokenizer:
    """Train a tokenizer like T5's and XLM-R's: unknown characters are one token."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace("▁", prepend_scheme="always")
    trainer = trainers.UnigramTrainer(vocab_size=250, special_tokens=SPECIALS, unk_token="<unk>")
    tokenizer.train_from_iterator(["\n".join(LINES[:3])] * 5, trainer)
    return tokenizer


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
        return re.sub("␀+", "<unk>", "".join(a if a == " " or a in _unigram_alphabet() else "␀" for a in text))
    if family == "sentencepiece, llama-2":  # a space is added after each special token
        text = re.sub(f"({SPECIAL.pattern})(?=.)", r"\1 ", text)
    return unicodedata.normalize("NFC", text) if family == "bytes, NFC" else text


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
    "messages, an empty answer": (openai("u: Hm?", "a: ", *TWO_ROUNDS), chat("u: Hm?", "a: ", *TWO_ROUNDS)),
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
NOT_THE_PROMPT = "the text before message . is not the prompt that the chat template makes for it"
ALTERNATE = f"{REJECTED}Conversation roles must alternate"
NO_REASONING = {"messages, separate reasoning": "the chat template leaves the reasoning of message 4 out"}
DROPPED: dict[str, dict[str, str]] = {
    **dict.fromkeys(STYLES, NO_REASONING),
    "alpaca": NO_REASONING | {TWO_ANSWERS: NOT_THE_PROMPT} | dict.fromkeys(OTHER_ROLES, UNSUPPORTED_ROLE),
    "gemma": NO_REASONING | dict.fromkeys((*WITH_SYSTEM, NO_QUESTION, TWO_ANSWERS, *OTHER_ROLES), UNSUPPORTED_ROLE),
    "llama-2": NO_REASONING | dict.fromkeys((NO_QUESTION, TWO_ANSWERS, *OTHER_ROLES), UNSUPPORTED_ROLE),
    "vicuna_v1.1": NO_REASONING | dict.fromkeys(OTHER_ROLES, UNSUPPORTED_ROLE),
    "zephyr": NO_REASONING | {"messages, a tool": UNSUPPORTED_ROLE},
    "system in the question": NO_REASONING | dict.fromkeys(OTHER_ROLES, UNSUPPORTED_ROLE),
    "strips reasoning": {TWO_ANSWERS: NOT_THE_PROMPT},
    # The prompt of this template matches only answers that start with reasoning.
    "prompts for reasoning": dict.fromkeys(ROWS.keys() - {"messages, reasoning"}, NOT_THE_PROMPT) | NO_REASONING,
    "raises": NO_REASONING
    | dict.fromkeys(WITH_SYSTEM, f"{REJECTED}System role not supported")
    | dict.fromkeys((NO_QUESTION, TWO_ANSWERS, *OTHER_ROLES), ALTERNATE),
}
"""Rows that a template does not support, with the reason; all others are encoded."""


def answer_by(style: str, messages: Sequence[Message], number: int) -> str:
    """Return what the model generates for an answer with this template, its end of turn included."""
    message, template = messages[number], STYLES[style]
    content = message.content.strip() if template.strips else message.content
    if style == "strips reasoning":
        reasoning, content = message.reasoning, message.content
        if "</think>" in content:
            reasoning, content = content.removeprefix("<think>\n").split("\n</think>\n\n")
        if number == len(messages) - 1:
            content = f"<think>\n{reasoning}\n</think>\n\n" + content.lstrip("\n")
    if style == "prompts for reasoning":
        content = content.removeprefix("<think>\n")  # is in the prompt
    return template.before * has_question(messages, number) + content + template.end


def find_answers(style: str, text: str, messages: Sequence[Message]) -> tuple[list[tuple[int, int]], set[int]]:
    """Return the spans of the supervised answers, and the characters of all other messages."""
    answers, others, position = [], set(), 0
    for i, message in enumerate(messages):
        if message.role == "assistant" and message.supervised:
            has_header = has_question(messages, i)
            if style == "system in the question" and messages[i - 1].role == "assistant":
                has_header = False  # this template writes nothing between two answers
            header, answer = STYLES[style].header * has_header, answer_by(style, messages, i)
            start = text.index(header + answer, position) + len(header)
            position = start + len(answer)
            answers.append((start, position))
        else:
            content = message.content if message.content in text else message.content.strip()
            start = text.find(content)  # contents are unique and not empty; a system text may be left out
            others |= set(range(start, start + len(content))) if start >= 0 else set()
    return answers, others


def has_question(messages: Sequence[Message], number: int) -> bool:
    """Whether a user or a tool message precedes this message."""
    return any(message.role in ("user", "tool") for message in messages[:number])


def merge_adjacent(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Merge spans that have no characters between them."""
    merged: list[tuple[int, int]] = []
    for start, end in spans:
        merged = [*merged[:-1], (merged[-1][0], end)] if merged and merged[-1][1] == start else [*merged, (start, end)]
    return merged


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


@pytest.mark.parametrize("begin", BEGINS)
@pytest.mark.parametrize("style", [style for style in STYLES if style != "contents only"])
@pytest.mark.parametrize("family", FAMILIES)
def test_exactly_the_answers_and_their_ends_are_supervised(family: str, style: str, begin: str) -> None:
    template = template_of(family, style, begin)
    tokenizer = template.tokenizer
    for name, (row, messages) in ROWS.items():
        record = parse_row(row, detect_format(row))
        if name in DROPPED[style]:
            with pytest.raises(UnusableRow, match=f"^{DROPPED[style][name]}"):
                encode_record(record, template, "assistant")
            continue
        example = encode_record(record, template, "assistant")

        # The text is what transformers renders, and its tokens are the tokenizer's, after at most one BOS.
        values = [message.for_template() for message in messages]
        text = tokenizer.apply_chat_template(values, chat_template=template.source, tokenize=False)
        tokens = tokenizer(text, add_special_tokens=False).input_ids
        prefix = [1] if begin == "BOS added" and style in BUILT_IN_TEMPLATES else []
        assert example.input_ids == prefix + tokens
        assert example.input_ids.count(1) == len(prefix) + text.count("<s>")
        assert example.input_ids[:2] != [1, 1]
        assert (example.input_ids[0] == 1) == (prefix == [1] or text.startswith("<s>"))

        # Supervised is what the model generates, and no token of another message.
        answers, others = find_answers(style, text, messages)
        chars = covered(family, begin, tokens, text, [match.span() for match in SPECIAL.finditer(text)])
        answer_chars = {i for start, end in answers for i in range(start, end)}
        labels = [IGNORE_INDEX] * len(prefix) + [
            token if token_chars & answer_chars and not token_chars & others else IGNORE_INDEX
            for token, token_chars in zip(tokens, chars, strict=True)
        ]
        assert example.labels == [IGNORE_INDEX, *labels[1:]]
        decoded = [tokenizer.decode(run) for run in supervised_runs(example)]
        start = 0 if prefix else max(chars[0]) + 1  # nothing predicts the first token
        # A template and an answer may share a token, so it may start before the answer does.
        token_starts = {i: min(token_chars) for token_chars in chars for i in token_chars}
        expected = [text[max(start, token_starts[a]) : b] for a, b in merge_adjacent(answers)]
        assert [run.strip() for run in decoded] == [as_decoded(family, run).strip() for run in expected]

        # The prompt at inference is the text before an answer.
        supervised = [i for i, message in enumerate(messages) if message.role == "assistant" and message.supervised]
        for i, (start, _) in zip(supervised, answers, strict=True):
            if not has_question(messages, i):
                continue
            assert template.prompt(messages[:i]) == text[:start]
            is_shared = any(min(token_chars) < start <= max(token_chars) for token_chars in chars)
            prompt = template.encode_prompt(messages[:i])
            assert is_shared or example.input_ids[: len(prompt)] == prompt

        last = encode_record(record, template, "last_assistant")
        everything = encode_record(record, template, "all")
        assert last.input_ids == everything.input_ids == example.input_ids
        assert [tokenizer.decode(run).strip() for run in supervised_runs(last)] == [
            as_decoded(family, text[token_starts[start] : end]).strip() for start, end in answers[-1:]
        ]
        assert everything.labels == [IGNORE_INDEX, *everything.input_ids[1:]]


@pytest.mark.parametrize("begin", BEGINS)
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_without_messages_do_not_depend_on_the_template(family: str, begin: str) -> None:
    prefix = [1] if begin in ("BOS added", "BOS written") else []
    for style, (prompt, completion) in itertools.product(
        STYLES, (("", "A text."), ("So </s> it", " is."), ("a:\n", "\n b "))
    ):
        template = template_of(family, style, begin)
        row = {"prompt": prompt, "completion": completion} if prompt else {"text": completion}
        example = encode_record(parse_row(row, detect_format(row)), template, "assistant")
        text = prompt + completion + "</s>"
        assert example.input_ids[: len(prefix)] == prefix
        tokens = example.input_ids[len(prefix) :]
        if "</s>" not in prompt:
            assert tokens == template.tokenizer(text, add_special_tokens=False).input_ids
        chars = covered(family, begin, tokens, text, [(len(prompt + completion), len(text))])
        labels = [
            token if min(token_chars) >= len(prompt) else IGNORE_INDEX
            for token, token_chars in zip(tokens, chars, strict=True)
        ]
        assert example.labels == [IGNORE_INDEX, *(len(prefix) * [IGNORE_INDEX] + labels)[1:]]
        assert example.labels[-1] == 2
        if any(min(token_chars) == len(prompt) for token_chars in chars):
            prompt_ids = template.encode_text(prompt)
            assert example.input_ids[: len(prompt_ids)] == prompt_ids
        tokens_row = {"input_ids": example.input_ids, "labels": example.labels}
        assert encode_record(parse_row(tokens_row, "tokens"), template, "assistant") == example._replace(notes=())


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
            before = Piece(" ", answer=i if has_question(messages, i) else None)
            pieces += [before, Piece(message.content, i, i), Piece("</s>", answer=i)]
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
            before = Piece(" ", answer=i if has_question(messages, i) else None)
            pieces += [Piece("ASSISTANT:"), before, Piece(message.content, i, i), Piece("</s>", answer=i)]
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
            answer = i if has_question(messages, i) else None
            pieces += [Piece("<think>\n", answer=answer), Piece(reasoning.strip("\n"), i, answer)]
            pieces += [Piece("\n</think>\n\n", answer=answer)]
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


def check_row(template: ChatTemplate, style: str, family: str, begin: str, row: dict[str, Any]) -> bool:
    """Check the tokens and labels of a row; return whether it was encoded."""
    pieces: list[Piece] | None = None
    try:
        record = parse_row(row, "messages")
        assert isinstance(record, Conversation)
        messages = record.messages
        pieces = EXPECTED_PIECES[style](messages)
        example = encode_record(record, template, "assistant")
    except (UnusableRow, MalformedRow, DataError) as error:
        contents = [
            "".join(part if isinstance(part, str) else part["text"] for part in m["content"]) for m in row["messages"]
        ]
        text = "".join(contents)
        only_reasoning = any(re.fullmatch(r"\s*<think>.*</think>\s*", text, re.DOTALL) for text in contents)
        documented = (
            ("changes the text around message", only_reasoning),  # the template may strip white space after it
            ("private use area B", any(letter >= "\U00100000" for letter in text)),
            ("no assistant turn", True),
            (REJECTED, pieces is None),
            (NOT_THE_PROMPT, style == "strips reasoning"),
            ("the chat template", style == "strips reasoning" and ("think>" in text or "\n" in text)),
        )
        if not any(re.search(reason, str(error)) and is_possible for reason, is_possible in documented):
            raise
        return False
    assert pieces is not None
    only_reasoning = any(re.fullmatch(r"\s*<think>.*</think>\s*", m.content, re.DOTALL) for m in messages)
    if style == "contents only" and only_reasoning:
        return False  # without an end of turn, the closing think tag of an empty answer is not supervised

    pieces = [Piece("<s>")] * (begin == "BOS written") + pieces
    text, specials, answer_chars, others, message_text = "", [], set(), set(), ""
    starts: dict[int, int] = {}
    for piece in pieces:
        start = len(text)
        text += piece.text
        if piece.message is None:
            specials += [(start + match.start(), start + match.end()) for match in SPECIAL.finditer(piece.text)]
        else:
            message_text += piece.text + "\n"
        if piece.answer is not None and messages[piece.answer].supervised:
            answer_chars |= set(range(start, len(text)))
            starts.setdefault(piece.answer, start)
        elif piece.message is not None:
            others |= set(range(start, len(text)))
    prefix = [1] if begin == "BOS added" and style in BUILT_IN_TEMPLATES else []
    tokens = example.input_ids[len(prefix) :]
    assert example.input_ids[: len(prefix)] == prefix
    if not SPECIAL.search(message_text):
        assert tokens == template.tokenizer(text, add_special_tokens=False).input_ids
    chars = covered(family, begin, tokens, text, specials)
    labels = [
        token if token_chars & answer_chars and not token_chars & others else IGNORE_INDEX
        for token, token_chars in zip(tokens, chars, strict=True)
    ]
    assert example.labels == [IGNORE_INDEX, *([IGNORE_INDEX] * len(prefix) + labels)[1:]]
    for number, start in starts.items():
        if has_question(messages, number):
            assert template.prompt(messages[:number]) == text[:start]
            is_shared = any(min(token_chars) < start <= max(token_chars) for token_chars in chars)
            prompt = template.encode_prompt(messages[:number])
            assert is_shared or example.input_ids[: len(prompt)] == prompt
            before = [span for span in specials if span[1] <= start]
            covered(family, begin, prompt[len(prefix) :], text[:start], before)
    return True


# Regressions.


def test_the_reasoning_of_an_answer_without_a_question_is_supervised() -> None:
    template = template_of("bytes", "chatml", "no BOS")
    example = encode_record(Conversation(chat(f"a: {REASONED_ANSWERS[0]}")), template, "assistant")
    assert [template.tokenizer.decode(run) for run in supervised_runs(example)] == [f"{REASONED_ANSWERS[0]}<|im_end|>"]


@pytest.mark.parametrize("style", ["alpaca", "vicuna_v1.1"])
def test_bos_is_added_before_a_text_that_starts_like_bos(style: str) -> None:
    template = template_of("bytes", style, "BOS added")
    example = encode_record(Conversation(chat("s: <s>Be brief.", *TWO_ROUNDS)), template, "assistant")
    assert example.input_ids[0] == 1
    assert example.input_ids.count(1) == 1


@pytest.mark.parametrize("key", ["text", "completion"])
def test_no_text_can_write_a_special_token(key: str) -> None:
    template = template_of("bytes", "chatml", "pad = eos")
    for number, token in itertools.product(range(len(SPECIALS)), SPECIALS):
        row = {"prompt": "So", key: chr(FIRST_ALIAS + number) * len(token)}
        try:
            example = encode_record(parse_row(row, detect_format(row)), template, "assistant")
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
    example = encode_record(Conversation(chat(*TWO_ROUNDS)), template, "assistant")
    prompt = template.encode_prompt(chat(*TWO_ROUNDS[:1]))
    assert example.input_ids[: len(prompt)] == prompt


def test_a_special_token_that_starts_with_another_is_distinguished_from_it() -> None:
    backend = Tokenizer.from_str(trained_json("bytes"))
    backend.add_special_tokens(["</s></s>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    tokenizer.chat_template = OPEN + "{{ m.content }}</s></s>" + CLOSE
    example = encode_record(Conversation(chat("u: a</s></s>", "a: b")), ChatTemplate(tokenizer), "assistant")
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
    example = encode_record(parse_row({"text": "<s>ab </s>"}, "text"), ChatTemplate(tokenizer), "assistant")
    assert example.input_ids.count(tokenizer.bos_token_id) == 0
    assert example.input_ids.count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(example.input_ids).replace(" ", "") == "<s>ab</s></s>"


@pytest.mark.parametrize(
    ("turns", "supervised"),
    [
        (TWO_ROUNDS, ["First answer.", "Second answer.<|im_end|>"]),
        (("u: q", "a: First answer.", "u: ", "a: Second answer."), ["First answer.", "Second answer.<|im_end|>"]),
        (("u: q", "a: ", "u: q", "a: Second answer."), ["Second answer.<|im_end|>"]),
    ],
)
def test_the_end_of_another_turn_is_not_supervised(turns: tuple[str, ...], supervised: list[str]) -> None:
    tokenizer = copy.copy(tokenizer_of("bytes", "pad = eos"))
    turn = TURN.replace("<|im_end|>", "{% if m.role == 'user' or loop.last %}<|im_end|>{% endif %}")
    tokenizer.chat_template = OPEN + turn + CLOSE + GENERATION_PROMPT
    example = encode_record(Conversation(chat(*turns)), ChatTemplate(tokenizer), "assistant")
    assert [tokenizer.decode(run) for run in supervised_runs(example)] == supervised
