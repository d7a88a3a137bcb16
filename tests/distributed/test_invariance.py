"""scripts/check_invariance.py: results do not depend on batching options, processes or ZeRO stage."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from scripts.check_invariance import main

from tests.distributed.forked import Forks

pytestmark = pytest.mark.distributed


def test_results_are_invariant(
    forks: Forks, tiny_model: Callable[..., Path], rows_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In float32 with adapter dropout 0.1, different lengths, and a short last step."""

    def launch(preset: str, *args: str) -> subprocess.CompletedProcess[str]:
        return forks.launch(*args, preset=preset)

    args = ["--model", str(tiny_model()), "--data", str(rows_file), "--learning-rate", "0.03"]
    code = main([*args, "--loss-limit", "1e-5", "--adapter-limit", "1e-4"], launch)
    stdout = capsys.readouterr().out
    assert code == 0, stdout
    assert ", no, 6 steps; losses 5." in stdout
    rows = re.findall(r"^\| (?:1|2) process.*\|$", stdout, flags=re.MULTILINE)
    assert len(rows) == 10, stdout
