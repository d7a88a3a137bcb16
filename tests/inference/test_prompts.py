"""Prompts are passed as in training: with the chat template and its variables, or raw."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from lora_accel.config.schema import ModelSection
from lora_accel.data.records import Conversation, Message
from lora_accel.data.template import ChatTemplate
from lora_accel.errors import ConfigError
from lora_accel.inference import chat as chat_module
from lora_accel.inference.prompts import encode_prompts, read_prompts
from lora_accel.inference.templates import load_template
from tests.conftest import CHATML

TOOLS = [{"type": "function", "function": {"name": "weather"}}]


@pytest.mark.parametrize("raw", [None, True, False])
@pytest.mark.parametrize("is_raw", [True, False])
def test_a_prompt_is_raw_if_training_was_unless_the_caller_decides(
    tokenizer: PreTrainedTokenizerFast, is_raw: bool, raw: bool | None
) -> None:
    template = ChatTemplate(tokenizer)
    template.is_raw = is_raw
    (ids,) = encode_prompts(["hello"], template, None, raw)
    expected = template.encode_text("hello") if (is_raw if raw is None else raw) else None
    assert ids == (expected or template.encode_prompt((Message("user", "hello"),)))


@pytest.mark.parametrize(
    ("prompt", "system"),
    [
        ("hello", "Be brief."),
        (Conversation((Message("user", "a"), Message("assistant", "b"), Message("user", "c"))), None),
        (Conversation((Message("user", "a"),), tools=TOOLS), None),
    ],
)
def test_what_needs_a_template_cannot_be_raw(
    tokenizer: PreTrainedTokenizerFast, prompt: str | Conversation, system: str | None
) -> None:
    with pytest.raises(ConfigError, match=r"need the chat template, .*; pass one message, or --template"):
        encode_prompts([prompt], ChatTemplate(tokenizer), system, raw=True)


def test_a_system_message_of_chat_needs_a_template(
    tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_module, "load_candidates", lambda *_, **__: pytest.fail("a model was loaded first"))
    with pytest.raises(ConfigError, match="--system: needs the chat template"):
        chat_module.chat(merged=tiny_model(), system="Be brief.", raw=True)


def test_a_merged_model_takes_no_base(tiny_model: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match="--base, --merged: a merged model needs no base"):
        chat_module.chat(merged=tiny_model(), base=str(tiny_model()))


def test_variables_of_a_prompt_reach_the_template(tokenizer_factory: Any) -> None:
    template = ChatTemplate(tokenizer_factory(chat_template="{{ mood }} " + CHATML), variables={"mood": "hello"})
    prompts: list[str | Conversation] = [
        "one",
        Conversation((Message("user", "one"),), template_kwargs={"mood": "world"}),
    ]
    first, second = encode_prompts(prompts, template, None)
    assert template.tokenizer.decode(first).startswith("hello ")
    assert template.tokenizer.decode(second).startswith("world ")


@pytest.mark.parametrize("is_merged", [True, False])
@pytest.mark.parametrize(
    ("recorded", "is_raw"), [({"prompt_format": "raw"}, True), ({"prompt_format": "template"}, False), ({}, False)]
)
def test_an_adapter_remembers_how_it_was_prompted(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, recorded: dict[str, str], is_raw: bool, is_merged: bool
) -> None:
    tokenizer.save_pretrained(tmp_path)
    config = {"model": {"chat_template": None, "chat_template_kwargs": {"mood": "world"}}}
    provenance: dict[str, Any] = {"config": config, **recorded}
    (tmp_path / "provenance.json").write_text(json.dumps({"adapter": provenance} if is_merged else provenance))
    template = load_template(tmp_path, ModelSection(name_or_path=str(tmp_path)))
    assert template.is_raw == is_raw
    assert template.variables == {"mood": "world"}


def test_an_adapter_of_another_tool_is_prompted_with_the_template(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    tokenizer.save_pretrained(tmp_path)
    template = load_template(tmp_path, ModelSection(name_or_path=str(tmp_path)))
    assert not template.is_raw
    assert template.variables == {}


def test_keys_beside_a_prompt_are_used(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    others = {"system": "Be brief.", "tools": TOOLS, "chat_template_kwargs": {"mood": "world"}, "completion": "x"}
    file.write_text(json.dumps({"prompt": "hello", **others}) + "\n" + json.dumps({"prompt": "hello"}))
    first, second = read_prompts([], file)
    assert [(m.role, m.content) for m in first.messages] == [("system", "Be brief."), ("user", "hello")]
    assert first.tools == TOOLS
    assert first.template_kwargs == {"mood": "world"}
    assert second == Conversation((Message("user", "hello"),))
