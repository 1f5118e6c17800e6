"""Each loss against its formula written out by hand, and what every row of the table of losses must
hold: a loss that is added to losses.LOSSES is tested here without a change to this file."""
import itertools
import math

import pytest
import torch

import losses
from data import collate
from losses import LOSSES, PREFERENCE_LOSSES
from model import GPT, GPTConfig

B, M, GAMMA = 5, 3, 0.7                         # examples, reward models, weight of the KL term
BETA, TAU = 0.3, 0.2
HAVE_VALUE_AT_REFERENCE = [name for name in LOSSES if LOSSES[name].at_reference]


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def token_counts(*shape, seed=0):
    return torch.randint(1, 9, shape, generator=torch.Generator().manual_seed(seed))


def assert_gives(got, wanted):
    torch.testing.assert_close(got, torch.tensor(wanted, dtype=got.dtype))


# ---------------------------------------------------------------- the equations, by hand

logps, ref_logps = numbers(B, 2, seed=1), numbers(B, 2, seed=2)
rewards, lengths = numbers(B, 2, M, seed=3), token_counts(B, 2, seed=4)


def h_by_hand(x, y):
    """Of one pair, in plain numbers: x the policy's two log-probs, y the reference's."""
    return (x[0] - y[0]) - (x[1] - y[1])


def dpo_by_hand(x, y, beta):
    return math.log(1 + math.exp(-beta * h_by_hand(x, y)))


def ipo_by_hand(x, y, tau):
    return (h_by_hand(x, y) - 1 / (2 * tau)) ** 2


def ipo_per_token_by_hand(x, y, n, tau):
    chosen, rejected = (x[0] - y[0]) / n[0], (x[1] - y[1]) / n[1]
    return (chosen - rejected - 1 / (2 * tau)) ** 2


def distill_by_hand(x, y, r, beta):
    return (r[0] - r[1] - beta * h_by_hand(x, y)) ** 2


def mean_by_hand(x, y, r, beta):
    return distill_by_hand(x, y, (sum(r[0]) / M, sum(r[1]) / M), beta)


def members_by_hand(x, y, r, beta):
    return [distill_by_hand(x, y, (r[0][m], r[1][m]), beta) for m in range(M)]


def ensemble_by_hand(x, y, r, beta, min_per):
    assert min_per == "example"
    return min(members_by_hand(x, y, r, beta))


def sft_by_hand(x):
    return -x[0] - x[1]


BY_HAND = {
    "sft": sft_by_hand,
    "dpo": dpo_by_hand,
    "ipo": ipo_by_hand,
    "ipo-per-token": ipo_per_token_by_hand,
    "d-dpo": mean_by_hand,
    "p-dpo": dpo_by_hand,
    "dp-dpo": mean_by_hand,
    "e-dpo": ensemble_by_hand,
}


def knobs_of(name, factor=1.0):
    """The defaults of a loss's knobs (its numbers times a factor), but for gamma, which the
    training loop anneals."""
    knobs = {}
    for knob, default in LOSSES[name].knobs.items():
        if knob != "gamma":
            knobs[knob] = factor * default if isinstance(default, float) else default
    return knobs


def columns_of(name, K=2, seed=20, n_samples=2):
    """(logps, the data's columns) as the training loop has them: K responses, and after them
    samples from the reference if the loss has a KL term."""
    S = n_samples if "ref_samples" in LOSSES[name].needs else 0
    columns = {"ref_logps": numbers(B, K + S, seed=seed + 1),
               "rewards": numbers(B, K, M, seed=seed),
               "lengths": token_counts(B, K + S, seed=seed), "n_samples": S}
    return numbers(B, K + S, seed=seed + 2), columns


@pytest.mark.parametrize("factor", [1.0, 0.6, 2.5])
@pytest.mark.parametrize("name", BY_HAND)
def test_equation(name, factor):
    """Each loss is its formula, computed example by example with the numbers of Python, for the
    default of its knobs and for others."""
    columns = {"ref_logps": ref_logps, "rewards": rewards, "lengths": lengths}
    arguments = [logps] + [columns[need] for need in LOSSES[name].needs if need != "ref_samples"]
    knobs = knobs_of(name, factor)
    wanted = [BY_HAND[name](*(argument[i].tolist() for argument in arguments), **knobs)
              for i in range(B)]
    assert_gives(LOSSES[name].equation(*arguments, **knobs), wanted)


def test_margins():
    """h and the reward margin, of one reward model and of several; the chosen one less the rejected
    one."""
    wanted = [h_by_hand(x, y) for x, y in zip(logps.tolist(), ref_logps.tolist())]
    assert_gives(losses.log_ratio_margin(logps, ref_logps), wanted)
    assert_gives(losses.reward_margin(torch.tensor([[5.0, 3.0], [1.0, 4.0]])), [2.0, -3.0])
    wanted = [[r[0][m] - r[1][m] for m in range(M)] for r in rewards.tolist()]
    assert_gives(losses.reward_margin(rewards), wanted)


def test_bradley_terry():
    wanted = [math.log(1 + math.exp(r[1] - r[0])) for r in rewards[..., 0].tolist()]
    assert_gives(losses.bradley_terry(rewards[..., 0]), wanted)


def test_dpo():
    wanted = [dpo_by_hand(x, y, BETA) for x, y in zip(logps.tolist(), ref_logps.tolist())]
    assert_gives(losses.dpo(logps, ref_logps, BETA), wanted)


def test_ipo():
    wanted = [ipo_by_hand(x, y, TAU) for x, y in zip(logps.tolist(), ref_logps.tolist())]
    assert_gives(losses.ipo(logps, ref_logps, TAU), wanted)


def test_ipo_per_token_is_ipo_of_mean_log_probs():
    """With two tokens in every response it is IPO on half the log-probs."""
    got = losses.ipo_per_token(logps, ref_logps, torch.full((B, 2), 2), TAU)
    torch.testing.assert_close(got, losses.ipo(logps / 2, ref_logps / 2, TAU))


def test_distill():
    wanted = [distill_by_hand(x, y, r, BETA)
              for x, y, r in zip(logps.tolist(), ref_logps.tolist(), rewards[..., 0].tolist())]
    assert_gives(losses.distill(logps, ref_logps, rewards[..., 0], BETA), wanted)


def test_distill_does_not_care_which_response_comes_first():
    turned = losses.distill(logps.flip(1), ref_logps.flip(1), rewards[..., 0].flip(1), BETA)
    torch.testing.assert_close(turned, losses.distill(logps, ref_logps, rewards[..., 0], BETA))


def every_member():
    """The d-DPO losses of each member, by hand: B lists of M."""
    return [members_by_hand(x, y, r, BETA)
            for x, y, r in zip(logps.tolist(), ref_logps.tolist(), rewards.tolist())]


def test_ensemble_distill_takes_the_best_member_of_each_example():
    """By default; and the examples here do not all have the best member in common."""
    wanted = [min(members) for members in every_member()]
    assert len({members.index(min(members)) for members in every_member()}) > 1
    assert_gives(losses.ensemble_distill(logps, ref_logps, rewards, BETA), wanted)
    assert_gives(losses.ensemble_distill(logps, ref_logps, rewards, BETA, "example"), wanted)


def test_ensemble_distill_per_batch_takes_one_member():
    means = [sum(members[m] for members in every_member()) / B for m in range(M)]
    best = means.index(min(means))
    wanted = [members[best] for members in every_member()]
    assert_gives(losses.ensemble_distill(logps, ref_logps, rewards, BETA, min_per="batch"), wanted)


def test_no_other_minimum():
    message = '^min_per must be "example" or "batch", not \'epoch\'$'
    with pytest.raises(ValueError, match=message):
        losses.ensemble_distill(logps, ref_logps, rewards, BETA, min_per="epoch")


def test_best_member():
    """Two examples, three members: the smallest of each row, or the column with the least mean."""
    table = torch.tensor([[1.0, 2.0, 9.0], [7.0, 3.0, 0.0]])
    assert losses.best_member(table, "example").tolist() == [1.0, 0.0]
    assert losses.best_member(table, "batch").tolist() == [2.0, 3.0]


@pytest.mark.parametrize("min_per, shares", [
    ("example", [[1 / 3, 0, 2 / 3], [0, 1, 0]]), ("batch", [[0, 1, 0], [0, 1, 0]])])
def test_how_often_each_member_is_picked(min_per, shares):
    """Rankings of three, beta 1, with a sample of the reference behind them: h is 1, 3, 2 in the
    first row's pairs and 0 in the second's; of the members' margins, member 1 is never far off."""
    change = torch.tensor([[3.0, 2.0, 0.0, 9.0], [5.0, 5.0, 5.0, 9.0]])
    rewards = torch.tensor([[[1.0, 2.0, 3.0], [0.0, 1.5, 1.5], [-9.0, 0.2, 0.0]],
                            [[0.0, 0.0, 0.5], [1.0, 0.1, 0.0], [9.0, 0.0, 3.0]]])
    values = losses.picks(change, torch.zeros(2, 4), rewards, 1.0, min_per)
    assert list(values) == ["picked_0", "picked_1", "picked_2"]
    assert_gives(torch.stack(list(values.values()), dim=1), shares)


def test_ensemble_of_one_is_distill():
    got = losses.ensemble_distill(logps, ref_logps, rewards[..., :1], BETA)
    torch.testing.assert_close(got, losses.distill(logps, ref_logps, rewards[..., 0], BETA))


def test_forward_kl():
    x, y = numbers(4, 3, seed=4), numbers(4, 3, seed=5)
    wanted = [sum((y[i, s] - x[i, s]).item() for s in range(3)) / 3 for i in range(4)]
    assert_gives(losses.forward_kl(x, y), wanted)


def test_sft_adds_up_all_demonstrations_of_a_row():
    """Of one demonstration, and of four."""
    assert losses.sft(torch.tensor([[-3.0], [-5.0]])).tolist() == [3.0, 5.0]
    four = numbers(B, 4, seed=6)
    wanted = [-sum(row) for row in four.tolist()]
    assert_gives(losses.sft(four), wanted)
    assert_gives(losses.training_loss("sft", four), wanted)


# ---------------------------------------------------------------- rankings of reward models

def test_plackett_luce_of_a_pair_is_bradley_terry():
    pair = rewards[..., 0]
    torch.testing.assert_close(losses.plackett_luce(pair), losses.bradley_terry(pair))


@pytest.mark.parametrize("name", losses.LOSSES)
def test_a_kl_term_has_its_weight(name):
    """Samples without gamma would weigh nothing, gamma without samples nothing either."""
    loss = losses.LOSSES[name]
    assert ("ref_samples" in loss.needs) == ("gamma" in loss.knobs)


def chance_of_ranking(r):
    """Of rewards in this order, responses being picked one after the other."""
    chance = 1.0
    for k in range(len(r)):
        chance *= math.exp(r[k]) / sum(map(math.exp, r[k:]))
    return chance


def test_plackett_luce_is_the_chance_of_a_ranking():
    """The chances of all 24 rankings of four responses, each a product of softmaxes over what is
    left, sum to 1."""
    four, total = numbers(B, 4, seed=11), 0
    for order in itertools.permutations(range(4)):
        got = losses.plackett_luce(four[:, order])
        assert_gives(got, [-math.log(chance_of_ranking(r)) for r in four[:, order].tolist()])
        total = total + (-got).exp()
    assert_gives(total, [1.0] * B)


# ---------------------------------------------------------------- rankings of a policy's responses

def test_all_pairs():
    """The better response first, a row's pairs one after the other; a pair is itself."""
    values = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    assert losses.all_pairs(values).tolist() == [
        [1, 2], [1, 3], [1, 4], [2, 3], [2, 4], [3, 4],
        [5, 6], [5, 7], [5, 8], [6, 7], [6, 8], [7, 8]]
    assert losses.all_pairs(values[:, :3]).tolist() == [
        [1, 2], [1, 3], [2, 3], [5, 6], [5, 7], [6, 7]]
    assert torch.equal(losses.all_pairs(rewards), rewards)
    three = numbers(B, 3, M)
    assert losses.all_pairs(three).shape == (3 * B, 2, M)
    assert torch.equal(losses.all_pairs(three)[5], three[1][[1, 2]])


def difference(values, more, scale):
    return scale * (values[:, 0] - 10 * values[:, 1]) + more[:, 1]


def test_mean_over_pairs():
    """Of a loss that is not symmetric: rows stay apart, knobs are passed on."""
    values = torch.tensor([[1.0, 2.0, 3.0], [5.0, 7.0, 0.0]])
    more = torch.tensor([[0.0, 0.0, 3.0], [1.0, 1.0, 1.0]])
    got = losses.mean_over_pairs(difference, values, more, scale=2.0)
    assert_gives(got, [2 * (4 - 80) / 3 + 2, 2 * (17 - 70) / 3 + 1])


@pytest.mark.parametrize("K", [3, 4])
@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_ranked_responses_give_the_mean_over_all_pairs(name, K):
    """K responses: the mean of the loss over their pairs, the better one first, each of them with
    the samples from the reference."""
    logps, columns = columns_of(name, K)
    got = losses.training_loss(name, logps, **columns, gamma=GAMMA, **knobs_of(name))
    samples = list(range(K, K + columns["n_samples"]))
    total = torch.zeros(B, dtype=torch.float64)
    pairs = list(itertools.combinations(range(K), 2))
    for i, j in pairs:
        rows = [i, j, *samples]
        pair = {"ref_logps": columns["ref_logps"][:, rows], "lengths": columns["lengths"][:, rows],
                "rewards": columns["rewards"][:, [i, j]], "n_samples": len(samples)}
        total += losses.training_loss(name, logps[:, rows], **pair, gamma=GAMMA, **knobs_of(name))
    assert got.shape == (B,)
    torch.testing.assert_close(got, total / len(pairs))


def test_ranked_responses_per_batch_have_one_member():
    """min_per="batch" takes one member for all pairs of all rows."""
    logps, columns = columns_of("e-dpo", 3, n_samples=1)
    got = losses.training_loss("e-dpo", logps, **columns, beta=BETA, min_per="batch")
    by_member = [losses.training_loss("d-dpo", logps[:, :3], columns["ref_logps"][:, :3],
                                      columns["rewards"][:, :, m:m + 1], beta=BETA)
                 for m in range(M)]
    torch.testing.assert_close(got, min(by_member, key=torch.mean))


# ---------------------------------------------------------------- the table

# What the README and the paper say of each: its columns, its knobs and what the loop averages over.
ANNEALED = (1e-4, 1e-2)
ROWS = {
    "sft": ((), {}, "tokens"),
    "dpo": (("ref_logps",), {"beta": 1.0}, "rows"),
    "ipo": (("ref_logps",), {"tau": 0.1}, "rows"),
    "ipo-per-token": (("ref_logps", "lengths"), {"tau": 0.1}, "rows"),
    "d-dpo": (("ref_logps", "rewards"), {"beta": 1.0}, "rows"),
    "p-dpo": (("ref_logps", "ref_samples"), {"beta": 1.0, "gamma": ANNEALED}, "rows"),
    "dp-dpo": (("ref_logps", "rewards", "ref_samples"), {"beta": 1.0, "gamma": ANNEALED}, "rows"),
    "e-dpo": (("ref_logps", "rewards", "ref_samples"),
              {"beta": 1.0, "gamma": ANNEALED, "min_per": "example"}, "rows"),
}


@pytest.mark.parametrize("name", ROWS)
def test_row_of_the_table(name):
    loss = LOSSES[name]
    assert (loss.needs, loss.knobs, loss.mean_over) == ROWS[name]


def test_every_loss_but_sft_is_a_preference_loss():
    assert PREFERENCE_LOSSES == [name for name in LOSSES if name != "sft"]
    assert LOSSES["sft"].at_reference is None


@pytest.mark.parametrize("name", LOSSES)
def test_training_loss_is_the_equation_and_the_kl_term(name):
    """Of a pair: the equation on the first two columns, and gamma times the forward KL on the
    samples from the reference if the table says so."""
    logps, columns = columns_of(name)
    pair = {column: columns[column][:, :2] for column in ("ref_logps", "rewards", "lengths")}
    needs = [need for need in LOSSES[name].needs if need != "ref_samples"]
    wanted = LOSSES[name].equation(logps[:, :2], *map(pair.get, needs), **knobs_of(name))
    if "ref_samples" in LOSSES[name].needs:
        kl = losses.forward_kl(logps[:, 2:], columns["ref_logps"][:, 2:])
        assert kl.abs().min() > 0.01
        without_gamma = losses.training_loss(name, logps, **columns, **knobs_of(name))
        torch.testing.assert_close(without_gamma, wanted)           # gamma is 0 by default
        wanted = wanted + GAMMA * kl
    got = losses.training_loss(name, logps, **columns, gamma=GAMMA, **knobs_of(name))
    assert got.shape == (B,)
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_samples_that_a_loss_does_not_need_do_not_count(name):
    """One more response that is called a sample from the reference changes the KL term alone."""
    logps, columns = columns_of(name, n_samples=1)
    wanted = losses.training_loss(name, logps, **columns, gamma=0.0, **knobs_of(name))
    more = torch.full((B, 1), -3.0)
    columns["ref_logps"] = torch.cat([columns["ref_logps"], more.double()], dim=1)
    columns["lengths"] = torch.cat([columns["lengths"], more.long()], dim=1)
    columns["n_samples"] += 1
    logps = torch.cat([logps, more.double()], dim=1)
    got = losses.training_loss(name, logps, **columns, gamma=0.0, **knobs_of(name))
    torch.testing.assert_close(got, wanted)


def test_training_loss_passes_its_knobs_on():
    logps, columns = columns_of("e-dpo")
    pair, ref_pair = logps[:, :2], columns["ref_logps"][:, :2]
    per_batch = losses.ensemble_distill(pair, ref_pair, columns["rewards"], BETA, "batch")
    per_example = losses.ensemble_distill(pair, ref_pair, columns["rewards"], BETA, "example")
    assert not torch.equal(per_batch, per_example)
    got = losses.training_loss("e-dpo", logps, **columns, beta=BETA, min_per="batch")
    torch.testing.assert_close(got, per_batch)


def test_unknown_loss():
    with pytest.raises(KeyError, match="kto"):
        losses.training_loss("kto", logps, ref_logps)


def everything(logps, rewards, ref_logps, lengths, scale):
    """A loss that asks for every column, in another order than the table's."""
    return scale * (logps[:, 0] + 10 * ref_logps[:, 1] + 100 * rewards[:, 0, 1]) + lengths[:, 1]


def everything_at_reference(ref_logps, rewards, lengths, scale):
    return everything(ref_logps, rewards, ref_logps, lengths, scale)


@pytest.mark.parametrize("K", [2, 3])
def test_a_loss_may_ask_for_any_column(monkeypatch, K):
    """In the order in which it names them, without the samples; its value at the reference too."""
    needs = ("rewards", "ref_logps", "ref_samples", "lengths")
    row = losses.Loss(everything, needs, {"scale": 2.0}, everything_at_reference)
    monkeypatch.setitem(LOSSES, "everything", row)
    logps, columns = columns_of("everything", K)
    ref_logps, lengths = columns["ref_logps"][:, :K], columns["lengths"][:, :K]

    def by_hand(x):
        pairs = [everything(x[:, [i, j]], columns["rewards"][:, [i, j]], ref_logps[:, [i, j]],
                            lengths[:, [i, j]], 3.0)
                 for i, j in itertools.combinations(range(K), 2)]
        return sum(pairs) / len(pairs)

    got = losses.training_loss("everything", logps, **columns, scale=3.0)
    torch.testing.assert_close(got, by_hand(logps[:, :K]))
    got = losses.loss_at_reference("everything", **columns, scale=3.0)
    torch.testing.assert_close(got, by_hand(ref_logps))


# ---------------------------------------------------------------- where the policy is the reference

@pytest.mark.parametrize("K", [2, 3, 4])
@pytest.mark.parametrize("name", HAVE_VALUE_AT_REFERENCE)
def test_value_at_reference(name, K):
    """loss_at_reference is what training_loss gives where the policy is the reference, for pairs
    and for rankings, whatever gamma is: the KL term is 0 there."""
    _, columns = columns_of(name, K)
    wanted = losses.training_loss(name, columns["ref_logps"], **columns, gamma=GAMMA,
                                  **knobs_of(name))
    got = losses.loss_at_reference(name, **columns, **knobs_of(name))
    assert got.shape == (B,)
    torch.testing.assert_close(got.double(), wanted)


@pytest.mark.parametrize("K", [2, 3])
def test_value_at_reference_of_one_member_per_batch(K):
    _, columns = columns_of("e-dpo", K)
    knobs = {"beta": BETA, "min_per": "batch"}
    wanted = losses.training_loss("e-dpo", columns["ref_logps"], **columns, **knobs)
    got = losses.loss_at_reference("e-dpo", **columns, **knobs)
    torch.testing.assert_close(got, wanted)
    per_example = losses.loss_at_reference("e-dpo", **columns, beta=BETA, min_per="example")
    assert not torch.allclose(got, per_example)


def test_value_at_reference_needs_no_samples():
    """By default there are none, and a plain number becomes the value of every example."""
    got = losses.loss_at_reference("dpo", numbers(B, 2), beta=BETA)
    assert_gives(got, [math.log(2)] * B)


def squared_mean_margin(r):
    return (sum(r[0]) / M - sum(r[1]) / M) ** 2


def least_squared_margin(r):
    return min((r[0][m] - r[1][m]) ** 2 for m in range(M))


STEP_0 = {"dpo": math.log(2), "p-dpo": math.log(2), "ipo": 1 / (4 * TAU ** 2),
          "ipo-per-token": 1 / (4 * TAU ** 2), "d-dpo": squared_mean_margin,
          "dp-dpo": squared_mean_margin, "e-dpo": least_squared_margin}


@pytest.mark.parametrize("name", STEP_0)
def test_step_0(name):
    """DPO is ln 2, IPO 1 / (4 tau^2), distillation the squared reward margin, the KL term 0."""
    knobs = knobs_of(name)
    if "tau" in knobs:
        knobs["tau"] = TAU
    _, columns = columns_of(name)
    wanted = [STEP_0[name]] * B
    if callable(STEP_0[name]):
        wanted = [STEP_0[name](r) for r in columns["rewards"].tolist()]
    got = losses.training_loss(name, columns["ref_logps"], **columns, gamma=0.5, **knobs)
    assert_gives(got, wanted)
    assert_gives(losses.loss_at_reference(name, **columns, **knobs), wanted)


# ---------------------------------------------------------------- gradients

def check_gradient(name, K, **changed_knobs):
    logps, columns = columns_of(name, K)
    knobs = {**knobs_of(name), **changed_knobs}
    scores = columns.pop("rewards")

    def loss(logps, scores):
        return losses.training_loss(name, logps, rewards=scores, **columns, gamma=GAMMA, **knobs)

    scores.requires_grad_("rewards" in LOSSES[name].needs)
    assert torch.autograd.gradcheck(loss, (logps.requires_grad_(), scores))


@pytest.mark.parametrize("K", [2, 3])
@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck(name, K):
    """Every loss's gradient equals finite differences in float64, with respect to the log-probs and
    the rewards. (The minimum of e-DPO has kinks; these random numbers are not on one.)"""
    check_gradient(name, K)


@pytest.mark.parametrize("K", [2, 3])
def test_gradcheck_of_one_member_per_batch(K):
    check_gradient("e-dpo", K, min_per="batch")


def test_gradcheck_of_reward_models():
    assert torch.autograd.gradcheck(losses.bradley_terry, numbers(5, 2).requires_grad_())
    assert torch.autograd.gradcheck(losses.plackett_luce, numbers(5, 4).requires_grad_())


# ---------------------------------------------------------------- extremes

# Log-probs of chosen, rejected and one sample from the reference: margins of +-1e4, and responses
# of probability exp(-1e4).
EXTREME = torch.tensor([[0.0, -1e4, -1e4], [-1e4, 0.0, 0.0], [-1e4, -1e4, -1e4], [0.0, 0.0, 0.0]])
EXTREME_REWARDS = torch.tensor([[[1e4, 5e3], [0.0, 0.0]], [[-1e4, -5e3], [0.0, 0.0]],
                                [[0.0, 0.0], [0.0, 0.0]], [[5.0, 2.5], [0.0, 0.0]]])    # (4, 2, 2)
EXTREME_LENGTHS = torch.tensor([[1, 1, 1], [1, 1000, 1], [1000, 1, 1], [1000, 1000, 1]])


@pytest.mark.parametrize("reference", [torch.zeros(4, 3), EXTREME, EXTREME.flip(0)])
@pytest.mark.parametrize("name", LOSSES)
def test_extreme_margins_are_finite(name, reference):
    """Margins of +-1e4 and log-probs down to -1e4, of policy and reference, in float32: finite
    losses, finite gradients."""
    K = 2 + ("ref_samples" in LOSSES[name].needs)
    x = EXTREME[:, :K].clone().requires_grad_()
    columns = {"ref_logps": reference[:, :K], "rewards": EXTREME_REWARDS,
               "lengths": EXTREME_LENGTHS[:, :K], "n_samples": K - 2}
    got = losses.training_loss(name, x, **columns, gamma=0.01, **knobs_of(name))
    got.sum().backward()
    assert got.isfinite().all() and x.grad.isfinite().all()


def test_dpo_and_bradley_terry_at_extreme_margins():
    """They are exact where the formula's limit is plain."""
    wanted = [0.0, 1e4, math.log(2), math.log(2)]
    pair = EXTREME[:, :2].clone().requires_grad_()
    assert_gives(losses.dpo(pair, torch.zeros(4, 2), 1.0), wanted)
    got = losses.bradley_terry(pair)
    assert_gives(got, wanted)
    got.sum().backward()
    assert pair.grad.isfinite().all() and pair.grad[1].tolist() == [-1.0, 1.0]
    ranking = EXTREME.clone().requires_grad_()
    losses.plackett_luce(ranking).sum().backward()
    assert ranking.grad.isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
def test_a_model_that_is_certain_has_finite_gradients(name):
    """Through the model: a head so large that responses have log-probs below -1e4, in float32, and
    so are the margins."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=7, n_layer=1, n_head=1, n_embd=8,
                          tie_word_embeddings=False))
    with torch.no_grad():
        model.lm_head.weight *= 2e5
    batch = collate([([1, 2], [[3, 4, 5], [2, 6], [0, 1]]), ([3], [[0], [5, 5], [2, 2]])])
    logps = model(batch)
    assert logps.min() < -1e4 and (logps[:, 0] - logps[:, 1]).abs().min() > 1e4
    K = 2 + ("ref_samples" in LOSSES[name].needs)
    columns = {"ref_logps": torch.zeros(2, K), "rewards": torch.ones(2, 2, 2),
               "lengths": batch.lengths[:, :K], "n_samples": K - 2}
    got = losses.training_loss(name, logps[:, :K], **columns, gamma=0.01, **knobs_of(name))
    got.sum().backward()
    assert got.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters())
