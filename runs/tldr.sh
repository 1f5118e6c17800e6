#!/usr/bin/env bash
# The paper's protocol on TL;DR (Reddit posts and their summaries, compared by people), at the paper's scale: 30,000 pairs,
# reward models of 3,000 steps of 64 pairs, policies of 10,000 steps of 16. Everything is a flag of runs/protocol.py: the
# last one given counts. On a small machine, from files:
#
#   bash runs/tldr.sh --data=prefs.jsonl --sft_data=demos.jsonl --init_from=scratch --n_pairs=300 --sft_steps=300 \
#       --oracle_steps=100 --rm_steps=60 --steps=100
set -euo pipefail
source "$(dirname "$0")/venv.sh" .venv requirements.txt
exec "$venv/bin/python" runs/protocol.py --data=trl-lib/tldr-preference --sft_data=trl-lib/tldr --out=out/tldr --n_pairs=30000 "$@"
