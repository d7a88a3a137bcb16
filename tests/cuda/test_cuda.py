"""What only a real NVIDIA GPU can show. All other tests hide GPUs; these run with `pytest tests/cuda`.

They were written without a GPU and have not run yet.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_accel import RunConfig, run_training
from lora_accel.batching.packing import pack
from lora_accel.config.schema import AdapterSection
from lora_accel.data.chat import Example
from lora_accel.distributed.devices import HIDDEN
from lora_accel.errors import TrainingError
from lora_accel.model.adapter import add_adapter, key_dropout
from lora_accel.model.attention import AttentionOptions, _blocks, _Blockwise, pack_attention
from lora_accel.model.device import has_package
from lora_accel.model.dropout import feature_keys, keep_mask
from lora_accel.model.fused_loss import patch_fused_loss
from lora_accel.model.gpu_attention import efficient_attention, flash_kernel, flex_attention, varlen_attention
from lora_accel.model.kernels import patch_base
from lora_accel.model.kernels.adapters import patch_adapters
from lora_accel.model.kernels.table import MIN_CAPABILITY
from lora_accel.training.loss import summed_token_loss
from lora_accel.training.memory import MAX_TOKENS
from tests.conftest import PATIENCE_SECONDS, ROOT, read_metrics, reset_accelerator, write_jsonl
from tests.families import model_of

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU: pytest tests/cuda"),
    # CUDA's libraries warn about themselves (TF32, no current context), whose code runs under that of the package.
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

GPU = torch.device("cuda:0")
LENGTHS = (5, 300, 1, 130)
TOLERANCES = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
"""Relative, of values around 1."""
KERNELS: dict[str, Callable[..., torch.Tensor]] = {
    "varlen": varlen_attention,
    "efficient": efficient_attention,
    "flex": flex_attention,
}


def blockwise(query: Any, key: Any, value: Any, options: AttentionOptions, sinks: Any = None) -> torch.Tensor:
    blocks = _blocks(LENGTHS, options.sliding_window)
    output: torch.Tensor = _Blockwise.apply(query, key, value, sinks, blocks, options)  # type: ignore[no-untyped-call]
    return output


def attend(kernel: str, inputs: list[torch.Tensor], options: AttentionOptions) -> torch.Tensor:
    """Return the attention of a kernel within `LENGTHS`; skip the test where it cannot run."""
    is_new, dtype = torch.cuda.get_device_capability() >= (8, 0), inputs[0].dtype
    if (kernel == "varlen" or dtype == torch.bfloat16) and not is_new:
        pytest.skip("FlashAttention and bfloat16 need compute capability 8.0")
    if kernel == "varlen" and flash_kernel() is None:
        pytest.skip("FlashAttention with groups needs torch 2.12")
    if kernel == "flex" and not has_package("triton"):
        pytest.skip("FlexAttention needs Triton")
    masking = {"varlen": {"window": options.sliding_window}, "efficient": {}, "flex": {}}[kernel]
    if kernel == "flex":
        # Else the ninth case would exceed torch.compile's limit of recompilations, and run without it.
        torch.compiler.reset()
        masking = {"window": options.sliding_window, "softcap": options.softcap}
    return KERNELS[kernel](*inputs, LENGTHS, scaling=options.scaling, **masking)


def random_inputs(dtype: torch.dtype, size: int, groups: int) -> list[torch.Tensor]:
    """Return query, key and value on the CPU."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn((heads, sum(LENGTHS), size), generator=generator).to(dtype) for heads in (4, groups, groups)]


@pytest.mark.parametrize(
    ("kernel", "dtype", "size", "window", "softcap"),
    [
        ("varlen", torch.bfloat16, 64, None, None),
        ("varlen", torch.float16, 96, 17, None),
        ("varlen", torch.bfloat16, 256, None, None),
        ("efficient", torch.float32, 64, None, None),
        ("efficient", torch.float32, 20, None, None),
        ("efficient", torch.float16, 20, None, None),
        ("efficient", torch.float16, 264, None, None),
        ("flex", torch.float16, 64, None, 50.0),
        ("flex", torch.bfloat16, 128, 17, 50.0),
        ("flex", torch.float32, 64, 17, None),
    ],
)
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_attention_kernels_equal_the_blockwise_one(
    kernel: str, dtype: torch.dtype, size: int, window: int | None, softcap: float | None, groups: int
) -> None:
    """Outputs and gradients, against float32 on the CPU."""
    inputs, options = random_inputs(dtype, size, groups), AttentionOptions(size**-0.5, window, softcap)
    weights = torch.randn(sum(LENGTHS), 4, size, generator=torch.Generator().manual_seed(1))

    exact = [x.float().requires_grad_() for x in inputs]
    expected = blockwise(*exact, options)
    (expected * weights).sum().backward()
    moved = [x.to(GPU).requires_grad_() for x in inputs]
    actual = attend(kernel, moved, options)
    (actual.float() * weights.to(GPU)).sum().backward()

    close = {"rtol": TOLERANCES[dtype], "atol": TOLERANCES[dtype]}
    torch.testing.assert_close(actual.float().cpu(), expected, **close)
    for one, other in zip(moved, exact, strict=True):
        assert one.grad is not None
        # The first token of a segment sums over up to 300 others.
        torch.testing.assert_close(one.grad.float().cpu(), other.grad, rtol=close["rtol"], atol=close["atol"] * 4)


@pytest.mark.parametrize(("dtype", "window"), [(torch.bfloat16, 17), (torch.float32, None)])
def test_attention_sinks_equal_those_of_the_blockwise_kernel(dtype: torch.dtype, window: int | None) -> None:
    """Outputs and gradients, those of the sinks too, against float32 on the CPU."""
    if not has_package("triton") or (dtype == torch.bfloat16 and torch.cuda.get_device_capability() < (8, 0)):
        pytest.skip("FlexAttention needs Triton, and bfloat16 compute capability 8.0")
    torch.compiler.reset()
    inputs = [*random_inputs(dtype, 64, 2), torch.linspace(-1, 3, 4).to(dtype)]
    weights = torch.randn(sum(LENGTHS), 4, 64, generator=torch.Generator().manual_seed(1))
    *exact, sinks = (x.float().requires_grad_() for x in inputs)
    expected = blockwise(*exact, AttentionOptions(0.125, window, None), sinks)
    (expected * weights).sum().backward()
    *moved, moved_sinks = (x.to(GPU).requires_grad_() for x in inputs)
    actual = flex_attention(*moved, LENGTHS, scaling=0.125, window=window, softcap=None, sinks=moved_sinks)
    (actual.float() * weights.to(GPU)).sum().backward()
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(actual.float().cpu(), expected, rtol=tolerance, atol=tolerance)
    for one, other in zip([*moved, moved_sinks], [*exact, sinks], strict=True):
        assert one.grad is not None
        assert (one.grad.float().cpu() - other.grad).norm() <= tolerance * other.grad.norm()


@pytest.mark.parametrize(
    ("kernel", "dtype", "window", "softcap"),
    [
        ("varlen", torch.bfloat16, None, None),
        ("varlen", torch.bfloat16, 17, None),
        ("efficient", torch.float32, None, None),
        ("flex", torch.float16, 17, 50.0),
    ],
)
def test_no_segment_sees_another_and_no_token_a_later_one(
    kernel: str, dtype: torch.dtype, window: int | None, softcap: float | None
) -> None:
    """Bitwise: other keys and values from the middle of the second segment to its end change only what follows them."""
    query, key, value = (x.to(GPU) for x in random_inputs(dtype, 64, 2))
    options = AttentionOptions(0.125, window, softcap)
    before = attend(kernel, [query, key, value], options)
    start, end = LENGTHS[0] + 150, LENGTHS[0] + LENGTHS[1]
    key[:, start:end], value[:, start:end] = -3 * key[:, start:end], 100.0
    after = attend(kernel, [query, key, value], options)
    assert torch.equal(before[:start], after[:start])
    assert torch.equal(before[end:], after[end:])
    assert not torch.isclose(before[end - 1], after[end - 1]).any()


def test_dropout_has_the_masks_of_the_cpu() -> None:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randint(-(2**31), 2**31, (3, 50), generator=generator).to(torch.int32) | 1
    features = feature_keys(100, 3)
    on_gpu = keep_mask(keys.to(GPU), features.to(GPU), 0.1).cpu()
    assert torch.equal(on_gpu, keep_mask(keys, features, 0.1))


@pytest.mark.skipif(not has_package("triton"), reason="needs Triton")
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("check", ["rms_norm", "gate", "rotate", "low_rank", "cross_entropy"])
def test_triton_kernels_equal_their_references(check: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks of tests/model/test_triton.py, compiled for this GPU."""
    if torch.cuda.get_device_capability() < MIN_CAPABILITY:
        pytest.skip("the kernels need compute capability 8.0")
    from tests.model import interpreter

    def on_gpu(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def made(*args: int, **options: int) -> torch.Tensor:
            with torch.device("cpu"):  # the generators are those of the CPU
                values = make(*args, **options)
            return values.to(GPU)

        return made

    for name in ("_random", "_keys"):
        monkeypatch.setattr(interpreter, name, on_gpu(getattr(interpreter, name)))
    with GPU:
        errors = interpreter.CHECKS[check](dtype)
    assert max(errors.values()) < max(2 * torch.finfo(dtype).eps, 2e-6), errors


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3", "gpt2"])
def test_forward_and_backward_never_wait_for_the_gpu(family: str) -> None:
    base = model_of(family).to(torch.bfloat16).to(GPU)
    pack_attention(base)
    patch_base(base)
    model = add_adapter(base, AdapterSection(target_modules="all-linear"), seed=0, autocast=True).to(GPU)
    keys = key_dropout(model, fused_loss=patch_fused_loss(model.get_base_model()))
    patch_adapters(model)
    batch = pack([Example([1, 2, 3, 4], [1, 2, 3, 4]), Example([5, 6, 7], [5, 6, 7])])

    def step() -> None:
        moved = batch.to(GPU)
        keys.keys = moved.token_keys
        with torch.autocast("cuda", torch.bfloat16):
            summed_token_loss(model.train(), moved).backward()

    step()  # compiles, and creates what is cached
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def losses(config: RunConfig) -> list[float]:
    run_training(config)
    reset_accelerator()
    return [line["loss"] for line in read_metrics(Path(config.output_dir))]


@pytest.mark.parametrize(("bits", "rel"), [(None, 1e-4), (4, 1e-2), (8, 2e-2)])
def test_losses_are_those_of_the_cpu(
    make_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, bits: int | None, rel: float
) -> None:
    config = make_config(training={"max_steps": 5}, quantization={"bits": bits})
    on_gpu = losses(config)
    # The run sets those of HIDDEN itself; here, so that they are restored: later tests need the GPU.
    for name, value in {"ACCELERATE_USE_CPU": "true", **HIDDEN}.items():
        monkeypatch.setenv(name, value)
    on_cpu = losses(config.model_copy(update={"output_dir": f"{config.output_dir}-cpu"}))
    assert on_gpu == pytest.approx(on_cpu, rel=rel)


@pytest.mark.parametrize(("bits", "dtype"), [(4, torch.float32), (4, torch.bfloat16), (8, torch.float16)])
def test_quantized_weights_are_those_of_the_cpu(bits: int, dtype: torch.dtype) -> None:
    """Codes and scales; a value half-way between two codes may get either."""
    from bitsandbytes import functional

    def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if bits == 8:
            codes, scales, _ = functional.int8_vectorwise_quant(weight)
        else:
            codes, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
            scales = state.absmax
        return codes.flatten().cpu(), scales.float().cpu()

    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(0)).to(dtype)
    codes, scales = quantize(weight.to(GPU))
    expected, expected_scales = quantize(weight)
    assert (codes == expected).float().mean() > 0.999
    torch.testing.assert_close(scales, expected_scales)


def one_gpu() -> Mapping[str, str]:
    """Return the environment of a process that sees the first GPU only."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    return os.environ | {"CUDA_VISIBLE_DEVICES": visible}


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_resumed_run_is_bitwise_equal_with_deterministic_kernels(
    make_config: Callable[..., RunConfig], config_file: Callable[[RunConfig], Path], precision: str
) -> None:
    file = config_file(make_config(training={"deterministic": True, "mixed_precision": precision}))
    command = [sys.executable, "-m", "lora_accel.cli", "verify-resume", "--config", str(file)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SECONDS, env=one_gpu())
    assert "bitwise equal: 4 steps" in result.stdout, result.stderr


def test_out_of_memory_names_what_takes_less(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    ids = [[5 + (3 * row + position) % 200 for position in range(200)] for row in range(40)]
    rows = write_jsonl(tmp_path / "long.jsonl", [{"input_ids": row, "labels": row} for row in ids])
    training = {"micro_batch_tokens": 100_000, "batch_size": 40, "max_steps": 2}
    config = make_config(training=training, data={"train": [{"path": str(rows)}]})
    gc.collect()
    torch.cuda.empty_cache()
    # The model fits into what is reserved and 4 MB; 8,000 tokens take about 50 MB.
    limit = torch.cuda.memory_reserved(GPU) + 4e6
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(GPU).total_memory)
    try:
        with pytest.raises(TrainingError, match=r"out of memory: CUDA out of memory\. Tried to allocate") as caught:
            run_training(config)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "training.activation_checkpointing=true: " in str(caught.value)


def test_chosen_micro_batches_fill_the_memory_and_give_the_same_losses(make_config: Callable[..., RunConfig]) -> None:
    expected = losses(make_config(training={"max_steps": 3}))
    config = make_config(training={"max_steps": 3, "micro_batch_tokens": "auto"})
    config = config.model_copy(update={"output_dir": f"{config.output_dir}-auto"})
    assert losses(config) == pytest.approx(expected, rel=1e-4)
    provenance = json.loads((Path(config.output_dir) / "provenance.json").read_text(encoding="utf-8"))
    assert provenance["config"]["training"]["micro_batch_tokens"] == MAX_TOKENS, "the model is tiny"


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("preset", ["ddp", "zero2", "zero3"])
def test_two_gpus_have_the_losses_of_one(
    make_config: Callable[..., RunConfig], config_file: Callable[[RunConfig], Path], preset: str
) -> None:
    config = make_config(training={"max_steps": 4})
    expected = losses(config)
    several = config.model_copy(update={"output_dir": f"{config.output_dir}-{preset}"})
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    command += [f"accelerate_configs/{preset}.yaml", "--num_processes", "2", "--main_process_port", "0"]
    command += ["-m", "lora_accel.train", "--config", str(config_file(several))]
    environment = os.environ | {"OMP_NUM_THREADS": "4"}
    subprocess.run(command, check=True, timeout=PATIENCE_SECONDS, env=environment, cwd=ROOT)
    actual = [line["loss"] for line in read_metrics(Path(several.output_dir))]
    assert actual == pytest.approx(expected, rel=1e-4)  # cuBLAS sums other shapes in another order
