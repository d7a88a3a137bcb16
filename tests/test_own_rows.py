"""A user's own rows, as README says: from `lora-accel init` to a reply, in an empty folder outside the clone."""

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
from tests.conftest import ROOT, Told, chat_rows, write_jsonl

RECIPE = resources.files("lora_accel.config") / "my_rows.yaml"


# The recipe


def test_the_recipe_in_the_repository_is_the_one_that_init_writes() -> None:
    assert (ROOT / "recipes" / "my_rows.yaml").read_bytes() == RECIPE.read_bytes()


def test_a_wheel_holds_the_recipe_and_all_other_files_of_the_package(tmp_path: Path) -> None:
    """Without its line in pyproject.toml's package-data a file is left out silently."""
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    code = "from setuptools import build_meta; build_meta.build_wheel('.')"
    built = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.startswith("lora_accel/")}
        assert archive.read("lora_accel/config/my_rows.yaml") == RECIPE.read_bytes()
    files = {path.relative_to(tmp_path / "src").as_posix() for path in (tmp_path / "src").rglob("*") if path.is_file()}
    assert packed == {name for name in files if ".egg-info/" not in name}


def test_the_recipe_names_nothing_of_the_repository(tmp_path: Path) -> None:
    """A user copies this file alone. It holds rows out, and leaves precision to the launcher and the machine."""
    text = RECIPE.read_text(encoding="utf-8")
    (tmp_path / "my_rows.yaml").write_text(text, encoding="utf-8")
    config = read_config(tmp_path / "my_rows.yaml")
    assert config.data.eval_fraction > 0
    assert [source.path for source in config.data.train] == ["my_rows.jsonl"]
    assert config.model.name_or_path == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert not re.search(r"recipes/|models/|mixed_precision|dtype", text)


def test_init_writes_the_recipe_and_never_over_a_file(
    command: Callable[..., Told], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    told = command("init")
    assert (told.returncode, told.stderr) == (0, "")
    assert "lora-accel inspect --config my_rows.yaml" in told.stdout
    assert (tmp_path / "my_rows.yaml").read_bytes() == RECIPE.read_bytes()
    (tmp_path / "my_rows.yaml").write_text("mine")
    told = command("init")
    assert told.returncode == 2
    assert told.stderr == "error: my_rows.yaml already exists; pass another name, such as lora-accel init other.yaml\n"
    assert (tmp_path / "my_rows.yaml").read_text() == "mine"
    assert command("init", "other.yaml").returncode == 0
    (tmp_path / "dangling.yaml").symlink_to("absent.yaml")
    assert command("init", "dangling.yaml").returncode == 2
    told = command("init", "absent/my.yaml")
    assert (told.returncode, told.stderr) == (
        2, "error: absent/my.yaml: cannot be written: No such file or directory\n"
    )  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling.yaml", "my_rows.yaml", "other.yaml"]


# A model that is not there


@pytest.fixture
def adapter(tmp_path: Path, tiny_model: Callable[..., Path]) -> Path:
    """An adapter of a model in a folder models/ that is not here."""
    folder = tmp_path / "adapter"
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model()), LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(folder, save_embedding_layers=False)
    transformers.AutoTokenizer.from_pretrained(tiny_model()).save_pretrained(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "models/SmolLM2-135M-Instruct"
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    "words",
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
def test_a_missing_model_folder_names_what_makes_it(
    command: Callable[..., Told],
    adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: str,
) -> None:
    """One message and exit code 2, before any row is read (there is no such file) and without asking the Hub."""
    monkeypatch.chdir(tmp_path)
    command("init")
    before = set(tmp_path.rglob("*"))
    asked: list[object] = []

    def look_up(host: object, *_: object, **__: object) -> None:
        asked.append(host)
        raise OSError("there is no network")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    name, *rest = shlex.split(words)
    if not rest:
        rest = ["--config", "my_rows.yaml", "model.name_or_path=models/SmolLM2-135M-Instruct"]
    told = Told(train.main(rest), *capsys.readouterr()) if name == "train" else command(name, *rest)
    assert told.returncode == 2, told
    assert told.stderr.count("error: ") == 1
    assert "Traceback" not in told.stderr
    for part in ("models/SmolLM2-135M-Instruct", "no such folder", str(tmp_path), "scripts/fetch_model.py", "--base"):
        assert part in told.stderr
    assert set(tmp_path.rglob("*")) == before, "nothing is written"
    assert asked == [], "the Hub was asked"


def test_a_hub_id_that_cannot_be_had_names_the_way_without_the_hub(
    command: Callable[..., Told], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that looks like a path, and the other way about; of other models the script knows nothing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    command("init")

    def told(model: str) -> str:
        said = command("inspect", "--config", "my_rows.yaml", f"model.name_or_path={model}")
        assert said.returncode == 2
        assert said.stderr.count("error: ") == 1
        assert "model.name_or_path" in said.stderr
        return said.stderr

    assert "scripts/fetch_model.py" in told("HuggingFaceTB/SmolLM2-135M-Instruct")
    assert "scripts/fetch_model.py" in told("SmolLM2-135M-Instruct")
    assert "scripts/fetch_model.py" in told("models/smollm2"), "a typing mistake"
    assert "scripts/fetch_model.py" not in told("somebody/else")
    for path in ("models/mine", "./mine", "a/b/c", "~/mine", str(tmp_path / "mine")):
        assert "there is no such folder" in told(path)
    assert "no such folder" not in told("somebody/else")


# README


def readme_block() -> str:
    """Return the commands of README's section, from the first bash block after its heading."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text[text.index("## Train on your own rows\n") :]
    found = re.search(r"```bash\n(.*?)```", section, re.DOTALL)
    assert found
    return found[1]


@pytest.mark.timeout(3600)
def test_readmes_own_rows_run_as_they_stand(tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    """Every line of the block but `pip install`, in an empty folder; edited is what README says to edit, and the model,
    so that a tiny one will do."""
    block = readme_block()
    installs = [line for line in block.splitlines() if line.startswith(("pip ", "python -m venv"))]
    assert len(installs) == 2, "the rest is run"
    edit = [line for line in block.splitlines() if line.startswith("# ")]
    assert len(edit) == 1, "one place to edit"
    model, rows = tiny_model(), write_jsonl(tmp_path / "elsewhere.jsonl", chat_rows(30))
    changes = f"s|HuggingFaceTB/SmolLM2-135M-Instruct|{model}|; s|path: my_rows.jsonl|path: {rows}|"
    script = block.replace(edit[0], f"sed -i '{changes}' my_rows.yaml")
    for line in installs:
        script = script.replace(line, "")
    home = tmp_path / "empty"
    home.mkdir()
    bin_folder = Path(sys.executable).parent
    ended = subprocess.run(
        ["bash", "-euxo", "pipefail", "-c", script],
        cwd=home,
        env=os.environ
        | {"PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    assert "Traceback" not in ended.stderr
    config = read_config(home / "my_rows.yaml")
    assert config.model.name_or_path == str(model)
    run = home / config.output_dir
    assert json.loads((run / "status.json").read_text())["state"] == "done"
    assert "held out by data.eval_fraction" in ended.stdout, "inspect"
    assert re.search(r"base \+ adapter +│ .* of 3 ", ended.stdout), "evaluate asks the rows that were held out"
    assert (run / "adapter" / "adapter_model.safetensors").is_file()
    assert (run / "merged" / "model.safetensors").is_file(), "merge"
    assert {path.name for path in home.iterdir()} == {"my_rows.yaml", config.output_dir.split("/")[0]}
