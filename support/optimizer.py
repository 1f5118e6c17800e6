"""AdamW and its learning-rate schedule."""
import math

import torch


def adamw(model, args):
    """AdamW; matrices and embeddings decay, biases and layer norms do not."""
    decay = [p for p in model.parameters() if p.dim() >= 2]
    no_decay = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decay, "weight_decay": args.weight_decay},
              {"params": no_decay, "weight_decay": 0.0}]
    fused = decay[0].device.type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=fused)


def learning_rate(step, max_steps, peak):
    """A pure function of the step: linear warm-up over the first 5% of the steps, then a cosine
    from the peak down to zero."""
    warmup = max(1, max_steps // 20)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, max_steps - warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


def set_learning_rate(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr
