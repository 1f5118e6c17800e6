"""The fast way to the log-probs of given tokens: log_softmax and gather, without their arrays.

Over a vocabulary of 50,000 the logits are the largest array there is, and passes over memory are
what they cost. Autograd would keep one array for each operation; this writes exp(logits) over the
logits, and the gradient, one-hot(target) - softmax, over that. tests/test_tree.py shows that values
and gradients are those of log_softmax.
"""
import torch

ROWS = 1024      # tokens at a time: with GPT-2's vocabulary an array of 200 MB


@torch.compiler.disable      # it would make new arrays for what is done in place
def token_logps(hidden, weight, target):
    """log softmax(hidden @ weight.T)[target] for R tokens.

    hidden: (R, C); weight: (vocab, C); target: (R,) int64. Products are in autocast's type, if it
    is on; everything that is added up is float32 (float64 for float64 inputs). Returns (R,).
    """
    device, dtype = hidden.device.type, hidden.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    return TokenLogps.apply(hidden, weight, target, dtype, torch.is_grad_enabled())


class TokenLogps(torch.autograd.Function):

    @staticmethod
    def forward(ctx, hidden, weight, target, dtype, keep):
        """dtype: of the matrix products. keep: there will be a backward pass."""
        wide = torch.promote_types(dtype, torch.float32)
        ctx.hidden_dtype, ctx.weight_dtype = hidden.dtype, weight.dtype
        ctx.kept, logps = [], []
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        few = 32 if hidden.device.type == "cpu" else ROWS
        for h, t in zip(hidden.split(ROWS), target.split(ROWS)):
            logits = h @ weight.t()                                     # (rows, vocab)
            top = logits.amax(dim=1, keepdim=True)                      # (rows, 1)
            wanted = logits.gather(1, t[:, None])                       # (rows, 1)
            exp = logits.sub_(top).exp_()                               # (rows, vocab), in place
            # A float32 sum of bfloat16 copies it: a few rows at a time, it stays in a CPU's cache.
            sums = [part.sum(dim=1, keepdim=True, dtype=wide) for part in exp.split(few)]
            total = torch.cat(sums)                                     # (rows, 1)
            logps.append((wanted.to(wide) - top.to(wide) - total.log()).squeeze(1))
            if keep:
                ctx.kept.append((h, t, exp, total))
        ctx.weight = weight
        return torch.cat(logps)

    @staticmethod
    def backward(ctx, grad):
        grad_hidden, grad_weight = [], None
        for g in grad[:, None].split(ROWS):                             # (rows, 1)
            h, t, exp, total = ctx.kept.pop(0)      # overwritten and freed: no second backward pass
            grad_logits = exp.mul_((-g / total).to(exp.dtype))     # (rows, vocab), -g * softmax
            rows = torch.arange(len(t), device=t.device)
            grad_logits[rows, t] += g.squeeze(1).to(exp.dtype)          # + g * one-hot
            grad_hidden.append((grad_logits @ ctx.weight).to(ctx.hidden_dtype))
            if grad_weight is None:
                grad_weight = (grad_logits.t() @ h).to(ctx.weight_dtype)         # (vocab, C)
            elif h.dtype == ctx.weight_dtype:
                grad_weight.addmm_(grad_logits.t(), h)
            else:      # bfloat16 products, added up in float32
                grad_weight += grad_logits.t() @ h
            del exp, grad_logits
        return torch.cat(grad_hidden), grad_weight, None, None, None
