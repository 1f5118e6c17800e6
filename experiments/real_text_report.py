"""Makes the tables and the figure of experiments/real_text.py from its CSV files."""
import os
import sys
from statistics import mean

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np

from evaluate import interval
from experiments import figure2
from support.flags import InputError
from support.report import markdown_table, pyplot, save

METHODS = {         # loss, reward models of the cell, flags
    "p-dpo": ("p-dpo", None, []),
    "dpo": ("dpo", None, []),
    "ipo": ("ipo", None, []),
    "d-dpo": ("d-dpo", "rm", []),
    "dp-dpo": ("dp-dpo", "rm", []),
    "e-dpo": ("e-dpo", "rms", []),
    "mean": ("dp-dpo", "rms", []),              # of the family, in the place of the minimum
    "balanced": ("dpo", None, ["--rho=0.5"]),   # DPO on the cell's largest balanced subset,
    "member": ("dp-dpo", "rms/0.5", []),        # and the reward model that was trained on it
}
JUDGES = {"oracle": "oracle", "second": "second oracle", "rouge": "ROUGE-L"}
LOSSES = [f"{part}_loss_{when}" for part in ("train", "validation") for when in ("first", "last")]
DIGITS = {"oracle": ".2f", "second": ".2f", "rouge": ".3f"}
JUDGE_COLUMNS = ["run", "rho", "seed", "model", "human_pairs", "human_accuracy", "human_95",
                 "human_longer", "human_length_correlation", "oracle_pairs", "oracle_accuracy",
                 "oracle_95", "oracle_longer", "oracle_length_correlation", "commit", "reference"]


def cells(rows, purpose="run"):
    """Groups rows of runs.csv. Returns {(rho, method): rows of all seeds}, in METHODS' order."""
    of_cell = {}
    for rho in dict.fromkeys(row["rho"] for row in rows if row["purpose"] == purpose):
        for method in METHODS:
            runs = [row for row in rows if row["purpose"] == purpose
                    and (row["rho"], row["method"]) == (rho, method)]
            if runs:
                of_cell[rho, method] = sorted(runs, key=lambda row: row["seed"])
    return of_cell


def column(rows, name):
    return [float(row[name]) for row in rows]


def method_table(rows):
    """Returns Markdown: each method's advantages over the reference, and its other numbers."""
    header = ["rho", "policy", "seeds", *[f"advantage, {label}" for label in JUDGES.values()],
              "length", "unended", "KL(pi ‖ ref)", "chosen change", "rejected change"]
    lines = []
    for row in rows:
        if row["purpose"] == "reference" and row["run"].startswith("test/"):
            lines.append(row)
    first = {row["method"]: row for row in reversed(lines)}
    table = [["", method, "", *["" if method == "sft" and name != "rouge" or not row[name]
                                else f"{float(row[name]):+.2f}" for name in JUDGES],
              f"{float(row['length']):.1f}",
              f"{float(row['unended']):.3f}" if row["unended"] else "", "", "", ""]
             for method, row in first.items()]
    for (rho, method), runs in cells(rows).items():
        table.append([
            rho, method, len(runs),
            *[with_interval(column(runs, name), DIGITS[name], float(runs[0][f"{name}_95"]))
              for name in JUDGES],
            f"{mean(column(runs, 'length')):.1f}", f"{mean(column(runs, 'unended')):.3f}",
            f"{mean(column(runs, 'kl_pi_ref')):.2f}",
            f"{mean(column(runs, 'chosen_change')):+.1f}",
            f"{mean(column(runs, 'rejected_change')):+.1f}"])
    return markdown_table(header, table)


def half_width(values, over_posts):
    """Returns the 95% interval over seeds; with a single seed that over its posts."""
    return figure2.half_width(values) if len(values) > 1 else over_posts


def with_interval(values, form=".2f", over_posts=None):
    """Writes the mean over seeds, with its 95% interval."""
    width = half_width(values, over_posts)
    return f"{mean(values):+{form}}" + (f" ± {width:{form}}" if width is not None else "")


def comparisons(methods):
    """Lists the pairs of methods that the plan compares: each with the reference, e-DPO with
    each, and some others."""
    pairs = [(method, "sft") for method in METHODS]
    pairs += [("e-dpo", other) for other in METHODS if other != "e-dpo"]
    pairs += [("balanced", "dpo"), ("mean", "dpo"), ("mean", "balanced"), ("mean", "member")]
    return [pair for pair in pairs if set(pair) <= {"sft", *methods}]


def comparison_table(rows, by_prompt):
    """Returns Markdown: one method minus another by each judge, and p over seeds if there are
    several. It also says in how many seeds a paired test over prompts sees the difference, and in
    which direction."""
    table = []
    of_cell = cells(rows)
    for rho in dict.fromkeys(rho for rho, _ in of_cell):
        runs = {method: {row["seed"]: row["run"] for row in of_cell[rho, method]}
                for its_rho, method in of_cell if its_rho == rho}
        runs["sft"] = {row["seed"]: row["run"] for row in rows
                       if row["run"] == f"test/{row['seed']}/sft"}
        for first, second in comparisons(runs):
            seeds = [seed for seed in runs[first] if seed in runs[second]]
            line = [rho, f"{first} minus {second}", len(seeds)]
            for name in JUDGES if seeds else ():
                differences = [by_prompt[runs[first][seed]][name]
                               - by_prompt[runs[second][seed]][name] for seed in seeds]
                values = [float(difference.mean()) for difference in differences]
                p = figure2.t_p_value(values)
                seen = [np.sign(difference.mean()) for difference in differences
                        if figure2.t_p_value(list(difference)) < 0.05]
                line.append(with_interval(values, DIGITS[name], interval(differences[0])[1])
                            + ("" if np.isnan(p) else f" (p {p:.2g})")
                            + f"; {seen.count(1)} up, {seen.count(-1)} down")
            if seeds:
                table.append(line)
    return markdown_table(["rho", "difference", "seeds", *JUDGES.values()], table)


def collapse_table(rows):
    """Returns Markdown: how the log-probs of training pairs have changed after the last step, at
    the chosen beta, and after more steps at a tenth of it."""
    table = []
    usual = cells(rows)
    for (rho, method), long_runs in cells(rows, "collapse").items():
        for what, runs in (("chosen", usual.get((rho, method), [])), ("a tenth", long_runs)):
            if runs:
                table.append([method, what, runs[0]["value"], runs[0]["max_steps"], *[
                    with_interval(column(runs, name), ".1f")
                    for name in ("last_chosen_change", "last_rejected_change")],
                    with_interval(column(runs, "oracle"), ".2f", float(runs[0]["oracle_95"]))])
    return markdown_table(["loss", "beta or tau", "", "steps", "chosen change", "rejected change",
                           "advantage, oracle"], table)


def loss_table(rows):
    """Returns Markdown: each method's loss on training and validation pairs, at the reference and
    after the last step. A policy that distils has reached its targets where it is near zero."""
    table = [[rho, method, runs[0]["value"],
              *[f"{mean(column(runs, name)):.3g}" for name in LOSSES]]
             for (rho, method), runs in cells(rows).items()]
    return markdown_table(["rho", "policy", "beta or tau", "training pairs, at the reference",
                           "at the end", "validation pairs, at the reference", "at the end"], table)


def judge_table(rows):
    """Returns Markdown: accuracy of the oracles and of reward models, as means over seeds."""
    table = []
    for rho, model in dict.fromkeys((row["rho"], row["model"]) for row in rows):
        runs = [row for row in rows if (row["rho"], row["model"]) == (rho, model)]
        numbers = {name: mean(column(runs, name)) for name in JUDGE_COLUMNS[4:-2]}
        table.append([rho, model, f"{numbers['human_accuracy']:.2f} ± {numbers['human_95']:.2f}",
                      f"{numbers['human_longer']:.2f}",
                      f"{numbers['human_length_correlation']:+.2f}",
                      f"{numbers['oracle_accuracy']:.2f}", f"{numbers['oracle_longer']:.2f}",
                      f"{numbers['oracle_length_correlation']:+.2f}"])
    return markdown_table(
        ["rho", "reward model", "right on human pairs", "the longer one is", "margin and length",
         "right on sampled pairs", "the longer one is", "margin and length"], table)


def figure(rows, folder):
    """Draws two panels with a point for each method and rho: advantage by both oracles, and mean
    length."""
    of_cell = cells(rows)
    methods = [method for method in METHODS if any(method == name for _, name in of_cell)]
    rhos = list(dict.fromkeys(rho for rho, _ in of_cell))
    fig, axes = pyplot().subplots(1, 2, figsize=(9, 0.6 + 0.45 * len(methods)), sharey=True,
                                  layout="constrained")
    for i, rho in enumerate(rhos):
        for name, filled in (("oracle", True), ("second", False)):
            y = [j + 0.2 * i + 0.1 * (not filled) for j, method in enumerate(methods)
                 if (rho, method) in of_cell]
            shown = [of_cell[rho, method] for method in methods if (rho, method) in of_cell]
            axes[0].errorbar(
                [mean(column(runs, name)) for runs in shown], y, fmt="o", markersize=4,
                xerr=[half_width(column(runs, name), float(runs[0][f"{name}_95"]))
                      for runs in shown], color=f"C{i}",
                markerfacecolor=f"C{i}" if filled else "white", linewidth=0.8,
                label=f"{JUDGES[name]}, rho {rho}")
        axes[1].errorbar(
            [mean(column(runs, "length")) for runs in shown], [j - 0.1 for j in y], fmt="o",
            markersize=4, xerr=[half_width(column(runs, "length"), 0) for runs in shown],
            color=f"C{i}", linewidth=0.8, label=f"rho {rho}")
    for method, style in (("sft", "-"), ("authors", ":")):
        lengths = [float(row["length"]) for row in rows if row["purpose"] == "reference"
                   and row["method"] == method and row["run"].startswith("test/")]
        if lengths:
            axes[1].axvline(mean(lengths), color="black", linestyle=style, linewidth=0.8,
                            label=method)
    axes[0].axvline(0, color="black", linewidth=0.8)
    axes[0].set_yticks(range(len(methods)), methods)
    axes[0].invert_yaxis()
    over = "seeds" if any(len(runs) > 1 for runs in of_cell.values()) else "posts"
    axes[0].set_xlabel(f"advantage over the reference (SFT), 95% intervals over {over}")
    axes[1].set_xlabel("mean length of a summary, tokens")
    for ax in axes:
        ax.legend(frameon=False, fontsize=7)
    save(fig, folder, "real_text.png")


def draw(results):
    """Prints the tables of what is in a folder of results, and draws its figure there. InputError
    if there are no runs."""
    rows = figure2.read_rows(f"{results}/runs.csv")
    if not cells(rows):
        raise InputError(f"--results: there are no runs in {results}/runs.csv")
    by_prompt = {row["run"]: {judge: np.array(row[judge].split(), float) for judge in JUDGES}
                 for row in figure2.read_rows(f"{results}/by_prompt.csv")}
    for table in (method_table(rows), comparison_table(rows, by_prompt), loss_table(rows),
                  collapse_table(rows), judge_table(figure2.read_rows(f"{results}/judges.csv"))):
        print(f"\n{table}")
    figure(rows, results)
