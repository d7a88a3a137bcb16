"""Whether two results were made from the same: each change of the mathematics is found, a harmless one is not."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_accel import RunConfig, run_training
from lora_accel.errors import ArtifactError
from lora_accel.saving.atomic import sha256_of
from lora_accel.saving.provenance import (
    PACKAGES,
    base_hashes,
    changes,
    changes_table,
    is_allowed,
    model_card,
    options_behind,
    serving_note,
    versions,
)
from tests.conftest import chat_rows, write_jsonl

Change = tuple[tuple[str | int, ...], Any]


@pytest.fixture(scope="module")
def provenance(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Path]) -> dict[str, Any]:
    """The provenance that a real run wrote; no test changes it."""
    folder = tmp_path_factory.mktemp("provenance")
    values = {
        "output_dir": str(folder / "run"),
        "model": {"name_or_path": str(tiny_model())},
        "data": {"train": [{"path": str(write_jsonl(folder / "rows.jsonl", chat_rows(8)))}]},
        "training": {"max_steps": 1},
        "logging": {"trackers": []},
    }
    run_training(RunConfig.model_validate(values))
    found: dict[str, Any] = json.loads((folder / "run" / "provenance.json").read_text(encoding="utf-8"))
    return found


def changed(provenance: dict[str, Any], *edits: Change) -> dict[str, Any]:
    after = copy.deepcopy(provenance)
    for path, value in edits:
        place = after
        for key in path[:-1]:
            place = place[key]
        assert place[path[-1]] != value, f"{path} is {value!r} already"
        place[path[-1]] = value
    return after


FOUND: list[tuple[Change, str]] = [
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
    ((("config", "data", "overlong"), "drop"), "data.overlong"),
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
    ((("config", "training", "max_grad_norm"), 0.1), "training.max_grad_norm"),
    ((("plan", "batch_size"), 5), "plan.batch_size"),
    ((("plan", "total_steps"), 99), "plan.total_steps"),
    ((("plan", "warmup_steps"), 99), "plan.warmup_steps"),
    ((("plan", "num_examples"), 99), "plan.num_examples"),
    ((("mixed_precision",), "bf16"), "training.mixed_precision"),
    ((("base", "sha256"), {"model.safetensors": "0" * 64}), "model.weights"),
    ((("base", "config_sha256"), "0" * 64), "model.config"),
    ((("tokenizer_sha256",), "0" * 64), "model.tokenizer"),
    ((("chat_template_sha256",), "0" * 64), "model.chat_template"),
]


@pytest.mark.parametrize(("edit", "key"), FOUND, ids=[key for _, key in FOUND])
def test_a_change_of_the_mathematics_is_found_and_named(provenance: dict[str, Any], edit: Change, key: str) -> None:
    differences = changes(provenance, changed(provenance, edit))
    assert [name for name, _, _ in differences] == [key]
    ((_, then, now),) = differences
    assert then != now
    assert changes(changed(provenance, edit), provenance) == [(key, now, then)]


HARMLESS: list[Change] = [
    (("config", "output_dir"), "elsewhere"),
    (("config", "model", "name_or_path"), "elsewhere"),  # the weights' hashes tell
    (("config", "model", "revision"), "v2"),
    (("config", "model", "attention"), "eager"),
    (("config", "model", "chat_template"), "same.jinja"),  # the template's hash tells
    (("config", "model", "trust_remote_code"), True),
    (("config", "data", "train", 0, "path"), "moved.jsonl"),  # the bytes tell
    (("config", "data", "eval"), [{"path": "eval.jsonl"}]),
    (("config", "data", "max_dropped"), 0.5),
    (("config", "data", "cache_dir"), "elsewhere"),
    (("config", "data", "num_workers"), 2),
    (("config", "data", "train", 0, "revision"), "v2"),  # the bytes tell
    (("config", "data", "train", 0, "streaming"), True),
    (("config", "training", "epochs"), 9),  # the plan tells
    (("config", "training", "max_steps"), 9),
    (("config", "training", "batch_size"), 9),
    (("config", "training", "micro_batch_tokens"), 9),
    (("config", "training", "micro_batch_size"), 9),
    (("config", "training", "gradient_accumulation_steps"), 9),
    (("config", "training", "activation_checkpointing"), True),
    (("config", "training", "compile"), True),
    (("config", "training", "mixed_precision"), "no"),
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
    (("base", "sha256"), {}),  # filled in below: other names, the same bytes
    (("plan", "num_ranks"), 9),
    (("plan", "num_eval_examples"), 9),
    (("plan", "save_every"), 9),
    (("packages",), {"torch": "9"}),
    (("num_threads",), 999),
]


@pytest.mark.parametrize("edit", HARMLESS, ids=lambda edit: ".".join(map(str, edit[0])))
def test_a_harmless_change_is_not_reported(provenance: dict[str, Any], edit: Change) -> None:
    if edit[0] == ("base", "sha256"):
        edit = edit[0], {f"renamed-{name}": sha for name, sha in provenance["base"]["sha256"].items()}
    assert changes(provenance, changed(provenance, edit)) == []


def test_a_checkpoint_that_does_not_know_an_option_yet_had_its_default(provenance: dict[str, Any]) -> None:
    older = copy.deepcopy(provenance)
    del older["config"]["training"]["weight_decay"]
    assert changes(older, provenance) == []
    now = changed(provenance, (("config", "training", "weight_decay"), 0.5))
    assert changes(older, now) == [("training.weight_decay", 0.0, 0.5)]


def test_every_key_of_a_config_is_either_found_or_harmless(provenance: dict[str, Any]) -> None:
    """A key that is added to the schema must be decided upon: unless named harmless, it is found."""
    named = {".".join(str(word) for word in path if not isinstance(word, int)) for (path, _), _ in FOUND}
    named |= {".".join(str(word) for word in path if not isinstance(word, int)) for path, _ in HARMLESS}
    for section, values in provenance["config"].items():
        if section in ("checkpoint", "evaluation", "logging") or not isinstance(values, dict):
            continue
        for key in values:
            if f"config.{section}.{key}" in named or (section, key) in {("data", "train"), ("data", "packing")}:
                continue
            if (section, key) == ("training", "warmup_steps"):
                continue  # the plan tells
            found = changes(provenance, changed(provenance, (("config", section, key), "something else")))
            assert [name for name, _, _ in found] == [f"{section}.{key}"]


@pytest.mark.parametrize(
    ("key", "allowed", "may"),
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
def test_a_change_is_allowed_by_an_option_behind_it_or_its_section(key: str, allowed: list[str], may: bool) -> None:
    assert is_allowed(key, allowed) is may


def test_behind_every_change_stands_an_option_that_can_allow_it() -> None:
    """What a refusal tells the user to allow must be taken by the schema, and then allow it."""
    needed = {"output_dir": "run", "model": {"name_or_path": "model"}, "data": {"train": [{"path": "rows.jsonl"}]}}
    for _, key in FOUND:
        for option in options_behind(key):
            RunConfig.model_validate(needed | {"checkpoint": {"allow_changes": [option]}})
            assert is_allowed(key, [option])


def test_changes_are_told_line_by_line_and_short() -> None:
    table = changes_table([("adapter.r", 8, 16), ("data.train[0].bytes", ["0" * 64], ["1" * 64])])
    first, second = table.split("\n")
    assert first == "  adapter.r: 8 -> 16"
    assert second.startswith("  data.train[0].bytes: ['0000")
    assert second.count("...") == 2
    assert len(second) < 160


def test_provenance_names_versions_hashes_and_config(
    provenance: dict[str, Any], tiny_model: Callable[..., Path]
) -> None:
    rows_file = Path(provenance["data"][0]["path"])
    assert set(provenance["packages"]) == set(PACKAGES)
    assert provenance["packages"] == versions()
    assert provenance["base"]["sha256"] == {"model.safetensors": sha256_of(tiny_model() / "model.safetensors")}
    (told,) = provenance["data"]
    assert len(told.pop("tokens_sha256")) == 64
    assert told == {"path": str(rows_file), "num_files": 1, "sha256": sha256_of(rows_file)}
    assert RunConfig.model_validate(provenance["config"]).training.max_steps == 1
    assert provenance["plan"]["total_steps"] == 1


def test_the_card_names_base_data_and_how_to_load(provenance: dict[str, Any]) -> None:
    card = model_card(provenance)
    assert card.startswith(f"---\nbase_model: {provenance['base']['name_or_path']}\n")
    assert f"- {provenance['data'][0]['path']}\n" in card
    assert "AutoPeftModelForCausalLM" in card


def test_base_hashes_know_every_weight_file(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    shutil.copytree(tiny_model(), tmp_path / "base")
    (tmp_path / "base" / "extra.bin").write_bytes(b"extra")
    found = base_hashes(str(tmp_path / "base"), None)
    assert set(found) == {"model.safetensors", "extra.bin"}
    assert found["extra.bin"] == sha256_of(tmp_path / "base" / "extra.bin")


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"no \*\.safetensors or \*\.bin file"):
        base_hashes(str(tmp_path), None)


def test_a_file_in_the_hubs_cache_is_named_by_its_hash_already(tmp_path: Path) -> None:
    blob = tmp_path / "blobs" / ("ab" * 32)
    blob.parent.mkdir()
    blob.write_bytes(b"weights")
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "model.safetensors").symlink_to(blob)
    assert base_hashes(str(tmp_path / "snapshot"), None) == {"model.safetensors": "ab" * 32}


@pytest.mark.parametrize(
    ("adapter", "told"),
    [
        ({"r": 8}, "vllm serve BASE --enable-lora --lora-modules NAME=DIR"),
        ({"r": 8, "rank_pattern": {"q_proj": 64}}, "--enable-lora --max-lora-rank 64"),
        ({"r": 8, "use_dora": True, "bias": "all"}, "merge it first: vLLM takes no adapter with DoRA, biases (all)"),
        ({"r": 8, "modules_to_save": ["lm_head"]}, "merge it first: vLLM takes no adapter with modules_to_save"),
    ],
)
def test_whether_a_server_can_load_it_is_told(adapter: dict[str, object], told: str) -> None:
    assert told in serving_note(adapter)
