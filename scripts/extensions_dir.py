"""Print where DeepSpeed's extensions are built for tests and the quickstart: in the environment, once for each version.

The cache of the user (`~/.cache/torch_extensions`) is shared with other programs, and with their unfinished builds.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import sys
from pathlib import Path


def extensions_dir() -> Path:
    """Return the folder of the installed versions of torch and DeepSpeed."""
    parts = []
    for name in ("torch", "deepspeed"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # DeepSpeed is for Linux only
            parts += [name, importlib.metadata.version(name)]
    return Path(sys.prefix) / "torch_extensions" / "-".join(parts)


if __name__ == "__main__":
    print(extensions_dir())
