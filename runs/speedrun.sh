#!/usr/bin/env bash
# Runs the whole method on the built-in task, from an empty folder to a report. Look at
# out/report/report.html, and read out/report/report.md.
# It prints each command, and you can also run them one by one. If you run the speedrun again, it
# goes on from what is in out/: finished runs are not trained twice, and interrupted ones are
# resumed. To start again from nothing, remove out/ or name another folder:
# OUT=out/second bash runs/speedrun.sh
# The flags --seed=, --device= and --dtype= go to every command.
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
out=${OUT:-out}
start=$SECONDS
flags=("$@")
python() {
    echo; echo "[$((SECONDS - start)) s] python $* ${flags[*]}"
    "$venv/bin/python" "$@" "${flags[@]}"
}
train() {   # a script, the name of its run folder, its flags; resumed where that folder has a state
    script=$1 folder=$out/$2 resume=()
    for state in "$folder"/state.pt "$folder"/0.*/state.pt; do
        [ -e "$state" ] && resume=(--resume)
    done
    python "$script" --out_dir="$folder" "${@:3}" "${resume[@]}" || {
        code=$?
        echo "speedrun.sh: stopped at $folder. To start afresh, remove $out, or name another folder:" \
            "OUT=out/second bash runs/speedrun.sh" >&2
        exit $code
    }
}

# The reference policy: supervised fine-tuning on demonstrations of mixed quality.
train train_policy.py sft --loss=sft

# Explicit reward models. The first run samples pairs from the reference, lets the oracle label
# them, and keeps D_rho: 1,000 pairs in which the longer response is preferred in a fraction
# rho = 0.2. Then one reward model on all of D_rho, and a family of five on subsets of it.
train train_rm.py rm --rho=0.2 --init_from="$out/sft"
train train_rm.py rms --rho=0.2 --init_from="$out/sft" --bias=0.2,0.4,0.5,0.6,0.8

# Six policies from the same reference, on the same pairs, for the same number of steps. Each keeps
# the checkpoint whose summaries of validation posts earn most from the oracle.
policy() {
    train train_policy.py "$1" --loss="$1" --rho=0.2 --init_from="$out/sft" --select=oracle "${@:2}"
}
policy dpo
policy ipo
policy p-dpo
policy d-dpo --rewards="$out/rm"
policy dp-dpo --rewards="$out/rm"
policy e-dpo --rewards="$out/rms"

# Oracle advantage on 1,000 test prompts, diagnostics, figures, samples.
python evaluate.py --ref="$out/sft" --rms="$out/rm,$out/rms" --out_dir="$out/report" \
    "$out/dpo" "$out/ipo" "$out/d-dpo" "$out/p-dpo" "$out/dp-dpo" "$out/e-dpo"

echo "The whole speedrun took $(((SECONDS - start + 30) / 60)) min ($((SECONDS - start)) s)."
