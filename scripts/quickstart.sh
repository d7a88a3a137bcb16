#!/usr/bin/env bash
# The quickstart on a real model: install, fetch the model, train, merge and evaluate, on two CPU cores.
#
#   scripts/quickstart.sh                              # results in runs/quickstart
#   scripts/quickstart.sh seed=1                       # arguments are overrides of the recipe; results in runs/quickstart-seed-1
#   scripts/quickstart.sh seed=1 output_dir=runs/mine
#
# Run it again after an interruption: it skips finished stages, and training resumes from its newest checkpoint.
set -euo pipefail
cd "$(dirname "$0")/.."

recipe=recipes/quickstart.yaml
run=runs/quickstart
for override in "$@"; do run+=-${override//[^[:alnum:]._]/-}; done
overrides=("output_dir=$run" "$@")
for override in "$@"; do
    case $override in output_dir=*) run=${override#*=} overrides=("$@") ;; esac
done

started=$SECONDS
stage() {
    echo "[$1/5] $2 …"
    stage_started=$SECONDS
}
finish() { echo "      ${1:-done} in $((SECONDS - stage_started)) s"; }

stage 1 "install into .venv"
[ -d .venv ] || "${PYTHON:-python3}" -m venv .venv
# Skip the installation if the requirements are those of the last one, by this script or by scripts/test.sh.
requirements=$(cat pyproject.toml constraints.txt | cksum)
if ! cat .venv/installed .venv/installed-quickstart 2>/dev/null | grep -qxF "$requirements"; then
    .venv/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[quickstart]'
    echo "$requirements" >.venv/installed-quickstart
fi
finish

stage 2 "fetch SmolLM2-135M-Instruct"
.venv/bin/python scripts/fetch_model.py
finish

# Idle threads spin briefly and then sleep: if other processes need the cores, longer spinning is many times slower.
export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-10000}
# glibc keeps and reuses freed memory: page faults are expensive, especially in a virtual machine.
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184 MALLOC_TOP_PAD_=67108864

# Build DeepSpeed's extensions in .venv: the user's cache may contain an unfinished build of another program.
TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$(.venv/bin/python scripts/extensions_dir.py)}
export TORCH_EXTENSIONS_DIR

stage 3 "train ($recipe)"
.venv/bin/lora-accel train --config "$recipe" "${overrides[@]}"
finish

stage 4 "merge the adapter into the base"
adapter=$run/adapter merged=$run/merged scores=$run/scores.json
if [ "$merged/config.json" -nt "$adapter/adapter_model.safetensors" ]; then
    echo "$merged is up to date"
else
    .venv/bin/lora-accel merge "$adapter" "$merged" --overwrite
fi
finish

stage 5 "score base, base + adapter and merged on held-out orders"
if [ "$scores" -nt "$merged/config.json" ]; then
    echo "$scores is up to date"
else
    # The longest answer has 31 tokens including its end token, so a longer reply cannot match.
    .venv/bin/lora-accel evaluate --config "$recipe" "${overrides[@]}" --adapter "$adapter" --merged "$merged" \
        --batch-size 100 --max-new-tokens 32 --json >"$scores.partial"
    mv "$scores.partial" "$scores"
fi
.venv/bin/lora-accel generate --adapter "$adapter" --merged "$merged" --compare --max-new-tokens 32 \
    "hi its Priya Raman again, could u send 2 dozen blue mugs by fri? no rush"
finish

.venv/bin/python - "$run" $((SECONDS - started)) <<'PYTHON'
import json, pathlib, sys

run, seconds = pathlib.Path(sys.argv[1]), int(sys.argv[2])
losses = [line for line in map(json.loads, open(run / "metrics.jsonl")) if line["kind"] == "train"]
print(f"\nfinished in {seconds // 60} min {seconds % 60} s: {losses[-1]['step']} steps, final loss {losses[-1]['loss']:.4f}\n")
print(f"{'model':<16}{'loss':>8}  exact match")
for score in json.load(open(run / "scores.json")):
    print(f"{score['name']:<16}{score['eval_loss']:>8.4f}  {score['exact_match']:.0%} of {score['rows']} held-out orders")
print(f"""
next:
  .venv/bin/lora-accel chat --adapter {run}/adapter             # chat with the adapter
  .venv/bin/lora-accel train --config recipes/my_rows.yaml     # train on your own rows: edit this file first
  vllm serve {run}/merged                                          # serve the merged model, where vLLM is installed""")
PYTHON
