"""The run config. Each section validates its own fields; `RunConfig` validates the combinations of sections.

All defaults are defined here. The docstring of a field becomes its description in the JSON Schema
(`lora-accel plan --schema`), which editors show.
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

from lora_accel.config.adapter_options import unsupported_adapter_options
from lora_accel.config.metrics import METRICS, check_metric_name, directions_of
from lora_accel.config.optimizers import OPTIMIZERS
from lora_accel.config.schedules import SCHEDULES, schedule_options
from lora_accel.errors import did_you_mean, join_or

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


def _name_in(table: Mapping[str, object]) -> Any:
    """Return a type that accepts the keys of a table, with the error message and schema of a Literal."""

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
"""Fields of LoraConfig that the oldest supported PEFT lacks -> the release that added them."""


class Section(BaseModel):
    """A section of the config: frozen, with strict types; an unknown key is an error."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )


def _check_path(value: str) -> str:
    if "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError("a path cannot contain NUL characters or surrogates")
    return value


PathText = Annotated[str, AfterValidator(_check_path)]
"""A path, a URL or a Hub id."""
MAX_STEPS = 1_000_000_000
MAX_TOKENS = 1 << 24
"""Limits of counts. Larger values are typing errors: 10^9 steps take years, and no model has 2^24 positions."""
MAX_NEW_TOKENS = 100_000
"""Maximum length of a reply. One of this length takes hours."""


class AddedTokens(Section):
    """Tokens to add to the vocabulary, and how to train them."""

    tokens: list[str] = Field(min_length=1)
    """Their texts. A token that the model already has is trained, too."""
    special: bool = False
    """Whether they are special tokens: only the chat template can write them, and replies omit them. false = their text
    is the token wherever it occurs."""
    train: Literal["rows", "embeddings"] = "rows"
    """What to train: the rows of these tokens, or all rows of the embeddings and the head."""
    like: dict[str, str] = {}
    """{token: text}: the token begins as the mean of the embeddings of this text. Default: of its own text."""

    @model_validator(mode="after")
    def _check_tokens(self) -> Self:
        if any(not token.strip() for token in self.tokens) or len(set(self.tokens)) < len(self.tokens):
            raise ValueError("tokens should be different texts that are not empty")
        for token, text in self.like.items():
            if token not in self.tokens:
                raise ValueError(f"like: {token!r} is not one of tokens{did_you_mean(token, self.tokens)}")
            if not text:
                raise ValueError(f"like: the text for {token!r} is empty")
        return self


class ModelSection(Section):
    """The frozen base model."""

    name_or_path: PathText = Field(min_length=1)
    """Model id on the Hub, or the folder of a Hugging Face model."""
    revision: str | None = None
    """Branch, tag or commit on the Hub. null = the default branch."""
    dtype: Dtype = "auto"
    """dtype of the base weights. auto = the dtype of mixed precision; without mixed precision as stored, or float32 if
    the device only emulates the stored dtype."""
    attention: str = "auto"
    """Attention implementation of transformers: sdpa, eager, flash_attention_2, flash_attention_3, a FlashAttention
    kernel of the Hub, … Others than these train with padded rows. auto = transformers' choice."""
    chat_template: PathText | None = None
    """null = the tokenizer's own | a built-in template (alpaca, chatml, gemma, llama-2, llama-3, vicuna_v1.1, zephyr) |
    a .jinja file."""
    rope_scaling: dict[str, Any] | None = None
    """Scaling of rotary embeddings, in transformers' names: {rope_type: linear, factor: 2.0} | yarn | llama3. linear
    without a factor = data.max_length / max_position_embeddings, rounded up. null = the model's own."""
    chat_template_kwargs: dict[str, Any] = {}
    """Variables of the chat template, such as {enable_thinking: false}. Used in training and inference alike."""
    add_tokens: AddedTokens | None = None
    """Tokens to add to the vocabulary: {tokens: [<tool>], special: false, train: rows | embeddings, like: {<tool>:
    text}}, or only the list. null = none."""
    trust_remote_code: bool = False
    """Whether to run Python code from the model's repository."""

    @field_validator("add_tokens", mode="before")
    @classmethod
    def _accept_list_of_tokens(cls, value: object) -> object:
        return {"tokens": value} if isinstance(value, list) else value

    @field_validator("chat_template_kwargs")
    @classmethod
    def _check_chat_template_kwargs(cls, value: dict[str, Any]) -> dict[str, Any]:
        if reserved := value.keys() & {"messages", "tools", "add_generation_prompt"}:
            raise ValueError(f"{join_or(sorted(reserved))} is set for each row; remove it")
        return value

    @field_validator("rope_scaling")
    @classmethod
    def _check_rope_scaling(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value is None:
            return None
        if {"type", "rope_type"} <= value.keys():
            raise ValueError("has type and rope_type, which are the same; keep rope_type")
        value = {"rope_type" if key == "type" else key: item for key, item in value.items()}  # FastChat's name
        if not isinstance(value.get("rope_type"), str):
            raise ValueError("rope_type is missing; set a mapping such as {rope_type: linear, factor: 2.0}")
        factor = value.get("factor", 1)
        is_number = isinstance(factor, (int, float)) and not isinstance(factor, bool)
        if factor is not None and not (is_number and factor >= 1):  # false for NaN, too
            raise ValueError(f"factor={factor!r}: should be a number of at least 1")
        if factor is not None and factor > MAX_TOKENS:
            raise ValueError(f"factor={factor!r:.20}: should be a number of at most {MAX_TOKENS:,}")
        return value


class QuantizationSection(Section):
    """QLoRA: quantize the frozen base to 4 or 8 bits with bitsandbytes."""

    bits: Literal[4, 8] | None = None
    """Bits per weight. null = as stored: not quantized, unless bitsandbytes stored the base in 4 or 8 bits."""
    type: Literal["nf4", "fp4"] = "nf4"
    """4-bit data type."""
    double_quant: bool = True
    """Whether to quantize the scales too (4 bits only). Saves about 0.4 bits per weight."""
    compute_dtype: Dtype = "auto"
    """dtype to which 4-bit weights are dequantized for each matrix product. auto = the dtype of the base."""


def _describe_peft_fields(schema: dict[str, Any]) -> None:
    for name, field in schema["properties"].items():
        field.setdefault("description", f"PEFT's LoraConfig.{name}; null = PEFT's default.")


class AdapterSection(Section):
    """The LoRA adapter. Fields after `init_from_force` are passed to PEFT's LoraConfig; null = PEFT's default."""

    model_config = ConfigDict(json_schema_extra=_describe_peft_fields)

    r: int = Field(8, ge=1, le=1024)
    """Rank of the update."""
    alpha: float = Field(16.0, gt=0, le=1e6)
    """The update is scaled by alpha / r (PEFT: lora_alpha)."""
    dropout: float = Field(0.05, ge=0, lt=1)
    """Dropout probability on the adapter's input (PEFT: lora_dropout)."""
    target_modules: list[str] | str = ["q_proj", "v_proj"]
    """Modules to adapt: a list of names, a regular expression, or all-linear."""
    loraplus_ratio: float = Field(1.0, ge=1, le=1e6)
    """LoRA+: learning rate of the B matrices, in multiples of that of the A matrices. 1 = plain LoRA."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Biases of the base to train and save: none, all, or those of the adapted modules."""
    init_from: Annotated[PathText, Field(min_length=1)] | None = None
    """An existing LoRA adapter with whose weights a new run begins, at step 0: a folder of this package or of another
    tool, a checkpoint, a loralib file, or a Hub id. Its options (r, alpha, target_modules, …) are taken from it, except
    dropout. null = a new adapter."""
    init_from_force: bool = False
    """Whether to accept an adapter of init_from that was trained on another base, and to ignore those of its options
    that the installed PEFT does not know."""

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
        """Return the fields to pass to `peft.LoraConfig`: those that are set and have no field above."""
        own = {"r", "alpha", "dropout", "target_modules", "loraplus_ratio", "bias", "init_from", "init_from_force"}
        return {
            name: getattr(self, name)
            for name in type(self).model_fields
            if name not in own and getattr(self, name) is not None
        }

    @field_validator(*PEFT_SINCE)
    @classmethod
    def _check_peft_version(cls, value: Any, info: ValidationInfo) -> Any:
        since, installed = PEFT_SINCE[str(info.field_name)], metadata.version("peft")
        if value is not None and _release(installed) < _release(since):
            raise ValueError(f"needs peft >= {since}, but {installed} is installed; upgrade peft, or remove this field")
        return value

    @field_validator("target_modules")
    @classmethod
    def _check_target_modules(cls, value: list[str] | str) -> list[str] | str:
        if not value:
            raise ValueError("is empty; set names such as [q_proj, v_proj], or all-linear")
        if isinstance(value, str):
            try:
                re.compile(value)
            except (re.error, RecursionError, OverflowError) as error:
                reason = str(error) or "it is nested too deep"
                raise ValueError(f"{value[:60]!r} is not a regular expression: {reason}; set a list of names") from None
        return value

    @model_validator(mode="after")
    def _check_supported(self) -> Self:
        if problems := unsupported_adapter_options(self.model_dump()):
            raise ValueError("\n".join(problems))
        return self


def _release(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")[:2]))


class SourceSection(Section):
    """One source of rows."""

    path: PathText = Field(min_length=1)
    """A file, a folder, a glob, a URL (https://, s3://, gs://, hf://, …), or a dataset id on the Hub."""
    format: str | None = None
    """Format of the rows. null = detected from the keys of the first row."""
    split: str = "train"
    """Split of a folder or a Hub dataset. A folder without names of splits is all train."""
    name: str | None = None
    """Configuration of a Hub dataset. null = its only one, or its default."""
    revision: str | None = None
    """Branch, tag or commit of a Hub dataset. null = the default branch."""
    streaming: bool = False
    """Whether to stream a Hub dataset row by row instead of downloading it first."""
    weight: float = Field(1.0, gt=0, le=1000)
    """Times that each row is used per epoch: 2 = twice; 0.25 = each epoch takes the next quarter of the rows."""
    limit: int | None = Field(None, ge=1, le=10**12)
    """Maximum number of rows to read, from the start. null = all."""
    columns: dict[str, str] = {}
    """Renamed columns: {name that the format expects: name in the file}."""


class DataSection(Section):
    """The training and evaluation data."""

    train: list[SourceSection] = Field(min_length=1)
    """Sources of training rows."""
    eval: list[SourceSection] = []
    """Sources of evaluation rows."""
    eval_fraction: float = Field(0.0, ge=0, lt=1)
    """Share of the training examples to hold out for evaluation, selected by the seed."""
    max_length: int = Field(2048, ge=2, le=MAX_TOKENS)
    """Maximum length of an example, in tokens."""
    overlong: Literal["auto", "truncate", "drop", "split", "error"] = "auto"
    """What to do with longer examples. auto = split .txt files, which are documents, and truncate rows."""
    loss_on: Literal["assistant", "last_assistant", "all"] = "assistant"
    """Which tokens are supervised: those of all assistant turns, of the last one, or all tokens. The end token of a
    turn belongs to the turn."""
    parse_special_tokens: bool = False
    """Whether special tokens in the text of rows, such as <|im_end|>, are parsed as special tokens. Needed for text to
    which a template is already applied. Unsafe for text from users, who could end their own turn."""
    packing: bool = True
    """Whether to pack examples into one row without padding; each example attends only to itself. Models that do not
    support packing get padded rows, and the run prints a note."""
    group_by_prefix: bool = False
    """Whether each step uses examples that begin with the same tokens, so that it computes fewer (share_prefixes). This
    changes the order: the examples of a step are less varied."""
    max_dropped: float = Field(0.05, ge=0, le=1)
    """Maximum share of unusable rows. Above it the run stops before it loads the model."""
    cache_dir: PathText | None = None
    """Folder for tokenized data. null = lora_accel in the Hugging Face cache folder (HF_HOME)."""
    num_workers: int | None = Field(None, ge=1, le=1024)
    """Number of tokenization processes. null = one per core. Does not change the result."""

    @model_validator(mode="after")
    def _check_eval(self) -> Self:
        if self.eval and self.eval_fraction:
            raise ValueError("set eval or eval_fraction, not both")
        return self


class SchedulerOptions(Section):
    """Options of the learning-rate schedules; null = the schedule's default. Each is an error for other schedules."""

    min_ratio: float | None = Field(None, ge=0, le=1)
    """Learning rate at the end, as a share of the peak (cosine_with_min: 0.1; polynomial, wsd: 0)."""
    decay_ratio: float | None = Field(None, gt=0, le=1)
    """Share of the steps after warm-up over which the learning rate decays (wsd: 0.1)."""
    power: float | None = Field(None, gt=0, le=100)
    """Power of the decay (polynomial: 1)."""
    num_cycles: int | None = Field(None, ge=1, le=MAX_STEPS)
    """Number of cosine decays (cosine_with_restarts: 1)."""


Beta = Annotated[float, Field(ge=0, lt=1)]
"""Decay rate of a moment."""


class OptimizerOptions(Section):
    """Options of the optimizers; null = the optimizer's default. Each is an error for other optimizers."""

    betas: Annotated[list[Beta], Field(min_length=2, max_length=2)] | None = None
    """Decay rates of the two moments (adamw and its variants: [0.9, 0.999]; lion: [0.9, 0.99])."""
    eps: float | None = Field(None, gt=0, le=1)
    """Added to the denominator of the update (adamw and its variants: 1e-8)."""
    momentum: Beta | None = None
    """Decay rate of the momentum (sgd: 0.9; muon: 0.95)."""


class TrainingSection(Section):
    """The training loop. A step is one optimizer update over all ranks."""

    epochs: float = Field(3.0, gt=0, le=1e6)
    """Number of epochs."""
    max_steps: int | None = Field(None, ge=1, le=MAX_STEPS)
    """Number of steps; overrides epochs. null = use epochs."""
    batch_size: int | None = Field(16, ge=1, le=1_000_000)
    """Examples per step, over all ranks."""
    micro_batch_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | Literal["auto"] = "auto"
    """Maximum tokens per forward on one device, padding included. auto = on a CPU 1,024, or more where examples share
    prefixes; on a GPU as many as fit, by measurement. A resumed run keeps the number of its checkpoint."""
    micro_batch_size: int | None = Field(None, ge=1, le=1_000_000)
    """Per-device batch size: examples per forward on one device. Replaces batch_size and micro_batch_tokens."""
    gradient_accumulation_steps: int | None = Field(None, ge=1, le=1_000_000)
    """Forwards per step on one device; only with micro_batch_size. null = 1."""
    learning_rate: float = Field(2.0e-4, gt=0, le=1000)
    """Peak learning rate."""
    optimizer: _name_in(OPTIMIZERS) = "adamw"  # type: ignore[valid-type]
    """The optimizer. Its state is part of every checkpoint."""
    optimizer_options: OptimizerOptions = OptimizerOptions()
    """Options of the optimizer, such as {betas: [0.9, 0.95]}."""
    embedding_learning_rate: float | None = Field(None, gt=0, le=1000)
    """Peak learning rate of what is trained in the embeddings and the head. null = learning_rate."""
    scheduler: _name_in(SCHEDULES) = "cosine"  # type: ignore[valid-type]
    """Learning-rate schedule after warm-up: decay toward 0 over the run, or constant."""
    scheduler_options: SchedulerOptions = SchedulerOptions()
    """Options of the schedule, such as {min_ratio: 0.1}."""
    warmup_ratio: float = Field(0.03, ge=0, le=1)
    """Share of the steps over which the learning rate rises to its peak."""
    warmup_steps: int | None = Field(None, ge=0, le=MAX_STEPS)
    """Number of warm-up steps; overrides warmup_ratio. null = use warmup_ratio."""
    warmup_from_zero: bool = False
    """Whether the first warm-up step has a learning rate of 0, as in transformers: it changes no weight. Unless this is
    set, a resumed run keeps the value of its checkpoint."""
    weight_decay: float = Field(0.0, ge=0, le=1000)
    """Weight decay of matrices; biases and norms have none."""
    max_grad_norm: float | None = Field(1.0, gt=0)
    """Maximum gradient norm; larger gradients are clipped to it. null = no clipping."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of each target's probability that the training loss spreads evenly over the vocabulary."""
    neftune_alpha: float | None = Field(None, gt=0, le=1000)
    """NEFTune: uniform noise of at most alpha / sqrt(length x hidden size) on the embeddings, in training only. null =
    none."""
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """auto = bf16 or fp16 if accelerate launch sets it; else bf16 if the device computes it natively; else fp16 on GPUs
    with native float16; else no (float32). A resumed run keeps the mixed precision of its checkpoint."""
    share_prefixes: bool | Literal["auto"] = "auto"
    """Whether the examples of a micro-batch share the unsupervised tokens with which they begin: each is computed once.
    Results do not change, apart from rounding. Packed rows only. auto = where the model supports it; on a GPU, only if
    it saves a quarter of the tokens."""
    activation_checkpointing: bool | Literal["auto"] = "auto"
    """Whether to recompute activations in the backward pass: less memory, up to a third more time. true = those of all
    layers. auto = measured: those of as many layers as do not fit into memory; none with aLoRA."""
    compile: bool = False
    """Whether to compile the decoder layers with torch.compile: up to a quarter faster, after about a minute of
    compilation."""
    deterministic: bool = False
    """Whether to use only deterministic kernels on a GPU, so that a resumed run equals an uninterrupted one bit for bit
    there, too. Slower. On CPUs it always does."""
    max_hours: float | None = Field(None, gt=0, le=100_000)
    """Maximum training time, in hours. Then the run saves a checkpoint and exits with 143, as after a signal; run the
    same command to resume. null = no limit."""
    skip_nonfinite: int = Field(0, ge=0, le=MAX_STEPS)
    """Maximum number of steps to skip because their loss or gradient is not finite. One more stops the run."""

    def examples_per_step(self, num_ranks: int) -> int:
        """Return the number of examples per step, over all ranks."""
        if self.micro_batch_size is None:
            assert self.batch_size is not None  # see _check_batch_options
            return self.batch_size
        return self.micro_batch_size * (self.gradient_accumulation_steps or 1) * num_ranks

    @field_validator("mixed_precision", mode="before")
    @classmethod
    def _yaml_no(cls, value: object) -> object:
        if value is None:  # the name of auto in older configs
            return "auto"
        return "no" if value is False else value  # YAML 1.1 reads a bare `no` as false

    @model_validator(mode="before")
    @classmethod
    def _per_device_batch(cls, values: Any) -> Any:
        """Drop the default batch_size if micro_batch_size is set."""
        if isinstance(values, dict) and values.get("micro_batch_size") is not None:
            return {"batch_size": None} | values
        return values

    @model_validator(mode="after")
    def _check_options_are_used(self) -> Self:
        problems = []
        for kind, supported in (
            ("optimizer", OPTIMIZERS[self.optimizer].settable),
            ("scheduler", schedule_options(self.scheduler)),
        ):
            known = f"its options are {', '.join(supported)}" if supported else "it has no options"
            problems += [
                f"{kind}_options: {name} is not an option of {kind}={getattr(self, kind)}; {known}"
                for name in chosen_options(getattr(self, f"{kind}_options"))
                if name not in supported
            ]
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @model_validator(mode="after")
    def _check_batch_options(self) -> Self:
        if self.gradient_accumulation_steps is not None and self.micro_batch_size is None:
            raise ValueError(
                "gradient_accumulation_steps needs micro_batch_size; with batch_size it is derived automatically"
            )
        if self.micro_batch_size is not None and self.batch_size is not None:
            raise ValueError(
                "set either batch_size, or micro_batch_size and gradient_accumulation_steps, not both "
                "(batch_size=null disables the first)"
            )
        if self.micro_batch_size is None and self.batch_size is None:
            raise ValueError("batch_size is null; set it, or micro_batch_size")
        return self


def chosen_options(section: Section) -> dict[str, Any]:
    """Return the options of a section that are not null."""
    return {name: value for name, value in section.model_dump().items() if value is not None}


class CheckpointSection(Section):
    """Checkpoints and resuming."""

    every_steps: int | None = Field(200, ge=1, le=MAX_STEPS)
    """Steps between checkpoints. The last step is always saved."""
    every_epochs: float | None = Field(None, ge=1e-6, le=1e6)
    """Epochs between checkpoints, such as 0.5. Replaces every_steps."""
    keep_last: int = Field(2, ge=1, le=MAX_STEPS)
    """Number of checkpoints to keep after the run. During the run at least 2 are kept, in case one is corrupt."""
    keep_best: str | None = None
    """Metric of the evaluation, such as eval_loss or eval_exact_match (of evaluation.metrics), whose best checkpoint is
    kept beside the newest ones. Every evaluated step is then saved. null = no checkpoint is kept for its metrics."""
    best_is: Literal["auto", "min", "max"] = "auto"
    """Whether the smallest or the largest value of keep_best is the best. auto = as the metric is defined."""
    export: Literal["last", "best"] = "last"
    """Which weights adapter/ gets: those of the last step, or those of the best evaluated checkpoint (keep_best, or
    eval_loss)."""
    resume: PathText = "auto"
    """Where to resume from: auto = the newest valid checkpoint of the run | never | a checkpoint folder."""
    allow_changes: list[str] = []
    """Options that may differ from the checkpoint's although they change the result, such as [training.learning_rate].
    A section allows all of its options."""
    gather: Literal["auto", "state_dict", "parameters"] = "auto"
    """How to gather sharded weights before saving. auto = the backend's default."""

    @property
    def keep_while_training(self) -> int:
        """Return how many checkpoints a run keeps while it trains: the newest may turn out to be corrupt."""
        return max(2, self.keep_last)

    @property
    def keeps_best(self) -> bool:
        """Whether the best evaluated checkpoint is kept."""
        return self.keep_best is not None or self.export == "best"

    @model_validator(mode="before")
    @classmethod
    def _accept_epochs(cls, values: Any) -> Any:
        """Drop the default every_steps if every_epochs is set."""
        if isinstance(values, dict) and values.get("every_epochs") is not None:
            return {"every_steps": None} | values
        return values

    @model_validator(mode="after")
    def _check_interval(self) -> Self:
        if self.every_steps is not None and self.every_epochs is not None:
            raise ValueError("set every_steps or every_epochs, not both")
        if self.every_steps is None and self.every_epochs is None:
            raise ValueError("every_steps is null; set it, or every_epochs")
        return self


class GenerationSection(Section):
    """How replies are generated: greedily unless a temperature or beams are set. The base's generation_config.json
    changes only the end tokens."""

    temperature: float = Field(0.0, ge=0, le=100)
    """Sampling temperature. 0 = greedy."""
    top_p: float | None = Field(None, gt=0, le=1)
    """Sample from the most likely tokens whose probabilities add up to this. null = from all tokens."""
    top_k: int | None = Field(None, ge=1, le=MAX_TOKENS)
    """Sample from this number of most likely tokens. null = from all tokens."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Seed of sampling. A draw depends on the seed, the number of the prompt and the position, not on the batch."""
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    """Divides the logits of tokens in the prompt and the reply: above 1 = fewer repetitions. null = none."""
    no_repeat_ngram_size: int | None = Field(None, ge=1, le=1000)
    """Sequences of this number of tokens occur only once in prompt and reply. null = any number of times."""
    num_beams: int = Field(1, ge=1, le=64)
    """Number of beams of beam search. 1 = no beam search."""
    length_penalty: float | None = Field(None, ge=-100, le=100)
    """Exponent of the length in the score of a beam: above 0 = longer replies. null = 1."""

    @model_validator(mode="after")
    def _check_combination(self) -> Self:
        for name in ("top_p", "top_k"):
            if getattr(self, name) is not None and not self.temperature:
                raise ValueError(f"{name} needs sampling; set temperature above 0 too")
        if self.num_beams > 1 and self.temperature:
            raise ValueError("num_beams and temperature are two ways to choose tokens; set one of them")
        if self.length_penalty is not None and self.num_beams == 1:
            raise ValueError("length_penalty needs beam search; set num_beams above 1 too")
        return self


GREEDY = GenerationSection()


class EvaluationSection(Section):
    """Evaluation during training."""

    every_steps: int | None = Field(None, ge=1, le=MAX_STEPS)
    """Steps between evaluations. null = after the last step only. Needs data.eval, data.eval_fraction, prompts or
    neutral."""
    every_epochs: float | None = Field(None, ge=1e-6, le=1e6)
    """Epochs between evaluations, such as 0.5, in place of every_steps."""
    at_start: bool = True
    """Whether to evaluate before the first step too: the base, or the adapter with which the run begins."""
    patience: int | None = Field(None, ge=1, le=MAX_STEPS)
    """Stop the run if this many evaluations in a row do not improve checkpoint.keep_best (or eval_loss). null = never.
    """
    min_delta: float = Field(0.0, ge=0, le=1e6)
    """Smallest change that counts as an improvement for patience."""
    metrics: list[Annotated[str, AfterValidator(check_metric_name)]] = []
    """Metrics beside loss and perplexity: bits_per_byte, exact_match, token_f1, rouge_l, bleu, json_valid, json_equal,
    tool_call_equal, or a function of yours, module:function (docs/evaluation.md)."""
    num_replies: int = Field(100, ge=1, le=MAX_STEPS)
    """Maximum number of rows of each evaluation source to reply to, for the metrics that need replies. The seed selects
    them."""
    neutral: PathText | None = Field(None, min_length=1)
    """Neutral text on which to compute a loss too, to see what the model forgets: auto = a built-in English text | a
    .txt file. null = none."""
    prompts: list[str] = []
    """User messages to reply to at each evaluation. The replies are written to metrics.jsonl."""
    max_new_tokens: int = Field(64, ge=1, le=MAX_NEW_TOKENS)
    """Maximum length of a reply, in tokens."""
    generation: GenerationSection = GREEDY
    """How replies are generated."""

    @model_validator(mode="after")
    def _check_metrics(self) -> Self:
        if len(set(self.metrics)) < len(self.metrics):
            raise ValueError("metrics has a name twice; remove one of them")
        return self

    @property
    def metric_directions(self) -> dict[str, bool | None]:
        """Return the metrics that an evaluation has; see `config.metrics.directions_of`."""
        return directions_of(self.metrics, has_neutral=self.neutral is not None)

    @property
    def is_periodic(self) -> bool:
        """Whether the run evaluates between its first and its last step."""
        return self.every_steps is not None or self.every_epochs is not None

    @model_validator(mode="after")
    def _check_interval(self) -> Self:
        if self.every_steps is not None and self.every_epochs is not None:
            raise ValueError("set every_steps or every_epochs, not both")
        if self.min_delta and self.patience is None:
            raise ValueError("min_delta needs patience")
        return self


class LoggingSection(Section):
    """Logging of metrics."""

    every_steps: int = Field(1, ge=1, le=MAX_STEPS)
    """Steps between lines in metrics.jsonl and points in the trackers."""
    report: bool = True
    """Whether to write report.html and loss.png into the run folder at the end of the run."""
    trackers: list[str] = ["tensorboard"]
    """Names of Accelerate's trackers: tensorboard, wandb, trackio, mlflow, … or all that are installed."""
    project: str | None = Field(None, min_length=1)
    """Project of the run in the trackers. null = lora_accel."""
    run_name: str | None = Field(None, min_length=1)
    """Name of the run in the trackers. null = the name of output_dir."""


class RunConfig(Section):
    """The config of a run."""

    output_dir: PathText = Field(min_length=1)
    """Run folder: checkpoints, logs and the final adapter."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Seed of the example order, dropout and adapter initialization."""
    model: ModelSection
    quantization: QuantizationSection = QuantizationSection()
    adapter: AdapterSection = AdapterSection()
    data: DataSection
    training: TrainingSection = TrainingSection()
    checkpoint: CheckpointSection = CheckpointSection()
    evaluation: EvaluationSection = EvaluationSection()
    logging: LoggingSection = LoggingSection()

    @model_validator(mode="after")
    def _check_sections(self) -> Self:
        problems = []
        has_eval = bool(self.data.eval) or self.data.eval_fraction > 0
        interval = "every_epochs" if self.evaluation.every_epochs else "every_steps"
        if self.evaluation.is_periodic and not (has_eval or self.evaluation.prompts or self.evaluation.neutral):
            problems.append(
                f"evaluation.{interval}: there is nothing to evaluate; set data.eval, data.eval_fraction, "
                "evaluation.prompts or evaluation.neutral"
            )
        if self.evaluation.metrics and not has_eval:
            problems.append(
                "evaluation.metrics: there are no evaluation rows; set data.eval or data.eval_fraction, or remove "
                "evaluation.metrics"
            )
        problems += self._selection_problems(has_eval)
        if self.quantization.bits and self.model.dtype == "float16":
            problems.append(
                "model.dtype=float16 with quantization.bits loses precision in the norms; use bfloat16, float32 or auto"
            )
        if self.quantization.bits and self.adapter.modules_to_save:
            problems.append(
                "adapter.modules_to_save with quantization.bits would train quantized weights; "
                "train them on a base that is not quantized"
            )
        if self.quantization.bits and self.adapter.kasa_config:
            problems.append(
                "adapter.kasa_config with quantization.bits is not supported: it changes the base's weights"
            )
        if self.adapter.alora_invocation_tokens and self.data.packing:
            problems.append(
                "adapter.alora_invocation_tokens: aLoRA looks for these tokens once per row, and a packed row has "
                "several examples; set data.packing=false"
            )
        evaluates = has_eval or bool(self.evaluation.prompts or self.evaluation.neutral)
        if self.adapter.alora_invocation_tokens and self.training.activation_checkpointing is True and evaluates:
            problems.append(
                "adapter.alora_invocation_tokens with training.activation_checkpointing=true does not support "
                "evaluation: PEFT expects a backward pass after each forward; set it to auto"
            )
        if self.model.add_tokens is not None and self.adapter.trainable_token_indices is not None:
            problems.append("model.add_tokens and adapter.trainable_token_indices: set one of them")
        if self.model.add_tokens is not None and self.model.add_tokens.train == "embeddings" and self.quantization.bits:
            problems.append("model.add_tokens.train=embeddings with quantization.bits is not supported; set train=rows")
        problems += self._allow_changes_problems()
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _allow_changes_problems(self) -> list[str]:
        """Return what is wrong with `checkpoint.allow_changes`."""
        problems = []
        for option in self.checkpoint.allow_changes:
            section: Any = RunConfig
            for name in option.split("."):
                fields = getattr(section, "model_fields", {})
                if name not in fields:
                    hint = did_you_mean(name, fields)
                    problems.append(f"checkpoint.allow_changes: {option!r} is not an option{hint}")
                    break
                section = fields[name].annotation
        return problems

    def _selection_problems(self, has_eval: bool) -> list[str]:
        """Return what is wrong with the options that select a checkpoint by its evaluation."""
        checkpoint, evaluation = self.checkpoint, self.evaluation
        options = {
            "checkpoint.keep_best": checkpoint.keep_best is not None,
            "checkpoint.export=best": checkpoint.export == "best",
            "evaluation.patience": evaluation.patience is not None,
        }
        name = next((name for name, is_set in options.items() if is_set), None)
        problems = []
        if name is None:
            if checkpoint.best_is != "auto":
                problems.append(
                    "checkpoint.best_is needs checkpoint.keep_best, checkpoint.export or evaluation.patience"
                )
        elif not has_eval:
            problems.append(f"{name}: there are no evaluation rows; set data.eval or data.eval_fraction")
        elif not evaluation.is_periodic:
            problems.append(
                f"{name}: the run is evaluated after its last step only; set evaluation.every_steps or "
                "evaluation.every_epochs"
            )
        return problems + self._keep_best_problems(checkpoint.keep_best or "eval_loss")

    def _keep_best_problems(self, metric: str) -> list[str]:
        """Return what is wrong with `checkpoint.keep_best`."""
        evaluation, directions = self.evaluation, self.evaluation.metric_directions
        has_function = None in directions.values()  # which may return further names
        if metric not in directions and not (has_function and metric.startswith("eval_")):
            hint = did_you_mean(metric, directions)
            if (name := metric.removeprefix("eval_")) in METRICS and name not in evaluation.metrics:
                hint = f"; add {name} to evaluation.metrics"
            return [f"checkpoint.keep_best: the evaluation has no metric {metric!r}{hint}"]
        if directions.get(metric) is None and self.checkpoint.best_is == "auto":
            return [
                f"checkpoint.keep_best={metric} is computed by your own function; set checkpoint.best_is to min or max"
            ]
        return []
