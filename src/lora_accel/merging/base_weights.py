"""The weights into which adapters are merged: as stored, dequantized, or as a QLoRA run computes with them."""

from __future__ import annotations

import torch
from pydantic import ValidationError
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lora_accel.config.schema import QuantizationSection, RunConfig
from lora_accel.errors import ArtifactError
from lora_accel.merging.base import Base, read_base_config
from lora_accel.merging.job import MergeJob, MergeOptions
from lora_accel.merging.shards import DequantizedWeights, Weights
from lora_accel.merging.streaming import WeightTransform
from lora_accel.model.base import (
    build_on_meta_device,
    choose_dtype,
    load_base_model,
    quantize_round_trip,
    quantized_names,
)
from lora_accel.model.prequantized import describe
from lora_accel.saving.lineage import trained_quantized


def open_weights(base: Base) -> Weights:
    """Return the base's weights, dequantized if they are stored quantized."""
    return Weights(base.folder) if base.quantization is None else DequantizedWeights(base.folder)


def load_base_fp32(base: Base, transform: WeightTransform | None) -> PreTrainedModel:
    """Load the base in float32, whatever it is stored in: nothing is rounded. Quantized weights are dequantized."""
    if base.quantization is None:
        model = load_base_model(base.section.model_copy(update={"dtype": "float32"}), QuantizationSection())
    else:
        dtype = str(base.config.dtype).removeprefix("torch.")
        model = load_base_model(base.section.model_copy(update={"dtype": dtype}), QuantizationSection()).dequantize()
    if transform is not None:
        for name, parameter in model.named_parameters():
            parameter.data = transform(name, parameter.data)
    return model.float()


def make_transform(job: MergeJob, base: Base, options: MergeOptions) -> WeightTransform | None:
    """Return the transform that `options.base_weights` asks for, None for the weights that `open_weights` reads.

    Raises:
        ArtifactError: the base is quantized and its original weights are asked for, or it is not known how the base was
            quantized in training.
    """
    if options.base_weights == "original":
        if base.quantization is not None:
            raise ArtifactError(
                f"{base.name}: is stored quantized ({describe(base.quantization)}): pass --base with the same model in "
                "16 or 32 bits, or --base-weights dequantized to merge into its dequantized weights"
            )
        return None
    if base.quantization is not None:
        return None
    config, provenance = _config_of_qlora(job), job.provenance or {}
    recorded_dtype = str(provenance.get("base_dtype", "auto"))  # older provenances lack it: the dtype in config.json
    section = base.section.model_copy(update={"dtype": config.model.dtype})
    dtype = choose_dtype(section, str(provenance.get("mixed_precision")), None, recorded_dtype)
    model = build_on_meta_device(read_base_config(base), trust_remote_code=base.trust_remote_code)
    quantized = quantized_names(model)
    transposed = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)}

    def round_trip(name: str, weight: torch.Tensor) -> torch.Tensor:
        if name not in quantized:
            return weight
        return quantize_round_trip(weight.to(dtype), config.quantization, transposed=name in transposed)

    return round_trip


def _config_of_qlora(job: MergeJob) -> RunConfig:
    """Return the config of the run that trained an adapter on a base which it loaded in 4 bits.

    Raises:
        ArtifactError: there is no such run, or its config is not known.
    """
    provenance = job.provenance or {}
    if trained_quantized(provenance):
        raise ArtifactError(
            f"{job.source}: was trained on weights that are stored quantized, in "
            f"{provenance['base']['name_or_path']}; to merge into those, pass that folder with --base. "
            "--base-weights original merges into the weights of this base"
        )
    try:
        config = RunConfig.model_validate(provenance["config"])
    except (KeyError, ValidationError):
        raise ArtifactError(
            f"{job.source}: has no record of how its base was quantized; pass --base-weights original"
        ) from None
    if config.quantization.bits != 4:
        bits = "to 8 bits, not 4" if config.quantization.bits == 8 else "not quantized"
        raise ArtifactError(f"{job.source}: its base was {bits} in training; pass --base-weights original")
    return config
