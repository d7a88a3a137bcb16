"""`scripts/benchmark.py`: its rows, its settings of other trainers, what it counts, and that it continues."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lora_accel.model.device import Device
from tests import forked
from tests.conftest import ROOT, write_jsonl


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Return the scripts as modules. Their processes are forks of one that has imported everything."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import benchmark
    import benchmark_case
    import benchmark_rows
    import benchmark_run

    monkeypatch.setattr(benchmark_run, "run_process", forked.run_process)
    return SimpleNamespace(main=benchmark, case=benchmark_case, rows=benchmark_rows, run=benchmark_run)


@pytest.fixture
def measured(scripts: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Replace trainings: the cases that are measured are recorded; each next one is faster by 100 tokens/s."""
    cases: list[Any] = []

    def measure(case: Any) -> Any:
        cases.append(case)
        return scripts.main.Result(100.0 * len(cases), 1.0, 50.0, 2.0, 10**9, 3 * 10**9, [1.0], "")

    monkeypatch.setattr(scripts.main, "measure", measure)
    monkeypatch.setattr(scripts.main, "fastest", lambda case: case.candidates[0] if case.candidates else {})
    monkeypatch.setattr(scripts.main, "matmul_rate", lambda *_: 1e9)
    monkeypatch.setattr(scripts.main, "plan_of", lambda _: SimpleNamespace(num_tokens=1000, num_examples=10))
    return cases


@pytest.fixture
def call(scripts: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Return a function that runs the part `memory` in float32 with further arguments."""

    def run(*arguments: str) -> None:
        options = ["--model", "model", "--data", "rows.json", "--parts", "memory", "--precision", "no"]
        monkeypatch.setattr("sys.argv", ["benchmark.py", *options, "--json", str(tmp_path / "json"), *arguments])
        scripts.main.main()

    return run


def words(text: str) -> int:
    return len(text.split())


@pytest.mark.parametrize(
    ("features", "line"),
    [
        ({"avx2"}, "Computed in float32; this CPU has no bfloat16 instructions: float32 is faster."),
        ({"avx2", "avx512_f", "avx512_bf16"}, "Computed in bfloat16; this CPU computes bfloat16 natively."),
    ],
)
def test_the_precision_is_the_native_one(
    scripts: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    features: set[str],
    line: str,
) -> None:
    monkeypatch.setattr(scripts.main, "CPU", Device("cpu", features=frozenset(features)))
    monkeypatch.setitem(scripts.main.PARTS, "memory", lambda args, _: print(f"precision {args.precision}") or [])
    monkeypatch.setattr("sys.argv", ["benchmark.py", "--model", "m", "--data", "d", "--parts", "memory"])
    scripts.main.main()
    output = capsys.readouterr().out.replace("\n", " ")
    assert output.startswith(line)
    assert f"precision {'bf16' if 'avx512_bf16' in features else 'no'}" in output
    names = [scripts.main.CPU_FLAGS[feature] for feature in ("avx2", "avx512_f", "avx512_bf16") if feature in features]
    assert f"amx_bf16 it has {', '.join(names)}. " in output


def test_generated_rows_share_their_instruction(scripts: SimpleNamespace, tmp_path: Path) -> None:
    files = [tmp_path / "a", tmp_path / "b"]
    for file in files:
        scripts.rows.write_instruction_rows(file, 20, words)
    assert files[0].read_bytes() == files[1].read_bytes()
    rows = [json.loads(line)["messages"] for line in files[0].read_text().splitlines()]
    assert len(rows) == 20
    assert len({row[0]["content"] for row in rows}) == 1
    assert 500 <= words(rows[0][0]["content"]) < 530
    assert len({row[1]["content"] for row in rows}) == 20
    for _, question, answer in rows:
        assert 130 <= words(question["content"] + answer["content"]) < 170
        assert len(question["content"].splitlines()) == len(
            [json.loads(line) for line in answer["content"].splitlines()]
        )


def test_rows_are_packed_as_by_trl(scripts: SimpleNamespace) -> None:
    datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")
    lengths = [300, 200, 200, 190, 120, 100, 600, 512, 50, 7]
    rows = datasets.Dataset.from_dict({"input_ids": [[1] * length for length in lengths]})
    assert scripts.case.num_packed(lengths, 512) == len(trl.pack_dataset(rows, 512, "bfd")) == 5


def test_other_trainers_use_their_fastest_candidate(scripts: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds, trials = {1: 3.0, 2: 1.0, 4: 2.0}, []

    def finish(case: Any) -> Any:
        trials.append(case)
        one = seconds[case.options["per_device_train_batch_size"]]
        return scripts.run.Finished([{"seconds": [0.1, one, one], "tokens": [9, 10, 10]}], "")

    monkeypatch.setattr(scripts.main, "finish", finish)
    config = {"model": {"dtype": "float32"}, "training": {"max_steps": 50, "batch_size": 16}}
    case = scripts.main.trl("TRL, packing", config, packing=True)
    assert case.options["gradient_checkpointing"] is False
    assert case.options["model_init_kwargs"] == {"dtype": "float32", "attn_implementation": "sdpa"}
    assert scripts.main.fastest(case) == {"per_device_train_batch_size": 2}
    assert [trial.config["training"] for trial in trials] == [{"max_steps": 3, "batch_size": 4}] * 3
    assert case.config["training"]["max_steps"] == 50
    assert scripts.main.settings_text({"per_device_train_batch_size": 2}) == " (2 per device)"


def test_a_call_continues_the_measurements(
    call: Callable[..., None], measured: list[Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    call("--rounds", "1", "--cases", "micro-batches of 512")
    assert [case.name for case in measured] == ["micro-batches of 512", "TRL, packing"]
    assert measured[1].options["per_device_train_batch_size"] == 1
    assert [case.config["training"]["max_steps"] for case in measured] == [82, 164]
    call("--rounds", "3", "--minutes", "0", "--cases", "micro-batches of 512")
    assert len(measured) == 2
    capsys.readouterr()
    docs = tmp_path / "page.md"
    docs.write_text("<!-- memory -->\n<!-- /memory -->\n")
    call("--rounds", "2", "--cases", "micro-batches of 512", "--docs", str(docs))
    assert len(measured) == 4
    lines = capsys.readouterr().out.splitlines()
    row = "| micro-batches of 512 | 2 | 200 (100-300) | 0.62 (0.50-0.75) | 1.00 | 50 | 3.00 GB | 1.00 GB | 2.0 s |"
    assert row in lines
    assert any(
        line.startswith("| TRL, packing (1 per device) | 2 | 300 (200-400) | 1.00 (1.00-1.00) |") for line in lines
    )
    assert row in docs.read_text()
    assert docs.read_text().startswith("<!-- memory -->\nComputed in float32; this CPU ")
    call("--rounds", "3", "--cases", "micro-batches of 1,024")  # in one round only
    capsys.readouterr()
    call("--rounds", "0")
    lines = capsys.readouterr().out.splitlines()
    assert row in lines
    assert any(line.startswith("| micro-batches of 1,024 | 1 | 500 (500-500) | 0.83 (0.83-0.83)") for line in lines)
    with pytest.raises(SystemExit, match="has measurements of other arguments"):
        call("--rows", "32")


def test_every_part_has_its_markers_in_the_docs(scripts: SimpleNamespace) -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    for part in scripts.main.PARTS:
        assert page.count(f"<!-- {part} -->") == page.count(f"<!-- /{part} -->") == 1, part


@pytest.mark.launch
def test_shared_tokens_are_computed_once_and_count_for_each_example(
    scripts: SimpleNamespace, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    start = {"role": "system", "content": "repeat what you hear and nothing else " * 5}
    rows = [
        [start, {"role": "user", "content": f"repeat {i}"}, {"role": "assistant", "content": f"{i}"}] for i in range(32)
    ]
    file = write_jsonl(tmp_path / "rows.jsonl", [{"messages": messages} for messages in rows])
    args = argparse.Namespace(model=str(tiny_model()), data=str(file), rows=32, precision="no")
    data = {"train": [{"path": str(file)}], "max_length": 512}
    results = {}
    for is_shared in (True, False):
        config = scripts.main.first_steps(args, data, share_prefixes=is_shared)
        results[is_shared] = scripts.main.measure(scripts.run.Case("case", "lora_accel", config, threads=1))
    assert results[False].computed_share == 1
    assert results[True].computed_share < 0.5
    assert results[True].losses == pytest.approx(results[False].losses, rel=1e-5)
    assert results[True].process_peak > results[True].peak_above_model > 0


@pytest.mark.launch
def test_two_runs_make_their_steps_in_turn(
    scripts: SimpleNamespace, tiny_model: Callable[..., Path], rows_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = str(tiny_model())
    args = argparse.Namespace(model=model, data=str(rows_file), rows=32, precision="no", conversations=None)
    rows = scripts.rows.Rows("rows", str(rows_file), 512)
    monkeypatch.setattr(scripts.main, "kinds_of_rows", lambda *_: [rows])
    [table] = scripts.main.pairs(args, Path("unused"))
    [case] = table.cases
    assert [config["training"].pop("share_prefixes") for config in (case.config, case.compared)] == [False, True]
    assert case.config == case.compared
    [table] = scripts.main.pairs(args, Path("unused"))
    measured: dict[str, Any] = {"settings": {}, "matmul": [], "rounds": []}
    scripts.main.measure_round(table, model, torch.float32, measured, lambda: None)
    [[separate, shared]] = [one["rows"] for one in measured["rounds"]]
    assert len(separate) == len(shared) == table.cases[0].config["training"]["max_steps"] - 1 > 0
    assert [step["tokens"] for step in separate] == [step["tokens"] for step in shared]
    assert all(step["seconds"] > 0 for step in [*separate, *shared])


def test_pairs_of_steps_are_compared_with_each_other(scripts: SimpleNamespace) -> None:
    def steps(*seconds: float, computed: int) -> list[dict[str, float]]:
        return [{"seconds": one, "tokens": 100, "computed": computed} for one in seconds]

    rounds = [
        {"rows": [steps(4, 2, computed=100), steps(2, 2, computed=75)]},
        {"rows": [steps(3, computed=100), steps(2, computed=75)], "other": [[], []]},
    ]
    cases = [scripts.run.Case(name, "lora_accel", {}, compared={}) for name in ("rows", "other")]
    [*_, line] = scripts.main.pair_lines(scripts.main.Table(cases, ""), rounds)
    assert line == "| rows | 3 | 33 | 50 | 1.50 (1.00-2.00) | 0.75 |"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["trainer", "fastchat"])
def test_transformers_trainer_trains(
    scripts: SimpleNamespace, tiny_model: Callable[..., Path], rows_file: Path, kind: str
) -> None:
    args = argparse.Namespace(model=str(tiny_model()), data=str(rows_file), rows=32, precision="no")
    config = scripts.main.run_config(args, training={"max_steps": 2, "batch_size": 8})
    [rank] = scripts.main.finish(scripts.run.Case("case", kind, config)).ranks
    assert len(rank["losses"]) == 2
    assert rank["computed"] == [8 * 512, 8 * 512] if kind == "fastchat" else sum(rank["computed"]) > sum(rank["tokens"])


@pytest.mark.slow
@pytest.mark.parametrize("packing", [True, False])
def test_trl_trains_with_every_candidate(
    scripts: SimpleNamespace, tiny_model: Callable[..., Path], rows_file: Path, packing: bool
) -> None:
    pytest.importorskip("trl")
    args = argparse.Namespace(model=str(tiny_model()), data=str(rows_file), rows=32, precision="no")
    config = scripts.main.run_config(args, training={"max_steps": 2, "batch_size": 8})
    case = scripts.main.trl("TRL", config, packing=packing)
    for candidate in case.candidates:
        [rank] = scripts.main.finish(case._replace(options=case.options | candidate)).ranks
        assert len(rank["losses"]) == 2
        is_padded = not packing and candidate["per_device_train_batch_size"] > 1 and "padding_free" not in candidate
        assert (sum(rank["computed"]) > sum(rank["tokens"])) == is_padded
