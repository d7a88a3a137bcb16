"""Runs the package's own step and evaluation on a fake GPU; started by tests/device/test_steps.py.

LD_PRELOAD=fake_cuda.so python -m tests.device.worker CASES.json RESULTS.json
"""

from __future__ import annotations

import gc
import json
import os
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["ACCELERATE_TORCH_DEVICE"] = "cuda:0"

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import GradientAccumulationPlugin

from lora_accel.config.schema import RunConfig
from lora_accel.model import base
from lora_accel.model.device import detect_device
from lora_accel.model.recompute import recompute_layers
from lora_accel.setup import model as setup_model
from lora_accel.setup.data import prepare_data
from lora_accel.setup.resume import ResumePoint
from lora_accel.setup.run import make_run
from lora_accel.training.loss_scale import LossScale
from lora_accel.training.progress import Progress
from lora_accel.training.step import train_step
from tests.device import controls, fake_cuda


def main(cases_file: str, results_file: str) -> None:
    """Run cases, and write what each did."""
    request = json.loads(Path(cases_file).read_text(encoding="utf-8"))
    mode = fake_cuda.install(request["library"])
    results = []
    for case in request["cases"]:
        try:
            results.append({"id": case["id"], **run_case(case, mode)})
        except Exception as error:  # every kind is a result
            frames = [f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)]
            results.append(
                {
                    "id": case["id"],
                    "error": f"{type(error).__name__}: {error}"[:800],
                    "frames": frames[:14] + frames[-6:],
                }
            )
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
        gc.collect()
    Path(results_file).write_text(json.dumps(results), encoding="utf-8")


def run_case(case: dict[str, Any], mode: Any) -> dict[str, Any]:
    """Train one step and evaluate; return what both did."""
    config = RunConfig.model_validate(case["config"])
    fake_cuda.set_capability(tuple(case["capability"]))
    accelerator = Accelerator(
        mixed_precision=config.training.mixed_precision,
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1, sync_with_dataloader=False),
    )
    assert accelerator.device.type == "cuda"
    data = prepare_data(config)
    prepare = accelerator.prepare

    def prepare_on_fake_gpu(model: Any, optimizer: Any) -> Any:
        by_id = {id(parameter): name for name, parameter in model.named_parameters()}
        fake_cuda.move_model(model, mode)
        controls.CONTROLS[case.get("control", "none")](model)
        parameters = dict(model.named_parameters())
        for group in optimizer.param_groups:
            group["params"] = [parameters[by_id[id(parameter)]] for parameter in group["params"]]
        return prepare(model, optimizer, device_placement=[False, False])

    accelerator.prepare = prepare_on_fake_gpu  # type: ignore[method-assign]
    load = base.load_base_model
    setup_model.load_base_model = lambda *a, **k: load(*a, **{**k, "device": torch.device("cpu")})
    try:
        prepared = setup_model.prepare_model(config, accelerator)
    finally:
        setup_model.load_base_model = load
    if config.training.activation_checkpointing is True:
        recompute_layers(accelerator.unwrap_model(prepared.model))
    scale = LossScale() if config.training.mixed_precision == "fp16" else None
    start = ResumePoint(Progress(), loss_scale=scale)
    stop = SimpleNamespace(cause=lambda: None)
    Path(config.output_dir).mkdir(parents=True, exist_ok=True)
    run = make_run(config, data, accelerator, prepared, {}, start, stop, lambda *a, **k: None)  # type: ignore[arg-type]
    run.model.train()
    recorder = fake_cuda.Recorder()
    fake_cuda.record_values(recorder)
    prepare_batch, prepared_after = run.batches.prepare, []

    def prepare_and_record(step: int) -> None:
        prepared_after.append((step, len(recorder.syncs)))
        prepare_batch(step)

    run.batches.prepare = prepare_and_record  # type: ignore[method-assign]
    torch.Tensor.pin_memory = lambda self, *a: self  # type: ignore[method-assign]
    with mode:
        with recorder:
            result = train_step(run, 0)
        evaluation = fake_cuda.Recorder()
        fake_cuda.record_values(evaluation)
        with evaluation:
            run.evaluator.evaluate(run.metrics)
    micro_batches = len(result.batch.micro_batches)
    return {
        "device": detect_device(accelerator.device).kind,
        "packed": prepared.packed,
        "micro_batches": micro_batches,
        "fields": sum(isinstance(x, torch.Tensor) for x in vars(result.batch.micro_batches[0]).values()),
        "kernels": recorder.kernels,
        "syncs": recorder.syncs,
        "to_device": recorder.to_device,
        "prepared_after": prepared_after,
        "blocking": recorder.blocking + evaluation.blocking,
        "evaluation_syncs": evaluation.syncs,
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
