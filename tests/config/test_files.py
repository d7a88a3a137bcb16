"""Reading a run config from YAML and overrides, and writing it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from lora_accel.config.files import config_to_yaml, read_config, yaml_scalar
from lora_accel.config.schema import RunConfig
from lora_accel.errors import ConfigError
from tests.conftest import ROOT

MINIMAL = """\
output_dir: runs/first
model: {name_or_path: model}
data:
  train: [{path: a.jsonl, weight: 2}, {path: b.jsonl}]
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL, encoding="utf-8")
    return path


def value_of(config: RunConfig, key: str) -> Any:
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("training.micro_batch_size=2", "training.gradient_accumulation_steps=3"),
        ("training.mixed_precision=no", "training.learning_rate=1e-5", "seed=4294967295"),
        ("training.warmup_steps=0", "training.max_steps=7", "evaluation.prompts=['no', '1', \"a: b\\n# c\", héé]"),
        ("adapter.target_modules='.*\\.(q|v)_proj$'", "adapter.rank_pattern={q_proj: 2}"),
        ("evaluation.prompts=['costs \\${amount}', 'a \\\\\\${x}']",),
        ("data.train=[{path: a.csv, columns: {text: body}, format: text, limit: 3}]", "quantization.bits=4"),
    ],
)
def test_written_config_reads_back_equal(file: Path, overrides: tuple[str, ...]) -> None:
    config = read_config(file, overrides)
    written = file.with_name("written.yaml")
    written.write_text(config_to_yaml(config), encoding="utf-8")
    assert read_config(written) == config
    assert config_to_yaml(read_config(written)) == written.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("seed=7", "seed", 7),
        ("training.learning_rate=3e-4", "training.learning_rate", 3e-4),
        ("training.epochs=2", "training.epochs", 2),
        ("training.mixed_precision=no", "training.mixed_precision", "no"),
        ("training.mixed_precision=bf16", "training.mixed_precision", "bf16"),
        ("adapter.target_modules=all-linear", "adapter.target_modules", "all-linear"),
        ("adapter.target_modules=[k_proj, o_proj]", "adapter.target_modules", ["k_proj", "o_proj"]),
        ("adapter.alpha_pattern={q_proj: 2.0}", "adapter.alpha_pattern", {"q_proj": 2.0}),
        ("evaluation.prompts=['a=b', 'c, d']", "evaluation.prompts", ["a=b", "c, d"]),
        ("logging.trackers=[]", "logging.trackers", []),
        ("output_dir=${model.name_or_path}/run", "output_dir", "model/run"),
        ("output_dir=a=b", "output_dir", "a=b"),
        ("model.name_or_path='123'", "model.name_or_path", "123"),
        ("checkpoint={every_steps: 5}", "checkpoint.every_steps", 5),
    ],
)
def test_override_sets_a_value(file: Path, override: str, key: str, value: Any) -> None:
    assert value_of(read_config(file), key) != value or value is None
    assert value_of(read_config(file, [override]), key) == value


def test_override_replaces_a_list(file: Path) -> None:
    config = read_config(file, ["data.train=[{path: c.jsonl}]"])
    assert [source.path for source in config.data.train] == ["c.jsonl"]


def test_last_override_wins_and_mappings_are_merged(file: Path) -> None:
    config = read_config(file, ["adapter.r=4", "adapter.alpha=9", "adapter={r: 6}", "seed=1", "seed=2"])
    assert (config.adapter.r, config.adapter.alpha, config.seed) == (6, 9, 2)


def test_bare_no_in_yaml_is_a_string(file: Path) -> None:
    file.write_text(MINIMAL + "training: {mixed_precision: no}\n", encoding="utf-8")
    assert read_config(file).training.mixed_precision == "no"


def test_bare_yes_is_an_error(file: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"training\.mixed_precision: should be 'auto', 'no', 'bf16' or 'fp16', not True"
    ):
        read_config(file, ["training.mixed_precision=yes"])


def test_interpolation_of_keys_and_environment(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_ACCEL_TEST_RANK", "12")
    lines = [
        "checkpoint: {resume: '${output_dir}/checkpoints/last'}",
        "adapter: {r: '${oc.decode:${oc.env:LORA_ACCEL_TEST_RANK}}'}",
    ]
    file.write_text(MINIMAL + "\n".join(lines), encoding="utf-8")
    config = read_config(file, ["output_dir=elsewhere"])
    assert config.checkpoint.resume == "elsewhere/checkpoints/last"
    assert config.adapter.r == 12


def test_missing_environment_variable_is_reported(file: Path) -> None:
    with pytest.raises(ConfigError, match=r"override .*: output_dir: .*LORA_ACCEL_ABSENT"):
        read_config(file, ["output_dir=${oc.env:LORA_ACCEL_ABSENT}"])


def test_numbers_in_scientific_notation_are_numbers(file: Path) -> None:
    file.write_text(MINIMAL + "training: {learning_rate: 2e-4, weight_decay: 1_0.5, epochs: 1}\n", encoding="utf-8")
    training = read_config(file).training
    assert (training.learning_rate, training.weight_decay, training.epochs) == (2e-4, 10.5, 1)


RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_recipes_are_valid(recipe: Path) -> None:
    config = read_config(recipe)
    for source in [*config.data.train, *config.data.eval]:
        if source.path.startswith("recipes/"):
            assert (ROOT / source.path).exists()


def test_recipes_exist() -> None:
    assert "quickstart.yaml" in [path.name for path in RECIPES]


@pytest.mark.parametrize(
    "value",
    ["a, b", "{a}", "[0-9].jsonl", "x?a=1&b=2", "a: b", "#a", "no", "1", "", " a ", "${a}", 3, ["a, b", 1]],
)
def test_yaml_scalar_is_read_back_in_a_flow_mapping(value: Any) -> None:
    text = yaml_scalar(value)
    read = OmegaConf.to_container(OmegaConf.create(f"outer: {text}\ninner: [{{path: {text}}}]\n"), resolve=True)
    assert read == {"outer": value, "inner": [{"path": value}]}
    assert "\n" not in text
