"""`accelerate launch -m lora_accel.train --config FILE [section.key=value …]`: a training run.

Start reading at `run_training`. Cheap checks run first, so that an error in the config or the data shows in seconds:

    config -> launch -> Accelerator -> headers of the base -> examples, plan
           -> model, adapter -> resume point -> train -> adapter/

Heavy libraries are imported inside functions, after the config is validated.
"""

from __future__ import annotations

import argparse
import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lora_accel.config.files import read_config
from lora_accel.config.launch import Settings
from lora_accel.config.schema import RunConfig
from lora_accel.console import Stage, run_command, show_logs, silence_libraries
from lora_accel.distributed.launch import (
    check_local_rank,
    connect_store,
    exit_process,
    exit_with_launcher,
    is_local_rank_0,
    make_accelerator,
    resolve_launch,
    use_deepspeed,
)
from lora_accel.faults import active_fault
from lora_accel.logs import logger
from lora_accel.saving.discovery import KeptSettings, kept_settings
from lora_accel.saving.lock import lock_run_folder
from lora_accel.saving.output_dir import check_final_adapter, check_output_folder
from lora_accel.summary import finished_lines, is_finished, summary_lines
from lora_accel.training.stopping import abort_on_signal

if TYPE_CHECKING:
    from accelerate import Accelerator

    from lora_accel.saving.provenance import Exported, Provenance
    from lora_accel.setup.data import PreparedData
    from lora_accel.setup.initial import InitialAdapter
    from lora_accel.setup.model import PreparedModel
    from lora_accel.setup.resume import ResumePoint
    from lora_accel.training.metrics import Metrics
    from lora_accel.training.progress import Progress
    from lora_accel.training.step import Run


def main(arguments: Sequence[str] | None = None) -> int:
    """Train with the options of the command line; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m lora_accel.train", description="Train a LoRA adapter.")
    parser.add_argument("--config", required=True, metavar="FILE", help="run config, YAML")
    parser.add_argument("--deepspeed", metavar="FILE", help="DeepSpeed JSON, if accelerate launch does not pass one")
    # The launchers of DeepSpeed and torch.distributed.launch pass it, and set LOCAL_RANK too.
    parser.add_argument("--local_rank", "--local-rank", type=int, default=-1, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="options that differ from the file")
    request, others = parser.parse_known_args(arguments)  # read_config explains unknown options

    def command() -> None:
        show_logs()
        with abort_on_signal():
            exit_with_launcher()
            check_local_rank(request.local_rank)
            if request.deepspeed is not None:
                use_deepspeed(request.deepspeed)
            run_training(read_config(request.config, [*request.overrides, *others]), silence=True)

    return run_command(
        command,
        rank=int(os.environ.get("RANK", "0")),
        reports=is_local_rank_0(),
        error_file=os.environ.get("TORCHELASTIC_ERROR_FILE"),
        should_continue=True,
    )


def run_training(config: RunConfig, *, silence: bool = False) -> Path:
    """Train an adapter and return its folder.

    Args:
        silence: turn off warnings and progress bars of other libraries in this process, as the command does.

    Raises:
        UserError: the config, the data or the checkpoint to resume from is wrong; nothing was written.
        TrainingError: training cannot continue; the last good checkpoint is kept.
        Interrupted: a signal, or the end of training.max_hours; a checkpoint is saved.
    """
    folder = Path(config.output_dir)
    check_output_folder(folder)
    active_fault()
    kept = kept_settings(folder / "checkpoints", config.checkpoint.resume)
    if kept is not None and "warmup_from_zero" not in config.training.model_fields_set:
        training = config.training.model_copy(update={"warmup_from_zero": kept.warmup_from_zero})
        config = config.model_copy(update={"training": training})
    launch, settings = resolve_launch(config, kept.mixed_precision if kept else None)
    with Stage("importing PyTorch and transformers", enabled=is_local_rank_0()):
        import transformers  # noqa: F401

        if silence:
            silence_libraries()
    starting = "DeepSpeed; it compiles its extension once, up to a minute" if launch.zero_stage else "Accelerate"
    with Stage(f"starting {starting}", enabled=is_local_rank_0()):
        accelerator = make_accelerator(config, launch, settings)
    with lock_run_folder(folder, enabled=accelerator.is_main_process) as create_folder:
        return run_in_folder(config, accelerator, settings, folder, kept, create_folder)


def run_in_folder(
    config: RunConfig,
    accelerator: Accelerator,
    settings: Settings,
    folder: Path,
    kept: KeptSettings | None,
    create_folder: Callable[[], None],
) -> Path:
    """Prepare data, model and resume point, then train, in a locked run folder.

    Args:
        settings: those that launcher and run config share, for the log.
        kept: settings of the checkpoint to resume from.
        create_folder: creates and locks the folder if it does not exist; nothing is written before this call.
    """
    from accelerate.utils import gather_object

    from lora_accel.setup.data import log_data, prepare_data
    from lora_accel.setup.initial import prepare_initial_adapter
    from lora_accel.setup.sizes import resolve_rope_scaling

    is_main, config = accelerator.is_main_process, resolve_rope_scaling(config)
    check_base_early(config, accelerator)
    config, initial = prepare_initial_adapter(config, accelerator, kept.begun_with_adapter if kept else None)
    data = prepare_data(config, accelerator.num_processes)
    if is_main:
        log_data(config, data)
    identity = {"template": data.template.source, "mixed_precision": accelerator.mixed_precision}
    identity["initial_sha256"] = initial and initial.sha256
    if gather_object([is_main and is_finished(folder, config, data.plan, data.dataset.ledgers, **identity)])[0]:
        options = {"can_evaluate": bool(data.eval_sources), "trust_remote_code": config.model.trust_remote_code}
        logger.info("\n".join(finished_lines(folder, data.plan, **options)))
        return folder / "adapter"
    check_final_adapter(folder / "adapter")

    with Stage("importing PEFT", enabled=accelerator.is_local_main_process):
        from lora_accel.planning.out_of_memory import explained_out_of_memory
    with explained_out_of_memory(config, data, accelerator.mixed_precision):
        return load_and_train(config, accelerator, settings, data, kept, initial, create_folder)


def load_and_train(
    config: RunConfig,
    accelerator: Accelerator,
    settings: Settings,
    data: PreparedData,
    kept: KeptSettings | None,
    initial: InitialAdapter | None,
    create_folder: Callable[[], None],
) -> Path:
    """Load the model, start or resume, and train: what takes memory.

    Args:
        initial: the adapter of adapter.init_from; None = a new one.
    """
    from lora_accel.saving.checkpoint import check_disk_space
    from lora_accel.saving.run_folder import write_run_folder
    from lora_accel.setup.memory import fit_into_memory
    from lora_accel.setup.model import prepare_model
    from lora_accel.setup.provenance import make_provenance
    from lora_accel.setup.resume import resume_run

    folder, is_main, checkpoint_dtype = Path(config.output_dir), accelerator.is_main_process, kept and kept.base_dtype
    prepared = prepare_model(config, accelerator, checkpoint_dtype=checkpoint_dtype, initial=initial)
    num_local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    kept_tokens = kept and kept.micro_batch_tokens
    config = fit_into_memory(config, data, accelerator, prepared, num_local_ranks, kept_tokens=kept_tokens)
    provenance = make_provenance(config, data, accelerator, prepared, initial)
    start = resume_run(config, accelerator, prepared, provenance, data.plan)
    create_folder()
    if is_main:
        keep_last = config.checkpoint.keep_while_training + config.checkpoint.keeps_best
        check_disk_space(accelerator, prepared.model, folder / "checkpoints", keep_last, config.training.optimizer)
        ledgers = {"train": data.dataset.ledgers, "eval": data.eval_ledgers}
        write_run_folder(folder, config, data.plan, ledgers, provenance)
    return train_and_export(config, settings, data, accelerator, prepared, provenance, start)


def check_base_early(config: RunConfig, accelerator: Accelerator) -> None:
    """Check a local base before its data is tokenized, which may take hours. Only headers of its files are read.

    A run folder with a final adapter may hold the finished run, which needs no weights. There, and on the Hub, the base
    is checked when it is loaded.

    Raises:
        ArtifactError: the weight files do not hold the model of config.json.
        TrainingError: they do not on another rank.
    """
    from lora_accel.distributed.collectives import on_all_ranks
    from lora_accel.model.base import check_base

    stage = "checking the base"
    with Stage(stage, enabled=accelerator.is_local_main_process), on_all_ranks(accelerator, stage):
        if Path(config.model.name_or_path).is_dir() and not (Path(config.output_dir) / "adapter").exists():
            check_base(config.model)


def train_and_export(
    config: RunConfig,
    settings: Settings,
    data: PreparedData,
    accelerator: Accelerator,
    prepared: PreparedModel,
    provenance: Provenance,
    start: ResumePoint,
) -> Path:
    """Train from the resume point to the last step, and save the final adapter. Updates status.json and the log."""
    from accelerate.utils import gather_object

    from lora_accel.distributed.heartbeat import Process, watch_ranks
    from lora_accel.report.write import report_finished_run
    from lora_accel.saving.discovery import prune
    from lora_accel.saving.status import track_status, write_state
    from lora_accel.setup.run import make_run
    from lora_accel.training.loop import train
    from lora_accel.training.stopping import handle_stop_signals

    folder, is_main, first_step = Path(config.output_dir), accelerator.is_main_process, start.progress.step
    checkpoints, processes = folder / "checkpoints", gather_object([Process.current()])
    pids, rank = [process.pid for process in processes], accelerator.process_index
    with (
        handle_stop_signals(config.training.max_hours, reports=accelerator.is_local_main_process) as stop,
        track_status(
            folder, first_step, start.checkpoint, total_steps=data.plan.total_steps, pids=pids, enabled=is_main
        ) as note_status,
    ):
        run = make_run(config, data, accelerator, prepared, provenance, start, stop, note_status)
        run.metrics.start_trackers(config)
        run.metrics.log_event(first_step, "resume" if first_step else "start", settings=settings.rows)
        try:
            if start.checkpoint is not None and start.checkpoint.parent.resolve() != checkpoints.resolve():
                run.checkpointer.save(start.progress)  # of another run: save a copy in this one
            run.checkpointer.report_unusable_best(start.progress, hashes=True)
            run.metrics.begin()
            store, end = connect_store(len(processes)), functools.partial(write_state, folder)
            with watch_ranks(store, run.position, processes, rank, on_abort=end):
                train(run, start.progress)
                exported = export_final_adapter(config, data, run, provenance, start.progress)
            if is_main:
                prune(checkpoints, config.checkpoint.keep_last, run.checkpointer.protected(start.progress))
            run.metrics.log_event(start.progress.step, "done")
        finally:
            run.metrics.close()
    if is_main:
        log_summary(config, data, run.metrics, first_step, start.progress.step, exported)
        if config.logging.report:
            report_finished_run(folder)
    return folder / "adapter"


def export_final_adapter(
    config: RunConfig, data: PreparedData, run: Run, provenance: Provenance, progress: Progress
) -> Exported:
    """Save the weights of the last step, or of the best one, as the final adapter; return which these are."""
    from lora_accel.saving.run_folder import save_final_adapter

    exported = run.checkpointer.restore_exported(progress)
    folder, provenance = Path(config.output_dir) / "adapter", {**provenance, "exported": exported}
    save_final_adapter(folder, data.template, run.accelerator, run.model, provenance, config.checkpoint.gather)
    return exported


def log_summary(
    config: RunConfig, data: PreparedData, metrics: Metrics, first_step: int, last_step: int, exported: Exported
) -> None:
    """Log the results of a run that has finished, and the commands that use its adapter."""
    lines = summary_lines(
        Path(config.output_dir),
        data.plan,
        resumed_from=first_step,
        last_step=last_step,
        exported=exported,
        seconds=metrics.elapsed_seconds,
        loss=metrics.loss,
        eval_loss=metrics.eval_loss,
        can_evaluate=bool(data.eval_sources),
        trust_remote_code=config.model.trust_remote_code,
    )
    logger.info("\n".join(lines))


if __name__ == "__main__":
    exit_process(main())
