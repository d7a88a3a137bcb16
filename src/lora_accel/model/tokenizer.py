"""The base model's tokenizer. Imports transformers only to load one."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from lora_accel.config.schema import AddedTokens, ModelSection
from lora_accel.errors import ArtifactError, first_line

FILES = (
    *("config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "chat_template.jinja"),
    "chat_template.json",
)
"""Files that define a tokenizer and its chat template."""

QUICKSTART_MODEL = "SmolLM2-135M-Instruct"
"""The model that scripts/fetch_model.py creates."""


def load_tokenizer(section: ModelSection) -> Any:
    """Load the tokenizer of the base, with a pad token and the tokens of `model.add_tokens`.

    If it has no pad token, its end token is used: the vocabulary keeps its size, and end tokens within examples stay
    supervised, since labels are masked by position. The unknown token is never used, since real text may contain it.

    Raises:
        ArtifactError: the model does not exist, or its tokenizer has neither a pad nor an end token.
    """
    from transformers import AutoTokenizer

    check_model_folder(section)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            section.name_or_path,
            revision=section.revision,
            trust_remote_code=section.trust_remote_code,
        )
    except Exception as error:  # the tokenizers library raises plain Exception
        raise ArtifactError(load_error_message(section, "tokenizer", error)) from None
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.unk_token_id:
        if tokenizer.eos_token is None:
            raise ArtifactError(
                f"{section.name_or_path}: the tokenizer has neither a pad nor an end token; add an eos_token to it"
            )
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    if section.add_tokens is not None:
        _add_tokens(tokenizer, section.add_tokens)
    return tokenizer


def _add_tokens(tokenizer: Any, added: AddedTokens) -> None:
    """Add tokens to a tokenizer. A text that is already in its vocabulary keeps its id, and is no longer divided."""
    from transformers import AddedToken

    tokens = [AddedToken(text, special=added.special, normalized=False) for text in added.tokens]
    tokenizer.add_tokens(tokens, special_tokens=added.special)


def padding_id(tokenizer: Any, vocab_size: int) -> int:
    """Return the token that pads rows: the tokenizer's pad token, or else any token that the model has.

    Padding is masked, so its token does not change the result.

    Args:
        vocab_size: rows of the model's embeddings.
    """
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((token for token in candidates if token is not None and token < vocab_size), 0)


def tokenizer_fingerprint(section: ModelSection) -> str | None:
    """Return a hash of the tokenizer's files; None if they are not downloaded yet."""
    digest = hashlib.sha256()
    files = [(name, file) for name in FILES if (file := local_file(section, name)) is not None]
    for name, file in files:
        digest.update(f"{name} {file.stat().st_size} ".encode() + file.read_bytes())
    return digest.hexdigest() if files else None


def local_file(section: ModelSection, name: str) -> Path | None:
    """Return a file of a model: in its folder, or in the cache of the Hub; None if it is in neither."""
    folder = Path(section.name_or_path)
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(section.name_or_path, name, revision=section.revision)
    except HFValidationError:  # not a valid Hub id
        return None
    return Path(cached) if isinstance(cached, str) else None


def check_model_folder(section: ModelSection) -> None:
    """Check that the model's folder exists, if its name cannot be a Hub id.

    Raises:
        ArtifactError: the folder does not exist.
    """
    if _is_local(section.name_or_path) and not Path(section.name_or_path).is_dir():
        raise ArtifactError(load_error_message(section, "model", FileNotFoundError()))


def load_error_message(section: ModelSection, what: str, error: Exception) -> str:
    """Return the error message for a model, or a part of it, that cannot be loaded.

    Args:
        what: model, tokenizer or config.
    """
    name = section.name_or_path
    reason = first_line(error)
    if section.attention != "auto" and section.attention in str(error):
        return f"model.attention: {section.attention!r} is not available: {reason} (auto = transformers' choice)"
    if _is_local(name) and not Path(name).is_dir():
        reason = "there is no such folder"
        if not Path(name).is_absolute():
            reason += f"; paths are relative to the working directory, {Path.cwd()}"
    return (
        f"model.name_or_path: the {what} of {name!r} cannot be loaded: {reason}. {_download_hint(name)}"
        "Set model.name_or_path or --base to a Hub id or a folder with config.json, *.safetensors and tokenizer.json."
    )


def _is_local(name: str) -> bool:
    """Whether a name can only be a path. A Hub id is NAME or OWNER/NAME, and no owner has the name `models`."""
    return name.startswith((".", "/", "~", "models/")) or name.count("/") > 1 or "\\" in name


def _download_hint(name: str) -> str:
    """Return how to get the quickstart model, if the name refers to it."""
    if Path(name).name != QUICKSTART_MODEL and not name.startswith("models/"):
        return ""
    return f"In a clone of lora_accel, scripts/fetch_model.py creates models/{QUICKSTART_MODEL} without the Hub. "
