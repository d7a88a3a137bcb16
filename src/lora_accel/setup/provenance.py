"""The provenance of a run: the inputs that its result depends on."""

from __future__ import annotations

from accelerate import Accelerator

from lora_accel.config.schema import RunConfig
from lora_accel.console import Stage
from lora_accel.model.prequantized import stored_quantization
from lora_accel.saving.provenance import Provenance, describe_base, describe_run
from lora_accel.setup.data import PreparedData
from lora_accel.setup.initial import InitialAdapter, check_origin
from lora_accel.setup.model import PreparedModel


def make_provenance(
    config: RunConfig,
    data: PreparedData,
    accelerator: Accelerator,
    prepared: PreparedModel,
    initial: InitialAdapter | None = None,
) -> Provenance:
    """Return the inputs of this run: config, plan, precision, and hashes of base, tokenizer, template and data.

    Args:
        initial: the adapter of adapter.init_from.

    Raises:
        ArtifactError: the base has no weight files, or `initial` was trained on another one.
    """
    with Stage("hashing the weights of the base model", enabled=accelerator.is_local_main_process):
        base = describe_base(config.model.name_or_path, config.model.revision)
    if (quantization := stored_quantization(config.model)) is not None:
        base["quantization"] = quantization.model_dump()
    provenance = describe_run(
        config,
        data.plan,
        precision=accelerator.mixed_precision,
        base_dtype=str(accelerator.unwrap_model(prepared.model).config.dtype).removeprefix("torch."),
        tokenizer=data.template.tokenizer,
        template=data.template.source,
        ledgers=data.dataset.ledgers,
        base=base,
    )
    if initial is not None:
        provenance["init_from"] = initial.lineage
        check_origin(initial, config, provenance)
    return provenance
