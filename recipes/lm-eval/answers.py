"""A task of lm-evaluation-harness: the loss of answers, as `lora-accel evaluate` defines it."""

from __future__ import annotations

from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask


class BitsPerByte(ConfigurableTask):
    """The loss of an answer and of the end of its turn in bits, over the UTF-8 bytes of the answer.

    The harness counts whitespace at the end of a prompt, such as chatml's last line break, as part of the answer. This
    task requests its log-likelihood too, and subtracts it.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config={key: value for key, value in config.items() if key != "class"})

    def construct_requests(self, doc: dict[str, Any], ctx: str, **kwargs: Any) -> list[Instance]:
        """Return the requests of a row: the answer, and the whitespace before it if there is some."""
        answer = super().construct_requests(doc, ctx, **kwargs)
        if ctx == ctx.rstrip():
            return [answer]
        return [answer, Instance("loglikelihood", doc, arguments=(ctx, ""), idx=1, metadata=kwargs["metadata"])]

    def process_results(self, doc: dict[str, Any], results: list[tuple[float, bool]]) -> dict[str, tuple[float, int]]:
        """Return the log-likelihood of an answer, in nats, and its number of bytes.

        Args:
            doc: a question and its answer, as `messages`.
            results: log-likelihood of each request, and whether greedy decoding gives its text.
        """
        (log_likelihood, _), *whitespace = results
        log_likelihood -= sum(value for value, _ in whitespace)
        return {"bits_per_byte": (log_likelihood, len(doc["messages"][1]["content"].encode()))}
