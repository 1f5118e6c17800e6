"""Chooses each method's temperature: beta, or IPO's tau, on validation prompts, with the same budget for every method.

    python runs/sweep.py --sft=out/speedrun/sft --rm=out/speedrun/rm --rms=out/speedrun/rms    # about 20 minutes, 2 cores

Every method tries the same number of values, one run each with the settings of the speedrun, scored by oracle advantage on
1,000 prompts of the validation split. The test split is not touched. Prints a table for each method (LOG.md keeps them) and
draws OUT_DIR/sweep.png.
"""
import argparse
import contextlib
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

BETAS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10)
TAUS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10)
METHODS = {"dpo": BETAS, "ipo": TAUS, "d-dpo": BETAS, "p-dpo": BETAS, "dp-dpo": BETAS, "e-dpo": BETAS}


def trial(args, loss, value):
    """Trains one policy, scores it on validation prompts: -> its numbers. What an earlier sweep left in --out_dir is kept."""
    import torch
    torch.set_num_threads(1)
    import evaluate
    import train_policy
    folder = f"{args.out_dir}/{loss}/{value}"
    if not os.path.exists(f"{folder}/report/results.json"):
        rewards = {"d-dpo": args.rm, "dp-dpo": args.rm, "e-dpo": args.rms}.get(loss)
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            train_policy.main([f"--loss={loss}", f"--init_from={args.sft}", f"--out_dir={folder}",
                               f"--{'tau' if loss == 'ipo' else 'beta'}={value}"]
                              + ([f"--rewards={rewards}"] if rewards else []))
            evaluate.main([f"--ref={args.sft}", folder, "--split=validation", f"--out_dir={folder}/report", "--show=0"])
    with open(f"{folder}/report/results.json", encoding="utf-8") as file:
        (numbers,) = json.load(file)["policies"].values()
    return numbers


def figure(results, path):
    """Advantage and change of the chosen responses' log-probability against beta (tau), a line for each method."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "font.size": 9, "figure.dpi": 150})
    fig, axes = plt.subplots(1, 2, figsize=(8.5, 3.2), layout="constrained")
    for loss, numbers in results.items():
        style = dict(linestyle="--" if loss in ("dpo", "ipo") else "-", marker="o", markersize=3,
                     label=loss + (" (tau)" if loss == "ipo" else ""))
        axes[0].plot(METHODS[loss], [n["advantage"] for n in numbers], **style)
        axes[1].plot(METHODS[loss], [n["chosen_change"] for n in numbers], **style)
    for ax, label in zip(axes, ("oracle advantage over the reference", "log-prob of chosen responses,\nchange in nats")):
        ax.set_xscale("log")
        ax.set_xlabel("beta (IPO: tau)")
        ax.set_ylabel(label)
        ax.axhline(0, color="black", linewidth=0.8)
    axes[1].set_yscale("symlog")
    axes[1].set_ylim(top=1)
    axes[1].legend(frameon=False)
    fig.savefig(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--sft", default="out/speedrun/sft")
    parser.add_argument("--rm", default="out/speedrun/rm")
    parser.add_argument("--rms", default="out/speedrun/rms")
    parser.add_argument("--out_dir", default="out/sweep", help="remove it to start anew, as after another --sft")
    parser.add_argument("--workers", type=int, default=2, help="runs at the same time, one thread each")
    args = parser.parse_args()
    with ProcessPoolExecutor(args.workers) as pool:
        # the first trial of each kind alone fills the caches that the others share
        first = [("dpo", BETAS[0]), ("e-dpo", BETAS[0]), ("d-dpo", BETAS[0]), ("dp-dpo", BETAS[0])]
        for loss, value in first:
            pool.submit(trial, args, loss, value).result()
        trials = {(loss, value): pool.submit(trial, args, loss, value) for loss, values in METHODS.items()
                  for value in values}
        results = {}
        for loss, values in METHODS.items():
            print(f"\n| {loss}, {'tau' if loss == 'ipo' else 'beta'} | " + " | ".join(map(str, values)) + " |")
            print("|---" * (len(values) + 1) + "|")
            numbers = results[loss] = [trials[loss, value].result() for value in values]
            best = max(n["advantage"] for n in numbers)
            print("| advantage | " + " | ".join(("**{:+.2f}**" if n["advantage"] == best else "{:+.2f}").format(n["advantage"])
                                               for n in numbers) + " |")
            for key, name in (("length", "length"), ("kl_pi_ref", "KL(pi ‖ ref)"), ("chosen_change", "chosen change")):
                print(f"| {name} | " + " | ".join(f"{n[key]:.1f}" for n in numbers) + " |", flush=True)
    figure(results, f"{args.out_dir}/sweep.png")


if __name__ == "__main__":
    import runtime
    runtime.run(main)
