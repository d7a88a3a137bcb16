"""The neutral text on which evaluation computes a loss, to see what a model forgets (`evaluation.neutral`)."""

from __future__ import annotations

from collections.abc import Callable
from importlib import resources
from pathlib import Path

from lora_accel.config.schema import RunConfig
from lora_accel.data.chat import Example
from lora_accel.data.template import ChatTemplate
from lora_accel.errors import ConfigError
from lora_accel.labels import IGNORE_INDEX
from lora_accel.model.sizes import ModelSizes
from lora_accel.paths import open_to_read
from lora_accel.setup.sizes import check_prompts

WINDOW = 512
"""Maximum number of tokens of an example. Shorter ones give each token less context, longer ones more memory."""
MAX_BYTES = 1_000_000
"""Maximum size of a user's file: each evaluation reads all of it."""


def neutral_examples(config: RunConfig, load_template: Callable[[], ChatTemplate], sizes: ModelSizes) -> list[Example]:
    """Return the neutral text as examples in which every token but the first is supervised; empty if there is none.

    Args:
        load_template: loads the tokenizer. Not called if there is no neutral text.
        sizes: of the model.

    Raises:
        ConfigError: the file cannot be used.
        DataError: the model lacks a token of the text.
    """
    if config.evaluation.neutral is None:
        return []
    template = load_template()
    ids = template.encode_text(_read_text(config.evaluation.neutral))
    length = max(2, min(WINDOW, config.data.max_length, (sizes.num_positions or WINDOW + 1) - 1))
    windows = [ids[start : start + length] for start in range(0, len(ids), length)]
    windows = [window for window in windows if len(window) > 1]
    if not windows:
        raise ConfigError(f"evaluation.neutral: {config.evaluation.neutral}: has no text; use a longer one")
    named = {f"evaluation.neutral, part {number}": window for number, window in enumerate(windows, start=1)}
    check_prompts(config.model, template.tokenizer, named, sizes)
    return [Example(window, [IGNORE_INDEX, *window[1:]]) for window in windows]


def _read_text(name: str) -> str:
    if name == "auto":
        return (resources.files("lora_accel.data") / "neutral.txt").read_text(encoding="utf-8")
    if Path(name).suffix != ".txt":
        raise ConfigError(f"evaluation.neutral: {name}: should be auto, or a .txt file")
    try:
        with open_to_read(Path(name)) as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"evaluation.neutral: {name}: cannot be read: {error.strerror}") from None
    if len(content) > MAX_BYTES:
        raise ConfigError(
            f"evaluation.neutral: {name}: over {MAX_BYTES:,} bytes, which each evaluation would read; use a part of it"
        )
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"evaluation.neutral: {name}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
