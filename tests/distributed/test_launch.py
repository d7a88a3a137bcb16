"""What is looked at before a launch trains, and how its processes end and tell an error."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
from accelerate import Accelerator
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from lora_accel import console
from lora_accel.config.launch import Launch
from lora_accel.console import run_command
from lora_accel.distributed.launch import check_launch, exit_process
from lora_accel.errors import Aborted, ConfigError, Interrupted, LoraAccelError, TrainingError
from lora_accel.train import main
from tests.conftest import PATIENCE_SECONDS, run_code


def launch_of(num_processes: int = 1, stage: int | None = None) -> Launch:
    deepspeed = None if stage is None else {"zero_optimization": {"stage": stage}}
    return Launch(num_processes=num_processes, mixed_precision="no", deepspeed=deepspeed, source="accelerate launch")


# --- an Accelerator that is not what was asked for


def test_an_accelerator_that_is_what_was_asked_for_is_accepted() -> None:
    check_launch(Accelerator(cpu=True), launch_of())


@pytest.mark.parametrize("stage", [None, 2])
def test_processes_that_do_not_see_each_other_are_stopped(stage: int | None) -> None:
    alone = Accelerator(cpu=True)
    with pytest.raises(ConfigError, match="started 2 processes, but this one sees 1"):
        check_launch(alone, launch_of(2, stage))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_that_was_asked_for_and_does_not_run_is_refused(stage: int) -> None:
    without = Accelerator(cpu=True)
    with pytest.raises(ConfigError, match="accelerate_configs/") as caught:
        check_launch(without, launch_of(1, stage))
    assert "processes" not in str(caught.value), "their number is right"


# --- offload


def test_without_offload_of_the_optimizer_deepspeed_is_not_imported() -> None:
    code = (
        "import sys\n"
        "from lora_accel.distributed.launch import refuse_offload\n"
        "refuse_offload({'optimizer': 'none', 'param': 'none'})\n"
        "refuse_offload({'optimizer': 'none', 'param': 'cpu'})\n"  # copies need no op
        "print([name for name in ('deepspeed', 'torch') if name in sys.modules])\n"
    )
    ran = run_code(code)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "[]\n", "")


@pytest.mark.parametrize(
    ("offload", "devices", "op"),
    [
        ({"optimizer": "cpu", "param": "none"}, "cpu", "CPUAdamBuilder"),
        ({"optimizer": "none", "param": "nvme"}, "nvme", "AsyncIOBuilder"),
    ],
)
def test_offload_without_what_its_op_is_built_with_is_refused(
    tmp_path: Path, offload: dict[str, str], devices: str, op: str
) -> None:
    """A PATH without ninja and compilers stands for a machine that has none."""
    code = (
        "from lora_accel.errors import ConfigError\n"
        "from lora_accel.distributed.launch import refuse_offload\n"
        "try:\n"
        f"    refuse_offload({offload!r})\n"
        "except ConfigError as error:\n"
        "    print('refused:', error)\n"
    )
    (tmp_path / "bin").mkdir()
    ran = run_code(code, PATH=str(tmp_path / "bin"), TORCH_EXTENSIONS_DIR=str(tmp_path / "extensions"))
    assert ran.returncode == 0, ran.stderr
    said = ran.stdout.splitlines()[-1]
    assert said.startswith(f"refused: offload to {devices} needs DeepSpeed's {op}: ")
    assert "ninja not being installed" in said
    assert "a C++ compiler, ninja; libaio for nvme" in said


# --- how a process ends


@pytest.mark.parametrize("code", [0, 2, 130])
def test_a_process_of_no_group_leaves_in_the_ordinary_way(code: int) -> None:
    with pytest.raises(SystemExit) as caught:
        exit_process(code)
    assert caught.value.code == code


def test_leaving_imports_nothing() -> None:
    code = (
        "import atexit, sys\n"
        "from lora_accel.distributed.launch import leave\n"
        "atexit.register(lambda: print('teardown', 'torch' in sys.modules))\n"
        "leave(3)\n"
    )
    ran = run_code(code)
    assert (ran.returncode, ran.stdout, ran.stderr) == (3, "teardown False\n", "")


@pytest.mark.parametrize("code", [0, 2])
def test_a_process_of_a_group_leaves_without_teardown_and_with_all_it_said(tmp_path: Path, code: int) -> None:
    store = (tmp_path / "store").as_uri()
    lines = (
        "import atexit, sys\n"
        "import torch.distributed\n"
        "from lora_accel.distributed.launch import leave\n"
        f"torch.distributed.init_process_group('gloo', init_method={store!r}, rank=0, world_size=1)\n"
        "atexit.register(print, 'teardown')\n"
        "print('told', end='')\n"
        "print('told', end='', file=sys.stderr)\n"
        f"leave({code})\n"
    )
    ran = run_code(lines)
    assert (ran.returncode, ran.stdout) == (code, "told")
    assert ran.stderr.endswith("told")


# --- how an error is told


class Clocked(io.StringIO):
    """A stream that keeps the time at which it was first written to."""

    first: float | None = None

    def write(self, text: str) -> int:
        self.first = self.first or time.perf_counter()
        return super().write(text)


def raises(error: BaseException) -> Callable[[], NoReturn]:
    def command() -> NoReturn:
        raise error

    return command


def tell(
    error: BaseException, rank: int = 0, error_file: Path | None = None, reports: bool | None = None
) -> tuple[int, str, float]:
    """Let a command meet an error; return its exit code, what it said, and after how many seconds it began to."""
    stderr, start = Clocked(), time.perf_counter()
    with contextlib.redirect_stderr(stderr):
        code = run_command(
            raises(error),
            rank=rank,
            reports=rank == 0 if reports is None else reports,
            error_file=error_file and str(error_file),
        )
    assert stderr.first is not None, "said nothing"
    return code, stderr.getvalue(), stderr.first - start


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits."""
    monkeypatch.setattr(console, "PATIENCE_SECONDS", 0)


def test_the_first_process_tells_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "PATIENCE_SECONDS", 120)
    code, said, seconds = tell(ConfigError("training.epochs is wrong"))
    assert (code, said) == (2, "error: training.epochs is wrong\n")
    assert seconds < 60


@pytest.mark.parametrize("rank", [1, 7])
def test_another_process_waits_before_it_tells(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    monkeypatch.setattr(console, "PATIENCE_SECONDS", 0.3)
    code, said, seconds = tell(ConfigError("training.epochs is wrong"), rank)
    assert (code, said) == (2, f"error on rank {rank}: training.epochs is wrong\n")
    assert seconds >= 0.3


def test_the_first_process_of_another_machine_tells_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "PATIENCE_SECONDS", 120)
    code, said, seconds = tell(ConfigError("output_dir is wrong"), rank=8, reports=True)
    assert (code, said) == (2, "error on rank 8: output_dir is wrong\n")
    assert seconds < 60


@pytest.mark.parametrize(
    ("error", "code"),
    [(LoraAccelError("x"), 1), (ConfigError("x"), 2), (TrainingError("x"), 3)],
)
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.usefixtures("hasty")
def test_the_exit_code_is_the_errors(error: LoraAccelError, code: int, rank: int) -> None:
    assert tell(error, rank)[0] == code


@pytest.mark.parametrize("code", [130, 143])
def test_a_run_that_was_asked_to_stop_is_told_once_at_once_and_is_no_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: int
) -> None:
    monkeypatch.setattr(console, "PATIENCE_SECONDS", 60)
    stopped, file = Interrupted("stopped by SIGTERM after step 3", code), str(tmp_path / "error.json")
    assert run_command(raises(stopped), rank=0, error_file=file) == code
    assert capsys.readouterr().err == "stopped by SIGTERM after step 3\n"
    assert run_command(raises(stopped), rank=8, reports=True, error_file=file) == code
    assert capsys.readouterr().err == "stopped by SIGTERM after step 3\n"
    began = time.perf_counter()
    assert run_command(raises(stopped), rank=1, reports=False, error_file=file) == code
    assert capsys.readouterr() == ("", "")
    assert time.perf_counter() - began < 30, "waited for its turn"
    assert list(tmp_path.iterdir()) == [], "torchrun would report a failure"


@pytest.mark.parametrize("rank", [0, 1])
def test_what_succeeds_says_and_leaves_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path, rank: int) -> None:
    assert run_command(lambda: None, rank=rank, error_file=str(tmp_path / "error.json")) == 0
    assert capsys.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []


def test_an_interruption_by_hand_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "PATIENCE_SECONDS", 120)
    code, said, seconds = tell(KeyboardInterrupt(), 8, tmp_path / "error.json", reports=True)
    assert code == 130
    assert said.startswith("interrupted; ")
    assert seconds < 60
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "code"), [(KeyboardInterrupt(), 130), (Aborted(signal.SIGINT), 130), (Aborted(signal.SIGTERM), 143)]
)
def test_an_interruption_is_told_once_on_a_machine(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, error: BaseException, code: int
) -> None:
    for reports in (True, False):
        file = str(tmp_path / "error.json")
        assert run_command(raises(error), rank=9 - reports, reports=reports, error_file=file) == code
        said = capsys.readouterr().err
        assert said.count("\n") == reports, said
    assert list(tmp_path.iterdir()) == []


def read_error_file(path: Path, began: float, exit_code: int) -> str:
    """Return the message for the launcher; torchrun itself reads it, and whatever follows bears a later second."""
    left = json.loads(path.read_text(encoding="utf-8"))
    assert left.keys() == {"message", "timestamp"}
    assert type(left["timestamp"]) is int
    assert int(began) <= left["timestamp"] < int(time.time())
    failure = ProcessFailure(local_rank=0, pid=os.getpid(), exitcode=exit_code, error_file=str(path))
    assert (failure.message, failure.timestamp) == (left["message"], left["timestamp"])
    return failure.message


@pytest.mark.parametrize(("rank", "prefix"), [(0, "error: "), (1, "error on rank 1: ")])
@pytest.mark.usefixtures("hasty")
def test_an_error_of_ours_is_left_for_the_launcher(tmp_path: Path, rank: int, prefix: str) -> None:
    path, began = tmp_path / "error.json", time.time()
    code, said, _ = tell(TrainingError("the loss is ∞ at step 3"), rank, path)
    assert (code, said) == (3, f"{prefix}the loss is ∞ at step 3\n")
    assert read_error_file(path, began, exit_code=3) == said.rstrip("\n")


@pytest.mark.parametrize("rank", [0, 1])
def test_an_unexpected_error_is_left_with_its_traceback_and_raised(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, rank: int
) -> None:
    path, began = tmp_path / "error.json", time.time()
    with pytest.raises(KeyError, match="lost"):
        run_command(raises(KeyError("lost")), rank=rank, error_file=str(path))
    message = read_error_file(path, began, exit_code=1)
    assert message.startswith("Traceback (most recent call last)")
    assert message.endswith("KeyError: 'lost'\n")
    assert Path(__file__).name in message
    assert capsys.readouterr().err == "", "Python itself will tell it"


def test_without_a_launcher_no_file_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert tell(ConfigError("x"))[0] == 2
    with pytest.raises(KeyError):
        run_command(raises(KeyError("lost")))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("hasty")
def test_the_training_command_knows_its_rank_and_where_its_launcher_looks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path, began = tmp_path / "error.json", time.time()
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
    assert main(["--config", str(tmp_path / "none.yaml")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error on rank 3: ")
    assert read_error_file(path, began, exit_code=2) == said.rstrip("\n")


ORPHAN = """
import os, subprocess, sys
code = "import os, sys; sys.path[:0] = []; from lora_accel.train import main; sys.exit(main(['--config', 'none.yaml']))"
subprocess.Popen(["/bin/sh", "-c", 'sleep 0.2; exec "$0" -c "$1"', sys.executable, code])
"""


def test_a_process_whose_launcher_has_gone_already_does_not_train_on(tmp_path: Path) -> None:
    """No one would end it: the launcher died while this process still read its imports."""
    environment = os.environ | {"ACCELERATE_MIXED_PRECISION": "no"}
    with (tmp_path / "said").open("w") as said:
        subprocess.run([sys.executable, "-c", ORPHAN], env=environment, stderr=said, stdout=said, check=True)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while "error" not in (tmp_path / "said").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert "what launched this process has gone" in (tmp_path / "said").read_text()
