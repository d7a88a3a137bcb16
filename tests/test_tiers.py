"""The fast tier starts no process: such tests are left out, and one that is not recognized fails."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest

from tests.conftest import GUARD, run_module
from tests.tiers import _refers


def helper() -> object:
    return run_module("lora_accel.cli")


def within() -> Callable[[], object]:
    return lambda: helper()


def harmless() -> object:
    return sorted(os.environ)


class Helper:
    def start(self) -> object:
        return helper()


def uses_a_class() -> Helper:
    return Helper()


@pytest.mark.parametrize(
    ("function", "starts"), [(helper, True), (within, True), (uses_a_class, True), (harmless, False)]
)
def test_what_starts_a_process_is_found_through_helpers(function: Callable[[], object], starts: bool) -> None:
    assert _refers(function, set()) == starts


def test_the_guard_stops_a_python_process_and_nothing_else() -> None:
    command = [sys.executable, "-c", ""]
    with GUARD.on():
        with pytest.raises(AssertionError, match="mark this test"):
            subprocess.run(command, check=True)
        with pytest.raises(AssertionError, match="mark this test"):
            os.fork()
        subprocess.run(["true"], check=True)
    subprocess.run(command, check=True)
