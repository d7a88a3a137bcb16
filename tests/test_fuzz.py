"""Mutated run folders, adapters, bases, configs and data files: an exit code and one message, never a traceback.

Seeded and bounded: the same cases in every run. A few run always, 2,000 with `--faults`.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shutil
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from lora_accel import RunConfig, cli, run_training, train
from lora_accel.config.files import config_to_yaml
from tests.conftest import chat_rows, reset_accelerator, write_jsonl

SECONDS = 10
"""CPU seconds of one command and its child processes. The watchdog allows six times as many by the clock."""
CASES, ALL_CASES, BLOCK = 40, 2000, 100
TRAIN = "-m lora_accel.train"
"""Marks the command lines of the module that `accelerate launch` starts."""
VALUES = (None, True, -1, 0, 1.5, 10**30, float("nan"), float("inf"), "", "x" * 10_000, [], {}, [[]], {"a": 1})


class Inputs(NamedTuple):
    """Valid inputs of all commands, in one folder."""

    root: Path

    def commands(self, folder: Path) -> dict[str, list[str]]:
        """Return the command lines for a copy of the folder."""
        adapter, out = str(folder / "run" / "adapter"), str(folder / "out")
        checkpoint = str(folder / "run" / "checkpoints" / "step-00000001")
        config = ["--config", str(folder / "config.yaml"), f"data.cache_dir={folder / 'cache'}"]
        new_run = [*config, f"output_dir={folder / 'new'}"]
        base = ["--base", str(folder / "base")]
        return {
            "plan": ["plan", "--no-estimate", *config],
            "inspect": ["inspect", *config],
            "train": [TRAIN, *new_run],
            "resume from": [TRAIN, *new_run, f"checkpoint.resume={folder / 'run/checkpoints/step-00000001'}"],
            "resume": [TRAIN, *config],
            "chat": ["chat", "--adapter", adapter, *base, "--max-new-tokens", "1"],
            "evaluate": ["evaluate", *config, "--adapter", adapter, "--max-new-tokens", "1"],
            "generate": ["generate", "--adapter", adapter, *base, "--max-new-tokens", "1", "hello"],
            "checkpoint": ["generate", "--adapter", checkpoint, *base, "--max-new-tokens", "1", "hello"],
            "merge": ["merge", adapter, out, *base],
            "export": ["export", adapter, out, "--format", "loralib", *base],
            "checkpoints": ["checkpoints", str(folder / "run"), "--verify"],
        }


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Path]) -> Inputs:
    """Return the folder of a short run with its config, rows and base."""
    root = tmp_path_factory.mktemp("fuzz")
    shutil.copytree(tiny_model(), root / "base")
    write_jsonl(root / "rows.jsonl", chat_rows(8))
    values: dict[str, Any] = {
        "output_dir": "run",
        "model": {"name_or_path": "base"},
        "adapter": {"r": 2, "target_modules": ["q_proj", "v_proj"]},
        "data": {"train": [{"path": "rows.jsonl"}], "eval": [{"path": "rows.jsonl"}], "num_workers": 1},
        "training": {"max_steps": 2, "batch_size": 2, "mixed_precision": "no"},
        "checkpoint": {"every_steps": 1},
        "logging": {"trackers": [], "report": False},
    }
    config = RunConfig.model_validate(values)
    (root / "config.yaml").write_text(config_to_yaml(config), encoding="utf-8")
    with contextlib.chdir(root) if sys.version_info >= (3, 11) else _in_folder(root):
        run_training(config)
    # As if the run had been killed in its last step.
    shutil.rmtree(root / "run" / "checkpoints" / "step-00000002")
    return Inputs(root)


@contextlib.contextmanager
def _in_folder(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def mutate(folder: Path, rng: random.Random) -> str:
    """Damage one file of a folder; return what was done."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    texts = [file for file in files if file.suffix in (".json", ".yaml", ".jsonl")]
    file = rng.choice(texts if rng.random() < 0.6 else files)
    how = rng.choice([flip, truncate, empty, change_value, change_value, change_value, replace_by_other, rename, grow])
    detail = how(file, rng)
    return f"{how.__name__} {file.relative_to(folder)} {detail or ''}"


def flip(file: Path, rng: random.Random) -> None:
    """Flip a few bits."""
    data = bytearray(file.read_bytes())
    for _ in range(rng.choice([1, 8]) if data else 0):
        data[rng.randrange(min(len(data), 4096))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)


def truncate(file: Path, rng: random.Random) -> None:
    """Cut the end off."""
    os.truncate(file, rng.randrange(file.stat().st_size + 1))


def empty(file: Path, rng: random.Random) -> None:
    """Remove the content."""
    file.write_bytes(b"")


def rename(file: Path, rng: random.Random) -> None:
    """Move the file away."""
    file.rename(file.with_name(f"{file.name}.old"))


def grow(file: Path, rng: random.Random) -> None:
    """Append what does not belong there."""
    with file.open("ab") as stream:
        stream.write(rng.choice([b"\0" * 100, b"[" * 20_000, b"{", b"\xff\xfe", b"\n- a: [\n", rng.randbytes(300)]))


def replace_by_other(file: Path, rng: random.Random) -> str:
    """Replace the file by something else."""
    kind = rng.choice(["folder", "pipe", "dangling link", "link to a device", "link to itself"])
    file.unlink()
    if kind == "folder":
        file.mkdir()
    elif kind == "pipe":
        os.mkfifo(file)
    else:
        target = {"dangling link": "/nonexistent/x", "link to a device": "/dev/zero", "link to itself": file.name}
        file.symlink_to(target[kind])
    return kind


def change_value(file: Path, rng: random.Random) -> str:
    """Replace or delete a random value of a JSON file, or replace a word of another text."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
        number = rng.randrange(len(lines)) if file.suffix == ".jsonl" else 0
        value = json.loads(lines[number] if file.suffix == ".jsonl" else "".join(lines))
    except (ValueError, IndexError):
        data = file.read_bytes()
        words = data.split(b" ")
        words[rng.randrange(len(words))] = rng.choice([b"1e999", b"-1", b"[]", b"null", b"{a: b}", b"9" * 500, b"\0"])
        file.write_bytes(b" ".join(words))
        return "a word"
    parent: Any = value
    key: Any = None
    for _ in range(rng.randrange(1, 5)):
        inner = parent if key is None else parent[key]
        if not isinstance(inner, (dict, list)) or not inner:
            break
        parent, key = inner, rng.choice(sorted(inner) if isinstance(inner, dict) else range(len(inner)))
    if key is None:
        value = rng.choice(VALUES)
    elif rng.random() < 0.2:
        del parent[key]
    else:
        parent[key] = rng.choice(VALUES)
    if file.suffix == ".jsonl":
        lines[number] = json.dumps(value) + "\n"
        file.write_text("".join(lines), encoding="utf-8")
    else:
        file.write_text(json.dumps(value), encoding="utf-8")
    return str(key)


class Hang(BaseException):
    """A command took too long."""


def run(arguments: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[int, str]:
    """Run a command line in this process. Return its exit code and stderr; 98 for no end, 99 for another exception."""

    def stop(*_: object) -> None:
        raise Hang

    reset_accelerator()
    monkeypatch.setattr(sys, "argv", ["lora-accel", *arguments])
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
    output, errors = io.StringIO(), io.StringIO()
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(6 * SECONDS)  # the machine may be busy
    try:
        with _in_folder(folder), contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            if arguments[0] == TRAIN:
                return train.main(arguments[1:]), errors.getvalue()
            cli.main()
    except SystemExit as error:
        return int(error.code or 0), errors.getvalue()
    except Hang:
        return 98, f"no end after {6 * SECONDS} s"
    except BaseException:
        return 99, traceback.format_exc()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    return 0, errors.getvalue()


def cpu_seconds() -> float:
    """Return the CPU time of this process and of its children that have ended."""
    return sum(os.times()[:4])


def snapshot(folder: Path) -> set[tuple[str, int]]:
    """Return names and sizes of all files in a folder, those of its data cache excepted."""
    paths = [path for path in folder.rglob("*") if not path.is_dir() and "cache" not in path.relative_to(folder).parts]
    return {(str(path), path.lstat().st_size) for path in paths}


def run_cases(inputs: Inputs, numbers: range, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """Run the cases of some seeds. Fails with all tracebacks and hangs."""
    codes: Counter[int] = Counter()
    faults, slowest = [], (0.0, 0)
    for number in numbers:
        rng = random.Random(number)
        outer = tmp_path / f"{number}"
        folder = outer / "inner"
        shutil.copytree(inputs.root, folder, symlinks=True)
        done = ", ".join(mutate(folder, rng) for _ in range(rng.choice([1, 1, 2, 4])))
        name, arguments = rng.choice(sorted(inputs.commands(folder).items()))
        originals, copies, start = snapshot(inputs.root), snapshot(folder), cpu_seconds()
        code, errors = run(arguments, folder, monkeypatch)
        slowest = max(slowest, (cpu_seconds() - start, number))
        codes[code] += 1
        is_message = code == 0 or "error: " in errors or "Usage" in errors
        if code not in (0, 1, 2, 3) or "Traceback" in errors or not is_message:
            faults.append(f"case {number}: {name} after {done}: {code}\n{errors[-1500:]}")
        if {path.name for path in outer.iterdir()} != {"inner"} or snapshot(inputs.root) != originals:
            faults.append(f"case {number}: {name} after {done}: wrote outside its folder")
        if code == 2 and (changed := snapshot(folder) ^ copies):
            faults.append(f"case {number}: {name} after {done}: exit 2, but wrote {sorted(changed)[:5]}")
        if cpu_seconds() - start > SECONDS:
            faults.append(f"case {number}: {name} after {done}: {cpu_seconds() - start:.1f} CPU seconds")
        shutil.rmtree(outer)
    print(f"exit codes {dict(sorted(codes.items()))}; slowest: case {slowest[1]}, {slowest[0]:.1f} CPU seconds")
    assert not faults, f"{len(faults)} of {len(numbers)}\n" + "\n\n".join(faults)
    return codes


@pytest.mark.launch
def test_mutated_inputs_give_one_message(inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = run_cases(inputs, range(CASES), tmp_path, monkeypatch)
    assert codes[2] > 0
    assert codes[0] > 0


@pytest.mark.slow
@pytest.mark.parametrize("first", range(CASES, ALL_CASES, BLOCK))
def test_many_mutated_inputs_give_one_message(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: int
) -> None:
    run_cases(inputs, range(first, min(first + BLOCK, ALL_CASES)), tmp_path, monkeypatch)
