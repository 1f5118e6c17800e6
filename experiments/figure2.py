"""Repeats the paper's figure 2 on the built-in task: the oracle advantage over the reference, for
each fraction rho of training pairs in which the longer response is preferred.

    python experiments/figure2.py                  # all cells: hours on 2 cores; resumable
    python experiments/figure2.py --rhos=0.2,all --seeds=0,1       # some of them
    python experiments/figure2.py --choose         # each method's beta or tau, on validation
    python experiments/figure2.py --draw --results=results/figure2      # our tables and figure

A cell is a rho ("all" means all pairs) and a seed. The seed draws new pairs, and new reward models
and policies are trained on them. The reference is the same everywhere. Each policy keeps the
checkpoint that earns most on validation prompts (--select=oracle). So does the beta or tau of each
method: --choose tries the same number of values for each, on pairs with another seed, and writes
the file that --chosen names. Test prompts are the same in all cells. A row of runs.csv is a policy,
or a control: the reference itself at a lower temperature, or the best of 16 of its samples.
"""
import csv
import json
import math
import os
import re
import subprocess
import sys
from concurrent.futures import as_completed
from statistics import mean, stdev

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np

import tinytldr
from experiments import trials
from experiments.world import TEMPERATURES, earned
from losses import PAPER
from model import GPT
from support.columns import hash_weights
from support.flags import (
    InputError,
    Parser,
    comma_separated,
    fraction_or_all,
    naming,
    positive_int,
    run_script,
    seed,
)
from support.report import pyplot, save
from support.run import read_json, replacing, run_flags, write_json

RHOS = [0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, "all"]
KNOB = {loss: "tau" if loss == "ipo" else "beta" for loss in PAPER}
VALUES = (0.03, 0.1, 0.3, 1, 3)         # of each knob
MEAN = "dp-dpo, family's mean"          # e-DPO's members and KL, without its minimum
BALANCED = "dp-dpo, member 0.5"         # one of them, which has seen as many long as short winners
ORACLE = "d-dpo, oracle's rewards"      # what d-DPO would reach with perfect reward models
METHODS = {         # its loss, and what it distils: reward models of the cell, or the oracle
    **{loss: (loss, rewards) for loss, rewards in PAPER.items()},
    MEAN: ("dp-dpo", "rms"), BALANCED: ("dp-dpo", "rms/0.5"), ORACLE: ("d-dpo", "scores")}
CHOOSE_SEED = 1000
FAMILY = "0.2,0.4,0.5,0.6,0.8"
COLUMNS = ["rho", "seed", "method", "knob", "value", "gamma", "max_steps", "batch_size", "lr",
           "n_pairs", "validation", "test", "test_95", "length", "kl_pi_ref", "kl_ref_pi",
           "chosen_change", "rejected_change", "seconds", "commit", "reference"]


def reward_models(folder, data):
    """Trains the single reward model and the family of one cell."""
    trials.train("train_rm", f"{folder}/rm", *data)
    trials.train("train_rm", f"{folder}/rms", *data, f"--bias={FAMILY}")


def policy(folder, cell, method, value, data):
    """Trains one policy of a cell. Returns its seconds."""
    loss, rewards = METHODS[method]
    flags = [f"--loss={loss}", f"--{KNOB[loss]}={value}", "--select=oracle", *data]
    if rewards:
        flags.append(f"--rewards={rewards if rewards == 'scores' else f'{cell}/{rewards}'}")
    return trials.train("train_policy", folder, *flags)


def trial(args, loss, value):
    """Runs one trial of --choose. Returns its numbers on validation prompts."""
    cell = f"{args.out_dir}/choose"
    folder = f"{cell}/{loss}/{value}"
    policy(folder, cell, loss, value, data_flags(args, args.choose_rho, CHOOSE_SEED))
    n_prompts = f"--n_prompts={args.n_prompts}"
    return trials.score(folder, args.sft, "validation", n_prompts)


def choose(args, pool):
    """Chooses each method's beta or tau by the validation advantage at --choose_rho. Writes
    chosen.json."""
    cell = f"{args.out_dir}/choose"
    pool.submit(reward_models, cell, data_flags(args, args.choose_rho, CHOOSE_SEED)).result()
    for loss in KNOB:           # a trial of each alone fills the caches that others share
        pool.submit(trial, args, loss, VALUES[0]).result()
    jobs = {(loss, value): pool.submit(trial, args, loss, value)
            for loss in KNOB for value in VALUES}
    record = {"rho": args.choose_rho, "seed": CHOOSE_SEED, "commit": commit(), "chosen": {}}
    for name in ("advantage", "kl_pi_ref"):
        record[name] = {loss: {value: round(jobs[loss, value].result()[name], 3)
                               for value in VALUES} for loss in KNOB}
    for loss, reached in record["advantage"].items():
        record["chosen"][loss] = max(VALUES, key=reached.get)
        print(f"{loss:7} {KNOB[loss]}: "
              + "  ".join(f"{value:g} {advantage:+.2f}" for value, advantage in reached.items()))
    write_json(f"{args.results}/chosen.json", record, indent=1)
    print(f"to run with these: --chosen={args.results}/chosen.json")


def data_flags(args, rho, number):
    return [f"--init_from={args.sft}", f"--rho={rho}", f"--seed={number}", *args.flags.split()]


def cell(args, rho, number, chosen):
    """Trains and measures all policies of one cell. Returns rows for the CSV."""
    folder, data = f"{args.out_dir}/{rho}/{number}", data_flags(args, rho, number)
    n_prompts = f"--n_prompts={args.n_prompts}"
    reward_models(folder, data)
    shared = {"rho": rho, "seed": number, "commit": commit(), "reference": reference(args.sft)}
    runs, seconds = {}, {}
    for method, (loss, _) in METHODS.items():
        runs[method] = f"{folder}/{re.sub('[^a-z0-9.]+', '-', method)}"
        seconds[method] = policy(runs[method], folder, method, chosen[loss], data)
    numbers = trials.scores(runs.values(), args.sft, "test", n_prompts)
    rows = []
    for method, run in runs.items():
        loss, test, flags = METHODS[method][0], numbers[run], run_flags(run)
        rows.append({
            **shared, "method": method, "knob": KNOB[loss], "value": chosen[loss],
            "gamma": flags["gamma"], "max_steps": flags["max_steps"],
            "batch_size": flags["batch_size"], "lr": flags["lr"], "n_pairs": flags["n_pairs"],
            "validation": selected_advantage(run),
            "test": test["advantage"], "test_95": test["advantage_95"],
            "length": test["length"], "kl_pi_ref": test["kl_pi_ref"],
            "kl_ref_pi": test["kl_ref_pi"], "chosen_change": test["chosen_change"],
            "rejected_change": test["rejected_change"], "seconds": seconds[method]})
    return rows


def selected_advantage(run):
    """Returns what --select saw: the advantage of the checkpoint that was kept, on 256 validation
    prompts. It is optimistic, because it is the best of several."""
    with open(f"{run}/metrics.jsonl", encoding="utf-8") as file:
        rewards = [metrics["validation/reward"] for metrics in map(json.loads, file)
                   if "validation/reward" in metrics]
    return max(rewards[1:]) - rewards[0]


def controls(args, number):
    """Measures what the reference earns without any preferences. Returns rows with rho "none"."""
    ref = GPT.from_pretrained(args.sft)
    texts = [tinytldr.post(0, "test", i) for i in range(args.n_prompts)]
    samples = {f"reference at {t}": earned(ref, texts, [number, 2], t) for t in TEMPERATURES}
    rewards, lengths = map(np.array, zip(*(earned(ref, texts, [number, 1, i]) for i in range(16))))
    best, prompts = rewards.argmax(axis=0), np.arange(len(texts))       # rewards: (16, N)
    samples["best of 16"] = rewards[best, prompts], lengths[best, prompts]
    base, _ = earned(ref, texts, [number, 0])
    return [{"rho": "none", "seed": number, "method": method, "test": (rewards - base).mean(),
             "test_95": 1.96 * (rewards - base).std(ddof=1) / len(texts) ** 0.5,
             "length": lengths.mean(), "commit": commit(), "reference": reference(args.sft)}
            for method, (rewards, lengths) in samples.items()]


def commit():
    """Returns the commit of this code, or "" without git."""
    try:
        done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=trials.ROOT,
                              capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip()


def reference(folder):
    """Returns the first eight digits of a hash of the reference's weights."""
    return hash_weights(GPT.from_pretrained(folder))[:8]


def check_reference(rows, folder, path):
    """Raises InputError if rows of a CSV come from another reference. Otherwise runs that are there
    would be skipped, and new ones averaged with them."""
    if {row.get("reference") for row in rows} - {reference(folder)}:
        raise InputError(f"--results: the runs in {path} are from another reference than "
                         f"{folder}; name another folder")


def check_settings(args, chosen):
    """Raises InputError if cells in --results were run with other flags: they would be skipped, and
    averaged with new ones. Otherwise writes the flags down, next to runs.csv. chosen: {loss: its
    beta or tau}."""
    path = f"{args.results}/settings.json"
    settings = {"flags": args.flags, "n_prompts": args.n_prompts, "chosen": chosen}
    before = read_json(path) if os.path.exists(path) else settings
    for name, value in settings.items():
        if before.get(name) != value:
            raise InputError(f"--results: the runs in {args.results} are from --{name}="
                             f"{before.get(name)!r}, not {value!r}; name another folder, for "
                             "--out_dir too")
    write_json(path, settings, indent=1)


def read_rows(path):
    if not os.path.exists(path):
        return []
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def append(path, rows, columns):
    rows = [*read_rows(path), *rows]
    with replacing(path) as temporary:
        with open(temporary, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            for row in rows:
                writer.writerow({name: f"{value:.5g}" if isinstance(value, float) else value
                                 for name, value in row.items()})


# ------ what came out


def t_p_value(differences):
    """Returns the two-sided p-value of a paired t-test, from Student's density by numerical
    integration."""
    n = len(differences)
    if n < 2 or stdev(differences) == 0:
        return math.nan
    t = abs(mean(differences)) / (stdev(differences) / n ** 0.5)
    x = np.tan(np.linspace(0, np.pi / 2, 200_001)[:-1])         # 0 to infinity
    density = (1 + x ** 2 / (n - 1)) ** (-n / 2)
    cumulative = np.concatenate([[0], np.cumsum(np.diff(x) * (density[1:] + density[:-1]) / 2)])
    return float(1 - np.interp(t, x, cumulative) / cumulative[-1])


def holm(p_values):
    """Corrects p-values for their number, by Holm's method. Returns {name: corrected p-value}. NaN,
    of a difference that is the same in all seeds, stays NaN and counts as a test all the same."""
    corrected, largest = dict(p_values), 0.0
    tested = [name for name in p_values if not math.isnan(p_values[name])]
    for rank, name in enumerate(sorted(tested, key=p_values.get)):
        largest = max(largest, (len(p_values) - rank) * p_values[name])
        corrected[name] = min(1.0, largest)
    return corrected


def t_quantile(n):
    """Returns the 97.5% quantile of Student's t with n - 1 degrees of freedom."""
    low, high = 1.9, 13.0
    while high - low > 1e-3:
        middle = (low + high) / 2
        spread = [middle / n ** 0.5 + z for z in _standard(n)]
        low, high = (middle, high) if t_p_value(spread) > 0.05 else (low, middle)
    return low


def _standard(n):
    """Makes n numbers with mean 0 and standard deviation 1."""
    z = np.arange(n) - (n - 1) / 2
    return list(z / z.std(ddof=1))


def advantages(rows):
    """Returns {rho: {method: {seed: test advantage}}}."""
    reached = {}
    for row in rows:
        of_rho = reached.setdefault(row["rho"], {})
        of_rho.setdefault(row["method"], {})[row["seed"]] = float(row["test"])
    return reached


def methods_of(rows):
    return [method for method in METHODS if any(row["method"] == method for row in rows)]


def tables(rows):
    """Returns Markdown: advantages with 95% intervals over seeds, and two methods against all
    others."""
    reached = advantages(rows)
    controls = reached.pop("none", {})
    rhos = [str(rho) for rho in RHOS if str(rho) in reached]
    methods = methods_of(rows)
    lines = ["| rho | seeds | " + " | ".join(methods) + " |", "|---" * (len(methods) + 2) + "|"]
    for rho in rhos:
        values = [list(reached[rho][method].values()) for method in methods]
        lines.append(f"| {rho} | {len(values[0])} | {' | '.join(map(with_interval, values))} |")
    lines += ["", "Without preferences: " + ", ".join(
        f"{method} {with_interval(list(values.values()))}" for method, values in controls.items())]
    for method in ("e-dpo", MEAN):
        if method in methods:
            lines += ["", *against(method, reached, rhos, methods)]
    return "\n".join(lines)


def against(method, reached, rhos, methods):
    """Returns lines of Markdown: a method's advantage minus that of each other one, by rho."""
    others = [other for other in methods if other != method]
    lines = [f"{method} minus another method, paired over seeds; p of a t-test, Holm-corrected "
             "within a row:", "", f"| rho | {' | '.join(f'minus {other}' for other in others)} |",
             "|---" * (len(others) + 1) + "|"]
    for rho in rhos:
        of_rho = reached[rho]
        differences = {other: [of_rho[method][s] - of_rho[other][s] for s in of_rho[method]]
                       for other in others}
        p = holm({other: t_p_value(d) for other, d in differences.items()})
        lines.append(f"| {rho} | " + " | ".join(
            f"{mean(d):+.2f}" + (f" (p {p[other]:.2g})" if len(d) > 1 else "")
            for other, d in differences.items()) + " |")
    return lines


def details(rows, rho):
    """Returns Markdown: for one rho, what else was measured of each method, as means over seeds."""
    names = {"length": ".1f", "kl_pi_ref": ".2f", "kl_ref_pi": ".2f", "chosen_change": "+.1f",
             "rejected_change": "+.1f"}
    lines = ["| policy | advantage | length | KL(pi ‖ ref) | KL(ref ‖ pi) | chosen change | "
             "rejected change |", "|---" * 7 + "|"]
    for method in methods_of(rows):
        runs = [row for row in rows if row["rho"] == rho and row["method"] == method]
        cells = [method, with_interval([float(run["test"]) for run in runs])]
        cells += [f"{mean(float(run[name]) for run in runs):{form}}"
                  for name, form in names.items()]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def with_interval(values):
    """Writes the mean over seeds, with its 95% interval if there are several."""
    return f"{mean(values):+.2f}" + (f" ± {half_width(values):.2f}" if len(values) > 1 else "")


def half_width(values):
    """Returns the half-width of the 95% interval of a mean over seeds, or 0 for one seed."""
    if len(values) < 2:
        return 0.0
    return t_quantile(len(values)) * stdev(values) / len(values) ** 0.5


def frontier(points):
    """Picks the points (distance, advantage) for which no nearer point has a larger advantage.
    Returns them by distance."""
    kept = []
    for distance, advantage in sorted(points):
        if not kept or advantage > kept[-1][1]:
            kept.append((distance, advantage))
    return kept


def figure(rows, folder, chosen):
    """Draws advantage against rho, and advantage against KL(pi || ref) for the trials in the file
    `chosen`. Each method has its colour, and its frontier is a line."""
    reached = advantages(rows)
    trials_of = read_json(chosen)
    fig, axes = pyplot().subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    numbers = [str(rho) for rho in RHOS if rho != "all" and str(rho) in reached]
    for method in methods_of(rows):
        style = dict(linestyle="--" if method in ("dpo", "ipo", ORACLE) else "-", marker="o",
                     markersize=3)
        values = [list(reached[rho][method].values()) for rho in numbers]
        line, = axes[0].plot([float(rho) for rho in numbers], list(map(mean, values)),
                             label=method, **style)
        axes[0].errorbar([float(rho) for rho in numbers], list(map(mean, values)),
                         list(map(half_width, values)), color=line.get_color(), fmt="none",
                         linewidth=0.8)
        if method in KNOB:
            points = list(zip(trials_of["kl_pi_ref"][method].values(),
                              trials_of["advantage"][method].values()))
            axes[1].plot(*zip(*points), "o", markersize=2, color=line.get_color())
            axes[1].plot(*zip(*frontier(points)), color=line.get_color(), **style)
    axes[0].set_xlabel("rho: longer response preferred")
    axes[0].set_ylabel("oracle advantage (test)")
    axes[1].set_xlabel(f"KL(pi ‖ ref) in nats; a point is a beta or tau, at rho {trials_of['rho']}")
    axes[1].set_ylabel("oracle advantage (validation)")
    axes[0].legend(frameon=False, fontsize=7)
    save(fig, folder, "figure2.png")


def main(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--sft", default="out/sft", help="the reference: the speedrun's")
    add("--rhos", type=comma_separated(fraction_or_all, "fractions, or all"), default=RHOS)
    add("--seeds", type=comma_separated(seed, "seeds"), default=[0, 1, 2, 3, 4])
    add("--choose", action="store_true", help="choose betas and taus, and nothing else")
    add("--choose_rho", type=fraction_or_all, default=0.2, help="with --choose")
    add("--draw", action="store_true", help="draw, and train nothing")
    add("--out_dir", default="out/figure2", help="for the runs")
    add("--results", default="out/figure2", help="for runs.csv, figure2.png, and chosen.json")
    add("--chosen", default="results/figure2/chosen.json", help="betas and taus: ours, or those "
        "that --choose has written")
    add("--n_prompts", type=positive_int, default=1000, help="in each evaluation")
    add("--flags", default="", help="more flags for all training runs, such as "
        "'--max_steps=20 --n_pairs=200'")
    add("--workers", type=positive_int, default=2, help="cells at a time, one thread each")
    args = parser.parse_args(argv)
    path = f"{args.results}/runs.csv"
    if not args.draw:
        trials.check_models(sft=args.sft)
    os.makedirs(args.results, exist_ok=True)
    if args.choose:
        with trials.workers(args.workers) as pool:
            return choose(args, pool)
    if not args.draw:
        with naming("--chosen"):
            chosen = read_json(args.chosen)["chosen"]
        check_reference(read_rows(path), args.sft, path)
        check_settings(args, chosen)
        done = {(row["rho"], row["seed"]) for row in read_rows(path)}
        with trials.workers(args.workers) as pool:
            jobs = [pool.submit(cell, args, rho, number, chosen)
                    for number in args.seeds for rho in args.rhos
                    if (str(rho), str(number)) not in done]
            jobs += [pool.submit(controls, args, number) for number in args.seeds
                     if ("none", str(number)) not in done]
            for job in as_completed(jobs):
                rows = job.result()
                append(path, rows, COLUMNS)
                print(f"rho {rows[0]['rho']}, seed {rows[0]['seed']}: "
                      + "  ".join(f"{row['method']} {row['test']:+.2f}" for row in rows),
                      flush=True)
    rows = read_rows(path)
    if not rows:
        raise InputError(f"--results: there are no runs in {path}")
    print(tables(rows))
    for rho in dict.fromkeys(row["rho"] for row in rows if row["rho"] != "none"):
        print(f"\nrho {rho}, means over seeds:\n\n{details(rows, rho)}")
    figure(rows, args.results, args.chosen)


if __name__ == "__main__":
    run_script(main)
