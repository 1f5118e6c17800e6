#!/usr/bin/env bash
# The whole method on the built-in task, from an empty folder to a report: out/speedrun/report.md.
# Each line below can be run alone; what an earlier run has cached is used again. --seed=, --device=
# and --dtype= go to every command; the variable OUT names another folder.
set -eo pipefail
for flag in "$@"; do
    case $flag in
        --seed=?* | --device=?* | --dtype=?*) ;;
        *)  echo "speedrun.sh: error: $flag: it takes --seed=, --device= and --dtype=; for other" \
                "flags run its commands one by one" >&2
            exit 2 ;;
    esac
done
source "$(dirname "$0")/venv.sh" .venv requirements-dev.txt
out=${OUT:-out/speedrun}
start=$SECONDS
flags=("$@")
python() {
    echo; echo "[$((SECONDS - start)) s] python $* ${flags[*]}"
    "$venv/bin/python" "$@" "${flags[@]}"
}

# The reference policy: supervised fine-tuning on demonstrations of mixed quality.
python train_policy.py --loss=sft --out_dir="$out/sft"

# Explicit reward models. The first run samples pairs from the reference, lets the oracle label
# them, and keeps D_rho: 1,000 pairs in which the longer response is preferred in a fraction
# rho = 0.2. Then one reward model on all of D_rho, and a family of five on subsets of it.
python train_rm.py --rho=0.2 --init_from="$out/sft" --out_dir="$out/rm"
python train_rm.py --rho=0.2 --init_from="$out/sft" --out_dir="$out/rms" --bias=0.2,0.4,0.5,0.6,0.8

# Six policies from the same reference, on the same pairs, for the same number of steps; of each the
# checkpoint whose summaries of validation posts the oracle likes best.
policy() {
    python train_policy.py --rho=0.2 --loss=$1 --init_from="$out/sft" --out_dir="$out/$1" \
        --select=oracle "${@:2}"
}
policy dpo
policy ipo
policy p-dpo
policy d-dpo --rewards="$out/rm"
policy dp-dpo --rewards="$out/rm"
policy e-dpo --rewards="$out/rms"

# Oracle advantage on 1,000 test prompts, diagnostics, figures, samples.
python evaluate.py --ref="$out/sft" --rms="$out/rm,$out/rms" --out_dir="$out" \
    "$out/dpo" "$out/ipo" "$out/d-dpo" "$out/p-dpo" "$out/dp-dpo" "$out/e-dpo"

echo "The whole speedrun took $(((SECONDS - start + 30) / 60)) min ($((SECONDS - start)) s)."
