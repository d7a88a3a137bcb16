"""Ollama's Modelfile: the Go template gives the text of the chat template, or is not written."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from lora_accel.data.records import Conversation, Message
from lora_accel.data.template import BUILT_IN_TEMPLATES, ChatTemplate
from lora_accel.export.modelfile import UNKNOWN, find_turns, modelfile
from tests.conftest import CHATML

WITH_DEFAULT = CHATML.replace(
    "{% for m in messages %}",
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system\nBe kind<|im_end|>\n"
    "{% endif %}",
)
SYSTEM_IN_QUESTION = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set first = '' %}{% endif %}{% for m in messages %}"
    "<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ first if loop.first else '' }}"
    "{{ m['content'] | trim }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
COUNTING = "{% for m in messages %}{{ loop.index }} {{ m['content'] }}<|im_end|>{% endfor %}"
OTHERS = {"default system": WITH_DEFAULT, "system in question": SYSTEM_IN_QUESTION}
MESSAGES = [Message(*x) for x in (("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "4 "))]
MESSAGES += [Message("user", "last")]


def run_go(template: str, messages: Sequence[Message]) -> str:
    """Run the subset of Go's templates that is written, as Ollama calls it."""
    system = "\n\n".join(message.content for message in messages if message.role == "system")
    tokens = re.split(r"(\{\{.*?\}\})", template)
    variables: dict[str, str] = {}

    def run(position: int, dot: Message | None, is_active: bool) -> tuple[str, int, str]:
        """Return the output up to `else` or `end`, where it is, and that action."""
        output = ""
        while position < len(tokens):
            token = tokens[position]
            action = token[2:-2].strip() if token.startswith("{{") else None
            if action is None:
                output += token if is_active else ""
            elif action == "end" or action.startswith("else"):
                return output, position, action
            elif action.startswith("range"):
                start, end = position + 1, run(position + 1, None, False)[1]
                output += "".join(run(start, message, True)[0] for message in messages) if is_active else ""
                position = end
            elif action.startswith("if"):
                text, position = branch(position, action, dot, is_active)
                output += text
            elif is_active:
                output += value(action, dot)
            position += 1
        return output, position, ""

    def branch(position: int, action: str, dot: Message | None, is_active: bool) -> tuple[str, int]:
        output, is_done = "", False
        while True:
            is_taken = is_active and not is_done and condition(action.removeprefix("else").strip(), dot)
            text, position, action = run(position + 1, dot, is_taken)
            output, is_done = output + text, is_done or is_taken
            if action == "end":
                return output, position

    def condition(action: str, dot: Message | None) -> bool:
        what = action.removeprefix("if").strip()
        if role := re.fullmatch(r'eq \.Role "(\w+)"', what):
            return dot is not None and dot.role == role[1]
        return bool(what == "" or value(what, dot))

    def value(action: str, dot: Message | None) -> str:
        if assignment := re.fullmatch(r"(\$\w+) :?= (.*)", action):
            variables[assignment[1]] = value(assignment[2], dot)
            return ""
        return {".System": system, '""': "", ".Content": dot.content if dot else "", **variables}[action]

    return run(0, None, True)[0]


def make_template(tokenizer_factory: Callable[..., PreTrainedTokenizerFast], name: str, **options: Any) -> ChatTemplate:
    options = {"bos_token": "<s>", "chat_template": OTHERS.get(name, name)} | options
    tokenizer = tokenizer_factory(**options)
    return ChatTemplate(tokenizer, name if name in BUILT_IN_TEMPLATES else None)


@pytest.mark.parametrize("name", [*BUILT_IN_TEMPLATES, *OTHERS])
def test_the_go_template_gives_the_text_of_the_chat_template(
    tokenizer_factory: Callable[..., PreTrainedTokenizerFast], name: str
) -> None:
    template = make_template(tokenizer_factory, name)
    written = re.search(r'TEMPLATE """(.*?)"""', modelfile(template, "x.gguf"), re.DOTALL)
    assert written is not None
    systems: list[list[Message]] = [[]] if name == "gemma" else [[], [Message("system", "short")]]
    for system in systems:
        for size in (1, 3, 5):
            messages = [*system, *MESSAGES[:size]]
            expected = template.prompt(Conversation(tuple(messages), None))
            if name == "llama-2" or name == "system in question" or name == "gemma" or name == "llama-3":
                messages = [message._replace(content=message.content.strip()) for message in messages]
            assert run_go(written[1], messages) == expected


def test_the_modelfile_of_chatml_is_what_ollama_documents(
    tokenizer_factory: Callable[..., PreTrainedTokenizerFast],
) -> None:
    assert modelfile(make_template(tokenizer_factory, "chatml"), "model-f16.gguf") == (
        "FROM ./model-f16.gguf\n"
        'TEMPLATE """{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n{{ end }}'
        '{{ range .Messages }}{{ if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "assistant" }}<|im_start|>assistant\n{{ .Content }}<|im_end|>\n{{ end }}{{ end }}'
        '<|im_start|>assistant\n"""\n'
        'PARAMETER stop "<|im_end|>"\n'
    )


def test_a_bos_that_the_tokenizer_writes_is_left_to_ollama(
    tokenizer_factory: Callable[..., PreTrainedTokenizerFast],
) -> None:
    from tokenizers.processors import TemplateProcessing

    template = make_template(tokenizer_factory, "system in question")
    assert modelfile(template, "x.gguf").count("<s>") == 2, "the tokenizer does not write it"
    processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    template.tokenizer.backend_tokenizer.post_processor = processor
    assert "<s>" not in modelfile(template, "x.gguf")


@pytest.mark.parametrize("source", [COUNTING, CHATML.replace("<|im_end|>", '"""<|im_end|>')])
def test_another_template_is_not_translated(
    tokenizer_factory: Callable[..., PreTrainedTokenizerFast], source: str
) -> None:
    template = make_template(tokenizer_factory, source)
    assert find_turns(template) is None
    text = modelfile(template, "x.gguf")
    assert UNKNOWN in text
    assert "\nTEMPLATE " not in text


def test_an_adapter_names_its_base_and_a_raw_model_has_no_template(
    tokenizer_factory: Callable[..., PreTrainedTokenizerFast],
) -> None:
    template = make_template(tokenizer_factory, "chatml")
    text = modelfile(template, "adapter-f32.gguf", is_adapter=True, is_raw=True)
    assert "FROM ./base.gguf\nADAPTER ./adapter-f32.gguf\n" in text
    assert "\nTEMPLATE {{ .Prompt }}\n" in text
    assert modelfile(None, "a.gguf", is_adapter=True).endswith("ADAPTER ./a.gguf\n")
