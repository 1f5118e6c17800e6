#!/usr/bin/env bash
# Mutation testing: see dev/mutants.py, to which arguments go.
set -euo pipefail
source "$(dirname "$0")/../runs/venv.sh" .venv requirements-dev.txt
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check mutmut==3.8.1
"$venv/bin/python" dev/mutants.py "$@"
