"""`lora-accel …`: parses, then imports what it needs. No logic."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

from lora_accel.console import hush_libraries, print_table, run_command
from lora_accel.errors import ConfigError, LoraAccelError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Fine-tune causal language models with LoRA and QLoRA. "
    "Train with: accelerate launch -m lora_accel.train --config FILE [section.key=value …]",
)

Config = Annotated[Optional[Path], typer.Option("--config", metavar="FILE", help="Run config, YAML.")]  # noqa: UP045
Overrides = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Argument(metavar="[section.key=value …]", help="What differs from the file."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for a script to read.")]
# typer evaluates these annotations, so they must hold on Python 3.10 as they stand.


def main() -> None:
    """Run the command line."""
    sys.exit(run_command(lambda: app(standalone_mode=True)))


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
    from lora_accel.train import prepare_data, show_data

    data = prepare_data(asked, ranks)
    if as_json:
        print(json.dumps(data.plan.as_dict(), indent=2))
    else:
        show_data(data)


@app.command()
def inspect(
    config: Annotated[Path, typer.Option("--config", metavar="FILE", help="Run config, YAML.")],
    overrides: Overrides = None,
    rows: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Examples of each source. Without it 3, with --json all."),
    ] = None,
    source: Annotated[Optional[str], typer.Option(metavar="PATH", help="Only the source of this path.")] = None,  # noqa: UP045
    html: Annotated[Optional[Path], typer.Option(metavar="FILE", help="Write a page for a browser, too.")] = None,  # noqa: UP045
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, one object a line.")] = False,
) -> None:
    """Show the data as they are learned: every token, the ledger, lengths. No model is loaded."""
    from lora_accel.config.files import read_config

    asked = read_config(config, overrides or [])
    from lora_accel.inspection import inspect as show

    show(asked, rows=rows, source=source, html=html, as_json=as_json)


@app.command()
def merge(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="Folder of the adapter.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to make.")],
    base: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="PATH", help="Base model, instead of the one that the adapter names."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")] = False,
    as_json: Json = False,
) -> None:
    """Merge an adapter into its base: an ordinary model folder."""
    hush_libraries()
    from lora_accel.saving.merge import merge_adapter

    provenance = merge_adapter(adapter, out, base=base, overwrite=overwrite)
    moved = provenance["merged"]["logits_moved"]
    print(
        json.dumps(provenance, indent=2) if as_json else f"merged: {out} (logits moved by {moved:.2g} of their spread)"
    )


@app.command()
def generate(
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT …", help="User messages.")],
    adapter: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the adapter.")],
    base: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="PATH", help="Base model, instead of the one that the adapter names."),
    ] = None,
    merged: Annotated[Optional[Path], typer.Option(metavar="DIR", help="Merged model to compare with.")] = None,  # noqa: UP045
    compare: Annotated[bool, typer.Option("--compare", help="Show base, adapter and merged side by side.")] = False,
    system: Annotated[Optional[str], typer.Option(metavar="TEXT", help="System message.")] = None,  # noqa: UP045
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest reply.")] = 128,
    as_json: Json = False,
) -> None:
    """Reply to prompts, greedily, with the chat template of training."""
    hush_libraries()
    from lora_accel.inference import generate as replies

    answers = replies(
        prompts,
        adapter=adapter,
        base=base,
        merged=merged,
        compare=compare or merged is not None,
        system=system,
        max_new_tokens=max_new_tokens,
    )
    if as_json:
        print(json.dumps([{"prompt": p, **a} for p, a in zip(prompts, answers, strict=True)], indent=2))
        return
    for prompt, answer in zip(prompts, answers, strict=True):
        print_table(prompt, list(answer.items()))


@app.command()
def evaluate(
    config: Annotated[Path, typer.Option("--config", metavar="FILE", help="Run config, YAML; data.eval is used.")],
    overrides: Overrides = None,
    adapter: Annotated[Optional[Path], typer.Option(metavar="DIR", help="Folder of the adapter.")] = None,  # noqa: UP045
    merged: Annotated[Optional[Path], typer.Option(metavar="DIR", help="Merged model.")] = None,  # noqa: UP045
    batch_size: Annotated[int, typer.Option(min=1, help="Rows generated at once.")] = 25,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest reply.")] = 128,
    as_json: Json = False,
) -> None:
    """Score base, base + adapter and a merged model on the evaluation rows."""
    from lora_accel.config.files import read_config

    asked = read_config(config, overrides or [])
    hush_libraries()
    from lora_accel.inference import evaluate as score
    from lora_accel.inference import scores_as_json

    scores = score(asked, adapter=adapter, merged=merged, batch_size=batch_size, max_new_tokens=max_new_tokens)
    if as_json:
        print(scores_as_json(scores))
        return
    rows = [
        (
            s.name,
            f"{s.eval_loss:.4f}",
            "-" if s.exact_match is None else f"{s.exact_match:.0%} of {s.rows}",
        )
        for s in scores
    ]
    print_table("evaluation", rows, heads=("model", "loss", "exact match"))


@app.command()
def checkpoints(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder (output_dir).")],
    verify: Annotated[bool, typer.Option("--verify", help="Read every byte and compare its hash.")] = False,
    as_json: Json = False,
) -> None:
    """List the checkpoints of a run: step, age, size, and whether each can be used."""
    from lora_accel.saving.history import list_checkpoints

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
    from lora_accel.verify import verify_resume as verify

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
