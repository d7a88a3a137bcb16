#!/usr/bin/env bash
# The main job on the embedded real model: install, fetch, train, merge, and show what was learned.
# About 8 minutes on two CPU cores. Can be run again: a finished part is not done twice.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
[ -d .venv ] || "$PYTHON" -m venv .venv
.venv/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[quickstart]'

# Waiting threads spin a little and then sleep: while something else needs a core, spinning on costs tenfold and more.
export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-10000}
# Freed memory is kept and used again: fresh pages are dear, above all in a virtual machine (glibc's names).
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184 MALLOC_TOP_PAD_=67108864
# DeepSpeed's extensions are not built in the user's cache, where another program may have left a build half done.
TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$(.venv/bin/python scripts/extensions_dir.py)}
export TORCH_EXTENSIONS_DIR
run=runs/quickstart
.venv/bin/python scripts/fetch_model.py
.venv/bin/accelerate launch --config_file accelerate_configs/cpu.yaml --quiet -m lora_accel.train --config recipes/quickstart.yaml
.venv/bin/lora-accel merge "$run/adapter" "$run/merged" --overwrite
.venv/bin/lora-accel generate --adapter "$run/adapter" --merged "$run/merged" --compare \
    --system 'Order to JSON.' \
    "hi its Priya Raman again, could u send 2 dozen blue mugs by fri? no rush"
.venv/bin/lora-accel evaluate --config recipes/quickstart.yaml --adapter "$run/adapter" --merged "$run/merged" --max-new-tokens 64
