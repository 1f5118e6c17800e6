"""Chooses each method's temperature, beta or IPO's tau, on validation prompts: as many trials for
each.

    python runs/sweep.py --sft=out/speedrun/sft --rm=out/speedrun/rm --rms=out/speedrun/rms

One run for each value, with the settings of the speedrun, scored by oracle advantage on 1,000
prompts of the validation split. The test split is not touched. Prints a table for each method
(LOG.md keeps them) and draws OUT_DIR/sweep.png. About 20 minutes on 2 cores.
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import trials

from support.figures import pyplot, save
from support.flags import Parser, positive_int, run_script

VALUES = (0.01, 0.03, 0.1, 0.3, 1, 3, 10)
METHODS = {"dpo": "beta", "ipo": "tau", "d-dpo": "beta", "p-dpo": "beta", "dp-dpo": "beta",
           "e-dpo": "beta"}                                     # loss: what is chosen
FIRST = ("dpo", "d-dpo", "e-dpo")       # a trial of each alone fills the caches that others share


def trial(args, loss, value):
    """Trains one policy, scores it on validation prompts: returns its numbers. What an earlier
    sweep left in --out_dir is kept."""
    folder = f"{args.out_dir}/{loss}/{value}"
    rewards = {"d-dpo": args.rm, "dp-dpo": args.rm, "e-dpo": args.rms}.get(loss)
    flags = [f"--loss={loss}", f"--{METHODS[loss]}={value}", f"--init_from={args.sft}"]
    if rewards is not None:
        flags.append(f"--rewards={rewards}")
    trials.train("train_policy", folder, *flags)
    return trials.score(folder, args.sft, "validation")


def table(loss, numbers):
    """Markdown: a column for each value. numbers: those of each value, in order."""
    best = max(n["advantage"] for n in numbers)
    rows = [[f"{loss}, {METHODS[loss]}", *VALUES], ["---"] * (1 + len(VALUES)), ["advantage"]]
    for n in numbers:
        text = f"{n['advantage']:+.2f}"
        rows[-1].append(f"**{text}**" if n["advantage"] == best else text)
    for key, name in (("length", "length"), ("kl_pi_ref", "KL(pi ‖ ref)"),
                      ("chosen_change", "chosen change")):
        rows.append([name, *(f"{n[key]:.1f}" for n in numbers)])
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)


def figure(results, out_dir):
    """Advantage and change of the chosen responses' log-probability against beta (tau), a line for
    each method. results: {loss: numbers}."""
    fig, axes = pyplot().subplots(1, 2, figsize=(8.5, 3.2), layout="constrained")
    for loss, numbers in results.items():
        label = f"{loss} (tau)" if METHODS[loss] == "tau" else loss
        style = dict(linestyle="--" if loss in ("dpo", "ipo") else "-", marker="o", markersize=3)
        axes[0].plot(VALUES, [n["advantage"] for n in numbers], label=label, **style)
        axes[1].plot(VALUES, [n["chosen_change"] for n in numbers], label=label, **style)
    axes[0].set_ylabel("oracle advantage over the reference")
    axes[1].set_ylabel("log-prob of chosen responses,\nchange in nats")
    for ax in axes:
        ax.set_xscale("log")
        ax.set_xlabel("beta (IPO: tau)")
        ax.axhline(0, color="black", linewidth=0.8)
    axes[1].set_yscale("symlog")
    axes[1].set_ylim(top=1)
    axes[1].legend(frameon=False)
    save(fig, out_dir, "sweep.png")


def main(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--sft", default="out/speedrun/sft")
    add("--rm", default="out/speedrun/rm")
    add("--rms", default="out/speedrun/rms")
    add("--out_dir", default="out/sweep", help="remove it to start anew, as after another --sft")
    add("--workers", type=positive_int, default=2, help="runs at a time, one thread each")
    args = parser.parse_args(argv)
    trials.check_models(sft=args.sft, rm=args.rm, rms=args.rms)
    with trials.workers(args.workers) as pool:
        for loss in FIRST:
            pool.submit(trial, args, loss, VALUES[0]).result()
        jobs = {loss: [pool.submit(trial, args, loss, value) for value in VALUES]
                for loss in METHODS}
        results = {}
        for loss in METHODS:
            results[loss] = [job.result() for job in jobs[loss]]
            print(f"\n{table(loss, results[loss])}", flush=True)
    figure(results, args.out_dir)


if __name__ == "__main__":
    run_script(main)
