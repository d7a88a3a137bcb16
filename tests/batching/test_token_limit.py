"""`micro_batch_tokens: auto` on a CPU: the smallest micro-batch that computes about as few tokens as a large one."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from lora_accel.batching.batches import Batches, BatchOptions, num_computed_tokens, step_batch
from lora_accel.batching.token_limit import CANDIDATES, MAX_EXTRA, choose_token_limit
from lora_accel.config.plan import Plan, make_plan
from lora_accel.config.schema import RunConfig
from lora_accel.data.chat import Example
from lora_accel.data.dataset import Dataset, Source
from lora_accel.data.store import Examples
from lora_accel.labels import IGNORE_INDEX

SHARING = BatchOptions(pad_id=0, packed=True, max_tokens=4096, min_saving=0.0)


def examples_of(prefix: int, rest: int, count: int = 64) -> list[Example]:
    """Examples that begin with the same tokens; the second half of the rest is supervised."""
    random = np.random.default_rng(0)
    beginning = random.integers(1, 1000, prefix).tolist()
    examples = []
    for _ in range(count):
        ids = beginning + random.integers(1, 1000, rest).tolist()
        examples.append(Example(ids, [IGNORE_INDEX] * (len(ids) - rest // 2) + ids[len(ids) - rest // 2 :]))
    return examples


def chosen(examples: list[Example], options: BatchOptions) -> tuple[int, Batches, Plan]:
    config = RunConfig.model_validate(
        {"output_dir": "run", "model": {"name_or_path": "m"}, "data": {"train": [{"path": "x"}]}}
    )
    plan = make_plan(
        config, num_ranks=options.num_ranks, num_examples=len(examples), num_tokens=1, num_supervised_tokens=1
    )
    batches = Batches(Dataset([Source(Examples.of(examples), 1.0)], []), plan, options, seed=0)
    return choose_token_limit(batches, options, plan.total_steps), batches, plan


@pytest.mark.parametrize(("prefix", "rest", "limit"), [(0, 300, 1024), (30, 100, 1024), (500, 150, 4096)])
def test_limit_grows_with_what_examples_share(prefix: int, rest: int, limit: int) -> None:
    assert chosen(examples_of(prefix, rest), SHARING)[0] == limit


def test_limit_computes_about_as_few_tokens_as_the_largest_one() -> None:
    for prefix in (100, 200, 300, 400):
        limit, batches, plan = chosen(examples_of(prefix, 100), SHARING)
        computed = {
            size: sum(
                num_computed_tokens(batches.examples(step), dataclasses.replace(SHARING, max_tokens=size))
                for step in range(plan.total_steps)
            )
            for size in CANDIDATES
        }
        most = (1 + MAX_EXTRA) * computed[CANDIDATES[-1]]
        assert computed[limit] <= most
        assert all(computed[size] > most for size in CANDIDATES if size < limit)


@pytest.mark.parametrize("changes", [{"min_saving": None}, {"packed": False, "min_saving": None}, {"max_examples": 4}])
def test_smallest_limit_where_nothing_is_shared_or_examples_are_counted(changes: dict[str, object]) -> None:
    assert chosen(examples_of(500, 150), dataclasses.replace(SHARING, **changes))[0] == CANDIDATES[0]  # type: ignore[arg-type]


def test_every_rank_chooses_the_same() -> None:
    limits = {
        chosen(examples_of(300, 100), dataclasses.replace(SHARING, rank=rank, num_ranks=3))[0] for rank in range(3)
    }
    assert len(limits) == 1


def test_counted_tokens_are_those_of_the_batch() -> None:
    examples = examples_of(200, 90, count=16)
    for options in (SHARING, dataclasses.replace(SHARING, max_tokens=1024, num_ranks=2)):
        assert num_computed_tokens(examples, options) == step_batch(examples, options).num_computed_tokens
