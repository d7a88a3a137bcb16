"""What is traced on tensors without data is what a real forward saves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_accel.batching.batch import MicroBatch
from lora_accel.batching.packing import pack, pad
from lora_accel.config.schema import RunConfig
from lora_accel.data.chat import Example
from lora_accel.model.adapter import add_adapter, count_parameters, key_dropout
from lora_accel.model.attention import BLOCK, can_pack, pack_attention
from lora_accel.model.base import load_base_model
from lora_accel.model.fused_loss import patch_fused_loss
from lora_accel.model.kernels import patch_base
from lora_accel.model.kernels.adapters import patch_adapters
from lora_accel.planning.estimate import model_sizes, trace_usage
from lora_accel.planning.parameters import count_by_kind
from lora_accel.planning.skeleton import build_skeleton
from lora_accel.planning.trace import Tracer, UntraceableError
from lora_accel.training.memory import saved_activation_bytes
from tests.families import model_of

CPU = torch.device("cpu")
MASK_BYTES = 4 * BLOCK * BLOCK
"""Of the masks of attention, at most: they are allocated once for each window, and neither saved nor freed."""


@pytest.fixture
def config_of(tmp_path: Path) -> Callable[..., RunConfig]:
    """Return a function that saves a tiny model of a family and returns a run config for it."""

    def make(family: str, num_layers: int = 4, **sections: Any) -> RunConfig:
        folder = tmp_path / family
        model_of(family, num_hidden_layers=num_layers, max_position_embeddings=512).save_pretrained(folder)
        values: dict[str, Any] = {
            "output_dir": str(tmp_path / "run"),
            "model": {"name_or_path": str(folder)},
            "adapter": {"target_modules": "all-linear", "dropout": 0.1},
            "data": {"train": [{"path": "rows.jsonl"}]},
        }
        for name, section in sections.items():
            values[name] = values.get(name, {}) | section
        return RunConfig.model_validate(values)

    return make


def batch_of(*lengths: int, packed: bool = True) -> MicroBatch:
    examples = [Example(ids, ids) for ids in ([1 + i % 90 for i in range(length)] for length in lengths)]
    return pack(examples) if packed else pad(examples, 0)


def real_model(config: RunConfig) -> Any:
    """Return the model that training would use, and the keys of its dropout."""
    base = load_base_model(config.model, config.quantization, device=CPU)
    if can_pack(base):
        pack_attention(base)
    patch_base(base)
    model = add_adapter(base, config.adapter, seed=0, autocast=False)
    is_fused = patch_fused_loss(model.get_base_model())
    keys = key_dropout(model, fused_loss=is_fused)
    patch_adapters(model)
    return model.train(), keys


def check_activations(config: RunConfig, batch: MicroBatch) -> None:
    """Assert that the traced activations are those that a forward saves for backward."""
    usage = trace_usage(build_skeleton(config, "no", CPU), batch, config)
    model, keys = real_model(config)
    keys.keys = batch.token_keys
    saved = saved_activation_bytes(model, batch)
    windows = {module.sliding_window for module in model.modules() if hasattr(module, "sliding_window")}
    assert saved == pytest.approx(usage.activations, abs=1.05 * MASK_BYTES * max(1, len(windows)))


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma", "gpt2", "gemma3_text", "phi3"])
@pytest.mark.sample(4)
def test_traced_activations_are_those_that_a_forward_saves(config_of: Callable[..., RunConfig], family: str) -> None:
    config, batch = config_of(family), batch_of(90, 70, 50)
    check_activations(config, batch)


@pytest.mark.parametrize(
    "sections",
    [
        {"quantization": {"bits": 4}},
        {"adapter": {"target_modules": ["q_proj"], "layers_to_transform": [2]}},
        {"data": {"packing": False}},
    ],
    ids=["nf4", "one layer", "padded"],
)
def test_traced_activations_of_options(config_of: Callable[..., RunConfig], sections: dict[str, Any]) -> None:
    config = config_of("llama", **sections)
    batch = batch_of(90, 70, 50, packed=config.data.packing)
    check_activations(config, batch)


def test_the_layers_that_are_not_traced_are_extrapolated(config_of: Callable[..., RunConfig]) -> None:
    config, batch = config_of("llama", num_layers=6), batch_of(60)
    tracer = Tracer(build_skeleton(config, "no", CPU))
    assert tracer.usage(batch).activations == tracer._trace(batch).activations


def test_activation_checkpointing_saves_the_inputs_of_layers(config_of: Callable[..., RunConfig]) -> None:
    plain, recomputed = (
        config_of("llama", num_layers=8),
        config_of("llama", 8, training={"activation_checkpointing": True}),
    )
    batch = batch_of(200, 200)
    few, many = (trace_usage(build_skeleton(config, "no", CPU), batch, config) for config in (recomputed, plain))
    assert few.activations < many.activations / 4
    assert few.backward > many.backward, "a layer is recomputed in backward"


def test_a_model_that_needs_values_is_reported(config_of: Callable[..., RunConfig]) -> None:
    config = config_of("qwen3_moe", adapter={"dropout": 0.0, "target_modules": ["q_proj"]})
    with pytest.raises(UntraceableError, match="cannot be traced"):
        trace_usage(build_skeleton(config, "no", CPU), batch_of(60), config)


def test_real_masks_are_kept_apart_from_traced_ones(config_of: Callable[..., RunConfig]) -> None:
    config, batch = config_of("llama"), batch_of(60)
    model, keys = real_model(config)
    keys.keys = batch.token_keys
    before = saved_activation_bytes(model, batch)
    trace_usage(build_skeleton(config, "no", CPU), batch, config)
    assert saved_activation_bytes(model, batch) == before


@pytest.mark.parametrize("bits", [None, 4])
def test_sizes_are_those_of_the_loaded_model(config_of: Callable[..., RunConfig], bits: int | None) -> None:
    config = config_of("llama", quantization={"bits": bits})
    skeleton, (model, _) = build_skeleton(config, "no", CPU), real_model(config)
    counts, sizes = count_by_kind(skeleton.model), model_sizes(config, skeleton)
    trained = sum(count.numel for count in counts if count.is_trained)
    assert (trained, sum(count.numel for count in counts)) == count_parameters(model)
    assert (sizes.trained_numel, sizes.trained) == (trained, 4 * trained)
    loaded = sum(x.numel() * x.element_size() for x in (*model.parameters(), *model.buffers()) if not x.requires_grad)
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            loaded += sum(x.numel() * x.element_size() for x in (state.absmax, state.state2.absmax))
    assert sizes.base == loaded


def test_parameters_by_kind(config_of: Callable[..., RunConfig]) -> None:
    config = config_of("llama", adapter={"target_modules": ["q_proj"], "r": 2, "trainable_token_indices": [3, 4, 5]})
    counts = {count.kind: count for count in count_by_kind(build_skeleton(config, "no", CPU).model)}
    trained = {kind: (count.num_tensors, count.numel) for kind, count in counts.items() if count.is_trained}
    assert trained == {
        "q_proj: LoRA A": (4, 4 * 2 * 32),
        "q_proj: LoRA B": (4, 4 * 32 * 2),
        "embed_tokens: token rows": (1, 3 * 32),
    }
    assert counts["norms"].numel == 9 * 32
    assert counts["k_proj"].num_tensors == 4
