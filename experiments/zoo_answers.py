"""Answers the questions that dev/LOG.md asks of the thirty-six losses, from the rows of
results/zoo/runs.csv: what was measured, and yes, no or undecided by the criteria there. A question
whose runs are not all there is left open. experiments/zoo.py prints it when it is done."""
from statistics import mean, median

import numpy as np

import zoo
from experiments.properties import where_both_fall
from support.report import markdown_table

SEEDS = ("0", "1", "2")
HELD_UP = ("nca", "sppo", "dpop", "rpo", "orpo", "cpo", "slic", "rrhf")
BY_LENGTH = ("ln-dpo", "simpo", "rrhf", "orpo")
MEAN = "dp-dpo, family's mean"
WITH_REWARDS = (MEAN, "d-dpo", "dp-dpo", "e-dpo", "odpo", "rebel")


def verdict(yes, no):
    """Returns the answer, by two criteria that exclude each other."""
    return "yes" if yes else "no" if no else "undecided"


def spearman(first, second):
    """Computes the rank correlation of two lists of numbers without ties."""
    ranks = [np.argsort(np.argsort(values)) for values in (first, second)]
    return float(np.corrcoef(*ranks)[0, 1])


class Runs:
    """Looks up test runs: three numbers, one for each seed. KeyError if one is missing."""

    def __init__(self, rows):
        self.rows = {(row["method"], row["rho"], row["seed"]): row for row in rows
                     if row["split"] == "test" and row["advantage"]}

    def three(self, method, column="advantage", rho="0.2"):
        return [float(self.rows[method, rho, seed][column]) for seed in SEEDS]

    def minus(self, method, other, column="advantage", rho="0.2"):
        pairs = zip(self.three(method, column, rho), self.three(other, column, rho))
        return [first - second for first, second in pairs]

    def methods(self, rho="0.2"):
        """Lists those of which all three seeds are there."""
        names = dict.fromkeys(method for method, *_ in self.rows)
        return [name for name in names if all((name, rho, seed) in self.rows for seed in SEEDS)]


def shown(values):
    return ", ".join(f"{value:+.2f}" for value in values)


def held_up(runs):
    flat = [name for name in zoo.ZOO if where_both_fall(name) == "flat"]
    of_group = [[mean(runs.three(name, "chosen_change")) for name in names]
                for names in (HELD_UP, flat)]
    lowest, middle, middle_of_flat = min(of_group[0]), median(of_group[0]), median(of_group[1])
    return (f"with such a term: lowest {lowest:+.2f}, median {middle:+.2f}; flat ones: median "
            f"{middle_of_flat:+.2f}",
            verdict(lowest > middle_of_flat, middle <= middle_of_flat))


def labels_alone(runs):
    runs.three(MEAN)                # a KeyError, if it is not there
    counts = {"dpo": 0}
    for method in runs.methods():
        if method not in WITH_REWARDS:
            counts[method] = sum(gap >= 0 for gap in runs.minus(method, MEAN))
    best = max(counts, key=lambda method: (counts[method], mean(runs.three(method))))
    return (f"{best} in {counts[best]} seeds ({shown(runs.minus(best, MEAN))}); {len(counts)} "
            "losses looked at", verdict(counts[best] == 3, counts[best] == 0))


def length_taken_out(runs):
    biased, natural = [runs.minus("r-dpo", "dpo", rho=rho) for rho in ("0.2", "all")]
    return (f"R-DPO minus DPO: {shown(biased)}; on natural pairs {shown(natural)}",
            verdict(min(biased) > 0 and mean(biased) > mean(natural),
                    sum(gap <= 0 for gap in biased) >= 2))


def per_token(runs):
    ahead = {name: sum(gap > 0 for gap in runs.minus(name, "dpo")) for name in BY_LENGTH}
    return ("seeds ahead of DPO: " + ", ".join(f"{name} {n}" for name, n in ahead.items()),
            verdict(sum(n == 3 for n in ahead.values()) > len(ahead) / 2,
                    not any(ahead.values())))


def same_ranking(runs):
    both = [name for name in runs.methods() if name in runs.methods("all")]
    if len(both) < 10:
        raise KeyError("too few methods to rank")
    means = [[mean(runs.three(name, rho=rho)) for name in both] for rho in ("0.2", "all")]
    correlation = spearman(*means)
    return (f"Spearman {correlation:.2f} over {len(both)} methods",
            verdict(correlation >= 0.7, correlation < 0.3))


def wrong_start(runs):
    gaps = runs.minus("discopop", "dpo")
    return (f"DiscoPOP minus DPO: {shown(gaps)}",
            verdict(max(gaps) < 0, sum(gap > 0 for gap in gaps) >= 2))


def no_lower_bound(runs):
    gaps = runs.minus("robust-dpo", "dpo", "chosen_change")
    return (f"chosen change, robust DPO minus DPO: {shown(gaps)}",
            verdict(max(gaps) < 0, sum(gap > 0 for gap in gaps) >= 2))


QUESTIONS = {
    "does a term on the chosen response hold it up?": held_up,
    "does any loss that sees labels alone reach the family's mean?": labels_alone,
    "does taking length out of the reward help?": length_taken_out,
    "do losses that are normalised by length do better than DPO?": per_token,
    "is a ranking at rho 0.2 a ranking on natural pairs?": same_ranking,
    "does DiscoPOP's wrong start matter?": wrong_start,
    "does robust DPO do harm?": no_lower_bound,
}


def answer_table(rows):
    """Returns a table in Markdown. rows: of runs.csv."""
    runs, table = Runs(rows), []
    for question, answer in QUESTIONS.items():
        try:
            table.append([question, *answer(runs)])
        except KeyError:
            table.append([question, "not all of its runs are there", "open"])
    return markdown_table(["question", "what was measured", "answer"], table)
