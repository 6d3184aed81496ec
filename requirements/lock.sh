#!/usr/bin/env bash
# Writes requirements/cpu.lock: every package of a CPU installation with its hashes, to be installed with --no-deps.
# Needs `uv` on PATH (or in $UV). Run it after changing pyproject.toml, cpu.in or excluded.txt.
set -euo pipefail
cd "$(dirname "$0")/.."
"${UV:-uv}" pip compile --quiet --python-version 3.11 --python-platform x86_64-manylinux_2_28 --generate-hashes \
  --no-header --no-annotate --override requirements/excluded.txt \
  --extra cpu --extra deepspeed --extra embedded --extra dev pyproject.toml requirements/cpu.in -o requirements/cpu.lock >/dev/null
# PyTorch publishes its CPU build (2.13.0+cpu, cp311, x86_64) outside PyPI: allow that file beside PyPI's, so that pip takes it where it is offered.
cpu_wheel=6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b
sed -i "s|^torch==2.13.0 .$|&\n    --hash=sha256:${cpu_wheel} \\\\|" requirements/cpu.lock
sed -i '1i # Made by requirements/lock.sh; do not edit. Install: pip install --no-deps --require-hashes -r requirements/cpu.lock' requirements/cpu.lock
