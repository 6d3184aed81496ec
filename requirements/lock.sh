#!/usr/bin/env bash
# Writes requirements/cpu.lock and gpu.lock: one resolution each for every Python that is supported, with hashes, to be installed
# with --no-deps. cpu.lock leaves torch out (see torch.txt). Needs `uv` on PATH (or in $UV). Run it after changing pyproject.toml,
# cpu.in, gpu.in or excluded*.txt. Versions that still fit stay; to move one, name it: requirements/lock.sh --upgrade-package transformers
set -euo pipefail
cd "$(dirname "$0")/.."

lock() { # NAME [OPTION...]: resolves pyproject.toml with NAME.in into NAME.lock
  local name=$1 lock=requirements/$1.lock
  shift
  "${UV:-uv}" pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
    --override requirements/excluded.txt "$@" \
    pyproject.toml "requirements/$name.in" -o "$lock" >/dev/null
  # Every package is for these machines: pyproject.toml, [tool.uv].
  sed -i -E "s/ and platform_machine == 'x86_64' and sys_platform == 'linux'//
    s/ ; platform_machine == 'x86_64' and sys_platform == 'linux'//" "$lock"
  sed -i "1i # Made by requirements/lock.sh; do not edit. Install: pip install --no-deps --require-hashes -r $lock" "$lock"
}

lock cpu --override requirements/excluded_cpu.txt \
  --extra cpu --extra deepspeed --extra lora --extra embedded --extra eval --extra mlflow --extra wandb --extra dev "$@"
awk '/^[^ ]/ { torch = /^torch==/ } !torch' requirements/cpu.lock > requirements/cpu.lock.new
mv requirements/cpu.lock.new requirements/cpu.lock
# uv keeps the versions that it finds in its output where they fit: here the tested ones of cpu.lock, then those of before.
touch requirements/gpu.lock
sed -nE 's/^([a-z0-9._-]+==[^ ;]+).*/\1/p' requirements/cpu.lock requirements/gpu.lock | awk -F== '!seen[$1]++' > requirements/gpu.lock.new
mv requirements/gpu.lock.new requirements/gpu.lock
lock gpu --extra gpu --extra deepspeed --extra lora --extra quantised --extra embedded --extra eval --extra mlflow --extra wandb "$@"
