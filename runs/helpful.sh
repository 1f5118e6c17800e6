#!/usr/bin/env bash
# The paper's protocol on the helpful half of Anthropic's HH dialogues, in its unbiased setting:
# people's own labels, on all pairs as they come. SFT is on the preferred replies. Everything is a
# flag of runs/protocol.py, and the last one given counts: --labels=oracle --rho=0.2 is the biased
# setting, as in runs/tldr.sh.
set -euo pipefail
source "$(dirname "$0")/venv.sh" .venv requirements-dev.txt
exec "$venv/bin/python" runs/protocol.py --data=Anthropic/hh-rlhf/helpful-base \
    --sft_data=Anthropic/hh-rlhf/helpful-base --out=out/helpful --labels=human --rho=all \
    "$@"
