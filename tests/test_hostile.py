"""Untrusted and extreme inputs, each given to a real command: exit 2 with one message, in bounded time and memory.

The inputs are those of the tests beside the modules that reject them; here the cost of the command is measured.
A few run always, all with `--faults`. The terminal shows what each took, beyond the imports of its command.
"""

from __future__ import annotations

import functools
import gzip
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_accel.saving.discovery import CONFIG, WEIGHTS
from lora_accel.saving.tensor_files import PICKLED
from tests import forked
from tests.config.test_limits import EXTREME_OVERRIDES, YAML_BOMBS
from tests.conftest import PATIENCE_SECONDS, chat_rows, write_jsonl
from tests.data.test_changing_files import write_long
from tests.model.test_generation import UNTRUSTED as GENERATION
from tests.model.test_weights import DAMAGES, IMPOSSIBLE, change_config, change_weights, plain_adapter
from tests.saving.test_untrusted import (
    FORGED_FILES,
    KEY,
    LARGE_CONFIGS,
    PATTERNS,
    PICKLED_CASES,
    STORED,
    change,
    pickled_tensors,
    plain_pickle,
    torch_pickle,
    write_compressed_pickle,
    write_sparse,
)
from tests.test_paths import REASONS, occupy
from tests.test_sandbox import TEMPLATES, TOKENIZERS

SECONDS, MEGABYTES = 5, 1000
"""Limits of CPU time and peak memory beyond those of the imports."""
MAX_ARGUMENT_BYTES = 100_000
"""Linux passes no longer argument."""
CONFIG_YAML = "output_dir: run\nmodel: {name_or_path: base}\ndata: {train: [{path: rows.jsonl}], cache_dir: cache}\n"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
COMMANDS: dict[str, list[str]] = {
    "plan": ["plan", "--no-estimate", "--config", "run.yaml"],
    "merge": ["merge", "adapter", "out", "--base", "base"],
    "export": ["export", "adapter", "out", "--format", "peft-bin", "--base", "base"],
    "generate": ["generate", "--adapter", "adapter", "--base", "base", "--max-new-tokens", "2", "hello"],
}


class Attack(NamedTuple):
    """A command and what is done to its inputs before it runs."""

    command: str
    prepare: Callable[[Path], object]
    """Gets the folder with the inputs; returns a list of more arguments, an output path, or anything else."""
    code: int = 2


class Out(NamedTuple):
    """An output path, instead of `out`."""

    path: Path


class Cost(NamedTuple):
    """How a process ended, and what it took."""

    code: int
    seconds: float
    megabytes: float
    output: str
    errors: str


def measure(arguments: list[str], folder: Path) -> Cost:
    """Run `lora-accel …` in a folder, in a fork of a process that has imported everything; without arguments nothing.

    It takes a tenth of the time of a new interpreter, which most inputs would only spend in imports.
    """
    output, errors = folder.parent / "stdout", folder.parent / "stderr"
    usage = forked.measure(arguments, folder, ENVIRONMENT, PATIENCE_SECONDS // 10, output, errors)
    return Cost(*usage, *map(read, (output, errors)))


def read(file: Path) -> str:
    return file.read_text("utf-8", "replace")


def put_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def put_device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def store(folder: Path, tensor: torch.Tensor, *, pickled: bool = False) -> None:
    """Put a tensor into the adapter, in safetensors or in a pickle."""
    file = folder / "adapter" / WEIGHTS
    tensors = load_file(file) | {KEY: tensor}
    if pickled:
        file.unlink()
        torch.save(tensors, folder / "adapter" / PICKLED)
    else:
        save_file(tensors, file)


def pickle_bomb(folder: Path, make: Callable[[Path], bytes]) -> None:
    (folder / "adapter" / WEIGHTS).unlink()
    (folder / "adapter" / PICKLED).write_bytes(make(folder / "canary"))


def edit_json(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def rows(folder: Path, name: str) -> list[str]:
    return [f"data.train=[{{path: {folder / name}}}]"]


def long_rows(folder: Path, name: str) -> list[str]:
    write_long(folder / name, 50_000_000)
    return rows(folder, name)


def gzip_bomb(folder: Path, byte: bytes) -> list[str]:
    (folder / "bomb.jsonl.gz").write_bytes(gzip.compress(byte * 20_000_000) * 100)
    return rows(folder, "bomb.jsonl.gz")


def adapter_attacks() -> Iterator[tuple[str, Attack]]:
    """Yield adapters whose config or tensors are untrusted or extreme."""
    for name, (values, _) in LARGE_CONFIGS.items():
        yield f"adapter config: {name}", Attack("merge", lambda folder, v=values: change(folder / "adapter", **v))
    for number, values in enumerate(PATTERNS):
        yield f"exponential pattern {number}", Attack("merge", lambda folder, v=values: change(folder / "adapter", **v))
    for name, (data, _) in FORGED_FILES.items():
        yield f"safetensors: {name}", Attack("generate", lambda f, d=data: (f / "adapter" / WEIGHTS).write_bytes(d))
    for name, dtype in STORED.items():
        yield f"safetensors: {name}", Attack("export", lambda f, t=dtype: store(f, torch.ones(4, 32).to(t)))
    yield "safetensors: 0-dim", Attack("merge", lambda folder: store(folder, torch.tensor(1.0)))
    yield "safetensors: 8 TB of holes", Attack("merge", lambda folder: write_sparse(folder / "adapter"))
    for name in PICKLED_CASES:
        yield f"pickle: {name}", Attack("export", lambda f, n=name: store(f, pickled_tensors()[n], pickled=True))
    yield "pickle: compressed", Attack("merge", lambda folder: write_compressed_pickle(folder / "adapter"))
    for make in (plain_pickle, torch_pickle):
        yield f"pickle: code, {make.__name__}", Attack("generate", functools.partial(pickle_bomb, make=make))


def base_attacks() -> Iterator[tuple[str, Attack]]:
    """Yield bases whose config, weights, tokenizer or template are untrusted or extreme."""
    for name, (source, _) in TEMPLATES.items():
        yield f"template: {name}", Attack("plan", lambda f, s=source: (f / "base/chat_template.jinja").write_text(s))
    for name, parts in TOKENIZERS.items():
        yield f"tokenizer: {name}", Attack("generate", lambda f, v=parts: edit_json(f / "base/tokenizer.json", v))
    for name, (values, _) in IMPOSSIBLE.items():
        yield f"base config: {name}", Attack("generate", lambda f, v=values: change_config(f / "base", **v))
    for name, (damage, _) in DAMAGES.items():
        yield f"base weights: {name}", Attack("merge", lambda f, d=damage: change_weights(f / "base", d))
    for name, values in GENERATION.items():
        edit = lambda f, v=values: edit_json(f / "base/generation_config.json", v)  # noqa: E731
        yield f"generation config: {name}", Attack("generate", edit, code=0)  # replies are greedy, whatever it asks for


def config_attacks() -> Iterator[tuple[str, Attack]]:
    """Yield run configs and data files that would take too much."""
    for number, (text, _) in enumerate(YAML_BOMBS):
        yield (
            f"YAML {number}: {text[:24]!r}",
            Attack("plan", lambda f, t=text: (f / "run.yaml").write_text(CONFIG_YAML + t)),
        )
    for number, (overrides, _) in enumerate(EXTREME_OVERRIDES):
        if max(map(len, overrides)) < MAX_ARGUMENT_BYTES:
            yield f"override {number}: {overrides[0][:40]!r}", Attack("plan", lambda f, o=overrides: list(o))
    for name in ("a.jsonl", "a.jsonl.gz", "a.json", "a.csv", "a.parquet", "a.txt"):
        yield f"50 MB in one row of {name}", Attack("plan", functools.partial(long_rows, name=name))
    for byte in (b"\0", b"\n"):
        yield f"2 GB of {byte!r} in 2 MB of gzip", Attack("plan", functools.partial(gzip_bomb, byte=byte))


def path_attacks() -> Iterator[tuple[str, Attack]]:
    """Yield FIFOs and devices instead of each input, and outputs that cannot be written."""
    paths = {
        "run.yaml": "plan",
        "rows.jsonl": "plan",
        "base/config.json": "plan",
        "base/tokenizer.json": "plan",
        "base/tokenizer_config.json": "plan",
        "base/chat_template.jinja": "plan",
        "base/model.safetensors": "merge",
        f"adapter/{CONFIG}": "merge",
        f"adapter/{WEIGHTS}": "generate",
    }
    for path, command in paths.items():
        for put in (put_fifo, put_device):
            yield f"{put.__name__[4:]} as {path}", Attack(command, lambda f, p=path, put=put: put(f / p))
    for kind in ("fifo", "device"):
        put = put_fifo if kind == "fifo" else put_device
        yield f"{kind} as prompts", Attack("generate", functools.partial(prompts, put=put))
    for kind in REASONS:
        if kind not in ("NUL", "surrogate"):  # no argument of a process
            yield f"out: {kind}", Attack("merge", functools.partial(occupied_out, kind=kind))


def prompts(folder: Path, put: Callable[[Path], None]) -> list[str]:
    (folder / "prompts.jsonl").touch()
    put(folder / "prompts.jsonl")
    return ["--prompts", "prompts.jsonl"]


def occupied_out(folder: Path, kind: str) -> Out:
    return Out(occupy(folder / "out", kind))


ATTACKS = dict([*adapter_attacks(), *base_attacks(), *config_attacks(), *path_attacks()])
EVERYDAY = ("adapter config: target_modules", "safetensors: 8 TB of holes")
"""Run without `--faults` too."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Path]) -> Path:
    """Return a folder with valid inputs of all commands."""
    root = tmp_path_factory.mktemp("inputs")
    shutil.copytree(tiny_model(), root / "base")
    plain_adapter(root / "base", root / "adapter")
    write_jsonl(root / "rows.jsonl", chat_rows(4))
    (root / "run.yaml").write_text(CONFIG_YAML, encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def report(request: pytest.FixtureRequest) -> Iterator[list[str]]:
    """Return lines that the terminal shows at the end."""
    lines: list[str] = []
    yield lines
    plugins = request.config.pluginmanager
    terminal, capture = plugins.getplugin("terminalreporter"), plugins.getplugin("capturemanager")
    if terminal is not None:  # a worker of pytest-xdist has none
        with capture.global_and_fixture_disabled():
            terminal.write_line(f"\n{'input':60} {'command':9} exit  CPU s    MB")
            for line in lines:
                terminal.write_line(line)


@pytest.fixture(scope="module")
def nothing(tmp_path_factory: pytest.TempPathFactory) -> Cost:
    """Return what a fork takes that does nothing."""
    folder = tmp_path_factory.mktemp("nothing") / "inner"
    folder.mkdir()
    return measure([], folder)


@pytest.mark.launch
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in EVERYDAY else pytest.mark.slow) for name in ATTACKS]
)
def test_untrusted_input(name: str, inputs: Path, tmp_path: Path, report: list[str], nothing: Cost) -> None:
    """Run an attack in a copy of the inputs, and check how it ended and what it took beyond the imports."""
    folder = tmp_path / "inner"
    attack = ATTACKS[name]
    shutil.copytree(inputs, folder)
    prepared, command = attack.prepare(folder), COMMANDS[attack.command]
    if isinstance(prepared, list):
        command = [*command, *prepared]
    elif isinstance(prepared, Out):
        command = [str(prepared.path) if part == "out" else part for part in command]
    cost = measure(command, folder)
    seconds, megabytes = cost.seconds - nothing.seconds, cost.megabytes - nothing.megabytes
    report.append(f"{name[:60]:60} {attack.command:9} {cost.code:4} {seconds:6.1f} {megabytes:5.0f}")
    assert cost.code == attack.code, cost.errors[-3000:]
    assert cost.errors.count("error: ") == (attack.code == 2), cost.errors[-3000:]
    assert "Traceback" not in cost.errors + cost.output
    assert seconds < SECONDS
    assert megabytes < MEGABYTES
    assert not (folder / "canary").exists()
    assert not (folder / "run").exists()
