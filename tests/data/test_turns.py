"""In which text an answer is trained: long rows, variables of the template, excluded characters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from lora_accel.config.schema import DataSection
from lora_accel.data import turns
from lora_accel.data.chat import Example, encode_record
from lora_accel.data.formats import parse_row
from lora_accel.data.overlong import apply_overlong
from lora_accel.data.records import Conversation, Message, UnusableRow
from lora_accel.data.template import ChatTemplate
from lora_accel.labels import IGNORE_INDEX
from tests.conftest import CHATML

Factory = Callable[..., PreTrainedTokenizerFast]

DEFAULT_SYSTEM = "{% if messages[0].role != 'system' %}<|im_start|>system\nhello<|im_end|>\n{% endif %}" + CHATML
NUMBERED = CHATML.replace("{{ m['content'] }}", "{{ loop.index }}. {{ m['content'] }}")
"""Renders a message differently after other messages: a row cannot be checked in parts."""


def conversation(size: int) -> Conversation:
    return Conversation(
        tuple(Message("assistant" if i % 2 else "user", f"message {i % 10} is one") for i in range(size))
    )


def supervised_texts(example: Example, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    runs: list[list[int]] = []
    for i, label in enumerate(example.labels):
        if label != IGNORE_INDEX:
            if example.labels[i - 1] == IGNORE_INDEX:
                runs.append([])
            runs[-1].append(label)
    return [str(tokenizer.decode(run)) for run in runs]


@pytest.mark.parametrize("source", [CHATML, DEFAULT_SYSTEM])
def test_a_long_row_is_encoded_as_if_every_prompt_were_rendered_in_full(
    tokenizer_factory: Factory, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    template = ChatTemplate(tokenizer_factory(chat_template=source))
    long = encode_record(conversation(200), template, "assistant")
    monkeypatch.setattr(turns, "LONG", 10**9)
    assert encode_record(conversation(200), template, "assistant") == long
    (example,) = long
    assert supervised_texts(example, template.tokenizer) == [
        f"message {i % 10} is one<|im_end|>" for i in range(1, 200, 2)
    ]


@pytest.mark.parametrize("source", [CHATML, DEFAULT_SYSTEM])
def test_the_text_rendered_for_a_row_grows_linearly(
    tokenizer_factory: Factory, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    template = ChatTemplate(tokenizer_factory(chat_template=source))
    num_messages = 0
    apply = ChatTemplate._apply

    def counting(self: ChatTemplate, values: Any, *args: Any, **options: Any) -> str:
        nonlocal num_messages
        num_messages += len(values)
        return apply(self, values, *args, **options)

    monkeypatch.setattr(ChatTemplate, "_apply", counting)
    counts = []
    for size in (1000, 2000):
        num_messages = 0
        (example,) = encode_record(conversation(size), template, "assistant")
        counts.append(num_messages)
        assert len(supervised_texts(example, template.tokenizer)) == size / 2
    assert counts[1] < 2.2 * counts[0]


def test_a_long_row_whose_template_counts_messages_is_still_encoded_right(tokenizer_factory: Factory) -> None:
    template = ChatTemplate(tokenizer_factory(chat_template=NUMBERED))
    row = conversation(80)
    examples = encode_record(row, template, "assistant")
    answers = [text for example in examples for text in supervised_texts(example, template.tokenizer)]
    assert sorted(answers) == sorted(f"{i + 1}. message {i % 10} is one<|im_end|>" for i in range(1, 80, 2))
    for example in examples:
        assert example.answer is not None
        start, _ = example.answer
        text = template.tokenizer.decode(example.input_ids[:start])
        assert text.endswith("<|im_start|>assistant\n")


THINKING = (
    CHATML.split("{% if add_generation_prompt")[0]
    + "{% if add_generation_prompt %}<|im_start|>assistant\n"
    + "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
ROW = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "world"}]}


def test_variables_of_the_config_and_of_the_row_are_used_in_training_and_inference(tokenizer_factory: Factory) -> None:
    tokenizer = tokenizer_factory(chat_template=THINKING)
    default, without = ChatTemplate(tokenizer), ChatTemplate(tokenizer, variables={"enable_thinking": False})
    user = (Message("user", "hello"),)
    prompts = [template.encode_prompt(user) for template in (default, without)]
    assert prompts[1][: len(prompts[0])] == prompts[0]
    assert tokenizer.decode(prompts[1]).endswith("<think>\n\n</think>\n\n")
    for template, variables, expected in (
        (default, None, prompts[0]),
        (without, None, prompts[1]),
        (default, {"enable_thinking": False}, prompts[1]),
        (without, {"enable_thinking": True}, prompts[0]),
    ):
        row = ROW if variables is None else ROW | {"chat_template_kwargs": variables}
        (example,) = encode_record(parse_row(row, "messages"), template, "assistant")
        assert example.answer is not None
        start, end = example.answer
        assert example.input_ids[:start] == expected == template.encode_prompt(user, None, variables)
        assert tokenizer.decode(example.input_ids[start:end]) == "world<|im_end|>"


def test_the_template_for_tools_is_used_where_tools_are(tokenizer_factory: Factory) -> None:
    tokenizer = tokenizer_factory()
    with_tools = "{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}" + CHATML
    tokenizer.chat_template = {"default": CHATML, "tool_use": with_tools}
    template = ChatTemplate(tokenizer)
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    for row, written in ((ROW, False), (ROW | {"tools": tools}, True)):
        (example,) = encode_record(parse_row(row, "messages"), template, "assistant")
        assert ("weather" in tokenizer.decode(example.input_ids)) == written
        assert supervised_texts(example, tokenizer) == ["world<|im_end|>"]
    user = (Message("user", "hello"),)
    assert "weather" in tokenizer.decode(template.encode_prompt(user, tools))


@pytest.mark.parametrize("content", ["one two three", "  one two three"])
def test_characters_that_a_row_excludes_are_not_supervised(tokenizer_factory: Factory, content: str) -> None:
    """With a template that strips the content, too: the characters are counted in the row's text."""
    tokenizer = tokenizer_factory(chat_template=CHATML.replace("m['content']", "m['content'] | trim"))
    start = content.index(" two")
    message = Message("assistant", content, unsupervised=((start, start + len(" two")),))
    record = Conversation((Message("user", "hello"), message))
    (example,) = encode_record(record, ChatTemplate(tokenizer), "assistant")
    assert supervised_texts(example, tokenizer) == ["one", " three<|im_end|>"]


def test_a_row_that_the_template_rejects_at_its_end_keeps_its_first_answer(tokenizer_factory: Factory) -> None:
    strict = "{% if messages | length > 3 %}{{ raise_exception('too many') }}{% endif %}" + CHATML
    template = ChatTemplate(tokenizer_factory(chat_template=strict))
    turns_ = conversation(4)
    (example,) = encode_record(turns_, template, "assistant")
    assert supervised_texts(example, template.tokenizer) == ["message 1 is one<|im_end|>"]
    assert any(
        note.startswith("an answer is left out: the chat template rejects it: too many") for note in example.notes
    )
    with pytest.raises(UnusableRow, match="too many"):
        encode_record(turns_, template, "last_assistant")


@pytest.mark.parametrize(
    "source", [CHATML, DEFAULT_SYSTEM, NUMBERED.replace("{{ loop.index }}", "{{ loop.revindex }}")]
)
def test_a_row_whose_last_answer_is_cut_off_is_not_scored_by_an_earlier_one(
    tokenizer_factory: Factory, source: str
) -> None:
    template = ChatTemplate(tokenizer_factory(chat_template=source))
    record = conversation(4)
    examples = encode_record(record, template, "assistant")
    longest = max(len(example.input_ids) for example in examples)
    options = DataSection.model_validate({"train": [{"path": "x"}], "max_length": longest - 3, "overlong": "truncate"})
    bucket, kept, num_cut = apply_overlong(record, examples, template, options)
    assert (bucket, num_cut) == ("truncated", 3)
    assert sum(example.num_supervised for example in kept) > 0
    assert [example.answer for example in kept] == [None] * len(kept)


CALLING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CALL = {"type": "function", "function": {"name": "one", "arguments": {"two": "three"}}}


@pytest.mark.parametrize(
    ("answer", "unsupervised"),
    [
        ({"content": "hello", "weight": 0}, "hello<|im_end|>"),
        (
            {"content": "", "weight": 0, "tool_calls": [CALL]},
            '{"name": "one", "arguments": {"two": "three"}}<|im_end|>',
        ),
        ({"content": ""}, "<|im_end|>"),
        ({"content": "one two", "train_detail": [{"begin_offset": 3, "end_offset": 6, "train": True}]}, "one"),
    ],
)
@pytest.mark.parametrize("last", ["world", "\n\nworld"])
def test_what_a_row_excludes_is_not_supervised_with_loss_on_all(
    tokenizer_factory: Factory, answer: dict[str, Any], unsupervised: str, last: str
) -> None:
    """Also where the last answer, and with it the row, is an example of its own."""
    template = ChatTemplate(tokenizer_factory(chat_template=CALLING))
    row = {
        "messages": [
            {"role": "user", "content": "the"},
            {"role": "assistant", **answer},
            {"role": "user", "content": "user"},
            {"role": "assistant", "content": last},
        ]
    }
    (example,) = encode_record(parse_row(row, "messages"), template, "all")
    excluded = [i for i in range(1, len(example.labels)) if example.labels[i] == IGNORE_INDEX]
    text = template.tokenizer.decode([example.input_ids[i] for i in excluded])
    if last == "world":
        assert text == unsupervised
    else:  # the text between the messages, too: where the turn ends in another rendering is not known
        assert unsupervised in text
        assert "world" not in text
        assert "the" not in text


def test_a_template_whose_prompt_names_another_role_is_not_trained_on(tokenizer_factory: Factory) -> None:
    other = CHATML.replace("<|im_start|>assistant\n{% endif", "<|im_start|>bot\n{% endif")
    template = ChatTemplate(tokenizer_factory(chat_template=other))
    with pytest.raises(UnusableRow, match="another text before answer 2 than its generation prompt"):
        encode_record(parse_row(ROW, "messages"), template, "assistant")


NEXT_PROMPT = "{{ '<|im_start|>system\none<|im_end|><|im_start|>assistant\n' }}"
CALLS_WITHOUT_END = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.tool_calls or [] %}{{ c.function | tojson }}"
    "{% else %}{{ m.content }}<|im_end|>{% endfor %}{% endfor %}" + NEXT_PROMPT
)
ROLES_AS_TOKENS = "{% for m in messages %}{{ '<s>' if m.role == 'user' else '</s>' }}{{ m.content }}{% endfor %}</s>"


@pytest.mark.parametrize(
    ("source", "message", "supervised"),
    [
        (CALLS_WITHOUT_END, Message("assistant", "hello"), "hello<|im_end|>"),
        (
            CALLS_WITHOUT_END,
            Message("assistant", "", tool_calls=(CALL,)),
            '{"name": "one", "arguments": {"two": "three"}}<|im_end|>',
        ),
        (ROLES_AS_TOKENS, Message("assistant", "hello"), "hello<|im_end|>"),
    ],
)
def test_a_prompt_that_a_template_writes_after_every_text_is_not_supervised(
    tokenizer_factory: Factory, source: str, message: Message, supervised: str
) -> None:
    """Where no token ends the turn, the end token of the tokenizer does."""
    template = ChatTemplate(tokenizer_factory(chat_template=source))
    (example,) = encode_record(Conversation((Message("user", "the"), message)), template, "assistant")
    assert supervised_texts(example, template.tokenizer) == [supervised]
