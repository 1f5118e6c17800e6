"""Defines other people's losses for preference pairs, in the form of losses.py. You don't need this
file to understand the rest. Start here if you want to compare losses, or to write the next one.

    python train_policy.py --loss=simpo             # any of them, by its name in the table below
    python experiments/zoo.py --draw                # docs/losses.md: what each of them does

Each docstring has the formula, the idea in a sentence or two, and where it was published. All
losses take B pairs and return one number for each, (B,). As in losses.py, h is the log-ratio
margin, column 0 is the chosen response and column 1 the rejected one. Parameters without a default
are columns that the loss needs; those with a default are its flags. There are a few more letters:

    u, v        log-ratio logp_pi - logp_ref of the chosen and of the rejected response: h = u - v
    |y|         tokens in a response, end of text included
    sigma       the logistic function, 1 / (1 + exp(-x))

Papers use a few Greek letters for many things. Here the name of a flag says what the number is for:
`epsilon` is the assumed fraction of wrong labels, `weight` is the weight of a second term. beta has
the same meaning as in losses.py.
"""
import math

import torch
import torch.nn.functional as F

from losses import COUPLED, LOSSES, MORE, UNPAIRED, d_dpo, dpo, log_ratio_margin, reward_margin

# ------ margins


def log_ratios(logps, ref_logps):
    """Computes u and v: by how many nats the log-prob of each response has changed, two of (B,)."""
    return (logps - ref_logps).unbind(dim=1)


def mean_logps(logps, lengths):
    """Computes the mean log-prob of a token, of the chosen and the rejected response, (B,) each."""
    return (logps / lengths).unbind(dim=1)


# ------ another curve over the same margin: these depend on h alone


def hinge(logps, ref_logps, beta=1.0):
    """Computes max(0, 1 - beta h).

    A pair stops counting once its margin is 1 / beta, as in a support vector machine.

    SLiC: Zhao et al. (2023), arXiv 2305.10425, Sec. 2; on log-ratios as in RSO, arXiv 2309.06657.
    """
    return F.relu(1 - beta * log_ratio_margin(logps, ref_logps))


def squared_hinge(logps, ref_logps, beta=1.0):
    """Computes max(0, 1 - beta h)^2.

    The hinge with a gradient that fades out before the margin is reached, and grows with the error.

    GPO: Tang et al. (2024), arXiv 2402.05749, Table 1 (truncated squared loss).
    """
    return F.relu(1 - beta * log_ratio_margin(logps, ref_logps)) ** 2


def exponential(logps, ref_logps, beta=1.0):
    """Computes exp(-beta h).

    The loss of boosting: a pair that is far on the wrong side outweighs all others together.

    GPO: Tang et al. (2024), arXiv 2402.05749, Table 1.
    """
    return (-beta * log_ratio_margin(logps, ref_logps)).exp()


def discopop(logps, ref_logps, beta=1.0, blend=0.05):
    """Computes (1 - s) * -log sigma(beta h) + s * exp(-beta h), where s = sigma(beta h / blend).

    A language model proposed it when asked for new losses: DPO on pairs that are wrong, the
    exponential on pairs that are right. Between the two it has a dent, so it is not convex.

    DiscoPOP: Lu et al. (2024), arXiv 2406.08414, Eq. 5 (blend is their tau).
    """
    margin = beta * log_ratio_margin(logps, ref_logps)
    s = torch.sigmoid(margin / blend)
    s_exp = (F.logsigmoid(margin / blend) - margin).exp()       # s * exp(-margin), without overflow
    return (1 - s) * -F.logsigmoid(margin) + s_exp


def cdpo(logps, ref_logps, beta=1.0, epsilon=0.1):
    """Computes -(1 - epsilon) log sigma(beta h) - epsilon log sigma(-beta h).

    Conservative DPO: labels are wrong with probability epsilon, so the margin to reach is finite,
    log((1 - epsilon) / epsilon) / beta.

    cDPO: Mitchell (2023), "A note on DPO with noisy preferences & relationship to IPO".
    """
    margin = beta * log_ratio_margin(logps, ref_logps)
    return -(1 - epsilon) * F.logsigmoid(margin) - epsilon * F.logsigmoid(-margin)


def robust_dpo(logps, ref_logps, beta=1.0, epsilon=0.1):
    """Computes (-(1 - epsilon) log sigma(beta h) + epsilon log sigma(-beta h)) / (1 - 2 epsilon).

    Where a fraction epsilon of the labels is flipped, its mean is DPO's mean on the right labels.
    For that, pairs are pushed apart more than in DPO, and the loss has no lower bound.

    rDPO: Chowdhury et al. (2024), arXiv 2403.00409, Sec. 3.1.
    """
    margin = beta * log_ratio_margin(logps, ref_logps)
    right, flipped = -F.logsigmoid(margin), -F.logsigmoid(-margin)
    return ((1 - epsilon) * right - epsilon * flipped) / (1 - 2 * epsilon)


def exo(logps, ref_logps, beta=1.0, epsilon=1e-3):
    """Computes KL(p || q) for p = (sigma(beta h), sigma(-beta h)), q = (1 - epsilon, epsilon).

    DPO is the KL in the other direction, from labels to policy. This one seeks a mode: a pair that
    is far on the wrong side is given up, its gradient vanishes.

    EXO: Ji et al. (2024), arXiv 2402.00856, Eq. 16, for two responses with a label.
    """
    margin = beta * log_ratio_margin(logps, ref_logps)
    for_chosen = F.logsigmoid(margin) - math.log(1 - epsilon)
    for_rejected = F.logsigmoid(-margin) - math.log(epsilon)
    return torch.sigmoid(margin) * for_chosen + torch.sigmoid(-margin) * for_rejected


# ------ each response by itself: the chosen one up, the rejected one down


def nca(logps, ref_logps, beta=1.0):
    """Computes -log sigma(beta u) - 1/2 log sigma(-beta u) - 1/2 log sigma(-beta v).

    Noise-contrastive: is a response data or a sample from the reference? The second term pulls the
    chosen log-ratio back to a finite place, log(2) / beta.

    NCA: Chen et al. (2024), arXiv 2402.05369, Sec. 4, for pairs.
    """
    u, v = log_ratios(logps, ref_logps)
    return -F.logsigmoid(beta * u) - 0.5 * (F.logsigmoid(-beta * u) + F.logsigmoid(-beta * v))


def bco(logps, ref_logps, beta=1.0):
    """Computes -log sigma(beta u - delta) - log sigma(delta - beta v), delta: the mean reward.

    A classifier of good and bad responses, whose threshold moves along with the rewards beta u and
    beta v. The paper keeps a running mean of them. Here it is the batch's, without a gradient.

    BCO: Jung et al. (2024), arXiv 2404.04656, Sec. 4.
    """
    u, v = log_ratios(logps, ref_logps)
    delta = beta * (u + v).detach().mean() / 2
    return -F.logsigmoid(beta * u - delta) - F.logsigmoid(delta - beta * v)


def kto(logps, ref_logps, beta=1.0, desirable_weight=1.0, undesirable_weight=1.0):
    """Computes D sigma(beta (z - u)) + U sigma(beta (v - z)), where z = max(0, mean(u, v)).

    Prospect theory: gains and losses are felt against a reference point z, the KL to the reference
    model, and less and less with their size. The paper estimates z from responses to other prompts
    of the batch; here it is the mean log-ratio of the batch's own, without a gradient. D and U are
    the two weights. On rows with one labelled response, kto_unpaired is what is computed.

    KTO: Ethayarajh et al. (2024), arXiv 2402.01306, the loss in Sec. 4.1, which TRL
    calls Eq. 7 (D, U are their lambda_D, lambda_U).
    """
    u, v = log_ratios(logps, ref_logps)
    z = (u + v).detach().mean().clamp(min=0) / 2
    return (desirable_weight * torch.sigmoid(beta * (z - u))
            + undesirable_weight * torch.sigmoid(beta * (v - z)))


def kto_unpaired(u, desirable, mismatched, beta=1.0, desirable_weight=1.0, undesirable_weight=1.0):
    """Computes D sigma(beta (z - u)) of a desirable response, U sigma(beta (u - z)) of another one,
    where z = max(0, mean(mismatched)).

    KTO as it was published, for single responses that people wanted or did not want. z estimates
    KL(pi || ref) as the paper and TRL do: by responses to other prompts of the batch, without a
    gradient. D and U, the two weights, make up for labels of which one kind is rare.
    u: (B,) log-ratios of B responses. desirable: (B,) bool. mismatched: (B,) log-ratios of
    responses to other prompts, each read after a prompt of this batch. Returns (B,).

    KTO: Ethayarajh et al. (2024), arXiv 2402.01306, the loss and the estimate of z_0 in Sec. 4.1.
    """
    z = mismatched.detach().mean().clamp(min=0)
    losses = torch.sigmoid(beta * torch.where(desirable, z - u, u - z))
    return torch.where(desirable, desirable_weight, undesirable_weight) * losses


def apo_zero(logps, ref_logps, beta=1.0):
    """Computes -sigma(beta u) + sigma(beta v).

    For chosen responses that are better than what the model says: those go up, rejected ones go
    down, each relative to the reference ("zero") and with a gradient that fades out on both sides.

    APO-zero: D'Oosterlinck et al. (2024), arXiv 2408.06266, Eq. 7.
    """
    u, v = log_ratios(logps, ref_logps)
    return -torch.sigmoid(beta * u) + torch.sigmoid(beta * v)


def apo_down(logps, ref_logps, beta=1.0):
    """Computes sigma(beta u) - sigma(beta h).

    For chosen responses that are worse than what the model says: both go down, and the rejected one
    further. At the reference the two pulls on the chosen response cancel.

    APO-down: D'Oosterlinck et al. (2024), arXiv 2408.06266, Eq. 8.
    """
    u, v = log_ratios(logps, ref_logps)
    return torch.sigmoid(beta * u) - torch.sigmoid(beta * (u - v))


def sppo(logps, ref_logps, eta=3.0):
    """Computes (u - eta / 2)^2 + (v + eta / 2)^2.

    Self-play: the log-ratio to reach is eta (P - 1/2), where P is the probability of winning. With
    one label P is 1 or 0, so each response has a target of its own.

    SPPO: Wu et al. (2024), arXiv 2405.00675, Eq. 4.7, for one round and hard labels.
    """
    u, v = log_ratios(logps, ref_logps)
    return (u - eta / 2) ** 2 + (v + eta / 2) ** 2


# ------ DPO, and the chosen response held up


def dpop(logps, ref_logps, beta=1.0, weight=5.0):
    """Computes -log sigma(beta (h - weight * max(0, -u))).

    DPO-positive: where the chosen response has become less likely than it was, the margin shrinks
    by a multiple of that.

    DPOP: Pal et al. (2024), arXiv 2402.13228, Eq. 3 (weight is their lambda).
    """
    u, v = log_ratios(logps, ref_logps)
    return -F.logsigmoid(beta * (u - v - weight * F.relu(-u)))


def rpo(logps, ref_logps, lengths, beta=1.0, weight=1.0):
    """Computes -log sigma(beta h) - weight * logp(chosen) / |chosen|.

    DPO, and supervised fine-tuning on the chosen response so that it can't lose its probability.

    DPO + NLL, also RPO: Pang et al. (2024), arXiv 2404.19733, Eq. 1 (weight is their alpha).
    """
    chosen, _ = mean_logps(logps, lengths)
    return dpo(logps, ref_logps, beta) - weight * chosen


# ------ the log-ratio measured otherwise


def alpha_dpo(logps, ref_logps, beta=1.0, alpha=0.5):
    """Computes -log sigma(beta f(u) - beta f(v)), where f(x) = (1 - exp(-alpha x)) / alpha.

    DPO derived from an alpha-divergence in place of the reverse KL: what has lost probability
    counts exponentially more. alpha = 0 is DPO, alpha = 1 the forward KL.

    f-DPO: Wang et al. (2023), arXiv 2309.16240, Table 1.
    """
    u, v = log_ratios(logps, ref_logps)
    return -F.logsigmoid(beta / alpha * (exp(-alpha * v) - exp(-alpha * u)))


def js_dpo(logps, ref_logps, beta=1.0):
    """Computes -log sigma(beta f(u) - beta f(v)), where f(x) = log(2 sigma(x)).

    DPO derived from the Jensen-Shannon divergence: f has a ceiling, so a response that has become
    more likely counts little, and the margin has to come from the rejected one.

    f-DPO: Wang et al. (2023), arXiv 2309.16240, Table 1.
    """
    u, v = log_ratios(logps, ref_logps)
    return -F.logsigmoid(beta * (F.logsigmoid(u) - F.logsigmoid(v)))


def chi_po(logps, ref_logps, beta=1.0, r_max=10.0):
    """Computes -log sigma(clip(beta f(u) - beta f(v), +-2 r_max)), where f(x) = exp(x) + x.

    DPO with a chi-squared divergence added to the KL, which is pessimistic about what the reference
    rarely says: a small gain in probability of a likely response makes a large margin.

    chi-PO: Huang et al. (2024), arXiv 2407.13399, Algorithm 1.
    """
    u, v = log_ratios(logps, ref_logps)
    margin = beta * ((exp(u) + u) - (exp(v) + v))
    return -F.logsigmoid(margin.clamp(-2 * r_max, 2 * r_max))


def exp(x):
    """Computes exp(x), and exp(20) from x = 20 on: what a probability has gained by more than 20
    nats counts no more, and float32 does not overflow."""
    return x.clamp(max=20).exp()


def aot(logps, ref_logps, beta=1.0):
    """Computes -log sigma(beta (m - m_ref)), where m, m_ref of a batch are sorted, then subtracted.

    Optimal transport: m is logp(chosen) - logp(rejected). Not every pair has to beat the reference,
    but the distribution of m over the batch has to, quantile by quantile.

    AOT, paired: Melnyk et al. (2024), arXiv 2406.05882, Sec. 3, in the batch as it comes.
    """
    margin, ref_margin = reward_margin(logps), reward_margin(ref_logps)
    rank = margin.argsort().argsort()                       # (B,) of each pair in the batch
    return -F.logsigmoid(beta * (margin - ref_margin.sort().values[rank]))


def aot_unpaired(logps, ref_logps, beta=1.0):
    """Computes -log sigma(beta (u - v)), where u, v of a batch are sorted, then subtracted.

    Optimal transport without pairs: the k-th best chosen response is compared with the k-th best
    rejected one, whatever their prompts.

    AOT, unpaired: Melnyk et al. (2024), arXiv 2406.05882, Sec. 3, in the batch as it comes.
    """
    u, v = log_ratios(logps, ref_logps)
    rank = u.argsort().argsort()                            # (B,)
    return -F.logsigmoid(beta * (u - v.sort().values[rank]))


# ------ length


def ln_dpo(logps, ref_logps, lengths, beta=10.0):
    """Computes -log sigma(beta (u / |chosen| - v / |rejected|)).

    Length-normalised DPO: log-ratios per token, so a long response gains nothing by its length.

    Tulu 3: Lambert et al. (2024), arXiv 2411.15124, length-normalized DPO.
    """
    return dpo(logps / lengths, ref_logps / lengths, beta)


def r_dpo(logps, ref_logps, lengths, beta=1.0, per_token=0.05):
    """Computes -log sigma(beta h + per_token (|chosen| - |rejected|)).

    A length penalty taken out of the reward: where the longer response was chosen, its length
    explains part of the label, and the policy has less to learn.

    R-DPO: Park et al. (2024), arXiv 2403.19159 (per_token is their alpha).
    """
    longer_by = reward_margin(lengths)
    return -F.logsigmoid(beta * log_ratio_margin(logps, ref_logps) + per_token * longer_by)


# ------ without a reference


def simpo(logps, lengths, beta=10.0, target=1.0):
    """Computes -log sigma(beta (mean logp(chosen) - mean logp(rejected)) - target).

    The reward is the mean log-prob of a token, which is also what sampling goes by.

    SimPO: Meng et al. (2024), arXiv 2405.14734, Eq. 6 (target is their gamma).
    """
    chosen, rejected = mean_logps(logps, lengths)
    return -F.logsigmoid(beta * (chosen - rejected) - target)


def orpo(logps, lengths, weight=1.0):
    """Computes -p - weight * log sigma(log-odds(p) - log-odds(q)), p and q: mean logp of a token.

    Supervised fine-tuning, and a term that sets the odds of the chosen response against those of
    the rejected one. p is of the chosen response, q of the rejected one.

    ORPO: Hong et al. (2024), arXiv 2403.07691, Eqs. 6 and 7 (weight is their lambda).
    """
    means = (logps / lengths).clamp(max=-1e-6)                          # (B, 2), p and q
    log_odds = means - (-torch.expm1(means)).log()
    return -means[:, 0] - weight * F.logsigmoid(reward_margin(log_odds))


def cpo(logps, beta=1.0, weight=1.0):
    """Computes -log sigma(beta (logp(chosen) - logp(rejected))) - weight * logp(chosen).

    DPO with a uniform reference, which then drops out, and supervised fine-tuning to stay in place.

    CPO: Xu et al. (2024), arXiv 2401.08417, Eq. 3 and the term after it, with weight 1.
    """
    return -F.logsigmoid(beta * reward_margin(logps)) - weight * logps[:, 0]


def slic(logps, target=1.0, weight=0.1):
    """Computes max(0, target - logp(chosen) + logp(rejected)) - weight * logp(chosen).

    SLiC as it was published: the hinge on log-probs themselves, and fine-tuning as the regulariser.

    SLiC-HF: Zhao et al. (2023), arXiv 2305.10425, Sec. 2 (their delta and lambda).
    """
    return F.relu(target - reward_margin(logps)) - weight * logps[:, 0]


def rrhf(logps, lengths, weight=0.1):
    """Computes max(0, mean logp(rejected) - mean logp(chosen)) - weight * logp(chosen).

    Rank responses by their mean log-prob as people do, without a margin, and imitate the best one.

    RRHF: Yuan et al. (2023), arXiv 2304.05302, Sec. 3, where the weight is 1.
    """
    chosen, rejected = mean_logps(logps, lengths)
    return F.relu(rejected - chosen) - weight * logps[:, 0]


# ------ with rewards


def odpo(logps, ref_logps, rewards, beta=1.0, offset=1.0):
    """Computes -log sigma(beta h - offset (r(chosen) - r(rejected))).

    DPO that asks for a wider margin where the chosen response is better by more. In the paper the
    difference goes through an increasing function, often the logarithm; here it is as it is.

    ODPO: Amini et al. (2024), arXiv 2402.10571 (offset is their alpha).
    """
    gap = reward_margin(rewards.mean(dim=2))
    return -F.logsigmoid(beta * log_ratio_margin(logps, ref_logps) - offset * gap)


def rebel(logps, ref_logps, rewards, eta=1.0):
    """Computes (h / eta - (r(chosen) - r(rejected)))^2.

    Reinforcement learning as regression on differences of rewards, round after round. One round
    is d-DPO of losses.py with beta = 1 / eta: both papers found it in the same spring.

    REBEL: Gao et al. (2024), arXiv 2404.16767, Algorithm 1, for one round.
    """
    return d_dpo(logps, ref_logps, rewards, 1 / eta)


ZOO = {
    "hinge": hinge,
    "squared-hinge": squared_hinge,
    "exponential": exponential,
    "discopop": discopop,
    "cdpo": cdpo,
    "robust-dpo": robust_dpo,
    "exo": exo,
    "nca": nca,
    "bco": bco,
    "kto": kto,
    "apo-zero": apo_zero,
    "apo-down": apo_down,
    "sppo": sppo,
    "dpop": dpop,
    "rpo": rpo,
    "alpha-dpo": alpha_dpo,
    "js-dpo": js_dpo,
    "chi-po": chi_po,
    "aot": aot,
    "aot-unpaired": aot_unpaired,
    "ln-dpo": ln_dpo,
    "r-dpo": r_dpo,
    "simpo": simpo,
    "orpo": orpo,
    "cpo": cpo,
    "slic": slic,
    "rrhf": rrhf,
    "odpo": odpo,
    "rebel": rebel,
}
MORE.update(ZOO)                        # now losses.py finds them by name
UNPAIRED["kto"] = kto_unpaired
COUPLED.update(["bco", "kto", "aot", "aot-unpaired"])


def all_losses():
    """Lists what --loss knows by name: the losses of losses.py, then these."""
    return list(LOSSES | ZOO)


# What TRL 1.16 calls them: {its trainer: {its loss_type or flag: (ours, what differs)}}.
TRL = {
    "DPOTrainer": {
        "sigmoid": ("dpo", ""),
        "ipo": ("ipo-per-token", "tau is its beta"),
        "hinge": ("hinge", ""),
        "exo_pair": ("exo", "epsilon is its label_smoothing"),
        "nca_pair": ("nca", ""),
        "robust": ("robust-dpo", "epsilon is its label_smoothing"),
        "bco_pair": ("bco", "TRL leaves out the shift delta, unlike the paper"),
        "sppo_hard": ("sppo", "eta is 1 / beta"),
        "aot": ("aot", ""),
        "aot_unpaired": ("aot-unpaired", ""),
        "apo_zero": ("apo-zero", "TRL adds 1, which has no gradient"),
        "apo_down": ("apo-down", "TRL adds 1, which has no gradient"),
        "discopop": ("discopop", "blend is its discopop_tau"),
        "sigmoid_norm": ("ln-dpo", ""),
        "sigmoid, sft": ("rpo", "TRL's mean is over all tokens of a batch, the paper's over those "
                                "of each response"),
        "f_divergence_type=alpha_divergence": ("alpha-dpo", "alpha is 1 - f_alpha_divergence_coef"),
        "f_divergence_type=forward_kl": ("alpha-dpo", "alpha is 1"),
        "f_divergence_type=js_divergence": ("js-dpo", ""),
    },
    "CPOTrainer": {
        "sigmoid": ("cpo", "weight is its cpo_alpha, of the mean over all tokens of a batch, where "
                           "the paper has the sum; with label_smoothing it is cdpo without a "
                           "reference"),
        "hinge": ("slic", "target is 1 / beta; the paper has no beta"),
        "simpo": ("simpo", "target is its simpo_gamma; with cpo_alpha=0"),
    },
    "ORPOTrainer": {
        "": ("orpo", "weight is its beta; TRL's first term is the mean over all tokens of a batch"),
    },
    "KTOTrainer": {
        "kto": ("kto", "on rows with one labelled response. On pairs, TRL takes them apart, and z "
                       "from responses to other prompts, as the paper does"),
        "apo_zero_unpaired": ("apo-zero", "on the two halves of a pair, plus 1"),
    },
    "RewardTrainer": {"": ("bradley_terry", "losses.py; the loss of train_rm.py")},
}
