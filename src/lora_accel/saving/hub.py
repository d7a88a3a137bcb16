"""Names of bases and adapters: Hub ids and folders, what is recorded of them, and what is downloaded."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from lora_accel.errors import ArtifactError, first_line
from lora_accel.model.tokenizer import download_hint, is_hub_id
from lora_accel.paths import real_path
from lora_accel.saving.atomic import read_json
from lora_accel.saving.discovery import CONFIG

ADAPTER_FILES = ("adapter_config.json", "adapter_model.*", "*.json", "*.jinja", "tokenizer.model", "*.txt")
"""Files of an adapter to download."""
SNAPSHOT = re.compile(r".*/models--(?P<id>[^/]+)/snapshots/(?P<commit>[0-9a-f]{40})")
"""A model's folder in the Hub's cache."""


def recorded_name(name_or_path: str, revision: str | None) -> tuple[str, str | None]:
    """Return how to record a base, so that other folders can find it: a Hub id or an absolute path, and the revision.

    A folder in the Hub's cache has a Hub id, and its revision is a commit.
    """
    if not os.path.isdir(name_or_path):
        return name_or_path, revision
    path = os.path.abspath(name_or_path)
    match = SNAPSHOT.fullmatch(Path(path).as_posix()) or SNAPSHOT.fullmatch(real_path(Path(path)).as_posix())
    if match is None:
        return path, revision
    return match["id"].replace("--", "/", 1), match["commit"]


def recorded_revision(adapter: Path, provenance: dict[str, Any] | None) -> str | None:
    """Return the revision of the base that an adapter records; None = the default branch.

    Args:
        provenance: of the adapter; None = it has none, and its adapter_config.json may name the revision.

    Raises:
        ArtifactError: adapter_config.json cannot be read.
    """
    if provenance is None and not (adapter / CONFIG).is_file():
        return None  # of another tool
    recorded = provenance["base"] if provenance is not None else read_json(adapter / CONFIG)
    revision = recorded.get("revision")
    return revision if isinstance(revision, str) else None


def find_adapter(name: str | Path) -> Path:
    """Return the folder of an adapter: the one that is named, or that of a Hub id, which is downloaded.

    Raises:
        ArtifactError: there is no such folder, and it cannot be downloaded.
    """
    name = str(name)
    owner, slash, _ = name.partition("/")
    # A folder with the owner's name: a mistyped path in it, such as `runs/adaptor`, is not looked up on the Hub.
    if not slash or os.path.isdir(owner) or os.path.lexists(name) or not is_hub_id(name):
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(ADAPTER_FILES)))
    except Exception as error:  # huggingface_hub and its HTTP client raise many types
        raise ArtifactError(
            f"{name}: there is no such folder here, and it cannot be downloaded from the Hub: {first_line(error)}; "
            "pass the folder of an adapter"
        ) from None


def missing_base(adapter: Path, name: str, reason: str = "") -> ArtifactError:
    """Return the error for a base that an adapter names and that cannot be used here.

    Args:
        name: of the base.
        reason: why it cannot be loaded; empty = it does not exist.
    """
    if not reason:
        relative = "" if os.path.isabs(name) else f"; relative paths start at the working directory, {Path.cwd()}"
        reason = f"and there is no such folder here{relative}"
    return ArtifactError(f"{adapter} names its base {name!r}, {reason}. {download_hint(name)}Pass --base PATH")
