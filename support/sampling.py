"""Which tokens may be drawn: the likely ones."""
import torch


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
