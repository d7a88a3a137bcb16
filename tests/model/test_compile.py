"""Compiled layers: equal results, one compilation for all layers and lengths, and an error without a compiler."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from packaging.version import Version
from torch import nn
from torch._dynamo.utils import counters

from lora_accel.batching.packing import pack
from lora_accel.batching.prefixes import shared_nodes
from lora_accel.data.chat import Example
from lora_accel.errors import ConfigError
from lora_accel.model.attention import pack_attention
from lora_accel.model.compile import compile_layers
from tests.conftest import run_code
from tests.families import model_of

CPU = torch.device("cpu")

pytestmark = pytest.mark.launch  # the compiler starts processes


@pytest.fixture(autouse=True)
def _reset_counters() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def forward(model: nn.Module, lengths: Sequence[int]) -> torch.Tensor:
    ids = iter(range(1, 200))
    examples = [Example([next(ids) % 60 + 1 for _ in range(length)], [1] * length) for length in lengths]
    logits: torch.Tensor = model(**pack(examples).inputs, use_cache=False).logits
    return logits


compiles_once = pytest.mark.skipif(
    Version(torch.__version__) < Version("2.13"), reason="torch 2.9 recompiles for some lengths, which is only slower"
)


@compiles_once
def test_layers_are_compiled_once_for_all_lengths() -> None:
    model, eager = model_of("llama").train(), model_of("llama").train()
    pack_attention(model)
    pack_attention(eager)
    compile_layers(model, CPU)
    num_graphs = []
    for lengths in ((9, 5, 3), (7, 4), (12,), (3, 3, 8, 2, 5), (21, 2)):
        logits, expected = forward(model, lengths), forward(eager, lengths)
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-6)
        logits.square().sum().backward()
        expected.square().sum().backward()
        num_graphs.append(counters["stats"]["unique_graphs"])
    for parameter, reference in zip(model.parameters(), eager.parameters(), strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, reference.grad, rtol=1e-4, atol=1e-5)
    assert num_graphs[1] > 0
    assert num_graphs[1:] == num_graphs[1:2] * 4


@compiles_once
def test_rows_with_shared_tokens_are_compiled_once() -> None:
    """For any trie, and no more often than rows without."""
    model, eager = (
        model_of("llama", max_position_embeddings=512).train(),
        model_of("llama", max_position_embeddings=512),
    )
    pack_attention(model)
    pack_attention(eager)
    compile_layers(model, CPU)
    num_graphs = []
    for count in (2, 3, 5, 4):
        examples = [
            Example([1] * (20 + 17 * (i % 2)) + [2 + i], [-100] * (20 + 17 * (i % 2)) + [2 + i]) for i in range(count)
        ]
        inputs = pack(examples, shared_nodes(examples)).inputs
        assert inputs["segments"].is_shared
        logits, expected = (m(**inputs, use_cache=False).logits for m in (model, eager))
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-6)
        logits.square().sum().backward()
        num_graphs.append(counters["stats"]["unique_graphs"])
    assert num_graphs[1:] == num_graphs[1:2] * 3


def test_only_training_is_compiled() -> None:
    model = model_of("llama").eval()
    pack_attention(model)
    before = forward(model, (9,))
    compile_layers(model, CPU)
    counters.clear()
    assert torch.equal(forward(model, (9,)), before)
    assert not counters["stats"]["unique_graphs"]


def test_model_without_known_layers_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"training\.compile: Linear has no decoder layers of transformers"):
        compile_layers(nn.Linear(2, 2), CPU)


def test_missing_compiler_is_an_error(tmp_path: Path) -> None:
    """An empty PATH simulates a machine without a compiler."""
    code = (
        "import torch\n"
        "from tests.families import model_of\n"
        "from lora_accel.errors import ConfigError\n"
        "from lora_accel.model.compile import compile_layers\n"
        "try:\n"
        "    compile_layers(model_of('llama'), torch.device('cpu'))\n"
        "except ConfigError as error:\n"
        "    print('error:', error)\n"
    )
    (tmp_path / "bin").mkdir()
    ran = run_code(code, PATH=str(tmp_path / "bin"), TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[-1].startswith("error: training.compile: torch.compile does not work here: ")
