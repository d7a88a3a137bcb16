"""`lora-accel train`: its accelerate launch command, exit codes and signals."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config import config_args
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

from lora_accel import launcher
from lora_accel.config.schema import RunConfig
from lora_accel.errors import ConfigError, LoraAccelError
from lora_accel.launcher import Machine, SignalForwarder, config_file_options, launch_training, machine_options
from lora_accel.processes import is_python
from lora_accel.training.stopping import signal_handler
from tests.conftest import run_code
from tests.distributed.launching import PRESETS
from tests.distributed.test_signals import is_running, status, wait_for

MACHINES = [Machine(0, None), Machine(0, 1), Machine(0, 8), Machine(1, None), Machine(8, None)]


@pytest.fixture(autouse=True)
def _no_default_config(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Ignore a file that `accelerate config` wrote on this machine."""
    monkeypatch.setattr(config_args, "default_config_file", str(tmp_path / "none.yaml"))


@pytest.mark.parametrize("machine", MACHINES, ids=str)
@pytest.mark.parametrize("threads", [None, "1"])
def test_options_are_valid_and_complete_except_precision(
    machine: Machine, threads: str | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if threads:
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
    elif machine == Machine(0, None):
        pytest.skip("without OMP_NUM_THREADS, the number of threads is set")
    arguments = [*machine_options(machine), "-m", "lora_accel.train", "--config", "x.yaml", "a.b=1"]
    parsed, _, _ = _validate_launch_command(launch_command_parser().parse_args(arguments))
    warned = [line for record in caplog.records for line in record.getMessage().splitlines() if line.startswith("\t")]
    assert warned == ["\t`--mixed_precision` was set to a value of `'no'`"]
    assert (parsed.num_processes, parsed.num_machines) == (max(1, machine.num_devices), 1)
    assert (parsed.multi_gpu, bool(parsed.cpu)) == (machine.num_devices > 1, machine.num_devices == 0)
    assert (parsed.training_script, parsed.training_script_args) == (
        "lora_accel.train",
        ["--config", "x.yaml", "a.b=1"],
    )


def test_several_processes_use_a_free_port(tmp_path: Path) -> None:
    file = tmp_path / "launcher.yaml"
    values = yaml.safe_load((PRESETS / "cpu_ddp.yaml").read_text())
    assert config_file_options(PRESETS / "cpu_ddp.yaml")[2:] == ["--main_process_port", "0"]
    assert config_file_options(PRESETS / "cpu.yaml")[2:] == []
    for change in ({"main_process_port": 29511}, {"num_machines": 2, "main_process_ip": "10.0.0.1"}):
        file.write_text(yaml.safe_dump(values | change))
        assert config_file_options(file) == ["--config_file", str(file)]


def test_the_file_of_accelerate_config_is_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert config_file_options(None) == []
    written = tmp_path / "default_config.yaml"
    written.write_bytes((PRESETS / "cpu.yaml").read_bytes())
    monkeypatch.setattr(config_args, "default_config_file", str(written))
    assert config_file_options(None) == ["--config_file", str(written)]
    assert config_file_options(PRESETS / "zero2.yaml")[1] == str(PRESETS / "zero2.yaml")


@pytest.mark.parametrize("text", ["a: [", "unknown_key: 1", "[]", ""])
def test_an_invalid_launcher_config_is_an_error(tmp_path: Path, text: str) -> None:
    file = tmp_path / "launcher.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"launcher\.yaml: not a config file of accelerate launch"):
        config_file_options(file)


class Failure:
    def __init__(self, exitcode: int, timestamp: int) -> None:
        self.exitcode, self.timestamp = exitcode, timestamp


@pytest.mark.parametrize(
    ("failures", "code"),
    [
        ([(2, 5)], 2),
        ([(143, 5), (-15, 6)], 143),
        ([(-15, 5), (143, 6)], 143),
        ([(1, 7), (3, 5)], 3),
        ([(-9, 5), (-15, 6)], -9),
    ],
)
def test_the_exit_code_is_that_of_the_rank_that_failed_first(failures: list[tuple[int, int]], code: int) -> None:
    assert launcher._first_exit_code({rank: Failure(*failure) for rank, failure in enumerate(failures)}) == code


@pytest.mark.parametrize("code", [0, 1, 2, 3, 130, 143])
def test_exit_codes_are_returned_unchanged(code: int) -> None:
    assert launcher._exit_code(code) == code


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 143), (signal.SIGUSR1, 143)]
)
def test_exit_code_of_a_process_that_a_signal_killed_at_startup(
    number: signal.Signals, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launcher._exit_code(-number) == code
    assert capsys.readouterr().err.startswith(f"stopped by {number.name} before training started")


@pytest.mark.parametrize(("number", "hint"), [(signal.SIGKILL, "out of memory"), (signal.SIGSEGV, "SIGSEGV")])
def test_a_killed_process_is_an_error(number: signal.Signals, hint: str) -> None:
    with pytest.raises(LoraAccelError, match=f"killed by {number.name}.*run|Run") as caught:
        launcher._exit_code(-number)
    assert hint in str(caught.value)
    assert caught.value.exit_code == 1


def test_a_signal_without_child_processes_ends_the_command() -> None:
    """Runs in a process of its own, since the test process may have children that would get the signal."""
    result = run_code(
        "import signal\n"
        "from lora_accel.errors import Aborted\n"
        "from lora_accel.launcher import SignalForwarder\n"
        "from lora_accel.training.stopping import signal_handler\n"
        "before = signal.getsignal(signal.SIGTERM)\n"
        "try:\n"
        "    with signal_handler(SignalForwarder().forward):\n"
        "        signal.raise_signal(signal.SIGTERM)\n"
        "except Aborted as aborted:\n"
        "    print(aborted.exit_code, signal.getsignal(signal.SIGTERM) is before)\n"
    )
    assert result.stdout.split() == ["143", "True"], result.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGQUIT])
def test_a_signal_is_forwarded_to_child_processes(number: signal.Signals) -> None:
    code = (
        "import signal, sys\n"
        f"signal.signal({int(number)}, lambda *_: sys.exit(7))\n"
        "print('ready', flush=True)\n"
        "while True: signal.pause()\n"
    )
    with signal_handler(SignalForwarder().forward):
        child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        assert child.stdout is not None
        child.stdout.readline()
        signal.raise_signal(number)
        assert child.wait(60) == 7
        child.stdout.close()


# Real launches


@pytest.fixture
def train_command(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Return a function that starts `lora-accel train` in an empty folder."""
    started: list[subprocess.Popen[str]] = []
    folder = tmp_path / "empty"
    folder.mkdir()

    def start(*arguments: str | Path, fault: str = "") -> subprocess.Popen[str]:
        environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "LORA_ACCEL_FAULT": fault}
        process = subprocess.Popen(
            [sys.executable, "-m", "lora_accel.cli", "train", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=folder,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | environment,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()


def test_a_wrong_config_is_one_message(config_file: Callable[..., Path], make_config: Callable[..., RunConfig]) -> None:
    file = config_file(make_config())
    with pytest.raises(ConfigError, match="trainin"):
        launch_training(file, ["trainin.epochs=3"])
    with pytest.raises(ConfigError, match=r"--launcher: none\.yaml does not exist"):
        launch_training(file, [], Path("none.yaml"))


@pytest.mark.distributed
def test_one_process_trains_and_its_error_is_printed_once(
    train_command: Callable[..., subprocess.Popen[str]],
    make_config: Callable[..., RunConfig],
    config_file: Callable[..., Path],
) -> None:
    config = make_config(training={"max_steps": 2})
    file = config_file(config)
    process = train_command("--config", file)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    line = shlex.split(out.splitlines()[0])
    assert line[:2] == ["accelerate", "launch"]
    assert line[-4:] == ["-m", "lora_accel.train", "--config", str(file)]
    assert out.splitlines()[-3:-1] == ["next:", f"  lora-accel chat --adapter {config.output_dir}/adapter"]
    assert "were not passed" not in err
    steps = [part for part in err.splitlines() if part.startswith("step ") and "loss" in part]
    assert [part.split()[1] for part in steps] == ["1/2", "2/2"]
    assert all(part.count("  ") == 4 and "left 0:" in part for part in steps), "complete lines"

    rows = Path(config.data.train[0].path)
    rows.write_text('{"messages": 3}\n')
    process = train_command("--config", file, f"output_dir={file.parent / 'other'}")
    out, err = process.communicate(timeout=600)
    assert process.returncode == 2
    assert "Traceback" not in err
    assert err.count("error") == 1, err


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("preset", "number", "code"),
    [("cpu_ddp", signal.SIGINT, 130), pytest.param("cpu", signal.SIGQUIT, 131, marks=pytest.mark.slow)],
)
def test_a_signal_saves_a_checkpoint_and_sets_the_exit_code(
    train_command: Callable[..., subprocess.Popen[str]],
    make_config: Callable[..., RunConfig],
    config_file: Callable[..., Path],
    preset: str,
    number: signal.Signals,
    code: int,
) -> None:
    config = make_config(checkpoint={"every_steps": 1})
    output = Path(config.output_dir)
    arguments = ("--config", config_file(config), "--launcher", PRESETS / f"{preset}.yaml")
    process = train_command(*arguments, fault="step.after_backward@3=sleep")
    wait_for(lambda: (output / "checkpoints" / "step-00000002").exists(), "no step 2", seconds=600)
    time.sleep(0.3)
    assert is_python(process.pid)
    pids = status(output)["pids"]
    process.send_signal(number)
    _, err = process.communicate(timeout=600)
    assert process.returncode == code, err
    assert "Traceback" not in err
    notice = "finishing this step, then saving"
    assert sum(notice in line for line in err.splitlines()) == 1, "only local rank 0 prints it"
    assert err.count(f"stopped by {number.name} on rank ") == 1
    assert not any(map(is_running, pids))
    assert (status(output)["state"], status(output)["step"]) == ("preempted", 3)
    assert json.loads((output / "status.json").read_text())["checkpoint"].endswith("step-00000003")


@pytest.mark.distributed
def test_a_signal_before_training_ends_the_command_with_one_line(
    train_command: Callable[..., subprocess.Popen[str]],
    make_config: Callable[..., RunConfig],
    config_file: Callable[..., Path],
) -> None:
    config = make_config()
    process = train_command("--config", config_file(config), "--launcher", PRESETS / "cpu.yaml")
    assert process.stdout is not None
    while "launch settings" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 143, err
    messages = [line for line in err.splitlines() if "stopped by" in line]
    assert messages == ["stopped by SIGTERM before training started; run the same command to start again"]
    assert "Traceback" not in err
    assert not Path(config.output_dir).exists()
