"""Each loss against its formula written out by hand, and what it must be where the policy is the reference."""
import math

import pytest
import torch

import losses

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
    assert_gives(losses.log_ratio_margin(policy, ref), h)


def test_bradley_terry():
    assert_gives(losses.bradley_terry(rewards[..., 0]), [-math.log(sigmoid((r[0] - r[1]).item())) for r in rewards[..., 0]])


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


def test_unknown_loss():
    with pytest.raises(ValueError, match="dpo, ipo"):
        losses.preference_loss("kto", policy, ref)
