"""One measured training, in a process of its own: what `scripts/benchmark.py` starts. Writes told-RANK.json.

Every trainer gets the same tokenised rows in the same order, and the same step: 16 examples, AdamW, the same adapter.
Tokens are counted in front of the model, time from one optimizer step to the next, memory from the moment when the
model is loaded and every weight has been touched.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments

from lora_accel import RunConfig
from lora_accel.batching.order import epoch_order
from lora_accel.console import silence_libraries
from lora_accel.setup.data import prepare_data
from lora_accel.train import run_training
from lora_accel.training.progress import Progress, StepResult
from lora_accel.training.step import Run


class Watch:
    """Seconds and real tokens of each step, and how much memory lies above the loaded model."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.tokens: list[int] = []
        self.losses: list[float] = []
        self._seen = 0
        self._from = 0.0
        self._loaded = 0

    def begin(self, model: torch.nn.Module) -> None:
        """Start: the model is there."""
        for parameter in model.parameters():
            parameter.data.view(torch.uint8).sum()  # a file that is mapped is read by this
        ctypes.CDLL(None).malloc_trim(0)  # what loading has freed is no part of the model
        Path("/proc/self/clear_refs").write_text("5")  # the peak is from here on
        self._loaded = _status("VmRSS")
        model.register_forward_pre_hook(self._count, with_kwargs=True)
        self._from = time.perf_counter()

    def step(self) -> None:
        """Note the end of a step."""
        now = time.perf_counter()
        self.seconds.append(now - self._from)
        self.tokens.append(self._seen)
        self._from, self._seen = now, 0

    def _count(self, _: Any, words: tuple[Any, ...], inputs: dict[str, Any]) -> None:
        ids: torch.Tensor = inputs["input_ids"]
        mask: torch.Tensor | None = inputs.get("attention_mask")
        # Packed rows bring no mask of their shape.
        self._seen += ids.numel() if mask is None or mask.shape != ids.shape else int(mask.sum())

    def told(self) -> dict[str, Any]:
        """Return what was seen."""
        above = _status("VmHWM") - self._loaded
        return {"seconds": self.seconds, "tokens": self.tokens, "losses": self.losses, "above": above}


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise RuntimeError(name)


def train_here(config: RunConfig, watch: Watch, profile: Path | None) -> None:
    """Train as `python -m lora_accel.train` does.

    Args:
        profile: where to write which operators took the time of the second step.
    """
    from lora_accel.training import loop
    from lora_accel.training.step import train_step

    train = loop.train

    def watched_train(run: Run, progress: Progress) -> None:
        watch.begin(run.model)
        train(run, progress)

    def watched_step(run: Run, step: int) -> StepResult:
        if profile is not None and step == 1:
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
                result = train_step(run, step)
            profile.write_text(operators(seen))
        else:
            result = train_step(run, step)
        watch.step()
        watch.losses.append(result.loss)
        return result

    loop.train = watched_train
    vars(loop)["train_step"] = watched_step
    run_training(config)


def operators(seen: Any, most: int = 15) -> str:
    """Return the operators that took the most time themselves, a line each."""
    averages = sorted(seen.key_averages(), key=lambda each: -each.self_cpu_time_total)
    whole = sum(each.self_cpu_time_total for each in averages)
    lines = [f"{'operator':28}{'ms':>8}{'share':>8}{'calls':>8}"]
    for each in averages[:most]:
        spent = each.self_cpu_time_total
        lines.append(f"{each.key[:27]:28}{spent / 1e3:8.0f}{spent / whole:8.1%}{each.count:8}")
    return "\n".join([*lines, f"{'all':28}{whole / 1e3:8.0f}"])


class _Callback(TrainerCallback):  # type: ignore[misc]
    def __init__(self, watch: Watch) -> None:
        self._watch = watch

    def on_train_begin(self, *_: Any, model: torch.nn.Module, **__: Any) -> None:
        self._watch.begin(model)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._watch.step()

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        if "loss" in logs:
            self._watch.losses.append(logs["loss"])


def train_peer(kind: str, config: RunConfig, watch: Watch, options: dict[str, Any]) -> None:
    """Train with another trainer.

    Args:
        kind: `fastchat` (float32 base, padded to the longest allowed), `trainer` (base in 16 bits, padded to the
            longest of the batch) or `trl`.
        options: more arguments of the trainer.
    """
    import datasets
    from peft import get_peft_model

    from lora_accel.model.adapter import lora_config

    datasets.disable_progress_bars()
    data = prepare_data(config, num_ranks=1)
    order = epoch_order([len(source.examples) for source in data.dataset.sources], [1.0], config.seed, epoch=0)
    examples = [data.dataset.examples[i] for i in order]
    columns = {name: [list(map(int, getattr(x, name))) for x in examples] for name in ("input_ids", "labels")}
    training, name = config.training, config.model.name_or_path
    arguments: dict[str, Any] = {
        "output_dir": config.output_dir,
        "max_steps": training.max_steps or -1,
        "num_train_epochs": 1,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 4,
        "learning_rate": training.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": data.plan.warmup_steps,
        "max_grad_norm": training.max_grad_norm,
        "train_sampling_strategy": "sequential",
        "bf16": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    } | options
    tokenizer = data.template.tokenizer
    torch.manual_seed(config.seed)  # the adapter's first weights
    if kind == "trl":
        from trl import SFTConfig, SFTTrainer

        trainer = SFTTrainer(
            name,
            args=SFTConfig(max_length=config.data.max_length, **arguments),
            train_dataset=datasets.Dataset.from_dict(columns),
            processing_class=tokenizer,
            peft_config=lora_config(config.adapter),
        )
    else:
        dtype, padding = (torch.float32, "max_length") if kind == "fastchat" else (torch.bfloat16, True)
        trainer = Trainer(
            get_peft_model(AutoModelForCausalLM.from_pretrained(name, dtype=dtype), lora_config(config.adapter)),
            args=TrainingArguments(**arguments),
            train_dataset=datasets.Dataset.from_dict(columns),
            data_collator=DataCollatorForSeq2Seq(tokenizer, padding=padding, max_length=config.data.max_length),
        )
    trainer.add_callback(_Callback(watch))
    trainer.train()


def matmul_rate(model: str, tokens: int = 4096) -> float:
    """Return FLOP/s of the products of a model's own linear layers in bfloat16, each as often as it occurs."""
    shapes = [tuple(x.weight.shape) for x in _on_meta(model).modules() if isinstance(x, torch.nn.Linear)]
    flops = seconds = 0.0
    for shape in sorted(set(shapes)):
        weight, x = torch.randn(shape, dtype=torch.bfloat16), torch.randn(tokens, shape[1], dtype=torch.bfloat16)
        fastest = float("inf")
        for _ in range(10):
            began = time.perf_counter()
            torch.nn.functional.linear(x, weight)
            fastest = min(fastest, time.perf_counter() - began)
        count = shapes.count(shape) if shape[0] < 20_000 else 0  # the head is made for some tokens only
        flops, seconds = flops + count * 2 * tokens * weight.numel(), seconds + count * fastest
    return flops / seconds


def step_flops(model: str, tokens: int, supervised: int) -> float:
    """Return FLOP that LoRA on a frozen base needs: each weight once forward and once back, the head for supervised
    tokens only. Attention and the adapter are left out."""
    layers = head = 0
    for name, module in _on_meta(model).named_modules():
        if isinstance(module, torch.nn.Linear):
            size = module.weight.numel()
            layers, head = (layers, size) if name == "lm_head" else (layers + size, head)
    return 4.0 * (layers * tokens + head * supervised)


def _on_meta(model: str) -> torch.nn.Module:
    from transformers import AutoConfig

    with torch.device("meta"):
        empty: torch.nn.Module = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    return empty


def main() -> None:
    """Train as the JSON of the command line says."""
    case: dict[str, Any] = json.loads(sys.argv[1])
    silence_libraries()
    watch = Watch()
    folder = Path(case["folder"])
    config = RunConfig.model_validate(case["config"] | {"output_dir": str(folder / "run")})
    if case["trainer"] == "lora_accel":
        train_here(config, watch, folder / "profile.txt" if case.get("profile") else None)
    else:
        train_peer(case["trainer"], config, watch, case.get("options", {}))
    rank = os.environ.get("RANK", "0")
    (folder / f"told-{rank}.json").write_text(json.dumps(watch.told()))


if __name__ == "__main__":
    main()
