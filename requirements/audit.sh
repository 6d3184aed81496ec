#!/usr/bin/env bash
# Looks every locked package up in the database of known vulnerabilities at osv.dev; fails if one is listed there.
# Where the database cannot be reached it says so and checks nothing: that is no failure of the lock.
set -euo pipefail
cd "$(dirname "$0")/.."
database=https://api.osv.dev/v1/query
if ! reason=$(curl -sS --max-time 20 -o /dev/null -d '{"package": {"name": "pip", "ecosystem": "PyPI"}}' "$database" 2>&1); then
  echo "audit: NOT DONE: no vulnerability database can be reached ($database: $reason)" >&2
  exit 0
fi
test -x .audit/bin/pip-audit || { .venv/bin/python -m venv .audit && .audit/bin/pip install -q pip-audit==2.10.1; }
.audit/bin/pip-audit --disable-pip --no-deps --vulnerability-service osv -r requirements/cpu.lock -r requirements/torch.txt
