"""Faults occur only at the given point, occurrence and rank; an invalid LORA_ACCEL_FAULT raises."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lora_accel import RunConfig, faults, run_training
from lora_accel.errors import ConfigError
from lora_accel.faults import POINTS, active_fault
from tests.conftest import ROOT

REACH = """
import sys
from lora_accel import faults
faults.SLEEP_SECONDS = 1
for point in sys.argv[1:]:
    try:
        faults.fault_point(point)
    except OSError as error:
        print(repr(error))
    print("after", point, flush=True)
"""


@pytest.fixture
def set_fault(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Return a function that sets LORA_ACCEL_FAULT in this process."""

    def set_variable(text: str) -> None:
        monkeypatch.setenv("LORA_ACCEL_FAULT", text)
        active_fault.cache_clear()

    active_fault.cache_clear()
    yield set_variable
    monkeypatch.undo()
    active_fault.cache_clear()


def reach(*points: str, fault: str | None, rank: str | None = None) -> tuple[int, list[str]]:
    """Reach fault points in another process; return its exit code and its lines of output."""
    environment = {key: value for key, value in os.environ.items() if key not in ("LORA_ACCEL_FAULT", "RANK")}
    environment |= {} if fault is None else {"LORA_ACCEL_FAULT": fault}
    environment |= {} if rank is None else {"RANK": rank}
    command = [sys.executable, "-c", REACH, *points]
    process = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    assert process.stderr == ""
    return process.returncode, process.stdout.splitlines()


@pytest.mark.parametrize("fault", [None, ""])
def test_no_fault_without_the_variable(fault: str | None) -> None:
    assert reach(*POINTS, fault=fault) == (0, [f"after {point}" for point in POINTS])


def test_kill() -> None:
    fault = "save.begin@1=kill"
    assert reach("step.begin", "save.begin", "save.begin", fault=fault) == (-9, ["after step.begin"])


def test_exit() -> None:
    assert reach("save.begin", "step.begin", fault="step.begin@1=exit") == (1, ["after save.begin"])


def test_enospc_raises_oserror_once() -> None:
    error = "OSError(28, 'No space left on device')"
    lines = [error, "after save.mid_file", "after save.mid_file"]
    assert reach("save.mid_file", "save.mid_file", fault="save.mid_file@1=enospc") == (0, lines)


def test_sleep() -> None:
    began = time.perf_counter()
    assert reach("merge.mid", fault="merge.mid@1=sleep") == (0, ["after merge.mid"])
    assert time.perf_counter() - began >= 1
    assert 5 <= faults.SLEEP_SECONDS <= 60


@pytest.mark.parametrize("end", ["signal", "mark deleted"])
def test_pause_ends_with_a_signal_or_when_the_mark_is_deleted(tmp_path: Path, end: str) -> None:
    program = "import signal\nsignal.signal(signal.SIGUSR1, lambda *_: print('signal', flush=True))" + REACH
    environment = os.environ | {
        "LORA_ACCEL_FAULT": "merge.mid@1=pause",
        "LORA_ACCEL_FAULT_MARK": str(tmp_path / "mark"),
    }
    environment.pop("RANK", None)
    command = [sys.executable, "-c", program, "merge.mid"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT) as process:
        mark = tmp_path / "mark-0"
        while not mark.exists():
            assert process.poll() is None
            time.sleep(0.01)
        if end == "signal":
            process.send_signal(signal.SIGUSR1)
        else:
            mark.unlink()
        assert process.stdout is not None
        assert process.stdout.read().splitlines() == ["signal"] * (end == "signal") + ["after merge.mid"]
    assert process.returncode == 0


def test_only_the_given_point_is_counted() -> None:
    points = ("step.begin", "save.begin", "step.begin", "save.begin", "save.begin", "step.begin")
    assert reach(*points, fault="step.begin@3=exit") == (1, [f"after {point}" for point in points[:-1]])
    assert reach(*points, fault="step.begin@4=exit")[0] == 0


@pytest.mark.parametrize(
    ("suffix", "rank", "is_killed"),
    [
        ("", None, True),
        ("", "3", True),
        (":rank=0", None, True),
        (":rank=0", "0", True),
        (":rank=0", "1", False),
        (":rank=1", "1", True),
        (":rank=1", None, False),
        (":rank=12", "12", True),
        (":rank=12", "1", False),
    ],
)
def test_fault_occurs_only_on_its_rank(suffix: str, rank: str | None, is_killed: bool) -> None:
    assert reach("rotate.mid", fault=f"rotate.mid@1=kill{suffix}", rank=rank)[0] == (-9 if is_killed else 0)


@pytest.mark.parametrize(
    "text",
    [
        "save.begin",
        "save.begin=kill",
        "save.begin@0=kill",
        "save.begin@-1=kill",
        "save.begin@one=kill",
        "save.begin@1=explode",
        "save.begin@1=kill:rank=x",
        "save.begin@1=kill:rank=",
        "save.begin@1=kill ",
        "save.begin@1=kill,step.begin@1=kill",
        "@1=kill",
        " ",
    ],
)
def test_invalid_fault_raises(set_fault: Callable[[str], None], text: str) -> None:
    set_fault(text)
    with pytest.raises(ConfigError) as caught:
        active_fault()
    message = str(caught.value)
    assert message.startswith(f"LORA_ACCEL_FAULT={text!r}: use ")
    assert "NAME@N=kill|enospc|exit|sleep|pause|hang[:rank=R]" in message


def test_unknown_fault_point_raises_with_a_suggestion(set_fault: Callable[[str], None]) -> None:
    set_fault("save.befor_manifest@1=kill")
    with pytest.raises(ConfigError, match=r"is not a fault point \(did you mean save\.before_manifest\?"):
        active_fault()


def test_training_with_an_invalid_fault_writes_nothing(
    set_fault: Callable[[str], None], make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    set_fault("save.begin@1=explode")
    with pytest.raises(ConfigError, match="LORA_ACCEL_FAULT"):
        run_training(make_config())
    assert not (tmp_path / "run").exists()


def test_points_match_the_code() -> None:
    """A test with a misspelled fault point would test nothing."""
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "src" / "lora_accel").rglob("*.py")]
    used = [point for source in sources for point in re.findall(r'\bfault_point\("([^"]+)"\)', source)]
    assert set(used) == set(POINTS)
    assert len(set(POINTS)) == len(POINTS)
