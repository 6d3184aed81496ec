#!/usr/bin/env bash
# Runs the quick unit tests with the newest or with the lowest versions that pyproject.toml allows, in .ranges/RESOLUTION. `make setup`
# comes first. RESOLUTION is uv's word: highest or lowest-direct.
set -euo pipefail
cd "$(dirname "$0")/.."
resolution=${1:?say highest or lowest-direct}
uv=$(command -v uv || echo .venv/bin/uv)
bin=.ranges/$resolution/bin
torch=$(sed -n '/^torch==/p' requirements/torch.txt)
.venv/bin/python -m venv --clear ".ranges/$resolution"
export UV_DEFAULT_INDEX=${UV_DEFAULT_INDEX:-${PIP_INDEX_URL:-$($bin/pip config get global.index-url 2>/dev/null || echo https://pypi.org/simple)}}
"$uv" pip compile --quiet --python $bin/python --no-header --no-annotate --resolution "$resolution" \
  --override requirements/excluded.txt --override requirements/excluded_cpu.txt \
  --extra cpu --extra deepspeed --extra lora --extra embedded --extra eval --extra mlflow --extra wandb --extra dev \
  pyproject.toml -o $bin/../versions.txt >/dev/null
$bin/pip install -q --no-deps "$torch+cpu" 2>/dev/null || $bin/pip install -q --no-deps "$torch"
grep -v '^torch==' $bin/../versions.txt | "$uv" pip install --quiet --compile-bytecode --python $bin/python --no-deps -r -
"$uv" pip install --quiet --python $bin/python --no-deps --no-build-isolation -e .
OMP_NUM_THREADS=1 $bin/python -m pytest tests/unit -q -n 2 --dist loadfile -m "not slow"
