"""Parse and check tools and tool calls."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from lora_accel.data.records import MalformedRow, Message, Row, UnusableRow
from lora_accel.json_text import parse_strictly


def parse_tools(row: Row) -> list[dict[str, Any]] | None:
    """Return the tools of a row, from its key `tools` or, in OpenAI's older notation, `functions`.

    Raises:
        MalformedRow: one of them is not a list of JSON schemas of functions (or its JSON text), or they differ.
    """
    tools = _tool_list(row.get("tools"), "tools")
    functions = _tool_list(row.get("functions"), "functions")
    if functions:
        functions = [tool if "function" in tool else {"type": "function", "function": tool} for tool in functions]
        if tools and tools != functions:
            raise MalformedRow("keys 'tools' and 'functions' differ; keep one of them")
    return tools or functions


def _tool_list(tools: Any, key: str) -> list[dict[str, Any]] | None:
    if isinstance(tools, str):
        tools = parse_json(tools, f"key {key!r}") if tools.strip() else None
    if tools is None or tools in ([], {}):
        return None
    if not isinstance(tools, list):
        raise MalformedRow(
            f"key {key!r} should be a list of functions' JSON schemas, not {_kind(tools)}: {tools!r:.60}"
        )
    return [_tool(tool, f"key {key!r}, tool {number}") for number, tool in enumerate(tools, start=1)]


def _tool(tool: Any, where: str) -> dict[str, Any]:
    """Check a tool: a function, `{"type": "function", "function": {…}}`, or the type of a built-in tool."""
    if isinstance(tool, str):
        tool = parse_json(tool, where)
    if not isinstance(tool, Mapping):
        raise MalformedRow(f"{where}: should be an object with name and parameters, not {_kind(tool)}: {tool!r:.60}")
    kind = tool.get("type")
    if kind is not None and not isinstance(kind, str):
        raise MalformedRow(f"{where}: 'type' should be text, not {kind!r:.60}")
    if "function" in tool:
        function = tool["function"]
        if not isinstance(function, Mapping):
            raise MalformedRow(
                f"{where}: 'function' should be an object with name and parameters, not {_kind(function)}: "
                f"{function!r:.60}"
            )
        return {**tool, "function": _function(function, f"{where}: 'function'")}
    if kind and kind != "function" and "name" not in tool:
        return dict(tool)  # a built-in tool, such as {"type": "code_interpreter"}
    return _function(tool, where)


def _function(function: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Check the name and the parameters of a function."""
    _check_name(function, where)
    parameters = function.get("parameters")
    if isinstance(parameters, str):
        parameters = parse_json(parameters.strip() or "{}", f"{where}: 'parameters'")
    if parameters is None:
        return dict(function)
    if not isinstance(parameters, Mapping):
        raise MalformedRow(
            f"{where}: 'parameters' should be an object (a JSON schema), not {_kind(parameters)}: {parameters!r:.60}"
        )
    return {**function, "parameters": parameters}


def parse_tool_call(call: Any, where: str) -> dict[str, Any]:
    """Return a call as chat templates expect it.

    Args:
        call: `{"name", "arguments"}`, or OpenAI's `{"id", "type", "function": {"name", "arguments"}}`; arguments as an
            object or its JSON text.
        where: the message, for errors.

    Raises:
        MalformedRow: there is no name, or the arguments are not an object.
    """
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        raise MalformedRow(f"{where}: a tool call should be an object with name and arguments, not {call!r:.60}")
    _check_name(function, f"{where}: a tool call should be an object with name and arguments")
    arguments = function.get("arguments")
    if isinstance(arguments, str):  # OpenAI stores them as JSON text; templates expect an object
        arguments = parse_json(arguments.strip() or "{}", f"{where}: the arguments of a tool call")
    if arguments is None or arguments == []:  # an empty map of a table is a list
        arguments = {}
    if not isinstance(arguments, Mapping):
        raise MalformedRow(
            f"{where}: the arguments of a tool call should be an object, not {_kind(arguments)}: {arguments!r:.60}"
        )
    call_id = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return {"type": "function", **call_id, "function": {"name": function["name"], "arguments": arguments}}


def _check_name(function: Mapping[str, Any], where: str) -> None:
    if "name" not in function:
        raise MalformedRow(f"{where}: 'name' is missing in {dict(function)!r:.60}")
    if not isinstance(function["name"], str) or not function["name"].strip():
        raise MalformedRow(f"{where}: 'name' should be text, not {function['name']!r:.60}")


def parse_json(text: str, where: str) -> Any:
    """Parse JSON text.

    Raises:
        MalformedRow: it is not JSON, a key appears twice in one object, or it contains an unpaired surrogate.
    """
    try:
        return parse_strictly(text, allow_nan=False)
    except ValueError as error:
        raise MalformedRow(f"{where} should be JSON: {error}") from None


def _kind(value: Any) -> str:
    return "null" if value is None else f"a {type(value).__name__}"


def check_call(message: Message, number: int, text: str) -> None:
    """Check that a text contains all tool calls of a message.

    Raises:
        UnusableRow: one is missing.
    """
    calls = [call["function"] for call in message.tool_calls]
    if calls:
        check_contains(text, calls, f"a tool call of message {number + 1}")


def check_contains(text: str, value: Any, what: str) -> None:
    """Check that a text contains every string and number of a value, as it is or in JSON.

    Raises:
        UnusableRow: one is missing.
    """
    for leaf in _leaves(value):
        encoded = json.dumps(leaf, ensure_ascii=False)
        twice = json.dumps(encoded, ensure_ascii=False)[1:-1]  # arguments as JSON text, in JSON
        forms = (str(leaf), encoded.strip('"'), twice.removeprefix('\\"').removesuffix('\\"'))
        if all(form not in text for form in forms):
            raise UnusableRow(f"the chat template leaves {what} out, or writes {leaf!r:.40} differently")


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for item in value.values():
            yield from _leaves(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, (str, int, float)) and not isinstance(value, bool):
        yield value
