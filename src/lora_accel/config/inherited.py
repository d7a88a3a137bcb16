"""The options that a run takes from the adapter with which it begins (`adapter.init_from`).

The shape of an adapter is that of its weights: rank, scaling, modules, biases and every variant of LoRA. The run's own
are `dropout`, `loraplus_ratio`, and everything outside the section.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from lora_accel.config.adapter_options import REPEATABLE_INITS
from lora_accel.config.recorded import with_defaults
from lora_accel.config.schema import AdapterSection, ModelSection, RunConfig
from lora_accel.errors import ArtifactError, ConfigError

OWN = ("dropout", "init_from", "init_from_force", "loraplus_ratio")
"""Options of the section `adapter` that are the run's own."""
WITHOUT_EFFECT = (
    "corda_config",
    "eva_config",
    "loftq_config",
    "lora_ga_config",
    "megatron_core",
    "qalora_group_size",
    "runtime_config",
)
"""Options of adapter_config.json that had an effect only before training, or have one only with another option."""
PEFT_DEFAULTS = {"r": 8, "alpha": 8, "bias": "none"}
SET_INITS = (*REPEATABLE_INITS, "mica")
"""Values of init_lora_weights that still matter: PEFT changes the base's weights, or trains A alone."""
MODEL_OPTIONS = ("rope_scaling", "add_tokens")
"""Options of the section `model` that an adapter's provenance records, since its weights depend on them."""
EMBEDDINGS = ("embed_tokens", "lm_head")
MAX_NAMED = 8
"""Modules that a message lists by their full names."""


def inheritable_options(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a saved adapter as values of the section `adapter`; null if it does not use one.

    Args:
        saved: content of its adapter_config.json.
    """
    options: dict[str, Any] = {}
    for name in AdapterSection.model_fields:
        if name not in OWN:
            value = None if name in WITHOUT_EFFECT else saved.get("lora_alpha" if name == "alpha" else name)
            is_used = bool(value) or type(value) is int  # layers_to_transform=0 is the first layer
            options[name] = value if is_used else PEFT_DEFAULTS.get(name)
    if options["init_lora_weights"] not in SET_INITS:
        options["init_lora_weights"] = None
    return options


def inherit(
    config: RunConfig, options: Mapping[str, Any], model: Mapping[str, Any] | None, named_modules: object = None
) -> RunConfig:
    """Return a run config with the options of the adapter with which it begins.

    Args:
        options: see `inheritable_options`.
        model: MODEL_OPTIONS with which the adapter was trained; None = not recorded, so the config's own count.
        named_modules: `target_modules` in the config that trained the adapter. PEFT saves the names of the modules that
            a pattern or all-linear selects.

    Raises:
        ConfigError: the config sets an option to another value.
        ArtifactError: a run cannot train an adapter with these options.
    """
    name, section = config.adapter.init_from, config.model.model_copy(update=dict(model or {}))
    options = _without_added_tokens(options, section)
    problems = _conflicts("adapter", config.adapter, options)
    if named_modules is not None and named_modules == config.adapter.target_modules:
        problems.pop("adapter.target_modules", None)
    problems |= _conflicts("model", config.model, model or {})
    if problems:
        lines = [
            f"{option}={_brief(own)}, but {name} has {'none' if theirs is None else _brief(theirs)}"
            for option, (own, theirs) in problems.items()
        ]
        raise ConfigError(
            f"adapter.init_from: {'; '.join(lines)}. A run that begins with an adapter has its options: remove "
            f"{', '.join(problems)} from the config, or begin with a new adapter (adapter.init_from=null)"
        )
    # The config's own spelling is kept, so that a resumed run, which may lack the adapter, has the same config.
    own = {key: getattr(config.adapter, key) for key in options.keys() & config.adapter.model_fields_set}
    return _validated(config, section, {**options, **own})


def keep_recorded(config: RunConfig, recorded: Mapping[str, Any]) -> RunConfig:
    """Return the config of a resumed run with the inherited options that its checkpoint records, unless it sets them.

    Args:
        recorded: config of the checkpoint.

    Raises:
        ArtifactError: it is not a config of a run.
    """
    complete = with_defaults(recorded)
    try:
        adapter = {key: complete["adapter"][key] for key in AdapterSection.model_fields.keys() - set(OWN)}
        model = {key: complete["model"][key] for key in MODEL_OPTIONS}
    except (KeyError, TypeError):
        raise ArtifactError("the config in the checkpoint's state.json is not that of a run") from None
    adapter |= {key: getattr(config.adapter, key) for key in adapter.keys() & config.adapter.model_fields_set}
    model |= {key: getattr(config.model, key) for key in model.keys() & config.model.model_fields_set}
    section = ModelSection.model_validate(config.model.model_dump(exclude=set(MODEL_OPTIONS)) | model)
    return _validated(config, section, adapter)


def describe_inherited(before: RunConfig, after: RunConfig) -> str:
    """Return the options that a run took from its adapter, as `r=16, alpha=32.0`."""
    taken = [
        f"{'' if section == 'adapter' else 'model.'}{key}={_brief(value)}"
        for section, keys in (("adapter", AdapterSection.model_fields), ("model", MODEL_OPTIONS))
        for key in keys
        if (value := getattr(getattr(after, section), key)) is not None
        and key not in (*OWN, *getattr(before, section).model_fields_set)
    ]
    return ", ".join(taken)


def _brief(value: Any) -> str:
    """Return a value as text; of many modules, only the last parts of their names."""
    if isinstance(value, list) and len(value) > MAX_NAMED:
        return f"{len(value)} x {', '.join(sorted({str(name).rpartition('.')[2] for name in value})[:MAX_NAMED])}"
    return str(value)


def _conflicts(prefix: str, section: Any, options: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the options that a section sets to another value: name -> (its value, the other one)."""
    set_options = {key: getattr(section, key) for key in options if key in section.model_fields_set}
    return {
        f"{prefix}.{key}": (own, options[key])
        for key, own in set_options.items()
        if _comparable(key, own) != _comparable(key, options[key])
    }


def _comparable(key: str, value: Any) -> Any:
    """Return a value that equals other spellings of it: false, null and empty mean that an option is not used."""
    if isinstance(value, list) and key in ("target_modules", "exclude_modules", "modules_to_save"):
        return frozenset(value)
    return None if not value or (value is True and key == "init_lora_weights") else value


def _without_added_tokens(options: Mapping[str, Any], model: ModelSection) -> dict[str, Any]:
    """Return the options of an adapter without those that `model.add_tokens` sets."""
    if model.add_tokens is None:
        return dict(options)
    if model.add_tokens.train == "rows":
        return {**options, "trainable_token_indices": None}
    kept = [name for name in options["modules_to_save"] or () if name.rpartition(".")[2] not in EMBEDDINGS]
    return {**options, "modules_to_save": kept or None}


def _validated(config: RunConfig, model: ModelSection, adapter: Mapping[str, Any]) -> RunConfig:
    own = {name: getattr(config.adapter, name) for name in OWN}
    try:
        section = AdapterSection.model_validate({**adapter, **own})
        changed = config.model_copy(update={"adapter": section, "model": model})
        RunConfig.model_validate(changed.model_dump())  # combinations with other sections
    except ValidationError as error:
        details = error.errors(include_url=False)
        lines = [
            f"{'.'.join(map(str, detail['loc']))}: {detail['msg']}".removeprefix(": ").replace("Value error, ", "")
            for detail in details
        ]
        raise ArtifactError(
            f"adapter.init_from: a run cannot begin with {own['init_from']}: {'; '.join(lines)}"
        ) from None
    return changed
