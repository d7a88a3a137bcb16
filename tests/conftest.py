"""What tests share: a tokenizer and models small enough to train in a second, rows, and ways to run the commands.

Nothing is fetched. Weights are made by a formula, not by a generator, so that losses can be written down.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

# Tokenised data of tests go with them; set before the Hub's library reads it. Processes that tests start, and
# kill, have it from them.
if "lora-accel-tests-" not in os.environ.get("HF_HOME", ""):
    os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="lora-accel-tests-")
    atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)

# Where tests are begun with nohup, this signal is ignored, by all processes that they start too.
signal.signal(signal.SIGHUP, signal.SIG_DFL)

from scripts.extensions_dir import extensions_dir

# DeepSpeed's extensions are built once for all tests, and a build that another program left half done hinders none.
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(extensions_dir()))

import hypothesis
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from lora_accel import cli
from lora_accel.config.schema import RunConfig
from tests import forked
from tests.tiers import Guard, fast

PATIENCE_SECONDS = 1200
"""After so long a process hangs: many times what one takes on a slow machine that is busy."""
GUARD = Guard()
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
    """`--write-reference` writes tests/reference/ anew instead of comparing with it; the others choose a tier."""
    parser.addoption("--write-reference", action="store_true", help="write the reference losses anew")
    parser.addoption(
        "--fast", action="store_true", help="only tests that start no process and train no longer than 1 s"
    )
    parser.addoption("--faults", action="store_true", help="kill at every place, stop everywhere: hours, not minutes")


def pytest_configure(config: pytest.Config) -> None:
    """Let hypothesis try fewer examples in the fast tier."""
    hypothesis.settings.register_profile("tier", max_examples=20 if config.getoption("--fast") else 300)
    hypothesis.settings.load_profile("tier")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is slow, unless it is asked for; see tests/tiers.py for the fast tier."""
    if not config.getoption("--faults"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow; say --faults"))
    if not config.getoption("--fast"):
        return
    kept = fast(items)
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


@pytest.fixture(autouse=True)
def _no_process_in_the_fast_tier(request: pytest.FixtureRequest) -> Iterator[None]:
    with GUARD.on() if request.config.getoption("--fast") else contextlib.nullcontext():
        yield


@pytest.fixture(scope="session")
def tokenizer_factory() -> Callable[..., PreTrainedTokenizerFast]:
    """A byte-level BPE tokenizer trained on a few lines, with chatml's markers as special tokens."""

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
    """The tokenizer of the tiny models."""
    return tokenizer_factory()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Callable[..., Path]:
    """Make the folder of a tiny model of a family: `tiny_model("gpt2", dtype=torch.bfloat16)`."""
    made: dict[tuple[str, torch.dtype], Path] = {}

    def make(family: str = "llama", dtype: torch.dtype = torch.float32) -> Path:
        if (family, dtype) not in made:
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
            made[family, dtype] = folder
        return made[family, dtype]

    return make


def fill_by_formula(model: torch.nn.Module) -> None:
    """Set each weight from its name and index alone, spread like an ordinary initialisation."""
    for name, parameter in model.named_parameters():
        index = torch.arange(parameter.numel(), dtype=torch.float64)
        phase = sum(map(ord, name)) % 97
        noise = torch.frac(torch.sin(index * 12.9898 + phase) * 43758.5453)  # in (-1, 1)
        around_one = parameter.ndim == 1 and name.endswith("weight")  # norms
        values = 1 + 0.1 * noise if around_one else 0.15 * noise
        parameter.data = values.reshape(parameter.shape).to(parameter.dtype)


def chat_rows(count: int) -> list[dict[str, Any]]:
    """Conversations of uneven length, some of two rounds."""
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
    """Write rows, one a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    """21 training rows: with 4 examples a step, 6 steps an epoch, the last one short."""
    return write_jsonl(tmp_path / "rows.jsonl", chat_rows(21))


@pytest.fixture
def make_config(tmp_path: Path, tiny_model: Callable[..., Path], rows_file: Path) -> Callable[..., RunConfig]:
    """A run config on the tiny model; sections given by name are merged in: `make_config(training={...})`."""

    def make(**changes: Any) -> RunConfig:
        values: dict[str, Any] = {
            "output_dir": str(tmp_path / "run"),
            "model": {"name_or_path": str(tiny_model())},
            "adapter": {"r": 4, "alpha": 8, "dropout": 0.1, "target_modules": "all-linear"},
            "data": {"train": [{"path": str(rows_file)}], "max_length": 200},
            # float32 on every machine: what `auto` chooses is a matter of tests/model/test_device.py.
            "training": {"epochs": 1, "batch_size": 4, "micro_batch_tokens": 256, "learning_rate": 3e-2}
            | {"mixed_precision": "no"},
            "checkpoint": {"every_steps": 2},
            "logging": {"trackers": []},
        }
        for key, change in changes.items():
            values[key] = values.get(key, {}) | change if isinstance(change, dict) else change
        return RunConfig.model_validate(values)

    return make


@pytest.fixture
def config_file(tmp_path: Path) -> Callable[[RunConfig], Path]:
    """Write a run config to a file."""
    from lora_accel.config.files import config_to_yaml

    def write(config: RunConfig) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(config_to_yaml(config), encoding="utf-8")
        return path

    return write


def run_code(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a few lines in a process of their own."""
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
    *words: str | Path, env: dict[str, str] | None = None, fresh: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run `python -m …` to its end in a process of its own.

    Args:
        env: changes of the environment.
        fresh: a new interpreter, which imports everything itself; else a fork that has imported it.
    """
    command = ["-m", *map(str, words)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | (env or {})
    if not fresh:
        return forked.run(command, environment, PATIENCE_SECONDS)
    return subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        env=environment,
        cwd=ROOT,
        check=False,
    )


class Told(NamedTuple):
    """What a command answered."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Told]:
    """Run `lora-accel …` within this process, which saves the seconds that importing takes."""

    def run(*words: str | Path) -> Told:
        monkeypatch.setattr(sys, "argv", ["lora-accel", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return Told(int(stopped.value.code or 0), *capsys.readouterr())

    return run


def read_metrics(folder: Path, kind: str = "train") -> list[dict[str, Any]]:
    """Read the lines of one kind of metrics.jsonl."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line["kind"] == kind]


@pytest.fixture(autouse=True)
def _fresh_accelerator_state() -> Iterator[None]:
    """Accelerate keeps its state in the class; each test begins without it."""
    from accelerate.state import AcceleratorState, GradientState

    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
