"""The base of the adapters that inference runs: which one it is, and whether it has the tokens of the prompts."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lora_accel.config.schema import Dtype, ModelSection
from lora_accel.errors import ConfigError

if TYPE_CHECKING:
    from lora_accel.data.template import ChatTemplate


def resolve_section(
    adapters: Sequence[Path], base: str | None, dtype: Dtype, *, trust_remote_code: bool = False
) -> ModelSection:
    """Return the model section of the adapters' base, with the RoPE scaling of their training.

    Args:
        base: Hub id or folder to use instead of the base that all adapters name.
        dtype: compute dtype.
        trust_remote_code: whether to run the base's own code.

    Raises:
        ArtifactError: an adapter does not name its base, the base is not here, or an adapter's provenance is invalid.
        ConfigError: adapters name different bases.
    """
    from lora_accel.merging.base import base_section
    from lora_accel.saving.provenance import provenance_of, recorded_changes

    if not base:
        _check_same_base(adapters)
    first = adapters[0]
    provenance = provenance_of(first)
    section = base_section(first, provenance, base, trust_remote_code=trust_remote_code, dtype=dtype)
    return section.model_copy(update={"rope_scaling": recorded_changes(provenance, str(first)).rope_scaling})


def check_rope_scaling(section: ModelSection, adapters: Sequence[Path]) -> None:
    """Check that adapters were trained with the RoPE scaling of a model section.

    Raises:
        ConfigError: one was not.
    """
    from lora_accel.saving.provenance import provenance_of, recorded_changes

    for adapter in adapters:
        provenance = provenance_of(adapter)
        trained = recorded_changes(provenance, str(adapter)).rope_scaling
        if provenance is not None and trained != section.rope_scaling:
            raise ConfigError(
                f"--adapter: {adapter} was trained with model.rope_scaling={json.dumps(trained)}, not "
                f"{json.dumps(section.rope_scaling)}; run it separately, or set model.rope_scaling in the config"
            )


def check_prompts(
    section: ModelSection, adapter: Path | None, template: ChatTemplate, prompts: Sequence[list[int]]
) -> None:
    """Check that a base has the tokens of prompts, and positions for the replies. Reads its config.json.

    Args:
        adapter: the adapter, which may add tokens; None = the base alone.
        prompts: token ids.

    Raises:
        DataError: it has not.
        ArtifactError: the base cannot be used.
    """
    from lora_accel.model.base import build_on_meta_device
    from lora_accel.model.sizes import load_config, sizes_of_model
    from lora_accel.saving.tensor_files import read_adapter
    from lora_accel.saving.vocabulary import resize_vocabulary
    from lora_accel.setup.sizes import check_prompts as check

    model = build_on_meta_device(load_config(section), trust_remote_code=section.trust_remote_code)
    if adapter is not None:
        resize_vocabulary(model, adapter, read_adapter(adapter))
    sizes = sizes_of_model(model)
    check(section, template.tokenizer, {f"prompt {n}": ids for n, ids in enumerate(prompts, start=1)}, sizes)


def _check_same_base(adapters: Sequence[Path]) -> None:
    """Check that all adapters name the same base, in the same revision.

    Raises:
        ArtifactError: an adapter does not name its base.
        ConfigError: adapters name different bases.
    """
    from lora_accel.saving.discovery import named_base
    from lora_accel.saving.hub import recorded_revision
    from lora_accel.saving.provenance import provenance_of

    bases = []
    for adapter in adapters:
        name, revision = named_base(adapter), recorded_revision(adapter, provenance_of(adapter))
        bases.append((os.path.abspath(name), revision, f"{name} ({revision})" if revision else name))
    for adapter, (path, revision, title) in zip(adapters, bases, strict=True):
        if (path, revision) != bases[0][:2]:
            raise ConfigError(
                f"--adapter: {adapters[0]} is for {bases[0][2]}, {adapter} for {title}; pass --base if both are the "
                "same model, else run the adapters separately"
            )
