"""The summed token loss equals transformers' loss, for padded and packed batches, with and without the fused loss."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lora_accel.batching.batch import MicroBatch
from lora_accel.batching.packing import empty_example, pack, pad
from lora_accel.data.chat import Example
from lora_accel.labels import IGNORE_INDEX
from lora_accel.model import fused_loss as loss_module
from lora_accel.model.fused_loss import patch_fused_loss
from lora_accel.training.loss import forward_takes, summed_token_loss
from tests.families import FUSED_LOSS, model_of

FAMILIES = ["llama", "qwen2", "opt", "gpt2"]
PAD = 4


def example(length: int, supervised: slice, start: int = 5) -> Example:
    ids = [start + (7 * i) % 200 for i in range(length)]
    labels = [IGNORE_INDEX] * length
    labels[supervised] = ids[supervised]
    return Example(ids, [IGNORE_INDEX, *labels[1:]])


EXAMPLES = [
    example(23, slice(9, 23)),
    example(11, slice(4, 7), start=17),  # supervised in the middle only
    example(17, slice(0, 17), start=40),
    example(5, slice(4, 5), start=90),  # the last token only
]


def load(folder: Path) -> torch.nn.Module:
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(folder).eval()
    return model


def padded(examples: list[Example]) -> dict[str, torch.Tensor]:
    """Return a padded batch in the format of transformers: labels as wide as the input."""
    width = max(len(x.input_ids) for x in examples)
    return {
        "input_ids": torch.tensor([x.input_ids + [PAD] * (width - len(x.input_ids)) for x in examples]),
        "attention_mask": torch.tensor([[int(i < len(x.input_ids)) for i in range(width)] for x in examples]),
        "labels": torch.tensor([x.labels + [IGNORE_INDEX] * (width - len(x.labels)) for x in examples]),
    }


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_equals_transformers_mean_times_tokens(tiny_model: Callable[..., Path], family: str, count: int) -> None:
    model = load(tiny_model(family))
    examples = EXAMPLES[:count]
    tokens = sum(x.num_supervised for x in examples)
    loss = summed_token_loss(model, pad(examples, PAD))
    expected = model(**padded(examples)).loss * tokens
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    expected.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            gradients[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_does_not_depend_on_padding_or_the_batch(tiny_model: Callable[..., Path], family: str) -> None:
    model = load(tiny_model(family))
    batched = summed_token_loss(model, pad(EXAMPLES, PAD))
    single = sum(summed_token_loss(model, pad([x], PAD)) for x in EXAMPLES)
    torch.testing.assert_close(batched, single, rtol=1e-6, atol=0)


def test_logits_are_computed_only_at_logit_positions(tiny_model: Callable[..., Path]) -> None:
    model = load(tiny_model())
    batch = pad([EXAMPLES[1]], PAD)
    assert batch.logit_positions.tolist() == [3, 4, 5], "a token is predicted from the one before it"
    assert batch.targets.tolist() == [EXAMPLES[1].input_ids[4:7]]
    shapes: list[torch.Size] = []
    model.lm_head.register_forward_hook(lambda module, args, output: shapes.append(output.shape))
    summed_token_loss(model, batch)
    assert shapes == [torch.Size([1, 3, model.config.vocab_size])]


class WithoutLogitsToKeep(torch.nn.Module):
    """A model whose forward does not accept `logits_to_keep`."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.inner = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        return self.inner(input_ids=input_ids, attention_mask=attention_mask)


@pytest.mark.parametrize("family", FAMILIES)
def test_model_without_logits_to_keep_gives_the_same_loss(tiny_model: Callable[..., Path], family: str) -> None:
    model = load(tiny_model(family))
    assert forward_takes(model, "logits_to_keep")
    assert not forward_takes(WithoutLogitsToKeep(model), "logits_to_keep")
    batch = pad(EXAMPLES, PAD)
    torch.testing.assert_close(
        summed_token_loss(WithoutLogitsToKeep(model), batch), summed_token_loss(model, batch), rtol=1e-6, atol=0
    )


def test_forward_takes_sees_through_wrappers(tiny_model: Callable[..., Path]) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(load(tiny_model()), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    wrapped = torch.nn.DataParallel(model)
    assert forward_takes(model, "logits_to_keep")
    assert forward_takes(wrapped, "logits_to_keep")


def empty() -> MicroBatch:
    """Return the micro-batch of a rank without examples."""
    return pad([empty_example(PAD)], PAD)


@pytest.mark.parametrize("family", FAMILIES)
def test_empty_micro_batch_adds_exactly_zero(tiny_model: Callable[..., Path], family: str) -> None:
    model = load(tiny_model(family))
    loss = summed_token_loss(model, empty())
    assert loss.item() == 0.0
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


def test_example_without_supervised_tokens_adds_exactly_zero(tiny_model: Callable[..., Path]) -> None:
    model = load(tiny_model())
    unsupervised = example(9, slice(0, 0))
    assert summed_token_loss(model, pad([unsupervised], PAD)).item() == 0.0
    loss = summed_token_loss(model, pad([EXAMPLES[0], unsupervised], PAD))
    torch.testing.assert_close(loss, summed_token_loss(model, pad([EXAMPLES[0]], PAD)), rtol=1e-6, atol=0)


def test_pad_token_within_the_text_is_supervised(tiny_model: Callable[..., Path]) -> None:
    """The end token is often the pad token too."""
    model = load(tiny_model())
    ended = Example([9, 10, 11, PAD], [IGNORE_INDEX, IGNORE_INDEX, 11, PAD])
    batch = pad([ended, EXAMPLES[0]], PAD)
    assert batch.attention_mask[0].sum() == 4
    logits = model(torch.tensor([ended.input_ids])).logits[0, 1:3]
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor([11, PAD]), reduction="sum")
    torch.testing.assert_close(summed_token_loss(model, pad([ended], PAD)), expected, rtol=1e-6, atol=0)


def test_bf16_logits_are_summed_in_float32(tiny_model: Callable[..., Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama", torch.bfloat16)).eval()
    batch = pad(EXAMPLES, PAD)
    loss = summed_token_loss(model, batch)
    assert loss.dtype == torch.float32
    logits = model(batch.input_ids, attention_mask=batch.attention_mask).logits[:, batch.logit_positions]
    assert logits.dtype == torch.bfloat16
    exact = torch.nn.functional.cross_entropy(
        logits.double().flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
    )
    assert loss.item() == pytest.approx(exact.item(), rel=1e-6)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use small chunks, so that there are several and the last is partial."""
    monkeypatch.setattr(loss_module, "CHUNK_NUMEL", 96 * 5)


CAPPED = ("gemma2", "gemma3_text", "gemma3n_text", "gemma4", "gemma4_text", "gemma4_unified_text", "nanochat")
CAPPED += ("vaultgemma",)


def original_and_fused(family: str, **options: Any) -> Any:
    """Return the same tiny model twice: the original, and with the fused loss. Scale and softcap have an effect."""
    if family in CAPPED:
        options["final_logit_softcapping"] = 1.5
    if family.startswith("granite"):
        options["logits_scaling"] = 3.0
    if family.startswith("cohere"):
        options["logit_scale"] = 0.3
    if family == "falcon_h1":
        options["lm_head_multiplier"] = 3.0
    original, fused = (model_of(family, **options).requires_grad_(False) for _ in range(2))
    assert patch_fused_loss(fused)
    for model in (original, fused):
        model.base_model.get_input_embeddings().weight.requires_grad_()
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(30)  # as sharp as a trained head
    return original, fused


def assert_gradients_close(model: Any, gradient: torch.Tensor) -> None:
    """Assert that the gradient of a model's embeddings is `gradient`, up to the rounding of large sums."""
    atol = max(1e-5, 1e-5 * gradient.abs().max().item())
    torch.testing.assert_close(model.get_input_embeddings().weight.grad, gradient, rtol=1e-4, atol=atol)


def within_vocabulary(examples: list[Example]) -> list[Example]:
    def wrap(values: list[int]) -> list[int]:
        return [value if value == IGNORE_INDEX else 1 + value % 95 for value in values]

    return [Example(wrap(x.input_ids), wrap(x.labels)) for x in examples]


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("family", FUSED_LOSS)
def test_label_smoothing_equals_that_of_torch(family: str) -> None:
    """Of the original model's logits; also where they are scaled and capped."""
    original, fused = original_and_fused(family, tie_word_embeddings=False)
    batch = pad(within_vocabulary(EXAMPLES), 0)
    logits = original(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, batch.logit_positions]
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch.targets.flatten(), reduction="sum", label_smoothing=0.2
    )
    (expected * 0.37).backward()
    gradient = original.get_input_embeddings().weight.grad.clone()
    for model in (original, fused):
        model.zero_grad()
        loss = summed_token_loss(model, batch, 0.2)
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
        (loss * 0.37).backward()
        assert_gradients_close(model, gradient)
    assert summed_token_loss(fused, batch).item() != pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("family", FUSED_LOSS)
def test_fused_loss_equals_the_original_loss(family: str) -> None:
    original, fused = original_and_fused(family, tie_word_embeddings=False)
    batch = pad(within_vocabulary(EXAMPLES), 0)
    expected = summed_token_loss(original, batch)
    loss = summed_token_loss(fused, batch)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    (expected * 0.37).backward()
    (loss * 0.37).backward()
    gradient = original.get_input_embeddings().weight.grad
    assert_gradients_close(fused, gradient)
    assert "logits" in fused(input_ids=batch.input_ids), "without targets the model returns logits"


def test_logits_are_never_materialized(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_NUMEL", 96 * 5)
    _, model = original_and_fused("llama", tie_word_embeddings=False)
    shapes: list[torch.Size] = []
    original = torch.nn.functional.linear

    def recording_linear(*args: Any) -> torch.Tensor:
        output = original(*args)
        shapes.append(output.shape)
        return output

    batch = pad(within_vocabulary(EXAMPLES), 0)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        monkeypatch.setattr(loss_module.F, "linear", recording_linear)
        summed_token_loss(model, batch)
    assert {rows for *_, rows, width in shapes if width == 96} <= set(range(1, 6)), "a chunk is five rows"
    assert batch.targets.numel() * 96 not in saved


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("kind", ["modules_to_save", "lora", "bias"])
def test_trained_head_gets_its_gradients(kind: str, smoothing: float) -> None:
    from peft import LoraConfig, get_peft_model

    options: dict[str, Any] = {
        "modules_to_save": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        "lora": {"target_modules": ["q_proj", "lm_head"]},
        "bias": {"target_modules": ["q_proj"], "bias": "all"},
    }[kind]
    models = []
    for is_fused in (False, True):
        torch.manual_seed(0)
        base = model_of("phi" if kind == "bias" else "llama", tie_word_embeddings=False)
        model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **options))
        assert not is_fused or patch_fused_loss(base)
        models.append(model)
    batch = pad(within_vocabulary(EXAMPLES), 0)
    losses = [summed_token_loss(model, batch, smoothing) for model in models]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=0)
    for loss in losses:
        loss.backward()
    gradients = [{n: p.grad for n, p in model.named_parameters() if p.requires_grad} for model in models]
    assert any("lm_head" in name for name in gradients[0])
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(
            gradients[1][name], gradient, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.usefixtures("small_chunks")
def test_fused_loss_under_autocast() -> None:
    original, fused = original_and_fused("llama", tie_word_embeddings=False)
    batch = pad(within_vocabulary(EXAMPLES), 0)
    with torch.autocast("cpu", torch.bfloat16):
        expected, loss = summed_token_loss(original, batch), summed_token_loss(fused, batch)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=0)
    loss.backward()
    expected.backward()
    gradient = original.get_input_embeddings().weight.grad
    difference = (fused.get_input_embeddings().weight.grad - gradient).norm() / gradient.norm()
    assert difference < 2e-2


def test_evaluation_computes_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = original_and_fused("llama", tie_word_embeddings=False)
    batch = pad(within_vocabulary(EXAMPLES), 0)
    monkeypatch.setattr(torch.Tensor, "scatter_add_", None)  # used only for the gradient
    with torch.no_grad():
        assert summed_token_loss(model, batch) > 0
    with pytest.raises(TypeError):
        summed_token_loss(model, batch)


def test_unknown_family_computes_its_own_logits(tiny_model: Callable[..., Path]) -> None:
    model = load(tiny_model())
    model.config.model_type = "unknown"
    assert not patch_fused_loss(model)
    assert summed_token_loss(model, pad(EXAMPLES, PAD)) > 0


def test_packed_and_padded_losses_are_equal(tiny_model: Callable[..., Path]) -> None:
    from lora_accel.model.attention import pack_attention

    model = load(tiny_model())
    padded_loss = summed_token_loss(model, pad(EXAMPLES, PAD))
    pack_attention(model)
    assert patch_fused_loss(model)
    torch.testing.assert_close(summed_token_loss(model, pack(EXAMPLES)), padded_loss, rtol=1e-6, atol=0)
    assert summed_token_loss(model, pack([empty_example(PAD)])).item() == 0.0


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("overwrite", [False, True])
def test_loss_of_probabilities_that_underflow_is_exact(overwrite: bool, smoothing: float) -> None:
    """The probability of a target 300 below the largest logit is zero in float32; its loss is 300."""
    torch.manual_seed(0)
    logits = torch.randn(4, 50).index_put((torch.tensor([0, 1]), torch.tensor([3, 4])), torch.tensor(300.0))
    targets = torch.tensor([5, 4, 6, IGNORE_INDEX])
    expected_logits = logits.double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(
        expected_logits, targets, ignore_index=IGNORE_INDEX, reduction="sum", label_smoothing=smoothing
    )
    expected.backward()
    loss = loss_module._loss(logits, targets, 1.0, None, smoothing, overwrite=overwrite)
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-6, atol=0)
    if overwrite:
        torch.testing.assert_close(logits[:3].double(), expected_logits.grad[:3], rtol=1e-6, atol=1e-8)
