"""The Dockerfile's commands name files, extras and scripts that exist. No builder runs in the tests."""

from __future__ import annotations

import fnmatch
import json
import re
from typing import Any

import pytest

from tests.conftest import ROOT

tomllib = pytest.importorskip("tomllib")  # since Python 3.11
INSTRUCTIONS = {"ARG", "FROM", "RUN", "WORKDIR", "COPY", "ENV", "USER", "ENTRYPOINT", "CMD"}


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    with (ROOT / "pyproject.toml").open("rb") as file:
        content: dict[str, Any] = tomllib.load(file)
    return content["project"]


def instructions() -> list[tuple[str, str]]:
    """Return the instructions of the Dockerfile, continued lines joined: (name, arguments)."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in lines]


def arguments_of(name: str) -> list[str]:
    return [arguments for instruction, arguments in instructions() if instruction == name]


def test_it_has_only_known_instructions_and_begins_with_a_base() -> None:
    names = [name for name, _ in instructions()]
    assert set(names) == INSTRUCTIONS
    assert names[:2] == ["ARG", "FROM"]
    assert arguments_of("FROM") == ["${BASE}"]


def test_copied_files_exist_and_are_not_ignored() -> None:
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {name for arguments in arguments_of("COPY") for name in arguments.split()[:-1]}
    assert copied == kept
    assert all((ROOT / name).exists() for name in copied)


def test_extras_constraints_and_python_are_those_of_the_project(project: dict[str, Any]) -> None:
    defaults = dict(argument.split("=", 1) for argument in arguments_of("ARG"))
    assert set(defaults["EXTRAS"].split(",")) <= project["optional-dependencies"].keys()
    (install,) = [run for run in arguments_of("RUN") if "pip install" in run]
    assert install.endswith('-c constraints.txt ".[${EXTRAS}]"')
    version = re.match(r"python:(\d+)\.(\d+)-", defaults["BASE"])
    assert version is not None
    oldest = re.search(r"(\d+)\.(\d+)", project["requires-python"])
    assert oldest is not None
    assert tuple(map(int, version.groups())) >= tuple(map(int, oldest.groups()))


def test_the_entry_point_is_a_script_of_the_project(project: dict[str, Any]) -> None:
    (entry,) = arguments_of("ENTRYPOINT")
    assert json.loads(entry)[0] in project["scripts"]


def test_the_license_file_of_the_project_is_copied(project: dict[str, Any]) -> None:
    """Without a file that pyproject.toml names, the installation in the image fails."""
    copied = [name for arguments in arguments_of("COPY") for name in arguments.split()[:-1]]
    assert project["readme"] in copied
    assert all(fnmatch.filter(copied, pattern) for pattern in project["license-files"])
