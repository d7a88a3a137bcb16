"""The prefix rule for random rows: the tokens that inference feeds are a prefix of the tokens of training.

Everything after them, up to the end of the turn, is supervised, and nothing else is. What inference feeds and what the
model has to generate is rendered and tokenized here by transformers, from the turns that a row was made of. So the
tests do not depend on the code under test.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import hypothesis
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from lora_accel.data.chat import NOT_TOKENIZED, Example, encode_record
from lora_accel.data.formats import detect_format, parse_row
from lora_accel.data.records import UnusableRow
from lora_accel.data.template import BUILT_IN_TEMPLATES, ChatTemplate
from lora_accel.labels import IGNORE_INDEX
from tests.data.templates import ADDED, TEMPLATES
from tests.data.templates import SPECIALS as SPECIALS_OF_TEMPLATES
from tests.data.tokenizers import train_sentencepiece, train_unigram

# Tokenizers.

SPECIALS = [
    *SPECIALS_OF_TEMPLATES,
    *("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("<start_of_turn>", "<end_of_turn>"),
]
SPECIAL = re.compile("|".join(map(re.escape, SPECIALS)))
SECTION = re.compile("|".join(map(re.escape, (*SPECIALS, *ADDED))))
"""What splits a text before it is tokenized."""

BORDERS = (
    "",
    " ",
    "  ",
    "\n",
    "\n\n",
    "\n\n\n",
    "\t",
    "    ",
    " \n\t ",
    "\r\n",
    "\u00a0",
    "😀",
    "\n  ",
    "- ",
    ".",
    "1",
)
"""What texts begin and end with."""
WORDS = (
    "yes",
    "the sky",
    "20",
    "1234567",
    "def f(x):\n    return 1",
    "日本",
    "e\u0301é",
    "😀👍",
    ":",
    "a b  c",
    "it's",
)
LOOKALIKES = ("<|end|>", "</s>", "<|turn|>user\n", "<s>", "<|im_start|>assistant\n", "<|text|>")
"""Text that looks like special tokens."""
LINES = [
    "user assistant system tool think final question answer model USER: ASSISTANT: yes the sky the sky is it's brief",
    "[Q] [/Q] [INST] [/INST] <<SYS>> ### Instruction: ### Response: ### Input: Answer: yes\n",
    '{"name": "weather", "arguments": {"city": "Paris"}} def f(x):\n    return 1\n\n 20 1234567 日本 e\u0301é 😀👍',
    "ABCDEFGHIJKLMNOPQRSTUVWXYZ abcdefghijklmnopqrstuvwxyz 0123456789 .,;:!?()[]{}<>|/\\_-+*='\"`~@#$%^&\u00a0\t\r\n",
]
TEXTS = [*LINES, *(f"{word}{border}{word}" for border in BORDERS for word in ("yes", "assistant", ":", "the"))] * 4
"""For tokens that cover the end of a prompt and the beginning of an answer."""
LLAMA_3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level(*before: Any, use_regex: bool = False, normalizer: Any = None, prefix_space: bool = False) -> Tokenizer:
    """Train byte-level BPE with pre-tokenizers before the split into bytes."""
    tokenizer = Tokenizer(models.BPE())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space, use_regex=use_regex)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*before, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def sentencepiece(scheme: str) -> Tokenizer:
    return train_sentencepiece(scheme, TEXTS, SPECIALS, vocab_size=500, limit_alphabet=90)


def unigram() -> Tokenizer:
    return train_unigram(TEXTS, SPECIALS, vocab_size=400)


def split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex(pattern), "isolated")


FAMILIES: dict[str, Callable[[], Tokenizer]] = {
    "bytes, GPT-2": functools.partial(byte_level, use_regex=True),
    "bytes, Llama 3": lambda: byte_level(split(LLAMA_3_PATTERN)),
    "bytes, Qwen": lambda: byte_level(split(LLAMA_3_PATTERN.replace("{1,3}", "")), normalizer=normalizers.NFC()),
    "bytes, digits": lambda: byte_level(pre_tokenizers.Digits(individual_digits=True), use_regex=True),
    "bytes, no split": byte_level,
    "bytes, prefix space": functools.partial(byte_level, use_regex=True, prefix_space=True),
    "bytes, stripping": functools.partial(byte_level, use_regex=True),
    "sentencepiece, first": functools.partial(sentencepiece, "first"),
    "sentencepiece, always": functools.partial(sentencepiece, "always"),
    "sentencepiece, llama-2": functools.partial(sentencepiece, "llama-2"),
    "unigram": unigram,
}
"""In `stripping`, the special tokens include the white space around them, as some of Phi 3's do."""


@functools.cache
def trained_json(family: str) -> str:
    """Train a tokenizer of a family and return it as JSON."""
    tokenizer = FAMILIES[family]()
    strips = family == "bytes, stripping"
    tokens = [AddedToken(text, special=True, normalized=False, lstrip=strips, rstrip=strips) for text in SPECIALS]
    tokenizer.add_special_tokens(tokens)
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in ADDED])
    return tokenizer.to_str()


EOS = {"chatml": "<|im_end|>", "llama-3": "<|eot_id|>"} | {name: case.eos for name, case in TEMPLATES.items()}


@functools.cache
def template_of(name: str, family: str, adds_bos: bool) -> ChatTemplate:
    """Return a template with a tokenizer of a family, which may add BOS."""
    backend = Tokenizer.from_str(trained_json(family))
    if adds_bos:
        number = backend.token_to_id("<s>")
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", number)])
    eos = EOS.get(name, "</s>")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=eos, pad_token=eos, bos_token="<s>", unk_token="<unk>"
    )
    if name in BUILT_IN_TEMPLATES:
        return ChatTemplate(tokenizer, name)
    tokenizer.chat_template = TEMPLATES[name].source
    return ChatTemplate(tokenizer)


def as_compared(family: str, text: str) -> str:
    """Return a text without what tokenizers of the family add or leave out next to special tokens."""
    if family == "bytes, stripping":
        return re.sub(rf"\s*({SPECIAL.pattern})\s*", r"\1", text)
    if family == "bytes, Qwen":
        return unicodedata.normalize("NFC", text)
    if family.startswith("bytes") and family != "bytes, prefix space":
        return text
    return re.sub(rf"({SECTION.pattern}) +", r"\1", text).lstrip(" ")


# Rows.


class Turn(NamedTuple):
    """A message of a row."""

    role: str
    text: str
    reasoning: str = ""
    argument: str = ""
    """The argument of its tool call; empty = there is no call."""

    def value(self, name: str = "") -> dict[str, Any]:
        """Return the message in OpenAI's format, with the tool call as a template expects it."""
        value: dict[str, Any] = {"role": self.role, "content": self.text}
        if self.reasoning:
            value["reasoning_content"] = self.reasoning
        if self.argument:
            arguments: Any = {"city": self.argument}
            if name == "arguments_as_text":
                arguments = json.dumps(arguments, ensure_ascii=False)
            value["tool_calls"] = [{"type": "function", "function": {"name": "weather", "arguments": arguments}}]
        return value


class Row(NamedTuple):
    """A row, and the turns that it was made of."""

    row: dict[str, Any]
    turns: tuple[Turn, ...]
    answers: tuple[int, ...]
    """0-based indices of the supervised answers."""
    tools: list[dict[str, Any]] | None = None
    variables: dict[str, Any] | None = None

    def has_lookalikes(self, end: int) -> bool:
        """Whether a turn before `end` contains text that looks like a special token."""
        return any(SPECIAL.search(turn.text + turn.reasoning) for turn in self.turns[:end])

    def without_lookalikes(self) -> Row:
        """Return the turns without text that looks like special tokens."""
        turns = (
            turn._replace(text=SPECIAL.sub("x", turn.text), reasoning=SPECIAL.sub("x", turn.reasoning))
            for turn in self.turns
        )
        return self._replace(turns=tuple(turns))


WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
WITHOUT_SYSTEM = {"gemma"}
WITH_CALLS = {name for name, case in TEMPLATES.items() if "tool_calls" in str(case.source)}
WITH_REASONING = {name for name, case in TEMPLATES.items() if "reasoning_content" in str(case.source)} | {
    *("opens_thought", "opens_thought_of_last_answer")
}
CLOSES_THOUGHT = {"closes_thought", "closes_thought_before_wrapped_answer"}

words = st.sampled_from(WORDS)
borders = st.sampled_from(BORDERS) | st.lists(st.sampled_from(BORDERS), max_size=3).map("".join)


@st.composite
def texts(draw: st.DrawFn, *, has_lookalikes: bool = True) -> str:
    """Draw a text that is not empty, with white space at its ends."""
    middle = draw(st.lists(words, min_size=1, max_size=3).map(" ".join))
    if has_lookalikes and draw(st.integers(0, 7)) == 0:
        middle = draw(st.permutations([middle, draw(st.sampled_from(LOOKALIKES))]).map("".join))
    return draw(borders) + middle + draw(borders)


@st.composite
def rows(draw: st.DrawFn, name: str) -> Row:
    """Draw a row that a template supports, in one of the formats."""
    kinds = ["turns", "turns", "prompt and answers", "sharegpt", "alpaca"]
    kinds += ["calls"] * 2 if name in WITH_CALLS else []
    kinds += ["reasoning"] * 2 if name in WITH_REASONING else []
    kinds += [] if "thought" in name or name in WITH_REASONING else ["reasoning as text"]
    kind = draw(st.sampled_from(kinds))
    system = [Turn("system", draw(texts()))] if name not in WITHOUT_SYSTEM and draw(st.booleans()) else []
    has_reasoning = kind == "reasoning" or (kind == "calls" and name in WITH_REASONING and draw(st.booleans()))
    # Templates strip reasoning in different ways, so it has no white space at its ends.
    reasoning = words if has_reasoning else st.just("")
    turns = [*system]
    # Some of the templates look for the last question by its text, so the questions differ.
    for question in draw(st.lists(texts(), min_size=1, max_size=3, unique=True)):
        turns.append(Turn("user", question))
        if kind == "calls" and draw(st.integers(0, 2)):
            argument = draw(words)
            turns.append(Turn("assistant", "", draw(reasoning), argument))
            turns.append(Turn("tool", draw(texts())))
        thought = f"<think>\n{draw(words)}\n</think>\n\n" if kind == "reasoning as text" else ""
        turns.append(Turn("assistant", thought + draw(texts()), draw(reasoning)))
    if kind == "calls" and len(turns) > 2 and turns[-2].role == "tool" and draw(st.booleans()):
        turns = turns[:-2]
    answers = tuple(i for i, turn in enumerate(turns) if turn.role == "assistant")
    messages = [turn.value() for turn in turns]
    if kind == "prompt and answers":
        row = {"prompt": messages[:-1], "completion": messages[-1:]}
        return Row(row, tuple(turns), answers[-1:])
    if kind == "sharegpt":
        roles = {"system": "system", "user": "human", "assistant": "gpt"}
        row = {"conversations": [{"from": roles[turn.role], "value": turn.text} for turn in turns]}
        return Row(row, tuple(turns), answers)
    if kind == "alpaca":
        return _as_alpaca(draw, turns)
    row = {"messages": messages}
    tools = [WEATHER] if name in WITH_CALLS and (kind == "calls" or draw(st.booleans())) else None
    variables = None
    if name == "kwargs_enable_thinking" and not has_reasoning and draw(st.booleans()):
        variables = {"enable_thinking": False}
    row |= ({"tools": tools} if tools else {}) | ({"chat_template_kwargs": variables} if variables else {})
    return Row(row, tuple(turns), answers, tools, variables)


def _as_alpaca(draw: st.DrawFn, turns: list[Turn]) -> Row:
    questions = [turn.text for turn in turns if turn.role == "user"]
    outputs = [turn.text for turn in turns if turn.role == "assistant"]
    row: dict[str, Any] = {"instruction": questions[-1], "output": outputs[-1]}
    if len(questions) > 1:
        row["history"] = [list(pair) for pair in zip(questions[:-1], outputs[:-1], strict=True)]
    if turns[0].role == "system":
        row["system"] = turns[0].text
    if draw(st.booleans()):
        row["input"] = draw(texts())
        turns[-2] = Turn("user", f"{questions[-1]}\n\n### Input:\n{row['input']}")
    answers = tuple(i for i, turn in enumerate(turns) if turn.role == "assistant")
    return Row(row, tuple(turns), answers)


# What the rule asks for.


class Wanted(NamedTuple):
    """An answer: what inference feeds, and what the model has to generate."""

    prompt: str
    fed: list[int] | None
    """The tokens as transformers makes them. It cannot if message text looks like a special token: None."""
    generated: tuple[str, ...]
    """The possible texts: without a closing token, an earlier answer ends with the token of the next turn."""


CALL = '<call>{{"name": "weather", "arguments": {{"city": {}}}}}</call>'
ENDS = dict.fromkeys(("no_generation_prompt", "space_before_answer", "alpaca", "llama-2", "vicuna_v1.1"), "</s>")
ENDS |= {"other_end_in_history": "<|stop|>", "reasoning_channel": "<|stop|>", "zephyr": "</s>"}
ENDS |= {"chatml": "<|im_end|>", "gemma": "<end_of_turn>", "llama-3": "<|eot_id|>"}
NO_END = {"no_closing_token": "<|turn|>", "closing_token_in_history": "<|end|>"}
"""Templates whose last answer has no end token -> the token that follows an earlier one."""
JOINED: dict[str, Callable[[Turn, str], str]] = {
    "system_in_last_user": lambda turn, text: text,
    "closes_thought": lambda turn, text: text,
    "closes_thought_before_wrapped_answer": lambda turn, text: f"<|text|>{text}<|text_end|>",
    "opens_thought": lambda turn, text: turn.reasoning + "\n</think>\n\n" + text.lstrip("\n"),
    "opens_thought_of_reasoning": lambda turn, text: f"{turn.reasoning}\n</think>\n\n{text}",
    "opens_thought_written_differently": lambda turn, text: f"{turn.reasoning}\n</think>\n{text}",
    "opens_thought_of_last_answer": lambda turn, text: f"{turn.reasoning}\n</think>\n\n{text}",
    "opens_thought_in_words": lambda turn, text: f"{turn.reasoning}\nso\n{text}",
    "swaps_thought_tags": lambda turn, text: f"{turn.reasoning}</think>{text}",
    "opens_thought_in_special_tokens": lambda turn, text: f"{turn.reasoning}<|stop|><|text|>{text}<|text_end|>",
    "line_break_after_earlier_result": lambda turn, text: text,
    "kwargs_enable_thinking": lambda turn, text: text,
}
"""What the model generates where an answer is rendered after another text than its prompt. All end with `<|end|>`."""


def find_wanted(template: ChatTemplate, name: str, row: Row, number: int) -> Wanted:
    """Return the prompt of an answer and what the model has to generate, as transformers renders them."""
    tokenizer = template.tokenizer
    values, variables = [turn.value(name) for turn in row.turns], row.variables or {}

    def apply(count: int, **options: Any) -> Any:
        source = template.source if name in BUILT_IN_TEMPLATES else None
        return tokenizer.apply_chat_template(
            values[:count], tools=row.tools, chat_template=source, return_dict=False, **options, **variables
        )

    if name == "content_none_with_calls":  # apply_chat_template would replace None
        tokenizer, source = copy.copy(tokenizer), template.source
        tokenizer.chat_template = source.replace("m.content is none", "m.tool_calls")
    prompt, fed = apply(number, add_generation_prompt=True, tokenize=False), None
    if not row.has_lookalikes(number):
        fed = apply(number, add_generation_prompt=True, tokenize=True)
    if fed is not None and name in BUILT_IN_TEMPLATES:  # these leave BOS to the tokenizer
        fed = tokenizer("").input_ids + fed
    rendered, turn = apply(number + 1, tokenize=False), row.turns[number]
    if not rendered.startswith(prompt) or name == "opens_thought_of_last_answer":
        call = CALL.format(json.dumps(turn.argument, ensure_ascii=False)) if turn.argument else ""
        return Wanted(prompt, fed, (JOINED[name](turn, turn.text + call) + "<|end|>",))
    generated = rendered[len(prompt) :]
    if name in NO_END:
        last = {tokenizer.eos_token} if number == len(row.turns) - 1 else {tokenizer.eos_token, NO_END[name]}
        return Wanted(prompt, fed, tuple(generated + end for end in last))
    end = "<|call|>" if name == "answer_continues_after_result" and turn.argument else ENDS.get(name, "<|end|>")
    return Wanted(prompt, fed, (generated[: generated.rindex(end) + len(end)],))


def supervised_runs(example: Example) -> Iterator[tuple[int, int]]:
    """Yield the first and end token of each run of supervised tokens."""
    labels, start = [*example.labels, IGNORE_INDEX], None
    for i, label in enumerate(labels):
        if label != IGNORE_INDEX and start is None:
            start = i
        elif label == IGNORE_INDEX and start is not None:
            yield start, i
            start = None


def check_row(name: str, family: str, adds_bos: bool, row: Row, loss_on: str) -> Counter[str]:
    """Check the examples of a row, and return its numbers of answers, of examples, and of answers that are left out."""
    template = template_of(name, family, adds_bos)
    record = parse_row(row.row, detect_format(row.row))
    numbers = row.answers if loss_on == "assistant" else row.answers[-1:]
    counts = Counter(rows=1, answers=len(numbers))
    try:
        examples = encode_record(record, template, loss_on)
    except UnusableRow as error:
        if str(error) != NOT_TOKENIZED:
            raise
        return counts + Counter({"left out": len(numbers), "dropped rows": 1})
    wanted = {number: find_wanted(template, name, row, number) for number in numbers}
    fed = {
        number: template.encode_prompt(record.messages[:number], record.tools, record.template_kwargs)
        for number in numbers
    }
    for number in numbers:
        assert wanted[number].fed in (None, fed[number])
    found: list[int] = []
    for example in examples:
        ids, runs = example.input_ids, list(supervised_runs(example))
        assert example.answer == runs[-1]
        for start, end in runs:
            assert example.labels[start:end] == ids[start:end]
            (number,) = [number for number in numbers if fed[number] == ids[:start]]
            check_answer(name, family, row, number, template, wanted[number], ids[:start], ids[start:end])
            found.append(number)
    assert len(found) == len(set(found)), "an answer is supervised twice"
    left_out = [note for note in examples[0].notes if note.startswith("an answer is left out: ")]
    assert len(set(numbers) - set(found)) >= len(left_out) >= bool(set(numbers) - set(found))
    assert all(note.endswith(NOT_TOKENIZED) for note in left_out)
    return counts + Counter({"examples": len(examples), "left out": len(numbers) - len(found)})


def check_answer(
    name: str,
    family: str,
    row: Row,
    number: int,
    template: ChatTemplate,
    wanted: Wanted,
    fed: list[int],
    generated: list[int],
) -> None:
    """Check the text and the special tokens of an answer."""
    tokenizer = template.tokenizer
    prefix = template.bos_prefix(wanted.prompt)
    assert fed[: len(prefix)] == prefix
    decode = functools.partial(tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    text = as_compared(family, decode(fed[len(prefix) :] + generated))
    expected = [as_compared(family, wanted.prompt + end) for end in wanted.generated]
    assert text in expected, f"{text!r} is not {expected}"
    assert as_compared(family, decode(fed[len(prefix) :])) == as_compared(family, wanted.prompt)
    # Special tokens are those that the template writes: text that looks like them is text.
    clean = find_wanted(template, name, row.without_lookalikes(), number)
    special = {tokenizer.convert_tokens_to_ids(text): text for text in SPECIALS}
    assert [special[token] for token in fed[len(prefix) :] if token in special] == SPECIAL.findall(clean.prompt)
    written = [special[token] for token in generated if token in special]
    assert written in [SPECIAL.findall(text) for text in clean.generated]


NAMES = [name for name in (*TEMPLATES, *BUILT_IN_TEMPLATES) if name != "drops_last_answer"]
"""Templates that write the last answer."""
COUNTS: Counter[str] = Counter()


@pytest.fixture(scope="module", autouse=True)
def _print_counts() -> Iterator[None]:
    yield
    print("\nprefix rule:", ", ".join(f"{count:,} {what}" for what, count in COUNTS.items()))


def check_rows(name: str, num_examples: int) -> None:
    """Check random rows of a template, with random tokenizers."""
    counts: Counter[str] = Counter()

    loss_on = st.sampled_from(("assistant", "assistant", "last_assistant"))

    @settings(max_examples=num_examples, deadline=None, suppress_health_check=list(HealthCheck))
    @given(rows(name), st.sampled_from(sorted(FAMILIES)), st.booleans(), loss_on)
    def check(row: Row, family: str, adds_bos: bool, loss_on: str) -> None:
        counts.update(check_row(name, family, adds_bos, row, loss_on))

    check()
    COUNTS.update(counts)
    assert counts["left out"] <= 0.02 * counts["answers"], "nearly all answers are used"


@pytest.mark.sample(24)
@pytest.mark.parametrize("name", NAMES)
def test_the_fed_tokens_are_a_prefix_and_the_rest_is_supervised(name: str) -> None:
    check_rows(name, max(10, hypothesis.settings.default.max_examples // 6))


@given(texts(), texts(), st.sampled_from(sorted(FAMILIES)), st.booleans())
def test_the_fed_tokens_of_a_completion_are_a_prefix(prompt: str, completion: str, family: str, adds_bos: bool) -> None:
    template = template_of("plain", family, adds_bos)
    tokenizer = template.tokenizer
    record = parse_row({"prompt": prompt, "completion": completion}, "prompt_completion")
    (example,) = encode_record(record, template, "assistant")
    ids, fed, prefix = example.input_ids, template.encode_text(prompt), tokenizer("").input_ids
    if not SPECIAL.search(prompt):
        assert fed == tokenizer(prompt).input_ids
    assert ids[: len(fed)] == fed
    assert example.labels == [IGNORE_INDEX] * len(fed) + ids[len(fed) :]
    assert example.answer == (len(fed), len(ids))
    text = tokenizer.decode(ids[len(prefix) :], skip_special_tokens=False)
    assert as_compared(family, text) == as_compared(family, prompt + completion + "<|end|>")
    special = {tokenizer.convert_tokens_to_ids(text) for text in SPECIALS}
    assert special.isdisjoint(ids[len(prefix) : -1])
    COUNTS.update(completions=1)


@pytest.mark.parametrize("adds_bos", [False, True])
def test_an_answer_without_tokens_before_it_is_no_answer_to_a_prompt(adds_bos: bool) -> None:
    record = parse_row({"prompt": "", "completion": "yes"}, "prompt_completion")
    (example,) = encode_record(record, template_of("plain", "bytes, GPT-2", adds_bos), "assistant")
    assert example.answer == ((1, len(example.input_ids)) if adds_bos else None)


@pytest.mark.parametrize("before", ["no call", "no tools"])
def test_how_a_template_takes_calls_does_not_depend_on_the_row_before(before: str) -> None:
    """The name of a tool in the list of tools is not a call, and a template may write calls only where tools are."""
    source = TEMPLATES["arguments_as_text" if before == "no tools" else "content_none_with_calls"].source
    tokenizer = copy.copy(template_of("tools", "bytes, GPT-2", False).tokenizer)
    tokenizer.chat_template = str(source).replace("m.tool_calls or []", "(m.tool_calls if tools else none) or []")
    template = ChatTemplate(tokenizer)
    question, answer, call = Turn("user", "why"), Turn("assistant", "yes"), Turn("assistant", "", argument="20")
    with_call = {"messages": [question.value(), call.value()]}
    first = with_call if before == "no tools" else {"messages": [question.value(), answer.value()], "tools": [WEATHER]}
    with contextlib.suppress(UnusableRow):
        encode_record(parse_row(first, "messages"), template, "assistant")
    (example,) = encode_record(parse_row(with_call | {"tools": [WEATHER]}, "messages"), template, "assistant")
    ((start, end),) = supervised_runs(example)
    text = tokenizer.decode(example.input_ids[start:end])
    assert text.startswith("<call>")
    assert text.endswith("</call><|end|>")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_fed_tokens_are_a_prefix_in_many_more_rows(name: str) -> None:
    check_rows(name, 1000)
