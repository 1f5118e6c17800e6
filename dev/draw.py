"""Draws the README's pictures: advantage.png, pipeline.png and tree_mask.png.

    python dev/draw.py                     # seconds; writes them to assets/

advantage.png shows results/degeneracy/curves.csv. tree_mask.png shows the mask that training uses.
"""
import csv
import os
import sys
from pathlib import Path

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np
import torch

from data import collate
from model import tree_mask
from support.flags import Parser, run_script
from support.report import pyplot, save

ROOT = Path(__file__).parent.parent
ORANGE, BLUE, GREEN, PURPLE, GREY = "#c0561f", "#2a6099", "#2a7f4f", "#7a4f9a", "#8a8a8a"
# the README's row: a prompt, two responses and a sample from the reference, for the KL
TREE = [["p0", "p1", "p2"], ["a0", "a1", "<end>"], ["b0", "<end>"], ["s0", "s1", "s2", "<end>"]]


def advantages(path):
    """Reads curves.csv. Returns {loss: (steps (E,), advantages (seeds, E))}: each run's oracle
    reward at its E evaluations, minus that of its own samples at step 0."""
    rewards = {}                            # loss -> seed -> step -> reward
    with open(path, encoding="utf-8") as file:
        for row in csv.DictReader(file):
            of_seed = rewards.setdefault(row["loss"], {}).setdefault(row["seed"], {})
            of_seed[int(row["step"])] = float(row["reward"])
    curves = {}
    for loss, seeds in rewards.items():
        steps = sorted(next(iter(seeds.values())))
        values = np.array([[of_seed[step] for step in steps] for of_seed in seeds.values()])
        curves[loss] = np.array(steps), values - values[:, :1]
    return curves


def draw_advantage(folder):
    """Draws the true reward over a long run: for each loss a line for the mean over seeds, and a
    band from the lowest seed to the highest."""
    curves = advantages(ROOT / "results" / "degeneracy" / "curves.csv")
    fig, ax = pyplot().subplots(figsize=(8, 3.8), layout="constrained")
    lines = {"ipo": (GREY, 6), "e-dpo": (GREEN, -4), "d-dpo": (BLUE, 0), "dpo": (ORANGE, 0)}
    for loss, (colour, label_height) in lines.items():
        steps, values = curves[loss]
        mean = values.mean(axis=0)
        ax.plot(steps, mean, color=colour, linewidth=1.5 if loss == "ipo" else 2.5)
        ax.fill_between(steps, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.12,
                        linewidth=0)
        ax.annotate(loss, (steps[-1], mean[-1]), (8, label_height), textcoords="offset points",
                    va="center", color=colour, fontsize=13)
    ax.axhline(0, color="black", linewidth=0.8)
    ax.annotate("the reference policy", (2150, 0), (0, -4), textcoords="offset points", va="top",
                fontsize=9)
    ax.set(xlim=(0, 3560), xticks=range(0, 3201, 800))
    ax.set_xlabel("training steps", fontsize=11)
    ax.set_ylabel("true reward, minus the reference's", fontsize=11)
    save(fig, folder, "advantage.png")


def draw_tree_mask(folder):
    """Draws who sees whom in the README's row: a token's line has a coloured cell for each token
    that it attends to. The mask is model.tree_mask's, of data.collate's batch."""
    tokens = [label for part in TREE for label in part]
    ids = iter(range(len(tokens)))
    prompt, *responses = [[next(ids) for _ in part] for part in TREE]
    branch = collate([(prompt, responses)]).branch                          # (1, T)
    visible = tree_mask(branch, torch.float32)[0, 0] == 0                # (T, T)

    T = len(tokens)
    fig, ax = pyplot().subplots(figsize=(5.6, 4.5), layout="constrained")
    colours = [GREY, ORANGE, BLUE, PURPLE]                                  # of the branches
    for query in range(T):
        for key in range(T):
            colour = colours[branch[0, key]] if visible[query, key] else "#f3f3f3"
            ax.add_patch(pyplot().Rectangle((key + 0.04, query + 0.04), 0.92, 0.92, color=colour,
                                            linewidth=0))
    names = ["prompt", "response a", "response b", "sample"]
    start = 0
    for name, part, colour in zip(names, TREE, colours):
        middle = start + len(part) / 2
        ax.text(T + 0.3, middle, name, color=colour, va="center", fontsize=11, fontweight="bold")
        start += len(part)
    ax.set(xlim=(0, T + 3.2), ylim=(T, 0), aspect="equal")
    centres = np.arange(T) + 0.5
    ax.set_xticks(centres, tokens, rotation=60, family="monospace")
    ax.set_yticks(centres, tokens, family="monospace")
    ax.xaxis.tick_top()
    for label, role in zip(ax.get_xticklabels() + ax.get_yticklabels(), [*branch[0], *branch[0]]):
        label.set_color(colours[role])
    ax.tick_params(length=0)
    ax.spines[["left", "bottom"]].set_visible(False)
    ax.set_ylabel("this token ...")
    ax.set_title("... may look at these", fontsize=10)
    save(fig, folder, "tree_mask.png")


STAGES = [      # title, text, colour, left lower corner
    ("1. demonstrations", "posts with summaries\nof mixed quality", GREY, (1, 20)),
    ("2. reference", "a small GPT, fine-tuned\non them (SFT)", GREY, (25, 20)),
    ("3. pairs", "two of its summaries of a\npost; in 80% of the pairs\nthe shorter is preferred",
     ORANGE, (49, 20)),
    ("4. reward models", "five; the shorter wins in\n80, 60, 50, 40 and 20%\nof a model's pairs",
     BLUE, (73, 20)),
    ("5. distil", "train a policy until its\nreward gaps match those\nof a reward model",
     GREEN, (73, 2)),
    ("6. policy", "summarises posts\nthat it has never seen", GREEN, (49, 2)),
    ("7. oracle", "+1 for each fact of the post\n0 for a fact said twice\n-3 for anything else",
     PURPLE, (25, 2)),
    ("advantage", "its mean reward, minus\nthat of the reference", PURPLE, (1, 2)),
]


def draw_pipeline(folder):
    """Draws the stages of the method as boxes, from demonstrations to the oracle's verdict."""
    fig, ax = pyplot().subplots(figsize=(9.4, 3.5), layout="constrained")
    ax.set(xlim=(0, 94), ylim=(1, 34))
    ax.axis("off")
    for title, text, colour, (x, y) in STAGES:
        ax.add_patch(pyplot().Rectangle((x, y), 20, 13, facecolor=colour + "18",
                                        edgecolor=colour, linewidth=1.4))
        ax.text(x + 10, y + 10.6, title, ha="center", va="center", color=colour,
                fontsize=10.5, fontweight="bold")
        ax.text(x + 10, y + 4.8, text, ha="center", va="center", fontsize=8.5)
    arrows = [((x, y), (x + 4, y)) for x, y in ((21, 26), (45, 26), (69, 26))]
    arrows += [((x + 4, y), (x, y)) for x, y in ((69, 8), (45, 8), (21, 8))]
    arrows += [((83, 20), (83, 15)), ((41, 20), (75, 15))]
    for start, end in arrows:
        ax.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": "#444444"})
    ax.text(45, 17, "and stay near the reference (KL)", fontsize=8.5, ha="center", va="center")
    save(fig, folder, "pipeline.png")


def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--out_dir", default=str(ROOT / "assets"), help="for the pictures")
    args = parser.parse_args(argv)
    os.makedirs(args.out_dir, exist_ok=True)
    for draw in (draw_advantage, draw_tree_mask, draw_pipeline):
        draw(args.out_dir)


if __name__ == "__main__":
    run_script(main)
