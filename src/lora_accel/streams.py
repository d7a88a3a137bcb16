"""Standard output and error of a command: closed pipes, full disks, streams that do not exist."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from collections.abc import Iterator
from typing import Any

CLOSED_PIPE = 141
"""Exit code of a command whose reader has gone, as `head` does after its last line: 128 + SIGPIPE, as a shell shows."""


class _Output:
    """A stream that does not raise if nothing can be written to it. Everything else is that of the stream."""

    def __init__(self, stream: Any, *, should_continue: bool) -> None:
        self._stream, self._should_continue, self._is_closed = stream, should_continue, False

    def write(self, text: str) -> int:
        """Write a text."""
        try:
            return int(self._stream.write(text))
        except OSError as error:
            self._fail(error)
            return len(text)

    def flush(self) -> None:
        """Flush the stream."""
        try:
            self._stream.flush()
        except OSError as error:
            self._fail(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _fail(self, error: OSError) -> None:
        """Discard all further output, then continue with a note on the other stream, or end the command.

        Raises:
            SystemExit: the reader has gone, and the command has nothing else to do.
            OSError: the stream cannot be written to for another reason.
        """
        is_first, self._is_closed = not self._is_closed, True
        if is_first:
            with contextlib.suppress(OSError, ValueError):  # ValueError: a stream without a descriptor
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self._stream.fileno())
                os.close(null)
        if not self._should_continue and error.errno == errno.EPIPE:
            raise SystemExit(CLOSED_PIPE)
        if not self._should_continue and is_first:
            error.filename = f"<{self._name}>"
            raise error
        if is_first:
            self._note(error)

    @property
    def _name(self) -> str:
        return "stdout" if self is sys.stdout else "stderr"

    def _note(self, error: OSError) -> None:
        other = sys.stderr if self is sys.stdout else sys.stdout
        if isinstance(other, _Output) and not other._is_closed:
            note = f"note: {self._name} cannot be written to ({error.strerror}); continuing without it"
            print(note, file=other, flush=True)


@contextlib.contextmanager
def safe_output(*, should_continue: bool) -> Iterator[None]:
    """Handle output that cannot be written, within the block and when it is flushed at its end.

    Args:
        should_continue: whether the command continues without output, because it writes files; otherwise it ends.
    """
    _open_missing_streams()
    before = sys.stdout, sys.stderr
    for stream in before:
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            with contextlib.suppress(OSError):  # it flushes
                stream.reconfigure(errors="backslashreplace")  # not all terminals and file names are UTF-8
    sys.stdout, sys.stderr = (_Output(stream, should_continue=should_continue) for stream in before)
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
    finally:
        sys.stdout, sys.stderr = before


def _open_missing_streams() -> None:
    """Open the null device in place of closed standard streams, so that no file of ours gets their numbers."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is not None:
            continue
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)
        setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w", encoding="utf-8"))  # noqa: SIM115
