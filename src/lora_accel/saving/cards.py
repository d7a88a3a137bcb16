"""Model cards: the README.md of an adapter and of a merged model."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_accel.config.adapter_options import subtracts_initial_adapter
from lora_accel.saving.lineage import lineage_note

AUTO_LOADING = """from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model = AutoPeftModelForCausalLM.from_pretrained(".")"""
BASE_LOADING = """from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("BASE"), ".")"""
"""How a model card loads an adapter whose base is on the Hub, and one whose base was a local folder."""
MAX_HASHES = 3
"""Maximum number of weight files in a model card."""


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
{_init_note(adapter)}Trained for {_steps(provenance)} of {plan["batch_size"]} examples with lora_accel
{provenance["packages"]["lora-accel"]} on:

{data}

{lineage_note(provenance.get("init_from", []))}{_local_base_note(base)}```python
{AUTO_LOADING if on_hub else BASE_LOADING}
tokenizer = AutoTokenizer.from_pretrained(".")  # with the chat template of training
```

`lora-accel merge . OUT{"" if on_hub else " --base BASE"}` merges it into the base model.
Serving: {serving}
{_base_notes(config["model"])}
`provenance.json` records the config, package versions, and hashes of base model, tokenizer, template and data.
"""


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


def _steps(provenance: Mapping[str, Any]) -> str:
    """Return how many steps an adapter was trained for, and why its run has more."""
    total = provenance["plan"]["total_steps"]
    exported = provenance.get("exported") or {"step": total, "selected": "last"}
    step = exported["step"]
    if exported["selected"] == "best":
        return f"{step} steps (of {total}; {exported['figure']} was best there: {exported['value']:.4g})"
    return f"{step} steps" if step == total else f"{step} steps (stopped early, of {total})"


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
