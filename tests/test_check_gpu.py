"""`scripts/check_gpu.py`: what its dry run covers, its table, and its exit codes."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests import forked
from tests.conftest import ROOT
from tests.device.budgets import BUDGETS

PYTEST_OUTPUT = """\
tests/cuda/test_cuda.py::test_a[4-varlen] PASSED                         [ 20%]
tests/cuda/test_cuda.py::test_a[2-varlen] FAILED                         [ 40%]
tests/cuda/test_cuda.py::test_a[1-flex] SKIPPED (FlexAttention needs Triton) [ 60%]
tests/cuda/test_cuda.py::test_b PASSED                                   [ 80%]
tests/cuda/test_cuda.py::test_c ERROR                                    [100%]
=========================== short test summary info ============================
FAILED tests/cuda/test_cuda.py::test_a[2-varlen] - AssertionError: Tensor-likes are not close!
ERROR tests/cuda/test_cuda.py::test_c - RuntimeError: a | b
"""


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    """Return the scripts as modules. Their processes are forks of one that has imported everything."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import benchmark_run
    import check_gpu

    monkeypatch.setattr(benchmark_run, "run_process", forked.run_process)
    monkeypatch.setattr(check_gpu, "run_process", forked.run_process)
    return {"check_gpu": check_gpu, "benchmark_run": benchmark_run}


def rows_of(table: str) -> dict[tuple[str, str], tuple[str, str]]:
    """Return status and text of each row of a table, by part and name."""
    lines = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")]
    return {(part, name): (status, text) for part, name, status, text in lines[2:]}


@pytest.mark.launch
def test_a_dry_run_fills_the_table(
    scripts: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Of the speed part, one trainer; the next test has all."""
    check_gpu, file = scripts["check_gpu"], tmp_path / "table.md"
    monkeypatch.setattr(check_gpu, "TRAINERS", ("lora_accel", "TRL + Liger"))
    monkeypatch.setattr(check_gpu, "BASES", {"LoRA": None})
    monkeypatch.setattr(check_gpu, "DROPOUTS", (0.05,))
    assert check_gpu.main(["--dry-run", "--output", str(file)]) == 0
    table = capsys.readouterr().out
    assert table.splitlines()[0] == "**A dry run on the CPU with tiny models: its figures mean nothing.**"
    assert table.strip() in file.read_text()
    rows = rows_of(table)
    assert {part for part, _ in rows} == {"device", "tests", "parity", "step", "speed"}
    assert rows["tests", "test_out_of_memory_names_what_takes_less"][0] == "not run"
    assert rows["parity", "tiny Llama"][0] == "passed"
    assert rows["step", "LoRA, kernels"][1].startswith(tuple("123456789"))
    assert rows["step", "LoRA, waits of the host"] == ("not run", "needs a GPU")
    assert "tokens/s in 1 round" in rows["speed", "lora_accel, LoRA, dropout 0.05"][1]
    assert rows["speed", "TRL + Liger, LoRA, dropout 0.05"][0] == "not run"


@pytest.mark.slow
def test_every_row_of_the_speed_part(scripts: dict[str, ModuleType], capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("trl")
    assert scripts["check_gpu"].main(["--dry-run", "--parts", "speed"]) == 0
    rows = rows_of(capsys.readouterr().out)
    for base in ("LoRA", "QLoRA nf4"):
        for dropout in ("0", "0.05"):
            for trainer in ("lora_accel", "lora_accel, compiled", "TRL", "TRL + Liger"):
                status, text = rows["speed", f"{trainer}, {base}, dropout {dropout}"]
                assert (status == "measured") is (trainer != "TRL + Liger"), text


@pytest.mark.launch
def test_a_failure_is_a_row_and_exit_code_1(
    scripts: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The other rows are there."""
    monkeypatch.setenv("LORA_ACCEL_FAULT", "step.after_backward@1=enospc")
    assert scripts["check_gpu"].main(["--dry-run", "--parts", "parity"]) == 1
    output = capsys.readouterr()
    rows = rows_of(output.out)
    assert rows["parity", "tiny Llama"][0] == "failed"
    assert rows["parity", "SmolLM2-135M"][0] == "not run"
    assert output.err.endswith("failed: parity: tiny Llama\n")


def test_without_a_gpu_nothing_is_written(
    scripts: dict[str, ModuleType], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    check_gpu = scripts["check_gpu"]
    assert check_gpu.main(["--output", str(tmp_path / "table.md")]) == 2
    assert "error: no usable GPU: " in capsys.readouterr().err
    (tmp_path / "notes.md").write_text("mine")
    assert check_gpu.main(["--dry-run", "--output", str(tmp_path / "notes.md")]) == 2
    assert "has no <!-- check_gpu -->" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.md"]


def test_the_results_of_tests_are_read(scripts: dict[str, ModuleType]) -> None:
    check_gpu = scripts["check_gpu"]
    rows = {name: check_gpu.summarize_cases(cases) for name, cases in check_gpu.parse_tests(PYTEST_OUTPUT).items()}
    assert rows == {
        "test_a": (
            "failed",
            "1 passed, 1 failed: test_a[2-varlen]: AssertionError: Tensor-likes are not close!, 1 skipped: "
            "FlexAttention needs Triton",
        ),
        "test_b": ("passed", "1 passed"),
        "test_c": ("failed", "1 failed: test_c: RuntimeError: a | b"),
    }


def test_the_table_keeps_the_rest_of_a_page(scripts: dict[str, ModuleType], tmp_path: Path) -> None:
    file = tmp_path / "page.md"
    file.write_text("# Page\n\n<!-- check_gpu -->\nold\n<!-- /check_gpu -->\n\nrest\n")
    table = scripts["check_gpu"].Table(file, ["heading"])
    table.put("speed", "TRL", "measured", "1 | 2")
    table.put("speed", "TRL", "measured", r"3 | 4 \d")
    before, _, after = file.read_text().partition("| speed | TRL | measured | 3 \\| 4 \\d |")
    assert before.startswith("# Page\n\n<!-- check_gpu -->\nheading\n")
    assert after == "\n<!-- /check_gpu -->\n\nrest\n"


def test_kernels_are_compared_with_the_budget_of_the_layers(scripts: dict[str, ModuleType]) -> None:
    check_gpu = scripts["check_gpu"]
    check = check_gpu.Check(None, "cuda", "bf16", check_gpu.choose_shape(85, 10, 100), 10, 0.0, ROOT)
    rank = {"kernels": {"gemm": 8000, "add": 400}, "micro_batches": 2}
    status, text = check_gpu.kernels_text(check, rank, is_quantized=True)
    assert text.startswith("4,200 kernels in a micro-batch, ")
    assert f"the budget of its 16 layers is {16 * sum(BUDGETS['1B', True][:2]):,};" in text
    assert status == "measured"
    assert check_gpu.kernels_text(check, {"kernels": {}, "micro_batches": 2}, is_quantized=True)[0] == "not run"


@pytest.mark.parametrize(
    ("syncs", "status"), [(None, "not run"), (["step.py:98"], "passed"), ([], "failed"), (["step.py:98"] * 2, "failed")]
)
def test_a_step_waits_once(scripts: dict[str, ModuleType], syncs: Any, status: str) -> None:
    assert scripts["check_gpu"].syncs_text(syncs)[0] == status


@pytest.mark.parametrize(
    ("actual", "status"), [([2.0, 1.0], "passed"), ([2.0, 1.00009], "passed"), ([2.0, 1.001], "failed")]
)
def test_parity_has_a_limit(scripts: dict[str, ModuleType], actual: list[float], status: str) -> None:
    assert scripts["check_gpu"].compare_losses(actual, [2.0, 1.0])[0] == status


@pytest.mark.parametrize(
    ("memory", "minutes", "disk", "expected"),
    [
        (85, 30, 100, ("8B", 4096)),
        (85, 10, 100, ("1B", 4096)),
        (48, 30, 100, ("8B", 2048)),
        (85, 30, 10, ("1B", 4096)),
        (8, 10, 100, ("135M", 2048)),
        (8, 10, 0.1, ("135M", 2048)),
    ],
)
def test_the_largest_model_that_fits_is_measured(
    scripts: dict[str, ModuleType], memory: float, minutes: float, disk: float, expected: tuple[str, int]
) -> None:
    shape = scripts["check_gpu"].choose_shape(memory, minutes, disk)
    assert (shape.name, shape.micro_batch_tokens) == expected


def test_a_process_that_takes_too_long_is_killed_with_its_children(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import benchmark_run

    file = tmp_path / "child"
    command = ["sh", "-c", f"sleep 1000 & echo $! > {file}; echo so far; sleep 1000"]
    for timeout in (1, 60):  # seconds; the second one on a machine that takes longer to start it
        with pytest.raises(subprocess.TimeoutExpired) as caught:
            benchmark_run.run_process(command, os.environ, timeout)
        if caught.value.stdout:
            break
    assert caught.value.stdout == "so far\n"
    child = file.read_text().strip()
    for _ in range(600):  # the kernel ends a killed process when that is scheduled
        if not is_running(child):
            return
        time.sleep(0.1)
    pytest.fail("the child still runs")


def is_running(pid: str) -> bool:
    """Whether a process has not ended; one that nobody waits for has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
