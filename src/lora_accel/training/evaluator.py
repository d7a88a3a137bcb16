"""Evaluation: the exact mean loss per supervised token over all examples and ranks, metrics, and replies to prompts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from lora_accel.batching.batch import StepBatch
from lora_accel.config.metrics import NEUTRAL_LOSS
from lora_accel.errors import ConfigError
from lora_accel.training import scoring
from lora_accel.training.loss import summed_token_loss
from lora_accel.training.metrics import Metrics
from lora_accel.training.replies import FailedReply, Reply, ReplyGenerator


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """Evaluates a run. Every rank calls `evaluate`, and gets the same values."""

    accelerator: Accelerator
    model: torch.nn.Module
    sources: Mapping[str, StepBatch]
    """This rank's micro-batches of each evaluation source, by name."""
    num_bytes: Mapping[str, int] | None
    """Bytes of the supervised text of each source, for bits per byte; None = not computed."""
    neutral: StepBatch | None
    """This rank's micro-batches of the neutral text; None = there is none."""
    scorers: scoring.Scorers
    """Functions that score the replies to `scored_prompts`."""
    scored_prompts: Sequence[scoring.ScoredPrompt]
    reply_generator: ReplyGenerator
    prompts: Sequence[str]
    """`evaluation.prompts`."""
    prompt_ids: Sequence[list[int]]
    """Their token ids."""
    fingerprint: int
    """Identifies the data and the settings behind the metric that selects a checkpoint; see `setup.fingerprint`."""

    def evaluate(self, metrics: Metrics) -> dict[str, Any]:
        """Return the values to log.

        They are the losses, the metrics, `fingerprint`, under `metric_failed` the reason why there are none, and under
        `replies` (prompt, reply or error) pairs.
        """
        values: dict[str, Any] = {}
        if self.sources:
            with metrics.activity("evaluating"):
                values = evaluate_sources(self.accelerator, self.model, self.sources, self.num_bytes)
        if self.neutral is not None:
            with metrics.activity("evaluating on neutral text"):
                values[f"eval_{NEUTRAL_LOSS}"] = evaluate(self.accelerator, self.model, self.neutral)
        if self.scorers:
            with metrics.activity(f"replying to {len(self.scored_prompts):,} evaluation rows"):
                replies = self.reply_generator.generate([prompt.ids for prompt in self.scored_prompts])
                self._add_scores(values, replies)
        if values:
            values["fingerprint"] = self.fingerprint
        if self.prompts:
            with metrics.activity("replying to evaluation.prompts"):
                replies = self.reply_generator.generate(self.prompt_ids)
            values["replies"] = list(zip(self.prompts, replies, strict=True))
        return values

    def _add_scores(self, values: dict[str, Any], replies: Sequence[Reply]) -> None:
        """Add the metrics of replies, or why there are none.

        The main process computes them for all ranks: a function of the user need not return the same value twice.
        """
        scores: tuple[dict[str, float], dict[str, dict[str, float]]] | str = ""
        if self.accelerator.is_main_process:
            try:
                scores = scoring.score_by_source(self.scorers, self.scored_prompts, require_replies(replies))
            except ConfigError as error:
                scores = str(error)
        scores = gather_object([scores])[0]
        if isinstance(scores, str):
            values["metric_failed"] = scores
            return
        overall, by_source = scores
        values |= overall
        for name, source in values.get("sources", {}).items():
            source |= by_source.get(name, {})


def require_replies(replies: Sequence[Reply]) -> list[str]:
    """Return replies of which none failed. Without all of them, metrics would be those of fewer rows.

    Raises:
        ConfigError: one failed.
    """
    failed = [reply for reply in replies if isinstance(reply, FailedReply)]
    if failed:
        raise ConfigError(
            f"evaluation.metrics: no reply to {len(failed):,} of {len(replies):,} evaluation rows: {failed[0].error}"
        )
    return [reply for reply in replies if not isinstance(reply, FailedReply)]


def evaluate_sources(
    accelerator: Accelerator,
    model: torch.nn.Module,
    sources: Mapping[str, StepBatch],
    num_bytes: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Return the loss and token count over all sources and, if there are several, of each source.

    Args:
        num_bytes: of the supervised text of each source; None = do not return bits per byte.
    """
    losses = {name: evaluate(accelerator, model, batch) for name, batch in sources.items()}
    tokens = {name: batch.num_supervised_tokens for name, batch in sources.items()}
    total = sum(tokens.values())
    loss = sum(losses[name] * tokens[name] for name in sources) / total
    values = _losses(loss, total, None if num_bytes is None else sum(num_bytes.values()))
    if len(sources) > 1:
        values["sources"] = {
            name: _losses(losses[name], tokens[name], None if num_bytes is None else num_bytes[name])
            for name in sources
        }
    return values


def _losses(loss: float, num_tokens: int, num_bytes: int | None) -> dict[str, Any]:
    """Return a mean loss, its number of tokens and its bits per byte, if the text has bytes."""
    values: dict[str, Any] = {"eval_loss": loss, "eval_tokens": num_tokens}
    if num_bytes:
        values["eval_bits_per_byte"] = loss * num_tokens / math.log(2) / num_bytes
    return values


@torch.no_grad()
def evaluate(accelerator: Accelerator, model: torch.nn.Module, batch: StepBatch) -> float:
    """Return the mean loss per supervised token over all ranks.

    Args:
        batch: this rank's micro-batches of the examples.
    """
    model.eval()
    # In float64 the sum does not depend on the number of ranks. (MPS has no float64.)
    dtype = torch.float32 if accelerator.device.type == "mps" else torch.float64
    loss_sum = torch.zeros((), dtype=dtype, device=accelerator.device)
    for micro_batch in batch.micro_batches:
        loss_sum += summed_token_loss(model, micro_batch.to(accelerator.device))
    total: torch.Tensor = accelerator.reduce(loss_sum)
    return total.item() / batch.num_supervised_tokens
