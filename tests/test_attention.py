"""Attention by itself, before the tree: its formula, a mask, RoPE, and a cache."""
import math

import pytest
import torch
from hints import assert_gives

from model import Attention, GPTConfig, turn

B, T, HEADS, SIZE = 2, 5, 2, 4      # rows, tokens, heads, numbers in a head
CONFIG = GPTConfig(n_head=HEADS, n_embd=HEADS * SIZE)
CAUSAL = torch.ones(T, T, dtype=torch.bool).tril()      # [q, k]: does q see k?


@pytest.fixture
def layer():
    torch.manual_seed(0)
    layer = Attention(CONFIG).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    return layer.requires_grad_(False)


@pytest.fixture
def x():
    return torch.randn(B, T, HEADS * SIZE, generator=torch.Generator().manual_seed(1)).double()


def cut(x):
    """(B, T, C) -> (B, heads, T, size)"""
    return torch.stack(x.split(SIZE, dim=2), dim=1)


def side_by_side(y):
    """(B, heads, T, size) -> (B, T, C)"""
    return torch.cat(y.unbind(dim=1), dim=2)


def queries_keys_values(layer, x):
    return [cut(part) for part in layer.c_attn(x).chunk(3, dim=2)]


def attend(q, k, v, seen, divisor=math.sqrt(SIZE)):
    """softmax(q k' / sqrt(size)) v, over the keys that are seen. Returns (B, heads, T, size)."""
    scores = (q @ k.transpose(2, 3) / divisor).masked_fill(~seen, -math.inf)
    return scores.softmax(dim=3) @ v


def angles():
    """RoPE's cosines and sines, here of any angles: (1, 1, T, size/2) each."""
    angle = torch.arange(T * SIZE // 2).double().view(1, 1, T, SIZE // 2)
    return angle.cos(), angle.sin()


def test_attention_is_its_formula(layer, x):
    """Causal without a mask."""
    q, k, v = queries_keys_values(layer, x)
    y = attend(q, k, v, CAUSAL)
    cut_wrongly = layer.c_attn(x)[..., :HEADS * SIZE].reshape(B, HEADS, T, SIZE)
    width, everything = math.sqrt(HEADS * SIZE), CAUSAL | True
    assert_gives(layer(x), layer.c_proj(side_by_side(y)), what="attention", mistakes={
        "scores are not divided by sqrt(size)":
            layer.c_proj(side_by_side(attend(q, k, v, CAUSAL, 1))),
        "scores are divided by the root of the width, where a head has sqrt(size)":
            layer.c_proj(side_by_side(attend(q, k, v, CAUSAL, width))),
        "not causal: a token sees later ones":
            layer.c_proj(side_by_side(attend(q, k, v, everything))),
        "queries and keys are exchanged": layer.c_proj(side_by_side(attend(k, q, v, CAUSAL))),
        "queries are cut into heads the wrong way: view as (B, T, heads, size), then transpose":
            layer.c_proj(side_by_side(attend(cut_wrongly, k, v, CAUSAL))),
        "heads are not put side by side: transpose back, then reshape":
            layer.c_proj(y.reshape(B, T, HEADS * SIZE)),
        "the output projection c_proj is missing": side_by_side(y)})


def test_attention_with_a_mask(layer, x):
    """0 where q sees k and -inf where not, in place of the causal one."""
    seen = torch.tensor([[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 0, 1, 0, 0], [1, 0, 1, 1, 1],
                         [0, 1, 0, 0, 1]], dtype=torch.bool)
    mask = torch.zeros(T, T).double().masked_fill(~seen, -math.inf).expand(B, 1, T, T)
    q, k, v = queries_keys_values(layer, x)
    wanted, causal, both = [layer.c_proj(side_by_side(attend(q, k, v, s)))
                            for s in (seen, CAUSAL, CAUSAL & seen)]
    assert_gives(layer(x, mask), wanted, what="attention", mistakes={
        "the mask is ignored: without one it is causal": causal,
        "causal as well, where there is a mask": both})


def test_rope_turns_queries_and_keys(layer, x):
    q, k, v = queries_keys_values(layer, x)
    turns = angles()

    def output(q, k, v):
        return layer.c_proj(side_by_side(attend(q, k, v, CAUSAL)))

    assert_gives(layer(x, turns=turns), output(turn(q, *turns), turn(k, *turns), v),
                 what="attention with RoPE", mistakes={
        "nothing is turned": output(q, k, v),
        "keys are not turned": output(turn(q, *turns), k, v),
        "queries are not turned": output(q, turn(k, *turns), v),
        "values are turned too":
            output(turn(q, *turns), turn(k, *turns), turn(v, *turns))})


def test_a_cache_has_the_keys_and_values_of_all_columns(layer, x):
    """Four tokens in one call and the fifth in another: what all five give at once."""
    q, k, v = queries_keys_values(layer, x)
    turns = angles()
    whole = layer(x, turns=turns)
    keys, values = torch.zeros(2, B, HEADS, T, SIZE).double()
    first, last = [tuple(t[:, :, part] for t in turns) for part in (slice(0, 4), slice(4, 5))]
    layer(x[:, :4], cache=(keys[:, :, :4], values[:, :, :4], slice(0, 4)), turns=first)
    everything = torch.zeros(1, 1).double()
    got = layer(x[:, 4:], everything, (keys, values, slice(4, 5)), last)
    alone = layer.c_proj(side_by_side(v[:, :, 4:]))
    last_q = turn(q[:, :, 4:], *last)
    unturned = layer.c_proj(side_by_side(attend(last_q, k, v, CAUSAL[4:])))
    assert_gives(got, whole[:, 4:], what="the token after the cache", mistakes={
        "the cache is not read: the token sees only itself": alone,
        "keys go into the cache before RoPE turns them": unturned})
    assert_gives(keys, turn(k, *turns), {"stored before RoPE turns them": k}, "keys in the cache")
    assert_gives(values, v, what="values in the cache")
