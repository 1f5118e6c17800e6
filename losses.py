"""Defines every loss, each as a pure function of a few numbers per pair. Read this file first.

Notation, as in the paper (Fisch et al., "Robust Preference Optimization through Reward Model
Distillation", TMLR 2025, arXiv 2405.19316):

    x, y            a prompt and a response
    pi, ref         the policy being trained, and the frozen reference policy (the SFT model)
    logp(y|x)       sum over the response's tokens, end of text included, of log p(token | before)
    h               log-ratio margin: [logp_pi(y1) - logp_ref(y1)] - [logp_pi(y2) - logp_ref(y2)]
    beta * h        implicit reward margin: the policy read as a reward model
    r(x, y)         explicit reward; only differences between responses to one prompt mean anything

Column 0 is the chosen response, column 1 the rejected one. Log-probs are in nats. A loss takes B
pairs and returns one number for each, (B,). The parameters without a default are what it needs to
know about a pair. Those with a default are its flags on the command line. zoo.py has more losses in
the same form, by other authors.
"""
import inspect
from collections import ChainMap

import torch.nn.functional as F

# The weight of the KL grows over training, from the first number to the last. Each step calls its
# loss with one number in between, such as gamma=0.003.
GAMMA = (1e-4, 1e-2)


# ------ margins


def log_ratio_margin(logps, ref_logps):
    """Computes h: by how many nats more than the reference the policy prefers the chosen response.

    logps, ref_logps: (B, 2) summed response log-probs of the policy and of the reference.
    Returns (B,).
    """
    log_ratio = logps - ref_logps                   # (B, 2)
    return log_ratio[:, 0] - log_ratio[:, 1]        # (B,)


def reward_margin(rewards):
    """Computes the reward margin r(x, y1) - r(x, y2) of chosen and rejected responses.

    rewards: (B, 2), or (B, 2, M) for M reward models. Returns (B,), or (B, M).
    """
    return rewards[:, 0] - rewards[:, 1]


# ------ reward models


def bradley_terry(rewards):
    """Computes the loss that trains a reward model: -log sigmoid(r(x, y1) - r(x, y2)).

    Bradley & Terry (1952); Rafailov et al. (2023), Eq. 2. rewards: (B, 2), chosen and rejected.
    Returns (B,).
    """
    return -F.logsigmoid(reward_margin(rewards))


# ------ policies: the losses that use the labels


def dpo(logps, ref_logps, beta=1.0):
    """Computes DPO, direct preference optimisation: -log sigmoid(beta * h).

    Rafailov et al. (2023), Eq. 7: Bradley-Terry on the implicit reward. With one label per pair it
    has no finite minimum. A wider margin always pays, and nothing keeps the chosen response's
    log-prob where it is.
    logps, ref_logps: (B, 2) summed log-probs, in nats. Returns (B,).
    """
    h = log_ratio_margin(logps, ref_logps)                      # (B,)
    return -F.logsigmoid(beta * h)


def ipo(logps, ref_logps, tau=0.1):
    """Computes IPO, identity preference optimisation: (h - 1 / (2 tau))^2.

    Azar et al. (2023), Eq. 17. It asks the policy to reach a margin, not to widen it.
    logps, ref_logps: (B, 2) summed log-probs, in nats. Returns (B,).
    """
    h = log_ratio_margin(logps, ref_logps)                      # (B,)
    return (h - 1 / (2 * tau)) ** 2


def ipo_per_token(logps, ref_logps, lengths, tau=0.1):
    """Computes IPO on mean log-probs per token, as TRL does.

    logps, ref_logps: (B, 2) summed log-probs, in nats; lengths: (B, 2) tokens in each response.
    Returns (B,).
    """
    return ipo(logps / lengths, ref_logps / lengths, tau)


def p_dpo(logps, ref_logps, kl, beta=1.0, gamma=GAMMA):
    """Computes the paper's p-DPO, pessimistic DPO: -log sigmoid(beta * h) + gamma * KL(ref || pi).

    logps, ref_logps: (B, 2) summed log-probs, in nats; kl: (B,), from forward_kl. Returns (B,).
    """
    h = log_ratio_margin(logps, ref_logps)                      # (B,)
    return -F.logsigmoid(beta * h) + gamma * kl


# ------ policies: reward-model distillation


def d_dpo(logps, ref_logps, rewards, beta=1.0):
    """Computes the paper's d-DPO, reward-model distillation: (r(y1) - r(y2) - beta * h)^2.

    It pulls the implicit reward margin towards the explicit one. That one is finite, so there is a
    margin at which to stop. Labels enter only through r: a pair needs none of its own.
    logps, ref_logps: (B, 2) summed log-probs, in nats; rewards: (B, 2, M) by M reward models, whose
    mean is distilled (usually M = 1). Returns (B,).
    """
    h = log_ratio_margin(logps, ref_logps)                      # (B,)
    target = reward_margin(rewards.mean(dim=2))                 # (B,)
    return (target - beta * h) ** 2


def dp_dpo(logps, ref_logps, rewards, kl, beta=1.0, gamma=GAMMA):
    """Computes the paper's dp-DPO: (r(y1) - r(y2) - beta * h)^2 + gamma * KL(ref || pi).

    It is pessimistic distillation: d-DPO with a KL term.
    logps, ref_logps: (B, 2) summed log-probs, in nats; rewards: (B, 2, M) by M reward models, whose
    mean is distilled; kl: (B,), from forward_kl. Returns (B,).
    """
    h = log_ratio_margin(logps, ref_logps)                      # (B,)
    target = reward_margin(rewards.mean(dim=2))                 # (B,)
    return (target - beta * h) ** 2 + gamma * kl


def e_dpo(logps, ref_logps, rewards, kl, beta=1.0, gamma=GAMMA):
    """Computes the paper's e-DPO: min_m (r_m(y1) - r_m(y2) - beta * h)^2 + gamma * KL(ref || pi).

    It distils a family of reward models. The minimum asks the policy to agree with at least one of
    them. Many policies do. Among those, the KL term picks the one closest to the reference; this
    caution is what the paper calls pessimism.
    The paper states its objective with the minimum outside the expectation: one member serves all
    pairs. What it runs, and what this function computes, is a minimum for each pair, as if the
    family were larger and its members took turns. Only the member that fits a pair best has a say
    in the pair's gradient.
    logps, ref_logps: (B, 2) summed log-probs, in nats; rewards: (B, 2, M) by M members; kl: (B,),
    from forward_kl. Returns (B,).
    """
    h = log_ratio_margin(logps, ref_logps)                                      # (B,)
    targets = reward_margin(rewards)                                            # (B, M)
    return (targets - beta * h[:, None]).square().min(dim=1).values + gamma * kl


def forward_kl(logps_of_ref_samples, ref_logps_of_ref_samples):
    """Estimates KL(ref || pi) = E_{y ~ ref}[logp_ref(y) - logp_pi(y)], in nats per response.

    This is the pessimism of p-DPO, dp-DPO and e-DPO. It penalises the policy for losing responses
    that the reference would give. The same gamma is a weaker brake on d-DPO than on DPO: at the
    start of training |dloss / dh| is beta / 2 in DPO and 2 beta |r1 - r2| in d-DPO, which is larger
    once the reward margin exceeds 1/4.

    The estimate is unbiased for a policy that was not trained on these samples. It may be negative.
    logps_of_ref_samples, ref_logps_of_ref_samples: (B, S) summed log-probs of S samples from the
    reference for each prompt. Returns (B,).
    """
    return (ref_logps_of_ref_samples - logps_of_ref_samples).mean(dim=1)


def sft(logps):
    """Computes the loss of supervised fine-tuning: -logp(y|x), summed over demonstrations of x.

    The training loop divides by the number of tokens. logps: (B, K) summed log-probs of K
    demonstrations. Returns (B,).
    """
    return -logps.sum(dim=1)


# ------ the distillation losses by themselves, without a KL


def distill(logps, ref_logps, rewards, beta):
    """Computes the distillation loss of one reward model: (r(y1) - r(y2) - beta * h)^2.

    logps, ref_logps: (B, 2) summed log-probs, in nats; rewards: (B, 2). Returns (B,).
    """
    return d_dpo(logps, ref_logps, rewards[:, :, None], beta)


def ensemble_distill(logps, ref_logps, rewards, beta):
    """Computes e-DPO without its KL: min_m (r_m(y1) - r_m(y2) - beta * h)^2.

    logps, ref_logps: (B, 2) summed log-probs, in nats; rewards: (B, 2, M) by M reward models, of
    which each pair takes the one that fits it best. Returns (B,).
    """
    return e_dpo(logps, ref_logps, rewards, kl=0.0, beta=beta, gamma=0.0)


def best_member(logps, ref_logps, rewards, beta):
    """Returns the index of the reward model that fits each pair best, which e-DPO's minimum picks.

    logps, ref_logps: (B, 2) summed log-probs, in nats; rewards: (B, 2, M) by M reward models.
    Returns (B,) int64, from 0 to M - 1.
    """
    h = log_ratio_margin(logps, ref_logps)                                      # (B,)
    return (reward_margin(rewards) - beta * h[:, None]).square().argmin(dim=1)


# ------ the table of losses

# Every default of beta and tau was chosen on validation prompts of TinyTLDR, from the same number
# of trials (results/figure2/chosen.json). The exception is the tau of ipo-per-token.
LOSSES = {
    "sft": sft,
    "dpo": dpo,
    "ipo": ipo,
    "ipo-per-token": ipo_per_token,
    "d-dpo": d_dpo,
    "p-dpo": p_dpo,
    "dp-dpo": dp_dpo,
    "e-dpo": e_dpo,
}
PREFERENCE_LOSSES = [name for name in LOSSES if name != "sft"]
MORE = {}       # losses of other files that --loss also knows, by name: zoo.py fills in its own
EVERY_LOSS = ChainMap(LOSSES, MORE)     # looks a name up in both
UNPAIRED = {}   # what those compute for rows with one response and a label, where they can: {name:
#                 function of (log-ratios, desirable, log-ratios of mismatched responses, flags)}
COUPLED = set()     # those in which the loss of a pair depends on the other pairs of its batch

# The paper's six methods, and what each distils: one reward model ("rm") or the family ("rms").
PAPER = {"dpo": None, "ipo": None, "d-dpo": "rm", "p-dpo": None, "dp-dpo": "rm", "e-dpo": "rms"}


def needs(name):
    """Lists what a loss needs to know, which are its parameters without a default.

    name: as in EVERY_LOSS. Returns a list of names, such as ["logps", "ref_logps", "kl"].
    """
    parameters = inspect.signature(EVERY_LOSS[name]).parameters.values()
    return [p.name for p in parameters if p.default is p.empty]


def knobs(name):
    """Returns the flags of a loss with their defaults, such as {"beta": 1.0}. name: as in
    EVERY_LOSS."""
    parameters = inspect.signature(EVERY_LOSS[name]).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def batch_loss(name, logps, batch, **knobs):
    """Computes a loss for every pair of a batch: it picks what the loss needs out of the batch.

    Come back here once you have met the TreeBatch, in data.py. It holds B rows, each a prompt with
    its K responses, such as the chosen one, the rejected one and a sample from the reference. Its
    tensor `pairs` says which two responses of a row make a pair, and batch.pair_up turns a column
    with a number for each response, (B, K), into one with two for each pair, (P, 2). So the P pairs
    here are the B pairs of the functions above. A row may hold several pairs (ranked responses
    do); each pair's loss is multiplied by its weight, and the weights of a row add up to 1.

    name: as in EVERY_LOSS. logps: (B, K) summed log-probs of all responses. batch: a TreeBatch
    with the columns that the loss needs. knobs: the flags of the loss; gamma is the number for this
    step. Returns (P,); for sft, and where rows have one response with a label, (B,).
    """
    if name == "sft":
        return sft(logps)
    if batch.desirable is not None:     # one response with a label, and one of another row
        log_ratios = logps - batch.ref_logps                                    # (B, 2)
        return UNPAIRED[name](log_ratios[:, 0], batch.desirable, log_ratios[:, 1], **knobs)
    columns = {"logps": logps, "ref_logps": batch.ref_logps, "rewards": batch.rewards,
               "lengths": batch.lengths}
    needed = needs(name)
    arguments = {need: batch.pair_up(columns[need]) for need in needed if need != "kl"}
    if "kl" in needed:
        kl = forward_kl(logps.gather(1, batch.samples), batch.ref_logps.gather(1, batch.samples))
        arguments["kl"] = kl[batch.pair_row]                                    # (P,)
    losses = EVERY_LOSS[name](**arguments, **knobs)
    assert losses.shape == batch.pair_weight.shape, (     # a wrong shape would be broadcast
        f"{name} gives {list(losses.shape)} numbers, not one for each of {len(batch.pairs)} pairs")
    return batch.pair_weight * losses
