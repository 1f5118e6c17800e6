#!/usr/bin/env bash
# Installs transformers, TRL and PEFT into .venv-parity and compares this repository with them.
# Arguments go to pytest.
set -euo pipefail
source "$(dirname "$0")/../runs/venv.sh" .venv-parity requirements-parity.txt
"$venv/bin/python" -c "import transformers, trl, peft"    # without them the tests would be skipped
tests=tests/plumbing
"$venv/bin/python" -m pytest -q $tests/test_parity.py $tests/test_families.py \
    $tests/test_zoo_parity.py "$@"
