"""Examples that share the tokens with which they begin: the same results, and no token that sees a sibling's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel

from lora_accel.batching.batch import MicroBatch, Segments
from lora_accel.batching.packing import pack, pad
from lora_accel.batching.prefixes import shared_nodes
from lora_accel.config.schema import AdapterSection, TrainingSection
from lora_accel.data.chat import Example
from lora_accel.errors import ConfigError
from lora_accel.labels import IGNORE_INDEX
from lora_accel.model.adapter import add_adapter, key_dropout, trainable_parameters
from lora_accel.model.attention import BLOCK, TILE, AttentionOptions, _blocks, _Blockwise, pack_attention, tile_size
from lora_accel.model.fused_loss import patch_fused_loss
from lora_accel.model.gpu_attention import flex_attention
from lora_accel.model.kernels.adapters import patch_adapters
from lora_accel.model.sharing import MIN_SAVING_ON_GPU, min_saving_of, why_not_shared
from lora_accel.training.loss import summed_token_loss
from tests.families import PACKING, model_of

FAMILIES = ["llama", "qwen3", "gemma", "gpt2", "opt", "phi", "mixtral", "olmo2", "glm4"]
OWN_DROPOUT = {"opt": {"dropout": 0.0}, "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0}}
"""Of these models, which depends on earlier draws."""
CPU = torch.device("cpu")


def tokens(count: int, seed: int) -> list[int]:
    return torch.randint(1, 90, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def examples_of(depth: int) -> list[Example]:
    """Examples with `depth` levels of shared tokens, some answers directly after them, and one example without."""
    prompts = [tokens(20, 0)] if depth else [[]]
    for level in range(1, depth):
        prompts = [[*prompt, *tokens(17, 10 * level + branch)] for branch in range(2) for prompt in prompts]
    examples = []
    for number, prompt in enumerate(prompts):
        for own in range(3):
            question, answer = tokens(own, 100 + 7 * number + own), tokens(3 + own, 200 + 7 * number + own)
            ids = [*prompt, *question] or [1]
            examples.append(Example(ids + answer, [IGNORE_INDEX] * len(ids) + answer, key=3))
    return [*examples, Example(tokens(9, 300), [IGNORE_INDEX] * 5 + tokens(4, 301), key=3)]


def prepared(family: str, dropout: float) -> tuple[PeftModel, Any]:
    base = model_of(family, max_position_embeddings=512, **OWN_DROPOUT.get(family, {})).requires_grad_(False)
    pack_attention(base)
    # PEFT adapts Mixtral's experts, which have no dropout.
    targets = "all-linear" if family != "mixtral" else ["q_proj", "k_proj", "v_proj", "o_proj"]
    section = AdapterSection(target_modules=targets, r=4, dropout=dropout)
    model = add_adapter(base, section, seed=0, autocast=False)
    patch_fused_loss(model.get_base_model())
    keys = key_dropout(model)
    patch_adapters(model)
    for seed, (name, parameter) in enumerate(trainable_parameters(model).items()):
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)) * 0.1
    return model.train(), keys


def step(family: str, batch: MicroBatch, dropout: float) -> tuple[float, torch.Tensor]:
    model, keys = prepared(family, dropout)
    keys.keys = batch.token_keys
    loss = summed_token_loss(model, batch)
    loss.backward()
    gradients = [p.grad.flatten() for p in trainable_parameters(model).values() if p.grad is not None]
    return loss.item(), torch.cat(gradients)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_separate_examples(family: str, depth: int, dropout: float) -> None:
    examples = examples_of(depth)
    shared = pack(examples, shared_nodes(examples))
    assert shared.input_ids.numel() < 0.7 * sum(len(example.input_ids) for example in examples)
    loss, gradient = step(family, shared, dropout)
    packed_loss, packed = step(family, pack(examples), dropout)
    padded_loss, padded = step(family, pad(examples, 0), dropout)
    assert loss == pytest.approx(packed_loss, rel=1e-6) == pytest.approx(padded_loss, rel=1e-6)
    assert (gradient - packed).norm() <= 2e-6 * packed.norm() + 2 * (packed - padded).norm(), "rounding"


SHARING_OPTIONS = {
    "gpt2": {"embd_pdrop": 0.0, "resid_pdrop": 0.0},
    "gpt_oss": {"layer_types": ["full_attention"] * 2},
    "granitemoehybrid": {"layer_types": ["attention"] * 2},
    "opt": {"dropout": 0.0},
    "qwen2": {"use_sliding_window": False},
}
"""Of families whose tiny models share nothing."""


@pytest.mark.parametrize(
    ("family", "options"),
    [*((name, {}) for name in PACKING), *(item for item in SHARING_OPTIONS.items() if item[0] in PACKING)],
)
def test_each_packed_family_shares_or_names_why_not(family: str, options: dict[str, Any]) -> None:
    """Losses and gradients of all weights; models that cannot share raise if they are made to."""
    base = model_of(family, max_position_embeddings=512, **options)
    pack_attention(base)
    examples = examples_of(2)
    shared, packed = pack(examples, shared_nodes(examples)), pack(examples)
    reason = why_not_shared(TrainingSection(), base, packed=True)
    if reason is not None:
        assert not options
        if "draws random numbers" in reason:
            return
        with pytest.raises(AssertionError, match="why_not_shared"):
            base(**shared.inputs, use_cache=False)
        return
    losses, gradients = [], []
    for batch in (shared, packed):
        base.zero_grad()
        logits = base(**batch.inputs, use_cache=False).logits[0, batch.logit_positions]
        losses.append(torch.nn.functional.cross_entropy(logits, batch.targets[0], reduction="none"))
        losses[-1].sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in base.parameters() if p.grad is not None]))
    # The rows hold the examples in another order.
    torch.testing.assert_close(losses[0].sort()[0], losses[1].sort()[0], rtol=1e-6, atol=1e-6)
    assert (gradients[0] - gradients[1]).norm() <= 1e-6 * gradients[1].norm()


def test_a_changed_example_changes_no_bit_of_its_siblings() -> None:
    examples = examples_of(2)
    changed = [*examples]
    last = examples[-2]
    changed[-2] = last._replace(input_ids=[*last.input_ids[:-1], 91], labels=[*last.labels[:-1], 91])
    model, keys = prepared("llama", 0.1)
    logits = []
    for these in (examples, changed):
        nodes = shared_nodes(these)
        batch = pack(these, nodes)
        keys.keys = batch.token_keys
        with torch.no_grad():
            logits.append(model(**batch.inputs, use_cache=False).logits[0])
    differs = (logits[0] != logits[1]).any(dim=1).nonzero().flatten().tolist()
    ends = torch.tensor([node.last - node.first for node in nodes]).cumsum(0).tolist()
    leaf = next(
        i for i, node in enumerate(nodes) if node.example == len(examples) - 2 and node.last == len(last.input_ids)
    )
    assert differs == [ends[leaf] - 1], "its last token only"


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_flex_attention_sees_the_same_keys(softcap: float | None) -> None:
    examples = examples_of(3)
    batch = pack(examples, shared_nodes(examples))
    segments = batch.inputs["segments"]
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(h, batch.input_ids.numel(), 16, generator=generator) for h in (4, 2, 2))
    options = AttentionOptions(0.25, softcap)
    sinks, blocks = torch.linspace(-1, 3, 4), _blocks(segments, None, query)
    expected = _Blockwise.apply(query, key, value, sinks, blocks, options)  # type: ignore[no-untyped-call]
    output = flex_attention(query, key, value, segments, scaling=0.25, window=None, softcap=softcap, sinks=sinks)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)


def attended(segments: Segments, window: int | None) -> torch.Tensor:
    """Which keys each query attends to by definition, [T, T]: those of its segment and of all that it continues."""
    own = [index for index, length in enumerate(segments.lengths) for _ in range(length)]
    keys = torch.zeros(len(own), len(own), dtype=torch.bool)
    for query, index in enumerate(own):
        path: set[int | None] = {index}
        parent = segments.parents[index] if segments.parents else None
        while parent is not None:
            path.add(parent)
            parent = segments.parents[parent] if segments.parents else None
        first = 0 if window is None else max(0, query - window + 1)
        for key in range(first, query + 1):
            keys[query, key] = own[key] in path
    return keys


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("depth", "window"), [(0, None), (0, 50), (1, None), (2, None), (3, None)])
def test_blocks_hold_the_keys_of_their_queries(depth: int, window: int | None, dtype: torch.dtype) -> None:
    """In 16 bits on a CPU they begin and end at multiples of `TILE`."""
    tile = tile_size(dtype, CPU)
    assert tile == (1 if dtype == torch.float32 else TILE)
    lengths = (1, 300, 30, 129, 64, 128, 7) if depth == 0 else (150, 2)
    long = [Example(tokens(n, n), [IGNORE_INDEX, *tokens(n - 1, 1000 + n)]) for n in lengths]
    examples = [*examples_of(depth), *long]
    batch = pack(examples, shared_nodes(examples) if depth else None, multiple=tile)
    segments = batch.inputs["segments"]
    found = torch.zeros(batch.input_ids.numel(), batch.input_ids.numel(), dtype=torch.bool)
    blocks = _blocks(segments, window, torch.zeros(1, dtype=dtype))
    assert [0, *(block.last for block in blocks)] == [*(block.first for block in blocks), len(found)]
    for block in blocks:
        assert block.last - block.first <= BLOCK
        assert all(bound % tile == 0 for bounds in ((block.first, block.last), *block.ranges) for bound in bounds)
        keys = torch.cat([torch.arange(*bounds) for bounds in block.ranges])
        visible = torch.ones(block.last - block.first, len(keys), dtype=torch.bool)
        for start, mask in block.masks:
            assert set(mask.unique().tolist()) <= {0.0, -torch.inf}
            visible[:, start : start + mask.shape[1]] &= mask == 0
        found[block.first : block.last, keys] = visible
    assert torch.equal(found, attended(segments, window))
    if depth == 3:
        assert any(len(block.ranges) > 1 for block in blocks)


@pytest.mark.parametrize("shares", [True, False])
def test_padding_of_a_row_changes_no_loss_and_no_gradient(*, shares: bool) -> None:
    examples = examples_of(2)
    nodes = shared_nodes(examples) if shares else None
    exact, padded = pack(examples, nodes), pack(examples, nodes, pad_id=5, multiple=32)
    assert exact.input_ids.numel() % 32
    assert exact.targets.numel() % 32
    assert padded.input_ids.numel() % 32 == padded.targets.numel() % 32 == 0
    assert exact.segments is not None
    assert padded.segments is not None
    assert padded.segments.num_tokens == exact.segments.num_tokens
    (loss, gradient), (expected_loss, expected) = step("llama", padded, 0.1), step("llama", exact, 0.1)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert (gradient - expected).norm() <= 2e-6 * expected.norm()


def test_the_layers_of_a_forward_share_their_blocks() -> None:
    examples = examples_of(3)
    segments = pack(examples, shared_nodes(examples)).inputs["segments"]
    like = torch.zeros(1)
    assert _blocks(segments, None, like) is _blocks(segments, None, like)


def saving(family: str = "llama", device: torch.device = CPU, *, packed: bool = True, **training: Any) -> float | None:
    return min_saving_of(TrainingSection.model_validate(training), model_of(family), device, packed=packed)


def test_where_prefixes_are_shared() -> None:
    assert saving() == 0.0
    assert saving(device=torch.device("cuda")) == MIN_SAVING_ON_GPU
    assert saving(device=torch.device("cuda"), share_prefixes=True) == 0.0
    for unsupported in ("gemma2", "gemma3", "mistral", "lfm2"):
        assert saving(unsupported) is None
    assert saving(packed=False) is saving(neftune_alpha=5) is None
    assert saving(share_prefixes=False) is None


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"family": "gemma2"}, "layers of gemma2 attend to a window of tokens only"),
        ({"family": "lfm2"}, "layers of lfm2 carry a state from token to token"),
        ({"packed": False}, "rows are padded"),
        ({"neftune_alpha": 5}, "the noise of neftune_alpha depends on the length of each example"),
        ({"family": "opt"}, r"opt draws random numbers for each token it computes \(dropout=0.1\)"),
        (
            {"family": "gpt2"},
            r"gpt2 draws random numbers for each token it computes \(embd_pdrop=0.1, resid_pdrop=0.1\)",
        ),
    ],
)
def test_what_does_not_support_it_is_an_error_if_asked_for(arguments: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=f"training.share_prefixes: {reason}; set it to auto"):
        saving(share_prefixes=True, **arguments)


def test_many_examples_of_one_prefix_add_up_in_16_bits() -> None:
    """In 16 bits, a sum over the blocks of 1,000 examples would lose most of the gradient of the keys that they share.

    Compared are the gradients in float32, of the same rounded values.
    """
    prompt = tokens(32, 0)
    own = [[1 + i % 90, *tokens(100, i)] for i in range(1000)]  # long enough for a block each
    examples = [Example(prompt + ids, [IGNORE_INDEX] * 32 + [1] * 101) for ids in own]
    batch = pack(examples, shared_nodes(examples))
    generator = torch.Generator().manual_seed(0)
    length = batch.input_ids.numel()
    query, key, value = ((torch.rand(2, length, 16, generator=generator) - 0.2).bfloat16() for _ in range(3))
    grad = torch.rand(length, 2, 16, generator=generator).bfloat16()
    gradients = []
    for dtype in (torch.bfloat16, torch.float32):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (query, key, value)]
        blocks, options = _blocks(batch.inputs["segments"], None, leaves[0]), AttentionOptions(0.25, None)
        output = _Blockwise.apply(*leaves, None, blocks, options)  # type: ignore[no-untyped-call]
        output.backward(grad.to(dtype))
        gradients.append([leaf.grad[:, :32].float() for leaf in leaves[1:] if leaf.grad is not None])
    for rounded, exact in zip(*gradients, strict=True):
        assert (rounded - exact).norm() <= 0.02 * exact.norm()


def test_many_answers_to_one_token_add_up_in_16_bits() -> None:
    """The gradient of the token that they all follow is their number times that of one."""
    prompt, gradients = tokens(32, 0), []
    for count in (1, 1000):
        examples = [Example([*prompt, 7], [IGNORE_INDEX] * 32 + [7])] * count
        model = model_of("llama").bfloat16()
        pack_attention(model)
        patch_fused_loss(model)
        model.requires_grad_(requires_grad=False)
        model.model.norm.weight.requires_grad_()
        outputs: list[torch.Tensor] = []
        model.model.norm.register_forward_hook(lambda *args, outputs=outputs: outputs.append(args[-1]))
        batch = pack(examples, shared_nodes(examples))
        loss = summed_token_loss(model, batch)
        (gradient,) = torch.autograd.grad(loss, outputs)
        gradients.append(gradient[0, 31].float())
    assert (gradients[1] - 1000 * gradients[0]).norm() <= 0.02 * gradients[1].norm()
