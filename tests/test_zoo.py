"""The losses of zoo.py: each against its formula in plain numbers, each against the properties that
its paper gives it, and the page that shows them."""
import math
from concurrent.futures import Future
from contextlib import nullcontext
from inspect import getsource, signature
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hints import assert_gives
from test_losses import COLUMNS, EXTREME, M, h_by_hand, make_batch

import losses
import train_policy
import zoo
from data import Dataset
from experiments import loss_page, properties, zoo_answers
from experiments import zoo as runner
from losses import PREFERENCE_LOSSES, batch_loss, knobs, needs
from support.columns import check_step_0
from support.flags import InputError

ROOT = Path(__file__).parents[1]
SOME = {"beta": 0.3, "eta": 2.5, "epsilon": 0.2, "weight": 0.6, "alpha": 0.7, "blend": 0.4,
        "r_max": 0.2, "per_token": 0.07, "target": 0.8, "offset": 0.9, "desirable_weight": 1.3,
        "undesirable_weight": 0.7}


def flags_of(name):
    return {knob: SOME[knob] for knob in knobs(name)}


# ---------------------------------------------------------------- the formulas, in plain numbers

def sigma(x):
    return 1 / (1 + math.exp(-x))


def nls(x):
    """-log sigma(x)"""
    return math.log(1 + math.exp(-x))


class Pair:
    """What the formulas below are about: h, u, v, mean log-probs p and q of a token, and so on."""

    def __init__(self, logps, ref_logps, rewards, lengths):
        self.chosen, self.rejected = logps
        self.u, self.v = logps[0] - ref_logps[0], logps[1] - ref_logps[1]
        self.h = h_by_hand(logps, ref_logps)
        self.tokens = lengths
        self.p, self.q = logps[0] / lengths[0], logps[1] / lengths[1]
        self.gap = sum(rewards[0]) / M - sum(rewards[1]) / M


def discopop_by_hand(pair, beta, blend):
    s = sigma(beta * pair.h / blend)
    return (1 - s) * nls(beta * pair.h) + s * math.exp(-beta * pair.h)


def robust_dpo_by_hand(pair, beta, epsilon):
    right, flipped = nls(beta * pair.h), nls(-beta * pair.h)
    return ((1 - epsilon) * right - epsilon * flipped) / (1 - 2 * epsilon)


def exo_by_hand(pair, beta, epsilon):
    p, q = sigma(beta * pair.h), sigma(-beta * pair.h)
    return p * math.log(p / (1 - epsilon)) + q * math.log(q / epsilon)


def chi_po_by_hand(pair, beta, r_max):
    margin = beta * (math.exp(pair.u) + pair.u - math.exp(pair.v) - pair.v)
    return nls(min(max(margin, -2 * r_max), 2 * r_max))


def alpha_dpo_by_hand(pair, beta, alpha):
    f_of_u, f_of_v = [(1 - math.exp(-alpha * x)) / alpha for x in (pair.u, pair.v)]
    return nls(beta * f_of_u - beta * f_of_v)


def r_dpo_by_hand(pair, beta, per_token):
    return nls(beta * pair.h + per_token * (pair.tokens[0] - pair.tokens[1]))


def orpo_by_hand(pair, weight):
    odds_of_p, odds_of_q = [math.exp(x) / (1 - math.exp(x)) for x in (pair.p, pair.q)]
    return -pair.p + weight * nls(math.log(odds_of_p / odds_of_q))


BY_HAND = {
    "hinge": lambda x, beta: max(0, 1 - beta * x.h),
    "squared-hinge": lambda x, beta: max(0, 1 - beta * x.h) ** 2,
    "exponential": lambda x, beta: math.exp(-beta * x.h),
    "discopop": discopop_by_hand,
    "cdpo": lambda x, beta, epsilon: (1 - epsilon) * nls(beta * x.h) + epsilon * nls(-beta * x.h),
    "robust-dpo": robust_dpo_by_hand,
    "exo": exo_by_hand,
    "nca": lambda x, beta: nls(beta * x.u) + nls(-beta * x.u) / 2 + nls(-beta * x.v) / 2,
    "apo-zero": lambda x, beta: sigma(beta * x.v) - sigma(beta * x.u),
    "apo-down": lambda x, beta: sigma(beta * x.u) - sigma(beta * (x.u - x.v)),
    "sppo": lambda x, eta: (x.u - eta / 2) ** 2 + (x.v + eta / 2) ** 2,
    "dpop": lambda x, beta, weight: nls(beta * (x.h - weight * max(0, -x.u))),
    "rpo": lambda x, beta, weight: nls(beta * x.h) - weight * x.p,
    "alpha-dpo": alpha_dpo_by_hand,
    "js-dpo": lambda x, beta: nls(beta * (nls(x.v) - nls(x.u))),
    "chi-po": chi_po_by_hand,
    "ln-dpo": lambda x, beta: nls(beta * (x.u / x.tokens[0] - x.v / x.tokens[1])),
    "r-dpo": r_dpo_by_hand,
    "simpo": lambda x, beta, target: nls(beta * (x.p - x.q) - target),
    "orpo": orpo_by_hand,
    "cpo": lambda x, beta, weight: nls(beta * (x.chosen - x.rejected)) - weight * x.chosen,
    "slic": lambda x, target, weight: max(0, target - x.chosen + x.rejected) - weight * x.chosen,
    "rrhf": lambda x, weight: max(0, x.q - x.p) - weight * x.chosen,
    "odpo": lambda x, beta, offset: nls(beta * x.h - offset * x.gap),
    "rebel": lambda x, eta: (x.h / eta - x.gap) ** 2,
}
# Log-probs are below zero.
OURS = {**COLUMNS, "logps": COLUMNS["logps"] - 4, "ref_logps": COLUMNS["ref_logps"] - 4}


def pairs():
    columns = [OURS[name].tolist() for name in ("logps", "ref_logps", "rewards", "lengths")]
    return [Pair(*values) for values in zip(*columns)]


def value_of(name, columns=OURS, **flags):
    return zoo.ZOO[name](**{need: columns[need] for need in needs(name)}, **flags)


@pytest.mark.parametrize("name", BY_HAND)
def test_a_loss_is_its_formula(name):
    flags = flags_of(name)
    assert list(signature(BY_HAND[name]).parameters)[1:] == list(flags)
    assert_gives(value_of(name, **flags), [BY_HAND[name](pair, **flags) for pair in pairs()])


def test_losses_of_a_batch_are_their_formulas():
    """BCO's threshold and KTO's reference point are means of the batch, and not differentiated; AOT
    compares quantiles: each pair with what has its rank."""
    ours, beta = pairs(), 0.3
    u, v = [pair.u for pair in ours], [pair.v for pair in ours]
    delta = beta * sum(u + v) / (2 * len(u))
    assert_gives(value_of("bco", beta=beta),
                 [nls(beta * a - delta) + nls(delta - beta * b) for a, b in zip(u, v)])
    higher = {**OURS, "logps": OURS["logps"] + 2}           # a mean below zero counts as zero
    z = sum(u + v) / (2 * len(u)) + 2
    assert z > 0 > z - 4
    assert_gives(value_of("kto", higher, beta=beta, desirable_weight=1.5),
                 [1.5 * sigma(beta * (z - a - 2)) + sigma(beta * (b + 2 - z))
                  for a, b in zip(u, v)])
    lower = {**OURS, "logps": OURS["logps"] - 2}
    assert_gives(value_of("kto", lower, beta=beta),
                 [sigma(-beta * (a - 2)) + sigma(beta * (b - 2)) for a, b in zip(u, v)])
    margins = [pair.chosen - pair.rejected for pair in ours]
    ref_margins = sorted(margin - pair.h for margin, pair in zip(margins, ours))
    rank = {margin: place for place, margin in enumerate(sorted(margins))}
    assert_gives(value_of("aot", beta=beta),
                 [nls(beta * (margin - ref_margins[rank[margin]])) for margin in margins])
    rank = {a: place for place, a in enumerate(sorted(u))}
    assert_gives(value_of("aot-unpaired", beta=beta),
                 [nls(beta * (a - sorted(v)[rank[a]])) for a in u])


def test_every_loss_has_a_formula_here():
    assert [*BY_HAND, "bco", "kto", "aot", "aot-unpaired"] == sorted(
        zoo.ZOO, key=[*BY_HAND, "bco", "kto", "aot", "aot-unpaired"].index)


def test_what_papers_say_of_their_own():
    """cDPO asks for the margin log(9) / beta at 10% noise. Robust DPO's mean over flipped labels is
    DPO. DiscoPOP's valley and hump are at -2.3714 and 1.44012 for beta = 0.05, the valley at 0.785.
    REBEL is distillation. alpha-DPO comes from DPO (0), and ends at the forward KL (1)."""
    h = torch.tensor([1.7, -0.4], dtype=torch.float64)
    pair, ref = torch.stack([h, 0 * h], dim=1), torch.zeros(2, 2, dtype=torch.float64)
    noisy = 0.8 * zoo.robust_dpo(pair, ref, 0.5, 0.2) + 0.2 * zoo.robust_dpo(-pair, ref, 0.5, 0.2)
    torch.testing.assert_close(noisy, losses.dpo(pair, ref, 0.5))
    places = torch.tensor([[-2.3714, 0], [1.44012, 0]], dtype=torch.float64, requires_grad=True)
    discopop = zoo.discopop(places, ref, 0.05)
    slopes, = torch.autograd.grad(discopop.sum(), places)
    assert slopes.abs().max() < 1e-5 and discopop[0].item() == pytest.approx(0.785, abs=1e-3)
    rewards = torch.tensor([[[1.0], [0.2]], [[0.1], [0.3]]], dtype=torch.float64)
    torch.testing.assert_close(zoo.rebel(pair, ref, rewards, 4.0),
                               losses.distill(pair, ref, rewards[:, :, 0], 0.25))
    torch.testing.assert_close(zoo.alpha_dpo(pair, ref, 0.5, 1e-8), losses.dpo(pair, ref, 0.5))


# ---------------------------------------------------------------- properties

# What the papers' equations give at the defaults, of the pair in experiments/properties.py: value
# at the reference; gradient there on the two log-probs; is it of h alone? where along h is it
# lowest? bounded below? convex? what does it do where both log-probs fall? slopes at h = -50 and
# at 50; is the label used?
LN2 = math.log(2)
EXPECTED = {
    "dpo": (LN2, -.5, .5, True, "inf", True, True, "flat", -1, 0, True),
    "ipo": (25, -10, 10, True, [5], True, True, "flat", -110, 90, True),
    "ipo-per-token": (25, -.5, .5, False, [100], True, True, "flat", -.75, -.25, True),
    "d-dpo": (4, -4, 4, True, [2], True, True, "flat", -104, 96, False),
    "p-dpo": (LN2, -.5, .5, True, "inf", True, True, "flat", -1, 0, True),
    "dp-dpo": (4, -4, 4, True, [2], True, True, "flat", -104, 96, False),
    "e-dpo": (1, -2, 2, True, [1, 1.5, 2, 2.5, 3], True, False, "flat", -102, 94, False),
    "hinge": (1, -1, 1, True, [1, "beyond"], True, True, "flat", -1, 0, True),
    "squared-hinge": (1, -2, 2, True, [1, "beyond"], True, True, "flat", -102, 0, True),
    "exponential": (1, -1, 1, True, "inf", True, True, "flat", -math.exp(50), 0, True),
    "discopop": (LN2 / 2 + .5, .784, -.784, True, "inf", True, False, "flat", -1, 0, True),
    "cdpo": (LN2, -.4, .4, True, [math.log(9)], True, True, "flat", -.9, .1, True),
    "robust-dpo": (LN2, -.625, .625, True, "inf", False, True, "flat", -1.125, -.125, True),
    "exo": (2.761, -math.log(999) / 4, math.log(999) / 4, True, [math.log(999)], True, False,
            "flat", 0, 0, True),
    "nca": (2 * LN2, -.25, .25, False, [2 * math.log(3)], True, True, "rises", -.75, .25, True),
    "bco": (2 * LN2, -.5, .5, False, "inf", True, True, "flat", -1, 0, True),
    "kto": (1, -.25, .25, False, "inf", True, False, "rises to a limit", 0, 0, True),
    "apo-zero": (0, -.25, .25, False, "inf", True, False, "rises to a limit", 0, 0, True),
    "apo-down": (0, 0, .25, False, [2.12], True, False, "falls to a limit", 0, 0, True),
    "sppo": (4.5, -3, 3, False, [3], True, True, "rises", -53, 47, True),
    "dpop": (LN2, -.5, .5, False, "inf", True, True, "rises", -3.5, 0, True),
    "rpo": (LN2 + 3, -.55, .5, False, "inf", True, True, "rises", -1.025, -.025, True),
    "alpha-dpo": (LN2, -.5, .5, False, "inf", True, False, "falls", -134168.6, 0, True),
    "js-dpo": (LN2, -.25, .25, False, "inf", True, False, "falls to a limit", -.5, 0, True),
    "chi-po": (LN2, -1, 1, False, [5.4, "beyond"], True, False, "rises to a limit", 0, 0, True),
    "aot": (LN2, -.5, .5, True, "inf", True, True, "flat", -1, 0, True),
    "aot-unpaired": (LN2, -.5, .5, False, "inf", True, False, "flat", -.5, 0, True),
    "ln-dpo": (LN2, -.25, .25, False, "inf", True, True, "flat", -.5, 0, True),
    "r-dpo": (LN2, -.5, .5, True, "inf", True, True, "flat", -1, 0, True),
    "simpo": (nls(-1), -.5 * sigma(1), .5 * sigma(1), False, "inf", True, True, "flat", -.5, 0,
              True),
    "orpo": (LN2 + 3, -.0763, .0263, False, "inf", True, False, "rises", -.0770, -.0286, True),
    "cpo": (LN2 + 60, -1.5, .5, False, "inf", True, True, "rises", -1.5, -.5, True),
    "slic": (7, -1.1, 1, False, "inf", True, True, "rises", -1.05, -.05, True),
    "rrhf": (6, -.1, 0, False, "inf", True, True, "rises", -.1, -.05, True),
    "odpo": (nls(-2), -sigma(2), sigma(2), True, "inf", True, True, "flat", -1, 0, True),
    "rebel": (4, -4, 4, True, [2], True, True, "flat", -104, 96, False),
}
NEEDED = {
    "nothing": ["cpo", "slic"],
    "lengths": ["simpo", "orpo", "rrhf"],
    "reference, batch": ["bco", "kto", "aot", "aot-unpaired"],
    "reference, lengths": ["ipo-per-token", "rpo", "ln-dpo", "r-dpo"],
    "reference, rewards": ["d-dpo", "odpo", "rebel"],
    "reference, samples": ["p-dpo"],
    "reference, rewards, samples": ["dp-dpo", "e-dpo"],
}


@pytest.fixture(scope="module")
def measured():
    return {name: properties.properties(name) for name in [*PREFERENCE_LOSSES, *zoo.ZOO]}


@pytest.mark.parametrize("name", [*PREFERENCE_LOSSES, *zoo.ZOO])
def test_a_loss_has_the_properties_of_its_equation(name, measured):
    (value, chosen, rejected, h_alone, minimum, bounded, convex, both_fall, wrong_side, right_side,
     label) = EXPECTED[name]
    loss = measured[name]
    gradient = *loss["gradient"], loss["slopes"][0], loss["slopes"][2]
    wanted = chosen, rejected, wrong_side, right_side
    assert loss["value"] == pytest.approx(value, abs=1e-3)
    assert gradient == pytest.approx(wanted, rel=1e-3, abs=1e-3)
    assert loss["slopes"][1] == pytest.approx((chosen - rejected) / 2, abs=1e-3)
    assert (loss["h alone"], loss["bounded"], loss["convex"], not loss["even"]) == (
        h_alone, bounded, convex, label)
    assert loss["both fall"] == both_fall
    if minimum == "inf":
        assert loss["minimum"] == ["infinity"]
    else:
        assert loss["minimum"][1:] == minimum[1:] or "beyond" not in minimum
        numbers = [place for place in minimum if place != "beyond"]
        assert loss["minimum"][:len(numbers)] == pytest.approx(numbers, abs=0.03)
    needed = ", ".join(loss_page.NEEDS[need] for need in loss["needs"]) or "nothing"
    assert needed == next((needed for needed, names in NEEDED.items() if name in names),
                          "reference")


def test_the_degeneracy(measured):
    """A loss of h alone does not notice that the chosen response loses its probability."""
    for name, loss in measured.items():
        assert loss["both fall"] == "flat" or not loss["h alone"], name


# ---------------------------------------------------------------- in training

@pytest.mark.parametrize("name", zoo.ZOO)
def test_a_loss_of_the_zoo_is_found_by_name(name):
    """It is computed for pairs of rows of several sizes, and its gradient is that of differences.
    (What a batch has in common is not differentiated, in BCO and KTO.)"""
    logps, batch = make_batch([3, 2], 0)
    logps, batch.ref_logps = logps - 4, batch.ref_logps - 4
    assert name in losses.MORE and name not in losses.LOSSES
    if name in ("bco", "kto"):
        assert batch_loss(name, logps, batch, **flags_of(name)).shape == (4,)
        return
    assert torch.autograd.gradcheck(
        lambda logps: batch_loss(name, logps, batch, **flags_of(name)), (logps.requires_grad_(),))


def test_flags_of_the_zoo():
    """Each loss has its own with their defaults, and refuses those of others; a loss that distils
    takes the rewards of out/rm."""
    for name in zoo.ZOO:
        args = train_policy.parse_flags([f"--loss={name}"])
        assert {knob: getattr(args, knob) for knob in SOME} == {
            knob: knobs(name).get(knob) for knob in SOME}
        assert args.rewards == ("out/rm" if "rewards" in needs(name) else None)
    with pytest.raises(InputError, match="--weight: it would be ignored: .* by --loss=dpop, rpo"):
        train_policy.parse_flags(["--loss=dpo", "--weight=2"])


def test_help_shows_the_flags_of_the_loss_that_is_named(capsys):
    shown = {}
    for loss in ("dpo", "ipo", "cdpo"):
        with pytest.raises(SystemExit):
            train_policy.parse_flags([f"--loss={loss}", "--help"])
        shown[loss] = capsys.readouterr().out
    assert ["--epsilon" in text for text in shown.values()] == [False, False, True]
    assert ["--tau" in text for text in shown.values()] == [False, True, False]
    assert all("--beta" in text and "--gamma" in text for text in shown.values())


def test_rounding_before_step_0_is_weighed_like_the_loss():
    """DPOP multiplies what the chosen response has lost, and so its rounding, by its weight."""
    ref_logps = torch.zeros(2, 2)
    logps = ref_logps - torch.tensor([[1e-4, 0.0], [0.0, 0.0]])
    before, after = [zoo.dpop(x, ref_logps, 1.0, 50.0) for x in (ref_logps, logps)]
    args = SimpleNamespace(loss="dpop", dtype="float32", beta=1.0, gamma=None, weight=50.0)
    check_step_0(after, before, logps, ref_logps, args)
    args.weight = None
    with pytest.raises(AssertionError, match="at the reference, dpop is 0.69"):
        check_step_0(after, before, logps, ref_logps, args)


@pytest.mark.parametrize("name", [name for name in zoo.ZOO if name != "exponential"])
def test_extreme_margins_are_finite(name):
    """Log-probs down to -1e4 in float32: a run does not end in a nan. (The exponential is exp(1e4),
    which is no float32.)"""
    logps = EXTREME.clone().requires_grad_()
    columns = {"logps": logps, "ref_logps": EXTREME.flip(0),
               "rewards": torch.zeros(4, 2, 2), "lengths": torch.tensor([[1, 1000]] * 4)}
    got = value_of(name, columns)
    got.sum().backward()
    assert got.isfinite().all() and logps.grad.isfinite().all()


# ---------------------------------------------------------------- the page and the runner

def test_the_page_is_up_to_date():
    """docs/losses.md is what `python experiments/zoo.py --draw` writes."""
    rows = runner.read_rows(ROOT / "results" / "zoo" / "runs.csv")
    text = loss_page.page(runner.METHODS, runner.knob_of, rows, runner.chosen_values(rows))
    assert (ROOT / "docs" / "losses.md").read_text(encoding="utf-8") == text


def test_what_trl_calls_them_exists_here():
    names = {ours for of_trainer in zoo.TRL.values() for ours, _ in of_trainer.values()}
    assert names - set(losses.EVERY_LOSS) == {"bradley_terry"}


@pytest.mark.parametrize("name", zoo.ZOO)
def test_a_loss_is_short_and_says_where_it_is_from(name):
    """Two to six lines of code; a formula, an idea, a source."""
    function = zoo.ZOO[name]
    definition, docstring, body = getsource(function).split('"""')
    assert 1 <= len(body.strip().splitlines()) <= 6
    formula, idea, source = loss_page.formula_idea_source(name)
    assert formula and idea and (", arXiv " in source or "Mitchell (2023)" in source)


# ---------------------------------------------------------------- single responses with a label

RATIOS = torch.tensor([1.5, -2.0, 0.5, -0.5], dtype=torch.float64)      # u
DESIRABLE = torch.tensor([True, True, False, False])


@pytest.mark.parametrize("mismatched, z", [([2.0, -1.0, 3.0, 0.0], 1.0), ([-2.0, 1.0, -3.0, 0], 0)])
def test_kto_of_single_responses_is_its_formula(mismatched, z):
    """The reference point is the mean over mismatched responses, zero if that is below, and has no
    gradient. Each label has its weight."""
    mismatched = torch.tensor(mismatched, dtype=torch.float64, requires_grad=True)
    ours = RATIOS.clone().requires_grad_()
    got = zoo.kto_unpaired(ours, DESIRABLE, mismatched, 0.3, 1.3, 0.7)
    assert_gives(got, [1.3 * (1 - sigma(0.3 * (u - z))) if wanted else
                       0.7 * (1 - sigma(0.3 * (z - u)))
                       for u, wanted in zip(RATIOS.tolist(), DESIRABLE)])
    got.sum().backward()
    assert mismatched.grad is None and ((ours.grad < 0) == DESIRABLE).all()


def test_kto_of_single_responses_at_the_reference_and_far_from_it():
    """Half a weight, with a slope of a quarter of weight * beta, up for what is desirable; between
    zero and the weight, and not convex."""
    ours = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    losses_there = zoo.kto_unpaired(ours, DESIRABLE, torch.zeros(4), 0.4, 3.0, 2.0)
    assert losses_there.tolist() == [1.5, 1.5, 1.0, 1.0]
    losses_there.sum().backward()
    assert ours.grad.tolist() == pytest.approx([-0.3, -0.3, 0.2, 0.2])
    far = torch.tensor([1e4, -1e4, 1e4, -1e4])
    assert zoo.kto_unpaired(far, DESIRABLE, torch.zeros(4), 1.0, 3.0, 2.0).tolist() == [0, 3, 2, 0]
    bad, better = [zoo.kto_unpaired(torch.tensor([u]), DESIRABLE[:1], torch.zeros(1)).item()
                   for u in (-8.0, -4.0)]
    assert better > (bad + 0.5) / 2         # above the chord from u = -8 to u = 0


def test_kto_of_a_batch_of_single_responses():
    """batch_loss takes the labels and the mismatched responses out of the batch, by the same flags
    as with pairs; the loss of the step-0 check is that of the reference."""
    assert list(signature(zoo.kto_unpaired).parameters)[3:] == list(knobs("kto"))
    dataset = Dataset([([1], [[2, 3]]), ([1], [[4]]), ([1, 2], [[5]])],
                      desirable=np.array([True, False, True])).with_mismatched(8)
    dataset.ref_logps = -np.ones((3, 2), np.float32)
    batch = dataset.batch(np.array([2, 1]))
    logps = torch.tensor([[-0.5, -2.5], [-3.0, 3.0]])
    got = batch_loss("kto", logps, batch, **flags_of("kto"))
    wanted = zoo.kto_unpaired(torch.tensor([0.5, -2.0]), torch.tensor([True, False]),
                              torch.tensor([-1.5, 4.0]), 0.3, 1.3, 0.7)
    assert_gives(got, wanted.tolist())
    at_reference = batch_loss("kto", batch.ref_logps, batch, **flags_of("kto"))
    assert_gives(at_reference, [0.65, 0.35])


def row(method, value, advantage, split="validation", rho="0.2", seed="1000"):
    return {"split": split, "rho": rho, "seed": seed, "method": method, "knob": "",
            "value": str(value), "advantage": advantage, "chosen_change": "-1", "length": "12",
            "seconds": "6", "reference": "abc"}


def test_a_knob_is_chosen_from_all_its_trials():
    """A run that diverged has no advantage, and loses; a method with a trial missing is not chosen
    yet."""
    rows = [row("hinge", 0.3, "1.5"), row("hinge", 1, "2.5"), row("hinge", 3, ""),
            row("sppo", 1, "1.0"), row("sppo", 3, "9.0")]
    assert runner.chosen_values(rows) == {"hinge": 1}
    rows.append(row("hinge", 1, "2.0", "test", "0.2", "0"))
    rows.append(row("hinge", 1, "3.0", "test", "0.2", "1"))
    text = loss_page.measured(runner.METHODS, runner.knob_of, rows, runner.chosen_values(rows))
    assert "| hinge | beta 1 | +2.50 ± 6.35 | -1.0 |  |  | 12.0 |" in text


def test_answers():
    """By the criteria in dev/LOG.md, from the runs there are."""
    rows = [row("dpo", 1, "2.0", "test", rho, seed) for rho in ("0.2", "all") for seed in "012"]
    assert zoo_answers.answer_table(rows).count("| open |") == 7
    rows += [row("discopop", 1, "1.5", "test", "0.2", seed) for seed in "012"]
    rows += [row(zoo_answers.MEAN, 1, advantage, "test", "0.2", seed)
             for seed, advantage in zip("012", ("1.9", "2.1", "2.1"))]
    rows += [row("r-dpo", 1, "2.5", "test", rho, seed) for rho in ("0.2", "all") for seed in "012"]
    lines = {line.split(" | ")[0]: line for line in zoo_answers.answer_table(rows).splitlines()}
    assert lines["| does DiscoPOP's wrong start matter?"].endswith("-0.50, -0.50, -0.50 | yes |")
    assert lines["| does taking length out of the reward help?"].endswith("| undecided |")
    assert "r-dpo in 3 seeds (+0.60, +0.40, +0.40)" in str(lines)
    assert zoo_answers.spearman([1, 2, 3], [10, 30, 20]) == pytest.approx(0.5)


def test_every_method_has_three_values_of_a_knob_of_its_loss():
    for method, (loss, rewards) in runner.METHODS.items():
        knob, values = runner.knob_of(method)
        assert knob in knobs(loss) and len(set(values)) == 3
        assert (rewards is not None) == ("rewards" in needs(loss))


class Inline:
    """A pool that does its work at once, in this process."""

    def submit(self, function, *args):
        future = Future()
        future.set_result(function(*args))
        return future


@pytest.fixture
def runs_made(monkeypatch):
    """Lists what would have been trained, in order; hinge does best at 3, the others at 0.3."""
    made = []

    def run(args, split, rho, seed, method, value):
        made.append((split, rho, seed, method, value))
        advantage = value if method == "hinge" else -value
        return row(method, value, advantage, split, rho, seed)

    def prepare(args, rho, seed, name):
        made.append((rho, seed, name))

    monkeypatch.setattr(runner, "run", run)
    monkeypatch.setattr(runner, "prepare", prepare)
    monkeypatch.setattr(runner.trials, "workers", lambda n: nullcontext(Inline()))
    monkeypatch.setattr(runner.trials, "check_models", lambda sft: None)
    monkeypatch.setattr(runner, "check_reference", lambda *_: None)
    monkeypatch.setattr(runner, "SEEDS", (0, 1))
    return made


def test_the_order_of_the_runs(tmp_path, runs_made):
    """First the choice, then rho 0.2, then the pairs as they are; what needs reward models that are
    not there yet comes last in its stage. What is in the CSV is not run again."""
    flags = [f"--out_dir={tmp_path}/out", f"--results={tmp_path}"]
    runner.main([*flags, "--losses=rebel,hinge", "--rhos=0.2"])
    choice = [("validation", "0.2", 1000, "hinge", value) for value in (0.3, 1, 3)]
    assert runs_made[:7] == [("0.2", 1000, "rm"), *choice, *(
        ("validation", "0.2", 1000, "rebel", value) for value in (0.3, 1, 3))]
    assert runs_made[7:] == [("0.2", 0, "rm"), ("0.2", 1, "rm"),
                             ("test", "0.2", 0, "hinge", 3), ("test", "0.2", 1, "hinge", 3),
                             ("test", "0.2", 0, "rebel", .3), ("test", "0.2", 1, "rebel", .3)]
    runs_made.clear()
    runner.main([*flags, "--losses=hinge"])
    assert runs_made == [("test", "all", seed, "hinge", 3) for seed in (0, 1)]
    with pytest.raises(InputError, match="--losses, --rhos: unknown hing;"):
        runner.main(["--losses=hing"])


def test_one_run(world, tmp_path, monkeypatch):
    """It trains, is measured against the reference, and leaves no folder."""
    monkeypatch.setattr(runner, "TRAINING", ["--max_steps=2", "--n_pairs=40", "--pool=500",
                                             "--batch_size=8", "--n_eval=16", "--lr=1e-2"])
    monkeypatch.setattr(runner, "N_PROMPTS", {"test": 8})
    args = SimpleNamespace(sft=f"{world}/sft", out_dir=tmp_path)
    (tmp_path / "all" / "0").mkdir(parents=True)
    (tmp_path / "all" / "0" / "rm").symlink_to(world / "rm")
    of_run = runner.run(args, "test", "all", 0, "rebel", 3)
    assert of_run.keys() <= set(runner.COLUMNS) and of_run["knob"] == "eta"
    assert abs(of_run["advantage"]) > 0 and abs(of_run["chosen_change"]) > 0
    assert list((tmp_path / "runs").iterdir()) == []
