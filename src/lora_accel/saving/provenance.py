"""Record the inputs of a run, compare the inputs of two runs, and write model cards."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, TypedDict

import torch
from pydantic import ValidationError
from transformers.utils import cached_file
from typing_extensions import NotRequired

from lora_accel.config.adapter_options import subtracts_initial_adapter
from lora_accel.config.plan import Plan
from lora_accel.config.recorded import with_defaults
from lora_accel.config.schema import ModelSection, RunConfig
from lora_accel.data.audit import SourceLedger
from lora_accel.errors import ArtifactError
from lora_accel.saving.atomic import read_json
from lora_accel.saving.base_identity import base_identity, loaded_hashes
from lora_accel.saving.hub import recorded_name

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

AUTO_LOADING = """from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model = AutoPeftModelForCausalLM.from_pretrained(".")"""
BASE_LOADING = """from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("BASE"), ".")"""
"""How a model card loads an adapter whose base is on the Hub, and one whose base was a local folder."""
MAX_HASHES = 3
"""Maximum number of weight files in a model card."""

# Config keys that may change when a run resumes: they affect where and how it runs, not the result. The pattern matches
# complete keys, so a key added to the schema counts as affecting the result until it is listed here.
MAY_CHANGE_ON_RESUME = re.compile(
    r"output_dir|model\.(name_or_path|revision|attention|chat_template|trust_remote_code)"
    r"|data\.(train|eval|overlong|max_dropped|packing|cache_dir|num_workers)"
    r"|training\.(epochs|max_steps|warmup_ratio|warmup_steps|batch_size|micro_batch_tokens|micro_batch_size"
    r"|gradient_accumulation_steps|mixed_precision|activation_checkpointing"  # compared by their effect on the plan
    r"|compile|max_hours|skip_nonfinite)"
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
    config_sha256: str
    config: dict[str, Any]
    plan: dict[str, Any]


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


def model_card(provenance: Mapping[str, Any], saved: Mapping[str, Any], serving: str) -> str:
    """Return the README.md of an adapter: what it is, how to load it, and its training data.

    Args:
        saved: the PEFT config in the adapter's folder.
        serving: how to serve it; see `serving.serving_note`.
    """
    config, plan, base = provenance["config"], provenance["plan"], provenance["base"]
    adapter, on_hub = config["adapter"], not os.path.isabs(base["name_or_path"])
    data = "\n".join(f"- {entry['path']}" for entry in provenance["data"])
    return f"""---
{_base_metadata(base)}library_name: peft
pipeline_tag: text-generation
---

# LoRA adapter for {_base_title(base)}

Rank {saved["r"]}, alpha {saved["lora_alpha"]}, on {adapter["target_modules"]}; biases: {adapter["bias"]}.
{_init_note(adapter)}Trained for {plan["total_steps"]} steps of {plan["batch_size"]} examples with lora_accel
{provenance["packages"]["lora-accel"]} on:

{data}

{_local_base_note(base)}```python
{AUTO_LOADING if on_hub else BASE_LOADING}
tokenizer = AutoTokenizer.from_pretrained(".")  # with the chat template of training
```

`lora-accel merge . OUT{"" if on_hub else " --base BASE"}` merges it into the base model.
Serving: {serving}
{_base_notes(config["model"])}
`provenance.json` records the config, package versions, and hashes of base model, tokenizer, template and data.
"""


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


def _init_note(adapter: Mapping[str, Any]) -> str:
    """Return why an adapter has twice the rank of its run; empty if it has not."""
    init = adapter.get("init_lora_weights")
    if not subtracts_initial_adapter(init):
        return ""
    return f"Trained with {init} and rank {adapter['r']}, and saved as plain LoRA of twice the rank.\n"


def _base_metadata(base: Mapping[str, Any]) -> str:
    """Return the line of a card's metadata that names the base; empty for a local folder, which no one else has."""
    return "" if os.path.isabs(base["name_or_path"]) else f"base_model: {base['name_or_path']}\n"


def _base_title(base: Mapping[str, Any]) -> str:
    """Return the name of a base in a card: its Hub id with the revision, or the name of its local folder."""
    name, revision = base["name_or_path"], base["revision"]
    if os.path.isabs(name):
        return f"the local model {Path(name).name}"
    return f"{name} ({revision})" if revision else str(name)


def _local_base_note(base: Mapping[str, Any]) -> str:
    """Return how to recognize a base that was in a local folder; empty for a base on the Hub."""
    if not os.path.isabs(base["name_or_path"]):
        return ""
    hashes = "\n".join(f"- `{name}`: {sha256}" for name, sha256 in sorted(base["sha256"].items())[:MAX_HASHES])
    folder, more = Path(base["name_or_path"]).name, len(base["sha256"]) > MAX_HASHES
    return f"""Its base was a model in the local folder `{folder}`; below, BASE is a copy of it. SHA-256 of its weights:

{hashes}{" …" if more else ""}

"""


def _base_notes(model: Mapping[str, Any]) -> str:
    """Return what must be changed in the base before PEFT's adapter fits it.

    Args:
        model: the section `model` of a run config.
    """
    notes = ""
    if model.get("rope_scaling"):
        notes += f"""
It was trained with the RoPE scaling `{json.dumps(model["rope_scaling"])}`, which PEFT does not store.
lora_accel applies it, and the merged model has it in its config.json. With the code above, set it as `rope_parameters`
of the base's config.
"""
    if added := model.get("add_tokens"):
        notes += f"""
It adds the tokens {", ".join(f"`{token}`" for token in added["tokens"])}.
lora_accel and the merged model have them. With PEFT, load the base, call `resize_token_embeddings` with the tokenizer's
number of tokens if the base has fewer, and then `PeftModel.from_pretrained`.
"""
    return notes


def merged_card(provenance: Mapping[str, Any]) -> str:
    """Return the README.md of a merged model: what it is, its base and adapter, and how it differs from them."""
    merged, agreement, base = provenance["merged"], provenance["merged"]["agreement"], provenance["base"]
    if agreement is None:
        checked = "It was not compared with base + adapter."
    else:
        checked = (
            f"Its logits differ from those of base + adapter by {agreement['mean_moved']:.2g} standard deviations on "
            f"average ({agreement['top1']:.0%} of {agreement['num_tokens']} tokens have the same top token)."
        )
    return f"""---
{_base_metadata(base)}library_name: transformers
pipeline_tag: text-generation
---

# {_base_title(base)} with a LoRA adapter merged into it

Of the base, the {merged["base_weights"]} weights are used, stored as {merged["dtype"]}. The adapter's file has the
SHA-256 {merged["adapter_sha256"]}. {checked}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(".")
tokenizer = AutoTokenizer.from_pretrained(".")  # with the chat template of training
```

`provenance.json` records package versions, hashes, and the provenance of the adapter.
"""


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


def _hash_of_files(hashes: Mapping[str, str]) -> str:
    """Return one hash for a source: a single file's own hash, or the hash of all files' hashes in order."""
    return next(iter(hashes.values())) if len(hashes) == 1 else sha256_of_text("".join(hashes.values()))


def _result_inputs(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Return everything that the result depends on, as a flat dict."""
    config = with_defaults(provenance["config"])
    flat = {key: value for key, value in _flat(config) if not MAY_CHANGE_ON_RESUME.fullmatch(key)}
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
