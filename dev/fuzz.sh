#!/usr/bin/env bash
# 50,000 made-up records, files and trees (FUZZ_CASES of each kind), new ones every time.
set -euo pipefail
export FUZZ_CASES=${FUZZ_CASES:-16667}
source "$(dirname "$0")/../runs/venv.sh" .venv requirements-dev.txt
exec "$venv/bin/python" -m pytest -q tests/plumbing/test_fuzz.py --hypothesis-show-statistics "$@"
