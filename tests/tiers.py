"""Select the tests of the fast tier (`scripts/test.sh --fast`), and guard it against starting processes.

A test is left out if its code, its fixtures or the helpers that they call refer to something that starts a process: no
marker is needed. A start that this does not detect, such as one in the package itself, fails the test in the fast tier;
mark such a test with `launch`.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from types import CodeType
from typing import Any

import pytest

STARTERS = {"subprocess", "Popen", "multiprocessing", "fork", "run_training"}
"""Names that start processes, and `run_training`, which takes longer than a second on a slow machine."""
EVENTS = {"os.fork", "os.posix_spawn", "subprocess.Popen"}
"""Python's audit events before a process starts."""


MARKERS = ("distributed", "launch", "slow", "smollm")
MAX_CASES = 3
"""Cases of a parametrized test in the fast tier, the same ones each time."""


def select_fast_tests(items: Sequence[pytest.Item]) -> set[pytest.Item]:
    """Return the tests of the fast tier."""
    cases_by_test: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if not any(item.get_closest_marker(name) for name in MARKERS):
            cases_by_test[item.nodeid.split("[")[0]].append(item)
    selected: set[pytest.Item] = set()
    for cases in cases_by_test.values():
        if isinstance(cases[0], pytest.Function) and starts_processes(cases[0]):
            continue
        selected.update(sorted(cases, key=_hash)[:MAX_CASES])
    return selected


def _hash(item: pytest.Item) -> int:
    """Return a key for sorting: every n-th case of a product of parameters may have the same value of one of them."""
    return zlib.crc32(item.nodeid.encode())


def outside_samples(items: Sequence[pytest.Item]) -> set[pytest.Item]:
    """Return the cases that run only with `--faults` because their test is marked `sample(n)`: all but n of its cases.

    They are the same ones each time, and those of the fast tier are among the n.
    """
    cases_by_test: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if item.get_closest_marker("sample") and not item.get_closest_marker("slow"):
            cases_by_test[item.nodeid.split("[")[0]].append(item)
    outside: set[pytest.Item] = set()
    for cases in cases_by_test.values():
        size = next(mark.args[0] for mark in cases[0].iter_markers("sample"))
        outside.update(sorted(cases, key=_hash)[size:])
    return outside


def starts_processes(item: pytest.Function) -> bool:
    """Whether a test, one of its fixtures or one of their helpers refers to something that starts a process."""
    fixtures = item._fixtureinfo.name2fixturedefs.values()
    functions = [item.function, *(fixture.func for definitions in fixtures for fixture in definitions)]
    return any(_refers_to_starter(function, set()) for function in functions)


def _refers_to_starter(function: Any, visited: set[Any]) -> bool:
    """Whether a function or class refers to one of `STARTERS`, directly or through other code of tests/."""
    function = inspect.unwrap(function)
    if function in visited:
        return False
    visited.add(function)
    if inspect.isclass(function):
        methods = [value for value in vars(function).values() if inspect.isfunction(value)]
        return any(_refers_to_starter(method, visited) for method in methods)
    names = _names(function.__code__)
    if names & STARTERS:
        return True
    values = [function.__globals__.get(name) for name in names]
    return any(_refers_to_starter(value, visited) for value in values if _is_test_code(value))


def _names(code: CodeType) -> set[str]:
    """Return the global names and attributes that code refers to, including nested functions."""
    nested = [_names(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    return set(code.co_names).union(*nested)


def _is_test_code(value: Any) -> bool:
    is_code = inspect.isfunction(value) or inspect.isclass(value)
    return is_code and value.__module__.startswith("tests.")


class ProcessGuard:
    """Fails a test that starts a Python process, while it is active."""

    def __init__(self) -> None:
        self._active = False
        sys.addaudithook(self._audit)  # an audit hook cannot be removed

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        is_sandbox = "sandbox_child.py" in str(arguments[1:2])  # it takes 0.2 seconds once, and imports no torch
        if not self._active or event not in EVENTS or is_sandbox:
            return
        if "python" in (str(arguments[0]) if arguments else "python"):
            raise AssertionError("the fast tier starts no process: mark this test with pytest.mark.launch")

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Forbid Python processes in the block. Other programs may start: libraries call `uname`, for example."""
        self._active = True
        try:
            yield
        finally:
            self._active = False
