"""The paper's figure 1: what happens to log-probs and margins when training goes on and on.

    python runs/degeneracy.py --sft=out/speedrun/sft --rm=out/speedrun/rm --rms=out/speedrun/rms
    python runs/degeneracy.py --draw --results=results/degeneracy       # ours, as a table

Ten times the usual steps of five losses at one beta, watched on training pairs, with the oracle's
reward of samples for validation prompts. 14 minutes on 2 cores. Writes curves.csv and
degeneracy.png to --results; docs/degeneracy.md says what is in them.
"""
import json
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import figure2
import numpy as np
import trials

from support.figures import pyplot, save
from support.flags import InputError, Parser, positive_float, positive_int, run_script

LOSSES = ("dpo", "ipo", "d-dpo", "p-dpo", "e-dpo")
CURVES = {"chosen_change": "train/chosen_change", "rejected_change": "train/rejected_change",
          "margin": "train/margin", "accuracy": "train/accuracy",
          "validation_accuracy": "validation/accuracy", "reward": "validation/reward"}


def run(args, loss):
    """Trains one policy. Returns [{"step", "chosen_change", ...}] of its evaluations."""
    folder = f"{args.out_dir}/{loss}"
    flags = [f"--loss={loss}", f"--init_from={args.sft}", f"--max_steps={args.steps}",
             f"--eval_every={args.steps // 20}", "--select=oracle"]
    flags += args.flags.split()
    if loss != "ipo":
        flags.append(f"--beta={args.beta}")
    rewards = {"d-dpo": args.rm, "e-dpo": args.rms}.get(loss)
    if rewards:
        flags.append(f"--rewards={rewards}")
    trials.train("train_policy", folder, *flags)
    with open(f"{folder}/metrics.jsonl", encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    return [{"loss": loss, "step": line["step"],
             **{name: round(line[metric], 4) for name, metric in CURVES.items()}}
            for line in lines if "train/margin" in line]


def table(curves):
    """Markdown: each loss after a tenth of the steps, half of them and all."""
    lines = ["| loss | steps | chosen change | rejected change | h | accuracy, train | "
             "accuracy, validation | advantage | best advantage |", "|---" * 9 + "|"]
    for loss, rows in curves.items():
        gains = [float(row["reward"]) - float(rows[0]["reward"]) for row in rows]
        for i in (len(rows) // 10, len(rows) // 2, len(rows) - 1):
            row = {name: float(rows[i][name]) for name in CURVES}
            lines.append(f"| {loss} | {rows[i]['step']} | {row['chosen_change']:+.1f} | "
                         f"{row['rejected_change']:+.1f} | {row['margin']:.1f} | "
                         f"{row['accuracy']:.2f} | {row['validation_accuracy']:.2f} | "
                         f"{gains[i]:+.2f} | {max(gains):+.2f} |")
    return "\n".join(lines)


def figure(curves, folder):
    """One panel each for log-probs, margins and rewards, one colour for each loss."""
    fig, axes = pyplot().subplots(1, 3, figsize=(11, 3.2), layout="constrained")
    for loss, lines in curves.items():
        steps, chosen, rejected, margin, reward = (
            np.array([float(line[name]) for line in lines])
            for name in ("step", "chosen_change", "rejected_change", "margin", "reward"))
        curve, = axes[0].plot(steps, chosen)
        colour = curve.get_color()
        axes[0].plot(steps, rejected, linestyle=":", color=colour)
        axes[1].plot(steps, margin, color=colour)
        axes[2].plot(steps, reward - reward[0], color=colour, label=loss)
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
    add("--sft", default="out/speedrun/sft")
    add("--rm", default="out/speedrun/rm")
    add("--rms", default="out/speedrun/rms")
    add("--steps", type=positive_int, default=3200)
    add("--beta", type=positive_float, default=0.1, help="of all losses that have it")
    add("--out_dir", default="out/degeneracy")
    add("--results", default="out/degeneracy", help="for curves.csv, degeneracy.png")
    add("--flags", default="", help="more flags for all training runs")
    add("--workers", type=positive_int, default=2, help="runs at a time, one thread each")
    add("--draw", action="store_true", help="table and figure of what is there")
    args = parser.parse_args(argv)
    path = f"{args.results}/curves.csv"
    if not args.draw:
        trials.check_models(sft=args.sft, rm=args.rm, rms=args.rms)
        with trials.workers(args.workers) as pool:
            jobs = [pool.submit(run, args, loss) for loss in LOSSES]
            rows = [row for job in jobs for row in job.result()]
        os.makedirs(args.results, exist_ok=True)
        if os.path.exists(path):
            os.remove(path)             # of an earlier call
        figure2.append(path, rows, ["loss", "step", *CURVES])
    rows = figure2.read_rows(path)
    if not rows:
        raise InputError(f"--results: there are no runs in {path}")
    curves = {}
    for row in rows:
        curves.setdefault(row["loss"], []).append(row)
    print(table(curves))
    figure(curves, args.results)


if __name__ == "__main__":
    run_script(main)
