"""Compares policies with their reference by an oracle reward, and writes a report with figures.

    python evaluate.py --ref=out/sft out/dpo out/e-dpo --rms=out/rm,out/rms      # -> out/report
    python evaluate.py --ref=out/sft out/e-dpo --data=prefs.jsonl --oracle=out/oracle

Every policy answers the same held-out prompts once, at temperature 1. The oracle is the reward of
TinyTLDR, or the reward model of --oracle. Policies are compared prompt by prompt, with the
reference and with each other. results.json has every number of the report.
"""
import numpy as np

import tinytldr
from data import Dataset, get_tokenizer, longer, preferences, relabel
from model import GPT, GPTConfig
from reward import load_reward_models
from support.cache import cache_folder
from support.checkpoint import read_sizes
from support.device import setup, shape_multiple
from support.flags import InputError, comparison_flags, run_script
from support.passes import prompt_room, sample, score, text_of
from support.report import judge, write_report
from support.run_folder import check_same_tokens, run_flags, run_names
from support.tokens import prompts_of, tokenised_file


def held_out_prompts(args, tokenizer, policy):
    """Each prompt of the split once, with room for a response: (texts, lists of token ids)."""
    if args.data == "tinytldr":
        texts = [tinytldr.post(args.seed, args.split, i) for i in range(args.n_prompts)]
        prompts = [tokenizer.encode_ordinary(text) for text in texts]
    else:
        arrays = tokenised_file(args.data, tokenizer, demonstrations=args.rms is None)
        prompts = prompts_of(arrays, args.split)[:args.n_prompts]
        texts = [text_of(prompt, tokenizer) for prompt in prompts]
    if len(texts) < 2:
        raise InputError(f"--n_prompts: an interval needs two, and {args.split} has {len(texts)}")
    room = prompt_room(policy, args.max_new_tokens)
    return texts, [prompt[-room:] for prompt in prompts]


def interval(differences):
    """Mean and half-width of a 95% confidence interval of paired differences (N,)."""
    error = differences.std(ddof=1) / len(differences) ** 0.5
    return float(differences.mean()), float(1.96 * error)


def mean_reward(models, dataset, args, autocast):
    """The mean reward of some reward models {folder: model} for each response. Returns (N, K)."""
    multiple = shape_multiple(args)
    return np.mean([score(model, dataset, autocast, multiple, folder)
                    for folder, model in models.items()], axis=0)


def answer(policy, texts, prompts, oracle_models, tokenizer, args, autocast):
    """Samples a reply to every prompt. Returns (Dataset of the prompts with one reply each, the
    replies as texts, their oracle rewards (N,), numbers for the report)."""
    ids = sample(policy, prompts, args.max_new_tokens, tokenizer.eot_token, [args.seed, 4],
                 args.temperature, autocast)
    dataset = Dataset([(prompt, [reply]) for prompt, reply in zip(prompts, ids)])
    replies = [text_of(reply, tokenizer) for reply in ids]
    if oracle_models:
        rewards = mean_reward(oracle_models, dataset, args, autocast)[:, 0]
    else:
        rewards = np.array(list(map(tinytldr.oracle_reward, texts, replies)))
    unended = np.mean([reply[-1] != tokenizer.eot_token for reply in ids])
    numbers = {"reward": rewards.mean(), "length": np.mean(list(map(len, ids))), "unended": unended}
    return dataset, replies, rewards, {name: float(value) for name, value in numbers.items()}


def compare(policy, ref, own, of_ref, difference, args, autocast):
    """What the report says of a policy beside its reference (docs/glossary.md). own, of_ref: their
    replies, a Dataset each; difference: (N,) of the oracle rewards."""
    advantage, half_width = interval(difference)
    win_rate = (difference > 0).mean() + 0.5 * (difference == 0).mean()
    numbers = {"advantage": advantage, "advantage_95": half_width, "win_rate": float(win_rate)}
    if args.temperature == 1:      # samples at another temperature are not from pi, nor from ref
        on_own, on_ref = [score(policy, dataset, autocast, shape_multiple(args))
                          - score(ref, dataset, autocast, shape_multiple(args))
                          for dataset in (own, of_ref)]             # (N, 1) log-ratios
        numbers |= {"kl_pi_ref": float(on_own.mean()), "kl_ref_pi": -float(on_ref.mean())}
    return numbers


def main(argv=None):
    # ---- set-up
    args = comparison_flags(argv, __doc__)
    device, autocast = setup(args)
    ref = GPT.from_pretrained(args.ref).to(device)
    args.tokenizer = run_flags(args.ref).get("tokenizer", "gpt2")
    tokenizer = get_tokenizer(args.tokenizer)
    for folder in args.policies:                # say what is missing before the work, not after it
        config = GPTConfig(**read_sizes(folder))
        check_same_tokens(folder, folder, config, ref.config, args.tokenizer)
    loading = (ref, args.tokenizer, device)
    reward_models = load_reward_models(args.rms, "--rms", *loading)
    oracle_models = load_reward_models(args.oracle, "--oracle", *loading)
    relabellers = load_reward_models(args.relabel, "--relabel", *loading)
    texts, prompts = held_out_prompts(args, tokenizer, ref)

    # ---- policies, each beside the reference and the best of them
    answering = (texts, prompts, oracle_models, tokenizer, args, autocast)
    of_ref, reply, reward, numbers = answer(ref, *answering)
    results, replies, rewards = {"reference": numbers}, {"reference": reply}, {"reference": reward}
    for name, folder in run_names(args.policies).items():
        policy = GPT.from_pretrained(folder).to(device)
        own, replies[name], rewards[name], results[name] = answer(policy, *answering)
        results[name] |= compare(policy, ref, own, of_ref, rewards[name] - reward, args, autocast)
        print(f"{name:9} advantage {results[name]['advantage']:+.3f} "
              f"± {results[name]['advantage_95']:.3f}")
    best = max(results, key=lambda name: results[name]["reward"])
    for name in results:
        results[name]["behind_best"] = interval(rewards[best] - rewards[name])

    # ---- reward models
    judged = None
    if reward_models:      # for their accuracy on held-out pairs
        cache = cache_folder(args.ref, args.out_dir)
        pairs = preferences(args.data, args.split, tokenizer, ref, cache, seed=args.seed)
        if relabellers:
            pairs = relabel(pairs, mean_reward(relabellers, pairs, args, autocast))
        lengths = pairs.response_lengths()
        if lengths.shape[1] == 2:
            scores = {folder: score(model, pairs, autocast, shape_multiple(args), folder)
                      for folder, model in reward_models.items()}
            judged = judge(scores, lengths, longer(lengths))
        else:
            print("reward models: left out of the report, which is about pairs")

    write_report(args, texts, results, replies, rewards, judged)


if __name__ == "__main__":
    run_script(main)
