"""The precision of a run: set in the config, by the launcher, by a checkpoint, or by the device."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from lora_accel import run_training
from lora_accel.config.schema import ModelSection, RunConfig
from lora_accel.errors import ArtifactError
from lora_accel.model.base import choose_dtype
from lora_accel.model.device import detect_device, native_dtypes, native_precision
from lora_accel.saving.atomic import write_manifest
from lora_accel.saving.discovery import KeptSettings, kept_settings
from tests.conftest import read_metrics

NATIVE = native_dtypes(detect_device(torch.device("cpu")))
needs_bf16_emulation = pytest.mark.skipif(torch.bfloat16 in NATIVE, reason="this CPU computes bfloat16 natively")


def losses(config: RunConfig) -> list[float]:
    return [line["loss"] for line in read_metrics(Path(config.output_dir))]


def delete_checkpoint(config: RunConfig, step: int) -> None:
    """Delete a checkpoint and the adapter, so that the run resumes from an earlier checkpoint."""
    folder = Path(config.output_dir)
    shutil.rmtree(folder / "checkpoints" / f"step-{step:08d}")
    shutil.rmtree(folder / "adapter")


def test_new_run_uses_the_precision_of_the_device(make_config: Callable[..., RunConfig]) -> None:
    config = make_config(training={"mixed_precision": "auto", "max_steps": 1})
    run_training(config)
    provenance = json.loads((Path(config.output_dir) / "provenance.json").read_text())
    precision, _ = native_precision(detect_device())
    assert provenance["mixed_precision"] == precision
    assert provenance["base_dtype"] == {"bf16": "bfloat16", "fp16": "float16", "no": "float32"}[precision]


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_resumed_run_keeps_the_precision_of_its_checkpoint(
    make_config: Callable[..., RunConfig], tmp_path: Path, precision: str
) -> None:
    def config(name: str, mixed_precision: str) -> RunConfig:
        training = {"mixed_precision": mixed_precision, "max_steps": 4, "learning_rate": 1e-3}
        return make_config(output_dir=str(tmp_path / name), training=training)

    run_training(config("uninterrupted", precision))
    run_training(config("resumed", precision))
    delete_checkpoint(config("resumed", precision), 4)
    run_training(config("resumed", "auto"))
    events = [(line["event"], line["step"]) for line in read_metrics(tmp_path / "resumed", "event")]
    assert ("resume", 2) in events
    assert losses(config("resumed", "auto")) == losses(config("uninterrupted", precision))
    kept = kept_settings(tmp_path / "resumed" / "checkpoints", "auto")
    assert kept == kept_settings(tmp_path / "uninterrupted" / "checkpoints", "auto")
    assert kept is not None
    assert kept.mixed_precision == precision


def test_precision_comes_from_the_checkpoint_to_resume_from(
    make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    for name, precision in (("first", "no"), ("second", "bf16")):
        training = {"max_steps": 2, "mixed_precision": precision}
        run_training(make_config(output_dir=str(tmp_path / name), training=training))
        AcceleratorState._reset_state(reset_partial_state=True)  # as in a new process
    checkpoint = str(tmp_path / "first" / "checkpoints" / "step-00000002")
    kept = kept_settings(tmp_path / "second" / "checkpoints", checkpoint)
    assert kept is not None
    assert kept.mixed_precision == "no"


def test_different_precision_than_the_checkpoint_is_an_error(make_config: Callable[..., RunConfig]) -> None:
    config = make_config(training={"max_steps": 4})
    run_training(config)
    delete_checkpoint(config, 4)
    AcceleratorState._reset_state(reset_partial_state=True)  # as in a new process
    with pytest.raises(ArtifactError, match=r"training\.mixed_precision: 'no' -> 'bf16'"):
        run_training(make_config(training={"max_steps": 4, "mixed_precision": "bf16"}))


@needs_bf16_emulation
def test_bf16_base_is_loaded_in_float32_if_bf16_is_emulated(
    make_config: Callable[..., RunConfig], tiny_model: Callable[..., Path]
) -> None:
    model = {"name_or_path": str(tiny_model(dtype=torch.bfloat16))}
    config = make_config(model=model, training={"mixed_precision": "auto", "max_steps": 2})
    run_training(config)
    provenance = json.loads((Path(config.output_dir) / "provenance.json").read_text())
    assert (provenance["mixed_precision"], provenance["base_dtype"]) == ("no", "float32")


def test_checkpoint_without_dtype_was_trained_as_stored(
    make_config: Callable[..., RunConfig], tiny_model: Callable[..., Path]
) -> None:
    """Checkpoints of older versions have no dtype."""
    model = {"name_or_path": str(tiny_model(dtype=torch.bfloat16)), "dtype": "auto"}
    config = make_config(model=model, training={"max_steps": 4})
    run_training(config)
    delete_checkpoint(config, 4)
    state_file = Path(config.output_dir) / "checkpoints" / "step-00000002" / "state.json"
    state: dict[str, Any] = json.loads(state_file.read_text())
    del state["provenance"]["base_dtype"], state["overflowed"], state["loss_scale"]
    state_file.write_text(json.dumps(state))
    write_manifest(state_file.parent)
    assert kept_settings(state_file.parent.parent, "auto") == KeptSettings("no", "auto", False, 256)
    run_training(config)
    provenance = json.loads((Path(config.output_dir) / "provenance.json").read_text())
    assert provenance["base_dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("dtype", "precision", "kept", "expected"),
    [
        ("float16", "no", None, torch.float16),
        ("float32", "bf16", "bfloat16", torch.float32),
        ("auto", "bf16", None, torch.bfloat16),
        ("auto", "fp16", "float32", torch.float16),
        ("auto", "no", "bfloat16", torch.bfloat16),
        ("auto", "no", "float32", torch.float32),
        ("auto", "no", "auto", torch.bfloat16),
        ("auto", "no", None, torch.bfloat16 if torch.bfloat16 in NATIVE else torch.float32),
    ],
)
def test_precedence_of_the_base_dtype(
    tiny_model: Callable[..., Path], dtype: str, precision: str, kept: str | None, expected: object
) -> None:
    section = ModelSection.model_validate({"name_or_path": str(tiny_model(dtype=torch.bfloat16)), "dtype": dtype})
    assert choose_dtype(section, precision, torch.device("cpu"), kept) == expected


@needs_bf16_emulation
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_emulated_precision_prints_a_warning(
    make_config: Callable[..., RunConfig], capsys: pytest.CaptureFixture[str], precision: str
) -> None:
    run_training(make_config(training={"mixed_precision": precision, "max_steps": 1}))
    output = capsys.readouterr().err
    name = {"bf16": "bfloat16", "fp16": "float16"}[precision]
    assert f"warning: this CPU emulates {name}: a matrix product takes " in output
    assert "training.mixed_precision=auto" in output
