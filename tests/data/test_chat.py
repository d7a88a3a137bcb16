"""Chat templates: the rendered text, and which of its tokens are supervised."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, normalizers, processors
from transformers import PreTrainedTokenizerFast

from lora_accel.data.chat import Example, encode_record
from lora_accel.data.formats import parse_row
from lora_accel.data.records import Completion, Conversation, MalformedRow, Message, PlainText, UnusableRow
from lora_accel.data.spans import FIRST_MARK, Span
from lora_accel.data.template import BUILT_IN_TEMPLATES, ChatTemplate
from lora_accel.errors import DataError
from lora_accel.labels import IGNORE_INDEX
from tests.conftest import CHATML

Factory = Callable[..., PreTrainedTokenizerFast]

REJECTED = "the chat template rejects it: "
"""How the reason of a row starts if its template raises."""

VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
ALPACA_SYSTEM = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)
ALPACA_SYSTEM_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
TWO_ROUNDS = (("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "a2"))

PLAIN = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
STRIPPING = "{% for m in messages %}<s>{{ m['role'] }} {{ m['content'] | trim }}</s>{% endfor %}"
WITH_BOS = "{{ bos_token }}" + CHATML
BARE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
NO_SYSTEM = PLAIN.replace("{{ m['content'] }}\n", "{% if m['role'] != 'system' %}{{ m['content'] }}</s>{% endif %}")


def chat(*turns: tuple[str, str]) -> tuple[Message, ...]:
    return tuple(Message(role, content) for role, content in turns)


def template_of(make: Factory, name: str | None = None, **options: Any) -> ChatTemplate:
    return ChatTemplate(make(**options), name)


def add_bos(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Make a tokenizer add `<s>` (BOS) to every text, as Llama's does."""
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    assert tokenizer("a").input_ids[0] == tokenizer.bos_token_id == 1
    return tokenizer


def supervised_texts(example: Example, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Return the text of each run of supervised tokens."""
    runs = []
    for supervised, run in itertools.groupby(range(len(example.labels)), lambda i: example.labels[i] != IGNORE_INDEX):
        if supervised:
            ids = [example.input_ids[i] for i in run]
            runs.append(tokenizer.decode(ids))
    assert all(label in (IGNORE_INDEX, token) for token, label in zip(example.input_ids, example.labels, strict=True))
    assert example.labels[0] == IGNORE_INDEX
    return runs


def supervised_of(template: ChatTemplate, messages: tuple[Message, ...], loss_on: str = "assistant") -> list[str]:
    (example,) = encode_record(Conversation(messages), template, loss_on)
    return supervised_texts(example, template.tokenizer)


# The built-in templates.


@pytest.mark.parametrize(
    ("name", "turns", "text"),
    [
        ("vicuna_v1.1", TWO_ROUNDS, f"{VICUNA_SYSTEM} USER: q1 ASSISTANT: a1</s>USER: q2 ASSISTANT: a2</s>"),
        ("vicuna_v1.1", (("system", "Be."), *TWO_ROUNDS[:2]), "Be. USER: q1 ASSISTANT: a1</s>"),
        ("alpaca", TWO_ROUNDS[:2], f"{ALPACA_SYSTEM}\n\n### Instruction:\nq1\n\n### Response:a1</s>"),
        (
            "alpaca",
            TWO_ROUNDS,
            f"{ALPACA_SYSTEM}\n\n### Instruction:\nq1\n\n### Response:a1</s>\n\n"
            "### Instruction:\nq2\n\n### Response:a2</s>",
        ),
        ("alpaca", (("system", "Be."), *TWO_ROUNDS[:2]), "Be.\n\n### Instruction:\nq1\n\n### Response:a1</s>"),
        (
            "chatml",
            TWO_ROUNDS[:2],
            "<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\na1<|im_end|>\n",
        ),
        (
            "llama-2",
            (("system", "Be."), *TWO_ROUNDS),
            "[INST] <<SYS>>\nBe.\n<</SYS>>\n\nq1 [/INST] a1 </s><s>[INST] q2 [/INST] a2 </s>",
        ),
        ("llama-2", TWO_ROUNDS[:2], "[INST] q1 [/INST] a1 </s>"),
        (
            "llama-3",
            (("system", "Be."), *TWO_ROUNDS[:2]),
            "<|start_header_id|>system<|end_header_id|>\n\nBe.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
            "q1<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\na1<|eot_id|>",
        ),
        (
            "zephyr",
            (("system", "Be."), *TWO_ROUNDS[:2]),
            "<|system|>\nBe.</s>\n<|user|>\nq1</s>\n<|assistant|>\na1</s>\n",
        ),
        (
            "gemma",
            TWO_ROUNDS,
            "<start_of_turn>user\nq1<end_of_turn>\n<start_of_turn>model\na1<end_of_turn>\n"
            "<start_of_turn>user\nq2<end_of_turn>\n<start_of_turn>model\na2<end_of_turn>\n",
        ),
    ],
)
def test_built_in_templates_render_exactly(
    tokenizer_factory: Factory, name: str, turns: tuple[tuple[str, str], ...], text: str
) -> None:
    template = template_of(tokenizer_factory, name, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    rendered = template.render(chat(*turns))
    assert rendered.text == text
    assert [text[span.start : span.end] for span in rendered.spans if span] == [content for _, content in turns]


def test_alpaca_with_an_input_has_its_own_system_text(tokenizer_factory: Factory) -> None:
    template = template_of(tokenizer_factory, "alpaca", eos_token="</s>", pad_token="</s>")
    record = parse_row({"instruction": "do", "input": "this", "output": "done"}, "alpaca")
    assert isinstance(record, Conversation)
    assert template.render(record.messages).text == (
        f"{ALPACA_SYSTEM_WITH_INPUT}\n\n### Instruction:\ndo\n\n### Input:\nthis\n\n### Response:done</s>"
    )


@pytest.mark.parametrize("name", BUILT_IN_TEMPLATES)
@pytest.mark.parametrize("system", [(), (("system", "Be."),)])
def test_the_prompt_equals_the_training_text_before_the_answer(
    tokenizer_factory: Factory, name: str, system: tuple[tuple[str, str], ...]
) -> None:
    if name == "gemma" and system:
        pytest.skip("gemma has no system role")
    template = template_of(tokenizer_factory, name, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    messages = chat(*system, *TWO_ROUNDS)
    for end in range(len(system) + 2, len(messages) + 1, 2):
        rendered = template.render(messages[:end])
        span = rendered.spans[-1]
        assert span is not None
        # The prompts of vicuna and llama-2 end before a space, which the model generates.
        assert template.prompt(Conversation(messages[: end - 1])) == rendered.text[: span.start].rstrip(" ")


@pytest.mark.parametrize(
    ("name", "role"),
    [
        *((name, "tool") for name in ("vicuna_v1.1", "alpaca", "gemma", "llama-2", "zephyr")),
        *((name, "system") for name in ("alpaca", "gemma", "llama-2")),
    ],
)
def test_a_role_that_a_template_does_not_support_is_an_error(tokenizer_factory: Factory, name: str, role: str) -> None:
    template = template_of(tokenizer_factory, name, eos_token="</s>", pad_token="</s>")
    with pytest.raises(UnusableRow, match=f"{REJECTED}{name} .* a {role} message here"):
        template.render(chat(*TWO_ROUNDS, (role, "x")))


# Supervised tokens.


@pytest.mark.parametrize(
    ("name", "options", "end"),
    [
        (None, {}, "<|im_end|>"),
        (None, {"pad_token": "<unk>"}, "<|im_end|>"),
        (None, {"eos_token": "</s>", "pad_token": "</s>"}, "<|im_end|>"),  # the end-of-turn token is not EOS
        (None, {"chat_template": STRIPPING}, "</s>"),
        (None, {"chat_template": CHATML.replace("<|im_end|>", "\n <|im_end|>")}, "\n <|im_end|>"),
        ("chatml", {}, "<|im_end|>"),
        ("vicuna_v1.1", {"eos_token": "</s>", "pad_token": "</s>"}, "</s>"),
        ("vicuna_v1.1", {"eos_token": "</s>", "pad_token": "<unk>"}, "</s>"),
        ("alpaca", {"eos_token": "</s>", "pad_token": "</s>"}, "</s>"),
        ("llama-2", {"eos_token": "</s>", "pad_token": "</s>"}, " </s>"),
        ("zephyr", {"eos_token": "</s>", "pad_token": "</s>"}, "</s>"),
    ],
)
def test_only_answers_and_their_end_of_turn_are_supervised(
    tokenizer_factory: Factory, name: str | None, options: dict[str, Any], end: str
) -> None:
    template = template_of(tokenizer_factory, name, **options)
    messages = chat(("user", "hello"), ("assistant", "QX 1."), ("user", "QX 1."), ("assistant", "YZ"))
    assert template.end_of_turn == end
    # The prompts of vicuna, llama-2 and this own template end before a space, which the model generates.
    space = " " if name in ("vicuna_v1.1", "llama-2") or options.get("chat_template") == STRIPPING else ""
    assert supervised_of(template, messages) == [f"{space}QX 1.{end}", f"{space}YZ{end}"]
    assert supervised_of(template, messages, "last_assistant") == [f"{space}YZ{end}"]
    (example,) = encode_record(Conversation(messages), template, "all")
    assert example.labels == [IGNORE_INDEX, *example.input_ids[1:]]


@pytest.mark.parametrize(("name", "end"), [("llama-3", "<|eot_id|>"), ("gemma", "<end_of_turn>")])
def test_eos_follows_an_end_of_turn_that_is_no_special_token(tokenizer_factory: Factory, name: str, end: str) -> None:
    """Inference could not stop at the end of turn."""
    template = template_of(tokenizer_factory, name)
    messages = chat(("user", "hello"), ("assistant", "QX 1."), ("user", "QX 1."), ("assistant", "YZ"))
    assert template.end_of_turn == end
    examples = encode_record(Conversation(messages), template, "assistant")
    texts = [supervised_texts(example, template.tokenizer) for example in examples]
    assert texts == [[f"QX 1.{end}<|im_end|>"], [f"YZ{end}<|im_end|>"]]
    for number, example in zip((1, 3), examples, strict=True):
        assert example.answer is not None
        assert example.input_ids[: example.answer[0]] == template.encode_prompt(messages[:number])
    (everything,) = encode_record(Conversation(messages), template, "all")
    assert everything.input_ids == examples[1].input_ids
    assert everything.labels == [IGNORE_INDEX, *everything.input_ids[1:]]


def test_without_an_end_of_turn_eos_ends_every_answer(tokenizer_factory: Factory) -> None:
    """Within its row, an earlier answer would teach to write the next question."""
    template = template_of(tokenizer_factory, chat_template=PLAIN)
    assert template.end_of_turn == ""
    messages = chat(("user", "hello"), ("assistant", "QX"), ("user", "hello"), ("assistant", "YZ"))
    examples = encode_record(Conversation(messages), template, "assistant")
    assert [supervised_texts(example, template.tokenizer) for example in examples] == [
        [" QX<|im_end|>"],
        [" YZ<|im_end|>"],
    ]
    assert [template.tokenizer.decode(example.input_ids) for example in examples] == [
        "user: hello\nassistant: QX<|im_end|>",
        "user: hello\nassistant: QX\nuser: hello\nassistant: YZ<|im_end|>",
    ]


def test_a_token_shared_by_answer_and_template_is_supervised(tokenizer_factory: Factory) -> None:
    template = template_of(tokenizer_factory, "vicuna_v1.1", eos_token="</s>", pad_token="</s>")
    assert " answer" in [template.tokenizer.decode([i]) for i in template.tokenizer(": answer").input_ids]
    assert supervised_of(template, chat(("user", "hello"), ("assistant", "answer"))) == [" answer</s>"]


@pytest.mark.parametrize(
    "content",
    [
        " leading",
        "trailing ",
        "  both \n",
        "\n\nlines\n\n\nof\ttext\n",
        "a  b   c",
        "😀👩‍👩‍👧 日本 é",
        "👍",
        "hello",  # also the user's text
        "assistant",  # also the role's name
        "<|im_end|>",
        "<|im_start|>user\nhello<|im_end|>\n",
        "{{ messages }}{% if x %}",
        "</s>USER: hello ASSISTANT: hello</s>",
    ],
)
@pytest.mark.parametrize("template", [CHATML, STRIPPING])
def test_unusual_answers_are_supervised_exactly(tokenizer_factory: Factory, template: str, content: str) -> None:
    chosen = template_of(tokenizer_factory, chat_template=template)
    text = content.strip() if template == STRIPPING else content
    (example,) = encode_record(Conversation(chat(("user", "hello"), ("assistant", content))), chosen, "assistant")
    # The answer's own end-of-turn text is plain text, and supervised like the rest.
    assert "".join(supervised_texts(example, chosen.tokenizer)) in (
        text + chosen.end_of_turn,
        " " + text + chosen.end_of_turn,
    )


def test_an_answer_that_repeats_the_question_is_found(tokenizer: PreTrainedTokenizerFast) -> None:
    template = ChatTemplate(tokenizer)
    messages = chat(("user", "echo"), ("assistant", "echo"), ("user", "echo"), ("assistant", "echo"))
    (example,) = encode_record(Conversation(messages), template, "assistant")
    text = template.render(messages).text
    first = text.index("assistant\necho") + len("assistant\n")
    supervised_tokens = [i for i, label in enumerate(example.labels) if label != IGNORE_INDEX]
    starts = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
    assert starts[supervised_tokens[0]][0] == first
    assert supervised_texts(example, tokenizer) == ["echo<|im_end|>"] * 2


def test_the_end_of_an_empty_answer_is_supervised(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = chat(("user", "q"), ("assistant", ""), ("user", "q"), ("assistant", "QX"))
    assert supervised_of(ChatTemplate(tokenizer), messages) == ["<|im_end|>", "QX<|im_end|>"]


def test_an_empty_answer_does_not_make_its_neighbors_supervised(tokenizer_factory: Factory) -> None:
    # " answer" is one token here, and the empty answer is in the middle of it.
    template = template_of(tokenizer_factory, chat_template=BARE)
    messages = chat(("user", "hello ans"), ("assistant", ""), ("user", "wer. "), ("assistant", "QX"))
    assert " answer" in [template.tokenizer.decode([i]) for i in template.tokenizer("hello answer").input_ids]
    row = {"messages": [{"role": message.role, "content": message.content} for message in messages]}
    (example,) = encode_record(parse_row(row, "messages"), template, "assistant")
    assert supervised_texts(example, template.tokenizer) == ["QX<|im_end|>"]
    assert example.input_ids == template.tokenizer("hello answer. QX<|im_end|>").input_ids


# BOS and end-of-turn tokens.


@pytest.mark.parametrize("name", ["chatml", "vicuna_v1.1", "alpaca"])
@pytest.mark.parametrize("adds_bos", [False, True])
def test_built_in_templates_leave_bos_to_the_tokenizer_in_training_and_inference(
    tokenizer_factory: Factory, adds_bos: bool, name: str
) -> None:
    tokenizer = tokenizer_factory(bos_token="<s>", eos_token="</s>", pad_token="</s>")
    if adds_bos:
        add_bos(tokenizer)
    template = ChatTemplate(tokenizer, name)
    (trained,) = encode_record(Conversation(chat(*TWO_ROUNDS)), template, "assistant")
    assert trained.input_ids.count(tokenizer.bos_token_id) == adds_bos
    assert (trained.input_ids[0] == tokenizer.bos_token_id) == adds_bos
    prompt = template.encode_prompt(chat(*TWO_ROUNDS[:3]))
    assert trained.input_ids[: len(prompt)] == prompt


@pytest.mark.parametrize("adds_bos", [False, True])
def test_a_template_that_writes_bos_gets_it_once(tokenizer_factory: Factory, adds_bos: bool) -> None:
    tokenizer = tokenizer_factory(bos_token="<s>", chat_template=WITH_BOS)
    if adds_bos:
        add_bos(tokenizer)
    (example,) = encode_record(Conversation(chat(*TWO_ROUNDS)), ChatTemplate(tokenizer), "assistant")
    assert example.input_ids.count(1) == 1
    assert example.input_ids[0] == 1
    assert supervised_texts(example, tokenizer) == ["a1<|im_end|>", "a2<|im_end|>"]


@pytest.mark.parametrize("record", [PlainText("hello world"), Completion("hello", " world")])
@pytest.mark.parametrize("adds_bos", [False, True])
def test_text_gets_bos_once_if_the_tokenizer_adds_it(
    tokenizer_factory: Factory, adds_bos: bool, record: PlainText | Completion
) -> None:
    tokenizer = tokenizer_factory(bos_token="<s>", eos_token="</s>", pad_token="</s>")
    if adds_bos:
        add_bos(tokenizer)
    for given_record in (record, type(record)("<s>" + record[0], *record[1:])):
        # BOS in the text is plain text.
        (example,) = encode_record(given_record, ChatTemplate(tokenizer), "assistant")
        assert example.input_ids.count(1) == adds_bos
        assert (example.input_ids[0] == 1) == adds_bos
        assert example.input_ids.count(2) == 1
        assert example.input_ids[-1] == example.labels[-1] == 2


def test_all_of_a_text_and_the_completion_after_a_prompt_are_supervised(tokenizer: PreTrainedTokenizerFast) -> None:
    template = ChatTemplate(tokenizer)
    (text,) = encode_record(PlainText("hello world"), template, "assistant")
    assert text.labels == [IGNORE_INDEX, *text.input_ids[1:]]
    assert tokenizer.decode(text.input_ids) == "hello world<|im_end|>"
    (completion,) = encode_record(Completion("hello", " world"), template, "assistant")
    assert tokenizer.decode(completion.input_ids) == "hello world<|im_end|>"
    assert supervised_texts(completion, tokenizer) == [" world<|im_end|>"]
    (everything,) = encode_record(Completion("hello", " world"), template, "all")
    assert everything.labels == [IGNORE_INDEX, *everything.input_ids[1:]]


# Untrusted templates.


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (CHATML.replace("m['content']", "m['content'] | upper"), "changes the text of message 2"),
        (CHATML.replace("{{ m['content'] }}", "{{ m['content'] }}{{ m['content'] }}"), "changes the text of message 2"),
        (CHATML.replace("m['content']", "m['content'][:2]"), "changes message 1"),
        (CHATML.replace("m['content']", "m['content'] | replace('a', 'A')"), "changes the text of message 2"),
        (CHATML.replace("m['content']", "m['content'] if m['role'] == 'assistant' else ''"), "leaves message 1 out"),
        ("{% for m in messages %}{{ m['content'] | length }}:{{ m['content'] }};{% endfor %}", "changes the text"),
        ("{{ messages[0].content | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}", "changes the text"),
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}{{ messages | string | length }}", "changes"),
        (CHATML + "{% if messages[0]['content'] == 'q1' %}!{% endif %}", "changes with the content"),
        ("always the same", "leaves message 1 out"),
        ("{{ raise_exception('no thanks') }}", f"{REJECTED}no thanks"),
        ("{{ messages[9]['content'] }}", f"{REJECTED}list object has no element 9"),
        ("{{ 1 / 0 }}", f"{REJECTED}division by zero"),
        ("{{ 'x' + 1 }}", REJECTED),
        ("{{ messages[0].content.nothing() }}", REJECTED),
        ("{{ '%d' % 'x' }}", REJECTED),
        ("{{ 'x' | int(default=none) + messages }}", REJECTED),
    ],
)  # fmt: skip
def test_a_template_whose_spans_cannot_be_verified_makes_the_row_unusable(
    tokenizer_factory: Factory, source: str, reason: str
) -> None:
    template = template_of(tokenizer_factory, chat_template=source)
    with pytest.raises(UnusableRow, match=reason):
        encode_record(Conversation(chat(*TWO_ROUNDS)), template, "assistant")


def test_an_unusual_order_of_messages_can_be_verified(tokenizer_factory: Factory) -> None:
    source = "{% for m in messages | reverse %}{{ m['content'] }}|{% endfor %}"
    rendered = template_of(tokenizer_factory, chat_template=source).render(chat(*TWO_ROUNDS))
    assert rendered.text == "a2|q2|a1|q1|"
    assert rendered.spans == [Span(9, 11), Span(6, 8), Span(3, 5), Span(0, 2)]


@pytest.mark.parametrize(
    "question", ["m['content'] | replace('q', 'Q')", "m['content'] | upper", "m['content'] + ', ' + m['content']"]
)
def test_a_template_may_rewrite_or_repeat_messages_that_are_not_supervised(
    tokenizer_factory: Factory, question: str
) -> None:
    source = CHATML.replace("m['content']", f"({question}) if m['role'] == 'user' else m['content']")
    template = template_of(tokenizer_factory, chat_template=source)
    (example,) = encode_record(Conversation(chat(*TWO_ROUNDS)), template, "assistant")
    assert supervised_texts(example, template.tokenizer) == ["a1<|im_end|>", "a2<|im_end|>"]
    prompt = template.encode_prompt(chat(*TWO_ROUNDS[:3]))
    assert example.answer is not None
    assert example.input_ids[: example.answer[0]] == prompt


def test_only_the_answer_that_a_template_changes_is_left_out(tokenizer_factory: Factory) -> None:
    source = CHATML.replace("m['content']", "m['content'] | replace('a1', 'A1')")
    template = template_of(tokenizer_factory, chat_template=source)
    (example,) = encode_record(Conversation(chat(*TWO_ROUNDS)), template, "assistant")
    assert supervised_texts(example, template.tokenizer) == ["a2<|im_end|>"]
    (note,) = example.notes
    assert note.startswith("an answer is left out: the chat template changes the text of message 2")


def test_a_row_that_a_template_rejects_keeps_its_earlier_answers(tokenizer_factory: Factory) -> None:
    source = "{% if messages | length > 3 %}{{ raise_exception('too many') }}{% endif %}" + CHATML
    template = template_of(tokenizer_factory, chat_template=source)
    (example,) = encode_record(Conversation(chat(*TWO_ROUNDS)), template, "assistant")
    assert supervised_texts(example, template.tokenizer) == ["a1<|im_end|>"]
    assert example.notes == (f"an answer is left out: {REJECTED}too many",)
    (example,) = encode_record(Conversation(chat(*TWO_ROUNDS[:3], ("user", "q3"))), template, "assistant")
    assert supervised_texts(example, template.tokenizer) == ["a1<|im_end|>"]
    assert example.notes == (), "no answer is left out"


def test_a_template_may_leave_out_the_system_message(tokenizer_factory: Factory) -> None:
    template = template_of(tokenizer_factory, chat_template=NO_SYSTEM)
    messages = chat(("system", "s"), *TWO_ROUNDS)
    assert template.render(messages).spans[0] is None
    assert supervised_of(template, messages) == [" a1</s>", " a2</s>"]


def test_a_content_with_reserved_characters_makes_the_row_unusable(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UnusableRow, match="private use area"):
        ChatTemplate(tokenizer).render(chat(("user", "q"), ("assistant", chr(FIRST_MARK + 3))))


def test_a_tokenizer_without_a_template_needs_one_for_conversations(tokenizer_factory: Factory) -> None:
    template = template_of(tokenizer_factory, chat_template=None)
    encode_record(PlainText("text needs no template"), template, "assistant")
    with pytest.raises(DataError, match=r"set model\.chat_template to one of alpaca, chatml, "):
        template.render(chat(*TWO_ROUNDS))


def test_the_default_of_several_templates_is_used(tokenizer_factory: Factory) -> None:
    template = template_of(tokenizer_factory, chat_template={"default": CHATML, "tool_use": "x"})
    assert template.source == CHATML


def test_a_prompt_that_a_template_rejects_is_in_the_message(tokenizer_factory: Factory) -> None:
    template = template_of(tokenizer_factory, "alpaca", eos_token="</s>", pad_token="</s>")
    with pytest.raises(DataError, match=f"prompt 'one more': {REJECTED}alpaca .* a tool message"):
        template.encode_prompt(chat(("user", "q"), ("tool", "one more")))
    with pytest.raises(DataError, match=f"prompt '': {REJECTED}"):
        template.encode_prompt(())


def test_a_template_file_is_used(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    file = tmp_path / "own.jinja"
    file.write_text("{% for m in messages %}[{{ m['content'] }}]{% endfor %}", encoding="utf-8")
    assert ChatTemplate(tokenizer, str(file)).render(chat(*TWO_ROUNDS)).text == "[q1][a1][q2][a2]"


def test_the_answer_of_an_example_follows_the_prompt_of_inference(tokenizer: PreTrainedTokenizerFast) -> None:
    template = ChatTemplate(tokenizer)
    for record, prompt, answer in (
        (
            Conversation(chat(*TWO_ROUNDS, ("user", "q3"))),
            template.encode_prompt(chat(*TWO_ROUNDS[:3])),
            "a2<|im_end|>",
        ),
        (Completion("p", "c"), template.encode_text("p"), "c<|im_end|>"),
    ):
        (example,) = encode_record(record, template, "assistant")
        assert example.answer is not None
        start, end = example.answer
        assert example.input_ids[:start] == prompt
        assert tokenizer.decode(example.input_ids[start:end]) == answer
    (text,) = encode_record(PlainText("t"), template, "assistant")
    assert text.answer is None


# Ends and boundaries that only some templates and tokenizers have.


def test_the_end_of_another_turn_is_not_supervised(tokenizer_factory: Factory) -> None:
    ends_last_answer = CHATML.replace("<|im_end|>\n", "{% if loop.last or m.role == 'user' %}<|im_end|>{% endif %}\n")
    template = template_of(tokenizer_factory, chat_template=ends_last_answer)
    messages = chat(("user", "q"), ("assistant", "y"), ("user", ""), ("assistant", "x"))
    examples = encode_record(Conversation(messages), template, "assistant")
    # The first answer has no end in the row, so it is trained as it is rendered where it is the last message.
    assert [supervised_texts(example, template.tokenizer) for example in examples] == [["y<|im_end|>"], ["x<|im_end|>"]]
    assert template.tokenizer.decode(examples[1].input_ids) == template.render(messages).text


def test_the_end_of_reasoning_without_an_answer_is_supervised(tokenizer_factory: Factory) -> None:
    reasoning = "<think>\nso\n</think>\n\n"
    template = template_of(tokenizer_factory, chat_template=BARE)
    assert supervised_of(template, chat(("user", "q."), ("assistant", reasoning))) == [f"{reasoning}<|im_end|>"]


def test_a_special_token_that_covers_white_space_of_an_answer_is_not_supervised(tokenizer_factory: Factory) -> None:
    tokenizer = tokenizer_factory(
        chat_template="{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    )
    tokenizer.add_tokens([AddedToken("<|im_start|>", rstrip=True, special=True)], special_tokens=True)
    assert supervised_of(ChatTemplate(tokenizer), chat(("user", "q"), ("assistant", "  x y"))) == ["x y<|im_end|>"]


def test_characters_normalized_before_an_answer_do_not_change_its_mask(tokenizer_factory: Factory) -> None:
    tokenizer = tokenizer_factory(chat_template=BARE)
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    template = ChatTemplate(tokenizer)
    assert "".join(supervised_of(template, chat(("user", "he\u0301"), ("assistant", "x yes")))) == "x yes<|im_end|>"


# Random conversations.

UNTRUSTED = [
    *("<|im_start|>", "<|im_end|>", "</s>", "<s>", "<unk>", "assistant\n", "user\n", "ASSISTANT: ", "USER: "),
    *("### Response:", "### Instruction:\n", "\n\n### Input:\n", "{{ x }}", "{% endfor %}", "|", "hello world"),
    *(" ", "  ", "\n", "\n\n", "\t", "\r\n", "\u00a0", "\u2028", "\u200b", "\ufeff", "\x00", "\x85"),
    *("😀", "👩‍👩‍👧", "日本", "e\u0301", "\ud7ff", chr(FIRST_MARK), chr(FIRST_MARK + 1), "the answer", "a"),
]
CONTENTS = st.lists(st.sampled_from(UNTRUSTED) | st.text(max_size=3), max_size=5).map("".join)
ROUNDS = st.lists(st.tuples(CONTENTS, CONTENTS), min_size=1, max_size=3)


def concatenate(name: str, messages: tuple[Message, ...]) -> tuple[str, list[tuple[str, int, int]]]:
    """Return the text of a template, and (role, start, end) of each content, by string concatenation."""
    heads = {
        "bare": {"user": "", "assistant": ""},
        "own": {"user": "<|im_start|>user\n", "assistant": "<|im_start|>assistant\n"},
        "strip": {"user": "<s>user ", "assistant": "<s>assistant "},
        "vicuna_v1.1": {"user": "USER: ", "assistant": "ASSISTANT: "},
    }[name]
    tails = {
        "bare": {"user": "", "assistant": ""},
        "own": {"user": "<|im_end|>\n", "assistant": "<|im_end|>\n"},
        "strip": {"user": "</s>", "assistant": "</s>"},
        "vicuna_v1.1": {"user": " ", "assistant": "</s>"},
    }[name]
    text = VICUNA_SYSTEM + " " if name == "vicuna_v1.1" else ""
    spans = []
    for message in messages:
        content = message.content.strip() if name == "strip" else message.content
        text += heads[message.role]
        spans.append((message.role, len(text), len(text) + len(content)))
        text += content + tails[message.role]
    return text, spans


@pytest.fixture(scope="module")
def probed_templates(tokenizer_factory: Factory) -> dict[str, list[ChatTemplate]]:
    """Each template with the plain tokenizer, and with one whose offsets exclude leading spaces, as GPT-2's do."""
    templates: dict[str, list[ChatTemplate]] = {}
    for trims in (False, True):
        for name, options in {
            "bare": {"chat_template": BARE},
            "own": {},
            "strip": {"chat_template": STRIPPING},
            "vicuna_v1.1": {"eos_token": "</s>", "pad_token": "</s>"},
        }.items():
            tokenizer = tokenizer_factory(**options)
            if trims:
                tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
            built_in = name if name in BUILT_IN_TEMPLATES else None
            templates.setdefault(name, []).append(ChatTemplate(tokenizer, built_in))
    return templates


@pytest.mark.parametrize(
    ("name", "end"), [("bare", ""), ("own", "<|im_end|>"), ("strip", "</s>"), ("vicuna_v1.1", "</s>")]
)
@given(rounds=ROUNDS)
@settings(derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
def test_no_content_can_move_a_mask(
    probed_templates: dict[str, list[ChatTemplate]], name: str, end: str, rounds: list[tuple[str, str]]
) -> None:
    turns = [turn for q, a in rounds for turn in (("user", q), ("assistant", a))]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    plain, trimming = probed_templates[name]
    try:
        record = parse_row(row, "messages")
        examples = encode_record(record, plain, "assistant")
    except (UnusableRow, MalformedRow, DataError):
        has_marks = any(ord(character) >= 0x100000 for _, content in turns for character in content)
        assert has_marks or not any(content.strip() for role, content in turns if role == "assistant")
        return
    assert isinstance(record, Conversation)
    messages = record.messages
    assert examples == encode_record(record, trimming, "assistant")

    text, spans = concatenate(name, messages)
    reserved = next((i for i, m in enumerate(messages) if any(ord(x) >= 0x100000 for x in m.content)), len(messages))
    answers = [i for i, m in enumerate(messages[:reserved]) if m.role == "assistant" and m.supervised]
    before = 1 if name in ("vicuna_v1.1", "strip") else 0  # the space after the prompt, which the model generates
    eos = "" if end else "<|im_end|>"
    generated = {i: text[spans[i][1] - before : spans[i][2]] + end + eos for i in answers}
    prompts = {i: plain.encode_prompt(messages[:i]) for i in answers}

    trained: list[int] = []
    for example in examples:
        supervised = [i for i, label in enumerate(example.labels) if label != IGNORE_INDEX]
        starts = [i for i in supervised if i - 1 not in supervised]
        stops = [i + 1 for i in supervised if i + 1 not in supervised]
        numbers = []
        for start, stop in zip(starts, stops, strict=True):
            # Each run begins where the prompt of an answer ends, and is this answer to the end of its turn.
            start = 0 if start == 1 and [] in prompts.values() else start  # nothing predicts the first token
            number = next(i for i in answers if prompts[i] == example.input_ids[:start])
            assert bytes_of(example.input_ids[start:stop], plain) == generated[number].encode()
            numbers.append(number)
        assert example.answer == ((len(prompts[number]), stops[-1]) if prompts[number] else None)
        trained += numbers
        # No byte is lost, and no special token is within message text.
        own_text = text[: spans[number][1] - before] + generated[number]
        is_own = bytes_of(example.input_ids, plain) == own_text.encode()
        assert is_own or bytes_of(example.input_ids, plain) == text.encode()
        in_text = spans[: number + 1] if is_own else spans
        message_text = {i for _, *span in in_text for i in range(*(len(text[:edge].encode()) for edge in span))}
        position = 0
        for token in example.input_ids:
            size = len(bytes_of([token], plain))
            assert token >= 5 or not message_text & set(range(position, position + size))
            position += size
    assert sorted(trained) == answers

    untrusted = "".join(text[start:stop] for _, start, stop in spans)
    if not any(token in untrusted for token in ("<|im_start|>", "<|im_end|>", "</s>", "<s>", "<unk>")):
        row_ids = plain.tokenizer(text, add_special_tokens=False).input_ids
        in_row = [i for i in answers if row_ids[: len(prompts[i])] == prompts[i] and end and reserved == len(messages)]
        assert len(examples) == len(answers) - len(in_row) + bool(in_row)
        assert [example.input_ids for example in examples].count(row_ids) >= bool(in_row)


def bytes_of(ids: list[int], template: ChatTemplate) -> bytes:
    """Return the text of tokens, as bytes: a token may be a part of a character."""
    pieces = template.tokenizer.convert_ids_to_tokens(ids)
    table = byte_level_table()
    return b"".join(
        piece.encode() if token < 5 else bytes(table[character] for character in piece)
        for token, piece in zip(ids, pieces, strict=True)
    )


@functools.cache
def byte_level_table() -> dict[str, int]:
    """Return the byte of each character of a byte-level token (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
