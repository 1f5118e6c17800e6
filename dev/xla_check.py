"""Checks that --device=xla computes what --device=cpu does: both train the same runs.

    bash dev/xla_check.sh      # makes an environment with torch_xla; needs no TPU

It runs on torch_xla's CPU device, unless PJRT_DEVICE names another. The runs are SFT, a reward
model, DPO and e-DPO, 20 steps each, with the pairs and samples that they need, and an evaluation.
For each run it prints the largest difference of a logged number and of a weight, and how many
programs were compiled.
"""
import contextlib
import json
import os
import shutil
import sys
import tempfile
import time
from itertools import islice

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
os.environ.setdefault("PJRT_DEVICE", "CPU")

import torch_xla
import torch_xla.debug.metrics as xla_metrics
from safetensors.torch import load_file

import evaluate
import tinytldr
import train_policy
import train_rm

TOLERANCE, MOST_COMPILED = 1e-4, 12
SHARED = ["--seed=0", "--dtype=float32"]
PAIRS = [*SHARED, "--max_steps=20", "--n_pairs=200", "--pool=1024", "--n_eval=64"]


def some_demonstrations(seed, split, all_rows=tinytldr.demonstration_rows):
    """Yields only 2,500 demonstrations, to save the time of tokenising them all."""
    return islice(all_rows(seed, split), 2500)


def stages(root, start):
    """Lists the runs in a folder, all from the same reference: [(name, script, flags)]."""
    reference = f"--init_from={start}"
    return [
        ("sft", train_policy, ["--loss=sft", *SHARED, "--max_steps=20", "--n_embd=64"]),
        ("rm", train_rm, [reference, *PAIRS]),
        ("dpo", train_policy, [reference, *PAIRS, "--loss=dpo"]),
        ("e-dpo", train_policy, [reference, *PAIRS, "--loss=e-dpo", f"--rewards={root}/rm"]),
        ("evaluate", evaluate, [f"--ref={start}", f"{root}/e-dpo", *SHARED, "--n_prompts=64"]),
    ]


def logged(folder):
    """Reads everything that a run logged. Returns {(line, name): number}."""
    numbers = {}
    with contextlib.suppress(FileNotFoundError):
        with open(f"{folder}/metrics.jsonl", encoding="utf-8") as file:
            for number, line in enumerate(file):
                for name, value in json.loads(line).items():
                    numbers[number, name] = value
    with contextlib.suppress(FileNotFoundError):
        with open(f"{folder}/results.json", encoding="utf-8") as file:
            for name, value in json.load(file)["policies"]["e-dpo"].items():
                if isinstance(value, float):
                    numbers["", name] = value
    return numbers


def difference(first, second):
    """Returns the largest difference between two dictionaries of numbers, relative to the number
    (or to 1, if that is larger). Accuracies are left out: they count signs, and at step 0 every
    margin is zero except for rounding."""
    assert first.keys() == second.keys(), (len(first), len(second))
    return max((abs(first[line, name] - second[line, name]) / max(1, abs(first[line, name]))
                for line, name in first if not name.endswith("accuracy")), default=0.0)


def weights_difference(first, second):
    """Returns the largest difference between two models' weights. The keys' biases are left out:
    they move all scores of a query alike, so their gradient is only rounding, which Adam makes as
    large as any other."""
    largest, others = 0.0, load_file(f"{second}/model.safetensors")
    for name, tensor in load_file(f"{first}/model.safetensors").items():
        error = (tensor - others[name]).abs()
        if name.endswith("c_attn.bias"):
            width = len(error) // 3
            error[width:2 * width] = 0
        largest = max(largest, error.max().item())
    return largest


def main():
    tinytldr.demonstration_rows = some_demonstrations
    torch_xla.device()          # before the first backward pass, whose threads are one a device
    root = tempfile.mkdtemp()
    start = f"{root}/start"
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        train_policy.main(["--loss=sft", *SHARED, "--max_steps=150", "--n_embd=64",
                           "--device=cpu", f"--out_dir={start}"])
    good = True
    print("| run | cpu, s | xla, s | compiled | logged numbers differ by | weights differ by |")
    print("|---|---|---|---|---|---|", flush=True)
    folders = {}
    for device in ("cpu", "xla"):       # a reference of its own, so that no cache is shared
        folders[device] = f"{root}/{device}"
        shutil.copytree(start, f"{root}/{device}/start")
    runs = zip(*(stages(folder, f"{folder}/start") for folder in folders.values()))
    for both in runs:
        seconds, compiled = {}, 0
        for device, (name, script, flags) in zip(folders, both):
            before, begin = xla_metrics.counter_value("UncachedCompile") or 0, time.time()
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
                script.main([*flags, f"--device={device}", f"--out_dir={folders[device]}/{name}"])
            seconds[device] = time.time() - begin
            compiled = (xla_metrics.counter_value("UncachedCompile") or 0) - before
        cpu, xla = (f"{folder}/{name}" for folder in folders.values())
        numbers, weights = difference(logged(cpu), logged(xla)), 0.0
        if os.path.exists(f"{cpu}/model.safetensors"):
            weights = weights_difference(cpu, xla)
        good &= max(numbers, weights) < TOLERANCE and compiled <= MOST_COMPILED
        print(f"| {name} | {seconds['cpu']:.0f} | {seconds['xla']:.0f} | {compiled} "
              f"| {numbers:.1e} | {weights:.1e} |", flush=True)
    shutil.rmtree(root)
    print("equal" if good else f"NOT within {TOLERANCE} and {MOST_COMPILED} programs")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
