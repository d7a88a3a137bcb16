"""The `optimizer` and `scheduler` sections of a DeepSpeed JSON, compared with the run config; pure.

The run config owns both. A section in which everything is `auto`, as in the files of Hugging Face's documentation,
asks for the run config's values. DeepSpeed never sees these sections (`RUN_CONFIG_SECTIONS`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lora_accel.config.schema import RunConfig, TrainingSection

RUN_CONFIG_SECTIONS = ("optimizer", "scheduler")
OPTIMIZER_TYPES = {"adamw": ("adam", "adamw")}
"""`training.optimizer` -> types of DeepSpeed that compute the same, in lower case. Its Adam decouples weight decay."""
SCHEDULER_TYPES = {"WarmupLR": "constant", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}
"""DeepSpeed's types -> `training.scheduler`."""
IMPLEMENTATION_KEYS = ("torch_adam", "fused")
"""Keys of optimizer.params that select an implementation, not a result."""


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
        unused = "" if SCHEDULER_TYPES.get(name, training.scheduler) == training.scheduler else f" (not {name})"
        rows.append(("scheduler", f"{training.scheduler}{unused}"))
    return rows


def _optimizer_problem(training: TrainingSection, name: str) -> str | None:
    if name == "auto" or name.lower() in OPTIMIZER_TYPES[training.optimizer]:
        return None
    return (
        f"optimizer.type is {json.dumps(name)}, but training.optimizer is {training.optimizer}; use "
        f'"{OPTIMIZER_TYPES[training.optimizer][-1]}" there, or remove the section'
    )


def _scheduler_problem(training: TrainingSection, name: str, *, is_explicit: bool) -> str | None:
    """Return the problem of a scheduler's type.

    Args:
        is_explicit: whether the section sets a value. Otherwise the run config's schedule replaces it.
    """
    if name == "auto" or (name in SCHEDULER_TYPES and not is_explicit):
        return None
    if SCHEDULER_TYPES.get(name) == training.scheduler:
        return None
    pairs = ", ".join(f"{ours} = {theirs}" for theirs, ours in SCHEDULER_TYPES.items())
    return (
        f"scheduler.type is {json.dumps(name)}, but training.scheduler is {training.scheduler}; remove the section, or "
        f"set the same schedule in both ({pairs})"
    )


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
    return {
        "lr": ("training.learning_rate", training.learning_rate),
        "weight_decay": ("training.weight_decay", training.weight_decay),
        "betas": ("the optimizer's value here", [0.9, 0.999]),
        "eps": ("the optimizer's value here", 1e-8),
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
