"""Compare examples and prompts with the sizes of a model, before its weights are loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from lora_accel.config.schema import ModelSection, RunConfig
from lora_accel.data.store import Examples
from lora_accel.data.template import ChatTemplate
from lora_accel.errors import ConfigError, DataError
from lora_accel.logs import logger
from lora_accel.model.new_tokens import resized_vocabulary
from lora_accel.model.prequantized import check_quantization
from lora_accel.model.sizes import ModelSizes, model_sizes, resolve_factor

MAX_NAMED = 5
"""Maximum number of tokens in a message."""


def resolve_rope_scaling(config: RunConfig) -> RunConfig:
    """Return a run config whose `model.rope_scaling` has a factor; see `model.sizes.resolve_factor`.

    Raises:
        ArtifactError: the model does not exist, or is quantized in a way that is not supported.
        ConfigError: the model has no rotary embeddings, or is stored in another quantization than the config asks for.
    """
    check_quantization(config.model, config.quantization)
    return config.model_copy(update={"model": resolve_factor(config.model, config.data.max_length)})


def check_examples(config: RunConfig, template: Callable[[], ChatTemplate], sources: Iterable[Examples]) -> ModelSizes:
    """Check that a model has the tokens and the positions of all examples. Log a note if RoPE must extrapolate.

    Args:
        template: loads the chat template with the tokenizer. Not called if every token is fine.
        sources: the examples of each source.

    Returns:
        The sizes of the model, with the tokens of `model.add_tokens`.

    Raises:
        DataError: a row holds a token that the model does not have.
        ConfigError: an example is longer than the model's table of positions, the model does not support
            `model.rope_scaling`, or it is stored in another quantization than the config has; or no example has the
            tokens of `adapter.alora_invocation_tokens`.
        ArtifactError: the model does not exist, or its padding token is not in its vocabulary.
    """
    check_quantization(config.model, config.quantization)
    sizes, longest = model_sizes(config.model), 0
    if config.model.add_tokens is not None:
        vocab_size = resized_vocabulary(config.model.add_tokens, template().tokenizer, sizes.vocab_size)
        sizes = sizes._replace(vocab_size=vocab_size)
    sources = list(sources)
    if config.adapter.alora_invocation_tokens:
        _check_invocations(config.adapter.alora_invocation_tokens, sources)
    for examples in sources:
        if len(examples):
            _check_tokens(config.model, sizes, template, examples)
            longest = max(longest, _check_length(config, sizes, examples))
    if sizes.rope_positions is not None and longest > sizes.rope_positions:
        logger.info(
            f"note: the longest example has {longest:,} tokens, but the model was trained with positions up to "
            f"{sizes.rope_positions:,} (max_position_embeddings); set model.rope_scaling={{rope_type: linear}} to "
            f"scale them, or data.max_length={sizes.rope_positions}"
        )
    return sizes


def check_prompts(
    section: ModelSection, tokenizer: Any, prompts: Mapping[str, Sequence[int]], sizes: ModelSizes | None = None
) -> None:
    """Check that a model has the tokens of some prompts, and a position for a reply.

    Args:
        prompts: token ids, by the name for the message.
        sizes: of the model; None = read its config.json.

    Raises:
        DataError: it has not.
        ArtifactError: the model does not exist, or its padding token is not in its vocabulary.
    """
    sizes = sizes or model_sizes(section)
    for name, ids in prompts.items():
        if unknown := sorted({token for token in ids if token >= sizes.vocab_size}):
            raise DataError(f"{name}: {_describe(section, sizes, tokenizer, unknown)}, or remove it from the prompt")
        if sizes.num_positions is not None and len(ids) >= sizes.num_positions:
            raise DataError(
                f"{name}: has {len(ids):,} tokens, but {section.name_or_path} has {sizes.num_positions:,} positions "
                "for prompt and reply; shorten the prompt"
            )


def num_with(tokens: Sequence[int], examples: Examples) -> int:
    """Return how many examples contain some tokens in sequence."""
    ids, ends = np.asarray(examples.input_ids), examples.table[:, 0]
    starts = np.flatnonzero(ids[: max(0, len(ids) - len(tokens) + 1)] == tokens[0])
    for offset, token in enumerate(tokens[1:], start=1):
        starts = starts[ids[starts + offset] == token]
    owners = np.searchsorted(ends, starts, side="right")
    owners = np.unique(owners[starts + len(tokens) <= ends[owners]])
    return len(owners if examples.indices is None else np.intersect1d(owners, examples.indices))


def _check_tokens(
    section: ModelSection, sizes: ModelSizes, template: Callable[[], ChatTemplate], examples: Examples
) -> None:
    if not examples.input_ids.size or int(examples.input_ids.max()) < sizes.vocab_size:
        return
    positions = np.flatnonzero(examples.input_ids >= sizes.vocab_size)
    owners = np.searchsorted(examples.table[:, 0], positions, side="right")
    if examples.indices is not None:
        selected = np.isin(owners, examples.indices)
        positions, owners = positions[selected], owners[selected]
    if not len(owners):
        return
    file, row = examples.table[owners[0], 2:4].tolist()
    num_rows = len(np.unique(examples.table[owners][:, 2:4], axis=0))
    others = f" (and {num_rows - 1:,} more rows)" if num_rows > 1 else ""
    unknown = np.unique(examples.input_ids[positions]).tolist()
    reason = _describe(section, sizes, template().tokenizer, unknown)
    raise DataError(f"{examples.files[file]}, row {row}{others}: {reason}, or remove it from the rows")


def _check_invocations(tokens: Sequence[int], sources: Sequence[Examples]) -> None:
    """Check that examples contain the tokens from which on an aLoRA adapter computes. Log a note if some do not."""
    numbers = [len(examples) for examples in sources]
    without = sum(numbers) - sum(num_with(tokens, examples) for examples in sources)
    if without and without == sum(numbers):
        raise ConfigError(
            f"adapter.alora_invocation_tokens={list(tokens)}: no example contains these tokens, so the adapter would "
            "never be used; lora-accel inspect --json shows the token ids of each row"
        )
    if without:
        logger.info(
            f"note: {without:,} of {sum(numbers):,} examples do not contain adapter.alora_invocation_tokens; in them "
            "the adapter is not used"
        )


def _check_length(config: RunConfig, sizes: ModelSizes, examples: Examples) -> int:
    """Return the number of tokens of the longest example."""
    longest = int(examples.lengths.argmax())
    length, limit = int(examples.lengths[longest]), sizes.num_positions
    if limit is not None and length > limit:
        file, row = examples[longest].row
        raise ConfigError(
            f"data.max_length={config.data.max_length}: {file}, row {row} has {length:,} tokens, but "
            f"{config.model.name_or_path} has only {limit:,} positions; set data.max_length={limit}, or use a model "
            "with more positions"
        )
    return length


def _describe(section: ModelSection, sizes: ModelSizes, tokenizer: Any, unknown: Sequence[int]) -> str:
    """Return which tokens a model lacks, the sizes of model and tokenizer, and the ways out."""
    named = unknown[:MAX_NAMED]
    texts = [text for text in tokenizer.convert_ids_to_tokens(named) if text is not None]
    names = f"{', '.join(map(repr, texts))}, " if texts else ""
    more = f" and {len(unknown) - MAX_NAMED} more" if len(unknown) > MAX_NAMED else ""
    return (
        f"the model has no embedding for the token {names}id {', '.join(map(str, named))}{more}: the tokenizer of "
        f"{section.name_or_path} has {len(tokenizer):,} tokens, the model {sizes.vocab_size:,} (vocab_size). "
        "Add it with model.add_tokens, use the tokenizer that the model was trained with"
    )
