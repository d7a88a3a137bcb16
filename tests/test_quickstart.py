"""The quickstart's rows are what their script writes, and held-out rows do not repeat training rows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "recipes" / "data"
FILES = ("orders_train.jsonl", "orders_heldout.jsonl")


def test_the_script_writes_the_committed_rows(tmp_path: Path) -> None:
    script = ROOT / "scripts" / "make_quickstart_data.py"
    subprocess.run([sys.executable, str(script), "--out", str(tmp_path)], check=True, capture_output=True)
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (DATA / name).read_bytes(), name


def test_held_out_orders_are_not_in_training() -> None:
    texts, last_names = [], []
    for name in FILES:
        rows = [json.loads(line)["messages"] for line in (DATA / name).read_text(encoding="utf-8").splitlines()]
        customers = [json.loads(answer["content"])["customer"] for _, answer in rows]
        texts.append({question["content"] for question, _ in rows})
        last_names.append({customer.split()[-1] for customer in customers if customer})
    assert len(texts[1]) >= 100  # one order is at most one percent of the score
    assert texts[0].isdisjoint(texts[1])
    assert last_names[1]
    assert last_names[0].isdisjoint(last_names[1])
