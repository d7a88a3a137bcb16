"""Where an adapter comes from, as provenances record it: the adapters from which its run and earlier ones began.

Imports no torch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

from lora_accel.errors import ArtifactError

MAX_ANCESTORS = 1000
"""Adapters in a lineage. Longer ones are not written by hand."""


@with_config(ConfigDict(strict=True, extra="ignore"))
class AncestorData(TypedDict):
    """A training source of an ancestor."""

    path: str
    sha256: str | None


@with_config(ConfigDict(strict=True, extra="ignore"))
class Ancestor(TypedDict):
    """An adapter with whose weights a run began, and what is known of its own run."""

    name: str
    """A Hub id, or the absolute path of a folder or file on the machine of the run."""
    revision: str | None
    """The commit of an adapter on the Hub."""
    sha256: str
    """Of the file with its tensors."""
    base: str | None
    """The base that it was trained on: a Hub id or a path. None = not recorded."""
    steps: int | None
    """Steps of the run that trained it. None = it was trained by another tool."""
    data: list[AncestorData]
    """Training sources of that run."""


def make_lineage(
    name: str,
    revision: str | None,
    sha256: str,
    *,
    base: object,
    provenance: Mapping[str, Any] | None,
    step: object = None,
) -> list[Ancestor]:
    """Return the lineage that begins with an adapter: itself, and those from which it descends, newest first.

    Args:
        name, revision, sha256: of the adapter; see `Ancestor`.
        base: the base that its config names.
        provenance: of the adapter; untrusted. None = it has none.
        step: of a checkpoint; None = it is the final adapter of its run.

    Raises:
        ArtifactError: the provenance has other types.
    """
    own: dict[str, Any] = {"name": name, "revision": revision, "sha256": sha256}
    own |= {"base": base if isinstance(base, str) else None, "steps": None, "data": []}
    try:
        if provenance is not None:
            total = provenance.get("plan", {}).get("total_steps")
            own |= {
                "base": provenance["base"]["name_or_path"],
                "steps": provenance.get("exported", {}).get("step", total) if step is None else step,
                "data": provenance.get("data", []),
            }
        earlier = (provenance or {}).get("init_from") or []
        return read_lineage([own, *earlier][:MAX_ANCESTORS], name)
    except (AttributeError, KeyError, TypeError):
        raise ArtifactError(f"{name}: its provenance has an invalid base, plan, data or init_from") from None


def read_lineage(recorded: object, where: str) -> list[Ancestor]:
    """Return a recorded lineage.

    Args:
        recorded: untrusted.
        where: the adapter, for the message.

    Raises:
        ArtifactError: it has other types.
    """
    try:
        return TypeAdapter(Annotated[list[Ancestor], Field(min_length=1)]).validate_python(recorded)
    except ValidationError:
        raise ArtifactError(f"{where}: its provenance has an invalid base, plan, data or init_from") from None


def lineage_note(lineage: Sequence[Ancestor]) -> str:
    """Return what a model card reports about the adapters from which a run descends; empty if it began with a new one.

    Folders are named by the end of their path, which means the same on other machines.
    """
    lines = []
    for number, adapter in enumerate(lineage):
        begin = "It began with the weights of" if number == 0 else "That one began with"
        title = f"`{adapter_title(adapter['name'])}`"
        title += f" ({adapter['revision']})" if adapter["revision"] else ""
        lines.append(f"{begin} the adapter {title}{_training(adapter)}\n(SHA-256 `{adapter['sha256']}`).")
    return "\n".join(lines) + "\n\n" if lines else ""


def adapter_title(name: str) -> str:
    """Return the name of an adapter in a text that others read: a Hub id, or the last two folders of its path."""
    if not os.path.isabs(name):
        return name
    return "/".join([part for part in Path(name).parts[1:] if part != "checkpoints"][-2:])


def trained_quantized(provenance: Any) -> bool:
    """Whether an adapter was trained on a base whose weights are stored quantized, so that no other base equals it.

    Args:
        provenance: of the adapter, which is untrusted; None = it has none.
    """
    base = provenance.get("base") if isinstance(provenance, dict) else None
    return isinstance(base, dict) and bool(base.get("quantization"))


def _training(adapter: Ancestor) -> str:
    """Return how an adapter was trained, as far as it is recorded."""
    if adapter["steps"] is None:
        return ""
    paths = [data["path"] for data in adapter["data"]]
    names = ", ".join(f"`{Path(path).name if os.path.isabs(path) else path}`" for path in paths)
    steps = f"{adapter['steps']:,} step{'' if adapter['steps'] == 1 else 's'}"
    return f", trained for {steps}" + (f" on {names}" if names else "")
