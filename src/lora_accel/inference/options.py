"""The sampling options of the commands that generate: one for each field of `GenerationSection`."""

from __future__ import annotations

import functools
import inspect
import re
import types
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Optional, get_args, get_type_hints

import typer
from pydantic import ValidationError

from lora_accel.config.schema import GenerationSection
from lora_accel.errors import ConfigError


def with_sampling(command: Callable[..., None]) -> Callable[..., None]:
    """Add the sampling options to a typer command, which gets those that are set as a mapping `sampling`."""
    options = {name: _option(name) for name in GenerationSection.model_fields}

    @functools.wraps(command)
    def wrapper(**values: Any) -> None:
        given = {name: value for name in options if (value := values.pop(name)) is not None}
        command(**values, sampling=given)

    hints = get_type_hints(command, include_extras=True)
    own = [
        parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY)
        for name, parameter in inspect.signature(command).parameters.items()
        if name != "sampling"
    ]
    signature = inspect.Signature([*own, *options.values()])
    wrapper.__signature__ = signature  # type: ignore[attr-defined]
    wrapper.__annotations__ = {name: parameter.annotation for name, parameter in signature.parameters.items()}
    return wrapper


def _option(name: str) -> inspect.Parameter:
    """Return the option of a field, with the field's type and description."""
    field = GenerationSection.model_fields[name]
    kinds = [kind for kind in get_args(field.annotation) if kind is not types.NoneType]
    kind: Any = kinds[0] if kinds else field.annotation
    option = typer.Option(_flag(name), help=field.description, rich_help_panel="Sampling")
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[Optional[kind], option],  # noqa: UP045
    )


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def parse_sampling(values: Mapping[str, Any]) -> GenerationSection:
    """Return the sampling options of a command.

    Raises:
        ConfigError: a value or a combination is not allowed. The message names the options.
    """
    try:
        return GenerationSection.model_validate(dict(values))
    except ValidationError as error:
        problems = []
        for detail in error.errors(include_url=False):
            if detail["loc"]:
                reason = re.sub("^Input should", "should", detail["msg"])
                problems.append(f"{_flag(str(detail['loc'][0]))}: {reason}, not {detail['input']!r}")
            else:
                names = "|".join(GenerationSection.model_fields)
                text = str(detail["ctx"]["error"])
                problems.append(re.sub(rf"\b({names})\b", lambda match: _flag(match[0]), text))
        raise ConfigError("\n".join(problems)) from None
