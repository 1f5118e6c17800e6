"""The evaluation report: report.md with its tables, figures and samples, and results.json."""
import json
import os
from pathlib import Path

import numpy as np

from support.figures import advantage_figure, logprob_figure, margin_figure, remove
from support.files import remove_leftovers, replacing, write_json
from support.passes import MANY_CUT_OFF
from support.processes import is_first
from support.run import run_flags, run_names

GLOSSARY = Path(__file__).parent.parent / "docs" / "glossary.md"
SHOWN_FLAGS = ["loss", "beta", "tau", "gamma", "rewards", "rho", "n_pairs", "max_steps",
               "select", "batch_size", "lr", "seed"]


def write_report(args, prompts, results, replies, rewards, accuracy):
    """Writes and prints what evaluate.py measured.

    results: {name: numbers}, the reference first; replies, rewards: {name: N texts, (N,)} to the N
    prompts (texts). accuracy: of reward models, what accuracy_table gives, or None.
    """
    if not is_first():
        return
    os.makedirs(args.out_dir, exist_ok=True)
    remove_leftovers(args.out_dir)
    runs = run_names(args.policies)
    flags = {name: run_flags(folder) for name, folder in runs.items()}
    curves = {name: training_curve(folder) for name, folder in runs.items()}
    for name, (steps, chosen, rejected, kept) in curves.items():
        if steps:
            results[name] |= {"chosen_change": chosen[kept], "rejected_change": rejected[kept]}
    policies = {name: numbers for name, numbers in results.items() if name != "reference"}

    remove(args.out_dir, "advantage.png", "logprob_change.png", "reward_margins.png")
    trained = [[name] + [cell(f.get(flag)) for flag in SHOWN_FLAGS] for name, f in flags.items()]
    parts = [f"# Report\n\nOracle: {args.oracle or 'the reward of TinyTLDR (tinytldr.py)'}. "
             f"Prompts: {len(prompts)} of the {args.split} split of {args.data}, one sample each "
             f"at temperature {args.temperature:g}. Reference: {args.ref}.",
             f"## Policies\n\n{verdict(results)}\n\n{policy_table(results)}",
             cut_off_note(results, args),
             image(advantage_figure(policies, args.out_dir)),
             image(logprob_figure(curves, args.out_dir)),
             "How they were trained (empty: not used):\n\n"
             + markdown_table(["policy"] + SHOWN_FLAGS, trained)]
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
        "reference": results["reference"], "policies": policies, "flags": flags,
        "reward_models": accuracy[0] if accuracy else {}, "evaluation": vars(args)}, indent=2)
    print(f"\n{policy_table(results)}\n\n{path}")


def training_curve(folder):
    """From a policy's metrics.jsonl: steps, at each the change of the log-probs of chosen and of
    rejected training responses, and which of these evaluations --select kept."""
    path = os.path.join(folder, "metrics.jsonl")
    lines = []
    if os.path.exists(path):
        try:
            with open(path, encoding="utf-8") as file:
                lines = [json.loads(line) for line in file if line.endswith("\n")]
            lines = [line for line in lines if "train/chosen_change" in line]
        except (ValueError, TypeError):
            print(f"{path}: damaged, and left out of the report")
            lines = []
    kept = len(lines) - 1
    select = run_flags(folder).get("select", "last")
    if select != "last" and kept > 0:                       # as Run._save_if_best
        if select == "loss":
            values = [-line["validation/loss"] for line in lines]
        else:
            values = [line["validation/reward"] for line in lines]
        kept = 1 + int(np.argmax(values[1:]))
    return ([line["step"] for line in lines], [line["train/chosen_change"] for line in lines],
            [line["train/rejected_change"] for line in lines], kept)


def accuracy_table(rewards, lengths, longer):
    """Accuracy of reward models on held-out pairs, by which response is longer, and their margins.

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
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows])


def image(name):
    return name and f"![{name.removesuffix('.png').replace('_', ' ')}]({name})"


def cell(value, form="{}"):
    return "" if value is None else form.format(value)


def policy_table(results):
    """results: {name: numbers}, the reference first."""
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
    return markdown_table(header, rows)


def verdict(results):
    """Which policy (or the reference) did best, whoever it is, where that can be told: where no 95%
    interval of what the others are behind it holds zero. results: {name: numbers}."""
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
    """What was done with samples that were cut off, if there are any; a warning if they are more
    than 5% of somebody's. results: {name: numbers}."""
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
    """table: {folder: numbers}; sides: (N,) of the pairs, see accuracy_table."""
    header = ["reward model", "accuracy", "longer chosen", "shorter chosen", "longer scored higher"]
    rows = [[folder] + [cell(value, "{:.3f}") for value in numbers.values()]
            for folder, numbers in table.items()]
    return (f"## Reward models\n\nOn {len(sides)} held-out pairs with their natural mix of "
            f"lengths; in {(sides == 1).sum()} the longer response was chosen, in "
            f"{(sides == -1).sum()} the shorter one.\n\n{markdown_table(header, rows)}")


def sample_sections(n, prompts, replies, rewards):
    """n prompts, spread over the split and so chosen before anything was seen, with all replies."""
    sections = []
    for number, i in enumerate(np.arange(min(n, len(prompts))) * len(prompts) // max(n, 1), 1):
        quoted = prompts[i].strip().replace("\n", "\n> ")
        rows = [[name, f"{rewards[name][i]:+.2f}",
                 replies[name][i].strip().replace("|", "\\|").replace("\n", " ")]
                for name in replies]
        table = markdown_table(["policy", "oracle reward", "reply"], rows)
        heading = "## Samples\n\n" if number == 1 else ""
        sections.append(f"{heading}**Prompt {number}**\n\n> {quoted}\n\n{table}")
    return sections
