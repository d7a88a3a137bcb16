"""HTML pages: where they are written, and invisible characters of untrusted text as visible marks."""

from __future__ import annotations

import unicodedata
from pathlib import Path

from lora_accel.errors import ConfigError
from lora_accel.paths import open_to_read, why_not_writable
from lora_accel.saving.atomic import write_text

HIDDEN, JOINERS, MARKS = ("Cc", "Cf", "Cs", "Zl", "Zp"), "\u200c\u200d", "⟦⟧⟨⏎⇥"
"""Unicode categories of invisible characters; two joiners that emoji and some scripts need; the marks used here."""


class _Visible(dict[int, str]):
    """Translation table of `make_visible`, filled on demand."""

    def __missing__(self, number: int) -> str:
        character = chr(number)
        is_hidden = unicodedata.category(character) in HIDDEN and character not in JOINERS
        self[number] = f"⟨U+{number:04X}⟩" if is_hidden or character in MARKS else character
        return self[number]


_VISIBLE = _Visible({ord("\n"): "⏎\n", ord("\t"): "⇥"})
_READABLE = _Visible({ord("\n"): "\n", ord("\t"): "\t"})


def make_visible(text: str) -> str:
    """Replace invisible characters, among them terminal control codes, by visible marks.

    Line breaks are kept, each after a mark. Characters that are marks themselves are shown by their code point.
    """
    return text.translate(_VISIBLE)


def make_readable(text: str) -> str:
    """Replace invisible characters as `make_visible` does, but leave line breaks and tabs as they are."""
    return text.translate(_READABLE)


def check_page_path(file: Path, option: str) -> None:
    """Check that a page can be written, and replaces nothing but a page.

    Raises:
        ConfigError: it cannot; the message names the option.
    """
    if reason := why_not_writable(file, "file"):
        raise ConfigError(f"{option}: {reason}")
    if not file.parent.is_dir():
        raise ConfigError(f"{option}: the folder {file.parent} does not exist; create it first")
    if file.is_file() and not _is_page(file):
        raise ConfigError(f"{option}: {file} exists and is not an HTML page; choose another name")


def write_page(file: Path, text: str, option: str) -> None:
    """Write a page.

    Raises:
        ConfigError: the path is not writable.
    """
    try:
        write_text(file, text)
    except PermissionError as error:
        raise ConfigError(f"{option}: {file} cannot be written: {error.strerror}; pass another path") from None


def _is_page(file: Path) -> bool:
    """Whether a file is an HTML page, or empty."""
    try:
        with open_to_read(file) as stream:
            begin = stream.read(100).strip().lower()
    except OSError:  # reported when it is written
        return True
    return not begin or begin.startswith((b"<!doctype html", b"<html"))
