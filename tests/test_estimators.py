"""Estimators against exact values, on a language model so tiny that all of its responses can be
written down.

Vocabulary 0, 1, 2 and STOP, at most four tokens: 1 + 3 + 9 + 27 responses that end in STOP and 81
that are cut off, 121 in all. All draws have fixed seeds, so with one build of torch a test always
passes or never does; the false-alarm rates are those over seeds.
"""
import itertools
import math

import pytest
import torch

from data import collate
from losses import forward_kl
from model import GPT, GPTConfig
from model import draw as draw_token

STOP, LONGEST, PROMPT = 3, 4, [1, 0, 2]


def every_response():
    """Those that end in STOP, the shorter ones first, then those that are cut off."""
    responses = []
    for n in range(LONGEST):
        responses += [[*head, STOP] for head in itertools.product(range(3), repeat=n)]
    return responses + [list(tokens) for tokens in itertools.product(range(3), repeat=LONGEST)]


RESPONSES = every_response()


def make(seed):
    torch.manual_seed(seed)
    model = GPT(GPTConfig(block_size=8, vocab_size=4, n_layer=2, n_head=2, n_embd=8))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model.eval()


@torch.no_grad()
def logps_of_all(model):
    """Log-probs of all responses to PROMPT, in the tree batch: (121,)."""
    batch = collate([(PROMPT, [response]) for response in RESPONSES])
    return model.response_logps(batch)[:, 0]


@torch.no_grad()
def exact_probabilities(model, temperature):
    """P(response) when every token is drawn from softmax(logits / temperature), by recomputing
    every prefix: (121,)."""
    logps = []
    for response in RESPONSES:
        logits = model.logits(torch.tensor([PROMPT + response]))[0]             # (T, vocab)
        logits = logits[len(PROMPT) - 1:-1]                                     # (tokens, vocab)
        steps = (logits.double() / temperature).log_softmax(dim=1)
        logps.append(steps[torch.arange(len(response)), response].sum())
    return torch.stack(logps).exp()


def draw(model, n, temperature, seed):
    """n responses to PROMPT, as indices into RESPONSES."""
    generator = torch.Generator().manual_seed(seed)
    drawn = model.generate([PROMPT] * n, LONGEST, temperature, STOP, generator, batch_size=n)
    index = {tuple(response): i for i, response in enumerate(RESPONSES)}
    return torch.tensor([index[tuple(response)] for response in drawn])


def test_there_are_121_responses():
    assert len(RESPONSES) == len(set(map(tuple, RESPONSES))) == 121


@pytest.mark.parametrize("seed", [0, 1])
def test_probabilities_of_all_responses_sum_to_one(seed):
    """response_logps is a distribution over whole responses (those cut off standing for all their
    continuations), whether the responses share one row of the tree or have a row each."""
    model = make(seed)
    logps = logps_of_all(model)
    assert logps.double().exp().sum().item() == pytest.approx(1, abs=1e-6)
    with torch.no_grad():
        in_a_row = model.response_logps(collate([(PROMPT, RESPONSES)]))[0]
    torch.testing.assert_close(in_a_row, logps, rtol=1e-5, atol=1e-5)
    exact = exact_probabilities(model, 1.0)
    torch.testing.assert_close(logps.double().exp(), exact, rtol=1e-5, atol=1e-8)


def test_probabilities_in_float64():
    """A float64 model's are those of the formula to 12 digits, and so is their sum."""
    model = make(0).double()
    logps = logps_of_all(model)
    torch.testing.assert_close(logps.exp(), exact_probabilities(model, 1.0), rtol=1e-12, atol=0)
    assert logps.exp().sum().item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("S", [1, 4])
def test_sampled_forward_kl_is_unbiased(S):
    """The mean of 40,000 / S estimates from S samples each is within 4 standard errors of the exact
    KL(ref || pi), pi fixed. By the central limit theorem an unbiased estimate fails that with a
    probability of 6.3e-5, each S. Power: samples from ref at temperature 0.7 are noticed."""
    ref, policy, sets = make(0), make(1), 40_000 // S
    ref_logps, logps = logps_of_all(ref), logps_of_all(policy)
    exact = (ref_logps.double().exp() * (ref_logps.double() - logps.double())).sum().item()

    def standard_errors_off(temperature):
        samples = draw(ref, sets * S, temperature, seed=S).view(sets, S)
        estimates = forward_kl(logps[samples], ref_logps[samples]).double()         # (sets,)
        assert (estimates < 0).any()
        standard_error = estimates.std().item() / math.sqrt(sets)
        return abs(estimates.mean().item() - exact) / standard_error

    assert exact > 0.1
    assert standard_errors_off(1.0) < 4 < standard_errors_off(0.7)


def p_value(drawn, probabilities):
    """Of Pearson's chi-square for draws (n,) of responses, those with fewer than 5 expected draws
    taken together."""
    n, counts = len(drawn), torch.bincount(drawn, minlength=121).double()
    expected = n * probabilities
    rare = expected < 5
    observed = torch.cat([counts[~rare], counts[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    observed, expected = observed[expected > 0], expected[expected > 0]
    chi2 = ((observed - expected) ** 2 / expected).sum()
    freedom = torch.tensor(len(observed) - 1.0, dtype=torch.float64)
    assert freedom > 20
    return torch.special.gammaincc(freedom / 2, chi2 / 2).item()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_generated_frequencies(temperature):
    """Frequencies of whole responses among 20,000 draws against their exact probabilities. Fails at
    p < 1e-4, which is its false-alarm rate. Power: a temperature 7% higher is noticed."""
    model = make(2)
    drawn = draw(model, 20_000, temperature, seed=5)
    assert p_value(drawn, exact_probabilities(model, temperature)) > 1e-4
    assert p_value(drawn, exact_probabilities(model, 1.07 * temperature)) < 1e-4


@torch.no_grad()
def generate_without_cache(model, prompts, max_new_tokens, temperature, generator):
    """What `generate` computes, with every token's logits from a full forward pass over its row
    alone."""
    rows = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))  # the order of the draws
    tokens = [list(prompts[i]) for i in rows]
    for _ in range(max_new_tokens):
        logits = [model.logits(torch.tensor([row]))[0, -1] for row in tokens]
        random = torch.rand(len(rows), 1, generator=generator, dtype=torch.float64)
        drawn = draw_token(torch.stack(logits).float(), temperature, random)
        for row, token in zip(tokens, drawn.tolist()):
            row.append(token)
    responses = dict(zip(rows, tokens))
    return [responses[i][len(prompt):] for i, prompt in enumerate(prompts)]


@pytest.mark.parametrize("temperature", [0, 0.7, 1.0])
def test_the_kv_cache_changes_no_token(temperature):
    """With the same random numbers, generation with a KV cache and without gives identical tokens,
    greedy or sampled, for prompts of different lengths in one batch. In float64, where rounding is
    most unlikely to move a draw across a boundary."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=32, vocab_size=11, n_layer=2, n_head=2, n_embd=16)).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10], [0, 1]] * 5
    cached = model.generate(prompts, 20, temperature, generator=torch.Generator().manual_seed(7))
    without = generate_without_cache(model, prompts, 20, temperature,
                                     torch.Generator().manual_seed(7))
    assert cached == without
