"""Every loss in the repository, each a pure function of a few numbers per pair. Read this first.

Notation, as in the paper (Fisch et al., "Robust Preference Optimization through Reward Model
Distillation", TMLR 2025, arXiv 2405.19316):

    x, y            a prompt and a response
    pi, ref         the policy being trained, and the frozen reference policy (the SFT model)
    logp(y|x)       sum over the response's tokens, end of text included, of log p(token | before)
    h               log-ratio margin: [logp_pi(y1) - logp_ref(y1)] - [logp_pi(y2) - logp_ref(y2)]
    beta * h        implicit reward margin: the policy read as a reward model
    r(x, y)         explicit reward; only differences between responses to one prompt mean anything

Column 0 is the chosen response and column 1 the rejected one. Log-probs are in nats. A loss takes
B pairs and returns one number for each, (B,). Its parameters without a default are what it needs
to know about a pair; those with one are its flags on the command line.
"""
import inspect

import torch.nn.functional as F

GAMMA = (1e-4, 1e-2)    # weight of the KL: over training it grows from the first to the last


# ------ margins


def log_ratio_margin(logps, ref_logps):
    """Computes h: by how many nats more than the reference the policy prefers the chosen response.

    logps, ref_logps: (B, 2) summed response log-probs of the policy and of the reference.
    Returns (B,).
    """
    log_ratio = logps - ref_logps                   # (B, 2)
    return log_ratio[:, 0] - log_ratio[:, 1]        # (B,)


def reward_margin(rewards):
    """Computes r(x, y1) - r(x, y2). rewards: (B, 2), or (B, 2, M) of M models. Returns (B[, M])."""
    return rewards[:, 0] - rewards[:, 1]


# ------ reward models


def bradley_terry(rewards):
    """Fits a reward model to preferences: -log sigmoid(r(x, y1) - r(x, y2)).

    Bradley & Terry (1952); Rafailov et al. (2023), Eq. 2. rewards: (B, 2). Returns (B,).
    """
    return -F.logsigmoid(reward_margin(rewards))


# ------ policies: the losses that use the labels


def dpo(logps, ref_logps, beta=1.0):
    """Direct preference optimisation: -log sigmoid(beta * h), Bradley-Terry on the implicit reward.

    Rafailov et al. (2023), Eq. 7. With one label per pair it has no finite minimum: widening the
    margin always pays, and nothing keeps the chosen response's log-prob where it is.
    logps, ref_logps: (B, 2). Returns (B,).
    """
    h = log_ratio_margin(logps, ref_logps)                      # (B,)
    return -F.logsigmoid(beta * h)


def ipo(logps, ref_logps, tau=0.1):
    """Identity preference optimisation: (h - 1 / (2 tau))^2, a margin to reach, not to widen.

    Azar et al. (2023), Eq. 17. logps, ref_logps: (B, 2) summed log-probs. Returns (B,).
    """
    h = log_ratio_margin(logps, ref_logps)                      # (B,)
    return (h - 1 / (2 * tau)) ** 2


def ipo_per_token(logps, ref_logps, lengths, tau=0.1):
    """IPO on the mean log-prob of a token, as TRL has it. lengths: (B, 2) tokens. Returns (B,)."""
    return ipo(logps / lengths, ref_logps / lengths, tau)


def p_dpo(logps, ref_logps, kl, beta=1.0, gamma=GAMMA):
    """Pessimistic DPO: -log sigmoid(beta * h) + gamma * KL(ref || pi).

    The paper's p-DPO. logps, ref_logps: (B, 2); kl: (B,), see forward_kl. Returns (B,).
    """
    h = log_ratio_margin(logps, ref_logps)                      # (B,)
    return -F.logsigmoid(beta * h) + gamma * kl


# ------ policies: reward-model distillation


def d_dpo(logps, ref_logps, rewards, beta=1.0):
    """Reward-model distillation: (r(y1) - r(y2) - beta * h)^2.

    The paper's d-DPO. The implicit reward margin regresses on the explicit one, which is finite, so
    that there is a margin at which to stop. The labels enter only through r: a pair needs none.
    logps, ref_logps: (B, 2); rewards: (B, 2, M), of which the mean over M models is distilled
    (usually M = 1). Returns (B,).
    """
    h = log_ratio_margin(logps, ref_logps)                      # (B,)
    target = reward_margin(rewards.mean(dim=2))                 # (B,)
    return (target - beta * h) ** 2


def dp_dpo(logps, ref_logps, rewards, kl, beta=1.0, gamma=GAMMA):
    """Pessimistic distillation: (r(y1) - r(y2) - beta * h)^2 + gamma * KL(ref || pi).

    The paper's dp-DPO. logps, ref_logps: (B, 2); rewards: (B, 2, M), of which the mean is
    distilled; kl: (B,), see forward_kl. Returns (B,).
    """
    h = log_ratio_margin(logps, ref_logps)                      # (B,)
    target = reward_margin(rewards.mean(dim=2))                 # (B,)
    return (target - beta * h) ** 2 + gamma * kl


def e_dpo(logps, ref_logps, rewards, kl, beta=1.0, gamma=GAMMA):
    """Distils a family of reward models: min_m (r_m(y1) - r_m(y2) - beta * h)^2 + gamma * KL.

    The paper's e-DPO. The minimum accepts every policy that *some* member of the family explains;
    the KL term, the pessimism, prefers the one of them that is nearest to the reference. As the
    paper states the objective, one member serves all pairs (the minimum is outside the
    expectation). What it runs, and what this is, takes a minimum for each pair: a larger family,
    whose members take turns.
    logps, ref_logps: (B, 2); rewards: (B, 2, M), of M members; kl: (B,), see forward_kl.
    Returns (B,).
    """
    h = log_ratio_margin(logps, ref_logps)                                      # (B,)
    targets = reward_margin(rewards)                                            # (B, M)
    return (targets - beta * h[:, None]).square().min(dim=1).values + gamma * kl


def forward_kl(logps_of_ref_samples, ref_logps_of_ref_samples):
    """Estimates KL(ref || pi) = E_{y ~ ref}[logp_ref(y) - logp_pi(y)], in nats per response.

    The pessimism of p-DPO, dp-DPO and e-DPO: it penalises the policy for losing responses that the
    reference would give. The same gamma is a weaker brake on d-DPO than on DPO: at the reference
    |dloss / dh| is beta / 2 in DPO and 2 beta |r1 - r2| in d-DPO, which is larger once the reward
    margin exceeds 1/4.

    Unbiased for a policy that was not trained on these samples; an estimate may be negative.
    logps_of_ref_samples, ref_logps_of_ref_samples: (B, S), S samples per prompt. Returns (B,).
    """
    return (ref_logps_of_ref_samples - logps_of_ref_samples).mean(dim=1)


def sft(logps):
    """Supervised fine-tuning: -logp(y|x), summed over all demonstrations of a prompt; the training
    loop divides by tokens. logps: (B, K) of K demonstrations. Returns (B,)."""
    return -logps.sum(dim=1)


# ------ the distillation losses by themselves, without a KL


def distill(logps, ref_logps, rewards, beta):
    """Distils one reward model: (r(y1) - r(y2) - beta * h)^2. logps, ref_logps, rewards: (B, 2).
    Returns (B,)."""
    return d_dpo(logps, ref_logps, rewards[:, :, None], beta)


def ensemble_distill(logps, ref_logps, rewards, beta):
    """Distils the reward model that fits best, pair by pair: min_m (r_m(y1) - r_m(y2) - beta h)^2.
    logps, ref_logps: (B, 2); rewards: (B, 2, M). Returns (B,)."""
    return e_dpo(logps, ref_logps, rewards, kl=0.0, beta=beta, gamma=0.0)


def best_member(logps, ref_logps, rewards, beta):
    """Tells which reward model e-DPO's minimum picks for each pair. logps, ref_logps: (B, 2);
    rewards: (B, 2, M). Returns (B,) int64, from 0 to M - 1."""
    h = log_ratio_margin(logps, ref_logps)                                      # (B,)
    return (reward_margin(rewards) - beta * h[:, None]).square().argmin(dim=1)


# ------ the table of losses

# Every beta and tau above was chosen on validation prompts of TinyTLDR, with as many trials for
# each (results/figure2/chosen.json); but not that of IPO per token.
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


def needs(name):
    """Lists what a loss needs to know: its parameters without a default, such as ref_logps, rewards
    or kl."""
    parameters = inspect.signature(LOSSES[name]).parameters.values()
    return [p.name for p in parameters if p.default is p.empty]


def knobs(name):
    """Returns a loss's flags with their defaults, such as {"beta": 1.0}."""
    parameters = inspect.signature(LOSSES[name]).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def batch_loss(name, logps, batch, **knobs):
    """Computes a loss for every pair of a batch, times the pair's weight in its row.

    name: a row of LOSSES. logps: (B, K), of all responses. batch: a TreeBatch (data.py), which says
    which responses are pairs and has the columns that the loss needs. knobs: the loss's flags, with
    gamma as it is now. Returns (P,); for sft (B,).
    """
    if name == "sft":
        return sft(logps)
    columns = {"logps": logps, "ref_logps": batch.ref_logps, "rewards": batch.rewards,
               "lengths": batch.lengths}
    arguments = {need: batch.pair_up(columns[need]) for need in needs(name) if need != "kl"}
    if "kl" in needs(name):
        kl = forward_kl(logps.gather(1, batch.samples), batch.ref_logps.gather(1, batch.samples))
        arguments["kl"] = kl[batch.pair_row]                                    # (P,)
    return batch.pair_weight * LOSSES[name](**arguments, **knobs)
