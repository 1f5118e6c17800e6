"""LoRA: leaves a model's weights as they are, and trains a small correction of each linear layer.

A linear layer computes x W', where W is (out, in) and ' means transposed. With LoRA it computes
x W' + 2 (x A') B'. A is (rank, in) and B is (out, rank): two thin matrices, whose product B A is a
low-rank change of W. All the corrections of a model together are its *adapter*. It has a few
percent of the model's numbers, and only numbers that are trained need a gradient, AdamW's moments
and a place in the saved run. B starts at zero, so at step 0 the model computes what it did before.

From "LoRA: Low-Rank Adaptation of Large Language Models" (Hu et al., 2021). In the terms of the
library PEFT, the factor 2 is alpha / r: alpha is twice the rank.
"""
import copy
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from support.checkpoint import read_adapter
from support.flags import InputError


class LoRALinear(nn.Linear):
    """Computes a linear layer with the weight and bias of another one, and a correction of it.

    A: (rank, in); B: (out, rank).
    """
    scale = 2       # the factor of the correction

    def __init__(self, linear, A, B):
        super().__init__(linear.in_features, linear.out_features, device="meta")    # no memory yet
        self.weight, self.bias = linear.weight, linear.bias
        self.lora_A, self.lora_B = nn.Parameter(A), nn.Parameter(B)

    def forward(self, x):
        small = self.scale * F.linear(x.flatten(0, -2), self.lora_A)    # (R, rank)
        y = F.linear(x.flatten(0, -2), self.weight, self.bias)          # (R, out)
        y.addmm_(small, self.lora_B.t().to(y.dtype))    # y += small @ B', in place to save memory
        return y.unflatten(0, x.shape[:-1])                             # (..., out)

    def merged(self):
        """Returns a plain linear layer that computes the same. This one is not changed."""
        linear = nn.Linear(self.in_features, self.out_features, device="meta")
        change = self.scale * self.lora_B @ self.lora_A                      # (out, in)
        linear.weight, linear.bias = nn.Parameter((self.weight + change).detach()), self.bias
        return linear


def linear_layers(model):
    """Lists the layers that get a correction: all linear ones of the transformer. Returns [(name,
    layer)]."""
    return [(name, layer) for name, layer in model.named_modules()
            if name.startswith("transformer.") and isinstance(layer, nn.Linear)]


def add_lora(model, rank, base, seed=0):
    """Freezes a model (GPT or RewardModel) and gives every linear layer of its transformer a
    correction, which is zero at first. A reward model's head stays trainable.

    base: the folder or hub name of the model, which is saved with the adapter. seed: for the random
    numbers in A, which are drawn as nn.Linear draws its weight. A model that already has an adapter
    keeps it, to train it further. InputError if that has another rank, or lacks some layers.
    """
    check_rank(model, rank)
    if model.lora_base is not None:
        return
    generator = torch.Generator().manual_seed(seed)
    corrections = {}
    for name, layer in linear_layers(model):
        A = torch.empty(rank, layer.in_features)
        nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=generator)
        corrections[name] = A, torch.zeros(layer.out_features, rank)
    put_lora(model, corrections, base)


def check_rank(model, rank):
    """Raises InputError if a model has an adapter already, of another rank or not of all layers."""
    ranks = {len(getattr(layer, "lora_A", ())) for _, layer in linear_layers(model)}
    if model.lora_base is not None and ranks != {rank}:
        raise InputError(f"--lora={rank}: the adapter of --init_from does not have this rank in "
                         f"all its layers, but {', '.join(map(str, sorted(ranks)))}; name its own "
                         "rank, or leave --lora out to merge it and train the whole model")


def put_lora(model, corrections, base):
    """Freezes a model, except for a reward model's head, and gives it trainable corrections.

    corrections: {name of a linear layer: (A, B)}. base: see add_lora.
    """
    model.requires_grad_(False)
    for name, (A, B) in corrections.items():
        linear = model.get_submodule(name)
        model.set_submodule(name, LoRALinear(linear, A.to(linear.weight), B.to(linear.weight)))
    if hasattr(model, "score"):
        model.score.requires_grad_(True)
    model.lora_base = base


def load_lora(model, folder):
    """Gives a model the adapter that is in a folder. The model has to have the weights that the
    adapter was trained on. InputError says what is wrong with the adapter."""
    base, corrections, head = read_adapter(folder, model, linear_layers(model))
    scale = LoRALinear.scale
    put_lora(model, {name: (A, B / scale) for name, (A, B) in corrections.items()}, base)
    if head is not None:
        model.score.load_state_dict({"weight": head})


def merge_lora(model):
    """Adds the corrections to the weights, so that the model is a plain one again, all of it
    trainable. A model without an adapter stays as it is."""
    for name, layer in linear_layers(model):
        if isinstance(layer, LoRALinear):
            model.set_submodule(name, layer.merged())
    model.requires_grad_(True)
    model.lora_base = None


def copy_around_frozen(module):
    """Copies a module, but not its frozen weights, which original and copy then share. So several
    adapters can stand on one model in memory."""
    frozen = {id(p): p for p in module.parameters() if not p.requires_grad}
    return copy.deepcopy(module, memo=frozen)
