"""Adapters that cannot be merged: an error that names the option, before anything is written; aLoRA in a run."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from lora_accel import RunConfig, run_training
from lora_accel.batching.packing import pad
from lora_accel.config.schema import AdapterSection
from lora_accel.data.chat import Example
from lora_accel.data.store import Examples
from lora_accel.errors import ArtifactError, ConfigError
from lora_accel.inference.evaluation import evaluate
from lora_accel.merging.merge import merge_adapter, merge_checkpoints, merge_weighted
from lora_accel.model.adapter import add_adapter, trainable_parameters
from lora_accel.model.fused_loss import patch_fused_loss
from lora_accel.saving.attach import keeps_base_weights
from lora_accel.setup.sizes import num_with
from lora_accel.training.loss import summed_token_loss
from tests.conftest import CommandResult, read_metrics
from tests.families import model_of

KINDS = {
    "alora_invocation_tokens": ({"alora_invocation_tokens": [7]}, "aLoRA cannot be merged"),
    "layer_replication": ({"layer_replication": [[0, 2], [1, 2]]}, "an adapter of replicated layers cannot be merged"),
}
INVOCATION = 7


@pytest.fixture
def save_adapter_of_peft(tiny_model: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """Return a function that saves an adapter with PEFT and returns its folder."""

    def save(**options: Any) -> Path:
        base = AutoModelForCausalLM.from_pretrained(tiny_model())
        config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], **options)
        get_peft_model(base, config).save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
        return tmp_path / "adapter"

    return save


@pytest.mark.parametrize("verify", [True, False, None])
@pytest.mark.parametrize("name", KINDS)
def test_merge_is_an_error_before_anything_is_written(
    save_adapter_of_peft: Callable[..., Path], tmp_path: Path, name: str, verify: bool | None
) -> None:
    options, message = KINDS[name]
    adapter = save_adapter_of_peft(**options)
    with pytest.raises(ArtifactError, match=f"{name}: {message}"):
        merge_adapter(adapter, tmp_path / "merged", verify=verify)
    other = shutil.copytree(adapter, tmp_path / "other")
    with pytest.raises(ArtifactError, match=message):
        merge_weighted([(adapter, 1.0), (other, 0.5)], tmp_path / "merged", verify=verify)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "other"}


@pytest.mark.parametrize("verify", [True, False])
def test_lora_bias_of_a_layer_without_bias_is_an_error(
    save_adapter_of_peft: Callable[..., Path], tmp_path: Path, verify: bool
) -> None:
    adapter = save_adapter_of_peft(lora_bias=True)
    with pytest.raises(ArtifactError, match=r"lora_bias: model\.layers\.0\.self_attn\.q_proj has no bias"):
        merge_adapter(adapter, tmp_path / "merged", verify=verify)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_command_exits_with_2(
    command: Callable[..., CommandResult], save_adapter_of_peft: Callable[..., Path], tmp_path: Path
) -> None:
    adapter = save_adapter_of_peft(**KINDS["layer_replication"][0])
    result = command("merge", adapter, tmp_path / "merged", "--no-verify")
    assert result.returncode == 2
    assert "layer_replication: an adapter of replicated layers cannot be merged" in result.stderr
    assert not (tmp_path / "merged").exists()


def test_adapter_that_truncates_the_base_changes_it(save_adapter_of_peft: Callable[..., Path]) -> None:
    if Version(peft.__version__) < Version("0.21"):
        pytest.skip(f"PEFT {peft.__version__} has no KaSA")
    assert not keeps_base_weights(save_adapter_of_peft(kasa_config={}))


def test_alora_of_padded_rows_is_that_of_each_row() -> None:
    """The adapter changes the tokens from the last invocation on, counted from the end of the padded row."""
    section = AdapterSection(
        target_modules=["q_proj", "down_proj"],
        alora_invocation_tokens=[INVOCATION],
        dropout=0.0,
        init_lora_weights=False,
    )
    rows = [[5, INVOCATION, 8, 9, 10], [5, 8, INVOCATION, 6, 5, 4, 3, 11], [1, 2, 3]]  # the last one without
    examples = [Example(ids, [-100, *ids[1:]]) for ids in rows]
    losses, gradients = [], []
    for batches in ([examples], [[example] for example in examples]):
        model = add_adapter(model_of("llama"), section, seed=0, autocast=False)
        patch_fused_loss(model.get_base_model())
        loss = sum(summed_token_loss(model, pad(batch, 0)) for batch in batches)
        assert isinstance(loss, torch.Tensor)
        loss.backward()
        losses.append(loss.item())
        gradients.append([parameter.grad for parameter in trainable_parameters(model).values()])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for together, alone in zip(*gradients, strict=True):
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-6)


def test_alora_run_is_evaluated_as_in_training_and_not_merged(
    make_config: Callable[..., RunConfig], tokenizer: Any
) -> None:
    config = make_config(
        adapter={"alora_invocation_tokens": tokenizer.encode("<|im_start|>"), "dropout": 0.0},
        data={"packing": False, "eval_fraction": 0.2},
        training={"max_steps": 2},
    )
    adapter = run_training(config)
    _, in_training = read_metrics(Path(config.output_dir), "eval")
    packed = config.model_copy(update={"data": config.data.model_copy(update={"packing": True})})
    score = evaluate(packed, adapters=[adapter], max_new_tokens=1)[1]
    assert score.eval_loss == pytest.approx(in_training["eval_loss"], rel=1e-5)
    with pytest.raises(ArtifactError, match="aLoRA cannot be merged"):
        merge_checkpoints(config.output_dir)
    assert not [path for path in Path(config.output_dir).iterdir() if path.name.startswith("merged")]


def test_alora_whose_tokens_occur_in_no_row_is_not_trained(
    make_config: Callable[..., RunConfig], tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def train_on(tokens: list[int]) -> None:
        run_training(
            make_config(
                adapter={"alora_invocation_tokens": tokens, "dropout": 0.0},
                data={"packing": False},
                training={"max_steps": 1},
            )
        )

    start = tokenizer.encode("<|im_start|>")
    with pytest.raises(ConfigError, match="no example contains these tokens, so the adapter would never be used"):
        train_on(start * 2)
    assert not Path(make_config().output_dir).exists()
    assert num_with([1, 2], Examples.of([Example(ids, ids) for ids in ([0, 1, 2], [1, 0, 2, 1], [2, 1])])) == 1
    caplog.set_level("INFO")
    train_on(start)
    assert "do not contain adapter.alora_invocation_tokens" not in caplog.text
