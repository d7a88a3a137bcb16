"""Print where DeepSpeed's extensions are built for tests and the quickstart: in the environment, once for each version.

The cache of the user (`~/.cache/torch_extensions`) is shared with other programs, and with their unfinished builds.
"""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path


def extensions_dir() -> Path:
    """Return the folder of the installed versions of torch and DeepSpeed."""
    versions = [importlib.metadata.version(name) for name in ("torch", "deepspeed")]
    return Path(sys.prefix) / "torch_extensions" / "-".join(["torch", versions[0], "deepspeed", versions[1]])


if __name__ == "__main__":
    print(extensions_dir())
