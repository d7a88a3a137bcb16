"""JSON, parsed strictly: what would lose data is an error."""

from __future__ import annotations

import collections
import json
from typing import Any


def parse_strictly(text: str, *, allow_nan: bool = True) -> Any:
    """Parse JSON text.

    Args:
        allow_nan: accept NaN and Infinity, which pandas writes for missing numbers.

    Raises:
        json.JSONDecodeError: it is not JSON.
        ValueError: a key appears twice in one object, it contains an unpaired surrogate, or it is nested too deeply.
            The message is the reason, without the location.
    """
    try:
        value = json.loads(text, object_pairs_hook=unique_keys, parse_constant=None if allow_nan else _reject_constant)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("contains an unpaired surrogate, which is not a character; remove it") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return value


def first_duplicate(names: list[str]) -> str:
    """Return the first of several names that occurs again."""
    counts = collections.Counter(names)
    return next(name for name in names if counts[name] > 1)


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the members of a JSON object; for `object_pairs_hook` of `json.loads`.

    Raises:
        ValueError: a key appears twice.
    """
    members = dict(pairs)
    if len(members) < len(pairs):
        raise ValueError(f"key {first_duplicate([key for key, _ in pairs])!r} appears twice in one object; keep one")
    return members


def _reject_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
