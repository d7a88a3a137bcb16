"""Build the Accelerator from `accelerate launch` and the run config, and end launched processes together."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from lora_accel.config.launch import Launch, Precision, Settings, read_launch, reconcile
from lora_accel.config.schema import RunConfig
from lora_accel.console import format_table
from lora_accel.distributed.builds import wait_for_builds
from lora_accel.errors import ConfigError, did_you_mean, first_line
from lora_accel.logs import logger
from lora_accel.processes import end_with_parent, is_python

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.utils import DeepSpeedPlugin


def is_local_rank_0() -> bool:
    """Whether this process is local rank 0, which reports progress and errors."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def resolve_launch(config: RunConfig, checkpoint_precision: str | None) -> tuple[Launch, Settings]:
    """Read the launcher's settings, and resolve those that it shares with the run config.

    Imports torch only after everything else is checked, and only if the device decides the precision.

    Args:
        checkpoint_precision: mixed precision of the checkpoint to resume from; None = a new run.

    Raises:
        ConfigError: launcher and run config conflict.
    """
    launch = read_launch(os.environ)

    def default() -> Precision:
        if checkpoint_precision is not None:
            return Precision(checkpoint_precision, "the checkpoint")
        import torch

        from lora_accel.model.device import detect_device, native_precision

        value, reason = native_precision(detect_device(torch.device("cpu") if launch.use_cpu else None))
        return Precision(value, "this machine", reason)

    return launch, reconcile(config, launch, default)


def exit_with_launcher() -> None:
    """Ask the kernel to send SIGTERM to this process when its launcher dies.

    Otherwise this process would outlive it: `accelerate launch` of a single process forwards no signals, and no
    launcher can forward SIGKILL.

    Raises:
        ConfigError: the launcher has died already.
    """
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
    if not launched:  # started from a shell, which it may outlive
        return
    launcher = os.getppid()
    if not is_python(launcher):
        raise ConfigError(
            "the launcher of this process has died, so nothing would end it; start again with accelerate launch "
            "(if you set ACCELERATE_MIXED_PRECISION yourself, unset it)"
        )
    end_with_parent(launcher)


def make_accelerator(config: RunConfig, launch: Launch, settings: Settings) -> Accelerator:
    """Build the Accelerator.

    Raises:
        ConfigError: a tracker is unknown, the ranks did not join one group, or offload lacks its DeepSpeed op.
    """
    import torch
    from accelerate import Accelerator
    from accelerate.utils import (
        DistributedDataParallelKwargs,
        GradientAccumulationPlugin,
        GradScalerKwargs,
        InitProcessGroupKwargs,
        ProjectConfiguration,
    )

    check_trackers(config.logging.trackers)
    on_cpu = not torch.accelerator.is_available()
    joins_on_cpu = on_cpu and (launch.num_processes > 1 or launch.zero_stage > 0)
    # All buffers are constant, so DDP need not broadcast them before each forward.
    # The loop scales the loss itself: the scale is part of a checkpoint, and the same on every backend.
    handlers: list[Any] = [DistributedDataParallelKwargs(broadcast_buffers=False), GradScalerKwargs(enabled=False)]
    if joins_on_cpu:
        handlers.append(InitProcessGroupKwargs(backend="gloo"))
    accelerator = Accelerator(
        mixed_precision=settings.mixed_precision,
        # Without a GPU Accelerate joins launched processes only with cpu=True, which would disable DeepSpeed silently.
        cpu=joins_on_cpu and launch.zero_stage == 0,
        kwargs_handlers=handlers,
        deepspeed_plugin=_deepspeed_plugin(settings) if launch.zero_stage else None,
        # The loop sets the number of micro-batches of each step itself.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1, sync_with_dataloader=False),
        log_with=config.logging.trackers or None,
        project_config=ProjectConfiguration(project_dir=config.output_dir, logging_dir=config.output_dir),
    )
    if settings.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        emulate_fp16(accelerator)
    check_launch(accelerator, launch)
    check_offload(launch.offload)
    if accelerator.is_main_process:
        logger.info(format_table("launch settings", settings.rows, headers=("setting", "value", "decided by")))
        warn_if_emulated(accelerator)
    return accelerator


def emulate_fp16(accelerator: Accelerator) -> None:
    """Enable float16 on CPU: Accelerate would silently disable autocast, and DeepSpeed would raise."""
    import torch

    if accelerator.distributed_type.value != "DEEPSPEED":
        accelerator.native_amp, accelerator.scaler = True, torch.amp.GradScaler("cpu", enabled=False)
        return
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True


def warn_if_emulated(accelerator: Accelerator) -> None:
    """Warn if the device only emulates the mixed precision, which the user or a checkpoint may have set."""
    from lora_accel.model.device import detect_device, emulation_warning

    option = "training.mixed_precision=auto (in another output_dir, if this run is resumed)"
    warning = emulation_warning(detect_device(accelerator.device), accelerator.mixed_precision, option)
    if warning is not None:
        logger.warning(warning)


def check_trackers(names: list[str]) -> None:
    """Check that all trackers are installed: Accelerate would silently omit those that are not.

    Raises:
        ConfigError: a tracker is unknown or not installed.
    """
    from accelerate.tracking import get_available_trackers

    available = {"all", *(tracker.value for tracker in get_available_trackers())}
    for name in names:
        if name not in available:
            raise ConfigError(
                f"logging.trackers: {name!r} is unknown or not installed{did_you_mean(name, available)}; "
                f"installed here are {', '.join(sorted(available - {'all'}))}"
            )


def check_launch(accelerator: Accelerator, launch: Launch) -> None:
    """Check that the Accelerator has the number of processes and the backend that the launcher set.

    Raises:
        ConfigError: they differ; training would give wrong results.
    """
    if launch.num_processes != accelerator.num_processes:
        raise ConfigError(
            f"the launcher started {launch.num_processes} processes, but this one sees {accelerator.num_processes}; "
            "each would train alone and write to the same folder. Use a config from accelerate_configs/"
        )
    kind = accelerator.distributed_type.value
    expected = ("DEEPSPEED",) if launch.zero_stage else ("NO", "MULTI_CPU", "MULTI_GPU")
    if kind not in expected:
        raise ConfigError(
            f"Accelerate uses {kind} for this launch instead of {' or '.join(expected)}; use a config from "
            "accelerate_configs/"
        )


def check_offload(offload: Mapping[str, str]) -> None:
    """Check that DeepSpeed's ops for offload are available. Compiles them, so that a failure shows before training.

    Args:
        offload: device of `optimizer` and of `param`.

    Raises:
        ConfigError: an op cannot be compiled or loaded.
    """
    ops = {"CPUAdamBuilder": offload["optimizer"] != "none", "AsyncIOBuilder": "nvme" in offload.values()}
    if not any(ops.values()):
        return
    from deepspeed.accelerator import get_accelerator

    for op in (op for op, needed in ops.items() if needed):
        try:
            get_accelerator().create_op_builder(op).load(verbose=False)
        except Exception as error:  # a compiler can fail in many ways
            reason = first_line(error)
            raise ConfigError(
                f"offload to {', '.join(sorted(set(offload.values()) - {'none'}))} needs DeepSpeed's {op}: {reason}. "
                "Install what it needs (a C++ compiler, ninja; libaio for nvme), or use a config without offload"
            ) from None


def _deepspeed_plugin(settings: Settings) -> DeepSpeedPlugin:
    """Return Accelerate's DeepSpeed plugin for this launch, updated with the run config's values."""
    from accelerate.utils import DeepSpeedPlugin

    wait_for_extension_builds()
    try:
        plugin = DeepSpeedPlugin(gradient_accumulation_steps=1)
    except ValueError as error:
        raise ConfigError(f"accelerate launch: {error}") from None
    plugin.deepspeed_config.update(settings.deepspeed)
    return plugin


def wait_for_extension_builds() -> None:
    """Wait for builds of DeepSpeed's extensions in progress, and delete the locks of those that were killed.

    Without this, every process of this machine would wait for such a lock forever. Only local rank 0 cleans up.

    Raises:
        ConfigError: a lock is older than a build takes, and no process that is visible here holds it.
    """
    from torch.utils.cpp_extension import get_default_build_root

    if is_local_rank_0():
        wait_for_builds(Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()))


def exit_process(code: int) -> NoReturn:
    """End this process with an exit code. A rank of a process group ends without interpreter shutdown.

    During shutdown, gloo's threads abort in about 1 of 20 launches, and the launcher would report a failure.
    """
    distributed = sys.modules.get("torch.distributed")  # torch is not imported if the config is wrong
    if distributed is None or not distributed.is_initialized():
        sys.exit(code)
    if code == 0:
        distributed.barrier()
        distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
