"""Base + adapter to a plain model folder that everything else can load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from lora_accel.config.schema import ModelSection, QuantizationSection
from lora_accel.errors import ArtifactError, LoraAccelError
from lora_accel.faults import reach
from lora_accel.model.base import load_base_model
from lora_accel.saving.commit import committed_folder, read_json, write_json
from lora_accel.saving.history import CONFIG
from lora_accel.saving.provenance import base_hashes, versions
from lora_accel.saving.weights import load_adapter, read_adapter

MOST_MOVED = 1e-2
"""How far a logit of the merged model may lie from base + adapter, both in float32, as a share of their spread."""


def merge_adapter(
    adapter: str | Path, out: str | Path, *, base: str | None = None, overwrite: bool = False
) -> dict[str, Any]:
    """Merge an adapter into its base and save an ordinary model folder with the adapter's tokenizer and template.

    The base is loaded whole, never quantised: merging into packed weights would round twice. The sum is formed and
    checked in float32 and rounded once, to the dtype that the base is stored in.

    Args:
        adapter: a folder with adapter_config.json and adapter_model.safetensors.
        out: the folder to make.
        base: a Hub id or folder instead of the one that the adapter names.
        overwrite: replace `out` if it is there.

    Returns:
        The provenance of the merged model, which is also written into it.

    Raises:
        ArtifactError: the adapter is none, does not fit its base, was trained on other weights, or `out` is there.
        LoraAccelError: the merged model does not answer as base + adapter do.
    """
    adapter, out = Path(adapter), Path(out)
    read_adapter(adapter)
    made_from = read_json(adapter / "provenance.json") if (adapter / "provenance.json").exists() else None
    name = base or read_json(adapter / CONFIG).get("base_model_name_or_path")
    if not name or not isinstance(name, str):
        raise ArtifactError(f"{adapter}: names no base model; say --base")
    _refuse_out(out, {"adapter": adapter, "base": Path(name)}, overwrite=overwrite)
    made_on = {} if made_from is None else made_from.get("base")
    if not isinstance(made_on, dict) or not isinstance(made_on.get("revision"), (str, type(None))):
        raise ArtifactError(f"{adapter / 'provenance.json'}: does not say what the adapter was made from")
    revision = None if base else made_on.get("revision")
    model = load_base_model(ModelSection(name_or_path=name, revision=revision), QuantizationSection())
    weights = base_hashes(name, revision)
    _same_base(made_from, name, weights)

    stored, model = model.dtype, model.float()
    probe = torch.arange(32).remainder(model.config.vocab_size)[None]
    peft_model = load_adapter(model, adapter).eval()
    with torch.no_grad():
        before = peft_model(probe).logits
        merged = peft_model.merge_and_unload(safe_merge=True).eval()
        moved = ((merged(probe).logits - before).abs().max() / before.std()).item()
    if not moved <= MOST_MOVED:
        raise LoraAccelError(
            f"{out}: the merged model's logits differ from base + adapter by {moved:.3g} of their spread, over the "
            f"limit of {MOST_MOVED:.3g}; nothing was written"
        )
    merged = merged.to(stored)

    provenance = {
        "merged": {
            "adapter": str(adapter),
            "base": name,
            "logits_moved": moved,
            "dtype": str(stored),
        },
        "base": {"name_or_path": name, "revision": revision, "sha256": weights},
        "packages": versions(),
        "num_threads": torch.get_num_threads(),
        "adapter": made_from,
    }
    with committed_folder(out) as temporary:
        merged.config.use_cache = True
        merged.save_pretrained(temporary)
        reach("merge.mid")
        _tokenizer_of(adapter, name, revision).save_pretrained(temporary)
        write_json(temporary / "provenance.json", provenance)
    return provenance


def _refuse_out(out: Path, sources: dict[str, Path], *, overwrite: bool) -> None:
    """Refuse a folder that is there already, or whose replacement would delete what is merged."""
    if out.exists() and not out.is_dir():
        raise ArtifactError(f"{out}: is a file; name a folder")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise ArtifactError(f"{out}: is there already; choose another folder, or say --overwrite")
    for what, source in sources.items():
        if source.is_dir() and source.resolve().is_relative_to(out.resolve()):
            raise ArtifactError(f"{out}: holds the {what} itself; choose another folder")


def _same_base(made_from: dict[str, Any] | None, name: str, found: dict[str, str]) -> None:
    """Refuse another base than the one that the adapter was trained on. A bare PEFT adapter tells nothing of it."""
    if made_from is None:
        return
    try:
        expected, trained_on = made_from["base"]["sha256"], made_from["base"]["name_or_path"]
        same = sorted(expected.values()) == sorted(found.values())
    except (KeyError, TypeError, AttributeError):
        raise ArtifactError("provenance.json: does not say which base the adapter was trained on") from None
    if not same:
        raise ArtifactError(
            f"{name}: its weights are not those that the adapter was trained on ({trained_on}); say --base with the "
            "right one"
        )


def _tokenizer_of(adapter: Path, base: str, revision: str | None) -> Any:
    """Return the adapter's tokenizer, which carries the template of training, or else the base's."""
    if (adapter / "tokenizer_config.json").is_file():
        base, revision = str(adapter), None
    try:
        return AutoTokenizer.from_pretrained(base, revision=revision, trust_remote_code=False)
    except Exception as error:  # tokenizers, in Rust, raises no kind of its own
        raise ArtifactError(f"{base}: its tokenizer cannot be loaded: {str(error).strip()[:200]}") from None
