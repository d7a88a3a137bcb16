"""Print the folder in which tests and the quickstart build DeepSpeed's extensions: in .venv, one per version.

The default, `~/.cache/torch_extensions`, is shared with other programs and may contain their unfinished builds.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import sys
from pathlib import Path


def extensions_dir() -> Path:
    """Return the folder for the installed versions of torch and DeepSpeed."""
    parts = []
    for name in ("torch", "deepspeed"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # DeepSpeed is installed on Linux only
            parts += [name, importlib.metadata.version(name)]
    return Path(sys.prefix) / "torch_extensions" / "-".join(parts)


if __name__ == "__main__":
    print(extensions_dir())
