"""Drawing a token: from the whole distribution, or from the likely ones."""
import torch
import torch.nn.functional as F


def draw(logits, temperature, random, top_k=None, top_p=None):
    """One token for each row, from softmax(logits / temperature), or its `likely` part; if the
    temperature is 0, the most likely.

    By inverting the distribution function, with one random number for each row, where
    torch.multinomial draws one for each token of the vocabulary.
    logits: (B, vocab) float32; random: (B, 1) float64 (mps: float32) in [0, 1). Returns (B,) int64.
    """
    if temperature == 0:
        return logits.argmax(dim=1)
    probs = F.softmax(logits / temperature, dim=1).to(random.dtype)         # (B, vocab)
    cumulative = likely(probs, top_k, top_p).cumsum(dim=1)                  # (B, vocab)
    token = torch.searchsorted(cumulative, random * cumulative[:, -1:], right=True)  # first above
    return token.squeeze(1).clamp(max=logits.size(1) - 1)


def likely(probs, top_k=None, top_p=None):
    """The probabilities, with 0 for all but the likely tokens: the top_k most likely; and of these
    the most likely ones, no more than it takes to hold a fraction top_p of what is left. Among
    equals the lower token comes first.

    probs: (B, vocab), not changed. Returns (B, vocab), not normalised: rows may sum to less than 1.
    """
    if top_k is None and top_p is None:
        return probs
    ordered, token = probs.sort(dim=1, descending=True, stable=True)        # (B, vocab)
    if top_k is not None:
        rank = torch.arange(probs.size(1), device=probs.device)
        ordered = ordered * (rank < top_k)
    if top_p is not None:
        before = ordered.cumsum(dim=1) - ordered        # of the tokens that are more likely
        ordered = ordered * (before < top_p * ordered.sum(dim=1, keepdim=True))
    return torch.zeros_like(probs).scatter(1, token, ordered)
