"""Trains explicit reward models by the Bradley-Terry likelihood of preferences.

    python train_rm.py --out_dir=out/my-rm                          # one, on D_rho
    python train_rm.py --bias=0.2,0.5,0.8 --out_dir=out/my-rms      # a family of three
    python train_rm.py --data=prefs.jsonl --out_dir=out/my-oracle   # on people's labels

Without --out_dir, one reward model goes to out/rm and a family to out/rms, as in the speedrun.

Each member of a family is trained on a subset of D_rho in which the longer response is preferred in
a fraction `bias` of the pairs. So the members disagree about length, and one of them should be near
the truth. All train for the same number of epochs, which is fewer steps on a smaller subset. Every
reward model starts from the transformer of --init_from. The loop is the one in train_policy.py,
with rewards instead of log-probs.
"""
import argparse
import math

import numpy as np
import torch
from torch.nn.utils import clip_grad_norm_

from data import BatchOrder, by_length, d_rho, get_tokenizer
from lora import add_lora, check_rank
from losses import bradley_terry, reward_margin
from model import GPT
from reward import RewardModel, training_pairs
from support.columns import add_frozen, cache_folder, hash_examples, hash_model, key
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
from support.flags import run_script
from support.run import Run, count_parameters, family_to_train
from support.tokenizer import check_vocabulary, save_tokenizer
from support.training_flags import reward_flags
from train_policy import GRAD_CLIP, adamw, learning_rate

# ------ the numbers of a run: each name is a flag, and the number its default

NUMBERS = dict(
    max_steps=200,              # optimizer steps
    batch_size=32,              # prompts in a step, each with its pair
    lr=5e-4,                    # peak learning rate; a hundredth of it for models as wide as GPT-2
    lora_lr=10,                 # with --lora, lr is multiplied by this (not a flag)
    rho=0.2,                    # TinyTLDR: in this fraction of the pairs the longer response wins
    n_pairs=1000,               # TinyTLDR: training pairs,
    pool=5000,                  # chosen from this many
    n_eval=256,                 # rows in each evaluation
)


def parse_flags(argv=None):
    """Reads the flags of a run: an argparse.Namespace. argv: the command line's words, or None for
    the real ones. InputError for a flag that is wrong or would be ignored."""
    return reward_flags(argv, __doc__, NUMBERS)


def statistics(rewards, batch):
    """Computes the numbers to watch, which docs/glossary.md explains.

    rewards: (P, 2) of the chosen and the rejected response of each pair. batch: their TreeBatch.
    Returns {name: (P,)}, one number for each pair, times the pair's weight in its row.
    """
    margin = reward_margin(rewards.detach())                # (P,)
    prefers_chosen = (margin > 0).float() + 0.5 * (margin == 0)
    return {"margin": batch.pair_weight * margin, "accuracy": batch.pair_weight * prefers_chosen}


@torch.no_grad()
def evaluate(reward_model, dataset, args, device):
    """Computes means of the loss and of the numbers to watch over a whole data set. Returns {name:
    number}."""
    size = 4 * args.micro_batch_size    # without a gradient, a row takes less memory
    sums = {}
    for part in micro_batches(np.arange(len(dataset)), size):
        batch = dataset.batch(part).to(device)
        with compute():
            rewards = batch.pair_up(reward_model(batch))    # (P, 2)
        losses = batch.pair_weight * bradley_terry(rewards)
        for name, values in {"loss": losses, **statistics(rewards, batch)}.items():
            sums[name] = sums.get(name, 0) + (values / len(dataset)).sum()
        if device.type == "xla":
            sync()
    return add_up({name: value.item() for name, value in sums.items()})


def main(argv=None):
    # ---- set-up
    args = parse_flags(argv)
    device = setup(args)
    policy = place(GPT.from_pretrained(args.init_from, merge=not args.lora), device, args)
    if args.lora:
        check_rank(policy, args.lora)
    tokenizer = get_tokenizer(args.tokenizer)
    check_vocabulary(policy, tokenizer, "--tokenizer")

    # ---- data: one training set, or one for each member of the family
    train, validation = training_pairs(args, tokenizer, policy, device)
    validation = by_length(validation.first(args.n_eval))
    cache = cache_folder(args.init_from, args.out_dir)
    if args.freeze:
        add_frozen(train, policy, cache, "train")
        add_frozen(validation, policy, cache, "validation")
    if args.lora:       # members share the policy's frozen weights; each trains an adapter
        add_lora(policy, args.lora, args.init_from, args.seed)
    if not args.bias:
        return train_one(args, policy, tokenizer, train, validation, device)
    subsets = []
    for bias in args.bias:
        print(f"--bias={bias}: ", end="")
        subsets.append(d_rho(train, bias, None, args.seed))
    for (bias, folder, resume), subset in zip(family_to_train(args), subsets):
        steps = max(1, round(args.max_steps * len(subset) / len(train)))    # the same epochs
        flags = {**vars(args), "bias": bias, "max_steps": steps, "out_dir": folder,
                 "resume": resume}
        member = argparse.Namespace(**flags)
        train_one(member, policy, tokenizer, subset, validation, device)


def train_one(args, policy, tokenizer, train, validation, device):
    """Trains one reward model, starting from the policy's transformer, and saves it in the folder
    args.out_dir.

    args: the flags, with those of this member of the family. train, validation: a Dataset each.
    """
    # A family sees its batches in another order. Otherwise its member that trains on all of D_rho
    # would be the same model as the single one.
    order = BatchOrder(train.row_lengths(), args.batch_size, args.seed + (args.bias is not None))

    # ---- model
    constants = key(hash_model(policy), hash_examples(train.examples))
    reward_model = place(RewardModel.from_policy(policy, args.head), device, args)
    optimizer = adamw(reward_model, args.lr)
    run = Run(args, reward_model, optimizer, constants)
    if args.compile:
        reward_model.compile(dynamic=True)
    print(f"reward model: {count_parameters(reward_model)}, {len(train)} training rows, "
          f"{args.max_steps} steps of {args.batch_size} rows, on {device}")

    # ---- loop
    size = args.micro_batch_size
    for step in range(run.first_step, args.max_steps + 1):
        if run.due(step):
            means = evaluate(reward_model, validation, args, device)
            run.report(step, {f"validation/{name}": value for name, value in means.items()})
        if step == args.max_steps:      # the last step is only evaluated
            break

        rows = order.rows(step)                                 # (batch_size,)
        for part in micro_batches(rows, size):                  # this process's share of the rows
            batch = train.batch(part).to(device)                # the tree
            with compute():
                rewards = batch.pair_up(reward_model(batch))    # (pairs, 2)
            losses = batch.pair_weight * bradley_terry(rewards)
            if step == 0:                                       # the head is zero: so are rewards
                torch.testing.assert_close(losses, batch.pair_weight * math.log(2))
            (losses.sum() / len(rows)).backward()               # adds to the batch's gradient
            run.watch(len(rows), loss=losses, **statistics(rewards, batch))
        if PROCESSES > 1:
            add_up_gradients(reward_model)
        grad_norm = clip_grad_norm_(reward_model.parameters(), GRAD_CLIP)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.max_steps, args.lr)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        run.end_step(step, rows, grad_norm=grad_norm)

    save_tokenizer(args.out_dir, tokenizer, policy.config.block_size)
    reward_model.save_pretrained(args.out_dir, tokenizer.eot_token)
    run.finish()


if __name__ == "__main__":
    run_script(main)
