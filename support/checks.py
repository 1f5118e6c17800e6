"""Checks a training run before its first step: cheap, and it catches most mistakes."""
import numpy as np

from support.columns import score
from support.device import in_float32

SOME = 16       # rows that are computed in float32 as well


def check_rounding(policy, dataset, split):
    """Compares the reference's log-probs in bfloat16, of some rows of a data set, with those of a
    float32 forward pass, and prints by how much they differ. AssertionError if a response's differs
    by more than 0.5 nats and 0.02 for each of its tokens, which is more than rounding does.

    policy: still the reference. dataset: with its column ref_logps, (N, K). split: its name.
    """
    rows = np.linspace(0, len(dataset) - 1, min(SOME, len(dataset))).astype(int)
    some = dataset.take(rows)
    with in_float32():
        exact = score(policy, some, desc="float32")                                 # (rows, K)
    error = np.abs(some.ref_logps - exact)
    if not (error <= 0.5 + 0.02 * some.response_lengths()).all():     # a nan is not
        raise AssertionError(f"the reference's {split} log-probs in bfloat16 differ from those in "
                             f"float32 by up to {error.max():.2g} nats; use --dtype=float32, or "
                             "delete the cache if another version of this code has written it")
    print(f"{split} log-probs in bfloat16: within {error.max():.1g} nats of float32, in "
          f"{len(rows)} rows")


def check_step_0(losses, expected, logps, ref_logps, args):
    """Checks that before step 0 the policy is the reference: its log-probs are the cached ones, and
    the loss is that of the reference itself. What rounding explains is let through.

    losses: (P,) of the first micro-batch, as it is trained on, before the first update; expected:
    (P,) the same with the reference in the policy's place; logps, ref_logps: (b, K).
    """
    change = (logps - ref_logps).abs().max().item()
    least, relative = (1e-3, 1e-5) if args.dtype == "float32" else (0.5, 1e-3)
    if change > least + relative * ref_logps.abs().max():
        raise AssertionError("before step 0, the policy's log-probs differ from the reference's by "
                             f"up to {change} nats")
    scale = max(1, args.beta or 1, *(args.gamma or ()))
    scale *= max(1, getattr(args, "weight", None) or 1)     # of a second term in beta * h
    slack = 2 * scale * change + 1e-4       # of beta * h (or its square), or the KL
    wrong = (losses - expected).abs() > (1 + expected.abs()) * slack + slack**2
    if wrong.any():
        raise AssertionError(f"at the reference, {args.loss} is {losses[wrong][0]:.4f}, not "
                             f"{expected[wrong][0]:.4f}")
    print(f"step 0: policy == reference to {change:.0e} nats, {args.loss} loss "
          f"{losses.sum() / len(logps):.4f}")


def say_spread(rewards, names):
    """Prints how much each member of a family varies in its margins. A member that hardly does is
    the nearest wherever the policy is near the reference, whatever it has learnt, and so e-DPO's
    minimum picks it nearly everywhere: a warning.

    rewards: (N, K, M) of the training rows, the best response first. names: of M reward models, or
    none where the rewards came with the data.
    """
    better, worse = np.triu_indices(rewards.shape[1], k=1)
    margins = rewards[:, better] - rewards[:, worse]                        # (N, pairs, M)
    spread = margins.std(axis=(0, 1))                                       # (M,)
    names = [f"{m} ({name})" for m, name in enumerate(names or ["score"] * len(spread))]
    print("standard deviation of the margins of each reward model: "
          + ", ".join(f"{name} {value:.3g}" for name, value in zip(names, spread)))
    for name, value in zip(names, spread):
        if value < np.median(spread) / 10:
            print(f"warning: the margins of reward model {name} hardly vary, so that the minimum "
                  "will pick it for nearly all pairs and the policy will learn little from the "
                  "others; train it for longer, or leave it out")
