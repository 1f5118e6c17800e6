"""The tree batch: its layout to the last number, and that it equals separate sequences in values and in gradients."""
import pytest
import torch
import torch.nn.functional as F

from data import collate
from model import GPT, GPTConfig, TargetLogps, tree_mask
from reward import RewardModel

CONFIG = GPTConfig(block_size=24, vocab_size=31, n_layer=2, n_head=2, n_embd=16)


def test_collate_layout():
    """Two rows with two responses each; the second row ends in padding."""
    batch = collate([([5, 6, 7], [[8, 9], [10]]), ([11], [[12], [13, 14]])])
    assert batch.tokens.tolist() == [[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 0, 0]]
    assert batch.branch.tolist() == [[0, 0, 0, 1, 1, 2], [0, 1, 2, 2, -1, -1]]
    assert batch.position.tolist() == [[0, 1, 2, 3, 4, 3], [0, 1, 1, 2, 0, 0]]
    assert batch.predictor.tolist() == [2, 3, 2, 6, 6, 8]      # first tokens from the last prompt position: 2, and 6 + 0
    assert batch.target.tolist() == [8, 9, 10, 12, 13, 14]
    assert batch.slot.tolist() == [0, 0, 1, 2, 3, 3]
    assert batch.last.tolist() == [[4, 5], [1, 3]]
    assert batch.lengths.tolist() == [[2, 1], [1, 2]]
    assert batch.context == 0


def test_collate_counts_from_the_end_of_the_context():
    """The context is what comes before the last prompt token in every row: here one column. What is read is counted after it."""
    batch = collate([([5, 6, 7], [[8, 9], [10]]), ([11, 15], [[12], [13, 14]])])
    assert batch.context == 1
    assert batch.tokens.tolist() == [[5, 6, 7, 8, 9, 10], [11, 15, 12, 13, 14, 0]]
    assert batch.predictor.tolist() == [1, 2, 1, 5, 5, 7]      # row 0: columns 2, 3, 2 less 1; row 1: 1, 1, 3 less 1, plus 5
    assert batch.last.tolist() == [[3, 4], [1, 3]]


def test_collate_pads_no_further_than_the_longest_row():
    batch = collate([([5, 6], [[8, 9], [10]]), ([11], [[12], [13]])])
    assert batch.tokens.shape == (2, 5) and batch.target.shape == (5,)


def test_collate_rounds_shapes_up():
    """Padding goes to slot B * K, which response_logps throws away."""
    batch = collate([([5, 6, 7], [[8, 9], [10]])], multiple=4)
    assert batch.tokens.tolist() == [[5, 6, 7, 8, 9, 10, 0, 0]]
    assert batch.branch.tolist() == [[0, 0, 0, 1, 1, 2, -1, -1]]
    assert batch.slot.tolist() == [0, 0, 1, 2]
    plain = collate([([5, 6, 7], [[8, 9], [10]])])
    model = make(GPT)
    torch.testing.assert_close(model(batch), model(plain))


@pytest.mark.parametrize("bad, message", [
    ([([], [[1]])], "^prompts and responses need at least one token$"),
    ([([1], [[]])], "^prompts and responses need at least one token$"),
    ([([1], [[1]]), ([1], [[1], [2]])], "same number of responses: got 1 and 2")])
def test_collate_refuses(bad, message):
    with pytest.raises(ValueError, match=message):
        collate(bad)


def test_tree_mask():
    """Prompt of two tokens, responses of two and one, one padding column; then without the first column, as a query."""
    branch = torch.tensor([[0, 0, 1, 1, 2, -1]])
    mask = tree_mask(branch, 0, torch.float64)
    assert mask.shape == (1, 1, 6, 6) and mask.dtype == torch.float64
    assert mask.exp()[0, 0].int().tolist() == [[1, 0, 0, 0, 0, 0],
                                               [1, 1, 0, 0, 0, 0],
                                               [1, 1, 1, 0, 0, 0],
                                               [1, 1, 1, 1, 0, 0],
                                               [1, 1, 0, 0, 1, 0],
                                               [1, 1, 0, 0, 0, 1]]
    assert torch.equal(tree_mask(branch, 1, torch.float64), mask[:, :, 1:])


def make(kind, seed=0):
    torch.manual_seed(seed)
    model = kind(CONFIG)
    for parameter in model.parameters():           # away from the initial zeros, so that every part matters
        torch.nn.init.normal_(parameter, std=0.3)
    return model.double()


def random_examples(K, rows=6, seed=0):
    """Ragged rows; the first has one-token responses only, and a one-token prompt."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high):
        n = torch.randint(low, high, (1,), generator=generator).item()
        return torch.randint(0, CONFIG.vocab_size, (n,), generator=generator).tolist()

    return [(draw(1, 2), [draw(1, 2) for _ in range(K)])] + [(draw(1, 12), [draw(1, 10) for _ in range(K)])
                                                            for _ in range(rows - 1)]


def separate_logps(model, examples):
    """Brute force: every prompt + response alone, plain causal logits, a sum over the response's tokens."""
    out = []
    for prompt, responses in examples:
        for response in responses:
            tokens = torch.tensor([prompt + response])
            logps = F.log_softmax(model.logits(tokens)[0], dim=-1)
            out.append(sum(logps[len(prompt) - 1 + t, token] for t, token in enumerate(response)))
    return torch.stack(out).view(len(examples), -1)


def separate_rewards(model, examples):
    out = []
    for prompt, responses in examples:
        for response in responses:
            tokens = torch.tensor([prompt + response])
            hidden = model.transformer(tokens, torch.arange(tokens.size(1))[None])
            out.append(model.score(hidden[0, -1])[0])
    return torch.stack(out).view(len(examples), -1)


def gradients(model, values):
    model.zero_grad()
    weights = torch.linspace(-1, 1, values.numel(), dtype=values.dtype).view_as(values)    # no response counts like another
    (values * weights).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("kind, brute_force", [(GPT, separate_logps), (RewardModel, separate_rewards)])
@pytest.mark.parametrize("K", [1, 2, 3])
def test_tree_equals_separate_sequences(kind, brute_force, K):
    """Log-probs, rewards and all their gradients, for ragged lengths, one-token prompts and one-token responses."""
    model, examples = make(kind), random_examples(K)
    tree, separate = model(collate(examples)), brute_force(model, examples)
    tolerance = dict(rtol=1e-5, atol=2e-5)          # the sums are float32, whatever the model is
    torch.testing.assert_close(tree, separate.float(), **tolerance)
    of_tree, of_separate = gradients(model, tree), gradients(model, separate)
    for name in of_tree:
        torch.testing.assert_close(of_tree[name], of_separate[name], rtol=1e-4, atol=1e-4, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("kind", [GPT, RewardModel])
def test_a_long_context_changes_nothing(kind):
    """Prompts of eight tokens and more, so that the attention is split into a causal and a masked part."""
    model, examples = make(kind), [([1] * 8 + prompt, responses) for prompt, responses in random_examples(2, seed=2)]
    examples = [(prompt[:CONFIG.block_size - max(map(len, responses))], responses) for prompt, responses in examples]
    batch = collate(examples)
    assert batch.context >= 7
    alone = torch.cat([model(collate([(prompt, [response])])) for prompt, responses in examples for response in responses])
    together = model(batch)
    torch.testing.assert_close(together, alone.view_as(together), rtol=1e-5, atol=2e-5)
    brute_force = separate_logps if kind is GPT else separate_rewards
    of_tree, of_separate = gradients(model, together), gradients(model, brute_force(model, examples))
    for name in of_tree:
        torch.testing.assert_close(of_tree[name], of_separate[name], rtol=1e-4, atol=1e-4, msg=lambda m: f"{name}: {m}")


def test_the_head_in_several_pieces(monkeypatch):
    """TargetLogps gives the same values and gradients whatever number of rows it takes at a time, and F.cross_entropy's."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(10, 4, dtype=torch.float64), torch.randn(7, 4, dtype=torch.float64)
    target, sizes = torch.randint(0, 7, (10,)), torch.rand(10, dtype=torch.float64)

    def values_and_gradients(logps):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        values = logps(h, w)
        (values * sizes).sum().backward()
        return values.double(), h.grad, w.grad

    wanted = values_and_gradients(lambda h, w: -F.cross_entropy(h @ w.t(), target, reduction="none"))
    for rows in (3, 10, 1024):
        monkeypatch.setattr(TargetLogps, "ROWS", rows)
        for found, right in zip(values_and_gradients(lambda h, w: TargetLogps.apply(h, w, target, True)), wanted):
            torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-6)     # log-probs are float32


@pytest.mark.parametrize("kind", [GPT, RewardModel])
def test_company_does_not_matter(kind):
    """A row gives the same numbers alone and beside longer rows, whose length makes padding of it."""
    model, examples = make(kind), random_examples(2, rows=8, seed=1)
    together = model(collate(examples))
    for i in range(len(examples)):
        torch.testing.assert_close(model(collate(examples[i:i + 1])), together[i:i + 1], rtol=1e-5, atol=1e-5)


def test_siblings_do_not_matter():
    """A response's log-prob and reward do not change when its sibling does, or when the two change places."""
    for kind in (GPT, RewardModel):
        model = make(kind)
        prompt, one, other, another = [1, 2, 3], [4, 5, 6], [7, 8], [9, 10, 11, 12]
        first = model(collate([(prompt, [one, other])]))
        torch.testing.assert_close(model(collate([(prompt, [one, another])]))[:, 0], first[:, 0])
        torch.testing.assert_close(model(collate([(prompt, [other, one])])), first.flip(1))


def test_rewards_keep_float32_under_autocast():
    """Products below the head may be bfloat16, rewards are not, or many would tie: they differ from what bfloat16 can hold."""
    model = make(RewardModel).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rewards = model(collate(random_examples(2)))
    assert rewards.dtype == torch.float32 and not torch.equal(rewards, rewards.bfloat16().float())


def test_log_probs_under_autocast():
    """The vocabulary's product is bfloat16 then, the log-probs are float32 sums: near those of float32, and not the same."""
    model, batch = make(GPT).float(), collate(random_examples(2))
    exact = model(batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model(batch)
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).abs().max() < 0.02 * exact.abs().max()


def test_reward_model_starts_at_zero():
    torch.manual_seed(0)
    assert RewardModel(CONFIG)(collate(random_examples(2))).abs().max() == 0
