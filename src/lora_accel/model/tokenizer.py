"""The base model's tokenizer. Imports torch only when it is loaded."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from lora_accel.config.schema import ModelSection
from lora_accel.errors import ArtifactError

FILES = (
    *("config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "chat_template.jinja"),
    "chat_template.json",
)
"""What a tokenizer and its chat template are made of."""


QUICKSTART_MODEL = "SmolLM2-135M-Instruct"
"""What scripts/fetch_model.py makes."""


def load_tokenizer(section: ModelSection) -> Any:
    """Load the tokenizer, with a pad token.

    Where it has none, the end token pads: the vocabulary keeps its size, and since labels are masked by position the
    end token is still learned where it belongs. The unknown token never pads, since it may stand in real text.

    Raises:
        ArtifactError: there is no such model, or its tokenizer has neither a pad nor an end token.
    """
    from transformers import AutoTokenizer

    check_folder(section)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            section.name_or_path,
            revision=section.revision,
            trust_remote_code=section.trust_remote_code,
        )
    except Exception as error:  # tokenizers, in Rust, raises no kind of its own
        raise ArtifactError(not_loaded(section, "tokenizer", error)) from None
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.unk_token_id:
        if tokenizer.eos_token is None:
            raise ArtifactError(
                f"{section.name_or_path}: the tokenizer has neither a pad nor an end token; add an eos_token to it"
            )
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


def tokenizer_fingerprint(section: ModelSection) -> str | None:
    """Return a hash of the bytes that a tokenizer is made of; None if they are not on this disk yet."""
    digest = hashlib.sha256()
    found = [(name, file) for name in FILES if (file := _file_of(section, name)) is not None]
    for name, file in found:
        digest.update(f"{name} {file.stat().st_size} ".encode() + file.read_bytes())
    return digest.hexdigest() if found else None


def _file_of(section: ModelSection, name: str) -> Path | None:
    folder = Path(section.name_or_path)
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(section.name_or_path, name, revision=section.revision)
    except HFValidationError:  # no such id can be
        return None
    return Path(cached) if isinstance(cached, str) else None


def check_folder(section: ModelSection) -> None:
    """Check that a model's folder exists, where its name cannot be a Hub id: the Hub is not asked then.

    Raises:
        ArtifactError: there is no such folder.
    """
    if _is_local(section.name_or_path) and not Path(section.name_or_path).is_dir():
        raise ArtifactError(not_loaded(section, "model", FileNotFoundError()))


def not_loaded(section: ModelSection, what: str, error: Exception) -> str:
    """Return the message of a model, or a part of one, that cannot be loaded."""
    name = section.name_or_path
    reason = str(error).strip().split("\n")[0]
    if section.attention != "auto" and section.attention in str(error):
        return f"model.attention: {section.attention!r} cannot be used here: {reason} (auto lets transformers choose)"
    if _is_local(name) and not Path(name).is_dir():
        reason = "there is no such folder"
        if not Path(name).is_absolute():
            reason += f"; relative paths are taken from the folder the command runs in, {Path.cwd()}"
    return (
        f"model.name_or_path: the {what} of {name!r} cannot be loaded: {reason}. {_way_to_get(name)}"
        "Give a Hub id or a folder with config.json, *.safetensors and tokenizer.json, in model.name_or_path or --base."
    )


def _is_local(name: str) -> bool:
    """Whether a name can only be a path: a Hub id is NAME or OWNER/NAME, and no owner is called models."""
    return name.startswith((".", "/", "~", "models/")) or name.count("/") > 1 or "\\" in name


def _way_to_get(name: str) -> str:
    """Return how to get the quickstart's model, where a name means it or its folder."""
    if Path(name).name != QUICKSTART_MODEL and not name.startswith("models/"):
        return ""
    return f"In a clone of lora_accel, scripts/fetch_model.py creates models/{QUICKSTART_MODEL} without the Hub. "
