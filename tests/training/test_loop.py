"""A step is the same step however it is cut; and what follows from (config, seed, step) alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from lora_accel import RunConfig, run_training
from lora_accel.config.plan import derive
from lora_accel.saving.weights import WEIGHTS
from tests.conftest import read_metrics

CUTS = {
    "1 at once": {"micro_batch_size": 1, "gradient_accumulation_steps": 4},
    "2 at once": {"micro_batch_size": 2, "gradient_accumulation_steps": 2},
    "4 at once": {"micro_batch_size": 4, "gradient_accumulation_steps": 1},
    "few tokens": {"batch_size": 4, "micro_batch_tokens": 1},
    "some tokens": {"batch_size": 4, "micro_batch_tokens": 90},
    "all tokens": {"batch_size": 4, "micro_batch_tokens": 10_000},
}


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_loss_and_gradient_do_not_depend_on_the_cut(
    make_config: Callable[..., RunConfig], tiny_model: Callable[..., Path], tmp_path: Path, family: str
) -> None:
    losses, norms, adapters, shapes = {}, {}, {}, {}
    for name, cut in CUTS.items():
        values = json.loads(make_config().model_dump_json())
        training = {"learning_rate": 1e-3, "warmup_steps": 1, "max_steps": 6} | cut
        config = RunConfig.model_validate(
            values
            | {
                "output_dir": str(tmp_path / name),
                "model": {"name_or_path": str(tiny_model(family)), "dtype": "float32"},
                "adapter": {"r": 4, "alpha": 8, "dropout": 0.1, "target_modules": "all-linear"},
                "training": training,
            }
        )
        adapters[name] = load_file(run_training(config) / WEIGHTS)
        lines = read_metrics(tmp_path / name)
        losses[name] = [line["loss"] for line in lines]
        norms[name] = [line["grad_norm"] for line in lines]
        shapes[name] = [(line["examples"], line["tokens"], line["supervised_tokens"]) for line in lines]

    whole = "all tokens"
    assert len(losses[whole]) == 6
    assert {count for count, _, _ in shapes[whole]} == {4, 1}, "the last step of an epoch is short"
    for name in CUTS:
        assert shapes[name] == shapes[whole]
        assert losses[name] == pytest.approx(losses[whole], rel=1e-6), name
        assert norms[name] == pytest.approx(norms[whole], rel=1e-5), name
        for tensor, expected in adapters[whole].items():
            difference = (adapters[name][tensor] - expected).norm() / expected.norm()
            assert difference < 1e-4, (name, tensor)
    assert losses["few tokens"] != losses["all tokens"], "cut otherwise, so rounded otherwise"


def test_a_step_weighs_tokens_not_examples(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    """The first step's loss, at the untrained weights, is the mean over its tokens of each example's loss."""
    single = make_config(
        output_dir=str(tmp_path / "single"),
        adapter={"dropout": 0.0},
        training={"batch_size": 1, "max_steps": 4, "learning_rate": 1e-30},
    )
    together = make_config(
        output_dir=str(tmp_path / "together"),
        adapter={"dropout": 0.0},
        training={"batch_size": 4, "max_steps": 1, "learning_rate": 1e-30},
    )
    run_training(single)
    run_training(together)
    lines = read_metrics(tmp_path / "single")
    tokens = [line["supervised_tokens"] for line in lines]
    losses = [line["loss"] for line in lines]
    (step,) = read_metrics(tmp_path / "together")
    by_token = sum(n * loss for n, loss in zip(tokens, losses, strict=True)) / sum(tokens)
    by_example = sum(losses) / 4
    assert step["supervised_tokens"] == sum(tokens)
    assert step["loss"] == pytest.approx(by_token, rel=1e-6)
    assert abs(by_example - by_token) > 1e-4 * by_token, "else this would not tell the two apart"


def test_the_gradient_norm_is_told_before_it_is_clipped(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    first = {}
    for limit in (1e-3, 1e3):
        config = make_config(output_dir=str(tmp_path / str(limit)), training={"max_grad_norm": limit, "max_steps": 2})
        run_training(config)
        first[limit] = read_metrics(tmp_path / str(limit))[0]["grad_norm"]
    assert first[1e-3] == first[1e3] > 1e-3


def test_step_seeds_are_what_they_were() -> None:
    """Frozen: another value would make a resumed run another run."""
    assert derive(0, 0) == 0xE220A8397B1DCDAF  # SplitMix64's published first output for seed 0
    assert derive(0, 1) == 0x6E789E6AA1B965F4
    assert derive(0, 2) == 0x06C45D188009454F


def test_step_seeds_are_distinct() -> None:
    seeds = [derive(seed, step) for seed in (0, 1, 2, 7, 2**32 - 1) for step in range(2000)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**64 for seed in seeds)


def test_dropout_differs_from_step_to_step_and_repeats_with_the_seed(
    make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """One row, learning rate nearly 0 after the adapter was shaken: what differs is the dropout mask."""
    rows = tmp_path / "one.jsonl"
    rows.write_text(json.dumps({"messages": [
        {"role": "user", "content": "say alpha bravo charlie"},
        {"role": "assistant", "content": "alpha bravo charlie delta echo"},
    ]}) + "\n")  # fmt: skip

    def losses(name: str, seed: int) -> list[float]:
        config = make_config(
            output_dir=str(tmp_path / name),
            seed=seed,
            adapter={"dropout": 0.5, "init_lora_weights": False},
            data={"train": [{"path": str(rows)}]},
            training={"batch_size": 1, "max_steps": 4, "learning_rate": 1e-30},
        )
        run_training(config)
        return [line["loss"] for line in read_metrics(tmp_path / name)]

    first = losses("first", 0)
    assert len(set(first)) == 4
    assert losses("again", 0) == first
    assert losses("other", 1) != first
