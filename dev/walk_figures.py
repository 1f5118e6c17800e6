"""Draws the pictures of docs/walk.md, for dev/walk_cells.py."""
import inspect
import io
from functools import cached_property, wraps

import torch

from support.report import pyplot

GREY, ORANGE, BLUE, GREEN = "#8a8a8a", "#c0561f", "#2a6099", "#2a7f4f"
BRANCHES = [GREY, BLUE, ORANGE]         # the prompt, the chosen reply, the rejected one


class Picture:
    """Holds a picture that is drawn when somebody asks for its PNG, as a notebook does."""

    def __init__(self, draw, arguments):
        self.draw, self.arguments = draw, arguments
        self.about = inspect.getdoc(draw).split("\n\n")[0].replace("\n", " ")
        self.about = self.about.removeprefix("Draws ").rstrip(".")

    @cached_property
    def png(self):
        file, fig = io.BytesIO(), self.draw(*self.arguments)
        fig.savefig(file, format="png", dpi=90)
        pyplot().close(fig)
        return file.getvalue()

    def _repr_png_(self):
        return self.png


def picture(draw):
    """Makes a function that draws a figure return a Picture instead. The first paragraph of its
    docstring says what one sees."""
    @wraps(draw)
    def later(*arguments):
        return Picture(draw, arguments)
    return later


def words(batch, encoding):
    """Returns the tokens of a batch's first row as short labels."""
    texts = [encoding.decode([token]).strip() for token in batch.tokens[0].tolist()]
    return [text.replace("<|endoftext|>", "<end>") for text in texts]


@picture
def tree(batch, encoding):
    """Draws the row as a tree: tokens with branch and position, and arrows to their predictors."""
    labels, T = words(batch, encoding), batch.tokens.size(1)
    fig, ax = pyplot().subplots(figsize=(10, 2.2), layout="constrained")
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
    ax.set(xlim=(-2.2, T - 0.4), ylim=(-1.8, 1.8))
    ax.axis("off")
    return fig


@picture
def masks(masks, batch, encoding):
    """Draws the right mask and three wrong ones: a line is a token, its cells what it sees.

    masks: {name: (1, 1, T, T)}.
    """
    labels, branch = words(batch, encoding), batch.branch[0]
    fig, axes = pyplot().subplots(1, len(masks), figsize=(11, 3.2), layout="constrained")
    for ax, (name, mask) in zip(axes, masks.items()):
        cells = torch.where(mask[0, 0] == 0, branch + 1, 0)                 # (T, T)
        for part, colour in enumerate(BRANCHES, 1):
            ax.spy(cells == part, marker="s", markersize=7, color=colour)
        ax.set_title(name, fontweight="bold" if name == "right" else None)
        ax.set(xticks=[], yticks=[])
    axes[0].set_yticks(range(len(labels)), labels, family="monospace", fontsize=6.5)
    axes[0].set_ylabel("this token sees ...")
    return fig


@picture
def curves(h, curves, lowest):
    """Draws four losses over h; dots: where each is lowest; dotted line: the reference.

    h: (N,). curves, lowest: {name: values}.
    """
    fig, axes = pyplot().subplots(1, len(curves), figsize=(10, 2.4), layout="constrained")
    for ax, (name, curve) in zip(axes, curves.items()):
        ax.plot(h, curve, color=BLUE)
        for place in lowest[name].tolist():
            ax.plot(place, curve[h == place], "o", color=ORANGE)
        ax.axvline(0, color=GREY, linestyle=":")
        ax.set(title=name, xlabel="h", ylim=(-0.05 * curve.max(), None))
    return fig


@picture
def staircase(h, distances, member):
    """Draws the minimum (blue) of three squared distances, and below it which of the three it is.

    h: (N,). distances: (N, M). member: (N,).
    """
    fig, (above, below) = pyplot().subplots(2, 1, figsize=(6, 3.6), layout="constrained",
                                            sharex=True, height_ratios=[2, 1])
    above.plot(h, distances, color=GREY, linewidth=0.8)
    above.plot(h, distances.min(dim=1).values, color=BLUE, linewidth=2.5)
    above.set(ylim=(-0.5, 12), ylabel="(target - h)^2")
    below.step(h, member, color=ORANGE, linewidth=2)
    below.set(xlabel="h", ylabel="best model", yticks=range(distances.size(1)))
    return fig


@picture
def changes(batch, change, encoding):
    """Draws the change of each token's log-prob: chosen reply blue, rejected one orange.

    change: (R,), in nats.
    """
    replies = batch.slot.tolist()
    fig, ax = pyplot().subplots(figsize=(8, 2.6), layout="constrained")
    ax.bar(range(len(change)), change, color=[BRANCHES[reply + 1] for reply in replies])
    labels = [label for label, role in zip(words(batch, encoding), batch.branch[0]) if role > 0]
    ax.set_xticks(range(len(change)), labels, family="monospace", fontsize=7.5)
    ax.axhline(0, color="black", linewidth=0.6)
    ax.set_ylabel("change, nats")
    return fig


@picture
def training(history):
    """Draws thirty steps of four losses: log-ratios of both replies, and their difference h.

    history: {loss: [{name: number} of each step]}.
    """
    fig, axes = pyplot().subplots(1, len(history), figsize=(10, 2.8), layout="constrained",
                                  sharey=True)
    lines = {"chosen_change": ("chosen", BLUE), "rejected_change": ("rejected", ORANGE),
             "margin": ("h", GREEN)}
    for ax, (loss, steps) in zip(axes, history.items()):
        for name, (label, colour) in lines.items():
            ax.plot([numbers[name] for numbers in steps], color=colour, label=label)
        ax.axhline(0, color="black", linewidth=0.6)
        ax.set(title=loss, xlabel="step")
    axes[0].set_ylabel("nats")
    axes[0].legend(frameon=False)
    return fig
