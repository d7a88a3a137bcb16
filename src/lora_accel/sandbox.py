"""Try what untrusted files contain (patterns, chat templates, tokenizers) in a child process with limits.

Adapters and base models come from elsewhere. A pattern may take exponential time, a template may never end, and a
tokenizer's normalizer may double a text again and again; none of them can be interrupted in this process. So each is
first run in a child with limits on CPU time and memory (sandbox_child.py), and used here only if it stayed within them.
The child is started at the first check, in about 0.2 seconds; a check then takes milliseconds.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_accel.errors import ArtifactError, DataError
from lora_accel.sandbox_child import MESSAGE_BYTES, OUTCOMES

CPU_SECONDS = 2
WALL_SECONDS = 300
"""Limit where other programs use the processor, too, or a disk is slow."""
MEMORY_BYTES = 1 << 30
MAX_TOKENIZER_BYTES = 200_000_000
"""The largest tokenizers have 35 MB."""
MAX_TEMPLATE_CHARACTERS = 1_000_000
MAX_CACHED_CHARACTERS = 200_000
"""Outcomes are cached for conversations up to this size."""
BYTES_PER_SECOND = 5_000_000
"""A tokenizer's file gets a second more for this many bytes: 8 seconds for one of 33 MB, which takes less than one."""
PROBLEMS = {
    "time": f"takes over {CPU_SECONDS} seconds",
    "memory": f"takes over {MEMORY_BYTES >> 20} MB of memory",
    "growth": "writes far more than it reads",
    "crash": "crashes",
}
"""Outcomes of a check, apart from ok."""


def check_patterns(where: str, patterns: Sequence[str], names: Sequence[str]) -> None:
    """Check that patterns of an adapter are valid, and match names of modules in time.

    Args:
        where: the file with the patterns.

    Raises:
        ArtifactError: they are not, or do not.
    """
    if not patterns:
        return
    outcome, message = _try("match_patterns", patterns=list(patterns), names=list(names))
    if outcome == "invalid":
        raise ArtifactError(f"{where}: {message}")
    if outcome in PROBLEMS:
        raise ArtifactError(
            f"{where}: matching its patterns ({patterns[0][:60]!r} …) with the base's modules {PROBLEMS[outcome]}; "
            "set target_modules to a list of names"
        )


def check_template(where: str, source: str, variables: Sequence[dict[str, Any]]) -> None:
    """Check that a chat template renders conversations in time and in proportion. Other errors are not reported.

    Args:
        where: how to name the template.
        source: its text.
        variables: those of each conversation.

    Raises:
        DataError: it does not.
    """
    if len(source) > MAX_TEMPLATE_CHARACTERS:
        raise DataError(f"{where}: over {MAX_TEMPLATE_CHARACTERS:,} characters; is this a chat template?")
    values = json.dumps(variables, default=str)
    attempt = _try_template if len(values) < MAX_CACHED_CHARACTERS else _try_template.__wrapped__
    outcome = attempt(source, values)
    if outcome in PROBLEMS:
        raise DataError(
            f"{where}: rendering a conversation {PROBLEMS[outcome]}; set model.chat_template to another template, "
            "or pass --raw to generate without one"
        )


@functools.lru_cache(maxsize=256)
def _try_template(source: str, variables: str) -> str:
    return _try("render_template", source=source, variables=json.loads(variables))[0]


def check_tokenizer(file: Path) -> None:
    """Check that a tokenizer.json encodes and decodes text in time and in proportion. Other errors are not reported.

    Raises:
        ArtifactError: it does not, or is too large.
    """
    status = file.stat()
    if status.st_size > MAX_TOKENIZER_BYTES:
        raise ArtifactError(f"{file}: over {MAX_TOKENIZER_BYTES:,} bytes; is this a tokenizer?")
    stamp = (status.st_ino, status.st_mtime_ns, status.st_size)
    seconds = CPU_SECONDS + status.st_size // BYTES_PER_SECOND
    outcome = _try_tokenizer(str(file.absolute()), stamp, seconds)
    if outcome in PROBLEMS:
        problem = f"takes over {seconds} seconds" if outcome == "time" else PROBLEMS[outcome]
        raise ArtifactError(f"{file}: tokenizing text with it {problem}; use another tokenizer")


@functools.lru_cache(maxsize=256)
def _try_tokenizer(file: str, stamp: tuple[int, ...], seconds: int) -> str:
    """Try a tokenizer's file, once for each version of it (`stamp`)."""
    return _try("run_tokenizer", file=file, cpu_seconds=seconds)[0]


def is_panic(error: BaseException) -> bool:
    """Whether an exception is a panic of a Rust library, which is no `Exception`: unusual input reached a bug."""
    return type(error).__name__ == "PanicException"


def _try(task: str, **request: Any) -> tuple[str, str]:
    """Run a task of the child. Return its outcome, one of sandbox_child.OUTCOMES, and a message."""
    if not hasattr(os, "fork"):  # Windows
        return "ok", ""
    limits = {"cpu_seconds": CPU_SECONDS, "wall_seconds": WALL_SECONDS, "memory_bytes": MEMORY_BYTES}
    return _CHILD.ask(json.dumps({"task": task} | limits | request).encode())


class _Child:
    """The child process. A forked process, such as a data worker, starts its own."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._lock = threading.Lock()

    def ask(self, request: bytes) -> tuple[str, str]:
        """Return the outcome of a request, one of sandbox_child.OUTCOMES, and a message.

        Raises:
            ArtifactError: the child cannot be started, or ended twice.
        """
        with self._lock:
            is_new = self._start()
            reply = self._exchange(request)
            if not reply and not is_new:  # it has ended since the last request
                self.close()
                self._start()
                reply = self._exchange(request)
        if not reply:
            self.close()
            raise ArtifactError("the process that tries untrusted files ended; run the command again")
        return OUTCOMES[reply[0]], reply[1:].decode(errors="replace").strip()

    def _start(self) -> bool:
        """Start the child unless it runs; return whether it was started."""
        if self._process is not None and self._owner == os.getpid() and self._process.poll() is None:
            return False
        program = Path(__file__).with_name("sandbox_child.py")
        path = [entry for entry in sys.path if entry]
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", str(program), json.dumps(path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,
                start_new_session=True,  # Ctrl-C is for this process
            )
        except OSError as error:
            raise ArtifactError(f"no process can be started to try untrusted files: {error.strerror}") from None
        self._owner = os.getpid()
        assert self._process.stdout is not None
        self._process.stdout.read(1)  # it is ready
        return True

    def _exchange(self, request: bytes) -> bytes:
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        data = memoryview(len(request).to_bytes(8, "big") + request)
        try:
            while data:
                data = data[self._process.stdin.write(data) :]
            return self._process.stdout.read(1 + MESSAGE_BYTES) or b""
        except BrokenPipeError:
            return b""

    def close(self) -> None:
        """End the child."""
        process, self._process = self._process, None
        if process is None or self._owner != os.getpid():
            return
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(OSError):
            process.stdin.close()
            process.stdout.close()
        process.wait()


_CHILD = _Child()
atexit.register(_CHILD.close)
