"""Reads a RunConfig from YAML and dotted overrides, and writes it. Reports all problems at once, each with its line."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from lora_accel.config import peer_names
from lora_accel.config.schema import RunConfig
from lora_accel.config.yaml_limits import check_interpolations, check_yaml
from lora_accel.errors import ConfigError, did_you_mean, first_line
from lora_accel.paths import open_to_read, why_not_writable

MAX_CONFIG_BYTES = 1_000_000
MAX_OVERRIDES = 1000
MAX_KEY_DEPTH = 20
MAX_PROBLEMS = 50
"""Problems that a message lists."""


def read_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run config.

    Args:
        path: a YAML file. OmegaConf interpolation (`${output_dir}`, `${oc.env:HOME}`) is resolved.
        overrides: values of the form `training.max_steps=20` or `data.train=[{path: a.jsonl}]`.

    Raises:
        ConfigError: the file cannot be read, or a key or value is invalid. The message lists every problem with its
            key, and the line or the override that set it.
    """
    text = _read_text(Path(path))
    try:
        check_yaml(text)
        values = OmegaConf.create(text)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{path}{line}: not valid YAML: {error.problem or error}") from None
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, AssertionError) as error:
        raise ConfigError(f"{path}: {first_line(error) or 'expected keys and values (key: value)'}") from None
    if not OmegaConf.is_dict(values):
        raise ConfigError(f"{path}: expected keys and values (key: value), found a list")
    merged = _apply_overrides(values, overrides)

    locations = _KeyLocations(str(path), text, overrides)
    try:
        check_interpolations(OmegaConf.to_container(merged, resolve=False))
        return RunConfig.model_validate(OmegaConf.to_container(merged, resolve=True, throw_on_missing=True))
    except OmegaConfBaseException as error:
        keys = re.findall(r"[^.\[\]]+", error.full_key or "")
        location = locations.describe(tuple(int(key) if key.isdigit() else key for key in keys))
        if isinstance(error, MissingMandatoryValue):
            raise ConfigError(f"{location}: ??? marks a required value; set it") from None
        hint = "${section.key} refers to the value of that key; write \\${ for a literal ${"
        raise ConfigError(f"{location}: {first_line(error)}; {hint}") from None
    except ValidationError as error:
        raise ConfigError("\n".join(_problems(error, locations))) from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: {first_line(error)}") from None


def config_to_yaml(config: RunConfig) -> str:
    """Return the full config, defaults included, as YAML that `read_config` can read."""
    return yaml.safe_dump(_escape(config.model_dump()), sort_keys=False, allow_unicode=True)


def check_recipe_path(path: Path) -> None:
    """Check that `write_recipe` can write a file.

    Raises:
        ConfigError: the file already exists, or cannot be written.
    """
    if os.path.lexists(path):
        raise ConfigError(f"{path} already exists; pass another name, such as lora-accel init other.yaml")
    if reason := why_not_writable(path, "file"):
        raise ConfigError(reason)


def write_recipe(path: Path, content: bytes | None = None) -> None:
    """Write a commented run config to a new file.

    Args:
        content: the file; None = `my_rows.yaml`, the recipe for a user's own rows.

    Raises:
        ConfigError: the file already exists, or cannot be written.
    """
    check_recipe_path(path)
    recipe = resources.files("lora_accel.config") / "my_rows.yaml"
    try:
        with path.open("xb") as file:
            try:
                file.write(recipe.read_bytes() if content is None else content)
                file.flush()
            except OSError:
                path.unlink()  # or the same command would report that the file exists
                raise
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from None


def yaml_scalar(value: object) -> str:
    """Return a text, number or flat list in one line of YAML that `read_config` reads back equal, in `{key: …}` too."""
    text = yaml.safe_dump([_escape(value)], default_flow_style=True, width=10**9, allow_unicode=True)
    return text.removesuffix("\n")[1:-1]


def _escape(value: Any) -> Any:
    """Return values in which `${` is escaped, so that OmegaConf reads it as text."""
    if isinstance(value, dict):
        return {key: _escape(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_escape(item) for item in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def _read_text(path: Path) -> str:
    try:
        with open_to_read(path) as file:
            data = file.read(MAX_CONFIG_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; pass a run config with --config") from None
    except OSError as error:
        raise ConfigError(f"{shorten(str(path))!r}: cannot be read: {error.strerror}") from None
    if len(data) > MAX_CONFIG_BYTES:
        raise ConfigError(f"{path}: over {MAX_CONFIG_BYTES:,} bytes; is this a run config?")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: cannot be read: not UTF-8 at byte {error.start}; save it as UTF-8") from None


def _apply_overrides(values: Any, overrides: Sequence[str]) -> Any:
    if len(overrides) > MAX_OVERRIDES or sum(map(len, overrides)) > MAX_CONFIG_BYTES:
        raise ConfigError(
            f"{len(overrides):,} overrides of {sum(map(len, overrides)):,} characters: at most {MAX_OVERRIDES:,} of "
            f"{MAX_CONFIG_BYTES:,} characters are read; write them into the config file"
        )
    for override, following in zip(overrides, [*overrides, None][1:], strict=True):
        if override.startswith("-"):
            reason = peer_names.flag_hint(shorten(override), following)
            raise ConfigError(f"override {shorten(override)!r}: no such option; {reason}")
    for override in overrides:
        name = repr(shorten(override))
        if "=" not in override or override.startswith("="):
            raise ConfigError(f"override {name}: expected section.key=value")
        key, value = override.split("=", 1)
        if key.count(".") + key.count("[") > MAX_KEY_DEPTH:
            raise ConfigError(f"override {name}: no option is nested in over {MAX_KEY_DEPTH} sections")
        try:
            check_yaml(value)
            values = OmegaConf.merge(values, OmegaConf.from_dotlist([override]))
        except yaml.MarkedYAMLError as error:
            raise ConfigError(f"override {name}: not a YAML value: {error.problem}; quote it") from None
        except (yaml.YAMLError, OmegaConfBaseException, ValueError) as error:
            raise ConfigError(f"override {name}: {first_line(error)}") from None
        except TypeError:
            raise ConfigError(
                f"override {name}: list items cannot be set one by one; set the full list, as in "
                "data.train=[{path: FILE}]"
            ) from None
    return values


def shorten(text: str, width: int = 200) -> str:
    """Return a text of at most `width` characters: an ellipsis replaces the end of a longer one."""
    return text if len(text) <= width else f"{text[: width - 1]}…"


def _problems(error: ValidationError, locations: _KeyLocations) -> list[str]:
    problems = [
        f"{locations.describe(_key_path(detail))}: {line}"
        for detail in error.errors(include_url=False)[: MAX_PROBLEMS + 1]
        for line in _explain(detail).split("\n")
    ]
    if len(problems) > MAX_PROBLEMS:
        problems[MAX_PROBLEMS:] = [f"… and {error.error_count() - MAX_PROBLEMS:,} more"]
    return problems


def _key_path(detail: ErrorDetails) -> tuple[str | int, ...]:
    """Return the keys that lead to the invalid value, without the branch names that pydantic adds for unions."""
    keys: list[str | int] = []
    model: Any = RunConfig
    for key in detail["loc"]:
        if isinstance(key, int):
            keys.append(key)
            continue
        fields = getattr(model, "model_fields", None)
        if fields is None:
            break
        keys.append(key)
        model = _section_of(fields[key].annotation) if key in fields else None
    return tuple(keys)


def _section_of(annotation: Any) -> type[BaseModel] | None:
    """Return the section class of a field, or of the items of a list field; None for other fields."""
    for candidate in (annotation, *getattr(annotation, "__args__", ())):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _explain(detail: ErrorDetails) -> str:
    name = str(detail["loc"][-1]) if detail["loc"] else ""
    if detail["type"] == "extra_forbidden":
        model: Any = RunConfig
        for key in detail["loc"][:-1]:
            model = model if isinstance(key, int) else _section_of(model.model_fields[key].annotation)
        is_nested = any(isinstance(key, int) for key in detail["loc"])  # a source: it has options of its own
        known = None if is_nested else peer_names.hint(name, detail["input"])
        return f"unknown key; {known}" if known else f"unknown key{did_you_mean(name, model.model_fields)}"
    if detail["type"] == "missing":
        return "is missing; it has no default"
    if detail["type"] == "value_error":
        return str(detail["ctx"]["error"])
    if detail["type"] == "too_short":
        return f"should have at least {detail['ctx']['min_length']} item"
    value = detail["input"]
    shown = shorten(repr(value)) if not isinstance(value, (dict, list)) else f"a {type(value).__name__}"
    message = re.sub(r"^(Input|String) should", "should", detail["msg"])
    message = re.sub(r"valid dictionary( or instance of \w+)?", "section of keys", message)
    peer = peer_names.TEXTS.get(".".join(map(str, detail["loc"]))) if isinstance(value, str) else None
    return f"{message}, not {shown}" + (f"; set {peer_names.describe(peer, value)}" if peer else "")


class _KeyLocations:
    """Where each key was set: file and line, or the override."""

    def __init__(self, path: str, text: str, overrides: Sequence[str]) -> None:
        self._path = path
        self._locations: dict[tuple[str | int, ...], str] = {}
        self._walk((), yaml.compose(text, Loader=yaml.SafeLoader), None)
        for override in overrides:
            dotted, value = override.split("=", 1)
            node = yaml.compose(value, Loader=yaml.SafeLoader)
            self._walk(tuple(dotted.split(".")), node, f"override {shorten(override)!r}")

    def _walk(self, keys: tuple[str | int, ...], node: Any, override: str | None) -> None:
        if override:
            if not isinstance(node, yaml.MappingNode):  # a mapping is merged, any other value replaces the old one
                self._locations = {key: x for key, x in self._locations.items() if key[: len(keys)] != keys}
            self._locations[keys] = override
        items: list[tuple[str | int, Any, Any]] = []  # (key, the node with its line, the node with its value)
        if isinstance(node, yaml.MappingNode):
            items = [(str(key.value), key, value) for key, value in node.value]
        elif isinstance(node, yaml.SequenceNode):
            items = [(index, value, value) for index, value in enumerate(node.value)]
        for key, marked, value in items:
            child = (*keys, key)
            if not override:
                self._locations[child] = f"{self._path}, line {marked.start_mark.line + 1}"
            self._walk(child, value, override)

    def describe(self, keys: tuple[str | int, ...]) -> str:
        """Return `file, line 3: section.key`, or the override that set the key."""
        dotted = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys).lstrip(".")
        for length in range(len(keys), 0, -1):
            if keys[:length] in self._locations:
                return f"{self._locations[keys[:length]]}: {dotted}"
        return f"{self._path}: {dotted}" if dotted else self._path
