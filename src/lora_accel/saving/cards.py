"""Model cards: the README.md of an adapter and of a merged model."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_accel.config.adapter_options import subtracts_initial_adapter
from lora_accel.config.schema import ModelSection
from lora_accel.model.tokenizer import is_hub_id, local_file
from lora_accel.paths import open_to_read
from lora_accel.saving.lineage import lineage_note
from lora_accel.saving.results import RunResults, evaluation_rows, loss_curve

AUTO_LOADING = """from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model = AutoPeftModelForCausalLM.from_pretrained(".")"""
BASE_LOADING = """from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("BASE"), ".")"""
"""How a model card loads an adapter whose base is on the Hub, and one whose base was a local folder."""
MAX_HASHES = 3
"""Maximum number of weight files in a model card."""
MAX_CELL = 100
"""Characters of a value in a table."""
LICENSE = re.compile(r"^license:\s*['\"]?([\w.+-]{1,60})['\"]?\s*$", re.MULTILINE)


def model_card(
    provenance: Mapping[str, Any],
    saved: Mapping[str, Any],
    serving: str,
    results: RunResults | None = None,
) -> str:
    """Return the README.md of an adapter: what it is, how to load it, and how it was trained.

    Args:
        saved: the PEFT config in the adapter's folder.
        serving: how to serve it; see `serving.serving_note`.
        results: of its run; None = unknown.
    """
    config, plan, base = provenance["config"], provenance["plan"], provenance["base"]
    adapter, on_hub = config["adapter"], not os.path.isabs(base["name_or_path"])
    return f"""---
{_base_metadata(base)}library_name: peft
pipeline_tag: text-generation
---

# LoRA adapter for {_base_title(base)}

Rank {saved["r"]}, alpha {saved["lora_alpha"]}, on {adapter["target_modules"]}; biases: {adapter["bias"]}.
{_init_note(adapter)}Trained for {_steps(provenance)} of {plan["batch_size"]} examples with lora_accel
{provenance["packages"]["lora-accel"]} on:

{_data_list(provenance)}

{lineage_note(provenance.get("init_from", []))}{_local_base_note(base)}```python
{AUTO_LOADING if on_hub else BASE_LOADING}
tokenizer = AutoTokenizer.from_pretrained(".")  # with the chat template of training
```

`lora-accel merge . OUT{"" if on_hub else " --base BASE"}` merges it into the base model.
Serving: {serving}
{_base_notes(config["model"])}{_training_section(provenance, results)}{_license_note(base)}
`provenance.json` records the config, package versions, and hashes of base model, tokenizer, template and data.
"""


def merged_card(
    provenance: Mapping[str, Any],
    results: RunResults | None = None,
    *,
    step: int | None = None,
    base_folder: Path | None = None,
) -> str:
    """Return the README.md of a merged model: what it is, its base and adapter, and how it differs from them.

    Args:
        results: of the adapter's run; None = unknown.
        step: of the checkpoint that was merged; None = an adapter.
        base_folder: of the base, whose card may name its license; None = unknown.
    """
    merged, agreement, base = provenance["merged"], provenance["merged"]["agreement"], provenance["base"]
    if agreement is None:
        checked = "It was not compared with base + adapter."
    else:
        checked = (
            f"Its logits differ from those of base + adapter by {agreement['mean_moved']:.2g} standard deviations on "
            f"average ({agreement['top1']:.0%} of {agreement['num_tokens']} tokens have the same top token)."
        )
    trained = provenance.get("adapter")
    license = None if base_folder is None else license_of(str(base_folder), None)
    return f"""---
{_base_metadata(base)}{f"license: {license}" + chr(10) if license else ""}library_name: transformers
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

Serving: `vllm serve .`; for llama.cpp and Ollama: `lora-accel export . OUT --format gguf`.
{_merged_training(trained, results, step)}
`provenance.json` records package versions, hashes, and the provenance of the adapter.
"""


def _steps(provenance: Mapping[str, Any]) -> str:
    """Return how many steps an adapter was trained for, and why its run has more."""
    total = provenance["plan"]["total_steps"]
    exported, step = provenance.get("exported") or {}, exported_step(provenance)
    if exported.get("selected") == "best":
        best = (
            f"{exported['metric']} was best there: {exported['value']:.4g}" if "metric" in exported else "its best one"
        )
        return f"{step} steps (of {total}; {best})"
    if step == total:
        return f"{step} steps"
    return f"{step} steps ({'' if exported.get('selected') == 'checkpoint' else 'stopped early, '}of {total})"


def exported_step(provenance: Mapping[str, Any]) -> int:
    """Return the step whose weights an adapter has."""
    exported = provenance.get("exported") or {"step": provenance["plan"]["total_steps"]}
    return int(exported["step"])


def license_of(name_or_path: str, revision: str | None) -> str | None:
    """Return the license that a model's card declares, as in its metadata; None if the card is not here."""
    file = local_file(ModelSection(name_or_path=name_or_path, revision=revision), "README.md")
    if file is None:
        return None
    try:
        with open_to_read(Path(file)) as stream:
            text = stream.read().decode("utf-8", errors="replace")
    except OSError:
        return None
    _, _, rest = text.partition("---\n")
    found = LICENSE.search(rest.partition("\n---")[0] + "\n")
    return found[1] if found else None


def data_name(path: str) -> str:
    """Return a source's name for a card: a Hub id as it is, of a path only the last part."""
    is_id = is_hub_id(path) and not os.path.lexists(path) and path.count("/") == 1 and not Path(path).suffix
    return _cell(path if is_id else Path(path).name)


def _data_list(provenance: Mapping[str, Any]) -> str:
    return "\n".join(f"- {data_name(entry['path'])}" for entry in provenance["data"])


def _merged_training(trained: Any, results: RunResults | None, step: int | None) -> str:
    """Return how the adapter of a merged model was trained; empty if that is not known.

    Args:
        trained: the adapter's provenance, which is untrusted; that of another tool is None.
        step: of the checkpoint that was merged; None = an adapter.
    """
    try:
        if step is not None:
            trained = {**trained, "exported": {"step": step, "selected": "checkpoint"}}
        return f"""
The adapter was trained for {_steps(trained)} on:

{_data_list(trained)}
{_training_section(trained, results)}"""
    except (KeyError, TypeError, AttributeError, ValueError):
        return ""


def _training_section(provenance: Mapping[str, Any], results: RunResults | None) -> str:
    """Return the settings of a run, its last evaluation and its losses."""
    text = f"""
## Training

{_table(("setting", "value"), _settings(provenance["config"], provenance["plan"], provenance))}
"""
    if results is not None and results.evaluation is not None:
        rows = evaluation_rows(results.evaluation)
        metrics = list(dict.fromkeys(metric for _, values in rows for metric in values))
        cells = [
            [data_name(name), *(f"{values[x]:.5g}" if x in values else "" for x in metrics)] for name, values in rows
        ]
        text += f"\nEvaluation after step {results.evaluation['step']}:\n\n{_table(('data', *metrics), cells)}\n"
    if results is not None and results.losses:
        (first, start), (last, end) = results.losses[0], results.losses[-1]
        text += f"\nLoss, steps {first} to {last}: {start:.3g} {loss_curve(results)} {end:.3g}\n"
    return text


def _settings(config: Mapping[str, Any], plan: Mapping[str, Any], provenance: Mapping[str, Any]) -> list[list[str]]:
    """Return the settings of a run that one asks for first. Those of another version may lack some."""
    adapter, training = config.get("adapter", {}), config.get("training", {})
    quantization = (config.get("quantization") or {}).get("bits")
    targets = adapter.get("target_modules")
    values = {
        "rank": adapter.get("r"),
        "alpha": adapter.get("alpha"),
        "dropout": adapter.get("dropout"),
        "target modules": ", ".join(map(str, targets)) if isinstance(targets, list) else targets,
        "optimizer": training.get("optimizer"),
        "learning rate": training.get("learning_rate"),
        "schedule": training.get("scheduler"),
        "warm-up steps": plan.get("warmup_steps"),
        "weight decay": training.get("weight_decay"),
        "steps": exported_step(provenance),
        "examples per step": plan.get("batch_size"),
        "training examples": plan.get("num_examples"),
        "maximum length": (config.get("data") or {}).get("max_length"),
        "mixed precision": provenance.get("mixed_precision"),
        "base": None if quantization is None else f"{quantization} bits",
        "seed": config.get("seed"),
    }
    return [[name, _cell(value)] for name, value in values.items() if value is not None]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    """Return a value as text that does not end the cell of a table, or the item of a list."""
    text = "".join(character if character.isprintable() else " " for character in str(value))
    text = text.replace("|", "\\|")
    return text if len(text) <= MAX_CELL else f"{text[: MAX_CELL - 1]}…"


def _license_note(base: Mapping[str, Any]) -> str:
    """Return the license of the base; empty if its card is not here."""
    license = license_of(base["name_or_path"], base["revision"])
    return f"\nThe base's license is {license}.\n" if license else ""


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
