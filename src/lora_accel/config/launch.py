"""Resolves each setting that the launcher and the run config share to one value, or reports the conflict.

The launcher owns the processes, the ZeRO stage and offload. The run config owns gradient accumulation, clipping, batch
sizes, and precision unless it is auto. `auto` in a DeepSpeed config is filled from the run config; a different explicit
value is an error. No function here reads the environment or imports torch.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lora_accel.config.deepspeed_json import key_problems, section_problems, section_rows, value_of
from lora_accel.config.optimizers import OPTIMIZERS
from lora_accel.config.schema import RunConfig
from lora_accel.errors import ConfigError, join_or
from lora_accel.json_text import unique_keys
from lora_accel.paths import open_to_read

WORLD_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Variables that hold the number of processes: of torchrun and Accelerate, then of MPI launchers."""
RENDEZVOUS = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""Variables that torch.distributed needs to connect the processes."""
OTHER_BACKENDS = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
}
LOSS_SCALE = {"loss_scale": 0, "initial_scale_power": 16, "hysteresis": 1, "min_loss_scale": 1}
"""DeepSpeed scales the loss, unscales gradients and skips overflows; training/loss_scale.py sets the scale."""
LOSS_SCALE_WINDOW = 2**30
"""Steps until DeepSpeed raises the loss scale itself: never, because it would raise it before it unscales that step."""
LAUNCHER = "accelerate launch"
RUN_CONFIG = "run config"


@dataclasses.dataclass(frozen=True)
class Launch:
    """The launcher's settings."""

    num_processes: int
    mixed_precision: str
    """no | bf16 | fp16 | fp8."""
    deepspeed: dict[str, Any] | None
    """DeepSpeed's config before `auto` is filled; None = no DeepSpeed."""
    source: str
    """Origin of the settings, for messages: accelerate launch, or the path of the DeepSpeed JSON."""
    use_cpu: bool = False
    """Whether to run on the CPU even if there is a GPU."""
    gpu_config: str | None = None
    """The config file of accelerate launch, if it asks for a GPU."""
    launcher: str = LAUNCHER
    """What started the processes: accelerate launch, deepspeed, torchrun, MPI, or nothing."""

    @property
    def zero(self) -> dict[str, Any]:
        """Return DeepSpeed's `zero_optimization`, empty without DeepSpeed."""
        return self.deepspeed["zero_optimization"] if self.deepspeed is not None else {}

    @property
    def zero_stage(self) -> int:
        """Return the ZeRO stage, 0 without DeepSpeed."""
        return int(self.zero.get("stage", 0))

    @property
    def offload(self) -> dict[str, str]:
        """Return the offload device of `optimizer` states and `param`eters: none | cpu | nvme."""
        devices = {key: (self.zero.get(f"offload_{key}") or {}).get("device") for key in ("optimizer", "param")}
        return {key: "none" if device in (None, "auto") else str(device) for key, device in devices.items()}

    @property
    def gathers_16bit(self) -> bool:
        """Whether DeepSpeed may gather the full ZeRO-3 model on one rank."""
        return self.zero.get("stage3_gather_16bit_weights_on_model_save") is True


class Precision(NamedTuple):
    """A mixed precision (no | bf16 | fp16), what decided it, and the reason."""

    value: str
    decided_by: str
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Settings:
    """The resolved settings."""

    mixed_precision: str
    deepspeed: dict[str, Any]
    """Values to write over DeepSpeed's config: everything in it that the run config owns."""
    rows: list[tuple[str, str, str]]
    """(setting, value, decided by), to print."""


def read_launch(environment: Mapping[str, str]) -> Launch:
    """Read the variables that `accelerate launch`, torchrun or MPI set.

    Raises:
        ConfigError: they contradict each other, or ask for a backend that is not supported.
    """
    for variable, backend in OTHER_BACKENDS.items():
        if is_true(environment.get(variable)):
            raise ConfigError(
                f"accelerate launch asks for {backend}, which is not supported: adapters are trained with one "
                "process, DDP, or DeepSpeed ZeRO. To shard the base, use accelerate_configs/zero3.yaml"
            )
    if environment.get("ACCELERATE_DYNAMO_BACKEND", "NO").upper() != "NO":
        raise ConfigError(
            "accelerate launch asks for torch.compile of the entire model (dynamo_backend), which is not supported; "
            "set dynamo_backend to 'no', and training.compile=true to compile the decoder layers"
        )
    num_processes = next((_number(environment, name) for name in WORLD_SIZES if environment.get(name)), None)
    if num_processes is None and environment.get("MASTER_ADDR"):
        raise ConfigError(
            "MASTER_ADDR is set, but WORLD_SIZE is not: several processes were requested and one was started, as "
            "`accelerate launch --cpu` does without MPI. Use accelerate_configs/cpu_ddp.yaml, or unset MASTER_ADDR"
        )
    uses_deepspeed = is_true(environment.get("ACCELERATE_USE_DEEPSPEED"))
    if uses_deepspeed or ((num_processes or 1) > 1 and environment.get("WORLD_SIZE")):
        missing = [name for name in RENDEZVOUS if not environment.get(name)]
        if missing:
            cause = "ACCELERATE_USE_DEEPSPEED is true" if uses_deepspeed else f"WORLD_SIZE is {num_processes}"
            raise ConfigError(
                f"{cause}, but {', '.join(missing)} is not set, so the processes cannot connect to each other. Start "
                f"with `accelerate launch`, or unset {cause.split()[0]}"
            )
    launcher = _launcher(environment)
    deepspeed, source = None, launcher
    if uses_deepspeed:
        source = LAUNCHER
        file = environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
        if file not in ("", "none", "None"):
            deepspeed, source = _read_json(Path(file)), file
        else:
            deepspeed = _from_environment(environment)
    precision = environment.get("ACCELERATE_MIXED_PRECISION", "").lower() or "no"
    use_cpu = is_true(environment.get("ACCELERATE_USE_CPU"))
    return Launch(num_processes or 1, precision, deepspeed, source, use_cpu, launcher=launcher)


def _launcher(environment: Mapping[str, str]) -> str:
    """Return the name of the program that started the processes."""
    if environment.get("WORLD_SIZE"):
        # torchrun comes last: accelerate launch runs it too.
        marks = {"CROSS_SIZE": "deepspeed", "ACCELERATE_MIXED_PRECISION": LAUNCHER, "TORCHELASTIC_RUN_ID": "torchrun"}
        return next((name for mark, name in marks.items() if mark in environment), "the environment")
    if any(environment.get(name) for name in WORLD_SIZES):
        return "MPI"
    return LAUNCHER if "ACCELERATE_MIXED_PRECISION" in environment else "no launcher"


def reconcile(config: RunConfig, launch: Launch, default: Callable[[], Precision]) -> Settings:
    """Resolve each shared setting to one value.

    Args:
        default: returns the precision if neither side sets one. Called last, and only if needed: it may import torch.

    Raises:
        ConfigError: the two sides conflict, or the combination is not supported. The message lists every reason.
    """
    problems: list[str] = []
    if launch.deepspeed is not None:
        problems += _conflicts(config, launch)
        problems += _unsupported(config, launch)
    requested = _requested_precision(config, launch)
    if problems and requested is None:
        raise ConfigError("\n".join(problems))  # before `default` imports torch
    precision = requested or _unless_disabled(default(), launch)
    problems = _precision_problems(config, launch, precision) + problems
    if problems:
        raise ConfigError("\n".join(problems))
    deepspeed = {} if launch.deepspeed is None else _deepspeed_values(config, launch, precision.value)
    return Settings(precision.value, deepspeed, _rows(config, launch, precision))


def _requested_precision(config: RunConfig, launch: Launch) -> Precision | None:
    """Return the mixed precision that one side sets; None if neither does.

    The launcher's `no` does not count: Accelerate sets it by default.
    """
    enabled = [name for name in ("bf16", "fp16") if value_of(launch.deepspeed, f"{name}.enabled") is True]
    if config.training.mixed_precision != "auto":
        return Precision(config.training.mixed_precision, RUN_CONFIG)
    if enabled:
        return Precision(enabled[0], launch.source)
    if launch.mixed_precision != "no":
        return Precision(launch.mixed_precision, LAUNCHER)
    return None


def _unless_disabled(precision: Precision, launch: Launch) -> Precision:
    """Return the precision, or `no` if a DeepSpeed JSON disables it."""
    if value_of(launch.deepspeed, f"{precision.value}.enabled") is False:
        return Precision("no", launch.source, f"{precision.value}.enabled is false")
    return precision


def _precision_problems(config: RunConfig, launch: Launch, precision: Precision) -> list[str]:
    """Return the settings that contradict the mixed precision."""
    value, decided_by, _ = precision
    option = {
        RUN_CONFIG: "training.mixed_precision",
        LAUNCHER: "accelerate launch's mixed_precision",
    }.get(decided_by, "mixed precision")
    problems = []
    for name in ("bf16", "fp16"):
        explicit = value_of(launch.deepspeed, f"{name}.enabled")
        if explicit not in (None, "auto") and explicit is not (value == name):
            problems.append(
                f"{launch.source}: {name}.enabled is {json.dumps(explicit)}, but {option} is {value}; "
                'use "auto" there, or the same value in both'
            )
    if value not in ("no", "bf16", "fp16"):
        prefix = "training.mixed_precision=" if decided_by == RUN_CONFIG else "mixed precision "
        problems.append(f"{prefix}{value} is not supported; use bf16, fp16, or no")
    if value_of(launch.deepspeed, "fp16.loss_scale") not in (None, "auto", 0) and value == "fp16":
        problems.append(f"{launch.source}: fp16.loss_scale is fixed, but the loss scale is dynamic here; set it to 0")
    dtype = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}.get(value)
    if launch.deepspeed is not None and dtype and config.model.dtype not in ("auto", dtype):
        problems.append(
            f"model.dtype={config.model.dtype} is not supported under DeepSpeed, which keeps all weights in {dtype} "
            f"with mixed precision {value}; set model.dtype=auto, or change training.mixed_precision"
        )
    return problems


def _conflicts(config: RunConfig, launch: Launch) -> list[str]:
    """Return the explicit values in DeepSpeed's config that contradict the run config or are not supported."""
    training = config.training
    batch_size, batch_option = training.examples_per_step(launch.num_processes), "training.batch_size"
    if training.micro_batch_size is not None:
        batch_option = "training.micro_batch_size x gradient_accumulation_steps x processes"
    accumulation = training.gradient_accumulation_steps
    if training.micro_batch_size is not None and accumulation is None:
        accumulation = 1
    owned = {
        "gradient_accumulation_steps": ("training.gradient_accumulation_steps", accumulation),
        "gradient_clipping": ("training.max_grad_norm", training.max_grad_norm)
        if training.max_grad_norm
        else ("training.max_grad_norm is null, so it", 0.0),
        "train_batch_size": (batch_option, batch_size),
        "train_micro_batch_size_per_gpu": ("training.micro_batch_size", training.micro_batch_size),
    }
    problems = []
    for key, (option, value) in owned.items():
        explicit = value_of(launch.deepspeed, key)
        if explicit in (None, "auto") or explicit == value:
            continue
        # DeepSpeed always gets 1: the loop itself marks the last micro-batch of a step.
        if key == "gradient_accumulation_steps" and explicit == 1 and value is None:
            continue
        ours = (
            f"{option} is {value}"
            if value is not None
            else f"micro-batches are sized by training.micro_batch_tokens, not {option}"
        )
        problems.append(
            f'{launch.source}: {key} is {json.dumps(explicit)}, but {ours}; use "auto" there, or the same value in both'
        )
    problems += section_problems(config, launch.deepspeed or {}, launch.source)
    problems += key_problems(launch.deepspeed or {}, launch.source)
    return problems


def _unsupported(config: RunConfig, launch: Launch) -> list[str]:
    """Return the settings that are not supported under DeepSpeed, each with an alternative."""
    stage = launch.zero_stage
    problems = []
    if stage not in (1, 2, 3):
        problems.append(
            f"{launch.source}: ZeRO stage {stage} is not supported; use 1, 2 or 3, or accelerate_configs/ddp.yaml "
            "for no sharding"
        )
    if stage == 3 and config.quantization.bits is not None:
        problems.append(
            f"quantization.bits={config.quantization.bits} with ZeRO-3 is not supported: quantized weights cannot be "
            "sharded. Use ZeRO-2 with a quantized base, which saves more memory (accelerate_configs/zero2.yaml), or "
            "set quantization.bits=null"
        )
    if stage == 3 and config.training.compile:
        problems.append(
            "training.compile with ZeRO-3 is not supported: weights are gathered between a layer's matrix products, "
            "so nothing can be fused (measured: no faster); set it to false, or use ZeRO-2"
        )
    if stage == 3 and config.adapter.trainable_token_indices is not None:
        problems.append("adapter.trainable_token_indices: PEFT cannot gather them under ZeRO-3; use ZeRO-2 or DDP")
    problems += _unsupported_optimizer(config.training.optimizer, launch) + _unsupported_offload(launch)
    if stage == 3 and config.checkpoint.gather == "state_dict" and not launch.gathers_16bit:
        problems.append(
            "checkpoint.gather=state_dict needs zero3_save_16bit_model (DeepSpeed: "
            "stage3_gather_16bit_weights_on_model_save) under ZeRO-3; set it to true, or checkpoint.gather=auto"
        )
    return problems


def _unsupported_optimizer(optimizer: str, launch: Launch) -> list[str]:
    if reason := OPTIMIZERS[optimizer].zero_problem:
        supported = join_or(name for name, spec in OPTIMIZERS.items() if not spec.zero_problem)
        return [
            f"training.optimizer={optimizer} is not supported under DeepSpeed: {reason}. Use {supported}, or DDP "
            "(accelerate_configs/ddp.yaml)"
        ]
    if optimizer != "adamw" and launch.offload["optimizer"] != "none":
        return [
            f"{launch.source}: offload_optimizer with training.optimizer={optimizer} is not supported: DeepSpeed "
            "updates offloaded moments with its own AdamW; use training.optimizer=adamw, or no offload"
        ]
    return []


def _unsupported_offload(launch: Launch) -> list[str]:
    stage, problems = launch.zero_stage, []
    stages = {"optimizer": (2, 3), "param": (3,)}
    for name, device in launch.offload.items():
        if device == "nvme" and name == "optimizer":
            problems.append(
                f"{launch.source}: offload_optimizer to nvme is not supported: a checkpoint cannot restore moments "
                "that are swapped out. An adapter's moments are small; use cpu, or none"
            )
        elif device == "nvme" and launch.zero["offload_param"].get("nvme_path") in (None, "none", ""):
            problems.append(
                f"{launch.source}: offload_param to nvme has no nvme_path; set it to a folder on a local disk in a "
                "DeepSpeed JSON (accelerate launch does not forward its own), or use cpu"
            )
        elif device not in ("none", "cpu", "nvme"):
            problems.append(f"{launch.source}: offload_{name}.device is {device!r}; it must be none, cpu or nvme")
        if device != "none" and stage not in stages[name]:
            needed = " or ".join(map(str, stages[name]))
            problems.append(f"{launch.source}: offload_{name} is supported with ZeRO stage {needed}, not {stage}")
    if "cpu_offload" in launch.zero:
        problems.append(f'{launch.source}: cpu_offload is deprecated; use "offload_optimizer": {{"device": "cpu"}}')
    return problems


def _deepspeed_values(config: RunConfig, launch: Launch, precision: str) -> dict[str, Any]:
    """Return the values to write over DeepSpeed's config.

    Its batch sizes are 1, since DeepSpeed never sees a batch: the loop passes it one weighted loss per micro-batch and
    marks the last one of each step.
    """
    values = launch.deepspeed or {}
    return {
        "gradient_accumulation_steps": 1,
        "train_micro_batch_size_per_gpu": 1,
        "train_batch_size": launch.num_processes,
        "gradient_clipping": config.training.max_grad_norm or 0.0,  # 0 = no clipping
        # Skip a step whose gradient is not finite.
        "bf16": {**_non_auto(values.get("bf16") or {}), "enabled": precision == "bf16", "check_grad_overflow": True},
        "fp16": {"enabled": True, **LOSS_SCALE, "loss_scale_window": LOSS_SCALE_WINDOW}
        if precision == "fp16"
        else {"enabled": False},
        # float32 sums over micro-batches and ranks cost nothing: an adapter's gradients are small.
        **({"communication_data_type": "fp32"} | _non_auto(values, "communication_data_type")),
        "data_types": {"grad_accum_dtype": "fp32"} | _non_auto(values.get("data_types") or {}),
    }


def _rows(config: RunConfig, launch: Launch, precision: Precision) -> list[tuple[str, str, str]]:
    training = config.training
    if launch.deepspeed is not None:
        backend = f"DeepSpeed ZeRO-{launch.zero_stage}"
    else:
        backend = "DDP" if launch.num_processes > 1 else "one process"
        if launch.launcher == "deepspeed":
            backend += " (for ZeRO pass --deepspeed FILE)"
    rows = [("processes", str(launch.num_processes), launch.launcher), ("backend", backend, launch.source)]
    if launch.deepspeed is not None:
        devices = f"optimizer {launch.offload['optimizer']}, parameters {launch.offload['param']}"
        rows.append(("offload", devices, launch.source))
        if launch.zero_stage == 3:
            dtype = {"bf16": "bfloat16", "fp16": "float16"}.get(precision.value, "float32")
            rows.append(("base dtype", dtype, launch.source))
            rows.append(("gather 16-bit on save", str(launch.gathers_16bit).lower(), launch.source))
    if training.micro_batch_size is not None:
        micro_batch = f"{training.micro_batch_size} examples per device"
        accumulation = f"{training.gradient_accumulation_steps or 1} micro-batches"
    else:
        tokens = training.micro_batch_tokens
        micro_batch = "auto: before the first step" if tokens == "auto" else f"{tokens} tokens per device"
        accumulation = "as needed per step"
    rows += [
        ("mixed precision", f"{precision.value}{precision.reason and f' ({precision.reason})'}", precision.decided_by),
        ("gradient accumulation", accumulation, RUN_CONFIG),
        ("gradient clipping", f"{training.max_grad_norm:g}" if training.max_grad_norm else "none", RUN_CONFIG),
        ("batch size", f"{training.examples_per_step(launch.num_processes)} examples per step", RUN_CONFIG),
        ("micro-batch", micro_batch, RUN_CONFIG),
    ]
    return rows + [(name, value, RUN_CONFIG) for name, value in section_rows(config, launch.deepspeed or {})]


def _from_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    """Return the DeepSpeed config that Accelerate builds from the `deepspeed_config` of its own YAML."""

    def get(name: str, default: str = "none") -> str:
        return environment.get(f"ACCELERATE_DEEPSPEED_{name}", default)

    values: dict[str, Any] = {
        "zero_optimization": {
            "stage": _number(environment, "ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"),
            "offload_optimizer": {
                "device": get("OFFLOAD_OPTIMIZER_DEVICE"),
                "nvme_path": get("OFFLOAD_OPTIMIZER_NVME_PATH"),
            },
            "offload_param": {"device": get("OFFLOAD_PARAM_DEVICE"), "nvme_path": get("OFFLOAD_PARAM_NVME_PATH")},
            "stage3_gather_16bit_weights_on_model_save": get("ZERO3_SAVE_16BIT_MODEL").lower() == "true",
        }
    }
    # `accelerate config` writes 1 by default, so 1 is not a request.
    if environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "auto") not in ("auto", "1"):
        values["gradient_accumulation_steps"] = _number(environment, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS")
    if environment.get("ACCELERATE_GRADIENT_CLIPPING", "auto") != "auto":
        values["gradient_clipping"] = _number(environment, "ACCELERATE_GRADIENT_CLIPPING", kind=float)
    return values


def _read_json(path: Path) -> dict[str, Any]:
    try:
        with open_to_read(path) as file:
            value = json.loads(file.read().decode("utf-8"), object_pairs_hook=unique_keys)
    except OSError as error:
        raise ConfigError(f"deepspeed_config_file: {path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"deepspeed_config_file: {path} is not valid JSON: {error}") from None
    if not isinstance(value, dict) or not isinstance(value.get("zero_optimization"), dict):
        raise ConfigError(f'deepspeed_config_file: {path} has no "zero_optimization": {{"stage": …}}')
    zero = value["zero_optimization"]
    if type(zero.get("stage")) is not int:
        raise ConfigError(f"deepspeed_config_file: {path}: zero_optimization.stage must be 1, 2 or 3")
    sections = {key: value.get(key) for key in ("bf16", "fp16", "data_types")}
    sections |= {f"zero_optimization.{key}": zero.get(key) for key in ("offload_optimizer", "offload_param")}
    for key, section in sections.items():
        if section is not None and not isinstance(section, dict):
            raise ConfigError(f"deepspeed_config_file: {path}: {key} must be an object, not {json.dumps(section)}")
    return value


def _non_auto(values: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    """Return the values, or those of some keys, that are not `auto`."""
    return {key: value for key, value in values.items() if value != "auto" and (not keys or key in keys)}


def _number(environment: Mapping[str, str], name: str, default: str = "", kind: type = int) -> Any:
    """Return the number in an environment variable."""
    text = environment.get(name, default)
    try:
        return kind(text)
    except ValueError:
        raise ConfigError(
            f"the environment variable {name} is {text!r}, which is not a number; fix or unset it"
        ) from None


def is_true(text: str | None) -> bool:
    """Whether the value of an environment variable means true, as Accelerate reads it."""
    return (text or "").lower() in ("1", "true", "yes", "y", "on", "t")
