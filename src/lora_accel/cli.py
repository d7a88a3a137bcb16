"""`lora-accel …`: parses, then imports what it needs. No logic."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

from lora_accel.config.schema import Dtype
from lora_accel.console import print_table, run_command, silence_libraries
from lora_accel.errors import ConfigError, LoraAccelError
from lora_accel.processes import keep_freed_memory

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Fine-tune causal language models with LoRA and QLoRA.",
)

Config = Annotated[Optional[Path], typer.Option("--config", metavar="FILE", help="Run config, YAML.")]  # noqa: UP045
Overrides = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Argument(metavar="[section.key=value …]", help="What differs from the file."),
]
DtypeOption = Annotated[
    Dtype,
    typer.Option(
        "--dtype", help="What models compute in. auto: as stored, or float32 where the device only emulates that."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for a script to read.")]
# typer evaluates these annotations, so they must hold on Python 3.10 as they stand.


def main() -> None:
    """Run the command line."""
    sys.exit(run_command(lambda: app(standalone_mode=True)))


@app.command()
def train(
    config: Annotated[Path, typer.Option("--config", metavar="FILE", help="Run config, YAML.")],
    overrides: Overrides = None,
    launcher: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            metavar="FILE",
            help="Config file of accelerate launch. Without it, what `accelerate config` wrote, else what fits "
            "this machine.",
        ),
    ] = None,
) -> None:
    """Train, or resume: runs accelerate launch on this machine and prints its command line."""
    from lora_accel.launcher import launch_training

    raise typer.Exit(launch_training(config, overrides or [], launcher))


@app.command()
def plan(
    overrides: Overrides = None,
    config: Config = None,
    ranks: Annotated[int, typer.Option(min=1, help="Number of processes.")] = 1,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of a run config.")] = False,
    as_json: Json = False,
) -> None:
    """Say what a run will do with its data, without loading the model."""
    from lora_accel.config.files import read_config
    from lora_accel.config.schema import RunConfig

    if schema:
        print(json.dumps(RunConfig.model_json_schema(), indent=2))
        return
    if config is None:
        raise ConfigError("--config FILE is missing (or say --schema)")
    asked = read_config(config, overrides or [])
    from lora_accel.setup.data import prepare_data, print_data

    data = prepare_data(asked, ranks)
    if as_json:
        print(json.dumps(data.plan.as_dict(), indent=2))
    else:
        print_data(data)


@app.command()
def init(
    file: Annotated[Path, typer.Argument(metavar="[FILE]", help="File to create.")] = Path("my_rows.yaml"),
) -> None:
    """Write a commented recipe for your own rows."""
    from lora_accel.config.files import write_recipe

    write_recipe(file)
    print(f"wrote {file}. Set data.train in it, then:\n  lora-accel inspect --config {file}")


@app.command()
def inspect(
    config: Annotated[Path, typer.Option("--config", metavar="FILE", help="Run config, YAML.")],
    overrides: Overrides = None,
    rows: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Examples of each source. Without it 3, with --json all."),
    ] = None,
    source: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="PATH", help="Only this source; data.eval_fraction = what it holds out."),
    ] = None,
    html: Annotated[Optional[Path], typer.Option(metavar="FILE", help="Write a page for a browser, too.")] = None,  # noqa: UP045
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, one object a line.")] = False,
) -> None:
    """Show the data as they are learned: every token, the ledger, lengths. No model is loaded."""
    from lora_accel.config.files import read_config

    asked = read_config(config, overrides or [])
    from lora_accel.preview import inspect as show

    show(asked, rows=rows, source=source, html=html, as_json=as_json)


@app.command()
def merge(
    adapter: Annotated[Optional[str], typer.Argument(metavar="ADAPTER", help="Folder of the adapter.")] = None,  # noqa: UP045
    out: Annotated[Optional[Path], typer.Argument(metavar="OUT", help="Folder to make.")] = None,  # noqa: UP045
    base: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--base", "--base-model-path", metavar="PATH", help="Base, instead of the one that it names."),
    ] = None,
    adapters: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--adapter", metavar="DIR=WEIGHT", help="Several, weighted; then OUT is the only word."),
    ] = None,
    combine: Annotated[str, typer.Option(help="How: linear, svd, ties, dare_linear or dare_ties.")] = "linear",
    density: Annotated[Optional[float], typer.Option(help="Part of the values that ties and dare keep.")] = None,  # noqa: UP045
    every: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--all", metavar="RUN", help="Every checkpoint of a run and its adapter, into RUN/merged/."),
    ] = None,
    base_weights: Annotated[
        str, typer.Option(help="original, or dequantized: what the adapter of a QLoRA run was trained on.")
    ] = "original",
    verify: Annotated[
        Optional[bool],  # noqa: UP045
        typer.Option("--verify/--no-verify", help="Compare with base + adapter. Without either: if memory allows."),
    ] = None,
    max_shard_size: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="5GB", help="Of a weight file; without it files are as the base has them."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Take a base that the adapter was not trained on.")] = False,
    lora_path: Annotated[Optional[str], typer.Option("--lora-path", help="ADAPTER, in FastChat's words.")] = None,  # noqa: UP045
    target_model_path: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--target-model-path", help="OUT, in FastChat's words."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Merge an adapter into its base: an ordinary model folder."""
    from lora_accel.merging.request import merge_lines, parse_merge

    words = [word for word in (adapter, None if out is None else str(out)) if word is not None]
    asked = parse_merge(words, adapters or [], every, lora_path, target_model_path, max_shard_size)
    silence_libraries()
    keep_freed_memory()
    from lora_accel.merging.merge import MergeOptions, merge_adapter, merge_checkpoints, merge_weighted

    options = MergeOptions(base_weights, verify, asked.max_shard_bytes, overwrite, force)
    if asked.run is not None:
        made = merge_checkpoints(asked.run, base=base, options=options)
    elif adapters:
        made = [merge_weighted(asked.adapters, asked.out, how=combine, density=density, base=base, options=options)]
    else:
        made = [merge_adapter(asked.adapters[0][0], asked.out, base=base, options=options)]
    if as_json:
        print(json.dumps(made if asked.run is not None else made[0], indent=2))
    else:
        print("\n".join(merge_lines(made, asked)))


@app.command()
def export(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="Folder of the adapter, or a file of loralib's.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to make.")],
    format: Annotated[
        str,
        typer.Option("--format", metavar="NAME", help="peft, peft-bin (an older pickle) or loralib (microsoft/LoRA)."),
    ],
    base: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="PATH", help="Base model, instead of the one that the adapter names."),
    ] = None,
    alpha: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(metavar="NUMBER", help="lora_alpha of a file of loralib's, which does not tell it."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")] = False,
    as_json: Json = False,
) -> None:
    """Write an adapter in another tool's format, or take one of loralib's over."""
    silence_libraries()
    from lora_accel.export.export import export_adapter

    written = export_adapter(adapter, out, format=format, base=base, alpha=alpha, overwrite=overwrite)
    print(json.dumps(written, indent=2) if as_json else f"{format}: {out} ({written['num_tensors']} tensors)")


@app.command()
def generate(
    adapter: Annotated[list[Path], typer.Option(metavar="DIR", help="Folder of an adapter; may be repeated.")],
    prompts: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(metavar="[PROMPT …]", help="User messages."),
    ] = None,
    prompts_file: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            "--prompts",
            metavar="FILE",
            help="More prompts: one a line (.txt), or a text, {prompt} or {messages} a line (.jsonl).",
        ),
    ] = None,
    base: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="PATH", help="Base model, instead of the one that the adapters name."),
    ] = None,
    merged: Annotated[Optional[Path], typer.Option(metavar="DIR", help="Merged model to compare with.")] = None,  # noqa: UP045
    compare: Annotated[bool, typer.Option("--compare", help="Show base, adapters and merged side by side.")] = False,
    system: Annotated[Optional[str], typer.Option(metavar="TEXT", help="System message.")] = None,  # noqa: UP045
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts answered at once.")] = 8,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest reply.")] = 128,
    streamed: Annotated[
        bool, typer.Option("--stream", help="Show replies of one adapter as they are written.")
    ] = False,
    dtype: DtypeOption = "auto",
    as_json: Json = False,
) -> None:
    """Reply to prompts, greedily, with the chat template of training."""
    from lora_accel.inference.generation import generate as replies
    from lora_accel.inference.generation import stream
    from lora_accel.inference.prompts import last_words, read_prompts

    asked = read_prompts(prompts or [], prompts_file)
    if streamed and (len(adapter) > 1 or compare or merged or as_json):
        raise ConfigError("--stream: shows one adapter alone; leave out --compare, --merged, --json, other --adapter")
    silence_libraries()
    if streamed:
        stream(asked, adapter=adapter[0], base=base, system=system, max_new_tokens=max_new_tokens, dtype=dtype)
        return
    answers = replies(
        asked,
        adapters=adapter,
        base=base,
        merged=merged,
        compare=compare or merged is not None,
        system=system,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        dtype=dtype,
    )
    named = [(last_words(prompt), answer) for prompt, answer in zip(asked, answers, strict=True)]
    if as_json:
        print(json.dumps([{"prompt": prompt, **answer} for prompt, answer in named], indent=2))
        return
    for prompt, answer in named:
        print_table(prompt, list(answer.items()))


@app.command()
def chat(
    adapter: Annotated[Optional[Path], typer.Option(metavar="DIR", help="Folder of the adapter.")] = None,  # noqa: UP045
    base: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="PATH", help="Base model, instead of the one that the adapter names."),
    ] = None,
    merged: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="DIR", help="Merged model to talk to, instead of base + adapter."),
    ] = None,
    system: Annotated[Optional[str], typer.Option(metavar="TEXT", help="System message.")] = None,  # noqa: UP045
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest reply.")] = 512,
    dtype: DtypeOption = "auto",
) -> None:
    """Talk with what was trained: replies are greedy, and shown as they are written."""
    silence_libraries()
    from lora_accel.inference.chat import chat as talk

    talk(adapter=adapter, base=base, merged=merged, system=system, max_new_tokens=max_new_tokens, dtype=dtype)


@app.command()
def evaluate(
    config: Annotated[
        Path,
        typer.Option("--config", metavar="FILE", help="Run config, YAML; its data.eval or data.eval_fraction is used."),
    ],
    overrides: Overrides = None,
    adapter: Annotated[
        Optional[list[Path]],  # noqa: UP045
        typer.Option(metavar="DIR", help="Folder of an adapter; may be repeated."),
    ] = None,
    merged: Annotated[Optional[Path], typer.Option(metavar="DIR", help="Merged model.")] = None,  # noqa: UP045
    batch_size: Annotated[int, typer.Option(min=1, help="Rows answered at once.")] = 25,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest reply.")] = 128,
    dtype: DtypeOption = "auto",
    as_json: Json = False,
) -> None:
    """Score base, base + each adapter and a merged model on the evaluation rows."""
    from lora_accel.config.files import read_config

    asked = read_config(config, [*(overrides or []), *([] if dtype == "auto" else [f"model.dtype={dtype}"])])
    silence_libraries()
    from lora_accel.inference.evaluation import evaluate as score
    from lora_accel.inference.evaluation import scores_as_json, scores_as_table

    scores = score(asked, adapters=adapter or [], merged=merged, batch_size=batch_size, max_new_tokens=max_new_tokens)
    if as_json:
        print(scores_as_json(scores))
        return
    heads, *rows = scores_as_table(scores)
    print_table("evaluation", rows, heads=heads)


@app.command()
def checkpoints(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder (output_dir).")],
    verify: Annotated[bool, typer.Option("--verify", help="Read every byte and compare its hash.")] = False,
    as_json: Json = False,
) -> None:
    """List the checkpoints of a run: step, age, size, and whether each can be used."""
    from lora_accel.saving.discovery import list_checkpoints

    listed = list_checkpoints(run, hashes=verify)
    if as_json:
        print(json.dumps([entry._asdict() for entry in listed], indent=2))
        return
    rows = [
        (e.name, str(e.step), f"{e.age_seconds / 3600:,.1f} h", f"{e.bytes / 1e6:,.1f} MB", e.reason or "valid")
        for e in listed
    ]
    print_table(str(run), rows, heads=("checkpoint", "step", "age", "size", "bytes and hashes" if verify else "state"))


@app.command(name="verify-resume")
def verify_resume(
    config: Annotated[Path, typer.Option("--config", metavar="FILE", help="Run config, YAML.")],
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(min=2, help="Steps of each run.")] = 4,
    launcher: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="WORDS", help="How runs are started: 'accelerate launch --config_file FILE', say."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Prove on this machine that a killed run goes on exactly: train, train again with a SIGKILL half-way, compare."""
    from lora_accel.verify_resume import verify_resume as verify

    verdict = verify(config, overrides or [], steps=steps, launcher=launcher)
    equal = not verdict.differences
    if as_json:
        print(json.dumps({"equal": equal, **verdict._asdict(), "folder": str(verdict.folder)}, indent=2))
    elif equal:
        print(f"equal to the last bit: {verdict.steps} steps straight, and with a SIGKILL after {verdict.killed_after}")
    if not equal:
        raise LoraAccelError(
            f"the resumed run differs from the straight one (straight -> resumed); both are in {verdict.folder}\n"
            + "\n".join(f"  {line}" for line in verdict.differences)
        )


if __name__ == "__main__":
    main()
