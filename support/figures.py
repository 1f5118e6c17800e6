"""The figures of the evaluation report."""
import contextlib
import os

import numpy as np

from support.files import replacing


def pyplot():
    """matplotlib.pyplot in this repository's style; here, so that the rest runs without it."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "font.size": 9,
                         "figure.dpi": 150})
    return plt


def save(fig, out_dir, name):
    with replacing(os.path.join(out_dir, name)) as temporary:
        fig.savefig(temporary, format=name.rsplit(".", 1)[-1])
    pyplot().close(fig)
    return name


def remove(out_dir, *names):
    """Figures of an earlier report."""
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(out_dir, name))


def advantage_figure(policies, out_dir):
    """policies: {name: numbers}. Returns the figure's name."""
    fig, ax = pyplot().subplots(figsize=(1.2 + 0.9 * len(policies), 3), layout="constrained")
    colours = ["#4878a8" if name in ("dpo", "ipo") else "#d1773c" for name in policies]
    ax.bar(list(policies), [r["advantage"] for r in policies.values()], color=colours, capsize=3,
           yerr=[r["advantage_95"] for r in policies.values()])
    ax.axhline(0, color="black", linewidth=0.8)
    ax.set_ylabel("oracle advantage over the reference")
    ax.set_title("Mean of paired differences, with 95% intervals")
    return save(fig, out_dir, "advantage.png")


def logprob_figure(curves, out_dir):
    """How chosen and rejected responses' log-probs change over training, with a dot where the
    checkpoint was kept. curves: {name: (steps, chosen, rejected, which was kept)}. Returns the
    figure's name, or None if there is no curve."""
    curves = {name: curve for name, curve in curves.items() if curve[0]}
    if not curves:
        return None
    size = (1 + 1.7 * len(curves), 2.6)
    fig, axes = pyplot().subplots(1, len(curves), figsize=size, sharey=True, squeeze=False,
                                  layout="constrained")
    for ax, (name, (steps, chosen, rejected, kept)) in zip(axes[0], curves.items()):
        ax.plot(steps, chosen, color="#2a7f4f", label="chosen")
        ax.plot(steps, rejected, color="#b5423a", linestyle="--", label="rejected")
        ax.plot(steps[kept], chosen[kept], "o", color="#2a7f4f", markersize=4)
        ax.axhline(0, color="black", linewidth=0.8)
        ax.set_title(name)
        ax.set_xlabel("step")
    axes[0, 0].set_ylabel("log-prob minus reference's\n(nats per response)")
    axes[0, 0].legend(frameon=False)
    return save(fig, out_dir, "logprob_change.png")


def margin_figure(margins, lengths, out_dir):
    """Box plots of r(longer) - r(shorter) by difference in length. margins: {folder: (N,)}, chosen
    minus rejected; lengths: (N, 2). Returns the figure's name, or None if all are as long."""
    plt = pyplot()
    difference = np.abs(lengths[:, 0] - lengths[:, 1])
    if not difference.any():
        return None
    sign = np.where(lengths[:, 0] >= lengths[:, 1], 1, -1)
    edges = np.unique(np.quantile(difference[difference > 0], np.linspace(0, 1, 6)).round())
    edges[-1] += 1      # the last bin holds the largest difference too
    bins = list(zip(edges[:-1], edges[1:])) or [(edges[0] - 1, edges[0])]
    width = 0.8 / len(margins)
    fig, ax = plt.subplots(figsize=(7, 3), layout="constrained")
    colours = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(margins)))
    for i, (folder, margin) in enumerate(margins.items()):
        groups = [(sign * margin)[(difference >= low) & (difference < high)] for low, high in bins]
        positions = np.arange(len(bins)) + (i - (len(margins) - 1) / 2) * width
        drawn = ax.boxplot([group if len(group) else [np.nan] for group in groups],
                           positions=positions, widths=0.9 * width, patch_artist=True,
                           showfliers=False, manage_ticks=False)
        for box in drawn["boxes"]:
            box.set_facecolor(colours[i])
        for line in drawn["medians"]:
            line.set_color("black")
        ax.plot([], [], color=colours[i], linewidth=6, label=folder)
    ax.axhline(0, color="black", linewidth=0.8)
    ax.set_xticks(range(len(bins)), [f"{low:.0f} to {high - 1:.0f}" for low, high in bins])
    ax.set_xlabel("difference in length (tokens)")
    ax.set_ylabel("r(longer) - r(shorter)")
    ax.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return save(fig, out_dir, "reward_margins.png")
