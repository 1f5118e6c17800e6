"""Generation: the likely tokens, a draw, and sampling with a cache of keys and values."""
import math

import pytest
import torch
from hints import assert_gives
from test_model import FAMILIES, random_model

import model as model_file
from model import GPT, GPTConfig, draw, likely
from support.device import computing

CONFIG = GPTConfig(block_size=20, vocab_size=13, n_layer=2, n_head=2, n_embd=16,
                   tie_word_embeddings=False)
STOP = 12
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9], [10, 11]]


@pytest.fixture
def model():
    """Its answers vary, from prompt to prompt and from token to token (without biases, which would
    pull all of them to the same token)."""
    torch.manual_seed(2)
    model = GPT(CONFIG)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.6)
        if name.endswith("bias"):
            torch.nn.init.zeros_(parameter)
    return model


# ---------------------------------------------------------------- likely tokens

def test_likely_tokens_by_hand():
    """Of four tokens, the second one is the most likely."""
    probs = torch.tensor([[0.125, 0.5, 0.25, 0.125]])

    def kept(top_k=None, top_p=None, probs=probs):
        return likely(probs, top_k, top_p)

    wanted = torch.tensor([[0, 0.5, 0.25, 0]])
    too_few = torch.tensor([[0, 0.5, 0, 0]])
    assert_gives(kept(top_k=2), wanted, what="top_k=2", mistakes={
        "one too many: top_k tokens are kept": [[0.125, 0.5, 0.25, 0]],
        "the least likely tokens, not the most likely ones": [[0.125, 0, 0, 0.125]],
        "sorted: tokens have to be put back in their place": [[0.5, 0.25, 0, 0]],
        "they are normalised, and should stay as they are": wanted / wanted.sum()})
    assert probs.tolist() == [[0.125, 0.5, 0.25, 0.125]], (
        "the probabilities of the caller are not changed")
    assert_gives(kept(top_p=0.6), wanted, what="top_p=0.6", mistakes={
        "top_p leaves out the token that crosses it": too_few,
        "sorted: tokens have to be put back in their place": [[0.5, 0.25, 0, 0]]})
    assert_gives(kept(top_p=0.5), too_few, what="top_p=0.5", mistakes={
        "top_p keeps one more token, where the first ones hold exactly this fraction": wanted})
    assert_gives(kept(2, 0.6), too_few, what="top_k=2, top_p=0.6", mistakes={
        "top_p is a fraction of the probability that is left by top_k": wanted})
    equal = torch.full((1, 4), 0.25)
    assert_gives(kept(2, None, equal), [[0.25, 0.25, 0, 0]], what="top_k=2", mistakes={
        "of equally likely tokens all are kept, not the first ones": equal})


def likely_by_hand(probs, top_k, top_p):
    """A walk along the tokens of a row, the most likely first (of equals, the first), until there
    are enough of them."""
    order = sorted(range(len(probs)), key=lambda token: -probs[token])[:top_k]
    total, before, kept = sum(probs[token] for token in order), 0.0, [0.0] * len(probs)
    for token in order:
        if top_p is not None and before >= top_p * total:
            break
        kept[token] = probs[token]
        before += probs[token]
    return kept


@pytest.mark.parametrize("top_k", [None, 1, 3, 100])
@pytest.mark.parametrize("top_p", [None, 1e-9, 0.3, 0.75, 1.0])
def test_likely_tokens(top_k, top_p):
    """Random rows, and rows of numbers without rounding in which sums meet top_p exactly and
    tokens are as likely as others."""
    probs = torch.randn(50, 9, generator=torch.Generator().manual_seed(0)).double().softmax(dim=1)
    ties = torch.tensor([[1, 4, 2, 1, 4, 1, 0, 2, 1], [0, 12, 0, 4, 0, 0, 0, 0, 0]]) / 16
    probs = torch.cat([probs, ties.double(), torch.full((1, 9), 1 / 16, dtype=torch.float64)])
    wanted = [likely_by_hand(row, top_k, top_p) for row in probs.tolist()]
    wanted = torch.tensor(wanted, dtype=torch.float64)
    torch.testing.assert_close(likely(probs, top_k, top_p), wanted, rtol=0, atol=0)


# ---------------------------------------------------------------- a draw

LOGITS = torch.tensor([0.5, 3.0, 1.0, 2.0, -1.0])
RANDOM = torch.linspace(0, 1 - 1e-9, 1000, dtype=torch.float64)[:, None]


def first_above(probs, random=RANDOM):
    """The first token at which the cumulative probability is above a random number; the last one if
    there is none. probs: (vocab,)."""
    return (probs.cumsum(dim=0) <= random).sum(dim=1).clamp(max=len(probs) - 1)


def test_draw_never_takes_a_token_with_a_probability_of_0():
    impossible = torch.tensor([[-math.inf, 0.0, -math.inf]]).expand(1000, 3)
    assert_gives(draw(impossible, 1.0, RANDOM), torch.ones(1000), what="a draw", mistakes={
        "a probability of 0 is not above a random number of 0": [0] + [1] * 999,
        "the token after the first one whose cumulative probability is above": [2] * 1000})


def test_draw_at_temperature_0_takes_the_most_likely_token():
    logits = torch.tensor([[1.0, 3.0, 2.0], [5.0, 0.0, -1.0]]).repeat(500, 1)
    assert draw(logits, 0, RANDOM).tolist() == [1, 0] * 500


def test_draw_by_a_random_number():
    """One for each row: the first token whose cumulative probability is above it."""
    logits = LOGITS.double()
    assert_gives(draw(LOGITS.expand(1000, 5), 2.0, RANDOM), first_above((logits / 2).softmax(0)),
                 what="a draw", mistakes={
        "logits are multiplied by the temperature, not divided":
            first_above((2 * logits).softmax(0)),
        "the temperature is not used": first_above(logits.softmax(0)),
        "the random number is not used": torch.ones(1000)})
    assert draw(LOGITS.expand(1000, 5), 0.01, RANDOM).tolist() == [1] * 1000


def test_draw_from_the_likely_tokens():
    """Their probabilities sum to less than 1."""
    for top_k, top_p in ((3, None), (None, 0.8), (4, 0.7)):
        probs = LOGITS.double().softmax(0)
        kept = torch.tensor(likely_by_hand(probs.tolist(), top_k, top_p), dtype=torch.float64)
        got = draw(LOGITS.expand(1000, 5), 1.0, RANDOM, top_k, top_p)
        assert_gives(got, first_above(kept / kept.sum()), {
            "all tokens are drawn from, where top_k and top_p leave some": first_above(probs),
            "what is left sums to less than 1: multiply the random number by the sum":
                first_above(kept)}, f"a draw with top_k={top_k}, top_p={top_p}")


def test_likely_tokens_are_drawn_as_often_as_they_are_likely():
    """At a temperature, of which top_p is after; from evenly spaced random numbers."""
    logits = torch.tensor([0.5, 3.0, 1.0, 2.0, -1.0])
    random = torch.linspace(0, 1 - 1e-9, 10_000, dtype=torch.float64)[:, None]
    for temperature, top_k, top_p in ((1.0, 3, None), (2.0, None, 0.8), (2.0, 4, 0.7)):
        token = draw(logits.expand(10_000, 5), temperature, random, top_k, top_p)
        probs = (logits.double() / temperature).softmax(dim=0).tolist()
        kept = torch.tensor(likely_by_hand(probs, top_k, top_p))
        assert 1 < (kept > 0).sum() < 5
        drawn = torch.bincount(token, minlength=5) / 10_000
        torch.testing.assert_close(drawn, kept / kept.sum(), rtol=0, atol=2e-4)


# ---------------------------------------------------------------- generation

def by_hand(model, prompt, n, stop=None, position=None, forget=False, padding=0):
    """Greedy decoding that recomputes everything for every token. The rest is for mistakes.
    position: {place: wrong position} of a place; forget: new tokens do not see each other; padding:
    so many tokens, 0, that are seen before the prompt's last one."""
    tokens = [*prompt[:-1], *[0] * padding, prompt[-1]]
    start, limit = len(tokens), model.config.block_size - len(prompt)
    while len(tokens) - start < min(n, limit):
        T = len(tokens)
        places = [*range(start - 1), *[i - padding for i in range(start - 1, T)]]
        places = torch.tensor([places]) if position is None else position(torch.tensor([places]))
        seen = torch.ones(T, T, dtype=torch.bool).tril()
        if forget:
            seen[start:, start - 1:] = torch.eye(T, dtype=torch.bool)[start:, start - 1:]
        hidden = model.transformer(torch.tensor([tokens]), places, seen[None, None])[0, -1]
        tokens.append((model.lm_head.weight @ hidden).argmax().item())
        if tokens[-1] == stop:
            break
    return tokens[start:]


def test_the_answers_of_this_model_vary(model):
    """Otherwise the tests below would not notice a cache that is read the wrong way."""
    answers = [by_hand(model, prompt, 8) for prompt in PROMPTS]
    assert len({answer[0] for answer in answers}) >= 3
    assert all(len(set(answer)) >= 4 for answer in answers)


def test_the_first_token_at_temperature_0(model):
    """The most likely one after the prompt."""
    prompt = [1, 2, 3]
    got, wanted = model.generate([prompt], 1, temperature=0)[0], by_hand(model, prompt, 1)
    assert_gives(got, wanted, what="the first token", mistakes={
        "its position is one too far": by_hand(model, prompt, 1, position=lambda p: p + (p >= 2)),
        "at temperature 0 it is the most likely one after the prompt": got})


def test_new_tokens_after_a_prompt(model):
    """A cache gives what recomputing everything gives."""
    prompt = [1, 2, 3]
    assert_gives(model.generate([prompt], 8, temperature=0)[0], by_hand(model, prompt, 8),
                 what="new tokens", mistakes={
        "their position stands still": by_hand(model, prompt, 8, position=lambda p: p.clamp(max=2)),
        "their position is one too far":
            by_hand(model, prompt, 8, position=lambda p: p + (p >= 2)),
        "a new token does not see the new tokens before it": by_hand(model, prompt, 8, forget=True),
        "they see a column of padding": by_hand(model, prompt, 8, padding=1)})


def test_prompts_of_several_lengths_share_a_batch(model):
    """Padding is not seen, and positions are each prompt's own."""
    T = 4                           # columns of prompts: the longest one without its last token
    mistakes = {"padding is seen": {}, "a column of padding is seen": {},
                "position: it is the column's, not the prompt's own": {}}
    for prompt in PROMPTS:
        start, padding = len(prompt) - 1, T + 1 - len(prompt)

        def of_columns(place):
            return (place + (place >= start) * (T - start)).clamp(max=CONFIG.block_size - 1)

        padded, by_a_column, shifted = mistakes.values()
        padded[len(prompt)] = by_hand(model, prompt, 8, padding=padding)
        by_a_column[len(prompt)] = by_hand(model, prompt, 8, padding=min(1, padding))
        shifted[len(prompt)] = by_hand(model, prompt, 8, position=of_columns)
    answers = model.generate(PROMPTS, 8, temperature=0)
    got = {len(prompt): answer for prompt, answer in zip(PROMPTS, answers)}
    wanted = {len(prompt): by_hand(model, prompt, 8) for prompt in PROMPTS}
    assert_gives(got, wanted, mistakes, "answers by the length of the prompt")
    assert model.generate(PROMPTS, 8, temperature=0, batch_size=2) == answers


def test_each_of_some_equal_prompts_gets_its_answer(model):
    """Equal prompts run through the model once; every row has to find its own again."""
    prompts = [[1, 2], [3], [1, 2], [3], [1, 2], [4]]
    got = model.generate(prompts, 6, temperature=0)
    assert got == [by_hand(model, prompt, 6) for prompt in prompts], (
        "equal prompts: a row has the keys and values of another prompt")


def test_a_stop_ends_a_response(model):
    free = by_hand(model, [1, 2, 3], 8)
    end = free.index(free[3])
    assert_gives(model.generate([[1, 2, 3]], 8, temperature=0, stop=free[3])[0], free[:end + 1],
                 what="a response with a stop", mistakes={
        "the stop is not part of it": free[:end],
        "it goes on after the stop": free,
        "it goes on after the stop, with zeros":
            free[:end + 1] + [0] * (7 - end)})


def test_rows_go_on_where_others_have_ended(model):
    """They go on in a smaller batch once half of the rows have ended. The row that goes on is
    neither the first one nor the last one."""
    free = [by_hand(model, prompt, 10) for prompt in PROMPTS]
    stops = [free[3][1], free[2][2]]
    wanted = []
    for answer in free:
        ends = [i for i, token in enumerate(answer) if token in stops]
        wanted.append(answer[:ends[0] + 1] if ends else answer)
    assert sorted(map(len, wanted)) == [2, 3, 3, 6]
    got = model.generate(PROMPTS, 10, temperature=0, stop=stops)
    assert got == wanted, "rows are mixed up once others have ended"


def test_generation_fills_the_block_and_no_more(model):
    for prompt, response in zip(PROMPTS, model.generate(PROMPTS, 100, temperature=0)):
        size = len(prompt) + len(response)
        assert size == CONFIG.block_size, f"prompt and response fill {size} of a block of 20"
    assert model.generate([[1] * CONFIG.block_size], 5) == [[]]
    for prompt in ([1] * (CONFIG.block_size + 1), []):
        with pytest.raises(ValueError, match="prompts must have 1 to 20 tokens"):
            model.generate([prompt], 5)


def test_generation_stops_at_any_of_several_tokens(model):
    """Each response is the one without a stop, up to the first of them."""
    free = model.generate(PROMPTS, 8, temperature=0)
    stops = [free[0][3], free[1][5], STOP]
    for stop in (stops, stops[:1], []):
        ends = [[token in stop for token in response] for response in free]
        wanted = [response[:1 + is_end.index(True) if any(is_end) else 8]
                  for response, is_end in zip(free, ends)]
        assert model.generate(PROMPTS, 8, temperature=0, stop=stop) == wanted
    assert model.generate(PROMPTS, 8, temperature=0, stop=stops[0]) == (
        model.generate(PROMPTS, 8, temperature=0, stop=stops[:1]))


def test_generation_leaves_the_global_random_stream_alone(model):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = model.generate(PROMPTS, 8, generator=torch.Generator().manual_seed(1))
    assert torch.equal(before, torch.get_rng_state())
    assert first == model.generate(PROMPTS, 8, generator=torch.Generator().manual_seed(1))


def test_generation_shows_every_step(model):
    """on_token gets the new tokens after every step, the longest prompt's row first."""
    steps = []
    responses = model.generate(PROMPTS, 6, temperature=0, on_token=steps.append)
    rows = [2, 0, 3, 1]
    assert list(map(list, zip(*steps))) == [responses[row] for row in rows]


@pytest.mark.parametrize("limits", [{"top_k": 1}, {"top_p": 1e-6}])
def test_the_most_likely_token_alone(model, limits):
    """Generation with top_k=1, or a tiny top_p, is greedy."""
    greedy = model.generate(PROMPTS, 8, temperature=0, stop=STOP)
    assert model.generate(PROMPTS, 8, stop=STOP, **limits) == greedy
    assert model.generate(PROMPTS, 8, stop=STOP) != greedy


@pytest.mark.parametrize("limits", [{}, {"top_k": 3, "top_p": 0.8}])
@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("n_prompts", [1, 5, 40])
def test_generation_in_shapes_that_never_change(n_prompts, temperature, limits, monkeypatch):
    """A device that compiles every shape gets two of them, for prompts and for new tokens, and
    gives the same tokens as others, from the same random numbers: ragged prompts, up to the whole
    block, rows that end and rows that do not."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=24, vocab_size=7, n_layer=2, n_head=2, n_embd=16)).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    lengths = torch.randint(1, 25, (n_prompts,), generator=torch.Generator().manual_seed(1))
    prompts = [torch.randint(0, 7, (n,)).tolist() for n in lengths]
    prompts += prompts[::2]                 # several responses to one prompt

    def generate(stop):
        return model.generate(prompts, 12, temperature, stop, torch.Generator().manual_seed(2),
                              batch_size=64, **limits)

    wanted, shapes = [generate(stop) for stop in (None, 3)], set()
    monkeypatch.setattr(computing, "few_shapes", True)
    model.transformer.h[0].attn.register_forward_pre_hook(
        lambda _, inputs: shapes.add((inputs[0].shape, inputs[2][0].shape)))     # x, cached keys
    assert [generate(stop) for stop in (None, 3)] == wanted
    B = 8 if n_prompts < 8 else 64
    assert shapes == {((B, 64, 16), (B, 2, 64, 8)), ((B, 1, 16), (B, 2, 64 + 12, 8))}


@pytest.mark.parametrize("few_shapes", [False, True])
def test_an_offset_of_all_logits_does_not_move_samples_in_bfloat16(monkeypatch, few_shapes):
    """Total variation between what is drawn from under autocast and the model's own distribution,
    the mean over 40 prompts, is as small with logits lower by 100 as without. Power: the product
    with the head as it is gives more than four times as much."""
    def total_variation(offset, centred=True):
        torch.manual_seed(0)
        config = GPTConfig(8, 499, 2, 2, 16, tie_word_embeddings=False)
        policy, seen = GPT(config), []
        for parameter in policy.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        with torch.no_grad():
            policy.transformer.ln_f.weight[0], policy.transformer.ln_f.bias[0] = 0, 10
            policy.lm_head.weight[:, 0] = offset / 10 + 0.1 * policy.lm_head.weight[:, 0]
            exact = policy.logits(torch.tensor(prompts))[:, -1].softmax(dim=1)
        with monkeypatch.context() as patch:
            patch.setattr(computing, "few_shapes", few_shapes)
            patch.setattr(model_file, "draw",
                          lambda logits, *_: seen.append(logits) or logits.argmax(1))
            if not centred:
                patch.setattr(model_file, "head_weight",
                              lambda weight, dtype: (weight.to(dtype), None))
            with torch.autocast("cpu", dtype=torch.bfloat16):
                policy.generate(prompts, 1, batch_size=len(prompts))
        assert seen[0].dtype == torch.float32
        return (seen[0].softmax(dim=1) - exact).abs().sum(dim=1).mean().item() / 2

    prompts = torch.randint(0, 499, (40, 4), generator=torch.Generator().manual_seed(1)).tolist()
    without, with_it = total_variation(0), total_variation(-100)
    assert with_it < 1.1 * without < 0.01
    assert total_variation(-100, centred=False) > 4 * with_it


def test_equal_prompts_run_once(model):
    """Their keys and values are computed once, and copied for every response."""
    sizes = []
    model.transformer.register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0].shape))
    responses = model.generate([[1, 2], [3], [1, 2], (3,), [1, 2]], 2)
    assert sizes == [(2, 1), (5, 1), (5, 1)] and responses[0] != responses[2]
    model.generate([[1], [1]], 2)
    assert sizes[3:] == [(1, 1), (2, 1), (2, 1)]


@pytest.mark.parametrize("config", FAMILIES)
def test_greedy_generation_of_newer_models(config, monkeypatch):
    """With a cache of fewer heads, of keys that are turned; in shapes that never change too."""
    model = random_model(config)
    wanted = [by_hand(model, prompt, 8, STOP) for prompt in PROMPTS]
    assert model.generate(PROMPTS, 8, temperature=0, stop=STOP) == wanted
    shapes = set()
    model.transformer.h[1].attn.register_forward_pre_hook(
        lambda _, inputs: shapes.add(inputs[2][0].shape))
    monkeypatch.setattr(computing, "few_shapes", True)
    assert model.generate(PROMPTS, 8, temperature=0, stop=STOP) == wanted
    size = config.head_size or 4
    assert shapes == {(8, config.n_kv_head, 64 + extra, size) for extra in (0, 8)}
