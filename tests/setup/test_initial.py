"""Runs that begin with an existing adapter: whose weights they have, what they check, and what they record."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lora_accel import RunConfig, run_training
from lora_accel.errors import ArtifactError, ConfigError, UserError
from lora_accel.export.export import export_adapter
from lora_accel.model.base import load_base_model
from lora_accel.saving.atomic import read_json, sha256_of, write_json
from lora_accel.saving.attach import load_adapter
from lora_accel.saving.discovery import CONFIG, WEIGHTS
from lora_accel.saving.names import adapter_parameters
from lora_accel.setup.data import prepare_data
from lora_accel.setup.initial import resolve_initial_adapter
from lora_accel.setup.model import prepare_model
from lora_accel.setup.recipe import complete_config
from tests.conftest import CommandResult, chat_rows, read_metrics, write_jsonl

IDS = torch.tensor([[5, 9, 31, 7, 60, 8, 41, 77, 12, 33]])
OWN = {"dropout": 0.0}
"""The section `adapter` of a run that sets nothing that an adapter has."""
Make = Callable[..., RunConfig]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Path]) -> Path:
    """Return the folder of a run of 3 steps, whose last evaluation is on all rows."""
    folder = tmp_path_factory.mktemp("first")
    rows = write_jsonl(folder / "rows.jsonl", chat_rows(21))
    config = {
        "output_dir": str(folder / "run"),
        "model": {"name_or_path": str(tiny_model())},
        "adapter": {"r": 4, "alpha": 8, "dropout": 0.1, "target_modules": "all-linear"},
        "data": {"train": [{"path": str(rows)}], "eval": [{"path": str(rows)}], "max_length": 200},
        "training": {"max_steps": 3, "batch_size": 4, "learning_rate": 3e-2, "mixed_precision": "no"},
        "logging": {"trackers": []},
    }
    run_training(RunConfig.model_validate(config))
    return folder / "run"


@pytest.fixture
def second(make_config: Make, trained: Path, tmp_path: Path) -> Make:
    """Return a function that makes the config of a run that begins with a copy of the trained adapter."""
    shutil.copytree(trained / "adapter", tmp_path / "first" / "adapter")

    def make(adapter: dict[str, Any] | None = None, **changes: Any) -> RunConfig:
        values = make_config(**changes).model_dump(exclude={"adapter"})
        values["adapter"] = OWN | {"init_from": str(tmp_path / "first" / "adapter")} | (adapter or {})
        values["model"] = {"name_or_path": values["model"]["name_or_path"]} | changes.get("model", {})
        return RunConfig.model_validate(values)

    return make


def prepared_model(config: RunConfig) -> PeftModel:
    """Return the model with which a run would begin, in eval mode."""
    config, initial = resolve_initial_adapter(config)
    accelerator = Accelerator(cpu=True, mixed_precision=config.training.mixed_precision)
    model = prepare_model(config, accelerator, checkpoint_dtype="float32", initial=initial).model
    return accelerator.unwrap_model(model, keep_fp32_wrapper=False).eval()


def base_of(config: RunConfig) -> Any:
    return load_base_model(config.model, config.quantization, recorded_dtype="float32")


@pytest.mark.parametrize("bits", [None, 4])
def test_first_logits_are_those_of_base_and_adapter(second: Make, bits: int | None) -> None:
    config = second(quantization={"bits": bits})
    with torch.no_grad():
        began = prepared_model(config)(input_ids=IDS).logits
        expected = load_adapter(base_of(config), config.adapter.init_from)(input_ids=IDS).logits
        base = base_of(config).eval()(input_ids=IDS).logits
    torch.testing.assert_close(began, expected, rtol=0, atol=0 if bits is None else 1e-5)
    assert (began - base).abs().max() > 1e-2


def test_first_loss_is_the_evaluation_loss_of_the_adapter(second: Make, trained: Path, tmp_path: Path) -> None:
    """A fresh run: step 1 with the rate of step 1, and the adapter's own weights."""
    run_training(second(training={"max_steps": 1, "batch_size": 21, "warmup_ratio": 0.0}))
    (first, *_), (*_, evaluated) = read_metrics(tmp_path / "run"), read_metrics(trained, "eval")
    assert first["step"] == 1
    assert first["learning_rate"] == 3e-2
    assert first["loss"] == pytest.approx(evaluated["eval_loss"], rel=1e-6)


def test_card_and_provenance_name_the_adapters_before(second: Make, trained: Path, tmp_path: Path) -> None:
    config = second(training={"max_steps": 1})
    first, parent = tmp_path / "first" / "adapter", tmp_path / "run"
    run_training(config)
    third = config.model_copy(
        update={
            "output_dir": str(tmp_path / "third"),
            "adapter": config.adapter.model_copy(update={"init_from": str(parent / "checkpoints" / "step-00000001")}),
        }
    )
    run_training(third)
    provenance = read_json(tmp_path / "third" / "adapter" / "provenance.json")
    checkpoint, earlier = provenance["init_from"]
    assert checkpoint["sha256"] == sha256_of(parent / "checkpoints" / "step-00000001" / WEIGHTS)
    assert (checkpoint["steps"], earlier["steps"]) == (1, 3)
    assert (earlier["name"], earlier["sha256"]) == (str(first), sha256_of(first / WEIGHTS))
    assert earlier["data"] == [
        {"path": entry["path"], "sha256": entry["sha256"]} for entry in read_json(trained / "provenance.json")["data"]
    ]
    card = (tmp_path / "third" / "adapter" / "README.md").read_text(encoding="utf-8")
    assert "It began with the weights of the adapter `run/step-00000001`, trained for 1 step on `rows.jsonl`" in card
    assert "That one began with the adapter `first/adapter`, trained for 3 steps on `rows.jsonl`" in card
    assert f"(SHA-256 `{earlier['sha256']}`)" in card
    assert str(first) not in card
    assert provenance["config"]["adapter"]["target_modules"] == read_json(first / CONFIG)["target_modules"]


def test_resumed_run_needs_the_adapter_no_more_and_repeats_the_uninterrupted_one(second: Make, tmp_path: Path) -> None:
    config = second({"dropout": 0.1}, training={"max_steps": 4}, checkpoint={"every_steps": 2})
    run_training(config)
    run, expected = tmp_path / "run", load_file(tmp_path / "run" / "adapter" / WEIGHTS)
    losses = [line["loss"] for line in read_metrics(run)]
    for folder in ("adapter", "checkpoints/step-00000004"):
        shutil.rmtree(run / folder)
    shutil.rmtree(tmp_path / "first")
    run_training(config)
    resumed = load_file(run / "adapter" / WEIGHTS)
    assert resumed.keys() == expected.keys()
    assert all(torch.equal(resumed[name], tensor) for name, tensor in expected.items())
    assert [line["loss"] for line in read_metrics(run)] == losses
    assert len(read_json(run / "adapter" / "provenance.json")["init_from"]) == 1
    (run / "adapter" / "README.md").write_text("mine", encoding="utf-8")
    run_training(config)  # finished: nothing to do
    assert (run / "adapter" / "README.md").read_text(encoding="utf-8") == "mine"


def test_other_adapter_at_the_same_path_is_an_error_on_resume(second: Make, tmp_path: Path) -> None:
    config = second(training={"max_steps": 1})
    run_training(config)
    file = tmp_path / "first" / "adapter" / WEIGHTS
    save_file({name: 2 * tensor for name, tensor in load_file(file).items()}, file)
    with pytest.raises(
        ArtifactError, match=r"different inputs \(checkpoint -> now\):\n  adapter\.init_from: '\w+"
    ) as error:
        run_training(config)
    assert str(error.value).count(" -> ") == 2
    assert "checkpoint.allow_changes=[adapter.init_from]" in str(error.value)
    without = config.model_copy(
        update={"adapter": resolve_initial_adapter(config)[0].adapter.model_copy(update={"init_from": None})}
    )
    with pytest.raises(ArtifactError, match=r"adapter\.init_from: '\w+\.\.\. -> None"):
        run_training(without)


@pytest.mark.sample(6)
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}}),
        ("llama", {"use_dora": True}),
        ("llama", {"init_lora_weights": "pissa"}),
        ("llama", {"init_lora_weights": "olora"}),
        ("llama", {"modules_to_save": ["lm_head"]}),
        ("llama", {"trainable_token_indices": {"embed_tokens": [3, 9]}}),
        ("qwen2", {"bias": "all"}),
        ("gpt2", {"bias": "lora_only", "target_modules": ["c_attn"]}),
        ("llama", {"target_modules": r".*\.1\..*_proj"}),
    ],
)
def test_adapter_of_another_tool(
    second: Make, tiny_model: Callable[..., Path], tmp_path: Path, family: str, options: dict[str, Any]
) -> None:
    """Its weights are those that PEFT loads, also where its initialization changed the base."""
    folder, base = tmp_path / "peft", tiny_model(family)
    peft_config = LoraConfig(task_type="CAUSAL_LM", **({"r": 4, "target_modules": ["q_proj", "v_proj"]} | options))
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), peft_config)
    torch.manual_seed(1)
    for parameter in adapter_parameters(model).values():
        parameter.data += 0.05 * torch.randn(parameter.shape)
    model.save_pretrained(folder, save_embedding_layers=False)
    reference = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
    began = prepared_model(second({"init_from": str(folder)}, model={"name_or_path": str(base)}))
    with torch.no_grad():
        torch.testing.assert_close(began(input_ids=IDS).logits, reference(input_ids=IDS).logits, rtol=1e-4, atol=1e-5)
    if "init_lora_weights" in options:
        return  # saved as plain LoRA of twice the rank
    for name, parameter in adapter_parameters(began).items():
        assert torch.equal(parameter, load_file(folder / WEIGHTS)[name]), name


def test_loralib_file_needs_alpha(second: Make, tmp_path: Path) -> None:
    adapter = tmp_path / "first" / "adapter"
    export_adapter(adapter, tmp_path / "loralib", format="loralib")
    file = tmp_path / "loralib" / "lora.pt"
    with pytest.raises(
        ArtifactError, match=r"adapter\.init_from: .*lora\.pt does not store lora_alpha; set adapter\.alpha"
    ):
        resolve_initial_adapter(second({"init_from": str(file)}))
    expected = prepared_model(second())(input_ids=IDS).logits
    for changes in ({"init_from": str(file), "alpha": 8.0}, {"init_from": str(file.parent)}):
        assert torch.equal(prepared_model(second(changes))(input_ids=IDS).logits, expected)


def test_tokens_that_the_adapter_adds_are_those_of_the_run(second: Make, tmp_path: Path) -> None:
    """Of a run with model.add_tokens, the next one has the tokens by itself, and so has its adapter."""
    first = second(model={"add_tokens": ["<tool>"]}, training={"max_steps": 1})
    plain = {"r": 4, "target_modules": ["q_proj"]}
    first = RunConfig.model_validate(first.model_dump() | {"adapter": plain, "output_dir": str(tmp_path / "tools")})
    run_training(first)
    config = second(
        {"init_from": str(tmp_path / "tools" / "adapter")}, training={"max_steps": 2}, checkpoint={"every_steps": 1}
    )
    run_training(config)
    shutil.rmtree(tmp_path / "tools")
    shutil.rmtree(tmp_path / "run" / "adapter")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000002")
    run_training(config)
    model = load_adapter(base_of(config), tmp_path / "run" / "adapter")
    assert model.get_input_embeddings().weight.shape[0] == len(prepare_data(first).template.tokenizer)


def record(adapter: Path, **changes: Any) -> None:
    """Change the provenance of an adapter."""
    write_json(adapter / "provenance.json", read_json(adapter / "provenance.json") | changes)


def test_rope_scaling_without_a_factor_is_compared_with_the_factor_of_the_adapter(second: Make, tmp_path: Path) -> None:
    """Commands that read the data of a run, such as `plan`, derive the factor first, as the run does."""
    scaling, data = {"rope_type": "linear", "factor": 2.0}, {"max_length": 300}
    adapter = tmp_path / "first" / "adapter"
    recorded = read_json(adapter / "provenance.json")["config"]
    record(adapter, config=recorded | {"model": recorded["model"] | {"rope_scaling": scaling}})
    for given in ({}, {"rope_scaling": {"rope_type": "linear"}}, {"rope_scaling": scaling}):
        assert complete_config(second(model=given, data=data)).model.rope_scaling == scaling
    with pytest.raises(ConfigError, match=r"model\.rope_scaling"):
        complete_config(second(model={"rope_scaling": {"rope_type": "linear"}}, data={"max_length": 600}))


def test_run_that_begins_with_an_exported_best_checkpoint_names_its_step(second: Make, tmp_path: Path) -> None:
    record(tmp_path / "first" / "adapter", exported={"step": 2, "selected": "best", "metric": "eval_loss", "value": 1})
    run = run_training(second(training={"max_steps": 1})).parent
    (ancestor,) = read_json(run / "adapter" / "provenance.json")["init_from"]
    assert ancestor["steps"] == 2
    card = " ".join((run / "adapter" / "README.md").read_text(encoding="utf-8").split())
    assert "the adapter `first/adapter`, trained for 2 steps on `rows.jsonl`" in card


def test_vocabulary_that_the_config_does_not_explain_is_an_error(second: Make, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(second().model.name_or_path)
    base.resize_token_embeddings(len(base.get_input_embeddings().weight) + 3)
    peft_config = LoraConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]
    )
    get_peft_model(base, peft_config).save_pretrained(tmp_path / "larger")
    with pytest.raises(
        ArtifactError, match=r"adapter\.init_from: .*larger has a vocabulary of \d+ tokens, the base one of"
    ):
        prepared_model(second({"init_from": str(tmp_path / "larger")}))


def test_other_base_is_an_error_unless_forced(second: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = second(training={"max_steps": 1})
    other = tmp_path / "other"
    shutil.copytree(config.model.name_or_path, other)
    tensors = load_file(other / "model.safetensors")
    save_file(
        tensors | {"model.norm.weight": 2 * tensors["model.norm.weight"]}, other / "model.safetensors", {"format": "pt"}
    )
    changed = second(model={"name_or_path": str(other)}, training={"max_steps": 1})
    with pytest.raises(
        ArtifactError,
        match=r"adapter\.init_from: .* was not trained on the weights of .*other.*set adapter\.init_from_force=true",
    ):
        run_training(changed)
    assert not (tmp_path / "run").exists()
    run_training(changed.model_copy(update={"adapter": changed.adapter.model_copy(update={"init_from_force": True})}))
    assert "note: adapter.init_from_force: " in capsys.readouterr().err


def test_option_that_peft_does_not_know_is_an_error_unless_forced(second: Make, tmp_path: Path) -> None:
    file = tmp_path / "first" / "adapter" / CONFIG
    write_json(file, read_json(file) | {"use_future": True})
    with pytest.raises(
        ArtifactError, match=r"adapter\.init_from: .*use_future=True.*or set adapter\.init_from_force=true to ignore"
    ):
        resolve_initial_adapter(second())
    assert resolve_initial_adapter(second({"init_from_force": True}))[1] is not None


def test_adapter_for_another_architecture_names_both(second: Make, tiny_model: Callable[..., Path]) -> None:
    with pytest.raises(
        ArtifactError, match=r"adapter\.init_from: .*first/adapter does not fit .*: .*not found in the base"
    ):
        prepared_model(second(model={"name_or_path": str(tiny_model("gpt2"))}))


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"r": 10**9}, "r=1000000000 is not a rank from 1 to 1024"),
        ({"init_lora_weights": "corda"}, "changed the base's weights when training began"),
        ({"peft_type": "IA3"}, "is not LORA"),
    ],
)
def test_untrusted_config(second: Make, tmp_path: Path, values: dict[str, Any], problem: str) -> None:
    file = tmp_path / "first" / "adapter" / CONFIG
    write_json(file, read_json(file) | values)
    with pytest.raises(ArtifactError, match=rf"adapter\.init_from: .*{problem}"):
        resolve_initial_adapter(second())


def test_untrusted_provenance(second: Make, tmp_path: Path) -> None:
    file = tmp_path / "first" / "adapter" / "provenance.json"
    valid = read_json(file)
    for changes in ({"base": 5}, {"init_from": [{"name": 5}]}, {"plan": 5}, {"data": [5]}, {"config": [5]}):
        write_json(file, valid | changes)
        with pytest.raises(ArtifactError, match=r"adapter\.init_from: .*provenance"):
            resolve_initial_adapter(second())


def test_paths_that_are_not_adapters(second: Make, trained: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=rf"is the folder of a run; name its adapter, {trained}/adapter"):
        resolve_initial_adapter(second({"init_from": str(trained)}))
    with pytest.raises(ArtifactError, match=r"adapter\.init_from: .*missing: there is no such folder"):
        resolve_initial_adapter(second({"init_from": str(tmp_path / "missing")}))
    with pytest.raises(
        ArtifactError, match=r"adapter\.init_from: .*is not an adapter: adapter_config\.json is missing"
    ):
        resolve_initial_adapter(second({"init_from": second().model.name_or_path}))


def test_errors_elsewhere_propose_it(second: Make, trained: Path) -> None:
    adapter, base = trained / "adapter", second().model.name_or_path
    with pytest.raises(
        ConfigError, match=rf"is an adapter of {base}, .*set adapter.init_from={adapter} model.name_or_path={base}\."
    ):
        prepare_data(second(model={"name_or_path": str(adapter)}))
    with pytest.raises(
        ArtifactError, match=rf"{adapter} is an adapter, not a checkpoint.*set adapter\.init_from={adapter} instead"
    ):
        run_training(second(checkpoint={"resume": str(adapter)}))


def test_command_reports_the_options_that_it_takes(
    second: Make, config_file: Callable[[RunConfig], Path], command: Callable[..., CommandResult], tmp_path: Path
) -> None:
    config = second(training={"max_steps": 1})
    values = json.loads(json.dumps(config.model_dump(exclude_unset=True)))
    file = tmp_path / "short.yaml"
    file.write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(UserError, match=r"adapter\.r=8, but .* has 4"):
        resolve_initial_adapter(second({"r": 8}))
    assert command("plan", "--config", file).returncode == 0
    assert command("inspect", "--config", file).returncode == 0


def test_hub_id_is_recorded_with_its_commit_and_not_downloaded_on_resume(
    second: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0" * 40
    snapshot = tmp_path / "models--someone--adapter" / "snapshots" / commit
    shutil.copytree(tmp_path / "first" / "adapter", snapshot)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(snapshot))
    config = second({"init_from": "someone/adapter"}, training={"max_steps": 1})
    run_training(config)
    (ancestor,) = read_json(tmp_path / "run" / "adapter" / "provenance.json")["init_from"]
    assert (ancestor["name"], ancestor["revision"]) == ("someone/adapter", commit)
    shutil.rmtree(snapshot)
    shutil.rmtree(tmp_path / "run" / "adapter")
    run_training(config)
    assert "`someone/adapter` (" + commit + ")" in (tmp_path / "run" / "adapter" / "README.md").read_text(
        encoding="utf-8"
    )
