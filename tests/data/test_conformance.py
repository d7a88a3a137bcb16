"""Every row format by every chat template by every kind of tokenizer: what is learned is the answers, to the letter.

Texts are rendered anew by transformers, and places of tokens are found here, by the bytes that tokens stand for:
nothing of the code under test is used to judge it.
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
from lora_accel.data.tokens import FIRST_NAME
from lora_accel.errors import DataError
from lora_accel.labels import IGNORE_INDEX

# Tokenizers.

SPECIALS = [
    *("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
]
SPECIAL = re.compile("|".join(map(re.escape, SPECIALS)))
THINKS = ("<think>", "</think>")
"""Added tokens that are not special, as Qwen3 has them."""
LINES = [
    "user assistant system hello world the answer is one two three: the question, and its answer.",
    "[INST] [/INST] USER: ASSISTANT: ### Instruction: ### Response: <think> </think> 日本 é 😀 (x|y) #",
    "ABCDEFGHIJKLMNOPQRSTUVWXYZ abcdefghijklmnopqrstuvwxyz 0123456789 .,;:!?()[]{}<>|/\\_-+*='\"`~@#$%^&",
] * 5
NEWLINES = ["so:\n\n", "so.\n\n\n", "\n\n", "\n###\n\n"] * 9
"""For tokens that a template and an answer may share. Not for GPT-2's words, whose last newline stands alone."""
LLAMA_3_WORDS = (  # its newlines stay together, as Qwen's do
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level(*, trims: bool = False, qwen: bool = False) -> Tokenizer:
    """GPT-2's way (offsets may leave leading spaces out), or Qwen's: NFC, other words, tokens for thoughts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if qwen:
        tokenizer.normalizer = normalizers.NFC()
        words = pre_tokenizers.Split(Regex(LLAMA_3_WORDS), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trims)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIALS, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(LINES + NEWLINES * qwen, trainer)
    if qwen:
        tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in THINKS])
    return tokenizer


def sentencepiece(scheme: str) -> Tokenizer:
    """BPE with bytes to fall back on; a space begins the text, each section, or (Llama 2) each by a normalizer."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIALS, limit_alphabet=60)
    tokenizer.train_from_iterator(LINES + NEWLINES, trainer)
    described = json.loads(tokenizer.to_str())
    vocabulary = described["model"]["vocab"]
    vocabulary |= {f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)}
    if scheme == "llama-2":
        described["pre_tokenizer"] = None
    tokenizer = Tokenizer.from_str(json.dumps(described))
    if scheme == "llama-2":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False)
    pieces = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(pieces)
    return tokenizer


def unigram() -> Tokenizer:
    """T5's and XLM-R's way: unknown characters are one token."""
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
"""A begin token that nobody writes; none; one that the tokenizer adds; one that both it and the template would."""


@functools.cache
def tokenizer_of(family: str, begin: str) -> PreTrainedTokenizerFast:
    """A tokenizer of a family; `begin` is one of `BEGINS`."""
    backend = Tokenizer.from_str(described(family))
    if begin in ("BOS added", "BOS written"):
        adds = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)])
        own = backend.post_processor
        backend.post_processor = processors.Sequence([own, adds]) if own else adds
    bos = {} if begin == "no BOS" else {"bos_token": "<s>"}
    pad = "<unk>" if begin == "no BOS" else "</s>"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", unk_token="<unk>", pad_token=pad, **bos
    )
    assert tokenizer("a").input_ids.count(1) == (begin in ("BOS added", "BOS written"))
    return tokenizer


@functools.cache
def described(family: str) -> str:
    """A trained tokenizer of a family, as JSON."""
    return FAMILIES[family]().to_str()


# Which characters a token covers, by its bytes.


class Unit(NamedTuple):
    """What is left of a text where tokens are made: a byte, a whole token, or a character that no token knows."""

    told: int | str
    chars: frozenset[int]


def covered(family: str, begin: str, ids: Sequence[int], text: str, names: Iterable[tuple[int, int]]) -> list[set[int]]:
    """Return the characters that each token covers.

    Args:
        ids: the tokens of the text, without any that was put before it.
        names: where special tokens stand. No other token may be special.
    """
    tokenizer = tokenizer_of(family, begin)
    units = _units(family, text, names)
    places, place = [], 0
    for token in ids:
        piece = tokenizer.convert_ids_to_tokens(token)
        if token == 0 and units[place].told == "unknown":
            count = sum(1 for _ in itertools.takewhile(lambda unit: unit.told == "unknown", units[place:]))
            told: list[int | str] = ["unknown"] * count
        elif piece in (*SPECIALS, *THINKS):
            told = [piece]
        else:
            told = [*_bytes(family, piece)]
        found = units[place : place + len(told)]
        assert [unit.told for unit in found] == told, f"{piece!r} stands at {''.join(text)[:40]!r}…, unit {place}"
        places.append(set().union(*(unit.chars for unit in found)))
        place += len(told)
    assert place == len(units), "the text is not at its end"
    return places


def _bytes(family: str, piece: str) -> bytes:
    if family.startswith("bytes"):
        return bytes(letters_of_bytes()[letter] for letter in piece)
    single = re.fullmatch("<0x([0-9A-F]{2})>", piece)
    return bytes.fromhex(single[1]) if single else piece.encode()


@functools.cache
def letters_of_bytes() -> dict[str, int]:
    """What byte each letter of a byte-level token stands for (GPT-2's table)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


def _units(family: str, text: str, names: Iterable[tuple[int, int]]) -> list[Unit]:
    whole = sorted(names)
    if family == "bytes, NFC":
        edges = [0, *itertools.chain(*whole), len(text)]
        for start, end in zip(edges[::2], edges[1::2], strict=True):
            whole += [found.span() for found in re.compile("</?think>").finditer(text, start, end)]
    units, place = [], 0
    for start, end in [*sorted(whole), (len(text), len(text))]:
        units += _section(family, text[place:start], place)
        if start < end:
            units.append(Unit(text[start:end], frozenset(range(start, end))))
        place = end
    return units


def _section(family: str, text: str, offset: int) -> list[Unit]:
    """Return the units of a text between whole tokens. A space put before it belongs to the first character."""
    units: list[Unit] = []
    if family == "bytes, NFC":
        for start, piece in _composed(text):
            composed = unicodedata.normalize("NFC", piece)
            together = frozenset(range(offset + start, offset + start + len(piece)))
            for i, letter in enumerate(composed, start=offset + start):
                chars = frozenset([i]) if composed == piece else together
                units += [Unit(byte, chars) for byte in letter.encode()]
        return units
    if not family.startswith("bytes"):
        text = text.replace(" ", "▁")
        prepends = {"first": offset == 0 and text[:1] != "▁", "llama-2": True}
        if text and prepends.get(family.removeprefix("sentencepiece, "), text[:1] != "▁"):
            units += [Unit(byte, frozenset([offset])) for byte in "▁".encode()]
    for i, letter in enumerate(text, start=offset):
        known = family != "unigram" or letter in _letters_of_unigram()
        told: Iterable[int | str] = letter.encode() if known else ["unknown"]
        units += [Unit(one, frozenset([i])) for one in told]
    return units


def as_decoded(family: str, text: str) -> str:
    """Return what is left of a text in its tokens."""
    if family == "unigram":
        return re.sub("␀+", "<unk>", "".join(a if a == " " or a in _letters_of_unigram() else "␀" for a in text))
    if family == "sentencepiece, llama-2":  # a space begins what follows a whole token
        text = re.sub(f"({SPECIAL.pattern})(?=.)", r"\1 ", text)
    return unicodedata.normalize("NFC", text) if family == "bytes, NFC" else text


@functools.cache
def _letters_of_unigram() -> set[str]:
    return {letter for piece, _ in json.loads(described("unigram"))["model"]["vocab"] for letter in piece}


def _composed(text: str) -> list[tuple[int, str]]:
    """Return the pieces of a text that are composed (NFC) on their own, and where they begin."""
    pieces: list[tuple[int, str]] = []
    for i, letter in enumerate(text):
        start, before = pieces[-1] if pieces else (0, "")
        joint = unicodedata.normalize("NFC", before + letter)
        if pieces and (unicodedata.combining(letter) or joint != unicodedata.normalize("NFC", before) + letter):
            pieces[-1] = (start, before + letter)
        else:
            pieces.append((i, letter))
    return pieces


# Templates.

TURN = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
ASKS = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
OPEN, CLOSE = "{% for m in messages %}", "{% endfor %}"

MISTRAL = """
{%- set system = messages[0].content if messages[0].role == 'system' else '' -%}
{%- for m in (messages[1:] if system else messages) -%}
    {%- if m.role == 'user' -%}
        {{ '[INST] ' + (system + '\n\n' if system and loop.first else '') + m.content + '[/INST]' }}
    {%- elif m.role == 'assistant' -%}
        {{ ' ' + m.content + eos_token }}
    {%- else -%}
        {{ raise_exception('no place for a ' + m.role + ' message here') }}
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
""" + ASKS  # fmt: skip

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
""" + ASKS  # fmt: skip


class Style(NamedTuple):
    """A chat template, and what stands around an answer in it."""

    source: str
    header: str = "<|im_start|>assistant\n"
    """How the prompt of an answer ends."""
    before: str = ""
    """What the model has to write before an answer."""
    end: str = "<|im_end|>"
    """How an answer ends."""
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
    # In the manner of well-known models.
    "strips": Style(OPEN + TURN.replace("m.content", "m.content | trim") + CLOSE + ASKS, strips=True),
    "system in the question": Style(MISTRAL, "[/INST]", before=" ", end="</s>"),
    "no system": Style(OPEN + "{% if m.role != 'system' %}" + TURN + "{% endif %}" + CLOSE + ASKS),
    "strips thoughts": Style(QWEN_3),
    "asks for thoughts": Style(
        OPEN + TURN + CLOSE + ASKS.replace("{% endif %}", "<think>\n{% endif %}"),
        "<|im_start|>assistant\n<think>\n",
    ),
    "raises": Style(RAISES),
    "tail": Style(
        OPEN + TURN + CLOSE + "{% if not add_generation_prompt %}<|im_start|>over<|im_end|>{% endif %}" + ASKS
    ),
    "words only": Style(
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
        + ASKS
    ),
    "words alone": Style(OPEN + "{{ m.content }}" + CLOSE, header="", end=""),
    "asks nothing": Style(OPEN + TURN + CLOSE),
    "begins": Style("{{ bos_token }}" + OPEN + TURN + CLOSE + ASKS),
}


@functools.cache
def template_of(family: str, style: str, begin: str) -> ChatTemplate:
    """A template on a tokenizer of its own."""
    source = STYLES[style].source
    if begin == "BOS written" and "{{ bos_token }}" not in source:
        source = "{{ bos_token }}" + source
    elif style in BUILT_IN_TEMPLATES:
        return ChatTemplate(tokenizer_of(family, begin), style)
    tokenizer = copy.copy(tokenizer_of(family, begin))
    tokenizer.chat_template = source
    return ChatTemplate(tokenizer)


# Rows.


def said(*turns: str, roles: str = "") -> tuple[Message, ...]:
    """Turns by their first letters: `said("s: Be.", "u: q", "a: an answer", "x: an answer that is not learned")`."""
    roles_of = {"s": "system", "u": "user", "a": "assistant", "x": "assistant", "t": "tool"}
    return tuple(Message(roles_of[turn[0]], turn[3:], learned=turn[0] != "x") for turn in turns)


def openai(*turns: str, **more: Any) -> dict[str, Any]:
    """The row of turns in OpenAI's format."""
    return {"messages": [{"role": m.role, "content": m.content} for m in said(*turns)], **more}


TWO_ROUNDS = ("u: First question?", "a: First answer.", "u: Second one?", "a: Second answer.")
THOUGHTS = (
    "<think>\nA first thought.\n</think>\n\nFirst answer.",
    "<think>\nOne more thought.\n</think>\n\nSecond answer.",
)
SPACES = ("u:  First question? \n", "a: \n  First answer. ", "u: \tSecond one?", "a: Second\n\n answer.\n")
ROWS: dict[str, tuple[dict[str, Any], tuple[Message, ...]]] = {
    "sharegpt": (
        {"conversations": [{"from": role, "value": f"{role} says."} for role in ("human", "gpt", "user", "chatgpt")]},
        said("u: human says.", "a: gpt says.", "u: user says.", "a: chatgpt says."),
    ),
    "sharegpt, synonyms": (
        {
            "system": "Be brief.",
            "conversations": [
                {"role": role, "content": f"{role} says."} for role in ("Prompter", "BOT", "human", "assistant")
            ],
        },
        said("s: Be brief.", "u: Prompter says.", "a: BOT says.", "u: human says.", "a: assistant says."),
    ),
    "sharegpt, untidy": (
        {
            "conversations": [
                {"from": role, "value": f"{role} {i}."} for i, role in enumerate(["gpt", "human", "user", "bard", "ai"])
            ]
        },
        said("u: human 1.\n\nuser 2.", "a: bard 3.\n\nai 4."),
    ),
    "messages": (openai("s: Be brief.", *TWO_ROUNDS), said("s: Be brief.", *TWO_ROUNDS)),
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
        said(*TWO_ROUNDS),
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
        said(
            *("u: First question?", "x: First answer.", "u: Second one?", "a: Second answer."),
            *("u: Third one?", "x: Third answer.", "u: Fourth one?", "a: Fourth answer."),
        ),
    ),
    "messages, spaces": (openai(*SPACES), said(*SPACES)),
    "messages, nothing asked": (openai("a: A greeting.", *TWO_ROUNDS), said("a: A greeting.", *TWO_ROUNDS)),
    "messages, two answers": (openai(*TWO_ROUNDS, "a: One more."), said(*TWO_ROUNDS, "a: One more.")),
    "messages, an empty answer": (openai("u: Hm?", "a: ", *TWO_ROUNDS), said("u: Hm?", "a: ", *TWO_ROUNDS)),
    "messages, a tool": (
        openai(*TWO_ROUNDS[:2], "t: A result.", "a: So it is."),
        said(*TWO_ROUNDS[:2], "t: A result.", "a: So it is."),
    ),
    "messages, late system": (
        openai(*TWO_ROUNDS[:2], "s: Be kind.", *TWO_ROUNDS[2:]),
        said(*TWO_ROUNDS[:2], "s: Be kind.", *TWO_ROUNDS[2:]),
    ),
    "messages, thoughts": (
        openai("u: First question?", f"a: {THOUGHTS[0]}", "u: Second one?", f"a: {THOUGHTS[1]}"),
        said("u: First question?", f"a: {THOUGHTS[0]}", "u: Second one?", f"a: {THOUGHTS[1]}"),
    ),
    "messages, thoughts apart": (
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
            for i, message in enumerate(said(*TWO_ROUNDS))
        ),
    ),
    "messages, letters": (
        openai("u: 日本 is é 😀?", "a: É e\u0301 👩‍👩‍👧 is 日本.", "u: «x»\u00a0y\u200b", "a: ☃\u2028 z"),
        said("u: 日本 is é 😀?", "a: É e\u0301 👩‍👩‍👧 is 日本.", "u: «x»\u00a0y\u200b", "a: ☃\u2028 z"),
    ),
    "alpaca": (
        {"instruction": "First question?", "output": "First answer."},
        said("u: First question?", "a: First answer."),
    ),
    "alpaca, input": (
        {"instruction": "First question?", "input": "With this.", "output": "First answer."},
        said("u: First question?\n\n### Input:\nWith this.", "a: First answer."),
    ),
    "alpaca, system and history": (
        {
            "instruction": "Second one?",
            "input": "",
            "output": "Second answer.",
            "system": "Be brief.",
            "history": [["First question?", "First answer."]],
        },
        said("s: Be brief.", *TWO_ROUNDS),
    ),
    "prompt_completion": (
        {
            "prompt": openai(*TWO_ROUNDS[:3])["messages"],
            "completion": [{"role": "assistant", "content": "Second answer."}],
        },
        said(TWO_ROUNDS[0], "x: First answer.", *TWO_ROUNDS[2:]),
    ),
}

WITH_SYSTEM = ("sharegpt, synonyms", "messages", "alpaca, system and history")
TWO_ANSWERS, NOTHING_ASKED = "messages, two answers", "messages, nothing asked"
OTHER_ROLES = ("messages, a tool", "messages, late system")
NO_PLACE = "the chat template refuses it: .*no place for a (tool|system|assistant) message here"
NOT_THE_PROMPT = "the text before message . is not the prompt that the chat template makes for it"
ALTERNATE = "the chat template refuses it: Conversation roles must alternate"
NO_THOUGHTS = {"messages, thoughts apart": "the chat template leaves the reasoning of message 4 out"}
REFUSED: dict[str, dict[str, str]] = {
    **dict.fromkeys(STYLES, NO_THOUGHTS),
    "alpaca": NO_THOUGHTS | {TWO_ANSWERS: NOT_THE_PROMPT} | dict.fromkeys(OTHER_ROLES, NO_PLACE),
    "gemma": NO_THOUGHTS | dict.fromkeys((*WITH_SYSTEM, NOTHING_ASKED, TWO_ANSWERS, *OTHER_ROLES), NO_PLACE),
    "llama-2": NO_THOUGHTS | dict.fromkeys((NOTHING_ASKED, TWO_ANSWERS, *OTHER_ROLES), NO_PLACE),
    "vicuna_v1.1": NO_THOUGHTS | dict.fromkeys(OTHER_ROLES, NO_PLACE),
    "zephyr": NO_THOUGHTS | {"messages, a tool": NO_PLACE},
    "system in the question": NO_THOUGHTS | dict.fromkeys(OTHER_ROLES, NO_PLACE),
    "strips thoughts": {TWO_ANSWERS: NOT_THE_PROMPT},
    # Only an answer that begins with a thought follows its prompt.
    "asks for thoughts": dict.fromkeys(ROWS.keys() - {"messages, thoughts"}, NOT_THE_PROMPT) | NO_THOUGHTS,
    "raises": NO_THOUGHTS
    | dict.fromkeys(WITH_SYSTEM, "the chat template refuses it: System role not supported")
    | dict.fromkeys((NOTHING_ASKED, TWO_ANSWERS, *OTHER_ROLES), ALTERNATE),
}
"""The rows that a template has no place for, and the reason given; all others are encoded."""


def answer_by(style: str, messages: Sequence[Message], number: int) -> str:
    """Return what the model has to write as this message: an answer, by this template, with its end."""
    message, chosen = messages[number], STYLES[style]
    asked = any(earlier.role in ("user", "tool") for earlier in messages[:number])
    words = message.content.strip() if chosen.strips else message.content
    if style == "strips thoughts":
        thought, words = message.reasoning, message.content
        if "</think>" in words:
            thought, words = words.removeprefix("<think>\n").split("\n</think>\n\n")
        if number == len(messages) - 1:
            words = f"<think>\n{thought}\n</think>\n\n" + words.lstrip("\n")
    if style == "asks for thoughts":
        words = words.removeprefix("<think>\n")  # stands in the prompt
    return chosen.before * asked + words + chosen.end


def places_of(style: str, text: str, messages: Sequence[Message]) -> tuple[list[tuple[int, int]], set[int]]:
    """Return where the answers that are learned stand, and the characters of all other messages."""
    answers, others, place = [], set(), 0
    for i, message in enumerate(messages):
        if message.role == "assistant" and message.learned:
            asked = any(earlier.role in ("user", "tool") for earlier in messages[:i])
            if style == "system in the question" and messages[i - 1].role == "assistant":
                asked = False  # nothing stands between the two
            header, answer = STYLES[style].header * asked, answer_by(style, messages, i)
            start = text.index(header + answer, place) + len(header)
            place = start + len(answer)
            answers.append((start, place))
        else:
            words = message.content if message.content in text else message.content.strip()
            start = text.find(words)  # no two are alike, and none is empty; a system text may be left out
            others |= set(range(start, start + len(words))) if start >= 0 else set()
    return answers, others


def joined(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return spans, those as one that have nothing between them."""
    whole: list[tuple[int, int]] = []
    for start, end in spans:
        whole = [*whole[:-1], (whole[-1][0], end)] if whole and whole[-1][1] == start else [*whole, (start, end)]
    return whole


def runs_of(example: Example) -> list[list[int]]:
    """Return the runs of supervised tokens."""
    numbers = range(len(example.labels))
    runs = itertools.groupby(numbers, lambda i: example.labels[i] != IGNORE_INDEX)
    return [[example.input_ids[i] for i in run] for supervised, run in runs if supervised]


def test_every_format_is_read_as_it_says() -> None:
    for row, messages in ROWS.values():
        record = parse_row(row, detect_format(row))
        assert isinstance(record, Conversation)
        assert record.messages == messages
    assert {detect_format(row) for row, _ in ROWS.values()} == set(FORMATS) - {"text", "tokens"}


@pytest.mark.parametrize("begin", BEGINS)
@pytest.mark.parametrize("style", [style for style in STYLES if style != "words alone"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_answers_and_their_ends_are_learned_whole_in_order_and_nothing_else(
    family: str, style: str, begin: str
) -> None:
    template = template_of(family, style, begin)
    tokenizer = template.tokenizer
    for name, (row, messages) in ROWS.items():
        record = parse_row(row, detect_format(row))
        if name in REFUSED[style]:
            with pytest.raises(UnusableRow, match=f"^{REFUSED[style][name]}"):
                encode_record(record, template, "assistant")
            continue
        example = encode_record(record, template, "assistant")

        # The text is the template's, and its tokens are the ordinary ones, after one begin token at most.
        told = [message.for_template() for message in messages]
        text = tokenizer.apply_chat_template(told, chat_template=template.source, tokenize=False)
        tokens = tokenizer(text, add_special_tokens=False).input_ids
        prefix = [1] if begin == "BOS added" and style in BUILT_IN_TEMPLATES else []
        assert example.input_ids == prefix + tokens
        assert example.input_ids.count(1) == len(prefix) + text.count("<s>")
        assert example.input_ids[:2] != [1, 1]
        assert (example.input_ids[0] == 1) == (prefix == [1] or text.startswith("<s>"))

        # What is learned is what the model has to write, and no token of another's words.
        answers, others = places_of(style, text, messages)
        named = [found.span() for found in SPECIAL.finditer(text)]
        places = covered(family, begin, tokens, text, named)
        wanted = {i for start, end in answers for i in range(start, end)}
        wanted_tokens = [bool(place & wanted) and not place & others for place in places]
        labels = [IGNORE_INDEX] * len(prefix) + [
            token if learned else IGNORE_INDEX for token, learned in zip(tokens, wanted_tokens, strict=True)
        ]
        assert example.labels == [IGNORE_INDEX, *labels[1:]]
        decoded = [tokenizer.decode(run) for run in runs_of(example)]
        start = 0 if prefix else max(places[0]) + 1  # nothing predicts the first token
        begins = {i: min(place) for place in places for i in place}  # of a token that a template and an answer share
        words = [text[max(start, begins[a]) : b] for a, b in joined(answers)]
        assert [run.strip() for run in decoded] == [as_decoded(family, run).strip() for run in words]

        # What is fed at inference is what stands before an answer.
        learned = [i for i, message in enumerate(messages) if message.role == "assistant" and message.learned]
        for i, (start, _) in zip(learned, answers, strict=True):
            if not any(message.role in ("user", "tool") for message in messages[:i]):
                continue
            assert template.prompt(messages[:i]) == text[:start]
            straddled = any(min(place) < start <= max(place) for place in places)
            prompt = template.encode_prompt(messages[:i])
            assert straddled or example.input_ids[: len(prompt)] == prompt

        last = encode_record(record, template, "last_assistant")
        whole = encode_record(record, template, "all")
        assert last.input_ids == whole.input_ids == example.input_ids
        assert [tokenizer.decode(run).strip() for run in runs_of(last)] == [
            as_decoded(family, text[begins[start] : end]).strip() for start, end in answers[-1:]
        ]
        assert whole.labels == [IGNORE_INDEX, *whole.input_ids[1:]]


@pytest.mark.parametrize("begin", BEGINS)
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_without_turns_are_the_same_by_every_template(family: str, begin: str) -> None:
    prefix = [1] if begin in ("BOS added", "BOS written") else []
    for style, (prompt, words) in itertools.product(
        STYLES, (("", "A text."), ("So </s> it", " is."), ("a:\n", "\n b "))
    ):
        template = template_of(family, style, begin)
        row = {"prompt": prompt, "completion": words} if prompt else {"text": words}
        example = encode_record(parse_row(row, detect_format(row)), template, "assistant")
        text = prompt + words + "</s>"
        assert example.input_ids[: len(prefix)] == prefix
        tokens = example.input_ids[len(prefix) :]
        if "</s>" not in prompt:
            assert tokens == template.tokenizer(text, add_special_tokens=False).input_ids
        places = covered(family, begin, tokens, text, [(len(prompt + words), len(text))])
        labels = [
            token if min(place) >= len(prompt) else IGNORE_INDEX for token, place in zip(tokens, places, strict=True)
        ]
        assert example.labels == [IGNORE_INDEX, *(len(prefix) * [IGNORE_INDEX] + labels)[1:]]
        assert example.labels[-1] == 2
        if any(min(place) == len(prompt) for place in places):
            asked = template.encode_text(prompt)
            assert example.input_ids[: len(asked)] == asked
        tokenised = {"input_ids": example.input_ids, "labels": example.labels}
        assert encode_record(parse_row(tokenised, "tokens"), template, "assistant") == example._replace(notes=())


# Any conversation at all.


class Piece(NamedTuple):
    """Characters that a template writes one after the other."""

    text: str
    owner: int | None = None
    """The message whose words these are."""
    answer: int | None = None
    """The message as which the model has to write it."""


def asked_before(messages: Sequence[Message], number: int) -> bool:
    return any(message.role in ("user", "tool") for message in messages[:number])


def chatml_by_hand(messages: Sequence[Message], *, strips: bool = False, end: str = "<|im_end|>") -> list[Piece]:
    pieces = []
    for i, message in enumerate(messages):
        answer = i if message.role == "assistant" else None
        words = message.content.strip() if strips else message.content
        pieces += [Piece("<|im_start|>"), Piece(f"{message.role}\n"), Piece(words, i, answer)]
        pieces += [Piece("<|im_end|>", answer=answer), Piece("\n")]
    return pieces


def words_by_hand(messages: Sequence[Message]) -> list[Piece]:
    pieces = []
    for i, message in enumerate(messages):
        answer = i if message.role == "assistant" else None
        pieces += [Piece(f"## {message.role}:\n"), Piece(message.content, i, answer)]
        pieces += [Piece("\n###", answer=answer), Piece("\n\n")]
    return [*pieces, Piece("The end.")]


def contents_by_hand(messages: Sequence[Message]) -> list[Piece]:
    return [Piece(m.content, i, i if m.role == "assistant" else None) for i, m in enumerate(messages)]


def llama_2_by_hand(messages: Sequence[Message]) -> list[Piece] | None:
    first = int(messages[0].role == "system")
    if any(message.role != ("user", "assistant")[i % 2] for i, message in enumerate(messages[first:])):
        return None
    pieces = []
    for i, message in enumerate(messages[first:], start=first):
        words = message.content.strip()
        if message.role == "user":
            pieces += [Piece("<s>")] * (i > first) + [Piece("[INST] ")]
            if first and i == 1:
                pieces += [Piece("<<SYS>>\n"), Piece(messages[0].content, 0), Piece("\n<</SYS>>\n\n")]
            pieces += [Piece(words, i), Piece(" [/INST]")]
        else:
            pieces += [Piece(" ", answer=i), Piece(words, i, i), Piece(" ", answer=i), Piece("</s>", answer=i)]
    return pieces


def mistral_by_hand(messages: Sequence[Message]) -> list[Piece] | None:
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
            before = Piece(" ", answer=i if asked_before(messages, i) else None)
            pieces += [before, Piece(message.content, i, i), Piece("</s>", answer=i)]
        else:
            return None
    return pieces


def vicuna_by_hand(messages: Sequence[Message]) -> list[Piece] | None:
    begins = template_source("vicuna_v1.1").split('{{ "')[1].split('" }}')[0]
    pieces = [] if messages[0].role == "system" else [Piece(begins)]
    for i, message in enumerate(messages):
        if message.role == "user":
            pieces += [Piece("USER: "), Piece(message.content, i), Piece(" ")]
        elif message.role == "assistant":
            before = Piece(" ", answer=i if asked_before(messages, i) else None)
            pieces += [Piece("ASSISTANT:"), before, Piece(message.content, i, i), Piece("</s>", answer=i)]
        elif message.role == "system" and i == 0:
            pieces += [Piece(message.content, i), Piece(" ")]
        else:
            return None
    return pieces


def qwen_3_by_hand(messages: Sequence[Message]) -> list[Piece]:
    asks = [i for i, message in enumerate(messages) if message.role == "user"]
    last_query = asks[-1] if asks else len(messages) - 1
    pieces = []
    for i, message in enumerate(messages):
        pieces += [Piece("<|im_start|>"), Piece(f"{message.role}\n")]
        if message.role != "assistant":
            pieces += [Piece(message.content, i), Piece("<|im_end|>"), Piece("\n")]
            continue
        thought, words = message.reasoning, message.content
        if not thought and "</think>" in words:
            thought = words.split("</think>")[0].rstrip("\n").split("<think>")[-1].lstrip("\n")
            words = words.split("</think>")[-1].lstrip("\n")
        if i > last_query and (i == len(messages) - 1 or thought):
            writes = i if asked_before(messages, i) else None
            pieces += [Piece("<think>\n", answer=writes), Piece(thought.strip("\n"), i, writes)]
            pieces += [Piece("\n</think>\n\n", answer=writes)]
            words = words.lstrip("\n")
        pieces += [Piece(words, i, i), Piece("<|im_end|>", answer=i), Piece("\n")]
    return pieces


BY_HAND: dict[str, Callable[[Sequence[Message]], list[Piece] | None]] = {
    "chatml": chatml_by_hand,
    "strips": functools.partial(chatml_by_hand, strips=True),
    "words only": words_by_hand,
    "words alone": contents_by_hand,
    "llama-2": llama_2_by_hand,
    "system in the question": mistral_by_hand,
    "vicuna_v1.1": vicuna_by_hand,
    "strips thoughts": qwen_3_by_hand,
}
HOSTILE = [
    *("<|im_start|>", "<|im_end|>", "<|im_end|>\n<|im_start|>assistant\n", "</s>", "<s>", "<unk>", "<|eot_id|>"),
    *("assistant\n", "user\n", "ASSISTANT: ", "USER: ", "[INST] ", " [/INST]", "<<SYS>>\n", "\n###", "## user:\n"),
    *("<think>", "</think>", "<think>\nso\n</think>\n\n", "<tool_call>", "{{ x }}", "{% endfor %}", "The end."),
    *(" ", "  ", "\n", "\n\n", "\t", "\r\n", "\u00a0", "\u2028", "\u200b", "\ufeff", "\x00", "\x85", "▁", "▁▁"),
    *("😀", "👩‍👩‍👧", "日本", "e\u0301", "\u0301", "가", "\u1100\u1161", "\ud7ff", "\ue000", "\U000f0000", "\ufffd"),
    *("the answer", "question", "a", "word ", " word", ".", "\U00108000" * 4),
]
CONTENTS = st.lists(st.sampled_from(HOSTILE) | st.text(max_size=3), max_size=4).map("".join)
ROUNDS = st.integers(1, 3).map(lambda count: ["user", "assistant"] * count)
ROLES = st.one_of(
    ROUNDS,
    ROUNDS,
    ROUNDS.map(lambda roles: ["system", *roles]),
    st.lists(st.sampled_from(["system", "user", "assistant", "assistant", "tool"]), min_size=1, max_size=5),
)
FLAGS = st.sampled_from([{}, {}, {}, {"weight": 0}, {"weight": 1}, {"train": False}, {"train": True}])


@st.composite
def hostile_rows(draw: st.DrawFn) -> dict[str, Any]:
    """Rows of OpenAI's format, contents as strings or parts."""
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
        ("words only", "unigram", "pad = eos"),
        ("words only", "bytes, NFC", "BOS added"),
        ("words alone", "bytes", "pad = eos"),
        ("words alone", "sentencepiece, first", "BOS written"),
        ("llama-2", "sentencepiece, first", "BOS added"),
        ("system in the question", "bytes, NFC", "no BOS"),
        ("vicuna_v1.1", "sentencepiece, always", "BOS added"),
        ("vicuna_v1.1", "bytes", "no BOS"),
        ("strips thoughts", "sentencepiece, llama-2", "BOS written"),
        ("strips thoughts", "bytes, NFC", "pad = eos"),
    ],
)
def test_no_conversation_can_move_a_mask_or_write_a_special_token(style: str, family: str, begin: str) -> None:
    template = template_of(family, style, begin)
    outcomes: list[bool] = []

    @given(row=hostile_rows())
    @settings(derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    def check(row: dict[str, Any]) -> None:
        outcomes.append(stands(template, style, family, begin, row))

    check()
    assert sum(outcomes) > len(outcomes) / 4, "most are refused, so little is shown"


def stands(template: ChatTemplate, style: str, family: str, begin: str, row: dict[str, Any]) -> bool:
    """Check one row; return whether it was encoded."""
    pieces: list[Piece] | None = None
    try:
        record = parse_row(row, "messages")
        assert isinstance(record, Conversation)
        messages = record.messages
        pieces = BY_HAND[style](messages)
        example = encode_record(record, template, "assistant")
    except (UnusableRow, MalformedRow, DataError) as error:
        contents = [
            "".join(part if isinstance(part, str) else part["text"] for part in m["content"]) for m in row["messages"]
        ]
        text = "".join(contents)
        only_a_thought = any(re.fullmatch(r"\s*<think>.*</think>\s*", text, re.DOTALL) for text in contents)
        documented = (
            ("changes the text around message", only_a_thought),  # what a template strips after it cannot be placed
            ("private use area B", any(letter >= "\U00100000" for letter in text)),
            ("no assistant turn", True),
            ("the chat template refuses it: ", pieces is None),
            (NOT_THE_PROMPT, style == "strips thoughts"),
            ("the chat template", style == "strips thoughts" and ("think>" in text or "\n" in text)),
        )
        if not any(re.search(reason, str(error)) and may for reason, may in documented):
            raise
        return False
    assert pieces is not None
    only_thoughts = [re.fullmatch(r"\s*<think>.*</think>\s*", m.content, re.DOTALL) for m in messages]
    if style == "words alone" and any(only_thoughts):
        return False  # where nothing ends an answer, what closes a thought without words after it is not learned

    bos = begin == "BOS written"
    pieces = [Piece("<s>")] * bos + pieces
    text, named, wanted, others, words = "", [], set(), set(), ""
    starts: dict[int, int] = {}
    for piece in pieces:
        place = range(len(text), len(text) + len(piece.text))
        text += piece.text
        if piece.owner is None:
            named += [(place.start + a, place.start + b) for a, b in (m.span() for m in SPECIAL.finditer(piece.text))]
        else:
            words += piece.text + "\n"
        if piece.answer is not None and messages[piece.answer].learned:
            wanted |= set(place)
            starts.setdefault(piece.answer, place.start)
        elif piece.owner is not None:
            others |= set(place)
    prefix = [1] if begin == "BOS added" and style in BUILT_IN_TEMPLATES else []
    tokens = example.input_ids[len(prefix) :]
    assert example.input_ids[: len(prefix)] == prefix
    if not SPECIAL.search(words):
        assert tokens == template.tokenizer(text, add_special_tokens=False).input_ids
    places = covered(family, begin, tokens, text, named)
    labels = [
        token if place & wanted and not place & others else IGNORE_INDEX
        for token, place in zip(tokens, places, strict=True)
    ]
    assert example.labels == [IGNORE_INDEX, *([IGNORE_INDEX] * len(prefix) + labels)[1:]]
    for number, start in starts.items():
        if asked_before(messages, number):
            assert template.prompt(messages[:number]) == text[:start]
            straddled = any(min(place) < start <= max(place) for place in places)
            prompt = template.encode_prompt(messages[:number])
            assert straddled or example.input_ids[: len(prompt)] == prompt
            covered(family, begin, prompt[len(prefix) :], text[:start], [name for name in named if name[1] <= start])
    return True


# What these tests have found wrong.


def test_a_thought_of_an_answer_that_nothing_asks_for_is_learned() -> None:
    template = template_of("bytes", "chatml", "no BOS")
    example = encode_record(Conversation(said(f"a: {THOUGHTS[0]}")), template, "assistant")
    assert [template.tokenizer.decode(run) for run in runs_of(example)] == [f"{THOUGHTS[0]}<|im_end|>"]


@pytest.mark.parametrize("style", ["alpaca", "vicuna_v1.1"])
def test_a_begin_token_is_not_left_out_for_a_text_that_looks_like_it(style: str) -> None:
    template = template_of("bytes", style, "BOS added")
    example = encode_record(Conversation(said("s: <s>Be brief.", *TWO_ROUNDS)), template, "assistant")
    assert example.input_ids[0] == 1
    assert example.input_ids.count(1) == 1


@pytest.mark.parametrize("key", ["text", "completion"])
def test_no_text_can_write_a_special_token(key: str) -> None:
    template = template_of("bytes", "chatml", "pad = eos")
    for number, token in itertools.product(range(len(SPECIALS)), SPECIALS):
        row = {"prompt": "So", key: chr(FIRST_NAME + number) * len(token)}
        try:
            example = encode_record(parse_row(row, detect_format(row)), template, "assistant")
        except UnusableRow:
            continue
        assert min(example.input_ids[:-1]) >= len(SPECIALS)


def test_a_prompt_that_ends_in_newlines_has_the_tokens_of_training() -> None:
    backend = Tokenizer.from_str(described("bytes"))
    words = json.loads(backend.to_str())
    words["model"]["vocab"]["ĊĊ"] = len(words["model"]["vocab"])
    words["model"]["merges"].append(["Ċ", "Ċ"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(words)), eos_token="</s>")
    template = ChatTemplate(tokenizer, "llama-3")
    example = encode_record(Conversation(said(*TWO_ROUNDS)), template, "assistant")
    prompt = template.encode_prompt(said(*TWO_ROUNDS[:1]))
    assert example.input_ids[: len(prompt)] == prompt


def test_a_special_token_that_begins_with_another_is_told_from_it() -> None:
    backend = Tokenizer.from_str(described("bytes"))
    backend.add_special_tokens(["</s></s>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    tokenizer.chat_template = OPEN + "{{ m.content }}</s></s>" + CLOSE
    example = encode_record(Conversation(said("u: a</s></s>", "a: b")), ChatTemplate(tokenizer), "assistant")
    end = tokenizer.convert_tokens_to_ids("</s></s>")
    assert example.input_ids.count(end) == 2
    assert example.input_ids.count(2) == 0
    assert example.input_ids[-1] == example.labels[-1] == end


def test_letters_do_not_join_to_a_special_token() -> None:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    backend.train_from_iterator(["<s> </s> ab"] * 9, trainers.BpeTrainer(special_tokens=["<unk>"]))
    assert "</s>" in backend.encode("</s>").tokens, "joined of its letters"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", bos_token="<s>")
    example = encode_record(parse_row({"text": "<s>ab </s>"}, "text"), ChatTemplate(tokenizer), "assistant")
    assert example.input_ids.count(tokenizer.bos_token_id) == 0
    assert example.input_ids.count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(example.input_ids).replace(" ", "") == "<s>ab</s></s>"


@pytest.mark.parametrize(
    ("turns", "learned"),
    [
        (TWO_ROUNDS, ["First answer.", "Second answer.<|im_end|>"]),
        (("u: q", "a: First answer.", "u: ", "a: Second answer."), ["First answer.", "Second answer.<|im_end|>"]),
        (("u: q", "a: ", "u: q", "a: Second answer."), ["Second answer.<|im_end|>"]),
    ],
)
def test_the_end_of_another_turn_is_not_an_answers(turns: tuple[str, ...], learned: list[str]) -> None:
    tokenizer = copy.copy(tokenizer_of("bytes", "pad = eos"))
    ended = TURN.replace("<|im_end|>", "{% if m.role == 'user' or loop.last %}<|im_end|>{% endif %}")
    tokenizer.chat_template = OPEN + ended + CLOSE + ASKS
    example = encode_record(Conversation(said(*turns)), ChatTemplate(tokenizer), "assistant")
    assert [tokenizer.decode(run) for run in runs_of(example)] == learned
