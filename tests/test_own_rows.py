"""README's "Train on your own rows": from `lora-accel init` to a reply, in an empty folder outside the clone."""

from __future__ import annotations

import json
import os
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
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from lora_accel import train
from lora_accel.config.files import read_config
from tests.conftest import ROOT, CommandResult, chat_rows, write_jsonl

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


# Missing models


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
    """Run every line of the block except the installation, in an empty folder. Edits the rows, as README asks for, and
    the model, which is a tiny one."""
    block = readme_block()
    installs = [line for line in block.splitlines() if line.startswith(("pip ", "python -m venv"))]
    assert len(installs) == 2, "only these two lines are skipped"
    edit = [line for line in block.splitlines() if line.startswith("# ")]
    assert len(edit) == 1, "one line to edit"
    model, rows = tiny_model(), write_jsonl(tmp_path / "elsewhere.jsonl", chat_rows(30))
    changes = f"s|HuggingFaceTB/SmolLM2-135M-Instruct|{model}|; s|path: my_rows.jsonl|path: {rows}|"
    script = block.replace(edit[0], f"sed -i '{changes}' my_rows.yaml")
    for line in installs:
        script = script.replace(line, "")
    folder = tmp_path / "empty"
    folder.mkdir()
    bin_folder = Path(sys.executable).parent
    result = subprocess.run(
        ["bash", "-euxo", "pipefail", "-c", script],
        cwd=folder,
        env=os.environ
        | {"PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert "Traceback" not in result.stderr
    config = read_config(folder / "my_rows.yaml")
    assert config.model.name_or_path == str(model)
    run = folder / config.output_dir
    assert json.loads((run / "status.json").read_text())["state"] == "done"
    assert "held out by data.eval_fraction" in result.stdout, "inspect"
    assert re.search(r"base \+ adapter +│ .* of 3 ", result.stdout), "evaluate scores the held-out rows"
    assert (run / "adapter" / "adapter_model.safetensors").is_file()
    assert (run / "merged" / "model.safetensors").is_file(), "merge"
    assert {path.name for path in folder.iterdir()} == {"my_rows.yaml", config.output_dir.split("/")[0]}
