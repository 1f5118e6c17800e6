#!/usr/bin/env bash
# Installs torch_xla into .venv-xla (gigabytes: the torch that comes with it is CUDA's) and compares
# --device=xla with --device=cpu, on torch_xla's own CPU device.
set -euo pipefail
source "$(dirname "$0")/venv.sh" .venv-xla requirements-xla.txt requirements-xla.txt
PJRT_DEVICE=${PJRT_DEVICE:-CPU} "$venv/bin/python" runs/xla_check.py
