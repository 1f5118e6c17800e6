"""Every loss in the repository, each a pure function of a few numbers per example. Read this file first.

Notation, shared by all of them (and by the paper, Fisch et al., "Robust Preference Optimization through Reward Model
Distillation", TMLR 2025, arXiv 2405.19316):

    x, y            a prompt and a response
    pi, ref         the policy being trained and the frozen reference policy (the supervised fine-tuned model)
    logp(y|x)       sum over the response's tokens, its end-of-text token included, of log p(token | x, tokens before)
    h               log-ratio margin: [logp_pi(y1) - logp_ref(y1)] - [logp_pi(y2) - logp_ref(y2)]
    beta * h        implicit reward margin: the policy seen as a reward model (Rafailov et al. 2023, Eq. 5)
    r(x, y)         explicit reward; only differences between responses to one prompt mean anything

Conventions: column 0 is the chosen response and column 1 the rejected one; log-probabilities are in nats, as floats;
every function returns one loss per example, shape (B,), and never reduces over the batch (e-DPO's `per="batch"` picks
its reward model with a batch mean, and still returns one loss per example). K ranked responses, the best one first, may
stand where a policy's loss asks for a pair: (B, K) instead of (B, 2), and the loss is the mean over all pairs of the K (e-DPO's:
the smallest of its members' means).
"""
import torch
import torch.nn.functional as F


def margins(values):
    """Differences between responses, the better one first. values: (B, K, ...). Returns (B, K (K - 1) / 2, ...): of a pair
    just value 0 - value 1; of three responses 0 - 1, 0 - 2, 1 - 2."""
    better, worse = torch.triu_indices(values.size(1), values.size(1), offset=1, device=values.device)
    return values[:, better] - values[:, worse]


def log_ratio_margin(policy, ref):
    """h = [logp_pi(y1) - logp_ref(y1)] - [logp_pi(y2) - logp_ref(y2)], in nats.

    policy, ref: (B, 2) summed response log-probs. Returns (B, 1); for K responses (B, K (K - 1) / 2), one h per pair.
    """
    return margins(policy - ref)


def bradley_terry(rewards):
    """How a reward model learns from preferences: -log sigmoid(r(x, y_w) - r(x, y_l)).

    Bradley & Terry (1952); Rafailov et al. (2023), Eq. 2. rewards: (B, 2). Returns (B,). Training uses the next function.
    """
    return -F.logsigmoid(rewards[:, 0] - rewards[:, 1])


def plackett_luce(rewards):
    """How a reward model learns from a ranking: -log of the chance that responses picked one after the other, each with
    probability softmax(rewards of those that are left), come out in this order. With K = 2 it is Bradley-Terry.

    Luce (1959), Plackett (1975). rewards: (B, K), the best response first. Returns (B,).
    """
    return sum(-F.logsigmoid(rewards[:, k] - rewards[:, k + 1:].logsumexp(dim=1)) for k in range(rewards.size(1) - 1))


def dpo(policy, ref, beta):
    """Direct preference optimisation: -log sigmoid(beta * h), Bradley-Terry on the implicit reward.

    Rafailov et al. (2023), Eq. 7. With one label per pair (and no contradictory cycle of them) it has no finite minimum:
    it always pays to widen the margin, and nothing in it says that the chosen log-prob should stay where it is.
    policy, ref: (B, 2) summed response log-probs. Returns (B,); ln 2 where policy == ref.
    """
    return -F.logsigmoid(beta * log_ratio_margin(policy, ref)).mean(dim=1)


def ipo(policy, ref, tau):
    """Identity preference optimisation: (h - 1 / (2 tau))^2, a margin to reach instead of one to widen for ever.

    Azar et al. (2023), Eq. 17. policy, ref: (B, 2) summed response log-probs, as in that paper; pass per-token means to
    get the variant that TRL uses. Returns (B,); 1 / (4 tau^2) where policy == ref.
    """
    return ((log_ratio_margin(policy, ref) - 1 / (2 * tau)) ** 2).mean(dim=1)


def distill(policy, ref, rewards, beta):
    """Reward-model distillation, d-DPO: (r(y1) - r(y2) - beta * h)^2.

    The paper's section on reward model distillation: the implicit reward margin regresses on the explicit one. Finite
    targets, so no run-away, and the labels enter only through r: a pair may be unlabelled, and the order is immaterial.
    policy, ref: (B, 2) summed response log-probs; rewards: (B, 2). Returns (B,); (r(y1) - r(y2))^2 where policy == ref.
    """
    return ((margins(rewards) - beta * log_ratio_margin(policy, ref)) ** 2).mean(dim=1)


def ensemble_distill(policy, ref, rewards, beta, per="example"):
    """Distillation from a family of reward models, e-DPO's first term: min_m (r_m(y1) - r_m(y2) - beta * h)^2.

    The paper's section on pessimistic reward model distillation: with the forward KL below, the policy stays close to
    the reference among those that *some* member of the family explains. Gradients flow through the best member only.
    per="example" takes the minimum for each example (what the paper runs); per="batch" takes one member for the whole
    batch, the objective as stated, where the minimum stands outside the expectation.
    policy, ref: (B, 2) summed response log-probs; rewards: (B, 2, M), M members. Returns (B,).
    """
    errors = margins(rewards) - beta * log_ratio_margin(policy, ref).unsqueeze(2)      # (B, pairs, M)
    losses = (errors ** 2).mean(dim=1)                                                 # (B, M)
    if per == "example":
        return losses.min(dim=1).values
    if per == "batch":
        return losses[:, losses.detach().mean(dim=0).argmin()]
    raise ValueError(f'per must be "example" or "batch", not {per!r}')


def forward_kl(policy_on_ref_samples, ref_on_ref_samples):
    """Monte-Carlo estimate of KL(ref || pi) = E_{y ~ ref}[logp_ref(y) - logp_pi(y)], in nats per response.

    The pessimism of p-DPO, dp-DPO and e-DPO: it punishes the policy for forgetting what the reference would say. The
    estimate is unbiased for a pi that does not depend on the samples, so not for one trained on these very samples; a single
    one may be negative. They are drawn once and cached.
    policy_on_ref_samples, ref_on_ref_samples: (B, S) log-probs of S samples from ref for each prompt. Returns (B,).
    """
    return (ref_on_ref_samples - policy_on_ref_samples).mean(dim=1)


PREFERENCE_LOSSES = ("dpo", "ipo", "d-dpo", "p-dpo", "dp-dpo", "e-dpo")
NEEDS_REWARDS = ("d-dpo", "dp-dpo", "e-dpo")     # distil from explicit rewards
PESSIMISTIC = ("p-dpo", "dp-dpo", "e-dpo")       # add gamma * KL(ref || pi)


def preference_loss(name, policy, ref, rewards=None, beta=0.1, tau=0.1, gamma=0.0, per="example", K=2):
    """The six objectives by name: what each is made of.

    policy, ref: (B, K) log-probs of chosen and rejected, or (B, K + S) with S samples from ref after them for the
    pessimistic losses; rewards: (B, K, M) for the distilling ones (d-DPO and dp-DPO use their mean over M; e-DPO the
    best). Returns (B,).
    """
    pair, ref_pair = policy[:, :K], ref[:, :K]
    if name in ("dpo", "p-dpo"):
        losses = dpo(pair, ref_pair, beta)
    elif name == "ipo":
        losses = ipo(pair, ref_pair, tau)
    elif name in ("d-dpo", "dp-dpo"):
        losses = distill(pair, ref_pair, rewards.mean(dim=2), beta)
    elif name == "e-dpo":
        losses = ensemble_distill(pair, ref_pair, rewards, beta, per)
    else:
        raise ValueError(f"no loss is called {name!r}: choose from {', '.join(PREFERENCE_LOSSES)}")
    if name in PESSIMISTIC:
        losses = losses + gamma * forward_kl(policy[:, K:], ref[:, K:])
    return losses


def loss_at_reference(name, rewards, tau):
    """What `preference_loss` must give where policy == ref, derived by hand. With the check that the policy's log-probs
    are the cached ones of the reference, it is what train_policy.py asserts before step 0.

    rewards: (B, K, M) for the distilling losses, else None. Returns a number, or (B,) where it depends on the rewards.
    """
    if name in ("dpo", "p-dpo"):
        return torch.tensor(2.0).log()                               # -log sigmoid(0)
    if name == "ipo":
        return torch.tensor(1 / (4 * tau ** 2))                      # (0 - 1 / (2 tau))^2
    if name != "e-dpo":
        rewards = rewards.mean(dim=2, keepdim=True)
    # The mean square of all differences of K numbers is twice their sample variance; e-DPO has the member that spreads least.
    return 2 * rewards.var(dim=1).min(dim=1).values
