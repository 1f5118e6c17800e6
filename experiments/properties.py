"""Finds out what a loss does by calling its function: where it wants the margin, whether it is
convex, what it does where both log-probs fall. Nothing here knows any loss by name.

The pair that is looked at has two responses of 20 tokens, at -60 nats each under the reference.
Five reward models say that the chosen one is better, by 1, 1.5, 2, 2.5 and 3. It stands in a batch
of eight pairs that are all alike at the reference. A KL is left out: it is about other responses.
Flags have their defaults. u and v are the log-ratios of the chosen and of the rejected response,
and h = u - v; "along h" means u = h / 2, v = -h / 2.
"""
from functools import lru_cache

import torch

from losses import EVERY_LOSS, GAMMA, UNPAIRED, knobs, needs

REF_LOGP, MARGINS, PAIRS = -60.0, (1.0, 1.5, 2.0, 2.5, 3.0), 8
FAR = (60.0, 0.0, -1e2, -1e3, -1e4)     # log-ratios; at 60 a response has probability 1
FLAT, SMALLEST = 1e-9, 1e-12


def losses_of(name, u, v, swapped=False, ref_logps=REF_LOGP, tokens=(20.0, 20.0)):
    """Computes the losses of the pairs of one batch. u, v: (N,) log-ratios. swapped: whether each
    pair has the other label. ref_logps: (N, 2), or a number for all. tokens: in the chosen and in
    the rejected response. Returns (N,)."""
    ratios = torch.stack([u, v], dim=1)                                         # (N, 2)
    N = len(ratios)
    half = torch.tensor(MARGINS, dtype=ratios.dtype) / 2                        # (M,)
    columns = {
        "logps": ref_logps + ratios,
        "ref_logps": ref_logps + torch.zeros_like(ratios),
        "rewards": torch.stack([half, -half]).expand(N, 2, len(half)),          # (N, 2, M)
        "lengths": numbers(*tokens).expand(N, 2),
        "kl": torch.zeros_like(u)}
    if swapped:
        columns = {column: values.flip(1) if values.dim() > 1 else values
                   for column, values in columns.items()}
    flags = {knob: GAMMA[1] if knob == "gamma" else value for knob, value in knobs(name).items()}
    return EVERY_LOSS[name](**{need: columns[need] for need in needs(name)}, **flags)


def numbers(*values):
    return torch.tensor(values, dtype=torch.float64)


def in_batch(name, u, v, swapped=False):
    """Computes the loss of one pair whose batch has seven others, which are at the reference."""
    others = torch.zeros(PAIRS - 1, dtype=torch.float64)
    return losses_of(name, torch.cat([u[None], others]), torch.cat([v[None], others]), swapped)[0]


@lru_cache
def sees_the_batch(name):
    """Tells whether the losses of some pairs are others when the pairs are not in one batch. Their
    log-probs under the reference differ too."""
    u, v, ref_logps = random_places(PAIRS, columns=4).split([1, 1, 2], dim=1)
    u, v = u[:, 0], v[:, 0]
    together = losses_of(name, u, v, ref_logps=REF_LOGP + ref_logps)
    alone = [losses_of(name, u[i:i + 1], v[i:i + 1], ref_logps=REF_LOGP + ref_logps[i:i + 1])
             for i in range(PAIRS)]
    return bool((together - torch.cat(alone)).abs().max() > FLAT)


def at_places(name, u, v, swapped=False):
    """Computes the loss of a pair at each place. u, v: (N,) log-ratios. Returns (N,)."""
    if not sees_the_batch(name):
        return losses_of(name, u, v, swapped)
    return torch.func.vmap(lambda u, v: in_batch(name, u, v, swapped))(u, v)


def along(name, h):
    """Computes the loss where the chosen response has gained h / 2 and the other one lost it."""
    return at_places(name, h / 2, -h / 2)


def slopes(name, h):
    """Computes the derivative of the loss along h, at each of the values h, (N,)."""
    h = h.clone().requires_grad_()
    return torch.autograd.grad(along(name, h).sum(), h)[0]


def at_reference(name):
    """Returns the value of the loss at the reference, and its derivatives with respect to the
    log-probs of the chosen and of the rejected response."""
    u, v = (torch.zeros(PAIRS, dtype=torch.float64, requires_grad=True) for _ in range(2))
    losses = losses_of(name, u, v)
    gradients = torch.autograd.grad(losses.sum(), (u, v))
    return losses[0].item(), *(gradient[0].item() for gradient in gradients)


def at_reference_unpaired(name):
    """Returns what a loss is for single responses with a label, at the reference: its value and its
    derivative, each for a desirable response and for an undesirable one."""
    u = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    losses = UNPAIRED[name](u, torch.tensor([True, False]), torch.zeros(2, dtype=torch.float64))
    return losses.tolist(), torch.autograd.grad(losses.sum(), u)[0].tolist()


def random_places(n, columns=2):
    """Returns n places, u and v between -8 and 8, (n, columns)."""
    generator = torch.Generator().manual_seed(0)
    return 16 * torch.rand(n, columns, generator=generator, dtype=torch.float64) - 8


def depends_on_h_alone(name):
    """Tells whether the loss of a pair stays the same where both of its log-probs fall by the same
    number, of each pair of a batch in turn. The rejected responses are longer here."""
    u, v = random_places(PAIRS).unbind(dim=1)
    before = losses_of(name, u, v, tokens=(20.0, 30.0))
    falls = 3 * torch.eye(PAIRS, dtype=torch.float64)       # row i: pair i falls, the others stay
    after = torch.stack([losses_of(name, u - falls[i], v - falls[i], tokens=(20.0, 30.0))[i]
                         for i in range(PAIRS)])
    return bool(((after - before).abs() <= FLAT * (1 + before.abs())).all())


def minimisers(name):
    """Finds where the loss is lowest along h, from -110 to 110: [numbers], a number and "beyond"
    where it is flat from there on, or "infinity" where it goes on falling."""
    step = 0.02
    h = torch.arange(-110, 110 + step / 2, step, dtype=torch.float64)
    values, gradients = along(name, h), slopes(name, h)
    lowest = values.min()
    if values[-1] <= lowest + FLAT:
        end = torch.nonzero(gradients)[-1].item()           # the last place with a slope
        underflow = gradients[end].abs() < SMALLEST         # too small for float64, but not zero
        if end == len(h) - 1 or underflow:
            return ["infinity"]
        return [round(h[end].item() + step, 1), "beyond"]
    inner = values[1:-1]
    is_valley = (inner <= values[:-2]) & (inner < values[2:]) & (inner < lowest + 1e-3)
    return [refine(name, place, step) for place in h[1:-1][is_valley].tolist()]


def refine(name, place, step):
    """Returns the place of a minimum to two digits, by cutting the interval around it in three."""
    low, high = place - step, place + step
    for _ in range(30):
        third = (high - low) / 3
        left, right = along(name, numbers(low + third, high - third)).tolist()
        low, high = (low, high - third) if left < right else (low + third, high)
    return round((low + high) / 2, 2)


def is_bounded_below(name):
    """Tells whether the loss stops falling on the way to log-probs of -10,000."""
    u, v = torch.cartesian_prod(numbers(*FAR), numbers(*FAR)).unbind(dim=1)
    values = at_places(name, u, v)
    near = (u.abs() < 5e3) & (v.abs() < 5e3)
    return bool(values.min() >= values[near].min() - 1)


def is_convex(name):
    """Tells whether the loss between two places is never above the line between them, in 2,000
    random pairs of places."""
    u, v = random_places(4000).unbind(dim=1)
    (u1, u2), (v1, v2) = u.chunk(2), v.chunk(2)
    middle = at_places(name, (u1 + u2) / 2, (v1 + v2) / 2)
    chord = (at_places(name, u1, v1) + at_places(name, u2, v2)) / 2
    return bool((middle <= chord + FLAT * (1 + chord.abs())).all())


def where_both_fall(name):
    """Tells what the loss does where both log-probs of all pairs fall by 40 nats and then by 40
    more, and h stays 1: "flat", or "falls" or "rises", and then "to a limit" if it stops."""
    fall = numbers(0.0, 40.0, 80.0)
    first, second, third = [
        losses_of(name, (0.5 - s).expand(PAIRS), (-0.5 - s).expand(PAIRS))[0].item() for s in fall]
    if abs(second - first) < FLAT:
        return "flat"
    direction = "rises" if second > first else "falls"
    return direction + (" to a limit" if abs(third - second) < 1e-3 * abs(second - first) else "")


def is_even(name):
    """Tells whether a pair with the other label has the same loss: the label is not used."""
    u, v = random_places(50).unbind(dim=1)
    change = (at_places(name, u, v, swapped=True) - at_places(name, u, v)).abs()
    return bool((change <= FLAT * (1 + at_places(name, u, v).abs())).all())


def properties(name):
    """Returns all of the above, {property: value}."""
    value, chosen, rejected = at_reference(name)
    needed = [need for need in needs(name) if need != "logps"]
    return {
        "needs": needed + ["batch"] * sees_the_batch(name),
        "value": value, "gradient": (chosen, rejected),
        "h alone": depends_on_h_alone(name),
        "minimum": minimisers(name),
        "bounded": is_bounded_below(name),
        "convex": is_convex(name),
        "both fall": where_both_fall(name),
        "slopes": tuple(slopes(name, numbers(-50.0, 0.0, 50.0)).tolist()),
        "even": is_even(name)}
