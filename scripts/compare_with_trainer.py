"""Train on the same rows with lora_accel and with Hugging Face Trainer + PEFT, and print the differences.

    python scripts/compare_with_trainer.py --model models/SmolLM2-135M-Instruct --data rows.jsonl --rows 64 --steps 8

Both train in float32 without dropout, with the same order of examples, AdamW, cosine schedule with warm-up, clipping
to 1 and token-weighted mean. Micro-batches differ on purpose: by tokens here, 2 examples x 4 accumulation steps there.
The remaining differences are float32 rounding.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, Trainer, TrainingArguments

from lora_accel import RunConfig, run_training
from lora_accel.batching.order import epoch_order
from lora_accel.console import print_table, run_command, silence_libraries
from lora_accel.model.adapter import lora_config
from lora_accel.setup.data import PreparedData, prepare_data

PER_DEVICE, ACCUMULATION = 2, 4


class Step(NamedTuple):
    """Loss and gradient norm of one step."""

    loss: float
    """Mean per supervised token."""
    grad_norm: float


class Run(NamedTuple):
    """The result of a training."""

    steps: list[Step]
    adapter: dict[str, torch.Tensor]


def comparison_config(
    model: str | Path,
    data: str | Path,
    output_dir: str | Path,
    *,
    rows: int = 64,
    steps: int = 8,
    max_length: int = 256,
    learning_rate: float = 1e-3,
    alpha: float = 16,
) -> RunConfig:
    """Return the config that both sides train with."""
    return RunConfig.model_validate(
        {
            "output_dir": str(output_dir),
            "model": {"name_or_path": str(model), "dtype": "float32"},
            "adapter": {"r": 8, "alpha": alpha, "dropout": 0.0, "target_modules": "all-linear"},
            "data": {"train": [{"path": str(data), "limit": rows}], "max_length": max_length, "max_dropped": 1.0},
            "training": {
                "max_steps": steps,
                "batch_size": PER_DEVICE * ACCUMULATION,
                "micro_batch_tokens": 1024,
                "learning_rate": learning_rate,
                "warmup_steps": 2,
                "warmup_from_zero": True,
                "weight_decay": 0.01,
                "max_grad_norm": 1.0,
                "mixed_precision": "no",
            },
            "logging": {"trackers": [], "report": False},
        }
    )


def train_with_lora_accel(config: RunConfig) -> Run:
    """Train as `python -m lora_accel.train` does."""
    adapter = run_training(config)
    lines = [json.loads(line) for line in (adapter.parent / "metrics.jsonl").read_text("utf-8").splitlines()]
    steps = [Step(line["loss"], line["grad_norm"]) for line in lines if line["kind"] == "train"]
    return Run(steps, load_file(adapter / "adapter_model.safetensors"))


def train_with_trainer(config: RunConfig, folder: Path) -> Run:
    """Train the same examples with transformers' Trainer on a PEFT model.

    Args:
        folder: output folder of the Trainer.
    """
    data = prepare_data(config, num_ranks=1)
    base = AutoModelForCausalLM.from_pretrained(config.model.name_or_path, dtype=torch.float32)
    torch.manual_seed(config.seed)  # initial weights of the adapter
    model = get_peft_model(base, lora_config(config.adapter))
    training = config.training
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=data.plan.total_steps,
        per_device_train_batch_size=PER_DEVICE,
        gradient_accumulation_steps=ACCUMULATION,
        learning_rate=training.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=data.plan.warmup_steps,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        train_sampling_strategy="sequential",
        dataloader_pin_memory=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    tokenizer = data.template.tokenizer
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=examples_in_order(config, data),
        data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100),
    )
    trainer.train()
    steps = [Step(line["loss"], line["grad_norm"]) for line in trainer.state.log_history if "loss" in line]
    adapter = get_peft_model_state_dict(model, save_embedding_layers=False)
    return Run(steps, {name: tensor.detach().cpu() for name, tensor in adapter.items()})


def examples_in_order(config: RunConfig, data: PreparedData) -> list[dict[str, Any]]:
    """Return the tokenized examples in lora_accel's training order."""
    if data.plan.total_steps > data.plan.steps_per_epoch:
        raise SystemExit(f"{data.plan.num_examples} examples make only {data.plan.steps_per_epoch} steps; take fewer")
    sources = data.dataset.sources
    order = epoch_order([len(s.examples) for s in sources], [s.weight for s in sources], config.seed, epoch=0)
    examples = data.dataset.examples
    return [{"input_ids": examples[i].input_ids, "labels": examples[i].labels} for i in order]


def relative(actual: float, expected: float) -> float:
    """Return the difference of two numbers relative to the second."""
    return abs(actual - expected) / max(abs(expected), 1e-30)


def adapter_differences(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    """Return the norm of each tensor's difference, relative to the norm of the Trainer's tensor."""
    if actual.keys() != expected.keys():
        raise SystemExit(f"different tensors: {sorted(actual.keys() ^ expected.keys())[:3]} …")
    return {name: ((actual[name] - expected[name]).norm() / expected[name].norm()).item() for name in sorted(actual)}


def main() -> None:
    """Train both and print the differences."""
    parser = argparse.ArgumentParser(description="Compare lora_accel with Hugging Face Trainer + PEFT.")
    parser.add_argument("--model", required=True, metavar="DIR", help="base model: folder or Hub id")
    parser.add_argument("--data", required=True, metavar="FILE", help="rows of any format that lora_accel reads")
    parser.add_argument("--rows", type=int, default=64, help="number of rows to use, from the first")
    parser.add_argument("--steps", type=int, default=8, help="number of optimizer steps of 8 examples")
    parser.add_argument("--max-length", type=int, default=256, help="maximum length of an example in tokens")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="peak learning rate")
    args = parser.parse_args()
    silence_libraries()
    with tempfile.TemporaryDirectory() as folder:
        config = comparison_config(
            args.model,
            args.data,
            Path(folder) / "lora_accel",
            rows=args.rows,
            steps=args.steps,
            max_length=args.max_length,
            learning_rate=args.learning_rate,
        )
        actual = train_with_lora_accel(config)
        expected = train_with_trainer(config, Path(folder) / "trainer")
    rows = [
        (
            str(number),
            f"{step.loss:.7f}",
            f"{expected_step.loss:.7f}",
            f"{relative(step.loss, expected_step.loss):.1e}",
            f"{relative(step.grad_norm, expected_step.grad_norm):.1e}",
        )
        for number, (step, expected_step) in enumerate(zip(actual.steps, expected.steps, strict=True), start=1)
    ]
    headers = ("step", "lora_accel", "Trainer", "relative difference", "of the gradient norm")
    print_table("loss", rows, headers=headers)
    differences = adapter_differences(actual.adapter, expected.adapter)
    worst = max(differences, key=lambda name: differences[name])
    print(f"adapter: {len(differences)} tensors; largest relative difference {differences[worst]:.1e} ({worst})")


if __name__ == "__main__":
    sys.exit(run_command(main))
