"""`lora-accel init`: reads a model and rows, and drafts a commented run config that fits them. Loads no weights."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lora_accel.config.files import yaml_scalar
from lora_accel.config.schema import MAX_TOKENS, DataSection, ModelSection, RunConfig, SourceSection
from lora_accel.console import Stage
from lora_accel.data.dataset import load_dataset, rename_columns
from lora_accel.data.formats import detect_format
from lora_accel.data.records import MalformedRow
from lora_accel.data.rows import find_input
from lora_accel.errors import ArtifactError, DataError
from lora_accel.model.sizes import model_sizes, read_config_file
from lora_accel.model.tokenizer import check_model_folder, is_hub_id
from lora_accel.setup.recipe import make_recipe

SCHEMA_FILE = "lora_accel.schema.json"
"""The JSON Schema that is written beside a draft, for editors."""
SAMPLE = 1000
"""Rows that are tokenized to see how long they are."""
LONGEST = 8192
"""Largest `data.max_length` of a draft: longer rows need memory that a first run should not."""
CHARACTERS_PER_TOKEN = 3
"""Fewer than in English text (about 4), so that lengths that are estimated without a tokenizer are not too small."""
TEMPLATE_TOKENS = 64
"""Added to lengths that are estimated: a chat template adds a system message and marks of turns (SmolLM2's: 32 tokens),
and a `data.max_length` that is too small truncates the answers."""
LARGE_HIDDEN_SIZE = 2048
"""Hidden size of models of about a billion parameters, from which on a smaller learning rate is usual."""
EXAMPLE_COLUMNS = "{instruction: NAME, output: NAME}"
CHAT_FORMATS = ("messages", "sharegpt", "alpaca")


class DraftRequest(NamedTuple):
    """The options of `lora-accel init`."""

    model: str
    data: str
    columns: dict[str, str] = {}  # noqa: RUF012 (never changed)
    """Renamed columns of `data` and `evaluation`: {name that the format expects: name in the file}."""
    evaluation: str | None = None
    """Rows to evaluate on; None = hold out some of `data`."""
    four_bits: bool = False
    output_dir: str = "runs/my_rows"


class Rows(NamedTuple):
    """Summary of the rows of a source."""

    format: str
    num_rows: int
    lengths: npt.NDArray[np.int64]
    """Tokens of each example of the first `SAMPLE` rows."""
    is_estimate: bool
    """Whether lengths were estimated from characters, because the tokenizer cannot be loaded."""
    num_dropped: int = 0
    """Rows of the sample that cannot be used."""


class InputSummary(NamedTuple):
    """Summary of a model and of rows."""

    rows: Rows
    max_positions: int | None
    """Positions of the model; None = unknown."""
    is_large: bool
    """Whether the model has about a billion parameters or more, or is not on this machine."""
    chat_template: str | None
    """The template to set; None = the tokenizer's own."""


class Values(NamedTuple):
    """The options of a draft that depend on the model and the rows."""

    max_length: int
    eval_fraction: float
    epochs: int
    batch_size: int
    learning_rate: float
    every_steps: int


def draft(request: DraftRequest) -> tuple[str, list[tuple[str, str]]]:
    """Return a run config as commented YAML, and a table that describes the rows and the model.

    Raises:
        UserError: the model is not a model, a file of rows does not exist, or no row can be used.
    """
    with Stage("reading the model and the rows"):
        inputs = summarize_inputs(request)
    values = choose(request, inputs)
    text = write(request, inputs, values)
    return text, describe(request, inputs)


def summarize_inputs(request: DraftRequest) -> InputSummary:
    """Read the model's config and tokenizer, if they can be loaded, and the rows.

    Raises:
        UserError: see `draft`.
    """
    model = ModelSection(name_or_path=request.model)
    check_model_folder(model)
    if request.evaluation is not None:
        check_first_row(request.evaluation, request.columns)
    check_first_row(request.data, request.columns)
    source = SourceSection(path=request.data, limit=SAMPLE, columns=request.columns)
    num_rows = sum(len(chunk.numbers) for chunk in find_input(source).chunks(None))
    try:
        rows, chat_template = _tokenize(model, source, num_rows), None
    except ArtifactError:  # on the Hub, which may be out of reach
        if not is_hub_id(request.model):
            raise
        rows, chat_template = _count_characters(source, num_rows), None
    except DataError:
        chat_template = _template_for(model, source)
        if chat_template is None:
            raise
        rows = _tokenize(model.model_copy(update={"chat_template": chat_template}), source, num_rows)
    config = read_config_file(model)
    hidden_size = (config or {}).get("hidden_size", LARGE_HIDDEN_SIZE)
    is_large = not isinstance(hidden_size, int) or hidden_size >= LARGE_HIDDEN_SIZE
    return InputSummary(rows, model_sizes(model).max_positions if config else None, is_large, chat_template)


def check_first_row(path: str, columns: dict[str, str]) -> None:
    """Check that rows exist and that the keys of the first one, after renaming, are those of a format.

    Raises:
        DataError: there is no such file, it has no rows, or no format has these keys.
    """
    first = next(find_input(SourceSection(path=path)).chunks(1), None)
    rows = [] if first is None else list(first.parsed())
    if first is None or not rows:
        raise DataError(f"{path}: has no rows; use a file with rows")
    number, row = rows[0]
    try:
        detect_format(rename_columns(row, columns))
    except MalformedRow as error:
        needs_columns = "columns: {" in str(error)
        how = f". Pass them to lora-accel init as --columns '{EXAMPLE_COLUMNS}'" if needs_columns else ""
        raise DataError(f"{first.file}, row {number}: {error}{how}") from None


def _tokenize(model: ModelSection, source: SourceSection, num_rows: int) -> Rows:
    options = DataSection(train=[source], max_length=MAX_TOKENS)
    recipe = make_recipe(RunConfig(output_dir="none", model=model, data=options))
    dataset = load_dataset([source], recipe, options)
    (examples,), (ledger,) = [source.examples for source in dataset.sources], dataset.ledgers
    ledger.check(max_dropped=1)
    num_dropped = sum(map(len, ledger.dropped.values()))
    return Rows(str(ledger.format), num_rows, np.asarray(examples.lengths), is_estimate=False, num_dropped=num_dropped)


def _count_characters(source: SourceSection, num_rows: int) -> Rows:
    rows = [row for chunk in find_input(source).chunks(source.limit) for _, row in chunk.parsed()]
    data_format = detect_format(rename_columns(rows[0], source.columns))
    lengths = [math.ceil(len(str(row)) / CHARACTERS_PER_TOKEN) + TEMPLATE_TOKENS for row in rows]
    return Rows(data_format, num_rows, np.asarray(lengths), is_estimate=True)


def _template_for(model: ModelSection, source: SourceSection) -> str | None:
    """Return a built-in template if the tokenizer has none and the rows are conversations."""
    from lora_accel.model.tokenizer import load_tokenizer

    row = next(row for chunk in find_input(source).chunks(1) for _, row in chunk.parsed())
    is_chat = detect_format(rename_columns(row, source.columns)) in CHAT_FORMATS
    return "chatml" if is_chat and not load_tokenizer(model).chat_template else None


def choose(request: DraftRequest, inputs: InputSummary) -> Values:
    """Return values that fit the number of rows, their lengths, and the size of the model."""
    num_rows, longest = inputs.rows.num_rows, int(inputs.rows.lengths.max())
    usual = int(np.quantile(inputs.rows.lengths, 0.99))
    max_length = _round_up(longest if longest <= 2 * usual else usual)  # a few long rows do not decide
    max_length = min(max_length, LONGEST, inputs.max_positions or LONGEST)
    batch_size = 4 if num_rows < 200 else 8 if num_rows < 2000 else 16
    epochs = 5 if num_rows < 200 else 3 if num_rows < 20_000 else 1
    eval_fraction = 0.0 if request.evaluation or num_rows < 20 else 0.1 if num_rows < 5000 else 0.02
    steps = max(1, round(num_rows * (1 - eval_fraction) / batch_size)) * epochs
    every_steps = min(200, max(10, steps // 10))
    return Values(max_length, eval_fraction, epochs, batch_size, 2e-4 if inputs.is_large else 5e-4, every_steps)


def _round_up(length: int) -> int:
    """Return the next multiple of 64 tokens, or of 256 from 1,024 on: room for rows that were not read."""
    step = 64 if length < 1024 else 256
    return math.ceil((length + 1) / step) * step


def describe(request: DraftRequest, inputs: InputSummary) -> list[tuple[str, str]]:
    """Return a description of the rows and the model as (name, text) pairs."""
    rows, lengths = inputs.rows, inputs.rows.lengths
    about = "about " if rows.is_estimate else ""
    sample = f" of the first {SAMPLE:,} rows" if rows.num_rows > SAMPLE else ""
    tokens = f"{about}{int(np.median(lengths)):,} tokens (median), {about}{int(lengths.max()):,} at most{sample}"
    table = [("rows", f"{rows.num_rows:,}, format {rows.format}"), ("length", tokens)]
    if rows.is_estimate:
        table.append(("tokenizer", f"{request.model} cannot be loaded now: lengths are estimated from characters"))
    if rows.num_dropped:
        table.append(("not usable", f"{rows.num_dropped:,}{sample}; lora-accel inspect lists the reasons"))
    if inputs.max_positions is not None:
        table.append(("positions", f"{inputs.max_positions:,} in the model"))
    if inputs.chat_template:
        table.append(("chat template", f"the tokenizer has none: {inputs.chat_template}"))
    return table


def write(request: DraftRequest, inputs: InputSummary, values: Values) -> str:
    """Return the run config as commented YAML."""
    rows, scalar = inputs.rows, yaml_scalar
    longest = f"the longest row has {'about ' if rows.is_estimate else ''}{int(rows.lengths.max()):,}"
    pairs = ", ".join(f"{scalar(name)}: {scalar(column)}" for name, column in request.columns.items())
    columns = f", columns: {{{pairs}}}" if pairs else ""
    evaluation = f"eval: [{{path: {scalar(request.evaluation)}{columns}}}]"
    if request.evaluation is None:
        evaluation = f"eval_fraction: {values.eval_fraction}    # share of the rows held out for evaluation"
    template = "# chat_template: chatml  # for a base model whose tokenizer has no chat template"
    if inputs.chat_template:
        template = f"chat_template: {inputs.chat_template}  # the tokenizer has none"
    bits = "quantization: {bits: 4}   # QLoRA: less memory, slower steps"
    has_eval = request.evaluation is not None or values.eval_fraction > 0
    size = "over" if inputs.is_large else "under"
    every = f"every_steps: {values.every_steps}"
    saving = f"checkpoint: {{{every}}}"
    if has_eval:
        saving = f"checkpoint: {{{every}, export: best}}   # adapter/ has the step with the lowest evaluation loss"
        saving += f"\nevaluation: {{{every}}}"
    return f"""\
# yaml-language-server: $schema={SCHEMA_FILE}
# Drafted by `lora-accel init` for {rows.num_rows:,} rows of format {rows.format}.
# Paths are relative to the directory in which the commands run.
#
#   lora-accel inspect --config FILE     shows the rows as the model sees them
#   lora-accel train --config FILE       trains; run it again to resume

data:
  train: [{{path: {scalar(request.data)}{columns}}}]
  {evaluation}
  max_length: {values.max_length}   # in tokens; {longest}; longer ones are truncated

model:
  name_or_path: {scalar(request.model)}
  {template}

{bits if request.four_bits else f"# {bits}"}

adapter:
  r: 16                       # rank; more for a task that is far from what the model knows
  alpha: 32                   # the update is scaled by alpha / r
  dropout: 0.05
  target_modules: all-linear  # every linear layer but the head; [q_proj, v_proj] trains fewer parameters

training:
  epochs: {values.epochs}
  batch_size: {values.batch_size}               # examples per optimizer step, over all devices
  micro_batch_tokens: auto    # per forward pass: as many as fit; a number limits memory
  learning_rate: {values.learning_rate}       # for models {size} a billion parameters
  activation_checkpointing: auto

{saving}
output_dir: {scalar(request.output_dir)}
"""


def schema_path(config: Path) -> Path:
    """Return the path of the schema of a drafted config."""
    return config.parent / SCHEMA_FILE
