"""Program that `sandbox.py` starts: it runs each request in a fork of its own, with limits on CPU time and memory.

A request is a JSON object after its length (8 bytes). The reply is one byte, an index of `OUTCOMES`, and a message of
`MESSAGE_BYTES`, filled with spaces. The program imports neither torch nor transformers nor this package, so that it
starts in a fraction of a second. It ends when its input is closed, or after `IDLE_SECONDS` without a request.
"""

from __future__ import annotations

import json
import os
import re
import select
import signal
import sys
from collections.abc import Callable
from datetime import datetime
from typing import Any, NoReturn

IDLE_SECONDS = 60
OUTCOMES = ("ok", "time", "memory", "growth", "invalid", "crash")
MESSAGE_BYTES = 200
MAX_GROWTH, FREE_SIZE = 200, 1_000_000
"""A template or a tokenizer may write this many characters or tokens for each one that it reads, and this many more."""

ORDINARY = (
    "The quick brown fox doesn't jump over 13 lazy dogs, e.g. on 2024-05-17 at 09:45; see https://example.org/a?b=c#d.\n"
    "def add(x, y):\n    return x + y  # 1,234.5 + 6e7\n\n\t\u00c9t\u00e9 na\u00efve \u4f60\u597d\u4e16\u754c "
    '\u041f\u0440\u0438\u0432\u0435\u0442 \u0645\u0631\u062d \U0001f600\u200d\u2764 <|x|> [INST] a_b-c {"k": [1]}\n'
)
PROBES = (ORDINARY * 10, *(character * 1000 for character in "aA1 \n!_=\u00e9\u4f60"), "ab " * 500, "a1! " * 500)
"""Texts on which a tokenizer's pattern that takes exponential time shows it."""


class GrowthError(Exception):
    """The output is out of proportion to the input."""


class InvalidError(Exception):
    """The input is not valid. The message is reported."""


def main() -> None:
    """Serve requests until the input is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.path[:] = json.loads(sys.argv[1])
    import tokenizers  # noqa: F401 - before the forks

    _environment()

    os.write(1, b"+")
    while select.select([0], [], [], IDLE_SECONDS)[0] and (request := _read_request()) is not None:
        outcome, message = _run_limited(request)
        os.write(1, bytes([outcome]) + message[:MESSAGE_BYTES].ljust(MESSAGE_BYTES))


def _read_request() -> dict[str, Any] | None:
    size = _read(8)
    data = _read(int.from_bytes(size, "big")) if len(size) == 8 else b""
    return json.loads(data) if data else None


def _read(size: int) -> bytes:
    parts = []
    while size and (part := os.read(0, min(size, 1 << 20))):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _run_limited(request: dict[str, Any]) -> tuple[int, bytes]:
    """Run a request in a fork. Return its outcome, an index of `OUTCOMES`, and a message."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        _run(request, writer)
    os.close(writer)
    status = os.waitpid(child, 0)[1]
    message = os.read(reader, MESSAGE_BYTES)
    os.close(reader)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) < len(OUTCOMES):
        return os.WEXITSTATUS(status), message
    is_time = os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGALRM)
    # The tokenizers library aborts if memory cannot be allocated.
    is_memory = os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGABRT, signal.SIGKILL)
    return OUTCOMES.index("time" if is_time else "memory" if is_memory else "crash"), b""


def _run(request: dict[str, Any], writer: int) -> NoReturn:
    import resource  # not on Windows, where this function is not used

    outcome = "crash"
    try:
        signal.alarm(int(request["wall_seconds"]))
        limits = {
            resource.RLIMIT_CPU: int(request["cpu_seconds"]),
            resource.RLIMIT_AS: int(request["memory_bytes"]),
            resource.RLIMIT_CORE: 0,
            resource.RLIMIT_FSIZE: 0,
        }
        for limit, value in limits.items():
            hard = resource.getrlimit(limit)[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(limit, (value, hard))
        TASKS[request["task"]](request)
        outcome = "ok"
    except MemoryError:
        outcome = "memory"
    except GrowthError:
        outcome = "growth"
    except InvalidError as error:
        outcome = "invalid"
        os.write(writer, str(error).encode(errors="replace")[:MESSAGE_BYTES])
    except Exception:  # an ordinary error: this package meets it itself, and reports it
        outcome = "ok"
    finally:
        os._exit(OUTCOMES.index(outcome))  # also after a panic of a Rust library, which is no Exception


def _check_growth(written: int, read: int) -> None:
    if written > MAX_GROWTH * read + FREE_SIZE:
        raise GrowthError


def match_patterns(request: dict[str, Any]) -> None:
    """Match patterns with names in the three ways that PEFT 0.21 does.

    Raises:
        InvalidError: a pattern is not valid.
    """
    for pattern in request["patterns"]:
        try:
            matchers = [re.compile(pattern).fullmatch, re.compile(rf"(.*\.)?({pattern})$").match]
            matchers.append(re.compile(rf".*\.{pattern}\.(\d+)\.").match)
        except (re.error, RecursionError, OverflowError) as error:
            reason = str(error) or type(error).__name__
            raise InvalidError(f"{pattern[:60]!r} is not a valid pattern: {reason}") from None
        for matcher in matchers:
            for name in request["names"]:
                matcher(name)


def render_template(request: dict[str, Any]) -> None:
    """Render conversations with a chat template, in an environment like that of transformers."""
    template = _environment().from_string(request["source"])
    for variables in request["variables"]:
        try:
            text = template.render(variables)
        except MemoryError:
            raise
        except Exception:  # the template rejects this conversation
            continue
        _check_growth(len(text), len(json.dumps(variables)))


def run_tokenizer(request: dict[str, Any]) -> None:
    """Encode and decode texts with all of a tokenizer.json but its vocabulary, which takes most of the time to load.

    Finding tokens in a vocabulary takes time in proportion to the text; everything around it is a program.
    """
    from tokenizers import Tokenizer

    with open(request["file"], encoding="utf-8") as file:
        config = json.load(file)
    vocabulary = config["model"].get("vocab") or {}
    names = list(vocabulary) if isinstance(vocabulary, dict) else [entry[0] for entry in vocabulary]
    config["model"] = {"type": "WordLevel", "vocab": {"": 0}, "unk_token": ""}
    config["truncation"] = config["padding"] = None
    tokenizer = Tokenizer.from_str(json.dumps(config))
    for text in PROBES:
        encoding = tokenizer.encode(text, add_special_tokens=True)
        _check_growth(sum(map(len, encoding.tokens)) + len(encoding.ids), len(text))
        if tokenizer.normalizer is not None:
            _check_growth(len(tokenizer.normalizer.normalize_str(text)), len(text))
    for tokens in (names[:500], names[-500:]):
        if tokenizer.decoder is not None:
            _check_growth(len(tokenizer.decoder.decode(tokens)), sum(map(len, tokens)))


TASKS: dict[str, Callable[[dict[str, Any]], None]] = {
    "match_patterns": match_patterns,
    "render_template": render_template,
    "run_tokenizer": run_tokenizer,
}


def _environment() -> Any:
    from jinja2 import TemplateError, nodes

    class Impossible(nodes.Impossible):
        """Raised where an expression cannot be computed when the template is compiled, even for lack of memory."""

        def __init__(self) -> None:
            if isinstance(sys.exc_info()[1], MemoryError):
                os._exit(OUTCOMES.index("memory"))

    nodes.Impossible = Impossible  # type: ignore[assignment,misc]
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """The tag `{% generation %}`, which marks the answer for transformers and writes nothing."""

        tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

        def parse(self, parser: Any) -> nodes.Node | list[nodes.Node]:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    def raise_exception(message: str) -> NoReturn:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = lambda value, ensure_ascii=False, **options: json.dumps(
        value, ensure_ascii=ensure_ascii, **options
    )
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


if __name__ == "__main__":
    main()
