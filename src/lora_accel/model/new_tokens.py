"""The tokens of `model.add_tokens`: their rows in the embeddings, the first values, and how they are trained."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lora_accel.config.schema import AdapterSection, AddedTokens, ModelSection
from lora_accel.errors import ConfigError
from lora_accel.logs import logger
from lora_accel.model.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def resized_vocabulary(added: AddedTokens, tokenizer: Any, vocab_size: int) -> int:
    """Return the rows of the embeddings that a model needs for its added tokens.

    Args:
        tokenizer: with the added tokens.
        vocab_size: rows of the embeddings now.

    Raises:
        ConfigError: the tokenizer has other tokens that the model lacks, whose rows would stay untrained.
    """
    ids = token_ids(added, tokenizer)
    size = max(vocab_size, *(token + 1 for token in ids))
    untrained = sorted(set(range(vocab_size, size)) - set(ids))
    if untrained:
        text = tokenizer.convert_ids_to_tokens(untrained[0])
        raise ConfigError(
            f"model.add_tokens: the tokenizer already has {text!r}, which the model lacks (id {untrained[0]}, model "
            f"{vocab_size:,} tokens); add it to model.add_tokens.tokens too"
        )
    return size


def token_ids(added: AddedTokens, tokenizer: Any) -> list[int]:
    """Return the ids of the added tokens, in order."""
    ids: list[int] = tokenizer.convert_tokens_to_ids(list(added.tokens))
    return ids


def extend_vocabulary(base: PreTrainedModel, section: ModelSection) -> None:
    """Add rows for the tokens of `model.add_tokens` to the embeddings of a base.

    Each row is the mean of the rows of other tokens: those into which the tokenizer divides the token's text without
    `model.add_tokens`, or those of the text in `like`. A token that the model already has keeps its row, unless `like`
    names it.

    Args:
        section: of the base, with `add_tokens`.

    Raises:
        ConfigError: see `resized_vocabulary`.
    """
    import torch

    added = section.add_tokens
    assert added is not None
    tokenizer, before = load_tokenizer(section), load_tokenizer(section.model_copy(update={"add_tokens": None}))
    vocab_size = base.config.get_text_config().vocab_size
    size = resized_vocabulary(added, tokenizer, vocab_size)
    if size > vocab_size:
        base.resize_token_embeddings(size, mean_resizing=False)
    known = [text for text in added.tokens if before.get_vocab().get(text, vocab_size) < vocab_size]
    if known:
        logger.info(f"note: model.add_tokens: the model already has {', '.join(map(repr, known))}: its row is trained")
    divided = _without_tokens(before, added)
    weights = {id(weight): weight for _, weight in _embedding_weights(base)}  # tied embeddings have one
    for text, token in zip(added.tokens, token_ids(added, tokenizer), strict=True):
        if text in known and text not in added.like:
            continue
        encoded = divided.encode(added.like.get(text, text), add_special_tokens=False).ids
        parts = [part for part in encoded if part < vocab_size] or list(range(vocab_size))
        for weight in weights.values():
            with torch.no_grad():
                weight[token] = weight[parts].float().mean(0).to(weight.dtype)


def train_new_tokens(
    section: AdapterSection, base: PreTrainedModel, added: AddedTokens, tokenizer: Any
) -> AdapterSection:
    """Return an adapter section that also trains the added tokens' rows, or all embeddings.

    Raises:
        ConfigError: PEFT cannot train the rows of this model, or the adapter adapts the embeddings in another way.
    """
    names = [name for name, _ in _embedding_weights(base)]
    targets = section.target_modules if isinstance(section.target_modules, list) else []
    for name in [*targets, *(section.modules_to_save or [])]:
        if any(f".{embedding}".endswith(f".{name}") for embedding in names):
            raise ConfigError(
                f"model.add_tokens trains the embeddings; remove {name} from adapter.target_modules and "
                "adapter.modules_to_save, or set model.add_tokens.train=embeddings to train all rows"
            )
    head = base.get_output_embeddings()
    is_tied = head is not None and head.weight is base.get_input_embeddings().weight
    if added.train == "embeddings":
        from peft.utils.constants import EMBEDDING_LAYER_NAMES

        if is_tied and names[0].rpartition(".")[2] not in EMBEDDING_LAYER_NAMES:
            raise ConfigError(
                f"model.add_tokens.train=embeddings: PEFT cannot keep {names[0]} and the head of this model equal, "
                "which are one tensor; set model.add_tokens.train=rows"
            )
        saved = [*(section.modules_to_save or []), *(names[:1] if is_tied else names)]
        return section.model_copy(update={"modules_to_save": saved, "ensure_weight_tying": is_tied or None})
    if getattr(head, "bias", None) is not None:
        raise ConfigError(
            "model.add_tokens.train=rows: this model's head has a bias, which PEFT would leave out; set "
            "model.add_tokens.train=embeddings"
        )
    indices = {name: sorted(token_ids(added, tokenizer)) for name in (names[:1] if is_tied else names)}
    return section.model_copy(update={"trainable_token_indices": indices})


def _embedding_weights(base: PreTrainedModel) -> Iterator[tuple[str, Any]]:
    """Yield the names of the input and output embeddings, and their weights."""
    modules = {id(module): name for name, module in base.named_modules()}
    for module in (base.get_input_embeddings(), base.get_output_embeddings()):
        if module is not None:
            yield modules[id(module)], module.weight


def _without_tokens(tokenizer: Any, added: AddedTokens) -> Any:
    """Return a copy of a tokenizer that divides the texts of the added tokens."""
    from tokenizers import Tokenizer

    config = json.loads(tokenizer.backend_tokenizer.to_str())
    config["added_tokens"] = [token for token in config["added_tokens"] if token["content"] not in added.tokens]
    config["truncation"] = config["padding"] = None
    return Tokenizer.from_str(json.dumps(config))
