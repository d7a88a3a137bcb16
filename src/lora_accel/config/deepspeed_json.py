"""The content of a DeepSpeed JSON: what the run config owns, what is not supported, and what DeepSpeed gets; pure.

The run config owns `optimizer` and `scheduler`. A section in which everything is `auto`, as in the files of Hugging
Face's documentation, asks for the run config's values. DeepSpeed never sees these sections (`RUN_CONFIG_SECTIONS`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lora_accel.config.optimizers import OPTIMIZERS
from lora_accel.config.schedules import SCHEDULES
from lora_accel.config.schema import RunConfig, TrainingSection, chosen_options

RUN_CONFIG_SECTIONS = ("optimizer", "scheduler")
OPTIMIZER_TYPES = {"adamw": ("adam", "adamw"), "lion": ("lion",), "sgd": ("sgd",)}
"""`training.optimizer` -> types of DeepSpeed that compute the same, in lower case. Its Adam decouples weight decay."""
SCHEDULER_TYPES = {"WarmupLR": "constant", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}
"""DeepSpeed's types -> `training.scheduler`."""
IMPLEMENTATION_KEYS = ("torch_adam", "fused")
"""Keys of optimizer.params that select an implementation, not a result."""
UNSUPPORTED_KEYS = (
    *("torch_autocast", "amp", "bfloat16", "elasticity", "tensor_parallel", "expert_parallel", "hybrid_engine"),
    *("sequence_parallel_size", "compression_training", "curriculum_learning", "data_efficiency"),
    *("progressive_layer_drop", "quantize_training", "weight_quantization"),
    *("bf16.bf16_master_weights_and_grads", "bf16.bf16_optimizer_states"),
    *("data_types.param_dtype", "data_types.buffer_dtype", "data_types.keep_in_fp32_modules"),
    *("zero_optimization.zero_quantized_weights", "zero_optimization.zero_quantized_nontrainable_weights"),
    *("zero_optimization.zero_quantized_gradients", "zero_optimization.zenflow"),
)
"""Keys that would change the result, or which rank computes what, if they are on."""
REQUIRED_VALUES = {
    "gradient_allreduce_op": "mean",
    "gradient_predivide_factor": 1.0,
    "managed_gradient_accumulation": True,
    "zero_optimization.compute_grad_norm": True,
}
"""Keys that the loop needs at DeepSpeed's default -> the default."""
REMOVED_SWITCHES = ("sparse_gradients", "graph_harvesting")
"""Switches that newer versions of DeepSpeed reject even if they are off, as they do with sections."""
COMPUTED_BY_ACCELERATE = tuple(
    f"zero_optimization.{key}"
    for key in ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")
)
"""Keys whose `auto` Accelerate replaces by a value that depends on the size of the model."""


def key_problems(values: Mapping[str, Any], source: str) -> list[str]:
    """Return the keys that are not supported, because they would change the result."""
    problems = [
        f"{source}: {key!r} is not supported: it would change the result; remove it"
        for key in UNSUPPORTED_KEYS
        if not is_off(value_of(values, key))
    ]
    return problems + [
        f"{source}: {key} is {json.dumps(value)}, but the training loop needs {json.dumps(needed)}; remove it"
        for key, needed in REQUIRED_VALUES.items()
        if (value := value_of(values, key)) not in (None, "auto") and value is not needed and value != needed
    ]


def deepspeed_values(values: Mapping[str, Any], *, keep_computed: bool = True, prefix: str = "") -> dict[str, Any]:
    """Return the values that DeepSpeed gets: without the run config's sections, what is off, null, and `auto`.

    So DeepSpeed's default replaces null, and an `auto` that neither the run config nor Accelerate knows; Accelerate
    would raise.

    Args:
        keep_computed: whether to keep the `auto` that Accelerate replaces.
        prefix: path of a section, with a final dot.
    """
    kept: dict[str, Any] = {}
    for key, value in values.items():
        is_section, path = isinstance(value, Mapping), f"{prefix}{key}"
        is_removed = not prefix and (is_section or key in REMOVED_SWITCHES) and is_off(value)
        is_unset = value is None or (value == "auto" and not (keep_computed and path in COMPUTED_BY_ACCELERATE))
        if path in RUN_CONFIG_SECTIONS or is_removed or is_unset:
            continue
        kept[key] = deepspeed_values(value, keep_computed=keep_computed, prefix=f"{path}.") if is_section else value
    return kept


def is_off(value: object) -> bool:
    """Whether a value is not set, `auto` or false, or a section with such a value under `enabled`."""
    if isinstance(value, Mapping) and "enabled" in value:
        value = value["enabled"]
    return value is None or value is False or value == "auto"


def value_of(values: Mapping[str, Any] | None, key: str) -> Any:
    """Return the value under a dotted key, None if there is none."""
    node: Any = values
    for name in key.split("."):
        node = node.get(name) if isinstance(node, Mapping) else None
    return node


def section_problems(config: RunConfig, values: Mapping[str, Any], source: str) -> list[str]:
    """Return what the `optimizer` and `scheduler` sections set differently from the run config.

    Args:
        values: DeepSpeed's config.
        source: its path, for messages.
    """
    problems = []
    expected = {"optimizer": _optimizer_params(config.training), "scheduler": _scheduler_params(config.training)}
    for name in RUN_CONFIG_SECTIONS:
        if name not in values:
            continue
        section = values[name]
        if not isinstance(section, Mapping) or not isinstance(section.get("params", {}), Mapping):
            problems.append(f'{source}: {name} must be an object {{"type": …, "params": {{…}}}}')
            continue
        kind = section.get("type", "auto")
        if not isinstance(kind, str):
            problems.append(f"{source}: {name}.type must be a name, not {json.dumps(kind)}")
            continue
        explicit = {key: value for key, value in section.get("params", {}).items() if value != "auto"}
        if name == "optimizer":
            found = [_optimizer_problem(config.training, kind)]
        else:
            found = [_scheduler_problem(config.training, kind, is_explicit=bool(explicit))]
        found += [_param_problem(f"{name}.params.{key}", value, expected[name]) for key, value in explicit.items()]
        problems += [f"{source}: {problem}" for problem in found if problem is not None]
    return problems


def section_rows(config: RunConfig, values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return (setting, value) for each of the sections that the JSON has: the run config's value, which is used."""
    training, rows = config.training, []
    if "optimizer" in values:
        rows.append(("optimizer", f"{training.optimizer}, learning rate {training.learning_rate:g}"))
    if "scheduler" in values:
        name = values["scheduler"].get("type", "auto")
        unused = "" if name not in SCHEDULER_TYPES or _is_schedule(name, training) else f" (not {name})"
        rows.append(("scheduler", f"{training.scheduler}{unused}"))
    return rows


def _optimizer_problem(training: TrainingSection, name: str) -> str | None:
    types = OPTIMIZER_TYPES.get(training.optimizer, ("auto",))
    if name == "auto" or name.lower() in types:
        return None
    return (
        f"optimizer.type is {json.dumps(name)}, but training.optimizer is {training.optimizer}; use "
        f'"{types[-1]}" there, or remove the section'
    )


def _scheduler_problem(training: TrainingSection, name: str, *, is_explicit: bool) -> str | None:
    """Return the problem of a scheduler's type.

    Args:
        is_explicit: whether the section sets a value. Otherwise the run config's schedule replaces it.
    """
    if name == "auto" or (name in SCHEDULER_TYPES and not is_explicit):
        return None
    if _is_schedule(name, training):
        return None
    pairs = ", ".join(f"{ours} = {theirs}" for theirs, ours in SCHEDULER_TYPES.items())
    return (
        f"scheduler.type is {json.dumps(name)}, but training.scheduler is {training.scheduler}; remove the section, or "
        f"set the same schedule in both ({pairs})"
    )


def _is_schedule(name: str, training: TrainingSection) -> bool:
    """Whether a type of DeepSpeed is the run config's schedule, which may have two names."""
    return name in SCHEDULER_TYPES and SCHEDULES[SCHEDULER_TYPES[name]] is SCHEDULES[training.scheduler]


def _param_problem(key: str, value: object, expected: Mapping[str, tuple[str, Any]]) -> str | None:
    """Return the problem of an explicit value; None if the run config has the same.

    Args:
        expected: (option or reason, value) by name of the parameter.
    """
    name = key.rsplit(".", 1)[1]
    if name in IMPLEMENTATION_KEYS:
        return None
    if name not in expected:
        return f'{key} is not supported; remove it, or use "auto"'
    option, ours = expected[name]
    if (value == ours and type(value) is not bool) or value is ours:
        return None
    is_set = f"{option} is {json.dumps(ours)}" if ours is not None else f"{option} is not set"
    return f'{key} is {json.dumps(value)}, but {is_set}; use "auto" there, or the same value in both'


def _optimizer_params(training: TrainingSection) -> dict[str, tuple[str, Any]]:
    arguments = OPTIMIZERS[training.optimizer].arguments(chosen_options(training.optimizer_options))
    options = {
        name: (f"training.optimizer_options.{name}", list(value) if isinstance(value, tuple) else value)
        for name, value in arguments.items()
    }
    return options | {
        "lr": ("training.learning_rate", training.learning_rate),
        "weight_decay": ("training.weight_decay", training.weight_decay),
        "adam_w_mode": ("the optimizer's value here", True),
    }


def _scheduler_params(training: TrainingSection) -> dict[str, tuple[str, Any]]:
    return {
        "warmup_max_lr": ("training.learning_rate", training.learning_rate),
        "warmup_min_lr": ("the learning rate before warm-up", 0),
        "warmup_num_steps": ("training.warmup_steps", training.warmup_steps),
        "warmup_type": ("the shape of the warm-up", "linear"),
        "total_num_steps": ("training.max_steps", training.max_steps),
        "warmup_min_ratio": ("the learning rate before warm-up", 0),
        "cos_min_ratio": ("the learning rate at the end", 0),
        "last_batch_iteration": ("the first step", -1),
    }
