"""What a template makes of messages, and which tokens of it are learned."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, normalizers, processors
from transformers import PreTrainedTokenizerFast

from lora_accel.data.chat import BUILT_IN_TEMPLATES, ChatTemplate, Example, encode_record, question_of
from lora_accel.data.formats import Completion, Conversation, MalformedRow, Message, PlainText, UnusableRow, parse_row
from lora_accel.data.spans import FIRST_MARK, Span
from lora_accel.errors import DataError
from lora_accel.labels import IGNORE_INDEX
from tests.conftest import CHATML

Factory = Callable[..., PreTrainedTokenizerFast]

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


def with_begin_token(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Let a tokenizer put `<s>` before every text, as Llama's does."""
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    assert tokenizer("a").input_ids[0] == tokenizer.bos_token_id == 1
    return tokenizer


def learned(example: Example, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The texts of the runs of supervised tokens."""
    runs = []
    for supervised, run in itertools.groupby(range(len(example.labels)), lambda i: example.labels[i] != IGNORE_INDEX):
        if supervised:
            ids = [example.input_ids[i] for i in run]
            runs.append(tokenizer.decode(ids))
    assert all(label in (IGNORE_INDEX, token) for token, label in zip(example.input_ids, example.labels, strict=True))
    assert example.labels[0] == IGNORE_INDEX
    return runs


def learned_of(template: ChatTemplate, messages: tuple[Message, ...], loss_on: str = "assistant") -> list[str]:
    return learned(encode_record(Conversation(messages), template, loss_on), template.tokenizer)


# What the built-in templates write.


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
def test_built_in_templates_to_the_letter(
    tokenizer_factory: Factory, name: str, turns: tuple[tuple[str, str], ...], text: str
) -> None:
    template = template_of(tokenizer_factory, name, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    rendered = template.render(chat(*turns))
    assert rendered.text == text
    assert [text[span.start : span.end] for span in rendered.spans if span] == [content for _, content in turns]


def test_alpaca_with_an_input_has_its_own_words(tokenizer_factory: Factory) -> None:
    template = template_of(tokenizer_factory, "alpaca", eos_token="</s>", pad_token="</s>")
    record = parse_row({"instruction": "do", "input": "this", "output": "done"}, "alpaca")
    assert isinstance(record, Conversation)
    assert template.render(record.messages).text == (
        f"{ALPACA_SYSTEM_WITH_INPUT}\n\n### Instruction:\ndo\n\n### Input:\nthis\n\n### Response:done</s>"
    )


@pytest.mark.parametrize("name", BUILT_IN_TEMPLATES)
@pytest.mark.parametrize("system", [(), (("system", "Be."),)])
def test_the_prompt_is_what_training_saw_before_the_answer(
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
        # The prompts of vicuna and llama-2 end before a space that they leave to the model.
        assert template.prompt(messages[: end - 1]) == rendered.text[: span.start].rstrip(" ")


@pytest.mark.parametrize(
    ("name", "role"),
    [
        *((name, "tool") for name in ("vicuna_v1.1", "alpaca", "gemma", "llama-2", "zephyr")),
        *((name, "system") for name in ("alpaca", "gemma", "llama-2")),
    ],
)
def test_a_role_that_a_template_has_no_place_for_is_refused(tokenizer_factory: Factory, name: str, role: str) -> None:
    template = template_of(tokenizer_factory, name, eos_token="</s>", pad_token="</s>")
    with pytest.raises(UnusableRow, match=f"the chat template refuses it: {name} has no place for a {role} message"):
        template.render(chat(*TWO_ROUNDS, (role, "x")))


# What is learned.


@pytest.mark.parametrize(
    ("name", "options", "end"),
    [
        (None, {}, "<|im_end|>"),
        (None, {"pad_token": "<unk>"}, "<|im_end|>"),
        (None, {"eos_token": "</s>", "pad_token": "</s>"}, "<|im_end|>"),  # the turn's end is not the text's
        (None, {"chat_template": STRIPPING}, "</s>"),
        (None, {"chat_template": CHATML.replace("<|im_end|>", "\n <|im_end|>")}, "\n <|im_end|>"),
        ("chatml", {}, "<|im_end|>"),
        ("vicuna_v1.1", {"eos_token": "</s>", "pad_token": "</s>"}, "</s>"),
        ("vicuna_v1.1", {"eos_token": "</s>", "pad_token": "<unk>"}, "</s>"),
        ("alpaca", {"eos_token": "</s>", "pad_token": "</s>"}, "</s>"),
        ("llama-2", {"eos_token": "</s>", "pad_token": "</s>"}, " </s>"),
        ("zephyr", {"eos_token": "</s>", "pad_token": "</s>"}, "</s>"),
        ("llama-3", {}, "<|eot_id|>"),  # no special tokens of this tokenizer, yet the end of every turn
        ("gemma", {}, "<end_of_turn>"),
    ],
)
def test_answers_and_their_end_token_are_learned_and_nothing_else(
    tokenizer_factory: Factory, name: str | None, options: dict[str, Any], end: str
) -> None:
    template = template_of(tokenizer_factory, name, **options)
    messages = chat(("user", "hello"), ("assistant", "QX 1."), ("user", "QX 1."), ("assistant", "YZ"))
    assert template.end_of_turn == end
    # The prompts of vicuna and llama-2 end before a space, which the model has to write.
    space = " " if name in ("vicuna_v1.1", "llama-2") else ""
    assert learned_of(template, messages) == [f"{space}QX 1.{end}", f"{space}YZ{end}"]
    assert learned_of(template, messages, "last_assistant") == [f"{space}YZ{end}"]
    example = encode_record(Conversation(messages), template, "all")
    assert example.labels == [IGNORE_INDEX, *example.input_ids[1:]]


def test_a_template_that_ends_no_turn_teaches_the_words_alone(tokenizer_factory: Factory) -> None:
    template = template_of(tokenizer_factory, chat_template=PLAIN)
    assert template.end_of_turn == ""
    assert learned_of(template, chat(("user", "hello"), ("assistant", "QX"))) == ["QX"]


def test_a_token_that_the_answer_shares_with_the_template_is_learned_whole(tokenizer_factory: Factory) -> None:
    template = template_of(tokenizer_factory, "vicuna_v1.1", eos_token="</s>", pad_token="</s>")
    assert " answer" in [template.tokenizer.decode([i]) for i in template.tokenizer(": answer").input_ids]
    assert learned_of(template, chat(("user", "hello"), ("assistant", "answer"))) == [" answer</s>"]


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
        "hello",  # also the user's word
        "assistant",  # also the role's name
        "<|im_end|>",
        "<|im_start|>user\nhello<|im_end|>\n",
        "{{ messages }}{% if x %}",
        "</s>USER: hello ASSISTANT: hello</s>",
    ],
)
@pytest.mark.parametrize("template", [CHATML, STRIPPING])
def test_awkward_answers_are_learned_to_the_letter(tokenizer_factory: Factory, template: str, content: str) -> None:
    chosen = template_of(tokenizer_factory, chat_template=template)
    text = content.strip() if template == STRIPPING else content
    example = encode_record(Conversation(chat(("user", "hello"), ("assistant", content))), chosen, "assistant")
    # One run, except where an end token of the answer's own is a token like any other: it is learned, too.
    assert "".join(learned(example, chosen.tokenizer)) in (text + chosen.end_of_turn, " " + text + chosen.end_of_turn)


def test_an_answer_that_repeats_the_question_is_told_apart(tokenizer: PreTrainedTokenizerFast) -> None:
    template = ChatTemplate(tokenizer)
    messages = chat(("user", "echo"), ("assistant", "echo"), ("user", "echo"), ("assistant", "echo"))
    example = encode_record(Conversation(messages), template, "assistant")
    text = template.render(messages).text
    first = text.index("assistant\necho") + len("assistant\n")
    learned_tokens = [i for i, label in enumerate(example.labels) if label != IGNORE_INDEX]
    starts = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
    assert starts[learned_tokens[0]][0] == first
    assert learned(example, tokenizer) == ["echo<|im_end|>"] * 2


def test_an_empty_answer_between_others_teaches_its_end(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = chat(("user", "q"), ("assistant", ""), ("user", "q"), ("assistant", "QX"))
    assert learned_of(ChatTemplate(tokenizer), messages) == ["<|im_end|>", "QX<|im_end|>"]


def test_an_empty_answer_makes_no_neighbour_learned(tokenizer_factory: Factory) -> None:
    # " answer" is one token here, and the empty answer stands in the middle of it.
    template = template_of(tokenizer_factory, chat_template=BARE)
    messages = chat(("user", "hello ans"), ("assistant", ""), ("user", "wer. "), ("assistant", "QX"))
    assert " answer" in [template.tokenizer.decode([i]) for i in template.tokenizer("hello answer").input_ids]
    assert learned_of(template, messages) == ["QX"]


# Begin and end tokens.


@pytest.mark.parametrize("name", ["chatml", "vicuna_v1.1", "alpaca"])
@pytest.mark.parametrize("adds_bos", [False, True])
def test_a_built_in_template_begins_as_the_tokenizer_does_in_training_and_at_inference(
    tokenizer_factory: Factory, adds_bos: bool, name: str
) -> None:
    tokenizer = tokenizer_factory(bos_token="<s>", eos_token="</s>", pad_token="</s>")
    if adds_bos:
        with_begin_token(tokenizer)
    template = ChatTemplate(tokenizer, name)
    trained = encode_record(Conversation(chat(*TWO_ROUNDS)), template, "assistant")
    assert trained.input_ids.count(tokenizer.bos_token_id) == adds_bos
    assert (trained.input_ids[0] == tokenizer.bos_token_id) == adds_bos
    asked, _ = question_of(Conversation(chat(*TWO_ROUNDS)), template) or ([], "")
    assert trained.input_ids[: len(asked)] == asked


@pytest.mark.parametrize("adds_bos", [False, True])
def test_a_template_that_writes_the_begin_token_gets_it_once(tokenizer_factory: Factory, adds_bos: bool) -> None:
    tokenizer = tokenizer_factory(bos_token="<s>", chat_template=WITH_BOS)
    if adds_bos:
        with_begin_token(tokenizer)
    example = encode_record(Conversation(chat(*TWO_ROUNDS)), ChatTemplate(tokenizer), "assistant")
    assert example.input_ids.count(1) == 1
    assert example.input_ids[0] == 1
    assert learned(example, tokenizer) == ["a1<|im_end|>", "a2<|im_end|>"]


@pytest.mark.parametrize("record", [PlainText("hello world"), Completion("hello", " world")])
@pytest.mark.parametrize("adds_bos", [False, True])
def test_text_gets_the_begin_token_once_where_the_tokenizer_adds_it(
    tokenizer_factory: Factory, adds_bos: bool, record: PlainText | Completion
) -> None:
    tokenizer = tokenizer_factory(bos_token="<s>", eos_token="</s>", pad_token="</s>")
    if adds_bos:
        with_begin_token(tokenizer)
    for given_record in (record, type(record)("<s>" + record[0], *record[1:])):
        # A begin token in the text is text.
        example = encode_record(given_record, ChatTemplate(tokenizer), "assistant")
        assert example.input_ids.count(1) == adds_bos
        assert (example.input_ids[0] == 1) == adds_bos
        assert example.input_ids.count(2) == 1
        assert example.input_ids[-1] == example.labels[-1] == 2


def test_text_is_learned_whole_and_of_a_completion_what_follows_the_prompt(tokenizer: PreTrainedTokenizerFast) -> None:
    template = ChatTemplate(tokenizer)
    text = encode_record(PlainText("hello world"), template, "assistant")
    assert text.labels == [IGNORE_INDEX, *text.input_ids[1:]]
    assert tokenizer.decode(text.input_ids) == "hello world<|im_end|>"
    completion = encode_record(Completion("hello", " world"), template, "assistant")
    assert tokenizer.decode(completion.input_ids) == "hello world<|im_end|>"
    assert learned(completion, tokenizer) == [" world<|im_end|>"]
    everything = encode_record(Completion("hello", " world"), template, "all")
    assert everything.labels == [IGNORE_INDEX, *everything.input_ids[1:]]


# Templates that cannot be trusted.


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (CHATML.replace("m['content']", "m['content'] | upper"), "changes or repeats message 1"),
        (CHATML.replace("{{ m['content'] }}", "{{ m['content'] }}{{ m['content'] }}"), "changes or repeats message 1"),
        (CHATML.replace("m['content']", "m['content'][:2]"), "changes or repeats message 1"),
        (CHATML.replace("m['content']", "m['content'] | replace('q', 'Q')"), "changes or repeats message 1"),
        (CHATML.replace("m['content']", "m['content'] if m['role'] == 'assistant' else ''"), "leaves message 1 out"),
        ("{% for m in messages[:3] %}{{ m['content'] }}{% endfor %}", "leaves message 4 out"),
        ("{% for m in messages | reverse %}{{ m['content'] }}|{% endfor %}", None),
        ("{% for m in messages %}{{ m['content'] | length }}:{{ m['content'] }};{% endfor %}", "changes the text"),
        ("{{ messages[0].content | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}", "changes the text"),
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}{{ messages | string | length }}", "changes"),
        (CHATML + "{% if messages[0]['content'] == 'q1' %}!{% endif %}", "changes with the content"),
        ("always the same", "leaves message 1 out"),
        ("{{ raise_exception('no thanks') }}", "refuses it: no thanks"),
        ("{{ messages[9]['content'] }}", "refuses it: list object has no element 9"),
        ("{{ 1 / 0 }}", "refuses it: division by zero"),
        ("{{ 'x' + 1 }}", "refuses it: "),
        ("{{ messages[0].content.nothing() }}", "refuses it: "),
        ("{{ '%d' % 'x' }}", "refuses it: "),
        ("{{ 'x' | int(default=none) + messages }}", "refuses it: "),
    ],
)  # fmt: skip
def test_a_template_whose_places_cannot_be_proven_is_refused(
    tokenizer_factory: Factory, source: str, reason: str | None
) -> None:
    template = template_of(tokenizer_factory, chat_template=source)
    if reason is None:  # an odd order can be proven
        rendered = template.render(chat(*TWO_ROUNDS))
        assert rendered.text == "a2|q2|a1|q1|"
        assert rendered.spans == [Span(9, 11), Span(6, 8), Span(3, 5), Span(0, 2)]
        return
    with pytest.raises(UnusableRow, match=reason):
        template.render(chat(*TWO_ROUNDS))


def test_a_template_may_leave_the_system_message_out(tokenizer_factory: Factory) -> None:
    template = template_of(tokenizer_factory, chat_template=NO_SYSTEM)
    messages = chat(("system", "s"), *TWO_ROUNDS)
    assert template.render(messages).spans[0] is None
    assert learned_of(template, messages) == ["a1</s>", "a2</s>"]


def test_a_content_with_marks_of_ours_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UnusableRow, match="private use area"):
        ChatTemplate(tokenizer).render(chat(("user", "q"), ("assistant", chr(FIRST_MARK + 3))))


def test_a_tokenizer_without_a_template_asks_for_one(tokenizer_factory: Factory) -> None:
    template = template_of(tokenizer_factory, chat_template=None)
    encode_record(PlainText("text needs none"), template, "assistant")
    with pytest.raises(DataError, match=r"set model\.chat_template to one of alpaca, chatml, "):
        template.render(chat(*TWO_ROUNDS))


def test_of_several_templates_the_default_is_taken(tokenizer_factory: Factory) -> None:
    template = template_of(tokenizer_factory, chat_template={"default": CHATML, "tool_use": "x"})
    assert template.source == CHATML


def test_a_prompt_that_a_template_refuses_is_named(tokenizer_factory: Factory) -> None:
    template = template_of(tokenizer_factory, "alpaca", eos_token="</s>", pad_token="</s>")
    with pytest.raises(DataError, match="prompt 'one more': the chat template refuses it: alpaca has no place"):
        template.encode_prompt(chat(("user", "q"), ("tool", "one more")))
    with pytest.raises(DataError, match="prompt '': the chat template refuses it"):
        template.encode_prompt(())


def test_a_template_file_is_used(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    file = tmp_path / "own.jinja"
    file.write_text("{% for m in messages %}[{{ m['content'] }}]{% endfor %}", encoding="utf-8")
    assert ChatTemplate(tokenizer, str(file)).render(chat(*TWO_ROUNDS)).text == "[q1][a1][q2][a2]"


def test_the_question_of_a_record_is_what_stands_before_its_last_answer(tokenizer: PreTrainedTokenizerFast) -> None:
    template = ChatTemplate(tokenizer)
    prompt = tokenizer(template.prompt(chat(*TWO_ROUNDS[:3]))).input_ids
    assert question_of(Conversation(chat(*TWO_ROUNDS, ("user", "q3"))), template) == (prompt, "a2")
    assert question_of(Completion("p", "c"), template) == (tokenizer("p").input_ids, "c")
    assert question_of(PlainText("t"), template) is None


# Ends and borders that only some templates and tokenizers have.


def test_the_end_of_another_turn_is_not_an_answers(tokenizer_factory: Factory) -> None:
    ends_the_last = CHATML.replace("<|im_end|>\n", "{% if loop.last or m.role == 'user' %}<|im_end|>{% endif %}\n")
    template = template_of(tokenizer_factory, chat_template=ends_the_last)
    messages = chat(("user", "q"), ("assistant", ""), ("user", ""), ("assistant", "x"))
    assert learned_of(template, messages) == ["x<|im_end|>"]


def test_the_end_of_a_thought_that_no_answer_follows_is_learned(tokenizer_factory: Factory) -> None:
    thought = "<think>\nso\n</think>\n\n"
    template = template_of(tokenizer_factory, chat_template=BARE)
    assert "".join(learned_of(template, chat(("user", "q."), ("assistant", thought)))) == thought


def test_a_special_token_that_swallows_white_space_is_not_learned(tokenizer_factory: Factory) -> None:
    tokenizer = tokenizer_factory(
        chat_template="{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    )
    tokenizer.add_tokens([AddedToken("<|im_start|>", rstrip=True, special=True)], special_tokens=True)
    assert learned_of(ChatTemplate(tokenizer), chat(("user", "q"), ("assistant", "  x y"))) == ["x y<|im_end|>"]


def test_normalised_letters_before_an_answer_take_nothing_of_it(tokenizer_factory: Factory) -> None:
    tokenizer = tokenizer_factory(chat_template=BARE)
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    template = ChatTemplate(tokenizer)
    assert "".join(learned_of(template, chat(("user", "he\u0301"), ("assistant", "x yes")))) == "x yes"


# Any conversation at all.

HOSTILE = [
    *("<|im_start|>", "<|im_end|>", "</s>", "<s>", "<unk>", "assistant\n", "user\n", "ASSISTANT: ", "USER: "),
    *("### Response:", "### Instruction:\n", "\n\n### Input:\n", "{{ x }}", "{% endfor %}", "|", "hello world"),
    *(" ", "  ", "\n", "\n\n", "\t", "\r\n", "\u00a0", "\u2028", "\u200b", "\ufeff", "\x00", "\x85"),
    *("😀", "👩‍👩‍👧", "日本", "e\u0301", "\ud7ff", chr(FIRST_MARK), chr(FIRST_MARK + 1), "the answer", "a"),
]
CONTENTS = st.lists(st.sampled_from(HOSTILE) | st.text(max_size=3), max_size=5).map("".join)
ROUNDS = st.lists(st.tuples(CONTENTS, CONTENTS), min_size=1, max_size=3)


def written_by_hand(name: str, messages: tuple[Message, ...]) -> tuple[str, list[tuple[str, int, int]]]:
    """The text of a template, and (role, start, end) of each content, by plain concatenation."""
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
    places = []
    for message in messages:
        content = message.content.strip() if name == "strip" else message.content
        text += heads[message.role]
        places.append((message.role, len(text), len(text) + len(content)))
        text += content + tails[message.role]
    return text, places


@pytest.fixture(scope="module")
def hostile_templates(tokenizer_factory: Factory) -> dict[str, list[ChatTemplate]]:
    """Each template on the plain tokenizer, and on one whose offsets leave leading spaces out, as GPT-2's do."""
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
    hostile_templates: dict[str, list[ChatTemplate]], name: str, end: str, rounds: list[tuple[str, str]]
) -> None:
    turns = [turn for q, a in rounds for turn in (("user", q), ("assistant", a))]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    plain, trimming = hostile_templates[name]
    try:
        record = parse_row(row, "messages")
        example = encode_record(record, plain, "assistant")
    except (UnusableRow, MalformedRow, DataError):
        marks = any(ord(character) >= 0x100000 for _, content in turns for character in content)
        assert marks or not any(content.strip() for role, content in turns if role == "assistant")
        return
    assert isinstance(record, Conversation)
    assert example == encode_record(record, trimming, "assistant")

    text, places = written_by_hand(name, record.messages)
    data = "".join(text[start:stop] for _, start, stop in places)
    specials = [token for token in ("<|im_start|>", "<|im_end|>", "</s>", "<s>", "<unk>") if token in data]
    if not specials:
        assert example.input_ids == plain.tokenizer(text, add_special_tokens=False).input_ids

    # Each token's place, by its bytes: nothing is lost, and no special token stands within anybody's words.
    letters = bytes_of_letters()
    before = 1 if name == "vicuna_v1.1" else 0  # the space that its prompt leaves to the model
    wanted = {i for role, a, b in places if role == "assistant" for i in range(a - before, b + len(end))}
    others = {i for role, start, stop in places if role != "assistant" for i in range(start, stop)}
    words = {i for _, start, stop in places for i in range(start, stop)}
    character = [i for i, letter in enumerate(text) for _ in letter.encode()]
    place = 0
    for i, token in enumerate(example.input_ids):
        special = token < 5
        piece = plain.tokenizer.convert_ids_to_tokens(token)
        size = len(piece.encode()) if special else len(piece)
        told = piece.encode() if special else bytes(letters[letter] for letter in piece)
        assert text.encode()[place : place + size] == told
        covered = set(character[place : place + size])
        assert not (special and covered & words)
        supervised = example.labels[i] != IGNORE_INDEX
        assert supervised == (i > 0 and bool(covered & wanted) and not covered & others)
        place += size
    assert place == len(text.encode())


def bytes_of_letters() -> dict[str, int]:
    """What byte each letter of a byte-level token stands for (GPT-2's table)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + i): byte for i, byte in enumerate(hidden)}
