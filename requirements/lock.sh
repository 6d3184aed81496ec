#!/usr/bin/env bash
# Writes requirements/cpu.lock: every package of a CPU installation but torch (see torch.txt), with its hashes, to be installed
# with --no-deps. Needs `uv` on PATH (or in $UV). Run it after changing pyproject.toml, cpu.in or excluded.txt.
# Versions that still fit stay as they are; to move one, name it: requirements/lock.sh --upgrade-package transformers
set -euo pipefail
cd "$(dirname "$0")/.."
"${UV:-uv}" pip compile --quiet --python-version 3.11 --python-platform x86_64-manylinux_2_28 --generate-hashes \
  --no-header --no-annotate --override requirements/excluded.txt "$@" \
  --extra cpu --extra deepspeed --extra lora --extra embedded --extra eval --extra mlflow --extra wandb --extra dev pyproject.toml requirements/cpu.in -o requirements/cpu.lock >/dev/null
{
  echo '# Made by requirements/lock.sh; do not edit. Install: pip install --no-deps --require-hashes -r requirements/cpu.lock'
  awk '/^[^ ]/ { torch = /^torch==/ } !torch' requirements/cpu.lock
} > requirements/cpu.lock.new
mv requirements/cpu.lock.new requirements/cpu.lock
