"""Text to tokens, where only the template may write special tokens: in anybody's words they are words.

A tokenizer looks for the texts of its special tokens everywhere, so a message that holds `<|im_end|>` would end its own
turn. Here a copy of the tokenizer knows its special tokens under names that no text has, and these names are put in
their place where the template wrote them, and nowhere else. Names are as long as what they stand for, so no offset
moves, and the tokens of a text without special tokens in its data are the very tokens of the original.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from typing import Any

from tokenizers import Encoding, Tokenizer

from lora_accel.data.spans import FIRST_MARK, MAX_PARTS, Span
from lora_accel.errors import DataError

FIRST_NAME = FIRST_MARK + 2 * MAX_PARTS
"""Where the names of special tokens begin: one character each, repeated. Marks end before it."""

HELD_CHARACTERS = 2**20
"""So much text's encodings are given back together: some 40 MB."""


class Tokens:
    """The tokens of a text, and the characters that each covers.

    Places are looked up as they are asked for, which costs much less than a list of all offsets.
    """

    def __init__(self, encoding: Encoding, length: int, special_ids: Collection[int]) -> None:
        """Wrap an encoding of a text of so many characters."""
        self.ids: list[int] = encoding.ids
        self._encoding, self._length, self._special_ids = encoding, length, special_ids

    def within(self, span: Span, foreign: Sequence[Span]) -> range:
        """Return the tokens that cover a character of a span and none of the foreign spans beside it."""
        if span.start == span.end:
            return range(0)
        first, last = self._token_at(span.start), self._token_at(span.end)
        if last < len(self.ids) and self._start(last) < span.end:
            last += 1
        before = max((other.end for other in foreign if other.end <= span.start), default=0)
        after = min((other.start for other in foreign if other.start >= span.end), default=self._length)
        while first < last and (self._start(first) < before or self._swallows(first, span.start)):
            first += 1
        while first < last and self._end(last - 1) > after:
            last -= 1
        return range(first, last)

    def token_from(self, place: int) -> int | None:
        """Return the token that begins at a character; None if one begins before it and goes beyond."""
        token = self._token_at(place)
        return token if token == len(self.ids) or self._start(token) >= place else None

    def _token_at(self, place: int) -> int:
        """Return the first token that covers a character, or, where none does, one after it."""
        for character in range(place, self._length):
            found = self._encoding.char_to_token(character)
            if found is not None:
                return int(found)
        return len(self.ids)

    def _swallows(self, token: int, place: int) -> bool:
        """Whether a special token that begins before a place has taken the white space after it for its own."""
        return self._start(token) < place and self.ids[token] in self._special_ids

    def _start(self, token: int) -> int:
        return self._chars(token)[0]

    def _end(self, token: int) -> int:
        return self._chars(token)[1]

    def _chars(self, token: int) -> tuple[int, int]:
        return self._encoding.token_to_chars(token) or (0, 0)  # (0, 0) of a token that stands for no text


class TextTokenizer:
    """A tokenizer that tells the template's special tokens from text that looks like them."""

    def __init__(self, tokenizer: Any, *, parse_special_tokens: bool = False) -> None:
        """Make the copy.

        Args:
            tokenizer: a fast tokenizer of transformers (offsets are needed).
            parse_special_tokens: whether the texts of special tokens count in data, too.

        Raises:
            DataError: the tokenizer has no offsets, or more special tokens than there are names.
        """
        if not tokenizer.is_fast:
            raise DataError(
                f"the tokenizer {type(tokenizer).__name__} gives no character offsets, so masks cannot be proven; "
                "use a model with a tokenizer.json"
            )
        self._parse_special_tokens = parse_special_tokens
        self._names = {
            text: chr(FIRST_NAME + i) * len(text) for i, text in enumerate(sorted(special_tokens(tokenizer)))
        }
        if FIRST_NAME + len(self._names) > 0x10FFFF:
            raise DataError(f"the tokenizer has {len(self._names)} special tokens, more than can be told from text")
        longest_first = sorted(self._names, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) if longest_first else r"(?!)")
        self._copy = _renamed(tokenizer.backend_tokenizer, self._names)
        self._special_ids = frozenset(tokenizer.convert_tokens_to_ids(list(self._names)))
        self._held: list[Encoding] = []
        self._held_characters = 0
        bos = tokenizer.bos_token_id
        self._bos_token: str = tokenizer.bos_token or ""
        self._bos: list[int] = [bos] if bos is not None and tokenizer("a").input_ids[0] == bos else []
        for text, name in self._names.items():
            if self._copy.token_to_id(name) != tokenizer.convert_tokens_to_ids(text):
                raise DataError(f"the tokenizer's special token {text!r} cannot be told from text that looks like it")

    def find_special(self, text: str) -> str | None:
        """Return the first special token whose text stands in a text that is data, if it would count as text."""
        found = None if self._parse_special_tokens else self._special.search(text)
        return found[0] if found else None

    def begin(self, text: str) -> list[int]:
        """Return the begin token where the tokenizer puts one before a text that has none."""
        return [] if self._parse_special_tokens and self._bos and text.startswith(self._bos_token) else self._bos

    def encode_prompt(self, text: str, data: Sequence[Span]) -> list[int]:
        """Return the tokens of a text to which an answer will be added, the same as with the answer.

        White space at the end of a text may be one token, and several before a word: so a letter stands in for it.
        """
        tokens = self.encode(f"{text}a", data)
        border = tokens.token_from(len(text))
        return self.encode(text, data).ids if border is None else tokens.ids[:border]

    def encode(self, text: str, data: Sequence[Span] = ()) -> Tokens:
        """Return the tokens of a text, without begin or end tokens of the tokenizer's own.

        Args:
            data: where others' words stand, in order: no special token is looked for there.
        """
        encoding = self._copy.encode(self._with_names(text, data), add_special_tokens=False)
        # An encoding is many small pieces of memory, which cost a fifth of its time if they are given back at once:
        # many together go faster.
        self._held.append(encoding)
        self._held_characters += len(text)
        if self._held_characters > HELD_CHARACTERS:
            self._held, self._held_characters = [], 0
        return Tokens(encoding, len(text), self._special_ids)

    def _with_names(self, text: str, data: Sequence[Span]) -> str:
        if self._parse_special_tokens:
            data = ()
        if not self._special.search(text):
            return text
        pieces, place = [], 0
        for start, end in [*data, (len(text), len(text))]:
            pieces += [self._special.sub(lambda found: self._names[found[0]], text[place:start]), text[start:end]]
            place = end
        return "".join(pieces)


def special_tokens(tokenizer: Any) -> set[str]:
    """Return the texts of the tokenizer's special tokens, its end token among them."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return (added | {tokenizer.eos_token}) - {"", None}


def _renamed(tokenizer: Tokenizer, names: dict[str, str]) -> Tokenizer:
    """Return a copy in which tokens have other names under the same ids: as added tokens, and in the vocabulary."""
    described = json.loads(tokenizer.to_str())
    # The post-processor would only trim spaces from offsets: begin and end tokens are not asked of it.
    described["truncation"] = described["padding"] = described["post_processor"] = None
    for token in described["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = described["model"]
    if isinstance(model.get("vocab"), dict):
        model["vocab"] = {names.get(text, text): number for text, number in model["vocab"].items()}
    elif isinstance(model.get("vocab"), list):
        model["vocab"] = [[names.get(text, text), score] for text, score in model["vocab"]]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if isinstance(model.get("merges"), list):  # no pieces of text may join to a special token
        pairs = [(merge, merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
        model["merges"] = [merge for merge, pair in pairs if names.keys().isdisjoint((*pair, "".join(pair)))]
    return Tokenizer.from_str(json.dumps(described))
