#!/usr/bin/env bash
# Makes an environment with exact versions, and spin_ray in it: `make setup` calls `setup.sh cpu` for .venv (tested together),
# `make gpu-setup` `setup.sh gpu` for .venv-gpu (upstream's vLLM and CUDA's torch). $PYTHON chooses the interpreter. uv installs
# (from PyPI, if it is not on PATH), as it takes a third of pip's time; pip does where uv cannot.
set -euo pipefail
cd "$(dirname "$0")/.."
case ${1:-cpu} in
  cpu) lock=requirements/cpu.lock venv=.venv ;;
  gpu) lock=requirements/gpu.lock venv=.venv-gpu ;;
  *) echo "setup: $1: is neither cpu nor gpu" >&2; exit 1 ;;
esac
started=$SECONDS
say() { echo "setup: $* (${SECONDS} s)" >&2; }
give_up() { echo "setup: $*" >&2; exit 1; }

find_python() { # prints the first of the candidates that runs, is new enough and can make an environment
  local candidate
  for candidate in ${PYTHON:-python3.12 python3.13 python3.11}; do
    "$candidate" -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && echo "$candidate" && return
  done
  return 1
}

[ "$(uname -sm)" = "Linux x86_64" ] || give_up "$lock is for Linux on x86-64, this is $(uname -sm); README.md says what works elsewhere"
if [ "$venv" = .venv-gpu ] && ! nvidia-smi -L >/dev/null 2>&1; then say "no NVIDIA driver answers here (nvidia-smi -L): a run will need one"; fi
if ! $venv/bin/python -c '' 2>/dev/null; then
  python=$(find_python) || give_up "no ${PYTHON:-Python 3.11, 3.12 or 3.13} with the module venv (Debian, Ubuntu: apt install python3-venv); or say PYTHON=/path/to/python"
  "$python" -m venv --clear $venv
fi
bin=$venv/bin
if [ "$venv" = .venv-gpu ]; then # vLLM and torch.compile need it when they run; told before gigabytes are installed
  missing=$($bin/python -c 'import sys; sys.path.append("spin_ray/config"); from compilers import missing_tools; print(missing_tools() or "")')
  if [ -n "$missing" ]; then say "a run on a GPU will need $missing"; fi
fi
uv=$(command -v uv || true)
if [ -z "$uv" ] && $bin/pip install -q uv 2>/dev/null; then uv=$bin/uv; fi
export UV_DEFAULT_INDEX=${UV_DEFAULT_INDEX:-${PIP_INDEX_URL:-$($bin/pip config get global.index-url 2>/dev/null || echo https://pypi.org/simple)}}
install() { # installs exactly what it is told, no dependency of it; uncompiled, every process of Ray would start twice as slowly
  if [ -n "$uv" ] && "$uv" pip install --quiet --compile-bytecode --python $bin/python --no-deps "$@"; then return; fi
  $bin/pip install -q --no-deps "$@"
}

# gpu.lock has torch. For CPUs it comes first and apart: its CPU build from where pip looks anyway (a mirror, a folder of wheels),
# else from PyTorch's own index, else PyPI's, which needs CUDA's libraries (requirements/torch.txt says why it is not in the lock).
torch=$(sed -n '/^torch==/p' requirements/torch.txt)
if [ "$venv" = .venv ] && ! $bin/python -c 'import sys, torch; sys.exit(torch.__version__.split("+")[0] != sys.argv[1])' "${torch#torch==}" 2>/dev/null; then
  say "$($bin/python --version): installing $torch"
  $bin/pip install -q --no-deps "$torch+cpu" 2>/dev/null \
    || $bin/pip install -q --no-deps --retries 1 --timeout 30 --index-url "${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}" "$torch" 2>/dev/null \
    || { say "no CPU build of $torch is to be had: taking PyPI's with CUDA's libraries, 3 GB"
         { [ -n "$uv" ] && "$uv" pip install --quiet --compile-bytecode --python $bin/python "$torch"; } || $bin/pip install -q "$torch"; }
fi
say "installing $(grep -c '^[a-z]' $lock) packages of $lock${uv:+ by uv}"
install --require-hashes -r $lock
install --no-build-isolation -e .
$bin/python -m compileall -q spin_ray tests  # under PYTHONDONTWRITEBYTECODE every process would compile them: a second each
say "preparing the embedded model in the cache (once)"
$bin/python -c 'from spin_ray.inputs.embedded import resolve; resolve("embedded:smollm2-135m-instruct")' >$venv/.ready.log 2>&1 \
  || give_up "$(tail -n 1 $venv/.ready.log); the embedded model could not be made, $venv/.ready.log has the whole message"
say "done, in $((SECONDS - started)) s"
