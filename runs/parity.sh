#!/usr/bin/env bash
# Installs transformers and TRL into .venv-parity and compares this repository with them. Arguments go to pytest.
set -euo pipefail
venv=.venv-parity requirements=requirements-parity.txt
source "$(dirname "$0")/venv.sh"
"$venv/bin/python" -m pytest -q tests/test_parity.py "$@"
