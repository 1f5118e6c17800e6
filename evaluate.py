"""Compares policies with their reference by an oracle reward, and writes a report with figures.

    python evaluate.py                      # the speedrun's six policies -> out/report
    python evaluate.py --ref=out/sft out/dpo out/e-dpo --rms=out/rm,out/rms
    python evaluate.py --ref=out/sft out/e-dpo --data=prefs.jsonl --oracle=out/rm

Every policy answers the same held-out prompts once, by default at temperature 1. The oracle rewards
the answers: TinyTLDR's own oracle, or the reward model of --oracle. Then each policy is compared,
prompt by prompt, with the reference and with the best policy. Open report.html in a browser to look
at replies, verdicts and curves. report.md shows the numbers, and results.json has all of them.
"""
import numpy as np

import tinytldr
from data import Dataset, get_tokenizer, longer, preferences, relabel
from losses import PAPER
from model import GPT
from reward import judge_samples, load_reward_models, mean_reward
from support.columns import cache_folder, sample, score
from support.device import setup
from support.flags import comparison_flags, naming, run_script
from support.report import accuracy_table, write_page, write_report
from support.run import run_names
from support.tokenizer import (
    check_same_tokens,
    check_vocabulary,
    own_tokenizer,
    to_text,
)
from support.tokens import held_out_prompts, longest_sample, with_room


def interval(differences):
    """Returns the mean of paired differences, (N,), and the half-width of its 95% confidence
    interval: 1.96 standard errors, from the variance with N - 1."""
    error = differences.std(ddof=1) / len(differences) ** 0.5
    return float(differences.mean()), float(1.96 * error)


def answer(name, policy, texts, prompts, oracle_models, tokenizer, args):
    """Samples a policy's reply to every prompt, and has the oracle reward it.

    name: of the policy, for messages. texts, prompts: the N prompts as text and as token ids.
    oracle_models: {folder: RewardModel}, whose mean is the oracle; with none it is TinyTLDR's.
    Returns (Dataset of the prompts with one reply each, as it was drawn; N replies as text; rewards
    (N,); {name: number} for the report).
    """
    ids = sample(policy, prompts, args.max_new_tokens, tokenizer.ends, [args.seed, 4],
                 args.temperature)
    dataset = Dataset([(prompt, [reply]) for prompt, reply in zip(prompts, ids)])
    replies = [to_text(reply, tokenizer) for reply in ids]
    rewards, cut = judge_samples(name, oracle_models, texts, prompts, ids, tokenizer, args)
    numbers = {"reward": rewards.mean(), "length": np.mean(list(map(len, ids))),
               "unended": cut.mean()}
    return dataset, replies, rewards, {name: float(value) for name, value in numbers.items()}


def compare(policy, ref, own, of_ref, difference, temperature):
    """Compares a policy with its reference: {name: number}, explained in docs/glossary.md.

    policy, ref: two GPTs. own, of_ref: their replies to the same N prompts, a Dataset each.
    difference: (N,), the policy's oracle rewards minus the reference's. temperature: at which the
    replies were drawn.
    """
    advantage, half_width = interval(difference)
    win_rate = (difference > 0).mean() + 0.5 * (difference == 0).mean()
    numbers = {"advantage": advantage, "advantage_95": half_width, "win_rate": float(win_rate)}
    if temperature == 1:           # at another temperature, samples are not drawn from pi and ref
        on_own = score(policy, own) - score(ref, own)                               # (N, 1)
        on_ref = of_ref.ref_logps - score(policy, of_ref)                           # (N, 1)
        numbers |= {"kl_pi_ref": float(on_own.mean()), "kl_ref_pi": float(on_ref.mean()),
                    "kl_pi_ref_95": interval(on_own[:, 0])[1]}
    return numbers


def main(argv=None):
    # ---- set-up: if something is missing, you are told before the work, not after it
    args = comparison_flags(argv, __doc__, list(PAPER))
    device = setup(args)
    with naming("--ref"):
        ref = GPT.from_pretrained(args.ref).to(device)
    tokenizer = get_tokenizer(own_tokenizer(args.ref, args.data))
    check_vocabulary(ref, tokenizer, "--ref")
    policies = {}
    for name, folder in run_names(args.policies).items():
        policies[name] = GPT.from_pretrained(folder)
        check_same_tokens(folder, folder, policies[name].config, ref.config, tokenizer)
    loading = (ref, tokenizer, device)
    reward_models = load_reward_models(args.rms, "--rms", *loading)
    oracle_models = load_reward_models(args.oracle, "--oracle", *loading)
    labellers = load_reward_models(args.relabel, "--relabel", *loading)
    texts, prompts, lengths = held_out_prompts(args, tokenizer, tinytldr.post, needed=2)
    args.max_new_tokens = args.max_new_tokens or longest_sample(lengths, ref.config.block_size,
                                                                "held-out")
    prompts = with_room(prompts, ref, args.max_new_tokens)

    # ---- reward models: how accurate they are on held-out pairs
    accuracy = None
    if reward_models:
        cache = cache_folder(args.ref, args.out_dir)
        pairs = preferences(args.data, args.split, tokenizer, ref, cache, seed=args.seed,
                            skip_bad_rows=args.skip_bad_rows)
        if labellers:
            pairs = relabel(pairs, mean_reward(labellers, pairs))
        rewards = {folder: score(model, pairs, folder) for folder, model in reward_models.items()}
        accuracy = accuracy_table(rewards, pairs.response_lengths(), longer)

    # ---- policies: each is compared with the reference and with the best of them
    answering = (texts, prompts, oracle_models, tokenizer, args)
    of_ref, ref_replies, ref_rewards, numbers = answer("reference", ref, *answering)
    of_ref.ref_logps = score(ref, of_ref)                                           # (N, 1)
    results = {"reference": numbers}
    drawn, replies = {"reference": of_ref}, {"reference": ref_replies}
    rewards = {"reference": ref_rewards}
    for name, policy in policies.items():
        policy.to(device)
        own, replies[name], rewards[name], results[name] = answer(name, policy, *answering)
        drawn[name] = own
        difference = rewards[name] - ref_rewards                                    # (N,)
        results[name] |= compare(policy, ref, own, of_ref, difference, args.temperature)
        print(f"{name:9} advantage {results[name]['advantage']:+.3f} "
              f"± {results[name]['advantage_95']:.3f}")
    best = max(results, key=lambda name: results[name]["reward"])
    for name in results:
        results[name]["behind_best"] = interval(rewards[best] - rewards[name])

    write_report(args, texts, results, replies, rewards, accuracy)
    judge = None if oracle_models else tinytldr.judge
    write_page(args, texts, results, rewards, accuracy, drawn, {"reference": ref, **policies},
               tokenizer, judge)


if __name__ == "__main__":
    run_script(main)
