"""The compiled library that makes torch believe in a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.device.library import build_library


@pytest.fixture(scope="session")
def library() -> Path:
    """Compile fake_cuda.cpp."""
    return build_library()
