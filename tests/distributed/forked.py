"""Start training processes without the seconds that imports take: forks of a process that has imported everything.

A fork gets the very environment that `accelerate launch` gives to its processes (asked once for each preset), runs
the very `lora_accel.train.main`, and dies a real death. What a launcher does besides, `finish` does: when one has
failed, it ends the others.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import resource
import runpy
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tests.conftest import PATIENCE_SECONDS
from tests.distributed.launching import free_port, launch
from tests.forked import become, context

DUMP = "import json, os; print('ENV' + json.dumps(dict(os.environ)))"
OPTIONS = {"zero1": ("--num_processes", "2", "--mixed_precision", "no")}
"""For presets that say something else than the tests want."""


class Forks:
    """Runs of one test module. Use it as a context."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._environments: dict[tuple[str, ...], dict[str, str]] = {}

    def environment(self, preset: str, *options: str) -> dict[str, str]:
        """Return what `accelerate launch` with this preset and options sets for its first process; asked once."""
        key = (preset, *(options or OPTIONS.get(preset, ())))
        if key not in self._environments:
            script = self._folder / "dump.py"
            script.write_text(DUMP, encoding="utf-8")
            ran = launch(*key[1:], script, preset=preset)
            line = next(line for line in ran.stdout.splitlines() if "ENV{" in line)
            # Two processes may print on one line: their line ends come later.
            told, _ = json.JSONDecoder().raw_decode(line[line.index("ENV{") + 3 :])
            self._environments[key] = {name: value for name, value in told.items() if os.environ.get(name) != value}
        return self._environments[key]

    def start(self, preset: str, words: list[str], options: tuple[str, ...] = (), **changes: str) -> list[BaseProcess]:
        """Start the processes of a preset.

        Args:
            words: arguments of `lora_accel.train`, or a script and its own.
            options: for `accelerate launch`.
            changes: of the environment.
        """
        shared = self.environment(preset, *options)
        if "ACCELERATE_USE_DEEPSPEED" in shared:
            ops_are_built()
        size = int(shared.get("WORLD_SIZE", "1"))
        port = free_port()
        processes = []
        for rank in range(size):
            own = os.environ | shared | changes
            if size > 1 or "RANK" in shared:
                own |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": port}
            own.pop("TORCHELASTIC_ERROR_FILE", None)
            own["TORCHELASTIC_USE_AGENT_STORE"] = "False"  # no agent here: rank 0 keeps the store in which all meet
            log = self._folder / f"log-{preset}-{rank}"
            log.unlink(missing_ok=True)
            processes.append(context().Process(target=_rank, args=(words, dict(own), str(log)), name=str(log)))
        for process in processes:
            process.start()
        return processes

    def launch(
        self, *words: str | Path, preset: str = "cpu_ddp", **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Do what `launching.launch` does, without a launcher. What ranks print is all in stdout, and again in stderr.

        Args:
            words: options of `accelerate launch`; then `-m lora_accel.train` or a script, and its arguments.
        """
        given = [str(word) for word in words]
        program = next(i for i, word in enumerate(given) if word == "-m" or word.endswith(".py"))
        arguments = given[program + 2 :] if given[program] == "-m" else given[program:]  # a training's, or a script's
        processes = self.start(preset, arguments, tuple(given[:program]), **environment)
        codes = self.finish(processes)
        printed = "".join(Path(process.name).read_text(encoding="utf-8") for process in processes)
        return subprocess.CompletedProcess(given, next((code for code in codes if code), 0), printed, printed)

    def finish(self, processes: list[BaseProcess], timeout: float = PATIENCE_SECONDS) -> list[int]:
        """Wait for all; when one has failed, end the others as a launcher does. Return their exit codes."""
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

    def run(self, preset: str, words: list[str], **changes: str) -> list[int]:
        """Run to the end; return the exit codes of the ranks."""
        return self.finish(self.start(preset, words, **changes))

    def log(self, processes: list[BaseProcess] | None = None) -> str:
        """Return what the latest processes have said."""
        logs = sorted(self._folder.glob("log-*"), key=lambda path: path.stat().st_mtime)[-2:]
        return "\n".join(path.read_text(encoding="utf-8", errors="replace")[-3000:] for path in logs)


def _rank(words: list[str], environment: dict[str, str], log: str) -> None:
    """Be a rank of a training, in a fork."""
    become(environment, log, log)
    if environment.get("FSIZE_RANK") == environment.get("RANK", "0"):
        most = int(environment["FSIZE"])
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    if words[0].endswith(".py"):
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")
        return
    from lora_accel import train
    from lora_accel.distributed.launch import exit_process

    SABOTAGES[environment.get("SABOTAGE", "none")]()
    exit_process(train.main(words))


def _writes_in_place() -> None:
    """A folder is written where it will stand."""
    from lora_accel.saving import atomic, checkpoint

    @contextlib.contextmanager
    def in_place(final: Path) -> Iterator[Path]:
        final.mkdir(parents=True, exist_ok=True)
        yield final
        atomic.fault_point("save.before_manifest")
        atomic.write_manifest(final)

    checkpoint.atomic_folder = in_place
    checkpoint.why_invalid = lambda *_, **__: None


def _forgets_moments() -> None:
    """A resumed run begins with fresh moments, as if they were not worth saving."""
    from lora_accel.saving import checkpoint

    checkpoint._restore_moments = lambda *_: None


def _keeps_the_log() -> None:
    """Lines of steps that are made again stay in the log."""
    from lora_accel.training import metrics

    metrics.keep_until = lambda *_, **__: None


def _overflows() -> None:
    """The loss of some steps is so large that gradients leave float16's range at any scale above 1."""
    import torch

    from lora_accel.training import loop
    from lora_accel.training import step as step_module

    steps = {int(step) for step in os.environ["OVERFLOW_STEPS"].split(",")}
    own_step, own_loss = step_module.train_step, step_module.summed_token_loss

    def train_step(run: Any, step: int) -> Any:
        def loss(model: Any, batch: Any) -> torch.Tensor:
            found = own_loss(model, batch)
            too_large = found * 1e30
            return found + (too_large - too_large.detach()) if step + 1 in steps else found  # the value stays

        step_module.summed_token_loss = loss
        return own_step(run, step)

    loop.train_step = train_step


def _second_reply_fails() -> None:
    """Generation raises for one prompt of two."""
    from lora_accel.training import evaluator

    own, calls = evaluator.replies_to, []

    def replies_to(*arguments: Any, **options: Any) -> list[str]:
        calls.append(arguments)
        if len(calls) == 2:
            raise RuntimeError("out of luck")
        return own(*arguments, **options)

    evaluator.replies_to = replies_to


SABOTAGES = {
    "none": lambda: None,
    "second reply fails": _second_reply_fails,
    "overflows": _overflows,
    "writes in place": _writes_in_place,
    "forgets moments": _forgets_moments,
    "keeps the log": _keeps_the_log,
}
"""Protections that a test takes away, to see itself fail."""


@functools.cache
def ops_are_built() -> None:
    """Let DeepSpeed compile its op once, before processes are killed within the build."""
    program = (
        "from deepspeed.accelerator import get_accelerator as a\n"
        "a().create_op_builder('ShareMemCommBuilder').load(verbose=False)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
