"""Errors in `on_all_ranks`, on a single process. The other tests here run several."""

from __future__ import annotations

import errno
import os

import pytest
from accelerate import Accelerator
from safetensors import SafetensorError

from lora_accel.distributed.collectives import on_all_ranks
from lora_accel.errors import ConfigError, TrainingError


def fail_with(error: BaseException) -> None:
    with on_all_ranks(Accelerator(), "saving step-00000003"):
        raise error


def test_successful_block() -> None:
    done = []
    with on_all_ranks(Accelerator(), "saving step-00000003"):
        done.append(1)
    assert done == [1]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO])
def test_full_disk_raises_with_rank_and_remedy(number: int) -> None:
    error = OSError(number, os.strerror(number), "/run/checkpoints")
    with pytest.raises(TrainingError) as caught:
        fail_with(error)
    message = str(caught.value)
    assert message.startswith(f"saving step-00000003 failed on rank 0: OSError: [Errno {number}] {os.strerror(number)}")
    assert message.endswith("Earlier files are unchanged. Free up space and run the same command to resume.")
    assert caught.value.__cause__ is error
    assert caught.value.exit_code == 3


def test_full_disk_error_of_a_rust_library() -> None:
    message = "Error while serializing: I/O error: No space left on device (os error 28)"
    with pytest.raises(TrainingError, match="failed on rank 0: SafetensorError: Error while serializing"):
        fail_with(SafetensorError(message))


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
def test_other_errors_are_raised_unchanged(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught:
        fail_with(error)
    assert caught.value is error
