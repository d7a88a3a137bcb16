"""Tokenize text in which only the template may write special tokens. In the text of a message they are plain text.

A tokenizer parses special tokens wherever their text occurs, so a message that contains `<|im_end|>` would end its own
turn. To prevent this, a copy of the tokenizer gives each special token an alias: private use characters that no text
contains. Before encoding, special tokens that the template wrote are replaced by their aliases; all others stay as
text. An alias is as long as its token, so offsets do not change. For a text without special tokens in its messages,
the copy returns exactly the tokens of the original.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from tokenizers import Encoding, Tokenizer

from lora_accel.data.spans import FIRST_MARK, MAX_PARTS, Span
from lora_accel.errors import DataError

FIRST_ALIAS = FIRST_MARK + 2 * MAX_PARTS
"""First character of the aliases, after the last mark. An alias is one character, repeated."""

ANCHORS = ("\n", ".", "a", "0", ")")
"""Texts after which a text is encoded to get its tokens as a continuation."""
WORD_START, MAX_WORD = re.compile(r"(?<=[A-Za-z]) (?=[A-Za-z])"), 200
"""The space between two words, and how far back it is searched for, in characters."""
MAX_TAILS = 1024
"""Number of cached prompt tails."""
MAX_KEPT_CHARACTERS = 2**20
"""Encodings are kept until they cover this much text (about 40 MB), then freed together."""


class Tokens:
    """The tokens of a text, and the characters that each one covers.

    Offsets are looked up on request, which is much cheaper than a list of all of them.
    """

    def __init__(self, encoding: Encoding, num_characters: int) -> None:
        """Wrap an encoding of a text with this many characters."""
        self.ids: list[int] = encoding.ids
        self._encoding, self._num_characters = encoding, num_characters

    def within(self, span: Span) -> range:
        """Return the tokens that cover a character of a span."""
        if span.start == span.end:
            return range(0)
        return range(self.token_at(span.start), self.token_after(span.end))

    def token_after(self, position: int) -> int:
        """Return the index of the first token that covers no character before a position."""
        token = self.token_at(position)
        return token + 1 if token < len(self.ids) and self._start(token) < position else token

    def token_from(self, position: int) -> int | None:
        """Return the index of the token that starts at a character; None if an earlier token covers it."""
        token = self.token_at(position)
        return token if token == len(self.ids) or self._start(token) >= position else None

    def token_at(self, position: int) -> int:
        """Return the index of the first token that covers a character, or of the next one if none does."""
        for character in range(position, self._num_characters):
            token = self._encoding.char_to_token(character)
            if token is not None:
                return int(token)
        return len(self.ids)

    def _start(self, token: int) -> int:
        return self._offsets(token)[0]

    def _offsets(self, token: int) -> tuple[int, int]:
        return self._encoding.token_to_chars(token) or (0, 0)  # a token that covers no text


class TextTokenizer:
    """A tokenizer that distinguishes the template's special tokens from text that looks like them."""

    def __init__(self, tokenizer: Any, *, parse_special_tokens: bool = False) -> None:
        """Copy the tokenizer, with aliases for its special tokens.

        Args:
            tokenizer: a fast transformers tokenizer (character offsets are needed).
            parse_special_tokens: parse special tokens in untrusted text, too.

        Raises:
            DataError: the tokenizer has no offsets, or more special tokens than there are aliases.
        """
        if not tokenizer.is_fast:
            raise DataError(
                f"the tokenizer {type(tokenizer).__name__} has no character offsets, which the loss masks need; "
                "use a model with a tokenizer.json"
            )
        self._parse_special_tokens = parse_special_tokens
        self._aliases = {
            text: chr(FIRST_ALIAS + i) * len(text) for i, text in enumerate(sorted(special_tokens(tokenizer)))
        }
        if FIRST_ALIAS + len(self._aliases) > 0x10FFFF:
            raise DataError(f"the tokenizer has {len(self._aliases)} special tokens, more than are supported")
        longest_first = sorted(self._aliases, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) if longest_first else r"(?!)")
        self._copy = _copy_with_aliases(tokenizer.backend_tokenizer, self._aliases)
        self._has_words = _splits_words(self._copy)
        end = self._aliases.get(tokenizer.eos_token)
        self._end_alias = [tokenizer.eos_token] if end else []
        self._tails: dict[str, list[int]] = {}
        self._kept: list[Encoding] = []
        self._kept_characters = 0
        bos = tokenizer.bos_token_id
        self._bos_token: str = tokenizer.bos_token or ""
        self._bos: list[int] = [bos] if bos is not None and tokenizer("").input_ids[:1] == [bos] else []
        for text, alias in self._aliases.items():
            if self._copy.token_to_id(alias) != tokenizer.convert_tokens_to_ids(text):
                raise DataError(
                    f"the tokenizer's special token {text!r} cannot be distinguished from text that looks like it"
                )

    def find_special(self, text: str) -> str | None:
        """Return the first special token in an untrusted text that is tokenized as plain text, if there is one."""
        match = None if self._parse_special_tokens else self._special.search(text)
        return match[0] if match else None

    def bos_prefix(self, text: str) -> list[int]:
        """Return the BOS token if the tokenizer adds one; nothing if the text starts with one that is parsed."""
        return [] if self._parse_special_tokens and self._bos and text.startswith(self._bos_token) else self._bos

    def encode_tail(self, text: str, untrusted: Sequence[Span]) -> list[int]:
        """Return the tokens of the end of a prompt, from a special token on.

        Templates repeat the same few tails (`<|im_start|>assistant`), so those without message text are cached.
        """
        if untrusted:
            return self.encode(text, untrusted).ids
        if text not in self._tails:
            if len(self._tails) == MAX_TAILS:
                self._tails.clear()
            self._tails[text] = self.encode(text).ids
        return self._tails[text]

    def split_before(self, text: str, start: int, end: int) -> int:
        """Return the last position in [start, end) where a text can be divided without a change of tokens, or `start`.

        Most tokenizers divide a text into words first, and tokenize each alone. The space between two words is such a
        position.
        """
        if not self._has_words:
            return start
        *_, last = (start, *(match.start() for match in WORD_START.finditer(text, max(start, end - MAX_WORD), end)))
        return last

    def encode_after(self, prompt: list[int], text: str, untrusted: Sequence[Span], expected: str) -> list[int] | None:
        """Return the tokens of a text that continues a prompt; None if the tokenizer cannot tokenize it so.

        A tokenizer may add a space before a text, or join its first characters with those before them. So the
        text is encoded after an anchor, and only tokens that decode to the right text are returned.

        Args:
            prompt: token ids of the prompt.
            untrusted: spans of message text in `text`.
            expected: the decoded text of prompt and text together.
        """
        for anchor in (*self._end_alias, *ANCHORS):
            shifted = [Span(start + len(anchor), end + len(anchor)) for start, end in untrusted]
            tokens = self.encode(anchor + text, shifted)
            boundary = tokens.token_from(len(anchor))
            if boundary is not None and self.decode(prompt + tokens.ids[boundary:]) == expected:
                return tokens.ids[boundary:]
        return None

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of tokens. Special tokens are aliases in it."""
        text: str = self._copy.decode(ids, skip_special_tokens=False)
        return text

    def first_special(self, text: str, start: int) -> Span | None:
        """Return the span of the first special token at or after a position, whoever wrote it."""
        match = self._special.search(text, start)
        return Span(*match.span()) if match else None

    def find_specials(self, text: str, untrusted: Sequence[Span] = ()) -> list[Span]:
        """Return the spans of the special tokens that the template wrote, in order.

        Args:
            untrusted: spans of message text, in order.
        """
        if self._parse_special_tokens:
            untrusted = ()
        spans, position = [], 0
        for start, end in [*untrusted, (len(text), len(text))]:
            spans += [Span(*match.span()) for match in self._special.finditer(text, position, start)]
            position = end
        return spans

    def encode(self, text: str, untrusted: Sequence[Span] = ()) -> Tokens:
        """Return the tokens of a text, without the BOS and EOS that the tokenizer would add.

        Args:
            untrusted: spans of message text, in order. No special token is parsed there.
        """
        encoding = self._copy.encode(self._insert_aliases(text, untrusted), add_special_tokens=False)
        # An encoding is many small allocations. Freeing each one at once takes a fifth of the encoding time; freeing
        # many together is faster.
        self._kept.append(encoding)
        self._kept_characters += len(text)
        if self._kept_characters > MAX_KEPT_CHARACTERS:
            self._kept, self._kept_characters = [], 0
        return Tokens(encoding, len(text))

    def _insert_aliases(self, text: str, untrusted: Sequence[Span]) -> str:
        if self._parse_special_tokens:
            untrusted = ()
        if not self._special.search(text):
            return text
        pieces, position = [], 0
        for start, end in [*untrusted, (len(text), len(text))]:
            pieces += [self._special.sub(lambda match: self._aliases[match[0]], text[position:start]), text[start:end]]
            position = end
        return "".join(pieces)


BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
"""A token for one byte. Some tokenizers also list these as special, but text consists of them."""


def special_tokens(tokenizer: Any) -> set[str]:
    """Return the texts of a tokenizer's special tokens, EOS included."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    added = {text for text in added if not BYTE_TOKEN.fullmatch(text)}
    return (added | {tokenizer.eos_token}) - {"", None}


def _splits_words(tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer divides a text before each space that a word follows, and tokenizes the parts alone."""
    if tokenizer.pre_tokenizer is None:
        return False
    starts = {start for _, (start, _) in tokenizer.pre_tokenizer.pre_tokenize_str("ab cd ef")}
    return {2, 5} <= starts


def _copy_with_aliases(tokenizer: Tokenizer, aliases: dict[str, str]) -> Tokenizer:
    """Return a copy in which the added tokens and the vocabulary have aliases, under the same ids."""
    config = json.loads(tokenizer.to_str())
    # The post-processor would only trim spaces from offsets: BOS and EOS are not added here.
    config["truncation"] = config["padding"] = config["post_processor"] = None
    for token in config["added_tokens"]:
        token["content"] = aliases.get(token["content"], token["content"])
    model = config["model"]
    if isinstance(model.get("vocab"), dict):
        model["vocab"] = {aliases.get(text, text): number for text, number in model["vocab"].items()}
    elif isinstance(model.get("vocab"), list):
        model["vocab"] = [[aliases.get(text, text), score] for text, score in model["vocab"]]
    if model.get("unk_token") in aliases:
        model["unk_token"] = aliases[model["unk_token"]]
    if isinstance(model.get("merges"), list):  # pieces of text must not merge into a special token
        pairs = [(merge, merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
        model["merges"] = [merge for merge, pair in pairs if aliases.keys().isdisjoint((*pair, "".join(pair)))]
    return Tokenizer.from_str(json.dumps(config))
