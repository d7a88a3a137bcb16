"""The package and its commands as a user sees them: imports, output and error messages."""

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
from tests.conftest import ROOT, CommandResult, chat_rows, read_metrics, run_module, write_jsonl

HEAVY = ("torch", "transformers", "peft", "accelerate", "datasets", "deepspeed", "bitsandbytes")

# Runs a command in this process, then prints its exit code and the heavy packages that it imported.
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
    """Return the exit code of a statement and the heavy packages that it imports, in a separate process."""
    command = [sys.executable, "-c", PROBE, *arguments, statement]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    _, code, *names = result.stdout.splitlines()[-1].split()
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


def test_help_of_training_does_not_import_torch() -> None:
    assert imported_by("from lora_accel.train import main; sys.exit(main(sys.argv[1:]))", "--help") == (0, [])


@pytest.mark.parametrize("command", ["plan", "evaluate", "train", "python -m lora_accel.train"])
@pytest.mark.parametrize("fault", ["absent", "unknown key", "no yaml"])
def test_a_bad_config_is_reported_without_importing_torch(tmp_path: Path, command: str, fault: str) -> None:
    file = tmp_path / "config.yaml"
    if fault != "absent":
        file.write_text("train: {}\n" if fault == "unknown key" else "a: [")
    statement, arguments = CLI, [command]
    if command == "python -m lora_accel.train":
        statement, arguments = "from lora_accel.train import main; sys.exit(main(sys.argv[1:]))", []
    assert imported_by(statement, *arguments, "--config", str(file)) == (2, [])


def test_the_probe_detects_imports() -> None:
    assert imported_by("import torch") == (0, ["torch"])


def test_every_exported_name_resolves() -> None:
    assert lora_accel.__all__
    for name in lora_accel.__all__:
        assert getattr(lora_accel, name).__name__ == name
    assert set(lora_accel.__all__) <= set(dir(lora_accel))
    with pytest.raises(AttributeError, match="has no attribute 'run_trainig'"):
        lora_accel.run_trainig  # noqa: B018


def test_lora_accel_train_is_the_module() -> None:
    import lora_accel.train

    assert lora_accel.train.__name__ == "lora_accel.train"


def test_the_version_matches_the_distribution() -> None:
    assert importlib.metadata.version("lora-accel") == lora_accel.__version__


# Commands on a tiny trained adapter


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Path]) -> RunConfig:
    """Return the config of a finished run."""
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
        "training": {"max_steps": 3, "batch_size": 4, "learning_rate": 1e-2, "mixed_precision": "no"},
        "logging": {"trackers": [], "report": False},
    }
    config = RunConfig.model_validate(values)
    (folder / "config.yaml").write_text(config_to_yaml(config), encoding="utf-8")
    run_training(config)
    return config


def adapter_of(config: RunConfig) -> Path:
    return Path(config.output_dir) / "adapter"


def file_of(config: RunConfig) -> Path:
    return Path(config.output_dir).parent / "config.yaml"


def test_plan_prints_the_plan_that_the_run_wrote(command: Callable[..., CommandResult], trained: RunConfig) -> None:
    result = command("plan", "--config", file_of(trained), "--json", "--no-estimate")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == json.loads((Path(trained.output_dir) / "plan.json").read_text())


def test_plan_takes_overrides_and_ranks(
    command: Callable[..., CommandResult], trained: RunConfig, tmp_path: Path
) -> None:
    output = tmp_path / "planned"
    args = ("training.max_steps=7", f"output_dir={output}", "--ranks", "3", "--json", "--no-estimate")
    result = command("plan", "--config", file_of(trained), *args)
    plan = json.loads(result.stdout)
    assert (plan["total_steps"], plan["num_ranks"], plan["batch_size"]) == (7, 3, 4)
    assert not output.exists(), "planning writes nothing"


def test_plan_prints_a_table(command: Callable[..., CommandResult], trained: RunConfig) -> None:
    result = command("plan", "--config", file_of(trained), "--no-estimate")
    assert result.returncode == 0
    assert "12 rows" in result.stdout
    assert "4 examples over 1 rank" in result.stdout


def test_the_schema_describes_every_key(command: Callable[..., CommandResult], trained: RunConfig) -> None:
    schema = json.loads(command("plan", "--schema").stdout)
    training = schema["$defs"]["TrainingSection"]
    assert training["properties"]["learning_rate"]["description"] == "Peak learning rate."
    assert training["additionalProperties"] is False
    assert set(schema["properties"]) == set(RunConfig.model_fields)


def test_merge_writes_a_folder_and_reports_how_close_it_is(
    command: Callable[..., CommandResult], trained: RunConfig, tmp_path: Path
) -> None:
    out = tmp_path / "merged"
    result = command("merge", adapter_of(trained), out, "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["merged"]["agreement"]["moved"] < 1e-4
    assert why_invalid(out) is None
    repeated = command("merge", adapter_of(trained), out)
    assert repeated.returncode == 2
    assert "already exists" in repeated.stderr
    replaced = command("merge", adapter_of(trained), out, "--overwrite")
    assert replaced.returncode == 0
    assert replaced.stdout.startswith(f"merged: {out}")


def test_merge_of_all_checkpoints_of_a_combination_and_with_fastchats_options(
    command: Callable[..., CommandResult], trained: RunConfig, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained.output_dir, run)
    result = command("merge", "--all", run)
    assert result.returncode == 0, result.stderr
    names = {path.name for path in (run / "merged-all").iterdir()}
    assert names == {"adapter", *(path.name for path in (run / "checkpoints").iterdir())}
    assert sum(line.startswith("merged: ") for line in result.stdout.splitlines()) == len(names)
    assert command("merge", "--all", run).stdout.count("already merged: ") == len(names)

    args = ("--lora-path", run / "adapter", "--base-model-path", trained.model.name_or_path)
    result = command("merge", *args, "--target-model-path", tmp_path / "fastchat")
    assert result.returncode == 0, result.stderr
    weights = "model.safetensors"
    assert (tmp_path / "fastchat" / weights).read_bytes() == (run / "merged-all" / "adapter" / weights).read_bytes()

    checkpoint = min((run / "checkpoints").iterdir())
    args = ("--adapter", f"{run / 'adapter'}=0.7", "--adapter", f"{checkpoint}=0.3")
    result = command("merge", *args, tmp_path / "combined", "--json", "--max-shard-size", "50KB")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["merged"]["adapter"] == {str(run / "adapter"): 0.7, str(checkpoint): 0.3}
    assert len(list((tmp_path / "combined").glob("*.safetensors"))) > 1


@pytest.fixture(scope="module")
def merged(trained: RunConfig) -> Path:
    out = Path(trained.output_dir) / "merged"
    lora_accel.merge_adapter(adapter_of(trained), out)
    return out


def test_generate_compares_base_adapter_and_merged(
    command: Callable[..., CommandResult], trained: RunConfig, merged: Path
) -> None:
    args = ("--compare", "--json", "--max-new-tokens", "6", "alpha bravo", "hello")
    result = command("generate", "--adapter", adapter_of(trained), "--merged", merged, *args)
    assert result.returncode == 0, result.stderr
    answers = json.loads(result.stdout)
    assert [answer["prompt"] for answer in answers] == ["alpha bravo", "hello"]
    for answer in answers:
        assert set(answer) == {"prompt", "base", "base + adapter", "merged"}
        assert answer["merged"] == answer["base + adapter"]
    assert any(answer["base"] != answer["base + adapter"] for answer in answers)


def test_generate_without_compare_uses_only_the_adapter(
    command: Callable[..., CommandResult], trained: RunConfig
) -> None:
    result = command("generate", "--adapter", adapter_of(trained), "--json", "--max-new-tokens", "3", "hello")
    ((answer),) = json.loads(result.stdout)
    assert set(answer) == {"prompt", "base + adapter"}
    as_text = command("generate", "--adapter", adapter_of(trained), "--max-new-tokens", "3", "hello")
    assert as_text.returncode == 0
    assert "base + adapter" in as_text.stdout


def test_evaluate_scores_all_three(trained: RunConfig, merged: Path) -> None:
    args = ("--adapter", adapter_of(trained), "--merged", merged, "--json", "--max-new-tokens", "4")
    # In a separate process: what libraries print when they are imported must not end up in the JSON on stdout.
    result = run_module("lora_accel.cli", "evaluate", "--config", file_of(trained), *args, fresh=True)
    assert result.returncode == 0, result.stderr
    scores = {score["name"]: score for score in json.loads(result.stdout)}
    assert list(scores) == ["base", "base + adapter", "merged"]
    assert scores["base + adapter"]["eval_loss"] < scores["base"]["eval_loss"]
    assert scores["merged"]["eval_loss"] == pytest.approx(scores["base + adapter"]["eval_loss"], rel=1e-5)
    *_, in_training = read_metrics(Path(trained.output_dir), "eval")
    assert scores["base + adapter"]["eval_loss"] == pytest.approx(in_training["eval_loss"], rel=1e-6)
    assert {score["rows"] for score in scores.values()} == {5}
    assert all(0 <= score["exact_match"] <= 1 for score in scores.values())


# Wrong requests: one message, exit code 2, no traceback, nothing written


def check_one_error(result: CommandResult, *parts: str) -> None:
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.stderr
    for part in parts:
        assert part in lines[0]


@pytest.mark.parametrize("kind", ["absent", "empty", "a file"])
@pytest.mark.parametrize("verb", ["merge", "generate", "generate --base", "evaluate"])
def test_a_missing_adapter_is_one_message(
    command: Callable[..., CommandResult], trained: RunConfig, tmp_path: Path, verb: str, kind: str
) -> None:
    adapter = tmp_path / "no-adapter"
    if kind == "empty":
        adapter.mkdir()
    elif kind == "a file":
        adapter.write_text("mine")
    command_lines: dict[str, tuple[str | Path, ...]] = {
        "merge": ("merge", adapter, tmp_path / "merged"),
        "generate": ("generate", "--adapter", adapter, "hello"),
        "generate --base": ("generate", "--adapter", adapter, "--base", trained.model.name_or_path, "hello"),
        "evaluate": ("evaluate", "--config", file_of(trained), "--adapter", adapter),
    }
    check_one_error(command(*command_lines[verb]), "no-adapter", "adapter")
    assert not (tmp_path / "merged").exists()


def test_a_missing_base_of_an_adapter_is_one_message(
    command: Callable[..., CommandResult], trained: RunConfig, tmp_path: Path
) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(adapter_of(trained), adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "gone")
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    check_one_error(command("merge", adapter, tmp_path / "merged"), "gone")
    check_one_error(command("generate", "--adapter", adapter, "hello"), "gone")


@pytest.mark.parametrize("verb", ["generate", "evaluate"])
def test_a_missing_merged_model_is_reported_before_a_model_is_loaded(
    command: Callable[..., CommandResult],
    trained: RunConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    verb: str,
) -> None:
    from lora_accel.model import base

    def load(*_: object) -> None:
        pytest.fail("a model was loaded first")

    monkeypatch.setattr(base, "load_base_model", load)
    args: tuple[str | Path, ...] = ("generate", "hello")
    if verb == "evaluate":
        args = ("evaluate", "--config", file_of(trained))
    result = command(*args, "--adapter", adapter_of(trained), "--merged", tmp_path / "no-model")
    check_one_error(result, "no-model")
    if verb == "evaluate":
        check_one_error(command(*args, "--adapter", tmp_path / "no-adapter"), "no-adapter")


def test_evaluate_without_rows_is_one_message(command: Callable[..., CommandResult], trained: RunConfig) -> None:
    check_one_error(command("evaluate", "--config", file_of(trained), "data.eval=[]"), "data.eval")


def test_plan_without_a_config_is_one_message(command: Callable[..., CommandResult]) -> None:
    check_one_error(command("plan"), "--config FILE is missing")


@pytest.mark.parametrize("args", [("plam",), ("merge", "--outt"), ("plan", "--rnaks", "2"), ("plan", "--ranks", "0")])
def test_an_unknown_argument_is_exit_code_2(command: Callable[..., CommandResult], args: tuple[str, ...]) -> None:
    result = command(*args)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert "Usage: " in result.stderr
