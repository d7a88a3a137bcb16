"""The house rules: the trees in the docs match src/, and an entry in one table is all that an extension needs."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from scripts.check_language import hits
from transformers import AutoModelForCausalLM

from lora_accel import RunConfig, logs, run_training, save_adapter
from lora_accel.config.optimizers import OPTIMIZERS, OptimizerSpec
from lora_accel.config.schedules import SCHEDULES
from lora_accel.data import formats
from lora_accel.data.records import PlainText
from lora_accel.errors import ConfigError
from lora_accel.export import formats as export_formats
from lora_accel.export.export import export_adapter
from lora_accel.export.formats import ExportFormat
from lora_accel.saving.discovery import WEIGHTS
from lora_accel.saving.tensor_files import State
from tests import forked
from tests.conftest import PATIENCE_SECONDS, ROOT, read_metrics, reset_accelerator, write_jsonl

PACKAGE = ROOT / "src" / "lora_accel"


def code_blocks(file: str, language: str) -> list[str]:
    """Return the code blocks of a document in one language; "" = blocks without a language."""
    text = (ROOT / file).read_text(encoding="utf-8")
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [code for name, code in blocks if name == language]


def test_architecture_lists_every_module() -> None:
    (tree,) = [block for block in code_blocks("ARCHITECTURE.md", "") if "train.py" in block]
    listed: set[str] = set()
    folders: list[str] = []
    for line in tree.splitlines():
        name, depth = line.split()[0], (len(line) - len(line.lstrip())) // 2
        path = "".join(folders[:depth]) + name
        if name.endswith("/"):
            folders[depth:] = [name]
        else:
            listed.add(path)
    modules = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"}
    assert listed == modules


def test_readme_lists_the_top_level() -> None:
    (tree,) = [block for block in code_blocks("README.md", "") if "src/lora_accel/" in block]
    inside = tree.split("src/lora_accel/")[1].splitlines()[1:]
    listed = {line.split()[0] for line in inside if line.startswith("  ") and not line.startswith("   ")}
    entries = {f"{path.name}/" if path.is_dir() else path.name for path in PACKAGE.iterdir()}
    assert listed == entries - {"__init__.py", "__pycache__/", "py.typed"}


# Language and messages


@pytest.mark.parametrize(
    ("line", "phrase"),
    [
        ("the run goes on from there", "goes on"),
        ("def refuse_output() -> None:", "refuse"),
        ("weights are quantised", "quantised"),
        ("a resumed run continues", None),
    ],
)
def test_banned_phrases_are_found_in_prose_and_names(line: str, phrase: str | None) -> None:
    assert [found for _, found, _ in hits(f"first\n{line}\n", ".py")] == ([] if phrase is None else [phrase])


def test_long_prose_is_found_but_not_long_tables() -> None:
    assert [number for number, *_ in hits(f"{'word ' * 30}\n| {'word ' * 30} |\n", ".md")] == [1]


def test_only_rank_0_logs_and_every_rank_warns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for rank in (0, 1):
        monkeypatch.setattr(logs, "_rank", lambda rank=rank: rank)
        logs.logger.info("information of rank %d", rank)
        logs.logger.warning("warning of rank %d", rank)
    assert capsys.readouterr() == ("information of rank 0\n", "warning of rank 0\nwarning of rank 1\n")


# A new entry in each table, from here, where nothing else knows it.


@pytest.mark.launch
def test_an_optimizer_and_a_schedule_are_one_entry_each(
    make_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Training, saving and an exact resume follow from the entries."""
    sgd = OptimizerSpec("torch.optim.SGD", moments=("momentum_buffer",), options={"momentum": 0.9})
    monkeypatch.setitem(OPTIMIZERS, "toy", sgd)
    monkeypatch.setitem(SCHEDULES, "toy", lambda progress: 1 - progress**2)
    training = {"optimizer": "toy", "scheduler": "toy", "learning_rate": 0.1, "max_steps": 4, "warmup_steps": 0}

    def train(name: str) -> list[float]:
        reset_accelerator()
        run_training(make_config(output_dir=str(tmp_path / name), training=training, checkpoint={"every_steps": 2}))
        return [line["loss"] for line in read_metrics(tmp_path / name)]

    straight = train("straight")
    assert [line["learning_rate"] for line in read_metrics(tmp_path / "straight")] == pytest.approx(
        [0.1 * (1 - (step / 4) ** 2) for step in range(4)]
    )
    assert train("resumed") == straight
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "step-00000004")
    shutil.rmtree(tmp_path / "resumed" / "adapter")
    assert train("resumed") == straight


def test_a_data_format_is_one_entry(
    make_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from lora_accel.setup.data import prepare_data

    monkeypatch.setitem(formats.FORMATS, "toy", (("poem",), lambda row: PlainText(row["poem"])))
    rows = write_jsonl(tmp_path / "poems.jsonl", [{"poem": "roses are red"}])
    for name in (None, "toy"):
        data = prepare_data(make_config(data={"train": [{"path": str(rows), "format": name}]}))
        assert data.dataset.ledgers[0].format == "toy"
    with pytest.raises(ConfigError, match=r"should be .*'toy', not 'toyy' \(did you mean toy\?\)"):
        prepare_data(make_config(data={"train": [{"path": str(rows), "format": "toyy"}]}))


def test_an_export_format_is_one_entry(
    tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_model())
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    save_adapter(Accelerator(), model, tmp_path / "adapter")

    def write(file: Path, tensors: State) -> None:
        file.write_text(json.dumps({name: tensor.tolist() for name, tensor in tensors.items()}), encoding="utf-8")

    def read(file: Path) -> State:
        return {name: torch.tensor(values) for name, values in json.loads(file.read_text(encoding="utf-8")).items()}

    toy = ExportFormat("tensors.json", "toy.json", copied_files=(), write_tensors=write, read_tensors=read)
    monkeypatch.setitem(export_formats.FORMATS, "toy", toy)
    result = export_adapter(tmp_path / "adapter", tmp_path / "out", format="toy")
    assert read(tmp_path / "out" / "tensors.json").keys() == load_file(tmp_path / "adapter" / WEIGHTS).keys()
    assert result["num_tensors"] == 4
    assert (tmp_path / "out" / "toy.json").is_file()


# docs/python.md


@pytest.mark.launch
def test_the_code_of_the_python_page_runs(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    script, messages, loop = code_blocks("docs/python.md", "python")
    script = script.replace('"models/SmolLM2-135M-Instruct"', repr(str(tiny_model()))).replace('"r": 8', '"r": 2')
    assert repr(str(tiny_model())) in script
    rows = [
        {"messages": [{"role": "user", "content": f"hello {n}"}, {"role": "assistant", "content": "world"}]}
        for n in range(20)
    ]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    (tmp_path / "script.py").write_text("\n".join([messages, script, loop]), encoding="utf-8")
    result = forked.run(["script.py"], dict(os.environ), PATIENCE_SECONDS, tmp_path)
    assert result.returncode == 0, result.stderr
    assert "base + adapter: loss" in result.stdout
    assert "INFO:lora_accel:trainable: " in result.stderr
    for folder in ("runs/python/adapter", "runs/own-loop"):
        assert (tmp_path / folder / "adapter_model.safetensors").is_file()
    assert (tmp_path / "runs/python/merged/model.safetensors").is_file()
    assert json.loads((tmp_path / "runs/python/status.json").read_text())["state"] == "done"
