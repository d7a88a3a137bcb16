"""Every optimizer and schedule resumes exactly; no knob makes the result depend on micro-batches."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_accel import RunConfig, run_training
from lora_accel.config.optimizers import OPTIMIZERS, Moment
from lora_accel.config.schedules import SCHEDULES
from lora_accel.errors import ArtifactError
from lora_accel.saving.atomic import write_manifest
from lora_accel.saving.discovery import OPTIMIZER, STATE, WEIGHTS
from tests.conftest import read_metrics, reset_accelerator

KNOBS: dict[str, Any] = {
    "scheduler": "wsd",
    "scheduler_options": {"decay_ratio": 0.5, "min_ratio": 0.2},
    "optimizer_options": {"betas": [0.8, 0.95], "eps": 1e-6},
    "embedding_learning_rate": 1e-4,
    "label_smoothing": 0.1,
    "neftune_alpha": 5.0,
    "max_grad_norm": None,
    "learning_rate": 1e-3,
    "max_steps": 4,
}
"""All knobs at once, in `training`."""
KNOBS_OF_ADAPTER: dict[str, Any] = {"loraplus_ratio": 4.0, "modules_to_save": ["lm_head"]}

Train = Callable[..., Path]


@pytest.fixture
def train(make_config: Callable[..., RunConfig], tmp_path: Path) -> Train:
    """Return a function that trains in a folder with a name, and returns the folder."""

    def train(name: str, **changes: Any) -> Path:
        reset_accelerator()
        changes["checkpoint"] = {"every_steps": 1, "keep_last": 9}
        run_training(make_config(output_dir=str(tmp_path / name), **changes))
        return tmp_path / name

    return train


def rewind(folder: Path, step: int) -> None:
    """Make a finished run look as if it had stopped after a step."""
    for checkpoint in sorted((folder / "checkpoints").iterdir())[step:]:
        shutil.rmtree(checkpoint)
    shutil.rmtree(folder / "adapter")


def result(folder: Path) -> tuple[list[Any], bytes, bytes]:
    """Return what must be equal bit for bit: losses and rates, weights, moments."""
    last = sorted((folder / "checkpoints").iterdir())[-1]
    lines = [(line["step"], line["loss"], line["grad_norm"], line["learning_rate"]) for line in read_metrics(folder)]
    return lines, (last / WEIGHTS).read_bytes(), (last / OPTIMIZER).read_bytes()


@pytest.mark.parametrize("optimizer", [*OPTIMIZERS])
def test_every_optimizer_resumes_bitwise(train: Train, optimizer: str) -> None:
    """Matrices of 4096 values and more have 8-bit moments, smaller ones do not."""
    spec = OPTIMIZERS[optimizer]
    changes: dict[str, Any] = {
        "adapter": {"r": 128, "alpha": 128, "target_modules": ["q_proj", "v_proj"]},
        "training": {"optimizer": optimizer, "max_steps": 4, "weight_decay": 0.1, "learning_rate": 1e-3},
    }
    folder = train("run", **changes)
    straight = result(folder)
    moments = load_file(folder / "checkpoints" / "step-00000004" / OPTIMIZER)
    weights = load_file(folder / "checkpoints" / "step-00000004" / WEIGHTS)
    assert {name.split(".")[0] for name in moments} <= set(spec.moments)
    assert sum(tensor.nbytes for tensor in moments.values()) == sum(
        moment.num_bytes for tensor in weights.values() for moment in spec.moments_of(tuple(tensor.shape)).values()
    )
    assert any(tensor.dtype == torch.uint8 for tensor in moments.values()) == ("8bit" in optimizer)
    assert all(tensor.float().count_nonzero() for tensor in moments.values()), "every moment was updated"
    rewind(folder, 2)
    train("run", **changes)
    assert [line["step"] for line in read_metrics(folder, "event")] == [0, 2, 4]
    assert result(folder) == straight


@pytest.mark.parametrize("scheduler", [*SCHEDULES])
@pytest.mark.sample(2)
def test_every_schedule_resumes_bitwise(train: Train, scheduler: str) -> None:
    changes = {"training": {"scheduler": scheduler, "max_steps": 3}}
    straight = result(train("run", **changes))
    rewind(train("run", **changes), 1)
    assert result(train("run", **changes)) == straight


def test_all_knobs_resume_bitwise_and_do_not_depend_on_micro_batches(train: Train) -> None:
    changes: dict[str, Any] = {"adapter": KNOBS_OF_ADAPTER}
    variants: dict[str, dict[str, Any]] = {
        "by tokens": {"training": KNOBS | {"micro_batch_tokens": 90}},
        "single": {"training": KNOBS | {"batch_size": 4, "micro_batch_tokens": 1, "activation_checkpointing": True}},
        "padded": {"training": KNOBS, "data": {"packing": False}},
    }
    folders = {name: train(name, **changes | variant) for name, variant in variants.items()}
    expected = [(line["loss"], line["grad_norm"]) for line in read_metrics(folders["by tokens"])]
    adapter = load_file(folders["by tokens"] / "adapter" / WEIGHTS)
    for name in ("single", "padded"):
        lines = read_metrics(folders[name])
        assert [line["loss"] for line in lines] == pytest.approx([loss for loss, _ in expected], rel=1e-6), name
        assert [line["grad_norm"] for line in lines] == pytest.approx([norm for _, norm in expected], rel=1e-5), name
        for key, tensor in load_file(folders[name] / "adapter" / WEIGHTS).items():
            assert (tensor - adapter[key]).norm() <= 1e-4 * adapter[key].norm(), (name, key)
    straight = result(folders["by tokens"])
    assert [rate for *_, rate in straight[0]] == pytest.approx([1e-3, 1e-3, 1e-3, 6e-4]), "the base rate is logged"
    rewind(folders["by tokens"], 2)
    assert result(train("by tokens", **changes | variants["by tokens"])) == straight


@pytest.mark.parametrize(
    ("section", "option", "value"),
    [
        ("training", "scheduler_options", {"min_ratio": 0.3, "decay_ratio": 0.5}),
        ("training", "optimizer_options", {"betas": [0.8, 0.9], "eps": 1e-6}),
        ("training", "embedding_learning_rate", 1e-2),
        ("training", "label_smoothing", 0.2),
        ("training", "neftune_alpha", 6.0),
        ("training", "max_grad_norm", 1e-3),
        ("adapter", "loraplus_ratio", 8.0),
    ],
)
@pytest.mark.sample(2)
def test_a_changed_knob_is_an_error_on_resume(train: Train, section: str, option: str, value: Any) -> None:
    changes: dict[str, Any] = {"adapter": KNOBS_OF_ADAPTER, "training": KNOBS}
    rewind(train("run", **changes), 2)
    changed = {**changes, section: changes[section] | {option: value}}
    with pytest.raises(ArtifactError, match=f"{section}\\.{option}.* -> "):
        train("run", **changed)


@pytest.mark.parametrize("damage", ["dtype", "shape", "negative"])
def test_invalid_8bit_moments_are_an_error(train: Train, damage: str) -> None:
    changes: dict[str, Any] = {
        "adapter": {"r": 128, "target_modules": ["q_proj"]},
        "training": {"optimizer": "adamw_8bit", "max_steps": 2},
    }
    folder = train("run", **changes)
    rewind(folder, 1)
    checkpoint = folder / "checkpoints" / "step-00000001"
    moments = load_file(checkpoint / OPTIMIZER)
    name = next(name for name in moments if name.startswith("state1" if damage == "dtype" else "absmax2"))
    moments[name] = {
        "dtype": lambda x: x.float(),
        "shape": lambda x: x[:-1].clone(),
        "negative": lambda x: -x - 1,
    }[damage](moments[name])
    save_file(moments, checkpoint / OPTIMIZER)
    state = json.loads((checkpoint / STATE).read_text())
    state.pop("files")
    (checkpoint / STATE).write_text(json.dumps(state))
    write_manifest(checkpoint)
    reasons = {"dtype": "is not uint8", "shape": r"has shape \(\d+,\), expected is", "negative": "has negative values"}
    with pytest.raises(ArtifactError, match=reasons[damage]):
        train("run", **changes)


def test_label_smoothing_changes_training_only(train: Train) -> None:
    """At a rate of almost 0, evaluation gives the loss of the initial model."""
    changes: dict[str, Any] = {"data": {"eval_fraction": 0.2}, "adapter": {"dropout": 0.0}}
    # NEFTune turns sharing off, which rounds differently.
    training = {"max_steps": 1, "learning_rate": 1e-30, "share_prefixes": False}
    plain = train("plain", training=training, **changes)
    knobs = train("knobs", training=training | {"label_smoothing": 0.2, "neftune_alpha": 50.0}, **changes)
    losses = [[line["eval_loss"] for line in read_metrics(folder, "eval")][-1] for folder in (plain, knobs)]
    assert losses[0] == losses[1]
    assert read_metrics(plain)[0]["loss"] != read_metrics(knobs)[0]["loss"]


def test_noise_on_a_quantized_base(train: Train) -> None:
    training = {"max_steps": 2, "neftune_alpha": 50.0, "activation_checkpointing": True}
    quantization = {"bits": 4}
    folder = train("noise", training=training, quantization=quantization)
    without = train("without", training=training | {"neftune_alpha": None}, quantization=quantization)
    assert [line["loss"] for line in read_metrics(folder)] != [line["loss"] for line in read_metrics(without)]


def test_without_clipping_the_update_is_that_of_a_large_limit(train: Train) -> None:
    folders = [
        train(str(limit), training={"optimizer": "sgd", "max_steps": 3, "max_grad_norm": limit})
        for limit in (None, 1e9, 1e-3)
    ]
    results = [result(folder) for folder in folders]
    assert results[0] == results[1]
    assert results[0] != results[2]


def test_sizes_of_moments() -> None:
    def sizes(optimizer: str, *shape: int) -> dict[str, Moment]:
        return dict(OPTIMIZERS[optimizer].moments_of(shape))

    codes, scales = Moment((65, 64), "uint8"), Moment((17,))
    assert sizes("adamw_8bit", 65, 64) == {"state1": codes, "state2": codes, "absmax1": scales, "absmax2": scales}
    assert sizes("adamw_8bit", 63, 64) == dict.fromkeys(("state1", "state2"), Moment((63, 64)))
    assert sizes("adafactor", 3, 5) == {"row_var": Moment((3, 1)), "col_var": Moment((1, 5))}
    assert sizes("adafactor", 5) == {"variance": Moment((5,))}
    assert (codes.num_bytes, scales.num_bytes) == (65 * 64, 68)
