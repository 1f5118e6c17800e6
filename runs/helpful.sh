#!/usr/bin/env bash
# The paper's protocol on the helpful half of Anthropic's HH dialogues; see runs/tldr.sh. SFT is on the preferred replies.
set -euo pipefail
source "$(dirname "$0")/venv.sh" .venv requirements.txt
exec "$venv/bin/python" runs/protocol.py --data=Anthropic/hh-rlhf/helpful-base --sft_data=Anthropic/hh-rlhf/helpful-base \
    --out=out/helpful --max_new_tokens=128 "$@"
