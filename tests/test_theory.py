"""The theory, executable: what can be proved about DPO, distillation and pessimism, checked on
policies small enough to write down. A companion to read next to Fisch et al. (arXiv 2405.19316) and
losses.py; each docstring is a statement with its assumptions ("the paper's" or "ours"), and the
body is the check, by training or by enumeration.

There is a single prompt with a handful of responses, in float64. A *tabular* policy is the softmax
of a free logit for each response, so it can be any distribution with full support; it is trained
with this repository's own losses until the gradient vanishes (or, for DPO, to show that it never
does). Expectations are exact sums over the responses, not samples.
"""
import itertools
import math

import pytest
import torch

from losses import distill, dpo, ensemble_distill, forward_kl


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def reference(n, seed=0):
    """Log-probs (n,) of a reference policy with full support."""
    return numbers(n, seed=seed).log_softmax(0)


def of_pairs(values, pairs):
    """Values of the two responses of each pair, column 0 the chosen one: (n,) -> (B, 2), or
    (n, M) -> (B, 2, M)."""
    return values[torch.as_tensor(pairs)]


def kl(p, q):
    """KL(p || q) of log-probs (n,), exactly: the estimate of losses.forward_kl for each response,
    weighted by p."""
    return (p.exp() * forward_kl(q[:, None], p[:, None])).sum()


def total_variation(p, q):
    return 0.5 * (p.exp() - q.exp()).abs().sum().item()


def optimum(ref_logps, reward, beta):
    """Log-probs of the policy that maximises E_pi[r] - beta KL(pi || ref), which is
    pi* ~ ref * exp(r / beta)."""
    return (ref_logps + reward / beta).log_softmax(0)


def every_pair(n):
    return list(itertools.combinations(range(n), 2))


def minimise(loss, start, tolerance=1e-11):
    """Logits (n,) at which the gradient of loss(log-probs) vanishes, by L-BFGS from `start`: a
    global minimum, as DPO, distillation and KL(ref || softmax) are all convex in the logits of a
    tabular policy."""
    logits = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([logits], max_iter=2000, tolerance_grad=tolerance,
                                  tolerance_change=0, line_search_fn="strong_wolfe",
                                  history_size=20)

    def closure():
        optimizer.zero_grad()
        value = loss(logits.log_softmax(0))
        value.backward()
        return value

    for _ in range(5):            # again from where the line search gave up
        optimizer.step(closure)
    closure()
    assert logits.grad.norm() < 1e-7, f"not converged: the gradient is {logits.grad}"
    return logits.detach()


# ---------------------------------------------------------------- DPO and its degenerate optima

# Three disjoint pairs with one label each, and two responses that are in none.
PAIRS, OUTSIDE = [(0, 1), (2, 3), (4, 5)], [6, 7]
CHOSEN, REJECTED = [0, 2, 4], [1, 3, 5]


def dpo_loss(logps, ref_logps, beta):
    return dpo(of_pairs(logps, PAIRS), of_pairs(ref_logps, PAIRS), beta).mean()


def test_dpo_reaches_zero_only_as_margins_grow_without_bound():
    """The paper's proposition on DPO: with one label per pair and disjoint pairs (so that no labels
    contradict each other in a cycle), the infimum of the loss is 0. No policy with full support
    attains it, and it is approached only as every implicit reward margin beta * h goes to infinity,
    with the rejected responses' probabilities going to 0.

    "Only": a mean loss below eps over N pairs leaves no pair a loss above N eps, so
    beta h >= -log(exp(N eps) - 1) for every pair. "Is approached": gradient descent on a tabular
    policy gets below any eps that we have the patience for.
    """
    ref_logps, beta = reference(8), 0.5
    logits = ref_logps.clone().requires_grad_()
    optimizer, reached = torch.optim.SGD([logits], lr=50.0), []
    for eps in (1e-1, 1e-2, 1e-3, 1e-4):
        for _ in range(20_000):
            loss = dpo_loss(logits.log_softmax(0), ref_logps, beta)
            if loss <= eps:
                break
            optimizer.zero_grad()
            loss.backward()
            assert logits.grad.norm() > 0
            optimizer.step()
        log_ratio = of_pairs(logits.detach().log_softmax(0) - ref_logps, PAIRS)    # (3, 2)
        of_chosen, of_rejected = log_ratio.unbind(dim=1)                           # (3,) each
        margin = beta * (of_chosen - of_rejected)                                  # (3,)
        assert 0 < loss.item() <= eps
        assert (margin >= -math.log(math.expm1(len(PAIRS) * loss.item()))).all()
        # as log pi(chosen) <= 0: rejected ones vanish
        assert (of_rejected <= -ref_logps[CHOSEN] - margin / beta).all()
        reached.append(margin.min().item())
    # With one pair, a margin of m makes a loss of about exp(-m): a factor of 10 in the loss costs
    # log 10 of margin, without end.
    assert reached[-1] - reached[1] == pytest.approx(math.log(100), rel=0.1)


def test_dpo_is_also_minimised_by_policies_that_give_up_the_preferred_responses():
    """The paper's corollary: the infimum is approached too by policies whose *preferred* responses
    all have probabilities as close to 0 as one likes, the mass sitting on responses outside the
    data.

    Here: chosen at exp(-t), rejected at exp(-2 t), the rest outside. The loss falls to 0 as t
    grows.
    """
    ref_logps, beta = reference(8), 0.5
    for t in (10.0, 100.0, 1000.0):
        logits = torch.zeros(8, dtype=torch.float64)
        logits[CHOSEN], logits[REJECTED] = -t, -2 * t
        logps = logits.log_softmax(0)
        assert (logps[CHOSEN] < -t).all()
        assert logps[OUTSIDE].exp().sum() >= 1 - 4 * math.exp(-t) - 1e-12
        favoured = (ref_logps[CHOSEN] - ref_logps[REJECTED]).max().item()
        smallest = t - favoured                        # h of the pair that ref favours most
        assert 0 <= dpo_loss(logps, ref_logps, beta) <= math.exp(-beta * smallest)


# A log-linear policy, pi(y) ~ exp(theta . f(y)) on a uniform reference. Feature 0 is shared: the
# rejected response (index 1) has twice as much of it as the chosen one (index 0). Feature 1 is the
# chosen response's own. Two responses have neither.
FEATURES = torch.tensor([[1.0, 0.2], [2.0, 0.0], [0.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
UNIFORM = torch.full((4,), -math.log(4), dtype=torch.float64)


def zeros(n):
    """Parameters to start from."""
    return torch.zeros(n, dtype=torch.float64, requires_grad=True)


def descend(logps_of, loss, parameters, steps, lr):
    """Plain gradient descent on loss(logps_of(parameters)). Returns the losses and the log-probs of
    the chosen response, before every step."""
    losses, chosen = [], []
    for _ in range(steps):
        logps = logps_of(parameters)
        value = loss(logps)
        losses.append(value.item())
        chosen.append(logps[0].item())
        gradient = torch.autograd.grad(value, parameters)[0]
        parameters = (parameters - lr * gradient).detach().requires_grad_()
    return torch.tensor(losses), torch.tensor(chosen)


def log_linear(theta):
    return (FEATURES @ theta).log_softmax(0)


def tabular(logits):
    return logits.log_softmax(0)


def one_pair(beta, gamma=0.0):
    """DPO on the pair (0, 1) alone, with the exact gamma * KL(ref || pi) of p-DPO."""
    def loss(logps):
        return dpo(logps[None, :2], UNIFORM[None, :2], beta).mean() + gamma * kl(UNIFORM, logps)

    return loss


def test_dpo_can_lower_the_chosen_probability_at_every_step():
    """Ours. With a log-linear policy whose chosen and rejected responses share a feature, plain
    gradient descent on DPO lowers the chosen response's probability at every step while the loss
    falls at every step, without a floor.

    The step is along f(chosen) - f(rejected) = (-1, 0.2): less of the shared feature. That pushes
    both down and the mass out to the responses that nobody compared. A tabular policy, which shares
    nothing, raises the chosen one on this pair.
    """
    losses, chosen = descend(log_linear, one_pair(beta=1.0), zeros(2), 3000, 0.5)
    assert (losses.diff() < 0).all()
    assert losses[0] == pytest.approx(math.log(2)) and losses[-1] < 1e-3
    assert (chosen.diff() < 0).all() and chosen[-1] < -6

    _, chosen = descend(tabular, one_pair(beta=1.0), zeros(4), 3000, 0.5)
    assert chosen[-1] > chosen[0]


# ---------------------------------------------------------------- distillation

def distilled(ref_logps, reward, pairs, beta, start):
    """Logits of d-DPO's minimiser on these pairs, from `start`."""
    ref_pairs, reward_pairs = of_pairs(ref_logps, pairs), of_pairs(reward, pairs)

    def loss(logps):
        return distill(of_pairs(logps, pairs), ref_pairs, reward_pairs, beta).mean()

    return minimise(loss, start)


@pytest.mark.parametrize("beta", [0.1, 1.0, 10.0])
def test_distillation_recovers_the_rlhf_optimum(beta):
    """The paper's theorem on distillation: if the pairs have full support (every two responses are
    compared) and the reference has too, then d-DPO's minimiser is the optimum of the KL-regularised
    objective, pi* ~ ref * exp(r / beta); total variation below 1e-6, for small and large beta, from
    the reference and from elsewhere."""
    ref_logps, reward = reference(6), numbers(6, seed=1)
    for start in (ref_logps, numbers(6, seed=2)):
        logits = distilled(ref_logps, reward, every_pair(6), beta, start)
        best = optimum(ref_logps, reward, beta)
        assert total_variation(logits.log_softmax(0), best) < 1e-6


def test_distillation_needs_only_a_connected_graph_of_comparisons():
    """Ours. Full support is more than is needed: a chain of comparisons that connects all responses
    has that minimiser too."""
    ref_logps, reward = reference(6), numbers(6, seed=1)
    pairs = [(0, 1), (2, 1), (2, 3), (4, 3), (5, 0)]
    logits = distilled(ref_logps, reward, pairs, 1.0, ref_logps)
    assert total_variation(logits.log_softmax(0), optimum(ref_logps, reward, 1.0)) < 1e-6


def test_distillation_with_restricted_support_recovers_the_optimum_within_each_compared_group():
    """Ours. With restricted support the optimum is *not* recovered. What is: inside each group of
    responses that comparisons connect (here {0, 1, 2}, {3, 4} and the lone {5}), pi*'s conditional
    distribution. How much mass a group has is not in the loss: from different starts, different
    policies reach loss 0. Methods whose steps are sums of gradients (gradient descent, L-BFGS; not
    Adam, which rescales each logit) keep every group's mean logit where it started, so from the
    reference the answer is determined, and it is not pi*."""
    ref_logps, reward, beta = reference(6), 2 * numbers(6, seed=1), 1.0
    pairs, groups = [(0, 1), (1, 2), (0, 2), (3, 4)], [[0, 1, 2], [3, 4], [5]]
    best, reached = optimum(ref_logps, reward, beta), []
    for start in (ref_logps, numbers(6, seed=2)):
        logits = distilled(ref_logps, reward, pairs, beta, start)
        logps = logits.log_softmax(0)
        reached.append(logps)
        for group in groups:
            within, best_within = logps[group].log_softmax(0), best[group].log_softmax(0)
            assert total_variation(within, best_within) < 1e-6
            assert logits[group].mean() == pytest.approx(start[group].mean().item(), abs=1e-6)
        assert total_variation(logps, best) > 0.01
    assert total_variation(*reached) > 0.01


# ---------------------------------------------------------------- pessimism: a family of rewards

def value(logps, ref_logps, rewards, beta):
    """The pessimistic objective, min over the family of E_pi[r] - E_ref[r] - beta KL(pi || ref).

    logps: (..., n); rewards: (M, n). As it is linear in r, this is also the minimum over the
    family's convex hull. Returns (...)."""
    gain = (logps.exp() - ref_logps.exp()) @ rewards.T                             # (..., M)
    penalty = (logps.exp() * (logps - ref_logps)).sum(dim=-1)                      # (...)
    return gain.min(dim=-1).values - beta * penalty


def simplex(n, k):
    """All points of the (n - 1)-simplex with coordinates that are multiples of 1 / k. Returns
    (points, n)."""
    bars = torch.combinations(torch.arange(k + n - 1), n - 1)                      # stars and bars
    first = torch.full((len(bars), 1), -1)
    last = torch.full((len(bars), 1), k + n - 1)
    ends = torch.cat([first, bars, last], dim=1)
    return (ends.diff(dim=1) - 1).double() / k


@pytest.mark.parametrize("beta", [0.1, 1.0, 10.0])
def test_the_value_of_an_optimal_policy_is_its_forward_kl(beta):
    """Used by the paper's theorem. For pi_r ~ ref * exp(r / beta), any r:
    E_pi_r[r] - E_ref[r] - beta KL(pi_r || ref) = beta KL(ref || pi_r).

    Both sides are beta log Z - E_ref[r], Z = E_ref[exp(r / beta)]. So the forward KL measures how
    much a reward model claims can be gained, and the family's most pessimistic member is the one
    with the smallest forward KL."""
    ref_logps = reference(7)
    for seed in range(20):
        reward = numbers(7, seed=seed + 1)
        logps = optimum(ref_logps, reward, beta)
        claimed = value(logps, ref_logps, reward[None], beta)
        torch.testing.assert_close(claimed, beta * kl(ref_logps, logps))


REF3 = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
# three reward models that agree on what is bad (response 0) and not on what is good
VERTICES = torch.tensor([[0.0, 3.0, 0.0], [0.0, 0.0, 3.0], [0.0, 1.0, 2.5]], dtype=torch.float64)


def test_the_pessimistic_optimum_over_a_convex_family_is_its_least_forward_kl_policy():
    """The paper's theorem on pessimistic distillation: over a convex, compact family S of reward
    models, max_pi min_{r in S} E_pi[r] - E_ref[r] - beta KL(pi || ref) is solved by the policy
    pi_r, r in S, with the smallest KL(ref || pi_r). Brute force on both sides, for the family
    spanned by three reward vectors over three responses: all members on a grid of mixtures, all
    policies on a grid of the simplex."""
    beta = 1.0
    members = simplex(3, 300) @ VERTICES                            # (45451, 3) reward vectors
    logps = (REF3 + members / beta).log_softmax(dim=1)              # (45451, 3)
    forward = (REF3.exp() * (REF3 - logps)).sum(dim=1)
    best = logps[forward.argmin()]
    best_value = value(best, REF3, VERTICES, beta)

    everything = simplex(3, 300)
    everything = everything[(everything > 0).all(dim=1)].log()      # every policy, on a grid
    values = value(everything, REF3, VERTICES, beta)
    assert best_value == pytest.approx(beta * forward.min().item(), abs=1e-3)
    assert values.max() == pytest.approx(best_value.item(), abs=1e-3)       # no policy does better
    # and the best one there is this one
    assert total_variation(everything[values.argmax()], best) < 0.01
    vertices = [kl(REF3, optimum(REF3, vertex, beta)) for vertex in VERTICES]
    assert forward.min() < 0.9 * min(vertices)                      # a proper mixture, no vertex


def test_a_finite_family_needs_its_convex_hull():
    """Ours. Convexity matters. For the finite family of the three vertices alone, the member policy
    with the smallest forward KL is not the pessimistic optimum: the policy of a *mixture* does
    strictly better in the worst case, and reaches what no single member's policy does."""
    beta = 1.0
    members = (REF3 + VERTICES / beta).log_softmax(dim=1)           # (3, 3): a policy per model
    forward = torch.stack([kl(REF3, logps) for logps in members])
    mixtures = (REF3 + simplex(3, 300) @ VERTICES / beta).log_softmax(dim=1)
    worst_case = value(mixtures, REF3, VERTICES, beta).max()
    assert worst_case > 0.2                                 # there is something to gain for sure
    # each member's policy can lose, the one with the least forward KL too
    assert value(members, REF3, VERTICES, beta).max() < 0
    assert forward.argmin() == 2 and value(members[2], REF3, VERTICES, beta) < 0


def test_distilling_a_family_with_a_vanishing_kl_tends_to_the_member_with_the_least_forward_kl():
    """The relaxed objective, min over members of distill_m (the minimum outside the expectation) +
    gamma KL(ref || pi), for a finite family, a full-support reference and comparisons that connect
    all responses: as gamma -> 0 its minimiser tends to the member policy with the smallest forward
    KL (here there is only one). Every member's policy has a distillation loss of 0; the KL term
    breaks the tie. As a minimum of one convex function per member, it is minimised member by
    member."""
    ref_logps, rewards, beta, pairs = reference(5), numbers(5, 3, seed=3), 0.7, every_pair(5)
    ref_pairs, reward_pairs = of_pairs(ref_logps, pairs), of_pairs(rewards, pairs)
    members = [optimum(ref_logps, rewards[:, m], beta) for m in range(3)]
    least = min(members, key=lambda logps: kl(ref_logps, logps).item())

    def objective(logps, gamma, family=slice(None)):
        fit = one_for_all(of_pairs(logps, pairs), ref_pairs, reward_pairs[..., family], beta)
        return fit + gamma * kl(ref_logps, logps)

    distances = []
    for gamma in (1e-1, 1e-2, 1e-3, 1e-4):
        minima = []
        for m in range(3):
            logits = minimise(lambda logps: objective(logps, gamma, slice(m, m + 1)), ref_logps)
            minima.append(logits.log_softmax(0))
        lowest = min(minima, key=lambda logps: objective(logps, gamma).item())
        distances.append(total_variation(lowest, least))
    assert distances[-1] < 1e-3
    # linear in gamma
    assert all(after < 0.2 * before for before, after in itertools.pairwise(distances))


# ---------------------------------------------------------------- e-DPO

def random_batch(seed, B=6, M=4):
    """logps, ref_logps, rewards."""
    logps, ref_logps = numbers(B, 2, seed=seed), numbers(B, 2, seed=seed + 100)
    return logps, ref_logps, numbers(B, 2, M, seed=seed + 200)


def by_member(logps, ref_logps, rewards, beta=0.5):
    """The d-DPO losses of every member of a family: (B, M)."""
    members = [distill(logps, ref_logps, rewards[..., m], beta) for m in range(rewards.size(2))]
    return torch.stack(members, dim=1)


def one_for_each(logps, ref_logps, rewards, beta=0.5):
    """What the paper runs: the minimum inside the expectation, for each pair its own member."""
    return ensemble_distill(logps, ref_logps, rewards, beta).mean()


def one_for_all(logps, ref_logps, rewards, beta=0.5):
    """The objective as stated: the minimum outside the expectation, one member for all pairs."""
    return by_member(logps, ref_logps, rewards, beta).mean(dim=0).min()


def test_e_dpo_is_the_minimum_over_members_of_d_dpo_for_each_pair():
    """By definition: e-DPO's loss of a pair is the smallest of the members' d-DPO losses there, and
    different pairs may pick different members; with one member it is d-DPO."""
    logps, ref_logps, rewards = random_batch(0)
    members = by_member(logps, ref_logps, rewards)                                  # (6, 4)
    got = ensemble_distill(logps, ref_logps, rewards, 0.5)
    torch.testing.assert_close(got, members.min(dim=1).values)
    assert len(members.argmin(dim=1).unique()) > 1
    got = ensemble_distill(logps, ref_logps, rewards[..., :1], 0.5)
    torch.testing.assert_close(got, members[:, 0])


def test_e_dpo_has_the_gradient_of_the_best_fitting_member_alone():
    """Ours. The subgradient: with respect to the policy it is that of d-DPO with the best-fitting
    member, pair by pair; with respect to the rewards it is zero for every other member."""
    logps, ref_logps, rewards = random_batch(1)
    logps.requires_grad_()
    rewards.requires_grad_()
    rows, best = torch.arange(6), by_member(logps, ref_logps, rewards).argmin(dim=1)        # (6,)
    loss = ensemble_distill(logps, ref_logps, rewards, 0.5).sum()
    of_logps, of_rewards = torch.autograd.grad(loss, (logps, rewards))
    loss = distill(logps, ref_logps, rewards[rows, :, best], 0.5).sum()
    torch.testing.assert_close(of_logps, torch.autograd.grad(loss, logps)[0])
    touched = (of_rewards != 0).any(dim=1)                                                  # (6, 4)
    assert touched.sum() == 6 and touched[rows, best].all()


@pytest.mark.parametrize("objective", [one_for_each, one_for_all])
def test_adding_a_member_never_raises_the_loss(objective):
    """Ours. A larger family can only explain the policy better: 100 random batches, members added
    one at a time."""
    for seed in range(100):
        logps, ref_logps, rewards = random_batch(seed)
        by_size = [objective(logps, ref_logps, rewards[..., :m]) for m in (1, 2, 3, 4)]
        assert all(after <= before + 1e-12 for before, after in itertools.pairwise(by_size))


def test_one_member_for_each_pair_is_the_weaker_demand():
    """Ours. The minimum inside the expectation is at most the one outside, and it can be 0 for a
    policy that no single member explains: here member 0 explains the first pair, member 1 the
    second."""
    logps, ref_logps = torch.tensor([[1.0, 0.0], [2.0, 0.0]]), torch.zeros(2, 2)
    rewards = torch.tensor([[[1.0, 5.0], [0.0, 0.0]], [[5.0, 2.0], [0.0, 0.0]]])    # (2, 2, 2)
    assert one_for_each(logps, ref_logps, rewards, 1.0) == 0
    assert one_for_all(logps, ref_logps, rewards, 1.0) > 1
    for seed in range(100):
        assert one_for_each(*random_batch(seed)) <= one_for_all(*random_batch(seed))


# ---------------------------------------------------------------- p-DPO

def floor(ref_chosen, gamma):
    """A lower bound on the chosen response's probability where the p-DPO loss is at most that of
    the reference, ln 2.

    As DPO's part is positive, gamma KL(ref || pi) <= ln 2. By the data-processing inequality,
    KL(ref || pi) is at least the KL between chosen and not chosen, which is at least
    -H - ref_chosen * log pi_chosen with H the entropy of that coin."""
    entropy = -(ref_chosen * math.log(ref_chosen) + (1 - ref_chosen) * math.log(1 - ref_chosen))
    return math.exp(-(math.log(2) / gamma + entropy) / ref_chosen)


def test_p_dpo_keeps_preferred_responses_where_dpo_gives_them_up():
    """Ours. On the log-linear policy above, gradient descent on p-DPO never takes the chosen
    probability below the bound, which holds for every policy no worse than the reference, and it
    settles; DPO goes through that bound and on."""
    gamma, bound = 1.0, math.log(floor(0.25, 1.0))
    losses, chosen = descend(log_linear, one_pair(beta=1.0, gamma=gamma), zeros(2), 5000, 0.5)
    assert (losses.diff() <= 1e-12).all()
    assert chosen.min() > bound
    _, without = descend(log_linear, one_pair(beta=1.0), zeros(2), 5000, 0.5)
    assert without[-1] < bound
    assert chosen[-1] - chosen[-1000] == pytest.approx(0, abs=1e-4)     # settled ...
    assert chosen[-1] > -3                                              # ... near ref's -1.39

    # below the bound DPO's loss is as good as 0 and p-DPO's is worse than the reference's
    for t in (50.0, 500.0):
        degenerate = torch.tensor([-t, -2 * t, 0, 0], dtype=torch.float64).log_softmax(0)
        assert degenerate[0] < bound
        assert one_pair(beta=1.0)(degenerate) < 1e-20
        assert one_pair(beta=1.0, gamma=gamma)(degenerate) > math.log(2)


def test_p_dpo_has_a_finite_minimiser():
    """Ours. With the KL term the minimum is attained: the gradient of tabular p-DPO on the disjoint
    pairs vanishes at finite margins, with chosen responses up, rejected ones down, and
    KL(ref || pi) below ln 2 / gamma, because the minimum is at most the reference's ln 2 and DPO's
    part of it is positive."""
    ref_logps, beta, gamma = reference(8), 0.5, 0.3

    def loss(logps):
        return dpo_loss(logps, ref_logps, beta) + gamma * kl(ref_logps, logps)

    logps = minimise(loss, ref_logps).log_softmax(0)
    log_ratio = logps - ref_logps
    assert (log_ratio[CHOSEN] > 0).all() and (log_ratio[REJECTED] < 0).all()
    assert kl(ref_logps, logps) < math.log(2) / gamma and log_ratio.abs().max() < 10
