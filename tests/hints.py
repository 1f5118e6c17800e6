"""What a failing test says: a guess at the mistake where one fits, then what came out and what was
wanted. A test that names typical mistakes says what each of them would give."""
import torch


def assert_gives(got, wanted, mistakes=None, what=""):
    """Two tensors are equal but for rounding, or two other values exactly.

    mistakes: {what may be wrong: what that would give}. what: is said first, such as "dpo".
    """
    __tracebackhide__ = True
    if torch.is_tensor(got):
        wanted = torch.as_tensor(wanted, dtype=got.dtype)
    if equal(got, wanted):
        return
    guesses = list((mistakes or {}).items())
    if torch.is_tensor(got):
        guesses += usual_mistakes(got, wanted).items()
    fitting = [guess for guess, value in guesses if equal(got, value)]
    first = ": ".join(filter(None, [what, fitting[0] if fitting else difference(got, wanted)]))
    raise AssertionError(f"{first}\n     got {plain(got)}\n  wanted {plain(wanted)}")


def equal(got, wanted):
    if not torch.is_tensor(got):
        return got == wanted
    try:
        torch.testing.assert_close(got, torch.as_tensor(wanted, dtype=got.dtype), equal_nan=True)
    except AssertionError:
        return False
    return True


def usual_mistakes(got, wanted):
    """What may be wrong with any number for each pair: {mistake: what it would give}."""
    wanted = wanted.detach()
    if not wanted.is_floating_point() or got.shape not in (wanted.shape, ()):
        return {}
    return {"the mean over the pairs, where each has a number of its own": wanted.mean(),
            "the sum over the pairs, where each has a number of its own": wanted.sum(),
            "the sign is turned: a minus is missing, or is one too many": -wanted,
            "the square is missing": got.sign() * wanted.clamp(min=0).sqrt(),
            "the log is missing": got.sign() * (-wanted).exp(),
            "1 - sigmoid, where it is the log of sigmoid": 1 - (-wanted).exp(),
            "the absolute value, which loses the sign": wanted.abs(),
            "half of it": wanted / 2, "twice as much": wanted * 2}


def difference(got, wanted):
    if torch.is_tensor(got) and got.shape != wanted.shape:
        return f"its shape is {tuple(got.shape)}, not {tuple(wanted.shape)}"
    if torch.is_tensor(got) and not got.isfinite().all():
        return "not finite"
    if torch.is_tensor(got) and got.is_floating_point() and got.numel() > 1:
        ratio, offset = (got / wanted).flatten(), (got - wanted).flatten()
        if equal(ratio, ratio[0].expand_as(ratio)):
            return f"{ratio[0]:.3g} times what it should be"
        if equal(offset, offset[0].expand_as(offset)):
            return f"off by {offset[0]:+.3g}, for all the same"
    return "not what it should be"


def plain(value):
    if torch.is_tensor(value) and value.is_floating_point():
        return value.detach().numpy().round(4).tolist()
    return value.tolist() if torch.is_tensor(value) else value
