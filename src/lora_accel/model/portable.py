"""Writes tokenizers and configs in the form of the base's own files, so that whatever loads the base loads them too.

transformers 5 writes other names than transformers 4 reads: `TokenizersBackend` as the class of most tokenizers,
`extra_special_tokens` as a list, `dtype`, and `rope_parameters`. transformers 4 fails on the first two, and would take
its default rotary base instead of the last without a message.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_accel.model.json_files import read_object

NEW_CLASSES = ("TokenizersBackend", "SentencePieceBackend", "PythonBackend", "MistralCommonBackend")
"""Tokenizer classes that transformers 4 does not know."""
LOAD_KEYS = (
    *("is_local", "local_files_only", "name_or_path", "cache_dir", "revision", "subfolder", "token", "_commit_hash"),
    *("tokenizer_file", "vocab_file", "merges_file", "special_tokens_map_file", "force_download", "proxies"),
)
"""Keys of tokenizer_config.json that describe how and from where a tokenizer was loaded on this machine."""
REPLACED_KEYS = ("added_tokens_decoder", "chat_template", "additional_special_tokens", *LOAD_KEYS)
"""Keys of the base's tokenizer_config.json whose content transformers 5 saves elsewhere, and `LOAD_KEYS`."""
NOT_RESTORED = ("quantization_config", "_name_or_path", "torch_dtype")
"""Keys of the base's config.json that a merged model does not take over as they are."""


def save_tokenizer(tokenizer: Any, folder: Path, base_file: Path | None = None) -> None:
    """Save a tokenizer with the class that its own tokenizer_config.json names.

    Args:
        tokenizer: as returned by `load_tokenizer`.
        folder: an existing folder.
        base_file: the base's tokenizer_config.json, whose class is used if the tokenizer's own is one that
            transformers 5 wrote.
    """
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    stored = read_object(getattr(tokenizer, "config_file", None)) or {}
    if stored.get("tokenizer_class", NEW_CLASSES[0]) in NEW_CLASSES:
        stored = read_object(base_file) or stored
    values = read_object(file) or {}
    for key in (*LOAD_KEYS, *(() if "backend" in stored else ("backend",))):
        values.pop(key, None)
    if stored.get("tokenizer_class"):
        values["tokenizer_class"] = stored["tokenizer_class"]
    elif values.get("tokenizer_class") in NEW_CLASSES and (folder / "tokenizer.json").is_file():
        values["tokenizer_class"] = "PreTrainedTokenizerFast"
    if values.get("tokenizer_class") not in NEW_CLASSES and isinstance(values.get("extra_special_tokens"), list):
        values["additional_special_tokens"] = values.pop("extra_special_tokens")
    # transformers 4 adds a start token, for example, unless `add_bos_token` is false.
    values |= {key: value for key, value in stored.items() if key not in values and key not in REPLACED_KEYS}
    _write_object(file, values)


def restore_config_keys(file: Path, base_file: Path, base_config: Mapping[str, Any]) -> None:
    """Rewrite the config.json of a merged model with the names that the base's config.json has.

    Args:
        file: config.json, as transformers saved it.
        base_file: the base's config.json.
        base_config: the base's config, as transformers reads it, as a dictionary.
    """
    saved, base = read_object(file), read_object(base_file)
    if saved and base:
        _write_object(file, _with_keys_of(saved, base, base_config))


def _with_keys_of(saved: dict[str, Any], base: Mapping[str, Any], parsed: Mapping[str, Any]) -> dict[str, Any]:
    """Return a saved config with the keys of the base's config.json.

    Args:
        parsed: the base's config as transformers reads it.
    """
    values = dict(saved)
    rope: Any = values.get("rope_parameters")
    is_renamed = "rope_parameters" in values and "rope_parameters" not in base
    is_same_rope = rope == parsed.get("rope_parameters")
    # A model may rotate some layers differently. A scaling that the run sets for those has no older name.
    is_flat = isinstance(rope, dict) and not any(isinstance(value, dict) for value in rope.values())
    for key, value in base.items():
        is_nested = isinstance(value, dict) and isinstance(values.get(key), dict)
        if is_nested and key.endswith("_config"):
            values[key] = _with_keys_of(values[key], value, parsed.get(key) or {})
        elif key not in values and key not in NOT_RESTORED:
            values[key] = value
    if is_renamed and (is_same_rope or is_flat):
        del values["rope_parameters"]
        if not is_same_rope:
            scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
            values["rope_theta"] = rope.get("rope_theta", base.get("rope_theta"))
            values["rope_scaling"] = None if scaling.get("rope_type", "default") == "default" else scaling
    if "torch_dtype" in base and "dtype" not in base and "dtype" in values:
        values["torch_dtype"] = values.pop("dtype")
    return values


def _write_object(file: Path, values: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
