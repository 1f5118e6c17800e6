"""Writes the evaluation report: report.md with its tables, figures and samples; results.json; and
report.html, a page for the browser that needs no other file.

support/report.html is the template of that page, in HTML, CSS and JavaScript. The numbers and texts
are filled in as JSON. What a policy or a data set wrote is shown as plain text, even if it looks
like HTML.
"""
import json
import math
import os
from pathlib import Path

import numpy as np
import torch

from support.columns import MANY_CUT_OFF, TOKENS_PER_BATCH, was_cut_off
from support.device import RANK, compute
from support.run import (
    naming_file,
    remove,
    remove_leftovers,
    replacing,
    run_flags,
    run_names,
    write_json,
)
from support.tokenizer import to_text

GLOSSARY = Path(__file__).parent.parent / "docs" / "glossary.md"
SHOWN_FLAGS = ["loss", "beta", "tau", "gamma", "rewards", "rho", "n_pairs", "max_steps",
               "select", "batch_size", "lr", "seed"]
EVALUATED = ("validation/loss", "validation/reward", "train/chosen_change")     # each has one
TEMPLATE = Path(__file__).with_name("report.html")
PLACE = "{{data}}"                  # where the JSON stands in the template
POSTS = 24                          # prompts whose replies are shown
CURVES = {                          # {name in metrics.jsonl: (title, unit)}
    "validation/reward": ("Reward of samples for validation prompts", "mean reward"),
    "train/chosen_change": ("Log-prob of chosen training responses",
                            "log pi − log ref, nats per response"),
    "train/rejected_change": ("Log-prob of rejected training responses",
                              "log pi − log ref, nats per response"),
    "train/desirable_change": ("Log-prob of desirable training responses",
                               "log pi − log ref, nats per response"),
    "train/undesirable_change": ("Log-prob of undesirable training responses",
                                 "log pi − log ref, nats per response"),
    "validation/accuracy": ("Validation pairs that it ranks right, by log pi − log ref",
                            "fraction of pairs")}


def write_report(args, prompts, results, replies, rewards, accuracy):
    """Writes and prints what evaluate.py measured.

    results: {name: numbers}, the reference first; replies, rewards: {name: N texts, (N,)} to the N
    prompts (texts). accuracy: of reward models, what accuracy_table gives, or None.
    """
    if RANK > 0:
        return
    with naming_file(args.out_dir):
        os.makedirs(args.out_dir, exist_ok=True)
    remove_leftovers(args.out_dir)
    runs = run_names(args.policies)
    curves = {name: training_curve(folder) for name, folder in runs.items()}
    for name, (steps, chosen, rejected, kept) in curves.items():
        if steps:
            results[name] |= {"chosen_change": chosen[kept], "rejected_change": rejected[kept]}
    policies = {name: numbers for name, numbers in results.items() if name != "reference"}

    for name in ("advantage.png", "logprob_change.png", "reward_margins.png"):
        remove(os.path.join(args.out_dir, name))        # of an earlier report
    parts = [f"# Report\n\n{about(args, len(prompts))}",
             f"## Policies\n\n{verdict(results)}\n\n{policy_table(results)}",
             cut_off_note(results, args),
             image(advantage_figure(policies, args.out_dir)),
             image(logprob_figure(curves, args.out_dir)),
             "How they were trained (empty: not used):\n\n"
             + markdown_table(*training_rows(args.policies))]
    if accuracy is not None:
        table, margins, lengths, sides = accuracy
        parts.append(reward_model_section(table, sides))
        parts.append(image(margin_figure(margins, lengths, args.out_dir)))
    parts += sample_sections(args.show, prompts, replies, rewards)
    parts.append("## Glossary\n\n" + GLOSSARY.read_text(encoding="utf-8").split("\n", 2)[2].strip())

    path = os.path.join(args.out_dir, "report.md")
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write("\n\n".join(part for part in parts if part) + "\n")
    write_json(os.path.join(args.out_dir, "results.json"), {
        "reference": results["reference"], "policies": policies,
        "flags": {name: run_flags(folder) for name, folder in runs.items()},
        "reward_models": accuracy[0] if accuracy else {}, "evaluation": vars(args)}, indent=2)
    print(f"\n{policy_table(results)}\n\n{path}")


def training_curve(folder):
    """Reads a policy's metrics.jsonl. Returns (steps, change of the chosen training responses'
    log-probs at each step, that of the rejected ones, index of the step that --select kept)."""
    lines = read_evaluations(folder, say_damaged=True)
    lines = [line for line in lines if "train/chosen_change" in line]   # not of labelled responses
    return ([line["step"] for line in lines], [line["train/chosen_change"] for line in lines],
            [line["train/rejected_change"] for line in lines], kept_evaluation(lines, folder))


def read_evaluations(folder, say_damaged=False):
    """Returns the lines of a policy's metrics.jsonl that are evaluations, dicts; [] if there are
    none, or the file is damaged. say_damaged: whether to print that it is."""
    path = os.path.join(folder, "metrics.jsonl")
    if not os.path.exists(path):
        return []
    try:
        with open(path, encoding="utf-8") as file:
            lines = [json.loads(line) for line in file if line.endswith("\n")]
        return [line for line in lines if any(name in line for name in EVALUATED)]
    except (ValueError, TypeError):
        if say_damaged:
            print(f"{path}: damaged, and left out of the report")
        return []


def kept_evaluation(lines, folder):
    """Returns the index of the evaluation that --select kept. lines: see read_evaluations."""
    kept = len(lines) - 1
    select = run_flags(folder).get("select", "last")
    if select != "last" and kept > 0:                       # as Run._save_if_best
        if select == "loss":
            values = [-line["validation/loss"] for line in lines]
        else:
            values = [line["validation/reward"] for line in lines]
        kept = 1 + int(np.argmax(values[1:]))
    return kept


def accuracy_table(rewards, lengths, longer):
    """Measures accuracy and margins of reward models on held-out pairs, by which side is longer.

    rewards: {folder: (N, 2)}, chosen/rejected; lengths: (N, 2); longer: data.longer. Returns
    ({folder: numbers}, {folder: (N,)}, lengths, longer(lengths)), or None for rankings.
    """
    if lengths.shape[1] != 2:
        print("reward models: left out of the report, which is about pairs")
        return None
    sides = longer(lengths)
    table, margins = {}, {}
    for folder, values in rewards.items():
        margin = margins[folder] = values[:, 0] - values[:, 1]
        right = (margin > 0) + 0.5 * (margin == 0)
        groups = {"accuracy": right, "longer_chosen": right[sides == 1],
                  "shorter_chosen": right[sides == -1],
                  "longer_has_higher_reward": (margin * sides > 0)[sides != 0]}
        table[folder] = {name: float(group.mean()) if len(group) else None
                         for name, group in groups.items()}
    return table, margins, lengths, sides


# ------------------------------------------------------------------ parts of the report


def markdown_table(header, rows):
    """Returns a table in Markdown. header: names; rows: lists of values. A "|" in a text (replies
    and folders may have some) is escaped, so that it does not begin another column."""
    texts = [[str(value).replace("|", "\\|").replace("\n", " ") for value in row]
             for row in (header, *rows)]
    lines = ["| " + " | ".join(row) + " |" for row in texts]
    return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]])


def image(name):
    """Returns a figure in Markdown, or None if there is none. name: of its file."""
    return name and f"![{name.removesuffix('.png').replace('_', ' ')}]({name})"


def cell(value, form="{}"):
    """Returns a value as text, None as an empty cell."""
    return "" if value is None else form.format(value)


def about(args, n_prompts):
    """Says what was evaluated, in three sentences."""
    return (f"Oracle: {args.oracle or 'the reward of TinyTLDR (tinytldr.py)'}. "
            f"Prompts: {n_prompts} of the {args.split} split of {args.data}, one sample each "
            f"at temperature {args.temperature:g}. Reference: {args.ref}.")


def policy_table(results):
    """Returns the table of the policies in Markdown."""
    return markdown_table(*policy_rows(results))


def policy_rows(results):
    """Returns the table of the policies, (header, rows of text). results: {name: numbers}, the
    reference first."""
    header = ["policy", "advantage", "behind the best", "win rate", "length", "unended",
              "KL(pi ‖ ref)", "KL(ref ‖ pi)", "chosen change", "rejected change"]
    rows = []
    for name, r in results.items():
        advantage = "0"
        if name != "reference":
            advantage = f"{r['advantage']:+.3f} ± {r['advantage_95']:.3f}"
        behind, half_width = r["behind_best"]
        rows.append([name, advantage, f"{behind:.3f} ± {half_width:.3f}",
                     cell(r.get("win_rate"), "{:.3f}"), f"{r['length']:.1f}", f"{r['unended']:.3f}",
                     cell(r.get("kl_pi_ref"), "{:.2f}"), cell(r.get("kl_ref_pi"), "{:.2f}"),
                     cell(r.get("chosen_change"), "{:+.1f}"),
                     cell(r.get("rejected_change"), "{:+.1f}")])
    return header, rows


def training_rows(folders):
    """Returns the table of the flags of some runs, (header, rows of text)."""
    rows = [[name] + [cell(run_flags(folder).get(flag)) for flag in SHOWN_FLAGS]
            for name, folder in run_names(folders).items()]
    return ["policy", *SHOWN_FLAGS], rows


def accuracy_rows(table):
    """Returns the table of the reward models, (header, rows of text). table: {folder: numbers}."""
    header = ["reward model", "accuracy", "longer chosen", "shorter chosen", "longer scored higher"]
    return header, [[folder] + [cell(value, "{:.3f}") for value in numbers.values()]
                    for folder, numbers in table.items()]


def verdict(results):
    """Says which policy (or the reference) did best. That can be told if each of the others is
    behind it by more than the half-width of its 95% interval. results: {name: numbers}."""
    best = max(results, key=lambda name: results[name]["reward"])
    reward = f"{results[best]['reward']:+.3f}"
    near = []
    for name, numbers in results.items():
        behind, half_width = numbers["behind_best"]
        if name != best and behind <= half_width:
            near.append(name)
    text = f"Highest mean reward: **{best}** ({reward}), prompt by prompt ahead of every other."
    if near:
        text = (f"No clear winner: prompt by prompt, {best} (mean reward {reward}) can't be told "
                f"from {', '.join(near)}.")
    lowest = min(results, key=lambda name: results[name].get("chosen_change", 0))
    change = results[lowest].get("chosen_change", 0)
    if change < 0:
        text += (" The chosen responses lost most log-probability under "
                 f"**{lowest}** ({change:+.1f} nats).")
    return text


def cut_off_note(results, args):
    """Says what was done with samples that were cut off, if there are any; warns if they are more
    than 5% of a policy's. results: {name: numbers}."""
    if not any(numbers["unended"] for numbers in results.values()):
        return ""
    text = f"Samples were cut off at --max_new_tokens={args.max_new_tokens}, or at block_size."
    if args.oracle:
        text += (" Those that were (the column unended) are judged as if they ended there, with an "
                 "end-of-text token appended: that is where a reward model is read.")
    if args.missing_eos_penalty:
        text += f" Each loses --missing_eos_penalty={args.missing_eos_penalty:g}."
    many = [name for name, numbers in results.items() if numbers["unended"] > MANY_CUT_OFF]
    if many:
        text += (f" **Warning: more than {MANY_CUT_OFF:.0%} of the samples of {', '.join(many)} "
                 "were cut off**, so their rewards are those of beginnings. A higher "
                 "--max_new_tokens cuts off fewer.")
    return text


def reward_model_section(table, sides):
    """Returns the section about reward models. table: {folder: numbers}; sides: (N,) of the pairs,
    see accuracy_table."""
    return (f"## Reward models\n\nOn {len(sides)} held-out pairs with their natural mix of "
            f"lengths; in {(sides == 1).sum()} the longer response was chosen, in "
            f"{(sides == -1).sum()} the shorter one.\n\n{markdown_table(*accuracy_rows(table))}")


def sample_sections(n, prompts, replies, rewards):
    """Returns sections with n prompts and all replies. The prompts are spread evenly over the
    split, so that nobody chooses them by their replies."""
    sections = []
    for number, i in enumerate(np.arange(min(n, len(prompts))) * len(prompts) // max(n, 1), 1):
        quoted = prompts[i].strip().replace("\n", "\n> ")
        rows = [[name, f"{rewards[name][i]:+.2f}", replies[name][i].strip()]
                for name in replies]
        table = markdown_table(["policy", "oracle reward", "reply"], rows)
        heading = "## Samples\n\n" if number == 1 else ""
        sections.append(f"{heading}**Prompt {number}**\n\n> {quoted}\n\n{table}")
    return sections


# ------------------------------------------------------------------ figures


def pyplot():
    """Returns matplotlib.pyplot in this repository's style."""
    import matplotlib  # here, so that the rest runs without it
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "font.size": 9,
                         "figure.dpi": 150})
    return plt


def save(fig, out_dir, name):
    """Writes a figure to a file and closes it. Returns the file's name."""
    with replacing(os.path.join(out_dir, name)) as temporary:
        fig.savefig(temporary, format=name.rsplit(".", 1)[-1])
    pyplot().close(fig)
    return name


def advantage_figure(policies, out_dir):
    """Draws the advantage of each policy. policies: {name: numbers}. Returns the figure's name."""
    fig, ax = pyplot().subplots(figsize=(1.2 + 0.9 * len(policies), 3), layout="constrained")
    colours = ["#4878a8" if name in ("dpo", "ipo") else "#d1773c" for name in policies]
    ax.bar(list(policies), [r["advantage"] for r in policies.values()], color=colours, capsize=3,
           yerr=[r["advantage_95"] for r in policies.values()])
    ax.axhline(0, color="black", linewidth=0.8)
    ax.set_ylabel("oracle advantage over the reference")
    ax.set_title("Mean of paired differences, with 95% intervals")
    return save(fig, out_dir, "advantage.png")


def logprob_figure(curves, out_dir):
    """Draws how chosen and rejected responses' log-probs change over training, with a dot where the
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
    """Draws box plots of r(longer) - r(shorter) by difference in length. margins: {folder: (N,)},
    chosen minus rejected; lengths: (N, 2). Returns the figure's name, or None if all have
    the same length."""
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


# ------------------------------------------------------------------ report.html


def write_page(args, prompts, results, rewards, accuracy, drawn, models, tokenizer, judge=None):
    """Writes report.html next to report.md, after write_report.

    prompts, results, rewards, accuracy: as write_report takes them. drawn: {name: Dataset of the
    N prompts, each with the policy's reply}. models: {name: GPT}; both have the reference first.
    judge: tinytldr.judge, or None where reward models judge.
    """
    if RANK > 0:
        return
    n = min(POSTS, len(prompts))
    rows = np.arange(n) * len(prompts) // n         # spread over the split, as in report.md
    posts = [{"number": int(i) + 1, "text": prompts[i], "replies": []} for i in rows]
    for name, model in models.items():
        dataset = drawn[name].take(rows)
        logps, ref_logps = token_logps(model, dataset), token_logps(models["reference"], dataset)
        for i, post, own, ref, (_, [ids]) in zip(rows, posts, logps, ref_logps, dataset.examples):
            reply = {"reward": float(rewards[name][i]), "cut": was_cut_off(ids, tokenizer.ends),
                     "tokens": token_table(ids, own, ref, tokenizer)}
            verdicts = judge(prompts[i], to_text(ids, tokenizer)) if judge else []
            reply["clauses"] = clauses_of(reply["tokens"], verdicts)
            post["replies"].append(reply)

    policies = [{"name": name, **{key: numbers.get(key) for key in
                 ("reward", "advantage", "advantage_95", "kl_pi_ref", "kl_pi_ref_95")}}
                for name, numbers in results.items()]
    text = json_in_html({
        "verdict": verdict(results).replace("**", ""), "about": about(args, len(prompts)),
        "note": cut_off_note(results, args).replace("**", ""), "penalty": args.missing_eos_penalty,
        "unit": "points" if judge else "reward", "scale": colour_scale(posts),
        "policies": policies, "posts": posts, "curves": curves(args.policies),
        "tables": tables(args, results, accuracy)})
    path = os.path.join(args.out_dir, "report.html")
    page = TEMPLATE.read_text(encoding="utf-8").replace(PLACE, text)
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(page)
    print(path)


def json_in_html(value):
    """Returns a value as JSON that can stand in a <script> of HTML: without "<" and "&", and with
    null in the place of NaN and infinity, which JSON does not have."""
    text = json.dumps(finite(value), allow_nan=False, separators=(",", ":"))    # ASCII
    return text.replace("<", r"\u003c").replace(">", r"\u003e").replace("&", r"\u0026")


def finite(value):
    """Returns a value of dicts, lists and numbers with None for each number that is not finite."""
    if isinstance(value, dict):
        return {str(key): finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


# ------------------------------------------------------------------ replies, token by token


@torch.no_grad()
def token_logps(model, dataset):
    """Computes the log-prob of each token of N replies, in nats. dataset: of rows with one reply
    each. Returns N arrays, (tokens in the reply,) each."""
    lengths = dataset.response_lengths()[:, 0]                                      # (N,)
    n = max(1, TOKENS_PER_BATCH // int(dataset.row_lengths().max()))    # rows at a time
    values = []
    for first in range(0, len(dataset), n):
        rows = np.arange(first, min(first + n, len(dataset)))
        batch = dataset.batch(rows).to(next(model.parameters()).device)
        batch.slot = torch.arange(len(batch.target), device=batch.target.device)
        batch.last = batch.slot[:, None]    # (R, 1): each token counts as a response of its own,
        with compute():                     # so that the sums have one term
            logps = model(batch)[:, 0].float().cpu().numpy()                        # (R,)
        values += np.split(logps[:lengths[rows].sum()], np.cumsum(lengths[rows])[:-1])
    return values


def token_table(ids, logps, ref_logps, tokenizer):
    """Lists the pieces of a reply that are shown: [text, log pi, log ref] for each token, the
    numbers in nats. The text of the token that ends a reply is None. ids: the reply's tokens.
    logps, ref_logps: (L,), the policy's and the reference's."""
    end = None if was_cut_off(ids, tokenizer.ends) else len(ids) - 1
    table, group, before = [], [], []
    for i, token in enumerate(ids):
        if i == end:
            table.append([None, *total(logps, ref_logps, i, i + 1)])
            continue
        group.append(token)
        context = readable(before, tokenizer)       # some tokenizers drop a text's first space
        text = readable(before + group, tokenizer)[len(context):]
        if text.endswith("\ufffd") and len(group) < 4 and i + 1 not in (end, len(ids)):
            continue                                # a letter may be up to four tokens
        table.append([text, *total(logps, ref_logps, i + 1 - len(group), i + 1)])
        before, group = group, []
    return table


def readable(ids, tokenizer):
    """Returns tokens as text, without ids that only a padded vocabulary has."""
    return tokenizer.decode([token for token in ids if token < tokenizer.n_vocab])


def total(logps, ref_logps, first, end):
    """Returns the sums of two arrays over some tokens, rounded for the page."""
    return [round(float(values[first:end].sum()), 3) for values in (logps, ref_logps)]


def clauses_of(table, verdicts):
    """Finds out which tokens each clause of a reply has.

    table: what token_table gives. verdicts: [(clause, verdict, points)], the clauses in their
    order. Returns [verdict, points, first token, the one after the last] for each clause. What
    stands between two clauses belongs to the one before.
    """
    pieces = [text for text, _, _ in table if text is not None]
    ends = np.cumsum([len(text) for text in pieces])        # of the tokens, in the reply's text
    reply, place, starts = "".join(pieces), 0, []
    for clause, _, _ in verdicts:
        place = max(place, reply.find(clause, place))
        starts.append(int(np.searchsorted(ends, place, side="right")))
        place += len(clause)
    starts = [0, *starts[1:], len(pieces)]
    return [[verdict, points, first, end]
            for (_, verdict, points), first, end in zip(verdicts, starts, starts[1:])]


def colour_scale(posts):
    """Returns the change of a token's log-prob, in nats, that gets the full colour: only one token
    in twenty changes by more."""
    changes = [abs(own - ref) for post in posts for reply in post["replies"][1:]
               for _, own, ref in reply["tokens"]]
    changes = [change for change in changes if math.isfinite(change)]
    largest = np.quantile(changes, 0.95) if changes else 0
    return next((scale for scale in (0.5, 1, 2, 3, 5) if scale >= largest), 10)


# ------------------------------------------------------------------ curves and tables


def curves(folders):
    """Returns the panels of training curves: [{title, unit, lines}], each line {policy, steps,
    values, kept}. A panel that no run has anything for is left out."""
    panels = []
    runs = {name: (read_evaluations(folder), folder) for name, folder in run_names(folders).items()}
    for key, (title, unit) in CURVES.items():
        lines = []
        for name, (evaluations, folder) in runs.items():
            if any(key in line for line in evaluations):
                lines.append({"policy": name, "kept": kept_evaluation(evaluations, folder),
                              "steps": [line["step"] for line in evaluations],
                              "values": [line.get(key) for line in evaluations]})
        if lines:
            panels.append({"title": title, "unit": unit, "lines": lines})
    return panels


def tables(args, results, accuracy):
    """Returns the tables of report.md, with the same cells: [{title, note, header, rows}]."""
    parts = [("Policies", "The numbers of report.md; docs/glossary.md explains them. "
              "Click a heading to sort, a row to choose its policy.", policy_rows(results)),
             ("How they were trained", "The flags of each run. Empty: not used.",
              training_rows(args.policies))]
    if accuracy is not None:
        parts.append(("Reward models", "The fraction of held-out pairs that each one ranks right.",
                      accuracy_rows(accuracy[0])))
    return [{"title": title, "note": note, "header": header, "rows": rows}
            for title, note, (header, rows) in parts]
