"""The `lora-accel` command line. Each command parses its options, imports what it needs and calls it; no logic here."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from lora_accel import __version__
from lora_accel.config.schema import MAX_NEW_TOKENS, Dtype
from lora_accel.console import print_table, run_command, show_logs, silence_libraries
from lora_accel.errors import ConfigError, LoraAccelError
from lora_accel.inference.options import parse_sampling, with_sampling
from lora_accel.processes import keep_freed_memory

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Config = Annotated[Optional[Path], typer.Option("--config", metavar="FILE", help="Run config (YAML).")]  # noqa: UP045
Overrides = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Argument(metavar="[section.key=value …]", help="Options that override the config file."),
]
DtypeOption = Annotated[
    Dtype,
    typer.Option(
        "--dtype", help="Compute dtype. auto = as stored, or float32 where the device only emulates that dtype."
    ),
]
RawOption = Annotated[
    Optional[bool],  # noqa: UP045
    typer.Option("--raw/--template", help="Pass prompts without, or with, the chat template. Default: as in training."),
]
ForceOption = Annotated[
    bool,
    typer.Option(
        "--force",
        help="Allow a base that the adapter was not trained on, and options that the installed PEFT does not know.",
    ),
]
TrustOption = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run the base model's own Python code. Only for code that you trust."),
]
Json = Annotated[bool, typer.Option("--json", help="Print machine-readable JSON.")]
READS_CONFIG = {"ignore_unknown_options": True}
"""Settings of commands that need a config: an unknown option becomes an override, so that `read_config` explains it."""
# typer evaluates these annotations at run time, so they must be valid on Python 3.10.

CONFIG_COMMANDS = ("train", "plan", "inspect", "evaluate", "verify-resume")
"""Commands that read a run config."""
WRITING_COMMANDS = ("train", "merge", "export", "push", "init", "report", "verify-resume")
"""Commands whose result is files: they continue if nobody reads what they print."""


def main() -> None:
    """Run the command line."""
    show_logs()
    should_continue = any(name in WRITING_COMMANDS for name in sys.argv[1:2])
    sys.exit(run_command(_run_app, should_continue=should_continue))


def _run_app() -> None:
    _check_config_option(sys.argv[1:])
    app(standalone_mode=True)


def _check_config_option(arguments: list[str]) -> None:
    """Check that a run config is not passed as `lora-accel train my.yaml` or `-c my.yaml`, as other tools expect it."""
    command, rest = "".join(arguments[:1]), arguments[1:]
    pairs = zip([command, *rest], rest, strict=False)  # after `--launcher`, a file is that option's value
    names = (name for before, name in pairs if not before.startswith("--"))
    file = next((name for name in names if re.fullmatch(r"[^-=][^=]*\.ya?ml", name)), None)
    has_config = any(re.match("--config(=|$)", argument) for argument in rest)
    if command in CONFIG_COMMANDS and file is not None and not has_config:
        raise ConfigError(f"pass the run config with --config: lora-accel {command} --config {file}")


def _print_version(is_asked: bool) -> None:
    if is_asked:
        print(f"lora-accel {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Fine-tune causal language models with LoRA and QLoRA."""


@app.command(context_settings=READS_CONFIG)
def train(
    config: Annotated[Path, typer.Option("--config", metavar="FILE", help="Run config (YAML).")],
    overrides: Overrides = None,
    launcher: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            metavar="FILE",
            help="Config file for accelerate launch. Default: the file written by `accelerate config`, else settings "
            "for this machine.",
        ),
    ] = None,
) -> None:
    """Train an adapter, or resume training. Runs accelerate launch on this machine and prints its command line."""
    from lora_accel.launcher import launch_training

    raise typer.Exit(launch_training(config, overrides or [], launcher))


@app.command()
def plan(
    overrides: Overrides = None,
    config: Config = None,
    ranks: Annotated[int, typer.Option(min=1, help="Number of training processes.")] = 1,
    estimate: Annotated[
        bool,
        typer.Option("--estimate/--no-estimate", help="Estimate parameters and memory. Default: yes; takes seconds."),
    ] = True,
    measure: Annotated[
        bool, typer.Option("--measure", help="Also load the model and measure two micro-batches on this machine.")
    ] = False,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of the run config.")] = False,
    as_json: Json = False,
) -> None:
    """Print the training plan for a config: data, steps, parameters, memory, time. Writes nothing, loads no weights."""
    from lora_accel.config.files import read_config
    from lora_accel.config.schema import RunConfig

    if schema:
        print(json.dumps(RunConfig.model_json_schema(), indent=2))
        return
    if config is None:
        raise ConfigError("--config FILE is missing (or pass --schema)")
    run_config = read_config(config, overrides or [])
    from lora_accel.setup.data import log_data, prepare_data
    from lora_accel.setup.recipe import complete_config

    run_config = complete_config(run_config)
    data = prepare_data(run_config, ranks)
    if not as_json:
        log_data(run_config, data)
    if not (estimate or measure):
        if as_json:
            print(json.dumps(data.plan.as_dict(), indent=2))
        return
    silence_libraries()
    from lora_accel.planning.report import forecast_as_dict, forecast_text, make_forecast

    forecast = make_forecast(run_config, data, ranks, measured_with=(config, overrides or []) if measure else None)
    print(json.dumps(forecast_as_dict(forecast), indent=2) if as_json else forecast_text(forecast))
    if forecast.failure is not None:
        raise LoraAccelError(forecast.failure)


@app.command()
def init(
    file: Annotated[Path, typer.Argument(metavar="[FILE]", help="File to create.")] = Path("my_rows.yaml"),
    model: Annotated[Optional[str], typer.Option(metavar="NAME", help="Base model: Hub id or folder.")] = None,  # noqa: UP045
    data: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="PATH", help="Rows to train on: a file, a folder, a URL, or a dataset id on the Hub."),
    ] = None,
    columns: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="MAPPING", help="Names of your columns: '{instruction: question, output: answer}'."),
    ] = None,
    evaluation: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--eval", metavar="PATH", help="Rows to evaluate on. Default: some of --data are held out."),
    ] = None,
    four_bits: Annotated[
        Optional[bool],  # noqa: UP045
        typer.Option("--4bit/--no-4bit", help="Quantize the base to 4 bits (QLoRA)."),
    ] = None,
    output: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="DIR", help="Run folder (output_dir). Default: runs/ and the name of FILE."),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Ask nothing.")] = False,
) -> None:
    """Write a commented config file for training on your own data.

    Looks at the rows and the model, and chooses values that fit them. Asks for what is missing if this is a terminal.
    Without options, and without a terminal or with --yes, writes a recipe to edit.
    """
    from lora_accel.config.files import check_recipe_path, write_recipe
    from lora_accel.setup.dialog import complete_request, is_terminal, write_draft
    from lora_accel.setup.draft import schema_path

    check_recipe_path(file)
    should_ask = is_terminal() and not yes
    if should_ask or any(option is not None for option in (model, data, columns, evaluation, four_bits, output)):
        silence_libraries()
        request = complete_request(
            model=model,
            data=data,
            columns=columns,
            evaluation=evaluation,
            four_bits=four_bits,
            output_dir=output or f"runs/{file.stem}",
            should_ask=should_ask,
        )
        print_table("rows and model", write_draft(file, request))
        print(f"wrote {file}, and {schema_path(file)} for editors. Then:")
        print(f"  lora-accel inspect --config {file}\n  lora-accel train --config {file}")
        return
    write_recipe(file)
    print(f"wrote {file}. Set data.train in it, then:\n  lora-accel inspect --config {file}")


@app.command(context_settings=READS_CONFIG)
def inspect(
    config: Annotated[Path, typer.Option("--config", metavar="FILE", help="Run config (YAML).")],
    overrides: Overrides = None,
    rows: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Examples to show per source. Default: 3, or all with --json."),
    ] = None,
    source: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            metavar="PATH", help="Show only this source; data.eval_fraction = the examples held out for evaluation."
        ),
    ] = None,
    html: Annotated[Optional[Path], typer.Option(metavar="FILE", help="Also write an HTML page.")] = None,  # noqa: UP045
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, one object per line.")] = False,
) -> None:
    """Show the training data token by token, with its loss mask, the audit of all rows and a length histogram."""
    from lora_accel.config.files import read_config

    run_config = read_config(config, overrides or [])
    from lora_accel.preview import inspect as print_preview

    print_preview(run_config, rows=rows, source=source, html=html, as_json=as_json)


@app.command()
def merge(
    adapter: Annotated[Optional[str], typer.Argument(metavar="ADAPTER", help="Adapter folder.")] = None,  # noqa: UP045
    out: Annotated[Optional[Path], typer.Argument(metavar="OUT", help="Output folder.")] = None,  # noqa: UP045
    base: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--base", "--base-model-path", metavar="PATH", help="Base model, instead of the one that the adapter names."
        ),
    ] = None,
    adapters: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            "--adapter",
            metavar="DIR=WEIGHT",
            help="Adapter to combine, with its weight; repeat it for each. OUT is then the only argument.",
        ),
    ] = None,
    combine: Annotated[
        str, typer.Option(help="How to combine adapters: linear, svd, ties, dare_linear or dare_ties.")
    ] = "linear",
    density: Annotated[Optional[float], typer.Option(help="Fraction of the values that ties and dare_* keep.")] = None,  # noqa: UP045
    run: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            "--all", metavar="RUN", help="Merge every checkpoint of a run and its final adapter into RUN/merged-all/."
        ),
    ] = None,
    base_weights: Annotated[
        str,
        typer.Option(
            help="Weights to merge into: original, or dequantized (the 4-bit weights that a QLoRA run trained on)."
        ),
    ] = "original",
    verify: Annotated[
        Optional[bool],  # noqa: UP045
        typer.Option(
            "--verify/--no-verify",
            help="Compare the merged model with base + adapter. Default: compare if memory allows.",
        ),
    ] = None,
    max_shard_size: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="5GB", help="Largest weight file. Default: the same files as the base."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")] = False,
    force: ForceOption = False,
    trust_remote_code: TrustOption = False,
    lora_path: Annotated[Optional[str], typer.Option("--lora-path", help="Alias of ADAPTER (FastChat).")] = None,  # noqa: UP045
    target_model_path: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--target-model-path", help="Alias of OUT (FastChat)."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Merge an adapter into its base model and write an ordinary model folder."""
    from lora_accel.merging.request import merge_lines, parse_merge

    folders = [folder for folder in (adapter, None if out is None else str(out)) if folder is not None]
    request = parse_merge(folders, adapters or [], run, lora_path, target_model_path, max_shard_size)
    if not adapters and (combine != "linear" or density is not None):
        raise ConfigError("--combine, --density: need several adapters; pass each one with --adapter DIR=WEIGHT")
    silence_libraries()
    keep_freed_memory()
    from lora_accel.merging.job import MergeKeywords
    from lora_accel.merging.merge import merge_adapter, merge_checkpoints, merge_weighted

    options: MergeKeywords = {
        "base_weights": base_weights,
        "verify": verify,
        "max_shard_bytes": request.max_shard_bytes,
        "overwrite": overwrite,
        "force": force,
        "trust_remote_code": trust_remote_code,
    }
    if request.run is not None:
        merged = merge_checkpoints(request.run, base=base, **options)
    elif adapters:
        merged = [merge_weighted(request.adapters, request.out, how=combine, density=density, base=base, **options)]
    else:
        merged = [merge_adapter(request.adapters[0][0], request.out, base=base, **options)]
    if as_json:
        print(json.dumps(merged if request.run is not None else merged[0], indent=2))
    else:
        print("\n".join(merge_lines(merged, request)))


@app.command()
def export(
    adapter: Annotated[
        Path, typer.Argument(metavar="ADAPTER", help="Adapter folder, or a loralib file; for gguf also a model folder.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Output folder.")],
    format: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="NAME",
            help="Output format: peft, peft-bin (PEFT's older pickle file), loralib (microsoft/LoRA) or gguf "
            "(llama.cpp and Ollama).",
        ),
    ],
    outtype: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            metavar="TYPE", help="How gguf stores the weights: f32, f16, bf16 or q8_0. Default: as they are stored."
        ),
    ] = None,
    base: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="PATH", help="Base model, instead of the one that the adapter names."),
    ] = None,
    alpha: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(metavar="NUMBER", help="lora_alpha of a loralib file, which does not store it."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")] = False,
    force: ForceOption = False,
    trust_remote_code: TrustOption = False,
    as_json: Json = False,
) -> None:
    """Convert an adapter to another tool's format, or import one from loralib."""
    silence_libraries()
    from lora_accel.export.export import export_adapter

    written = export_adapter(
        adapter,
        out,
        format=format,
        outtype=outtype,
        base=base,
        alpha=alpha,
        overwrite=overwrite,
        force=force,
        trust_remote_code=trust_remote_code,
    )
    print(json.dumps(written, indent=2) if as_json else f"{format}: {out} ({written['num_tensors']} tensors)")


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="RUN/adapter, a merged model or a GGUF folder.")],
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="Repository on the Hub: owner/name.")],
    base: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="HUB_ID", help="The adapter's base on the Hub, if it was in a local folder."),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Create a private repository.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would be uploaded. Nothing is sent.")] = False,
    as_json: Json = False,
) -> None:
    """Upload an adapter, a merged model or a GGUF folder to the Hugging Face Hub."""
    silence_libraries()
    from lora_accel.export.push import push_folder, push_lines

    pushed = push_folder(folder, repo_id, base=base, private=private, dry_run=dry_run)
    print(json.dumps(pushed, indent=2) if as_json else "\n".join(push_lines(pushed)))


@app.command()
@with_sampling
def generate(
    sampling: dict[str, Any],
    adapter: Annotated[
        Optional[list[Path]],  # noqa: UP045
        typer.Option(metavar="DIR", help="Adapter folder; repeat it for several. Default: the base alone (--base)."),
    ] = None,
    prompts: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(metavar="[PROMPT …]", help="Prompts (user messages)."),
    ] = None,
    prompts_file: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            "--prompts",
            metavar="FILE",
            help="File with more prompts: one per line (.txt), or a string, {prompt} or {messages} per line (.jsonl).",
        ),
    ] = None,
    base: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            metavar="PATH", help="Base model, instead of the one that the adapters name, or without adapters."
        ),
    ] = None,
    merged: Annotated[Optional[Path], typer.Option(metavar="DIR", help="Merged model, to compare its replies.")] = None,  # noqa: UP045
    compare: Annotated[bool, typer.Option("--compare", help="Also show the replies of the base model.")] = False,
    system: Annotated[Optional[str], typer.Option(metavar="TEXT", help="System message.")] = None,  # noqa: UP045
    raw: RawOption = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts per batch.")] = 8,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, max=MAX_NEW_TOKENS, help="Maximum reply length in tokens.")
    ] = 128,
    streamed: Annotated[
        bool, typer.Option("--stream", help="Print tokens as they are generated (one adapter only).")
    ] = False,
    dtype: DtypeOption = "auto",
    force: ForceOption = False,
    trust_remote_code: TrustOption = False,
    as_json: Json = False,
) -> None:
    """Generate replies to prompts: greedy by default, with the chat template of training."""
    from lora_accel.inference.generation import generate as generate_replies
    from lora_accel.inference.generation import stream
    from lora_accel.inference.prompts import last_message, read_prompts

    conversations, adapters, options = (
        read_prompts(prompts or [], prompts_file),
        adapter or [],
        parse_sampling(sampling),
    )
    if streamed and (len(adapters) > 1 or compare or merged or as_json):
        raise ConfigError(
            "--stream supports a single adapter; leave out --compare, --merged, --json and further --adapter options"
        )
    silence_libraries()
    if streamed:
        stream(
            conversations,
            adapter=adapters[0] if adapters else None,
            base=base,
            system=system,
            raw=raw,
            max_new_tokens=max_new_tokens,
            sampling=options,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            force=force,
        )
        return
    answers = generate_replies(
        conversations,
        adapters=adapters,
        base=base,
        merged=merged,
        compare=compare or merged is not None,
        system=system,
        raw=raw,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        sampling=options,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        force=force,
    )
    replies = [(last_message(prompt), answer) for prompt, answer in zip(conversations, answers, strict=True)]
    if as_json:
        print(json.dumps([{"prompt": prompt, **answer} for prompt, answer in replies], indent=2))
        return
    for prompt, answer in replies:
        print_table(prompt, list(answer.items()))


@app.command()
@with_sampling
def chat(
    sampling: dict[str, Any],
    adapter: Annotated[Optional[Path], typer.Option(metavar="DIR", help="Adapter folder.")] = None,  # noqa: UP045
    base: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            metavar="PATH", help="Base model, instead of the one that the adapter names, or without an adapter."
        ),
    ] = None,
    merged: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="DIR", help="Merged model to chat with, instead of base + adapter."),
    ] = None,
    system: Annotated[Optional[str], typer.Option(metavar="TEXT", help="System message.")] = None,  # noqa: UP045
    raw: RawOption = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, max=MAX_NEW_TOKENS, help="Maximum reply length in tokens.")
    ] = 512,
    dtype: DtypeOption = "auto",
    force: ForceOption = False,
    trust_remote_code: TrustOption = False,
) -> None:
    """Chat with an adapter, a merged model or a base in the terminal. Decoding is greedy by default."""
    options = parse_sampling(sampling)
    silence_libraries()
    from lora_accel.inference.chat import chat as start_chat

    start_chat(
        adapter=adapter,
        base=base,
        merged=merged,
        system=system,
        raw=raw,
        max_new_tokens=max_new_tokens,
        sampling=options,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        force=force,
    )


@app.command(context_settings=READS_CONFIG)
@with_sampling
def evaluate(
    sampling: dict[str, Any],
    config: Annotated[
        Path,
        typer.Option("--config", metavar="FILE", help="Run config (YAML) with data.eval or data.eval_fraction."),
    ],
    overrides: Overrides = None,
    adapter: Annotated[
        Optional[list[Path]],  # noqa: UP045
        typer.Option(metavar="DIR", help="Adapter folder; repeat it for several."),
    ] = None,
    merged: Annotated[Optional[Path], typer.Option(metavar="DIR", help="Merged model to score.")] = None,  # noqa: UP045
    metric: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            metavar="NAME",
            help="Metric to compute, or module:function; repeat it for several (docs/evaluation.md). Default: loss, "
            "perplexity, exact_match and those of the config.",
        ),
    ] = None,
    forgetting: Annotated[
        bool,
        typer.Option("--forgetting", help="Also compute the loss on neutral text, of the base and of each adapter."),
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts per batch.")] = 25,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, max=MAX_NEW_TOKENS, help="Maximum reply length in tokens.")
    ] = 128,
    dtype: DtypeOption = "auto",
    force: ForceOption = False,
    trust_remote_code: TrustOption = False,
    as_json: Json = False,
) -> None:
    """Compute loss, exact match and other metrics of base, adapters and a merged model on the evaluation data."""
    from lora_accel.config.files import read_config

    options = [] if dtype == "auto" else [f"model.dtype={dtype}"]
    options += ["model.trust_remote_code=true"] if trust_remote_code else []
    options += [f"evaluation.generation.{name}={value}" for name, value in sampling.items()]
    run_config = read_config(config, [*(overrides or []), *options])
    if forgetting and run_config.evaluation.neutral is None:
        run_config = read_config(config, [*(overrides or []), *options, "evaluation.neutral=auto"])
    silence_libraries()
    from lora_accel.inference.evaluation import evaluate as score_models
    from lora_accel.inference.evaluation import scores_as_json, scores_as_table

    scores = score_models(
        run_config,
        adapters=adapter or [],
        merged=merged,
        metrics=metric,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        force=force,
    )
    if as_json:
        print(scores_as_json(scores))
        return
    headers, *rows = scores_as_table(scores)
    print_table("evaluation", rows, headers=headers)


@app.command()
def checkpoints(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder (output_dir).")],
    verify: Annotated[bool, typer.Option("--verify", help="Also compare the SHA-256 of every file.")] = False,
    as_json: Json = False,
) -> None:
    """List the checkpoints of a run: step, age, size, metrics, and whether each is valid, newest, best, exported."""
    from lora_accel.saving.listing import as_table, list_checkpoints

    infos = list_checkpoints(run, hashes=verify)
    if as_json:
        print(json.dumps([dataclasses.asdict(info) for info in infos], indent=2))
        return
    headers, *rows = as_table(run, infos, hashes=verify)
    print_table(str(run), rows, headers=headers)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN…", help="Run folder (output_dir); several are compared.")],
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            metavar="FILE", help="Page to write. Default: report.html in RUN, of several runs comparison.html."
        ),
    ] = None,
) -> None:
    """Write a run's curves, replies, data, checkpoints and settings to one HTML page, or compare several runs."""
    from lora_accel.report.write import write_report

    print(write_report(runs, out))


@app.command(name="verify-resume", context_settings=READS_CONFIG)
def verify_resume(
    config: Annotated[Path, typer.Option("--config", metavar="FILE", help="Run config (YAML).")],
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(min=2, help="Training steps of each run.")] = 4,
    launcher: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            metavar="COMMAND",
            help="Launch command, such as 'accelerate launch --config_file FILE'. Default: accelerate launch.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Verify on this machine that resuming is exact.

    Trains a few steps twice, once with a SIGKILL half-way, and compares losses and weights bit by bit.
    """
    from lora_accel.verify_resume import verify_resume as verify

    verdict = verify(config, overrides or [], steps=steps, launcher=launcher)
    equal = not verdict.differences
    if as_json:
        print(json.dumps({"equal": equal, **verdict._asdict(), "folder": str(verdict.folder)}, indent=2))
    elif equal:
        print(
            f"bitwise equal: {verdict.steps} steps uninterrupted, and killed by SIGKILL after step "
            f"{verdict.killed_after} and resumed"
        )
    if not equal:
        raise LoraAccelError(
            "the resumed run differs from the uninterrupted one (uninterrupted -> resumed); both are in "
            f"{verdict.folder}. (On a GPU, equal bits need training.deterministic=true.)\n"
            + "\n".join(f"  {line}" for line in verdict.differences)
        )


if __name__ == "__main__":
    main()
