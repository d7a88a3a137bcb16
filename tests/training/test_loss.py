"""The loss is transformers' own, summed over tokens, whatever the padding and wherever the logits come from."""

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
from lora_accel.model.families import HEADS
from lora_accel.model.fused_loss import patch_fused_loss
from lora_accel.training.loss import forward_takes, summed_token_loss
from tests.families import model_of

FAMILIES = ["llama", "qwen2", "opt", "gpt2"]
PAD = 4


def example(length: int, supervised: slice, start: int = 5) -> Example:
    ids = [start + (7 * i) % 200 for i in range(length)]
    labels = [IGNORE_INDEX] * length
    labels[supervised] = ids[supervised]
    return Example(ids, [IGNORE_INDEX, *labels[1:]])


EXAMPLES = [
    example(23, slice(9, 23)),
    example(11, slice(4, 7), start=17),  # supervised within: nothing before and after
    example(17, slice(0, 17), start=40),
    example(5, slice(4, 5), start=90),  # the last token only
]


def load(folder: Path) -> torch.nn.Module:
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(folder).eval()
    return model


def padded(examples: list[Example]) -> dict[str, torch.Tensor]:
    """The same as transformers wants it: labels of the width of the input."""
    width = max(len(x.input_ids) for x in examples)
    return {
        "input_ids": torch.tensor([x.input_ids + [PAD] * (width - len(x.input_ids)) for x in examples]),
        "attention_mask": torch.tensor([[int(i < len(x.input_ids)) for i in range(width)] for x in examples]),
        "labels": torch.tensor([x.labels + [IGNORE_INDEX] * (width - len(x.labels)) for x in examples]),
    }


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_transformers_mean_times_the_tokens(tiny_model: Callable[..., Path], family: str, count: int) -> None:
    model = load(tiny_model(family))
    examples = EXAMPLES[:count]
    tokens = sum(x.num_supervised for x in examples)
    ours = summed_token_loss(model, pad(examples, PAD))
    theirs = model(**padded(examples)).loss * tokens
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    ours.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    theirs.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            gradients[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_and_company_change_no_loss(tiny_model: Callable[..., Path], family: str) -> None:
    model = load(tiny_model(family))
    together = summed_token_loss(model, pad(EXAMPLES, PAD))
    alone = sum(summed_token_loss(model, pad([x], PAD)) for x in EXAMPLES)
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=0)


def test_logits_are_made_where_a_token_is_supervised_only(tiny_model: Callable[..., Path]) -> None:
    model = load(tiny_model())
    batch = pad([EXAMPLES[1]], PAD)
    assert batch.logit_positions.tolist() == [3, 4, 5], "a token is predicted from the one before it"
    assert batch.targets.tolist() == [EXAMPLES[1].input_ids[4:7]]
    made: list[torch.Size] = []
    model.lm_head.register_forward_hook(lambda module, args, output: made.append(output.shape))
    summed_token_loss(model, batch)
    assert made == [torch.Size([1, 3, model.config.vocab_size])]


class WithoutLogitsToKeep(torch.nn.Module):
    """A model of a stranger: input ids and mask in, all logits out."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.inner = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        return self.inner(input_ids=input_ids, attention_mask=attention_mask)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_that_makes_all_logits_gives_the_same(tiny_model: Callable[..., Path], family: str) -> None:
    model = load(tiny_model(family))
    assert forward_takes(model, "logits_to_keep")
    assert not forward_takes(WithoutLogitsToKeep(model), "logits_to_keep")
    batch = pad(EXAMPLES, PAD)
    torch.testing.assert_close(
        summed_token_loss(WithoutLogitsToKeep(model), batch), summed_token_loss(model, batch), rtol=1e-6, atol=0
    )


def test_the_road_is_chosen_through_wrappers(tiny_model: Callable[..., Path]) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(load(tiny_model()), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    wrapped = torch.nn.DataParallel(model)
    assert forward_takes(model, "logits_to_keep")
    assert forward_takes(wrapped, "logits_to_keep")


def empty() -> MicroBatch:
    """What a rank is given when a step has fewer micro-batches than ranks."""
    return pad([empty_example(PAD)], PAD)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_empty_micro_batch_adds_exactly_nothing(tiny_model: Callable[..., Path], family: str) -> None:
    model = load(tiny_model(family))
    loss = summed_token_loss(model, empty())
    assert loss.item() == 0.0
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


def test_an_example_without_a_supervised_token_adds_exactly_nothing(tiny_model: Callable[..., Path]) -> None:
    model = load(tiny_model())
    silent = example(9, slice(0, 0))
    assert summed_token_loss(model, pad([silent], PAD)).item() == 0.0
    with_it = summed_token_loss(model, pad([EXAMPLES[0], silent], PAD))
    torch.testing.assert_close(with_it, summed_token_loss(model, pad([EXAMPLES[0]], PAD)), rtol=1e-6, atol=0)


def test_a_pad_token_within_the_text_is_learned(tiny_model: Callable[..., Path]) -> None:
    """The end token often pads, and must be learned where it ends a turn."""
    model = load(tiny_model())
    ends = Example([9, 10, 11, PAD], [IGNORE_INDEX, IGNORE_INDEX, 11, PAD])
    batch = pad([ends, EXAMPLES[0]], PAD)
    assert batch.attention_mask[0].sum() == 4
    alone = pad([ends], PAD)
    logits = model(torch.tensor([ends.input_ids])).logits[0, 1:3]
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor([11, PAD]), reduction="sum")
    torch.testing.assert_close(summed_token_loss(model, alone), expected, rtol=1e-6, atol=0)


def test_sixteen_bit_logits_are_summed_in_float32(tiny_model: Callable[..., Path]) -> None:
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
    """Several chunks, the last not whole."""
    monkeypatch.setattr(loss_module, "CHUNK_NUMEL", 96 * 5)


def returning(family: str, **options: Any) -> Any:
    """The same tiny model twice: as it is, and returning its loss. Its scale and cap do something."""
    if family in ("gemma2", "gemma3_text"):
        options["final_logit_softcapping"] = 1.5
    if family == "granite":
        options["logits_scaling"] = 3.0
    if family in ("cohere", "cohere2"):
        options["logit_scale"] = 0.3
    usual, changed = (
        model_of(family, **options).requires_grad_(False),
        model_of(family, **options).requires_grad_(False),
    )
    assert patch_fused_loss(changed)
    for model in (usual, changed):
        model.base_model.get_input_embeddings().weight.requires_grad_()
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(30)  # as sharp as a trained head
    return usual, changed


def within_vocabulary(examples: list[Example]) -> list[Example]:
    def less(values: list[int]) -> list[int]:
        return [value if value == IGNORE_INDEX else 1 + value % 95 for value in values]

    return [Example(less(x.input_ids), less(x.labels)) for x in examples]


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("family", sorted(HEADS))
def test_the_loss_made_in_chunks_is_the_models_own(family: str) -> None:
    usual, changed = returning(family, tie_word_embeddings=False)
    batch = pad(within_vocabulary(EXAMPLES), 0)
    expected = summed_token_loss(usual, batch)
    ours = summed_token_loss(changed, batch)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)
    (expected * 0.37).backward()
    (ours * 0.37).backward()
    theirs = usual.get_input_embeddings().weight.grad
    torch.testing.assert_close(changed.get_input_embeddings().weight.grad, theirs, rtol=1e-4, atol=1e-5)
    assert "logits" in changed(input_ids=batch.input_ids), "without targets it is the model it was"


def test_no_logits_are_kept_or_made_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_NUMEL", 96 * 5)
    _, model = returning("llama", tie_word_embeddings=False)
    made: list[torch.Size] = []
    whole = torch.nn.functional.linear

    def seen(*words: Any) -> torch.Tensor:
        out = whole(*words)
        made.append(out.shape)
        return out

    batch = pad(within_vocabulary(EXAMPLES), 0)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        monkeypatch.setattr(loss_module.F, "linear", seen)
        summed_token_loss(model, batch)
    assert {rows for *_, rows, width in made if width == 96} <= set(range(1, 6)), "a chunk is five rows"
    assert batch.targets.numel() * 96 not in kept


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("kind", ["modules_to_save", "lora", "bias"])
def test_a_head_that_is_trained_has_its_gradients(kind: str) -> None:
    from peft import LoraConfig, get_peft_model

    options: dict[str, Any] = {
        "modules_to_save": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        "lora": {"target_modules": ["q_proj", "lm_head"]},
        "bias": {"target_modules": ["q_proj"], "bias": "all"},
    }[kind]
    models = []
    for returns in (False, True):
        torch.manual_seed(0)
        base = model_of("phi" if kind == "bias" else "llama", tie_word_embeddings=False)
        model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **options))
        assert not returns or patch_fused_loss(base)
        models.append(model)
    batch = pad(within_vocabulary(EXAMPLES), 0)
    losses = [summed_token_loss(model, batch) for model in models]
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
def test_under_autocast_the_head_multiplies_in_sixteen_bits() -> None:
    usual, changed = returning("llama", tie_word_embeddings=False)
    batch = pad(within_vocabulary(EXAMPLES), 0)
    with torch.autocast("cpu", torch.bfloat16):
        expected, ours = summed_token_loss(usual, batch), summed_token_loss(changed, batch)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=0)
    ours.backward()
    expected.backward()
    theirs = usual.get_input_embeddings().weight.grad
    difference = (changed.get_input_embeddings().weight.grad - theirs).norm() / theirs.norm()
    assert difference < 2e-2


def test_evaluation_forms_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = returning("llama", tie_word_embeddings=False)
    batch = pad(within_vocabulary(EXAMPLES), 0)
    monkeypatch.setattr(torch.Tensor, "scatter_add_", None)  # what forms it
    with torch.no_grad():
        assert summed_token_loss(model, batch) > 0
    with pytest.raises(TypeError):
        summed_token_loss(model, batch)


def test_an_unknown_head_makes_its_own_logits(tiny_model: Callable[..., Path]) -> None:
    model = load(tiny_model())
    model.config.model_type = "somebodys"
    assert not patch_fused_loss(model)
    assert summed_token_loss(model, pad(EXAMPLES, PAD)) > 0


def test_packed_rows_have_the_loss_of_padded_ones(tiny_model: Callable[..., Path]) -> None:
    from lora_accel.model.attention import pack_attention

    model = load(tiny_model())
    padded_loss = summed_token_loss(model, pad(EXAMPLES, PAD))
    pack_attention(model)
    assert patch_fused_loss(model)
    torch.testing.assert_close(summed_token_loss(model, pack(EXAMPLES)), padded_loss, rtol=1e-6, atol=0)
    assert summed_token_loss(model, pack([empty_example(PAD)])).item() == 0.0
