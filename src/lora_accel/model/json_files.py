"""Reads the JSON files of a model folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_object(file: Path | None) -> dict[str, Any] | None:
    """Return the object in a JSON file; None if there is none.

    A file that cannot be read counts as none: transformers, which reads it too, reports why.
    """
    if file is None:
        return None
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
