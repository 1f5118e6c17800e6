"""Trains explicit reward models on preferences by the Bradley-Terry likelihood (Plackett-Luce for rankings of more than two
responses): one, or a family with --bias.

    python train_rm.py                                                    # one, on D_rho      -> out/rm
    python train_rm.py --bias=0.2,0.4,0.5,0.6,0.8                         # a family of five   -> out/rms/0.2 ... 0.8
    python train_rm.py --data=prefs.jsonl --init_from=out/sft --out_dir=out/oracle    # on people's labels

A member of the family is trained on a subset of D_rho in which the longer response is preferred in a fraction `bias` of
the pairs, so that the members disagree about length, and some member is near the truth. Every model starts from the
transformer of --init_from. The skeleton is that of train_policy.py: `diff train_rm.py train_policy.py`.
"""
import argparse
import math
import os
import time

import numpy as np
import torch
from tqdm import tqdm

import runtime
from data import batch_order, biased_subset, collate, save_tokenizer, training_pairs
from losses import margins, plackett_luce
from reward import RewardModel
from runtime import InputError


def parse_flags(argv):
    parser = runtime.shared_flags(__doc__)
    parser.add_argument("--bias", help="comma-separated fractions: train a family, one reward model on each subset of D_rho "
                                       "in which the longer response is preferred in this fraction of the pairs")
    args = parser.parse_args(argv)

    args.out_dir = args.out_dir or ("out/rms" if args.bias else "out/rm")
    args.init_from = args.init_from or "out/sft"
    args.max_steps = args.max_steps or 100
    args.batch_size = args.batch_size or 64
    args.micro_batch_size = min(args.micro_batch_size or args.batch_size, args.batch_size)
    args.lr = args.lr or 5e-4
    args.eval_every = args.eval_every or max(1, args.max_steps // 2)
    if args.init_from == "scratch":
        raise InputError("--init_from: a reward model starts from a language model, such as the run of --loss=sft")
    try:
        args.bias = [runtime.fraction(text) for text in args.bias.split(",")] if args.bias else None
    except ValueError:
        raise InputError(f"--bias: comma-separated fractions between 0 and 1, not {args.bias!r}") from None
    if args.bias and len(set(args.bias)) < len(args.bias):
        raise InputError("--bias: the members of a family differ in their bias; one is named twice")
    return args


def main(argv=None):
    # ---- set-up
    args = parse_flags(argv)
    device, autocast = runtime.setup(args)
    policy, tokenizer = runtime.load_policy(args, device)

    # ---- data: one training set, or one for each member of the family
    train, validation = training_pairs(args, tokenizer, policy, device, autocast)
    validation = validation.take(range(min(args.n_eval, len(validation))))
    if not args.bias:
        return train_one(args, policy, tokenizer, {"train": train, "validation": validation}, device, autocast)
    if train.response_lengths().shape[1] != 2:
        raise InputError("--bias: subsets by length are made of pairs, and the rows of --data have more responses")
    folders = {bias: os.path.join(args.out_dir, str(bias)) for bias in args.bias}
    begun = {folder for folder in folders.values() if os.path.exists(os.path.join(folder, "state.pt"))}
    if args.resume and not begun:
        raise InputError(f"--resume: there is no state.pt in {', '.join(folders.values())}; leave --resume out")
    for folder in [args.out_dir, *(entry.path for entry in os.scandir(args.out_dir))] if os.path.isdir(args.out_dir) else []:
        if folder not in folders.values() and os.path.exists(os.path.join(folder, "config.json")):
            raise InputError(f"--out_dir: {folder} holds another reward model, which would join this family; name another folder")
    try:
        subsets = {bias: train.take(biased_subset(train.response_lengths(), bias, seed=args.seed)) for bias in folders}
    except ValueError as error:
        raise InputError(f"--bias: {error}") from error
    for bias, folder in folders.items():
        member = argparse.Namespace(**{**vars(args), "bias": bias, "out_dir": folder, "resume": args.resume and folder in begun})
        train_one(member, policy, tokenizer, {"train": subsets[bias], "validation": validation}, device, autocast)


def train_one(args, policy, tokenizer, splits, device, autocast):
    """One reward model, from the policy's transformer, into the run folder args.out_dir."""
    constants = runtime.key(runtime.hash_weights(policy), runtime.hash_examples(splits["train"].examples))
    batch_rows = batch_order(splits["train"].row_lengths(), args.batch_size, args.seed)

    # ---- model
    reward_model = RewardModel.from_policy(policy).to(device)
    optimizer = runtime.adamw(reward_model, args, device)
    model = torch.compile(reward_model, dynamic=True) if args.compile else reward_model

    def forward(split, rows):
        """One pass over some rows of a split: losses (b,) and statistics {name: (b,)}."""
        with autocast():
            batch = collate([splits[split].examples[i] for i in rows], runtime.shape_multiple(device)).to(device)
            rewards = model(batch)                                     # (b, K)
        margin = margins(rewards.detach())                             # (b, pairs)
        right = (margin > 0).float() + 0.5 * (margin == 0)
        return plackett_luce(rewards), {"margin": margin.mean(dim=1), "accuracy": right.mean(dim=1)}

    def whole_pass(split, rows, backward=False):
        """Mean loss and statistics over `rows`, in micro-batches; the gradient is that of the whole batch."""
        total, size = {}, args.micro_batch_size if backward else 4 * args.micro_batch_size       # no gradient, less memory
        for at in range(0, len(rows), size):
            losses, stats = forward(split, rows[at:at + size])
            loss = losses.sum() / len(rows)
            if backward:
                loss.backward()
            for name, value in {"loss": loss.detach(), **{n: v.sum() / len(rows) for n, v in stats.items()}}.items():
                total[name] = total.get(name, 0) + value
        return total

    # ---- step 0 has known values: the head is zero
    watched = np.argsort(splits["validation"].row_lengths(), kind="stable")      # little padding
    with torch.no_grad():
        start = whole_pass("validation", watched)["loss"].item()
    known = math.lgamma(len(splits["train"].examples[0][1]) + 1)       # ln K!: every ranking of K is as likely; of two, ln 2
    assert abs(start - known) < 1e-5 * known, f"before step 0, the loss is {start}, not {known}"

    # ---- loop
    print(f"reward model: {sum(p.numel() for p in reward_model.parameters()):,} parameters, {len(splits['train'])} training "
          f"pairs, {args.max_steps} steps of {args.batch_size}, on {device} -> {args.out_dir}")
    started, window = time.time(), []
    with runtime.Run(args, reward_model, optimizer, constants) as run, tqdm(
            total=args.max_steps, initial=run.first_step, desc=args.out_dir, disable=None, leave=False) as bar:
        for step in range(run.first_step, args.max_steps + 1):
            last_step = step == args.max_steps
            if window and (step % 10 == 0 or step % args.eval_every == 0 or last_step):
                # logged as means since the last line: one transfer from the device, not one a step
                run.log(step - 1, **{name: torch.stack([s[name] for s in window]).mean().item() for name in window[0]})
                window = []
            if step % args.eval_every == 0 or last_step:
                with torch.no_grad():
                    result = {f"validation/{name}": value.item() for name, value in whole_pass("validation", watched).items()}
                run.log(step, **result)
                run.save_state(step)
                tqdm.write(f"step {step:5d}  " + "  ".join(f"{name} {value:.4f}" for name, value in result.items()))
            if last_step:
                save_tokenizer(args.out_dir, tokenizer, policy.config.block_size)
                reward_model.save_pretrained(args.out_dir, tokenizer.eot_token)
                break

            stats = whole_pass("train", batch_rows(step), backward=True)
            norm = torch.nn.utils.clip_grad_norm_(reward_model.parameters(), args.grad_clip)
            optimizer.param_groups[0]["lr"] = runtime.learning_rate(step, args.max_steps, args.lr)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            runtime.end_step(device)
            bar.update()
            window.append({**stats, "grad_norm": norm})
    print(f"reward model: {args.max_steps} steps in {time.time() - started:.0f} s -> {args.out_dir}")


if __name__ == "__main__":
    runtime.run(main)
