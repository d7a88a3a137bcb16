"""What the launcher says and what the run config says, brought to one value each. Pure; refuses what cannot agree.

The launcher owns processes, ZeRO stage and offload. The run config owns accumulation, clipping and batch sizes, and
precision where it is not auto. DeepSpeed's `auto` is filled from it; another explicit value is an error.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lora_accel.config.schema import RunConfig
from lora_accel.errors import ConfigError

WORLD_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Where launchers leave the number of processes: torchrun and Accelerate, then MPI's."""
MEETING = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What processes need to find each other."""
OTHER_BACKENDS = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
}
CHANGES_THE_RESULT = (
    *("torch_autocast", "amp", "bfloat16", "elasticity", "tensor_parallel", "sequence_parallel_size"),
    *("compression_training", "curriculum_learning", "data_efficiency", "progressive_layer_drop"),
)
"""Keys of a DeepSpeed config that would change what is computed, or which rank computes what."""
LOSS_SCALE = {"loss_scale": 0, "initial_scale_power": 16, "hysteresis": 1, "min_loss_scale": 1}
"""DeepSpeed's part of the loss scale: it scales, unscales and skips; training/loss_scale.py sets the value."""
NEVER_GROWS = 2**30
"""Steps after which DeepSpeed would raise the loss scale by itself: it does so before it unscales that step."""
LAUNCHER = "accelerate launch"
RUN_CONFIG = "run config"


@dataclasses.dataclass(frozen=True)
class Launch:
    """What the launcher asked for."""

    num_processes: int
    mixed_precision: str
    """no | bf16 | fp16 | fp8."""
    deepspeed: dict[str, Any] | None
    """DeepSpeed's config as it was asked for; None = DeepSpeed does not run."""
    source: str
    """Who asked: accelerate launch, or the DeepSpeed JSON."""
    use_cpu: bool = False
    """Whether a GPU that is there is left alone."""

    @property
    def zero(self) -> dict[str, Any]:
        """Return DeepSpeed's `zero_optimization`, empty without DeepSpeed."""
        return self.deepspeed["zero_optimization"] if self.deepspeed is not None else {}

    @property
    def zero_stage(self) -> int:
        """Return ZeRO's stage, 0 without DeepSpeed."""
        return int(self.zero.get("stage", 0))

    @property
    def offload(self) -> dict[str, str]:
        """Return where `optimizer` states and `param`eters rest: none | cpu | nvme."""
        devices = {key: (self.zero.get(f"offload_{key}") or {}).get("device") for key in ("optimizer", "param")}
        return {key: "none" if device in (None, "auto") else str(device) for key, device in devices.items()}

    @property
    def gathers_16bit(self) -> bool:
        """Whether a ZeRO-3 model may be collected whole on one rank."""
        return self.zero.get("stage3_gather_16bit_weights_on_model_save") is True


class Precision(NamedTuple):
    """A mixed precision: no | bf16 | fp16, who decided it, and why."""

    value: str
    decided_by: str
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Settings:
    """One value for everything that two sides could set."""

    mixed_precision: str
    deepspeed: dict[str, Any]
    """What is written over DeepSpeed's config: all in it that the run config owns."""
    rows: list[tuple[str, str, str]]
    """(setting, value, who decided), for a person."""


def read_launch(environment: Mapping[str, str]) -> Launch:
    """Read what `accelerate launch` (or torchrun, or MPI) left in the environment.

    Raises:
        ConfigError: it is contradictory, or asks for a backend that is not supported.
    """
    for variable, backend in OTHER_BACKENDS.items():
        if _is_true(environment.get(variable)):
            raise ConfigError(
                f"accelerate launch asks for {backend}, which is not supported: adapters are trained and gathered "
                "under one process, DDP, or DeepSpeed ZeRO. To shard the base, use accelerate_configs/zero3.yaml"
            )
    if environment.get("ACCELERATE_DYNAMO_BACKEND", "NO").upper() != "NO":
        raise ConfigError(
            "accelerate launch asks for torch.compile (dynamo_backend) of a whole model, which is not supported; say "
            "'no' there, and training.compile=true for its layers"
        )
    num_processes = next((_number(environment, name) for name in WORLD_SIZES if environment.get(name)), None)
    if num_processes is None and environment.get("MASTER_ADDR"):
        raise ConfigError(
            "the launcher was asked for several processes (MASTER_ADDR is set) and started one (WORLD_SIZE is not): "
            "`accelerate launch --cpu` does so without MPI. Use accelerate_configs/cpu_ddp.yaml, or unset MASTER_ADDR"
        )
    with_deepspeed = _is_true(environment.get("ACCELERATE_USE_DEEPSPEED"))
    if with_deepspeed or ((num_processes or 1) > 1 and environment.get("WORLD_SIZE")):
        missing = [name for name in MEETING if not environment.get(name)]
        if missing:
            asked = "ACCELERATE_USE_DEEPSPEED is true" if with_deepspeed else f"WORLD_SIZE is {num_processes}"
            raise ConfigError(
                f"{asked}, but {', '.join(missing)} is not set: the processes could not meet. Start with `accelerate "
                f"launch`, or unset {asked.split()[0]}"
            )
    deepspeed, source = None, LAUNCHER
    if with_deepspeed:
        file = environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
        if file not in ("", "none", "None"):
            deepspeed, source = _read_json(Path(file)), file
        else:
            deepspeed = _from_environment(environment)
    precision = environment.get("ACCELERATE_MIXED_PRECISION", "").lower() or "no"
    return Launch(num_processes or 1, precision, deepspeed, source, _is_true(environment.get("ACCELERATE_USE_CPU")))


def reconcile(config: RunConfig, launch: Launch, default: Callable[[], Precision]) -> Settings:
    """Bring both sides to one value for each setting.

    Args:
        default: the precision where neither side names one; asked only then, and after all else has been checked.

    Raises:
        ConfigError: they cannot agree, or what they agree on cannot work; every reason in one message.
    """
    problems: list[str] = []
    if launch.deepspeed is not None:
        problems += _disagreements(config, launch)
        problems += _unworkable(config, launch)
    asked = _asked_precision(config, launch)
    if problems and asked is None:
        raise ConfigError("\n".join(problems))  # before torch is imported to see what the device computes
    precision = asked or _unless_excluded(default(), launch)
    problems = _precision_problems(config, launch, precision) + problems
    if problems:
        raise ConfigError("\n".join(problems))
    overwrite = {} if launch.deepspeed is None else _owned_by_the_run(config, launch, precision.value)
    return Settings(precision.value, overwrite, _rows(config, launch, precision))


def _asked_precision(config: RunConfig, launch: Launch) -> Precision | None:
    """Return the mixed precision that one side names; None if neither does.

    A launcher's `no` is none: Accelerate writes it where nobody has asked for anything.
    """
    enabled = [name for name in ("bf16", "fp16") if _value(launch.deepspeed, f"{name}.enabled") is True]
    if config.training.mixed_precision != "auto":
        return Precision(config.training.mixed_precision, RUN_CONFIG)
    if enabled:
        return Precision(enabled[0], launch.source)
    if launch.mixed_precision != "no":
        return Precision(launch.mixed_precision, LAUNCHER)
    return None


def _unless_excluded(precision: Precision, launch: Launch) -> Precision:
    """Return no mixed precision where a DeepSpeed JSON switches the default one off."""
    if _value(launch.deepspeed, f"{precision.value}.enabled") is False:
        return Precision("no", launch.source, f"{precision.value}.enabled is false")
    return precision


def _precision_problems(config: RunConfig, launch: Launch, precision: Precision) -> list[str]:
    """Return what contradicts the mixed precision."""
    value, decided_by, _ = precision
    option = {
        RUN_CONFIG: "training.mixed_precision",
        LAUNCHER: "accelerate launch's mixed_precision",
    }.get(decided_by, "mixed precision")
    found = []
    for name in ("bf16", "fp16"):
        explicit = _value(launch.deepspeed, f"{name}.enabled")
        if explicit not in (None, "auto") and explicit is not (value == name):
            found.append(
                f"{launch.source}: {name}.enabled is {json.dumps(explicit)}, but {option} is {value}; "
                'use "auto" there, or the same in both'
            )
    if value not in ("no", "bf16", "fp16"):
        asked = "training.mixed_precision=" if decided_by == RUN_CONFIG else "mixed precision "
        found.append(f"{asked}{value} is not supported; use bf16, fp16, or no")
    if _value(launch.deepspeed, "fp16.loss_scale") not in (None, "auto", 0) and value == "fp16":
        found.append(f"{launch.source}: fp16.loss_scale is fixed, but the loss scale is dynamic here; set it to 0")
    held = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}.get(value)
    if launch.deepspeed is not None and held and config.model.dtype not in ("auto", held):
        found.append(
            f"model.dtype={config.model.dtype} under DeepSpeed, which keeps all weights in {held} at mixed precision "
            f"{value}; let model.dtype be auto, or change training.mixed_precision"
        )
    return found


def _disagreements(config: RunConfig, launch: Launch) -> list[str]:
    """Return what DeepSpeed's config says explicitly and otherwise than the run config."""
    training = config.training
    batch_size, batch_option = training.examples_per_step(launch.num_processes), "training.batch_size"
    if training.micro_batch_size is not None:
        batch_option = "training.micro_batch_size x gradient_accumulation_steps x processes"
    accumulation = training.gradient_accumulation_steps
    if training.micro_batch_size is not None and accumulation is None:
        accumulation = 1
    owned = {
        "gradient_accumulation_steps": ("training.gradient_accumulation_steps", accumulation),
        "gradient_clipping": ("training.max_grad_norm", training.max_grad_norm),
        "train_batch_size": (batch_option, batch_size),
        "train_micro_batch_size_per_gpu": ("training.micro_batch_size", training.micro_batch_size),
    }
    found = []
    for key, (option, value) in owned.items():
        explicit = _value(launch.deepspeed, key)
        if explicit in (None, "auto") or explicit == value:
            continue
        # 1 is what DeepSpeed is given anyway: the loop says which micro-batch is a step's last.
        if key == "gradient_accumulation_steps" and explicit == 1 and value is None:
            continue
        ours = (
            f"{option} is {value}" if value is not None else f"a step's micro-batches are cut by tokens, not {option}"
        )
        found.append(
            f'{launch.source}: {key} is {json.dumps(explicit)}, but {ours}; say "auto" there, or the same in both'
        )
    found += [
        f"{launch.source}: {key!r} would replace what the run config's training section says; take it out"
        for key in ("optimizer", "scheduler")
        if key in (launch.deepspeed or {})
    ]
    found += [
        f"{launch.source}: {key!r} would change what is computed, and is not supported; take it out"
        for key in CHANGES_THE_RESULT
        if key in (launch.deepspeed or {})
    ]
    found += [
        f"{launch.source}: zero_optimization.{key} would change what is computed, and is not supported; take it out"
        for key in ("zero_quantized_weights", "zero_quantized_gradients")
        if launch.zero.get(key)
    ]
    return found


def _unworkable(config: RunConfig, launch: Launch) -> list[str]:
    """Return what cannot work under DeepSpeed, each with the way out."""
    stage = launch.zero_stage
    found = []
    if stage not in (1, 2, 3):
        found.append(f"{launch.source}: ZeRO stage {stage}; use 1, 2 or 3, or accelerate_configs/ddp.yaml for none")
    if stage == 3 and config.quantization.bits is not None:
        found.append(
            f"quantization.bits={config.quantization.bits} with ZeRO-3: packed weights cannot be partitioned. ZeRO-2 "
            "and a quantised base save more memory (accelerate_configs/zero2.yaml), or set quantization.bits=null"
        )
    if stage == 3 and config.training.compile:
        found.append(
            "training.compile with ZeRO-3: weights are gathered between a layer's products, which leaves nothing to "
            "fuse (measured: no faster); set it to false, or use ZeRO-2"
        )
    if stage == 3 and config.adapter.trainable_token_indices is not None:
        found.append("adapter.trainable_token_indices: PEFT cannot gather them under ZeRO-3; use ZeRO-2 or DDP")
    stages = {"optimizer": (2, 3), "param": (3,)}
    for name, device in launch.offload.items():
        if device == "nvme" and name == "optimizer":
            found.append(
                f"{launch.source}: offload_optimizer to nvme is not supported: moments that are swapped out could not "
                "be restored from a checkpoint. An adapter's are small; say cpu, or none"
            )
        elif device == "nvme" and launch.zero["offload_param"].get("nvme_path") in (None, "none", ""):
            found.append(
                f"{launch.source}: offload_param to nvme has no nvme_path; give a folder of a local disk in a "
                "DeepSpeed JSON (accelerate launch does not pass its own on), or say cpu"
            )
        elif device not in ("none", "cpu", "nvme"):
            found.append(f"{launch.source}: offload_{name}.device is {device!r}; it must be none, cpu or nvme")
        if device != "none" and stage not in stages[name]:
            needed = " or ".join(map(str, stages[name]))
            found.append(f"{launch.source}: offload_{name} is supported here with ZeRO stage {needed}, not {stage}")
    if "cpu_offload" in launch.zero:
        found.append(f'{launch.source}: cpu_offload is no longer read; say "offload_optimizer": {{"device": "cpu"}}')
    if stage == 3 and config.checkpoint.gather == "state_dict" and not launch.gathers_16bit:
        found.append(
            "checkpoint.gather=state_dict needs zero3_save_16bit_model (DeepSpeed: "
            "stage3_gather_16bit_weights_on_model_save) under ZeRO-3; set it to true, or let gather be auto"
        )
    return found


def _owned_by_the_run(config: RunConfig, launch: Launch, precision: str) -> dict[str, Any]:
    """Return what is written over DeepSpeed's config.

    DeepSpeed never sees a batch: the loop gives it sums that are already weighted, one by one, and says which is a
    step's last. So its own batch sizes are 1, whatever the run's are.
    """
    asked = launch.deepspeed or {}
    return {
        "gradient_accumulation_steps": 1,
        "train_micro_batch_size_per_gpu": 1,
        "train_batch_size": launch.num_processes,
        "gradient_clipping": config.training.max_grad_norm,
        # A step with a gradient that is not finite is never made.
        "bf16": {**asked.get("bf16", {}), "enabled": precision == "bf16", "check_grad_overflow": True},
        "fp16": {"enabled": True, **LOSS_SCALE, "loss_scale_window": NEVER_GROWS}
        if precision == "fp16"
        else {"enabled": False},
        # An adapter's gradients are small: summed over micro-batches and ranks in float32 they cost nothing.
        **({"communication_data_type": "fp32"} | _explicit(asked, "communication_data_type")),
        "data_types": {"grad_accum_dtype": "fp32"} | _explicit(asked.get("data_types", {})),
    }


def _rows(config: RunConfig, launch: Launch, precision: Precision) -> list[tuple[str, str, str]]:
    training = config.training
    if launch.deepspeed is not None:
        how = f"DeepSpeed ZeRO-{launch.zero_stage}"
    else:
        how = "DDP" if launch.num_processes > 1 else "one process"
    rows = [("processes", str(launch.num_processes), LAUNCHER), ("backend", how, launch.source)]
    if launch.deepspeed is not None:
        where = f"optimizer {launch.offload['optimizer']}, parameters {launch.offload['param']}"
        rows.append(("offload", where, launch.source))
        if launch.zero_stage == 3:
            kept = {"bf16": "bfloat16", "fp16": "float16"}.get(precision.value, "float32")
            rows.append(("base dtype", kept, launch.source))
            rows.append(("gather 16-bit on save", str(launch.gathers_16bit).lower(), launch.source))
    if training.micro_batch_size is not None:
        cut = f"{training.micro_batch_size} examples a device"
        accumulation = f"{training.gradient_accumulation_steps or 1} micro-batches"
    else:
        cut, accumulation = f"{training.micro_batch_tokens} tokens a device", "as many micro-batches as a step needs"
    rows += [
        ("mixed precision", f"{precision.value}{precision.reason and f' ({precision.reason})'}", precision.decided_by),
        ("gradient accumulation", accumulation, RUN_CONFIG),
        ("gradient clipping", f"{training.max_grad_norm:g}", RUN_CONFIG),
        ("batch size", f"{training.examples_per_step(launch.num_processes)} examples a step", RUN_CONFIG),
        ("micro-batch", cut, RUN_CONFIG),
    ]
    return rows


def _from_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    """Return the DeepSpeed config that Accelerate will make of its own YAML's `deepspeed_config`."""

    def get(name: str, default: str = "none") -> str:
        return environment.get(f"ACCELERATE_DEEPSPEED_{name}", default)

    asked: dict[str, Any] = {
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
    # `accelerate config` writes an accumulation of 1 unasked, so 1 is no wish.
    if environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "auto") not in ("auto", "1"):
        asked["gradient_accumulation_steps"] = _number(environment, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS")
    if environment.get("ACCELERATE_GRADIENT_CLIPPING", "auto") != "auto":
        asked["gradient_clipping"] = _number(environment, "ACCELERATE_GRADIENT_CLIPPING", kind=float)
    return asked


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"deepspeed_config_file: {path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"deepspeed_config_file: {path} is no JSON: {error}") from None
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


def _explicit(values: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    """Return the values, or those of some keys, that are not left open."""
    return {key: value for key, value in values.items() if value != "auto" and (not keys or key in keys)}


def _number(environment: Mapping[str, str], name: str, default: str = "", kind: type = int) -> Any:
    """Return a number that the launcher left."""
    text = environment.get(name, default)
    try:
        return kind(text)
    except ValueError:
        raise ConfigError(f"the environment variable {name} is {text!r}, which is no number; start anew") from None


def _value(config: Mapping[str, Any] | None, key: str) -> Any:
    """Return the value under a dotted key, None where there is none."""
    node: Any = config
    for word in key.split("."):
        node = node.get(word) if isinstance(node, Mapping) else None
    return node


def _is_true(text: str | None) -> bool:
    return (text or "").lower() in ("1", "true", "yes", "y", "on", "t")
