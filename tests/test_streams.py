"""A command whose output is closed, full or missing: it ends or continues, without a traceback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_accel.config.schema import RunConfig
from tests.conftest import PATIENCE_SECONDS, ROOT

pytestmark = pytest.mark.launch

PROGRAM = """
import sys, time
from pathlib import Path
from lora_accel.console import Stage, run_command
def command():
    with Stage("working"):
        time.sleep({stage})
    for _ in range(2000):
        print("a line of output")
    print("a warning", file=sys.stderr)
    Path({mark!r}).write_text("done")
code = run_command(command, should_continue={should_continue})
sys.exit(code)
"""


def run(
    code: str, stdout: Any = subprocess.PIPE, stderr: Any = subprocess.PIPE, **options: Any
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        stdout=stdout,
        stderr=stderr,
        text=True,
        cwd=ROOT,
        timeout=PATIENCE_SECONDS,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        **options,
    )


def closed_pipe() -> int:
    """Return the writing end of a pipe that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def cli(*args: str | Path) -> str:
    """Return a program that runs `lora-accel …`."""
    return f"import sys\nfrom lora_accel.cli import main\nsys.argv[1:] = {list(map(str, args))!r}\nmain()"


def program(mark: Path, *, should_continue: bool, stage: float = 0) -> str:
    return PROGRAM.format(mark=str(mark), should_continue=should_continue, stage=stage)


@pytest.mark.parametrize("should_continue", [False, True])
def test_closed_stdout_ends_a_command_that_only_prints(tmp_path: Path, should_continue: bool) -> None:
    result = run(program(tmp_path / "mark", should_continue=should_continue), stdout=closed_pipe())
    assert result.returncode == (0 if should_continue else 141)
    assert (tmp_path / "mark").exists() == should_continue
    note = "note: stdout cannot be written to (Broken pipe); continuing without it\na warning\n"
    assert result.stderr == (note if should_continue else "")


def test_text_that_a_terminal_cannot_show_is_escaped() -> None:
    code = "from lora_accel.console import run_command; run_command(lambda: print(chr(0x20AC), chr(0xDCFF)))"
    for encoding, expected in (("ascii", "\\u20ac \\udcff\n"), ("utf-8", "\u20ac \\udcff\n")):
        result = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            cwd=ROOT,
            check=True,
            env=os.environ | {"PYTHONIOENCODING": encoding},
        )
        assert result.stdout.decode() == expected


def test_closed_stderr_with_a_long_stage(tmp_path: Path) -> None:
    """The stage is shown by a thread."""
    result = run(program(tmp_path / "mark", should_continue=True, stage=2.3), stderr=closed_pipe())
    assert result.returncode == 0
    assert (tmp_path / "mark").exists()
    assert "note: stderr cannot be written to" in result.stdout
    assert result.stdout.count("a line of output\n") == 2000


@pytest.mark.parametrize("should_continue", [False, True])
def test_full_device_is_one_message(tmp_path: Path, should_continue: bool) -> None:
    with open("/dev/full", "w", encoding="utf-8") as full:
        result = run(program(tmp_path / "mark", should_continue=should_continue), stdout=full)
    assert result.returncode == (0 if should_continue else 3)
    assert "Traceback" not in result.stderr
    assert ("No space left on device" if should_continue else "No space left on device: '<stdout>'") in result.stderr
    assert (tmp_path / "mark").exists() == should_continue


def test_exit_code_is_kept_if_the_message_cannot_be_written(tmp_path: Path) -> None:
    """Standard error may be on the same full disk. It was a traceback, which nobody saw, with exit code 1."""
    with open("/dev/full", "w", encoding="utf-8") as full:
        code = run(program(tmp_path / "mark", should_continue=False), stdout=full, stderr=full).returncode
    assert code == 3


@pytest.mark.parametrize("number", [1, 2])
def test_stream_that_does_not_exist(tmp_path: Path, number: int) -> None:
    """`>&-`: the next file that opens would get its number, and everything that is printed."""
    code = (
        "import os, sys\n"
        f"os.close({number})\n"
        f"sys.{'stdout' if number == 1 else 'stderr'} = None\n"  # as Python starts then
        + program(tmp_path / "mark", should_continue=False)
    )
    result = run(code)
    assert result.returncode == 0, (result.stdout, result.stderr)
    assert (tmp_path / "mark").read_text() == "done"


@pytest.mark.parametrize("module", ["lora_accel.train", "lora_accel.cli"])
def test_ctrl_c_during_imports_ends_without_a_traceback(tmp_path: Path, module: str) -> None:
    (tmp_path / "pydantic.py").write_text(
        f"import time\nopen({str(tmp_path / 'mark')!r}, 'w').close()\ntime.sleep(600)\n", encoding="utf-8"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT / "src")])}
    process = subprocess.Popen([sys.executable, "-m", module], stderr=subprocess.PIPE, text=True, env=environment)
    while not (tmp_path / "mark").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (-signal.SIGINT, "")


def test_importing_the_package_keeps_the_handler_of_a_program() -> None:
    code = "import signal, lora_accel\nprint(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    assert run(code).stdout == "True\n"


def test_signal_that_an_import_hides_ends_the_process() -> None:
    code = (
        "import os, signal, time\n"
        "from lora_accel.training import stopping\n"
        "stopping.ABORT_SECONDS = 0.3\n"
        "with stopping.abort_on_signal():\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "        time.sleep(1)\n"
        "    except BaseException:\n"
        "        pass\n"
        "    time.sleep(600)\n"
    )
    result = run(code)
    expected = "stopped by SIGTERM before training started; run the same command to start again\n"
    assert (result.returncode, result.stderr) == (143, expected)


def test_a_printing_command_into_head() -> None:
    result = run(cli("plan", "--schema"), stdout=closed_pipe())
    assert (result.returncode, result.stderr) == (141, "")


@pytest.mark.distributed
@pytest.mark.slow
def test_training_continues_after_head(config_file: Callable[..., Path], make_config: Callable[..., RunConfig]) -> None:
    """Under the launcher, whose first line ends `head`."""
    config = make_config(training={"max_steps": 1})
    result = run(cli("train", "--config", config_file(config)), stdout=closed_pipe())
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    assert "note: stdout cannot be written to (Broken pipe); continuing without it" in result.stderr
    assert (Path(config.output_dir) / "adapter" / "adapter_model.safetensors").is_file()
