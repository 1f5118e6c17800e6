"""Measures whether FlexAttention would be faster with the tree's mask: times one layer's attention
at the shapes of training.

    python dev/attention.py --device=cuda --dtype=bfloat16
    python dev/attention.py --shape=hh --n_head=20     # on a CPU: no backward pass, not compiled

mask    as in model.py: one call with a mask of numbers. torch's fastest kernels can't be used then
flex    one call, with the mask as a function of `branch`. Blocks that nobody may see are skipped

Training uses the first. Attention is only 6% to 10% of a step's operations. So flex is worth its
place in model.py only if it takes at most half of the time, forward and backward, at both shapes.
"""
import argparse
import os
import sys
import warnings
from statistics import median

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from data import collate
from dev import bench
from model import tree_mask
from support.device import computing, setup
from support.flags import Parser, positive_int, run_script, seed


def tree_blocks(branch):
    """Builds model.tree_mask in blocks. branch: (B, T). Returns a BlockMask."""
    def visible(b, head, query, key):
        return (key <= query) & ((branch[b, key] == 0) | (branch[b, key] == branch[b, query]))

    B, T = branch.shape
    return create_block_mask(visible, B, None, T, T, device=branch.device)


def milliseconds(attend, q, k, v, backward):
    """Times a forward pass, with its backward pass if `backward` is true. Returns milliseconds."""
    def work():
        y = attend(q, k, v)
        if backward:
            y.sum().backward()

    with torch.set_grad_enabled(backward):
        return 1000 * bench.seconds_of(work, q.device)


def main(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--shape", choices=bench.SHAPES, default="tldr")
    add("--n_head", type=positive_int, default=12)
    add("--head_size", type=positive_int, default=64)
    add("--batch_size", type=positive_int, default=8)
    add("--turns", type=positive_int, default=20)
    add("--seed", type=seed, default=0)
    parser.add_shared("device", "dtype")
    args = parser.parse_args(argv)
    device = setup(args)
    prompt, response = bench.SHAPES[args.shape]
    made_up = argparse.Namespace(seed=args.seed, prompt=prompt, response=response, n_responses=1)
    examples = bench.made_up_examples(made_up, args.batch_size, vocab_size=1000)
    batch = collate(examples, computing.multiple).to(device)
    dtype, backward = getattr(torch, args.dtype), device.type != "cpu"
    B, T = batch.branch.shape
    q, k, v = (torch.randn(B, args.n_head, T, args.head_size, device=device, dtype=dtype,
                           requires_grad=backward) for _ in range(3))
    mask, blocks = tree_mask(batch.branch, dtype), tree_blocks(batch.branch)
    flex = flex_attention if device.type == "cpu" else torch.compile(flex_attention)
    warnings.filterwarnings("ignore", "flex_attention called without torch.compile")

    attends = {"mask": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask),
               "flex": lambda q, k, v: flex(q, k, v, block_mask=blocks)}
    with torch.no_grad():
        apart = (attends["mask"](q, k, v) - attends["flex"](q, k, v)).abs().max().item()
    times = {name: [] for name in attends}
    for _ in range(bench.WARM_UP + args.turns):
        for name, attend in attends.items():
            times[name].append(milliseconds(attend, q, k, v, backward))
    mask_ms, flex_ms = (median(turns[bench.WARM_UP:]) for turns in times.values())
    print(f"{B} rows of {T} columns, {args.n_head} heads of {args.head_size}, {args.dtype}, "
          f"{bench.device_name(device)}, torch {torch.__version__}\n"
          f"{'forward and backward' if backward else 'forward alone, flex not compiled'}: "
          f"mask {mask_ms:.2f} ms, flex {flex_ms:.2f} ms ({flex_ms / mask_ms:.2f} of it); "
          f"at most {apart:.1g} apart")


if __name__ == "__main__":
    run_script(main)
