"""The package's own steps, evaluation, replies, saving and resume on a fake GPU: devices, waits, copies and dtypes.

One process runs all cases. It preloads a library that makes torch believe in a GPU (fake_cuda.cpp). Without `--faults`
these are the cases of `SELECTED`, in which every two values of different options occur together.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from lora_accel.training.memory import MAX_TOKENS
from tests.conftest import PATIENCE_SECONDS, ROOT, chat_rows, write_jsonl
from tests.families import model_of

FAMILIES = ("llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "mixtral", "gpt2", "opt")
BASES = {"plain": None, "nf4": 4, "int8": 8}
"""Bits of the quantization."""
PRECISIONS = ("bf16", "fp16", "no")
LAYOUTS = ("packed", "padded")
ACTIVATIONS = ("saved", "checkpointed")
CONTROLS = ("buffer_on_the_cpu", "value_on_the_host", "copy_per_layer")


class Case(NamedTuple):
    """One training configuration."""

    family: str
    base: str = "plain"
    precision: str = "bf16"
    layout: str = "packed"
    activations: str = "saved"
    capability: tuple[int, int] = (9, 0)
    control: str = "none"
    is_shared: bool = False
    """Whether examples share the tokens with which they begin."""

    @property
    def name(self) -> str:
        """The test's id."""
        return "-".join(map(str, (*self[:5], *self.capability, self.control, *["shared"] * self.is_shared)))


MATRIX = [Case(*values) for values in itertools.product(FAMILIES, BASES, PRECISIONS, LAYOUTS, ACTIVATIONS)]
SELECTED = [
    Case(family, base, PRECISIONS[(i + j) % 3], LAYOUTS[(i + j) % 2], ACTIVATIONS[(i // 2 + j) % 2])
    for i, family in enumerate(FAMILIES)
    for j, base in enumerate(BASES)
]
T4 = [Case(family, precision="fp16", capability=(7, 5)) for family in ("llama", "gemma2")]
"""On a GPU without bfloat16 and FlashAttention."""
SHARED = [
    Case("llama", is_shared=True),
    Case("qwen3", "nf4", activations="checkpointed", is_shared=True),
    Case("mixtral", precision="no", is_shared=True),
    Case("llama", precision="fp16", capability=(7, 5), is_shared=True),
]
ORDINARY = [*SELECTED, *T4, *SHARED]
MISTAKES = [Case("llama", control=control) for control in CONTROLS]
TOKENS_PER_REPLY = 2
"""After which the worker lets `generate` stop."""

Result = Mapping[str, Any]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give tests their cases: all of the matrix with `--faults`, those that every run has without."""
    if "case" not in metafunc.fixturenames or any(metafunc.definition.iter_markers("parametrize")):
        return
    cases = [*MATRIX, *T4, *SHARED] if metafunc.config.getoption("--faults") else ORDINARY
    if metafunc.function in (test_packed_attention_is_one_kernel_per_layer, test_a_checkpoint_is_restored_onto_the_gpu):
        cases = [case for case in cases if case.layout == "packed"]
    metafunc.parametrize("case", [pytest.param(case, id=case.name) for case in cases])


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="preloads a library")


@pytest.fixture(scope="module")
def results(
    library: Path, tmp_path_factory: pytest.TempPathFactory, tokenizer: Any, request: pytest.FixtureRequest
) -> dict[Case, Result]:
    """Run the cases of the selected tests in one process; return the result of each."""
    root = tmp_path_factory.mktemp("device")
    rows = write_jsonl(root / "rows.jsonl", chat_rows(21))
    system = {"role": "system", "content": "Answer each of the following questions in one word that is in it. " * 2}
    shared_rows = [{"messages": [system, *row["messages"]]} for row in chat_rows(21)]
    shared = write_jsonl(root / "shared.jsonl", shared_rows)
    tests = [
        item for item in request.session.items if isinstance(item, pytest.Function) and item.path == Path(__file__)
    ]
    cases = list(dict.fromkeys(test.callspec.params["case"] for test in tests if hasattr(test, "callspec")))
    for family in {case.family for case in cases}:
        model_of(family, vocab_size=400, max_position_embeddings=512, hidden_size=64, head_dim=16).save_pretrained(
            root / family
        )
        tokenizer.save_pretrained(root / family)

    def config(case: Case) -> dict[str, Any]:
        return {
            "output_dir": str(root / "runs" / case.name),
            "model": {"name_or_path": str(root / case.family)},
            "quantization": {"bits": BASES[case.base]},
            # PEFT's LoRA on experts has no dropout.
            "adapter": {"target_modules": "all-linear", "dropout": 0.0 if case.family == "mixtral" else 0.1},
            "data": {"train": [{"path": str(shared if case.is_shared else rows)}], "max_length": 300}
            | {"eval": [{"path": str(shared if case.is_shared else rows), "limit": 2}]}
            | {"packing": case.layout == "packed"},
            "training": {
                "epochs": 1,
                "batch_size": 8 if case.is_shared else 3,
                "share_prefixes": "auto",
                "micro_batch_tokens": 450 if case.is_shared else 150 if case.layout == "packed" else 200,
                "mixed_precision": case.precision,
            }
            | {"activation_checkpointing": case.activations == "checkpointed"},
            "evaluation": {"max_new_tokens": 4}
            | ({"metrics": ["exact_match"]} if case.layout == "packed" else {"prompts": ["hello", "the answer is"]}),
            "logging": {"trackers": [], "report": False},
        }

    requested, answer = root / "cases.json", root / "results.json"
    entries = [{"config": config(case), "control": case.control, "capability": case.capability} for case in cases]
    requested.write_text(json.dumps({"library": str(library), "cases": entries}), encoding="utf-8")
    environment = os.environ | {"LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.device.worker", str(requested), str(answer)]
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE_SECONDS
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return dict(zip(cases, json.loads(answer.read_text(encoding="utf-8")), strict=True))


@pytest.fixture
def result(results: dict[Case, Result], case: Case) -> Result:
    """Return the result of a case, which must not have failed."""
    assert "error" not in results[case], (results[case]["error"], results[case]["frames"])
    return results[case]


def test_selected_cases_have_all_pairs_of_values() -> None:
    for first, second in itertools.combinations(range(5), 2):
        pairs = {(case[first], case[second]) for case in MATRIX}
        assert {(case[first], case[second]) for case in SELECTED} == pairs


def test_a_step_waits_once_and_copies_only_its_batch(result: Result, case: Case) -> None:
    """Except in 8 bits: bitsandbytes looks for outliers in the input of each layer, and waits for the answer."""
    assert result["packed"] is (case.layout == "packed")
    forwards = 2 if case.activations == "checkpointed" else 1
    for step in [result["step"], result["next_step"]] if case.layout == "packed" else [result["step"]]:
        assert step["micro_batches"] > 1
        waits = [wait for wait in step["syncs"] if wait != "bitsandbytes"]
        assert waits == ["step.py:train_step"], "one wait per step, none per micro-batch"
        outliers = len(step["syncs"]) - 1
        assert outliers == result["int8_layers"] * step["micro_batches"] * forwards
        assert step["to_device"] == ["batch.py:<dictcomp>"] * result["fields"] * step["micro_batches"]
        assert step["blocking"] == []
    assert result["batches"][0] == [1, False], "the next step's batch is built before the wait"
    assert (result["int8_layers"] > 0) is (case.base == "int8")


def test_evaluation_waits_once_per_source(result: Result, case: Case) -> None:
    evaluation = result["evaluation"]
    assert [wait for wait in evaluation["syncs"] if wait != "bitsandbytes"] == ["evaluator.py:evaluate"]
    assert evaluation["blocking"] == []


def test_replies_wait_once_per_token(result: Result, case: Case) -> None:
    """And six times for each batch: for transformers' checks of its arguments, and for the tokens of the reply."""
    assert result["replied"]
    assert "FailedReply" not in str(result["replied"])
    waits = [wait for wait in result["replies"]["syncs"] if wait != "bitsandbytes"]
    assert waits == ["generation.py:generate_replies"] * (6 + TOKENS_PER_REPLY)


def test_a_checkpoint_is_restored_onto_the_gpu(result: Result, case: Case) -> None:
    """With the devices, dtypes and shapes that the tensors had. The next step trains with them.

    Of packed cases only: a checkpoint does not depend on how rows are batched.
    """
    assert Counter(result["save"]["syncs"]) == {
        "adapter.py:_on_cpu": result["num_trained"],
        "checkpoint.py:_moments": 2 * result["num_trained"],
        # Accelerate's state dict, of which the adapter is a part, has the base's scales.
        **({"bitsandbytes": result["nf4_layers"]} if case.base == "nf4" else {}),
    }
    assert result["resumed_step"] == 1
    assert result["restored"] == result["trained"]
    assert all(tensor.startswith("cuda:0, torch.float32") for tensor in result["restored"].values())


def test_mixed_precision_computes_in_16_bits(result: Result, case: Case) -> None:
    """No matrix product over tokens is in float32, and neither are the hidden states between layers.

    Batched products belong to attention, whose kernel torch can only choose on a real GPU.
    """
    dtype = {"bf16": "torch.bfloat16", "fp16": "torch.float16", "no": "torch.float32"}[case.precision]
    for part in ("step", "evaluation", "replies"):
        products = [product for product in result[part]["products"] if "bmm" not in product]
        assert {product.split(", ")[1] for product in products} == {dtype}
    assert result["hidden_dtypes"] == [dtype]


def test_micro_batches_fill_the_memory(result: Result) -> None:
    """The models are tiny, and 80 GB are free."""
    assert result["chosen_tokens"] == MAX_TOKENS


@pytest.mark.parametrize("case", [pytest.param(case, id=case.control) for case in MISTAKES])
def test_mistakes_are_found(results: dict[Case, Result], case: Case) -> None:
    """The checks above would fail for each of them."""
    result = results[case]
    if case.control == "buffer_on_the_cpu":
        assert "found at least two devices, cuda:0 and cpu" in result["error"]
    elif case.control == "value_on_the_host":
        assert "controls.py:<lambda>" in result["step"]["syncs"]
    else:
        assert result["step"]["blocking"].count("controls.py:hook") >= 4


def test_packed_attention_is_one_kernel_per_layer(result: Result, case: Case) -> None:
    """Instead of a loop over blocks, which would start a dozen kernels for each."""
    has_varlen = case.precision != "no" and case.capability >= (8, 0) and case.family != "gemma2"
    num_windows = {"gemma2": 2, "gemma3_text": 2, "qwen2": 1}.get(case.family, 0)  # flex supports a window or a softcap
    flex = 0 if has_varlen else num_windows
    expected = {
        "_varlen_attn": 2 if has_varlen else 0,
        "_efficient_attention": 0 if has_varlen else 2 - flex,
        "flex_attention": flex,
    }
    if case.is_shared:  # the other two find no keys of earlier segments
        expected = dict.fromkeys(expected, 0) | {"flex_attention": 2}
    forward = {"_efficient_attention": "_efficient_attention_forward"}
    recomputed = 2 if case.activations == "checkpointed" else 1
    for kernel, num_layers in expected.items():
        total = num_layers * result["step"]["micro_batches"]
        assert result["step"]["kernels"].get(forward.get(kernel, kernel), 0) == total * recomputed
        assert result["step"]["kernels"].get(f"{kernel}_backward", 0) == total


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in SHARED])
def test_the_layers_of_a_forward_share_one_mask(result: Result, case: Case) -> None:
    """Of shared prefixes, also if activations are recomputed. It is made of tensors of the batch: no wait, no copy."""
    for step in (result["step"], result["next_step"]):
        assert step["computed_tokens"] < 0.75 * step["tokens"], "the limit of model/sharing.py"
        assert step["masks"] == step["micro_batches"]
    assert result["fields"] == 8, "those of a row without shared tokens, and seen_until"
