#!/usr/bin/env bash
# All that CI runs: install, lint, types, import rules, tests. Further words go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=.venv constraints=constraints.txt
if [ "${1:-}" = --oldest ]; then
    venv=.venv-oldest constraints=constraints-oldest.txt
fi
PYTHON=${PYTHON:-python3}
[ -d "$venv" ] || "$PYTHON" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --constraint "$constraints" --editable '.[dev]'

export PATH="$PWD/$venv/bin:$PATH"
if [ "${1:-}" = --oldest ]; then # whether the lower bounds hold: no lint, and nothing that is launched
    OMP_NUM_THREADS=1 exec python -m pytest -m 'not distributed and not smollm and not slow' "${@:2}"
fi
ruff format --check .
ruff check .
codespell src tests scripts docs recipes ./*.md
mypy
lint-imports
python scripts/fetch_model.py
# DeepSpeed compiles these at their first use; once here, before many processes want them.
python -c 'from deepspeed.accelerator import get_accelerator as a; [a().create_op_builder(op).load(verbose=False) for op in ("ShareMemCommBuilder", "CPUAdamBuilder")]'
# One thread for each of the two workers: more only wait for each other.
OMP_NUM_THREADS=1 python -m pytest -n 2 --dist loadfile --cov --cov-report=term "$@"
