"""Untrusted patterns, templates and tokenizers are tried in a child process with limits on time and memory."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from lora_accel import sandbox
from lora_accel.config.schema import ModelSection
from lora_accel.data.records import Message
from lora_accel.data.template import ChatTemplate
from lora_accel.errors import ArtifactError, DataError, UserError
from lora_accel.model.tokenizer import load_tokenizer
from tests.conftest import CHATML

ROWS = [{"messages": [{"role": "user", "content": "hi"}]}]
TEMPLATES = {
    "endless loop": (
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "takes over 2 seconds",
    ),
    "doubled text": (
        "{% set n = namespace(s='x' * 1000) %}{% for a in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
        "takes over",
    ),
    "repeated text": ("{{ 'x' * 10**10 }}", "takes over 1024 MB of memory"),
    "text repeated in a branch": (
        "{% if messages|length > 100 %}{{ 'x' * 10**10 }}{% endif %}",  # computed when it is compiled
        "takes over 1024 MB of memory",
    ),
    "centered text": ("{{ 'x' | center(10**10) }}", "takes over 1024 MB of memory"),
    "long output": ("{{ 'x' * 10**7 }}", "writes far more than it reads"),
    "long source": ("{# " + "x" * 1_000_000 + " #}", "over 1,000,000 characters"),
}


def replace(text: str, other: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": text}, "content": other}


TOKENIZERS = {
    "growing normalizer": {"normalizer": {"type": "Sequence", "normalizers": [replace("a", "aa")] * 60}},
    "growing decoder": {"decoder": {"type": "Sequence", "decoders": [replace("a", "aa")] * 60}},
    "long prefix": {"normalizer": {"type": "Prepend", "prepend": "x" * 10**7}},
    "exponential pattern": {
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(.+)+$x"}, "behavior": "Isolated", "invert": False}
    },
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_template_that_takes_too_much_raises(
    tokenizer_factory: Callable[..., PreTrainedTokenizerFast], name: str
) -> None:
    source, problem = TEMPLATES[name]
    began = time.monotonic()
    with pytest.raises(DataError, match=rf"^the chat template.*{problem}"):
        ChatTemplate(tokenizer_factory(chat_template=source))
    assert time.monotonic() - began < 60  # 5 on an idle machine
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 4_000_000, "it was rendered in this process"


def test_template_that_takes_too_much_for_one_prompt_raises(
    tokenizer_factory: Callable[..., PreTrainedTokenizerFast],
) -> None:
    template = ChatTemplate(
        tokenizer_factory(
            chat_template=CHATML
            + "{% if messages[0].content == 'secret' %}{{ 'x' * (10 ** (9 + messages|length)) }}{% endif %}"
        )
    )
    assert template.encode_prompt([Message("user", "hello")])
    with pytest.raises(DataError, match=r"takes over 1024 MB of memory; set model\.chat_template"):
        template.encode_prompt([Message("user", "secret")])


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizer_that_takes_too_much_raises(tiny_model: Callable[..., Path], tmp_path: Path, name: str) -> None:
    shutil.copytree(tiny_model(), tmp_path / "base")
    file = tmp_path / "base" / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | TOKENIZERS[name]))
    began = time.monotonic()
    with pytest.raises(ArtifactError, match=r"tokenizer\.json: tokenizing text with it (takes|writes|crashes)"):
        load_tokenizer(ModelSection(name_or_path=str(tmp_path / "base")))
    assert time.monotonic() - began < 60


def test_too_large_tokenizer_is_not_read(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    shutil.copytree(tiny_model(), tmp_path / "base")
    with (tmp_path / "base" / "tokenizer.json").open("wb") as file:
        file.truncate(300_000_000)
    with pytest.raises(ArtifactError, match="over 200,000,000 bytes; is this a tokenizer"):
        load_tokenizer(ModelSection(name_or_path=str(tmp_path / "base")))


@pytest.mark.parametrize("text", ["", "[]", "{}", "[" * 100_000, '{"model": {"type": "BPE"}}', '{"version": 1e999}'])
def test_broken_tokenizer_is_one_message(tiny_model: Callable[..., Path], tmp_path: Path, text: str) -> None:
    shutil.copytree(tiny_model(), tmp_path / "base")
    (tmp_path / "base" / "tokenizer.json").write_text(text)
    with pytest.raises(UserError):
        load_tokenizer(ModelSection(name_or_path=str(tmp_path / "base")))


def test_patterns() -> None:
    names = [f"model.layers.{layer}.self_attn.{name}_proj" for layer in range(100) for name in "qkvo"]
    sandbox.check_patterns("config", [r".*\.(q|v)_proj", "layers"], names)
    sandbox.check_patterns("config", [], names)
    with pytest.raises(ArtifactError, match="config: '\\(' is not a valid pattern: missing"):
        sandbox.check_patterns("config", ["("], [])
    with pytest.raises(ArtifactError, match="takes over 2 seconds"):
        sandbox.check_patterns("config", ["(([a-z_.0-9])+)+!"], names)


def test_a_check_takes_milliseconds_and_survives_the_end_of_the_child() -> None:
    sandbox.check_template("template", "{{ messages }}", ROWS)
    began = time.monotonic()
    for number in range(20):
        sandbox.check_template("template", f"{{{{ messages }}}}{number}", ROWS)
    assert time.monotonic() - began < 5
    process = sandbox._CHILD._process
    assert process is not None
    process.kill()
    process.wait()
    sandbox.check_template("template", "{{ messages }} again", ROWS)
    assert sandbox._CHILD._process is not process


def test_child_imports_no_torch_and_ends_with_its_input() -> None:
    sandbox.check_template("template", "{{ messages }} once more", ROWS)
    process = sandbox._CHILD._process
    assert process is not None
    maps = Path(f"/proc/{process.pid}/maps").read_text()
    assert "libtorch" not in maps
    sandbox._CHILD.close()
    assert process.poll() == 0


@pytest.mark.launch
def test_forked_process_has_a_child_of_its_own() -> None:
    sandbox.check_template("template", "{{ messages }} here", ROWS)
    process = sandbox._CHILD._process
    assert process is not None
    pid = os.fork()
    if pid == 0:
        sandbox.check_template("template", "{{ messages }} there", ROWS)
        is_other = sandbox._CHILD._process is not process
        sandbox._CHILD.close()
        os._exit(0 if is_other else 1)
    assert os.waitpid(pid, 0)[1] == 0
    sandbox.check_template("template", "{{ messages }} and here", ROWS)
    assert isinstance(process, subprocess.Popen)
