"""The table of scripts/check_invariance.py: nothing but the speed may change."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from scripts.check_invariance import main

from tests.distributed.forked import Forks

pytestmark = pytest.mark.distributed


def test_cut_processes_and_zero_stage_change_nothing(
    forks: Forks, tiny_model: Callable[..., Path], rows_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Float32, adapter dropout 0.1, uneven lengths, the last of 6 steps short."""

    def launch(preset: str, *words: str) -> subprocess.CompletedProcess[str]:
        return forks.launch(*words, preset=preset)

    words = ["--model", str(tiny_model()), "--data", str(rows_file), "--learning-rate", "0.03"]
    code = main([*words, "--loss-limit", "1e-5", "--adapter-limit", "1e-4"], launch)
    printed = capsys.readouterr().out
    assert code == 0, printed
    assert ", no, 6 steps; losses 5." in printed
    rows = re.findall(r"^\| (?:1|2) process.*\|$", printed, flags=re.MULTILINE)
    assert len(rows) == 10, printed
