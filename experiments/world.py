"""Measures whether the built-in task is like the paper's: the criteria that were fixed before any
two methods were compared on it (dev/LOG.md, "A world in the paper's regime").

    python experiments/world.py                    # trains what it needs: 15 minutes on 2 cores
    python experiments/world.py --out_dir=out/w    # what is there is not trained again

It uses validation prompts and pairs only. "Longer" means at least 10% more tokens, as everywhere.
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np

import tinytldr
from data import longer, preferences
from experiments import trials
from model import GPT
from reward import RewardModel
from support.columns import sample, score
from support.flags import Parser, positive_int, run_script, seed
from support.tokenizer import to_text

TEMPERATURES = (0.7, 0.5, 0.3)
BETAS = (0.1, 0.3, 1)


def earned(policy, texts, stream, temperature=1.0):
    """Draws one sample for each of N prompts. Returns their oracle rewards and their lengths in
    tokens, (N,) each."""
    tokenizer = tinytldr.tokenizer()
    prompts = [tokenizer.encode_ordinary(text) for text in texts]
    replies = sample(policy, prompts, 64, tokenizer.eot_token, stream, temperature)
    rewards = [tinytldr.oracle_reward(text, to_text(reply, tokenizer))
               for text, reply in zip(texts, replies)]
    return np.array(rewards), np.array([len(reply) for reply in replies])


def balanced_accuracy(margins, lengths):
    """Returns how often a judge agrees with the oracle: the mean of its accuracies on pairs whose
    longer response is preferred and on the others. A judge that sees only length gets 1/2.

    margins: (N,), rewards of the chosen minus the rejected responses. lengths: (N, 2), in tokens.
    """
    right = np.where(margins == 0, 0.5, margins > 0)
    sides = longer(lengths)
    return (right[sides == 1].mean() + right[sides == -1].mean()) / 2


def measure(args):
    """Trains what is missing. Returns {what: number}."""
    sft = f"{args.out_dir}/sft"
    natural = [f"--init_from={sft}", f"--seed={args.seed}", "--rho=all"]
    biased = [*natural[:2], "--rho=0.2"]
    trials.train("train_policy", sft, "--loss=sft", f"--seed={args.seed}")
    jobs = [("train_rm", f"{args.out_dir}/rm", natural)]
    for beta in BETAS:
        for name, data in (("natural", natural), ("biased", biased)):
            jobs.append(("train_policy", f"{args.out_dir}/{name}/{beta}",
                         ["--loss=dpo", f"--beta={beta}", "--select=oracle", *data]))
    with trials.workers(args.workers) as pool:
        pool.submit(trials.train, *jobs[0][:2], *jobs[0][2]).result()     # samples the pairs
        for job in [pool.submit(trials.train, *job[:2], *job[2]) for job in jobs[1:]]:
            job.result()

    ref = GPT.from_pretrained(sft)
    texts = [tinytldr.post(args.seed, "validation", i) for i in range(args.n_prompts)]
    base, _ = earned(ref, texts, [args.seed, 0])
    values = {}
    for temperature in TEMPERATURES:
        rewards, _ = earned(ref, texts, [args.seed, 0], temperature)
        values[f"reference at {temperature}"] = rewards.mean() - base.mean()
    rewards, lengths = zip(*[earned(ref, texts, [args.seed, 1, i]) for i in range(16)])
    rewards, lengths = np.array(rewards), np.array(lengths)                # (16, N)
    best = rewards.argmax(axis=0)
    values["correlation"] = np.corrcoef(rewards.ravel(), lengths.ravel())[0, 1]
    values["length, mean"] = lengths.mean()
    values["length, best of 16"] = lengths[best, np.arange(len(texts))].mean()
    values["best of 16"] = rewards.max(axis=0).mean() - base.mean()

    pairs = preferences("tinytldr", "validation", tinytldr.tokenizer(), ref, f"{sft}/cache",
                        seed=args.seed)
    sides = longer(pairs.response_lengths())
    values["longer preferred"] = (sides == 1).sum() / (sides != 0).sum()
    judged = score(RewardModel.from_pretrained(f"{args.out_dir}/rm"), pairs)
    values["reward model"] = balanced_accuracy(judged[:, 0] - judged[:, 1],
                                               pairs.response_lengths())
    ref_logps = score(ref, pairs)
    for name in ("natural", "biased"):
        for beta in BETAS:
            policy = GPT.from_pretrained(f"{args.out_dir}/{name}/{beta}")
            rewards, _ = earned(policy, texts, [args.seed, 2])
            values[f"dpo {name}, beta {beta}"] = rewards.mean() - base.mean()
            change = score(policy, pairs) - ref_logps
            values[f"dpo {name}, beta {beta}, judge"] = balanced_accuracy(
                change[:, 0] - change[:, 1], pairs.response_lengths())
    return {name: float(value) for name, value in values.items()}


def criteria(values):
    """Compares what `measure` returns with the bars. Returns [(criterion, value, lowest, highest,
    does it hold?)]."""
    gain = {name: max(values[f"dpo {name}, beta {beta}"] for beta in BETAS)
            for name in ("natural", "biased")}
    best_beta = max(BETAS, key=lambda beta: values[f"dpo natural, beta {beta}"])
    sharpened = max(values[f"reference at {temperature}"] for temperature in TEMPERATURES)
    judge = values[f"dpo natural, beta {best_beta}, judge"]
    rows = [("longer preferred in natural pairs", values["longer preferred"], 0.58, 0.64),
            ("correlation of reward and length", values["correlation"], 0.25, 1),
            ("length of the best of 16 / mean length",
             values["length, best of 16"] / values["length, mean"], 1, np.inf),
            ("share of DPO's gain that is lost on D_0.2",
             1 - gain["biased"] / gain["natural"], 0.25, np.inf),
            ("share of DPO's gain that a lower temperature gives too",
             sharpened / gain["natural"], -np.inf, 0.5),
            ("reward model, from length only (0) to the oracle (1)",
             2 * values["reward model"] - 1, 0.75, 1),
            ("reward model's accuracy minus DPO's", values["reward model"] - judge, 0, 1)]
    return [(name, value, low, high, low <= value <= high) for name, value, low, high in rows]


def main(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--out_dir", default="out/world", help="for its runs; remove it to start again")
    add("--n_prompts", type=positive_int, default=1000)
    add("--seed", type=seed, default=0)
    add("--workers", type=positive_int, default=2, help="runs at a time, one thread each")
    args = parser.parse_args(argv)
    values = measure(args)
    print("| measured | value |\n|---|---|")
    for name, value in values.items():
        print(f"| {name} | {value:.3f} |")
    print("\n| criterion | value | bar | |\n|---|---|---|---|")
    for name, value, low, high, holds in criteria(values):
        bar = f"{low:g} to {high:g}".replace("-inf to", "at most").replace(" to inf", " or more")
        print(f"| {name} | {value:.2f} | {bar} | {'holds' if holds else 'fails'} |")


if __name__ == "__main__":
    run_script(main)
