"""The questions that `lora-accel init` asks on a terminal, and the files that it writes."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import yaml

from lora_accel.config.files import check_recipe_path, write_recipe
from lora_accel.config.schema import RunConfig
from lora_accel.config.yaml_limits import check_yaml
from lora_accel.errors import ConfigError
from lora_accel.json_text import parse_strictly
from lora_accel.paths import open_to_read
from lora_accel.saving.atomic import write_text
from lora_accel.setup.draft import EXAMPLE_COLUMNS, DraftRequest, check_first_row, draft, schema_path

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
MAX_SCHEMA_BYTES = 10_000_000


def is_terminal() -> bool:
    """Whether a user can be asked."""
    return sys.stdin.isatty() and sys.stdout.isatty()


def complete_request(
    *,
    model: str | None,
    data: str | None,
    columns: str | None,
    evaluation: str | None,
    four_bits: bool | None,
    output_dir: str,
    should_ask: bool,
) -> DraftRequest:
    """Return a request, with a question for each option that is missing.

    Raises:
        ConfigError: there are no rows to look at, and nobody to ask; or `columns` is not a mapping of names.
        DataError: asked for rows, the user named some that cannot be read: reported before the next question.
    """
    renamed = parse_columns(columns)
    if not should_ask and data is None:
        raise ConfigError("--data PATH is missing: the rows to train on (a file, a folder, or a dataset id on the Hub)")
    if should_ask:
        from typer import confirm, prompt

        data = data or prompt("Rows to train on (a file, a folder, or a dataset id on the Hub)")
        check_first_row(data, renamed)
        model = model or prompt("Base model (Hub id or folder)", default=DEFAULT_MODEL)
        if evaluation is None:
            evaluation = prompt("Rows to evaluate on (empty: hold some out)", default="", show_default=False) or None
        if four_bits is None:
            four_bits = confirm("Quantize the base to 4 bits (QLoRA)?", default=False)
    assert data is not None
    return DraftRequest(model or DEFAULT_MODEL, data, renamed, evaluation, bool(four_bits), output_dir)


def parse_columns(text: str | None) -> dict[str, str]:
    """Return the mapping that `--columns` gives as one line of YAML; None = no mapping.

    Raises:
        ConfigError: it is not a mapping of names to names.
    """
    try:
        check_yaml(text or "")
        columns: Any = {} if text is None else yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):
        columns = None
    if not isinstance(columns, dict) or not all(isinstance(name, str) for pair in columns.items() for name in pair):
        raise ConfigError(
            f"--columns: should be {{known name: name in the file}}, as '{EXAMPLE_COLUMNS}', not {text!r}"
        )
    return columns


def write_draft(file: Path, request: DraftRequest) -> list[tuple[str, str]]:
    """Write a drafted config, and the schema for editors beside it. Return a table that describes rows and model.

    Raises:
        UserError: the file exists or cannot be written, or see `draft`. Nothing was written.
    """
    check_recipe_path(file)
    schema = schema_path(file)
    if os.path.lexists(schema) and not _is_our_schema(schema):
        raise ConfigError(f"{schema} is not a schema of lora-accel; move it away, or choose another folder")
    text, description = draft(request)
    write_recipe(file, text.encode())
    write_text(schema, json.dumps(RunConfig.model_json_schema(), indent=2) + "\n")
    return description


def _is_our_schema(path: Path) -> bool:
    try:
        with open_to_read(path) as file:
            content = parse_strictly(file.read(MAX_SCHEMA_BYTES).decode())
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("title") == RunConfig.__name__
