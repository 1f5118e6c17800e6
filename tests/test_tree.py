"""The tree batch: its layout to the last number, that it equals separate sequences in values and in
gradients, and that the fast head equals the plain formula."""
import contextlib
import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hints import assert_gives

import model as model_file
from data import Dataset, collate
from losses import PREFERENCE_LOSSES, batch_loss, bradley_terry, knobs
from model import GPT, GPTConfig, tree_mask
from reward import RewardModel
from support import backward

CONFIG = GPTConfig(block_size=24, vocab_size=31, n_layer=2, n_head=2, n_embd=16)
LLAMA = dataclasses.replace(
    CONFIG, family="llama", n_kv_head=1, n_inner=24, mlp="swiglu", norm="rms", qkv_bias=False,
    proj_bias=False, mlp_bias=False, rope_theta=100.0)
SCALING = dict(factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
               original_max_position_embeddings=12)
FAMILIES = [        # each with other parts (docs/models.md)
    LLAMA,
    dataclasses.replace(LLAMA, rope_scaling=SCALING, rope_theta=20.0, tie_word_embeddings=False),
    dataclasses.replace(LLAMA, qkv_bias=True, qk_norm="head", head_size=12, n_head=4, n_kv_head=2),
    dataclasses.replace(LLAMA, rope_layers=[1, 0], proj_bias=True, mlp_bias=True),
    dataclasses.replace(LLAMA, qk_norm="all", norm_after=True)]


# ---------------------------------------------------------------- the mask

BRANCH = [0, 0, 1, 1, 2, -1]        # a prompt of two tokens, responses of two and one, padding


def sees(q, k):
    return k <= q and BRANCH[k] in (0, BRANCH[q])


def test_tree_mask():
    places, wanted = range(6), [[int(sees(q, k)) for k in range(6)] for q in range(6)]
    assert wanted[3] == [1, 1, 1, 1, 0, 0] and wanted[4] == [1, 1, 0, 0, 1, 0]

    def mask_of(sees):
        return [[int(sees(q, k)) for k in places] for q in places]

    mask = tree_mask(torch.tensor([BRANCH]), torch.float64)
    assert mask.shape == (1, 1, 6, 6), f"the shape is (B, 1, T, T), not {tuple(mask.shape)}"
    assert set(mask.unique().tolist()) == {-math.inf, 0.0}, (
        "0 where q sees k and -inf where not: it is added to the scores")
    assert_gives(mask.exp()[0, 0].int().tolist(), wanted, what="the mask (rows are q)", mistakes={
        "a response sees its siblings": mask_of(lambda q, k: k <= q and BRANCH[k] >= 0),
        "a token of the prompt is seen by those before it":
            mask_of(lambda q, k: BRANCH[k] == 0 or sees(q, k)),
        "a response does not see the prompt":
            mask_of(lambda q, k: k <= q and BRANCH[k] == BRANCH[q]),
        "a token sees what comes after it": mask_of(lambda q, k: BRANCH[k] in (0, BRANCH[q])),
        "a token sees what comes after it, and not what is before":
            mask_of(lambda q, k: k >= q and BRANCH[k] in (0, BRANCH[q])),
        "a token does not see itself": mask_of(lambda q, k: k != q and sees(q, k)),
        "padding sees nothing, so its softmax is empty":
            mask_of(lambda q, k: BRANCH[q] >= 0 and sees(q, k)),
        "inverted: -inf where q sees k": mask_of(lambda q, k: not sees(q, k))})
    assert mask.dtype == torch.float64
    assert tree_mask(torch.tensor([BRANCH]), torch.float32).dtype == torch.float32


# ---------------------------------------------------------------- layout

# What is said of a field that is wrong; the order is that in which a student should get them right.
FIELDS = {
    "tokens": "prompt, response 1, ..., response K, padding",
    "branch": "0 in the prompt, k in response k, -1 in padding",
    "position": "it counts up; every response starts again at the prompt's length",
    "own": "the place, row * T + column, of each learnt token",
    "predictor": "the place of the token before; for the first one the last prompt position",
    "target": "the learnt tokens themselves",
    "slot": "row * K + response, from 0, of each learnt token; padding has B * K",
    "last": "the place of each response's last token",
    "lengths": "learnt tokens of each response, 0 where a row has fewer responses"}


def assert_batch(batch, about=None, **wanted):
    """The fields of a TreeBatch. about: what is special in it."""
    for field, meaning in FIELDS.items():
        if field in wanted:
            got = getattr(batch, field).tolist()
            said = f" ({about})" if about else ""
            assert got == wanted[field], (
                f"{field}: {meaning}{said}\n     got {got}\n  wanted {wanted[field]}")


def test_collate_layout():
    """Two rows with two responses each; the second row ends in padding. First tokens are predicted
    from the last prompt position: 2, and 6 + 0. Whatever is in row 1 is 6 further."""
    batch = collate([([5, 6, 7], [[8, 9], [10]]), ([11], [[12], [13, 14]])])
    assert_batch(
        batch,
        tokens=[[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 0, 0]],
        branch=[[0, 0, 0, 1, 1, 2], [0, 1, 2, 2, -1, -1]],
        position=[[0, 1, 2, 3, 4, 3], [0, 1, 1, 2, 0, 0]],
        own=[3, 4, 5, 7, 8, 9],
        predictor=[2, 3, 2, 6, 6, 8],
        target=[8, 9, 10, 12, 13, 14],
        slot=[0, 0, 1, 2, 3, 3],
        last=[[4, 5], [7, 9]],
        lengths=[[2, 1], [1, 2]])
    assert batch.pairs is batch.samples is batch.ref_logps is batch.rewards is None
    tensors = [value for value in vars(batch).values() if torch.is_tensor(value)]
    assert len(tensors) == 9 and {tensor.dtype for tensor in tensors} == {torch.int64}


@pytest.mark.parametrize("kind", [list, tuple, np.array])
def test_collate_of_arrays_and_lists(kind):
    """Token ids come as arrays from a data set, as lists from a test; more of them, or fewer, than
    there are in the prompt."""
    batch = collate([(kind([5, 6]), [kind([7]), kind([8, 9, 10])])])
    assert_batch(batch, f"of {kind.__name__}s", tokens=[[5, 6, 7, 8, 9, 10]],
                 position=[[0, 1, 2, 2, 3, 4]], predictor=[1, 1, 3, 4], lengths=[[1, 3]])


def test_collate_of_tokens_that_are_only_read():
    """A ~token is in the tree as any other, and is not learnt: here the second one and the last."""
    batch = collate([([5], [[6, ~7, 8, ~0]])])
    assert_batch(batch, "a ~token is read, and not learnt", tokens=[[5, 6, 7, 8, 0]],
                 branch=[[0, 1, 1, 1, 1]], position=[[0, 1, 2, 3, 4]], own=[1, 3],
                 predictor=[0, 2], target=[6, 8], slot=[0, 0], last=[[4]], lengths=[[2]])


def test_collate_of_three_responses():
    batch = collate([([5, 6], [[7], [8, 9, 10], [11, 12]])])
    assert_batch(batch, tokens=[[5, 6, 7, 8, 9, 10, 11, 12]],
                 branch=[[0, 0, 1, 2, 2, 2, 3, 3]],
                 position=[[0, 1, 2, 2, 3, 4, 2, 3]],
                 own=[2, 3, 4, 5, 6, 7],
                 predictor=[1, 1, 3, 4, 1, 6],
                 target=[7, 8, 9, 10, 11, 12],
                 slot=[0, 1, 1, 1, 2, 2],
                 last=[[2, 5, 7]],
                 lengths=[[1, 3, 2]])


def test_collate_of_different_numbers_of_responses():
    """K is the largest number; a response that is not there has length 0 and no slot."""
    batch = collate([([5], [[6]]), ([7], [[8], [9, 10]])])
    assert_batch(batch, "rows with fewer responses", 
                 tokens=[[5, 6, 0, 0], [7, 8, 9, 10]],
                 branch=[[0, 1, -1, -1], [0, 1, 2, 2]],
                 slot=[0, 2, 3, 3],
                 lengths=[[1, 0], [1, 2]])
    assert batch.last.shape == (2, 2)


def test_collate_pads_no_further_than_the_longest_row():
    batch = collate([([5, 6], [[8, 9], [10]]), ([11], [[12], [13]])])
    assert batch.tokens.shape == (2, 5) and batch.target.shape == (5,)


def test_collate_rounds_shapes_up():
    """The row and the response tokens to the multiple. Padding goes to slot B * K, which sum_tokens
    throws away."""
    batch = collate([([5, 6, 7, 1, 2, 3], [[8, 9, 4], [10, 0]])], multiple=4)
    assert_batch(batch, "with padding", 
                 tokens=[[5, 6, 7, 1, 2, 3, 8, 9, 4, 10, 0, 0]],
                 branch=[[0, 0, 0, 0, 0, 0, 1, 1, 1, 2, 2, -1]],
                 own=[6, 7, 8, 9, 10, 0, 0, 0],
                 predictor=[5, 6, 7, 5, 9, 0, 0, 0],
                 target=[8, 9, 4, 10, 0, 0, 0, 0],
                 slot=[0, 0, 0, 1, 1, 2, 2, 2],
                 last=[[8, 10]])
    exact = collate([([5, 6, 7, 1, 2], [[8, 9], [10]])], multiple=4)    # nothing to round
    assert exact.tokens.shape == (1, 8)


@pytest.mark.parametrize("bad", [
    [([], [[1]])], [([1], [[]])], [([1], [[1], [2]]), ([1], [[1], []])]])
def test_collate_refuses_an_empty_prompt_or_response(bad):
    with pytest.raises(ValueError, match="^prompts and responses need at least one token$"):
        collate(bad)


# ---------------------------------------------------------------- equal to separate sequences

def make(kind, seed=0, config=CONFIG):
    """In float64, and away from the initial zeros, so that every part matters."""
    torch.manual_seed(seed)
    model = kind(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.double()


def random_examples(K, rows=6, seed=0):
    """Ragged rows; the first has one-token responses only, and a one-token prompt."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high):
        n = torch.randint(low, high, (1,), generator=generator).item()
        return torch.randint(0, CONFIG.vocab_size, (n,), generator=generator).tolist()

    examples = [(draw(1, 2), [draw(1, 2) for _ in range(K)])]
    for _ in range(rows - 1):
        examples.append((draw(1, 14), [draw(1, 10) for _ in range(K)]))
    return examples


def separate_logps(model, examples):
    """Brute force: every prompt + response alone, plain causal logits, a sum over the response's
    tokens."""
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
            out.append(hidden[0, -1] @ model.score.weight[0])
    return torch.stack(out).view(len(examples), -1)


def summing(config):
    """A reward model that adds up the numbers of all response tokens."""
    return RewardModel(dataclasses.replace(config, reward_head="sum"))


def separate_sums(model, examples):
    out = []
    for prompt, responses in examples:
        for response in responses:
            tokens = torch.tensor([prompt + response])
            hidden = model.transformer(tokens, torch.arange(tokens.size(1))[None])
            out.append((hidden[0, len(prompt):] @ model.score.weight[0]).sum())
    return torch.stack(out).view(len(examples), -1)


MODELS = [(GPT, separate_logps), (RewardModel, separate_rewards), (summing, separate_sums)]
ALL_MODELS = pytest.mark.parametrize("kind, brute_force", MODELS)


def gradients(model, values):
    """Of a sum in which no response counts like another: {parameter name: gradient}."""
    model.zero_grad()
    weights = torch.linspace(-1, 1.5, values.numel(), dtype=values.dtype).view_as(values)
    (values * weights).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def relative_error(got, wanted):
    return ((got.double() - wanted.double()).norm() / wanted.double().norm()).item()


def assert_equal_with_gradients(model, got, wanted, tolerance):
    """Two ways to compute some values: they agree relative to their size, and so do the gradients
    of every parameter."""
    assert got.dtype == wanted.dtype and got.shape == wanted.shape
    assert relative_error(got, wanted) < tolerance
    of_got, of_wanted = gradients(model, got), gradients(model, wanted)
    for name in of_wanted:
        assert of_wanted[name].norm() > 0, name
        assert relative_error(of_got[name], of_wanted[name]) < tolerance, name


def hidden_by_hand(model, batch, read, siblings=False, restart=True):
    """What the transformer gives at some places, with a mask that is written out. siblings: whether
    responses see each other; restart: whether every response starts again at the prompt's
    length."""
    T, branch = batch.tokens.size(1), batch.branch[:, None]
    visible = (branch == 0) | (branch == branch.transpose(1, 2)) | siblings     # (B, q, k)
    mask = (visible & torch.ones(T, T, dtype=torch.bool).tril()).unsqueeze(1)
    position = batch.position if restart else torch.arange(T).expand_as(batch.tokens)
    return model.transformer(batch.tokens, position, mask, read=read)           # (R, C)


def add_up(batch, values):
    """The sum of the values in each response's slot: (R,) -> (B, K)."""
    slots = [values[batch.slot == slot].sum() for slot in range(batch.last.numel())]
    return torch.stack(slots).view_as(batch.last)


SIBLINGS = "a response sees its siblings: the mask is not the tree's"
POSITIONS = "a position counts on from one response to the next"
FEW = [([1, 2], [[3, 4, 5], [6]]), ([7, 8, 9], [[10, 11], [12, 13]]), ([14], [[15], [16]])]


@pytest.mark.parametrize("fast", [True, False])
def test_response_logps_are_those_of_separate_sequences(fast):
    model, batch = make(GPT), collate(FEW)
    wanted, weight = separate_logps(model, FEW), model.lm_head.weight

    def logits(read=batch.predictor, **changes):
        return hidden_by_hand(model, batch, read, **changes) @ weight.t()       # (R, vocab)

    def of_targets(values, target=batch.target):
        return add_up(batch, values[torch.arange(len(target)), target])         # (B, K)

    right, read_tokens = logits().log_softmax(dim=1), batch.tokens.flatten()[batch.predictor]
    assert_gives(model.response_logps(batch, fast=fast), wanted, what="log-probs", mistakes={
        SIBLINGS: of_targets(logits(siblings=True).log_softmax(dim=1)),
        POSITIONS: of_targets(logits(restart=False).log_softmax(dim=1)),
        "read at the tokens, not at their predictor":
            of_targets(logits(read=batch.own).log_softmax(dim=1)),
        "the mean over its tokens, not their sum": wanted / batch.lengths,
        "probabilities are added up, not log-probs": of_targets(right.exp()),
        "logits: log_softmax is missing": of_targets(logits()),
        "log_softmax is over the tokens, not over the vocabulary":
            of_targets(logits().log_softmax(dim=0)),
        "of the token that is read, not of the target": of_targets(right, read_tokens)})


def test_rewards_are_those_of_separate_sequences():
    """At the last token of a response."""
    model, batch = make(RewardModel), collate(FEW)
    last, ends = batch.last.flatten(), torch.arange(1, 4) * batch.tokens.size(1) - 1

    def rewards(read=last, **changes):
        hidden = hidden_by_hand(model, batch, read, **changes)
        return (hidden @ model.score.weight[0]).view_as(batch.last)

    assert_gives(model(batch), separate_rewards(model, FEW), what="rewards", mistakes={
        SIBLINGS: rewards(siblings=True), POSITIONS: rewards(restart=False),
        "read at the row's last column, not at the response's last token":
            rewards(ends.repeat_interleave(2)),
        "read before the last token": rewards(last - 1)})


def test_summed_rewards_are_those_of_separate_sequences():
    """With the head "sum": of all tokens of a response."""
    model, batch = make(summing), collate(FEW)
    wanted = separate_sums(model, FEW)

    def numbers(read=batch.own, **changes):
        return hidden_by_hand(model, batch, read, **changes) @ model.score.weight[0]

    assert_gives(model(batch), wanted, what="summed rewards", mistakes={
        SIBLINGS: add_up(batch, numbers(siblings=True)),
        POSITIONS: add_up(batch, numbers(restart=False)),
        "read at the predictors, not at a response's own tokens":
            add_up(batch, numbers(batch.predictor)),
        "the mean over its tokens, not their sum": wanted / batch.lengths,
        "the last token alone, not the sum of all":
            numbers(batch.last.flatten()).view_as(wanted)})


@ALL_MODELS
@pytest.mark.parametrize("K", [1, 2, 3])
def test_tree_equals_separate_sequences(kind, brute_force, K):
    """Log-probs, rewards and all their gradients in float64, for ragged lengths, one-token prompts
    and one-token responses."""
    model, examples = make(kind), random_examples(K)
    tree = model(collate(examples))
    assert tree.shape == (6, K) and tree.dtype == torch.float64
    assert_equal_with_gradients(model, tree, brute_force(model, examples), 1e-9)


@ALL_MODELS
@pytest.mark.parametrize("n_layer, n_head", [(1, 1), (3, 4)])
def test_tree_equals_separate_sequences_in_models_of_other_shapes(kind, brute_force, n_layer,
                                                                  n_head):
    """One layer, which is the last one too, and several."""
    config = dataclasses.replace(CONFIG, n_layer=n_layer, n_head=n_head, tie_word_embeddings=False)
    model, examples = make(kind, config=config), random_examples(2, seed=3)
    assert_equal_with_gradients(model, model(collate(examples)), brute_force(model, examples), 1e-9)


@ALL_MODELS
@pytest.mark.parametrize("config", FAMILIES)
def test_tree_equals_separate_sequences_in_newer_models(kind, brute_force, config):
    """Positions that turn queries and keys restart in every response; heads share keys."""
    model, examples = make(kind, config=config), random_examples(2)
    assert_equal_with_gradients(model, model(collate(examples)), brute_force(model, examples), 1e-9)


@pytest.mark.parametrize("kind", [GPT, RewardModel, summing])
def test_responses_share_a_row_or_have_one_each(kind):
    model, examples = make(kind), random_examples(2, seed=2)
    alone = [model(collate([(prompt, [response])]))
             for prompt, responses in examples for response in responses]
    together = model(collate(examples))
    assert relative_error(torch.cat(alone).view_as(together), together) < 1e-9


@ALL_MODELS
def test_padding_changes_nothing(kind, brute_force):
    """Shapes that are rounded up: more columns, and more tokens that are read."""
    model, examples = make(kind), random_examples(2, seed=2)
    plain, batch = collate(examples), collate(examples, multiple=32)
    assert batch.tokens.size(1) > plain.tokens.size(1), "there is padding in the rows"
    assert len(batch.target) > len(plain.target), "and in what is read"
    assert_gives(model(batch), brute_force(model, examples), what="a batch with padding")
    assert_equal_with_gradients(model, model(batch), brute_force(model, examples), 1e-9)


@pytest.mark.parametrize("kind", [GPT, RewardModel, summing])
def test_company_does_not_matter(kind):
    """A row gives the same numbers alone and in a batch with longer rows, which give it padding."""
    model, examples = make(kind), random_examples(2, rows=8, seed=1)
    together = model(collate(examples))
    for i in range(len(examples)):
        alone = model(collate(examples[i:i + 1]))
        assert relative_error(alone, together[i:i + 1]) < 1e-9


@pytest.mark.parametrize("kind", [GPT, RewardModel, summing])
def test_rows_with_fewer_responses(kind):
    """Each row gives the same numbers alone and in a batch with rows that have more; a log-prob
    that is not there is 0."""
    model, examples = make(kind), random_examples(3, seed=1)
    examples = [(prompt, responses[:1 + i % 3]) for i, (prompt, responses) in enumerate(examples)]
    together = model(collate(examples))
    assert together.shape == (6, 3)
    for i, example in enumerate(examples):
        alone = model(collate([example]))
        assert relative_error(together[i:i + 1, :alone.size(1)], alone) < 1e-9
        if kind is GPT:
            assert (together[i, alone.size(1):] == 0).all()


@pytest.mark.parametrize("kind", [GPT, RewardModel, summing])
def test_siblings_do_not_matter(kind):
    """A response's log-prob and reward do not change when its sibling does, or when the two change
    places."""
    model = make(kind)
    prompt, first, second, third = [1, 2, 3], [4, 5, 6], [7, 8], [9, 10, 11, 12]
    values = model(collate([(prompt, [first, second])]))
    other_sibling = model(collate([(prompt, [first, third])]))
    assert relative_error(other_sibling[:, 0], values[:, 0]) < 1e-9
    turned = model(collate([(prompt, [second, first])]))
    assert relative_error(turned, values.flip(1)) < 1e-9


def with_columns(examples, K):
    """A batch of a data set whose rows have K responses, and samples after them."""
    N, S = len(examples), len(examples[0][1]) - K
    dataset = Dataset(examples, np.ones((N, K, 2), np.float32), np.zeros((N, K + S), np.float32), S)
    return dataset.batch(np.arange(N))


def test_a_batch_moves_to_a_device_whole():
    """Every tensor of it, the columns that only some data sets have included."""
    batch = with_columns([([5, 6, 7], [[8, 9], [10], [11]])], K=2)
    for field, value in vars(batch).items():
        setattr(batch, field, torch.zeros(1) if value is None else value)
    assert batch.to("meta") is batch
    assert {field: value.device.type for field, value in vars(batch).items()} == dict.fromkeys(
        vars(batch), "meta")


@pytest.mark.parametrize("config", [CONFIG, FAMILIES[2]])
def test_everything_is_computed_where_the_model_is(monkeypatch, config):
    """On torch's "meta" device, which has shapes and no numbers (nor autocast): a tensor made on
    the CPU by mistake does not mix with its tensors, as it would not with a GPU's."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **options: contextlib.nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)
    examples = [([1, 2, 3], [[4, 5], [6], [7, 8]]), ([1, 2], [[3], [4, 5, 6], [7]])]
    batch = with_columns(examples, K=2).to("meta")
    policy, reward_model = GPT(config).to("meta"), RewardModel(config).to("meta")
    logps = policy.response_logps(batch)                            # (2, 3)
    assert logps.device.type == "meta" and logps.shape == (2, 3)
    assert policy.response_logps(batch, fast=False).device.type == "meta"
    assert policy.logits(batch.tokens).device.type == "meta"
    for name in PREFERENCE_LOSSES:
        flags = knobs(name) | ({"gamma": 0.1} if "gamma" in knobs(name) else {})
        assert batch_loss(name, logps, batch, **flags).device.type == "meta"
    bradley_terry(batch.pair_up(reward_model(batch))).sum().backward()
    assert reward_model.score.weight.grad.device.type == "meta"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_have_the_type_of_the_weights(dtype):
    batch = collate(random_examples(2))
    policy, reward_model = make(GPT).to(dtype), make(RewardModel).to(dtype)
    assert policy.response_logps(batch).dtype == dtype
    assert policy.response_logps(batch, fast=False).dtype == dtype
    assert reward_model(batch).dtype == dtype


@pytest.mark.parametrize("fast", [True, False])
def test_log_probs_of_bfloat16_weights_are_added_up_in_float32(fast):
    """Which is also what autocast leaves to do on a TPU, where log_softmax would stay bfloat16."""
    logps = make(GPT).bfloat16().response_logps(collate(random_examples(2)), fast=fast)
    assert logps.dtype == torch.float32 and not torch.equal(logps, logps.bfloat16().float())


def test_rewards_keep_float32_under_autocast():
    """Products below the head may be bfloat16, rewards are not, or many would tie: they are float32
    products of what the transformer gives, which differ from what bfloat16 can hold."""
    model, batch = make(RewardModel).float(), collate(random_examples(2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rewards = model(batch)
        mask = tree_mask(batch.branch, torch.float32)
        hidden = model.transformer(batch.tokens, batch.position, mask, read=batch.last.flatten())
    assert rewards.dtype == torch.float32
    assert not torch.equal(rewards, rewards.bfloat16().float())
    wanted = (hidden.float() @ model.score.weight[0]).view_as(rewards)
    torch.testing.assert_close(rewards, wanted, rtol=1e-5, atol=1e-5)


def test_log_probs_under_autocast():
    """The vocabulary's product is bfloat16 then, the log-probs are float32 sums: near those of
    float32, and not the same."""
    model, batch = make(GPT).float(), collate(random_examples(2))
    exact = model(batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model(batch)
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).abs().max() < 0.02 * exact.abs().max()


def with_offset(offset):
    """A policy in float32 whose logits are all higher by `offset`, which no probability depends on:
    one of the hidden numbers is 10 everywhere, and its weight in the head offset / 10."""
    config = dataclasses.replace(CONFIG, vocab_size=499, tie_word_embeddings=False)
    policy = make(GPT, config=config).float()
    with torch.no_grad():
        policy.transformer.ln_f.weight[0], policy.transformer.ln_f.bias[0] = 0, 10
        policy.lm_head.weight[:, 0] = offset / 10 + 0.1 * policy.lm_head.weight[:, 0]
    return policy


def bfloat16_errors(offset, fast):
    """Root mean squares of the errors that autocast makes, against float32: of log-probs, of
    log-ratio margins, and of the gradients of all parameters, relative to their size."""
    policy, batch = with_offset(offset), collate(random_examples(2, rows=64))
    results = []
    for rounded in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=rounded):
            logps = policy.response_logps(batch, fast=fast or not rounded)
        of_weights = gradients(policy, logps)
        results.append((logps.detach(), torch.cat([g.flatten() for g in of_weights.values()])))
    (exact, exact_gradient), (logps, gradient) = results
    assert logps.dtype == torch.float32
    error = logps - exact
    h_error = error[:, 0] - error[:, 1]
    return [error.square().mean().sqrt().item(), h_error.square().mean().sqrt().item(),
            relative_error(gradient, exact_gradient)]


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("offset", [-100, 300])
def test_an_offset_of_all_logits_costs_no_digits_under_autocast(offset, fast):
    """As GPT-2 has one, near -110: errors of log-probs, margins and gradients are those without it
    (at most a tenth larger). Power: products with the weight as it is are off by more than five
    times as much."""
    without, with_it = bfloat16_errors(0, fast), bfloat16_errors(offset, fast)
    assert max(without) < 0.2
    for large, small in zip(with_it, without):
        assert large < 1.1 * small
    policy, batch = with_offset(offset), collate(random_examples(2, rows=64))
    exact = policy(batch)
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_file, "head_weight", lambda weight, dtype: (weight.to(dtype), None))
        error = policy.response_logps(batch, fast=False) - exact
    assert error.square().mean().sqrt() > 5 * with_it[0]


def test_the_heads_weight_is_centred_where_it_is_rounded():
    """In bfloat16 every column has the mean 0, but for rounding; otherwise it is the tensor itself.
    A piece at a time, the last one shorter."""
    weight = torch.randn(2500, 3) + torch.tensor([-100.0, 0.0, 5.0])
    for dtype in (torch.float32, torch.float64):
        as_it_is, mean = backward.head_weight(weight.to(dtype), dtype)
        assert torch.equal(as_it_is, weight.to(dtype)) and mean is None
    assert backward.head_weight(weight, torch.float32)[0] is weight
    rounded, mean = backward.head_weight(weight, torch.bfloat16)
    assert rounded.dtype == torch.bfloat16 and mean.dtype == torch.float32
    torch.testing.assert_close(mean, weight.double().mean(dim=0).float())
    assert torch.equal(rounded, (weight - mean).bfloat16())


def test_logits_are_not_rounded_under_autocast():
    """GPT.logits keeps the head's product in float32, offset and all."""
    policy, tokens = with_offset(-100), torch.arange(8)[None]
    exact = policy.logits(tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = policy.logits(tokens)
    assert logits.dtype == torch.float32 and exact.mean() < -90
    assert 0 < (logits - exact).abs().max() < 0.1


def test_a_targets_own_logit_is_not_rounded():
    """Under autocast the logits 1 + 1/512 and 1 round to the same number, but the log-probs of
    these targets differ by 1/512. A certain target and an impossible one have finite log-probs."""
    weight = torch.tensor([[1 + 1 / 512], [1.0], [-2 - 1 / 512]])
    hidden = torch.ones(2, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logps = backward.token_logps(hidden, weight, torch.tensor([0, 1]))
        far = backward.token_logps(1000 * hidden, weight, torch.tensor([0, 2]))
        alone = backward.token_logps(hidden, torch.ones(1, 1), torch.tensor([0, 0]))
    assert (logps[0] - logps[1]).item() == pytest.approx(1 / 512, rel=0.5)
    assert torch.isfinite(far).all() and far[1].item() == pytest.approx(-3000, rel=0.01)
    assert alone.tolist() == [0, 0]


@pytest.mark.parametrize("kind", [RewardModel, summing])
def test_reward_model_starts_at_zero(kind):
    torch.manual_seed(0)
    assert kind(CONFIG)(collate(random_examples(2))).abs().max() == 0


# ---------------------------------------------------------------- the fast head

@pytest.mark.parametrize("rows", [1, 7, 64, 1024])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_the_fast_head_equals_the_plain_formula(monkeypatch, dtype, tolerance, tied, rows):
    """Values and all gradients, however many tokens it takes at a time, with padding."""
    monkeypatch.setattr(backward, "ROWS", rows)
    config = dataclasses.replace(CONFIG, tie_word_embeddings=tied)
    model, batch = make(GPT, config=config).to(dtype), collate(random_examples(3), multiple=16)
    fast, plain = model.response_logps(batch), model.response_logps(batch, fast=False)
    assert fast.dtype == dtype and len(batch.target) > 64
    assert_equal_with_gradients(model, fast, plain, tolerance)


def test_the_fast_head_is_the_default(monkeypatch):
    """model(batch) and response_logps(batch) take it, fast=False does not."""
    calls = []

    def counted(*arguments):
        calls.append(arguments)
        return backward.token_logps(*arguments)

    monkeypatch.setattr(model_file, "token_logps", counted)
    model, batch = make(GPT), collate(random_examples(2))
    model(batch)
    model.response_logps(batch)
    assert len(calls) == 2
    model.response_logps(batch, fast=False)
    assert len(calls) == 2


def head_inputs(R=10, C=4, vocab=7, dtype=torch.float64):
    """hidden, weight, target, and how much each token counts."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(R, C, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocab, C, generator=generator, dtype=torch.float64)
    target = torch.randint(0, vocab, (R,), generator=generator)
    sizes = torch.rand(R, generator=generator, dtype=torch.float64)
    return hidden.to(dtype), weight.to(dtype), target, sizes.to(dtype)


def cross_entropy(hidden, weight, target):
    return -F.cross_entropy(hidden @ weight.t(), target, reduction="none")


@pytest.mark.parametrize("rows", [1, 3, 10, 1024])
def test_token_logps_are_cross_entropys(monkeypatch, rows):
    """Values and gradients of F.cross_entropy, to rounding in float64."""
    monkeypatch.setattr(backward, "ROWS", rows)
    hidden, weight, target, sizes = head_inputs()
    hidden.requires_grad_()
    weight.requires_grad_()
    results = []
    for function in (backward.token_logps, cross_entropy):
        logps = function(hidden, weight, target)
        assert logps.shape == (10,)
        results.append([logps, *torch.autograd.grad((logps * sizes).sum(), (hidden, weight))])
    for got, wanted in zip(*results):
        assert got.dtype == torch.float64 and relative_error(got, wanted) < 1e-12


def test_token_logps_of_logits_beyond_what_exp_can_hold():
    """Logits of +-1000 in float32: exact values, gradients of 0 and 1."""
    weight = torch.tensor([[1000.0], [-1000.0], [0.0]], requires_grad=True)
    hidden = torch.ones(3, 1, requires_grad=True)
    logps = backward.token_logps(hidden, weight, torch.arange(3))
    assert logps.tolist() == [0.0, -2000.0, -1000.0]
    logps.sum().backward()
    assert weight.grad.tolist() == [[-2.0], [1.0], [1.0]]
    assert hidden.grad.tolist() == [[0.0], [-2000.0], [-1000.0]]


def test_what_is_added_up_is_float32_under_autocast():
    """The sum over the vocabulary (5,001 equal tokens, which bfloat16 would round to 4,992), and
    the difference of two logits (which it would round to a multiple of 0.5). The logits of the
    second add up to 0, so that centring them rounds nothing."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        equal = backward.token_logps(torch.ones(40, 2), torch.zeros(5001, 2), torch.arange(40))
        weight = torch.tensor([[100.0], [1.0078125], [-101.0078125]])
        apart = backward.token_logps(torch.ones(1, 1), weight, torch.tensor([1]))
    assert equal.dtype == apart.dtype == torch.float32
    torch.testing.assert_close(equal, torch.full((40,), -math.log(5001)), rtol=1e-6, atol=0)
    assert apart.tolist() == [1.0078125 - 100]


def test_products_are_bfloat16_under_autocast():
    """A logit is the product of rounded factors, rounded: 1 + 1/512 counts as 1."""
    weight = torch.tensor([[1 + 1 / 512], [0.0]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = backward.token_logps(torch.ones(1, 1), weight, torch.tensor([1]))
    assert rounded.item() == pytest.approx(-math.log(1 + math.exp(1)), abs=2e-3)
    exact = backward.token_logps(torch.ones(1, 1), weight, torch.tensor([1]))
    assert exact.item() == pytest.approx(-math.log(1 + math.exp(1 + 1 / 512)), abs=1e-6)


def test_the_weights_gradient_is_added_up_in_float32_under_autocast(monkeypatch):
    """256 pieces of 8 tokens: the error of the gradient, against float32's, is that of single
    bfloat16 products (it is one product with 2048 tokens at a time). Power: adding the pieces in
    bfloat16 is worse by more than five times."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(2048, 16).abs(), 0.3 * torch.randn(31, 16)
    target, sizes = torch.randint(0, 31, (2048,)), torch.rand(2048)

    def gradient(rows, tokens=slice(None), bfloat16=True):
        monkeypatch.setattr(backward, "ROWS", rows)
        w = weight.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16):
            logps = backward.token_logps(hidden[tokens], w, target[tokens])
        (logps * sizes[tokens]).sum().backward()
        assert w.grad.dtype == torch.float32
        return w.grad

    exact = gradient(2048, bfloat16=False)
    single = relative_error(gradient(2048), exact)
    assert 1e-4 < single < 1e-2
    assert relative_error(gradient(8), exact) < 1.2 * single
    total = torch.zeros(31, 16, dtype=torch.bfloat16)
    for start in range(0, 2048, 8):
        total += gradient(8, slice(start, start + 8)).bfloat16()
    assert relative_error(total, exact) > 5 * single


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_gradients_have_the_types_of_what_they_are_of(monkeypatch, dtype):
    """Whatever the type of the products; log-probs are float32 at least."""
    monkeypatch.setattr(backward, "ROWS", 4)
    hidden, weight, target, _ = head_inputs(dtype=dtype)
    hidden.requires_grad_()
    weight.requires_grad_()
    logps = backward.token_logps(hidden, weight, target)
    assert logps.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    logps.sum().backward()
    assert hidden.grad.dtype == weight.grad.dtype == dtype


def test_the_fast_head_keeps_its_arrays_until_the_backward_pass(monkeypatch):
    """One for every piece, until it has been used; none if there will be no backward pass."""
    hidden, weight, target, _ = head_inputs()
    monkeypatch.setattr(backward, "ROWS", 3)
    context = SimpleNamespace(needs_input_grad=[True, True, False, False, False])
    backward.TokenLogps.forward(context, hidden, weight, target, torch.float64, True)
    assert len(context.kept) == 4
    backward.TokenLogps.backward(context, torch.ones(10, dtype=torch.float64))
    assert context.kept == []

    contexts, forward = [], backward.TokenLogps.forward

    def watched(ctx, *arguments):
        contexts.append(ctx)
        return forward(ctx, *arguments)

    monkeypatch.setattr(backward.TokenLogps, "forward", staticmethod(watched))
    backward.token_logps(hidden.requires_grad_(), weight, target)
    with torch.no_grad():
        backward.token_logps(hidden, weight, target)
    assert [len(ctx.kept) for ctx in contexts] == [4, 0]
