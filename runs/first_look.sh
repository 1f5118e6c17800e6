#!/usr/bin/env bash
# A first look, in less than two minutes: a small model learns to summarise, and then learns from
# preferences. out/first-look/report/report.md says what that changed. This is a short version of
# the first steps of runs/speedrun.sh. That one trains for longer and on more pairs, so don't
# compare the numbers of the two.
# The flags --seed=, --device= and --dtype= go to every command.
set -eo pipefail
source "$(dirname "$0")/venv.sh" .venv requirements-dev.txt
out=${OUT:-out}/first-look
start=$SECONDS
flags=("$@")
python() {
    echo; echo "[$((SECONDS - start)) s] python $* ${flags[*]}"
    "$venv/bin/python" "$@" "${flags[@]}"
}

rm -rf "$out"             # of an earlier look

# It learns from people's summaries, which are of mixed quality. Watch the two samples: at first they
# are noise, then words, then clauses.
python train_policy.py --loss=sft --out_dir="$out/sft" --max_steps=600 --batch_size=16

# It writes two summaries of each post. The oracle says which one is better, and DPO learns from that.
# Watch the reward.
python train_policy.py --loss=dpo --out_dir="$out/dpo" --init_from="$out/sft" --max_steps=100 \
    --pool=1500 --n_pairs=600 --select=oracle

# Both summarise 300 posts that neither was trained on. The advantage is what DPO has gained.
python evaluate.py --out_dir="$out/report" --ref="$out/sft" --n_prompts=300 "$out/dpo"

echo "This first look took $((SECONDS - start)) s."
