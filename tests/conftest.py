"""Shared fixtures and helpers: a tokenizer and models that train in a second, rows, and functions that run commands.

Nothing is downloaded. Weights follow a formula instead of a random generator, so tests can compare with stored losses.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

# The data cache of the tests is deleted after them. Set before huggingface_hub reads it; child processes inherit it.
if "lora-accel-tests-" not in os.environ.get("HF_HOME", ""):
    os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="lora-accel-tests-")
    atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)

# Only tests/cuda uses GPUs. Set before CUDA is initialized; child processes inherit it.
if not any("tests/cuda" in argument for argument in sys.argv) and "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

# nohup ignores this signal, and child processes inherit that.
signal.signal(signal.SIGHUP, signal.SIG_DFL)

from scripts.extensions_dir import extensions_dir

# DeepSpeed's extensions are built once for all tests, apart from unfinished builds of other programs.
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(extensions_dir()))

import hypothesis
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from lora_accel import cli
from lora_accel.config.schema import RunConfig
from lora_accel.console import show_logs
from tests import forked
from tests.tiers import ProcessGuard, outside_samples, select_fast_tests

if TYPE_CHECKING:
    from tests.distributed.forked import Forks

forked.skip_fsync()

PATIENCE_SECONDS = 1200
"""Timeout of a process that hangs: many times the duration of any test on a slow, busy machine."""
PROCESS_GUARD = ProcessGuard()
ROOT = Path(__file__).parent.parent
SHARED_DATA = ROOT.parent / "shared" / "data"
SMOLLM = ROOT / "models" / "SmolLM2-135M-Instruct"

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TINY = {
    "llama": {"num_key_value_heads": 2, "intermediate_size": 64, "hidden_size": 32, "num_hidden_layers": 2},
    "qwen2": {"num_key_value_heads": 2, "intermediate_size": 64, "hidden_size": 32, "num_hidden_layers": 2},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32, "hidden_size": 32, "num_hidden_layers": 2, "dropout": 0.0},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0},
}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--write-reference` and the options that select a tier."""
    parser.addoption(
        "--write-reference", action="store_true", help="write the reference losses instead of comparing with them"
    )
    parser.addoption(
        "--fast", action="store_true", help="run only tests that start no process and train for less than 1 s"
    )
    parser.addoption(
        "--faults", action="store_true", help="run the fault matrices too: kill and stop at every fault point; hours"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Set hypothesis's examples for the tier; let Ctrl-C reach the processes of tests in the background too."""
    max_examples = 20 if config.getoption("--fast") else 300 if config.getoption("--faults") else 100
    hypothesis.settings.register_profile("tier", max_examples=max_examples)
    hypothesis.settings.load_profile("tier")
    show_logs()  # as the commands do
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # started with `&`, which child processes inherit
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip slow tests without `--faults`; select the fast tier with `--fast` (tests/tiers.py)."""
    if not config.getoption("--faults"):
        outside = outside_samples(items)
        for item in items:
            if item.get_closest_marker("slow") or item in outside:
                item.add_marker(pytest.mark.skip(reason="slow; pass --faults"))
    if not config.getoption("--fast"):
        return
    selected = select_fast_tests(items)
    config.hook.pytest_deselected(items=[item for item in items if item not in selected])
    items[:] = [item for item in items if item in selected]


@pytest.fixture(autouse=True)
def _no_process_in_the_fast_tier(request: pytest.FixtureRequest) -> Iterator[None]:
    with PROCESS_GUARD.active() if request.config.getoption("--fast") else contextlib.nullcontext():
        yield


@pytest.fixture(scope="session")
def tokenizer_factory() -> Callable[..., PreTrainedTokenizerFast]:
    """Return a function that trains a small byte-level BPE tokenizer with chatml's markers as special tokens."""

    def make(**options: Any) -> PreTrainedTokenizerFast:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        specials = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
        trainer = trainers.BpeTrainer(
            vocab_size=400, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        )
        tokenizer.train_from_iterator(
            ["user assistant system hello world the answer is", "one two three"] * 20, trainer
        )
        defaults = {"eos_token": "<|im_end|>", "unk_token": "<unk>", "pad_token": "<|im_end|>"}
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **(defaults | options))
        fast.chat_template = options.get("chat_template", CHATML)
        return fast

    return make


@pytest.fixture(scope="session")
def tokenizer(tokenizer_factory: Callable[..., PreTrainedTokenizerFast]) -> PreTrainedTokenizerFast:
    """Return the tokenizer of the tiny models."""
    return tokenizer_factory()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Callable[..., Path]:
    """Return a function that saves a tiny model and returns its folder: `tiny_model("gpt2", dtype=torch.bfloat16)`."""
    folders: dict[tuple[str, torch.dtype], Path] = {}

    def make(family: str = "llama", dtype: torch.dtype = torch.float32) -> Path:
        if (family, dtype) not in folders:
            folder = tmp_path_factory.mktemp(f"{family}-{str(dtype).removeprefix('torch.')}")
            heads = {} if family == "gpt2" else {"num_attention_heads": 4}
            config = AutoConfig.for_model(
                family,
                vocab_size=len(tokenizer),
                max_position_embeddings=256,
                bos_token_id=1,
                eos_token_id=4,
                pad_token_id=4,
                **heads,
                **TINY[family],
            )
            model = AutoModelForCausalLM.from_config(config)
            fill_by_formula(model)
            model.to(dtype).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            folders[family, dtype] = folder
        return folders[family, dtype]

    return make


def fill_by_formula(model: torch.nn.Module) -> None:
    """Set each weight from its name and index, with the spread of a normal initialization."""
    for name, parameter in model.named_parameters():
        index = torch.arange(parameter.numel(), dtype=torch.float64)
        phase = sum(map(ord, name)) % 97
        noise = torch.frac(torch.sin(index * 12.9898 + phase) * 43758.5453)  # in (-1, 1)
        is_norm = parameter.ndim == 1 and name.endswith("weight")
        values = 1 + 0.1 * noise if is_norm else 0.15 * noise
        parameter.data = values.reshape(parameter.shape).to(parameter.dtype)


def chat_rows(count: int) -> list[dict[str, Any]]:
    """Return conversations of different lengths; every third one has two turns."""
    words = ["alpha", "bravo", "charlie", "delta", "echo", "foxtrot", "golf", "hotel", "india"]
    rows = []
    for i in range(count):
        question = " ".join(words[(i * 5 + k) % len(words)] for k in range(1 + i % 7))
        messages = [
            {"role": "user", "content": f"say {question}"},
            {"role": "assistant", "content": f"{question} {i}"},
        ]
        if i % 3 == 0:
            messages += [{"role": "user", "content": "again"}, {"role": "assistant", "content": question.upper()}]
        rows.append({"messages": messages})
    return rows


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    """Write one row per line and return the path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    """Return a file of 21 training rows: 6 steps per epoch of 4 examples, the last step of one."""
    return write_jsonl(tmp_path / "rows.jsonl", chat_rows(21))


@pytest.fixture
def make_config(tmp_path: Path, tiny_model: Callable[..., Path], rows_file: Path) -> Callable[..., RunConfig]:
    """Return a function that makes a run config on the tiny model: `make_config(training={...})` changes a section."""

    return functools.partial(run_config, tmp_path / "run", tiny_model(), rows_file)


def run_config(folder: Path, model: Path, rows: Path, /, **changes: Any) -> RunConfig:
    """Return the config of a run in `folder`. A dict of `changes` changes a section, another value replaces it."""
    values: dict[str, Any] = {
        "output_dir": str(folder),
        "model": {"name_or_path": str(model)},
        "adapter": {"r": 4, "alpha": 8, "dropout": 0.1, "target_modules": "all-linear"},
        "data": {"train": [{"path": str(rows)}], "max_length": 200},
        # float32 on every machine; tests/model/test_device.py covers `auto`.
        "training": {"epochs": 1, "batch_size": 4, "micro_batch_tokens": 256, "learning_rate": 3e-2}
        | {"mixed_precision": "no"},
        "checkpoint": {"every_steps": 2},
        "logging": {"trackers": [], "report": False},
    }
    for key, change in changes.items():
        values[key] = values.get(key, {}) | change if isinstance(change, dict) else change
    return RunConfig.model_validate(values)


@pytest.fixture
def config_file(tmp_path: Path) -> Callable[[RunConfig], Path]:
    """Return a function that writes a run config to a file and returns its path."""
    from lora_accel.config.files import config_to_yaml

    def write(config: RunConfig) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(config_to_yaml(config), encoding="utf-8")
        return path

    return write


def run_code(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python code in a separate process."""
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": ""} | environment,
        cwd=ROOT,
        check=False,
    )


def run_module(
    *args: str | Path, env: dict[str, str] | None = None, fresh: bool = False, folder: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    """Run `python -m …` in a separate process and wait for it.

    Args:
        env: changes to the environment.
        fresh: whether to start a new interpreter instead of a fork of one that has imported everything.
        folder: the working directory.
    """
    command = ["-m", *map(str, args)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | (env or {})
    if not fresh:
        return forked.run(command, environment, PATIENCE_SECONDS, folder)
    return subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        env=environment,
        cwd=folder,
        check=False,
    )


class CommandResult(NamedTuple):
    """The exit code and the output of a command."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., CommandResult]:
    """Return a function that runs `lora-accel …` in this process, without the seconds that imports take."""

    def run(*args: str | Path) -> CommandResult:
        monkeypatch.setattr(sys, "argv", ["lora-accel", *map(str, args)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_info:
            cli.main()
        return CommandResult(int(exit_info.value.code or 0), *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Forks:
    """Return a launcher of training processes that start fast."""
    from tests.distributed.forked import Forks

    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return Forks(tmp_path_factory.mktemp("forks"))


def read_metrics(folder: Path, kind: str = "train") -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl of one kind."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line["kind"] == kind]


@pytest.fixture(autouse=True)
def _fresh_accelerator_state() -> Iterator[None]:
    """Reset Accelerate's state after each test."""
    yield
    reset_accelerator()


def reset_accelerator() -> None:
    """Reset Accelerate's state, as in a new process: it is stored in its classes."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
