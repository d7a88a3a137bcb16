"""The base of an adapter is found and checked in the same way by merge, export, generate, chat and evaluate."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from huggingface_hub import constants
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_accel import RunConfig, run_training, save_adapter
from lora_accel.config.files import config_to_yaml
from lora_accel.config.schema import ModelSection, QuantizationSection
from lora_accel.errors import ArtifactError, ConfigError
from lora_accel.model.base import load_base_model
from lora_accel.saving import base_identity
from lora_accel.saving.hub import find_adapter, recorded_name
from tests.conftest import CommandResult, chat_rows, write_jsonl
from tests.inference.test_inference import check_error

COMMANDS = ("merge", "export", "generate", "chat", "evaluate")
Run = Callable[..., CommandResult]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Path]) -> Path:
    """Return an adapter that a run trained on the tiny model."""
    return train(tmp_path_factory.mktemp("trained"), tiny_model())


@pytest.fixture(autouse=True)
def _offline_in_tmp_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)


def run_config(folder: Path, base: Path | str, **model: Any) -> RunConfig:
    rows = write_jsonl(folder / "rows.jsonl", chat_rows(4))
    values = {
        "output_dir": str(folder / "run"),
        "model": {"name_or_path": str(base), "dtype": "float32"} | model,
        "adapter": {"r": 2, "target_modules": ["q_proj", "v_proj"]},
        "data": {"train": [{"path": str(rows)}], "eval": [{"path": str(rows), "limit": 1}]},
        "training": {"max_steps": 1, "mixed_precision": "no"},
        "evaluation": {"every_steps": 100},
        "logging": {"trackers": [], "report": False},
    }
    return RunConfig.model_validate(values)


def changed(config: RunConfig, **sections: dict[str, Any]) -> RunConfig:
    """Return a config with other values in some sections."""
    values = config.model_dump()
    return RunConfig.model_validate(values | {name: values[name] | section for name, section in sections.items()})


def train(folder: Path, base: Path | str, **model: Any) -> Path:
    return run_training(run_config(folder, base, **model))


def copy_adapter(adapter: Path, out: Path, *, keep_provenance: bool = False, **config: Any) -> Path:
    """Copy an adapter, with other values in its adapter_config.json."""
    shutil.copytree(adapter, out)
    values = json.loads((out / "adapter_config.json").read_text()) | config
    (out / "adapter_config.json").write_text(json.dumps(values))
    if not keep_provenance:
        (out / "provenance.json").unlink()
    return out


def other_weights(base: Path, out: Path) -> Path:
    """Copy a base, with another value in one tensor."""
    shutil.copytree(base, out)
    tensors = load_file(out / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] += 1e-3
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def reshard(base: Path, out: Path) -> Path:
    shutil.copytree(base, out)
    (out / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(out, max_shard_size="20KB")
    return out


def put_in_hub_cache(folder: Path, name: str, revision: str = "main") -> Path:
    """Put a model or an adapter into the Hub's cache, as if it had been downloaded; return its folder there."""
    commit = hashlib.sha1(f"{folder} {revision}".encode()).hexdigest()
    repository = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / revision).write_text(commit)
    return repository / "snapshots" / commit


@pytest.fixture
def run(
    command: Callable[..., CommandResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., CommandResult]:
    """Return a function that runs a command with an adapter and, if it is given, another base."""

    def end_of_file(_: str) -> str:
        raise EOFError

    def run(name: str, adapter: Path | str, base: Path | str | None, *options: str) -> CommandResult:
        monkeypatch.setattr("builtins.input", end_of_file)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        requested = () if base is None else ("--base", base)
        if name == "merge":
            return command("merge", adapter, tmp_path / "out", *requested, *options)
        if name == "export":
            return command("export", adapter, tmp_path / "out", "--format", "loralib", *requested, *options)
        if name == "generate":
            return command("generate", "hi", "--adapter", adapter, "--max-new-tokens", "1", *requested, *options)
        if name == "chat":
            return command("chat", "--adapter", adapter, *requested, *options)
        assert base is not None
        file = tmp_path / "evaluate.yaml"
        file.write_text(config_to_yaml(run_config(tmp_path, base)))
        return command("evaluate", "--config", file, "--adapter", adapter, "--max-new-tokens", "1", *options)

    return run


# Identity


@pytest.mark.parametrize("name", COMMANDS)
def test_other_weights_of_the_same_shapes_are_rejected(
    run: Run, adapter: Path, tiny_model: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    base = other_weights(tiny_model(), tmp_path / "other")
    result = run(name, adapter, base)
    check_error(result, str(base), "not those that the adapter was trained on", str(tiny_model()), "--force")
    way_out = "model.name_or_path" if name == "evaluate" else "--base"
    assert way_out in result.stderr
    assert not (tmp_path / "out").exists()
    forced = run(name, adapter, base, "--force")
    assert forced.returncode == 0, forced.stderr
    assert ("note: --force: " in forced.stdout) == (name == "merge"), "the standard output of others may be JSON"
    assert ("note: --force: " in forced.stderr) == (name != "merge")


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("change", ["unread files", "other files"])
def test_a_base_with_the_same_tensors_is_accepted(
    run: Run, adapter: Path, tiny_model: Callable[..., Path], tmp_path: Path, name: str, change: str
) -> None:
    if change == "other files":
        base = reshard(tiny_model(), tmp_path / "base")
    else:
        base = tmp_path / "base"
        shutil.copytree(tiny_model(), base)
        for file in ("consolidated.safetensors", "training_args.bin", "pytorch_model.bin"):
            (base / file).write_bytes(b"something else")
    result = run(name, adapter, base)
    assert result.returncode == 0, result.stderr
    assert "--force" not in result.stdout + result.stderr


def test_an_adapter_without_hashes_is_accepted(
    run: Run, adapter: Path, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    bare = copy_adapter(adapter, tmp_path / "bare")
    assert run("generate", bare, other_weights(tiny_model(), tmp_path / "other")).returncode == 0


def test_generate_hashes_a_base_once(
    run: Run, adapter: Path, tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_model(), tmp_path / "base")
    monkeypatch.setattr(base_identity, "RACY_SECONDS", -1.0)  # as if its files were old
    assert run("generate", adapter, tmp_path / "base").returncode == 0

    def fail(path: Path) -> str:
        pytest.fail(f"{path} was read again")

    monkeypatch.setattr(base_identity, "sha256_of", fail)
    assert run("generate", adapter, tmp_path / "base").returncode == 0


def test_a_run_whose_base_gets_files_that_nobody_loads_is_finished_and_resumes(
    tiny_model: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_model(), base)
    adapter = train(tmp_path, base)
    shutil.copy(base / "model.safetensors", base / "consolidated.safetensors")
    with caplog.at_level("INFO", logger="lora_accel"):
        assert train(tmp_path, base) == adapter
    assert "finished after step 1; nothing to do" in caplog.text
    more = {"training": {"max_steps": 2}, "checkpoint": {"allow_changes": ["training.max_steps"]}}
    run_training(changed(run_config(tmp_path, reshard(tiny_model(), tmp_path / "resharded")), **more))
    more["training"]["max_steps"] = 3
    with pytest.raises(ArtifactError, match=r"model\.weights"):
        run_training(changed(run_config(tmp_path, other_weights(tiny_model(), tmp_path / "other")), **more))


def test_all_checkpoints_are_merged_again_if_the_base_changed(
    command: Callable[..., CommandResult], tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_model(), base)
    adapter = train(tmp_path, base)
    merge = ("merge", "--all", adapter.parent, "--no-verify")
    assert "already merged" not in command(*merge).stdout
    assert command(*merge).stdout.count("already merged") == 2
    shutil.copy(other_weights(tiny_model(), tmp_path / "other") / "model.safetensors", base)
    check_error(command(*merge), "not those that the adapter was trained on")
    assert "already merged" not in command(*merge, "--force").stdout


# Bases that moved


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "evaluate"])
@pytest.mark.parametrize(
    "base",
    [
        *("/home/x/llama", "models/Llama", "./llama", "a/b/c", "owner/llama", "llama--2", "C:\\x"),
        *("a\0b", "a\ud800", "a" * 300, f"{'a' * 300}/b", "/" + "a" * 5000),
    ],
    ids=lambda base: ascii(base)[:20],
)
def test_a_base_that_is_not_here_is_named_with_the_way_out(
    run: Run, adapter: Path, tmp_path: Path, name: str, base: str
) -> None:
    moved = copy_adapter(adapter, tmp_path / "moved", base_model_name_or_path=base)
    result = run(name, moved, None)
    check_error(result, f"{moved} names its base {base!r}", "Pass --base PATH")
    assert "Repo id" not in result.stderr
    assert ("there is no such folder" in result.stderr) == (base != "owner/llama")


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("base", ["/home/x/llama", "a/b/c", "models/Llama", "a" * 300], ids=lambda base: base[:20])
def test_a_requested_base_that_is_not_here_raises(run: Run, adapter: Path, name: str, base: str) -> None:
    check_error(run(name, adapter, base), base, "there is no such folder", "--base")


def test_an_adapter_records_where_its_base_is(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """An absolute path, or the Hub id and the commit of a folder in the Hub's cache; and the hashes."""
    base = tmp_path / "base"
    shutil.copytree(tiny_model(), base)
    in_cache = put_in_hub_cache(base, "owner/recorded")
    for number, (name, expected) in enumerate(
        [("base", (str(base), None)), (in_cache, ("owner/recorded", in_cache.name)), ("owner/recorded", None)]
    ):
        (tmp_path / str(number)).mkdir()
        adapter = train(tmp_path / str(number), name)
        config = json.loads((adapter / "adapter_config.json").read_text())
        provenance = json.loads((adapter / "provenance.json").read_text())
        expected = expected or ("owner/recorded", None)
        assert (config["base_model_name_or_path"], config["revision"]) == expected
        assert (provenance["base"]["name_or_path"], provenance["base"]["revision"]) == expected
        assert provenance["base"]["tensors_sha256"]
        checkpoint = tmp_path / str(number) / "run" / "checkpoints" / "step-00000001" / "adapter_config.json"
        assert json.loads(checkpoint.read_text())["base_model_name_or_path"] == expected[0]


def test_save_adapter_records_where_the_base_is(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """Also in a script with a relative path."""
    shutil.copytree(tiny_model(), tmp_path / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained("base"), LoraConfig(target_modules=["q_proj"]))
    save_adapter(Accelerator(), model, tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "base")


def test_recorded_names() -> None:
    commit = "0123456789" * 4
    Path(f"models--owner--a--b/snapshots/{commit}").mkdir(parents=True)
    Path("local").mkdir()
    assert recorded_name(f"models--owner--a--b/snapshots/{commit}", None) == ("owner/a--b", commit)
    assert recorded_name("local", None) == (os.path.abspath("local"), None)
    assert recorded_name("gpt2", "v1") == ("gpt2", "v1")


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "evaluate"])
def test_the_recorded_revision_is_used(
    run: Run, adapter: Path, tiny_model: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    """By an adapter of PEFT, in its config. The provenance records which weights were used."""
    repository = f"owner/revisions-{name}"
    put_in_hub_cache(tiny_model(), repository, "v2")
    put_in_hub_cache(other_weights(tiny_model(), tmp_path / "other"), repository, "main")
    for revision, accepted in (("v2", True), (None, False)):
        provenance = json.loads((adapter / "provenance.json").read_text())
        provenance["base"] |= {"name_or_path": repository, "revision": revision}
        named = {"base_model_name_or_path": repository, "revision": revision}
        copy = copy_adapter(adapter, tmp_path / f"adapter-{revision}", keep_provenance=True, **named)
        (copy / "provenance.json").write_text(json.dumps(provenance))
        result = run(name, copy, None)
        assert (result.returncode == 0) is accepted, result.stderr
        assert accepted or "not those that the adapter was trained on" in result.stderr


# An adapter on the Hub


@pytest.mark.parametrize("name", COMMANDS)
def test_an_adapter_is_found_by_its_hub_id(
    run: Run, adapter: Path, tiny_model: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    put_in_hub_cache(adapter, f"owner/adapter-{name}")
    result = run(name, f"owner/adapter-{name}", tiny_model())
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_an_adapter_that_is_neither_here_nor_on_the_hub_raises(
    run: Run, tiny_model: Callable[..., Path], name: str
) -> None:
    result = run(name, "tloen/alpaca-lora-7b", tiny_model())
    check_error(result, "tloen/alpaca-lora-7b: there is no such folder here", "cannot be downloaded", "pass the folder")


def test_a_path_is_no_hub_id() -> None:
    Path("runs").mkdir()
    for name in ("runs/adapter", "adapter", "a/b/c", "/adapter", "../adapter"):
        assert find_adapter(name) == Path(name)


# Code of a base


def with_code(base: Path, out: Path, *, known_type: bool) -> Path:
    """Copy a base, with code of its own that leaves a trace when it runs.

    Args:
        known_type: whether transformers has a class of its own for the model.
    """
    shutil.copytree(base, out)
    trace = f"from pathlib import Path\nPath({str(out / 'trace')!r}).touch()\n"
    (out / "configuration_mine.py").write_text(
        f"{trace}from transformers import LlamaConfig\nclass MineConfig(LlamaConfig):\n    model_type = 'mine'\n"
    )
    config_class = "LlamaConfig" if known_type else "MineConfig"
    imports = "from transformers import LlamaConfig" if known_type else "from .configuration_mine import MineConfig"
    (out / "modeling_mine.py").write_text(
        f"{trace}from transformers import LlamaForCausalLM\n{imports}\n"
        f"class MineForCausalLM(LlamaForCausalLM):\n    config_class = {config_class}\n"
    )
    config = json.loads((out / "config.json").read_text())
    auto_map = {"AutoModelForCausalLM": "modeling_mine.MineForCausalLM"}
    if not known_type:
        config |= {"model_type": "mine", "architectures": ["MineForCausalLM"]}
        auto_map["AutoConfig"] = "configuration_mine.MineConfig"
    (out / "config.json").write_text(json.dumps(config | {"auto_map": auto_map}))
    return out


@pytest.mark.parametrize("known_type", [False, True], ids=["unknown type", "known type"])
def test_a_base_with_code_of_its_own(
    run: Run,
    command: Callable[..., CommandResult],
    tiny_model: Callable[..., Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    known_type: bool,
) -> None:
    """It runs only with --trust-remote-code, which the messages name."""
    base = with_code(tiny_model(), tmp_path / "base", known_type=known_type)
    trace = base / "trace"
    with caplog.at_level("INFO", logger="lora_accel"):
        adapter = train(tmp_path, base, trust_remote_code=True)
    assert f"lora-accel chat --adapter {adapter} --trust-remote-code\n" in caplog.text
    trace.unlink()
    for name in COMMANDS:
        check_error(run(name, adapter, base), "code", "--trust-remote-code")
        assert not trace.exists(), name
    for name in COMMANDS:
        result = run(name, adapter, base, "--trust-remote-code")
        assert result.returncode == 0, (name, result.stderr)
    result = run("merge", adapter, None, "--trust-remote-code")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "out" / "modeling_mine.py").is_file()
    check = ("chat", "--merged", tmp_path / "out")
    if not known_type:
        check_error(command(*check), "--trust-remote-code")
    assert command(*check, "--trust-remote-code").returncode == 0


def test_training_on_a_base_with_code_names_the_option(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    base = with_code(tiny_model(), tmp_path / "base", known_type=False)
    with pytest.raises(ArtifactError, match=r"model\.trust_remote_code=true"):
        train(tmp_path, base)
    assert not (base / "trace").exists()
    assert not (tmp_path / "run").exists()


# An adapter instead of a base, and beside one


def test_an_adapter_is_no_base(run: Run, adapter: Path, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is an adapter of .*, not a model\. .*set adapter\.init_from=") as error:
        train(tmp_path, adapter)
    assert str(tiny_model()) in str(error.value)
    assert not (tmp_path / "run").exists()
    for name in COMMANDS:
        check_error(run(name, adapter, adapter), f"{adapter} is an adapter of {tiny_model()}", "--base")


def test_an_adapter_or_a_run_instead_of_a_checkpoint_raises(
    adapter: Path, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    config = run_config(tmp_path, tiny_model())
    for folder, message in (
        (adapter, "is an adapter, not a checkpoint"),
        (copy_adapter(adapter, tmp_path / "plain"), "is an adapter, not a checkpoint"),
        (adapter.parent, "is not a checkpoint; name one of the step-… folders"),
        (adapter.parent / "checkpoints", "is not a checkpoint; name one of the step-… folders"),
    ):
        with pytest.raises(ArtifactError, match=message) as error:
            run_training(changed(config, checkpoint={"resume": str(folder)}))
        assert str(folder) in str(error.value)
    assert not (tmp_path / "run").exists()


def test_an_adapter_beside_a_base_is_not_loaded(
    run: Run, adapter: Path, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """transformers would load it onto the base."""
    base = tmp_path / "base"
    shutil.copytree(tiny_model(), base)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(adapter / file, base)
    loaded = load_base_model(ModelSection(name_or_path=str(base)), QuantizationSection())
    expected = load_base_model(ModelSection(name_or_path=str(tiny_model())), QuantizationSection())
    assert list(loaded.state_dict()) == list(expected.state_dict())
    assert all(torch.equal(x, y) for x, y in zip(loaded.parameters(), expected.parameters(), strict=True))
    for name in COMMANDS:
        assert run(name, adapter, base).returncode == 0


# A base without a tokenizer


def test_a_base_without_a_tokenizer_merges_with_a_note(
    run: Run, adapter: Path, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    base, files = tmp_path / "base", ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    shutil.copytree(tiny_model(), base)
    bare = copy_adapter(adapter, tmp_path / "bare")
    for folder in (base, bare):
        for file in files:
            (folder / file).unlink(missing_ok=True)
    result = run("merge", bare, base)
    assert result.returncode == 0, result.stderr
    assert "note: neither the adapter nor the base has a tokenizer" in result.stdout
    assert "logits differ by" in result.stdout, "it is compared all the same"
    assert not (tmp_path / "out" / "tokenizer_config.json").exists()
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    shutil.copy(adapter / "tokenizer.json", bare)
    shutil.copy(adapter / "tokenizer_config.json", bare)
    assert "note: neither" not in run("merge", bare, base).stdout
    assert AutoTokenizer.from_pretrained(tmp_path / "out")
