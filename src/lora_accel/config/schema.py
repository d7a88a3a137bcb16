"""The run config. Each section checks itself; what two sections must agree on stands in `RunConfig`.

Defaults live here and nowhere else. The docstring under a field becomes its description in the JSON
Schema (`lora-accel plan --schema`), which is what an editor shows.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib import metadata
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticKnownError
from typing_extensions import Self

from lora_accel.config.optimizers import OPTIMIZERS
from lora_accel.config.schedules import SCHEDULES
from lora_accel.errors import did_you_mean, join_or

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


def _name_in(table: Mapping[str, object]) -> Any:
    """Return the type of a name in a table, checked as a Literal of its names would be."""

    def check(name: str) -> str:
        if name not in table:
            raise PydanticKnownError("literal_error", {"expected": join_or(map(repr, table))})
        return name

    return Annotated[str, AfterValidator(check), Field(json_schema_extra={"enum": [*table]})]


PEFT_SINCE = {
    "kasa_config": "0.21",
    "lora_ga_config": "0.19",
    "monteclora_config": "0.20",
    "use_bdlora": "0.19",
    "velora_config": "0.20",
}
"""Fields of LoraConfig that the oldest supported PEFT lacks, with the release that added them."""


class Section(BaseModel):
    """A part of the config: closed (an unknown key is an error), strict in types, unchangeable."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )


class ModelSection(Section):
    """The frozen base model."""

    name_or_path: str = Field(min_length=1)
    """Hub id, or a folder with an ordinary Hugging Face model."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    dtype: Dtype = "auto"
    """dtype of the base. auto = bfloat16 or float16 under that mixed precision, else as stored; float32 where the
    device only emulates that."""
    attention: str = "auto"
    """An attention implementation of transformers (sdpa, eager, flash_attention_2, …); auto lets it choose."""
    chat_template: str | None = None
    """null = the tokenizer's own | a built-in one (alpaca, chatml, gemma, llama-2, llama-3, vicuna_v1.1, zephyr) |
    a .jinja file."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""


class QuantizationSection(Section):
    """QLoRA: the frozen base in 4 or 8 bits through bitsandbytes."""

    bits: Literal[4, 8] | None = None
    """null = not quantised."""
    type: Literal["nf4", "fp4"] = "nf4"
    """The 4-bit code."""
    double_quant: bool = True
    """Quantise the scales too (4 bits only): about 0.4 bit less per weight."""
    compute_dtype: Dtype = "auto"
    """What 4-bit weights are unpacked to for each product. auto = as model.dtype."""


def _describe_peft_fields(schema: dict[str, Any]) -> None:
    for name, field in schema["properties"].items():
        field.setdefault("description", f"PEFT's LoraConfig.{name}; null = PEFT's default.")


class AdapterSection(Section):
    """The LoRA adapter. Fields below `bias` go to PEFT's LoraConfig under PEFT's own name; null = PEFT's default."""

    model_config = ConfigDict(json_schema_extra=_describe_peft_fields)

    r: int = Field(8, ge=1, le=1024)
    """Rank."""
    alpha: float = Field(16.0, gt=0)
    """The update is scaled by alpha / r (PEFT: lora_alpha)."""
    dropout: float = Field(0.05, ge=0, lt=1)
    """On the input of A (PEFT: lora_dropout)."""
    target_modules: list[str] | str = ["q_proj", "v_proj"]
    """Names of linear modules, a regular expression, or all-linear."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases of the base are trained and saved."""

    alora_invocation_tokens: list[int] | None = None
    alpha_pattern: dict[str, float] | None = None
    arrow_config: dict[str, Any] | None = None
    corda_config: dict[str, Any] | None = None
    ensure_weight_tying: bool | None = None
    eva_config: dict[str, Any] | None = None
    exclude_modules: list[str] | str | None = None
    fan_in_fan_out: bool | None = None
    init_lora_weights: bool | str | None = None
    kasa_config: dict[str, Any] | None = None
    layer_replication: list[list[int]] | None = None
    layers_pattern: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    loftq_config: dict[str, Any] | None = None
    lora_bias: bool | None = None
    lora_ga_config: dict[str, Any] | None = None
    megatron_config: dict[str, Any] | None = None
    megatron_core: str | None = None
    modules_to_save: list[str] | None = None
    monteclora_config: dict[str, Any] | None = None
    qalora_group_size: int | None = None
    rank_pattern: dict[str, int] | None = None
    runtime_config: dict[str, Any] | None = None
    target_parameters: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    use_bdlora: dict[str, Any] | None = None
    use_dora: bool | None = None
    use_qalora: bool | None = None
    use_rslora: bool | None = None
    velora_config: dict[str, Any] | None = None

    def peft_fields(self) -> dict[str, Any]:
        """Return the fields that pass through to `peft.LoraConfig`, those that were given."""
        ours = {"r", "alpha", "dropout", "target_modules", "bias"}
        return {
            name: getattr(self, name)
            for name in type(self).model_fields
            if name not in ours and getattr(self, name) is not None
        }

    @field_validator(*PEFT_SINCE)
    @classmethod
    def _installed_peft_has_it(cls, value: Any, info: ValidationInfo) -> Any:
        since, installed = PEFT_SINCE[str(info.field_name)], metadata.version("peft")
        if value is not None and _release(installed) < _release(since):
            raise ValueError(f"needs peft >= {since}, but {installed} is installed; upgrade peft, or remove this field")
        return value

    @field_validator("target_modules")
    @classmethod
    def _names_something(cls, value: list[str] | str) -> list[str] | str:
        if not value:
            raise ValueError("names no module; give names such as [q_proj, v_proj], or all-linear")
        if isinstance(value, str):
            try:
                re.compile(value)
            except re.error as error:
                raise ValueError(f"{value!r} is no regular expression: {error}; give a list of names") from None
        return value


def _release(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")[:2]))


class SourceSection(Section):
    """One source of rows."""

    path: str = Field(min_length=1)
    """A file, a folder, a glob, or a data set id on the Hub."""
    format: str | None = None
    """null = found by the keys of the first row."""
    split: str = "train"
    """Which split of a Hub data set."""
    revision: str | None = None
    """Which branch, tag or commit of a Hub data set."""
    streaming: bool = False
    """Read a Hub data set row by row instead of fetching it whole first."""
    weight: float = Field(1.0, gt=0)
    """How many times its rows are seen in an epoch: 2 = twice, 0.25 = another quarter of them each epoch."""
    limit: int | None = Field(None, ge=1)
    """Only the first so many rows."""
    columns: dict[str, str] = {}
    """Other names: {the name a format expects: the name in the file}."""


class DataSection(Section):
    """What is learned from."""

    train: list[SourceSection] = Field(min_length=1)
    """Sources of training rows."""
    eval: list[SourceSection] = []
    """Sources of evaluation rows."""
    eval_fraction: float = Field(0.0, ge=0, lt=1)
    """Hold out this share of the training examples, chosen by the seed."""
    max_length: int = Field(2048, ge=2)
    """Longest example, in tokens."""
    overlong: Literal["truncate", "drop", "split", "error"] = "truncate"
    """What happens to a longer one."""
    loss_on: Literal["assistant", "last_assistant", "all"] = "assistant"
    """Which words are supervised; a turn's end token belongs to the turn."""
    parse_special_tokens: bool = False
    """Whether the text of a special token, such as <|im_end|>, counts as that token in rows, too. Text that a template
    has rendered before needs it; in what users wrote it would let them end their own turn."""
    packing: bool = True
    """No padding: examples lie end to end in one row and cannot see each other. A model that cannot do so is given
    padded rows, and the run says so."""
    max_dropped: float = Field(0.05, ge=0, le=1)
    """More unusable rows than this share stop the run before the model loads."""
    cache_dir: str | None = None
    """Where tokenised data are kept; null = lora_accel in the Hugging Face cache folder (HF_HOME)."""
    num_workers: int | None = Field(None, ge=1)
    """Processes that tokenise; null = one for each core. Their number changes nothing but the time."""

    @model_validator(mode="after")
    def _one_way_to_evaluate(self) -> Self:
        if self.eval and self.eval_fraction:
            raise ValueError("give eval or eval_fraction, not both")
        return self


class TrainingSection(Section):
    """How it is learned. A step is one optimizer update over all ranks."""

    epochs: float = Field(3.0, gt=0)
    """Passes over the training examples."""
    max_steps: int | None = Field(None, ge=1)
    """Exactly so many steps instead; wins over epochs."""
    batch_size: int | None = Field(16, ge=1)
    """Examples per step, over all ranks."""
    micro_batch_tokens: int = Field(4096, ge=1)
    """What one forward holds on one device, in tokens, padding counted."""
    micro_batch_size: int | None = Field(None, ge=1)
    """The other habit: examples per forward on one device; batch_size is then derived."""
    gradient_accumulation_steps: int | None = Field(None, ge=1)
    """The other habit: forwards per step on one device."""
    learning_rate: float = Field(2.0e-4, gt=0)
    """Peak learning rate."""
    optimizer: _name_in(OPTIMIZERS) = "adamw"  # type: ignore[valid-type]
    """The optimizer; its state is part of every checkpoint."""
    scheduler: _name_in(SCHEDULES) = "cosine"  # type: ignore[valid-type]
    """After warm-up: down to 0 over the run, or constant."""
    warmup_ratio: float = Field(0.03, ge=0, le=1)
    """Share of the steps over which the learning rate rises from 0."""
    warmup_steps: int | None = Field(None, ge=0)
    """Exactly so many steps instead; wins over warmup_ratio."""
    weight_decay: float = Field(0.0, ge=0)
    """On matrices, not on biases or norms."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are scaled down to this norm."""
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """auto = bf16 or fp16 if accelerate launch asks for it, else what the device computes natively: bf16, fp16 on GPUs
    without it, float32 (no) on other CPUs. A resumed run keeps its checkpoint's."""
    activation_checkpointing: bool | Literal["auto"] = False
    """Recompute activations in the backward pass: less memory, a third more time. auto = where they would not fit."""
    compile: bool = False
    """Layers through torch.compile: a few percent to a quarter faster, after a minute or so at the start."""
    max_hours: float | None = Field(None, gt=0)
    """Stop after so many hours of training as at a signal: save, exit 143; the same command goes on."""
    skip_nonfinite: int = Field(0, ge=0)
    """So many steps of the run whose loss or gradient is not finite are left out and counted; one more ends it."""

    def examples_per_step(self, num_ranks: int) -> int:
        """Return how many examples a step takes, over all ranks."""
        if self.micro_batch_size is None:
            assert self.batch_size is not None  # one of the two habits is held below
            return self.batch_size
        return self.micro_batch_size * (self.gradient_accumulation_steps or 1) * num_ranks

    @field_validator("mixed_precision", mode="before")
    @classmethod
    def _yaml_no(cls, value: object) -> object:
        if value is None:  # what auto was called before
            return "auto"
        return "no" if value is False else value  # YAML 1.1 reads a bare `no` as false

    @model_validator(mode="before")
    @classmethod
    def _other_habit(cls, values: Any) -> Any:
        """Per-device sizes replace the default batch_size, though not one that was given."""
        if isinstance(values, dict) and values.get("micro_batch_size") is not None:
            return {"batch_size": None} | values
        return values

    @model_validator(mode="after")
    def _one_habit(self) -> Self:
        if self.gradient_accumulation_steps is not None and self.micro_batch_size is None:
            raise ValueError(
                "gradient_accumulation_steps goes with micro_batch_size; "
                "with batch_size alone the accumulation is derived"
            )
        if self.micro_batch_size is not None and self.batch_size is not None:
            raise ValueError(
                "batch_size and micro_batch_size + gradient_accumulation_steps are two ways to say "
                "one thing; keep one (batch_size=null switches the first off)"
            )
        if self.micro_batch_size is None and self.batch_size is None:
            raise ValueError("batch_size is null; give it, or micro_batch_size")
        return self


class CheckpointSection(Section):
    """What outlives a crash."""

    every_steps: int = Field(200, ge=1)
    """Save after every so many steps; the last step is always saved."""
    keep_last: int = Field(2, ge=1)
    """How many checkpoints stay after the run; while it goes on, at least 2: one may be the last that is sound."""
    resume: str = "auto"
    """auto = go on from the newest valid one | never | a checkpoint folder."""
    allow_changes: list[str] = []
    """Options that may differ from those of the checkpoint though they change what is learned, such as
    [training.learning_rate]; a section allows all in it."""
    gather: Literal["auto", "state_dict", "parameters"] = "auto"
    """How sharded weights are collected before they are written."""


class EvaluationSection(Section):
    """How it is watched."""

    every_steps: int | None = Field(None, ge=1)
    """Evaluate after every so many steps; null = at the end only. Needs data.eval or data.eval_fraction."""
    prompts: list[str] = []
    """User messages whose replies are written to metrics.jsonl at each evaluation."""
    max_new_tokens: int = Field(64, ge=1)
    """Longest such reply."""


class LoggingSection(Section):
    """What is told on the way."""

    every_steps: int = Field(1, ge=1)
    """One line in metrics.jsonl, and one point for the trackers, every so many steps."""
    trackers: list[str] = ["tensorboard"]
    """Accelerate's names: tensorboard, wandb, mlflow, …"""


class RunConfig(Section):
    """All that a run is asked to do."""

    output_dir: str = Field(min_length=1)
    """The run folder."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Order of examples, dropout and adapter initialisation are functions of it."""
    model: ModelSection
    quantization: QuantizationSection = QuantizationSection()
    adapter: AdapterSection = AdapterSection()
    data: DataSection
    training: TrainingSection = TrainingSection()
    checkpoint: CheckpointSection = CheckpointSection()
    evaluation: EvaluationSection = EvaluationSection()
    logging: LoggingSection = LoggingSection()

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        problems = []
        has_eval = bool(self.data.eval) or self.data.eval_fraction > 0
        if self.evaluation.every_steps and not (has_eval or self.evaluation.prompts):
            problems.append(
                "evaluation.every_steps has nothing to evaluate; add data.eval, data.eval_fraction "
                "or evaluation.prompts"
            )
        if self.quantization.bits and self.model.dtype == "float16":
            problems.append(
                "quantization.bits with model.dtype=float16 loses precision in the norms; use bfloat16, float32 or auto"
            )
        if self.quantization.bits and self.adapter.modules_to_save:
            problems.append(
                "adapter.modules_to_save under quantization.bits would train packed weights; "
                "train them on an unquantised base"
            )
        for option in self.checkpoint.allow_changes:
            section: Any = RunConfig
            for name in option.split("."):
                fields = getattr(section, "model_fields", {})
                if name not in fields:
                    problems.append(f"checkpoint.allow_changes: {option!r} is no option{did_you_mean(name, fields)}")
                    break
                section = fields[name].annotation
        if problems:
            raise ValueError("\n".join(problems))
        return self
