"""A number that identifies what the metric that selects a checkpoint depends on, beside the weights.

A run may resume with other evaluation data or settings. Its earlier values are then not compared with the new ones.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence

import numpy as np

from lora_accel.config.metrics import METRICS, NEUTRAL_LOSS
from lora_accel.config.schema import RunConfig
from lora_accel.setup.data import PreparedData

DIGITS = 12
"""Hexadecimal digits: 48 bits, which every reader of JSON reads exactly."""


def evaluation_fingerprint(config: RunConfig, data: PreparedData) -> int:
    """Return a number that changes with the inputs of `checkpoint.keep_best`, or of eval_loss without it.

    For a loss these are the tokens and labels of the evaluation data; for a metric of replies the prompts and answers,
    and how replies are generated. Of a function of the user, the name is covered, but not the code.
    """
    digest = hashlib.sha256()
    for part in _inputs((config.checkpoint.keep_best or "eval_loss").removeprefix("eval_"), config, data):
        digest.update(len(part).to_bytes(8, "little") + part)
    return int(digest.hexdigest()[:DIGITS], 16)


def _inputs(metric: str, config: RunConfig, data: PreparedData) -> Iterator[bytes]:
    if metric == NEUTRAL_LOSS:
        yield from (_as_bytes(example.input_ids) for example in data.neutral)
    elif metric in METRICS and not METRICS[metric].needs_replies:
        for examples in data.eval_sources.values():
            for example in examples:
                yield from (_as_bytes(example.input_ids), _as_bytes(example.labels))
    else:
        section = config.evaluation
        functions = [] if metric in METRICS else [name for name in section.metrics if name not in METRICS]
        yield json.dumps([functions, section.max_new_tokens, section.generation.model_dump()]).encode()
        for prompt in data.scored_prompts:
            yield from (_as_bytes(prompt.ids), prompt.reference.encode("utf-8", errors="surrogatepass"))


def _as_bytes(tokens: Sequence[int]) -> bytes:
    return np.asarray(tokens, "<i8").tobytes()
