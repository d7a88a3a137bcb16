"""A block that may fail on one process alone. Several processes: tests/distributed."""

from __future__ import annotations

import errno
import os

import pytest
from accelerate import Accelerator
from safetensors import SafetensorError

from lora_accel.distributed.collectives import on_all_ranks
from lora_accel.errors import ConfigError, TrainingError


def fail(error: BaseException) -> None:
    with on_all_ranks(Accelerator(), "saving step-00000003"):
        raise error


def test_a_block_that_ends_well_is_no_error() -> None:
    done = []
    with on_all_ranks(Accelerator(), "saving step-00000003"):
        done.append(1)
    assert done == [1]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO])
def test_a_full_disk_names_the_rank_what_failed_and_the_way_out(number: int) -> None:
    error = OSError(number, os.strerror(number), "/run/checkpoints")
    with pytest.raises(TrainingError) as caught:
        fail(error)
    said = str(caught.value)
    assert said.startswith(f"saving step-00000003 failed on rank 0: OSError: [Errno {number}] {os.strerror(number)}")
    assert said.endswith("What was saved before is as it was; make room, and the same command goes on")
    assert caught.value.__cause__ is error
    assert caught.value.exit_code == 3


def test_a_full_disk_told_by_a_library_in_rust_is_one() -> None:
    words = "Error while serializing: I/O error: No space left on device (os error 28)"
    with pytest.raises(TrainingError, match="failed on rank 0: SafetensorError: Error while serializing"):
        fail(SafetensorError(words))


@pytest.mark.parametrize(
    "error",
    [
        ValueError("a bug"),
        ConfigError("output_dir: wrong"),
        FileNotFoundError(errno.ENOENT, "No such file or directory"),
        PermissionError(errno.EACCES, "Permission denied"),
        RuntimeError("(os error 2)"),
        KeyboardInterrupt(),
        SystemExit(3),
    ],
    ids=lambda error: type(error).__name__,
)
def test_any_other_error_stays_as_it_is(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught:
        fail(error)
    assert caught.value is error
