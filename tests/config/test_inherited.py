"""The options that a run takes from the adapter with which it begins, and those that contradict it."""

from __future__ import annotations

import dataclasses
from typing import Any

import peft
import pytest

from lora_accel.config.inherited import describe_inherited, inherit, inheritable_options, keep_recorded
from lora_accel.config.schema import AdapterSection, AddedTokens, RunConfig
from lora_accel.errors import ArtifactError, ConfigError

SAVED = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.3, "target_modules": ["v_proj", "q_proj"], "bias": "lora_only"}


def run_config(adapter: dict[str, Any] | None = None, **sections: Any) -> RunConfig:
    values = {"output_dir": "run", "model": {"name_or_path": "m"}, "data": {"train": [{"path": "rows.jsonl"}]}}
    return RunConfig.model_validate(values | {"adapter": {"init_from": "first"} | (adapter or {})} | sections)


def complete(config: RunConfig, saved: dict[str, Any], **options: Any) -> RunConfig:
    return inherit(config, inheritable_options(saved), options.pop("model", None), **options)


def test_shape_is_that_of_the_adapter_and_dropout_that_of_the_run() -> None:
    config = run_config({"dropout": 0.2})
    result = complete(config, SAVED | {"use_rslora": True, "rank_pattern": {"q_proj": 2}})
    section = result.adapter
    assert (section.r, section.alpha, section.bias, section.use_rslora) == (16, 32, "lora_only", True)
    assert (section.target_modules, section.rank_pattern) == (["v_proj", "q_proj"], {"q_proj": 2})
    assert (section.dropout, section.init_from) == (0.2, "first")
    taken = describe_inherited(config, result)
    assert {"r=16", "alpha=32", "use_rslora=True"} <= set(taken.replace(".0", "").split(", "))
    assert "dropout" not in taken


def test_defaults_of_pefts_config_are_not_options_of_the_run() -> None:
    """PEFT saves every field; most have a value that means nothing."""
    saved = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"]).to_dict() | {"target_modules": ["q_proj"]}
    section = complete(run_config(), saved).adapter
    assert section.peft_fields() == {}
    assert {name for name in dataclasses.asdict(peft.LoraConfig()) if saved.get(name)} > {"megatron_core"}


@pytest.mark.parametrize(("init", "expected"), [(True, None), ("gaussian", None), ("eva", None), ("pissa", "pissa")])
def test_initialization_counts_only_where_it_changes_more_than_first_values(init: Any, expected: Any) -> None:
    assert complete(run_config(), SAVED | {"init_lora_weights": init}).adapter.init_lora_weights == expected


def test_first_layer_is_not_no_layer() -> None:
    assert complete(run_config(), SAVED | {"layers_to_transform": 0}).adapter.layers_to_transform == 0


@pytest.mark.parametrize(
    ("adapter", "problem"),
    [
        ({"r": 8}, "adapter.r=8, but first has 16"),
        ({"alpha": 16.0}, "adapter.alpha=16.0, but first has 32"),
        ({"target_modules": ["q_proj"]}, r"adapter.target_modules=\['q_proj'\], but first has \['v_proj', 'q_proj'\]"),
        ({"bias": "none"}, "adapter.bias=none, but first has lora_only"),
        ({"use_dora": True}, "adapter.use_dora=True, but first has none"),
        ({"init_lora_weights": "pissa"}, "adapter.init_lora_weights=pissa, but first has none"),
    ],
)
def test_option_that_contradicts_the_adapter_is_an_error(adapter: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=rf"adapter\.init_from: {problem}.*: remove adapter\.\w+ from the config"):
        complete(run_config(adapter), SAVED)


def test_other_spellings_of_the_same_value_are_no_contradiction() -> None:
    """Also the full config in a run folder, which sets every option."""
    same = {"r": 16, "alpha": 32.0, "target_modules": ["q_proj", "v_proj"], "bias": "lora_only", "use_dora": False}
    result = complete(run_config(same | {"init_lora_weights": True, "rank_pattern": {}}), SAVED)
    assert complete(RunConfig.model_validate(result.model_dump()), SAVED) == result


def test_pattern_is_compared_with_that_of_the_adapters_run() -> None:
    config = run_config({"target_modules": "all-linear"})
    result = complete(config, SAVED, named_modules="all-linear")
    assert result.adapter.target_modules == "all-linear"
    assert keep_recorded(config, result.model_dump()) == result
    with pytest.raises(ConfigError, match=r"adapter\.target_modules=all-linear, but first has"):
        complete(config, SAVED, named_modules="q_proj|v_proj")


@pytest.mark.parametrize(
    ("saved", "sections", "problem"),
    [
        ({"layer_replication": [[0, 2]]}, {}, "layer_replication: makes several layers share weights"),
        ({"target_modules": None}, {}, "target_modules"),
        ({"lora_alpha": -1}, {}, "alpha: Input should be greater than 0"),
        ({"modules_to_save": ["lm_head"]}, {"quantization": {"bits": 4}}, "modules_to_save with quantization.bits"),
    ],
)
def test_adapter_that_a_run_cannot_train_is_an_error(saved: Any, sections: Any, problem: str) -> None:
    with pytest.raises(ArtifactError, match=rf"adapter\.init_from: a run cannot begin with first: .*{problem}"):
        complete(run_config(**sections), SAVED | saved)


def test_tokens_and_rope_scaling_are_those_of_the_adapters_run() -> None:
    added, scaling = AddedTokens(tokens=["<tool>"]), {"rope_type": "linear", "factor": 2.0}
    model = {"add_tokens": added, "rope_scaling": scaling}
    saved = SAVED | {"trainable_token_indices": {"embed_tokens": [7]}}
    result = complete(run_config(), saved, model=model)
    assert (result.model.add_tokens, result.model.rope_scaling) == (added, scaling)
    assert result.adapter.trainable_token_indices is None, "model.add_tokens sets it"
    same = {"name_or_path": "m", "add_tokens": ["<tool>"]}
    assert complete(run_config(model=same), saved, model=model).model.add_tokens == added
    other = run_config(model={"name_or_path": "m", "rope_scaling": {"rope_type": "yarn", "factor": 2.0}})
    with pytest.raises(ConfigError, match=r"model\.rope_scaling=.*'yarn'.*, but first has .*'linear'"):
        complete(other, saved, model=model)
    kept = complete(run_config(model=same), saved).adapter
    assert kept.trainable_token_indices is None, "an adapter of another tool, with the tokens of the config"


def test_all_rows_of_added_tokens() -> None:
    added = AddedTokens(tokens=["<tool>"], train="embeddings")
    saved = SAVED | {"modules_to_save": ["embed_tokens", "lm_head", "score"]}
    assert complete(run_config(), saved, model={"add_tokens": added}).adapter.modules_to_save == ["score"]


def test_many_modules_are_named_by_the_last_part() -> None:
    names = [f"model.layers.{n}.{name}" for n in range(9) for name in ("q_proj", "v_proj")]
    config = run_config()
    assert "target_modules=18 x q_proj, v_proj" in describe_inherited(
        config, complete(config, SAVED | {"target_modules": names})
    )


def test_resumed_run_keeps_what_its_checkpoint_records() -> None:
    first = complete(
        run_config({"dropout": 0.2}), SAVED, model={"rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    )
    assert keep_recorded(run_config({"dropout": 0.2}), first.model_dump()) == first
    changed = keep_recorded(run_config({"dropout": 0.1, "r": 4}), first.model_dump()).adapter
    assert (changed.dropout, changed.r, changed.alpha) == (0.1, 4, 32), "what the config sets is compared later"
    with pytest.raises(ArtifactError, match="not that of a run"):
        keep_recorded(run_config(), {"adapter": 5, "training": {}})


def test_paths_and_force_are_no_options_of_peft() -> None:
    assert AdapterSection(init_from="a", init_from_force=True).peft_fields() == {}
