"""Provenance: changes of the mathematics are detected, harmless ones are not; model cards and hashes."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_accel import RunConfig, run_training
from lora_accel.saving.atomic import sha256_of
from lora_accel.saving.cards import model_card
from lora_accel.saving.provenance import (
    PACKAGES,
    changes,
    changes_table,
    is_allowed,
    options_for_key,
    versions,
)
from tests.conftest import chat_rows, write_jsonl

Change = tuple[tuple[str | int, ...], Any]

SAVED = {"r": 4, "lora_alpha": 8.0}
SERVING = "merge the adapter first"


@pytest.fixture(scope="module")
def provenance(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Path]) -> dict[str, Any]:
    """Return the provenance that a real run wrote. Tests must not change it."""
    folder = tmp_path_factory.mktemp("provenance")
    values = {
        "output_dir": str(folder / "run"),
        "model": {"name_or_path": str(tiny_model())},
        "data": {"train": [{"path": str(write_jsonl(folder / "rows.jsonl", chat_rows(8)))}]},
        "training": {"max_steps": 1, "mixed_precision": "no"},
        "logging": {"trackers": [], "report": False},
    }
    run_training(RunConfig.model_validate(values))
    provenance: dict[str, Any] = json.loads((folder / "run" / "provenance.json").read_text(encoding="utf-8"))
    return provenance


def changed(provenance: dict[str, Any], *edits: Change) -> dict[str, Any]:
    after = copy.deepcopy(provenance)
    for path, value in edits:
        parent = after
        for key in path[:-1]:
            parent = parent[key]
        assert parent[path[-1]] != value, f"{path} is {value!r} already"
        parent[path[-1]] = value
    return after


DETECTED: list[tuple[Change, str]] = [
    ((("config", "seed"), 1), "seed"),
    ((("config", "adapter", "r"), 16), "adapter.r"),
    ((("config", "adapter", "alpha"), 1.0), "adapter.alpha"),
    ((("config", "adapter", "dropout"), 0.2), "adapter.dropout"),
    ((("config", "adapter", "target_modules"), ["q_proj"]), "adapter.target_modules"),
    ((("config", "adapter", "bias"), "all"), "adapter.bias"),
    ((("config", "adapter", "use_dora"), True), "adapter.use_dora"),
    ((("config", "adapter", "rank_pattern"), {"q_proj": 2}), "adapter.rank_pattern.q_proj"),
    ((("config", "quantization", "bits"), 4), "quantization.bits"),
    ((("config", "model", "dtype"), "bfloat16"), "model.dtype"),
    ((("config", "data", "max_length"), 64), "data.max_length"),
    ((("config", "data", "loss_on"), "all"), "data.loss_on"),
    ((("config", "data", "eval_fraction"), 0.5), "data.eval_fraction"),
    ((("config", "data", "train", 0, "weight"), 2.0), "data.train[0].weight"),
    ((("config", "data", "train", 0, "format"), "text"), "data.train[0].format"),
    ((("config", "data", "train", 0, "limit"), 3), "data.train[0].limit"),
    ((("config", "data", "train", 0, "columns"), {"messages": "talk"}), "data.train[0].columns"),
    ((("data", 0, "sha256"), "0" * 64), "data.train[0].bytes"),
    ((("data", 0, "tokens_sha256"), "0" * 64), "data.train[0].tokens"),
    ((("config", "training", "learning_rate"), 1.0), "training.learning_rate"),
    ((("config", "training", "scheduler"), "linear"), "training.scheduler"),
    ((("config", "training", "weight_decay"), 0.1), "training.weight_decay"),
    ((("config", "training", "warmup_from_zero"), True), "training.warmup_from_zero"),
    ((("config", "training", "max_grad_norm"), 0.1), "training.max_grad_norm"),
    ((("plan", "batch_size"), 5), "plan.batch_size"),
    ((("plan", "total_steps"), 99), "plan.total_steps"),
    ((("plan", "warmup_steps"), 99), "plan.warmup_steps"),
    ((("plan", "num_examples"), 99), "plan.num_examples"),
    ((("mixed_precision",), "bf16"), "training.mixed_precision"),
    ((("base", "tensors_sha256"), "0" * 64), "model.weights"),
    ((("base", "config_sha256"), "0" * 64), "model.config"),
    ((("tokenizer_sha256",), "0" * 64), "model.tokenizer"),
    ((("chat_template_sha256",), "0" * 64), "model.chat_template"),
]


@pytest.mark.parametrize(("edit", "key"), DETECTED, ids=[key for _, key in DETECTED])
def test_change_of_the_mathematics_is_detected(provenance: dict[str, Any], edit: Change, key: str) -> None:
    differences = changes(provenance, changed(provenance, edit))
    assert [name for name, _, _ in differences] == [key]
    ((_, then, now),) = differences
    assert then != now
    assert changes(changed(provenance, edit), provenance) == [(key, now, then)]


HARMLESS: list[Change] = [
    (("config", "output_dir"), "elsewhere"),
    (("config", "model", "name_or_path"), "elsewhere"),  # detected by the hashes of the weights
    (("config", "model", "revision"), "v2"),
    (("config", "model", "attention"), "eager"),
    (("config", "model", "chat_template"), "same.jinja"),  # detected by the hash of the template
    (("config", "model", "trust_remote_code"), True),
    (("config", "adapter", "init_from"), "moved"),  # detected by the hash of its tensors
    (("config", "adapter", "init_from_force"), True),
    (("config", "data", "train", 0, "path"), "moved.jsonl"),  # detected by the hash of the rows
    (("config", "data", "overlong"), "drop"),  # detected by the hash of the tokens
    (("config", "data", "eval"), [{"path": "eval.jsonl"}]),
    (("config", "data", "max_dropped"), 0.5),
    (("config", "data", "cache_dir"), "elsewhere"),
    (("config", "data", "num_workers"), 2),
    (("config", "data", "train", 0, "revision"), "v2"),  # detected by the hash of the rows
    (("config", "data", "train", 0, "streaming"), True),
    (("config", "training", "epochs"), 9),  # detected by the plan
    (("config", "training", "max_steps"), 9),
    (("config", "training", "batch_size"), 9),
    (("config", "training", "micro_batch_tokens"), 9),
    (("config", "training", "micro_batch_size"), 9),
    (("config", "training", "gradient_accumulation_steps"), 9),
    (("config", "training", "activation_checkpointing"), True),
    (("config", "training", "compile"), True),
    (("config", "training", "share_prefixes"), False),
    (("config", "training", "deterministic"), True),
    (("config", "training", "mixed_precision"), "bf16"),  # detected by the precision in effect
    (("config", "training", "warmup_ratio"), 0.5),
    (("config", "training", "max_hours"), 0.5),
    (("config", "training", "skip_nonfinite"), 9),
    (("config", "checkpoint", "every_steps"), 9),
    (("config", "checkpoint", "keep_last"), 9),
    (("config", "checkpoint", "allow_changes"), ["training"]),
    (("config", "evaluation", "every_steps"), 9),
    (("config", "evaluation", "prompts"), ["hello"]),
    (("config", "logging", "every_steps"), 9),
    (("base", "name_or_path"), "elsewhere"),
    (("base", "sha256"), {"model-00001-of-00002.safetensors": "0" * 64}),  # other files, the same tensors
    (("plan", "num_ranks"), 9),
    (("plan", "num_eval_examples"), 9),
    (("plan", "save_every"), 9),
    (("packages",), {"torch": "9"}),
    (("num_threads",), 999),
    (("prompt_format",), "raw"),  # detected by the hash of the tokens
]


@pytest.mark.parametrize("edit", HARMLESS, ids=lambda edit: ".".join(map(str, edit[0])))
def test_harmless_change_is_not_reported(provenance: dict[str, Any], edit: Change) -> None:
    assert changes(provenance, changed(provenance, edit)) == []


def test_option_missing_in_an_older_checkpoint_counts_as_its_default(provenance: dict[str, Any]) -> None:
    older = copy.deepcopy(provenance)
    del older["config"]["training"]["weight_decay"]
    assert changes(older, provenance) == []
    now = changed(provenance, (("config", "training", "weight_decay"), 0.5))
    assert changes(older, now) == [("training.weight_decay", 0.0, 0.5)]


def test_a_checkpoint_without_warmup_from_zero_was_trained_from_zero(provenance: dict[str, Any]) -> None:
    older = copy.deepcopy(provenance)
    del older["config"]["training"]["warmup_from_zero"], older["prompt_format"]
    assert changes(older, provenance) == [("training.warmup_from_zero", True, False)]
    assert changes(older, changed(provenance, (("config", "training", "warmup_from_zero"), True))) == []


def test_every_config_key_is_either_detected_or_harmless(provenance: dict[str, Any]) -> None:
    """A key that is added to the schema is detected unless it is listed as harmless."""
    paths = [path for (path, _), _ in DETECTED] + [path for path, _ in HARMLESS]
    tested = {".".join(part for part in path if isinstance(part, str)) for path in paths}
    for section, values in provenance["config"].items():
        if section in ("checkpoint", "evaluation", "logging") or not isinstance(values, dict):
            continue
        for key in values:
            if f"config.{section}.{key}" in tested or (section, key) in {("data", "train"), ("data", "packing")}:
                continue
            if (section, key) == ("training", "warmup_steps"):
                continue  # detected by the plan
            differences = changes(provenance, changed(provenance, (("config", section, key), "something else")))
            assert [name for name, _, _ in differences] == [f"{section}.{key}"]


@pytest.mark.parametrize(
    ("key", "allowed", "expected"),
    [
        ("training.learning_rate", [], False),
        ("training.learning_rate", ["training.learning_rate"], True),
        ("training.learning_rate", ["seed", "training"], True),
        ("training.learning_rate", ["training.learn"], False),
        ("training.learning_rate", ["adapter"], False),
        ("adapter.r", ["adapter.rank_pattern"], False),
        ("adapter.rank_pattern.q_proj", ["adapter.rank_pattern"], True),
        ("adapter.rank_pattern.q_proj", ["adapter.r"], False),
        ("data.train[0].bytes", ["data.train"], True),
        ("data.train[11].weight", ["data.train"], True),
        ("data.train[0].bytes", ["data"], True),
        ("data.train[0].bytes", ["data.max_length"], False),
        ("plan.total_steps", ["training.epochs"], True),
        ("plan.total_steps", ["training.max_steps"], True),
        ("plan.total_steps", ["training.batch_size"], True),
        ("plan.total_steps", ["data.train"], True),
        ("plan.total_steps", ["training.learning_rate"], False),
        ("plan.warmup_steps", ["training.warmup_ratio"], True),
        ("plan.warmup_steps", ["training.epochs"], True),
        ("plan.batch_size", ["training.micro_batch_size"], True),
        ("plan.batch_size", ["training.epochs"], False),
        ("plan.num_examples", ["data.train"], True),
        ("plan.num_examples", ["training"], False),
        ("model.weights", ["model.name_or_path"], True),
        ("model.tokenizer", ["model.revision"], True),
        ("model.weights", ["model.dtype"], False),
        ("model.chat_template", ["model.chat_template"], True),
        ("seed", ["seed"], True),
        ("seed", ["model"], False),
    ],
)
def test_change_is_allowed_by_its_option_or_section(key: str, allowed: list[str], expected: bool) -> None:
    assert is_allowed(key, allowed) is expected


def test_every_change_can_be_allowed_by_an_option() -> None:
    """The option that the error message suggests must be valid in the schema and allow the change."""
    required = {"output_dir": "run", "model": {"name_or_path": "model"}, "data": {"train": [{"path": "rows.jsonl"}]}}
    for _, key in DETECTED:
        for option in options_for_key(key):
            RunConfig.model_validate(required | {"checkpoint": {"allow_changes": [option]}})
            assert is_allowed(key, [option])


def test_changes_table_has_one_short_line_per_change() -> None:
    table = changes_table([("adapter.r", 8, 16), ("data.train[0].bytes", ["0" * 64], ["1" * 64])])
    first, second = table.split("\n")
    assert first == "  adapter.r: 8 -> 16"
    assert second.startswith("  data.train[0].bytes: ['0000")
    assert second.count("...") == 2
    assert len(second) < 160


def test_provenance_contains_versions_hashes_and_config(
    provenance: dict[str, Any], tiny_model: Callable[..., Path]
) -> None:
    rows_file = Path(provenance["data"][0]["path"])
    assert set(provenance["packages"]) == set(PACKAGES)
    assert provenance["packages"] == versions()
    assert provenance["base"]["sha256"] == {"model.safetensors": sha256_of(tiny_model() / "model.safetensors")}
    (source,) = provenance["data"]
    tokens_sha256 = source["tokens_sha256"]
    assert len(tokens_sha256) == 64
    assert source == {
        "path": str(rows_file),
        "num_files": 1,
        "sha256": sha256_of(rows_file),
        "tokens_sha256": tokens_sha256,
    }
    assert RunConfig.model_validate(provenance["config"]).training.max_steps == 1
    assert provenance["plan"]["total_steps"] == 1


def test_model_card_of_a_local_base_names_no_path(provenance: dict[str, Any]) -> None:
    """Nobody else has this path, so the card names the folder and the hashes, and no `base_model`."""
    card = model_card(provenance, SAVED, SERVING)
    base = Path(provenance["base"]["name_or_path"])
    assert base.is_absolute()
    assert "base_model" not in card
    assert str(base) not in card
    assert base.name in card
    assert provenance["base"]["sha256"]["model.safetensors"] in card
    assert "merge . OUT --base BASE" in card
    assert "\n- rows.jsonl\n" in card


def test_model_card_of_a_base_on_the_hub_names_it(provenance: dict[str, Any]) -> None:
    edits = (("base", "name_or_path"), "owner/model"), (("base", "revision"), "v2")
    card = model_card(changed(provenance, *edits), SAVED, SERVING)
    assert card.startswith("---\nbase_model: owner/model\n")
    assert "# LoRA adapter for owner/model (v2)\n" in card
    assert "AutoPeftModelForCausalLM" in card
    assert "`lora-accel merge . OUT`" in card


# The weights of an old provenance are the hashes of all weight files in the folder


@pytest.mark.parametrize(
    ("then", "expected"),
    [
        ({}, True),
        ({"consolidated.safetensors": "1" * 64, "training_args.bin": "2" * 64}, True),  # not loaded
        ({"pytorch_model.bin": "3" * 64}, True),
        ({"model.safetensors": "4" * 64}, False),
    ],
)
def test_an_older_provenance_is_compared_by_the_files_that_are_loaded(
    provenance: dict[str, Any], then: dict[str, str], expected: bool
) -> None:
    older = copy.deepcopy(provenance)
    del older["base"]["tensors_sha256"]
    older["base"]["sha256"] |= then
    for differences in (changes(older, provenance), changes(provenance, older)):
        assert [key for key, _, _ in differences] == ([] if expected else ["model.weights"])
