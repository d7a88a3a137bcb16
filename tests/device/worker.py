"""Runs the package's own step and evaluation on a fake GPU; started by tests/device/test_steps.py.

LD_PRELOAD=fake_cuda.so python -m tests.device.worker CASES.json RESULTS.json
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

os.environ["ACCELERATE_TORCH_DEVICE"] = "cuda:0"

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import GradientAccumulationPlugin
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import flex_attention
from transformers.generation.utils import StopCheck

from lora_accel.config.schema import RunConfig
from lora_accel.model import base
from lora_accel.setup import model as setup_model
from lora_accel.setup.data import PreparedData, prepare_data
from lora_accel.setup.memory import fit_into_memory
from lora_accel.setup.model import PreparedModel
from lora_accel.setup.provenance import make_provenance
from lora_accel.setup.resume import ResumePoint, resume_run
from lora_accel.setup.run import make_run
from lora_accel.training.loss_scale import LossScale
from lora_accel.training.progress import Progress, StepResult
from lora_accel.training.step import Run, train_step
from tests.device import controls, fake_cuda

STOP_CHECK = StopCheck.__call__


def main(cases_file: str, results_file: str) -> None:
    """Run cases, and write what each did."""
    request = json.loads(Path(cases_file).read_text(encoding="utf-8"))
    mode = fake_cuda.install(request["library"])
    gc.freeze()  # what the imports created: collecting it took 2 s after each case
    results = []
    gc.freeze()  # what was imported need not be searched again after each case
    for case in request["cases"]:
        try:
            results.append(run_case(case, mode))
        except Exception as error:  # every kind is a result
            frames = [f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)]
            results.append({"error": f"{type(error).__name__}: {error}"[:800], "frames": frames[:14] + frames[-6:]})
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
        gc.collect()
    Path(results_file).write_text(json.dumps(results), encoding="utf-8")


def run_case(case: dict[str, Any], mode: FakeTensorMode) -> dict[str, Any]:
    """Train a step, evaluate, save, resume, and train another step; return what each did."""
    config = RunConfig.model_validate(case["config"])
    fake_cuda.set_capability(tuple(case["capability"]))
    accelerator = Accelerator(
        mixed_precision=config.training.mixed_precision,
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1, sync_with_dataloader=False),
    )
    assert accelerator.device.type == "cuda"
    data = prepare_data(config)
    prepared = prepare_on_gpu(config, accelerator, mode, case["control"])
    unlimited = config.training.model_copy(update={"micro_batch_tokens": "auto"})
    with fake_cuda.Recorder():
        chosen = fit_into_memory(config.model_copy(update={"training": unlimited}), data, accelerator, prepared, 1)
    config = fit_into_memory(config, data, accelerator, prepared, num_local_ranks=1)
    start = ResumePoint(Progress(), loss_scale=LossScale() if config.training.mixed_precision == "fp16" else None)
    stop = SimpleNamespace(cause=lambda: None)
    Path(config.output_dir).mkdir(parents=True)
    provenance = make_provenance(config, data, accelerator, prepared)
    run = make_run(config, data, accelerator, prepared, provenance, start, stop, lambda *args: None)  # type: ignore[arg-type]
    run.model.train()

    hidden_dtypes: set[str] = set()
    for layer in decoder_layers(prepared.model):
        layer.register_forward_hook(lambda module, inputs, output: hidden_dtypes.add(str(first_tensor(output).dtype)))
    prepare_batch, batches = run.batches.prepare, []

    def prepare_and_record(number: int) -> None:
        batches.append((number, "step.py:train_step" in step.syncs))
        prepare_batch(number)

    run.batches.prepare = prepare_and_record  # type: ignore[method-assign]
    with fake_cuda.Recorder() as step, counted_masks() as masks:
        result = train_step(run, 0)
    if case["control"] != "none":
        return {"step": recorded(step)}
    with fake_cuda.Recorder() as evaluation:
        dataclasses.replace(run.evaluator, prompts=[], scorers={}).evaluate(run.metrics)
    with fake_cuda.Recorder() as replies, patch.object(StopCheck, "__call__", stop_after_two_tokens):
        replied = dataclasses.replace(run.evaluator, sources={}).evaluate(run.metrics)
    counts = {
        "int8_layers": sum(isinstance(module, Linear8bitLt) for module in prepared.model.modules()),
        "nf4_layers": sum(isinstance(module, Linear4bit) for module in prepared.model.modules()),
        "num_trained": len(prepared.trainable),
        "fields": sum(isinstance(x, torch.Tensor) for x in vars(result.batch.micro_batches[0]).values()),
    }
    outcome: dict[str, Any] = {
        **counts,
        "chosen_tokens": chosen.training.micro_batch_tokens,
        "packed": prepared.packed,
        "batches": batches,
        "hidden_dtypes": sorted(hidden_dtypes),
        "step": recorded(step) | described(result, masks),
        "evaluation": recorded(evaluation),
        "replies": recorded(replies),
        "replied": replied,
    }
    if not prepared.packed:
        return outcome
    return outcome | resume_after_save(config, accelerator, data, prepared, run, mode)


def resume_after_save(
    config: RunConfig,
    accelerator: Accelerator,
    data: PreparedData,
    prepared: PreparedModel,
    run: Run,
    mode: FakeTensorMode,
) -> dict[str, Any]:
    """Save a checkpoint, restore it as a new process would, and train a step; return what this did."""
    trained = layout(prepared)
    with fake_cuda.Recorder() as save:
        run.checkpointer.save(Progress(step=1))
    prepared.optimizer.state.clear()
    with fake_cuda.Recorder():
        start = resume_run(config, accelerator, prepared, run.checkpointer.provenance, data.plan)
    restored = layout(prepared)
    run.model.train()
    with fake_cuda.Recorder() as step, counted_masks() as masks:
        result = train_step(run, start.progress.step)
    return {
        "trained": trained,
        "restored": restored,
        "resumed_step": start.progress.step,
        "save": recorded(save),
        "next_step": recorded(step) | described(result, masks),
    }


@contextlib.contextmanager
def counted_masks() -> Iterator[list[None]]:
    """Yield a list with an entry for each mask of FlexAttention."""
    create, masks = flex_attention.BlockMask.from_kv_blocks, list[None]()

    def create_and_count(*args: Any, **kwargs: Any) -> Any:
        masks.append(None)
        return create(*args, **kwargs)

    with patch.object(flex_attention.BlockMask, "from_kv_blocks", create_and_count):
        yield masks


def described(result: StepResult, masks: list[None]) -> dict[str, int]:
    """Return the sizes of a step, for JSON."""
    batch = result.batch
    return {
        "micro_batches": len(batch.micro_batches),
        "masks": len(masks),
        "tokens": batch.num_tokens,
        "computed_tokens": batch.num_computed_tokens,
    }


def recorded(recorder: fake_cuda.Recorder) -> dict[str, Any]:
    """Return what a recorder recorded, for JSON."""
    return {name: getattr(recorder, name) for name in ("kernels", "products", "to_device", "blocking", "syncs")}


def prepare_on_gpu(config: RunConfig, accelerator: Accelerator, mode: FakeTensorMode, control: str) -> PreparedModel:
    """Prepare the model by the package's own code, which loads it on the CPU, and move it to the fake GPU."""
    prepare, load = accelerator.prepare, base.load_base_model

    def prepare_and_move(model: Any, optimizer: Any) -> Any:
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        fake_cuda.move_model(model, mode)
        controls.CONTROLS[control](model)
        parameters = dict(model.named_parameters())
        for group in optimizer.param_groups:
            group["params"] = [parameters[names[id(parameter)]] for parameter in group["params"]]
        return prepare(model, optimizer, device_placement=[False, False])

    accelerator.prepare = prepare_and_move  # type: ignore[method-assign]
    with patch.object(setup_model, "load_base_model", lambda *a, **k: load(*a, **{**k, "device": torch.device("cpu")})):
        return setup_model.prepare_model(config, accelerator)


def stop_after_two_tokens(check: StopCheck, unfinished: torch.Tensor, tokens: torch.Tensor, length: int) -> bool:
    """Wait for the value with which `generate` decides whether to stop; there is none here, so count tokens."""
    vars(check)["num_tokens"] = vars(check).get("num_tokens", 0) + 1
    return STOP_CHECK(check, unfinished, tokens, length) or vars(check)["num_tokens"] == 2


def decoder_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Return the modules between which the hidden states pass."""
    return [module for module in model.modules() if type(module).__name__.endswith(("DecoderLayer", "GPT2Block"))]


def first_tensor(output: Any) -> torch.Tensor:
    """Return the hidden states that a layer returns."""
    return output if isinstance(output, torch.Tensor) else output[0]


def layout(prepared: PreparedModel) -> dict[str, str]:
    """Return the device, dtype and shape of what is trained and of the optimizer's state, by name."""
    names = {parameter: name for name, parameter in prepared.model.named_parameters()}
    tensors = {names[parameter]: parameter.detach() for parameter in prepared.trainable}
    for parameter, state in prepared.optimizer.state.items():
        tensors |= {f"{key}.{names[parameter]}": value for key, value in state.items()}
    return {name: f"{value.device}, {value.dtype}, {tuple(value.shape)}" for name, value in sorted(tensors.items())}


if __name__ == "__main__":
    main(*sys.argv[1:])
