"""Compares policies with their reference by an oracle reward, and writes a report with figures.

    python evaluate.py --ref=out/sft out/dpo out/e-dpo --rms=out/rm,out/rms            # -> out/report/report.md
    python evaluate.py --ref=out/sft out/e-dpo --data=prefs.jsonl --oracle=out/oracle  # a reward model as the oracle

Every policy answers the same held-out prompts once, at temperature 1. The oracle is the programmatic reward of TinyTLDR,
or the reward model of --oracle. Sampling has a random stream of its own. results.json has every number of the report.
"""
import argparse
import json
import os

import numpy as np

import runtime
from data import file_splits, get_tokenizer, longer, preferences, relabel
from model import GPT
from reward import family_folders, load_reward_model
from runtime import InputError
import tinytldr

GLOSSARY = """
* **advantage**: mean oracle reward of the policy's samples minus that of the reference's, on the same prompts; after it
  the half-width of a 95% confidence interval, 1.96 standard errors of the paired differences.
* **win rate**: fraction of prompts for which the policy's sample has the higher oracle reward than the reference's; a tie
  counts a half.
* **length**: mean tokens in a sample, the end-of-text token included. **unended**: fraction of samples that were cut off
  before it.
* **KL(pi ‖ ref)**: mean over the policy's own samples (temperature 1) of logp_pi - logp_ref, in nats per response: how far
  it went.
* **KL(ref ‖ pi)**: mean over the reference's samples of logp_ref - logp_pi, in nats per response: how much of the
  reference it forgot.
* **chosen change, rejected change**: mean of logp_pi - logp_ref of the chosen and of the rejected responses, on a fixed
  sample of training pairs, in nats per response, at the end of training. Far below zero for *chosen* responses is the
  degeneracy that the paper is about.
* **accuracy** of a reward model: fraction of held-out pairs in which the chosen response has the higher reward; also among
  the pairs whose longer response (by at least 10% more tokens) was chosen, and among those whose shorter one was. **longer
  scored higher**: fraction of the pairs of unequal length in which the longer response has the higher reward.
* **reward margin**: r(longer) - r(shorter), in units of the reward model, whose Bradley-Terry temperature is 1.
""".strip()


def parse_flags(argv):
    parser = runtime.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("policies", nargs="*", help="run folders of policies (default: all six of out/)")
    parser.add_argument("--ref", default="out/sft", help="run folder of the reference policy")
    parser.add_argument("--rms", help="reward models, or folders of families, comma-separated (if no policies "
                                      "are named: out/rm,out/rms)")
    parser.add_argument("--oracle", help="run folder of a reward model that scores the samples (default: tinytldr's oracle)")
    parser.add_argument("--relabel", help="run folder of a reward model that relabels the pairs for --rms's accuracy")
    parser.add_argument("--data", default="tinytldr", help="where the held-out prompts and pairs come from")
    parser.add_argument("--split", default="test", choices=["validation", "test"])
    parser.add_argument("--out_dir", default="out/report", help="where report.md, results.json and figures go")
    parser.add_argument("--n_prompts", type=runtime.positive(int), default=1000, help="held-out prompts, at most")
    parser.add_argument("--max_new_tokens", type=runtime.positive(int), default=64, help="longest sample")
    parser.add_argument("--temperature", type=float, default=1.0, help="of sampling; 0 takes the most likely token")
    parser.add_argument("--show", type=runtime.not_negative(int), default=5, help="prompts whose samples are printed in the report")
    parser.add_argument("--seed", type=runtime.seed, default=0, help="of the data and of sampling")
    runtime.device_flags(parser)
    args = parser.parse_args(argv)
    if args.temperature and not 0.01 <= args.temperature <= 100:
        raise InputError(f"--temperature: 0, or between 0.01 and 100; not {args.temperature}")
    if args.n_prompts < 2:
        raise InputError("--n_prompts: an interval needs two or more")
    runtime.check_out_dir(args.out_dir)
    if args.data != "tinytldr" and not args.oracle:
        raise InputError("--oracle: only --data=tinytldr has an oracle of its own; name the run folder of a reward model")
    if not args.policies:
        args.policies = [f"out/{name}" for name in ("dpo", "ipo", "d-dpo", "p-dpo", "dp-dpo", "e-dpo")]
        if args.rms is None and args.data == "tinytldr":
            args.rms = "out/rm,out/rms"
    return args


# ---------------------------------------------------------------- measuring

def held_out_prompts(args, tokenizer, block_size):
    """-> (prompt texts, prompts as lists of ids with room for a response), each prompt once."""
    if args.data == "tinytldr":
        texts = [tinytldr.post(args.seed, args.split, i) for i in range(args.n_prompts)]
        prompts = [tokenizer.encode_ordinary(text) for text in texts]
    else:
        dataset, = file_splits(args.data, [args.split], tokenizer, 2 ** 30, demonstrations=True)
        prompts = [list(ids) for ids in dict.fromkeys(tuple(prompt.tolist()) for prompt, _ in dataset.examples)][:args.n_prompts]
        texts = [tokenizer.decode([token for token in ids if token != tokenizer.eot_token]) for ids in prompts]
        if len(texts) < 2:
            raise InputError(f"--data: {args.data}: {len(texts)} prompts in the {args.split} split, and an interval needs two")
    room = block_size - args.max_new_tokens
    if room < 1:
        raise InputError(f"--max_new_tokens: {args.max_new_tokens} leaves no room for a prompt in block_size {block_size}")
    return texts, [ids[-room:] for ids in prompts]


def measure(policy, ref_side, prompts, texts, oracle, tokenizer, args, autocast):
    """Samples from one policy and everything the report says of them. ref_side: (reference, its samples), or None for
    the reference itself. Returns (numbers, texts of the samples, their rewards, their ids)."""
    responses, ids = runtime.sample(policy, tokenizer, prompts, policy.config.block_size, args.max_new_tokens,
                                    args.temperature, seed=[args.seed, 4], autocast=autocast)
    rewards = oracle(texts, prompts, responses, ids)                             # (N,)
    numbers = {"reward": rewards.mean(), "length": np.mean([len(r) for r in ids]),
               "unended": np.mean([r[-1] != tokenizer.eot_token for r in ids])}
    if ref_side:
        ref, ref_ids, ref_rewards = ref_side
        difference = rewards - ref_rewards                                       # (N,), paired over prompts
        own, of_ref = [list(zip(prompts, [[r] for r in some])) for some in (ids, ref_ids)]
        logps = lambda model, examples: runtime.score(model, examples, autocast)[:, 0]
        numbers |= {"advantage": difference.mean(),
                    "advantage_95": 1.96 * difference.std(ddof=1) / len(difference) ** 0.5,
                    "win_rate": (difference > 0).mean() + 0.5 * (difference == 0).mean()}
        if args.temperature == 1:      # samples at another temperature are not from pi, nor from ref
            numbers |= {"kl_pi_ref": (logps(policy, own) - logps(ref, own)).mean(),
                        "kl_ref_pi": (logps(ref, of_ref) - logps(policy, of_ref)).mean()}
    return {name: float(value) for name, value in numbers.items()}, responses, rewards, ids


def training_curve(folder):
    """From a policy's metrics.jsonl: steps, and the change of chosen and rejected training log-probs at each."""
    path = os.path.join(folder, "metrics.jsonl")
    if not os.path.exists(path):
        return [], [], []
    with open(path, encoding="utf-8") as file:
        lines = [json.loads(line) for line in file if line.endswith("\n") and "train/chosen_change" in line]
    return ([line["step"] for line in lines], [line["train/chosen_change"] for line in lines],
            [line["train/rejected_change"] for line in lines])


def reward_model_table(models, pairs, autocast):
    """Held-out accuracy of every reward model, and its margins r(longer) - r(shorter) on pairs of unequal length."""
    who, lengths = longer(pairs.response_lengths()), pairs.response_lengths()
    table, margins = {}, {}
    for folder, model in models.items():
        rewards = runtime.score(model, pairs.examples, autocast, desc=folder)
        margin = rewards[:, 0] - rewards[:, 1]                                   # (N,) chosen minus rejected
        right = (margin > 0) + 0.5 * (margin == 0)
        mean = lambda mask: float(right[mask].mean()) if mask.any() else float("nan")
        table[folder] = {"accuracy": mean(who == who), "longer_chosen": mean(who == 1), "shorter_chosen": mean(who == -1),
                         "longer_has_higher_reward": float((margin * who > 0)[who != 0].mean())}
        sign = np.where(lengths[:, 0] >= lengths[:, 1], 1, -1)
        margins[folder] = sign * margin
    return table, margins, np.abs(lengths[:, 0] - lengths[:, 1]), {"pairs": len(who), "longer": int((who == 1).sum()),
                                                                   "shorter": int((who == -1).sum())}


# ---------------------------------------------------------------- figures

def figures(results, curves, margins, length_difference, out_dir):
    """advantage.png, logprob_change.png and, where there are reward models, reward_margins.png."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "font.size": 9, "figure.dpi": 150})
    names = list(results)

    fig, ax = plt.subplots(figsize=(1.2 + 0.9 * len(names), 3), layout="constrained")
    ax.bar(names, [r["advantage"] for r in results.values()], yerr=[r["advantage_95"] for r in results.values()],
           color=["#4878a8" if name in ("dpo", "ipo") else "#d1773c" for name in names], capsize=3)
    ax.axhline(0, color="black", linewidth=0.8)
    ax.set_ylabel("oracle advantage over the reference")
    ax.set_title("Mean of paired differences, with 95% intervals")
    fig.savefig(os.path.join(out_dir, "advantage.png"))
    plt.close(fig)

    with_curve = [name for name in names if curves[name][0]]
    if with_curve:
        fig, axes = plt.subplots(1, len(with_curve), figsize=(1 + 1.7 * len(with_curve), 2.6), sharey=True, squeeze=False,
                                 layout="constrained")
        for ax, name in zip(axes[0], with_curve):
            steps, chosen, rejected = curves[name]
            ax.plot(steps, chosen, color="#2a7f4f", label="chosen")
            ax.plot(steps, rejected, color="#b5423a", linestyle="--", label="rejected")
            ax.axhline(0, color="black", linewidth=0.8)
            ax.set_title(name)
            ax.set_xlabel("step")
        axes[0, 0].set_ylabel("log-prob minus reference's\n(nats per response)")
        axes[0, 0].legend(frameon=False)
        fig.savefig(os.path.join(out_dir, "logprob_change.png"))
        plt.close(fig)

    edges = np.unique(np.quantile(length_difference[length_difference > 0], np.linspace(0, 1, 6)).round()
                      ) if margins and length_difference.any() else []
    if len(edges) > 1:
        bins = [(low, high) for low, high in zip(edges[:-1], edges[1:])]
        fig, ax = plt.subplots(figsize=(7, 3), layout="constrained")
        colours = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(margins)))
        for i, (folder, margin) in enumerate(margins.items()):
            groups = [margin[(length_difference >= low) & (length_difference < high + (high == edges[-1]))]
                      for low, high in bins]
            at = np.arange(len(bins)) + (i - (len(margins) - 1) / 2) * 0.8 / len(margins)
            drawn = ax.boxplot([g if len(g) else [np.nan] for g in groups], positions=at, widths=0.7 / len(margins),
                               patch_artist=True, showfliers=False, manage_ticks=False)
            for box in drawn["boxes"]:
                box.set_facecolor(colours[i])
            for line in drawn["medians"]:
                line.set_color("black")
            ax.plot([], [], color=colours[i], linewidth=6, label=folder)
        ax.axhline(0, color="black", linewidth=0.8)
        ax.set_xticks(range(len(bins)), [f"{low:.0f} to {high - (high < edges[-1]):.0f}" for low, high in bins])
        ax.set_xlabel("difference in length (tokens)")
        ax.set_ylabel("r(longer) - r(shorter)")
        ax.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
        fig.savefig(os.path.join(out_dir, "reward_margins.png"))
        plt.close(fig)


# ---------------------------------------------------------------- the report

def markdown_table(header, rows):
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows])


def policy_table(reference, results):
    header = ["policy", "advantage", "win rate", "length", "unended", "KL(pi ‖ ref)", "KL(ref ‖ pi)", "chosen change",
              "rejected change"]
    rows = [["reference", "0", "0.5", f"{reference['length']:.1f}", f"{reference['unended']:.3f}", "0", "0", "0", "0"]]
    for name, r in results.items():
        rows.append([name, f"{r['advantage']:+.3f} ± {r['advantage_95']:.3f}", f"{r['win_rate']:.3f}", f"{r['length']:.1f}",
                     f"{r['unended']:.3f}", *(f"{r[c]:.2f}" if c in r else "" for c in ("kl_pi_ref", "kl_ref_pi")),
                     *(f"{r[c]:+.1f}" if c in r else "" for c in ("chosen_change", "rejected_change"))])
    return markdown_table(header, rows)


def verdict(results):
    """Which policy did best, said whoever it is."""
    order = sorted(results, key=lambda name: -results[name]["advantage"])
    best = order[0]
    near = [name for name in order[1:] if results[name]["advantage"] + results[name]["advantage_95"]
            >= results[best]["advantage"] - results[best]["advantage_95"]]
    text = f"Highest advantage: **{best}** ({results[best]['advantage']:+.3f})."
    if near:
        text += f" Intervals that overlap its own: {', '.join(near)}."
    lowest = min(results, key=lambda name: results[name].get("chosen_change", 0))
    if results[lowest].get("chosen_change", 0) < 0:
        text += f" The chosen responses lost most log-probability under **{lowest}** ({results[lowest]['chosen_change']:+.1f} nats)."
    return text


def write_report(args, reference, results, flags, rms, rm_counts, samples, has_figures):
    parts = [f"# Report\n\nOracle: {args.oracle or 'the reward of TinyTLDR (tinytldr.py)'}. Prompts: {samples['n']} of the "
             f"{args.split} split of {args.data}, one sample each at temperature {args.temperature:g}. Reference: {args.ref}.",
             "## Policies\n\n" + verdict(results) + "\n\n" + policy_table(reference, results),
             "![advantage](advantage.png)"]
    if has_figures["curves"]:
        parts.append("![change of log-probabilities over training](logprob_change.png)")
    shown = ["loss", "beta", "tau", "gamma", "rewards", "rho", "n_pairs", "max_steps", "batch_size", "lr", "seed"]
    parts.append("How they were trained (empty: not used, or for rho and n_pairs the default):\n\n" + markdown_table(
        ["policy"] + shown, [[name] + ["" if f.get(s) is None else f[s] for s in shown] for name, f in flags.items()]))
    if rms:
        parts.append(f"## Reward models\n\nOn {rm_counts['pairs']} held-out pairs with their natural mix of lengths; in "
                     f"{rm_counts['longer']} the longer response was chosen, in {rm_counts['shorter']} the shorter one.\n\n"
                     + markdown_table(["reward model", "accuracy", "longer chosen", "shorter chosen", "longer scored higher"],
                                      [[folder] + [f"{value:.3f}" for value in r.values()] for folder, r in rms.items()])
                     + ("\n\n![reward margins by length difference](reward_margins.png)" if has_figures["margins"] else ""))
    blocks = []
    for number in range(min(args.show, samples["n"])):
        i = number * samples["n"] // args.show                     # spread over the split, chosen before anything was seen
        block = [f"**Prompt {number + 1}**\n\n> " + samples["prompts"][i].strip().replace("\n", "\n> ") + "\n"]
        block.append(markdown_table(["policy", "oracle reward", "reply"],
                                    [[name, f"{rewards[i]:+.2f}", texts[i].strip().replace("|", "\\|").replace("\n", " ")]
                                     for name, (texts, rewards) in samples["replies"].items()]))
        blocks.append("\n".join(block))
    if blocks:
        parts.append("## Samples\n\n" + "\n\n".join(blocks))
    parts.append("## Glossary\n\n" + GLOSSARY)
    path = os.path.join(args.out_dir, "report.md")
    with open(path, "w", encoding="utf-8") as file:
        file.write("\n\n".join(parts) + "\n")
    return path


def main(argv=None):
    args = parse_flags(argv)
    device, autocast = runtime.setup(args)
    ref = GPT.from_pretrained(args.ref).to(device)
    args.tokenizer = runtime.run_flags(args.ref).get("tokenizer", "gpt2")
    tokenizer = get_tokenizer(args.tokenizer)
    load = lambda folder, flag: load_reward_model(folder, flag, ref, args.tokenizer, device)
    policies = {}
    for folder in args.policies:
        name = os.path.basename(os.path.normpath(folder))
        policies[folder if name in policies else name] = folder
    for folder in args.policies:                          # say what is missing before the work, not after it
        if not os.path.exists(os.path.join(folder, "model.safetensors")):
            raise InputError(f"{folder}: no finished run in this folder (no model.safetensors)")
        other = runtime.run_flags(folder).get("tokenizer", args.tokenizer)
        if other != args.tokenizer:
            raise InputError(f"{folder}: reads {other} tokens, the reference {args.tokenizer} tokens")
        if GPT.from_pretrained(folder).config.block_size != ref.config.block_size:
            raise InputError(f"{folder}: its block_size is not the reference's, {ref.config.block_size}")
    models = {folder: load(folder, "--rms") for folder in (family_folders(args.rms, "--rms") if args.rms else [])}
    oracle_model = load(args.oracle, "--oracle") if args.oracle else None
    relabeller = load(args.relabel, "--relabel") if args.relabel else None

    texts, prompts = held_out_prompts(args, tokenizer, ref.config.block_size)
    if args.oracle:
        oracle = lambda texts, prompts, responses, ids: runtime.score(
            oracle_model, list(zip(prompts, [[r] for r in ids])), autocast, desc="oracle")[:, 0]
    else:
        oracle = lambda texts, prompts, responses, ids: np.array(list(map(tinytldr.oracle_reward, texts, responses)))

    if models:
        pairs, = preferences(args.data, [args.split], tokenizer, ref.config.block_size, ref,
                             runtime.cache_folder(args.ref, args.out_dir), seed=args.seed)
        if not len(pairs):
            raise InputError(f"--data: {args.data}: no usable pair in the {args.split} split, which --rms needs")
        if pairs.response_lengths().shape[1] != 2:
            print("reward models: left out of the report, as their table is about pairs and the rows of --data have more responses")
            models = {}

    # ---- policies
    reference, replies, ref_rewards, ref_ids = measure(ref, None, prompts, texts, oracle, tokenizer, args, autocast)
    samples = {"n": len(texts), "prompts": texts, "replies": {"reference": (replies, ref_rewards)}}
    results, curves, flags = {}, {}, {}
    for name, folder in policies.items():
        policy = GPT.from_pretrained(folder).to(device)
        results[name], replies, rewards, _ = measure(policy, (ref, ref_ids, ref_rewards), prompts, texts, oracle, tokenizer,
                                                     args, autocast)
        samples["replies"][name] = (replies, rewards)
        curves[name], flags[name] = training_curve(folder), runtime.run_flags(folder)
        if curves[name][0]:
            results[name] |= {"chosen_change": curves[name][1][-1], "rejected_change": curves[name][2][-1]}
        print(f"{name:8} advantage {results[name]['advantage']:+.3f} ± {results[name]['advantage_95']:.3f}")

    # ---- reward models
    rms, margins, length_difference, rm_counts = {}, {}, None, None
    if models:
        if relabeller:
            pairs = relabel(pairs, runtime.score(relabeller, pairs.examples, autocast))
        rms, margins, length_difference, rm_counts = reward_model_table(models, pairs, autocast)

    # ---- report
    os.makedirs(args.out_dir, exist_ok=True)
    figures(results, curves, margins, length_difference, args.out_dir)
    with open(os.path.join(args.out_dir, "results.json"), "w", encoding="utf-8") as file:
        json.dump({"reference": reference, "policies": results, "reward_models": rms, "flags": flags,
                   "evaluation": vars(args)}, file, indent=2)
    path = write_report(args, reference, results, flags, rms, rm_counts, samples, {
        "curves": any(c[0] for c in curves.values()), "margins": os.path.exists(f"{args.out_dir}/reward_margins.png")})
    print("\n" + policy_table(reference, results))
    print(f"\n{path}")


if __name__ == "__main__":
    runtime.run(main)
