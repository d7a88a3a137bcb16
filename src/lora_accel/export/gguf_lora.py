"""A LoRA adapter as a GGUF file, which llama.cpp (`--lora`) and Ollama (`ADAPTER`) apply to the base's GGUF file.

llama.cpp reads a pair `<tensor>.lora_a` [r, in], `<tensor>.lora_b` [out, r] for each weight, and adds
alpha / r · B A with the r of each pair and one alpha for all (`src/llama-adapter.cpp`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import PretrainedConfig

from lora_accel.errors import ArtifactError
from lora_accel.export.gguf_families import GgufFamily, family_of, to_gguf_layout
from lora_accel.export.gguf_file import GgufTensor, write_gguf
from lora_accel.export.gguf_model import gguf_names
from lora_accel.saving.names import PREFIX
from lora_accel.saving.provenance import provenance_of
from lora_accel.saving.serving import differences_from_plain_lora
from lora_accel.saving.tensor_files import AdapterData, State

OUTTYPES = ("auto", "f32", "f16", "bf16")
PARTS = {".lora_A.weight": ".lora_a", ".lora_B.weight": ".lora_b"}
"""End of PEFT's name of a matrix -> end of llama.cpp's."""
PATTERNS = ("rank_pattern", "alpha_pattern")
MERGE_INSTEAD = "merge the adapter, and export the merged folder: lora-accel merge ADAPTER MERGED"


def write_lora(file: Path, adapter: Path, data: AdapterData, peft_model: PeftModel, outtype: str) -> list[GgufTensor]:
    """Write an adapter's matrices, read them back and compare; return the tensors of the file.

    Args:
        adapter: where it was read from.
        data: tensors by PEFT's names, and adapter_config.json.
        peft_model: the adapter on its base, on the meta device.
        outtype: a value of `OUTTYPES` except auto.

    Raises:
        ArtifactError: the base's family is not supported, or the format cannot hold the adapter.
    """
    import gguf

    config: PretrainedConfig = peft_model.get_base_model().config
    family = family_of(str(adapter), config)
    _check_plain(adapter, data, config)
    matrices = _matrices(adapter, family, config, data.tensors)
    tensors = [GgufTensor(name, tuple(matrix.shape), outtype) for name, matrix in matrices.items()]
    writer = gguf.GGUFWriter(None, family.architecture)
    writer.add_type("adapter")
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, _common_alpha(adapter, data.config, peft_model))
    write_gguf(file, writer, tensors, lambda tensor: matrices[tensor.name])
    return tensors


def _check_plain(adapter: Path, data: AdapterData, config: PretrainedConfig) -> None:
    """Check that an adapter is LoRA on linear layers, and that its run changed nothing else of the base.

    Raises:
        ArtifactError: it is not.
    """
    shapes: Mapping[str, Sequence[int]] = {name: tensor.shape for name, tensor in data.tensors.items()}
    found = [name for name in differences_from_plain_lora(data.config, shapes) if name not in PATTERNS]
    section = ((provenance_of(adapter) or {}).get("config") or {}).get("model") or {}
    if section.get("rope_scaling"):
        found.append("model.rope_scaling, which the base's file lacks")
    if section.get("add_tokens"):
        found.append("model.add_tokens")
    if config.tie_word_embeddings and any(".lm_head." in name for name in shapes):
        found.append("LoRA on an lm_head that is tied to the embeddings")
    if found:
        raise ArtifactError(f"{adapter}: a LoRA GGUF file cannot hold {', '.join(found)}; {MERGE_INSTEAD}")


def _matrices(adapter: Path, family: GgufFamily, config: PretrainedConfig, tensors: State) -> dict[str, torch.Tensor]:
    """Return an adapter's matrices by llama.cpp's names, in its layout. q and k are interleaved in their outputs: B."""
    matrices = {}
    for peft_name, tensor in tensors.items():
        end = next(end for end in PARTS if peft_name.endswith(end))
        weight = peft_name.removeprefix(PREFIX).removesuffix(end) + ".weight"
        (name,) = gguf_names(adapter, family, config, [weight])
        if end == ".lora_B.weight":
            tensor = to_gguf_layout(family, config, weight, tensor)
        matrices[name + PARTS[end]] = tensor
    return matrices


def _common_alpha(adapter: Path, config: Mapping[str, Any], peft_model: PeftModel) -> float:
    """Return the alpha with which alpha / r is the scaling of every module.

    Raises:
        ArtifactError: there is none.
    """
    active = peft_model.active_adapter
    layers = [module for module in peft_model.modules() if isinstance(module, LoraLayer) and active in module.scaling]
    alphas = [float(layer.scaling[active] * layer.r[active]) for layer in layers]
    if not all(math.isclose(alpha, alphas[0], rel_tol=1e-6) for alpha in alphas):
        options = [option for option in ("use_rslora", *PATTERNS) if config.get(option)]
        raise ArtifactError(
            f"{adapter}: a LoRA GGUF file has one alpha for all modules, and {', '.join(options)} give several; "
            f"{MERGE_INSTEAD}"
        )
    return alphas[0]
