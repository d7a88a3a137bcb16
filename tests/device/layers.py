"""Kernels, traffic, operations and saved memory of a training step by decoder layer, on a fake GPU, at real sizes.

A model of two layers less one of one layer leaves exactly one layer. Modeled, not measured: no kernel runs.
"""

from __future__ import annotations

import dataclasses
import gc
from collections import Counter
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, PreTrainedModel

from lora_accel.batching.batch import MicroBatch
from lora_accel.batching.batches import BatchOptions, step_batch
from lora_accel.config.schema import RunConfig
from lora_accel.data.chat import Example
from lora_accel.model.dropout import DropoutKeys
from lora_accel.setup import model as setup_model
from lora_accel.training.loss import summed_token_loss
from tests.device import peers
from tests.device.controls import CONTROLS
from tests.device.fake_cuda import move_model
from tests.device.traffic import COPIES, Kernel, TrafficRecorder

SIZES: dict[str, dict[str, int]] = {
    "8B": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "1B": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "135M": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
    },
}
"""Llama 3.1 8B, Llama 3.2 1B, SmolLM2 135M."""
WAYS = ("ours", "PEFT", "TRL + Liger")
NUM_LAYERS = {"8B": 32, "1B": 16, "135M": 30}
TOKENS, EXAMPLES = 4096, 8
"""A packed row of 8 examples with 512 tokens each, all supervised."""


@dataclasses.dataclass(frozen=True)
class Case:
    """What to measure."""

    way: str
    """One of WAYS."""
    size: str
    """A key of SIZES."""
    is_quantized: bool = False
    """Linear layers in nf4, with nested quantization."""
    dropout: float = 0.05
    control: str = "none"
    """A key of tests.device.controls.CONTROLS: a mistake that a budget must find."""


@dataclasses.dataclass(frozen=True)
class Costs:
    """The cost of one forward and backward."""

    first: Counter[Kernel]
    """Kernels of a model with one layer. Its backward is shorter: nothing before it needs a gradient."""
    layer: Counter[Kernel]
    """Kernels of each further layer."""
    saved_bytes: int
    """What a further layer saves for backward."""

    def kernels(self, *, is_backward: bool) -> int:
        """Return the kernels of a layer, in forward or in backward."""
        return sum(count for kernel, count in self.layer.items() if kernel.is_backward is is_backward)

    @property
    def elementwise_bytes(self) -> int:
        """Return the traffic of a layer's kernels other than matrix products and attention."""
        return sum(count * kernel.nbytes for kernel, count in self.layer.items() if not kernel.flop)

    @property
    def total_bytes(self) -> int:
        """Return the traffic of all kernels of a layer."""
        return sum(count * kernel.nbytes for kernel, count in self.layer.items())

    @property
    def flop(self) -> int:
        """Return the operations of a layer's matrix products and attention."""
        return sum(count * kernel.flop for kernel, count in self.layer.items())

    @property
    def copies(self) -> int:
        """Return the kernels of a layer that only copy or cast."""
        return sum(count for kernel, count in self.layer.items() if kernel.name in COPIES)

    @property
    def outside(self) -> tuple[int, float, float]:
        """Return kernels, element-wise MB and TFLOP outside of layers, less what the first layer's backward lacks."""
        rest = Counter(self.first)
        rest.subtract(self.layer)
        elementwise = sum(count * kernel.nbytes for kernel, count in rest.items() if not kernel.flop)
        flop = sum(count * kernel.flop for kernel, count in rest.items())
        return sum(rest.values()), round(elementwise / 1e6, 1), round(flop / 1e12, 3)

    def step(self, num_layers: int) -> Counter[Kernel]:
        """Return the kernels of a model with any number of layers."""
        return self.first + Counter({kernel: count * (num_layers - 1) for kernel, count in self.layer.items()})


def measure(case: Case, mode: Any) -> Costs:
    """Return the cost of a case.

    Args:
        mode: of tests.device.fake_cuda.install.
    """
    (first, first_saved), (both, both_saved) = (_run(case, num_layers, mode) for num_layers in (1, 2))
    assert first <= both, "a deeper model has the same kernels and more"
    return Costs(first, both - first, both_saved - first_saved)


def _run(case: Case, num_layers: int, mode: Any) -> tuple[Counter[Kernel], int]:
    """Run forward and backward; return the kernels, and the bytes of tensors that exist between the two."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    accelerator = Accelerator(mixed_precision="bf16")
    micro_batch = _micro_batch()
    model, keys = _ours(case, num_layers, accelerator) if case.way == "ours" else _peer(case, num_layers)
    move_model(model, mode)
    CONTROLS[case.control](model)
    with mode, peers.rotary_embedding(case.way):
        model = accelerator.prepare_model(model, device_placement=False).train()
        micro_batch = micro_batch.to(accelerator.device)
        if keys is not None:
            keys.keys = micro_batch.token_keys
        labels = torch.zeros_like(micro_batch.input_ids)
        recorder = TrafficRecorder()
        with recorder:
            if case.way == "ours":
                loss = summed_token_loss(model, micro_batch)
            else:
                loss = model(**micro_batch.inputs, labels=labels)["loss"]
            gc.collect()
            saved = recorder.live_bytes()
            recorder.is_backward = True
            loss.backward()
    return recorder.traffic, saved


def _micro_batch() -> MicroBatch:
    length = TOKENS // EXAMPLES
    examples = [Example([1] * length, [-100] + [1] * (length - 1), key) for key in range(EXAMPLES)]
    batch = step_batch(examples, BatchOptions(pad_id=0, packed=True, max_tokens=TOKENS))
    (micro_batch,) = batch.micro_batches
    return micro_batch


def _ours(case: Case, num_layers: int, accelerator: Accelerator) -> tuple[nn.Module, DropoutKeys]:
    """Return a model that the package's own function has prepared, on the meta device, and its dropout keys."""
    config = RunConfig.model_validate(
        {
            "output_dir": "unused",
            "model": {"name_or_path": "unused"},
            "quantization": {"bits": 4 if case.is_quantized else None},
            "adapter": {"r": 16, "target_modules": "all-linear", "dropout": case.dropout},
            "data": {"train": [{"path": "unused"}]},
            "training": {"epochs": 1, "batch_size": EXAMPLES, "mixed_precision": "bf16"},
        }
    )
    replaced = {
        "load_base_model": lambda *args, **kwargs: _base(case, num_layers),
        "has_fused_adamw": lambda device: False,  # the fused optimizer does not accept meta tensors
    }
    originals = {name: getattr(setup_model, name) for name in replaced}
    accelerator.prepare = lambda *objects: objects  # type: ignore[method-assign]
    try:
        vars(setup_model).update(replaced)
        prepared = setup_model.prepare_model(config, accelerator)
    finally:
        vars(setup_model).update(originals)
    return prepared.model, prepared.dropout_keys


def _peer(case: Case, num_layers: int) -> tuple[nn.Module, None]:
    """Return a model that another trainer would train, on the meta device."""
    build = {"PEFT": peers.transformers_with_peft, "TRL + Liger": peers.trl_with_liger}[case.way]
    return build(_base(case, num_layers), dropout=case.dropout, is_quantized=case.is_quantized), None


def _base(case: Case, num_layers: int) -> PreTrainedModel:
    """Return a frozen Llama in bfloat16 as `load_base_model` would."""
    config = LlamaConfig(**SIZES[case.size], num_hidden_layers=num_layers, max_position_embeddings=8192)
    config.use_cache = False
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.requires_grad_(False)
    if case.is_quantized:
        _quantize(model)
    return model


def _quantize(model: Any) -> None:
    """Replace linear layers by bitsandbytes' as transformers does, with tensors of the sizes of nested nf4."""
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear

    options = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    replace_with_bnb_linear(model, ["lm_head"], options)
    model.is_loaded_in_4bit, model.is_quantized = True, True
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.weight = _nf4_weight(module.out_features, module.in_features)


def _nf4_weight(out_features: int, in_features: int) -> nn.Parameter:
    from bitsandbytes.functional import QuantState

    numel, device = out_features * in_features, "meta"
    blocks = numel // 64
    nested = QuantState(
        torch.empty(-(-blocks // 256), device=device),
        code=torch.empty(256, device=device),
        blocksize=256,
        dtype=torch.float32,
    )
    state = QuantState(
        torch.empty(blocks, dtype=torch.uint8, device=device),
        shape=torch.Size((out_features, in_features)),
        code=torch.empty(16, device=device),
        blocksize=64,
        quant_type="nf4",
        dtype=torch.bfloat16,
        offset=torch.empty((), device=device),
        state2=nested,
    )
    weight: Any = nn.Parameter(torch.empty((numel // 2, 1), dtype=torch.uint8, device=device), requires_grad=False)
    weight.quant_state, weight.compress_statistics, weight.quant_type = state, True, "nf4"
    return weight
