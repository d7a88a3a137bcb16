"""A fault happens where, when and on the rank that is said, and nowhere else; what says nothing known is refused."""

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

PASS = """
import sys
from lora_accel import faults
faults.SLEEP_SECONDS = 1
for point in sys.argv[1:]:
    try:
        faults.reach(point)
    except OSError as error:
        print(repr(error))
    print("after", point, flush=True)
"""


@pytest.fixture
def arm(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Set the variable for this process."""

    def set_to(text: str) -> None:
        monkeypatch.setenv("LORA_ACCEL_FAULT", text)
        active_fault.cache_clear()

    active_fault.cache_clear()
    yield set_to
    monkeypatch.undo()
    active_fault.cache_clear()


def pass_by(*points: str, fault: str | None, rank: str | None = None) -> tuple[int, list[str]]:
    """Come to places in a process of its own; return its exit code and what it said."""
    environment = {key: value for key, value in os.environ.items() if key not in ("LORA_ACCEL_FAULT", "RANK")}
    environment |= {} if fault is None else {"LORA_ACCEL_FAULT": fault}
    environment |= {} if rank is None else {"RANK": rank}
    command = [sys.executable, "-c", PASS, *points]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    assert ran.stderr == ""
    return ran.returncode, ran.stdout.splitlines()


@pytest.mark.parametrize("fault", [None, ""])
def test_without_the_variable_nothing_happens(fault: str | None) -> None:
    assert pass_by(*POINTS, fault=fault) == (0, [f"after {point}" for point in POINTS])


def test_killed_a_process_says_nothing_more() -> None:
    said = ["after step.begin"]
    assert pass_by("step.begin", "save.begin", "save.begin", fault="save.begin@1=kill") == (-9, said)


def test_an_exit_is_one_without_teardown() -> None:
    assert pass_by("save.begin", "step.begin", fault="step.begin@1=exit") == (1, ["after save.begin"])


def test_a_full_disk_is_an_oserror_and_happens_once() -> None:
    error = "OSError(28, 'No space left on device')"
    said = [error, "after save.mid_file", "after save.mid_file"]
    assert pass_by("save.mid_file", "save.mid_file", fault="save.mid_file@1=enospc") == (0, said)


def test_asleep_a_process_goes_on_later() -> None:
    began = time.perf_counter()
    assert pass_by("merge.mid", fault="merge.mid@1=sleep") == (0, ["after merge.mid"])
    assert time.perf_counter() - began >= 1
    assert 5 <= faults.SLEEP_SECONDS <= 60


@pytest.mark.parametrize("end", ["signal", "mark deleted"])
def test_a_paused_process_waits_for_a_signal_or_until_its_mark_is_deleted(tmp_path: Path, end: str) -> None:
    program = "import signal\nsignal.signal(signal.SIGUSR1, lambda *_: print('signal', flush=True))" + PASS
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


def test_only_its_own_place_is_counted() -> None:
    points = ("step.begin", "save.begin", "step.begin", "save.begin", "save.begin", "step.begin")
    code, said = pass_by(*points, fault="step.begin@3=exit")
    assert (code, said) == (1, [f"after {point}" for point in points[:-1]])
    assert pass_by(*points, fault="step.begin@4=exit")[0] == 0


@pytest.mark.parametrize(
    ("asked", "rank", "dies"),
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
def test_a_fault_is_that_of_its_rank(asked: str, rank: str | None, dies: bool) -> None:
    assert pass_by("rotate.mid", fault=f"rotate.mid@1=kill{asked}", rank=rank)[0] == (-9 if dies else 0)


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
def test_what_says_nothing_known_is_refused(arm: Callable[[str], None], text: str) -> None:
    arm(text)
    with pytest.raises(ConfigError) as refused:
        active_fault()
    said = str(refused.value)
    assert said.startswith(f"LORA_ACCEL_FAULT={text!r}: say ")
    assert "NAME@N=kill|enospc|exit|sleep|pause|hang[:rank=R]" in said


def test_an_unknown_place_is_refused_with_the_nearest_one(arm: Callable[[str], None]) -> None:
    arm("save.befor_manifest@1=kill")
    with pytest.raises(ConfigError, match=r"'save\.befor_manifest' is no place \(did you mean save\.before_manifest\?"):
        active_fault()


def test_a_training_refuses_a_wrong_fault_before_it_writes(
    arm: Callable[[str], None], make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    arm("save.begin@1=explode")
    with pytest.raises(ConfigError, match="LORA_ACCEL_FAULT"):
        run_training(make_config())
    assert not (tmp_path / "run").exists()


def test_every_place_is_in_the_code_and_every_place_in_the_code_is_known() -> None:
    """A misspelt place would be a test that tests nothing."""
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "src" / "lora_accel").rglob("*.py")]
    reached = [point for source in sources for point in re.findall(r'\bfault_point\("([^"]+)"\)', source)]
    assert set(reached) == set(POINTS)
    assert len(set(POINTS)) == len(POINTS)
