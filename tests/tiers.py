"""Which tests the fast tier (`scripts/test.sh --fast`) leaves out, and a guard that keeps it honest.

A test that starts a process is found by what its code, its fixtures and the helpers that they call refer to: nobody has
to mark it. A start that is not found so (the package itself starts one) fails the test in the fast tier; mark such a
test with `launch`.
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
"""Names of what starts processes; and a training, which takes longer than a second on a slow machine."""
EVENTS = {"os.fork", "os.posix_spawn", "subprocess.Popen"}
"""Audit events of Python that come before a process starts."""


MARKERS = ("distributed", "launch", "slow", "smollm")
MOST_CASES = 3
"""Of a test with more cases the fast tier holds so many, the same ones each time."""


def fast(items: Sequence[pytest.Item]) -> set[pytest.Item]:
    """Return the tests of the fast tier."""
    of_test: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if not any(item.get_closest_marker(name) for name in MARKERS):
            of_test[item.nodeid.split("[")[0]].append(item)
    kept: set[pytest.Item] = set()
    for cases in of_test.values():
        if isinstance(cases[0], pytest.Function) and starts_processes(cases[0]):
            continue
        # By a hash, since every n-th of a product of lists may hold the same value of one list each time.
        kept.update(sorted(cases, key=lambda item: zlib.crc32(item.nodeid.encode()))[:MOST_CASES])
    return kept


def starts_processes(item: pytest.Function) -> bool:
    """Whether a test, one of its fixtures or a helper of theirs refers to something that starts a process."""
    fixtures = item._fixtureinfo.name2fixturedefs.values()
    functions = [item.function, *(fixture.func for several in fixtures for fixture in several)]
    return any(_refers(function, set()) for function in functions)


def _refers(function: Any, seen: set[Any]) -> bool:
    """Follow functions and classes of tests/ as far as they refer to each other."""
    function = inspect.unwrap(function)
    if function in seen:
        return False
    seen.add(function)
    if inspect.isclass(function):
        return any(_refers(method, seen) for method in vars(function).values() if inspect.isfunction(method))
    names = _names(function.__code__)
    if names & STARTERS:
        return True
    values = [function.__globals__.get(name) for name in names]
    return any(_refers(value, seen) for value in values if _is_of_tests(value))


def _names(code: CodeType) -> set[str]:
    """Return the global names and attributes that code refers to, functions within it included."""
    inner = [_names(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    return set(code.co_names).union(*inner)


def _is_of_tests(value: Any) -> bool:
    is_code = inspect.isfunction(value) or inspect.isclass(value)
    return is_code and value.__module__.startswith("tests.")


class Guard:
    """Makes a start of a process an error, where it is on."""

    def __init__(self) -> None:
        self._on = False
        sys.addaudithook(self._audit)  # there is no way to remove it

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._on and event in EVENTS and "python" in (str(arguments[0]) if arguments else "python"):
            raise AssertionError("the fast tier starts no process: mark this test with pytest.mark.launch")

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        """Let no Python process start meanwhile; other programs (`uname`, which libraries ask) may."""
        self._on = True
        try:
            yield
        finally:
            self._on = False
