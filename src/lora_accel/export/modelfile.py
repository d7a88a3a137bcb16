"""The Modelfile with which Ollama loads a GGUF file: the chat template in Go's syntax, and the stop words.

The Go template is derived from the texts that the chat template writes around the messages of a few conversations. It
is written only if these texts give what the chat template gives, for all of them.
https://docs.ollama.com/modelfile, https://docs.ollama.com/template
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from typing import NamedTuple

from lora_accel.data.records import Conversation, Message, UnusableRow
from lora_accel.data.template import ChatTemplate
from lora_accel.export.gguf_tokenizer import adds_bos

MODELFILE = "Modelfile"
BASE_FILE = "base.gguf"
"""The base's file in the Modelfile of an adapter."""
SYSTEM = Message("system", "the system text")
ROUNDS = (
    *(Message("user", "question one"), Message("assistant", "answer one"), Message("user", "another")),
    *(Message("assistant", "a last answer"), Message("user", "the end")),
)
UNKNOWN = """\
# No TEMPLATE: the chat template does more than write texts around messages, which is not translated here. Ollama
# then uses the template in the GGUF file if it knows it; `ollama show --template NAME` shows the one in use.
"""
BASE_NOTE = f"""\
# The base as a GGUF file; write it with `lora-accel export BASE OUT --format gguf`, and name it here:
FROM ./{BASE_FILE}
"""


class Turns(NamedTuple):
    """The texts that a chat template writes around messages."""

    preamble: str
    """At the start, if there is no system message."""
    system_start: str | None
    """None = the template takes no system message."""
    system_end: str
    is_in_question: bool
    """Whether the system message is inside the first question: system_start and system_end include its start."""
    question_start: str
    question_end: str
    answer_start: str
    answer_end: str
    prompt: str
    """After the last question: the answer is generated after it."""

    def render(self, messages: Sequence[Message]) -> str:
        """Return the text of a conversation that ends with a question."""
        text = self.preamble
        is_open = False
        for message in messages:
            if message.role == "system":
                text, is_open = f"{self.system_start}{message.content}{self.system_end}", self.is_in_question
            elif message.role == "user":
                text += ("" if is_open else self.question_start) + message.content + self.question_end
                is_open = False
            else:
                text += self.answer_start + message.content + self.answer_end
        return text + self.prompt

    def to_go(self) -> str:
        """Return the template for Ollama: `.System` is the system text, `.Messages` are all messages."""
        start, question = self.preamble, self.question_start
        if self.system_start is not None:
            otherwise = "{{ else }}" + start if start else ""
            start = "{{ if .System }}" + self.system_start + "{{ .System }}" + self.system_end + otherwise + "{{ end }}"
        if self.is_in_question:
            start = "{{ $open := .System }}" + start
            question = '{{ if $open }}{{ $open = "" }}{{ else }}' + question + "{{ end }}"
        user = '{{ if eq .Role "user" }}' + question + "{{ .Content }}" + self.question_end
        answer = '{{ else if eq .Role "assistant" }}' + self.answer_start + "{{ .Content }}" + self.answer_end
        return start + "{{ range .Messages }}" + user + answer + "{{ end }}{{ end }}" + self.prompt


def modelfile(template: ChatTemplate | None, file: str, *, is_adapter: bool = False, is_raw: bool = False) -> str:
    """Return the Modelfile of a GGUF file.

    Args:
        template: None = the folder has no tokenizer; Ollama then uses the template in the base's file.
        file: the name of the GGUF file beside it.
        is_adapter: whether it holds a LoRA adapter.
        is_raw: whether the model was trained on prompts without a chat template.
    """
    lines = f"{BASE_NOTE}ADAPTER ./{file}\n" if is_adapter else f"FROM ./{file}\n"
    if is_raw:
        lines += "# Trained without a chat template: the prompt is passed as it is.\nTEMPLATE {{ .Prompt }}\n"
    elif template is not None and template.source:
        turns = find_turns(template)
        lines += UNKNOWN if turns is None else f'TEMPLATE """{turns.to_go()}"""\n'
    for token in sorted(template.end_tokens if template is not None else ()):
        lines += f"PARAMETER stop {json.dumps(token, ensure_ascii=False)}\n"
    return lines


def find_turns(template: ChatTemplate) -> Turns | None:
    """Return the texts that a chat template writes around messages; None if it does more than that.

    Ollama writes the BOS token if the tokenizer does, so it is left out then.
    """
    try:
        turns = _parse(template)
    except ValueError:  # a message is not in the text as it is
        return None
    if turns is None or any('"""' in text or "{{" in text for text in turns if isinstance(text, str)):
        return None
    systems = [()] if turns.system_start is None else [(), (SYSTEM,)]
    for conversation in [(*system, *ROUNDS[:size]) for system in systems for size in (1, 3, 5)]:
        if _prompt(template, conversation) != turns.render(conversation):
            return None
    return turns


def _parse(template: ChatTemplate) -> Turns | None:
    """Return the texts around the messages of short conversations, not verified."""
    one, two, with_system = (_prompt(template, x) for x in (ROUNDS[:1], ROUNDS[:3], (SYSTEM, ROUNDS[0])))
    if one is None or two is None:
        return None
    head, tail = one.split(ROUNDS[0].content)
    _, middle, rest = _split(two, ROUNDS[:2])
    between, _ = rest.split(ROUNDS[2].content)
    end = template.end_of_turn if between.startswith(template.end_of_turn) else ""
    question_start = _common_end(between[len(end) :], head).lstrip("\n ")
    answer_end = between[: len(between) - len(question_start)]
    common = _common_start(tail, middle)
    question_end = answer_end if answer_end and common.startswith(answer_end) else _leading_space(common)
    system_start, system_end, is_in_question = None, "", False
    if with_system is not None and SYSTEM.content in with_system:
        system_start, system_end, _ = _split(with_system, (SYSTEM, ROUNDS[0]))
        is_in_question = not system_end.endswith(question_start)
        system_end = system_end if is_in_question else system_end[: len(system_end) - len(question_start)]
    return Turns(
        *(head[: len(head) - len(question_start)], system_start, system_end, is_in_question),
        *(question_start, question_end, middle[len(question_end) :], answer_end, tail[len(question_end) :]),
    )


def _prompt(template: ChatTemplate, messages: Sequence[Message]) -> str | None:
    """Return the prompt of a conversation, without BOS if the tokenizer writes it; None = the template rejects it."""
    try:
        text = template.prompt(Conversation(tuple(messages), None))
    except UnusableRow:
        return None
    return text.removeprefix(template.tokenizer.bos_token) if adds_bos(template.tokenizer) else text


def _split(text: str, messages: Sequence[Message]) -> list[str]:
    """Return the texts around two messages.

    Raises:
        ValueError: a message is missing, or written twice.
    """
    before, rest = text.split(messages[0].content)
    return [before, *rest.split(messages[1].content)]


def _common_start(first: str, second: str) -> str:
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))
    return "".join(character for character, _ in same)


def _common_end(first: str, second: str) -> str:
    return _common_start(first[::-1], second[::-1])[::-1]


def _leading_space(text: str) -> str:
    return text[: len(text) - len(text.lstrip())]
