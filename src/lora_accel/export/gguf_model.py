"""A model folder, such as a merged model, as a GGUF file for llama.cpp and Ollama."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PretrainedConfig

from lora_accel.config.schema import ModelSection
from lora_accel.data.template import ChatTemplate
from lora_accel.errors import ArtifactError
from lora_accel.export.gguf_families import (
    ROPE_FREQS,
    GgufFamily,
    add_metadata,
    family_of,
    rope_factors,
    to_gguf_layout,
)
from lora_accel.export.gguf_file import GgufTensor, tensor_outtype, write_gguf
from lora_accel.export.gguf_tokenizer import Vocabulary, add_tokenizer, read_vocabulary
from lora_accel.merging.shards import Weights
from lora_accel.model.headers import StoredTensor
from lora_accel.model.sizes import load_config
from lora_accel.model.tokenizer import load_tokenizer
from lora_accel.model.weights import check_weights
from lora_accel.saving.cards import license_of
from lora_accel.saving.provenance import provenance_of

FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32}
"""llama.cpp's numbers of the type of most tensors."""


class Model(NamedTuple):
    """A model folder that GGUF can hold. Its weights are not read yet."""

    folder: Path
    config: PretrainedConfig
    family: GgufFamily
    weights: Weights
    template: ChatTemplate
    vocabulary: Vocabulary

    @property
    def stored(self) -> dict[str, StoredTensor]:
        """Return the tensors that the weight files declare."""
        return {name: StoredTensor(*spec) for name, spec in self.weights.specs.items()}


def read_model(folder: Path) -> Model:
    """Return a model folder, after all checks that need no weights.

    Raises:
        ArtifactError: the model cannot be read, or GGUF export does not support it.
    """
    section = ModelSection(name_or_path=str(folder))
    config = load_config(section)
    family, weights, template = family_of(str(folder), config), Weights(folder), ChatTemplate(load_tokenizer(section))
    vocabulary = read_vocabulary(str(folder), template.tokenizer, config.vocab_size)
    model = Model(folder, config, family, weights, template, vocabulary)
    check_weights(str(folder), config, model.stored)
    return model


def write_model(file: Path, model: Model, outtype: str) -> list[GgufTensor]:
    """Write a model, read it back and compare; return the tensors of the file.

    Weights are read, converted and written one at a time.

    Args:
        outtype: a value of `gguf_file.OUTTYPES` except auto.

    Raises:
        ArtifactError: llama.cpp's architecture lacks a tensor, or a value does not fit into the outtype.
    """
    sources, factors = _sources(model), rope_factors(model.config)
    tensors = []
    for name, source in sources.items():
        shape = model.weights.specs[source].shape
        tensors.append(GgufTensor(name, shape, tensor_outtype(outtype, shape)))
    if factors is not None:
        tensors.append(GgufTensor(ROPE_FREQS, tuple(factors.shape), "f32"))

    def load(tensor: GgufTensor) -> torch.Tensor:
        if tensor.name == ROPE_FREQS and factors is not None:
            return factors
        source = sources[tensor.name]
        return to_gguf_layout(model.family, model.config, source, model.weights.read(source))

    write_gguf(file, _writer(model, outtype), tensors, load)
    return tensors


def gguf_names(model: Path, family: GgufFamily, config: PretrainedConfig, names: Iterable[str]) -> dict[str, str]:
    """Return llama.cpp's names of tensors: {its name: name in transformers' model}.

    Raises:
        ArtifactError: llama.cpp's architecture has no such tensor.
    """
    import gguf

    architecture = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}[family.architecture]
    mapping = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    found = {}
    for name in names:
        mapped = mapping.get_name(name, try_suffixes=(".weight", ".bias"))
        if mapped is None:
            raise ArtifactError(f"{model}: {name}: llama.cpp's architecture {family.architecture} has no such tensor")
        found[mapped] = name
    return found


def _sources(model: Model) -> dict[str, str]:
    """Return the tensors of the file: {llama.cpp's name: name in the weight files}."""
    left_out = ("lm_head.weight",) if model.config.tie_word_embeddings else ()
    names = [x for x in model.weights.specs if x not in left_out and not x.endswith("rotary_emb.inv_freq")]
    return gguf_names(model.folder, model.family, model.config, names)


def _writer(model: Model, outtype: str) -> Any:
    """Return a GGUFWriter with the metadata of a model."""
    import gguf

    writer = gguf.GGUFWriter(None, model.family.architecture)
    writer.add_type("model")
    writer.add_name(model.folder.resolve().name)
    if (license := license_of(str(model.folder), None)) is not None:
        writer.add_license(license)
    base = ((provenance_of(model.folder) or {}).get("base") or {}).get("name_or_path", "")
    if not os.path.isabs(base) and base.count("/") == 1:  # a Hub id
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, base.partition("/")[2])
        writer.add_base_model_repo_url(0, f"https://huggingface.co/{base}")
    writer.add_file_type(FILE_TYPES[outtype])
    if outtype == "q8_0":
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_metadata(writer, model.family, model.config)
    add_tokenizer(writer, model.template.tokenizer, model.vocabulary, model.template.source)
    return writer
