#!/usr/bin/env bash
# Installs into .venv and runs the tests: no network after the installation, no accelerator.
# Arguments go to pytest.
set -euo pipefail
source "$(dirname "$0")/venv.sh" .venv requirements-dev.txt
"$venv/bin/python" -m pytest -q --numprocesses=auto --maxprocesses=4 --dist=loadfile "$@"
