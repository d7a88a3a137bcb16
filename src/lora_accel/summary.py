"""The summary of a finished run, and whether a run folder contains one."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_accel.config.plan import Plan
from lora_accel.config.recorded import with_defaults
from lora_accel.config.schema import RunConfig
from lora_accel.console import format_seconds
from lora_accel.data.audit import SourceLedger
from lora_accel.errors import ArtifactError
from lora_accel.saving.atomic import read_json, why_invalid

if TYPE_CHECKING:
    from lora_accel.saving.provenance import Exported


def is_finished(
    folder: Path,
    config: RunConfig,
    plan: Plan,
    ledgers: Sequence[SourceLedger],
    *,
    template: str,
    mixed_precision: str,
    initial_sha256: str | None = None,
) -> bool:
    """Whether a run folder contains the finished result of this run, so that nothing is left to do.

    Config, plan, data, chat template, precision and base must be those of the finished run, and the adapter must match
    its manifest. In any other case, resuming continues the run or raises.

    Args:
        ledgers: ledgers of the training sources.
        template: source of the chat template.
        initial_sha256: of the adapter with which this run begins; None = a new one.
    """
    adapter = (folder / "adapter").resolve()  # it may be a link to another disk
    try:
        status, provenance = read_json(folder / "status.json"), read_json(folder / "provenance.json")
        total_steps = status.get("total_steps", status["step"])  # a run that stopped early has done fewer
        if status["state"] != "done" or total_steps != plan.total_steps or why_invalid(adapter) is not None:
            return False
        finished_plan = {key: value for key, value in provenance["plan"].items() if key != "num_ranks"}
        tokens = [entry["tokens_sha256"] for entry in provenance["data"]]
        settings, precision = with_defaults(provenance["config"]), provenance["mixed_precision"]
        asked = config.model_dump()
        if asked["training"]["micro_batch_tokens"] == "auto":  # what the run chose is recorded
            asked["training"]["micro_batch_tokens"] = settings["training"]["micro_batch_tokens"]
        initial = (provenance.get("init_from") or [{"sha256": None}])[0]["sha256"]
        base, template_sha256 = provenance["base"], provenance["chat_template_sha256"]
        recorded = {
            "sha256": dict(base["sha256"]),
            "config_sha256": base["config_sha256"],
            "tensors_sha256": base.get("tensors_sha256"),
        }
    except (ArtifactError, KeyError, TypeError, ValueError, AttributeError):
        return False
    is_same = (
        finished_plan == {key: value for key, value in plan.as_dict().items() if key in finished_plan}
        and tokens == [ledger.tokens_sha256 for ledger in ledgers]
        and settings == asked
        and precision == mixed_precision
        and initial == initial_sha256
    )
    return is_same and _has_same_model(config, template, recorded, template_sha256)


def finished_lines(folder: Path, plan: Plan, *, can_evaluate: bool, trust_remote_code: bool = False) -> list[str]:
    """Return the message for a run that is already finished.

    Args:
        can_evaluate: whether the run's config has evaluation data.
        trust_remote_code: whether the base's own code ran, which the next commands must allow too.
    """
    step = read_json(folder / "status.json")["step"]
    return [
        f"{folder}: finished after step {step:,}{_early_note(step, plan)}; nothing to do",
        f"adapter: {folder / 'adapter'}",
        "to continue, raise evaluation.patience"
        if step < plan.total_steps
        else "to train longer, add training.epochs=N 'checkpoint.allow_changes=[training.epochs]'",
        "to train from the beginning, add output_dir=ANOTHER",
        *next_lines(folder, can_evaluate=can_evaluate, trust_remote_code=trust_remote_code),
    ]


def summary_lines(
    folder: Path,
    plan: Plan,
    *,
    resumed_from: int,
    last_step: int,
    exported: Exported,
    seconds: float,
    loss: float | None,
    eval_loss: float | None,
    can_evaluate: bool,
    trust_remote_code: bool = False,
) -> list[str]:
    """Return the message at the end of a run.

    Args:
        resumed_from: the step after which this process started.
        last_step: the last step of the plan, or the one at which the run stopped early.
        exported: which weights adapter/ has.
        seconds: training time of this process.
        loss, eval_loss: of the last step; None = not logged, not evaluated.
        can_evaluate: whether the run's config has evaluation data.
        trust_remote_code: see `finished_lines`.
    """
    steps = last_step - resumed_from
    resumed = f", resumed after step {resumed_from:,}" if resumed_from else ""
    losses = [("loss", loss), ("eval loss", eval_loss)]
    final_losses = ", ".join(f"{name} {value:.4f}" for name, value in losses if value is not None)
    best = f", of step {exported['step']:,}: best {exported['metric']}" if exported["selected"] == "best" else ""
    return [
        f"finished: {steps:,} steps in {format_seconds(seconds)}{resumed}{_early_note(last_step, plan)}"
        + (f"; {final_losses}" if final_losses else ""),
        f"adapter: {folder / 'adapter'}{best}",
        *next_lines(folder, can_evaluate=can_evaluate, trust_remote_code=trust_remote_code),
    ]


def _early_note(step: int, plan: Plan) -> str:
    """Return that a run stopped early; empty if it did not."""
    return "" if step == plan.total_steps else f", stopped early (of {plan.total_steps:,} steps)"


def next_lines(folder: Path, *, can_evaluate: bool, trust_remote_code: bool = False) -> list[str]:
    """Return the commands to run next, ready to copy.

    Args:
        can_evaluate: whether the run's config has evaluation data.
        trust_remote_code: see `finished_lines`.
    """
    option = " --trust-remote-code" if trust_remote_code else ""
    adapter, merged, config = (shlex.quote(str(folder / name)) for name in ("adapter", "merged", "config.yaml"))
    lines = [f"lora-accel chat --adapter {adapter}{option}"]
    if can_evaluate:
        lines.append(f"lora-accel evaluate --config {config} --adapter {adapter}")
    lines.append(f"lora-accel merge {adapter} {merged}{option}")
    return ["next:", *(f"  {line}" for line in lines)]


def _has_same_model(config: RunConfig, template: str, recorded: dict[str, Any], template_sha256: str) -> bool:
    """Whether a run's base and chat template are the recorded ones. False if the base is not available."""
    from lora_accel.saving.base_identity import base_hashes, is_same_base, tensors_hash
    from lora_accel.saving.provenance import config_hash, sha256_of_text

    name, revision = config.model.name_or_path, config.model.revision
    try:
        hashes = base_hashes(name, revision, cached=True)
        same_weights = is_same_base(recorded, hashes, lambda: tensors_hash(name, revision, cached=True))
        same_config = config_hash(name, revision) == recorded["config_sha256"]
    except (ArtifactError, OSError):  # deleted, or no longer in the cache
        return False
    return same_weights and same_config and sha256_of_text(template) == template_sha256
