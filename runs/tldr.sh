#!/usr/bin/env bash
# The paper's protocol on TL;DR (Reddit posts and their summaries, compared by people), at the
# paper's scale: 30,000 pairs, reward models of 3,000 steps of 64 pairs, policies of 10,000 steps of
# 16. Everything is a flag of runs/protocol.py: the last one given counts. On a small machine, from
# files:
#
#   bash runs/tldr.sh --data=prefs.jsonl --sft_data=demos.jsonl --init_from=scratch --n_pairs=200 \
#       --sft_steps=300 --sft_batch_size=16 --sft_lr=1e-3 --oracle_steps=100 --rm_steps=60 \
#       --rm_batch_size=16 --rm_lr=1e-4 --steps=60 --batch_size=8 --lr=5e-5 --n_prompts=100
set -euo pipefail
source "$(dirname "$0")/venv.sh" .venv requirements-dev.txt
exec "$venv/bin/python" runs/protocol.py --data=trl-lib/tldr-preference --sft_data=trl-lib/tldr \
    --out=out/tldr --n_pairs=30000 "$@"
