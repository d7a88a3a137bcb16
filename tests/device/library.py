"""Compiles fake_cuda.cpp. A process that preloads it can let torch believe that there is a GPU (fake_cuda.py)."""

from __future__ import annotations

import subprocess
from pathlib import Path

from filelock import FileLock
from scripts.extensions_dir import extensions_dir

SOURCE = Path(__file__).with_name("fake_cuda.cpp")
TIMEOUT_SECONDS = 600


def build_library() -> Path:
    """Return the compiled library; it is built once for each torch."""
    import torch
    import torch.utils.cpp_extension as cpp

    folder = extensions_dir() / "fake_cuda"
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"fake_cuda-{torch.__version__}-{SOURCE.stat().st_mtime_ns}.so"
    with FileLock(folder / "lock"):
        if not target.exists():
            libraries = Path(torch.__file__).parent / "lib"
            includes = [f"-I{path}" for path in cpp.include_paths()]
            command = ["g++", "-shared", "-fPIC", "-std=c++20", str(SOURCE), "-o", f"{target}.part", *includes]
            command += [f"-L{libraries}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{libraries}"]
            subprocess.run(command, check=True, capture_output=True, timeout=TIMEOUT_SECONDS)
            Path(f"{target}.part").rename(target)
    return target


if __name__ == "__main__":
    print(build_library())
