"""Write the files of a run, except checkpoints: config, plan, provenance, data ledger and the final adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator

from lora_accel.config.files import config_to_yaml
from lora_accel.config.plan import Plan
from lora_accel.config.schema import RunConfig
from lora_accel.data.audit import SourceLedger
from lora_accel.data.template import ChatTemplate
from lora_accel.distributed.collectives import on_all_ranks
from lora_accel.faults import fault_point
from lora_accel.model.portable import save_tokenizer
from lora_accel.saving.adapter import gather_adapter, unwrap_peft_model, write_adapter
from lora_accel.saving.atomic import atomic_folder, read_json, write_json, write_text
from lora_accel.saving.cards import exported_step, model_card
from lora_accel.saving.discovery import CONFIG
from lora_accel.saving.output_dir import check_exists
from lora_accel.saving.provenance import Provenance
from lora_accel.saving.results import RunResults, read_results
from lora_accel.saving.serving import serving_note
from lora_accel.saving.tensor_files import read_adapter


def write_run_folder(
    folder: Path,
    config: RunConfig,
    plan: Plan,
    ledgers: Mapping[str, Sequence[SourceLedger]],
    provenance: Provenance,
) -> None:
    """Write the run's config, plan, provenance and data ledger.

    Args:
        ledgers: one per source, for the splits `train` and `eval`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "plan.json", plan.as_dict())  # first: plan.json marks the folder as a run folder
    write_text(folder / "config.yaml", config_to_yaml(config))
    write_json(folder / "provenance.json", provenance)
    write_json(
        folder / "data_ledger.json",
        {split: [ledger.as_dict() for ledger in sources] for split, sources in ledgers.items()},
    )


def save_final_adapter(
    folder: Path,
    template: ChatTemplate,
    accelerator: Accelerator,
    model: torch.nn.Module,
    provenance: Provenance,
    gather: str,
) -> None:
    """Save the final adapter with its tokenizer, chat template, provenance and model card. Every rank calls this.

    Args:
        gather: see `gather_adapter`.

    Raises:
        TrainingError: the disk is full, or a rank failed.
    """
    state = gather_adapter(accelerator, model, gather=gather)
    with on_all_ranks(accelerator, "saving the final adapter"):
        if accelerator.is_main_process:
            check_exists(folder.parent)
            with atomic_folder(folder) as temporary:
                write_adapter(unwrap_peft_model(accelerator, model), state, temporary)
                fault_point("export.mid")
                template.tokenizer.chat_template = template.source or None
                save_tokenizer(template.tokenizer, temporary)
                write_json(temporary / "provenance.json", provenance)
                results = read_results(folder.parent, exported_step(provenance))
                write_text(temporary / "README.md", _card(temporary, provenance, results))


def _card(folder: Path, provenance: Provenance, results: RunResults) -> str:
    """Return the model card of the adapter in a folder."""
    config = read_json(folder / CONFIG)
    shapes = {name: tensor.shape for name, tensor in read_adapter(folder).items()}
    serving = serving_note(config, shapes, provenance["config"]["model"])
    return model_card(provenance, config, serving, results)
