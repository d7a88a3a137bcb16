"""The tokenizer of a merged model."""

from __future__ import annotations

from typing import Any

from lora_accel.config.schema import ModelSection
from lora_accel.data.template import template_source
from lora_accel.errors import ArtifactError, DataError
from lora_accel.merging.base import Base
from lora_accel.merging.job import TOKENIZER, MergeJob
from lora_accel.model.tokenizer import has_tokenizer, load_tokenizer
from lora_accel.saving.discovery import run_of
from lora_accel.saving.provenance import recorded_changes, sha256_of_text


def load_adapter_tokenizer(job: MergeJob, base: Base) -> Any:
    """Return the adapter's tokenizer, which has the chat template of training, or else the base's; None = both lack it.

    A checkpoint has no tokenizer: use that of the run's adapter, or else the base's with the chat template of the run.
    """
    run = run_of(job.adapter)
    for folder in (job.adapter, *([run / "adapter"] if run is not None and job.provenance is not None else [])):
        if (folder / TOKENIZER).is_file():
            return load_tokenizer(ModelSection(name_or_path=str(folder)))
    added = recorded_changes(job.provenance, str(job.adapter)).add_tokens
    if job.provenance is None and not has_tokenizer(base.section):
        return None
    tokenizer = load_tokenizer(base.section.model_copy(update={"add_tokens": added}))
    if job.provenance is not None:
        try:
            source = template_source(job.provenance["config"]["model"]["chat_template"]) or tokenizer.chat_template
        except (KeyError, TypeError, DataError):
            source = None
        if source is None or sha256_of_text(source) != job.provenance.get("chat_template_sha256"):
            raise ArtifactError(
                f"{job.source}: the chat template of training was not found (model.chat_template in the run's "
                "config.yaml); merge the run's adapter/, or restore the template"
            )
        tokenizer.chat_template = source
    return tokenizer
