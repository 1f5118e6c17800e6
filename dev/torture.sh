#!/usr/bin/env bash
# Kills runs of every kind at 60 moments and compares what becomes of them with uninterrupted runs,
# byte by byte.
set -euo pipefail
source "$(dirname "$0")/../runs/venv.sh" .venv requirements-dev.txt
exec "$venv/bin/python" dev/torture.py "$@"
