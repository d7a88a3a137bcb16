"""Limits on YAML: a short text can describe any number of values, or nest them until a parser crashes."""

from __future__ import annotations

import re
from typing import Any

import yaml

MAX_DEPTH = 40
MAX_VALUES = 10_000
"""Values in the text, those behind each alias included. OmegaConf has the same limit since 2.4."""
MAX_NUMBER_LENGTH = 400
"""Characters of a number. Converting a longer one takes quadratic time."""
MAX_EXPANDED_CHARACTERS = 10_000_000
"""Characters of all values after interpolation."""
MAX_INTERPOLATIONS = 50
"""Interpolations in one value. OmegaConf parses nested ones in quadratic time."""
MAX_COMPLEX = 10
"""Interpolations whose size is not computed: nested ones, and those with a resolver other than oc.env."""

START = re.compile(r"(?<!\\)\$\{")
NUMBER = re.compile(r"[-+]?[0-9a-fA-FxXob_.:]+")
INTERPOLATION = re.compile(r"\$\{\s*([\w.-]+)\s*\}")
ENVIRONMENT = re.compile(r"\$\{\s*oc\.env:[^${}]*\}")


def check_yaml(text: str) -> None:
    """Check the size of a YAML text, from the events of the parser: nothing is constructed.

    Raises:
        yaml.MarkedYAMLError: it is not valid YAML, or nested too deep, or has too many values.
    """
    sizes: dict[str, int] = {}
    open_nodes: list[tuple[str | None, int]] = []  # (anchor, number of values before it)
    total = 0
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise _error(event, f"the alias *{event.anchor} refers to a value that contains it, or to none")
            total += sizes[event.anchor]
        elif isinstance(event, yaml.ScalarEvent):
            total += 1
            if len(event.value) > MAX_NUMBER_LENGTH and event.implicit[0] and NUMBER.fullmatch(event.value):
                raise _error(event, f"a number of {len(event.value):,} characters; quote it if it is text")
            if len(START.findall(event.value)) > MAX_INTERPOLATIONS:
                raise _error(
                    event, f"over {MAX_INTERPOLATIONS} interpolations in one value; write \\${{ for a literal ${{"
                )
            if event.anchor:
                sizes[event.anchor] = 1
        elif isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((event.anchor, total))
            total += 1
            if len(open_nodes) > MAX_DEPTH:
                raise _error(event, f"lists and mappings are nested more than {MAX_DEPTH} deep")
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_nodes.pop()
            if anchor:
                sizes[anchor] = total - before
        if total > MAX_VALUES:
            raise _error(event, f"over {MAX_VALUES:,} values, aliases included; put data into a data file")


def _error(event: Any, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)


def check_interpolations(values: Any) -> None:
    """Check how long the values of a config become when OmegaConf's interpolations are resolved.

    Args:
        values: plain values, with interpolations as text.

    Raises:
        ValueError: too long. Interpolations that refer to each other are left to OmegaConf, which names the key.
    """
    sizes: dict[str, int] = {}
    num_complex = 0

    def size_of(value: Any, key: str) -> int:
        """Return the characters of a value. While it is computed it counts as 0."""
        nonlocal num_complex
        if key in sizes:
            return sizes[key]
        sizes[key], size = 0, 1
        if isinstance(value, dict):
            size += sum(size_of(item, f"{key}.{name}") for name, item in value.items())
        elif isinstance(value, list):
            size += sum(size_of(item, f"{key}.{index}") for index, item in enumerate(value))
        elif isinstance(value, str):
            names = INTERPOLATION.findall(value)
            num_complex += max(0, len(START.findall(value)) - len(names) - len(ENVIRONMENT.findall(value)))
            size += len(value) + sum(size_of(_select(values, name), f".{name}") for name in names)
        sizes[key] = size
        if size > MAX_EXPANDED_CHARACTERS or num_complex > MAX_COMPLEX:
            raise ValueError(
                f"{key.lstrip('.')[:100]}: has too many interpolations, or they are too long; write the values out"
            )
        return size

    size_of(values, "")


def _select(values: Any, name: str) -> Any:
    """Return the value of a dotted key; None if there is none."""
    for key in name.split("."):
        if isinstance(values, dict):
            values = values.get(key)
        elif isinstance(values, list) and key.isdecimal() and int(key) < len(values):
            values = values[int(key)]
        else:
            return None
    return values
