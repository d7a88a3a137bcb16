"""A tokenizer in a GGUF file: tokens, their types, merges or scores, special ids and the chat template.

llama.cpp has its own tokenizers. Two of them are exported to:

- `gpt2`, byte-level BPE. It splits text into words by a regular expression that the file names (`tokenizer.ggml.pre`);
  which one is read off the steps of tokenizer.json.
- `llama`, SentencePiece's BPE. It joins the pair whose token has the highest score. Here a token's score is minus the
  rank of the first merge that makes it, so the pairs are joined in the order of the merges.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lora_accel.errors import ArtifactError
from lora_accel.logs import logger

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""llama.cpp's token types. It matches USER_DEFINED tokens in any text, CONTROL tokens only in the template's."""
SPACE = "▁"
"""What SentencePiece writes for a space."""
_WORD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {
    _WORD + r"\p{L}+|\p{N}{1,3}" + _REST: {True: "llama-bpe", False: "smaug-bpe"},
    _WORD + r"\p{L}+|\p{N}" + _REST: {False: "qwen2"},
}
"""Regular expression of tokenizer.json -> {ignore_merges: name of llama.cpp, which has the same expression}."""
BYTE_LEVEL_STEPS = {("ByteLevel",): "gpt-2", ("Digits", "ByteLevel"): "smollm"}
"""Steps of tokenizer.json before which text is not split otherwise -> name of llama.cpp."""


class Vocabulary(NamedTuple):
    """What a GGUF file stores of a tokenizer's tokens."""

    model: str
    """llama.cpp's tokenizer: gpt2 or llama."""
    split: str
    """How gpt2 splits text into words (`tokenizer.ggml.pre`)."""
    tokens: list[str]
    types: list[int]
    merges: list[str]
    """`left right`; empty for llama."""
    scores: list[float]
    """Empty for gpt2."""


def read_vocabulary(name: str, tokenizer: Any, vocab_size: int) -> Vocabulary:
    """Return the tokens of a tokenizer.

    Args:
        name: of the model, for messages.
        tokenizer: a fast transformers tokenizer.
        vocab_size: rows of the model's embeddings. Rows without a token get unused ones, tokens without a row are left
            out, with a note.

    Raises:
        ArtifactError: llama.cpp has no such tokenizer.
    """
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    model, steps = content["model"], _steps(content["pre_tokenizer"])
    if model["type"] != "BPE":
        raise _unsupported(name, f"is {model['type']}, not BPE")
    added = {token["id"]: token for token in content["added_tokens"]}
    texts = {index: text for text, index in model["vocab"].items()} | {i: x["content"] for i, x in added.items()}
    if without := [texts.pop(index) for index in sorted(texts) if index >= vocab_size]:
        logger.warning(f"note: {name}: left out {', '.join(without[:3])}: tokens for which the model has no embeddings")
    if any(step["type"] == "ByteLevel" for step in steps):
        split = _split_name(name, model, steps, _steps(content["normalizer"], "normalizers"))
        types = [_type_of(index, texts, added) for index in range(vocab_size)]
        return Vocabulary("gpt2", split, _padded(texts, vocab_size), types, [" ".join(x) for x in _merges(model)], [])
    if not model.get("byte_fallback"):
        raise _unsupported(name, "is neither byte-level BPE nor BPE of SentencePiece")
    return _sentencepiece(name, model, texts, added, vocab_size)


def add_tokenizer(writer: Any, tokenizer: Any, vocabulary: Vocabulary, chat_template: str) -> None:
    """Write a tokenizer.

    Args:
        writer: a GGUFWriter.
        chat_template: empty = none.
    """
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.split)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
        first = tokenizer.backend_tokenizer.encode("a", add_special_tokens=False).tokens[0]
        writer.add_add_space_prefix(first.startswith(SPACE))
    for kind in ("bos", "eos", "unk", "pad"):
        index = getattr(tokenizer, f"{kind}_token_id")
        if index is not None and index < len(vocabulary.tokens):
            getattr(writer, f"add_{kind}_token_id")(index)
    writer.add_add_bos_token(adds_bos(tokenizer))
    writer.add_add_eos_token(_ids(tokenizer)[-1:] == [tokenizer.eos_token_id])
    if chat_template:
        writer.add_chat_template(chat_template)


def adds_bos(tokenizer: Any) -> bool:
    """Whether a tokenizer writes its BOS token before a text."""
    return tokenizer.bos_token_id is not None and _ids(tokenizer)[:1] == [tokenizer.bos_token_id]


def _ids(tokenizer: Any) -> list[int]:
    """Return what a tokenizer makes of a text that is no special token."""
    ids: list[int] = tokenizer("a")["input_ids"]
    return ids


def _steps(step: Mapping[str, Any] | None, key: str = "pretokenizers") -> Sequence[Mapping[str, Any]]:
    """Return the steps of a normalizer or pre-tokenizer as a flat list."""
    if step is None:
        return []
    return [x for inner in step[key] for x in _steps(inner, key)] if step["type"] == "Sequence" else [step]


def _merges(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the merges of tokenizer.json, which writes them as pairs or, before 2024, as `left right`."""
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    return [(left, right) for left, right in merges]


def _split_name(
    name: str,
    model: Mapping[str, Any],
    steps: Sequence[Mapping[str, Any]],
    normalizers: Sequence[Mapping[str, Any]],
) -> str:
    """Return llama.cpp's name of the way in which a byte-level tokenizer splits text into words."""
    ignores_merges, last = bool(model.get("ignore_merges")), steps[-1]
    kinds = tuple(step["type"] for step in steps)
    known = None
    if kinds == ("Split", "ByteLevel") and not last["use_regex"] and steps[0]["behavior"] == "Isolated":
        known = SPLITS.get(steps[0]["pattern"].get("Regex"), {}).get(ignores_merges)
    elif last.get("use_regex") and not ignores_merges and steps[0].get("individual_digits", True):
        known = BYTE_LEVEL_STEPS.get(kinds)
    # Qwen's normalizer, NFC, changes only decomposed characters, and llama.cpp leaves it out for every such model.
    is_plain = not last.get("add_prefix_space") and {step["type"] for step in normalizers} <= {"NFC"}
    if known is None or not is_plain:
        raise _unsupported(name, f"splits text in a way that is not known here ({', '.join(kinds)})")
    return known


def _sentencepiece(
    name: str, model: Mapping[str, Any], texts: dict[int, str], added: Mapping[int, Any], vocab_size: int
) -> Vocabulary:
    """Return the tokens of a SentencePiece model that was converted to tokenizer.json."""
    merges = _merges(model)
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    _check_merges(name, model["vocab"], set(merges), ranks)
    types, scores = [], []
    for index in range(vocab_size):
        kind, text = _type_of(index, texts, added), texts.get(index, "")
        if text == model.get("unk_token"):
            kind = UNKNOWN
        elif index not in added and len(text) == 6 and text.startswith("<0x"):
            kind = BYTE
        elif kind == USER_DEFINED:  # matched before spaces are replaced
            texts[index] = text.replace(SPACE, " ")
        types.append(kind)
        scores.append(-float(ranks.get(text, len(merges)) if kind == NORMAL else len(merges) + 1))
    return Vocabulary("llama", "default", _padded(texts, vocab_size), types, [], scores)


def _check_merges(name: str, vocab: Mapping[str, int], merges: set[tuple[str, str]], ranks: Mapping[str, int]) -> None:
    """Warn if merges are missing that SentencePiece has: it joins any two tokens whose text is a token."""
    for text in ranks:
        for cut in range(1, len(text)):
            pair = (text[:cut], text[cut:])
            if pair[0] in vocab and pair[1] in vocab and pair not in merges:
                logger.warning(
                    f"note: {name}: its tokenizer does not join {pair[0]!r} and {pair[1]!r}, and llama.cpp does: it is "
                    "not a converted SentencePiece model, so llama.cpp may tokenize some words differently"
                )
                return


def _type_of(index: int, texts: Mapping[int, str], added: Mapping[int, Any]) -> int:
    if index in added:
        return CONTROL if added[index]["special"] else USER_DEFINED
    return NORMAL if index in texts else UNUSED


def _padded(texts: Mapping[int, str], vocab_size: int) -> list[str]:
    return [texts.get(index, f"[PAD{index}]") for index in range(vocab_size)]


def _unsupported(name: str, reason: str) -> ArtifactError:
    return ArtifactError(
        f"{name}: GGUF export does not support its tokenizer, which {reason}; use convert_hf_to_gguf.py of llama.cpp"
    )
