"""Trains a policy: supervised fine-tuning (--loss=sft), or a preference loss from a reference.

    python train_policy.py --loss=sft                       # the reference policy -> out/sft
    python train_policy.py --loss=dpo                       # from out/sft -> out/dpo
    python train_policy.py --loss=e-dpo --rewards=out/rms   # distils a family of reward models

The reference is --init_from, as it was before step 0. What it says of the training responses, its
samples for the KL term and the reward models' scores are columns of the data set, computed once
before training and cached: a step is one forward and one backward pass of the policy. Flags and
their defaults: --help, and support/training_flags.py.
"""
import numpy as np
import torch
from torch.nn.utils import clip_grad_norm_

import tinytldr
from data import BatchOrder, Dataset, by_length, demonstrations, get_tokenizer
from losses import LOSSES, all_pairs, loss_at_reference, picks, training_loss
from model import GPT, GPTConfig
from reward import family_scores, load_reward_models, training_pairs
from support.cache import cache_folder, cached, hash_examples, hash_weights, key
from support.checks import check_rounding, check_step_0, say_spread
from support.device import setup, shape_multiple, sync
from support.flags import InputError, run_script
from support.optimizer import adamw, learning_rate, set_learning_rate
from support.passes import sample, score, to_text
from support.processes import add_up_gradients, add_up_numbers, micro_batches
from support.run_folder import Run
from support.sharding import place
from support.tokenizer import check_vocabulary, save_tokenizer
from support.tokens import default_block_size
from support.training_flags import policy_flags


def with_columns(dataset, split, policy, tokenizer, reward_models, args, autocast):
    """The data set with what its loss takes as given: the reference's log-probs and, if the loss
    needs them, rewards and samples from the reference for each row. policy: still the reference."""
    needs = LOSSES[args.loss].needs
    cache = cache_folder(args.init_from, args.out_dir)
    weights = hash_weights(policy)
    if "rewards" not in needs:
        dataset.rewards = None
    elif args.rewards != "scores":
        dataset.rewards = family_scores(reward_models, dataset, args, autocast, split)
    elif dataset.rewards is None:
        raise InputError(f"--rewards=scores: {args.data} has no score_chosen and score_rejected, "
                         "nor scores, in all its rows")
    if "ref_samples" in needs:
        prompts = [prompt.tolist() for prompt, _ in dataset.examples] * args.kl_samples
        entry = key(weights, prompts, args.max_new_tokens, args.seed, args.dtype, args.tokenizer)
        samples = cached(cache, f"{split}-samples", entry, sample, policy, prompts,
                         args.max_new_tokens, tokenizer.eot_token, seed=[args.seed, 3],
                         autocast=autocast, desc=f"{split} samples")
        for first in range(0, len(samples), len(dataset)):
            dataset = dataset.with_samples(samples[first:first + len(dataset)])
    entry = key(weights, hash_examples(dataset.examples), args.dtype)
    logps = cached(cache, f"{split}-logps", entry, score, policy, dataset, autocast,
                   shape_multiple(args), desc=f"{split} log-probs")
    dataset.ref_logps = np.array(logps, np.float32)  # (N, K + S)
    if args.dtype == "bfloat16":
        check_rounding(policy, dataset, split, args)
    return dataset


def statistics(logps, ref_logps, n_samples):
    """What to watch (docs/glossary.md), per example. logps, ref_logps: (B, K + S). Returns {name:
    (B,)}; nothing for SFT, which has no reference."""
    if ref_logps is None:
        return {}
    B = len(logps)
    K = logps.size(1) - n_samples
    change = logps.detach() - ref_logps                     # (B, K + S) log-ratios
    pairs = all_pairs(change[:, :K])                        # (B * P, 2)
    h = pairs[:, 0] - pairs[:, 1]
    prefers_chosen = (h > 0).float() + 0.5 * (h == 0)
    values = {"chosen_change": change[:, 0],
              "rejected_change": change[:, 1:K].mean(dim=1),
              "margin": h.view(B, -1).mean(dim=1),
              "accuracy": prefers_chosen.view(B, -1).mean(dim=1)}
    if n_samples:
        values["forward_kl"] = -change[:, K:].mean(dim=1)
    return values


def row_terms(dataset, loss):
    """How many terms of the mean each row's loss adds up, (N,): 1, or for SFT its tokens. A step
    divides by the mean number of terms: in batches of rows of similar length, dividing by the
    batch's own tokens would make short responses count more."""
    if loss.mean_over == "tokens":
        return dataset.response_lengths().sum(axis=1)
    return np.ones(len(dataset), np.int64)


@torch.no_grad()
def evaluate(policy, dataset, args, knobs, device, autocast):
    """Means of the loss and the statistics over a whole data set: {name: number}."""
    gamma = anneal(args.gamma, args.max_steps, args.max_steps)  # the last: steps are to compare
    total = int(row_terms(dataset, LOSSES[args.loss]).sum())
    size = 4 * args.micro_batch_size  # no gradient, less memory
    sums = {}
    for part in micro_batches(np.arange(len(dataset)), size):
        batch = dataset.batch(part, shape_multiple(args)).to(device)
        with autocast():
            logps = policy(batch)
        losses = training_loss(args.loss, logps, **batch.columns(), gamma=gamma, **knobs)
        stats = statistics(logps, batch.ref_logps, batch.n_samples)
        if "min_per" in knobs:
            stats |= picks(logps, batch.ref_logps, batch.rewards, **knobs)
        for name, values in {"loss": losses, **stats}.items():
            sums[name] = sums.get(name, 0) + (values / total).sum()
        sync(device)
    return add_up_numbers({name: value.item() for name, value in sums.items()})


def reward_of_samples(policy, prompts, judges, tokenizer, args, autocast):
    """What --select goes by: the mean reward of one sample for each prompt, by the mean of the
    reward models {folder: model} in `judges`, or with none by TinyTLDR's oracle."""
    replies = sample(policy, prompts, args.max_new_tokens, tokenizer.eot_token, [args.seed, 5],
                     autocast=autocast)
    if not judges:
        texts = [[to_text(ids, tokenizer) for ids in pair] for pair in zip(prompts, replies)]
        return float(np.mean([tinytldr.oracle_reward(*pair) for pair in texts]))
    dataset = Dataset([(prompt, [reply]) for prompt, reply in zip(prompts, replies)])
    multiple = shape_multiple(args)
    return float(np.mean([score(judge, dataset, autocast, multiple) for judge in judges.values()]))


def anneal(gamma, step, max_steps):
    """The weight of the KL term at a step, linear from the first to the last; 0 without one."""
    first, last = gamma or (0.0, 0.0)
    return first + (last - first) * step / max_steps


def main(argv=None):
    # ---- set-up
    args = policy_flags(argv, __doc__, LOSSES)
    loss = LOSSES[args.loss]
    knobs = {knob: getattr(args, knob) for knob in loss.knobs if knob != "gamma"}
    device, autocast = setup(args)
    multiple = shape_multiple(args)
    tokenizer = get_tokenizer(args.tokenizer)
    if args.init_from == "scratch":
        args.block_size = args.block_size or default_block_size(args, tokenizer)
        config = GPTConfig(block_size=args.block_size, vocab_size=tokenizer.n_vocab,
                           n_layer=args.n_layer, n_head=args.n_head, n_embd=args.n_embd)
        policy = GPT(config)
    else:
        policy = GPT.from_pretrained(args.init_from)
    check_vocabulary(policy, tokenizer, "--tokenizer")
    place(policy, device, args)   # with --fsdp, a part of it
    reward_models = load_reward_models(args.rewards, "--rewards", policy, args.tokenizer, device)
    judges = load_reward_models(args.select, "--select", policy, args.tokenizer, device)

    # ---- data: rows to train on, rows to watch, and what is constant about them
    if args.loss == "sft":
        common = (tokenizer, policy.config.block_size, args.seed, args.skip_bad_rows)
        train = demonstrations(args.data, "train", *common)
        validation = demonstrations(args.data, "validation", *common)
        watched = {"validation": by_length(validation.first(args.n_eval))}
    else:
        train, validation = training_pairs(args, tokenizer, policy, device, autocast)
        common = (policy, tokenizer, reward_models, args, autocast)
        train = with_columns(train, "train", *common)
        if "min_per" in knobs:
            say_spread(train.rewards, list(reward_models))
        validation = with_columns(validation.first(args.n_eval), "validation", *common)
        some = np.random.default_rng(0).permutation(len(train))[:args.n_eval]
        watched = {"validation": by_length(validation), "train": by_length(train.take(some))}
    terms = row_terms(train, loss)
    order = BatchOrder(train.row_lengths(), args.batch_size, args.seed)

    # ---- model
    constants = key(hash_weights(policy), hash_examples(train.examples), train.rewards)
    optimizer = adamw(policy, args)
    run = Run(args, policy, optimizer, constants)
    if args.compile:
        policy.compile(dynamic=True)
    print(f"{args.loss}: {sum(p.numel() for p in policy.parameters()):,} parameters, {len(train)} "
          f"training rows, {args.max_steps} steps of {args.batch_size}, on {device}")

    # ---- loop
    size = args.micro_batch_size
    for step in range(run.first_step, args.max_steps + 1):
        gamma = anneal(args.gamma, step, args.max_steps)
        if run.due(step):
            results = {}
            for split, dataset in watched.items():
                means = evaluate(policy, dataset, args, knobs, device, autocast)
                results |= {f"{split}/{name}": value for name, value in means.items()}
            if judges or args.select == "oracle":
                prompts = [prompt.tolist() for prompt, _ in watched["validation"].examples]
                results["validation/reward"] = reward_of_samples(policy, prompts, judges, tokenizer,
                                                                 args, autocast)
            run.report(step, results)
        if step == args.max_steps:      # evaluated only
            break

        rows = order.rows(step)                                 # (batch_size,)
        total = len(rows) * terms.mean()                        # rows; for SFT, expected tokens
        for part in micro_batches(rows, size):                  # of this process
            batch = train.batch(part, multiple).to(device)      # the tree, with its columns
            with autocast():
                logps = policy(batch)                           # (b, K + S)
            losses = training_loss(args.loss, logps, **batch.columns(), gamma=gamma, **knobs)
            if step == 0 and part[0] == rows[0] and loss.at_reference:      # the first part
                expected = loss_at_reference(args.loss, **batch.columns(), **knobs)
                check_step_0(losses, expected, logps, batch.ref_logps, args)
            (losses.sum() / total).backward()                   # part of the whole batch's gradient
            run.watch(total, loss=losses, **statistics(logps, batch.ref_logps, batch.n_samples))
        add_up_gradients(policy)                                # of all processes
        grad_norm = clip_grad_norm_(policy.parameters(), args.grad_clip)
        set_learning_rate(optimizer, learning_rate(step, args.max_steps, args.lr))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        run.end_step(step, rows, grad_norm=grad_norm)

    run.restore_selected()
    save_tokenizer(args.out_dir, tokenizer, policy.config.block_size)
    policy.save_pretrained(args.out_dir, tokenizer.eot_token)
    run.finish()


if __name__ == "__main__":
    run_script(main)
