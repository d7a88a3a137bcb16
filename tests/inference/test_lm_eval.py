"""lm-evaluation-harness on a merged model, by the command of docs/evaluation.md, gives the figures of `evaluate`."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_accel import RunConfig, run_training
from lora_accel.inference.evaluation import evaluate
from lora_accel.merging.merge import merge_adapter
from tests.conftest import PATIENCE_SECONDS, ROOT, write_jsonl

pytest.importorskip("lm_eval", reason="needs pip install 'lora-accel[lm-eval]'")

TRAINED, OTHER = "one two three", "hello \u00e9"


def row(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def documented_command() -> str:
    """Return the command that docs/evaluation.md gives for the quickstart's rows."""
    blocks = re.findall(r"^```bash\n(.*?)^```$", (ROOT / "docs" / "evaluation.md").read_text("utf-8"), re.S | re.M)
    (block,) = [block for block in blocks if "orders_bits_per_byte" in block]
    (command,) = [line for line in block.replace("\\\n", " ").splitlines() if "lm_eval " in line]
    return command


@pytest.mark.slow
def test_the_documented_command_gives_the_figures_of_evaluate(
    make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    train = write_jsonl(tmp_path / "train.jsonl", [row(f"repeat {number}", TRAINED) for number in range(16)])
    rows = [row(f"repeat it {number}", OTHER if number % 3 == 0 else TRAINED) for number in range(10)]
    data_folder = tmp_path / "recipes" / "data"
    data_folder.mkdir(parents=True)
    heldout = write_jsonl(data_folder / "orders_heldout.jsonl", rows)
    shutil.copytree(ROOT / "recipes" / "lm-eval", tmp_path / "recipes" / "lm-eval")
    config = make_config(
        output_dir=str(tmp_path / "runs" / "quickstart"),
        data={"train": [{"path": str(train)}], "eval": [{"path": str(heldout)}]},
        training={"max_steps": 60, "batch_size": 16},
        evaluation={"at_start": False},
    )
    merged = tmp_path / "runs" / "quickstart" / "merged"
    merge_adapter(run_training(config), merged)
    _, score = evaluate(config, merged=merged, metrics=["bits_per_byte", "exact_match"])
    assert score.exact_match == 0.6, "the rows whose answer was trained"

    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    subprocess.run(
        ["bash", "-c", documented_command()],
        cwd=tmp_path,
        env=os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=PATIENCE_SECONDS,
    )
    (file,) = tmp_path.rglob("results_*.json")
    results = json.loads(file.read_text("utf-8"))["results"]
    assert results["orders_exact_match"]["exact_match,none"] == score.exact_match
    bits_per_byte = results["orders_bits_per_byte"]["bits_per_byte,none"]
    assert bits_per_byte == pytest.approx(score.metrics["eval_bits_per_byte"], rel=1e-5)
