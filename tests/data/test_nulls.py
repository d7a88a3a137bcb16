"""Rows of tables mean what their author wrote: the nulls that a table adds are removed."""

from __future__ import annotations

import io
import json
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from lora_accel.data.formats import parse_row
from lora_accel.data.nulls import drop_null_members


def tool(name: str, **properties: str) -> dict[str, Any]:
    schema = {"type": "object", "properties": {key: {"type": kind} for key, kind in properties.items()}}
    return {"type": "function", "function": {"name": name, "description": name, "parameters": schema}}


def call(name: str, **arguments: Any) -> list[dict[str, Any]]:
    function = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return [{"role": "user", "content": name}, {"role": "assistant", "content": "", "tool_calls": [function]}]


ROWS = [
    {"messages": call("weather", city="Paris"), "tools": [tool("weather", city="string")]},
    {"messages": call("add", a=1, b=2), "tools": [tool("add", a="integer", b="integer")]},
    {"messages": call("now"), "tools": [tool("now"), {"type": "code_interpreter"}]},
]


@pytest.mark.parametrize("kind", ["arrow", "parquet", "datasets"])
def test_tools_from_a_table_are_those_of_the_author(kind: str) -> None:
    table = pa.Table.from_pylist(ROWS)
    if kind == "parquet":
        buffer = io.BytesIO()
        pq.write_table(table, buffer)
        table = pq.read_table(buffer)
    rows = list(datasets.Dataset.from_list(ROWS)) if kind == "datasets" else table.to_pylist()
    assert rows != ROWS
    cleaned = [drop_null_members(row) for row in rows]
    assert cleaned == [(row, True) for row in ROWS]
    for (row, _), written in zip(cleaned, ROWS, strict=True):
        assert parse_row(row, "messages") == parse_row(written, "messages")


def test_only_nulls_in_tools_and_arguments_are_reported() -> None:
    row = {"messages": [{"role": "user", "content": "q", "tool_calls": None, "name": None}], "source": None}
    assert drop_null_members(row) == ({"messages": [{"role": "user", "content": "q"}], "source": None}, False)
    assert drop_null_members({"tools": [{"name": "f", "strict": None}]}) == ({"tools": [{"name": "f"}]}, True)
    called = {"name": "f", "arguments": {"a": None}}
    for row in ({"messages": [{"function_call": called}]}, {"messages": [{"tool_calls": [{"function": called}]}]}):
        cleaned, is_cut = drop_null_members(row)
        assert is_cut
        assert json.dumps(cleaned) == json.dumps(row).replace('{"a": null}', "{}")


def test_nulls_that_a_table_does_not_add_stay() -> None:
    row = {"a": None, "b": [None, 1, None], "tools": [{"enum": ["x", None]}, None], "c": [[{"d": None}], None]}
    assert drop_null_members(row) == (row | {"c": [[{}], None]}, False)
    text = {"tools": '[{"name": "f", "default": null}]', "messages": [{"arguments": '{"a": null}'}]}
    assert drop_null_members(text) == (text, False)


def test_a_map_becomes_an_object_with_its_nulls() -> None:
    inner = pa.map_(pa.string(), pa.struct([("type", pa.string()), ("enum", pa.list_(pa.string()))]))
    schema = pa.schema([("arguments", pa.map_(pa.string(), pa.string())), ("tools", inner)])
    rows = [{"arguments": {"city": "Paris", "day": None}, "tools": {"city": {"type": "string"}}}]
    table = pa.Table.from_pylist(rows, schema=schema)
    assert drop_null_members(table.to_pylist()[0]) == (rows[0], True)


KEYS = st.sampled_from(["tools", "arguments", "a", "b", "c"])
TYPES: st.SearchStrategy[Any] = st.recursive(
    st.sampled_from(["text", "integer", "boolean"]),
    lambda inner: st.lists(inner, min_size=1, max_size=1) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=6,
)


def values_of(kind: Any) -> st.SearchStrategy[Any]:
    """Values of one column of a table: objects may lack any member."""
    if isinstance(kind, dict):
        return st.fixed_dictionaries({}, optional={key: values_of(inner) for key, inner in kind.items()})
    if isinstance(kind, list):
        return st.lists(values_of(kind[0]), max_size=3)
    return {"text": st.text(max_size=2), "integer": st.integers(-5, 5), "boolean": st.booleans()}[kind]


@given(data=st.data(), kinds=st.dictionaries(KEYS, TYPES, min_size=1, max_size=3))
@settings(derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_rows_without_nulls_survive_a_table(data: st.DataObject, kinds: dict[str, Any]) -> None:
    columns = st.fixed_dictionaries({key: values_of(kind) for key, kind in kinds.items()})
    rows = data.draw(st.lists(columns, min_size=1, max_size=4))
    try:
        read = pa.Table.from_pylist(rows).to_pylist()
    except pa.ArrowException:
        assume(False)
    assert [drop_null_members(row)[0] for row in read] == rows
