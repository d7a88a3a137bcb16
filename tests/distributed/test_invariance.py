"""scripts/check_invariance.py: results do not depend on batching options, processes or ZeRO stage."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from scripts.check_invariance import main

from tests.conftest import chat_rows, write_jsonl
from tests.distributed.forked import Forks

pytestmark = pytest.mark.distributed


def test_results_are_invariant(
    forks: Forks, tiny_model: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In float32 with adapter dropout 0.1, different lengths, shared prefixes of two levels, and a short last step."""

    def launch(preset: str, *args: str) -> subprocess.CompletedProcess[str]:
        return forks.launch(*args, preset=preset)

    rows = []
    for row in chat_rows(24):
        number = len(rows)
        system = {"role": "system", "content": f"Answer in one word. The document is number {number % 3} of those."}
        rows.append({"messages": [system, *row["messages"]] if number % 4 else row["messages"]})
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    args = ["--model", str(tiny_model()), "--data", str(data), "--learning-rate", "0.03"]
    code = main([*args, "--loss-limit", "1e-5", "--adapter-limit", "1e-4"], launch)
    stdout = capsys.readouterr().out
    assert code == 0, stdout
    assert ", no, " in stdout
    lines = re.findall(r"^\| (?:1|2) process.*\|$", stdout, flags=re.MULTILINE)
    assert len(lines) == 11, stdout


@pytest.mark.slow
def test_results_do_not_depend_on_shared_prefixes(
    forks: Forks, tiny_model: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """For each number of processes, layout, dropout and depth of prefixes, in float32."""
    model = shutil.copytree(tiny_model(), tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 512}))

    def launch(preset: str, *args: str) -> subprocess.CompletedProcess[str]:
        return forks.launch(*args, preset=preset)

    limits = ["--loss-limit", "1e-6", "--adapter-limit", "1e-6", "--optimizer", "sgd", "--learning-rate", "0.1"]
    sizes = ["--batch-size", "8", "--micro-batch-tokens", "1024", "1024", "--max-length", "400"]
    code = main(["--model", str(model), "--grid", *sizes, *limits], launch)
    stdout = capsys.readouterr().out
    print(stdout)
    assert code == 0, stdout
    assert len(re.findall(r"^\| (?:1|2) process.*\|$", stdout, flags=re.MULTILINE)) == 6 * 9, stdout
