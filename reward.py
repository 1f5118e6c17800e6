"""Explicit reward models: the transformer with a one-number head, families of them, and scores.

A reward model is a transformer with one number for each token, read in the policy's tree batch: at
the last token of a response (the standard head), or summed over its tokens, as the policy's
implicit reward is a sum over tokens. On the built-in task the sum judges better (LOG.md). A reward
is known only up to a constant per prompt: Bradley-Terry, and all that follows, sees differences.
"""
from dataclasses import replace

import numpy as np
import torch
import torch.nn as nn

from data import d_rho, preferences, relabel
from model import GPTConfig, Transformer, init_weights, tree_mask
from support.cache import cache_folder, cached, hash_examples, hash_weights, key
from support.checkpoint import load_tensors, read_checkpoint, write_checkpoint
from support.device import shape_multiple
from support.flags import naming
from support.passes import score
from support.run import check_same_tokens, models_named
from support.sharding import whole


class RewardModel(nn.Module):
    """r(x, y). Laid out as Hugging Face's GPT2ForSequenceClassification with one label, and the
    same thing where config.reward_head is "last"; "sum" adds up the numbers of all its tokens."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = Transformer(config)
        self.score = nn.Linear(config.n_embd, 1, bias=False)
        init_weights(self, config)
        nn.init.zeros_(self.score.weight)   # all rewards start at 0: Bradley-Terry starts at ln 2

    def forward(self, batch):
        """TreeBatch -> rewards (B, K), in the type of the weights."""
        mask = tree_mask(batch.branch, batch.context, self.score.weight.dtype)
        hidden = self.transformer(batch.tokens, batch.position, mask)       # (B, T - context, C)
        with torch.autocast(hidden.device.type, enabled=False):     # bfloat16 rewards would tie
            rewards = self.score(hidden.to(self.score.weight.dtype)).squeeze(2)     # (B, T - ctx)
        if self.config.reward_head == "last":
            return rewards.gather(1, batch.last)                            # (B, K)
        B, K = batch.last.size()
        branch = batch.branch[:, batch.context:].clamp(min=0)       # 0: prompt, and padding here
        sums = torch.zeros(B, 1 + K, dtype=rewards.dtype, device=rewards.device)
        return sums.scatter_add(1, branch, rewards)[:, 1:]                  # (B, K)

    @classmethod
    def from_policy(cls, gpt, head="last"):
        """A reward model whose transformer starts from a language model's; its head is zero."""
        model = cls(replace(gpt.config, reward_head=head))
        model.transformer.load_state_dict(whole(gpt.transformer.state_dict()))
        return model

    @classmethod
    def from_pretrained(cls, dir_or_hub_name):
        """Reads a checkpoint as GPT.from_pretrained does."""
        config, tensors = read_checkpoint(dir_or_hub_name, head="score")
        model = cls(GPTConfig(**config))
        load_tensors(model, tensors, dir_or_hub_name)
        return model

    def save_pretrained(self, directory, eos_token_id=None):
        """Writes config.json and model.safetensors. (transformers reads the reward at the last
        token that is not pad_token_id; a response ends in end-of-text, so that is another one.)"""
        fields = dict(reward_head="sum")        # which transformers does not know
        if self.config.reward_head == "last":
            fields = dict(id2label={"0": "reward"}, label2id={"reward": 0}, pad_token_id=0,
                          architectures=["GPT2ForSequenceClassification"])
        write_checkpoint(directory, self, eos_token_id, **fields)


def load_reward_models(folders, flag, policy, tokenizer, device):
    """{folder: RewardModel} of comma-separated folders, each a run or a family; {} for None.
    InputError, naming the flag, if one can't read what the policy writes. tokenizer: its name."""
    models = {}
    for folder in models_named(folders, flag):
        with naming(flag):
            models[folder] = RewardModel.from_pretrained(folder).to(device)
            check_same_tokens(folder, folder, models[folder].config, policy.config, tokenizer)
    return models


def family_scores(models, dataset, args, autocast, name):
    """Every reward model's rewards for a data set, cached next to the model. models: {folder:
    RewardModel}. Returns (N, K, M) float32: a data set's column `rewards`."""
    columns = []
    for folder, model in models.items():
        entry = key(hash_weights(model), model.config.reward_head, hash_examples(dataset.examples),
                    args.dtype)
        rewards = cached(cache_folder(folder, args.out_dir), f"{name}-rewards", entry, score, model,
                         dataset, autocast, shape_multiple(args), f"{name} rewards")
        columns.append(np.array(rewards, np.float32))       # (N, K)
    return np.stack(columns, axis=2)


def training_pairs(args, tokenizer, policy, device, autocast):
    """What a reward model or a policy learns from: (D_rho of the training pairs, validation pairs
    as they come), relabelled by the reward model of --relabel, if there is one. policy: the
    reference, from which TinyTLDR's pairs are sampled."""
    cache = cache_folder(args.init_from, args.out_dir)
    labellers = load_reward_models(args.relabel, "--relabel", policy, args.tokenizer, device)
    pairs = []
    for split in ("train", "validation"):
        dataset = preferences(args.data, split, tokenizer, policy, cache, args.pool,
                              args.label_temperature, args.seed, args.skip_bad_rows)
        if labellers:
            rewards = family_scores(labellers, dataset, args, autocast, f"{split}-relabel")
            dataset = relabel(dataset, rewards.mean(axis=2))
        pairs.append(dataset)
    train, validation = pairs
    return d_rho(train, args.rho, args.n_pairs, args.seed), validation
