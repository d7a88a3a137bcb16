"""`lora-accel train`: runs `accelerate launch` within this process, with options for this machine.

The command returns the exit code of training and forwards signals to it. An error is printed once, by the process in
which it occurred.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from lora_accel.config.files import read_config
from lora_accel.console import Stage
from lora_accel.distributed.devices import LAUNCH_OPTIONS, unused_gpu
from lora_accel.errors import Aborted, ConfigError, LoraAccelError, exit_code_of
from lora_accel.saving.output_dir import check_output_folder
from lora_accel.training.stopping import SIGNALS, StartupHandler, signal_handler


def launch_training(config: Path, overrides: Sequence[str], launcher: Path | None = None) -> int:
    """Run training in processes started by `accelerate launch`, and return its exit code.

    Args:
        config: run config file.
        overrides: `section.key=value` options that override it.
        launcher: config file for `accelerate launch`; None = the file written by `accelerate config`, else options for
            this machine.

    Raises:
        ConfigError: the run config or the launcher's config is wrong; nothing was started.
        LoraAccelError: the training process was killed.
    """
    check_output_folder(Path(read_config(config, overrides).output_dir))
    if launcher is not None and not launcher.is_file():
        raise ConfigError(f"--launcher: {launcher} does not exist; the repository has presets in accelerate_configs/")
    training = ["-m", "lora_accel.train", "--config", str(config), *overrides]
    signals = SignalForwarder()
    try:
        with signal_handler(signals.forward):
            with Stage("importing PyTorch and Accelerate"):
                options = config_file_options(launcher) or machine_options(detect_machine())
                note = unused_gpu() if "--cpu" in options else None
            if note:
                print(f"note: training on the CPU: {note}", file=sys.stderr, flush=True)
            os.environ[LAUNCH_OPTIONS] = shlex.join(options)
            print(shlex.join(["accelerate", "launch", *options, *training]), flush=True)
            code = _run_accelerate_launch([*options, *training])
            signals.startup.is_over = True
    except Aborted as aborted:  # here, because typer's exit code for it is always 130
        print(aborted, file=sys.stderr, flush=True)
        return aborted.exit_code
    finally:
        signals.startup.close()
    return _exit_code(code)


class Machine(NamedTuple):
    """The hardware that training may use."""

    num_devices: int
    """Accelerators; 0 = train on the CPU."""
    num_threads: int | None
    """CPU threads; None = not set here."""


def detect_machine() -> Machine:
    """Detect the accelerators of this machine, or the CPU threads if it has none and OMP_NUM_THREADS is not set."""
    import psutil
    import torch

    if torch.accelerator.is_available():
        return Machine(torch.accelerator.device_count(), None)
    if os.environ.get("OMP_NUM_THREADS"):
        return Machine(0, None)
    num_cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Machine(0, min(num_cpus, psutil.cpu_count(logical=False) or num_cpus))


def machine_options(machine: Machine) -> list[str]:
    """Return the options of `accelerate launch` for one machine: one process per accelerator, or one on the CPU.

    Mixed precision is not among them: training chooses it.
    """
    options = ["--num_processes", str(max(1, machine.num_devices)), "--num_machines", "1", "--dynamo_backend", "no"]
    if machine.num_devices == 0:
        options.append("--cpu")
    if machine.num_devices > 1:
        options += ["--multi_gpu", "--main_process_port", "0"]  # 0 = a free port, so that two runs do not collide
    if machine.num_threads is not None:
        options += ["--num_cpu_threads_per_process", str(machine.num_threads)]
    return options


def config_file_options(launcher: Path | None) -> list[str]:
    """Return the options of `accelerate launch` that select a config file, empty if there is none.

    Args:
        launcher: the config file; None = the file written by `accelerate config`, if it exists.

    Raises:
        ConfigError: Accelerate cannot read the file.
    """
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file

    file = launcher or Path(default_config_file)
    if launcher is None and not file.is_file():
        return []
    try:
        values = load_config_from_file(str(file))
    except Exception as error:  # whatever a YAML parser and Accelerate's dataclasses raise
        raise ConfigError(f"{file}: not a config file of accelerate launch: {str(error).strip()}") from None
    options = ["--config_file", str(file)]
    is_single_machine = (getattr(values, "num_machines", 1) or 1) == 1
    if is_single_machine and (getattr(values, "num_processes", 1) or 1) > 1 and values.main_process_port is None:
        options += ["--main_process_port", "0"]
    return options


class SignalForwarder:
    """Forwards signals to the training processes, which save a checkpoint and exit; then this process exits too."""

    def __init__(self) -> None:
        self.startup = StartupHandler()

    def forward(self, number: int, frame: FrameType | None = None) -> None:
        """Send a signal to all child processes; without any, end the command.

        A terminal sends Ctrl-C to the children too. They ignore a second one within a second.

        Raises:
            Aborted: training has not started.
        """
        import psutil

        children = psutil.Process().children()
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.send_signal(number)
        if not children:
            self.startup.handle(number)


def _run_accelerate_launch(arguments: Sequence[str]) -> int:
    """Run `accelerate launch` and return the exit code of training; negative = the signal that killed it."""
    from subprocess import CalledProcessError

    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    parsed = launch_command_parser().parse_args(list(arguments))
    # torchrun forwards signals itself, but kills its processes after 30 seconds; a step may take longer.
    parsed.signals_to_handle = "none"
    logging.disable(logging.CRITICAL)  # training reports its errors itself, once
    try:
        launch_command(parsed)
    except CalledProcessError as error:
        return int(error.returncode)
    except ChildFailedError as error:
        return _first_exit_code(error.failures)
    except (ValueError, AssertionError, ImportError, ConnectionError) as error:
        raise ConfigError(f"accelerate launch: {error}") from None
    finally:
        logging.disable(logging.NOTSET)
    return 0


def _first_exit_code(failures: dict[int, Any]) -> int:
    """Return the exit code of the rank that failed first. Ranks killed by a signal count only if all were."""
    first, *others = sorted(failures.values(), key=lambda failure: failure.timestamp)
    return int(next((failure.exitcode for failure in (first, *others) if failure.exitcode > 0), first.exitcode))


def _exit_code(code: int) -> int:
    """Return the exit code of this command.

    Raises:
        LoraAccelError: training was killed and could not report it.
    """
    if code >= 0:
        return code
    number = -code
    if number in SIGNALS:  # it arrived while Python was starting, before there was a handler
        print(Aborted(number), file=sys.stderr, flush=True)
        return exit_code_of(number)
    name = signal.Signals(number).name
    hint = ", perhaps out of memory" if number == signal.SIGKILL else ""
    raise LoraAccelError(
        f"the training process was killed by {name}{hint}; the newest checkpoint is kept. "
        "Run the same command to resume"
    )
