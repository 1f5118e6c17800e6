"""The two backward passes that are written by hand, because autograd's are slow: `token_logps`, the
log-probs of given tokens from hidden states, and `rms_norm`. They give the same values and
gradients as the plain formulas; tests/test_tree.py and tests/test_model.py check it.

With a vocabulary of 50,000 tokens the logits are the largest array of a training step. They are
costly because they are read and written several times. Autograd would keep an array for each
operation of log_softmax. `token_logps` keeps one: exp(logits) overwrites the logits, and the
gradient overwrites that.

To derive the gradient, let z be the logits at one token's place, and t the token. Then

    logp = z[t] - log(sum over v of exp(z[v]))

and its derivative with respect to z[v] is (1 if v is t, else 0) - softmax(z)[v]. In short, that is
one-hot(t) - softmax(z). The backward pass multiplies this by g, the loss's derivative with respect
to logp, and passes it on through the matrix product z = W h: to h as the gradient times W, to W as
the gradient's transpose times h.
"""
import torch
import torch.nn.functional as F

ROWS = 1024      # tokens at a time: with GPT-2's vocabulary an array of 200 MB


def product_type(tensor):
    """Returns the type in which matrix products with a tensor are computed: autocast's if it is
    on, otherwise the tensor's own."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype


def head_weight(weight, dtype):
    """Returns the weight of a head, (vocab, C), ready for products in `dtype`, and the mean row,
    (C,), that was subtracted from it: for bfloat16 the weight is centred before it is rounded.

    The mean row adds the same number to all logits of a position, and a softmax does not notice
    that. In GPT-2 the number is near -110, where bfloat16 numbers are 0.5 apart, so the differences
    between logits would be rounded away. Without it the logits are near 0. float32 and float64 are
    left as they are, with None for the mean. The gradient with respect to the weight needs no
    change either, because over the vocabulary it adds up to 0.
    """
    wide = torch.promote_types(dtype, torch.float32)
    if dtype == wide:
        return weight.to(dtype), None
    mean = weight.mean(dim=0, dtype=wide)
    return torch.cat([(rows - mean).to(dtype) for rows in weight.split(ROWS)]), mean


@torch.compiler.disable      # compiled, it would make new arrays for what is done in place
def token_logps(hidden, weight, target):
    """Returns the log-prob of one token at each of R places, (R,): log_softmax(hidden @ weight.T)
    at its target.

    hidden: (R, C); weight: (vocab, C); target: (R,) int64. Matrix products are in autocast's type,
    if it is on. The targets' own logits and all sums are float32 (float64 for float64 inputs).
    """
    return TokenLogps.apply(hidden, weight, target, product_type(hidden), torch.is_grad_enabled())


class TokenLogps(torch.autograd.Function):
    """Computes `token_logps`, with its gradient by hand, ROWS tokens at a time."""

    @staticmethod
    def forward(ctx, hidden, weight, target, dtype, keep):
        """Computes `token_logps`. dtype: the type of matrix products. keep: whether there will be a
        backward pass, which needs exp(logits)."""
        wide = torch.promote_types(dtype, torch.float32)
        ctx.hidden_dtype, ctx.weight_dtype = hidden.dtype, weight.dtype
        ctx.kept, logps = [], []
        ctx.weight, mean = head_weight(weight, dtype)
        few = 32 if hidden.device.type == "cpu" else ROWS
        for h, t in zip(hidden.split(ROWS), target.split(ROWS)):
            if dtype != wide:       # the target's own logit is cheap to compute without rounding
                own = ((weight[t] - mean) * h).sum(dim=1, keepdim=True, dtype=wide)     # (rows, 1)
            h = h.to(dtype)
            logits = h @ ctx.weight.t()                                 # (rows, vocab)
            top = logits.amax(dim=1, keepdim=True)                      # (rows, 1)
            wanted = logits.gather(1, t[:, None])                       # (rows, 1)
            exp = logits.sub_(top).exp_()                               # (rows, vocab), in place
            # A float32 sum of bfloat16 copies it: a few rows at a time, it stays in a CPU's cache.
            sums = [part.sum(dim=1, keepdim=True, dtype=wide) for part in exp.split(few)]
            total = torch.cat(sums)                                     # (rows, 1)
            if dtype == wide:
                logps.append((wanted - top - total.log()).squeeze(1))
            else:       # p = exp(own) / (exp(own) + others) = sigmoid(own - log(others))
                others = (total - exp.gather(1, t[:, None])).clamp(min=0)           # (rows, 1)
                logps.append(F.logsigmoid(own - top - others.log()).squeeze(1))
            if keep:
                ctx.kept.append((h, t, exp, total))
        return torch.cat(logps)

    @staticmethod
    def backward(ctx, grad):
        grad_hidden, grad_weight = [], None
        for g in grad[:, None].split(ROWS):                             # (rows, 1)
            h, t, exp, total = ctx.kept.pop(0)      # overwritten below: works for one backward pass
            grad_logits = exp.mul_((-g / total).to(exp.dtype))      # (rows, vocab), -g * softmax
            rows = torch.arange(len(t), device=t.device)
            grad_logits[rows, t] += g.squeeze(1).to(exp.dtype)          # + g * one-hot
            grad_hidden.append((grad_logits @ ctx.weight).to(ctx.hidden_dtype))
            if not ctx.needs_input_grad[1]:         # the head is frozen, as with --lora
                pass
            elif grad_weight is None:
                grad_weight = (grad_logits.t() @ h).to(ctx.weight_dtype)         # (vocab, C)
            elif h.dtype == ctx.weight_dtype:
                grad_weight.addmm_(grad_logits.t(), h)
            else:      # bfloat16 products, added up in float32
                grad_weight += grad_logits.t() @ h
            del exp, grad_logits
        return torch.cat(grad_hidden), grad_weight, None, None, None


# ------------------------------------------------------------------ RMSNorm


def rms_norm(x, weight, eps):
    """Returns x / sqrt(mean(x^2) + eps) * weight, the mean over the last dimension. x: (..., C) of
    any type, weight: (C,). Computes in float32 at least; returns x's type.

    Zhang and Sennrich (2019). With autograd, the formula would read and write the array ten times
    more, which on a CPU takes a tenth of a training step, and it would keep more arrays.
    """
    if x.device.type == "cuda":         # torch has one kernel for it there, for a single type
        return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)
    return RMSNorm.apply(x, weight, eps)


class RMSNorm(torch.autograd.Function):
    """Computes `rms_norm`, with its gradient by hand."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = wide.square().mean(dim=-1, keepdim=True).add_(eps).rsqrt_()     # (..., 1)
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).to(x.dtype).mul(weight).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        wide, grad, w = x.to(scale.dtype), grad.to(scale.dtype), weight.to(scale.dtype)
        grad_x = grad * scale                                                   # (..., C)
        by_weight = grad_x * wide                                               # (..., C)
        grad_weight = by_weight.flatten(0, -2).sum(dim=0)                       # (C,)
        along_x = (by_weight @ w)[..., None] * scale.square() / x.size(-1)      # (..., 1)
        grad_x = grad_x.mul_(w).addcmul_(wide, along_x, value=-1)
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None
