"""`lora-accel train`: `accelerate launch` with what fits this machine, run within this process.

So the exit code of training becomes this command's, signals reach training, and an error is shown once, by the process
that met it.
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
from lora_accel.errors import Aborted, ConfigError, LoraAccelError, exit_code_of
from lora_accel.saving.lock import check_output_folder
from lora_accel.training.stopping import SIGNALS, signal_handler


def launch_training(config: Path, overrides: Sequence[str], launcher: Path | None = None) -> int:
    """Start training as a run config says, wait for it, and return its exit code.

    Args:
        launcher: config file of `accelerate launch`; None = what `accelerate config` wrote, else what this machine has.

    Raises:
        ConfigError: the run config or the launcher's is wrong; nothing was started.
        LoraAccelError: the training process was killed.
    """
    check_output_folder(Path(read_config(config, overrides).output_dir))
    if launcher is not None and not launcher.is_file():
        raise ConfigError(f"--launcher: there is no file {launcher}; a preset is in accelerate_configs/ of the sources")
    training = ["-m", "lora_accel.train", "--config", str(config), *overrides]
    signals = Signals()
    with signal_handler(signals.take):
        with Stage("importing PyTorch and Accelerate"):
            options = config_file_options(launcher) or machine_options(detect_machine())
        print(shlex.join(["accelerate", "launch", *options, *training]), flush=True)
        try:
            code = _accelerate_launch([*options, *training])
        finally:
            signals.is_over = True
    return _exit_code(code)


class Machine(NamedTuple):
    """What training may use."""

    num_devices: int
    """Accelerators; 0 = the CPU trains."""
    num_threads: int | None
    """Threads for the CPU; None = the environment says it."""


def detect_machine() -> Machine:
    """Return what this machine has."""
    import psutil
    import torch

    if torch.accelerator.is_available():
        return Machine(torch.accelerator.device_count(), None)
    if os.environ.get("OMP_NUM_THREADS"):
        return Machine(0, None)
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Machine(0, min(usable, psutil.cpu_count(logical=False) or usable))


def machine_options(machine: Machine) -> list[str]:
    """Return options of `accelerate launch` for one machine: a process for each accelerator, or one on the CPU.

    Precision is left out: training decides it.
    """
    options = ["--num_processes", str(max(1, machine.num_devices)), "--num_machines", "1", "--dynamo_backend", "no"]
    if machine.num_devices == 0:
        options.append("--cpu")
    if machine.num_devices > 1:
        options += ["--multi_gpu", "--main_process_port", "0"]  # 0 = a free one, so that two runs do not meet
    if machine.num_threads is not None:
        options += ["--num_cpu_threads_per_process", str(machine.num_threads)]
    return options


def config_file_options(launcher: Path | None) -> list[str]:
    """Return options of `accelerate launch` for a config file: this one, or what `accelerate config` wrote, or none.

    Raises:
        ConfigError: Accelerate cannot read it.
    """
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file

    file = launcher or Path(default_config_file)
    if launcher is None and not file.is_file():
        return []
    try:
        values = load_config_from_file(str(file))
    except Exception as error:  # whatever a YAML parser and Accelerate's dataclasses raise
        raise ConfigError(f"{file}: no config of accelerate launch: {str(error).strip()}") from None
    options = ["--config_file", str(file)]
    is_alone = (getattr(values, "num_machines", 1) or 1) == 1
    if is_alone and (getattr(values, "num_processes", 1) or 1) > 1 and values.main_process_port is None:
        options += ["--main_process_port", "0"]
    return options


class Signals:
    """Passes signals on to the processes that train; they save and end, and so does this process."""

    def __init__(self) -> None:
        self.is_over = False

    def take(self, number: int, frame: FrameType | None = None) -> None:
        """Take a signal.

        A terminal sends Ctrl-C to training, too, which takes what comes twice within a second for one.
        """
        import psutil

        children = psutil.Process().children()
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.send_signal(number)
        if not children and not self.is_over:
            self.is_over = True
            raise Aborted(number)


def _accelerate_launch(arguments: Sequence[str]) -> int:
    """Run `accelerate launch`; return the exit code of training, negative where a signal killed it."""
    from subprocess import CalledProcessError

    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    parsed = launch_command_parser().parse_args(list(arguments))
    # torchrun would pass signals on by itself, but kills after 30 seconds, which a step may take.
    parsed.signals_to_handle = "SIGQUIT"
    logging.disable(logging.CRITICAL)  # training itself reports what goes wrong, once
    try:
        launch_command(parsed)
    except CalledProcessError as error:
        return int(error.returncode)
    except ChildFailedError as error:
        return _code_of_ranks(error.failures)
    except (ValueError, AssertionError, ImportError, ConnectionError) as error:
        raise ConfigError(f"accelerate launch: {error}") from None
    finally:
        logging.disable(logging.NOTSET)
    return 0


def _code_of_ranks(failures: dict[int, Any]) -> int:
    """Return the exit code of the rank that failed first; one that was killed follows from another's failure."""
    first, *others = sorted(failures.values(), key=lambda failure: failure.timestamp)
    return int(next((failure.exitcode for failure in (first, *others) if failure.exitcode > 0), first.exitcode))


def _exit_code(code: int) -> int:
    """Return the exit code of this command.

    Raises:
        LoraAccelError: training was killed, and could not say so.
    """
    if code >= 0:
        return code
    number = -code
    if number in SIGNALS:  # it came while Python still read its files
        print(Aborted(number), file=sys.stderr, flush=True)
        return exit_code_of(number)
    name = signal.Signals(number).name
    hint = ", perhaps out of memory" if number == signal.SIGKILL else ""
    raise LoraAccelError(
        f"the training process was killed by {name}{hint}; the newest checkpoint is kept. "
        "Run the same command to resume"
    )
