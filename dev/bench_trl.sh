#!/usr/bin/env bash
# Installs transformers and TRL into .venv-parity and races their training step against this
# repository's, side by side. Arguments go to dev/bench_trl.py: --only=tiny,dpo for some of the
# lines. All of them take about 30 minutes on 2 cores.
set -euo pipefail
source "$(dirname "$0")/../runs/venv.sh" .venv-parity requirements-parity.txt
HF_HUB_OFFLINE=1 "$venv/bin/python" dev/bench_trl.py "$@"
