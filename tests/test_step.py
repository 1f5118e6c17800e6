"""The numbers of a step other than its loss: the learning rate, the flags, what is watched; and the
interval of a comparison. (The step itself is in test_training.py.)"""
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hints import assert_gives
from test_losses import make_batch

from evaluate import interval
from train_policy import learning_rate, loss_flags, statistics

# ---------------------------------------------------------------- the learning rate


def curve(warmup, first=1, cosine_from=None, shape=None):
    """The learning rate of steps 0 to 100, with a peak of 1. first: what step 0 counts as;
    cosine_from: the step from which the cosine counts; shape: of what comes after the warm-up, a
    function of the progress from 0 to 1."""
    shape = shape or (lambda progress: (1 + math.cos(math.pi * progress)) / 2)
    start = warmup if cosine_from is None else cosine_from
    rates = [(step + first) / warmup for step in range(warmup)]
    rates += [shape((step - start) / (100 - start)) for step in range(warmup, 101)]
    return torch.tensor(rates, dtype=torch.float64)


def test_learning_rate():
    """Of 100 steps, 5 are warm-up: up to the peak. Then half a cosine down to zero."""
    rates = torch.tensor([learning_rate(step, 100, 1.0) for step in range(101)]).double()
    mistakes = {
        "the warm-up is missing": [1.0] * 5 + curve(5)[5:].tolist(),
        "the first step of the warm-up would have none: (step + 1) / warmup": curve(5, first=0),
        "the warm-up goes down, not up": [*reversed(curve(5)[:5].tolist()), *curve(5)[5:].tolist()],
        "a sine, not a cosine":
            curve(5, shape=lambda progress: 1 - math.sin(math.pi * progress / 2)),
        "a straight line, not a cosine": curve(5, shape=lambda progress: 1 - progress),
        "a whole wave of the cosine, not half of one":
            curve(5, shape=lambda progress: (1 + math.cos(2 * math.pi * progress)) / 2),
        "below zero: it is (1 + cosine) / 2":
            curve(5, shape=lambda progress: math.cos(math.pi * progress) / 2),
        "the cosine counts from step 0, not from after the warm-up": curve(5, cosine_from=0),
        "the warm-up takes 10% of the steps, not 5%": curve(10)}
    if rates[-1] > 1e-6:
        mistakes["it does not go down to zero"] = rates
    assert_gives(rates.float(), curve(5).float(), mistakes, "the learning rate")
    assert learning_rate(30, 100, 3.0) == pytest.approx(3 * learning_rate(30, 100, 1.0))


@pytest.mark.parametrize("max_steps, rates", [
    (50, {0: 0.5, 1: 1, 2: 1, 26: 0.5, 50: 0}),      # two steps of warm-up, 5% rounded down
    (40, {0: 0.5, 1: 1, 2: 1, 21: 0.5, 40: 0}),
    (9, {0: 1, 1: 1, 5: 0.5, 9: 0}),                 # a step of warm-up is the least
    (2, {0: 1, 1: 1, 2: 0}), (1, {0: 1, 1: 1})])
def test_learning_rate_of_short_runs(max_steps, rates):
    """Up to the peak, in the middle of the cosine, and at the end."""
    for step, rate in rates.items():
        assert learning_rate(step, max_steps, 3.0) == pytest.approx(3 * rate), (
            f"step {step} of a short run, of {max_steps} steps: 5% of them are warm-up, rounded "
            "down, and at least a step is")


# ---------------------------------------------------------------- the flags of the loss


def test_gamma_is_annealed_from_the_first_to_the_last():
    args = SimpleNamespace(loss="p-dpo", beta=0.5, gamma=[1.0, 4.0], max_steps=4)
    flags = [loss_flags(args, step) for step in range(5)]
    assert all("beta" in of_step for of_step in flags), "the other flags are missing, such as beta"
    assert [of_step["beta"] for of_step in flags] == [0.5] * 5
    got = [of_step["gamma"] for of_step in flags]
    assert all(isinstance(gamma, float) for gamma in got), "gamma: a step has a single number"
    assert_gives(torch.tensor(got), [1, 1.75, 2.5, 3.25, 4], what="gamma", mistakes={
        "it is not annealed: it stays at its first value": [1.0] * 5,
        "it is not annealed: it has its last value from the start": [4.0] * 5,
        "it is annealed backwards": [4, 3.25, 2.5, 1.75, 1],
        "it grows by a factor in each step, where it should be linear":
            [4 ** (step / 4) for step in range(5)],
        "it has its last value at max_steps, not a step before": [1.0, 2, 3, 4, 5],
        "from 0, not from its first value": [0.0, 1, 2, 3, 4],
        "one step too early: step 0 has the first value": [1.75, 2.5, 3.25, 4, 4.75]})


def test_flags_of_a_loss_without_a_kl():
    args = SimpleNamespace(loss="ipo", tau=0.5, beta=None, gamma=None, max_steps=4)
    assert loss_flags(args, 1) == {"tau": 0.5}


# ---------------------------------------------------------------- what is watched


def assert_statistics(got, wanted, **mistakes):
    """mistakes: {name of a number: {mistake: what it would give}}."""
    assert list(got) == list(wanted)
    for name, value in wanted.items():
        assert_gives(got[name], value, mistakes.get(name), name)


def test_statistics_of_log_probs():
    """Pairs with two samples each; a margin of zero is half right."""
    _, batch = make_batch([2, 2, 2], n_samples=2)
    change = torch.tensor([[0.5, -0.5, -0.25, 0.0], [0.25, 0.25, 0.75, 0.25],
                           [-0.5, -0.25, 0.0, 1.0]]).double()
    logps = (batch.ref_logps + change).requires_grad_()
    values = statistics(logps, batch)
    watched = {name: value.detach() for name, value in values.items()}
    chosen, rejected = logps.detach()[:, 0], logps.detach()[:, 1]
    without = "the reference is missing: it is the change from it that counts"
    assert_statistics(watched, {
        "chosen_change": [0.5, 0.25, -0.5], "rejected_change": [-0.5, 0.25, -0.25],
        "margin": [1, 0, -0.25], "accuracy": [1, 0.5, 0], "forward_kl": [0.125, -0.5, -0.5]},
        chosen_change={without: chosen}, rejected_change={without: rejected},
        margin={"chosen and rejected are swapped": [-1.0, 0, 0.25]},
        accuracy={"a margin of zero is half right, not wrong": [1.0, 0, 0],
                  "a margin of zero is half right, not right": [1.0, 1, 0]},
        forward_kl={without: -logps.detach()[:, 2:].mean(dim=1),
                    "the sign is turned: it is logp_ref - logp_pi": [-0.125, 0.5, 0.5],
                    "the sum over the samples, not their mean": [0.25, -1.0, -1.0],
                    "of all responses, not of the samples alone": -change.mean(dim=1)})
    assert not any(value.requires_grad for value in values.values()), (
        "detach the log-probs: what is watched has no gradient")


def test_statistics_of_rankings():
    """Each of a row's three pairs counts a third, the pair of the other row whole; without a sample
    there is no KL, and without a reference nothing."""
    _, batch = make_batch([3, 2], n_samples=0)
    change = torch.tensor([[1.5, 0.75, 2.25], [0.5, 0.5, 0.0]]).double()
    unweighted = "the pair's weight in its row is missing"
    assert_statistics(statistics(batch.ref_logps + change, batch), {
        "chosen_change": [0.5, 0.5, 0.25, 0.5], "rejected_change": [0.25, 0.75, 0.75, 0.5],
        "margin": [0.25, -0.25, -0.5, 0], "accuracy": [1 / 3, 0, 0, 0.5]},
        chosen_change={unweighted: [1.5, 1.5, 0.75, 0.5]})
    batch.ref_logps = None
    assert statistics(change, batch) == {}


# ---------------------------------------------------------------- the interval


def test_interval():
    """By hand: differences 1, 2 and 6 have the mean 3, the variance (4 + 1 + 9) / 2 = 7 and the
    standard error sqrt(7 / 3)."""
    mean, half_width = interval(np.array([1.0, 2.0, 6.0]))
    assert isinstance(mean, float) and isinstance(half_width, float)
    assert_gives(mean, 3.0, {"the median, not the mean": 2.0}, "the mean")
    error = math.sqrt(7 / 3)
    assert_gives(torch.tensor([half_width]), [1.96 * error], what="the half-width", mistakes={
        "the variance divides by N - 1, not by N: ddof=1": [1.96 * math.sqrt(14 / 3 / 3)],
        "the spread of the differences, not divided by sqrt(N)": [1.96 * math.sqrt(7)],
        "divided by N, not by sqrt(N)": [1.96 * math.sqrt(7) / 3],
        "the variance: a root is missing": [1.96 * 7 / math.sqrt(3)],
        "1.96 standard errors, not 2": [2 * error],
        "1.96 is missing: one standard error": [error],
        "the whole width, not the half-width": [2 * 1.96 * error]})
