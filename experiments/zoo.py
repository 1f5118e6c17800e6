"""Measures every loss of zoo.py, and the paper's own, on the built-in task. Writes docs/losses.md,
which also says what each of them does, as found from its function alone.

    python experiments/zoo.py --draw                  # docs/losses.md again: seconds, no training
    python experiments/zoo.py --prepare               # pairs and reward models: 20 minutes, a core
    python experiments/zoo.py --jobs=2                # all runs, one thread each; resumable
    python experiments/zoo.py --losses=hinge,simpo    # some of them

All runs start from the speedrun's reference and go over 1,000 pairs twice. First, one knob of each
method is chosen out of three values, by the advantage on validation prompts, with pairs of a seed
that serves for nothing else. Then the method is trained on the pairs of three other seeds, and its
last checkpoint is scored on test prompts. A row of runs.csv is one run; its split is "validation"
if it served for the choice.
"""
import json
import os
import shutil
import sys
import time
from concurrent.futures import as_completed
from functools import lru_cache

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import tinytldr
import train_policy
import zoo
from experiments import trials
from experiments.figure2 import append, check_reference, commit, read_rows, reference
from experiments.loss_page import write_page
from experiments.world import earned
from experiments.zoo_answers import answer_table
from losses import needs
from model import GPT
from support.flags import InputError, Parser, comma_separated, positive_int, run_script

# ------ what is measured

SEEDS = (0, 1, 2)
CHOOSE_SEED = 1000
RHOS = ("0.2", "all")
FAMILY = "0.2,0.4,0.5,0.6,0.8"
TRAINING = ["--max_steps=124", "--lr=2e-4", "--eval_every=124", "--device=cpu"]     # two epochs
N_PROMPTS = {"validation": 500, "test": 1000}

# The paper's own, in the same few steps; the last one distils the mean of the family.
OWN = {"dpo": ("dpo", None), "ipo": ("ipo", None), "p-dpo": ("p-dpo", None),
       "d-dpo": ("d-dpo", "rm"), "dp-dpo": ("dp-dpo", "rm"), "e-dpo": ("e-dpo", "rms"),
       "dp-dpo, family's mean": ("dp-dpo", "rms")}
METHODS = OWN | {name: (name, "rm" if "rewards" in needs(name) else None) for name in zoo.ZOO}

# The knob of each method and its three values: beta, unless it is named here.
BETA = ("beta", (0.3, 1, 3))
KNOBS = {
    "ipo": ("tau", (0.03, 0.1, 0.3)),
    "chi-po": ("beta", (0.1, 0.3, 1)),
    "sppo": ("eta", (1, 3, 10)),
    "ln-dpo": ("beta", (3, 10, 30)),        # per token, of which a summary has about twelve
    "simpo": ("beta", (3, 10, 30)),
    "orpo": ("weight", (1, 3, 10)),
    "slic": ("weight", (0.01, 0.1, 1)),
    "rrhf": ("weight", (0.01, 0.1, 1)),
    "rebel": ("eta", (0.3, 1, 3)),
}
COLUMNS = ["split", "rho", "seed", "method", "knob", "value", "advantage", "advantage_95", "length",
           "chosen_change", "rejected_change", "seconds", "commit", "reference"]


def knob_of(method):
    return KNOBS.get(method, BETA)


def cell_flags(args, rho, seed):
    return [f"--init_from={args.sft}", f"--rho={rho}", f"--seed={seed}"]


def prepare(args, rho, seed, name):
    """Samples the pairs of a cell, and trains its single reward model ("rm") or its family
    ("rms")."""
    family = [f"--bias={FAMILY}"] if name == "rms" else []
    trials.train("train_rm", f"{args.out_dir}/{rho}/{seed}/{name}", *cell_flags(args, rho, seed),
                 "--eval_every=200", *family, states=False)


@lru_cache
def of_reference(sft, split):
    """Returns what the reference's own samples earn, (N,), one for each prompt of a split."""
    return answers(sft, split)[0]


def answers(folder, split):
    """Returns rewards and lengths, (N,) both, of one sample for each prompt of a split."""
    texts = [tinytldr.post(0, split, i) for i in range(N_PROMPTS[split])]
    return earned(GPT.from_pretrained(folder), texts, [0, 4])


def run(args, split, rho, seed, method, value):
    """Trains one policy and measures it. Returns a row for the CSV, without an advantage if the
    training diverged; the run's folder is removed."""
    start = time.time()
    (loss, rewards), (knob, _) = METHODS[method], knob_of(method)
    row = {"split": split, "rho": rho, "seed": seed, "method": method, "knob": knob, "value": value,
           "commit": commit(), "reference": reference(args.sft)}
    name = f"{split}-{rho}-{seed}-{method}-{value}".replace(" ", "-")
    folder = f"{args.out_dir}/runs/{name}"
    flags = [f"--loss={loss}", f"--{knob}={value}", *cell_flags(args, rho, seed), *TRAINING,
             f"--out_dir={folder}"]
    if rewards:
        flags.append(f"--rewards={args.out_dir}/{rho}/{seed}/{rewards}")
    shutil.rmtree(folder, ignore_errors=True)       # of a run that was interrupted
    with trials.silence():
        try:
            train_policy.main(flags)
        except InputError as error:
            if "diverged" not in str(error):
                raise
            return row
        earned_here, lengths = answers(folder, split)
        difference = earned_here - of_reference(args.sft, split)
    with open(f"{folder}/metrics.jsonl", encoding="utf-8") as file:
        *_, last = map(json.loads, file)
    shutil.rmtree(folder)
    return row | {
        "advantage": float(difference.mean()), "length": float(lengths.mean()),
        "advantage_95": float(1.96 * difference.std(ddof=1) / len(difference) ** 0.5),
        "chosen_change": last["train/chosen_change"],
        "rejected_change": last["train/rejected_change"], "seconds": time.time() - start}


def chosen_values(rows):
    """Returns {method: the value of its knob with the largest validation advantage}, of the methods
    of which all trials are among these rows of the CSV."""
    reached = {}
    for row in rows:
        if row["split"] == "validation":
            advantage = float(row["advantage"] or "-inf")
            reached.setdefault(row["method"], {})[float(row["value"])] = advantage
    return {method: max(knob_of(method)[1], key=of_method.get)
            for method, of_method in reached.items()
            if set(of_method) == set(map(float, knob_of(method)[1]))}


def run_all(args, pool, path, jobs):
    """Runs what is not in the CSV yet, and appends the row of each run when it is finished. jobs:
    what `run` takes; those whose reward models are still to be trained come last."""
    done = {(row["split"], row["rho"], row["seed"], row["method"], float(row["value"]))
            for row in read_rows(path)}
    first, last, models = [], [], {}
    for split, rho, seed, method, value in jobs:
        rewards = METHODS[method][1]
        if (split, rho, str(seed), method, float(value)) in done:
            continue
        trained = os.path.exists(f"{args.out_dir}/{rho}/{seed}/{rewards}/finished.json")
        (first if trained or not rewards else last).append((split, rho, seed, method, value))
        if rewards and not trained and (rho, seed, rewards) not in models:
            models[rho, seed, rewards] = pool.submit(prepare, args, rho, seed, rewards)
    running = [pool.submit(run, args, *job) for job in first]
    for model in models.values():
        model.result()
    running += [pool.submit(run, args, *job) for job in last]
    for number, job in enumerate(as_completed(running), 1):
        row = job.result()
        append(path, [row], COLUMNS)
        print(f"{number}/{len(running)}  {row['split']} rho {row['rho']} seed {row['seed']}  "
              f"{row['method']} {row['knob']} {row['value']}: "
              + (f"{row['advantage']:+.2f}" if "advantage" in row else "diverged"), flush=True)


def main(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--sft", default="out/sft", help="the folder of the reference (default: out/sft, the "
        "speedrun's)")
    add("--losses", type=comma_separated(str, "names"), default=list(METHODS), help="the methods "
        "to measure (default: all)")
    add("--rhos", type=comma_separated(str, "0.2 or all"), default=list(RHOS), help="the length "
        "biases of the training pairs (default: 0.2,all)")
    add("--jobs", type=positive_int, default=2, help="how many runs to do at a time, with one "
        "thread each (default: 2)")
    add("--prepare", action="store_true", help="only sample pairs and train reward models")
    add("--draw", action="store_true", help="only write docs/losses.md and its figure")
    add("--out_dir", default="out/zoo", help="the folder for the runs and the reward models "
        "(default: out/zoo)")
    add("--results", default="results/zoo", help="the folder for runs.csv (default: results/zoo)")
    args = parser.parse_args(argv)
    unknown = set(args.losses) - set(METHODS) | set(args.rhos) - set(RHOS)
    if unknown:
        raise InputError(f"--losses, --rhos: unknown {', '.join(sorted(unknown))}; they are "
                         f"{', '.join(METHODS)}, and {', '.join(RHOS)}")
    path = f"{args.results}/runs.csv"
    if args.draw:
        rows = read_rows(path)
        write_page(METHODS, knob_of, rows, chosen_values(rows))
        return print(answer_table(rows))
    trials.check_models(sft=args.sft)
    check_reference(read_rows(path), args.sft, path)
    os.makedirs(args.results, exist_ok=True)
    with trials.workers(args.jobs) as pool:
        if args.prepare:
            cells = [(RHOS[0], CHOOSE_SEED), *((rho, seed) for rho in args.rhos for seed in SEEDS)]
            for job in [pool.submit(prepare, args, *cell, name)
                        for name in ("rm", "rms") for cell in cells]:
                job.result()
            return
        run_all(args, pool, path, [("validation", RHOS[0], CHOOSE_SEED, method, value)
                                   for method in args.losses for value in knob_of(method)[1]])
        chosen = chosen_values(read_rows(path))
        for rho in args.rhos:
            run_all(args, pool, path, [("test", rho, seed, method, chosen[method])
                                       for seed in SEEDS for method in args.losses])
    print(answer_table(read_rows(path)))


if __name__ == "__main__":
    run_script(main)
