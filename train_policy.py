"""Trains a policy: supervised fine-tuning (--loss=sft), or one of the six preference losses from a reference policy.

    python train_policy.py --loss=sft                        # the reference policy       -> out/sft
    python train_policy.py --loss=dpo                        # from out/sft               -> out/dpo
    python train_policy.py --loss=e-dpo --rewards=out/rms    # distils a family of reward models -> out/e-dpo
    python train_policy.py --loss=p-dpo --data=prefs.jsonl --init_from=gpt2 --lr=1e-6 --max_steps=10000

The reference is --init_from, frozen as it was before step 0. What depends on it alone (its log-probs of the training
responses, its samples for the KL term) and the reward models' scores are computed once, before training, and cached, so
that a step is one forward and one backward pass of the policy, whatever the loss.
"""
import math
import time

import numpy as np
import torch
from tqdm import tqdm

import runtime
from data import Dataset, batch_order, collate, demonstrations, save_tokenizer, training_pairs
from losses import NEEDS_REWARDS, PESSIMISTIC, PREFERENCE_LOSSES, loss_at_reference, margins, preference_loss
from reward import family_folders, family_scores, load_reward_model
from runtime import InputError

# Each method's own temperature, chosen on validation prompts with the same budget of trials (runs/sweep.py, LOG.md).
BETA = {"dpo": 0.3, "d-dpo": 0.3, "p-dpo": 0.3, "dp-dpo": 0.1, "e-dpo": 0.3}
TAU = 0.1


def parse_flags(argv):
    parser = runtime.shared_flags(__doc__)
    parser.add_argument("--loss", default="e-dpo", choices=("sft",) + PREFERENCE_LOSSES)
    parser.add_argument("--rewards", help="folder of a reward model or of a family, or several, comma-separated "
                                          "(default: out/rms for e-dpo, out/rm for d-dpo and dp-dpo); or scores: the "
                                          "rewards that --data came with, as score_chosen and score_rejected")
    parser.add_argument("--beta", type=runtime.positive(float), help="scale of the implicit reward, in reward per nat "
                                                                     f"(default: {BETA})")
    parser.add_argument("--tau", type=runtime.positive(float), help=f"IPO's: the margin to reach is 1 / (2 tau) (default: {TAU})")
    parser.add_argument("--gamma", help="weight of the forward KL: FIRST,LAST, annealed linearly over training, or one "
                                        "number for all of it (default: 1e-4,1e-2)")
    parser.add_argument("--min_per", default="example", choices=["example", "batch"],
                        help="e-DPO: pick the best reward model for each example, or one for each batch")
    parser.add_argument("--ipo_per_token", action="store_true", help="IPO on mean instead of summed log-probs, as TRL does")
    parser.add_argument("--max_new_tokens", type=runtime.positive(int), default=64, help="length of samples for the KL term")
    for flag, default in (("n_layer", 2), ("n_head", 4), ("n_embd", 128), ("block_size", 192)):
        parser.add_argument(f"--{flag}", type=runtime.positive(int), default=default, help="of a model from scratch")
    args = parser.parse_args(argv)

    sft = args.loss == "sft"
    args.out_dir = args.out_dir or f"out/{args.loss}"
    args.init_from = args.init_from or ("scratch" if sft else "out/sft")
    args.max_steps = args.max_steps or (1000 if sft else 400)
    args.batch_size = args.batch_size or (32 if sft else 16)
    args.micro_batch_size = min(args.micro_batch_size or args.batch_size, args.batch_size)
    args.lr = args.lr or (4e-3 if sft else 2e-4)
    args.eval_every = args.eval_every or max(1, args.max_steps // 8)
    for flag, losses, default in (("beta", BETA, BETA.get(args.loss)), ("tau", ("ipo",), TAU),
                                  ("gamma", PESSIMISTIC, "1e-4,1e-2"),
                                  ("rewards", NEEDS_REWARDS, "out/rms" if args.loss == "e-dpo" else "out/rm")):
        if getattr(args, flag) and args.loss not in losses:
            raise InputError(f"--{flag}: --loss={args.loss} does not use it, only {', '.join(losses)}")
        setattr(args, flag, (getattr(args, flag) or default) if args.loss in losses else None)
    if not sft and args.init_from == "scratch":
        raise InputError(f"--init_from: --loss={args.loss} needs a reference policy, such as the run of --loss=sft")
    if args.gamma:
        try:
            values = list(map(float, args.gamma.split(",")))
            if len(values) > 2 or not all(0 <= value < math.inf for value in values):
                raise ValueError
        except ValueError:
            raise InputError(f"--gamma: FIRST,LAST or one number, none below 0; not {args.gamma!r}") from None
        args.gamma = [values[0], values[-1]]
    if args.n_embd % args.n_head:
        raise InputError(f"--n_head: {args.n_head} heads do not divide --n_embd={args.n_embd}")
    if args.min_per == "batch" and args.micro_batch_size < args.batch_size:
        raise InputError("--min_per=batch: one minimum per batch needs the whole batch in one pass; leave --micro_batch_size out")
    return args


def add_reference_samples(dataset, policy, tokenizer, args, cache, autocast, name):
    """Adds to each row, as one more response, a sample from the reference for its prompt: what the forward KL averages."""
    prompts = [prompt.tolist() for prompt, _ in dataset.examples]
    key = runtime.key(runtime.hash_weights(policy), prompts, args.max_new_tokens, args.seed, args.dtype, args.tokenizer)
    samples = runtime.cached(cache, f"{name}-samples", key, lambda: runtime.sample(
        policy, tokenizer, prompts, policy.config.block_size, args.max_new_tokens, seed=[args.seed, 3], autocast=autocast,
        desc=f"{name} samples")[1])
    return Dataset([(prompt, responses + [np.array(sample, np.int32)])
                    for (prompt, responses), sample in zip(dataset.examples, samples)], dataset.scores)


def reference_logps(dataset, policy, args, cache, autocast, name):
    """The reference's summed log-prob of every response, (N, K) float32: one pass over the data, ever."""
    key = runtime.key(runtime.hash_weights(policy), runtime.hash_examples(dataset.examples), args.dtype)
    return torch.tensor(runtime.cached(cache, f"{name}-logps", key, lambda: runtime.score(
        policy, dataset.examples, autocast, desc=f"{name} log-probs").tolist()))


def statistics(policy, ref, K):
    """What to watch, per example, detached: see the glossary in README.md. policy, ref: (B, K), or (B, K + 1) with the KL
    term's sample -> {name: (B,)}."""
    change = (policy - ref).detach()
    h = margins(change[:, :K])                                         # (B, pairs)
    values = {"chosen_change": change[:, 0], "rejected_change": change[:, 1:K].mean(dim=1), "margin": h.mean(dim=1),
              "accuracy": ((h > 0).float() + 0.5 * (h == 0)).mean(dim=1)}
    if change.size(1) > K:
        values["forward_kl"] = -change[:, K:].mean(dim=1)
    return values


def main(argv=None):
    # ---- set-up
    args = parse_flags(argv)
    device, autocast = runtime.setup(args)
    policy, tokenizer = runtime.load_policy(args, device)
    reward_models = {folder: load_reward_model(folder, "--rewards", policy, args.tokenizer, device)
                     for folder in (family_folders(args.rewards) if args.rewards and args.rewards != "scores" else [])}
    sft = args.loss == "sft"

    # ---- data: train and validation rows, and everything about them that does not change
    ref = rewards = {}
    if sft:
        train, validation = demonstrations(args.data, tokenizer, policy.config.block_size, args.seed)
        if not len(train) or not len(validation):
            raise InputError(f"--data: {args.data}: no usable row in the train or the validation split")
    else:
        train, validation = training_pairs(args, tokenizer, policy, device, autocast)
        if args.rewards == "scores" and train.scores is None:
            raise InputError(f"--rewards=scores: {args.data} has no score_chosen and score_rejected, nor scores, in all its rows")
    splits = {"train": train, "validation": validation.take(range(min(args.n_eval, len(validation))))}
    K = len(train.examples[0][1])      # responses that are compared; the KL term's sample comes after them
    if not sft:
        cache = runtime.cache_folder(args.init_from, args.out_dir)
        if args.loss in PESSIMISTIC:
            splits = {s: add_reference_samples(d, policy, tokenizer, args, cache, autocast, s) for s, d in splits.items()}
        ref = {s: reference_logps(d, policy, args, cache, autocast, s) for s, d in splits.items()}
        if args.rewards == "scores":
            rewards = {s: torch.tensor(d.scores) for s, d in splits.items()}              # (N, K, M) each
        elif args.loss in NEEDS_REWARDS:
            rewards = {s: torch.tensor(family_scores(reward_models, d, args.dtype, autocast, s, K)) for s, d in splits.items()}
    constants = runtime.key(runtime.hash_weights(policy), runtime.hash_examples(splits["train"].examples),
                            rewards["train"].numpy().tobytes() if rewards else b"")
    response_tokens = {split: dataset.response_lengths().sum(axis=1) for split, dataset in splits.items()}
    batch_rows = batch_order(splits["train"].row_lengths(), args.batch_size, args.seed)

    # ---- model
    optimizer = runtime.adamw(policy, args, device)
    model = torch.compile(policy, dynamic=True) if args.compile else policy

    def forward(split, rows, gamma):
        """One pass over some rows of a split: losses (b,), statistics {name: (b,)}; for SFT, response tokens (b,)."""
        with autocast():
            batch = collate([splits[split].examples[i] for i in rows], runtime.shape_multiple(device)).to(device)
            logps = model(batch)                                       # (b, K)
        if sft:
            tokens = batch.lengths.sum(dim=1)                          # (b,)
            return -logps.sum(dim=1) / tokens, {}, tokens
        ref_logps = ref[split][rows].to(device)                        # (b, K)
        scores = rewards[split][rows].to(device) if rewards else None  # (b, K, M)
        per_token = batch.lengths if args.loss == "ipo" and args.ipo_per_token else 1
        losses = preference_loss(args.loss, logps / per_token, ref_logps / per_token, scores, args.beta, args.tau, gamma,
                                 args.min_per, K)
        return losses, statistics(logps, ref_logps, K), None

    def whole_pass(split, rows, gamma, backward=False):
        """Mean loss and statistics over `rows`, in micro-batches; the gradient is that of the whole batch."""
        total, all_tokens = {}, response_tokens[split][rows].sum()
        size = args.micro_batch_size if backward else 4 * args.micro_batch_size        # no gradient, less memory
        for at in range(0, len(rows), size):
            losses, stats, tokens = forward(split, rows[at:at + size], gamma)
            weight = tokens / all_tokens if sft else torch.full_like(losses, 1 / len(rows))     # SFT: a mean over tokens
            loss = (losses * weight).sum()
            if backward:
                loss.backward()
            for name, value in {"loss": loss.detach(), **{n: (v * weight).sum() for n, v in stats.items()}}.items():
                total[name] = total.get(name, 0) + value
        return total

    # ---- step 0 has known values: the policy is the reference
    by_length = lambda split, rows: rows[np.argsort(splits[split].row_lengths()[rows], kind="stable")]      # little padding
    watched = {"validation": by_length("validation", np.arange(len(splits["validation"])))}
    if not sft:
        watched["train"] = by_length("train", np.random.default_rng(0).permutation(len(splits["train"]))[:args.n_eval])
        rows = watched["train"][-args.micro_batch_size:]
        with torch.no_grad():
            start, scores = ref["train"][rows], rewards["train"][rows] if rewards else None
            with autocast():
                logps = model(collate([splits["train"].examples[i] for i in rows], runtime.shape_multiple(device)).to(device))
            change = (logps.cpu() - start).abs().max().item()
        known = loss_at_reference(args.loss, scores, args.tau)
        found = preference_loss(args.loss, start, start, scores, args.beta, args.tau, per=args.min_per, K=K)
        if args.min_per == "example":
            assert torch.allclose(found, known.expand_as(found)), f"at the reference, {args.loss} is {found}, not {known}"
        tolerance = (1e-5 if args.dtype == "float32" else 1e-2) * start.abs().max().item() + 1e-3      # rounding only
        assert change < tolerance, f"before step 0, log-probs differ from the reference's by up to {change} nats"
        print(f"step 0: policy == reference to {change:.0e} nats, {args.loss} loss {found.mean():.4f} as derived")

    # ---- loop
    print(f"{args.loss}: {sum(p.numel() for p in policy.parameters()):,} parameters, {len(splits['train'])} training rows, "
          f"{args.max_steps} steps of {args.batch_size}, on {device} -> {args.out_dir}")
    started, window = time.time(), []
    first_gamma, last_gamma = args.gamma or (0.0, 0.0)
    with runtime.Run(args, policy, optimizer, constants) as run, tqdm(total=args.max_steps, initial=run.first_step,
                                                                      desc=args.loss, disable=None, leave=False) as bar:
        for step in range(run.first_step, args.max_steps + 1):
            last_step = step == args.max_steps
            gamma = first_gamma + (last_gamma - first_gamma) * step / args.max_steps
            if window and (step % 10 == 0 or step % args.eval_every == 0 or last_step):
                # logged as means since the last line: one transfer from the device, not one a step
                run.log(step - 1, **{name: torch.stack([s[name] for s in window]).mean().item() for name in window[0]})
                window = []
            if step % args.eval_every == 0 or last_step:
                with torch.no_grad():
                    result = {f"{split}/{name}": value.item() for split, rows in watched.items()
                              for name, value in whole_pass(split, rows, gamma).items()}
                run.log(step, **result)
                run.save_state(step)
                tqdm.write(f"step {step:5d}  " + "  ".join(f"{k} {v:.4f}" for k, v in result.items() if "loss" in k
                                                           or k in ("validation/accuracy", "train/chosen_change")))
            if last_step:
                save_tokenizer(args.out_dir, tokenizer, policy.config.block_size)
                policy.save_pretrained(args.out_dir, tokenizer.eot_token)
                break

            stats = whole_pass("train", batch_rows(step), gamma, backward=True)
            norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), args.grad_clip)
            optimizer.param_groups[0]["lr"] = runtime.learning_rate(step, args.max_steps, args.lr)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            runtime.end_step(device)
            bar.update()
            window.append({**stats, "grad_norm": norm})
    print(f"{args.loss}: {args.max_steps} steps in {time.time() - started:.0f} s -> {args.out_dir}")


if __name__ == "__main__":
    runtime.run(main)
