"""The fast tier starts no process: such tests are left out, and one that is not detected fails."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest

from tests.conftest import PROCESS_GUARD, run_module
from tests.tiers import _refers_to_starter


def helper() -> object:
    return run_module("lora_accel.cli")


def nested() -> Callable[[], object]:
    return lambda: helper()


def harmless() -> object:
    return sorted(os.environ)


class Helper:
    def start(self) -> object:
        return helper()


def uses_a_class() -> Helper:
    return Helper()


@pytest.mark.parametrize(
    ("function", "starts"), [(helper, True), (nested, True), (uses_a_class, True), (harmless, False)]
)
def test_starters_are_found_through_helpers(function: Callable[[], object], starts: bool) -> None:
    assert _refers_to_starter(function, set()) == starts


def test_the_guard_stops_python_processes_only() -> None:
    command = [sys.executable, "-c", ""]
    with PROCESS_GUARD.active():
        with pytest.raises(AssertionError, match="mark this test"):
            subprocess.run(command, check=True)
        with pytest.raises(AssertionError, match="mark this test"):
            os.fork()
        subprocess.run(["true"], check=True)
    subprocess.run(command, check=True)
