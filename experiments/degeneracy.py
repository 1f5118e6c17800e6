"""Repeats the paper's figure 1: what happens to log-probs and margins if training goes on and on.

    python experiments/degeneracy.py               # five seeds: over an hour on 2 cores; resumable
    python experiments/degeneracy.py --draw --results=results/degeneracy       # ours, as a table

It trains five losses at one beta for ten times the usual steps. It watches the log-probs of
training pairs, and the oracle's reward of samples for validation prompts. A seed draws new pairs,
and new reward models and policies are trained on them. The results are curves.csv and
degeneracy.png in --results, and docs/degeneracy.md discusses them.
"""
import json
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np

from experiments import figure2, trials
from losses import PAPER
from support.flags import (
    InputError,
    Parser,
    comma_separated,
    positive_float,
    positive_int,
    run_script,
    seed,
)
from support.report import pyplot, save

RHO = 0.2
LOSSES = ("dpo", "ipo", "d-dpo", "p-dpo", "e-dpo")
CURVES = {"chosen_change": "train/chosen_change", "rejected_change": "train/rejected_change",
          "margin": "train/margin", "accuracy": "train/accuracy",
          "validation_accuracy": "validation/accuracy", "reward": "validation/reward"}


def run(args, number, loss):
    """Trains one policy. Returns [{"loss", "seed", "step", "chosen_change", ...}] of its
    evaluations."""
    cell = f"{args.out_dir}/{number}"
    flags = [f"--loss={loss}", f"--max_steps={args.steps}", f"--eval_every={args.steps // 20}",
             "--select=oracle", *figure2.data_flags(args, RHO, number)]
    if loss != "ipo":
        flags.append(f"--beta={args.beta}")
    rewards = PAPER[loss]
    if rewards:
        flags.append(f"--rewards={cell}/{rewards}")
    trials.train("train_policy", f"{cell}/{loss}", *flags)
    with open(f"{cell}/{loss}/metrics.jsonl", encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    return [{"loss": loss, "seed": number, "step": line["step"],
             **{name: round(line[metric], 4) for name, metric in CURVES.items()}}
            for line in lines if "train/margin" in line]


def by_loss(rows):
    """Reads curves from rows of the CSV. Returns {loss: {"step": (E,), name of a curve: (seeds,
    E)}}, for E evaluations. The curve "advantage" is the reward minus that at step 0."""
    curves = {}
    for loss in dict.fromkeys(row["loss"] for row in rows):
        of_loss = [row for row in rows if row["loss"] == loss]
        n_seeds = len({row["seed"] for row in of_loss})
        values = {name: np.array([float(row[name]) for row in of_loss]).reshape(n_seeds, -1)
                  for name in ("step", *CURVES)}
        values["advantage"] = values["reward"] - values["reward"][:, :1]
        curves[loss] = {**values, "step": values["step"][0].astype(int)}
    return curves


def table(curves):
    """Returns Markdown: each loss after 10%, 50% and 100% of the steps, as means over seeds."""
    lines = ["| loss | steps | chosen change | rejected change | h | accuracy, train | "
             "accuracy, validation | advantage | best advantage |", "|---" * 9 + "|"]
    for loss, values in curves.items():
        best = figure2.with_interval(list(values["advantage"].max(axis=1)))
        for i in (len(values["step"]) // 10, len(values["step"]) // 2, len(values["step"]) - 1):
            now = {name: values[name][:, i].mean() for name in CURVES}
            lines.append(f"| {loss} | {values['step'][i]} | {now['chosen_change']:+.1f} | "
                         f"{now['rejected_change']:+.1f} | {now['margin']:.1f} | "
                         f"{now['accuracy']:.2f} | {now['validation_accuracy']:.2f} | "
                         f"{figure2.with_interval(list(values['advantage'][:, i]))} | {best} |")
    return "\n".join(lines)


def figure(curves, folder):
    """Draws a panel each for log-probs, margins and rewards, with a colour for each loss: a line
    for the mean over seeds, and a band from the lowest seed to the highest."""
    fig, axes = pyplot().subplots(1, 3, figsize=(11, 3.2), layout="constrained")
    panels = {"chosen_change": (axes[0], "-"), "rejected_change": (axes[0], ":"),
              "margin": (axes[1], "-"), "advantage": (axes[2], "-")}
    for i, (loss, values) in enumerate(curves.items()):
        for name, (ax, style) in panels.items():
            ax.plot(values["step"], values[name].mean(axis=0), style, color=f"C{i}", label=loss)
            ax.fill_between(values["step"], values[name].min(axis=0), values[name].max(axis=0),
                            color=f"C{i}", alpha=0.15, linewidth=0)
    axes[0].set_ylabel("log-prob of chosen (line) and\nrejected (dotted), change in nats")
    axes[0].set_yscale("symlog")
    axes[1].set_ylabel("margin h on training pairs, nats")
    axes[1].set_yscale("symlog")
    axes[2].set_ylabel("oracle advantage, validation prompts")
    axes[2].legend(frameon=False, fontsize=7)
    for ax in axes:
        ax.set_xlabel("step")
    save(fig, folder, "degeneracy.png")


def main(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--sft", default="out/sft", help="the reference: the speedrun's")
    add("--seeds", type=comma_separated(seed, "seeds"), default=[0, 1, 2, 3, 4])
    add("--steps", type=positive_int, default=3200)
    add("--beta", type=positive_float, default=0.1, help="of all losses that have it")
    add("--out_dir", default="out/degeneracy", help="for the runs")
    add("--results", default="out/degeneracy", help="for curves.csv, degeneracy.png")
    add("--flags", default="", help="more flags for all training runs")
    add("--workers", type=positive_int, default=2, help="runs at a time, one thread each")
    add("--draw", action="store_true", help="table and figure of what is there")
    args = parser.parse_args(argv)
    path = f"{args.results}/curves.csv"
    if not args.draw:
        trials.check_models(sft=args.sft)
        with trials.workers(args.workers) as pool:
            models = [pool.submit(figure2.reward_models, f"{args.out_dir}/{number}",
                                  figure2.data_flags(args, RHO, number)) for number in args.seeds]
            for job in models:
                job.result()
            jobs = [pool.submit(run, args, number, loss)
                    for number in args.seeds for loss in LOSSES]
            rows = [row for job in jobs for row in job.result()]
        os.makedirs(args.results, exist_ok=True)
        if os.path.exists(path):
            os.remove(path)             # of an earlier call
        figure2.append(path, rows, ["loss", "seed", "step", *CURVES])
    rows = figure2.read_rows(path)
    if not rows:
        raise InputError(f"--results: there are no runs in {path}")
    curves = by_loss(rows)
    print(table(curves))
    figure(curves, args.results)


if __name__ == "__main__":
    run_script(main)
