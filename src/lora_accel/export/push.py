"""Upload an adapter, a merged model or a GGUF folder to the Hugging Face Hub, without what belongs to this machine.

The files in the folder are not changed. Of provenance.json a copy is uploaded in which every absolute path is only its
last part. A path of this machine or a secret in any other text is an error.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lora_accel.errors import ArtifactError, ConfigError, first_line
from lora_accel.saving.atomic import MANIFEST, read_json
from lora_accel.saving.discovery import CONFIG

PROVENANCE, CARD = "provenance.json", "README.md"
BASE_KEY = "base_model_name_or_path"
TRAINING_STATE = ("optimizer.safetensors", "state.json")
"""Files of a checkpoint that only resuming needs."""
RUN_FILE = "plan.json"
TEXTS = (".json", ".jinja", ".md", ".txt", ".yaml", ".yml", "")
"""Suffixes of the files that are searched for paths and secrets."""
VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt")
"""Large files of the tokenizer, which nobody edits."""
MAX_TEXT_BYTES = 10_000_000
REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
SECRETS = {
    "an access token of the Hub": r"\bhf_[A-Za-z0-9]{20,}",
    "an API key": r"\b(?:sk|pk)-[A-Za-z0-9_-]{20,}|\bAKIA[0-9A-Z]{16}\b|\bAIza[\w-]{35}",
    "a token of GitHub": r"\bgh[pousr]_[A-Za-z0-9]{30,}|\bgithub_pat_\w{30,}",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "a password in a URL": r"\b[a-z]+://[^\s/:@]+:[^\s/@]+@",
}
LOCAL_PATH = re.compile(
    r"(?<![\w./:<-])/(?:home|root|Users|tmp|mnt|media|srv|data|scratch|workspace|work|content|kaggle)/[^\s\"'`)>]+"
    r"|\b[A-Za-z]:\\(?:Users|Documents)[^\s\"'`]*"
)
"""A path on some machine, in a text. `</tag>` and `https://…/home/…` are none."""


class Upload(NamedTuple):
    """A file to upload."""

    name: str
    """In the repository."""
    path: Path
    content: bytes | None = None
    """What is uploaded instead of the file's content; None = the file as it is."""

    @property
    def num_bytes(self) -> int:
        """Return the size of what is uploaded."""
        return self.path.stat().st_size if self.content is None else len(self.content)


def push_folder(
    folder: Path,
    repo_id: str,
    *,
    base: str | None = None,
    private: bool = False,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Upload a folder to a model repository of the Hub in one commit; create the repository if it does not exist.

    Args:
        folder: an adapter, a merged model, a checkpoint or the output of `export --format gguf`.
        repo_id: `owner/name`.
        base: Hub id of the base, for an adapter whose base was in a local folder.
        private: whether a new repository is private.
        dry_run: only return what would be uploaded. Nothing is sent.

    Returns:
        A summary: repo_id, files (name, bytes, is_changed), left_out, url (None in a dry run).

    Raises:
        ConfigError: `repo_id` or `base` is not a Hub id.
        ArtifactError: the folder is none of these, a file contains a secret or a path of this machine, or the upload
            failed.
    """
    for option, name in (("REPO_ID", repo_id), ("--base", base)):
        if name is not None and not REPO_ID.fullmatch(name):
            raise ConfigError(f"{option}={name}: is not a Hub id, such as my-name/my-adapter")
    _check_kind(folder)
    left_out = [name for name in TRAINING_STATE if (folder / name).exists()]
    uploads = [_prepare(folder, path, base) for path in _files(folder) if path.name not in (MANIFEST, *left_out)]
    for upload in uploads:
        _check_text(upload)
    return {
        "repo_id": repo_id,
        "files": [{"name": x.name, "bytes": x.num_bytes, "is_changed": x.content is not None} for x in uploads],
        "left_out": left_out,
        "url": None if dry_run else _upload(repo_id, uploads, private=private),
    }


def push_lines(pushed: dict[str, Any]) -> list[str]:
    """Return what the command prints."""
    files = pushed["files"]
    note = {True: "  (paths of this machine removed)", False: ""}
    lines = [f"{file['bytes']:>15,}  {file['name']}{note[file['is_changed']]}" for file in files]
    total = sum(file["bytes"] for file in files)
    if pushed["left_out"]:
        lines.append(f"left out: {', '.join(pushed['left_out'])}, from which only this run resumes")
    done = f"uploaded to {pushed['url']}" if pushed["url"] else f"would be uploaded to {pushed['repo_id']}"
    return [*lines, f"{total:>15,}  bytes in {len(files)} files {done}"]


def _check_kind(folder: Path) -> None:
    """Check that a folder is something to upload."""
    if (folder / RUN_FILE).is_file() and not (folder / CONFIG).is_file():
        raise ArtifactError(f"{folder}: is a run folder, with all its checkpoints; push {folder / 'adapter'}")
    if not folder.is_dir():
        raise ArtifactError(f"{folder}: is not a folder")
    if not any((folder / name).is_file() for name in (CONFIG, "config.json")) and not list(folder.glob("*.gguf")):
        raise ArtifactError(f"{folder}: is neither an adapter ({CONFIG}), nor a model (config.json, *.gguf)")


def _files(folder: Path) -> Iterator[Path]:
    """Yield the files of a folder.

    Raises:
        ArtifactError: one is a link out of it.
    """
    for path in sorted(folder.rglob("*")):
        if not path.resolve().is_relative_to(folder.resolve()):
            raise ArtifactError(f"{path}: is a link to {os.readlink(path)}; replace it with the file, or remove it")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts):
            yield path


def _prepare(folder: Path, path: Path, base: str | None) -> Upload:
    """Return a file, or what is uploaded instead of it."""
    name = path.relative_to(folder).as_posix()
    if name == PROVENANCE:
        provenance = _without_paths(read_json(path))
        if base is not None and isinstance(provenance.get("base"), dict):
            provenance["base"]["name_or_path"] = base
        content = _to_json(provenance)
    elif name == CONFIG:
        content = _to_json(_with_base(path, read_json(path), base))
    elif name == CARD and base is not None and "\nbase_model:" not in (card := path.read_text(encoding="utf-8")):
        content = card.replace("---\n", f"---\nbase_model: {base}\n", 1).encode()
    else:
        return Upload(name, path)
    return Upload(name, path, None if content == path.read_bytes() else content)


def _with_base(path: Path, config: dict[str, Any], base: str | None) -> dict[str, Any]:
    """Return adapter_config.json with a base that others can load."""
    named = config.get(BASE_KEY)
    if base is not None:
        return config | {BASE_KEY: base}
    if not isinstance(named, str) or not REPO_ID.fullmatch(named) or os.path.isdir(named):
        raise ArtifactError(f"{path}: names its base by a path of this machine, {named!r}; pass --base HUB_ID")
    return config


def _without_paths(value: Any) -> Any:
    """Return a JSON value in which absolute paths, and paths below the home folder, are only their last part."""
    if isinstance(value, dict):
        return {key: _without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_paths(item) for item in value]
    if isinstance(value, str) and (os.path.isabs(value) or value.startswith("~") or re.match(r"[A-Za-z]:\\", value)):
        return re.split(r"[/\\]", value.rstrip("/\\"))[-1]
    return value


def _to_json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _check_text(upload: Upload) -> None:
    """Check that a text file contains neither a secret nor a path of this machine. The secret is not printed.

    Raises:
        ArtifactError: it does.
    """
    path = upload.path
    if path.suffix not in TEXTS or path.name in VOCABULARIES or upload.num_bytes > MAX_TEXT_BYTES:
        return
    text = (path.read_bytes() if upload.content is None else upload.content).decode("utf-8", errors="replace")
    token = _own_token()
    for number, line in enumerate(text.splitlines(), start=1):
        for what, pattern in SECRETS.items():
            if re.search(pattern, line) or (token is not None and token in line):
                raise ArtifactError(f"{path}:{number}: contains {what}; remove it, and revoke it if it is real")
        home = str(Path.home())
        if (found := LOCAL_PATH.search(line)) or (len(home) > 1 and f"{home}/" in line):
            name = found[0] if found else f"{home}/…"
            raise ArtifactError(f"{path}:{number}: contains a path of this machine, {name}; remove it")


def _own_token() -> str | None:
    """Return the user's access token of the Hub, to look for it."""
    from huggingface_hub import get_token

    return get_token()


def _upload(repo_id: str, uploads: list[Upload], *, private: bool) -> str:
    from huggingface_hub import CommitOperationAdd, HfApi

    operations = [CommitOperationAdd(x.name, str(x.path) if x.content is None else x.content) for x in uploads]
    api = HfApi(library_name="lora-accel")
    try:
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        commit = api.create_commit(repo_id, operations, commit_message="Upload with lora-accel push")
    except Exception as error:  # huggingface_hub and its HTTP client raise many types
        raise ArtifactError(
            f"{repo_id}: cannot be uploaded to: {first_line(error)}; log in with `hf auth login`, or pass --dry-run"
        ) from None
    return str(commit.repo_url)
