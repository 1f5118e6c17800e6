"""Each loss against its formula written out by hand, and what it must be where the policy is the reference."""
import itertools
import math

import pytest
import torch

import losses
from data import collate
from model import GPT, GPTConfig

BETA, TAU = 0.3, 0.2


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


policy, ref, rewards = numbers(5, 2, seed=1), numbers(5, 2, seed=2), numbers(5, 2, 3, seed=3)
h = [(policy[i, 0] - ref[i, 0] - policy[i, 1] + ref[i, 1]).item() for i in range(5)]


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def assert_gives(got, wanted):
    torch.testing.assert_close(got, torch.tensor(wanted, dtype=got.dtype))


def test_log_ratio_margin():
    assert_gives(losses.log_ratio_margin(policy, ref)[:, 0], h)


def test_bradley_terry():
    assert_gives(losses.bradley_terry(rewards[..., 0]), [-math.log(sigmoid((r[0] - r[1]).item())) for r in rewards[..., 0]])


def test_plackett_luce_of_a_pair_is_bradley_terry():
    assert torch.equal(losses.plackett_luce(rewards[..., 0]), losses.bradley_terry(rewards[..., 0]))


def test_plackett_luce_is_the_chance_of_a_ranking():
    """The chances of all 24 rankings of four responses, each a product of softmaxes over what is left, sum to 1."""
    four, total = numbers(5, 4, seed=11), 0
    for order in itertools.permutations(range(4)):
        by_hand = [math.prod(math.exp(r[order[k]]) / sum(math.exp(r[j]) for j in order[k:]) for k in range(4)) for r in four.tolist()]
        got = losses.plackett_luce(four[:, order])
        assert_gives(got, [-math.log(chance) for chance in by_hand])
        total = total + (-got).exp()
    assert_gives(total, [1.0] * 5)


@pytest.mark.parametrize("name", losses.PREFERENCE_LOSSES)
def test_ranked_responses_give_the_mean_over_all_pairs(name):
    """Four responses: the mean of the loss over their six pairs, better one first; e-DPO takes one member for all six."""
    pi, reference, scores = numbers(5, 5, seed=12), numbers(5, 5, seed=13), numbers(5, 4, 3, seed=14)
    got = losses.preference_loss(name, pi, reference, scores, BETA, TAU, gamma=0.7, K=4)
    by_member = []
    for m in range(3):
        pairs = [losses.preference_loss(name, pi[:, [i, j, 4]], reference[:, [i, j, 4]],
                                        scores[:, [i, j], m:m + 1] if name == "e-dpo" else scores[:, [i, j]], BETA, TAU, gamma=0.7)
                 for i, j in itertools.combinations(range(4), 2)]
        by_member.append(sum(pairs) / 6)
    torch.testing.assert_close(got, torch.stack(by_member).min(dim=0).values)
    at_reference = losses.preference_loss(name, reference, reference, scores, BETA, TAU, gamma=0.7, K=4)
    torch.testing.assert_close(losses.loss_at_reference(name, scores, TAU).expand(5).double(), at_reference)


def test_dpo():
    assert_gives(losses.dpo(policy, ref, BETA), [-math.log(sigmoid(BETA * x)) for x in h])


def test_ipo():
    assert_gives(losses.ipo(policy, ref, TAU), [(x - 1 / (2 * TAU)) ** 2 for x in h])


def test_distill():
    assert_gives(losses.distill(policy, ref, rewards[..., 0], BETA),
          [((r[0] - r[1]).item() - BETA * x) ** 2 for r, x in zip(rewards[..., 0], h)])


def test_distill_does_not_care_which_response_comes_first():
    torch.testing.assert_close(losses.distill(policy.flip(1), ref.flip(1), rewards[..., 0].flip(1), BETA),
                               losses.distill(policy, ref, rewards[..., 0], BETA))


def by_member():
    return [[((rewards[i, 0, m] - rewards[i, 1, m]).item() - BETA * h[i]) ** 2 for m in range(3)] for i in range(5)]


def test_ensemble_distill_takes_the_best_member_of_each_example():
    assert_gives(losses.ensemble_distill(policy, ref, rewards, BETA), [min(members) for members in by_member()])


def test_ensemble_distill_per_batch_takes_one_member():
    means = [sum(by_member()[i][m] for i in range(5)) for m in range(3)]
    best = means.index(min(means))
    assert_gives(losses.ensemble_distill(policy, ref, rewards, BETA, per="batch"), [members[best] for members in by_member()])
    with pytest.raises(ValueError, match="per must be"):
        losses.ensemble_distill(policy, ref, rewards, BETA, per="epoch")


def test_ensemble_of_one_is_distill():
    torch.testing.assert_close(losses.ensemble_distill(policy, ref, rewards[..., :1], BETA),
                               losses.distill(policy, ref, rewards[..., 0], BETA))


def test_forward_kl():
    pi, reference = numbers(4, 3, seed=4), numbers(4, 3, seed=5)
    assert_gives(losses.forward_kl(pi, reference), [sum((reference[i, s] - pi[i, s]).item() for s in range(3)) / 3 for i in range(4)])


@pytest.mark.parametrize("name", losses.PREFERENCE_LOSSES)
def test_preference_loss_is_made_of_the_parts_its_table_says(name):
    """The table of objectives in the README, written out again."""
    pi, reference, gamma = numbers(5, 4, seed=6), numbers(5, 4, seed=7), 0.7       # two samples from ref
    pair = pi[:, :2], reference[:, :2]
    first = {"dpo": losses.dpo(*pair, BETA), "ipo": losses.ipo(*pair, TAU),
             "d-dpo": losses.distill(*pair, rewards.mean(dim=2), BETA), "p-dpo": losses.dpo(*pair, BETA),
             "dp-dpo": losses.distill(*pair, rewards.mean(dim=2), BETA),
             "e-dpo": losses.ensemble_distill(*pair, rewards, BETA)}[name]
    kl = losses.forward_kl(pi[:, 2:], reference[:, 2:]) if name in ("p-dpo", "dp-dpo", "e-dpo") else 0
    torch.testing.assert_close(losses.preference_loss(name, pi, reference, rewards, BETA, TAU, gamma), first + gamma * kl)


@pytest.mark.parametrize("name", losses.PREFERENCE_LOSSES)
def test_step_0(name):
    """Where the policy is the reference: DPO is ln 2, IPO 1/(4 tau^2), distillation the squared reward margin, KL 0."""
    known = {"dpo": math.log(2), "p-dpo": math.log(2), "ipo": 1 / (4 * TAU ** 2)}.get(name)
    reference = numbers(5, 3, seed=8)
    got = losses.preference_loss(name, reference, reference, rewards, BETA, TAU, gamma=0.5)
    if known is None:
        margins = rewards[:, 0] - rewards[:, 1]
        wanted = (margins.mean(dim=1) ** 2).tolist() if name != "e-dpo" else (margins ** 2).min(dim=1).values.tolist()
    else:
        wanted = [known] * 5
    assert_gives(got, wanted)
    torch.testing.assert_close(losses.loss_at_reference(name, rewards, TAU).expand(5).double(), got)


def test_preference_loss_passes_its_options_on():
    pi, reference = numbers(5, 3, seed=9), numbers(5, 3, seed=10)
    by_batch = losses.ensemble_distill(pi[:, :2], reference[:, :2], rewards, BETA, per="batch")
    assert not torch.equal(by_batch, losses.ensemble_distill(pi[:, :2], reference[:, :2], rewards, BETA))
    torch.testing.assert_close(losses.preference_loss("e-dpo", pi, reference, rewards, BETA, per="batch"), by_batch)
    for name, wanted in (("p-dpo", losses.dpo(pi[:, :2], reference[:, :2], beta=0.1)),       # the defaults; gamma is 0
                         ("ipo", losses.ipo(pi[:, :2], reference[:, :2], tau=0.1))):
        torch.testing.assert_close(losses.preference_loss(name, pi, reference), wanted)


def test_unknown_loss():
    with pytest.raises(ValueError, match="dpo, ipo"):
        losses.preference_loss("kto", policy, ref)


# ---------------------------------------------------------------- gradients

@pytest.mark.parametrize("name, per", [(name, "example") for name in losses.PREFERENCE_LOSSES] + [("e-dpo", "batch")])
def test_gradcheck(name, per):
    """Every objective's gradient equals finite differences in float64, with respect to the log-probs and the rewards. (The
    minimum of e-DPO has kinks; these random numbers are not on one.)"""
    def loss(policy, rewards):
        return losses.preference_loss(name, policy, numbers(5, 4, seed=7), rewards, BETA, TAU, gamma=0.7, per=per)

    inputs = numbers(5, 4, seed=6).requires_grad_(), numbers(5, 2, 3, seed=3).requires_grad_(name in losses.NEEDS_REWARDS)
    assert torch.autograd.gradcheck(loss, inputs)


def test_gradcheck_of_reward_models():
    assert torch.autograd.gradcheck(losses.bradley_terry, numbers(5, 2).requires_grad_())
    assert torch.autograd.gradcheck(losses.plackett_luce, numbers(5, 4).requires_grad_())


# log-probs of chosen, rejected and one sample from ref: margins of +-1e4, and responses of probability exp(-1e4)
EXTREME = torch.tensor([[0.0, -1e4, -1e4], [-1e4, 0.0, 0.0], [-1e4, -1e4, -1e4], [0.0, 0.0, 0.0]])


@pytest.mark.parametrize("name", losses.PREFERENCE_LOSSES)
def test_extreme_margins_are_finite(name):
    """Margins of +-1e4 and log-probs down to -1e4, of policy and reference, in float32: finite losses, finite gradients,
    and exact where the formula's limit is plain."""
    extreme_rewards = torch.tensor([1e4, -1e4, 0.0, 5.0])[:, None, None] * torch.tensor([[1.0, 0.5], [0.0, 0.0]])   # (4, 2, 2)
    for reference in (torch.zeros(4, 3), EXTREME, EXTREME.flip(0)):
        pi = EXTREME.clone().requires_grad_()
        got = losses.preference_loss(name, pi, reference, extreme_rewards, beta=1.0, tau=TAU, gamma=0.01)
        got.sum().backward()
        assert got.isfinite().all() and pi.grad.isfinite().all()
    if name == "dpo":
        torch.testing.assert_close(losses.dpo(EXTREME[:, :2], torch.zeros(4, 2), 1.0), torch.tensor([0.0, 1e4, math.log(2), math.log(2)]))


def test_bradley_terry_at_extreme_margins():
    rewards = EXTREME[:, :2].clone().requires_grad_()
    got = losses.bradley_terry(rewards)
    got.sum().backward()
    torch.testing.assert_close(got, torch.tensor([0.0, 1e4, math.log(2), math.log(2)]))
    assert rewards.grad.isfinite().all() and rewards.grad[1].tolist() == [-1.0, 1.0]
    ranking = EXTREME.clone().requires_grad_()
    losses.plackett_luce(ranking).sum().backward()
    assert ranking.grad.isfinite().all()


@pytest.mark.parametrize("name", losses.PREFERENCE_LOSSES)
def test_a_model_that_is_certain_has_finite_gradients(name):
    """Through the model: a head so large that responses have log-probs below -1e4, in float32; DPO's margin too."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=7, n_layer=1, n_head=1, n_embd=8, tie_word_embeddings=False))
    with torch.no_grad():
        model.lm_head.weight *= 2e5
    logps = model(collate([([1, 2], [[3, 4, 5], [2, 6], [0, 1]]), ([3], [[0], [5, 5], [2, 2]])]))
    assert logps.min() < -1e4 and (logps[:, 0] - logps[:, 1]).abs().min() > 1e4
    losses.preference_loss(name, logps, torch.zeros(2, 3), torch.ones(2, 2, 2), 1.0, TAU, 0.01).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
