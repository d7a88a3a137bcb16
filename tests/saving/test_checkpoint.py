"""Which checkpoint a run goes on from, which ones stay, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lora_accel import RunConfig, run_training
from lora_accel.errors import ArtifactError
from lora_accel.saving.checkpoint import OPTIMIZER, STATE, find_checkpoint, load_checkpoint, save_checkpoint
from lora_accel.saving.commit import MANIFEST, why_invalid, write_manifest
from lora_accel.saving.weights import WEIGHTS
from tests.conftest import read_metrics

Made = tuple[Accelerator, PeftModel, torch.optim.Optimizer]


@pytest.fixture
def make(tiny_model: Callable[..., Path]) -> Callable[[int], Made]:
    """A tiny model and its optimizer after so many steps."""

    def make(steps: int) -> Made:
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_pretrained(tiny_model())
        model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"]))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        accelerator = Accelerator()
        model, optimizer = accelerator.prepare(model, optimizer)
        for step in range(steps):
            update(accelerator, model, optimizer, step)
        return accelerator, model, optimizer

    return make


def update(accelerator: Accelerator, model: PeftModel, optimizer: torch.optim.Optimizer, step: int) -> None:
    ids = torch.arange(5 + step, 25 + step, device=accelerator.device)[None]
    accelerator.backward(model(ids, labels=ids).loss)
    optimizer.step()
    optimizer.zero_grad()


def save(made: Made, folder: Path, step: int, keep_last: int = 10) -> Path:
    return save_checkpoint(*made, folder, {"step": step}, keep_last=keep_last)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.fixture
def three(make: Callable[[int], Made], tmp_path: Path) -> Path:
    """A folder with the checkpoints of steps 1, 2 and 3."""
    made = make(1)
    for step in (1, 2, 3):
        save(made, tmp_path / "checkpoints", step)
    return tmp_path / "checkpoints"


@pytest.mark.parametrize("keep_last", [1, 2, 3])
def test_the_last_so_many_stay(make: Callable[[int], Made], tmp_path: Path, keep_last: int) -> None:
    made = make(1)
    for step in (2, 9, 10, 100_000_000):
        save(made, tmp_path, step, keep_last)
    assert names(tmp_path) == ["step-00000002", "step-00000009", "step-00000010", "step-100000000"][-keep_last:]


def test_other_things_beside_checkpoints_stay(make: Callable[[int], Made], tmp_path: Path) -> None:
    for other in ("notes", "step-1", "step-00000001.bak", ".hidden"):
        (tmp_path / other).mkdir()
    save(make(1), tmp_path, 5, keep_last=1)
    save(make(1), tmp_path, 6, keep_last=1)
    assert names(tmp_path) == [".hidden", "notes", "step-00000001.bak", "step-00000006", "step-1"]


def test_a_save_that_fails_deletes_nothing(
    three: Path, make: Callable[[int], Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_accel.saving import checkpoint

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save(make(1), three, 4, keep_last=1)
    assert names(three) == ["step-00000001", "step-00000002", "step-00000003"]


def test_saved_and_loaded_state_goes_on_bitwise(make: Callable[[int], Made], tmp_path: Path) -> None:
    straight = make(5)
    stopped = make(3)
    save(stopped, tmp_path, 3)
    accelerator, model, optimizer = make(0)
    checkpoint, _ = find_checkpoint(tmp_path, "auto")
    assert checkpoint is not None
    assert load_checkpoint(accelerator, model, optimizer, checkpoint) == 3
    for step in (3, 4):
        update(accelerator, model, optimizer, step)
    for one, other in zip(straight[1].parameters(), model.parameters(), strict=True):
        assert torch.equal(one, other)
    again = save((accelerator, model, optimizer), tmp_path, 5)
    whole = save(straight, tmp_path / "straight", 5)
    for file in (WEIGHTS, OPTIMIZER):
        assert (again / file).read_bytes() == (whole / file).read_bytes()


def test_the_folder_holds_no_pickle(three: Path) -> None:
    files = {path.name for path in (three / "step-00000003").iterdir()}
    assert files == {WEIGHTS, "adapter_config.json", OPTIMIZER, STATE, MANIFEST}


# Finding


def test_the_newest_is_found(three: Path) -> None:
    checkpoint, damaged = find_checkpoint(three, "auto")
    assert checkpoint is not None
    assert (checkpoint.folder.name, checkpoint.step, damaged) == ("step-00000003", 3, [])


def test_steps_are_compared_as_numbers(three: Path, make: Callable[[int], Made]) -> None:
    save(make(1), three, 99_999_999)
    save(make(1), three, 100_000_000)
    checkpoint, _ = find_checkpoint(three, "auto")
    assert checkpoint is not None
    assert checkpoint.step == 100_000_000


@pytest.mark.parametrize("folder", ["absent", "empty"])
def test_without_checkpoints_a_run_begins_afresh(tmp_path: Path, folder: str) -> None:
    (tmp_path / "empty").mkdir()
    for resume in ("auto", "never"):
        assert find_checkpoint(tmp_path / folder, resume) == (None, [])


@pytest.mark.parametrize("file", [WEIGHTS, "adapter_config.json", OPTIMIZER, STATE, MANIFEST])
@pytest.mark.parametrize("damage", ["flipped", "gone"])
def test_a_damaged_newest_is_passed_over_and_named(three: Path, file: str, damage: str) -> None:
    spoiled = three / "step-00000003" / file
    flip(spoiled) if damage == "flipped" else spoiled.unlink()
    if file == MANIFEST and damage == "flipped":
        spoiled.write_text("{")
    checkpoint, damaged = find_checkpoint(three, "auto")
    assert checkpoint is not None
    assert checkpoint.step == 2
    assert len(damaged) == 1
    assert damaged[0].startswith(f"step-00000003: {file} ")


def test_a_folder_left_by_a_killed_save_is_no_checkpoint(three: Path) -> None:
    shutil.copytree(three / "step-00000003", three / ".step-00000004.writing")
    checkpoint, damaged = find_checkpoint(three, "auto")
    assert checkpoint is not None
    assert (checkpoint.step, damaged) == (3, [])


def test_when_all_are_damaged_beginning_afresh_is_refused(three: Path) -> None:
    for folder in three.iterdir():
        flip(folder / WEIGHTS)
    with pytest.raises(ArtifactError, match="every checkpoint is damaged") as refused:
        find_checkpoint(three, "auto")
    assert all(f"step-0000000{step}" in str(refused.value) for step in (1, 2, 3))


def test_a_named_one_is_used_though_it_is_not_the_newest(three: Path) -> None:
    checkpoint, _ = find_checkpoint(three.parent / "elsewhere", str(three / "step-00000001"))
    assert checkpoint is not None
    assert checkpoint.step == 1


def test_a_named_damaged_one_is_refused_not_replaced(three: Path) -> None:
    flip(three / "step-00000003" / OPTIMIZER)
    with pytest.raises(ArtifactError, match=r"step-00000003 cannot be used: optimizer.safetensors is not what was"):
        find_checkpoint(three, str(three / "step-00000003"))


def test_a_named_folder_that_is_not_there_is_refused(three: Path) -> None:
    with pytest.raises(ArtifactError, match="is no folder"):
        find_checkpoint(three, str(three / "step-00000009"))


def test_never_meets_checkpoints_and_refuses(three: Path) -> None:
    with pytest.raises(ArtifactError, match=r"resume=never, but .* holds 3 checkpoints"):
        find_checkpoint(three, "never")


# Loading


@pytest.mark.parametrize("spoil", ["gone", "shape"])
def test_moments_of_something_else_are_refused(three: Path, make: Callable[[int], Made], spoil: str) -> None:
    folder = three / "step-00000003"
    moments = load_file(folder / OPTIMIZER)
    name = next(iter(moments))
    moments[name] = moments[name][:1].contiguous()
    if spoil == "gone":
        del moments[name]
    save_file(moments, folder / OPTIMIZER)
    write_manifest(folder)
    assert why_invalid(folder) is None
    checkpoint, _ = find_checkpoint(three, "auto")
    assert checkpoint is not None
    with pytest.raises(ArtifactError, match="are not the moments of what is trained here"):
        load_checkpoint(*make(0), checkpoint)


@pytest.mark.parametrize("state", ["[]", "{}", '{"step": "three"}', "null"])
def test_a_state_that_is_none_is_refused(three: Path, state: str) -> None:
    folder = three / "step-00000003"
    (folder / STATE).write_text(state)
    write_manifest(folder)
    with pytest.raises(ArtifactError, match=r"state\.json: "):
        find_checkpoint(three, "auto")


# The whole run


def test_a_run_goes_on_before_a_damaged_checkpoint(
    make_config: Callable[..., RunConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config()
    run_training(config)
    folder = Path(config.output_dir)
    whole = (folder / "adapter" / WEIGHTS).read_bytes()
    flip(folder / "checkpoints" / "step-00000006" / WEIGHTS)
    run_training(config)
    assert "passed over a damaged checkpoint: step-00000006" in capsys.readouterr().out
    assert [line["step"] for line in read_metrics(folder, "event") if line["event"] == "resume"] == [4]
    assert (folder / "adapter" / WEIGHTS).read_bytes() == whole
    assert why_invalid(folder / "checkpoints" / "step-00000006") is None


def test_a_run_with_resume_never_refuses_its_own_checkpoints(make_config: Callable[..., RunConfig]) -> None:
    run_training(make_config())
    with pytest.raises(ArtifactError, match="resume=never"):
        run_training(make_config(checkpoint={"resume": "never"}))


def test_a_run_goes_on_from_a_checkpoint_of_another_folder(
    make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config = make_config()
    run_training(config)
    folder = Path(config.output_dir)
    source = folder / "checkpoints" / "step-00000004"
    other = make_config(output_dir=str(tmp_path / "other"), checkpoint={"resume": str(source)})
    adapter = run_training(other)
    assert (adapter / WEIGHTS).read_bytes() == (folder / "adapter" / WEIGHTS).read_bytes()
    assert [line["step"] for line in read_metrics(adapter.parent)] == [5, 6]
    state = json.loads((adapter.parent / "checkpoints" / "step-00000006" / STATE).read_text())
    assert (state["step"], state["epoch"], state["examples"], state["seed"]) == (6, 1, 21, 0)
