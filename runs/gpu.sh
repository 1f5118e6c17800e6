#!/usr/bin/env bash
# What a GPU does with it, written to results/gpu.md: steps of GPT-2 124M, 355M and 774M with and
# without --compile, the tree's attention, the race against TRL (where it is installed), and the
# speedrun. Not run yet: no GPU was at hand.
set -euo pipefail
cd "$(dirname "$0")/.."
exec > >(tee results/gpu.md) 2>&1

say() {     # a command, and what it prints
    echo -e "\n\`$*\`\n"
    "$@"
}

date
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
git rev-parse --short HEAD || true
gpu="--device=cuda --dtype=bfloat16"
for shape in tldr hh; do
    for heads in 12 20; do
        say python runs/attention.py $gpu --shape=$shape --n_head=$heads --batch_size=32
    done
done
for model in gpt2 gpt2-medium gpt2-large; do
    for compile in --no-compile --compile; do
        say python runs/bench.py $gpu --model=$model --batch_size=32 $compile
    done
done
if python -c "import trl" 2> /dev/null; then
    for settings in "bf16" "bf16 best"; do
        say python runs/bench_trl.py --device=cuda --models=gpt2,gpt2-large \
            --only="tldr,dpo,$settings"
    done
fi
if [ ! -e .venv ]; then     # the speedrun with the packages of this python, not those pinned
    python -m venv --system-site-packages .venv
    cat requirements.txt requirements-dev.txt constraints.txt > .venv/installed.txt
    trap 'rm -rf .venv' EXIT
fi
time say bash runs/speedrun.sh $gpu
