"""Trains a policy, by supervised fine-tuning (--loss=sft) or from a reference by a preference loss.

    python train_policy.py --loss=sft --out_dir=out/my-sft       # a reference policy
    python train_policy.py --loss=dpo --out_dir=out/my-dpo       # from the reference in out/sft
    python train_policy.py --loss=e-dpo --out_dir=out/my-e-dpo   # distils the family in out/rms

Without --out_dir, a run goes to out/ under the name of its loss, where the speedrun puts its runs
too. The reference is the model of --init_from, as it was before step 0. Everything that stays fixed
during training (the reference's log-probs, its samples for the KL term, the reward models' scores)
is computed once before training and stored as columns of the data set. A training step is then one
forward and one backward pass of the policy. The default numbers are at the top of train_policy.py.
With --lora=16 only a small adapter is trained; docs/data.md shows how to use your own data and
models.
"""
import math

import numpy as np
import torch
from torch.nn.utils import clip_grad_norm_

from data import BatchOrder, by_length, demonstrations, get_tokenizer
from lora import add_lora, check_rank
from losses import COUPLED, LOSSES, PAPER, UNPAIRED, batch_loss, best_member, knobs, needs
from model import GPT, GPTConfig
from reward import (
    family_scores,
    judge_samples,
    load_reward_models,
    reward_samples,
    training_pairs,
)
from support.columns import (
    add_frozen,
    cache_folder,
    cached,
    check_labels,
    check_rounding,
    check_step_0,
    count_cut_off,
    hash_examples,
    hash_model,
    key,
    print_spread,
    sample,
    score,
    was_cut_off,
)
from support.device import (
    PROCESSES,
    add_up,
    add_up_gradients,
    compute,
    micro_batches,
    place,
    setup,
    sync,
)
from support.flags import InputError, run_script
from support.run import Run, count_parameters, print_prompt, print_reply
from support.tokenizer import check_vocabulary, save_tokenizer, to_text
from support.tokens import default_block_size, example_lengths, longest_sample
from support.training_flags import policy_flags
from zoo import ZOO

# ------ the numbers of a run: each name in lower case is a flag, and the number its default

SFT = dict(                     # --loss=sft, which makes the reference policy
    max_steps=1500,             # optimizer steps
    batch_size=32,              # prompts in a step, each with its demonstrations
    lr=4e-3,                    # peak learning rate; a hundredth of it for models as wide as GPT-2
    lora_lr=10,                 # with --lora, lr is multiplied by this (not a flag)
    n_layer=2,                  # layers of the model from scratch,
    n_head=4,                   # its attention heads,
    n_embd=128,                 # its width,
    block_size=192,             # and its longest prompt + response, in tokens
    n_eval=256,                 # rows in each evaluation
)
PREFERENCES = dict(             # every other loss; its beta, tau and gamma are in losses.py
    max_steps=320,
    batch_size=16,              # prompts in a step, each with its pair
    lr=2e-4,
    lora_lr=10,
    rho=0.2,                    # TinyTLDR: in this fraction of the pairs the longer response wins
    n_pairs=1000,               # TinyTLDR: training pairs,
    pool=5000,                  # chosen from this many
    max_new_tokens=64,          # TinyTLDR: longest sample
    n_eval=256,
)
GRAD_CLIP = 1.0                 # largest norm of the gradient
KL_SAMPLES = 1                  # samples from the reference for each prompt, for the KL term
SAMPLE_TOKENS = 64              # longest reply that is printed during training


def parse_flags(argv=None):
    """Reads the flags of a run: an argparse.Namespace. argv: the command line's words, or None for
    the real ones. InputError for a flag that is wrong or would be ignored."""
    losses = {name: (needs(name), knobs(name), PAPER.get(name)) for name in LOSSES | ZOO}
    args = policy_flags(argv, __doc__, SFT, PREFERENCES, losses)
    if args.loss in COUPLED and (args.micro_batch_size < args.batch_size or PROCESSES > 1):
        raise InputError(f"--loss: {args.loss} compares the rows of a batch with each other, so it "
                         "needs them all in one forward pass: no --micro_batch_size, one process")
    return args


def with_columns(dataset, split, policy, tokenizer, reward_models, args):
    """Adds the columns that a loss takes as given: the reference's log-probs and, if the loss needs
    them, the reward models' rewards and samples from the reference for each row.

    dataset: the rows of a split ("train" or "validation"). policy: still the reference, before
    training. reward_models: {folder: RewardModel}. Returns a Dataset. InputError if the loss
    distils the scores of a file that has none.
    """
    needed = needs(args.loss)
    cache = cache_folder(args.init_from, args.out_dir)
    weights, ends = hash_model(policy), tokenizer.ends
    if "rewards" not in needed:
        dataset.rewards = None
    elif args.rewards != "scores":
        dataset.rewards = family_scores(reward_models, dataset, args.out_dir, split)
    elif dataset.rewards is None:
        raise InputError(f"--rewards=scores: {args.data} has no score_chosen and score_rejected, "
                         "nor scores, in all its rows")
    if "kl" in needed:
        prompts = [prompt.tolist() for prompt, _ in dataset.examples] * KL_SAMPLES
        entry = key(weights, prompts, args.max_new_tokens, args.seed, args.dtype, args.tokenizer,
                    ends)
        samples = cached(cache, f"{split}-samples", entry, sample, policy, prompts,
                         args.max_new_tokens, ends, seed=[args.seed, 3],
                         desc=f"{split} samples")
        count_cut_off(f"{split} samples for the KL term", samples, ends,
                      args.max_new_tokens, "the KL counts the tokens that were drawn")
        for first in range(0, len(samples), len(dataset)):
            dataset = dataset.with_samples(samples[first:first + len(dataset)])
    if dataset.desirable is not None:
        dataset = dataset.with_mismatched(policy.config.block_size)
    if args.freeze:
        add_frozen(dataset, policy, cache, split)
    entry = key(weights, hash_examples(dataset.examples), args.dtype)
    logps = cached(cache, f"{split}-logps", entry, score, policy, dataset,
                   desc=f"{split} log-probs")
    dataset.ref_logps = np.array(logps, np.float32)         # (N, K), samples included
    if args.dtype == "bfloat16":
        check_rounding(policy, dataset, split)
    return dataset


def statistics(logps, batch):
    """Computes the numbers to watch, which docs/glossary.md explains.

    logps: (B, K) summed log-probs of the policy, in nats. batch: a TreeBatch. Returns {name: (P,)},
    one number for each pair, times the pair's weight in its row: chosen_change, rejected_change,
    margin and accuracy, where a margin of 0 is half right. If rows have samples, forward_kl has one
    number for each row, (B,). If rows are single responses with a label, all of them have.
    SFT has no reference to compare with, so it returns {}.
    """
    if batch.ref_logps is None:
        return {}
    change = logps.detach() - batch.ref_logps               # (B, K) log-ratios
    if batch.desirable is not None:
        weighted = change[:, 0] * batch.label_weight        # (B,)
        return {"desirable_change": weighted * batch.desirable,
                "undesirable_change": weighted * ~batch.desirable,
                "mismatched_change": change[:, 1]}
    chosen, rejected = batch.pair_up(change).unbind(dim=1)  # (P,) each
    h = chosen - rejected
    prefers_chosen = (h > 0).float() + 0.5 * (h == 0)
    values = {"chosen_change": chosen, "rejected_change": rejected, "margin": h,
              "accuracy": prefers_chosen}
    values = {name: batch.pair_weight * value for name, value in values.items()}
    if batch.samples.size(1):
        values["forward_kl"] = -change.gather(1, batch.samples).mean(dim=1)
    return values


def picked_members(logps, batch, beta):
    """Says which reward models e-DPO's minimum picks.

    logps: (B, K) summed log-probs. batch: a TreeBatch with rewards by M models. Returns
    {"picked_0": (P,), ..., "picked_<M - 1>": (P,)}: a pair's weight in its row if its minimum is at
    this model, else 0.
    """
    columns = [batch.pair_up(column) for column in (logps, batch.ref_logps, batch.rewards)]
    member = best_member(*columns, beta)                    # (P,)
    return {f"picked_{m}": batch.pair_weight * (member == m) for m in range(batch.rewards.size(2))}


def row_terms(dataset, loss):
    """Counts the terms that each row adds to the mean loss: for SFT its response tokens, for other
    losses 1. Returns (N,).

    A step divides by the number of terms that a batch has on average. It does not divide by the
    tokens of its own batch: all rows of a batch have similar lengths, so short responses would
    count more.
    """
    if loss == "sft":
        return dataset.response_lengths().sum(axis=1)
    return np.ones(len(dataset), np.int64)


@torch.no_grad()
def evaluate(policy, dataset, args, flags, device):
    """Computes means of the loss and of the numbers to watch over a whole data set.

    flags: those of the loss, with the gamma of the last step, so that you can compare evaluations.
    Returns {name: number}.
    """
    total = int(row_terms(dataset, args.loss).sum())
    size = 4 * args.micro_batch_size    # without a gradient, a row takes less memory
    sums = {}
    for part in micro_batches(np.arange(len(dataset)), size):
        batch = dataset.batch(part).to(device)
        with compute():
            logps = policy(batch)
        values = {"loss": batch_loss(args.loss, logps, batch, **flags), **statistics(logps, batch)}
        if args.loss == "e-dpo":
            values |= picked_members(logps, batch, args.beta)
        for name, value in values.items():
            sums[name] = sums.get(name, 0) + (value / total).sum()
        if device.type == "xla":
            sync()
    return add_up({name: value.item() for name, value in sums.items()})


def reward_of_samples(policy, prompts, judges, tokenizer, args):
    """Measures what --select chooses by: the mean reward of one sample for each prompt.

    prompts: lists of token ids. judges: {folder: RewardModel}, which reward the samples; with none,
    TinyTLDR's oracle does. Returns {"reward": the mean, "unended": the fraction of samples that
    were cut off}.
    """
    replies = sample(policy, prompts, args.max_new_tokens, tokenizer.ends, [args.seed, 5])
    texts = [to_text(prompt, tokenizer) for prompt in prompts]
    rewards, cut = judge_samples("--select", judges, texts, prompts, replies, tokenizer, args)
    return {"reward": float(rewards.mean()), "unended": float(cut.mean())}


def show_samples(policy, prompts, judges, tokenizer, args):
    """Prints the policy's reply to each of a few prompts (lists of token ids), and its reward: the
    oracle's on TinyTLDR, on other data the mean of the reward models {folder: model} in `judges`.
    Each call draws with the same random numbers, from a generator of their own."""
    replies = sample(policy, prompts, SAMPLE_TOKENS, tokenizer.ends, [args.seed, 6],
                     desc="samples to show")
    judges = {} if args.data == "tinytldr" else judges
    rewards = [None] * len(prompts)
    if judges or args.data == "tinytldr":
        texts = [to_text(prompt, tokenizer) for prompt in prompts]
        rewards = reward_samples(judges, texts, prompts, replies, tokenizer)
    for number, (reply, reward) in enumerate(zip(replies, rewards), 1):
        ending = " ..." if was_cut_off(reply, tokenizer.ends) else ""
        print_reply(number, reward, to_text(reply, tokenizer) + ending)


def adamw(model, lr):
    """Makes the optimizer, AdamW without weight decay. lr: the peak learning rate."""
    fused = next(model.parameters()).device.type in ("cpu", "cuda")     # one kernel for all weights
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr, (0.9, 0.95), weight_decay=0.0, fused=fused)


def learning_rate(step, max_steps, peak):
    """Returns the learning rate of a step: a linear warm-up over the first 5% of the steps (rounded
    down, at least one), then half a cosine from the peak down to zero."""
    warmup = max(1, max_steps // 20)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, max_steps - warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


def loss_flags(args, step):
    """Returns the flags of the loss at a step, {name: number}. gamma, the weight of the KL, goes
    linearly from its first value to its last."""
    flags = {knob: getattr(args, knob) for knob in knobs(args.loss)}
    if "gamma" in flags:
        first, last = args.gamma
        flags["gamma"] = first + (last - first) * step / args.max_steps
    return flags


def main(argv=None):
    # ---- set-up
    args = parse_flags(argv)
    device = setup(args)
    tokenizer = get_tokenizer(args.tokenizer)
    if args.init_from == "scratch":
        args.block_size = args.block_size or default_block_size(args, tokenizer)
        config = GPTConfig(block_size=args.block_size, vocab_size=tokenizer.n_vocab,
                           n_layer=args.n_layer, n_head=args.n_head, n_embd=args.n_embd)
        policy = GPT(config)
    else:
        policy = GPT.from_pretrained(args.init_from, merge=not args.lora)
        if args.lora:
            check_rank(policy, args.lora)
    check_vocabulary(policy, tokenizer, "--tokenizer")
    place(policy, device, args)         # with --fsdp, this process holds only a part of it
    reward_models = load_reward_models(args.rewards, "--rewards", policy, tokenizer, device)
    judges = load_reward_models(args.select, "--select", policy, tokenizer, device)

    # ---- data: rows to train on, rows to watch, and the columns that stay fixed
    if args.loss == "sft":
        common = (tokenizer, policy.config.block_size, args.seed, args.skip_bad_rows)
        train = demonstrations(args.data, "train", *common)
        validation = demonstrations(args.data, "validation", *common).first(args.n_eval)
        if args.freeze:
            cache = cache_folder(args.init_from, args.out_dir)
            add_frozen(train, policy, cache, "train")
            add_frozen(validation, policy, cache, "validation")
        watched = {"validation": by_length(validation)}
    else:
        train, validation = training_pairs(args, tokenizer, policy, device, args.loss in UNPAIRED)
        if train.desirable is not None:
            check_labels(train.desirable, args)
        if "kl" in needs(args.loss) or judges:          # this run will draw samples
            args.max_new_tokens = args.max_new_tokens or longest_sample(
                example_lengths(train.examples), policy.config.block_size, "training")
        common = (policy, tokenizer, reward_models, args)
        train = with_columns(train, "train", *common)
        if args.loss == "e-dpo":
            print_spread(train.rewards, list(reward_models))
        validation = with_columns(validation.first(args.n_eval), "validation", *common)
        some = np.random.default_rng(0).permutation(len(train))[:args.n_eval]
        watched = {"validation": by_length(validation), "train": by_length(train.take(some))}
    terms = row_terms(train, args.loss)
    order = BatchOrder(train.row_lengths(), args.batch_size, args.seed)

    # ---- model
    constants = key(hash_model(policy), hash_examples(train.examples),
                    train.rewards if train.desirable is None else train.desirable,
                    hash_examples(validation.examples), *map(hash_model, judges.values()))
    if args.lora:       # from here on an adapter is trained; the reference's weights stay frozen
        add_lora(policy, args.lora, args.init_from, args.seed)
    optimizer = adamw(policy, args.lr)
    run = Run(args, policy, optimizer, constants)
    if args.compile:
        policy.compile(dynamic=True)
    print(f"{args.loss}: {count_parameters(policy)}, {len(train)} training rows, {args.max_steps} "
          f"steps of {args.batch_size} rows, on {device}")
    # With --fsdp nothing is shown: sampling needs the whole model on one device.
    shown = [] if args.fsdp else [row[0].tolist() for row in validation.first(2).examples]
    for number, prompt in enumerate(shown, 1):
        print_prompt(number, to_text(prompt, tokenizer))

    # ---- loop
    size = args.micro_batch_size
    for step in range(run.first_step, args.max_steps + 1):
        if run.due(step):
            results, last = {}, loss_flags(args, args.max_steps)
            for split, dataset in watched.items():
                means = evaluate(policy, dataset, args, last, device)
                results |= {f"{split}/{name}": value for name, value in means.items()}
            if judges or args.select == "oracle":
                prompts = [prompt.tolist() for prompt, _ in watched["validation"].examples]
                means = reward_of_samples(policy, prompts, judges, tokenizer, args)
                results |= {f"validation/{name}": value for name, value in means.items()}
            run.report(step, results)
            if shown:
                show_samples(policy, shown, judges or reward_models, tokenizer, args)
        if step == args.max_steps:      # the last step is only evaluated
            break

        rows, flags = order.rows(step), loss_flags(args, step)  # (batch_size,)
        total = len(rows) * terms.mean()                        # rows; for SFT, expected tokens
        for part in micro_batches(rows, size):                  # this process's share of the rows
            batch = train.batch(part).to(device)                # the tree, with its columns
            with compute():
                logps = policy(batch)                           # (b, K)
            losses = batch_loss(args.loss, logps, batch, **flags)       # (pairs,), for SFT (b,)
            if step == 0 and part[0] == rows[0] and args.loss != "sft":     # first micro-batch
                expected = batch_loss(args.loss, batch.ref_logps, batch, **flags)
                check_step_0(losses, expected, logps, batch.ref_logps, args)
            (losses.sum() / total).backward()                   # adds to the batch's gradient
            run.watch(total, loss=losses, **statistics(logps, batch))
        if PROCESSES > 1:
            add_up_gradients(policy)
        grad_norm = clip_grad_norm_(policy.parameters(), GRAD_CLIP)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.max_steps, args.lr)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        run.end_step(step, rows, grad_norm=grad_norm)

    run.restore_selected()
    save_tokenizer(args.out_dir, tokenizer, policy.config.block_size)
    policy.save_pretrained(args.out_dir, tokenizer.eot_token)
    run.finish()


if __name__ == "__main__":
    run_script(main)
