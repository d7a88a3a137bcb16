"""The package and its commands from outside: what they import, print, and answer to a wrong request."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import lora_accel
from lora_accel import RunConfig, run_training
from lora_accel.config.files import config_to_yaml
from lora_accel.saving.atomic import why_invalid
from tests.conftest import ROOT, Told, chat_rows, read_metrics, run_module, write_jsonl

HEAVY = ("torch", "transformers", "peft", "accelerate", "datasets", "deepspeed", "bitsandbytes")

# Runs a command within the process, then tells its exit code and which heavy packages it has imported.
PROBE = f"""
import sys
sys.argv = ["lora-accel", *sys.argv[1:]]
code = 0
try:
    exec(sys.argv.pop())
except SystemExit as stopped:
    code = stopped.code
print("HEAVY", code or 0, *[name for name in {HEAVY!r} if name in sys.modules])
"""


def imported_by(statement: str, *arguments: str) -> tuple[int, list[str]]:
    """Return the exit code of a statement and the heavy packages that it imports, in a process of its own."""
    command = [sys.executable, "-c", PROBE, *arguments, statement]
    told = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    _, code, *names = told.stdout.splitlines()[-1].split()
    return int(code), names


CLI = "from lora_accel.cli import main; main()"


def test_importing_the_package_imports_nothing_heavy() -> None:
    assert imported_by("import lora_accel; lora_accel.RunConfig; lora_accel.read_config") == (0, [])


@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",),
        ("plan", "--help"),
        ("merge", "--help"),
        ("generate", "--help"),
        ("evaluate", "--help"),
        ("plan", "--schema"),
    ],
    ids=" ".join,
)
def test_help_and_schema_import_nothing_heavy(arguments: tuple[str, ...]) -> None:
    assert imported_by(CLI, *arguments) == (0, [])


def test_training_says_its_help_without_torch() -> None:
    assert imported_by("from lora_accel.train import main; sys.exit(main(sys.argv[1:]))", "--help") == (0, [])


@pytest.mark.parametrize("command", ["plan", "evaluate", "train", "python -m lora_accel.train"])
@pytest.mark.parametrize("fault", ["absent", "unknown key", "no yaml"])
def test_a_bad_config_is_answered_without_torch(tmp_path: Path, command: str, fault: str) -> None:
    file = tmp_path / "config.yaml"
    if fault != "absent":
        file.write_text("train: {}\n" if fault == "unknown key" else "a: [")
    statement, arguments = CLI, [command]
    if command == "python -m lora_accel.train":
        statement, arguments = "from lora_accel.train import main; sys.exit(main(sys.argv[1:]))", []
    assert imported_by(statement, *arguments, "--config", str(file)) == (2, [])


def test_the_probe_sees_what_is_imported() -> None:
    assert imported_by("import torch") == (0, ["torch"])


def test_every_exported_name_resolves() -> None:
    assert lora_accel.__all__
    for name in lora_accel.__all__:
        assert getattr(lora_accel, name).__name__ == name
    assert set(lora_accel.__all__) <= set(dir(lora_accel))
    with pytest.raises(AttributeError, match="has no attribute 'run_trainig'"):
        lora_accel.run_trainig  # noqa: B018


def test_train_stays_the_modules_name() -> None:
    import lora_accel.train

    assert lora_accel.train.__name__ == "lora_accel.train"


def test_the_version_is_that_of_the_distribution() -> None:
    assert importlib.metadata.version("lora-accel") == lora_accel.__version__


# Commands on a tiny trained adapter


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Path]) -> RunConfig:
    """The config of a finished run: run folder and eval rows are where it says."""
    folder = tmp_path_factory.mktemp("trained")
    values = {
        "output_dir": str(folder / "run"),
        "model": {"name_or_path": str(tiny_model())},
        "adapter": {"target_modules": "all-linear"},
        "data": {
            "train": [{"path": str(write_jsonl(folder / "rows.jsonl", chat_rows(12)))}],
            "eval": [{"path": str(write_jsonl(folder / "eval.jsonl", chat_rows(5)))}],
            "max_length": 200,
        },
        "training": {"max_steps": 3, "batch_size": 4, "learning_rate": 1e-2},
        "logging": {"trackers": []},
    }
    config = RunConfig.model_validate(values)
    (folder / "config.yaml").write_text(config_to_yaml(config), encoding="utf-8")
    run_training(config)
    return config


def adapter_of(config: RunConfig) -> Path:
    return Path(config.output_dir) / "adapter"


def file_of(config: RunConfig) -> Path:
    return Path(config.output_dir).parent / "config.yaml"


def test_plan_tells_the_plan_that_the_run_wrote(command: Callable[..., Told], trained: RunConfig) -> None:
    told = command("plan", "--config", file_of(trained), "--json")
    assert told.returncode == 0, told.stderr
    assert json.loads(told.stdout) == json.loads((Path(trained.output_dir) / "plan.json").read_text())


def test_plan_takes_overrides_and_ranks(command: Callable[..., Told], trained: RunConfig, tmp_path: Path) -> None:
    output = tmp_path / "planned"
    words = ("training.max_steps=7", f"output_dir={output}", "--ranks", "3", "--json")
    told = command("plan", "--config", file_of(trained), *words)
    plan = json.loads(told.stdout)
    assert (plan["total_steps"], plan["num_ranks"], plan["batch_size"]) == (7, 3, 4)
    assert not output.exists(), "planning writes nothing"


def test_plan_says_it_in_words(command: Callable[..., Told], trained: RunConfig) -> None:
    told = command("plan", "--config", file_of(trained))
    assert told.returncode == 0
    assert "12 rows" in told.stdout
    assert "4 examples over 1 rank" in told.stdout


def test_the_schema_describes_every_key(command: Callable[..., Told], trained: RunConfig) -> None:
    schema = json.loads(command("plan", "--schema").stdout)
    training = schema["$defs"]["TrainingSection"]
    assert training["properties"]["learning_rate"]["description"] == "Peak learning rate of AdamW."
    assert training["additionalProperties"] is False
    assert set(schema["properties"]) == set(RunConfig.model_fields)


def test_merge_makes_a_folder_and_tells_how_near_it_is(
    command: Callable[..., Told], trained: RunConfig, tmp_path: Path
) -> None:
    out = tmp_path / "merged"
    told = command("merge", adapter_of(trained), out, "--json")
    assert told.returncode == 0, told.stderr
    assert json.loads(told.stdout)["merged"]["agreement"]["moved"] < 1e-4
    assert why_invalid(out) is None
    again = command("merge", adapter_of(trained), out)
    assert again.returncode == 2
    assert "is there already" in again.stderr
    replaced = command("merge", adapter_of(trained), out, "--overwrite")
    assert replaced.returncode == 0
    assert replaced.stdout.startswith(f"merged: {out}")


def test_merge_takes_a_whole_run_and_a_weighted_combination_and_fastchats_names(
    command: Callable[..., Told], trained: RunConfig, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained.output_dir, run)
    told = command("merge", "--all", run)
    assert told.returncode == 0, told.stderr
    made = {path.name for path in (run / "merged").iterdir()}
    assert made == {"adapter", *(path.name for path in (run / "checkpoints").iterdir())}
    assert sum(line.startswith("merged: ") for line in told.stdout.splitlines()) == len(made)
    assert command("merge", "--all", run).stdout.count("merged already: ") == len(made)

    words = ("--lora-path", run / "adapter", "--base-model-path", trained.model.name_or_path)
    told = command("merge", *words, "--target-model-path", tmp_path / "fastchat")
    assert told.returncode == 0, told.stderr
    weights = "model.safetensors"
    assert (tmp_path / "fastchat" / weights).read_bytes() == (run / "merged" / "adapter" / weights).read_bytes()

    checkpoint = min((run / "checkpoints").iterdir())
    words = ("--adapter", f"{run / 'adapter'}=0.7", "--adapter", f"{checkpoint}=0.3")
    told = command("merge", *words, tmp_path / "combined", "--json", "--max-shard-size", "50KB")
    assert told.returncode == 0, told.stderr
    assert json.loads(told.stdout)["merged"]["adapter"] == {str(run / "adapter"): 0.7, str(checkpoint): 0.3}
    assert len(list((tmp_path / "combined").glob("*.safetensors"))) > 1


@pytest.fixture(scope="module")
def merged(trained: RunConfig) -> Path:
    out = Path(trained.output_dir) / "merged"
    lora_accel.merge_adapter(adapter_of(trained), out)
    return out


def test_generate_compares_base_adapter_and_merged(
    command: Callable[..., Told], trained: RunConfig, merged: Path
) -> None:
    words = ("--compare", "--json", "--max-new-tokens", "6", "say alpha", "hello")
    told = command("generate", "--adapter", adapter_of(trained), "--merged", merged, *words)
    assert told.returncode == 0, told.stderr
    answers = json.loads(told.stdout)
    assert [answer["prompt"] for answer in answers] == ["say alpha", "hello"]
    for answer in answers:
        assert set(answer) == {"prompt", "base", "base + adapter", "merged"}
        assert answer["merged"] == answer["base + adapter"]
    assert any(answer["base"] != answer["base + adapter"] for answer in answers)


def test_generate_without_compare_asks_the_adapter_alone(command: Callable[..., Told], trained: RunConfig) -> None:
    told = command("generate", "--adapter", adapter_of(trained), "--json", "--max-new-tokens", "3", "hello")
    ((answer),) = json.loads(told.stdout)
    assert set(answer) == {"prompt", "base + adapter"}
    in_words = command("generate", "--adapter", adapter_of(trained), "--max-new-tokens", "3", "hello")
    assert in_words.returncode == 0
    assert "base + adapter" in in_words.stdout


def test_evaluate_scores_all_three(trained: RunConfig, merged: Path) -> None:
    words = ("--adapter", adapter_of(trained), "--merged", merged, "--json", "--max-new-tokens", "4")
    # In a process of its own, since libraries print at import what would spoil JSON on stdout.
    told = run_module("lora_accel.cli", "evaluate", "--config", file_of(trained), *words, fresh=True)
    assert told.returncode == 0, told.stderr
    scores = {score["name"]: score for score in json.loads(told.stdout)}
    assert list(scores) == ["base", "base + adapter", "merged"]
    assert scores["base + adapter"]["eval_loss"] < scores["base"]["eval_loss"]
    assert scores["merged"]["eval_loss"] == pytest.approx(scores["base + adapter"]["eval_loss"], rel=1e-5)
    (in_training,) = read_metrics(Path(trained.output_dir), "eval")
    assert scores["base + adapter"]["eval_loss"] == pytest.approx(in_training["eval_loss"], rel=1e-6)
    assert {score["rows"] for score in scores.values()} == {5}
    assert all(0 <= score["exact_match"] <= 1 for score in scores.values())


# A wrong request: one message, exit code 2, no traceback, nothing written


def refused(told: Told, *parts: str) -> None:
    assert told.returncode == 2
    assert "Traceback" not in told.stderr
    lines = [line for line in told.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, told.stderr
    for part in parts:
        assert part in lines[0]


@pytest.mark.parametrize("kind", ["absent", "empty", "a file"])
@pytest.mark.parametrize("verb", ["merge", "generate", "generate --base", "evaluate"])
def test_a_missing_adapter_is_one_message(
    command: Callable[..., Told], trained: RunConfig, tmp_path: Path, verb: str, kind: str
) -> None:
    adapter = tmp_path / "no-adapter"
    if kind == "empty":
        adapter.mkdir()
    elif kind == "a file":
        adapter.write_text("mine")
    words: dict[str, tuple[str | Path, ...]] = {
        "merge": ("merge", adapter, tmp_path / "merged"),
        "generate": ("generate", "--adapter", adapter, "hello"),
        "generate --base": ("generate", "--adapter", adapter, "--base", trained.model.name_or_path, "hello"),
        "evaluate": ("evaluate", "--config", file_of(trained), "--adapter", adapter),
    }
    refused(command(*words[verb]), "no-adapter", "adapter")
    assert not (tmp_path / "merged").exists()


def test_an_adapter_whose_base_is_gone_is_one_message(
    command: Callable[..., Told], trained: RunConfig, tmp_path: Path
) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(adapter_of(trained), adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "gone")
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    refused(command("merge", adapter, tmp_path / "merged"), "gone")
    refused(command("generate", "--adapter", adapter, "hello"), "gone")


@pytest.mark.parametrize("verb", ["generate", "evaluate"])
def test_a_missing_merged_model_is_told_before_the_others_are_asked(
    command: Callable[..., Told], trained: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    from lora_accel.model import base

    def load(*_: object) -> None:
        pytest.fail("a model was loaded first")

    monkeypatch.setattr(base, "load_base_model", load)
    words: tuple[str | Path, ...] = ("generate", "hello")
    if verb == "evaluate":
        words = ("evaluate", "--config", file_of(trained))
    told = command(*words, "--adapter", adapter_of(trained), "--merged", tmp_path / "no-model")
    refused(told, "no-model")
    if verb == "evaluate":
        refused(command(*words, "--adapter", tmp_path / "no-adapter"), "no-adapter")


def test_evaluate_without_rows_is_one_message(command: Callable[..., Told], trained: RunConfig) -> None:
    refused(command("evaluate", "--config", file_of(trained), "data.eval=[]"), "data.eval")


def test_plan_without_a_config_is_one_message(command: Callable[..., Told]) -> None:
    refused(command("plan"), "--config FILE is missing")


@pytest.mark.parametrize("words", [("plam",), ("merge", "--outt"), ("plan", "--rnaks", "2"), ("plan", "--ranks", "0")])
def test_a_word_that_the_command_line_does_not_know_is_exit_code_2(
    command: Callable[..., Told], words: tuple[str, ...]
) -> None:
    told = command(*words)
    assert told.returncode == 2
    assert "Traceback" not in told.stderr
    assert "Usage: " in told.stderr
