"""Build the Accelerator from `accelerate launch` and the run config, and end launched processes together."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from lora_accel.config.deepspeed_json import deepspeed_values
from lora_accel.config.launch import LAUNCHER, RENDEZVOUS, Launch, Precision, Settings, read_launch, reconcile
from lora_accel.config.schema import RunConfig
from lora_accel.console import format_table
from lora_accel.distributed.builds import exclusive_builds
from lora_accel.distributed.devices import (
    check_devices,
    device_row,
    set_deterministic,
    use_expandable_segments,
    with_requested_device,
)
from lora_accel.errors import ConfigError, did_you_mean, first_line
from lora_accel.logs import logger
from lora_accel.processes import end_with_parent, is_python

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.utils import DeepSpeedPlugin

LAUNCH_TYPES: dict[str, str | None] = {
    "NO": None,
    "MULTI_CPU": None,
    "MULTI_GPU": None,  # NVIDIA and AMD
    "MULTI_XPU": None,
    "MULTI_NPU": None,
    "MULTI_HPU": None,
    "DEEPSPEED": None,
    "MULTI_MLU": "Cambricon MLU",
    "MULTI_MUSA": "Moore Threads MUSA",
    "MULTI_NEURON": "AWS Neuron",
    "MULTI_SDAA": "Tecorigin SDAA",
    "XLA": "XLA (TPU)",
    "FSDP": "FSDP",
    "MEGATRON_LM": "Megatron-LM",
}
"""Accelerate's `DistributedType` -> what is not supported in it; None = it is supported."""
DEVICES = ("cpu", "cuda", "xpu", "npu", "hpu", "mps")
"""torch's types of devices that are supported; ROCm is cuda."""


def is_local_rank_0() -> bool:
    """Whether this process is local rank 0, which reports progress and errors."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def check_local_rank(local_rank: int) -> None:
    """Check the option --local_rank, which some launchers pass, against LOCAL_RANK.

    Args:
        local_rank: -1 = not passed.

    Raises:
        ConfigError: they differ.
    """
    value = os.environ.get("LOCAL_RANK", "0")
    if local_rank >= 0 and str(local_rank) != value:
        state = f"LOCAL_RANK is {value}" if "LOCAL_RANK" in os.environ else "LOCAL_RANK is not set"
        raise ConfigError(
            f"--local_rank={local_rank}, but {state}; start with accelerate launch, torchrun or deepspeed, which set "
            "both, and leave the option to them"
        )


def use_deepspeed(file: str) -> None:
    """Train with the DeepSpeed JSON of the option --deepspeed, as if accelerate launch had passed it.

    Raises:
        ConfigError: accelerate launch configured DeepSpeed itself, or there is no launcher.
    """
    missing = [name for name in RENDEZVOUS if not os.environ.get(name)]
    if missing:
        raise ConfigError(
            f"--deepspeed {file}: {', '.join(missing)} is not set; start with deepspeed, torchrun or accelerate launch"
        )
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        raise ConfigError(f"--deepspeed {file}: accelerate launch configures DeepSpeed already; use one of the two")
    os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": file}


def resolve_launch(config: RunConfig, checkpoint_precision: str | None) -> tuple[Launch, Settings]:
    """Read the launcher's settings, and resolve those that it shares with the run config.

    Imports torch only after everything else is checked, and only if the device decides the precision.

    Args:
        checkpoint_precision: mixed precision of the checkpoint to resume from; None = a new run.

    Raises:
        ConfigError: launcher and run config conflict.
    """
    launch = with_requested_device(read_launch(os.environ), os.environ)
    use_expandable_segments(launch, os.environ)

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
    # Set by accelerate launch, torchrun, and the launcher of DeepSpeed.
    marks = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID", "CROSS_SIZE")
    if not any(mark in os.environ for mark in marks):  # started from a shell, which it may outlive
        return
    launcher = os.getppid()
    if not is_python(launcher):
        raise ConfigError(
            "the launcher of this process has died, so nothing would end it; start again with accelerate launch "
            "(if you set ACCELERATE_MIXED_PRECISION yourself, unset it)"
        )
    end_with_parent(launcher)


def make_accelerator(config: RunConfig, launch: Launch, settings: Settings) -> Accelerator:
    """Build the Accelerator, and log its settings.

    Raises:
        ConfigError: a tracker is unknown, this machine lacks the devices of the launch, the ranks did not join one
            group, or offload lacks its DeepSpeed op.
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
    check_devices(launch, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    set_deterministic(config.training.deterministic)
    on_cpu = launch.use_cpu or not torch.accelerator.is_available()
    if launch.zero_stage:
        load_extensions(launch.offload)
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
        deepspeed_plugin=_deepspeed_plugin(launch, settings) if launch.zero_stage else None,
        # The loop sets the number of micro-batches of each step itself.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1, sync_with_dataloader=False),
        log_with=config.logging.trackers or None,
        project_config=ProjectConfiguration(project_dir=config.output_dir, logging_dir=config.output_dir),
    )
    if settings.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        emulate_fp16(accelerator)
    check_launch(accelerator, launch)
    if accelerator.is_main_process:
        rows = [device_row(accelerator.device, launch), *settings.rows]
        logger.info(format_table("launch settings", rows, headers=("setting", "value", "decided by")))
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
    from accelerate.utils import LoggerType

    available = {"all", *(tracker.value for tracker in get_available_trackers())}
    missing = [name for name in names if name not in available and name in [kind.value for kind in LoggerType]]
    if missing:
        raise ConfigError(
            f"logging.trackers: not installed: {', '.join(missing)}; run pip install {' '.join(missing)}, or leave out "
            "what is not installed"
        )
    for name in names:
        if name not in available:
            raise ConfigError(
                f"logging.trackers: {name!r} is not a tracker of Accelerate{did_you_mean(name, available)}; "
                f"installed here are {', '.join(sorted(available - {'all'}))}"
            )


def check_launch(accelerator: Accelerator, launch: Launch) -> None:
    """Check that the Accelerator has the number of processes and the backend that the launcher set.

    Raises:
        ConfigError: they differ, and training would give wrong results; or the backend or the device is not supported.
    """
    kind, device = accelerator.distributed_type.value, accelerator.device.type
    unsupported = LAUNCH_TYPES.get(kind, kind) or (None if device in DEVICES else device.upper())
    if unsupported is not None:
        raise ConfigError(
            f"accelerate launch uses {unsupported}, which is not supported: runs train on {', '.join(DEVICES[:-1])} or "
            f"{DEVICES[-1]}, with one process, DDP or DeepSpeed ZeRO. Use a config from accelerate_configs/; to train "
            "on the CPU, cpu.yaml"
        )
    if launch.num_processes != accelerator.num_processes:
        raise ConfigError(
            f"the launcher started {launch.num_processes} processes, but this one sees {accelerator.num_processes}; "
            "each would train alone and write to the same folder. Use a config from accelerate_configs/"
        )
    if (kind == "DEEPSPEED") != bool(launch.zero_stage):
        expected = "DEEPSPEED" if launch.zero_stage else "one process or DDP"
        raise ConfigError(
            f"Accelerate uses {kind} for this launch instead of {expected}; use a config from accelerate_configs/"
        )


def load_extensions(offload: Mapping[str, str]) -> None:
    """Build and load the extensions of DeepSpeed that a run needs, so that a failure shows before training.

    DeepSpeed keeps what is loaded, and so takes no lock of torch's later (see distributed/builds.py).

    Args:
        offload: device of `optimizer` and of `param`.

    Raises:
        ConfigError: an extension cannot be compiled or loaded.
    """
    from deepspeed.accelerator import get_accelerator

    devices = f"offload to {', '.join(sorted(set(offload.values()) - {'none'}))}"
    users = {"ShareMemCommBuilder": "DeepSpeed on CPUs"} if _has_shared_memory_op() else {}
    users |= {"CPUAdamBuilder": devices} if offload["optimizer"] != "none" else {}
    users |= {"AsyncIOBuilder": devices} if "nvme" in offload.values() else {}
    if not users:
        return
    root, is_own = extensions_root()
    with exclusive_builds(root, is_own=is_own):
        for name, user in users.items():
            try:
                get_accelerator().create_op_builder(name).load(verbose=False)
            except Exception as error:  # a compiler can fail in many ways
                raise ConfigError(
                    f"{user} needs DeepSpeed's {name}: {first_line(error)}. Install what it needs (a C++ compiler, "
                    f"ninja; libaio for nvme), or use a config without {user.split()[0]}"
                ) from None


def _has_shared_memory_op() -> bool:
    """Whether DeepSpeed exchanges tensors through an extension: on CPUs."""
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    return builder is not None and bool(deepspeed.ops.__compatible_ops__.get(builder.NAME, False))


def extensions_root() -> tuple[Path, bool]:
    """Return the folder in which torch builds extensions, and whether only this package builds there.

    Unless TORCH_EXTENSIONS_DIR is set, it becomes a folder for this package and these versions in torch's cache.
    """
    import deepspeed
    import torch
    from torch.utils.cpp_extension import get_default_build_root

    own = Path(get_default_build_root(), f"lora_accel-torch-{torch.__version__}-deepspeed-{deepspeed.__version__}")
    root = Path(os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(own)))
    return root, root == own


def _deepspeed_plugin(launch: Launch, settings: Settings) -> DeepSpeedPlugin:
    """Return Accelerate's DeepSpeed plugin for this launch, updated with the run config's values.

    Raises:
        ConfigError: Accelerate or DeepSpeed rejects a value.
    """
    from accelerate.utils import DeepSpeedPlugin
    from deepspeed.runtime.config import DeepSpeedConfig, DtypeEnum
    from pydantic import ValidationError

    # For a file, Accelerate gets the content that was checked.
    content = None if launch.source == LAUNCHER else deepspeed_values(launch.deepspeed or {})
    try:
        plugin = DeepSpeedPlugin(hf_ds_config=content, gradient_accumulation_steps=1)
        plugin.deepspeed_config.update(settings.deepspeed)
        # Without what depends on the model or on the other ranks, which this process has not met yet.
        values = deepspeed_values(plugin.deepspeed_config, keep_computed=False)
        DeepSpeedConfig({key: value for key, value in values.items() if key != "train_batch_size"})
        DtypeEnum(values["data_types"]["grad_accum_dtype"])
    except ValidationError as error:
        reasons = [f"{'.'.join(map(str, reason['loc']))}: {reason['msg']}" for reason in error.errors()]
        raise ConfigError(f"{launch.source}: DeepSpeed rejects {'; '.join(reasons)}") from None
    except Exception as error:  # each of DeepSpeed's sections is read by code of its own
        raise ConfigError(f"{launch.source}: DeepSpeed rejects the config: {first_line(error)}") from None
    return plugin


def connect_store(num_processes: int) -> Any:
    """Return a connection to the store through which the ranks have met; None for one process, or without a store."""
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if num_processes == 1 or not address or not port:
        return None
    import torch.distributed

    distributed: Any = torch.distributed  # its type does not export the stores
    try:
        store = distributed.TCPStore(address, int(port), is_master=False, wait_for_workers=False)
    except Exception as error:  # the ranks may have met in another way
        logger.warning(f"note: a stalled rank will not be reported: no store at {address}:{port} ({error})")
        return None
    return distributed.PrefixStore("lora_accel/heartbeat", store)


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
