"""Writes report.html: an evaluation to look at, in one file that opens from the disk.

support/report.html is the page without its numbers: HTML, CSS and JavaScript. The numbers and the
texts stand in it as JSON. What a policy or a data set wrote is shown as text, whatever is in it.
"""
import json
import math
import os
from pathlib import Path

import numpy as np
import torch

from support.columns import TOKENS_PER_BATCH, was_cut_off
from support.device import compute, is_first
from support.files import replacing
from support.report import (
    about,
    accuracy_rows,
    cut_off_note,
    kept_evaluation,
    policy_rows,
    read_evaluations,
    training_rows,
    verdict,
)
from support.run import run_names
from support.tokenizer import ends_of, to_text

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


def write_page(args, prompts, results, rewards, accuracy, drawn, models, tokenizer, judge=None):
    """Writes report.html next to report.md, after write_report.

    prompts, results, rewards, accuracy: as write_report takes them. drawn: {name: Dataset of the
    N prompts, each with the policy's reply}. models: {name: GPT}; both have the reference first.
    judge: tinytldr.judge, or None where reward models judge.
    """
    if not is_first():
        return
    n = min(POSTS, len(prompts))
    rows = np.arange(n) * len(prompts) // n         # spread over the split, as in report.md
    posts = [{"number": int(i) + 1, "text": prompts[i], "replies": []} for i in rows]
    for name, model in models.items():
        dataset = drawn[name].take(rows)
        logps, ref_logps = token_logps(model, dataset), token_logps(models["reference"], dataset)
        for i, post, own, ref, (_, [ids]) in zip(rows, posts, logps, ref_logps, dataset.examples):
            reply = {"reward": float(rewards[name][i]), "cut": was_cut_off(ids, ends_of(tokenizer)),
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
    end = None if was_cut_off(ids, ends_of(tokenizer)) else len(ids) - 1
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
    """Returns report.md's tables, the same cells: [{title, note, header, rows}]."""
    parts = [("Policies", "The numbers of report.md; docs/glossary.md explains them. "
              "Click a heading to sort, a row to choose its policy.", policy_rows(results)),
             ("How they were trained", "The flags of each run. Empty: not used.",
              training_rows(args.policies))]
    if accuracy is not None:
        parts.append(("Reward models", "The fraction of held-out pairs that each one ranks right.",
                      accuracy_rows(accuracy[0])))
    return [{"title": title, "note": note, "header": header, "rows": rows}
            for title, note, (header, rows) in parts]
