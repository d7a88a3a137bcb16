"""README's "Train on your own rows": from `lora-accel init` to a reply, in an empty folder outside the clone."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import socket
import subprocess
import sys
import zipfile
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import pytest
import transformers
from huggingface_hub.errors import LocalEntryNotFoundError
from peft import LoraConfig, get_peft_model
from scripts import fetch_model
from transformers import AutoModelForCausalLM

import lora_accel
from lora_accel import train
from lora_accel.config.files import read_config
from lora_accel.config.schema import ModelSection
from lora_accel.errors import ArtifactError
from lora_accel.model.tokenizer import load_tokenizer
from lora_accel.setup.draft import SCHEMA_FILE
from tests.conftest import ROOT, CommandResult, chat_rows, run_module, write_jsonl

RECIPE = resources.files("lora_accel.config") / "my_rows.yaml"


# The recipe


def test_init_writes_the_recipe_of_the_repository() -> None:
    assert (ROOT / "recipes" / "my_rows.yaml").read_bytes() == RECIPE.read_bytes()


def test_the_wheel_contains_every_file_of_the_package(tmp_path: Path) -> None:
    """setuptools silently drops a data file that pyproject.toml's package-data does not list."""
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    code = "from setuptools import build_meta; build_meta.build_wheel('.')"
    build = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert build.returncode == 0, build.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        in_wheel = {name for name in archive.namelist() if name.startswith("lora_accel/")}
        assert archive.read("lora_accel/config/my_rows.yaml") == RECIPE.read_bytes()
    files = {path.relative_to(tmp_path / "src").as_posix() for path in (tmp_path / "src").rglob("*") if path.is_file()}
    assert in_wheel == {name for name in files if ".egg-info/" not in name}


def test_the_recipe_does_not_need_the_repository(tmp_path: Path) -> None:
    """A user copies only this file. It holds out rows, and leaves precision to the launcher and the device."""
    text = RECIPE.read_text(encoding="utf-8")
    (tmp_path / "my_rows.yaml").write_text(text, encoding="utf-8")
    config = read_config(tmp_path / "my_rows.yaml")
    assert config.data.eval_fraction > 0
    assert [source.path for source in config.data.train] == ["my_rows.jsonl"]
    assert config.model.name_or_path == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert not re.search(r"recipes/|models/|mixed_precision|dtype", text)


def test_init_writes_the_recipe_and_overwrites_nothing(
    command: Callable[..., CommandResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = command("init")
    assert (result.returncode, result.stderr) == (0, "")
    assert "lora-accel inspect --config my_rows.yaml" in result.stdout
    assert (tmp_path / "my_rows.yaml").read_bytes() == RECIPE.read_bytes()
    (tmp_path / "my_rows.yaml").write_text("mine")
    result = command("init")
    assert result.returncode == 2
    assert (
        result.stderr == "error: my_rows.yaml already exists; pass another name, such as lora-accel init other.yaml\n"
    )
    assert (tmp_path / "my_rows.yaml").read_text() == "mine"
    assert command("init", "other.yaml").returncode == 0
    (tmp_path / "dangling.yaml").symlink_to("absent.yaml")
    assert command("init", "dangling.yaml").returncode == 2
    result = command("init", "absent/my.yaml")
    assert (result.returncode, result.stderr) == (
        2, "error: absent/my.yaml: cannot be written: No such file or directory\n"
    )  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling.yaml", "my_rows.yaml", "other.yaml"]


@pytest.mark.parametrize("arguments", [("train", "my.yaml"), ("train", "-c", "my.yaml"), ("inspect", "my.yaml")])
def test_a_config_without_its_option(command: Callable[..., CommandResult], arguments: tuple[str, ...]) -> None:
    result = command(*arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"error: pass the run config with --config: lora-accel {arguments[0]} --config my.yaml\n"


def test_other_files_are_not_taken_for_the_config(command: Callable[..., CommandResult]) -> None:
    for arguments in (("train", "--launcher", "zero.yaml"), ("inspect", "data.eval=[{path: a.yaml}]")):
        assert "Missing option '--config'" in command(*arguments).stderr
    assert "absent.yaml: no such file" in command("inspect", "--config", "absent.yaml", "more.yaml").stderr


def test_version(command: Callable[..., CommandResult]) -> None:
    assert command("--version") == CommandResult(0, f"lora-accel {lora_accel.__version__}\n", "")


# Missing models


def test_fetching_the_model_names_a_command_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package is not on an index: the extra must be that of the clone."""
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(fetch_model.FetchError, match=re.escape(f"gguf: pip install '{ROOT}[quickstart]'")):
        fetch_model.check_requirements()


@pytest.fixture
def adapter(tmp_path: Path, tiny_model: Callable[..., Path]) -> Path:
    """Return an adapter whose base is in a folder models/ that does not exist."""
    folder = tmp_path / "adapter"
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model()), LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(folder, save_embedding_layers=False)
    transformers.AutoTokenizer.from_pretrained(tiny_model()).save_pretrained(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "models/SmolLM2-135M-Instruct"
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    "command_line",
    [
        "train",
        "plan",
        "inspect",
        "evaluate",
        "merge adapter merged",
        "merge adapter merged --base models/SmolLM2-135M-Instruct",
        "merge --adapter adapter=0.5 merged",
        "export adapter exported --format loralib",
        "generate --adapter adapter hello",
        "generate --adapter adapter --stream hello",
        "generate --adapter adapter --base models/SmolLM2-135M-Instruct hello",
        "chat --adapter adapter",
    ],
)
def test_a_missing_model_folder_is_reported_with_the_script_that_creates_it(
    command: Callable[..., CommandResult],
    adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command_line: str,
) -> None:
    """One message and exit code 2, before rows are read (their file does not exist), without a request to the Hub."""
    monkeypatch.chdir(tmp_path)
    command("init")
    before = set(tmp_path.rglob("*"))
    requested_hosts: list[object] = []

    def look_up(host: object, *_: object, **__: object) -> None:
        requested_hosts.append(host)
        raise OSError("there is no network")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    name, *rest = shlex.split(command_line)
    if not rest:
        rest = ["--config", "my_rows.yaml", "model.name_or_path=models/SmolLM2-135M-Instruct"]
    result = CommandResult(train.main(rest), *capsys.readouterr()) if name == "train" else command(name, *rest)
    assert result.returncode == 2, result
    assert result.stderr.count("error: ") == 1
    assert "Traceback" not in result.stderr
    for part in ("models/SmolLM2-135M-Instruct", "no such folder", str(tmp_path), "scripts/fetch_model.py", "--base"):
        assert part in result.stderr
    assert set(tmp_path.rglob("*")) == before, "nothing is written"
    assert requested_hosts == []


def test_an_unreachable_hub_is_asked_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """huggingface_hub retries for half a minute for each file, and transformers would ask for two more."""

    def fail(*_: object, **__: object) -> None:
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *_, **__: pytest.fail("asked again"))
    with pytest.raises(ArtifactError, match="the tokenizer of 'some/model' cannot be loaded: no connection"):
        load_tokenizer(ModelSection(name_or_path="some/model"))


def test_an_unreachable_hub_id_is_reported_with_the_way_without_the_hub(
    command: Callable[..., CommandResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also for a Hub id that looks like a path, and for a path. The script creates the quickstart's model only."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    command("init")

    def error_of(model: str) -> str:
        result = command("inspect", "--config", "my_rows.yaml", f"model.name_or_path={model}")
        assert result.returncode == 2
        assert result.stderr.count("error: ") == 1
        assert "model.name_or_path" in result.stderr
        return result.stderr

    assert "scripts/fetch_model.py" in error_of("HuggingFaceTB/SmolLM2-135M-Instruct")
    assert "scripts/fetch_model.py" in error_of("SmolLM2-135M-Instruct")
    assert "scripts/fetch_model.py" in error_of("models/smollm2"), "a typo"
    assert "scripts/fetch_model.py" not in error_of("somebody/else")
    for path in ("models/mine", "./mine", "a/b/c", "~/mine", str(tmp_path / "mine")):
        assert "there is no such folder" in error_of(path)
    assert "no such folder" not in error_of("somebody/else")


# README


def readme_block() -> str:
    """Return the first bash block of README's section."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text[text.index("## Train on your own rows\n") :]
    block = re.search(r"```bash\n(.*?)```", section, re.DOTALL)
    assert block
    return block[1]


@pytest.mark.timeout(3600)
def test_readmes_commands_run_as_documented(tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    """Run every line of the block except the installation, in a folder with rows, on a tiny model."""
    block = readme_block()
    installs = [line for line in block.splitlines() if line.startswith(("pip ", "python -m venv"))]
    assert len(installs) == 2, "only these two lines are skipped"
    model, folder = tiny_model(), tmp_path / "empty"
    folder.mkdir()
    write_jsonl(folder / "my_rows.jsonl", chat_rows(30))
    script = block.replace("--data my_rows.jsonl", f"--data my_rows.jsonl --model {model}")
    assert script != block, "init names the rows"
    outputs = {}
    for line in script.splitlines():
        if line in installs:
            continue
        program, name, *arguments = shlex.split(line, comments=True)
        assert program == "lora-accel"
        result = run_module("lora_accel.cli", name, *arguments, folder=folder)
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
        assert "Traceback" not in result.stderr
        outputs[name] = result.stdout
    assert outputs.keys() == {"init", "inspect", "train", "evaluate", "merge", "generate"}
    config = read_config(folder / "my_rows.yaml")
    assert config.model.name_or_path == str(model)
    run = folder / config.output_dir
    assert json.loads((run / "status.json").read_text())["state"] == "done"
    assert "held out by data.eval_fraction" in outputs["inspect"]
    assert re.search(r"base \+ adapter +│ .* of 3 ", outputs["evaluate"]), "it scores the held-out rows"
    assert (run / "adapter" / "adapter_model.safetensors").is_file()
    assert (run / "merged" / "model.safetensors").is_file(), "merge"
    files = {"my_rows.jsonl", "my_rows.yaml", SCHEMA_FILE}
    assert {path.name for path in folder.iterdir()} == files | {config.output_dir.split("/")[0]}
