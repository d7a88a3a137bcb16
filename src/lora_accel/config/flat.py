"""The options of a config under their dotted names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the options of a config, or of its section `prefix`, by dotted name. An empty section is a value."""
    options: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict) and value:
            options |= flatten(value, f"{prefix}{key}.")
        else:
            options[f"{prefix}{key}"] = value
    return options
