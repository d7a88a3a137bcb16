"""The loss is transformers' own, summed over tokens, whatever the padding and wherever the logits come from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lora_accel.data.batches import MicroBatch, collate
from lora_accel.data.chat import IGNORED, Example
from lora_accel.training.loss import summed_token_loss, takes_logits_to_keep

FAMILIES = ["llama", "qwen2", "opt", "gpt2"]
PAD = 4


def example(length: int, supervised: slice, start: int = 5) -> Example:
    ids = [start + (7 * i) % 200 for i in range(length)]
    labels = [IGNORED] * length
    labels[supervised] = ids[supervised]
    return Example(ids, [IGNORED, *labels[1:]])


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
        "labels": torch.tensor([x.labels + [IGNORED] * (width - len(x.labels)) for x in examples]),
    }


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_transformers_mean_times_the_tokens(tiny_model: Callable[..., Path], family: str, count: int) -> None:
    model = load(tiny_model(family))
    examples = EXAMPLES[:count]
    tokens = sum(x.num_supervised for x in examples)
    ours = summed_token_loss(model, collate(examples, PAD))
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
    together = summed_token_loss(model, collate(EXAMPLES, PAD))
    alone = sum(summed_token_loss(model, collate([x], PAD)) for x in EXAMPLES)
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=0)


def test_logits_are_made_where_a_token_is_supervised_only(tiny_model: Callable[..., Path]) -> None:
    model = load(tiny_model())
    batch = collate([EXAMPLES[1]], PAD)
    assert batch.columns.tolist() == [3, 4, 5], "a token is predicted from the one before it"
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
    assert takes_logits_to_keep(model)
    assert not takes_logits_to_keep(WithoutLogitsToKeep(model))
    batch = collate(EXAMPLES, PAD)
    torch.testing.assert_close(
        summed_token_loss(WithoutLogitsToKeep(model), batch), summed_token_loss(model, batch), rtol=1e-6, atol=0
    )


def test_the_road_is_chosen_through_wrappers(tiny_model: Callable[..., Path]) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(load(tiny_model()), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    wrapped = torch.nn.DataParallel(model)
    assert takes_logits_to_keep(model)
    assert takes_logits_to_keep(wrapped)


def empty() -> MicroBatch:
    """What a rank is given when a step has fewer micro-batches than ranks."""
    return collate([], PAD)


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
    assert summed_token_loss(model, collate([silent], PAD)).item() == 0.0
    with_it = summed_token_loss(model, collate([EXAMPLES[0], silent], PAD))
    torch.testing.assert_close(with_it, summed_token_loss(model, collate([EXAMPLES[0]], PAD)), rtol=1e-6, atol=0)


def test_a_pad_token_within_the_text_is_learned(tiny_model: Callable[..., Path]) -> None:
    """The end token often pads, and must be learned where it ends a turn."""
    model = load(tiny_model())
    ends = Example([9, 10, 11, PAD], [IGNORED, IGNORED, 11, PAD])
    batch = collate([ends, EXAMPLES[0]], PAD)
    assert batch.attention_mask[0].sum() == 4
    alone = collate([ends], PAD)
    logits = model(torch.tensor([ends.input_ids])).logits[0, 1:3]
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor([11, PAD]), reduction="sum")
    torch.testing.assert_close(summed_token_loss(model, alone), expected, rtol=1e-6, atol=0)


def test_sixteen_bit_logits_are_summed_in_float32(tiny_model: Callable[..., Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama", torch.bfloat16)).eval()
    batch = collate(EXAMPLES, PAD)
    loss = summed_token_loss(model, batch)
    assert loss.dtype == torch.float32
    logits = model(batch.input_ids, attention_mask=batch.attention_mask).logits[:, batch.columns]
    assert logits.dtype == torch.bfloat16
    exact = torch.nn.functional.cross_entropy(
        logits.double().flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    assert loss.item() == pytest.approx(exact.item(), rel=1e-6)
