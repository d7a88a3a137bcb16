#!/usr/bin/env bash
# Everything that CI runs: install, lint, types, import rules, tests. Other arguments go to pytest.
#
#   scripts/test.sh --fast     while working: lint, types, and the tests that start no process and train no longer than a second
#   scripts/test.sh            before a commit: all of them except the fault matrices
#   scripts/test.sh --faults   a change of saving, stopping or resuming: the fault matrices too
#   scripts/test.sh --oldest   the fast tests on the lower bounds of pyproject.toml (constraints-oldest.txt)
set -euo pipefail
cd "$(dirname "$0")/.."

venv=.venv constraints=constraints.txt extra=dev tier=ordinary
case "${1:-}" in
    --fast) tier=fast ;; # pytest has this option too
    --oldest) # the lower bounds of pyproject.toml
        venv=.venv-oldest constraints=constraints-oldest.txt extra=test tier=oldest
        shift
        set -- --fast "$@"
        ;;
esac

# Reinstalls only when the requirements have changed.
requirements=$(cat pyproject.toml "$constraints" | cksum)
if [ "$(cat "$venv/installed" 2>/dev/null)" != "$requirements" ]; then
    [ -d "$venv" ] || "${PYTHON:-python3}" -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet --constraint "$constraints" --editable ".[$extra]"
    echo "$requirements" >"$venv/installed"
fi
export PATH="$PWD/$venv/bin:$PATH"

if [ "$tier" != oldest ]; then
    ruff format --check .
    ruff check .
    codespell src tests scripts docs recipes ./*.md
    python scripts/check_language.py
    mypy
    lint-imports
fi
TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$(python scripts/extensions_dir.py)}
export TORCH_EXTENSIONS_DIR
unset PYTHONDONTWRITEBYTECODE # pytest rewrites every assertion: 10 s of each start, unless it may keep what it wrote
if [ "$tier" = ordinary ]; then
    python scripts/fetch_model.py
    # DeepSpeed compiles these at first use: once here, before many processes need them.
    python -c 'from deepspeed.accelerator import get_accelerator as a; [a().create_op_builder(op).load(verbose=False) for op in ("ShareMemCommBuilder", "CPUAdamBuilder")]'
fi
# One thread for each of the two workers: more would wait for each other.
OMP_NUM_THREADS=1 python -m pytest -n 2 --dist worksteal "$@"
