"""The device that a launch asks for, against those of this machine."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lora_accel.config.launch import Launch, read_launch
from lora_accel.config.schema import RunConfig
from lora_accel.distributed import devices
from lora_accel.distributed.devices import (
    HIDDEN,
    LAUNCH_OPTIONS,
    check_devices,
    config_file_of,
    device_row,
    unused_gpu,
    why_no_gpu,
    with_requested_device,
)
from lora_accel.distributed.launch import make_accelerator, resolve_launch
from lora_accel.errors import ConfigError
from tests.distributed.launching import PRESETS

CPU_BUILD = torch.version.cuda is None and torch.version.hip is None
NO_GPU = pytest.mark.skipif(torch.accelerator.is_available(), reason="this machine has an accelerator")


def launch_with(monkeypatch: pytest.MonkeyPatch, *options: str | Path) -> tuple[Launch, dict[str, str]]:
    """Return the launch of these options of `accelerate launch`, and the variables that it sets."""
    monkeypatch.setenv(LAUNCH_OPTIONS, shlex.join(map(str, options)))
    environment: dict[str, str] = {}
    return with_requested_device(read_launch(environment), environment), environment


def gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)


# --- the allocator


@pytest.mark.parametrize(
    ("has_driver", "is_jetson", "options", "set_by_user", "expected"),
    [
        (True, False, (), {}, "expandable_segments:True"),
        (True, False, (), {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, "max_split_size_mb:64"),
        (True, False, (), {"PYTORCH_ALLOC_CONF": "expandable_segments:False"}, None),
        (True, False, ("--cpu",), {}, None),
        (True, True, (), {}, None),
        (False, False, (), {}, None),
    ],
)
def test_segments_expand_on_nvidia_gpus_unless_the_user_configures_the_allocator(
    make_config: Callable[..., RunConfig],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    has_driver: bool,
    is_jetson: bool,
    options: tuple[str, ...],
    set_by_user: dict[str, str],
    expected: str | None,
) -> None:
    """The environment of a rank, before it imports torch."""
    files = {"NVIDIA_DRIVER": has_driver, "JETSON": is_jetson}
    for name, exists in files.items():
        monkeypatch.setattr(devices, name, tmp_path / name)
        if exists:
            (tmp_path / name).touch()
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv(LAUNCH_OPTIONS, shlex.join(options or ("--num_processes", "1")))
    for name in (*HIDDEN, "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.setenv(name, "")  # restored after the test
        if name not in HIDDEN:
            monkeypatch.delenv(name)
    for name, value in set_by_user.items():
        monkeypatch.setenv(name, value)
    resolve_launch(make_config(), None)
    assert os.environ.get("PYTORCH_CUDA_ALLOC_CONF") == expected


# --- what the launcher asks for


@pytest.mark.parametrize("preset", sorted(PRESETS.glob("*.yaml")), ids=lambda path: path.stem)
def test_each_preset_asks_for_the_cpu_or_a_gpu(preset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launch, environment = launch_with(monkeypatch, "--config_file", preset)
    is_cpu = preset.stem.startswith("cpu")
    assert launch.use_cpu is is_cpu
    assert launch.gpu_config == (None if is_cpu else str(preset))
    assert environment == (HIDDEN if is_cpu else {}), "a preset for the CPU hides the GPUs"


def test_options_of_accelerate_launch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert launch_with(monkeypatch, "--cpu", "--config_file", PRESETS / "ddp.yaml")[0].use_cpu
    without_file, environment = launch_with(monkeypatch, "--num_processes", "1")
    assert not without_file.use_cpu
    assert without_file.gpu_config is None, "without a config file a laptop trains on its CPU"
    assert environment == {}
    default = tmp_path / "accelerate" / "default_config.yaml"
    default.parent.mkdir()
    default.write_text("use_cpu: false\n")
    assert launch_with(monkeypatch, "--num_processes", "1")[0].gpu_config == str(default)
    assert config_file_of([]) is None, "without accelerate launch, nobody reads it"
    assert config_file_of([f"--config_file={PRESETS / 'cpu.yaml'}"]) == PRESETS / "cpu.yaml"


@pytest.mark.parametrize("content", [None, "a: [", b"\xff\xfe\x00"])
def test_a_config_file_that_cannot_be_read(
    content: str | bytes | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "launch.yaml"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=r"launch\.yaml: not a config file of accelerate launch"):
        launch_with(monkeypatch, "--config_file", file)


@pytest.mark.parametrize("program", [["-m", "lora_accel.train"], ["own.py"]], ids=" ".join)
@pytest.mark.parametrize("launcher", [["accelerate", "launch"], ["-m", "accelerate.commands.launch"]], ids=" ".join)
def test_options_of_the_program_are_not_those_of_the_launcher(
    launcher: list[str], program: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["python", *launcher, "--num_processes", "2", *program, "--cpu"]
    monkeypatch.setattr("psutil.Process", lambda pid: SimpleNamespace(cmdline=lambda: command))
    monkeypatch.delenv(LAUNCH_OPTIONS, raising=False)
    assert devices._launcher_arguments() == ["--num_processes", "2"]


# --- what this machine has


@pytest.mark.parametrize(
    ("preset", "processes", "stage", "replacement"),
    [
        ("single_gpu", 1, None, "cpu.yaml"),
        ("ddp", 8, None, "cpu_ddp.yaml"),
        ("zero2", 8, 2, "cpu_zero2.yaml"),
        ("zero3", 8, 3, "cpu_zero3.yaml"),
    ],
)
def test_gpu_preset_without_a_gpu_is_an_error(
    preset: str, processes: int, stage: int | None, replacement: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(monkeypatch, 0)
    deepspeed = None if stage is None else {"zero_optimization": {"stage": stage}}
    with pytest.raises(ConfigError) as caught:
        check_devices(Launch(processes, "no", deepspeed, "accelerate launch", gpu_config=f"{preset}.yaml"), processes)
    message = str(caught.value)
    assert message.startswith(f"{preset}.yaml asks for a GPU (use_cpu: false), but torch can use none: ")
    assert message.endswith(f"accelerate_configs/{replacement}")
    check_devices(Launch(processes, "no", deepspeed, "accelerate launch", use_cpu=True), processes)


@pytest.mark.parametrize(("processes", "count"), [(1, 1), (8, 8), (2, 8), (2, 1), (9, 8)])
def test_more_processes_than_devices_is_an_error(processes: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, count)
    launch = Launch(16, "no", None, "accelerate launch")
    if processes <= count:
        check_devices(launch, processes)
        return
    with pytest.raises(ConfigError, match=f"started {processes} processes .* has {count} devices?,.* {count}, or"):
        check_devices(launch, processes)


def test_why_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    if CPU_BUILD:
        assert why_no_gpu() == (
            f"torch {torch.__version__} is a build without CUDA (https://pytorch.org/get-started has others)"
        )
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert why_no_gpu() == "CUDA_VISIBLE_DEVICES= hides all"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")

    def init() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\nPlease update")

    monkeypatch.setattr(torch.cuda, "init", init)
    assert why_no_gpu() == "The NVIDIA driver on your system is too old (found version 11040)"


def test_the_launch_table_names_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = Launch(1, "no", None, "accelerate launch")
    setting, value, decided_by = device_row(torch.device("cpu"), launch)
    assert (setting, decided_by) == ("device", "this machine")
    assert value.startswith(f"CPU, {torch.get_num_threads()} thread")
    assert value.endswith(f"(torch {torch.__version__})")
    h100 = type("Properties", (), {"name": "NVIDIA H100", "major": 9, "minor": 0, "total_memory": 84_929_347_584})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: h100)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert device_row(torch.device("cuda:0"), launch)[1] == (
        f"NVIDIA H100, compute capability 9.0, 85 GB (torch {torch.__version__}, CUDA 12.8)"
    )


@NO_GPU
def test_an_unused_gpu_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    driver = tmp_path / "version"
    monkeypatch.setattr(devices, "NVIDIA_DRIVER", driver)
    assert unused_gpu() is None
    driver.touch()
    reason = unused_gpu()
    assert reason is not None
    assert reason.startswith("the NVIDIA GPU is not used: ")
    row = device_row(torch.device("cpu"), Launch(1, "no", None, "accelerate launch"))
    assert reason in row[1]


@NO_GPU
def test_accelerate_launch_with_a_gpu_preset(
    make_config: Callable[..., RunConfig], config_file: Callable[[RunConfig], Path]
) -> None:
    """The real launcher: the training process reads its command line."""
    config = make_config()
    command = ["-m", "accelerate.commands.launch", "--config_file", PRESETS / "single_gpu.yaml"]
    command += ["-m", "lora_accel.train", "--config", config_file(config)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, *map(str, command)], env=environment, capture_output=True, text=True)
    assert "single_gpu.yaml asks for a GPU (use_cpu: false), but torch can use none" in result.stderr
    assert result.returncode != 0
    assert not Path(config.output_dir).exists()


def test_deterministic_kernels(make_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    """The option holds for its own run: the next one in this process chooses again."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    config = make_config(training={"deterministic": True})
    launch, settings = resolve_launch(config, None)
    make_accelerator(config, launch, settings)
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.utils.deterministic.fill_uninitialized_memory
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    make_accelerator(make_config(), launch, settings)
    assert not torch.are_deterministic_algorithms_enabled()
