"""What the docs name exists: files, sections, commands and their options, options of the run config, tests."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main

from lora_accel.cli import app
from lora_accel.config.peer_names import options
from lora_accel.config.schema import RunConfig
from tests.conftest import ROOT

PAGES = sorted([*(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])
FOLDERS = ("docs", "scripts", "recipes", "tests", "accelerate_configs", "src")
CREATED = ("recipes/mine.yaml",)
"""Files of the user in examples."""
FREE = ("model.add_tokens", "model.rope_scaling", "model.chat_template_kwargs", "adapter.velora_config", "data.train")
"""Options with keys of their own."""
FILE = re.compile(rf"(?<![\w./~-])(?:{'|'.join(FOLDERS)})/[\w./-]*\w")
OPTION = re.compile(rf"(?<![\w./])(?:{'|'.join(RunConfig.model_fields)})\.[a-z_]+(?:\.[a-z_]+)?(?![\w/(])")
LINK = re.compile(r"\]\(([^)#\s]*)(#[^)\s]*)?\)")
TEST = re.compile(r"`(?:tests/[\w/]+\.py::)?(test_\w+)`")


def code_of(text: str) -> Iterator[str]:
    """Yield the code blocks and the inline code of a page, without Python, whose variables look like options."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    yield from (code for language, code in blocks if language != "python")
    yield from re.findall(r"(?<!`)`([^`\n]+)`(?!`)", re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE))


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {"#" + re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@functools.cache
def known_tests() -> set[str]:
    """Return the names of all tests."""
    files = (ROOT / "tests").rglob("test_*.py")
    return {name for file in files for name in re.findall(r"^def (test_\w+)", file.read_text("utf-8"), re.MULTILINE)}


@functools.cache
def known_options() -> dict[str, set[str]]:
    """Return the options of each command."""
    commands = typer.main.get_group(app).commands
    return {
        name: {
            "--help",
            *(option for parameter in command.params for option in parameter.opts + parameter.secondary_opts),
        }
        for name, command in commands.items()
    }


def command_problems(code: str) -> Iterator[str]:
    """Yield what is wrong with each `lora-accel …` in a piece of code."""
    for line in re.findall(r"(?:^|[\s(])lora-accel ([a-z-]+[^\n|#]*)", code.replace("\\\n", " ")):
        name = line.split()[0]
        if name not in known_options():
            yield f"lora-accel {name}"
            continue
        given = re.findall(r"(?<![\w-])--[a-z0-9-]+", re.sub(r"'[^']*'", "", line))
        yield from (f"lora-accel {name} {option}" for option in given if option not in known_options()[name])


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_page_names_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    problems = [f"file {name}" for name in FILE.findall(text) if name not in CREATED and not (ROOT / name).exists()]
    for target, anchor in LINK.findall(text):
        file = page if not target else page.parent / target
        if "://" in target:
            continue
        if not file.exists():
            problems.append(f"link {target}")
        elif anchor and anchor not in anchors(file):
            problems.append(f"link {target}{anchor}")
    known = {".".join(option.split(".")[:depth]) for option in options() for depth in (1, 2, 3)}
    for code in code_of(text):
        problems += command_problems(code)
        for option in OPTION.findall(code):
            is_file = re.search(r"\.(safetensors|jsonl?|py|md|yaml|jinja|bin|txt)$", option)
            is_known = option in known or option.startswith(FREE)
            problems += [] if is_known or is_file else [f"option {option}"]
    problems += [f"test {name}" for name in TEST.findall(text) if name not in known_tests()]
    assert problems == []


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("lora-accel train --config FILE", []),
        ("lora-accel trein --config FILE", ["lora-accel trein"]),
        ("lora-accel merge A OUT --bass B  # --not-read", ["lora-accel merge --bass"]),
        ("lora-accel verify-resume --config F --launcher 'accelerate launch --config_file F'", []),
    ],
)
def test_wrong_commands_are_found(code: str, expected: list[str]) -> None:
    assert list(command_problems(code)) == expected


def test_the_table_of_packed_rows_is_that_of_the_families() -> None:
    from lora_accel.model.families import FAMILIES

    rows: dict[tuple[str, ...], list[str]] = {}
    for name, family in sorted(FAMILIES.items()):
        kind = "packed" if family.padded is None else f"padded: {family.padded}"
        if family.packed_from is not None:
            kind += f" from transformers {family.packed_from}"
        rows.setdefault((kind, "fused" if family.supports_fused_loss else "of transformers"), []).append(f"`{name}`")
    table = "".join(f"| {kind} | {loss} | {', '.join(names)} |\n" for (kind, loss), names in sorted(rows.items()))
    section = (ROOT / "docs" / "models.md").read_text(encoding="utf-8").split("## Packed rows")[1].split("\n## ")[0]
    assert table in section, f"replace it by:\n{table}"


def test_the_index_names_every_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    assert {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"} <= {
        link for link, _ in LINK.findall(index)
    }
