"""Run one training of `scripts/benchmark.py` in this process and write its measurements to rank-RANK.json.

Every trainer gets the same tokenized rows in the same order and makes the same steps: 16 examples, AdamW, one adapter.
Time is measured from one optimizer step to the next; a GPU is synchronized there. Computed tokens are those of the
model's input, with padding; real tokens are those of the examples, so one that several examples share counts for each.
Memory is that of the process, and its peak above what it had when the model was loaded and each weight read once.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments

from lora_accel import RunConfig
from lora_accel.batching.batch import MicroBatch
from lora_accel.batching.order import epoch_order
from lora_accel.console import silence_libraries
from lora_accel.setup.data import prepare_data
from lora_accel.train import run_training
from lora_accel.training import loop
from lora_accel.training.progress import Progress, StepResult
from lora_accel.training.step import Run, train_step


class Monitor:
    """Records seconds, tokens and loss of each step, and the peak memory.

    Args:
        device: cpu or cuda.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.seconds: list[float] = []
        self.tokens: list[int] = []
        """Real tokens of each step."""
        self.computed: list[int] = []
        """Computed tokens of each step."""
        self.losses: list[float] = []
        self.probed: dict[str, Any] = {}
        """What one step of each kind showed; see `Case.probe`."""
        self._on_gpu = device == "cuda"
        self._step_tokens = self._step_computed = 0
        self._step_start = 0.0
        self._model_bytes = self._loading_peak = 0

    def begin(self, model: torch.nn.Module) -> None:
        """Start to measure. The model is loaded."""
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats()
            self._model_bytes = torch.cuda.memory_allocated()
        else:
            for parameter in model.parameters():
                parameter.data.view(torch.uint8).sum()  # reads a weight file that is only mapped
            ctypes.CDLL(None).malloc_trim(0)  # return what loading freed
            self._loading_peak = _status("VmHWM")
            Path("/proc/self/clear_refs").write_text("5")  # reset the peak
            self._model_bytes = _status("VmRSS")
        model.register_forward_pre_hook(self._count, with_kwargs=True)
        self.start_step()

    def start_step(self) -> None:
        """Measure the next step from now on."""
        self._step_start = time.perf_counter()

    def step(self, num_tokens: int | None = None) -> None:
        """Record the end of a step.

        Args:
            num_tokens: its real tokens; None = those of the model's input that are no padding.
        """
        if self._on_gpu:
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds.append(now - self._step_start)
        self.tokens.append(self._step_tokens if num_tokens is None else num_tokens)
        self.computed.append(self._step_computed)
        self._step_start, self._step_tokens, self._step_computed = now, 0, 0

    def _count(self, _: Any, args: tuple[Any, ...], inputs: dict[str, Any]) -> None:
        ids: torch.Tensor = inputs["input_ids"]
        mask: torch.Tensor | None = inputs.get("attention_mask")
        self._step_computed += ids.numel()
        # Packed rows have no padding, and no mask of their shape.
        self._step_tokens += ids.numel() if mask is None or mask.shape != ids.shape else int(mask.sum())

    def steps(self) -> list[dict[str, float]]:
        """Return seconds, real tokens (`tokens`) and computed tokens (`computed`) of each step."""
        columns = zip(self.seconds, self.tokens, self.computed, strict=True)
        return [{"seconds": seconds, "tokens": tokens, "computed": computed} for seconds, tokens, computed in columns]

    def measurements(self) -> dict[str, Any]:
        """Return the measurements of this rank; memory in bytes."""
        peak = torch.cuda.max_memory_allocated() if self._on_gpu else _status("VmHWM")
        return {
            "seconds": self.seconds,
            "tokens": self.tokens,
            "computed": self.computed,
            "losses": self.losses,
            "peak": peak,  # since the model was loaded
            "process_peak": max(peak, self._loading_peak),
            "peak_above_model": peak - self._model_bytes,
            **self.probed,
        }


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise RuntimeError(name)


def train_with_lora_accel(config: RunConfig, monitor: Monitor, profile: Path | None, *, probe: bool = False) -> None:
    """Train as `python -m lora_accel.train` does.

    Args:
        profile: file for the operators of the second step and their time; None = no profile.
        probe: whether to count the kernels of the second step and the synchronizations of the third.
    """
    train = loop.train

    def monitored_train(run: Run, progress: Progress) -> None:
        monitor.begin(run.model)
        train(run, progress)

    def monitored_step(run: Run, step: int) -> StepResult:
        if profile is not None and step == 1:
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
                result = train_step(run, step)
            profile.write_text(operators(profiler))
        elif probe and step == 1:
            with counted_kernels(monitor.probed):
                result = train_step(run, step)
            monitor.probed["micro_batches"] = len(result.batch.micro_batches)
        elif probe and step == 2 and torch.cuda.is_available():
            with listed_syncs(monitor.probed):
                result = train_step(run, step)
        else:
            result = train_step(run, step)
        monitor.step(sum(map(num_real_tokens, result.batch.micro_batches)))
        monitor.losses.append(result.loss)
        return result

    loop.train = monitored_train
    vars(loop)["train_step"] = monitored_step
    run_training(config)


class _Prepared(BaseException):
    """A run is ready to train."""


def take_turns(configs: Sequence[RunConfig]) -> list[list[dict[str, float]]]:
    """Make each step in several runs, in turn, in this process.

    A machine that slows down for a while slows down all of them. The one that begins changes from step to step.

    Returns:
        The steps of each run; see `Monitor.steps`.
    """
    runs = [prepared_run(config) for config in configs]
    monitors = [Monitor() for _ in runs]
    for run, monitor in zip(runs, monitors, strict=True):
        monitor.begin(run.model)
    for step in range(runs[0].plan.total_steps):
        for number in sorted(range(len(runs)), reverse=step % 2 == 1):
            monitors[number].start_step()
            result = train_step(runs[number], step)
            monitors[number].step(sum(map(num_real_tokens, result.batch.micro_batches)))
    return [monitor.steps() for monitor in monitors]


def prepared_run(config: RunConfig) -> Run:
    """Return a run before its first step."""
    prepared: list[Run] = []

    def stop(run: Run, progress: Progress) -> None:
        prepared.append(run)
        raise _Prepared

    train, loop.train = loop.train, stop
    try:
        run_training(config)
    except _Prepared:
        pass
    finally:
        loop.train = train
    return prepared[0]


def num_real_tokens(micro_batch: MicroBatch) -> int:
    """Return the tokens of a micro-batch's examples, without padding."""
    segments = micro_batch.segments
    return int(micro_batch.attention_mask.sum()) if segments is None else segments.num_tokens


@contextlib.contextmanager
def counted_kernels(probed: dict[str, Any]) -> Iterator[None]:
    """Count the kernels that run in the block, by name, as `kernels`; on the CPU, torch's operators."""
    kinds = torch.profiler.ProfilerActivity
    on_gpu = torch.cuda.is_available()
    with torch.profiler.profile(activities=[kinds.CPU, kinds.CUDA] if on_gpu else [kinds.CPU]) as profiler:
        yield
        if on_gpu:
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:  # in the trace, kernels, copies and annotations differ
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        events = json.loads(file.read_text(encoding="utf-8", errors="replace"))["traceEvents"]
    kind = "kernel" if on_gpu else "cpu_op"
    probed["kernels"] = dict(Counter(event["name"] for event in events if event.get("cat") == kind))


@contextlib.contextmanager
def listed_syncs(probed: dict[str, Any]) -> Iterator[None]:
    """List where the host waits for the GPU in the block, as `syncs`: file and line, with repeats."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found = [warning for warning in caught if "synchronizing CUDA operation" in str(warning.message)]
    probed["syncs"] = [f"{Path(warning.filename).name}:{warning.lineno}" for warning in found]


def estimated_bytes(config: RunConfig) -> int:
    """Return the memory of a run on one device, as `lora-accel plan` estimates it."""
    from lora_accel.distributed.launch import resolve_launch
    from lora_accel.planning.estimate import make_estimate

    precision = resolve_launch(config, None)[1].mixed_precision
    estimate = make_estimate(config, prepare_data(config), precision, 1, has_4_bits=False)
    if estimate.untraced is not None:
        raise RuntimeError(estimate.untraced)
    assert estimate.options[0].memory is not None  # one device is always supported
    return estimate.options[0].memory.total


def operators(profiler: Any, most: int = 15) -> str:
    """Return a table of the operators with the most self time."""
    averages = sorted(profiler.key_averages(), key=lambda average: -average.self_cpu_time_total)
    total = sum(average.self_cpu_time_total for average in averages)
    lines = [f"{'operator':28}{'ms':>8}{'share':>8}{'calls':>8}"]
    for average in averages[:most]:
        time_us = average.self_cpu_time_total
        lines.append(f"{average.key[:27]:28}{time_us / 1e3:8.0f}{time_us / total:8.1%}{average.count:8}")
    return "\n".join([*lines, f"{'all':28}{total / 1e3:8.0f}"])


class _Callback(TrainerCallback):  # type: ignore[misc]
    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor

    def on_train_begin(self, *_: Any, model: torch.nn.Module, **__: Any) -> None:
        self._monitor.begin(model)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._monitor.step()

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        if "loss" in logs:
            self._monitor.losses.append(logs["loss"])


def train_with_other(
    kind: str, config: RunConfig, monitor: Monitor, options: dict[str, Any], device: str = "cpu"
) -> None:
    """Train with another trainer.

    Args:
        kind: `fastchat` (float32 base, padded to `data.max_length`), `trainer` (16-bit base, padded to the longest
            example of the batch) or `trl`.
        options: additional arguments of the trainer. Without `gradient_accumulation_steps`, a step has
            `training.batch_size` examples, or, of packed rows, as many as hold about so many examples.
        device: cpu or cuda.
    """
    import datasets
    from peft import get_peft_model

    from lora_accel.model.adapter import lora_config
    from lora_accel.model.base import DTYPES, _bitsandbytes_config

    datasets.disable_progress_bars()
    data = prepare_data(config, num_ranks=1)
    order = epoch_order([len(source.examples) for source in data.dataset.sources], [1.0], config.seed, epoch=0)
    examples = [data.dataset.examples[i] for i in order]
    columns = {name: [list(map(int, getattr(x, name))) for x in examples] for name in ("input_ids", "labels")}
    training, name = config.training, config.model.name_or_path
    has_bf16 = training.mixed_precision == "bf16"
    arguments: dict[str, Any] = {
        "output_dir": config.output_dir,
        "max_steps": training.max_steps or -1,
        "num_train_epochs": 1,
        "per_device_train_batch_size": 4,
        "learning_rate": training.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": data.plan.warmup_steps,
        "max_grad_norm": training.max_grad_norm,
        "train_sampling_strategy": "sequential",
        "bf16": has_bf16,
        "use_cpu": device == "cpu",
        "dataloader_pin_memory": device != "cpu",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    } | options
    if "gradient_accumulation_steps" not in arguments:
        rows: float = data.plan.batch_size
        if arguments.get("packing"):
            lengths = [len(ids) for ids in columns["input_ids"]]
            rows *= num_packed(lengths, config.data.max_length) / len(lengths)
        arguments["gradient_accumulation_steps"] = max(1, round(rows / arguments["per_device_train_batch_size"]))
    tokenizer = data.template.tokenizer
    torch.manual_seed(config.seed)  # the adapter's first weights
    if kind == "trl":
        from trl import SFTConfig, SFTTrainer

        if config.quantization.bits == 4:
            loading = arguments["model_init_kwargs"]
            loading["quantization_config"] = _bitsandbytes_config(config.quantization, DTYPES[loading["dtype"]])
        trainer = SFTTrainer(
            name,
            args=SFTConfig(**{"max_length": config.data.max_length} | arguments),
            train_dataset=datasets.Dataset.from_dict(columns),
            processing_class=tokenizer,
            peft_config=lora_config(config.adapter),
        )
    else:
        dtype = torch.bfloat16 if has_bf16 and kind == "trainer" else torch.float32
        padding = "max_length" if kind == "fastchat" else True
        trainer = Trainer(
            get_peft_model(AutoModelForCausalLM.from_pretrained(name, dtype=dtype), lora_config(config.adapter)),
            args=TrainingArguments(**arguments),
            train_dataset=datasets.Dataset.from_dict(columns),
            data_collator=DataCollatorForSeq2Seq(tokenizer, padding=padding, max_length=config.data.max_length),
        )
    trainer.add_callback(_Callback(monitor))
    trainer.train()


def num_packed(lengths: Sequence[int], row_length: int) -> int:
    """Return the rows into which best-fit decreasing, as in TRL, packs examples; a longer one is truncated."""
    free: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [number for number, left in enumerate(free) if left >= length]
        if fitting:
            free[min(fitting, key=free.__getitem__)] -= length
        else:
            free.append(max(0, row_length - length))
    return len(free)


def matmul_rate(model: str, dtype: torch.dtype, tokens: int = 4096) -> float:
    """Return the FLOP/s of matrix products with the shapes of a model's linear layers.

    Args:
        tokens: rows of the input.
    """
    shapes = [tuple(x.weight.shape) for x in _on_meta(model).modules() if isinstance(x, torch.nn.Linear)]
    flops = seconds = 0.0
    for shape in sorted(set(shapes)):
        weight, x = torch.randn(shape, dtype=dtype), torch.randn(tokens, shape[1], dtype=dtype)
        fastest = float("inf")
        for _ in range(10):
            start = time.perf_counter()
            torch.nn.functional.linear(x, weight)
            fastest = min(fastest, time.perf_counter() - start)
        count = shapes.count(shape) if shape[0] < 20_000 else 0  # the head runs on supervised tokens only
        flops, seconds = flops + count * 2 * tokens * weight.numel(), seconds + count * fastest
    return flops / seconds


def step_flops(model: str, tokens: int, supervised: int) -> float:
    """Return the FLOP of a step of LoRA on a frozen base, without attention and the adapter.

    Each weight is used once in forward and once in backward; the head for supervised tokens only.
    """
    layers = head = 0
    for name, module in _on_meta(model).named_modules():
        if isinstance(module, torch.nn.Linear):
            size = module.weight.numel()
            layers, head = (layers, size) if name == "lm_head" else (layers + size, head)
    return 4.0 * (layers * tokens + head * supervised)


def _on_meta(model: str) -> torch.nn.Module:
    from transformers import AutoConfig

    with torch.device("meta"):
        meta_model: torch.nn.Module = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    return meta_model


def main() -> None:
    """Run the training that the JSON argument describes."""
    case: dict[str, Any] = json.loads(sys.argv[1])
    silence_libraries()
    device, probe = case["device"], case["probe"]
    monitor = Monitor(device)
    folder = Path(case["folder"])
    config = RunConfig.model_validate(case["config"] | {"output_dir": str(folder / "run")})
    if case["compared"] is not None:
        other = RunConfig.model_validate(case["compared"] | {"output_dir": str(folder / "compared")})
        (folder / "rank-0.json").write_text(json.dumps({"runs": take_turns([config, other])}))
        return
    if case["trainer"] == "lora_accel":
        train_with_lora_accel(config, monitor, folder / "profile.txt" if case["profile"] else None, probe=probe)
    else:
        train_with_other(case["trainer"], config, monitor, case["options"], device)
    measurements = monitor.measurements()
    if probe:
        measurements["estimate"] = estimated_bytes(config)
    rank = os.environ.get("RANK", "0")
    (folder / f"rank-{rank}.json").write_text(json.dumps(measurements))


if __name__ == "__main__":
    main()
