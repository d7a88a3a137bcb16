"""Extreme run configs: each is one message within seconds, whatever a short YAML text describes."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from lora_accel.config import files, yaml_limits
from lora_accel.config.files import read_config
from lora_accel.errors import ConfigError
from tests.config.test_files import MINIMAL

ALIASES = "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 9))
CHAIN = "".join(f"a{n}: {('${a' + str(n - 1) + '}') * 10}\n" for n in range(1, 10))
NESTED = "lists and mappings are nested more than 40 deep"
YAML_BOMBS = [
    ("logging: {trackers: " + "[" * 100_000 + "]" * 100_000 + "}", NESTED),
    ("logging: {trackers: " + "[" * 500 + "]" * 500 + "}", NESTED),
    ("adapter: " + "{a: " * 30_000 + "1" + "}" * 30_000, NESTED),
    ("adapter:\n" + "".join("  " * n + "a:\n" for n in range(1, 600)), NESTED),
    ("x:\n" + "- " * 100_000 + "x", NESTED),
    ("a0: &a0 [1, 2, 3]\n" + ALIASES, "over 10,000 values, aliases included"),
    ("adapter: &a {x: *a}", r"the alias \*a refers to a value that contains it"),
    ("evaluation: {prompts: [" + "a," * 20_000 + "b]}", "over 10,000 values"),
    ("adapter: {" + ",".join(f"k{n}: 1" for n in range(2000)) + "}", "… and 1,950 more"),
    ("seed: " + "9" * 5000, "line 5: not valid YAML: a number of 5,000 characters"),
    ("seed: 1" + ":59" * 50_000, "a number of 150,001 characters"),
    ("seed: 0b" + "1" * 500_000, "a number of 500,002 characters"),
    ("seed: ${seed}", "Recursive interpolation"),
    ("seed: " + "${" * 2000 + "a" + "}" * 2000, "over 50 interpolations in one value"),
    ("a0: xxxxxxxxxx\n" + CHAIN, "too many interpolations, or they are too long"),
    ("? [a, b]\n: 1", "not valid YAML|unhashable|key"),
    ("seed: 2024-99-99", "month|should be a valid integer"),
]
EXTREME_OVERRIDES = [
    (("seed=" + "[" * 100_000,), "not a YAML value: " + NESTED),
    ((".".join(["a"] * 100_000) + "=1",), "no option is nested in over 20 sections"),
    (("seed=1",) * 100_000, "100,000 overrides of 600,000 characters: at most 1,000"),
    (("evaluation.prompts=['" + "x" * 2_000_000 + "']",), "at most 1,000 of 1,000,000 characters are read"),
    (("adapter.target_modules='" + "(" * 5000 + "a" + ")" * 5000 + "'",), "is not a regular expression"),
    (("output_dir=\udc80",), "surrogates not allowed"),
    (('output_dir="a\\0b"',), "a path cannot contain NUL characters"),
    (("training.epochs=1e300",), "training.epochs: should be less than or equal to 1000000"),
    (("training.max_steps=" + "9" * 20,), "training.max_steps: should be less than or equal to"),
    (("training.max_hours=1e300",), "training.max_hours: should be less than or equal to"),
    (("training.learning_rate=.nan",), "training.learning_rate: should be a finite number"),
    (("adapter.alpha=.inf",), "adapter.alpha: should be a finite number"),
    (("data.train=[{path: a, weight: 1e300}]",), "weight: should be less than or equal to 1000"),
    (("data.train=[{path: a, weight: .inf}]",), "weight: should be a finite number"),
    (("evaluation.max_new_tokens=1000000",), "max_new_tokens: should be less than or equal to 100000"),
    (("data.max_length=1" + "0" * 12,), "data.max_length: should be less than or equal to 16777216"),
    (("data.num_workers=1000000",), "data.num_workers: should be less than or equal to 1024"),
    (("model.rope_scaling={rope_type: linear, factor: .nan}",), "should be a number of at least 1"),
    (("model.rope_scaling={rope_type: linear, factor: .inf}",), "should be a number of at most"),
]


def error_of(path: Path, overrides: tuple[str, ...] = ()) -> str:
    began = time.process_time()
    with pytest.raises(ConfigError) as caught:
        read_config(path, overrides)
    assert time.process_time() - began < 5
    assert len(str(caught.value)) < 20_000
    return str(caught.value)


@pytest.mark.parametrize(("text", "message"), YAML_BOMBS)
def test_yaml_bomb_is_one_message(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(MINIMAL + text, encoding="utf-8")
    error = error_of(file)
    assert any(part in error for part in message.replace("\\", "").split("|")), error[:300]


@pytest.mark.parametrize("text", ["3", "- a", "hello", "", "null", "[" * 50_000, "a: 1\n---\nb: 2"])
def test_text_that_is_no_config_is_one_message(tmp_path: Path, text: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text, encoding="utf-8")
    assert error_of(file).startswith(str(file))


def test_device_or_folder_is_one_message(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (Path("/dev/zero"), Path("/dev/null"), tmp_path, pipe, Path("a\0b"), Path("a" * 5000)):
        assert "cannot be read" in error_of(path)


def test_config_of_100_megabytes_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    with file.open("wb") as stream:
        stream.truncate(100_000_000)
    assert f"over {files.MAX_CONFIG_BYTES:,} bytes" in error_of(file)


def test_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_bytes(b"\xef\xbb\xbf" + MINIMAL.encode())
    assert read_config(file).output_dir == "runs/first"


@pytest.mark.parametrize(("overrides", "message"), EXTREME_OVERRIDES)
def test_extreme_override_is_one_message(tmp_path: Path, overrides: tuple[str, ...], message: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(MINIMAL, encoding="utf-8")
    assert message in error_of(file, overrides)


def test_ordinary_aliases_and_interpolations_are_allowed(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    text = MINIMAL + "seed: &n 3\ntraining: {max_steps: *n}\nevaluation: {prompts: ['${output_dir}', '\\${a}']}\n"
    file.write_text(text, encoding="utf-8")
    config = read_config(file, ["data.cache_dir=${output_dir}/${model.name_or_path}"])
    assert (config.training.max_steps, config.data.cache_dir) == (3, "runs/first/model")
    assert config.evaluation.prompts == ["runs/first", "${a}"]
    assert yaml_limits.MAX_DEPTH > 10
