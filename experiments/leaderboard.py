"""Judges a loss that a student wrote: can it beat e-DPO at rho 0.2, within the same budget?

    python experiments/leaderboard.py                               # a student, on validation posts
    python experiments/leaderboard.py ada/entry.py --split=test --seeds=52,871,9404     # a teacher

It starts from the reference that the speedrun left in out/sft. For each seed it draws new pairs,
trains five reward models on them, and then two policies: one by e-DPO, one by the loss in the file,
with the same pairs, steps, batch size and learning rate. Each keeps the checkpoint that earns most
on validation posts. The oracle rewards what both write about 1,000 posts, whose wording depends on
the seed too. So nobody can tune a loss to seeds that the teacher keeps secret. Finished runs are
not trained again. results.json has the points in Gradescope's format.

This runs the code in the file. Read it first.
"""
import ast
import hashlib
import os
import runpy
import sys
from statistics import mean

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch

from experiments import trials
from losses import LOSSES, knobs, needs
from support.flags import InputError, Parser, comma_separated, run_script, seed
from support.run import write_json

BUDGET = ["--rho=0.2", "--n_pairs=1000", "--max_steps=320", "--batch_size=16", "--lr=2e-4",
          "--select=oracle"]
FAMILY = "0.2,0.4,0.5,0.6,0.8"          # biases of the five reward models
N_PROMPTS = 1000
POINTS = {"earns more than the reference": 6, "earns more than e-DPO, on average": 8,
          "earns more than e-DPO with every seed": 6}
MAY_IMPORT = {"math", "torch", "losses"}    # above all not the oracle


def read_entry(path):
    """Reads a student's file and makes its function `loss` the loss "entry" of train_policy.py.
    Returns a hash of the file. InputError if there is no such function, or it is not allowed."""
    if os.path.isdir(path):
        path = os.path.join(path, "entry.py")
    try:
        with open(path, encoding="utf-8") as file:
            source = file.read()
        tree = ast.parse(source)
    except (OSError, ValueError, SyntaxError) as error:
        raise InputError(f"entry: can't read {path}: {error}") from error
    for node in ast.walk(tree):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module or "."]
        for module in modules:
            if module.split(".")[0] not in MAY_IMPORT:
                raise InputError(f"entry: {path}, line {node.lineno} imports {module}; an entry "
                                 f"may import {', '.join(sorted(MAY_IMPORT))}")
    try:
        LOSSES["entry"] = runpy.run_path(path).get("loss")
    except (Exception, SystemExit) as error:        # whatever a student's file raises
        raise InputError(f"entry: {path} can't be run: {type(error).__name__}: {error}") from error
    if not callable(LOSSES["entry"]):
        raise InputError(f"entry: {path} has no function `loss`")
    columns = {"logps", "ref_logps", "rewards", "lengths", "kl"}
    unknown = [need for need in needs("entry") if need not in columns]
    if unknown:
        raise InputError(f"entry: {path}: `loss` needs {', '.join(unknown)}; a parameter without a "
                         f"default is one of {', '.join(sorted(columns))}")
    try_out(path)
    return hashlib.sha256(source.encode()).hexdigest()[:12]


def try_out(path):
    """Calls the entry with four made-up pairs: what is wrong should be said before anything is
    trained. InputError if it fails, or does not return a number with a gradient for each pair."""
    logps, ref_logps = -20 - 5 * torch.rand(2, 4, 2)
    columns = {"logps": logps.requires_grad_(), "ref_logps": ref_logps,
               "rewards": torch.randn(4, 2, 5), "lengths": torch.randint(5, 20, (4, 2)),
               "kl": (logps - ref_logps).square().mean(dim=1)}
    numbers = {name: value[0] if isinstance(value, tuple) else value
               for name, value in knobs("entry").items()}
    try:
        losses = LOSSES["entry"](**{need: columns[need] for need in needs("entry")}, **numbers)
    except Exception as error:
        raise InputError(f"entry: {path}: `loss` fails with four made-up pairs: "
                         f"{type(error).__name__}: {error}") from error
    if not torch.is_tensor(losses) or losses.shape != (4,):
        what = list(losses.shape) if torch.is_tensor(losses) else type(losses).__name__
        raise InputError(f"entry: {path}: `loss` returns {what} for 4 pairs, not (4,): a number "
                         "for each pair, without their mean")
    if not losses.isfinite().all():
        raise InputError(f"entry: {path}: `loss` returns {losses.tolist()} for made-up pairs")
    if not losses.requires_grad:
        raise InputError(f"entry: {path}: what `loss` returns does not depend on the policy's "
                         "logps, so nothing can be learnt")


def compare(ref, out_dir, entry, number, split):
    """Trains what is missing for one seed. ref: the reference's folder. entry: the hash of the
    file. Returns the advantages of (e-DPO, the entry) over the reference, in points."""
    cell = f"{out_dir}/{number}"
    data = [f"--init_from={ref}", f"--seed={number}"]
    of_reward_models = [flag for flag in BUDGET if flag.startswith(("--rho", "--n_pairs"))]
    trials.train("train_rm", f"{cell}/rms", *data, *of_reward_models, f"--bias={FAMILY}")
    folders = {"e-dpo": f"{cell}/e-dpo", "entry": f"{cell}/{entry}"}
    for loss, folder in folders.items():
        rewards = [f"--rewards={cell}/rms"] if "rewards" in needs(loss) else []
        trials.train("train_policy", folder, f"--loss={loss}", *data, *BUDGET, *rewards)
    numbers = trials.scores(folders.values(), ref, split, f"--n_prompts={N_PROMPTS}",
                            f"--seed={number}")
    return [numbers[folder]["advantage"] for folder in folders.values()]


def results(advantages):
    """Gives the points. advantages: a pair (e-DPO, the entry) for each seed. Returns what
    Gradescope reads: {"tests": [...], "leaderboard": [...]}."""
    ours = mean(own for _, own in advantages)
    leads = [own - e_dpo for e_dpo, own in advantages]
    passed = dict(zip(POINTS, (ours > 0, mean(leads) > 0, min(leads) > 0)))
    output = (f"advantage {ours:+.3f}, lead over e-DPO {mean(leads):+.3f} "
              f"(seeds: {len(leads)})")
    tests = [{"name": name, "score": points * passed[name], "max_score": points, "output": output,
              "visibility": "visible"} for name, points in POINTS.items()]
    return {"tests": tests, "leaderboard": [
        {"name": "lead over e-DPO", "value": round(mean(leads), 3), "order": "desc"},
        {"name": "advantage", "value": round(ours, 3), "order": "desc"}]}


def parse_flags(argv):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("entry", nargs="?", default="experiments/entry.py", help="the file with the function loss, "
        "or the folder of its entry.py (default: experiments/entry.py)")
    add("--seeds", type=comma_separated(seed, "seeds"), default=[0], help="keep those of the test "
        "to yourself (default: 0)")
    add("--split", choices=["validation", "test"], default="validation", help="whose posts "
        "(default: validation)")
    add("--ref", default="out/sft", help="the reference policy (default: out/sft)")
    add("--out_dir", default="out/leaderboard", help="for the runs: the same for all entries")
    add("--results", default="results.json", help="where to write the points")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_flags(argv)
    if os.path.isfile(args.results):        # of an earlier entry: it must not pass for this one's
        os.remove(args.results)
    entry = read_entry(args.entry)
    trials.check_models(ref=args.ref)
    print(f"{args.entry}, trained with {' '.join(BUDGET)}; a new seed takes minutes", flush=True)
    advantages = []
    for number in args.seeds:
        advantages.append(compare(args.ref, args.out_dir, entry, number, args.split))
        e_dpo, own = advantages[-1]
        print(f"seed {number}: e-DPO {e_dpo:+.3f}, the entry {own:+.3f}, lead {own - e_dpo:+.3f}",
              flush=True)
    report = results(advantages)
    for test in report["tests"]:
        print(f"{test['score']:2} of {test['max_score']} points: {test['name']}")
    print(report["tests"][0]["output"])
    write_json(args.results, report, indent=2)


if __name__ == "__main__":
    run_script(main)
