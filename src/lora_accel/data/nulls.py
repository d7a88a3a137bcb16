"""Remove the nulls that a table (parquet, Arrow, a Hub dataset) adds to the objects of its rows.

In a table all objects of a column have the same members. A member that only some rows have is null in the others: the
arguments `{"city": "Paris"}` become `{"city": "Paris", "days": null}`. Nothing distinguishes these nulls from nulls of
the author, so both are removed. The order of the members, which a table does not keep either, cannot be restored. An
author who needs one of the two stores arguments and tools as JSON text.
"""

from __future__ import annotations

from typing import Any

from lora_accel.data.records import Row

NULLS_LEFT_OUT = "null members that the table adds to tools or arguments are left out"
"""Note in the ledger."""
TOOL_KEYS = frozenset(("tools", "functions", "arguments"))


def drop_null_members(row: Row) -> tuple[Row, bool]:
    """Return a row of a table without the null members of its objects, at any depth.

    Columns that are null stay, and so do nulls in lists. A map, which pyarrow returns as a list of pairs, becomes an
    object with its nulls: a table adds none to it. (An empty map cannot be distinguished from an empty list.)

    Returns:
        The row, and whether a null was removed within tools or the arguments of a call (`NULLS_LEFT_OUT`).
    """
    cleaned = {key: _clean(value, key in TOOL_KEYS) for key, value in row.items()}
    return {key: value for key, (value, _) in cleaned.items()}, any(is_cut for _, is_cut in cleaned.values())


def _clean(value: Any, in_tools: bool) -> tuple[Any, bool]:
    if isinstance(value, dict):
        members = {key: _clean(v, in_tools or key in TOOL_KEYS) for key, v in value.items() if v is not None}
        is_cut = any(is_cut for _, is_cut in members.values()) or (in_tools and len(members) < len(value))
        return {key: member for key, (member, _) in members.items()}, is_cut
    if isinstance(value, list):
        first = next((item for item in value if item is not None), None)  # the items of a table's list have one type
        if isinstance(first, (dict, list, tuple)):
            items = [_clean(item, in_tools) for item in value]
            if isinstance(first, tuple) and None not in value:
                return {key: item for (key, item), _ in items}, any(is_cut for _, is_cut in items)
            return [item for item, _ in items], any(is_cut for _, is_cut in items)
    if isinstance(value, tuple):  # key and value of a map
        key, (item, is_cut) = value[0], _clean(value[1], in_tools or value[0] in TOOL_KEYS)
        return (key, item), is_cut
    return value, False
