#!/usr/bin/env bash
# Mutation testing: see runs/mutants.py, to which arguments go.
set -euo pipefail
source "$(dirname "$0")/venv.sh" .venv requirements-dev.txt
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check mutmut==3.8.1
"$venv/bin/python" runs/mutants.py "$@"
