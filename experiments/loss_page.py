"""Writes docs/losses.md and its figure, for experiments/zoo.py --draw: what each loss is, what it
does, where it was published, what TRL calls it, and what it reached on TinyTLDR."""
import inspect
import os
from statistics import mean

import numpy as np
import torch

import zoo
from experiments.figure2 import with_interval
from experiments.properties import along, at_reference_unpaired, properties, slopes
from experiments.trials import ROOT
from losses import EVERY_LOSS, PREFERENCE_LOSSES, knobs
from support.report import markdown_table, pyplot, save

PAGE = os.path.join(ROOT, "docs", "losses.md")
FIGURE = os.path.join(ROOT, "results", "zoo")
YES = {True: "yes", False: "no"}
# What the columns of a loss are called on the page.
NEEDS = {"ref_logps": "reference", "rewards": "rewards", "lengths": "lengths", "kl": "samples",
         "batch": "batch"}

INTRODUCTION = """# Thirty-six losses

<!-- Written by python experiments/zoo.py --draw; its text is in experiments/loss_page.py. -->

This page is about the 36 losses that you can train a policy with. It says what each one is, what
each one does to the log-probs of a pair, what TRL calls them, and what they earn on TinyTLDR.

Each loss trains by its name: `python train_policy.py --loss=simpo`, for example. Seven are in
[losses.py](../losses.py): the paper's six, which the README [lists](../README.md#the-method), and
IPO per token. The other 29 are in [zoo.py](../zoo.py), each a function of a few lines. The first
table lists those.

The formulas use some letters:

* u is the log-ratio of the chosen response: its log-prob under the policy minus its log-prob under
  the reference. v is that of the rejected response.
* h = u - v is the margin.
* sigma is the logistic function, |y| the number of tokens in a response, and r a reward.

## What each one is
"""

PROPERTIES = """
## What each one does

Where does a loss pull the two responses of a pair, and does it ever stop? We found the answers by
calling the functions, without looking at their formulas
([properties.py](../experiments/properties.py)). [test_zoo.py](../tests/test_zoo.py) compares them
with what the papers lead you to expect.

The next table is about one pair: two responses of 20 tokens, each with a log-prob of -60 nats under
the reference. Five reward models give it margins of 1, 1.5, 2, 2.5 and 3. Flags are at their
defaults, and the KL is left out. These are its columns:

* **needs**: what a loss has to know besides the policy's log-probs. *batch* means that the loss of
  a pair depends on the other pairs of its batch, so that `--micro_batch_size` is refused.
* **value**: the loss at the reference, where training starts.
* **gradient**: its derivatives there, with respect to the log-probs of the chosen and of the
  rejected response. Training pushes a log-prob up where its number is negative.
* **h alone**: whether the loss stays the same when both log-probs of a pair change together.
* **lowest at**: the h at which the loss is lowest, if u = h / 2 and v = -h / 2. ∞ means that more
  is always better.
* **bounded**: whether the loss has a lower bound, wherever the policy may go.
* **convex**: whether it is convex in the two log-probs.
* **both fall**: what the loss does when the log-probs of all pairs fall together and h stays 1.
  *Flat* is the [degeneracy](degeneracy.md): nothing keeps the chosen responses where they are.
* **slopes**: the derivative along h, at -50, 0 and 50. If it is near zero at -50, the loss gives up
  on a pair that is far on the wrong side. If it is above zero at 50, the loss pulls back a pair
  that has gone too far. If it is below zero there, the loss keeps pushing such a pair further.
* **label**: *unused* means that swapping the two responses changes nothing, because rewards say
  which one is better.

"""

READING = """
What to look at:

* **Does anything hold the chosen response up?** Every loss that depends on h alone is flat where
  both fall. So are the length-normalised ones (on responses of equal length), and BCO and unpaired
  AOT, which compare a response with its batch. NCA, SPPO, DPOP, RPO, ORPO, CPO, SLiC and RRHF have
  a term of their own that holds it up. KTO, APO-zero and chi-PO notice the fall, but level off: far
  down, nothing pulls back. alpha-DPO, JS-DPO and APO-down even gain by it.
* **Does the margin have a place to stop?** cDPO, EXO and NCA ask for a finite margin because they
  do not quite trust the label. IPO, SPPO and distillation have a target. The hinges stop, and so
  does chi-PO, by its clip. APO-down is lowest at a finite h only along this line: in general it
  lowers both responses. All others ask for an infinite margin.
* **What happens to a pair that is far on the wrong side?** EXO, KTO, chi-PO and both APOs ignore
  it. To the squared losses and the exponential it matters more than all others.
* **Who uses the label?** All but distillation, REBEL included.
* **Robust DPO** is the only one without a lower bound. Its slope at h = 50 is -0.125, and stays
  there.
* **DiscoPOP** starts in the wrong direction: at the reference its slope is positive. There it
  blends from DPO's ln 2 up to the exponential's 1, which makes a valley at h = -0.12 / beta and a
  hump at 0.07 / beta. A pair doesn't get over the hump by itself; the others have to carry it.
* **APO-down** leaves the chosen response alone at the reference, where its two pulls cancel.

![Each loss, and its slope, over h](../results/zoo/losses.png)

Each panel shows a loss minus its lowest value there (blue), and its slope along h (orange), for h
from -6 to 6 on the same pair. The dotted line is the reference.
"""

UNPAIRED = """
## Single responses with a label

`--loss=kto` also reads rows with one response that people wanted or did not want
([data.md](data.md#columns)). Its loss is then `D sigma(beta (z - u))` of a response that they
wanted (*desirable*), and `U sigma(beta (u - z))` of one that they did not (`kto_unpaired` in
[zoo.py](../zoo.py)).

* D and U are `--desirable_weight` and `--undesirable_weight`.
* z is the mean log-ratio of responses to other prompts, or 0 if that mean is negative. For this,
  each prompt of a batch is also read with the response of another row, as in the paper and in TRL.

At the reference the loss is {0[0]:g} and {0[1]:g}, and its derivative with respect to the
response's log-prob is {1[0]:g} and {1[1]:g}. Like KTO on pairs it is not convex, and it is bounded:
it lies between 0 and the weight, and gives up on a response that is far on the wrong side.
"""

TRL = """
## What TRL calls them

These are the names in TRL 1.16. `bash dev/parity.sh` allows for the differences in the last column,
and then compares values and gradients of every row with TRL's own code, to 1e-5.

"""


def formula_idea_source(name):
    """Splits the docstring of a loss: the formula after its first verb, the sentences between, and
    the last paragraph, which says where it was published."""
    first, *middle = inspect.getdoc(EVERY_LOSS[name]).split("\n\n")
    *middle, source = middle
    formula = " ".join(first.split()).removeprefix("Computes ").removesuffix(".")
    return formula, " ".join(" ".join(middle).split()), " ".join(source.split())


def catalogue():
    """Returns a table of the losses of zoo.py: name, flags, formula, idea and source."""
    rows = []
    for name in zoo.ZOO:
        formula, idea, source = formula_idea_source(name)
        flags = ", ".join(f"{knob} {default:g}" for knob, default in knobs(name).items())
        rows.append([f"**{name}**<br>{flags}", f"`{formula}`<br>{idea}", source])
    return markdown_table(["loss, its flags", "what it is", "published"], rows)


def number(value):
    """Returns a number as text with three digits, "0" if it is too small to matter."""
    if abs(value) < 1e-6:
        return "0"
    return f"{value:.1g}" if abs(value) >= 1e6 or abs(value) < 1e-3 else f"{value:.3g}"


def where_lowest(minimum):
    """Returns the places of a minimum as text."""
    if minimum == ["infinity"]:
        return "∞"
    if minimum[-1] == "beyond":
        return f"from {minimum[0]:g} on"
    return ", ".join(f"{place:g}" for place in minimum)


def property_table():
    """Returns the table of what the losses do."""
    rows = []
    for name in [*PREFERENCE_LOSSES, *zoo.ZOO]:
        of_loss = properties(name)
        rows.append([
            name, ", ".join(NEEDS[need] for need in of_loss["needs"]) or "nothing",
            number(of_loss["value"]), ", ".join(map(number, of_loss["gradient"])),
            YES[of_loss["h alone"]], where_lowest(of_loss["minimum"]), YES[of_loss["bounded"]],
            YES[of_loss["convex"]], of_loss["both fall"],
            ", ".join(map(number, of_loss["slopes"])),
            "unused" if of_loss["even"] else "used"])
    return markdown_table(["loss", "needs", "value", "gradient", "h alone", "lowest at", "bounded",
                           "convex", "both fall", "slopes", "label"], rows)


def trl_table():
    """Returns the table of TRL's names."""
    rows = [[trainer, f"`{theirs}`" if theirs else "", ours, note]
            for trainer, losses in zoo.TRL.items() for theirs, (ours, note) in losses.items()]
    return markdown_table(["trainer", "its name", "ours", "what differs"], rows)


def measured(methods, knob_of, rows, chosen):
    """Returns the section that says what the losses reached, best first. methods: their names.
    rows: of runs.csv. chosen: {method: value of its knob}."""
    lines = ["", "## What they reach on TinyTLDR", ""]
    test = [row for row in rows if row["split"] == "test" and row["advantage"]]
    if not test:
        return "\n".join([*lines, "`python experiments/zoo.py` measures this.", ""])
    numbers = {}
    for row in test:
        for column in ("advantage", "chosen_change", "length"):
            key = (row["method"], row["rho"], column)
            numbers.setdefault(key, []).append(float(row[column]))
    measured_methods = [method for method in methods if (method, "0.2", "advantage") in numbers]
    measured_methods.sort(key=lambda method: -mean(numbers[method, "0.2", "advantage"]))
    table = []
    for method in measured_methods:
        cells = [method, f"{knob_of(method)[0]} {chosen[method]:g}"]
        for rho in ("0.2", "all"):
            values = numbers.get((method, rho, "advantage"))
            change = numbers.get((method, rho, "chosen_change"))
            cells += [with_interval(values), f"{mean(change):+.1f}"] if values else ["", ""]
        cells.append(f"{mean(numbers[method, '0.2', 'length']):.1f}")
        table.append(cells)
    planned = 9 * len(methods)      # of each three trials, and three seeds at two rhos
    finished = len(rows) == planned
    unfinished = "" if finished else (
        f" **This is not finished**: {planned - len(rows)} of {planned} runs are still to be made. "
        "An advantage without ± is of one seed, and other seeds move it by as much as most methods "
        "here differ.")
    reference, = {row["reference"] for row in rows}
    header = ["method", "knob", "advantage, rho 0.2", "chosen change", "advantage, natural pairs",
              "chosen change", "length, rho 0.2"]
    lines += [
        f"`python experiments/zoo.py` trained {len(rows)} policies from one reference "
        f"({reference}).{unfinished} Each went over 1,000 pairs twice, which is 124 steps of 16; "
        "the speedrun's policies have 320. One knob of each method was chosen out of three "
        "values, by the advantage on validation prompts, with pairs of another seed. The questions "
        "were written down before, and [dev/LOG.md](../dev/LOG.md) has them"
        f"{' with the answers' if finished else ''}. "
        "[runs.csv](../results/zoo/runs.csv) has every run.", "",
        "* **advantage**: the oracle's reward of samples for 1,000 test prompts, minus the "
        "reference's. ± is a 95% interval over seeds.",
        "* **chosen change**: how far the log-prob of chosen responses has moved from the "
        "reference's, in nats, on training pairs.",
        "* **rho 0.2**: the shorter response is preferred in 80% of the pairs, although the oracle "
        "likes longer ones.", "",
        markdown_table(header, table), ""]
    return "\n".join(lines)


def page(methods, knob_of, rows, chosen):
    """Returns the text of docs/losses.md."""
    return "\n".join([INTRODUCTION, catalogue(), PROPERTIES, property_table(), READING,
                      UNPAIRED.format(*at_reference_unpaired("kto")), TRL + trl_table(),
                      measured(methods, knob_of, rows, chosen)])


def draw():
    """Draws each loss and its slope over h, a panel each."""
    names = [*PREFERENCE_LOSSES, *zoo.ZOO]
    h = torch.linspace(-6, 6, 241, dtype=torch.float64)
    fig, axes = pyplot().subplots(-(-len(names) // 6), 6, figsize=(11, 10.5),
                                  layout="constrained")
    for name, ax in zip(names, axes.flat):
        value = along(name, h).numpy()
        height = min(value.max() - value.min(), 12.0)
        ax.plot(h, value - value.min(), color="#2a6099")
        ax.plot(h, slopes(name, h).numpy(), color="#c0561f", linewidth=0.9)
        ax.axvline(0, color="#8a8a8a", linestyle=":", linewidth=0.7)
        ax.axhline(0, color="black", linewidth=0.5)
        ax.set(title=name, ylim=(-0.5 * height, 1.05 * height))
        ax.tick_params(labelsize=6)
    for ax in np.ravel(axes)[len(names):]:
        ax.axis("off")
    save(fig, FIGURE, "losses.png")


def write_page(methods, knob_of, rows, chosen):
    """Writes the page and its figure."""
    os.makedirs(FIGURE, exist_ok=True)
    draw()
    with open(PAGE, "w", encoding="utf-8") as file:
        file.write(page(methods, knob_of, rows, chosen))
    print(f"written: {os.path.relpath(PAGE)}, {os.path.relpath(FIGURE)}/losses.png")
