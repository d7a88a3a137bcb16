"""Arguments and output of `lora-accel merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lora_accel.errors import ConfigError
from lora_accel.merging.request import MergeRequest, merge_lines, parse_merge


def parse(*args: str, **options: Any) -> MergeRequest:
    defaults: dict[str, Any] = dict.fromkeys(("run", "lora_path", "target_model_path", "max_shard_size"))
    return parse_merge(args, **({"weighted_adapters": []} | defaults | options))


def test_equivalent_arguments_give_the_same_request() -> None:
    plain = parse("adapter", "out")
    assert plain == MergeRequest([("adapter", 1.0)], Path("out"), None, None)
    assert parse(lora_path="adapter", target_model_path=Path("out")) == plain, "FastChat's option names"
    assert parse("out", lora_path="adapter") == plain
    assert parse("adapter", target_model_path=Path("out")) == plain
    assert parse("out", weighted_adapters=["a=0.7", "b=x=-0.3"]).adapters == [("a", 0.7), ("b=x", -0.3)]
    assert parse(run=Path("run")) == MergeRequest([], Path("run/merged-all"), Path("run"), None)


@pytest.mark.parametrize(("size", "number"), [("5GB", 5e9), ("500 mb", 5e8), ("2GiB", 2**31), ("0.5KB", 500), ("7", 7)])
def test_max_shard_size_units(size: str, number: float) -> None:
    assert parse("a", "b", max_shard_size=size).max_shard_bytes == number


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        ((), {}, "ADAPTER is missing"),
        (("a",), {}, "OUT is missing"),
        (("a", "b", "c"), {}, "unexpected argument 'c'"),
        (("a", "b"), {"weighted_adapters": ["c=1"]}, "unexpected argument"),
        (("a", "b"), {"lora_path": "c"}, "unexpected argument"),
        (("a",), {"run": Path("r")}, "takes neither"),
        ((), {"weighted_adapters": ["a=heavy"]}, "expected DIR=WEIGHT"),
        ((), {"weighted_adapters": ["a=nan"]}, "expected DIR=WEIGHT"),
        ((), {"weighted_adapters": ["=1"]}, "expected DIR=WEIGHT"),
        (("a", "b"), {"max_shard_size": "big"}, "--max-shard-size big"),
        (("a", "b"), {"max_shard_size": "0"}, "--max-shard-size 0"),
    ],
)
def test_invalid_arguments_raise(args: tuple[str, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(*args, **options)


def test_output_lists_what_was_not_checked() -> None:
    merged = {"adapter": "a", "base": "b", "same_base": None, "agreement": None}
    lines = merge_lines([{"merged": merged}, {"merged": merged | {"same_base": False}}], parse("a", "out"))
    assert "not compared with base + adapter" in lines[0]
    assert "only names and shapes were checked" in lines[1]
    assert "b is not the base that the adapter was trained on" in lines[3]
    lines = merge_lines([{"merged": merged, "already": True}], parse(run=Path("run")))
    assert lines == ["already merged: run/merged-all/a"]


@pytest.mark.parametrize(
    ("bits", "weights", "num_notes"), [(4, "original", 1), (4, "dequantized", 0), (8, "original", 0)]
)
def test_qlora_adapter_gets_a_note_about_base_weights(bits: int, weights: str, num_notes: int) -> None:
    merged = {"adapter": "a", "base": "b", "same_base": True, "agreement": None, "base_weights": weights}
    provenance = {"merged": merged, "adapter": {"config": {"quantization": {"bits": bits}}}}
    lines = merge_lines([provenance], parse("a", "out"))
    assert len([line for line in lines if "--base-weights dequantized" in line]) == num_notes
    assert len(merge_lines([provenance | {"adapter": {"config": "none"}}], parse("a", "out"))) == 1
