"""Save, select, quarantine, prune and load checkpoints; resume runs from them."""

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
from lora_accel.saving import listing
from lora_accel.saving.atomic import MANIFEST, sha256_of, why_invalid, write_manifest
from lora_accel.saving.checkpoint import METADATA_BYTES, check_disk_space, load_checkpoint, save_checkpoint
from lora_accel.saving.discovery import (
    OPTIMIZER,
    STATE,
    WEIGHTS,
    Checkpoint,
    CheckpointSelection,
    find_checkpoint,
    prune,
    quarantine,
)
from lora_accel.saving.listing import list_checkpoints
from tests.conftest import read_metrics

Prepared = tuple[Accelerator, PeftModel, torch.optim.Optimizer]


@pytest.fixture
def make(tiny_model: Callable[..., Path]) -> Callable[..., Prepared]:
    """Return a function that trains a tiny model for some steps and returns it with its accelerator and optimizer."""

    def make(steps: int, r: int = 4) -> Prepared:
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


def save(prepared: Prepared, folder: Path, step: int, keep_last: int = 10, protected: str = "", **state: Any) -> Path:
    return save_checkpoint(
        *prepared, folder, {"step": step, **state}, keep_last=keep_last, protected=[protected] if protected else []
    )


def newest(folder: Path) -> Checkpoint:
    checkpoint = find_checkpoint(folder, "auto").checkpoint
    assert checkpoint is not None
    return checkpoint


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def sign(folder: Path) -> None:
    """Make the files of a checkpoint valid, as somebody who forges it would."""
    state = json.loads((folder / STATE).read_text())
    state.pop("files", None)
    (folder / STATE).write_text(json.dumps(state))
    write_manifest(folder)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.fixture
def three(make: Callable[[int], Prepared], tmp_path: Path) -> Path:
    """Return a folder with the checkpoints of steps 1, 2 and 3."""
    prepared = make(1)
    for step in (1, 2, 3):
        save(prepared, tmp_path / "checkpoints", step)
    return tmp_path / "checkpoints"


@pytest.mark.parametrize("keep_last", [1, 2, 3])
def test_keep_last(make: Callable[[int], Prepared], tmp_path: Path, keep_last: int) -> None:
    prepared = make(1)
    for step in (2, 9, 10, 100_000_000):
        save(prepared, tmp_path, step, keep_last)
    assert names(tmp_path) == ["step-00000002", "step-00000009", "step-00000010", "step-100000000"][-keep_last:]


def test_other_files_are_not_pruned(make: Callable[[int], Prepared], tmp_path: Path) -> None:
    for other in ("notes", "step-1", "step-00000001.bak", ".hidden"):
        (tmp_path / other).mkdir()
    save(make(1), tmp_path, 5, keep_last=1)
    save(make(1), tmp_path, 6, keep_last=1)
    assert names(tmp_path) == [".hidden", "notes", "step-00000001.bak", "step-00000006", "step-1"]


def test_failed_save_deletes_nothing(
    three: Path, make: Callable[[int], Prepared], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_accel.saving import checkpoint

    def raise_no_space(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_tensors", raise_no_space)
    with pytest.raises(TrainingError, match="No space left"):
        save(make(1), three, 4, keep_last=1)
    assert names(three) == ["step-00000001", "step-00000002", "step-00000003"]


def test_training_resumes_bitwise(make: Callable[[int], Prepared], tmp_path: Path) -> None:
    uninterrupted = make(5)
    interrupted = make(3)
    save(interrupted, tmp_path, 3)
    accelerator, model, optimizer = make(0)
    load_checkpoint(accelerator, model, optimizer, newest(tmp_path))
    for step in (3, 4):
        update(accelerator, model, optimizer, step)
    for one, other in zip(uninterrupted[1].parameters(), model.parameters(), strict=True):
        assert torch.equal(one, other)
    actual = save((accelerator, model, optimizer), tmp_path, 5)
    expected = save(uninterrupted, tmp_path / "uninterrupted", 5)
    for file in (WEIGHTS, OPTIMIZER):
        assert (actual / file).read_bytes() == (expected / file).read_bytes()


def test_checkpoint_contains_no_pickle(three: Path) -> None:
    files = {path.name for path in (three / "step-00000003").iterdir()}
    assert files == {WEIGHTS, "adapter_config.json", OPTIMIZER, STATE, MANIFEST}


def test_incomplete_checkpoints_are_neither_counted_nor_deleted(three: Path, make: Callable[[int], Prepared]) -> None:
    save(make(1), three, 4)
    (three / "step-00000002" / STATE).unlink()
    with (three / "step-00000004" / WEIGHTS).open("ab") as file:
        file.write(b"x")
    (three / "step-00000005").mkdir()
    prune(three, 1)
    assert names(three) == ["step-00000002", "step-00000003", "step-00000004", "step-00000005"]


def test_checkpoint_with_an_incomplete_manifest_is_not_counted(three: Path) -> None:
    (three / "step-00000003" / OPTIMIZER).unlink()
    write_manifest(three / "step-00000003")
    prune(three, 1)
    assert names(three) == ["step-00000002", "step-00000003"]


@pytest.mark.parametrize("path", ["absolute", "relative", "link"])
def test_protected_checkpoint_is_not_pruned(
    three: Path, make: Callable[[int], Prepared], monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    protected = str(three / "step-00000001")
    if path == "relative":
        monkeypatch.chdir(three.parent)
        protected = f"{three.name}/../{three.name}/step-00000001/"
    elif path == "link":
        (three.parent / "link").symlink_to(three, target_is_directory=True)
        protected = str(three.parent / "link" / "step-00000001")
    save(make(1), three, 4, keep_last=1, protected=protected)
    assert names(three) == ["step-00000001", "step-00000004"]
    prune(three, 1, protected=["auto"])
    assert names(three) == ["step-00000004"]


# Disk space


def actual_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Return a function that sets the number of free bytes."""

    def set_to(count: int) -> None:
        monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda path: SimpleNamespace(free=count))

    return set_to


def test_disk_must_have_space_for_all_checkpoints_at_once(
    make: Callable[..., Prepared], tmp_path: Path, free: Callable[[int], None]
) -> None:
    """Those that are kept, the one being written, and the final adapter."""
    accelerator, model, optimizer = make(1, r=4096)
    checkpoint_bytes = actual_bytes(save((accelerator, model, optimizer), tmp_path / "sample", 1))
    adapter_bytes = (tmp_path / "sample" / "step-00000001" / WEIGHTS).stat().st_size
    folder = tmp_path / "run" / "checkpoints"
    folder.parent.mkdir()
    for keep_last in (2, 5):
        needed = (keep_last + 1) * checkpoint_bytes + adapter_bytes
        free(needed - 1)
        with pytest.raises(ConfigError, match=f"but {keep_last + 1} checkpoints of .* free up space") as caught:
            check_disk_space(accelerator, model, folder, keep_last)
        assert str(caught.value).startswith(f"output_dir: {folder.parent} has ")
        free(needed + checkpoint_bytes + (keep_last + 2) * METADATA_BYTES)
        check_disk_space(accelerator, model, folder, keep_last)
    assert not folder.exists()


def test_existing_checkpoints_reduce_the_needed_space(
    three: Path, make: Callable[[int], Prepared], free: Callable[[int], None]
) -> None:
    accelerator, model, _ = make(0)

    def needed_bytes(folder: Path) -> int:
        """Return how many bytes must be free, by bisection."""
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

    existing = sum(actual_bytes(three / name) for name in names(three))
    assert needed_bytes(three.parent / "empty") - needed_bytes(three) == existing > 0


def test_training_without_disk_space_fails_before_it_writes(
    make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="but 1000000001 checkpoints of"):
        run_training(make_config(checkpoint={"keep_last": 10**9}))
    assert not (tmp_path / "run").exists()


# Selecting


def test_auto_selects_the_newest(three: Path) -> None:
    selection = find_checkpoint(three, "auto")
    assert selection == CheckpointSelection(selection.checkpoint, None, None, {}, [])
    assert selection.checkpoint is not None
    assert selection.checkpoint.folder == three / "step-00000003"
    assert selection.checkpoint.state.items() > {"step": 3, "skipped": 0, "overflowed": 0}.items()
    assert newest(three).step == 3


def test_steps_are_compared_as_numbers(three: Path, make: Callable[[int], Prepared]) -> None:
    save(make(1), three, 99_999_999)
    save(make(1), three, 100_000_000)
    assert newest(three).step == 100_000_000


@pytest.mark.parametrize("folder", ["absent", "empty"])
def test_run_without_checkpoints_starts_from_step_0(tmp_path: Path, folder: str) -> None:
    (tmp_path / "empty").mkdir()
    for resume in ("auto", "never"):
        assert find_checkpoint(tmp_path / folder, resume) == CheckpointSelection(None, None, None, {}, [])


@pytest.mark.parametrize("file", [WEIGHTS, "adapter_config.json", OPTIMIZER, STATE, MANIFEST])
@pytest.mark.parametrize("damage", ["flipped", "gone"])
def test_corrupt_newest_checkpoint_is_skipped_and_reported(three: Path, file: str, damage: str) -> None:
    corrupt = three / "step-00000003" / file
    flip(corrupt) if damage == "flipped" else corrupt.unlink()
    if file == MANIFEST and damage == "flipped":
        corrupt.write_text("{")
    selection = find_checkpoint(three, "auto")
    assert selection.checkpoint is not None
    assert selection.checkpoint.step == 2
    assert list(selection.corrupt) == [three / "step-00000003"]
    assert selection.corrupt[three / "step-00000003"].startswith(f"{file} ")
    (line,) = quarantine(selection)
    assert line.startswith(f"skipped a corrupt checkpoint: step-00000003: {file} ")


def test_leftover_of_a_killed_save_is_not_a_checkpoint(three: Path) -> None:
    shutil.copytree(three / "step-00000003", three / ".step-00000004.lora-accel-writing")
    selection = find_checkpoint(three, "auto")
    assert selection.checkpoint is not None
    assert (selection.checkpoint.step, selection.corrupt) == (3, {})


def test_all_checkpoints_corrupt_raises(three: Path) -> None:
    for folder in three.iterdir():
        flip(folder / WEIGHTS)
    with pytest.raises(ArtifactError, match="every checkpoint is corrupt") as caught:
        find_checkpoint(three, "auto")
    assert all(f"step-0000000{step}: {WEIGHTS} is corrupt" in str(caught.value) for step in (1, 2, 3))
    assert names(three) == ["step-00000001", "step-00000002", "step-00000003"]


def test_corrupt_checkpoint_is_renamed_to_an_unused_name(three: Path, make: Callable[[int], Prepared]) -> None:
    prepared = make(1)
    for suffix in ("", "-2", "-3"):
        save(prepared, three, 3)
        flip(three / "step-00000003" / WEIGHTS)
        corrupt = (three / "step-00000003" / WEIGHTS).read_bytes()
        before = names(three)
        selection = find_checkpoint(three, "auto")
        assert names(three) == before, "selecting changes nothing"
        (line,) = quarantine(selection)
        assert line.endswith(f"; renamed to corrupt-step-00000003{suffix}")
        assert (three / f"corrupt-step-00000003{suffix}" / WEIGHTS).read_bytes() == corrupt
        assert newest(three).step == 2
    assert names(three)[:3] == ["corrupt-step-00000003", "corrupt-step-00000003-2", "corrupt-step-00000003-3"]


def test_all_checkpoints_quarantined_raises(three: Path) -> None:
    for folder in list(three.iterdir()):
        folder.rename(folder.with_name(f"corrupt-{folder.name}"))
    with pytest.raises(ArtifactError, match="every checkpoint is corrupt") as caught:
        find_checkpoint(three, "auto")
    assert all(f"corrupt-step-0000000{step}" in str(caught.value) for step in (1, 2, 3))
    (three / "corrupt-step-00000001").rename(three / "step-00000001")
    assert newest(three).step == 1


def test_named_checkpoint_is_selected_though_it_is_not_the_newest(three: Path) -> None:
    selection = find_checkpoint(three.parent / "elsewhere", str(three / "step-00000001"))
    assert selection.checkpoint is not None
    assert selection.checkpoint.step == 1
    assert selection.parent_hash == sha256_of(three / "step-00000001" / MANIFEST)
    assert (selection.corrupt, selection.superseded) == ({}, [])


def test_newer_checkpoints_of_another_branch_are_superseded(three: Path, make: Callable[[int], Prepared]) -> None:
    selection = find_checkpoint(three, str(three / "step-00000001"))
    assert selection.checkpoint is not None
    assert selection.checkpoint.step == 1
    assert selection.superseded == [three / "step-00000003", three / "step-00000002"]
    assert names(three) == ["step-00000001", "step-00000002", "step-00000003"], "selecting changes nothing"
    assert quarantine(selection) == [
        f"step-0000000{step} does not descend from the named checkpoint; renamed to superseded-step-0000000{step}"
        for step in (3, 2)
    ]
    assert names(three) == ["step-00000001", "superseded-step-00000002", "superseded-step-00000003"]
    assert why_invalid(three / "superseded-step-00000003") is None
    save(make(1), three, 3, begun_from="another")
    quarantine(find_checkpoint(three, str(three / "step-00000001")))
    assert "superseded-step-00000003-2" in names(three)


def test_descendants_of_the_named_checkpoint_are_preferred(three: Path, make: Callable[[int], Prepared]) -> None:
    """The same command resumes the run; it does not start again from the named checkpoint."""
    named, prepared = three / "step-00000001", make(1)
    parent_hash = sha256_of(named / MANIFEST)
    save(prepared, three, 4, begun_from=parent_hash)
    save(prepared, three, 5, begun_from=parent_hash)
    save(prepared, three, 6, begun_from="another")
    selection = find_checkpoint(three, str(named))
    assert selection.checkpoint is not None
    assert (selection.checkpoint.step, selection.parent_hash) == (5, parent_hash)
    assert selection.superseded == [three / "step-00000006"]

    flip(three / "step-00000005" / OPTIMIZER)
    selection = find_checkpoint(three, str(named))
    assert selection.checkpoint is not None
    assert selection.checkpoint.step == 4
    assert list(selection.corrupt) == [three / "step-00000005"]

    flip(three / "step-00000004" / OPTIMIZER)
    selection = find_checkpoint(three, str(named))
    assert selection.checkpoint is not None
    assert selection.checkpoint.step == 1, "only the named one is left, since its descendants are corrupt"
    assert set(selection.corrupt) == {three / "step-00000004", three / "step-00000005"}
    assert set(selection.superseded) == {three / f"step-0000000{step}" for step in (2, 3, 6)}


def test_parent_hash_is_kept_with_auto(three: Path, make: Callable[[int], Prepared]) -> None:
    save(make(1), three, 4, begun_from="0" * 64)
    assert find_checkpoint(three, "auto").parent_hash == "0" * 64


def test_corrupt_named_checkpoint_raises(three: Path) -> None:
    flip(three / "step-00000003" / OPTIMIZER)
    with pytest.raises(ArtifactError, match=r"step-00000003 cannot be used: optimizer.safetensors is corrupt"):
        find_checkpoint(three, str(three / "step-00000003"))


def test_missing_named_checkpoint_raises(three: Path) -> None:
    with pytest.raises(ArtifactError, match="is not a folder"):
        find_checkpoint(three, str(three / "step-00000009"))


def test_never_raises_if_there_are_checkpoints(three: Path) -> None:
    with pytest.raises(ArtifactError, match=r"resume=never, but .* contains 3 checkpoints"):
        find_checkpoint(three, "never")


# Loading


@pytest.mark.parametrize("damage", ["missing", "shape"])
def test_moments_of_other_parameters_raise(three: Path, make: Callable[[int], Prepared], damage: str) -> None:
    folder = three / "step-00000003"
    moments = load_file(folder / OPTIMIZER)
    name = next(iter(moments))
    moments[name] = moments[name][:1].contiguous()
    if damage == "missing":
        del moments[name]
    save_file(moments, folder / OPTIMIZER)
    sign(folder)
    assert why_invalid(folder) is None
    with pytest.raises(ArtifactError, match="are not the moments of the parameters that are trained here"):
        load_checkpoint(*make(0), newest(three))


@pytest.mark.parametrize(
    ("moment", "value", "reason"),
    [
        ("exp_avg.", "nan", "is not float32, or not finite"),
        ("exp_avg.", "inf", "is not float32, or not finite"),
        ("exp_avg_sq.", "nan", "is not float32, or not finite"),
        ("exp_avg.", "float16", "is not float32, or not finite"),
        ("exp_avg_sq.", "float64", "is not float32, or not finite"),
        ("exp_avg_sq.", "int32", "is not float32, or not finite"),
        ("exp_avg_sq.", "-1e-30", "has negative values, which this moment cannot have"),
        ("exp_avg.", "-1e-30", None),
    ],
)
def test_invalid_moments_raise(
    three: Path, make: Callable[[int], Prepared], moment: str, value: str, reason: str | None
) -> None:
    folder = three / "step-00000003"
    moments = load_file(folder / OPTIMIZER)
    name = next(name for name in moments if name.startswith(moment))
    if isinstance(getattr(torch, value, None), torch.dtype):
        moments[name] = moments[name].to(getattr(torch, value))
    else:
        moments[name].view(-1)[-1] = float(value)
    save_file(moments, folder / OPTIMIZER)
    sign(folder)
    if reason is None:
        load_checkpoint(*make(0), newest(three))
        return
    with pytest.raises(ArtifactError) as caught:
        load_checkpoint(*make(0), newest(three))
    assert str(caught.value) == f"{folder / OPTIMIZER}: {name} {reason}"


@pytest.mark.parametrize("skipped", [None, 0, 2])
def test_adam_counts_updates_without_skipped_steps(
    make: Callable[[int], Prepared], tmp_path: Path, skipped: int | None
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
def test_malformed_state_raises(three: Path, state: str) -> None:
    folder = three / "step-00000003"
    (folder / STATE).write_text(state)
    write_manifest(folder)
    with pytest.raises(ArtifactError, match=r"state\.json: "):
        find_checkpoint(three, "auto")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": "3"}, "step='3': input should be a valid integer"),
        ({"step": True}, "step=True: input should be a valid integer"),
        ({"step": 3.0}, r"step=3\.0: input should be a valid integer"),
        ({"step": 0}, "step=0: input should be greater than or equal to 1"),
        ({"step": -3}, "step=-3: "),
        ({"step": 10**400}, "step=1000"),
        ({"step": None}, "step=None: "),
        ({"step": 2}, "step=2, but the folder is step-00000003"),
        ({"skipped": -1}, "skipped=-1: "),
        ({"skipped": 4}, "skipped=4 and overflowed=0 are more than step=3"),
        ({"overflowed": False}, "overflowed=False: "),
        ({"examples": 1.5}, r"examples=1\.5: "),
        ({"seed": "0"}, "seed='0': "),
        ({"begun_from": 3}, "begun_from=3: "),
        ({"provenance": []}, r"provenance=\[\]: "),
        ({"loss_scale": {"value": "x"}}, "loss_scale.value"),
        ({"evaluations": [{"step": 1, "eval_loss": "low"}]}, r"evaluations\.0\.eval_loss"),
        (
            {"evaluations": [{"step": 3, "eval_loss": 1.0}]},
            r"evaluations has the steps \[3\], which are not increasing",
        ),
        ({"evaluations": [{"step": 2}, {"step": 1}]}, r"evaluations has the steps \[2, 1\], which are not increasing"),
        ({"steps": 3}, "steps is not a field that this version knows"),
        ({"files": {WEIGHTS: "0" * 64}}, f"{WEIGHTS} is not the file that was saved with this state"),
        ({"files": {"../x": "0" * 64}}, r"\.\./x is not the file"),
    ],
)
def test_forged_state_raises(three: Path, change: dict[str, Any], message: str) -> None:
    folder = three / "step-00000003"
    (folder / STATE).write_text(json.dumps(json.loads((folder / STATE).read_text()) | change))
    write_manifest(folder)
    with pytest.raises(ArtifactError, match=rf"step-00000003/state\.json: {message}"):
        find_checkpoint(three, "auto")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"step": 3, "step": 2}', "key 'step' appears twice"),
        ('{"step": 3, "seed": NaN}', "NaN is not JSON"),
        ('{"step": ' + "[" * 100_000, "nested too deeply"),
        ('{"step": ' + "9" * 5000 + "}", "cannot be read"),
        ('{"step": "' + "x" * 10_000_000 + '"}', "over 10,000,000 bytes"),
        ("\udcff", "cannot be read"),
    ],
)
def test_state_that_is_not_plain_json_raises(three: Path, text: str, message: str) -> None:
    folder = three / "step-00000003"
    (folder / STATE).write_bytes(text.encode(errors="surrogateescape"))
    write_manifest(folder)
    with pytest.raises(ArtifactError, match=rf"state\.json: .*{message}"):
        find_checkpoint(three, "auto")


def test_link_to_itself_is_not_valid(three: Path) -> None:
    file = three / "step-00000003" / OPTIMIZER
    file.unlink()
    file.symlink_to(OPTIMIZER)
    reason = why_invalid(three / "step-00000003")
    assert reason is not None
    assert reason.startswith(OPTIMIZER)


def test_weights_of_another_step_raise(make: Callable[[int], Prepared], tmp_path: Path) -> None:
    for step in (1, 2):
        save(make(step), tmp_path, step)
    shutil.copyfile(tmp_path / "step-00000001" / WEIGHTS, tmp_path / "step-00000002" / WEIGHTS)
    write_manifest(tmp_path / "step-00000002")
    with pytest.raises(ArtifactError, match=f"{WEIGHTS} is not the file that was saved with this state"):
        find_checkpoint(tmp_path, "auto")


@pytest.mark.parametrize(("name", "value"), [("examples", 9), ("epoch", 1), ("seed", 7)])
def test_state_that_does_not_follow_from_the_step_raises(
    make_config: Callable[..., RunConfig], name: str, value: int
) -> None:
    config = make_config(training={"max_steps": 2})
    run_training(config)
    run = Path(config.output_dir)
    shutil.rmtree(run / "adapter")
    folder = run / "checkpoints" / "step-00000002"
    (folder / STATE).write_text(json.dumps(json.loads((folder / STATE).read_text()) | {name: value}))
    write_manifest(folder)
    with pytest.raises(ArtifactError, match=rf"state\.json: {name}={value}, but after step 2 of this run it is"):
        run_training(config)
    if name != "seed":  # another input than the length may be another seed, too
        longer = make_config(training={"max_steps": 3}, checkpoint={"allow_changes": ["training.max_steps"]})
        with pytest.raises(ArtifactError, match=f"{name}={value}, but after step 2"):
            run_training(longer)


# Runs


def test_run_resumes_before_a_corrupt_checkpoint(
    make_config: Callable[..., RunConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config()
    run_training(config)
    folder = Path(config.output_dir)
    expected = (folder / "adapter" / WEIGHTS).read_bytes()
    shutil.rmtree(folder / "adapter")  # as if it had crashed before the end: a finished run has nothing to do
    flip(folder / "checkpoints" / "step-00000006" / WEIGHTS)
    run_training(config)
    assert "skipped a corrupt checkpoint: step-00000006" in capsys.readouterr().out
    assert [line["step"] for line in read_metrics(folder, "event") if line["event"] == "resume"] == [4]
    assert (folder / "adapter" / WEIGHTS).read_bytes() == expected
    assert why_invalid(folder / "checkpoints" / "step-00000006") is None


def test_run_with_resume_never_raises_if_it_has_checkpoints(make_config: Callable[..., RunConfig]) -> None:
    run_training(make_config())
    with pytest.raises(ArtifactError, match="resume=never"):
        run_training(make_config(checkpoint={"resume": "never"}))


def test_run_resumes_from_a_checkpoint_of_another_folder(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
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


def test_run_begun_from_its_own_named_checkpoint_resumes(
    make_config: Callable[..., RunConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(checkpoint={"keep_last": 5})
    run_training(config)
    folder = Path(config.output_dir)
    named = folder / "checkpoints" / "step-00000002"
    parent_hash = sha256_of(named / MANIFEST)
    restarted = make_config(
        checkpoint={"keep_last": 1, "resume": str(named), "allow_changes": ["training.learning_rate"]},
        training={"learning_rate": 1e-2},
    )
    run_training(restarted)
    assert f"resuming after step 2 from {named}" in capsys.readouterr().out
    assert names(folder / "checkpoints") == [
        "step-00000002",
        "step-00000006",
        "superseded-step-00000004",
        "superseded-step-00000006",
    ]
    state = json.loads((folder / "checkpoints" / "step-00000006" / STATE).read_text())
    assert state["begun_from"] == parent_hash
    assert [line["step"] for line in read_metrics(folder)] == [1, 2, 3, 4, 5, 6]
    adapter = (folder / "adapter" / WEIGHTS).read_bytes()

    shutil.rmtree(folder / "adapter")
    run_training(restarted)
    assert f"resuming after step 6 from {folder / 'checkpoints' / 'step-00000006'}" in capsys.readouterr().out
    assert (folder / "adapter" / WEIGHTS).read_bytes() == adapter

    # With resume=auto and more epochs, new checkpoints still record the parent.
    more = make_config(
        checkpoint={"allow_changes": ["training"]}, training={"learning_rate": 1e-2, "epochs": 2, "warmup_steps": 0}
    )
    run_training(more)
    state = json.loads((folder / "checkpoints" / "step-00000012" / STATE).read_text())
    assert state["begun_from"] == parent_hash


def test_run_begun_from_the_last_checkpoint_can_be_repeated(
    make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """It only writes its adapter, and has no checkpoint of its own."""
    run_training(make_config())
    named = tmp_path / "run" / "checkpoints" / "step-00000006"
    config = make_config(output_dir=str(tmp_path / "repeated"), checkpoint={"resume": str(named)})
    adapter = (run_training(config) / WEIGHTS).read_bytes()
    assert (run_training(config) / WEIGHTS).read_bytes() == adapter


def test_unfinished_run_keeps_two_checkpoints(
    make_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newest one may become corrupt; only a finished run needs no other."""
    config = make_config(checkpoint={"keep_last": 1})
    fault = faults.Fault("export.mid", 1, "enospc", None)
    monkeypatch.setattr(faults, "active_fault", lambda: fault)
    with pytest.raises(TrainingError, match="saving the final adapter failed on rank 0"):
        run_training(config)
    assert names(Path(config.output_dir) / "checkpoints") == ["step-00000004", "step-00000006"]
    run_training(config)
    assert names(Path(config.output_dir) / "checkpoints") == ["step-00000006"]


@pytest.mark.parametrize("point", ["save.begin", "save.mid_file", "save.before_manifest", "save.before_rename"])
def test_full_disk_while_saving_keeps_earlier_checkpoints(
    make_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, point: str
) -> None:
    run_training(make_config(output_dir=str(tmp_path / "uninterrupted")))
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
    expected = (tmp_path / "uninterrupted" / "adapter" / WEIGHTS).read_bytes()
    assert (folder / "adapter" / WEIGHTS).read_bytes() == expected


@pytest.mark.sample(6)
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
def test_disallowed_change_raises_with_the_options_that_allow_it(
    make_config: Callable[..., RunConfig], changes: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config()
    run_training(config)
    folder = Path(config.output_dir)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(ArtifactError, match="was created with different inputs") as caught:
        run_training(make_config(**changes))
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    options = re.search(r"'checkpoint\.allow_changes=\[([^\]]+)\]'$", str(caught.value))
    assert options is not None
    reported = re.findall(r"^  ([^\s:]+): (.* -> .*)$", str(caught.value), re.MULTILINE)
    allowed = options[1].split(", ")
    for missing in allowed if len(allowed) > 1 else []:
        others = [option for option in allowed if option != missing]
        with pytest.raises(ArtifactError, match="was created with different inputs"):
            run_training(make_config(**changes, checkpoint={"allow_changes": others}))
    capsys.readouterr()
    run_training(make_config(**changes, checkpoint={"allow_changes": allowed}))
    stdout = capsys.readouterr().out
    assert reported
    for key, values in reported:
        assert f"changed, allowed by checkpoint.allow_changes:  {key}: {values}\n" in stdout


def test_checkpoint_deleted_while_listing_is_omitted(three: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run in progress prunes its checkpoints."""
    why_invalid = listing.why_invalid

    def deleting_why_invalid(folder: Path, **options: Any) -> str | None:
        reason = why_invalid(folder, **options)
        if folder.name == "step-00000001":
            shutil.rmtree(folder)
        return reason

    monkeypatch.setattr(listing, "why_invalid", deleting_why_invalid)
    assert [entry.step for entry in list_checkpoints(three.parent, hashes=True)] == [2, 3]
