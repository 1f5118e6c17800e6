"""Draws the pictures of docs/walk.md. Each function returns a Picture, which a notebook shows."""
import io

import numpy as np
import torch

from support.report import pyplot

GREY, ORANGE, BLUE, GREEN = "#8a8a8a", "#c0561f", "#2a6099", "#2a7f4f"
BRANCHES = [GREY, BLUE, ORANGE]         # the prompt, the chosen reply, the rejected one


class Picture:
    """A figure as PNG, the form in which notebooks ask for it."""

    def __init__(self, fig, about):
        self.about, file = about, io.BytesIO()
        fig.savefig(file, format="png", dpi=90)
        pyplot().close(fig)
        self.png = file.getvalue()

    def _repr_png_(self):
        return self.png


def words(batch, encoding):
    """The tokens of a batch's first row as short labels."""
    texts = [encoding.decode([token]).strip() for token in batch.tokens[0].tolist()]
    return [text.replace("<|endoftext|>", "<end>") for text in texts]


def tree(batch, encoding):
    """Draws tokens as boxes with branch and position, and arrows to their predictors."""
    labels, T = words(batch, encoding), batch.tokens.size(1)
    fig, ax = pyplot().subplots(figsize=(10, 2.7), layout="constrained")
    for column, label in enumerate(labels):
        branch = batch.branch[0, column].item()
        box = {"boxstyle": "round,pad=0.1", "facecolor": BRANCHES[branch] + "22",
               "edgecolor": BRANCHES[branch]}
        ax.text(column, 0, f"{label:^8}", ha="center", va="center", fontsize=7.5, bbox=box,
                family="monospace")
        for height, number in ((-0.8, branch), (-1.4, batch.position[0, column].item())):
            ax.text(column, height, number, ha="center", va="center", color=BRANCHES[branch])
    for own, predictor in zip(batch.own.tolist(), batch.predictor.tolist()):
        arrow = {"arrowstyle": "-|>", "color": BRANCHES[batch.branch[0, own]],
                 "connectionstyle": f"arc3,rad={0.7 if own - predictor == 1 else 0.25}"}
        ax.annotate("", (predictor, 0.35), (own, 0.35), arrowprops=arrow)
    ax.text(-0.8, -0.8, "branch", ha="right", va="center")
    ax.text(-0.8, -1.4, "position", ha="right", va="center")
    ax.set(xlim=(-2.2, T - 0.4), ylim=(-1.8, 2.7))
    ax.axis("off")
    return Picture(fig, "the row as a tree: tokens with branch and position, and their predictors")


def masks(masks, batch, encoding):
    """Draws masks next to each other. masks: {name: (1, 1, T, T)}."""
    labels, branch = words(batch, encoding), batch.branch[0]
    colours = np.array([[1.0] * 3, *[tuple(int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5))
                                     for colour in BRANCHES]])
    fig, axes = pyplot().subplots(1, len(masks), figsize=(11, 3.2), layout="constrained")
    for ax, (name, mask) in zip(axes, masks.items()):
        cells = torch.where(mask[0, 0] == 0, branch + 1, 0)                 # (T, T)
        ax.imshow(colours[cells.numpy()])
        ax.set_title(name, fontweight="bold" if name == "right" else None)
        ax.set_xticks([])
        ax.set_yticks(range(len(labels)), labels if ax is axes[0] else [""] * len(labels),
                      family="monospace", fontsize=6.5)
        ax.tick_params(length=0)
        ax.set_xticks(np.arange(len(labels)) - 0.5, minor=True)
        ax.set_yticks(np.arange(len(labels)) - 0.5, minor=True)
        ax.grid(which="minor", color="white", linewidth=1)
        ax.tick_params(which="minor", length=0)
    axes[0].set_ylabel("this token sees ...")
    return Picture(fig, "the right mask and three wrong ones; the colour is that of the seen token")
