"""The base model's tokenizer. Imports transformers only to load one."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import Any

from lora_accel.config.schema import AddedTokens, ModelSection
from lora_accel.errors import ArtifactError, ConfigError, first_line
from lora_accel.model.json_files import read_object
from lora_accel.sandbox import check_tokenizer, is_panic

FILES = (
    *("config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "chat_template.jinja"),
    "chat_template.json",
)
"""Files that define a tokenizer and its chat template."""

HUB_ID = re.compile(r"([\w.-]{1,96}/)?[\w.-]{1,96}", re.ASCII)
QUICKSTART_MODEL = "SmolLM2-135M-Instruct"
"""The model that scripts/fetch_model.py creates."""


def load_tokenizer(section: ModelSection) -> Any:
    """Load the tokenizer of the base, with a pad token and the tokens of `model.add_tokens`.

    If it has no pad token, its end token is used: the vocabulary keeps its size, and end tokens within examples stay
    supervised, since labels are masked by position. The unknown token is never used, since real text may contain it.

    Raises:
        ArtifactError: the model does not exist, or its tokenizer has neither a pad nor an end token, an unknown token
            that its vocabulary lacks, or takes too much time or memory.
    """
    _check_exists(section)  # it may be the folder of an adapter
    if (file := _tokenizer_file(section)) is not None:
        check_tokenizer(file)
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            section.name_or_path,
            revision=section.revision,
            trust_remote_code=section.trust_remote_code,
        )
    except BaseException as error:  # the tokenizers library raises plain Exception, or panics
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        raise ArtifactError(load_error_message(section, "tokenizer", Exception(str(error)))) from None
    try:
        unknown_id = tokenizer.unk_token_id
    except RecursionError:  # transformers looks an unknown token up as the unknown token
        raise ArtifactError(
            f"{section.name_or_path}: the tokenizer's unk_token {tokenizer.unk_token!r:.50} is not in its vocabulary; "
            "correct it in tokenizer_config.json"
        ) from None
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == unknown_id:
        if tokenizer.eos_token is None:
            raise ArtifactError(
                f"{section.name_or_path}: the tokenizer has neither a pad nor an end token; add an eos_token to it"
            )
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    tokenizer.config_file = local_file(section, "tokenizer_config.json")  # for model/portable.py
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


def tokens_without_embedding(tokenizer: Any, vocab_size: int) -> list[str]:
    """Return the tokens that a model has no embedding for, by their ids, such as a `[PAD]` that was added later.

    Args:
        vocab_size: rows of the model's embeddings.
    """
    beyond = {token: text for text, token in tokenizer.get_vocab().items() if token >= vocab_size}
    return [beyond[token] for token in sorted(beyond)]


def has_tokenizer(section: ModelSection) -> bool:
    """Whether a model has files of a tokenizer."""
    return any(local_file(section, name) is not None for name in FILES if name != "config.json")


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
    if os.path.isdir(folder):  # unlike Path.is_dir, False for names of any length
        return folder / name if (folder / name).is_file() else None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(section.name_or_path, name, revision=section.revision)
    except HFValidationError:  # not a valid Hub id
        return None
    return Path(cached) if isinstance(cached, str) else None


def _tokenizer_file(section: ModelSection) -> Path | None:
    """Return a model's tokenizer.json, downloaded if it is on the Hub; None if it has none, or it cannot be loaded."""
    file = local_file(section, "tokenizer.json")
    if file is None and not Path(section.name_or_path).is_dir():
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            file = Path(hf_hub_download(section.name_or_path, "tokenizer.json", revision=section.revision))
        except LocalEntryNotFoundError as error:  # the Hub is out of reach
            if not has_tokenizer(section):  # nothing in the cache: transformers would wait for each file in turn
                raise ArtifactError(load_error_message(section, "tokenizer", error)) from None
        except (OSError, ValueError):  # loading the tokenizer reports them
            pass
    return file


def _check_exists(section: ModelSection) -> None:
    if not is_hub_id(section.name_or_path) and not os.path.isdir(section.name_or_path):
        raise ArtifactError(load_error_message(section, "model", FileNotFoundError()))
    folder = Path(section.name_or_path)
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.exists() and not (path.is_file() or path.is_dir()):  # a FIFO would block, a device never end
            raise ArtifactError(f"{path}: is not an ordinary file; remove it")


def check_model_folder(section: ModelSection) -> None:
    """Check that the model's folder exists, if its name cannot be a Hub id, and that it is not an adapter.

    transformers would load an adapter's base, and then the adapter onto it.

    Raises:
        ArtifactError: the folder does not exist.
        ConfigError: it is an adapter.
    """
    _check_exists(section)
    name = section.name_or_path
    adapter_config = local_file(section, "adapter_config.json")
    if adapter_config is not None and local_file(section, "config.json") is None:
        base = _base_of_adapter(adapter_config)
        raise ConfigError(
            f"model.name_or_path or --base: {name} is an adapter{' of ' if base else ''}{base}, not a model. To begin "
            f"a new run with its weights, set adapter.init_from={name} model.name_or_path={base or 'BASE'}. To resume "
            "the run that trained it, set model.name_or_path to the base, and checkpoint.resume to a folder in the "
            "run's checkpoints/"
        )


def _base_of_adapter(config_file: Path) -> str:
    """Return the base that an adapter_config.json names, else an empty text."""
    base = (read_object(config_file) or {}).get("base_model_name_or_path")
    return base if isinstance(base, str) else ""


def load_error_message(section: ModelSection, what: str, error: Exception) -> str:
    """Return the error message for a model, or a part of it, that cannot be loaded.

    Args:
        what: model, tokenizer or config.
    """
    name = section.name_or_path
    reason = first_line(error)
    names_attention = section.attention in str(error) or (
        "flash" in section.attention and re.search("flash|`kernels`", str(error), re.IGNORECASE)
    )
    if section.attention != "auto" and names_attention:
        return f"model.attention: {section.attention!r} is not available: {reason} (auto = transformers' choice)"
    if "trust_remote_code" in str(error) and not section.trust_remote_code:
        return (
            f"{name}: has Python code of its own, which must run to load the {what}; if you trust it, pass "
            "--trust-remote-code, or set model.trust_remote_code=true in the run config"
        )
    if not is_hub_id(name) and not os.path.isdir(name):
        reason = "there is no such folder"
        if not Path(name).is_absolute():
            reason += f"; paths are relative to the working directory, {Path.cwd()}"
    return (
        f"model.name_or_path: the {what} of {name!r} cannot be loaded: {reason}. {download_hint(name)}"
        "Set model.name_or_path or --base to a Hub id or a folder with config.json, *.safetensors and tokenizer.json."
    )


def is_hub_id(name: str) -> bool:
    """Whether a name can be a Hub id, NAME or OWNER/NAME, and not only a path. No owner has the name `models`."""
    return (
        HUB_ID.fullmatch(name) is not None
        and not name.startswith((".", "models/"))
        and not any(part in name for part in ("--", ".."))
    )


def download_hint(name: str) -> str:
    """Return how to get the quickstart model, if a name refers to it; else an empty text."""
    if Path(name).name != QUICKSTART_MODEL and not name.startswith("models/"):
        return ""
    return f"In a clone of lora_accel, scripts/fetch_model.py creates models/{QUICKSTART_MODEL} without the Hub. "
