"""DeepSpeed ZeRO with two and three real processes: the same run, whatever is partitioned, saved whole and resumed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lora_accel import run_training
from lora_accel.config.schema import RunConfig
from tests.conftest import read_metrics
from tests.distributed.forked import Forks
from tests.distributed.launching import TRAIN

pytestmark = pytest.mark.distributed


@pytest.fixture
def config(make_config: Callable[..., RunConfig], tiny_model: Callable[..., Path], tmp_path: Path) -> RunConfig:
    """A run on GPT-2 with biases, so that there are two groups of parameters, with every step kept."""
    return make_config(
        output_dir=str(tmp_path / "one"),
        model={"name_or_path": str(tiny_model("gpt2"))},
        adapter={"bias": "all"},
        training={"micro_batch_tokens": 100, "learning_rate": 1e-3, "weight_decay": 0.1},
        checkpoint={"every_steps": 1, "keep_last": 9},
    )


def forget_after(folder: Path, step: int) -> None:
    """Make a finished run look as if it had been stopped after a step."""
    for checkpoint in (folder / "checkpoints").iterdir():
        if int(checkpoint.name.removeprefix("step-")) > step:
            shutil.rmtree(checkpoint)
    shutil.rmtree(folder / "adapter")


def tensors(folder: Path, name: str = "adapter/adapter_model.safetensors") -> dict[str, torch.Tensor]:
    return dict(load_file(folder / name))


def test_a_run_goes_on_under_any_backend(
    forks: Forks, config: RunConfig, config_file: Callable[[RunConfig], Path], tmp_path: Path
) -> None:
    """Begun on one process, on under ZeRO-3 on three (which do not divide the tensors), ZeRO-2 on two, one again."""
    run_training(config)
    moving, file = tmp_path / "moving", config_file(config)
    shutil.copytree(tmp_path / "one", moving)
    for step, preset, processes in ((2, "cpu_zero3", "3"), (3, "cpu_zero2", "2"), (4, "zero2_offload", "2")):
        forget_after(moving, step)
        options = ("--num_processes", processes, "--mixed_precision", "no")
        ran = forks.launch(*options, *TRAIN, file, f"output_dir={moving}", preset=preset)
        assert ran.returncode == 0, ran.stderr[-3000:]
        assert f"resuming after step {step}" in ran.stdout
    forget_after(moving, 5)
    run_training(RunConfig.model_validate(config.model_dump() | {"output_dir": str(moving)}))

    assert [line["step"] for line in read_metrics(moving, "event")] == [0, 2, 3, 4, 5, 6]
    for expected, found in zip(read_metrics(tmp_path / "one"), read_metrics(moving), strict=True):
        for key in ("loss", "grad_norm", "learning_rate"):
            assert found[key] == pytest.approx(expected[key], rel=1e-5)
    for file_name in ("adapter_model.safetensors", "optimizer.safetensors"):
        expected_state = tensors(tmp_path / "one", f"checkpoints/step-00000006/{file_name}")
        state = tensors(moving, f"checkpoints/step-00000006/{file_name}")
        assert state.keys() == expected_state.keys()
        for name, tensor in state.items():
            if "attn.c_attn.base_layer.bias" not in name:  # a key's bias moves no logit: its gradient is all rounding
                assert (tensor - expected_state[name]).norm() <= 1e-4 * expected_state[name].norm(), name


@pytest.mark.parametrize("preset", ["zero1", "cpu_zero2", "cpu_zero3"])
def test_a_resumed_run_is_the_straight_one_bit_for_bit(
    forks: Forks, config: RunConfig, config_file: Callable[[RunConfig], Path], preset: str, tmp_path: Path
) -> None:
    """Also in bf16, where the float32 masters hold what the parameters do not."""
    words: list[Any] = ["--mixed_precision", "bf16", "--num_processes", "2", *TRAIN, config_file(config)]
    for folder in ("straight", "resumed"):
        ran = forks.launch(*words, f"output_dir={tmp_path / folder}", preset=preset)
        assert ran.returncode == 0, ran.stderr[-3000:]
        if folder == "straight":
            shutil.copytree(tmp_path / "straight", tmp_path / "resumed")
            forget_after(tmp_path / "resumed", 3)
    straight, resumed = tensors(tmp_path / "straight"), tensors(tmp_path / "resumed")
    assert any(not torch.equal(x, x.bfloat16().float()) for x in straight.values()), "masters are saved, not copies"
    assert straight.keys() == resumed.keys()
    for name, tensor in straight.items():
        assert torch.equal(tensor, resumed[name]), name
    both = [[line["loss"] for line in read_metrics(tmp_path / folder)] for folder in ("straight", "resumed")]
    assert both[0] == both[1]


def test_evaluation_and_replies_under_zero3_are_those_of_one_process(
    forks: Forks, make_config: Callable[..., RunConfig], config_file: Callable[[RunConfig], Path], tmp_path: Path
) -> None:
    evaluation = {"prompts": ["say alpha", "say bravo and more than that"], "max_new_tokens": 5, "every_steps": 3}
    config = make_config(
        output_dir=str(tmp_path / "one"), evaluation=evaluation, data={"eval_fraction": 0.2}, training={"epochs": 1.0}
    )
    run_training(config)
    ran = forks.launch(*TRAIN, config_file(config), f"output_dir={tmp_path / 'two'}", preset="cpu_zero3")
    assert ran.returncode == 0, ran.stderr[-3000:]
    one, two = (read_metrics(tmp_path / name, "eval") for name in ("one", "two"))
    assert [line["eval_loss"] for line in two] == pytest.approx([line["eval_loss"] for line in one], rel=1e-5)
    replies = [
        [line["reply"] for line in read_metrics(tmp_path / name, "event") if line["event"] == "reply"]
        for name in ("one", "two")
    ]
    assert replies[0] == replies[1]
    assert len(replies[0]) == 4


def test_whole_modules_are_trained_and_gathered_under_zero3(
    forks: Forks, make_config: Callable[..., RunConfig], config_file: Callable[[RunConfig], Path], tmp_path: Path
) -> None:
    """With activations recomputed in the backward pass, where ZeRO-3 gathers the layer again."""
    config = make_config(
        output_dir=str(tmp_path / "one"), adapter={"modules_to_save": ["lm_head"]}, training={"learning_rate": 1e-3}
    )
    run_training(config)
    words = (f"output_dir={tmp_path / 'two'}", "training.activation_checkpointing=true")
    ran = forks.launch(*TRAIN, config_file(config), *words, preset="cpu_zero3")
    assert ran.returncode == 0, ran.stderr[-3000:]
    one, two = tensors(tmp_path / "one"), tensors(tmp_path / "two")
    assert one.keys() == two.keys()
    assert "base_model.model.lm_head.weight" in one
    for name, tensor in one.items():
        assert (tensor - two[name]).norm() <= 1e-4 * tensor.norm(), name


@pytest.mark.parametrize("preset", ["cpu_ddp", "cpu_zero2"])
def test_qlora_runs_on_two_processes(
    forks: Forks,
    make_config: Callable[..., RunConfig],
    config_file: Callable[[RunConfig], Path],
    preset: str,
    tmp_path: Path,
) -> None:
    """nf4 and its scales in blocks: products in bfloat16, so equal up to their rounding."""
    config = make_config(
        output_dir=str(tmp_path / "one"), quantization={"bits": 4}, training={"learning_rate": 1e-3, "warmup_steps": 1}
    )
    run_training(config)
    ran = forks.launch(*TRAIN, config_file(config), f"output_dir={tmp_path / 'two'}", preset=preset)
    assert ran.returncode == 0, ran.stderr[-3000:]
    for expected, found in zip(read_metrics(tmp_path / "one"), read_metrics(tmp_path / "two"), strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-3)
    assert tensors(tmp_path / "one").keys() == tensors(tmp_path / "two").keys()
