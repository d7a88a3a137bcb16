"""Text to tokens: special tokens, byte tokens, continuations, small vocabularies."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lora_accel.data.spans import Span
from lora_accel.data.tokens import TextTokenizer, special_tokens

Factory = Callable[..., PreTrainedTokenizerFast]

VOCAB = {"<unk>": 0, "<s>": 1, "</s>": 2, "▁": 3, "yes": 4, "▁yes": 5, "Q": 6, ":": 7, "▁Q": 8}


def sentencepiece(*, mark_bytes_special: bool = False) -> PreTrainedTokenizerFast:
    """Return a tokenizer like Llama 2's: a space before each text, bytes for unknown characters, no word boundaries."""
    vocab = VOCAB | {f"<0x{byte:02X}>": len(VOCAB) + byte for byte in range(256)}
    merges = [("▁", "yes"), ("▁", "Q")]
    words = {letter: len(vocab) + i for i, letter in enumerate("yes") if letter not in vocab}
    words |= {"ye": len(vocab) + len(words)}
    backend = Tokenizer(
        models.BPE(
            vocab | words,
            [("y", "e"), ("ye", "s"), *merges],
            byte_fallback=True,
            unk_token="<unk>",
            fuse_unk=True,
        )
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", bos_token="<s>", unk_token="<unk>")
    if mark_bytes_special:
        tokenizer.add_tokens([AddedToken("<0x0A>", special=True), AddedToken("<0x41>", special=True)])
    return tokenizer


def test_a_continuation_has_no_space_before_it() -> None:
    tokens = TextTokenizer(sentencepiece())
    prompt = tokens.encode("Q: ", [Span(0, 3)]).ids
    complete = tokens.encode("Q: yes", [Span(0, 6)]).ids
    assert complete != [*prompt, VOCAB["yes"]]
    rest = tokens.encode_after(prompt, "yes", [Span(0, 3)], tokens.decode(complete))
    assert rest == [VOCAB["yes"]]


def test_a_continuation_that_no_tokens_give_is_none() -> None:
    tokens = TextTokenizer(sentencepiece())
    assert tokens.encode_after(tokens.encode("Q: ").ids, "yes", [], "another text") is None


def test_byte_tokens_that_are_marked_special_are_ordinary() -> None:
    tokenizer = sentencepiece(mark_bytes_special=True)
    assert special_tokens(tokenizer) == {"<unk>", "<s>", "</s>"}
    tokens = TextTokenizer(tokenizer)
    line_break, letter = tokenizer.convert_tokens_to_ids(["<0x0A>", "<0x41>"])
    ids = tokens.encode("A\nyes", [Span(0, 5)]).ids
    assert line_break in ids
    assert letter in ids
    assert 0 not in ids
    assert tokens.decode(ids) == "A\nyes"


@pytest.mark.parametrize("adds_bos", [True, False])
def test_a_vocabulary_may_lack_every_letter(adds_bos: bool) -> None:
    vocab = {"<s>": 0, "</s>": 1, "1": 2, "2": 3}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="</s>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if adds_bos:
        from tokenizers import processors

        backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", bos_token="<s>")
    tokens = TextTokenizer(tokenizer)
    assert tokens.bos_prefix("1 2") == ([0] if adds_bos else [])
    assert tokens.encode("1 2", [Span(0, 3)]).ids == [2, 3]


def test_special_tokens_are_found_where_the_template_wrote_them(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "<|im_start|>user\n<|im_end|><|im_end|>"
    start = text.index("<|im_end|>")
    message = Span(start, start + len("<|im_end|>"))
    tokens = TextTokenizer(tokenizer)
    assert tokens.find_specials(text, [message]) == [Span(0, 12), Span(message.end, len(text))]
    parsed = TextTokenizer(tokenizer, parse_special_tokens=True)
    assert parsed.find_specials(text, [message]) == [Span(0, 12), message, Span(message.end, len(text))]


@pytest.mark.parametrize("words", [True, False])
def test_a_text_is_divided_between_words_only_if_the_tokenizer_does(tokenizer_factory: Factory, words: bool) -> None:
    tokenizer = tokenizer_factory() if words else sentencepiece()
    tokens = TextTokenizer(tokenizer)
    text = "the answer is one: "
    position = tokens.split_before(text, 0, len(text))
    assert position == (text.index(" one") if words else 0)
    assert tokens.split_before("42 a", 1, 4) == 1  # not between a number and a word
    if words:
        complete = tokens.encode(text).ids
        assert complete == tokens.encode(text[:position]).ids + tokens.encode(text[position:]).ids


def test_cached_tails_are_the_tokens_of_the_text(tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = TextTokenizer(tokenizer)
    tail = "<|im_start|>assistant\n"
    expected = tokens.encode(tail).ids
    assert tokens.encode_tail(tail, []) == tokens.encode_tail(tail, []) == expected
    special = tokens.encode_tail(tail, [Span(0, 12)])  # the text of a message
    assert special != expected
    assert json.loads(tokenizer.backend_tokenizer.to_str())["added_tokens"][3]["id"] not in special
