"""`lora-accel plan --measure`: memory and time of two real micro-batches, in a child process that writes nothing.

A child process: its peak is not that of the parent, and the kernel may kill it when memory runs out.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lora_accel.config.files import read_config
from lora_accel.config.schema import RunConfig
from lora_accel.console import Stage, run_command, silence_libraries
from lora_accel.errors import LoraAccelError, is_out_of_memory
from lora_accel.processes import return_freed_memory

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

    from lora_accel.batching.batch import MicroBatch
    from lora_accel.setup.model import PreparedModel

OUT_OF_MEMORY = 77
"""Exit code of the child process if an allocation fails."""


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What two micro-batches took."""

    peak_bytes: int
    """Allocated by tensors, beyond what imports and data take."""
    loaded_bytes: int
    """After loading model and adapter."""
    tokens: list[int]
    """Of the largest micro-batch and of the typical one, padding included."""
    seconds: list[float]
    """Forward, backward and update, for each."""
    device: str
    process_bytes: int
    """Peak of the process in the host's memory."""

    @property
    def tokens_per_second(self) -> float:
        """Throughput of the typical micro-batch."""
        return self.tokens[1] / self.seconds[1]


def measure_in_child(config: Path, overrides: Sequence[str]) -> Measurement | None:
    """Measure a run in a child process.

    Args:
        config: run config file.
        overrides: `section.key=value` options that override it.

    Returns:
        None if memory ran out.

    Raises:
        LoraAccelError: the child process failed for another reason.
    """
    command = [sys.executable, "-m", "lora_accel.planning.measure", "--config", str(config), *overrides]
    with Stage("measuring: loading the model, then three micro-batches"):
        result = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if result.returncode in (OUT_OF_MEMORY, -signal.SIGKILL):
        return None
    if result.returncode:
        lines = result.stderr.strip().splitlines()[-1:] or [f"it ended with exit code {result.returncode}"]
        raise LoraAccelError(f"--measure: {lines[0].removeprefix('error: ')}")
    return Measurement(**json.loads(result.stdout.splitlines()[-1]))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print the result as a line of JSON; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m lora_accel.planning.measure")
    parser.add_argument("--config", required=True)
    parser.add_argument("overrides", nargs="*")
    request = parser.parse_args(arguments)
    lacked_memory = False

    def command() -> None:
        nonlocal lacked_memory
        try:
            measured = measure(read_config(request.config, request.overrides))
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            lacked_memory = True
        else:
            print(json.dumps(dataclasses.asdict(measured)))

    code = run_command(command)
    return OUT_OF_MEMORY if lacked_memory else code


def measure(config: RunConfig) -> Measurement:
    """Load the model in this process, and run the largest micro-batch and a typical one.

    Raises:
        UserError: the config, the data or the base is wrong.
    """
    silence_libraries()
    from lora_accel.distributed.launch import make_accelerator, resolve_launch
    from lora_accel.planning.micro_batches import choose_micro_batches
    from lora_accel.planning.skeleton import build_skeleton
    from lora_accel.setup.data import prepare_data
    from lora_accel.setup.memory import fit_into_memory
    from lora_accel.setup.model import prepare_model
    from lora_accel.setup.recipe import complete_config
    from lora_accel.setup.sizes import resolve_rope_scaling

    config = resolve_rope_scaling(complete_config(config))
    accelerator = make_accelerator(config, *resolve_launch(config, None))
    if accelerator.device.type == "cpu":
        return_freed_memory()  # as on a GPU, memory that is allocated is measured, not what the allocator reserves
    data = prepare_data(config)
    build_skeleton(config, accelerator.mixed_precision, accelerator.device)  # imports what loading imports
    memory = _MemoryMeter(accelerator.device)
    prepared = prepare_model(config, accelerator)
    config = fit_into_memory(config, data, accelerator, prepared, 1)
    batches = choose_micro_batches(config, data, packed=prepared.packed, min_saving=prepared.min_saving)
    loaded = memory.begin()
    _update(accelerator, prepared, batches.typical, config)  # warms up, and creates the optimizer's state
    seconds = [_update(accelerator, prepared, batch, config) for batch in (batches.largest, batches.typical)]
    tokens = [batch.segments.num_tokens if batch.segments else int(batch.attention_mask.sum()) for batch in batches[:2]]
    kind = accelerator.device.type
    return Measurement(memory.peak(), loaded, tokens, seconds, kind, _process_memory().peak)


def _update(accelerator: Accelerator, prepared: PreparedModel, batch: MicroBatch, config: RunConfig) -> float:
    """Run a step of one micro-batch; return its seconds. See training/step.py."""
    import torch

    from lora_accel.training.loss import summed_token_loss

    _synchronize(accelerator.device)
    began = time.perf_counter()
    accelerator.step, accelerator.gradient_accumulation_steps = 0, 1
    factor = prepared.backend.begin_step(prepared.optimizer, 1, None)
    with accelerator.accumulate(prepared.model):
        batch = batch.to(accelerator.device)
        prepared.dropout_keys.keys, prepared.dropout_keys.lengths = batch.token_keys, batch.example_lengths
        prepared.model.train()
        loss = summed_token_loss(prepared.model, batch, config.training.label_smoothing)
        accelerator.backward(loss * (factor / batch.targets.numel()))
    accelerator.clip_grad_norm_(prepared.trainable, config.training.max_grad_norm or torch.inf)
    prepared.optimizer.step()
    prepared.optimizer.zero_grad()
    _synchronize(accelerator.device)
    return time.perf_counter() - began


def _synchronize(device: torch.device) -> None:
    import torch

    if device.type != "cpu":
        torch.accelerator.synchronize()


class _ProcessMemory(NamedTuple):
    """Memory of this process, in bytes."""

    resident: int
    peak: int


class _MemoryMeter:
    """The peak memory of a device since `begin`, beyond what was in use before the model was loaded."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = 0 if device.type != "cpu" else _process_memory().resident

    def begin(self) -> int:
        """Forget earlier peaks, those of loading; return the memory that is in use now."""
        import torch

        if self._device.type != "cpu":
            torch.accelerator.reset_peak_memory_stats()
            return int(torch.accelerator.memory_allocated())
        reset = Path("/proc/self/clear_refs")
        if reset.exists():
            reset.write_text("5", encoding="ascii")  # proc(5): resets VmHWM to VmRSS
        return _process_memory().resident - self._before

    def peak(self) -> int:
        """Return the peak since `begin`."""
        import torch

        if self._device.type != "cpu":
            return int(torch.accelerator.max_memory_allocated())
        return _process_memory().peak - self._before


def _process_memory() -> _ProcessMemory:
    """Return this process's memory by /proc/self/status; elsewhere, with a peak that cannot be reset."""
    import psutil

    from lora_accel.training.metrics import peak_memory_bytes

    status = Path("/proc/self/status")
    if not status.exists():
        import torch

        return _ProcessMemory(psutil.Process().memory_info().rss, peak_memory_bytes(torch.device("cpu")))
    lines: dict[str, Any] = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
    return _ProcessMemory(*(1024 * int(lines[name].split()[0]) for name in ("VmRSS", "VmHWM")))


if __name__ == "__main__":
    sys.exit(main())
