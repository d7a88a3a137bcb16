"""The device of a launch: what the launcher asks for, what this machine has, and whether the two fit.

Accelerate trains on the CPU without a word if there is no GPU that torch can use, and lets processes share a GPU if
there are more of them than GPUs. Both are errors here.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
from collections.abc import MutableMapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lora_accel.config.launch import Launch, is_true
from lora_accel.errors import ConfigError, first_line

if TYPE_CHECKING:
    import torch

HIDDEN = {
    "CUDA_VISIBLE_DEVICES": "",
    "HIP_VISIBLE_DEVICES": "",
    "ASCEND_RT_VISIBLE_DEVICES": "",
    "ONEAPI_DEVICE_SELECTOR": "*:cpu",
}
"""Variables that hide the accelerators of this machine: NVIDIA, AMD, Ascend, Intel."""
LAUNCH_OPTIONS = "LORA_ACCEL_LAUNCH_OPTIONS"
"""Variable with the options of `accelerate launch` that `lora-accel train` runs within its own process."""
COMMAND = ["accelerate", "launch"]
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
"""Exists if the driver of an NVIDIA GPU is loaded. (Linux, without WSL)"""
JETSON = Path("/etc/nv_tegra_release")
"""Exists on NVIDIA's Jetson, whose GPU has no memory of its own."""
ALLOCATOR = "PYTORCH_CUDA_ALLOC_CONF"
"""Variable with the options of torch's allocator. Its newer name, PYTORCH_ALLOC_CONF, has no effect on CUDA in torch
2.9 (https://github.com/pytorch/pytorch/issues/183387); up to 2.11 torch warns that this one is deprecated."""


def with_requested_device(launch: Launch, environment: MutableMapping[str, str]) -> Launch:
    """Return a launch with the device that its launcher asks for, and hide the accelerators if that is the CPU.

    `accelerate launch` passes `use_cpu` to a single process only, so its command line is read. Call this before CUDA is
    initialized, which reads the variables.

    Raises:
        ConfigError: the launcher's config file cannot be read.
    """
    use_cpu, gpu_config = launch.use_cpu, None
    if not use_cpu:
        arguments = _launcher_arguments()
        use_cpu = "--cpu" in arguments
        file = None if use_cpu else config_file_of(arguments)
        if file is not None:
            use_cpu = reads_use_cpu(file)
            gpu_config = None if use_cpu else str(file)
    if use_cpu:
        environment.update(HIDDEN)
    return dataclasses.replace(launch, use_cpu=use_cpu, gpu_config=gpu_config)


def _launcher_arguments() -> list[str]:
    """Return the options of the `accelerate launch` that started this process, empty if there is none."""
    import psutil

    if LAUNCH_OPTIONS in os.environ:
        return shlex.split(os.environ[LAUNCH_OPTIONS])
    try:
        command: list[str] = psutil.Process(os.getppid()).cmdline()
    except psutil.Error:
        return []
    names = [Path(word).name for word in command]
    for end, name in enumerate(names, start=1):
        if name in ("accelerate.commands.launch", "accelerate-launch") or names[end - 2 : end] == COMMAND:
            options = command[end:]
            is_program = [word in ("-m", "--module") or word.endswith(".py") for word in options]
            return options[: [*is_program, True].index(True)]  # what follows are options of the program
    return []


def config_file_of(arguments: Sequence[str]) -> Path | None:
    """Return the config file in the options of `accelerate launch`, or the one that it reads without the option."""
    for position, word in enumerate(arguments):
        name, _, value = word.partition("=")
        if name in ("--config_file", "--config-file"):
            return Path(value or next(iter(arguments[position + 1 :]), ""))
    if not arguments:
        return None
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface")
    default = Path(home, "accelerate", "default_config.yaml").expanduser()
    return default if default.is_file() else None


def reads_use_cpu(file: Path) -> bool:
    """Whether a config file of `accelerate launch` asks for the CPU.

    Raises:
        ConfigError: the file cannot be read.
    """
    import yaml

    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{file}: not a config file of accelerate launch: {first_line(error)}") from None
    return isinstance(values, dict) and is_true(str(values.get("use_cpu")))


def check_devices(launch: Launch, num_local_ranks: int) -> None:
    """Check that this machine has the devices that a launch needs.

    Args:
        num_local_ranks: processes of this launch on this machine.

    Raises:
        ConfigError: it asks for a GPU that torch cannot use, or starts more processes than there are devices.
    """
    import torch

    if launch.use_cpu:
        return
    if not torch.accelerator.is_available():
        if launch.gpu_config is not None:
            raise ConfigError(
                f"{launch.gpu_config} asks for a GPU (use_cpu: false), but torch can use none: {why_no_gpu()}. To "
                f"train on the CPU use accelerate_configs/{_cpu_preset(launch)}"
            )
        return
    count = torch.accelerator.device_count()
    if num_local_ranks > count:
        raise ConfigError(
            f"the launcher started {num_local_ranks} processes on this machine, which has {count} device"
            f"{'s' * (count != 1)}, and two processes on one would take twice its memory; start with --num_processes "
            f"{count}, or check CUDA_VISIBLE_DEVICES"
        )


def use_expandable_segments(launch: Launch, environment: MutableMapping[str, str]) -> None:
    """Let torch's allocator grow its segments on NVIDIA GPUs, unless the user has configured the allocator.

    Micro-batches have different sizes, and what one frees is too small for the next. Call this before CUDA is
    initialized, which reads the variable. WSL, where allocations can fail with it
    (https://github.com/pytorch/pytorch/issues/192330), and Jetson are left out.
    """
    is_configured = ALLOCATOR in environment or "PYTORCH_ALLOC_CONF" in environment
    if not launch.use_cpu and not is_configured and NVIDIA_DRIVER.exists() and not JETSON.exists():
        environment[ALLOCATOR] = "expandable_segments:True"


def set_deterministic(enabled: bool) -> None:
    """Choose whether torch uses only deterministic kernels. Call this before CUDA is initialized.

    This covers the backward of FlashAttention, sums by index and cuBLAS, which needs a workspace of fixed size
    (https://docs.nvidia.com/cuda/cublas, "Results reproducibility"). An operation that has none raises.
    """
    import torch
    import torch.utils.deterministic

    if enabled:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        # It would write into every new tensor, which takes time, to show reads of uninitialized memory.
        setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010 - not in its type
    torch.use_deterministic_algorithms(enabled)


def why_no_gpu() -> str:
    """Return why torch can use no GPU: its build, the driver, or no visible device."""
    import torch

    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is a build without CUDA (https://pytorch.org/get-started has others)"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible in ("", "-1"):
        return f"CUDA_VISIBLE_DEVICES={visible} hides all"
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:  # for instance a driver that is too old for this torch
        return first_line(error)
    return "this machine has none"


def unused_gpu() -> str | None:
    """Return why torch does not use the NVIDIA GPU of this machine; None if it does, or there is none."""
    import torch

    if torch.accelerator.is_available() or not NVIDIA_DRIVER.exists():
        return None
    return f"the NVIDIA GPU is not used: {why_no_gpu()}"


def device_row(device: torch.device, launch: Launch) -> tuple[str, str, str]:
    """Return the row of the launch table that names the device: (setting, value, decided by)."""
    import torch

    build = f"torch {torch.__version__}"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name = f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
        name += f"{properties.total_memory / 1e9:.0f} GB"
        build += f", ROCm {torch.version.hip}" if torch.version.hip else f", CUDA {torch.version.cuda}"
    elif device.type == "cpu":
        name = f"CPU, {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() != 1)}"
        if not launch.use_cpu and (reason := unused_gpu()):
            name += f"; {reason}"
    else:
        name = device.type.upper()
    decided_by = launch.source if launch.use_cpu or launch.gpu_config else "this machine"
    return ("device", f"{name} ({build})", decided_by)


def _cpu_preset(launch: Launch) -> str:
    """Return the preset for the CPU that is like this launch."""
    if launch.zero_stage:
        return "cpu_zero3.yaml" if launch.zero_stage == 3 else "cpu_zero2.yaml"
    return "cpu_ddp.yaml" if launch.num_processes > 1 else "cpu.yaml"
