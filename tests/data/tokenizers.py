"""Train tiny tokenizers of the kinds that models have."""

from __future__ import annotations

import json
from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers


def train_sentencepiece(
    scheme: str, lines: Sequence[str], specials: Sequence[str], *, vocab_size: int, limit_alphabet: int
) -> Tokenizer:
    """Train BPE with byte fallback.

    Args:
        scheme: where a space is added: `always` and `first` are Metaspace's, `llama-2` a normalizer, as Llama 2's.
        lines: the training text.
        specials: the special tokens.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="always")
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(specials), limit_alphabet=limit_alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(lines, trainer)
    config = json.loads(tokenizer.to_str())
    vocabulary = config["model"]["vocab"]
    vocabulary |= {f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)}
    if scheme == "llama-2":
        config["pre_tokenizer"] = None
    tokenizer = Tokenizer.from_str(json.dumps(config))
    if scheme == "llama-2":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False)
    pieces = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(pieces)
    return tokenizer


def train_unigram(lines: Sequence[str], specials: Sequence[str], *, vocab_size: int) -> Tokenizer:
    """Train a tokenizer like T5's and XLM-R's: unknown characters are one token."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace("▁", prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size, special_tokens=list(specials), unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(lines, trainer)
    return tokenizer
