"""Which checkpoint a run goes on from, which ones stay, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lora_accel import RunConfig, faults, run_training
from lora_accel.errors import ArtifactError, ConfigError, TrainingError
from lora_accel.saving import checkpoint as checkpoints
from lora_accel.saving import discovery
from lora_accel.saving.atomic import MANIFEST, sha256_of, why_invalid, write_manifest
from lora_accel.saving.checkpoint import SPARE_BYTES, check_disk_space, load_checkpoint, save_checkpoint
from lora_accel.saving.discovery import (
    OPTIMIZER,
    STATE,
    WEIGHTS,
    Checkpoint,
    CheckpointSelection,
    find_checkpoint,
    list_checkpoints,
    prune,
    quarantine,
)
from tests.conftest import read_metrics

Made = tuple[Accelerator, PeftModel, torch.optim.Optimizer]


@pytest.fixture
def make(tiny_model: Callable[..., Path]) -> Callable[..., Made]:
    """A tiny model and its optimizer after so many steps."""

    def make(steps: int, r: int = 4) -> Made:
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_pretrained(tiny_model())
        model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=r, target_modules=["q_proj"]))
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


def save(made: Made, folder: Path, step: int, keep_last: int = 10, spare: str = "", **state: Any) -> Path:
    return save_checkpoint(*made, folder, {"step": step, **state}, keep_last=keep_last, spare=spare)


def newest(folder: Path) -> Checkpoint:
    found = find_checkpoint(folder, "auto").checkpoint
    assert found is not None
    return found


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

    monkeypatch.setattr(checkpoint, "write_tensors", full)
    with pytest.raises(TrainingError, match="No space left"):
        save(make(1), three, 4, keep_last=1)
    assert names(three) == ["step-00000001", "step-00000002", "step-00000003"]


def test_saved_and_loaded_state_goes_on_bitwise(make: Callable[[int], Made], tmp_path: Path) -> None:
    straight = make(5)
    stopped = make(3)
    save(stopped, tmp_path, 3)
    accelerator, model, optimizer = make(0)
    load_checkpoint(accelerator, model, optimizer, newest(tmp_path))
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


def test_what_is_no_whole_checkpoint_is_neither_counted_nor_deleted(three: Path, make: Callable[[int], Made]) -> None:
    save(make(1), three, 4)
    (three / "step-00000002" / STATE).unlink()
    with (three / "step-00000004" / WEIGHTS).open("ab") as file:
        file.write(b"x")
    (three / "step-00000005").mkdir()
    prune(three, 1)
    assert names(three) == ["step-00000002", "step-00000003", "step-00000004", "step-00000005"]


def test_one_whose_manifest_lacks_a_file_is_not_counted(three: Path) -> None:
    (three / "step-00000003" / OPTIMIZER).unlink()
    write_manifest(three / "step-00000003")
    prune(three, 1)
    assert names(three) == ["step-00000002", "step-00000003"]


@pytest.mark.parametrize("way", ["plain", "relative", "link"])
def test_the_one_that_a_run_was_told_to_begin_from_stays(
    three: Path, make: Callable[[int], Made], monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    spare = str(three / "step-00000001")
    if way == "relative":
        monkeypatch.chdir(three.parent)
        spare = f"{three.name}/../{three.name}/step-00000001/"
    elif way == "link":
        (three.parent / "link").symlink_to(three, target_is_directory=True)
        spare = str(three.parent / "link" / "step-00000001")
    save(make(1), three, 4, keep_last=1, spare=spare)
    assert names(three) == ["step-00000001", "step-00000004"]
    prune(three, 1, spare="auto")
    assert names(three) == ["step-00000004"]


# Room on the disk


def actual_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Let the disk have so many bytes free."""

    def set_to(count: int) -> None:
        monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda path: SimpleNamespace(free=count))

    return set_to


def test_what_will_stand_at_once_must_find_room(
    make: Callable[..., Made], tmp_path: Path, free: Callable[[int], None]
) -> None:
    """That are as many as are kept, the one being written, and the final adapter."""
    accelerator, model, optimizer = make(1, r=4096)
    one = actual_bytes(save((accelerator, model, optimizer), tmp_path / "sample", 1))
    adapter = (tmp_path / "sample" / "step-00000001" / WEIGHTS).stat().st_size
    folder = tmp_path / "run" / "checkpoints"
    folder.parent.mkdir()
    for keep_last in (2, 5):
        needed = (keep_last + 1) * one + adapter
        free(needed - 1)
        with pytest.raises(ConfigError, match=f"MB free, but {keep_last + 1} checkpoints of .* make room") as refused:
            check_disk_space(accelerator, model, folder, keep_last)
        assert str(refused.value).startswith(f"output_dir: {folder.parent} has ")
        free(needed + one + (keep_last + 2) * SPARE_BYTES)
        check_disk_space(accelerator, model, folder, keep_last)
    assert not folder.exists()


def test_checkpoints_that_stand_already_need_no_room_again(
    three: Path, make: Callable[[int], Made], free: Callable[[int], None]
) -> None:
    accelerator, model, _ = make(0)

    def least(folder: Path) -> int:
        """Return how many bytes must be free, by trying."""
        too_little, enough = 0, 10**9
        while enough - too_little > 1:
            middle = (too_little + enough) // 2
            free(middle)
            try:
                check_disk_space(accelerator, model, folder, 3)
                enough = middle
            except ConfigError:
                too_little = middle
        return enough

    standing = sum(actual_bytes(three / name) for name in names(three))
    assert least(three.parent / "empty") - least(three) == standing > 0


def test_a_training_without_room_is_refused_before_it_writes(
    make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="but 1000000001 checkpoints of"):
        run_training(make_config(checkpoint={"keep_last": 10**9}))
    assert not (tmp_path / "run").exists()


# Finding


def test_the_newest_is_found(three: Path) -> None:
    found = find_checkpoint(three, "auto")
    assert found == CheckpointSelection(
        Checkpoint(three / "step-00000003", {"step": 3, "skipped": 0, "overflowed": 0}), None, None, {}, []
    )
    assert newest(three).step == 3


def test_steps_are_compared_as_numbers(three: Path, make: Callable[[int], Made]) -> None:
    save(make(1), three, 99_999_999)
    save(make(1), three, 100_000_000)
    assert newest(three).step == 100_000_000


@pytest.mark.parametrize("folder", ["absent", "empty"])
def test_without_checkpoints_a_run_begins_afresh(tmp_path: Path, folder: str) -> None:
    (tmp_path / "empty").mkdir()
    for resume in ("auto", "never"):
        assert find_checkpoint(tmp_path / folder, resume) == CheckpointSelection(None, None, None, {}, [])


@pytest.mark.parametrize("file", [WEIGHTS, "adapter_config.json", OPTIMIZER, STATE, MANIFEST])
@pytest.mark.parametrize("damage", ["flipped", "gone"])
def test_a_damaged_newest_is_passed_over_and_named(three: Path, file: str, damage: str) -> None:
    spoiled = three / "step-00000003" / file
    flip(spoiled) if damage == "flipped" else spoiled.unlink()
    if file == MANIFEST and damage == "flipped":
        spoiled.write_text("{")
    found = find_checkpoint(three, "auto")
    assert found.checkpoint is not None
    assert found.checkpoint.step == 2
    assert list(found.damaged) == [three / "step-00000003"]
    assert found.damaged[three / "step-00000003"].startswith(f"{file} ")
    (told,) = quarantine(found)
    assert told.startswith(f"passed over a damaged checkpoint: step-00000003: {file} ")


def test_a_folder_left_by_a_killed_save_is_no_checkpoint(three: Path) -> None:
    shutil.copytree(three / "step-00000003", three / ".step-00000004.writing")
    found = find_checkpoint(three, "auto")
    assert found.checkpoint is not None
    assert (found.checkpoint.step, found.damaged) == (3, {})


def test_when_all_are_damaged_beginning_afresh_is_refused(three: Path) -> None:
    for folder in three.iterdir():
        flip(folder / WEIGHTS)
    with pytest.raises(ArtifactError, match="every checkpoint is damaged") as refused:
        find_checkpoint(three, "auto")
    assert all(f"step-0000000{step}: {WEIGHTS} is not what was" in str(refused.value) for step in (1, 2, 3))
    assert names(three) == ["step-00000001", "step-00000002", "step-00000003"]


def test_a_damaged_one_is_kept_under_a_name_that_is_free(three: Path, make: Callable[[int], Made]) -> None:
    made = make(1)
    for again in ("", "-2", "-3"):
        save(made, three, 3)
        flip(three / "step-00000003" / WEIGHTS)
        spoiled = (three / "step-00000003" / WEIGHTS).read_bytes()
        before = names(three)
        found = find_checkpoint(three, "auto")
        assert names(three) == before, "looking changes nothing"
        (told,) = quarantine(found)
        assert told.endswith(f"; it is kept as corrupt-step-00000003{again}")
        assert (three / f"corrupt-step-00000003{again}" / WEIGHTS).read_bytes() == spoiled
        assert newest(three).step == 2
    assert names(three)[:3] == ["corrupt-step-00000003", "corrupt-step-00000003-2", "corrupt-step-00000003-3"]


def test_when_only_damaged_ones_that_stepped_aside_are_left_beginning_afresh_is_refused(three: Path) -> None:
    for folder in list(three.iterdir()):
        folder.rename(folder.with_name(f"corrupt-{folder.name}"))
    with pytest.raises(ArtifactError, match="every checkpoint is damaged") as refused:
        find_checkpoint(three, "auto")
    assert all(f"corrupt-step-0000000{step}" in str(refused.value) for step in (1, 2, 3))
    (three / "corrupt-step-00000001").rename(three / "step-00000001")
    assert newest(three).step == 1


def test_a_named_one_is_used_though_it_is_not_the_newest(three: Path) -> None:
    found = find_checkpoint(three.parent / "elsewhere", str(three / "step-00000001"))
    assert found.checkpoint is not None
    assert found.checkpoint.step == 1
    assert found.parent_hash == sha256_of(three / "step-00000001" / MANIFEST)
    assert (found.damaged, found.superseded) == ({}, [])


def test_newer_ones_that_do_not_descend_from_a_named_one_step_aside(three: Path, make: Callable[[int], Made]) -> None:
    found = find_checkpoint(three, str(three / "step-00000001"))
    assert found.checkpoint is not None
    assert found.checkpoint.step == 1
    assert found.superseded == [three / "step-00000003", three / "step-00000002"]
    assert names(three) == ["step-00000001", "step-00000002", "step-00000003"], "looking changes nothing"
    assert quarantine(found) == [
        f"step-0000000{step} does not descend from the named checkpoint; it is kept as superseded-step-0000000{step}"
        for step in (3, 2)
    ]
    assert names(three) == ["step-00000001", "superseded-step-00000002", "superseded-step-00000003"]
    assert why_invalid(three / "superseded-step-00000003") is None
    save(make(1), three, 3, begun_from="another")
    quarantine(find_checkpoint(three, str(three / "step-00000001")))
    assert "superseded-step-00000003-2" in names(three)


def test_a_run_goes_on_from_what_descends_from_the_named_one(three: Path, make: Callable[[int], Made]) -> None:
    """The same command again resumes; it does not begin again at the named checkpoint."""
    named, made = three / "step-00000001", make(1)
    origin = sha256_of(named / MANIFEST)
    save(made, three, 4, begun_from=origin)
    save(made, three, 5, begun_from=origin)
    save(made, three, 6, begun_from="another")
    found = find_checkpoint(three, str(named))
    assert found.checkpoint is not None
    assert (found.checkpoint.step, found.parent_hash) == (5, origin)
    assert found.superseded == [three / "step-00000006"]

    flip(three / "step-00000005" / OPTIMIZER)
    found = find_checkpoint(three, str(named))
    assert found.checkpoint is not None
    assert found.checkpoint.step == 4
    assert list(found.damaged) == [three / "step-00000005"]

    flip(three / "step-00000004" / OPTIMIZER)
    found = find_checkpoint(three, str(named))
    assert found.checkpoint is not None
    assert found.checkpoint.step == 1, "the named one is what is left, though all newer ones are damaged"
    assert set(found.damaged) == {three / "step-00000004", three / "step-00000005"}
    assert set(found.superseded) == {three / f"step-0000000{step}" for step in (2, 3, 6)}


def test_where_a_run_began_is_carried_on_without_naming_it(three: Path, make: Callable[[int], Made]) -> None:
    save(make(1), three, 4, begun_from="0" * 64)
    assert find_checkpoint(three, "auto").parent_hash == "0" * 64


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
    with pytest.raises(ArtifactError, match="are not the moments of the parameters that are trained here"):
        load_checkpoint(*make(0), newest(three))


@pytest.mark.parametrize(
    ("moment", "spoil", "reason"),
    [
        ("exp_avg.", "nan", "is not finite in float32"),
        ("exp_avg.", "inf", "is not finite in float32"),
        ("exp_avg_sq.", "nan", "is not finite in float32"),
        ("exp_avg.", "float16", "is not finite in float32"),
        ("exp_avg_sq.", "float64", "is not finite in float32"),
        ("exp_avg_sq.", "int32", "is not finite in float32"),
        ("exp_avg_sq.", "-1e-30", "is a mean of squares and has negative values"),
        ("exp_avg.", "-1e-30", None),
    ],
)
def test_moments_that_adam_never_makes_are_refused(
    three: Path, make: Callable[[int], Made], moment: str, spoil: str, reason: str | None
) -> None:
    folder = three / "step-00000003"
    moments = load_file(folder / OPTIMIZER)
    name = next(name for name in moments if name.startswith(moment))
    if hasattr(torch, spoil) and isinstance(getattr(torch, spoil), torch.dtype):
        moments[name] = moments[name].to(getattr(torch, spoil))
    else:
        moments[name].view(-1)[-1] = float(spoil)
    save_file(moments, folder / OPTIMIZER)
    write_manifest(folder)
    if reason is None:
        load_checkpoint(*make(0), newest(three))
        return
    with pytest.raises(ArtifactError) as refused:
        load_checkpoint(*make(0), newest(three))
    assert str(refused.value) == f"{folder / OPTIMIZER}: {name} {reason}"


@pytest.mark.parametrize("skipped", [None, 0, 2])
def test_adam_counts_the_updates_that_were_made(
    make: Callable[[int], Made], tmp_path: Path, skipped: int | None
) -> None:
    save(make(3), tmp_path, 5, **({} if skipped is None else {"skipped": skipped}))
    accelerator, model, optimizer = make(0)
    checkpoint = newest(tmp_path)
    load_checkpoint(accelerator, model, optimizer, checkpoint)
    assert checkpoint.skipped == (skipped or 0)
    counts = {values["step"].item() for values in optimizer.state.values()}
    assert counts == {5 - (skipped or 0)}
    assert len(optimizer.state) == 4


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
    shutil.rmtree(folder / "adapter")  # as if it had died before its end: a finished run has nothing to do
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


def test_a_run_begun_from_a_named_checkpoint_in_place_goes_on_when_started_again(
    make_config: Callable[..., RunConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(checkpoint={"keep_last": 5})
    run_training(config)
    folder = Path(config.output_dir)
    named = folder / "checkpoints" / "step-00000002"
    origin = sha256_of(named / MANIFEST)
    again = make_config(
        checkpoint={"keep_last": 1, "resume": str(named), "allow_changes": ["training.learning_rate"]},
        training={"learning_rate": 1e-2},
    )
    run_training(again)
    told = capsys.readouterr().out
    assert f"resuming after step 2 from {named}" in told
    assert names(folder / "checkpoints") == [
        "step-00000002",
        "step-00000006",
        "superseded-step-00000004",
        "superseded-step-00000006",
    ]
    state = json.loads((folder / "checkpoints" / "step-00000006" / STATE).read_text())
    assert state["begun_from"] == origin
    assert [line["step"] for line in read_metrics(folder)] == [1, 2, 3, 4, 5, 6]
    adapter = (folder / "adapter" / WEIGHTS).read_bytes()

    shutil.rmtree(folder / "adapter")
    run_training(again)
    assert f"resuming after step 6 from {folder / 'checkpoints' / 'step-00000006'}" in capsys.readouterr().out
    assert (folder / "adapter" / WEIGHTS).read_bytes() == adapter

    # Without naming it again, and with more to do: what is saved still knows where it began.
    more = make_config(
        checkpoint={"allow_changes": ["training"]}, training={"learning_rate": 1e-2, "epochs": 2, "warmup_steps": 0}
    )
    run_training(more)
    state = json.loads((folder / "checkpoints" / "step-00000012" / STATE).read_text())
    assert state["begun_from"] == origin


def test_a_run_begun_from_a_finished_one_can_be_started_again(
    make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """It has nothing to do but to write its adapter, and no checkpoint of its own."""
    run_training(make_config())
    named = tmp_path / "run" / "checkpoints" / "step-00000006"
    again = make_config(output_dir=str(tmp_path / "again"), checkpoint={"resume": str(named)})
    adapter = (run_training(again) / WEIGHTS).read_bytes()
    assert (run_training(again) / WEIGHTS).read_bytes() == adapter


def test_as_long_as_a_run_goes_on_two_checkpoints_stay(
    make_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newest may be the one that a disk spoils; only a run that is done needs no other."""
    config = make_config(checkpoint={"keep_last": 1})
    fault = faults.Fault("export.mid", 1, "enospc", None)
    monkeypatch.setattr(faults, "active_fault", lambda: fault)
    with pytest.raises(TrainingError, match="saving the final adapter failed on rank 0"):
        run_training(config)
    assert names(Path(config.output_dir) / "checkpoints") == ["step-00000004", "step-00000006"]
    run_training(config)
    assert names(Path(config.output_dir) / "checkpoints") == ["step-00000006"]


@pytest.mark.parametrize("point", ["save.begin", "save.mid_file", "save.before_manifest", "save.before_rename"])
def test_a_disk_that_fills_up_while_saving_ends_the_run_with_what_was_saved_before(
    make_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, point: str
) -> None:
    run_training(make_config(output_dir=str(tmp_path / "straight")))
    config = make_config()
    folder = Path(config.output_dir)
    fault = faults.Fault(point, 3, "enospc", None)  # a checkpoint has two large files
    monkeypatch.setattr(faults, "active_fault", lambda: fault)
    with pytest.raises(TrainingError, match=r"saving step-0000000[46] failed on rank 0: OSError: .*No space left"):
        run_training(config)
    assert json.loads((folder / "status.json").read_text())["state"] == "failed"
    assert all(why_invalid(path) is None for path in (folder / "checkpoints").iterdir())
    assert names(folder / "checkpoints")[0] == "step-00000002"
    run_training(config)
    assert (folder / "adapter" / WEIGHTS).read_bytes() == (tmp_path / "straight" / "adapter" / WEIGHTS).read_bytes()


@pytest.mark.parametrize(
    "changes",
    [
        {"training": {"learning_rate": 1e-3}},
        {"training": {"epochs": 2}},
        {"training": {"batch_size": 3}},
        {"training": {"max_steps": 7}},
        {"training": {"warmup_steps": 3}},
        {"training": {"learning_rate": 1e-3, "weight_decay": 0.1}, "adapter": {"alpha": 4}},
        {"adapter": {"dropout": 0.0}},
        {"adapter": {"alpha_pattern": {"q_proj": 2.0}}},
        {"data": {"loss_on": "all", "max_length": 100}},
        {"model": {"chat_template": "chatml"}},
        {"model": {"dtype": "bfloat16"}},
        {"seed": 1},
    ],
    ids=str,
)
def test_a_refused_change_is_told_with_the_words_that_allow_it(
    make_config: Callable[..., RunConfig], changes: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config()
    run_training(config)
    folder = Path(config.output_dir)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(ArtifactError, match="was made from something else") as refused:
        run_training(make_config(**changes))
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    words = re.search(r"'checkpoint\.allow_changes=\[([^\]]+)\]'$", str(refused.value))
    assert words is not None
    told = re.findall(r"^  ([^\s:]+): (.* -> .*)$", str(refused.value), re.MULTILINE)
    allowed = words[1].split(", ")
    for missing in allowed if len(allowed) > 1 else []:
        with pytest.raises(ArtifactError, match="was made from something else"):
            run_training(make_config(**changes, checkpoint={"allow_changes": [w for w in allowed if w != missing]}))
    capsys.readouterr()
    run_training(make_config(**changes, checkpoint={"allow_changes": allowed}))
    said = capsys.readouterr().out
    assert told
    for key, values in told:
        assert f"changed, as checkpoint.allow_changes says:  {key}: {values}\n" in said


def test_a_checkpoint_that_goes_while_it_is_listed_is_left_out(three: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that lives rotates its checkpoints."""
    look = discovery.why_invalid

    def rotated(folder: Path, **options: Any) -> str | None:
        reason = look(folder, **options)
        if folder.name == "step-00000001":
            shutil.rmtree(folder)
        return reason

    monkeypatch.setattr(discovery, "why_invalid", rotated)
    assert [entry.step for entry in list_checkpoints(three.parent, hashes=True)] == [2, 3]
