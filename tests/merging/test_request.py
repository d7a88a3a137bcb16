"""What may be said to `lora-accel merge`, and what it tells."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lora_accel.errors import ConfigError
from lora_accel.merging.request import MergeRequest, merge_lines, parse_merge


def parsed(*words: str, **options: Any) -> MergeRequest:
    told: dict[str, Any] = dict.fromkeys(("run", "lora_path", "target_model_path", "max_shard_size"))
    return parse_merge(words, **({"weighted": []} | told | options))


def test_the_ways_to_say_it_are_one() -> None:
    plain = parsed("adapter", "out")
    assert plain == MergeRequest([("adapter", 1.0)], Path("out"), None, None)
    assert parsed(lora_path="adapter", target_model_path=Path("out")) == plain, "FastChat's words"
    assert parsed("out", lora_path="adapter") == plain
    assert parsed("adapter", target_model_path=Path("out")) == plain
    assert parsed("out", weighted=["a=0.7", "b=x=-0.3"]).adapters == [("a", 0.7), ("b=x", -0.3)]
    assert parsed(run=Path("run")) == MergeRequest([], Path("run/merged"), Path("run"), None)


@pytest.mark.parametrize(("size", "number"), [("5GB", 5e9), ("500 mb", 5e8), ("2GiB", 2**31), ("0.5KB", 500), ("7", 7)])
def test_sizes(size: str, number: float) -> None:
    assert parsed("a", "b", max_shard_size=size).max_shard_bytes == number


@pytest.mark.parametrize(
    ("words", "options", "told"),
    [
        ((), {}, "ADAPTER is missing"),
        (("a",), {}, "OUT is missing"),
        (("a", "b", "c"), {}, "'c' is one word too many"),
        (("a", "b"), {"weighted": ["c=1"]}, "one word too many"),
        (("a", "b"), {"lora_path": "c"}, "one word too many"),
        (("a",), {"run": Path("r")}, "takes neither"),
        ((), {"weighted": ["a=heavy"]}, "say DIR=WEIGHT"),
        ((), {"weighted": ["a=nan"]}, "say DIR=WEIGHT"),
        ((), {"weighted": ["=1"]}, "say DIR=WEIGHT"),
        (("a", "b"), {"max_shard_size": "big"}, "--max-shard-size big"),
        (("a", "b"), {"max_shard_size": "0"}, "--max-shard-size 0"),
    ],
)
def test_what_cannot_be_meant_is_refused(words: tuple[str, ...], options: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        parsed(*words, **options)


def test_what_was_not_checked_is_told() -> None:
    merged = {"adapter": "a", "base": "b", "same_base": None, "agreement": None}
    lines = merge_lines([{"merged": merged}, {"merged": merged | {"same_base": False}}], parsed("a", "out"))
    assert "not compared with base + adapter" in lines[0]
    assert "only names and shapes could be checked" in lines[1]
    assert "b is not the base that the adapter was trained on" in lines[3]
    again = merge_lines([{"merged": merged, "already": True}], parsed(run=Path("run")))
    assert again == ["merged already: run/merged/a"]


@pytest.mark.parametrize(("bits", "weights", "told"), [(4, "original", 1), (4, "dequantized", 0), (8, "original", 0)])
def test_of_a_qlora_adapter_it_is_told_which_weights_are_nearer(bits: int, weights: str, told: int) -> None:
    merged = {"adapter": "a", "base": "b", "same_base": True, "agreement": None, "base_weights": weights}
    made = {"merged": merged, "adapter": {"config": {"quantization": {"bits": bits}}}}
    notes = [line for line in merge_lines([made], parsed("a", "out")) if "--base-weights dequantized is nearer" in line]
    assert len(notes) == told
    assert len(merge_lines([made | {"adapter": {"config": "none"}}], parsed("a", "out"))) == 1
