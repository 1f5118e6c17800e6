#!/usr/bin/env bash
# Checks and measures this repository on a GPU, in parts that can each be run alone, within a time
# limit:
#
#     bash dev/gpu.sh checks [SECONDS] [ARGUMENTS]        # does it compute what a CPU computes?
#     bash dev/gpu.sh bench [SECONDS]                     # steps of four models, --compile or not
#     bash dev/gpu.sh race [SECONDS]                      # against TRL, where it is installed
#     bash dev/gpu.sh experiment [SECONDS] ARGUMENTS      # experiments/real_text.py
#     bash dev/gpu.sh speedrun [SECONDS]                  # the built-in task, from start to end
#
# What is printed also goes to results/gpu.md, or to the file that RESULTS names: a section for each
# part, with its date, card and commands. If a command fails or runs out of time, that is printed,
# the next one runs, and the exit code is 1. NANOPREF_SMOLLM2 (a folder with real weights) and
# NANOPREF_DATA (a folder with tldr_preference.jsonl.gz) are used if they are set. DEVICE=cpu tries
# the script itself, without a GPU.
set -uo pipefail
cd "$(dirname "$0")/.."
part=${1:-}
results=${RESULTS:-results/gpu.md} device=${DEVICE:-cuda}
case $part in
    checks) limit=90 ;;
    bench) limit=100 ;;
    race) limit=120 ;;
    experiment | speedrun) limit=480 ;;
    *) sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0" >&2; exit 2 ;;
esac
shift
if [[ ${1:-} =~ ^[0-9]+$ ]]; then
    limit=$1
    shift
fi
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
exec > >(tee -a "$results") 2>&1
trap 'exec > /dev/null 2>&1; sleep 0.3' EXIT    # until tee has written all
failed=0

say() {     # a command, what it prints, and its time; within what is left of the part's
    local left=$((limit - SECONDS)) before=$SECONDS code=0
    echo -e "\n\`${*@Q}\`\n" | sed "s/'\([^' ]*\)'/\1/g"     # quotes only around spaces
    if [ $left -lt 5 ]; then
        echo "not run: no time was left"
        failed=1
        return
    fi
    timeout -k 5 $left "$@" || code=$?
    case $code in
        0) echo -e "\n($((SECONDS - before)) s)" ;;
        124 | 137) echo -e "\nstopped after $left s: no time was left" ;;
        *) echo -e "\nFAILED with exit code $code ($((SECONDS - before)) s)" ;;
    esac
    [ $code = 0 ] || failed=1
}

echo -e "\n## $part, $(date -u '+%Y-%m-%d %H:%M UTC')\n"
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2> /dev/null
python3 -c 'import torch; print("torch", torch.__version__)'
git rev-parse --short HEAD 2> /dev/null || true

case $part in
    checks)
        say python3 dev/gpu_checks.py --device="$device" "$@"
        ;;
    bench)      # what matters most comes first, since time may run out
        for line in gpt2:--no-compile smollm2:--no-compile gpt2-medium:--no-compile \
                    gpt2-large:--no-compile smollm2:--compile gpt2:--compile \
                    attention gpt2-medium:--compile gpt2-large:--compile; do
            if [ $line = attention ]; then
                say python3 dev/attention.py --device="$device" --dtype=bfloat16 --batch_size=32
                continue
            fi
            say python3 dev/bench.py --model="${line%:*}" --device="$device" --dtype=bfloat16 \
                --batch_size=32 --only=dpo,score --steps=8 "${line#*:}" "$@"
        done
        ;;
    race)
        rows=()
        if [ -n "${NANOPREF_DATA:-}" ] && [ -n "${NANOPREF_SMOLLM2:-}" ]; then
            rows=(--data="$NANOPREF_DATA/tldr_preference.jsonl.gz"
                  --tokenizer="${NANOPREF_SMOLLM2%/}/")
        fi
        say python3 dev/bench_trl.py --device="$device" --batch_size=16 --steps=5 "${rows[@]}" \
            --models=smollm2,gpt2,gpt2-medium,gpt2-large --only=smollm2,dpo,default \
            --only=smollm2,dpo,best --only=dpo,bf16 --only="dpo,bf16 best" \
            --only="smollm2,bf16 lora" "$@"
        ;;
    experiment)
        say python3 experiments/real_text.py --device="$device" "$@"
        ;;
    speedrun)
        if [ ! -e .venv ]; then     # with the packages of this python, not those pinned
            python3 -m venv --system-site-packages .venv
            cat requirements.txt requirements-dev.txt constraints.txt > .venv/installed.txt
            made=.venv
        fi
        say bash runs/speedrun.sh --device="$device" --dtype=bfloat16
        rm -rf "${made:-}"
        ;;
esac
exit $failed
