"""Every loss in the repository, each a pure function of a few numbers per example. Read this first.

Notation, as in the paper (Fisch et al., "Robust Preference Optimization through Reward Model
Distillation", TMLR 2025, arXiv 2405.19316):

    x, y            a prompt and a response
    pi, ref         the policy being trained, and the frozen reference policy (the SFT model)
    logp(y|x)       sum over the response's tokens, end of text included, of log p(token | before)
    h               log-ratio margin: [logp_pi(y1) - logp_ref(y1)] - [logp_pi(y2) - logp_ref(y2)]
    beta * h        implicit reward margin: the policy read as a reward model
    r(x, y)         explicit reward; only differences between responses to one prompt mean anything

Column 0 is the chosen response and column 1 the rejected one. Log-probs are in nats. A loss
returns one number per example, (B,); the mean over the batch is the training loop's.
"""
import math
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F

# ------ the losses of a pair


def log_ratio_margin(logps, ref_logps):
    """h: by how many nats more than the reference the policy prefers the chosen response.

    logps, ref_logps: (B, 2) summed response log-probs of the policy and of the reference.
    Returns (B,).
    """
    log_ratio = logps - ref_logps                   # (B, 2)
    return log_ratio[:, 0] - log_ratio[:, 1]        # (B,)


def reward_margin(rewards):
    """r(x, y1) - r(x, y2). rewards: (B, 2), or (B, 2, M) of M models. Returns (B,) or (B, M)."""
    return rewards[:, 0] - rewards[:, 1]


def bradley_terry(rewards):
    """How a reward model learns from preferences: -log sigmoid(r(x, y1) - r(x, y2)).

    Bradley & Terry (1952); Rafailov et al. (2023), Eq. 2. rewards: (B, 2). Returns (B,).
    """
    return -F.logsigmoid(reward_margin(rewards))


def dpo(logps, ref_logps, beta):
    """Direct preference optimisation: -log sigmoid(beta * h), Bradley-Terry on the implicit reward.

    Rafailov et al. (2023), Eq. 7. With one label per pair it has no finite minimum: it always pays
    to widen the margin, and nothing says that the chosen log-prob should stay where it is.
    logps, ref_logps: (B, 2). Returns (B,).
    """
    h = log_ratio_margin(logps, ref_logps)
    return -F.logsigmoid(beta * h)


def ipo(logps, ref_logps, tau):
    """Identity preference optimisation: (h - 1 / (2 tau))^2, a margin to reach, not to widen.

    Azar et al. (2023), Eq. 17. logps, ref_logps: (B, 2) summed log-probs. Returns (B,).
    """
    h = log_ratio_margin(logps, ref_logps)
    return (h - 1 / (2 * tau)) ** 2


def ipo_per_token(logps, ref_logps, lengths, tau):
    """IPO on the mean log-prob of a token, as TRL has it. lengths: (B, 2) tokens. Returns (B,)."""
    return ipo(logps / lengths, ref_logps / lengths, tau)


def distill(logps, ref_logps, rewards, beta):
    """Reward-model distillation, d-DPO: (r(y1) - r(y2) - beta * h)^2.

    The paper's section on reward model distillation: the implicit reward margin regresses on the
    explicit one. The targets are finite, and the labels enter only through r: a pair needs none.
    logps, ref_logps, rewards: (B, 2). Returns (B,).
    """
    h = log_ratio_margin(logps, ref_logps)
    return (reward_margin(rewards) - beta * h) ** 2


def distill_mean(logps, ref_logps, rewards, beta):
    """d-DPO from the mean of M reward models (usually M = 1). rewards: (B, 2, M). Returns (B,)."""
    return distill(logps, ref_logps, rewards.mean(dim=2), beta)


def ensemble_distill(logps, ref_logps, rewards, beta, min_per="example"):
    """Distillation from a family of reward models, e-DPO: min_m (r_m(y1) - r_m(y2) - beta * h)^2.

    The paper's section on pessimistic reward model distillation. The minimum accepts every policy
    that *some* member explains; the pessimism is the forward KL below, which of these prefers the
    one nearest to the reference. As stated there, one member serves all data (the minimum is
    outside the expectation). The paper runs, and min_per="example" takes, a minimum for each pair:
    a larger family, whose members take turns. min_per="batch" takes one member per batch.
    logps, ref_logps: (B, 2); rewards: (B, 2, M), of M members. Returns (B,).
    """
    return best_member(member_losses(logps, ref_logps, rewards, beta), min_per)


def member_losses(logps, ref_logps, rewards, beta):
    """The d-DPO loss of each member by itself. rewards: (B, 2, M). Returns (B, M)."""
    members = [distill(logps, ref_logps, r, beta) for r in rewards.unbind(dim=2)]
    return torch.stack(members, dim=1)


def best_member(losses, min_per):
    """The losses of the member that fits best. losses: (B, M), M members. Returns (B,)."""
    return losses.gather(1, picked_member(losses, min_per)[:, None]).squeeze(1)


def picked_member(losses, min_per):
    """The number of that member, (B,)."""
    if min_per == "batch":
        return losses.mean(dim=0).argmin().expand(len(losses))
    if min_per == "example":
        return losses.argmin(dim=1)
    raise ValueError(f'min_per must be "example" or "batch", not {min_per!r}')


def picks(logps, ref_logps, rewards, beta, min_per):
    """How often ensemble_distill picks each member: the share of a row's pairs.
    logps, ref_logps: (B, K + S); rewards: (B, K, M). Returns {"picked_0": (B,), ...}."""
    B, K, M = rewards.size()
    pairs = [all_pairs(column[:, :K]) for column in (logps, ref_logps, rewards)]
    picked = picked_member(member_losses(*pairs, beta), min_per).view(B, -1)    # (B, P)
    return {f"picked_{m}": (picked == m).float().mean(dim=1) for m in range(M)}


def forward_kl(logps_of_ref_samples, ref_logps_of_ref_samples):
    """Estimate of KL(ref || pi) = E_{y ~ ref}[logp_ref(y) - logp_pi(y)], in nats per response.

    The pessimism of p-DPO, dp-DPO and e-DPO, added with a weight gamma: it punishes the policy for
    forgetting what the reference would say. The same gamma weighs less against d-DPO than against
    DPO: at the reference |dloss / dh| is beta / 2 in DPO and 2 beta |r1 - r2| in d-DPO, which is
    more where the margin is above 1/4.

    Unbiased for a policy that was not trained on these samples; it may be negative.
    logps_of_ref_samples, ref_logps_of_ref_samples: (B, S), S samples per prompt. Returns (B,).
    """
    return (ref_logps_of_ref_samples - logps_of_ref_samples).mean(dim=1)


def sft(logps):
    """Supervised fine-tuning: -logp(y|x) of all demonstrations in a row; the training loop divides
    by tokens instead of rows. logps: (B, K). Returns (B,)."""
    return -logps.sum(dim=1)


# ------ the table of losses


class Loss(NamedTuple):
    """A row of the table: all that the command line, the training loop and the tests ask of a loss.

    equation        (logps, *needs, **knobs) -> (B,), the KL term apart
    needs           columns, in order: ref_logps, rewards, lengths; ref_samples adds gamma * KL
    knobs           its flags, and their defaults
    at_reference    (ref_logps, rewards, lengths, **knobs) -> its value where the policy is the
                    reference, derived by hand; the training loop asserts it at step 0
    mean_over       what the training loop averages over: "rows" of a batch, or response "tokens"
    """
    equation: Callable
    needs: tuple
    knobs: dict
    at_reference: Callable = None
    mean_over: str = "rows"


GAMMA = (1e-4, 1e-2)    # the paper's: it grows linearly over training, from the first to the last

# Every beta and tau was chosen on validation prompts of TinyTLDR, with as many trials for each
# (results/figure2/chosen.json); but not that of IPO per token.
LOSSES = {
    "sft": Loss(sft, (), {}, mean_over="tokens"),
    "dpo": Loss(dpo, ("ref_logps",), {"beta": 1.0},
                lambda **_: math.log(2)),                                   # -log sigmoid(0)
    "ipo": Loss(ipo, ("ref_logps",), {"tau": 0.1},
                lambda tau, **_: 1 / (4 * tau**2)),                         # (0 - 1 / (2 tau))^2
    "ipo-per-token": Loss(ipo_per_token, ("ref_logps", "lengths"), {"tau": 0.1},
                          lambda tau, **_: 1 / (4 * tau**2)),
    "d-dpo": Loss(distill_mean, ("ref_logps", "rewards"), {"beta": 1.0},
                  lambda rewards, **_: reward_margin(rewards.mean(dim=2)) ** 2),   # (r1 - r2 - 0)^2
    "p-dpo": Loss(dpo, ("ref_logps", "ref_samples"), {"beta": 1.0, "gamma": GAMMA},
                  lambda **_: math.log(2)),
    "dp-dpo": Loss(distill_mean, ("ref_logps", "rewards", "ref_samples"),
                   {"beta": 1.0, "gamma": GAMMA},
                   lambda rewards, **_: reward_margin(rewards.mean(dim=2)) ** 2),
    "e-dpo": Loss(ensemble_distill, ("ref_logps", "rewards", "ref_samples"),
                  {"beta": 1.0, "gamma": GAMMA, "min_per": "example"},
                  lambda rewards, min_per, **_: best_member(reward_margin(rewards) ** 2, min_per)),
}
PREFERENCE_LOSSES = [name for name, loss in LOSSES.items() if loss.mean_over == "rows"]


def training_loss(name, logps, ref_logps=None, rewards=None, lengths=None, n_samples=0, gamma=0.0,
                  **knobs):
    """The loss called `name`, put together as its row of the table says.

    logps, ref_logps: (B, K + S) log-probs of K responses, then of S = n_samples samples from the
    reference; lengths: (B, K + S) tokens; rewards: (B, K, M). gamma: weight of the KL term now.
    knobs: the loss's others, such as beta. Returns (B,).
    """
    loss = LOSSES[name]
    K = logps.size(1) - n_samples
    columns = {"ref_logps": ref_logps, "rewards": rewards, "lengths": lengths}
    arguments = [columns[need][:, :K] for need in loss.needs if need != "ref_samples"]
    if K > 2 and loss.mean_over == "rows":      # a ranking
        losses = mean_over_pairs(loss.equation, logps[:, :K], *arguments, **knobs)
    else:
        losses = loss.equation(logps[:, :K], *arguments, **knobs)
    if "ref_samples" in loss.needs:
        losses = losses + gamma * forward_kl(logps[:, K:], ref_logps[:, K:])
    return losses


def loss_at_reference(name, ref_logps, rewards=None, lengths=None, n_samples=0, **knobs):
    """What `training_loss` must give where the policy is the reference, and the KL term 0; for the
    same arguments. Returns (B,)."""
    B = len(ref_logps)
    K = ref_logps.size(1) - n_samples
    columns = {"ref_logps": ref_logps, "rewards": rewards, "lengths": lengths}
    pairs = {column: all_pairs(v[:, :K]) for column, v in columns.items() if v is not None}
    value = torch.as_tensor(LOSSES[name].at_reference(**pairs, **knobs), device=ref_logps.device)
    return value.expand(len(pairs["ref_logps"])).view(B, -1).mean(dim=1)


# ------ rankings of K responses


def all_pairs(values):
    """Every pair of K ranked responses, the better one first, as a row of its own.
    values: (B, K, ...), the best first. Returns (B * P, 2, ...), P = K (K - 1) / 2."""
    K = values.size(1)
    pairs = torch.triu_indices(K, K, offset=1, device=values.device).t()      # (P, 2)
    return values[:, pairs].flatten(0, 1)


def mean_over_pairs(pair_loss, *columns, **knobs):
    """A pair loss, averaged over all pairs of a ranking. columns: (B, K, ...). Returns (B,)."""
    losses = pair_loss(*map(all_pairs, columns), **knobs)       # (B * P,)
    return losses.view(len(columns[0]), -1).mean(dim=1)         # (B,)


def plackett_luce(rewards):
    """How a reward model learns from a ranking: -log of the chance that responses, picked one after
    the other in proportion to exp(reward), come out in this order. Each pick is Bradley-Terry
    against the (soft) maximum of those left, so K = 2 is Bradley-Terry itself.

    Luce (1959), Plackett (1975). rewards: (B, K), the best response first. Returns (B,).
    """
    losses = 0
    for k in range(rewards.size(1) - 1):
        left = rewards[:, k + 1:].logsumexp(dim=1)                              # (B,)
        losses = losses + bradley_terry(torch.stack([rewards[:, k], left], dim=1))
    return losses
