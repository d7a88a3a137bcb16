"""The metrics of evaluation: which direction is better, whether they need replies, and where their code is.

To add a metric, add it to `METRICS`. Its code is imported only when it is computed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lora_accel.errors import ConfigError, did_you_mean, first_line, join_or

FUNCTION = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")
"""The path of a user's function: `module:function`."""


@dataclasses.dataclass(frozen=True)
class MetricSpec:
    """A metric of an evaluation. Its value is logged as `eval_<name>`."""

    larger_is_better: bool
    path: str | None = None
    """Import path of the function that scores replies, `module:function`. None = it is derived from the loss."""
    package: str | None = None
    """The module of an optional package that it needs."""

    @property
    def needs_replies(self) -> bool:
        """Whether the model has to reply to the prompts of the evaluation rows."""
        return self.path is not None


_SCORES = "lora_accel.training.scores"
METRICS: dict[str, MetricSpec] = {
    "loss": MetricSpec(larger_is_better=False),
    "perplexity": MetricSpec(larger_is_better=False),
    "bits_per_byte": MetricSpec(larger_is_better=False),
    "exact_match": MetricSpec(larger_is_better=True, path=f"{_SCORES}:exact_match"),
    "token_f1": MetricSpec(larger_is_better=True, path=f"{_SCORES}:token_f1"),
    "rouge_l": MetricSpec(larger_is_better=True, path=f"{_SCORES}:rouge_l", package="rouge_score"),
    "bleu": MetricSpec(larger_is_better=True, path=f"{_SCORES}:bleu", package="sacrebleu"),
    "json_valid": MetricSpec(larger_is_better=True, path=f"{_SCORES}:json_valid"),
    "json_equal": MetricSpec(larger_is_better=True, path=f"{_SCORES}:json_equal"),
    "tool_call_equal": MetricSpec(larger_is_better=True, path=f"{_SCORES}:tool_call_equal"),
}
"""Names for `evaluation.metrics`. The functions take (prompts, replies, references), three lists of equal length."""
NEUTRAL_LOSS = "neutral_loss"
"""The loss on neutral text (`evaluation.neutral`)."""


def check_metric_name(name: str) -> str:
    """Return a name for `evaluation.metrics`, if it is one.

    Raises:
        ValueError: it is neither in `METRICS` nor of the form `module:function`.
    """
    if name not in METRICS and not FUNCTION.fullmatch(name):
        hint = did_you_mean(name, METRICS)
        raise ValueError(f"{name!r:.80} is not a metric{hint}; set {join_or(METRICS)}, or module:function for your own")
    return name


def directions_of(metrics: Sequence[str], *, has_neutral: bool) -> dict[str, bool | None]:
    """Return the metrics of an evaluation -> whether a larger value is better; None = a function of the user decides.

    Args:
        metrics: `evaluation.metrics`. A function that returns several numbers by name is listed by its own name only.
        has_neutral: whether there is neutral text.
    """
    names = ["loss", "perplexity", *metrics]
    directions: dict[str, bool | None] = {
        f"eval_{name}": METRICS[name].larger_is_better for name in names if name in METRICS
    }
    directions |= {f"eval_{name.split(':')[1]}": None for name in metrics if name not in METRICS}
    return directions | ({f"eval_{NEUTRAL_LOSS}": False} if has_neutral else {})


def load_function(path: str) -> Callable[..., Any]:
    """Import the function of a metric. A user's module is looked for in the current folder too.

    Args:
        path: `module:function`.

    Raises:
        ConfigError: it cannot be imported.
    """
    module, name = path.split(":")
    try:
        with _current_folder_on_path():
            function = getattr(importlib.import_module(module), name)
    except (Exception, SystemExit) as error:  # the module's code may raise anything
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise ConfigError(
            f"evaluation.metrics: {path} cannot be imported: {reason}; set module:function, with a module that is "
            "installed or in the current folder"
        ) from None
    if not callable(function):
        raise ConfigError(f"evaluation.metrics: {path} is not a function")
    return function  # type: ignore[no-any-return]


def load_metrics(names: Sequence[str]) -> dict[str, Callable[..., Any]]:
    """Return the functions of those metrics that need replies, by name.

    Raises:
        ConfigError: a function cannot be imported, or a package is not installed.
    """
    functions = {}
    for name in names:
        spec = METRICS.get(name)
        if spec is not None and spec.package is not None and importlib.util.find_spec(spec.package) is None:
            raise ConfigError(
                f"evaluation.metrics: {name} needs the package {spec.package.replace('_', '-')}; install it with "
                "pip install 'lora-accel[metrics]', or remove this metric"
            )
        if spec is None or spec.path is not None:
            functions[name] = load_function(name if spec is None else str(spec.path))
    return functions


@contextlib.contextmanager
def _current_folder_on_path() -> Iterator[None]:
    """Allow imports from the current folder within the block, after all other folders: it hides no installed module."""
    if "" in sys.path:
        yield
        return
    sys.path.append("")
    try:
        yield
    finally:
        sys.path.remove("")
