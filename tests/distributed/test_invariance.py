"""The table of scripts/check_invariance.py: nothing but the speed may change."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.distributed


def check(tiny_model: Callable[..., Path], rows_file: Path, *words: str) -> subprocess.CompletedProcess[str]:
    script = [sys.executable, str(ROOT / "scripts" / "check_invariance.py")]
    script += ["--model", str(tiny_model()), "--data", str(rows_file), "--learning-rate", "0.03", *words]
    return subprocess.run(
        script,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )


@pytest.mark.timeout(900)
def test_cut_processes_and_zero_stage_change_nothing(tiny_model: Callable[..., Path], rows_file: Path) -> None:
    """Float32, adapter dropout 0.1, uneven lengths, the last of 6 steps short."""
    ran = check(tiny_model, rows_file, "--loss-limit", "1e-5", "--adapter-limit", "1e-4")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ", no, 6 steps; losses 5." in ran.stdout
    rows = re.findall(r"^\| (?:1|2) process.*\|$", ran.stdout, flags=re.MULTILINE)
    assert len(rows) == 10, ran.stdout
