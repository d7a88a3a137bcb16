"""Start training processes as forks of a process that has imported everything, which saves seconds of imports.

A fork gets the environment that `accelerate launch` sets (read once per preset) and runs `lora_accel.train.main`.
Like a launcher, `finish` ends the other ranks when one has failed.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import resource
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tests.conftest import PATIENCE_SECONDS
from tests.distributed.launching import free_port, launch
from tests.forked import become, context

DUMP = "import json, os; print('ENV' + json.dumps(dict(os.environ)))"
OPTIONS = {"zero1": ("--num_processes", "2", "--mixed_precision", "no")}
"""Options for presets whose values do not suit the tests."""
ENDED = (-signal.SIGTERM, 128 + signal.SIGTERM)
"""Exit codes of a rank that was ended because another one had failed, before and after it handles signals."""


class Forks:
    """Starts training processes; keeps their logs in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._environments: dict[tuple[str, ...], dict[str, str]] = {}

    def environment(self, preset: str, *options: str) -> dict[str, str]:
        """Return the environment that `accelerate launch` sets for rank 0, per preset and options. Cached."""
        key = (preset, *(options or OPTIONS.get(preset, ())))
        if key not in self._environments:
            script = self._folder / "dump.py"
            script.write_text(DUMP, encoding="utf-8")
            process = launch(*key[1:], script, preset=preset)
            line = next(line for line in process.stdout.splitlines() if "ENV{" in line)
            # Two processes may print on the same line.
            launched, _ = json.JSONDecoder().raw_decode(line[line.index("ENV{") + 3 :])
            self._environments[key] = {name: value for name, value in launched.items() if os.environ.get(name) != value}
        return self._environments[key]

    def start(self, preset: str, args: list[str], options: tuple[str, ...] = (), **changes: str) -> list[BaseProcess]:
        """Start the processes of a preset.

        Args:
            args: arguments of `lora_accel.train`, or a script and its arguments.
            options: of `accelerate launch`.
            changes: changes to the environment.
        """
        shared = self.environment(preset, *options)
        if "ACCELERATE_USE_DEEPSPEED" in shared:
            build_ops()
        size = int(shared.get("WORLD_SIZE", "1"))
        port = free_port()
        processes = []
        for rank in range(size):
            environment = os.environ | shared | changes
            if size > 1 or "RANK" in shared:
                environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": port}
            environment.pop("TORCHELASTIC_ERROR_FILE", None)
            environment["TORCHELASTIC_USE_AGENT_STORE"] = "False"  # without torchrun's agent, rank 0 hosts the store
            log = self._folder / f"log-{preset}-{rank}"
            log.write_text("", encoding="utf-8")  # a rank may be ended before it opens it
            processes.append(context().Process(target=_rank, args=(args, dict(environment), str(log)), name=str(log)))
        for process in processes:
            process.start()
        return processes

    def launch(
        self, *args: str | Path, preset: str = "cpu_ddp", **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run to the end like `launching.launch`, without a launcher. stdout and stderr both contain all output.

        Args:
            args: options of `accelerate launch`, `-m lora_accel.train` or a script, and its arguments.
        """
        command = [str(arg) for arg in args]
        program = next(i for i, arg in enumerate(command) if arg == "-m" or arg.endswith(".py"))
        program_args = command[program + 2 :] if command[program] == "-m" else command[program:]
        processes = self.start(preset, program_args, tuple(command[:program]), **environment)
        codes = self.finish(processes)
        output = "".join(Path(process.name).read_text(encoding="utf-8") for process in processes)
        code = next((code for code in sorted(codes, key=ENDED.__contains__) if code), 0)
        return subprocess.CompletedProcess(command, code, output, output)

    def finish(self, processes: list[BaseProcess], timeout: float = PATIENCE_SECONDS) -> list[int]:
        """Wait for all ranks and return their exit codes. When one fails, the others are ended, as a launcher does."""
        deadline = time.monotonic() + timeout
        failed_at = None
        while any(process.is_alive() for process in processes):
            now = time.monotonic()
            if failed_at is None and any(process.exitcode not in (None, 0) for process in processes):
                failed_at = now
                for process in processes:
                    if process.is_alive():
                        process.terminate()
            if now > deadline or (failed_at is not None and now > failed_at + 30):
                for process in processes:
                    process.kill()
                if now > deadline:
                    raise AssertionError(f"still running after {timeout} seconds\n{self.log(processes)}")
            time.sleep(0.02)
        for process in processes:
            process.join()
        return [process.exitcode if process.exitcode is not None else 1 for process in processes]

    def run(self, preset: str, args: list[str], **changes: str) -> list[int]:
        """Run to the end and return the exit codes of the ranks."""
        return self.finish(self.start(preset, args, **changes))

    def log(self, processes: list[BaseProcess] | None = None) -> str:
        """Return the end of the latest logs."""
        logs = sorted(self._folder.glob("log-*"), key=lambda path: path.stat().st_mtime)[-2:]
        return "\n".join(path.read_text(encoding="utf-8", errors="replace")[-3000:] for path in logs)


def _rank(args: list[str], environment: dict[str, str], log: str) -> None:
    """Run one rank, in a fork."""
    become(environment, log, log)
    if environment.get("FSIZE_RANK") == environment.get("RANK", "0"):
        limit = int(environment["FSIZE"])
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    if args[0].endswith(".py"):
        sys.argv = args
        runpy.run_path(args[0], run_name="__main__")
        return
    from lora_accel import train
    from lora_accel.distributed.launch import exit_process

    SABOTAGES[environment.get("SABOTAGE", "none")]()
    exit_process(train.main(args))


def _write_in_place() -> None:
    """Write checkpoints without a temporary folder."""
    from lora_accel.saving import atomic, checkpoint

    @contextlib.contextmanager
    def in_place(final: Path, hashes: dict[str, str]) -> Iterator[Path]:
        final.mkdir(parents=True, exist_ok=True)
        yield final
        atomic.fault_point("save.before_manifest")
        atomic.write_manifest(final, hashes)

    checkpoint.atomic_folder = in_place


def _skip_moments() -> None:
    """Resume without restoring the optimizer's moments."""
    from lora_accel.saving import checkpoint

    checkpoint._restore_moments = lambda *_: None


def _keep_log() -> None:
    """Keep the log lines of steps that are repeated."""
    from lora_accel.training import metrics

    metrics.truncate_log = lambda *_, **__: None


def _overflow() -> None:
    """Make gradients of some steps overflow float16 at any loss scale above 1, without changing the loss value."""
    import torch

    from lora_accel.training import loop
    from lora_accel.training import step as step_module

    steps = {int(step) for step in os.environ["OVERFLOW_STEPS"].split(",")}
    original_step, original_loss = step_module.train_step, step_module.summed_token_loss

    def train_step(run: Any, step: int) -> Any:
        def loss(*args: Any) -> torch.Tensor:
            value = original_loss(*args)
            huge = value * 1e30
            return value + (huge - huge.detach()) if step + 1 in steps else value

        step_module.summed_token_loss = loss
        return original_step(run, step)

    loop.train_step = train_step


def _fail_second_reply() -> None:
    """Raise an error while generating the reply to the second prompt, alone and in a batch."""
    from lora_accel.training import replies

    original = replies.generate_replies

    def generate_replies(*arguments: Any, numbers: Sequence[int], **options: Any) -> list[str]:
        if 1 in numbers:
            raise RuntimeError("out of luck")
        return original(*arguments, numbers=numbers, **options)

    replies.generate_replies = generate_replies


def _fail_replies_of_rank_1() -> None:
    """Raise an error on rank 1 while rank 0 generates the same replies."""
    if os.environ["RANK"] == "1":
        from lora_accel.training import replies

        def generate_replies(*_: Any, **__: Any) -> list[str]:
            raise RuntimeError("out of luck")

        replies.generate_replies = generate_replies


def _exhaust_memory_of_rank_1() -> None:
    """Let an allocation of rank 1 fail in the third step, while rank 0 waits for its gradients."""
    if os.environ["RANK"] == "1":
        import torch

        from lora_accel.training import loop
        from lora_accel.training import step as step_module

        original = step_module.train_step

        def train_step(run: Any, step: int) -> Any:
            if step == 2:
                step_module.summed_token_loss = lambda *_: torch.empty(2**50)
            return original(run, step)

        loop.train_step = train_step


def _be_impatient() -> None:
    """Report a stalled rank after two seconds."""
    from lora_accel.distributed import heartbeat

    heartbeat.BEAT_SECONDS, heartbeat.REPORT_SECONDS, heartbeat.SILENT_SECONDS = 0.2, 2.0, 1.0


SABOTAGES = {
    "none": lambda: None,
    "impatient": _be_impatient,
    "second reply fails": _fail_second_reply,
    "replies of rank 1 fail": _fail_replies_of_rank_1,
    "rank 1 exhausts memory": _exhaust_memory_of_rank_1,
    "overflows": _overflow,
    "writes in place": _write_in_place,
    "skips moments": _skip_moments,
    "keeps the log": _keep_log,
}
"""Patches that remove a protection, to check that the tests then fail, or that inject an error."""


@functools.cache
def build_ops() -> None:
    """Build DeepSpeed's op before tests kill processes, which could leave an unfinished build."""
    program = (
        "from deepspeed.accelerator import get_accelerator as a\n"
        "a().create_op_builder('ShareMemCommBuilder').load(verbose=False)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
