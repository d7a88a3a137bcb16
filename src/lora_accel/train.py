"""`accelerate launch -m lora_accel.train --config FILE [section.key=value …]`: where all parts of training meet.

Read it from `run_training` on. One direction, cheap things first, so that a mistake costs seconds:

    config -> Accelerator -> examples -> Plan -> model -> adapter -> resume -> train -> adapter/

Heavy libraries are imported once the config has been read and found good.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lora_accel.config.files import config_to_yaml, read_config
from lora_accel.config.plan import Plan, make_plan
from lora_accel.config.schema import RunConfig
from lora_accel.console import Stage, hush_libraries, print_table, run_command, short_names
from lora_accel.errors import ConfigError
from lora_accel.faults import armed, reach
from lora_accel.launch import follow_launcher, leave, make_accelerator, settle
from lora_accel.saving.lock import held, refuse_output
from lora_accel.summary import finished_lines, is_finished, summary_lines
from lora_accel.training.stopping import ending_before_training

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

    from lora_accel.data.audit import SourceLedger
    from lora_accel.data.chat import ChatTemplate, Example
    from lora_accel.data.dataset import Dataset, Recipe
    from lora_accel.model.dropout import TokenKeys
    from lora_accel.training.loop import Progress, Run
    from lora_accel.training.loss_scale import LossScale
    from lora_accel.training.stopping import Stop


def main(arguments: Sequence[str] | None = None) -> int:
    """Train as the command line says; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m lora_accel.train", description="Train a LoRA adapter as a run config says."
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="run config, YAML")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="what differs from the file")
    asked = parser.parse_args(arguments)

    def command() -> None:
        with ending_before_training():
            follow_launcher()
            run_training(read_config(asked.config, asked.overrides))

    return run_command(
        command,
        rank=int(os.environ.get("RANK", "0")),
        speaks=speaks(),
        error_file=os.environ.get("TORCHELASTIC_ERROR_FILE"),
    )


def speaks() -> bool:
    """Whether this process is local rank 0, the one that reports progress."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def run_training(config: RunConfig) -> Path:
    """Train an adapter and return the folder that holds it.

    Raises:
        UserError: the config, the data or what is to be resumed is wrong; nothing has been written.
        TrainingError: training cannot go on; the last good checkpoint is kept.
        Interrupted: a signal, or the end of training.max_hours; a checkpoint is saved.
    """
    folder = Path(config.output_dir)
    refuse_output(folder)
    armed()
    launch, settings = settle(config)
    with Stage("importing PyTorch and transformers", enabled=speaks()):
        hush_libraries()
    starting = "DeepSpeed; it compiles its extension once, up to a minute" if launch.zero_stage else "Accelerate"
    with Stage(f"starting {starting}", enabled=speaks()):
        accelerator = make_accelerator(config, launch, settings)
    with held(folder, enabled=accelerator.is_main_process) as begin:
        return run_in_folder(config, accelerator, folder, begin)


def run_in_folder(config: RunConfig, accelerator: Accelerator, folder: Path, begin: Callable[[], None]) -> Path:
    """Train in a folder that is this run's alone, from the call of `begin` on if it was not there before."""
    from accelerate.utils import gather_object

    from lora_accel.saving.history import prune
    from lora_accel.saving.status import running
    from lora_accel.training.stopping import listening

    checkpoints, main = folder / "checkpoints", accelerator.is_main_process
    data = prepare_data(config, accelerator.num_processes)
    if main:
        show_data(data)
    same = {"template": data.template.source, "mixed_precision": accelerator.mixed_precision}
    if gather_object([main and is_finished(folder, config, data.plan, data.dataset.ledgers, **same)])[0]:
        lines = finished_lines(folder, data.plan.total_steps, can_evaluate=bool(data.eval_sources))
        accelerator.print("\n".join(lines))
        return folder / "adapter"
    with Stage("importing PEFT", enabled=accelerator.is_local_main_process):
        from lora_accel.saving.checkpoint import refuse_full_disk
        from lora_accel.training.loop import train
    model, optimizer, dropout, packed = prepare_model(config, accelerator)
    if recomputes(config, data, accelerator, model, dropout, packed):
        accelerator.unwrap_model(model).gradient_checkpointing_enable({"use_reentrant": False})
    provenance = describe(config, data, accelerator, model)
    start = go_on(config, accelerator, model, optimizer, provenance, data.plan)
    begin()
    if main:
        refuse_full_disk(accelerator, model, checkpoints, keep_last=max(2, config.checkpoint.keep_last))
        write_run_folder(folder, config, data, provenance)
    pids, resumed_from = gather_object([os.getpid()]), start.progress.step
    with (
        listening(config.training.max_hours, speaks=accelerator.is_local_main_process) as stop,
        running(folder, start.progress.step, start.checkpoint, pids=pids, enabled=main) as status,
    ):
        run = make_run(config, data, accelerator, model, optimizer, dropout, packed, provenance, status, start, stop)
        # Accelerate puts the trackers' files into a folder of the project's name: OUTPUT_DIR/tensorboard.
        accelerator.init_trackers("tensorboard")
        run.metrics.log_event(start.progress.step, "resume" if start.progress.step else "start")
        try:
            if start.checkpoint is not None and start.checkpoint.parent.resolve() != checkpoints.resolve():
                run.save(start.progress)  # another run's; from here on this one has its own
            run.metrics.begin()
            train(run, start.progress)
            export_adapter(folder / "adapter", data.template, accelerator, model, provenance, config.checkpoint.gather)
            if main:
                prune(checkpoints, config.checkpoint.keep_last, spare=config.checkpoint.resume)
            run.metrics.log_event(data.plan.total_steps, "done")
        finally:
            run.metrics.close()
    metrics = run.metrics
    if main:
        lines = summary_lines(
            folder,
            data.plan,
            resumed_from=resumed_from,
            seconds=metrics.elapsed_seconds,
            loss=metrics.loss,
            eval_loss=metrics.eval_loss,
            can_evaluate=bool(data.eval_sources),
        )
        print("\n".join(lines))
    return folder / "adapter"


class Data(NamedTuple):
    """Examples and what was planned with them."""

    recipe: Recipe
    dataset: Dataset
    eval_sources: dict[str, list[Example]]
    """What is evaluated, each source under its name."""
    eval_ledgers: list[SourceLedger]
    prompts: list[list[int]]
    """Tokens of `evaluation.prompts`."""
    plan: Plan

    @property
    def template(self) -> ChatTemplate:
        """Return the template of training, on its tokenizer."""
        return self.recipe.template()


def prepare_data(config: RunConfig, num_ranks: int) -> Data:
    """Read and tokenise the data, and work out the run.

    Raises:
        DataError: a file, a row or the template is wrong, or too many rows are unusable.
    """
    from lora_accel.data.formats import Message
    from lora_accel.data.order import source_count
    from lora_accel.data.splits import examples_by_name, load_splits
    from lora_accel.recipe import make_recipe

    recipe = make_recipe(config)
    dataset, evaluation, eval_ledgers = load_splits(config.data, config.seed, recipe)
    eval_sources = examples_by_name(evaluation)
    plan = make_plan(
        config,
        num_ranks=num_ranks,
        num_examples=sum(source_count(len(source.examples), source.weight) for source in dataset.sources),
        num_tokens=sum(round(x.weight * int(x.examples.lengths.sum())) for x in dataset.sources),
        num_supervised_tokens=sum(round(x.weight * int(x.examples.num_supervised.sum())) for x in dataset.sources),
        num_eval_examples=sum(map(len, eval_sources.values())),
    )
    prompts = [recipe.template().encode_prompt((Message("user", prompt),)) for prompt in config.evaluation.prompts]
    return Data(recipe, dataset, eval_sources, eval_ledgers, prompts, plan)


def show_data(data: Data) -> None:
    """Print the ledger, what an epoch takes of several sources, and the plan."""
    from lora_accel.data.audit import ledger_lines
    from lora_accel.data.order import source_count

    ledgers, sources = [*data.dataset.ledgers, *data.eval_ledgers], data.dataset.sources
    lines = ledger_lines(ledgers)
    print_table("data", lines)
    if len(sources) > 1 or any(source.weight != 1 for source in sources):
        names = short_names([path for *_, path in sources])
        shares = [
            f"{source_count(len(x), weight):,} of {len(x):,} examples (weight {weight:g})" for x, weight, _ in sources
        ]
        print_table("an epoch", list(zip(names, shares, strict=True)))
    print_table("plan", data.plan.table())
    if any(not ledger.num_ended and ledger.format not in ("text", "tokens") for ledger in data.dataset.ledgers):
        print("note: the chat template closes a turn with no special token, so the adapter will not learn to stop")


def prepare_model(
    config: RunConfig, accelerator: Accelerator
) -> tuple[torch.nn.Module, torch.optim.Optimizer, TokenKeys, bool]:
    """Load the base, put the adapter on it, and prepare both for this machine; last, whether rows may be packed."""
    from lora_accel.model.adapter import add_adapter, count_parameters, key_dropout, trainable_parameters
    from lora_accel.model.attention import can_pack, pack_attention
    from lora_accel.model.base import check_zero3_dtype, load_base_model
    from lora_accel.model.compiled import compile_layers
    from lora_accel.model.device import detect_device, has_fused_adamw
    from lora_accel.model.fused import fuse
    from lora_accel.saving.history import precision_of_run
    from lora_accel.saving.provenance import serving_note
    from lora_accel.saving.weights import refuse_what_would_be_lost
    from lora_accel.saving.zero import begin_moments
    from lora_accel.training.loss import return_loss
    from lora_accel.training.optimizer import make_optimizer

    sharded = accelerator.distributed_type.value == "DEEPSPEED"
    kept = precision_of_run(Path(config.output_dir) / "checkpoints", config.checkpoint.resume)
    kept_dtype = None if kept is None else kept.base_dtype
    if sharded and accelerator.deepspeed_plugin.zero_stage == 3 and accelerator.mixed_precision == "no":
        check_zero3_dtype(config.model, accelerator.device, kept_dtype)
    name = short_names([config.model.name_or_path])[0]
    with Stage(f"loading {name}", enabled=accelerator.is_local_main_process):
        base = load_base_model(
            config.model,
            config.quantization,
            mixed_precision=accelerator.mixed_precision,
            device=accelerator.device,
            kept_dtype=kept_dtype,
        )
    packed = config.data.packing and can_pack(base)
    if packed:
        pack_attention(base)
    elif config.data.packing:
        accelerator.print(
            f"note: rows are padded, since a {base.config.model_type} with this attention takes no packed ones"
        )
    # The compiler does by itself what `fuse` does by hand.
    (compile_layers if config.training.compile else fuse)(base)
    model = add_adapter(
        base,
        config.adapter,
        seed=config.seed,
        autocast=accelerator.mixed_precision != "no" and not sharded,
        masters=accelerator.mixed_precision != "no" and sharded,
    )
    trained, total = count_parameters(model)
    accelerator.print(f"trainable: {trained:,} of {total:,} parameters ({trained / total:.3%})")
    accelerator.print(f"afterwards, {serving_note(config.adapter.model_dump())}")
    refuse_what_would_be_lost(model)
    return_loss(model.get_base_model())
    fused = has_fused_adamw(detect_device(accelerator.device))
    optimizer = make_optimizer(trainable_parameters(model).values(), config.training, fused=fused)
    dropout = key_dropout(model)
    model, optimizer = accelerator.prepare(model, optimizer)
    if sharded:
        begin_moments(optimizer)
    return model, optimizer, dropout, packed


def recomputes(
    config: RunConfig,
    data: Data,
    accelerator: Accelerator,
    model: torch.nn.Module,
    dropout: TokenKeys,
    packed: bool,
) -> bool:
    """Whether activations are made again on the way back; `auto`: if on any rank they would not fit."""
    import torch

    from lora_accel.data.batches import step_batch
    from lora_accel.data.chat import Example
    from lora_accel.training.memory import free_bytes, wanted_bytes

    if config.training.activation_checkpointing != "auto":
        return config.training.activation_checkpointing
    longest = max(int(source.examples.lengths.max()) for source in data.dataset.sources)
    few = data.dataset.example(0)
    few = Example(few.input_ids[:256], few.labels[:256])
    pad_id = data.template.tokenizer.pad_token_id
    (batch,) = step_batch([few], config.training, rank=0, num_ranks=1, pad_id=pad_id, packed=packed).micro_batches
    batch = batch.to(accelerator.device)
    dropout.keys = batch.token_keys
    model.train()
    by_examples = config.training.micro_batch_size
    tokens = by_examples * longest if by_examples else max(longest, config.training.micro_batch_tokens)
    with Stage("measuring activation memory", enabled=accelerator.is_local_main_process):
        wanted = wanted_bytes(model, batch, tokens)
    free = free_bytes(accelerator.device, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    short = torch.tensor(float(wanted > free), device=accelerator.device)
    again = bool(accelerator.reduce(short) > 0)
    what = "made again on the way back" if again else "kept"
    accelerator.print(f"activations: {wanted / 1e9:.1f} GB of {free / 1e9:.1f} GB that are free; {what}")
    return again


def describe(config: RunConfig, data: Data, accelerator: Accelerator, model: torch.nn.Module) -> dict[str, Any]:
    """Return what this run is made from."""
    from lora_accel.saving.provenance import base_hashes, config_hash, describe_run

    with Stage("hashing the weights of the base model", enabled=accelerator.is_local_main_process):
        base = base_hashes(config.model.name_or_path, config.model.revision)
    return describe_run(
        config,
        data.plan,
        precision=accelerator.mixed_precision,
        base_dtype=str(accelerator.unwrap_model(model).config.dtype).removeprefix("torch."),
        tokenizer=data.template.tokenizer,
        template=data.template.source,
        ledgers=data.dataset.ledgers,
        base=base,
        base_config=config_hash(config.model.name_or_path, config.model.revision),
    )


class Start(NamedTuple):
    """Where a run begins."""

    progress: Progress
    loss_scale: LossScale | None
    """In float16 only."""
    checkpoint: Path | None
    begun_from: str | None
    """Hash of the checkpoint that `checkpoint.resume` named, here or when the run began."""
    begun_at: str | None
    """Where that one was."""


def go_on(
    config: RunConfig,
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    provenance: dict[str, Any],
    plan: Plan,
) -> Start:
    """Put right what a run that died left here, and load the checkpoint to go on from, if there is one."""
    from lora_accel.saving.checkpoint import load_checkpoint, refuse_changes
    from lora_accel.saving.commit import recover_all
    from lora_accel.saving.history import find_checkpoint, step_aside
    from lora_accel.training.loop import Progress
    from lora_accel.training.loss_scale import LossScale

    folder = Path(config.output_dir)
    if accelerator.is_main_process:
        recover_all(folder)
        recover_all(folder / "checkpoints")
    accelerator.wait_for_everyone()
    found = find_checkpoint(folder / "checkpoints", config.checkpoint.resume)
    checkpoint = found.checkpoint
    agree(provenance, None if checkpoint is None else checkpoint.step)
    changed = []
    if checkpoint is not None:
        changed = refuse_changes(checkpoint, provenance, config.checkpoint.allow_changes)
        if checkpoint.step > plan.total_steps:
            raise ConfigError(
                f"training: the run would have {plan.total_steps} steps, but {checkpoint.folder} is after step "
                f"{checkpoint.step}; give more epochs or max_steps, or name an earlier one in checkpoint.resume"
            )
        load_checkpoint(accelerator, model, optimizer, checkpoint)
    if accelerator.is_main_process:
        for line in step_aside(found, folder / "metrics.jsonl"):
            print(line)
    scale = None if accelerator.mixed_precision != "fp16" else LossScale()
    if checkpoint is None:
        return Start(Progress(), scale, None, None, None)
    accelerator.print(f"resuming after step {checkpoint.step} from {checkpoint.folder}")
    for line in changed:
        accelerator.print(f"changed, as checkpoint.allow_changes says:{line}")
    if scale is not None:
        scale = LossScale.from_state(checkpoint.state.get("loss_scale"))
    progress = Progress(checkpoint.step, checkpoint.skipped, checkpoint.overflowed)
    return Start(progress, scale, checkpoint.folder, found.begun_from, found.begun_at)


def agree(provenance: dict[str, Any], step: int | None) -> None:
    """Refuse to go on where processes have found different things: machines may see other files.

    Args:
        step: of the checkpoint that this process would go on from.
    """
    from accelerate.utils import gather_object

    from lora_accel.saving.provenance import changes, changes_table

    mine, *others = gather_object([(provenance, step)])
    for rank, (other, other_step) in enumerate(others, start=1):
        differences = changes(mine[0], other)
        if other_step != mine[1]:
            differences.append(("checkpoint", mine[1], other_step))
        if differences:
            raise ConfigError(
                f"processes 0 and {rank} have found different things (0 -> {rank}):\n{changes_table(differences)}\n"
                "Start all with one command, and let all machines see the same files and one output_dir."
            )


def write_run_folder(folder: Path, config: RunConfig, data: Data, provenance: dict[str, Any]) -> None:
    """Write what was asked, planned and used."""
    from lora_accel.saving.commit import write_json, write_text

    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "plan.json", data.plan.as_dict())  # first: a folder with it is a run's
    write_text(folder / "config.yaml", config_to_yaml(config))
    write_json(folder / "provenance.json", provenance)
    ledgers = {"train": data.dataset.ledgers, "eval": data.eval_ledgers}
    write_json(
        folder / "data_ledger.json",
        {name: [ledger.as_dict() for ledger in of_split] for name, of_split in ledgers.items()},
    )


def make_run(
    config: RunConfig,
    data: Data,
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    dropout: TokenKeys,
    packed: bool,
    provenance: dict[str, Any],
    status: Callable[[int, Path | None], None],
    start: Start,
    stop: Stop,
) -> Run:
    """Bind everything that the loop is handed."""
    from lora_accel.data.batches import Batches, step_batch
    from lora_accel.model.adapter import trainable_parameters
    from lora_accel.saving.checkpoint import save_checkpoint
    from lora_accel.training.evaluate import evaluate_sources, sample_replies
    from lora_accel.training.loop import Run
    from lora_accel.training.metrics import Metrics

    folder, tokenizer = Path(config.output_dir), data.template.tokenizer
    cut: dict[str, Any] = {"rank": accelerator.process_index, "pad_id": tokenizer.pad_token_id, "packed": packed}
    batches = Batches(data.dataset, config.training, data.plan, seed=config.seed, **cut)
    eval_batches = {
        name: step_batch(examples, config.training, num_ranks=data.plan.num_ranks, **cut)
        for name, examples in data.eval_sources.items()
    }

    def evaluation() -> dict[str, Any]:
        values: dict[str, Any] = {}
        if eval_batches:
            with metrics.doing("evaluating"):
                values = evaluate_sources(accelerator, model, eval_batches)
        if config.evaluation.prompts:
            most = config.evaluation.max_new_tokens
            with metrics.doing("replying to evaluation.prompts"):
                replies = sample_replies(accelerator, model, tokenizer, data.prompts, max_new_tokens=most)
            values["replies"] = list(zip(config.evaluation.prompts, replies, strict=True))
        return values

    metrics = Metrics(accelerator, folder, data.plan, start.progress.step)

    def save(progress: Progress) -> None:
        metrics.sync()
        state: dict[str, Any] = {
            "step": progress.step,
            "epoch": data.plan.place(progress.step)[0],
            "examples": data.plan.examples_after(progress.step),
            "skipped": progress.skipped,
            "overflowed": progress.overflowed,
            "loss_scale": None if start.loss_scale is None else start.loss_scale.state(),
            "seed": config.seed,
            "begun_from": start.begun_from,
            "begun_at": start.begun_at,
            "provenance": provenance,
        }
        saved = save_checkpoint(
            accelerator,
            model,
            optimizer,
            folder / "checkpoints",
            state,
            keep_last=max(2, config.checkpoint.keep_last),
            gather=config.checkpoint.gather,
            spare=config.checkpoint.resume,
        )
        status(progress.step, saved)

    return Run(
        accelerator=accelerator,
        model=model,
        trainable=list(trainable_parameters(model).values()),
        optimizer=optimizer,
        dropout=dropout,
        training=config.training,
        plan=data.plan,
        seed=config.seed,
        batch_of=batches.step,
        evaluate=evaluation,
        save=save,
        metrics=metrics,
        stop=stop,
        loss_scale=start.loss_scale,
    )


def export_adapter(
    folder: Path,
    template: ChatTemplate,
    accelerator: Accelerator,
    model: torch.nn.Module,
    provenance: dict[str, Any],
    gather: str,
) -> None:
    """Save the final adapter with all that is needed to use it: tokenizer, chat template, provenance, card."""
    from lora_accel.saving.commit import committed_folder, write_json, write_text
    from lora_accel.saving.provenance import model_card
    from lora_accel.saving.ranks import together
    from lora_accel.saving.weights import gather_adapter, unwrapped, write_adapter

    state = gather_adapter(accelerator, model, gather=gather)
    with together(accelerator, "saving the final adapter"):
        if accelerator.is_main_process:
            with committed_folder(folder) as temporary:
                write_adapter(unwrapped(accelerator, model), state, temporary)
                reach("export.mid")
                template.tokenizer.chat_template = template.source or None
                template.tokenizer.save_pretrained(temporary)
                write_json(temporary / "provenance.json", provenance)
                write_text(temporary / "README.md", model_card(provenance))


if __name__ == "__main__":
    leave(main())
