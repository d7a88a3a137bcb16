"""Checks before a launched run trains, and how its processes exit and report errors."""

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
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
from accelerate import Accelerator, DistributedType
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from lora_accel import console
from lora_accel.config.launch import Launch
from lora_accel.console import run_command
from lora_accel.distributed.launch import LAUNCH_TYPES, check_launch, exit_process, load_extensions
from lora_accel.errors import Aborted, ConfigError, Interrupted, LoraAccelError, TrainingError
from lora_accel.train import main
from tests.conftest import PATIENCE_SECONDS, run_code


def launch_of(num_processes: int = 1, stage: int | None = None) -> Launch:
    deepspeed = None if stage is None else {"zero_optimization": {"stage": stage}}
    return Launch(num_processes=num_processes, mixed_precision="no", deepspeed=deepspeed, source="accelerate launch")


# --- check_launch


def test_accelerator_that_matches_the_launch() -> None:
    check_launch(Accelerator(cpu=True), launch_of())


@pytest.mark.parametrize("stage", [None, 2])
def test_processes_without_a_common_group_raise(stage: int | None) -> None:
    accelerator = Accelerator(cpu=True)
    with pytest.raises(ConfigError, match="started 2 processes, but this one sees 1"):
        check_launch(accelerator, launch_of(2, stage))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_launch_with_deepspeed_without_deepspeed_raises(stage: int) -> None:
    accelerator = Accelerator(cpu=True)
    with pytest.raises(ConfigError, match="accelerate_configs/") as caught:
        check_launch(accelerator, launch_of(1, stage))
    assert "processes" not in str(caught.value), "the number of processes is right"


def accelerator_of(kind: str, device: str) -> Any:
    """Return what `check_launch` reads of an Accelerator on a device that this machine does not have."""
    return SimpleNamespace(
        num_processes=1, distributed_type=DistributedType(kind), device=SimpleNamespace(type=device, index=0)
    )


def test_each_launch_type_of_accelerate_is_known() -> None:
    assert set(LAUNCH_TYPES) >= {kind.value for kind in DistributedType}


@pytest.mark.parametrize("kind", [kind.value for kind in DistributedType])
def test_each_launch_type_is_accepted_or_rejected_by_name(kind: str) -> None:
    devices = {"MULTI_XPU": "xpu", "MULTI_NPU": "npu", "MULTI_HPU": "hpu", "MULTI_CPU": "cpu"}
    accelerator = accelerator_of(kind, devices.get(kind, "cuda"))
    launch = launch_of(stage=2 if kind == "DEEPSPEED" else None)
    accepted = {"NO", "MULTI_CPU", "MULTI_GPU", "MULTI_XPU", "MULTI_NPU", "MULTI_HPU", "DEEPSPEED"}
    if kind in accepted:
        check_launch(accelerator, launch)
        return
    name = kind.removeprefix("MULTI_").split("_")[0]
    with pytest.raises(ConfigError, match=rf"(?i)uses .*{name}.*, which is not supported: .*accelerate_configs/"):
        check_launch(accelerator, launch)


@pytest.mark.parametrize("device", ["cpu", "cuda", "xpu", "npu", "hpu", "mps"])
def test_one_process_on_each_supported_device(device: str) -> None:
    check_launch(accelerator_of("NO", device), launch_of())


@pytest.mark.parametrize(("kind", "stage"), [("NO", None), ("DEEPSPEED", 2)])
def test_another_device_is_rejected_by_name(kind: str, stage: int | None) -> None:
    with pytest.raises(ConfigError, match="uses MLU, which is not supported"):
        check_launch(accelerator_of(kind, "mlu"), launch_of(stage=stage))


def test_deepspeed_that_the_launch_did_not_ask_for_raises() -> None:
    with pytest.raises(ConfigError, match="uses DEEPSPEED for this launch instead of one process or DDP"):
        check_launch(accelerator_of("DEEPSPEED", "cuda"), launch_of())


# --- load_extensions


@pytest.mark.parametrize(
    ("offload", "user", "op"),
    [
        ({"optimizer": "cpu", "param": "none"}, "offload to cpu", "CPUAdamBuilder"),
        ({"optimizer": "none", "param": "nvme"}, "offload to nvme", "AsyncIOBuilder"),
        ({"optimizer": "none", "param": "none"}, "DeepSpeed on CPUs", "ShareMemCommBuilder"),
    ],
)
def test_extension_without_a_compiler_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, offload: dict[str, str], user: str, op: str
) -> None:
    """A PATH without ninja and compilers simulates a machine that has none."""
    from deepspeed.ops.op_builder.builder import OpBuilder

    loaded = {} if op == "ShareMemCommBuilder" else {"deepspeed_shm_comm": object()}
    monkeypatch.setattr(OpBuilder, "_loaded_ops", loaded)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    with pytest.raises(ConfigError) as caught:
        load_extensions(offload)
    message = str(caught.value)
    assert message.startswith(f"{user} needs DeepSpeed's {op}: ")
    assert "ninja not being installed" in message
    assert "a C++ compiler, ninja; libaio for nvme" in message
    assert not list((tmp_path / "extensions").rglob("lock"))


# --- exit_process


@pytest.mark.parametrize("code", [0, 2, 130])
def test_exit_without_a_process_group(code: int) -> None:
    with pytest.raises(SystemExit) as caught:
        exit_process(code)
    assert caught.value.code == code


def test_exit_imports_nothing() -> None:
    code = (
        "import atexit, sys\n"
        "from lora_accel.distributed.launch import exit_process\n"
        "atexit.register(lambda: print('teardown', 'torch' in sys.modules))\n"
        "exit_process(3)\n"
    )
    result = run_code(code)
    assert (result.returncode, result.stdout, result.stderr) == (3, "teardown False\n", "")


@pytest.mark.parametrize("code", [0, 2])
def test_exit_with_a_process_group_skips_shutdown_and_flushes_output(tmp_path: Path, code: int) -> None:
    store = (tmp_path / "store").as_uri()
    lines = (
        "import atexit, sys\n"
        "import torch.distributed\n"
        "from lora_accel.distributed.launch import exit_process\n"
        f"torch.distributed.init_process_group('gloo', init_method={store!r}, rank=0, world_size=1)\n"
        "atexit.register(print, 'teardown')\n"
        "print('text', end='')\n"
        "print('text', end='', file=sys.stderr)\n"
        f"exit_process({code})\n"
    )
    result = run_code(lines)
    assert (result.returncode, result.stdout) == (code, "text")
    assert result.stderr.endswith("text")


# --- run_command


class TimedStream(io.StringIO):
    """A stream that records the time of the first write."""

    first_write: float | None = None

    def write(self, text: str) -> int:
        self.first_write = self.first_write or time.perf_counter()
        return super().write(text)


def raises(error: BaseException) -> Callable[[], NoReturn]:
    def command() -> NoReturn:
        raise error

    return command


def run_failing(
    error: BaseException, rank: int = 0, error_file: Path | None = None, reports: bool | None = None
) -> tuple[int, str, float]:
    """Run a command that raises; return its exit code, its stderr, and the seconds until the first output."""
    stderr, start = TimedStream(), time.perf_counter()
    with contextlib.redirect_stderr(stderr):
        code = run_command(
            raises(error),
            rank=rank,
            reports=rank == 0 if reports is None else reports,
            error_file=error_file and str(error_file),
        )
    assert stderr.first_write is not None, "no output"
    return code, stderr.getvalue(), stderr.first_write - start


@pytest.fixture
def no_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ranks print their errors without a delay."""
    monkeypatch.setattr(console, "ERROR_DELAY_SECONDS", 0)


def test_rank_0_prints_immediately(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "ERROR_DELAY_SECONDS", 120)
    code, stderr, seconds = run_failing(ConfigError("training.epochs is wrong"))
    assert (code, stderr) == (2, "error: training.epochs is wrong\n")
    assert seconds < 60


@pytest.mark.parametrize("rank", [1, 7])
def test_other_ranks_wait_before_they_print(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    monkeypatch.setattr(console, "ERROR_DELAY_SECONDS", 0.3)
    code, stderr, seconds = run_failing(ConfigError("training.epochs is wrong"), rank)
    assert (code, stderr) == (2, f"error on rank {rank}: training.epochs is wrong\n")
    assert seconds >= 0.3


def test_local_rank_0_of_another_machine_prints_immediately(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "ERROR_DELAY_SECONDS", 120)
    code, stderr, seconds = run_failing(ConfigError("output_dir is wrong"), rank=8, reports=True)
    assert (code, stderr) == (2, "error on rank 8: output_dir is wrong\n")
    assert seconds < 60


@pytest.mark.parametrize(
    ("error", "code"),
    [(LoraAccelError("x"), 1), (ConfigError("x"), 2), (TrainingError("x"), 3)],
)
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.usefixtures("no_delay")
def test_exit_code_of_an_error(error: LoraAccelError, code: int, rank: int) -> None:
    assert run_failing(error, rank)[0] == code


@pytest.mark.parametrize("code", [130, 143])
def test_interruption_is_printed_once_and_is_not_an_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: int
) -> None:
    monkeypatch.setattr(console, "ERROR_DELAY_SECONDS", 60)
    stopped, file = Interrupted("stopped by SIGTERM after step 3", code), str(tmp_path / "error.json")
    assert run_command(raises(stopped), rank=0, error_file=file) == code
    assert capsys.readouterr().err == "stopped by SIGTERM after step 3\n"
    assert run_command(raises(stopped), rank=8, reports=True, error_file=file) == code
    assert capsys.readouterr().err == "stopped by SIGTERM after step 3\n"
    began = time.perf_counter()
    assert run_command(raises(stopped), rank=1, reports=False, error_file=file) == code
    assert capsys.readouterr() == ("", "")
    assert time.perf_counter() - began < 30, "waited before it exited"
    assert list(tmp_path.iterdir()) == [], "torchrun would report a failure"


@pytest.mark.parametrize("rank", [0, 1])
def test_success_prints_and_writes_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path, rank: int) -> None:
    assert run_command(lambda: None, rank=rank, error_file=str(tmp_path / "error.json")) == 0
    assert capsys.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []


def test_keyboard_interrupt_is_not_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "ERROR_DELAY_SECONDS", 120)
    code, stderr, seconds = run_failing(KeyboardInterrupt(), 8, tmp_path / "error.json", reports=True)
    assert code == 130
    assert stderr.startswith("interrupted; ")
    assert seconds < 60
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "code"), [(KeyboardInterrupt(), 130), (Aborted(signal.SIGINT), 130), (Aborted(signal.SIGTERM), 143)]
)
def test_interruption_is_printed_once_per_machine(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, error: BaseException, code: int
) -> None:
    for reports in (True, False):
        file = str(tmp_path / "error.json")
        assert run_command(raises(error), rank=9 - reports, reports=reports, error_file=file) == code
        stderr = capsys.readouterr().err
        assert stderr.count("\n") == reports, stderr
    assert list(tmp_path.iterdir()) == []


def read_error_file(path: Path, began: float, exit_code: int) -> str:
    """Return the message in an error file, read as torchrun does. Its timestamp must be earlier than now."""
    report = json.loads(path.read_text(encoding="utf-8"))
    assert report.keys() == {"message", "timestamp"}
    assert type(report["timestamp"]) is int
    assert int(began) <= report["timestamp"] < int(time.time())
    failure = ProcessFailure(local_rank=0, pid=os.getpid(), exitcode=exit_code, error_file=str(path))
    assert (failure.message, failure.timestamp) == (report["message"], report["timestamp"])
    return failure.message


@pytest.mark.parametrize(("rank", "prefix"), [(0, "error: "), (1, "error on rank 1: ")])
@pytest.mark.usefixtures("no_delay")
def test_error_file_of_an_expected_error(tmp_path: Path, rank: int, prefix: str) -> None:
    path, began = tmp_path / "error.json", time.time()
    code, stderr, _ = run_failing(TrainingError("the loss is ∞ at step 3"), rank, path)
    assert (code, stderr) == (3, f"{prefix}the loss is ∞ at step 3\n")
    assert read_error_file(path, began, exit_code=3) == stderr.rstrip("\n")


@pytest.mark.parametrize("rank", [0, 1])
def test_unexpected_error_is_written_with_its_traceback_and_raised(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, rank: int
) -> None:
    path, began = tmp_path / "error.json", time.time()
    with pytest.raises(KeyError, match="lost"):
        run_command(raises(KeyError("lost")), rank=rank, error_file=str(path))
    message = read_error_file(path, began, exit_code=1)
    assert message.startswith("Traceback (most recent call last)")
    assert message.endswith("KeyError: 'lost'\n")
    assert Path(__file__).name in message
    assert capsys.readouterr().err == "", "Python prints the traceback"


def test_no_error_file_without_a_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_failing(ConfigError("x"))[0] == 2
    with pytest.raises(KeyError):
        run_command(raises(KeyError("lost")))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_delay")
def test_train_reads_rank_and_error_file_from_the_environment(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path, began = tmp_path / "error.json", time.time()
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
    assert main(["--config", str(tmp_path / "none.yaml")]) == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith("error on rank 3: ")
    assert read_error_file(path, began, exit_code=2) == stderr.rstrip("\n")


ORPHAN = """
import os, subprocess, sys
code = "import os, sys; sys.path[:0] = []; from lora_accel.train import main; sys.exit(main(['--config', 'none.yaml']))"
subprocess.Popen(["/bin/sh", "-c", 'sleep 0.2; exec "$0" -c "$1"', sys.executable, code])
"""


def test_process_of_a_dead_launcher_raises(tmp_path: Path) -> None:
    """Nothing would end it: the launcher died while the process was importing."""
    environment = os.environ | {"ACCELERATE_MIXED_PRECISION": "no"}
    log = tmp_path / "log"
    with log.open("w") as file:
        subprocess.run([sys.executable, "-c", ORPHAN], env=environment, stderr=file, stdout=file, check=True)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while "error" not in log.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert "the launcher of this process has died" in log.read_text()
