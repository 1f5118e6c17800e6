"""Each loss against its formula in plain numbers, and what every row of the table of losses must
hold: a loss that you add to losses.LOSSES is tested here without a change to this file."""
import inspect
import itertools
import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hints import assert_gives

import losses
from data import Dataset, ranked_pairs
from losses import LOSSES, PREFERENCE_LOSSES, batch_loss, knobs, needs
from model import GPT, GPTConfig

B, M = 5, 3                                                     # pairs, reward models
FLAGS = {"beta": 0.3, "tau": 0.2, "gamma": 0.7}


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def token_counts(*shape, seed=0):
    return torch.randint(1, 9, shape, generator=torch.Generator().manual_seed(seed))


def flags_of(name, factor=1.0):
    """Numbers for the flags of a loss: those above, and the defaults of flags of your own."""
    return {knob: factor * FLAGS[knob] if knob in FLAGS else default
            for knob, default in knobs(name).items()}


# ---------------------------------------------------------------- the formulas
# Of one pair, in plain numbers. logps, ref_logps, lengths: two each, of the chosen response and of
# the rejected one; rewards: for each of the two a list of M; kl: a number.

def h_by_hand(logps, ref_logps):
    return (logps[0] - ref_logps[0]) - (logps[1] - ref_logps[1])


def dpo_by_hand(logps, ref_logps, beta):
    return math.log(1 + math.exp(-beta * h_by_hand(logps, ref_logps)))


def ipo_by_hand(logps, ref_logps, tau):
    return (h_by_hand(logps, ref_logps) - 1 / (2 * tau)) ** 2


def ipo_per_token_by_hand(logps, ref_logps, lengths, tau):
    chosen, rejected = [(logps[k] - ref_logps[k]) / lengths[k] for k in (0, 1)]
    return (chosen - rejected - 1 / (2 * tau)) ** 2


def d_dpo_by_hand(logps, ref_logps, rewards, beta):
    target = sum(rewards[0]) / M - sum(rewards[1]) / M
    return (target - beta * h_by_hand(logps, ref_logps)) ** 2


def gaps_by_hand(logps, ref_logps, rewards, beta):
    """r_m(y1) - r_m(y2) - beta * h of each reward model m."""
    return [chosen - rejected - beta * h_by_hand(logps, ref_logps)
            for chosen, rejected in zip(*rewards)]


def members_by_hand(logps, ref_logps, rewards, beta):
    """(r_m(y1) - r_m(y2) - beta * h)^2 of each reward model m."""
    return [gap ** 2 for gap in gaps_by_hand(logps, ref_logps, rewards, beta)]


def p_dpo_by_hand(logps, ref_logps, kl, beta, gamma):
    return dpo_by_hand(logps, ref_logps, beta) + gamma * kl


def dp_dpo_by_hand(logps, ref_logps, rewards, kl, beta, gamma):
    return d_dpo_by_hand(logps, ref_logps, rewards, beta) + gamma * kl


def e_dpo_by_hand(logps, ref_logps, rewards, kl, beta, gamma):
    return min(members_by_hand(logps, ref_logps, rewards, beta)) + gamma * kl


BY_HAND = {"dpo": dpo_by_hand, "ipo": ipo_by_hand, "ipo-per-token": ipo_per_token_by_hand,
           "d-dpo": d_dpo_by_hand, "p-dpo": p_dpo_by_hand, "dp-dpo": dp_dpo_by_hand,
           "e-dpo": e_dpo_by_hand}

COLUMNS = {"logps": numbers(B, 2, seed=8), "ref_logps": numbers(B, 2, seed=38),
           "rewards": numbers(B, 2, M, seed=3), "lengths": token_counts(B, 2, seed=4),
           "kl": numbers(B, seed=5)}


def by_hand(formula, flags, columns=COLUMNS):
    """A formula's value for each pair, (B,), or (B, M) if it has one for each reward model."""
    used = [column for column in inspect.signature(formula).parameters if column in columns]
    pairs = zip(*(columns[column].tolist() for column in used))
    values = [formula(**dict(zip(used, pair)), **flags) for pair in pairs]
    return torch.tensor(values, dtype=torch.float64)


# ---------------------------------------------------------------- margins

def test_log_ratio_margin():
    """h: the policy's log-ratio of the chosen response minus that of the rejected one."""
    logps, ref_logps = COLUMNS["logps"], COLUMNS["ref_logps"]
    (chosen, rejected), (ref_chosen, ref_rejected) = logps.T, ref_logps.T
    change = logps - ref_logps                                                  # (B, 2)
    wanted = by_hand(h_by_hand, {})
    assert wanted.min() < 0 < wanted.max()
    assert_gives(losses.log_ratio_margin(logps, ref_logps), wanted, what="h", mistakes={
        "chosen and rejected are swapped, or policy and reference": -wanted,
        "the reference is missing": chosen - rejected,
        "the reference of the rejected response is missing": chosen - ref_chosen - rejected,
        "the reference of the chosen response is missing": chosen - rejected + ref_rejected,
        "the absolute value, which loses the sign": wanted.abs(),
        "the sum of the two log-ratios, not their difference": change.sum(dim=1),
        "the mean of the two log-ratios, not their difference": change.mean(dim=1),
        "rows are taken for columns: the chosen responses are [:, 0]": change[0] - change[1],
        "of probabilities, not of log-probs": change.exp()[:, 0] - change.exp()[:, 1],
        "log-probs are divided, not subtracted": chosen / ref_chosen - rejected / ref_rejected})


def test_reward_margin():
    """The chosen response's less the rejected one's, of one reward model and of several."""
    assert losses.reward_margin(torch.tensor([[5, 3], [1, 4]])).tolist() == [2, -3]
    assert losses.reward_margin(torch.tensor([[[5, 1], [3, 4]]])).tolist() == [[2, -3]]


def test_bradley_terry():
    rewards = COLUMNS["rewards"][:, :, 0]
    chosen, rejected = rewards.T
    wanted = [math.log(1 + math.exp(rejected - chosen)) for chosen, rejected in rewards.tolist()]
    assert_gives(losses.bradley_terry(rewards), wanted, what="Bradley-Terry", mistakes={
        "chosen and rejected are swapped": (chosen - rejected).exp().log1p(),
        "the chosen reward alone": (-chosen).exp().log1p(),
        "the margin itself, without log sigmoid": rejected - chosen,
        "each reward by itself, not their difference":
            (-chosen).exp().log1p() + rejected.exp().log1p()})


# ---------------------------------------------------------------- losses

def mistakes_in(name, flags):
    """What a loss would give with a typical mistake in it: {mistake: a number for each pair}. Most
    are the formula of other columns or of other flags."""
    def formula(other_columns=None, **other_flags):
        columns = {**COLUMNS, **(other_columns or {})}
        return by_hand(BY_HAND[name], {**flags, **other_flags}, columns)

    logps, ref_logps, rewards, kl = [COLUMNS[c] for c in ("logps", "ref_logps", "rewards", "kl")]
    of_ipo = ", or 1 / (2 tau) is added" if name == "ipo" else ""
    of_two = " in one of the two margins" if "rewards" in needs(name) else ""
    mistakes = {
        f"chosen and rejected are swapped{of_two}{of_ipo}":
            formula({"logps": logps.flip(1), "ref_logps": ref_logps.flip(1)}),
        "the reference is missing": formula({"ref_logps": torch.zeros(B, 2)})}
    if "beta" in flags:
        mistakes["beta is missing (this is right for beta = 1 only)"] = formula(beta=1)
        mistakes["divided by beta, not multiplied"] = formula(beta=1 / flags["beta"])
    if "gamma" in flags:
        mistakes["gamma is missing (this is right for gamma = 1 only)"] = formula(gamma=1)
        mistakes["the KL is missing"] = formula(gamma=0)
        mistakes["the KL is subtracted, not added"] = formula({"kl": -kl})
    if name == "dpo":
        mistakes["beta is outside the logarithm"] = flags["beta"] * formula(beta=1)
        mistakes["beta is in it twice"] = formula(beta=flags["beta"] ** 2)
    if name == "ipo":
        h, tau = by_hand(h_by_hand, {}), flags["tau"]
        mistakes["1 / 2 * tau, which is tau / 2: brackets are missing"] = formula(tau=1 / tau)
        mistakes["1 / tau, not 1 / (2 tau)"] = formula(tau=tau / 2)
        mistakes["tau * h, as if tau were beta"] = (tau * h - 0.5) ** 2
    if "rewards" in needs(name):
        gaps = by_hand(gaps_by_hand, {"beta": flags["beta"]})                   # (B, M)
        of_mean = {"rewards": rewards.mean(dim=2, keepdim=True).expand(B, 2, M)}
        weighted_kl = flags.get("gamma", 0) * kl
        mistakes |= {
            "the mean of the squares over the reward models":
                gaps.square().mean(dim=1) + weighted_kl}
    if name in ("d-dpo", "dp-dpo"):
        first = {"rewards": rewards[:, :, :1].expand(B, 2, M)}
        mistakes["the first reward model alone, not the mean"] = formula(first)
        beta = flags["beta"]
        mistakes["the sum of the reward models, not their mean"] = formula({"rewards": M * rewards})
        mistakes["beta belongs to h, not to the reward margin"] = (
            beta ** 2 * (formula(beta=1 / beta) - weighted_kl) + weighted_kl)
    if name == "e-dpo":
        best = gaps.square().mean(dim=0).argmin()
        mistakes |= {
            "the mean reward, where every member has its own": formula(of_mean),
            "the sum over the members, not the minimum": gaps.square().sum(dim=1) + weighted_kl,
            "the least of the whole batch, not of each pair": gaps.square().min() + weighted_kl,
            "the worst member, not the best": gaps.square().max(dim=1).values + weighted_kl,
            "the minimum is taken before the square":
                gaps.min(dim=1).values.square() + weighted_kl,
            "the square is missing": gaps.abs().min(dim=1).values + weighted_kl,
            "one member for the whole batch, not for each pair":
                gaps[:, best].square() + weighted_kl}
    return mistakes


@pytest.mark.parametrize("factor", [1.0, 0.6, 2.5])
@pytest.mark.parametrize("name", BY_HAND)
def test_a_loss_is_its_formula(name, factor):
    """The KL term included, whatever the flags."""
    flags = flags_of(name, factor)
    got = LOSSES[name](**{need: COLUMNS[need] for need in needs(name)}, **flags)
    assert_gives(got, by_hand(BY_HAND[name], flags), mistakes_in(name, flags), name)


def test_forward_kl_is_the_mean_over_samples():
    """By hand: of two samples, which the policy finds 1 and 3 nats less likely than the reference
    does, then 1 nat less and 2 nats more, and then 1 and 4 nats more."""
    logps = torch.tensor([[-4.0, -5.0], [-2.0, 0.0], [-1.0, -0.5]])
    ref_logps = torch.tensor([[-3.0, -2.0], [-1.0, -2.0], [-2.0, -4.5]])
    change = ref_logps - logps
    assert_gives(losses.forward_kl(logps, ref_logps), [2.0, -0.5, -2.5], what="the KL", mistakes={
        "the sign is turned: it is of ref || pi, logp_ref - logp_pi": [-2.0, 0.5, 2.5],
        "the sum over the samples, not their mean": change.sum(dim=1),
        "the mean over the prompts, not over the samples": change.mean(dim=0),
        "the first sample alone": change[:, 0],
        "negative estimates are cut off": change.clamp(min=0).mean(dim=1),
        "the absolute value, where an estimate may be negative": change.mean(dim=1).abs(),
        "ratios of probabilities: subtract log-probs, without exp": change.exp().mean(dim=1),
        "weighted by probabilities, though samples come as often as they are likely":
            (ref_logps.exp() * change).sum(dim=1)})


@pytest.mark.parametrize("S", [1, 2, 3])
def test_forward_kl_of_all_samples_there_are(S):
    """Its mean over all ways to draw S samples from a reference with three responses is KL(ref ||
    pi), exactly. It is 0 for the reference itself."""
    ref, pi = numbers(3, seed=6).log_softmax(dim=0), numbers(3, seed=7).log_softmax(dim=0)
    samples = torch.tensor(list(itertools.product(range(3), repeat=S)))         # (3^S, S)
    likely = ref[samples].sum(dim=1).exp()                                      # (3^S,)
    got = (likely * losses.forward_kl(pi[samples], ref[samples])).sum()
    assert_gives(got, (ref.exp() * (ref - pi)).sum(), what="the KL", mistakes={
        "KL(pi || ref), not KL(ref || pi)": (pi.exp() * (pi - ref)).sum(),
        "the sign is turned": (ref.exp() * (pi - ref)).sum()})
    assert losses.forward_kl(ref[samples], ref[samples]).tolist() == [0] * 3 ** S


def test_sft_adds_up_all_demonstrations_of_a_prompt():
    assert losses.sft(torch.tensor([[-3.0, -1.0], [-5.0, 0.5]])).tolist() == [4.0, 4.5]


def test_distillation_without_a_kl():
    """distill has one reward model, ensemble_distill the best of several for each pair."""
    logps, ref_logps, rewards, beta = *map(COLUMNS.get, ("logps", "ref_logps", "rewards")), 0.3
    members = by_hand(members_by_hand, {"beta": beta})                          # (B, M)
    assert_gives(losses.distill(logps, ref_logps, rewards[:, :, 0], beta), members[:, 0])
    best = losses.ensemble_distill(logps, ref_logps, rewards, beta)
    assert_gives(best, members.min(dim=1).values)


def test_best_member_is_the_one_that_the_minimum_picks():
    """The forty pairs do not all have the same one."""
    columns = {"logps": numbers(40, 2, seed=1), "ref_logps": numbers(40, 2, seed=2),
               "rewards": numbers(40, 2, M, seed=3)}
    gaps = by_hand(gaps_by_hand, {"beta": 0.3}, columns)                        # (40, M)
    without_beta = by_hand(gaps_by_hand, {"beta": 1}, columns)
    wanted = gaps.square().argmin(dim=1)
    assert set(wanted.tolist()) == {0, 1, 2}
    got = losses.best_member(**columns, beta=0.3)
    assert not got.is_floating_point(), "the least square, not the index of its reward model"
    assert_gives(got, wanted, what="the best member", mistakes={
        "the worst one": gaps.square().argmax(dim=1),
        "the square is missing": gaps.argmin(dim=1),
        "beta is missing (this is right for beta = 1 only)": without_beta.square().argmin(dim=1),
        "the best pair of each member, not the best member of each pair":
            gaps.square().argmin(dim=0),
        "the largest margin, not the one that is nearest to beta * h":
            losses.reward_margin(columns["rewards"]).argmax(dim=1)})


# ---------------------------------------------------------------- the table

# What the README and the paper say of each: what it needs to know, and its flags.
ANNEALED = (1e-4, 1e-2)
TABLE = {
    "sft": ([], {}),
    "dpo": (["ref_logps"], {"beta": 1.0}),
    "ipo": (["ref_logps"], {"tau": 0.1}),
    "ipo-per-token": (["ref_logps", "lengths"], {"tau": 0.1}),
    "d-dpo": (["ref_logps", "rewards"], {"beta": 1.0}),
    "p-dpo": (["ref_logps", "kl"], {"beta": 1.0, "gamma": ANNEALED}),
    "dp-dpo": (["ref_logps", "rewards", "kl"], {"beta": 1.0, "gamma": ANNEALED}),
    "e-dpo": (["ref_logps", "rewards", "kl"], {"beta": 1.0, "gamma": ANNEALED}),
}


@pytest.mark.parametrize("name", TABLE)
def test_a_row_of_the_table(name):
    needed, flags = TABLE[name]
    assert needs(name) == ["logps", *needed] and knobs(name) == flags


def test_every_loss_but_sft_is_a_preference_loss():
    assert PREFERENCE_LOSSES == [name for name in LOSSES if name != "sft"]


@pytest.mark.parametrize("name", LOSSES)
def test_a_kl_term_has_its_weight(name):
    """The samples for a KL would weigh nothing without gamma, and gamma nothing without them."""
    assert ("kl" in needs(name)) == ("gamma" in knobs(name))


# ---------------------------------------------------------------- the pairs of a batch

def test_ranked_pairs_of_each_row():
    """All of them, the better response first, row after row; in each row the weights add up to 1.
    One response is no pair."""
    pairs, pair_row, pair_weight = ranked_pairs([2, 3, 1, 4])
    wanted = [[0, 1], [0, 1], [0, 2], [1, 2], [0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]]
    assert_gives(pairs.tolist(), wanted, what="pairs", mistakes={
        "the better response is the first of a pair": [pair[::-1] for pair in wanted],
        "not all pairs: the best response and another one": [p for p in wanted if p[0] == 0],
        "not all pairs: neighbours only": [p for p in wanted if p[0] + 1 == p[1]]})
    assert pair_row.tolist() == [0, 1, 1, 1, 3, 3, 3, 3, 3, 3], "pair_row: the row of each pair"
    assert_gives(pair_weight, [1] + [1 / 3] * 3 + [1 / 6] * 6, what="pair_weight", mistakes={
        "all pairs have the same weight: a row of four would count like six": torch.ones(10),
        "the weight is 1 over the number of responses, not of pairs":
            [1 / 2] + [1 / 3] * 3 + [1 / 4] * 6})
    assert (pairs.dtype, pair_row.dtype) == (torch.int64, torch.int64), "pairs are int64"
    assert pair_weight.dtype == torch.float32, "pair_weight is float32"
    assert [tuple(array.shape) for array in ranked_pairs([1, 1])] == [(0, 2), (0,), (0,)], (
        "rows of one response have no pair, which is the shape (0, 2)")


def make_batch(n_responses, n_samples, seed=20):
    """A batch of rows with these numbers of responses, the best first, and samples from the
    reference after them; and a policy's log-probs. Returns (logps (rows, K), TreeBatch)."""
    rows, most = len(n_responses), max(n_responses)
    K = most + n_samples
    tokens = token_counts(rows, K, seed=seed).tolist()
    examples = [([1, 2], [[3] * tokens[row][k] for k in range(n + n_samples)])
                for row, n in enumerate(n_responses)]
    dataset = Dataset(examples, rewards=numbers(rows, most, M, seed=seed).numpy(),
                      ref_logps=numbers(rows, K, seed=seed + 1).numpy(), n_samples=n_samples)
    return numbers(rows, K, seed=seed + 2), dataset.batch(np.arange(rows))


def S_of(name):
    return 2 if "kl" in needs(name) else 0


def loss_pair_by_pair(name, logps, batch, n_responses, n_samples):
    """Every pair of every row by itself, over the number of the row's pairs; the KL is the mean
    over the samples that come after the row's responses."""
    values = []
    for row, K in enumerate(n_responses):
        samples = range(K, K + n_samples)
        kl = sum((batch.ref_logps[row, k] - logps[row, k]) for k in samples) / max(n_samples, 1)
        pairs = [(k, j) for k in range(K) for j in range(k + 1, K)]     # the better response first
        for i, j in pairs:
            columns = {"logps": logps, "ref_logps": batch.ref_logps, "rewards": batch.rewards,
                       "lengths": batch.lengths}
            columns = {column: value[row, [i, j]][None] for column, value in columns.items()}
            columns["kl"] = torch.as_tensor(kl)[None]
            loss = LOSSES[name](**{need: columns[need] for need in needs(name)}, **flags_of(name))
            values.append(loss / len(pairs))
    return torch.cat(values)


@pytest.mark.parametrize("name, flags", [
    ("dpo", {"beta": 1.0}), ("ipo", {"tau": 0.1}), ("d-dpo", {"beta": 1.0}),
    ("p-dpo", {"beta": 1.0, "gamma": (1e-4, 1e-2)}),
    ("dp-dpo", {"beta": 1.0, "gamma": (1e-4, 1e-2)}),
    ("e-dpo", {"beta": 1.0, "gamma": (1e-4, 1e-2)})])
def test_flags_have_these_defaults(name, flags):
    """gamma's are the paper's: it grows from the first to the second."""
    assert knobs(name) == flags
    columns = {"logps": numbers(B, 2), "ref_logps": numbers(B, 2, seed=1),
               "rewards": numbers(B, 2, M, seed=2), "kl": numbers(B, seed=3)}
    given = {need: columns[need] for need in needs(name)}
    if "gamma" in flags:            # a loss takes the number of one step
        given["gamma"] = 0.5
    assert torch.equal(LOSSES[name](**given), LOSSES[name](**{**flags, **given}))


@pytest.mark.parametrize("n_responses", [[2] * 4, [3] * 2, [3, 2, 4, 1, 2]])
@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_batch_loss_is_the_mean_over_the_pairs_of_each_row(name, n_responses):
    """Pairs, rankings of three, and rows of several sizes, one of which has no pair."""
    logps, batch = make_batch(n_responses, S_of(name))
    got = batch_loss(name, logps, batch, **flags_of(name))
    assert len(got) == sum(math.comb(n, 2) for n in n_responses)
    torch.testing.assert_close(got, loss_pair_by_pair(name, logps, batch, n_responses, S_of(name)))


@pytest.mark.parametrize("shape", [(), (1,), (3, 1)])
def test_a_loss_that_is_not_a_number_for_each_pair(monkeypatch, shape):
    """It would be multiplied by the weights of the pairs all the same, and be another loss."""
    logps, batch = make_batch([2] * 3, 0)
    monkeypatch.setitem(LOSSES, "mine", lambda logps: torch.zeros(shape))
    with pytest.raises(AssertionError, match=r"mine gives \[.*\] numbers, not one for each of 3"):
        batch_loss("mine", logps, batch)


def test_batch_loss_of_demonstrations():
    """One number for each row, of all its demonstrations; pairs do not matter."""
    logps, batch = make_batch([3, 3], 0)
    torch.testing.assert_close(batch_loss("sft", logps, batch), -logps.sum(dim=1))


def test_a_loss_that_somebody_adds(monkeypatch):
    """One function is enough, with the columns in any order: here it has all."""
    def everything(rewards, logps, kl, lengths, ref_logps, scale=2.0, gamma=(0.0, 1.0)):
        margins = logps[:, 0] + 10 * logps[:, 1] + 100 * ref_logps[:, 0] + 1000 * lengths[:, 1]
        return scale * margins + rewards[:, 1, 2] + gamma * kl

    monkeypatch.setitem(LOSSES, "everything", everything)
    assert needs("everything") == ["rewards", "logps", "kl", "lengths", "ref_logps"]
    assert knobs("everything") == {"scale": 2.0, "gamma": (0.0, 1.0)}
    logps, batch = make_batch([3, 2], 2)
    got = batch_loss("everything", logps, batch, **flags_of("everything"))
    torch.testing.assert_close(got, loss_pair_by_pair("everything", logps, batch, [3, 2], 2))
    with pytest.raises(KeyError, match="ppo"):
        batch_loss("ppo", logps, batch)


# ---------------------------------------------------------------- where the policy is the reference

def squared_mean_margin(rewards):
    return (sum(rewards[0]) / M - sum(rewards[1]) / M) ** 2


def least_squared_margin(rewards):
    return min((chosen - rejected) ** 2 for chosen, rejected in zip(*rewards))


STEP_0 = {"dpo": math.log(2), "p-dpo": math.log(2), "ipo": 1 / (4 * 0.2 ** 2),
          "ipo-per-token": 1 / (4 * 0.2 ** 2), "d-dpo": squared_mean_margin,
          "dp-dpo": squared_mean_margin, "e-dpo": least_squared_margin}


@pytest.mark.parametrize("name", STEP_0)
def test_step_0(name):
    """DPO is ln 2, IPO 1 / (4 tau^2), distillation the squared reward margin, and the KL is 0: what
    a training run says before its first step."""
    _, batch = make_batch([2] * B, S_of(name))
    wanted = [STEP_0[name]] * B
    if callable(STEP_0[name]):
        wanted = [STEP_0[name](rewards) for rewards in batch.rewards.tolist()]
    assert_gives(batch_loss(name, batch.ref_logps, batch, **flags_of(name)), wanted)


def assert_prefers_the_chosen(name):
    """Where the policy is the reference and the reward models agree with the labels, a step down
    the gradient raises the chosen response's log-prob and does not raise the rejected one's."""
    logps = COLUMNS["ref_logps"].clone().requires_grad_()
    rewards = torch.tensor([2.0, 0.5]).double()[None, :, None].expand(B, 2, M)
    columns = {**COLUMNS, "logps": logps, "rewards": rewards}
    loss = LOSSES[name](**{need: columns[need] for need in needs(name)}, **flags_of(name))
    chosen, rejected = torch.autograd.grad(loss.sum(), logps)[0].unbind(dim=1)
    assert (chosen < 0).all() and (rejected >= 0).all(), (
        f"{name} lowers the chosen response: is a sign turned, or are the two sides swapped?")


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_a_loss_prefers_the_chosen_response(name):
    assert_prefers_the_chosen(name)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_loss_that_prefers_the_rejected_response_is_noticed(monkeypatch, sign):
    """SimPO as docs/assignments.md has it, and the same with its sign turned."""
    def simpo(logps, lengths, beta=2.0):
        mean_logps = logps / lengths                                # (B, 2)
        return -F.logsigmoid(sign * beta * (mean_logps[:, 0] - mean_logps[:, 1]))

    monkeypatch.setitem(LOSSES, "simpo", simpo)
    turned = nullcontext() if sign == 1 else pytest.raises(AssertionError, match="a sign turned")
    with turned:
        assert_prefers_the_chosen("simpo")


# ---------------------------------------------------------------- gradients

@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck(name):
    """Every loss's gradient equals finite differences in float64, with respect to the log-probs and
    the rewards. (The minimum of e-DPO has kinks; these random numbers are not on one.)"""
    logps, batch = make_batch([3, 2], S_of(name))

    def loss(logps, rewards):
        batch.rewards = rewards
        return batch_loss(name, logps, batch, **flags_of(name))

    rewards = batch.rewards.requires_grad_("rewards" in needs(name))
    assert torch.autograd.gradcheck(loss, (logps.requires_grad_(), rewards))


def test_gradcheck_of_reward_models():
    assert torch.autograd.gradcheck(losses.bradley_terry, numbers(5, 2).requires_grad_())


# ---------------------------------------------------------------- extremes

# Log-probs of two responses: margins of +-1e4, and responses of probability exp(-1e4).
EXTREME = torch.tensor([[0.0, -1e4], [-1e4, 0.0], [-1e4, -1e4], [0.0, 0.0]])
OTHER_COLUMNS = {
    "rewards": torch.tensor([[[1e4, 5e3], [0.0, 0.0]], [[-1e4, -5e3], [0.0, 0.0]],
                             [[0.0, 0.0], [0.0, 0.0]], [[5.0, 2.5], [0.0, 0.0]]]),  # (4, 2, 2)
    "lengths": torch.tensor([[1, 1], [1, 1000], [1000, 1], [1000, 1000]]),
    "kl": torch.tensor([1e4, -1e4, 0.0, 1.0])}


@pytest.mark.parametrize("reference", [torch.zeros(4, 2), EXTREME, EXTREME.flip(0)])
@pytest.mark.parametrize("name", LOSSES)
def test_extreme_margins_are_finite(name, reference):
    """Margins of +-1e4 and log-probs down to -1e4, of policy and reference, in float32: finite
    losses, finite gradients."""
    logps = EXTREME.clone().requires_grad_()
    columns = {"logps": logps, "ref_logps": reference, **OTHER_COLUMNS}
    got = LOSSES[name](**{need: columns[need] for need in needs(name)}, **flags_of(name))
    got.sum().backward()
    assert got.isfinite().all(), f"{name} overflows at a margin of 1e4: use F.logsigmoid"
    assert logps.grad.isfinite().all(), f"the gradient of {name} overflows at a margin of 1e4"


def test_dpo_and_bradley_terry_at_extreme_margins():
    """They are exact where the formula's limit is plain."""
    wanted = [0.0, 1e4, math.log(2), math.log(2)]
    pair = EXTREME.clone().requires_grad_()
    of_log = torch.tensor([0.0, math.inf, math.log(2), math.log(2)])
    overflow = {"log(sigmoid(x)) overflows: use F.logsigmoid": of_log}
    assert_gives(losses.dpo(pair, torch.zeros(4, 2)), wanted, overflow, "dpo")
    got = losses.bradley_terry(pair)
    assert_gives(got, wanted, overflow, "Bradley-Terry")
    got.sum().backward()
    assert pair.grad.isfinite().all() and pair.grad[1].tolist() == [-1.0, 1.0]


@pytest.mark.parametrize("name", LOSSES)
def test_a_model_that_is_certain_has_finite_gradients(name):
    """Through the model: a head so large that responses have log-probs below -1e4, in float32, and
    so are the margins."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=7, n_layer=1, n_head=1, n_embd=8,
                          tie_word_embeddings=False))
    with torch.no_grad():
        model.lm_head.weight *= 2e5
    examples = [([1, 2], [[3, 4, 5], [2, 6], [0, 1]]), ([3], [[0], [5, 5], [2, 2]])]
    dataset = Dataset(examples, np.ones((2, 2, 2), np.float32), np.zeros((2, 3), np.float32), 1)
    batch = dataset.batch(np.arange(2))
    logps = model(batch)
    assert logps.min() < -1e4 and (logps[:, 0] - logps[:, 1]).abs().min() > 1e4
    got = batch_loss(name, logps, batch, **flags_of(name))
    got.sum().backward()
    assert got.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters())
