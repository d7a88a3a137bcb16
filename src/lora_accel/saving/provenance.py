"""Record the inputs of a run, and compare the inputs of two runs."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, TypedDict

import torch
from pydantic import ValidationError
from transformers.utils import cached_file
from typing_extensions import NotRequired

from lora_accel.config.plan import Plan
from lora_accel.config.recorded import with_defaults
from lora_accel.config.schema import ModelSection, RunConfig
from lora_accel.data.audit import SourceLedger
from lora_accel.errors import ArtifactError
from lora_accel.model.tokenizer import local_file
from lora_accel.saving.atomic import read_json
from lora_accel.saving.base_identity import base_identity, loaded_hashes
from lora_accel.saving.discovery import run_of
from lora_accel.saving.hub import recorded_name
from lora_accel.saving.lineage import Ancestor

PROVENANCE = "provenance.json"
"""Its file in the folder of a run, an adapter and a merged model."""
PACKAGES = (
    "lora-accel",
    "torch",
    "accelerate",
    "transformers",
    "peft",
    "bitsandbytes",
    "deepspeed",
    "safetensors",
)


# Config keys that may change when a run resumes: they affect where and how it runs, not the result. The pattern matches
# complete keys, so a key added to the schema counts as affecting the result until it is listed here.
MAY_CHANGE_ON_RESUME = re.compile(
    r"output_dir|model\.(name_or_path|revision|attention|chat_template|trust_remote_code)"
    r"|adapter\.init_from(_force)?"  # the adapter itself is compared by its hash
    r"|data\.(train|eval|overlong|max_dropped|packing|cache_dir|num_workers)"
    r"|training\.(epochs|max_steps|warmup_ratio|warmup_steps|batch_size|micro_batch_tokens|micro_batch_size"
    r"|gradient_accumulation_steps|mixed_precision|activation_checkpointing"  # compared by their effect on the plan
    r"|compile|deterministic|share_prefixes|max_hours|skip_nonfinite)"
    r"|(checkpoint|evaluation|logging)\..*"
)
LOCATION_KEYS = ("path", "revision", "streaming")
"""Keys of a source that locate its rows. The rows themselves are compared by hash."""
_BATCH = ("training.batch_size", "training.micro_batch_size", "training.gradient_accumulation_steps")
_LENGTH = ("training.epochs", "training.max_steps")
# Derived value -> the options that determine it. To allow a change, list one of them in `checkpoint.allow_changes`.
DERIVED = {
    "plan.batch_size": _BATCH,
    "plan.num_examples": ("data",),
    "plan.total_steps": (*_LENGTH, *_BATCH, "data"),
    "plan.warmup_steps": ("training.warmup_ratio", "training.warmup_steps", *_LENGTH, *_BATCH, "data"),
    "model.weights": ("model.name_or_path", "model.revision"),
    "model.config": ("model.name_or_path", "model.revision"),
    "model.tokenizer": ("model.name_or_path", "model.revision"),
}


class BaseProvenance(TypedDict):
    """The base model of a run."""

    name_or_path: str
    """A Hub id, or the absolute path of a folder on the machine of the run."""
    revision: str | None
    sha256: dict[str, str]
    """Of each weight file that transformers loads, by its name."""
    tensors_sha256: str
    """Of the tensors in these files; see `base_identity.tensors_hash`. Earlier versions did not record it."""
    config_sha256: str
    quantization: NotRequired[dict[str, Any]]
    """How the weights are stored, in the fields of the section `quantization`; absent if they are not quantized."""


class DataProvenance(TypedDict):
    """A training source of a run."""

    path: str
    num_files: int
    sha256: str
    """Of the file, or of the hashes of several files."""
    tokens_sha256: str | None
    """Of all its token ids and masks."""


class Exported(TypedDict):
    """Which weights of its run an adapter has."""

    step: int
    """The step after which they were saved."""
    selected: str
    """last | best"""
    metric: NotRequired[str]
    """Name of the metric that is the best there."""
    value: NotRequired[float]


class Provenance(TypedDict):
    """What the result of a run depends on: the content of provenance.json.

    A dict, not a dataclass, since it is read back from files of other versions too.
    """

    packages: dict[str, str]
    num_threads: int
    base: BaseProvenance
    tokenizer_sha256: str
    chat_template_sha256: str
    data: list[DataProvenance]
    """In the order of data.train."""
    seed: int
    mixed_precision: str
    base_dtype: str
    prompt_format: str
    """raw = every training example was tokenized without a chat template; else template. Earlier versions did not
    record it."""
    init_from: NotRequired[list[Ancestor]]
    """The adapter of adapter.init_from, and those from which it descends; absent if the run began with a new one."""
    config_sha256: str
    config: dict[str, Any]
    plan: dict[str, Any]
    exported: NotRequired[Exported]
    """In the folder of the final adapter only."""


def describe_run(
    config: RunConfig,
    plan: Plan,
    *,
    precision: str,
    base_dtype: str,
    tokenizer: Any,
    template: str,
    ledgers: list[SourceLedger],
    base: BaseProvenance,
) -> Provenance:
    """Return the provenance of a run.

    Args:
        precision: mixed precision of the run.
        base_dtype: name of the base model's dtype.
        template: source of the chat template.
        ledgers: one per training source.
        base: name and hashes of the base model.
    """
    return {
        "packages": versions(),
        "num_threads": torch.get_num_threads(),
        "base": base,
        "tokenizer_sha256": sha256_of_text(tokenizer.backend_tokenizer.to_str()),
        "chat_template_sha256": sha256_of_text(template),
        "data": [
            {
                "path": ledger.path,
                "num_files": len(ledger.sha256),
                "sha256": _hash_of_files(ledger.sha256),
                "tokens_sha256": ledger.tokens_sha256,
            }
            for ledger in ledgers
        ],
        "seed": config.seed,
        "mixed_precision": precision,
        "base_dtype": base_dtype,
        "prompt_format": "raw" if all(ledger.num_raw == ledger.num_examples for ledger in ledgers) else "template",
        "config_sha256": sha256_of_text(json.dumps(config.model_dump(), sort_keys=True)),
        "config": config.model_dump(),
        "plan": plan.as_dict(),
    }


def provenance_of(adapter: Path) -> dict[str, Any] | None:
    """Return an adapter's provenance; that of a checkpoint is in its run. None if there is none.

    Raises:
        ArtifactError: it does not name the base.
    """
    files = [adapter / PROVENANCE]
    if (run := run_of(adapter)) is not None:
        files.append(run / PROVENANCE)
    file = next((file for file in files if file.exists()), None)
    if file is None:
        return None
    provenance = read_json(file)
    base = provenance.get("base")
    if (
        not isinstance(base, dict)
        or not isinstance(base.get("revision"), (str, type(None)))
        or not isinstance(base.get("name_or_path"), str)
        or not isinstance(base.get("sha256"), dict)
    ):
        raise ArtifactError(f"{file}: does not name the base that the adapter was trained on")
    return provenance


def recorded_changes(provenance: Mapping[str, Any] | None, where: str) -> ModelSection:
    """Return a model section with the base's changes in the run that trained an adapter: rope_scaling and add_tokens.

    Args:
        provenance: of the adapter; None = it has none.
        where: the adapter, for the message.

    Raises:
        ArtifactError: a value is invalid.
    """
    try:
        model = ((provenance or {}).get("config") or {}).get("model") or {}
        values = {key: model.get(key) for key in ("rope_scaling", "add_tokens")}
        return ModelSection.model_validate({"name_or_path": "base", **values})
    except (ValidationError, AttributeError):
        raise ArtifactError(f"{where}: its provenance has an invalid model.rope_scaling or model.add_tokens") from None


def check_code(
    adapter: Path, provenance: dict[str, Any] | None, section: ModelSection, way_out: str = "pass --trust-remote-code"
) -> None:
    """Check that the code with which an adapter was trained is trusted, if its base has any.

    transformers may have a class of its own for such a base, which would be used without a message.

    Args:
        provenance: of the adapter; None = it has none.
        section: the base.
        way_out: how to trust its code, for the message.

    Raises:
        ArtifactError: the code is not trusted.
    """
    config = (provenance or {}).get("config")
    model = config.get("model") if isinstance(config, dict) else None
    if section.trust_remote_code or not (isinstance(model, dict) and model.get("trust_remote_code") is True):
        return
    config_file = local_file(section, "config.json")
    if config_file is not None and read_json(config_file).get("auto_map"):
        raise ArtifactError(
            f"{adapter}: was trained with model.trust_remote_code=true, and {section.name_or_path} has Python code of "
            f"its own; {way_out} to run it"
        )


def changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Return the differences of two provenances that affect the result, as (key, then, now)."""
    before, after = _result_inputs(then), _result_inputs(now)
    before["model.weights"], after["model.weights"] = _weights_of(then["base"], now["base"])
    return [
        (key, before.get(key), after.get(key))
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]


def options_for_key(key: str) -> tuple[str, ...]:
    """Return the options of the run config that determine a key's value."""
    return DERIVED.get(key) or (".".join(key.split("[")[0].split(".")[:2]),)  # section.option


def is_allowed(key: str, allowed: Sequence[str]) -> bool:
    """Whether `checkpoint.allow_changes` lists an option behind a key, its section, or a part of it.

    Args:
        key: as returned by `changes`.
        allowed: `checkpoint.allow_changes`.
    """
    return any(
        f"{option}.".startswith(f"{entry}.") or f"{entry}.".startswith(f"{option}.")
        for option in options_for_key(key)
        for entry in allowed
    )


def changes_table(differences: list[tuple[str, Any, Any]]) -> str:
    """Return the differences as lines `key: checkpoint -> now`."""
    return "\n".join(f"  {key}: {_short(then)} -> {_short(now)}" for key, then, now in differences)


def describe_base(name_or_path: str, revision: str | None) -> BaseProvenance:
    """Return the name of a base, and the hashes of its weights and config. Reads its weight files once.

    Raises:
        ArtifactError: it has no weight files, or one cannot be read.
    """
    hashes, tensors = base_identity(name_or_path, revision)
    recorded, recorded_revision = recorded_name(name_or_path, revision)
    return {
        "name_or_path": recorded,
        "revision": recorded_revision,
        "sha256": hashes,
        "tensors_sha256": tensors,
        "config_sha256": config_hash(name_or_path, revision),
    }


def config_hash(name_or_path: str, revision: str | None) -> str:
    """Return a hash of the keys of a base model's config that affect its mathematics.

    Raises:
        ArtifactError: config.json cannot be read.
    """
    config = read_json(Path(str(cached_file(name_or_path, "config.json", revision=revision))))
    for key in ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache"):
        config.pop(key, None)
    return sha256_of_text(json.dumps(config, sort_keys=True))


def versions() -> dict[str, str]:
    """Return the versions of the packages that results depend on."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "absent"
    return versions


def sha256_of_text(text: str) -> str:
    """Return the SHA-256 of a text's UTF-8 bytes."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def initial_hash(provenance: Mapping[str, Any]) -> str | None:
    """Return the SHA-256 of the adapter with which a run began; None = it began with a new one."""
    lineage = provenance.get("init_from") or [None]
    return None if lineage[0] is None else str(lineage[0]["sha256"])


def _hash_of_files(hashes: Mapping[str, str]) -> str:
    """Return one hash for a source: a single file's own hash, or the hash of all files' hashes in order."""
    return next(iter(hashes.values())) if len(hashes) == 1 else sha256_of_text("".join(hashes.values()))


def _result_inputs(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Return everything that the result depends on, as a flat dict."""
    config = with_defaults(provenance["config"])
    flat = {key: value for key, value in _flat(config) if not MAY_CHANGE_ON_RESUME.fullmatch(key)}
    flat["adapter.init_from"] = initial_hash(provenance)
    plan, sources = provenance["plan"], config["data"]["train"]
    flat |= {f"plan.{key}": plan[key] for key in ("batch_size", "total_steps", "warmup_steps", "num_examples")}
    flat |= {
        "training.mixed_precision": provenance["mixed_precision"],
        "model.config": provenance["base"]["config_sha256"],
        "model.tokenizer": provenance["tokenizer_sha256"],
        "model.chat_template": provenance["chat_template_sha256"],
    }
    for number, (source, data) in enumerate(zip(sources, provenance["data"], strict=False)):
        flat |= {f"data.train[{number}].{k}": v for k, v in source.items() if k not in LOCATION_KEYS}
        flat[f"data.train[{number}].bytes"] = data["sha256"]
        flat[f"data.train[{number}].tokens"] = data["tokens_sha256"]
    return flat


def _weights_of(then: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return the hashes of two bases that can be compared: of all tensors, or else of the files.

    Earlier versions recorded only the files.
    """
    if "tensors_sha256" in then and "tensors_sha256" in now:
        return then["tensors_sha256"], now["tensors_sha256"]
    return loaded_hashes(then["sha256"]), loaded_hashes(now["sha256"])


def _flat(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for key, item in value.items():
        pairs += _flat(item, f"{prefix}{key}.") if isinstance(item, dict) else [(f"{prefix}{key}", item)]
    return pairs


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
