"""Your entry for the leaderboard: a loss. This one is DPO, which e-DPO beats by about 0.5.

    python experiments/leaderboard.py           # trains it, and compares it with e-DPO

A parameter without a default is something that your loss wants to know about its B pairs. Take any
of these, in any order; column 0 is the chosen response, column 1 the rejected one:

    logps      (B, 2)      the policy's summed log-probs of both responses, in nats
    ref_logps  (B, 2)      the reference's
    lengths    (B, 2)      tokens in each response
    rewards    (B, 2, 5)   by five reward models, trained on pairs in which the longer response wins
                           in 20%, 40%, 50%, 60% and 80% (the last dimension, in this order)
    kl         (B,)        an estimate of KL(ref || pi), in nats

A parameter with a default is a number that you choose. Choose it here. The exception is gamma: it
may be a pair of numbers, and then grows from the first to the second while the policy trains. You
may import torch, math and losses, nothing else.
"""
import torch.nn.functional as F

from losses import log_ratio_margin


def loss(logps, ref_logps, beta=1.0):
    """Computes one number for each pair, (B,)."""
    h = log_ratio_margin(logps, ref_logps)                      # (B,)
    return -F.logsigmoid(beta * h)
