"""What the training scripts assert at the start: cheap, and it catches most wiring mistakes."""


def check_step_0(losses, expected, logps, ref_logps, args):
    """Step 0 has known values: the policy is the reference, so its log-probs are the cached ones,
    and the loss is what losses.py derives by hand. What rounding explains is let through.

    losses: (b,) of the first micro-batch, as it is trained on, before the first update; expected:
    (b,) what they must be; logps, ref_logps: (b, K).
    """
    change = (logps - ref_logps).abs().max().item()
    rounding = 1e-5 if args.dtype == "float32" else 1e-2
    if change > rounding * ref_logps.abs().max() + 1e-3:
        raise AssertionError("before step 0, the policy's log-probs differ from the reference's by "
                             f"up to {change} nats")
    scale = max(1, args.beta or 1, *(args.gamma or ()))
    slack = 2 * scale * change + 1e-4       # of beta * h (or its square), or the KL
    if ((losses - expected).abs() > (1 + expected) * slack + slack**2).any():
        raise AssertionError(f"at the reference, {args.loss} is {losses.tolist()}, not "
                             f"{expected.tolist()}")
    print(f"step 0: policy == reference to {change:.0e} nats, {args.loss} loss "
          f"{losses.mean():.4f} as derived")
