"""Options of other trainers, and what they are called here: hints for unknown keys. None of these names is accepted.

Names of transformers' TrainingArguments, TRL, PEFT, Axolotl, LLaMA-Factory, torchtune, FastChat and Accelerate. To add
one, add it to `PEERS`, or to `LAUNCHED` if the launcher decides it.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from pydantic import BaseModel

from lora_accel.config.optimizers import OPTIMIZERS
from lora_accel.config.schedules import SCHEDULES
from lora_accel.config.schema import RunConfig
from lora_accel.errors import join_or

MAX_VALUE_WIDTH = 60
"""Longest value that a hint repeats, in characters."""


class Peer(NamedTuple):
    """The option of this package that an option of another trainer corresponds to."""

    option: str
    """Dotted name in the run config."""
    translate: Callable[[Any], Any] = lambda value: value
    """Returns the value here; `UNKNOWN` if there is none, then the hint has only the name."""


UNKNOWN = object()


def _mapped(values: Mapping[Any, Any]) -> Callable[[Any], Any]:
    def translate(value: Any) -> Any:
        return values.get(value, UNKNOWN) if isinstance(value, (str, int)) else UNKNOWN

    return translate


def _same_in(names: Iterable[str], values: Mapping[str, str]) -> Callable[[Any], Any]:
    return _mapped(dict(values) | {name: name for name in names})


def _as_source(value: Any) -> Any:
    return [{"path": value}] if isinstance(value, str) else UNKNOWN


def _as_list(value: Any) -> Any:
    if isinstance(value, str):
        return [] if value == "none" else [name.strip() for name in value.split(",")]
    return value


def _as_modules(value: Any) -> Any:
    """Translate LLaMA-Factory's `all` and `q_proj,v_proj`."""
    if value in ("all", "all-linear"):
        return "all-linear"
    return _as_list(value) if isinstance(value, str) and "," in value else value


def _as_eval_metric(value: Any) -> Any:
    """Translate transformers' `loss`, which it also accepts as `eval_loss`."""
    return f"eval_{value.removeprefix('eval_')}" if isinstance(value, str) else UNKNOWN


def _as_fraction(value: Any) -> Any:
    """Translate a share; a number of rows has no equivalent."""
    return value if isinstance(value, (int, float)) and 0 <= value < 1 else UNKNOWN


EPOCHS = Peer("training.epochs")
RATE = Peer("training.learning_rate")
MICRO_BATCH = Peer("training.micro_batch_size")
BATCH = Peer("training.batch_size")
RANK, ALPHA, DROPOUT = Peer("adapter.r"), Peer("adapter.alpha"), Peer("adapter.dropout")
MODULES = Peer("adapter.target_modules", _as_modules)
LENGTH = Peer("data.max_length")
MODEL = Peer("model.name_or_path")
TRAIN, EVAL = Peer("data.train", _as_source), Peer("data.eval", _as_source)
EVAL_FRACTION = Peer("data.eval_fraction", _as_fraction)
WORKERS = Peer("data.num_workers")
CLIP = Peer("training.max_grad_norm")
RECOMPUTE = Peer("training.activation_checkpointing")
SCHEDULE = Peer(
    "training.scheduler", _same_in(SCHEDULES, {"cosine_with_min_lr": "cosine_with_min", "warmup_stable_decay": "wsd"})
)
OPTIMIZER = Peer(
    "training.optimizer",
    _same_in(
        OPTIMIZERS,
        dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_hf"), "adamw")
        | {"adamw_bnb_8bit": "adamw_8bit", "paged_adamw_32bit": "paged_adamw", "lion_32bit": "lion"},
    ),
)
FLASH = {True: "flash_attention_2", "fa2": "flash_attention_2", "fa3": "flash_attention_3"}
ATTENTION = Peer(
    "model.attention", lambda value: FLASH.get(value, value) if isinstance(value, (str, bool)) else UNKNOWN
)

PEERS: dict[str, Peer] = {
    # TrainingArguments, TRL
    "num_train_epochs": EPOCHS,
    "lr": RATE,
    "lr_scheduler_type": SCHEDULE,
    "optim": OPTIMIZER,
    "per_device_train_batch_size": MICRO_BATCH,
    "per_gpu_train_batch_size": MICRO_BATCH,
    "gradient_checkpointing": RECOMPUTE,
    "bf16": Peer("training.mixed_precision", _mapped({True: "bf16"})),
    "fp16": Peer("training.mixed_precision", _mapped({True: "fp16"})),
    "save_steps": Peer("checkpoint.every_steps"),
    "save_total_limit": Peer("checkpoint.keep_last"),
    "resume_from_checkpoint": Peer(
        "checkpoint.resume", lambda value: {True: "auto", False: "never"}.get(value, value) if value else "never"
    ),
    "eval_steps": Peer("evaluation.every_steps"),
    "eval_on_start": Peer("evaluation.at_start"),
    "metric_for_best_model": Peer("checkpoint.keep_best", _as_eval_metric),
    "load_best_model_at_end": Peer("checkpoint.export", _mapped({True: "best", False: "last"})),
    "early_stopping_patience": Peer("evaluation.patience"),
    "early_stopping_threshold": Peer("evaluation.min_delta"),
    "neftune_noise_alpha": Peer("training.neftune_alpha"),
    "label_smoothing_factor": Peer("training.label_smoothing"),
    "adam_epsilon": Peer("training.optimizer_options.eps"),
    "wandb_project": Peer("logging.project"),
    "loraplus_lr_ratio": Peer("adapter.loraplus_ratio"),
    "logging_steps": Peer("logging.every_steps"),
    "report_to": Peer("logging.trackers", _as_list),
    "attn_implementation": ATTENTION,
    "torch_dtype": Peer("model.dtype"),
    "max_seq_length": LENGTH,
    "dataset_num_proc": WORKERS,
    "completion_only_loss": Peer("data.loss_on", _mapped({True: "assistant", False: "all"})),
    "assistant_only_loss": Peer("data.loss_on", _mapped({True: "assistant", False: "all"})),
    "chat_template_path": Peer("model.chat_template"),
    "train_file": TRAIN,
    "validation_file": EVAL,
    "model_name_or_path": MODEL,
    "pretrained_model_name_or_path": MODEL,
    # PEFT, bitsandbytes
    "lora_r": RANK,
    "lora_alpha": ALPHA,
    "lora_dropout": DROPOUT,
    "lora_target_modules": MODULES,
    "lora_modules_to_save": Peer("adapter.modules_to_save"),
    "load_in_4bit": Peer("quantization.bits", _mapped({True: 4, False: None})),
    "load_in_8bit": Peer("quantization.bits", _mapped({True: 8, False: None})),
    "bnb_4bit_quant_type": Peer("quantization.type"),
    "bnb_4bit_use_double_quant": Peer("quantization.double_quant"),
    "bnb_4bit_compute_dtype": Peer("quantization.compute_dtype"),
    # Axolotl
    "base_model": MODEL,
    "datasets": TRAIN,
    "test_datasets": EVAL,
    "val_set_size": EVAL_FRACTION,
    "sequence_len": LENGTH,
    "sample_packing": Peer("data.packing"),
    "train_on_inputs": Peer("data.loss_on", _mapped({True: "all", False: "assistant"})),
    "num_epochs": EPOCHS,
    "lora_target_linear": Peer("adapter.target_modules", _mapped({True: "all-linear"})),
    "peft_use_dora": Peer("adapter.use_dora"),
    "peft_use_rslora": Peer("adapter.use_rslora"),
    "flash_attention": ATTENTION,
    "dataset_processes": WORKERS,
    "auto_resume_from_checkpoints": Peer("checkpoint.resume", _mapped({True: "auto", False: "never"})),
    # LLaMA-Factory
    "lora_rank": RANK,
    "lora_target": MODULES,
    "additional_target": Peer("adapter.modules_to_save", _as_list),
    "quantization_bit": Peer("quantization.bits"),
    "double_quantization": Peer("quantization.double_quant"),
    "cutoff_len": LENGTH,
    "flash_attn": ATTENTION,
    "val_size": EVAL_FRACTION,
    "mask_history": Peer("data.loss_on", _mapped({True: "last_assistant", False: "assistant"})),
    "template": Peer("model.chat_template", lambda value: UNKNOWN),
    "eval_dataset": EVAL,
    "preprocessing_num_workers": WORKERS,
    # torchtune
    "max_seq_len": LENGTH,
    "lora_attn_modules": MODULES,
    "enable_activation_checkpointing": RECOMPUTE,
    "clip_grad_norm": CLIP,
    # FastChat
    "q_lora": Peer("quantization.bits", _mapped({True: 4, False: None})),
    "data_path": TRAIN,
    "eval_data_path": EVAL,
    "model_max_length": LENGTH,
    # common
    "model_id": MODEL,
    "model_path": MODEL,
    "dataset": TRAIN,
    "dataset_name": TRAIN,
    "dataset_path": TRAIN,
    "train_data": TRAIN,
    "eval_data": EVAL,
    "test_size": EVAL_FRACTION,
    "output": Peer("output_dir"),
    "total_batch_size": BATCH,
    "global_batch_size": BATCH,
    "train_batch_size": BATCH,
    "lr_scheduler": SCHEDULE,
    "gradient_clipping": CLIP,
    "rank": RANK,
    "num_workers": WORKERS,
}
"""Names of other trainers -> the option here."""

LAUNCHER = "the launcher decides it: lora-accel train --launcher FILE, such as accelerate_configs/zero2.yaml"
NO_FSDP = "FSDP is not supported; DeepSpeed ZeRO-3 shards the base, too: --launcher accelerate_configs/zero3.yaml"
LAUNCHED = ("deepspeed", "deepspeed_config", "zero_stage", "num_processes", "num_gpus", "num_machines", "use_cpu")
"""Names of settings that belong to the launcher."""
FSDP = ("fsdp", "fsdp_config")
TEXTS = {"model": MODEL, "data": TRAIN, "data.train": TRAIN, "data.eval": EVAL}
"""Sections and lists that other trainers set to a text."""


def options(section: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[str]:
    """Yield the dotted name of each option of a section, also of the sections in it."""
    for name, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from options(inner, f"{prefix}{name}.")
        else:
            yield prefix + name


def describe(peer: Peer, value: Any) -> str:
    """Return `training.epochs=3`: an override that does what another trainer's option does, or only the option."""
    translated = UNKNOWN if value is UNKNOWN else peer.translate(value)
    if translated is UNKNOWN:
        return peer.option
    text = translated if isinstance(translated, str) else json.dumps(translated, ensure_ascii=False, default=str)
    return peer.option if len(text) > MAX_VALUE_WIDTH else f"{peer.option}={text}"


def hint(name: str, value: Any) -> str | None:
    """Return which option an unknown key means: another trainer's name, or an option of another section.

    Args:
        name: the key, without its section.
        value: its value.

    Returns:
        Such as `that is training.epochs=3`; None if the name is not known.
    """
    name = name.replace("-", "_").lower()
    if name in LAUNCHED:
        return LAUNCHER
    if name in FSDP:
        return NO_FSDP
    if name in PEERS:
        return f"that is {describe(PEERS[name], value)}"
    known = [*options()]
    found = [name] if name in known else [option for option in known if name == option.rpartition(".")[2]]
    if len(found) == 1:
        return f"that is {describe(Peer(found[0]), value)}"
    return f"that is {join_or(found)}" if found else None


def flag_hint(flag: str, following: str | None) -> str:
    """Return what to do with an argument with dashes that is no option of a command, such as `--lr`.

    Args:
        flag: the argument: `--lr`, or `--lr=1e-4`.
        following: the argument after it, if there is one.
    """
    name, equals, text = flag.partition("=")
    if not equals and following and "=" not in following and not following.startswith("-"):
        text = following
    key = name.lstrip("-").replace("-", "_")
    known = hint(key.rpartition(".")[2], {"true": True, "false": False, "": UNKNOWN}.get(text, text))
    if known is None:
        close = difflib.get_close_matches(key, [*options(), *PEERS], n=1, cutoff=0.75)
        known = f"did you mean {close[0]}?" if close else "see --help"
    return f"{known}. Options of the run config have no dashes: section.key=value"
