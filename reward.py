"""Defines explicit reward models, transformers with a one-number head, and scores data by them.

A reward model reads the same tree batch as a policy, and its head makes one number of each token's
hidden state. The reward of a response is the number at its last token (the standard head), or the
sum over its tokens, as the policy's implicit reward is a sum over tokens. On the built-in task the
sum judges better (dev/LOG.md). A reward means something only in comparison with another response to
the same prompt: Bradley-Terry, and everything after it, uses differences alone.
"""
from dataclasses import replace

import numpy as np
import torch
import torch.nn as nn

import tinytldr
from data import Dataset, d_rho, preferences, relabel
from lora import copy_around_frozen, load_lora, put_lora
from model import GPT, GPTConfig, Transformer, init_weights, tree_mask
from support.checkpoint import (
    adapter_config,
    empty_model,
    load_model,
    read_checkpoint,
    reward_head,
    write_adapter,
    write_checkpoint,
)
from support.columns import (
    cache_folder,
    cached,
    count_cut_off,
    hash_examples,
    hash_model,
    key,
    score,
    with_end,
)
from support.device import computing, whole_on_cpu
from support.flags import naming
from support.run import family_folders
from support.tokenizer import check_same_tokens, to_text


class RewardModel(nn.Module):
    """Computes the reward r(x, y). Its files have the layout of Hugging Face's sequence
    classifier with one label. With config.reward_head "last" it is such a classifier; "sum" adds up
    the numbers of all tokens of a response instead."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.lora_base = None       # with a LoRA adapter (lora.py): the name of the model below it
        self.transformer = Transformer(config)
        self.score = nn.Linear(config.n_embd, 1, bias=False)
        init_weights(self, config)
        nn.init.zeros_(self.score.weight)   # all rewards start at 0: Bradley-Terry starts at ln 2

    def forward(self, batch):
        """Computes the rewards of a TreeBatch, (B, K), in the type of the weights. Under autocast
        too the head's product is not rounded: bfloat16 rewards would tie."""
        mask = tree_mask(batch.branch, self.score.weight.dtype)             # (B, 1, T, T)
        last = self.config.reward_head == "last"
        read = batch.last.flatten() if last else batch.own
        hidden = self.transformer(batch.tokens, batch.position, mask, read=read,
                                  below=batch.below)                        # (R, C)
        with torch.autocast(hidden.device.type, enabled=False):
            rewards = self.score(hidden.to(self.score.weight.dtype)).squeeze(1)     # (R,)
        return rewards.view_as(batch.last) if last else batch.sum_tokens(rewards)

    @classmethod
    def from_policy(cls, gpt, head="last"):
        """Makes a reward model whose transformer starts as a copy of a language model's. Its head
        is zero. If the language model has an adapter, frozen weights are shared, not copied."""
        model = empty_model(lambda: cls(replace(gpt.config, reward_head=head)))
        nn.init.zeros_(model.score.weight)
        if gpt.lora_base is None:
            model.transformer.load_state_dict(whole_on_cpu(gpt.transformer.state_dict()))
        else:
            model.transformer = copy_around_frozen(gpt.transformer)
            model.lora_base = gpt.lora_base
        return model

    @classmethod
    def from_pretrained(cls, dir_or_hub_name, bases=None):
        """Reads a checkpoint as GPT.from_pretrained does. bases: {name: GPT}, the frozen language
        models of the adapters that were read before. An adapter uses its model from there, or puts
        it there."""
        adapter, bases = adapter_config(dir_or_hub_name), {} if bases is None else bases
        if adapter is None:
            config, tensors = read_checkpoint(dir_or_hub_name, head="score")
            return load_model(lambda: cls(GPTConfig(**config)), tensors, dir_or_hub_name)
        base = adapter["base_model_name_or_path"]
        if base not in bases:
            bases[base] = GPT.from_pretrained(base)
            put_lora(bases[base], {}, base)
        model = cls.from_policy(bases[base], reward_head(dir_or_hub_name))
        load_lora(model, dir_or_hub_name)
        return model

    def save_pretrained(self, directory, eos_token_id=None):
        """Writes config.json and model.safetensors. If the model has a LoRA adapter, writes only
        that and the head, in PEFT's layout. (transformers reads the reward at the last token that
        is not pad_token_id. A response ends in end-of-text, so pad_token_id is another token.)"""
        if self.lora_base is not None:
            return write_adapter(directory, self)
        write_checkpoint(directory, self, eos_token_id)


def read_reward_models(folders, device):
    """Reads the reward models in some folders. Adapters of the same language model share its
    weights, which are loaded once. Returns {folder: RewardModel}."""
    bases = {}
    return {folder: RewardModel.from_pretrained(folder, bases).to(device) for folder in folders}


def load_reward_models(folders, flag, policy, tokenizer, device):
    """Reads the reward models that a flag names, and checks that they read the policy's tokens.

    folders: comma-separated, each a run or a family, or None. flag: its name, for messages.
    tokenizer: the policy's. Returns {folder: RewardModel}, {} for None. InputError names the flag.
    """
    folders = family_folders(folders, flag)
    with naming(flag):
        models = read_reward_models(folders, device)
        for folder, model in models.items():
            check_same_tokens(folder, folder, model.config, policy.config, tokenizer)
    return models


def family_scores(models, dataset, out_dir, name):
    """Scores a data set by each reward model, and caches the scores next to the model.

    models: {folder: RewardModel}. out_dir: the run's folder, for the cache if the model's folder
    can't have it. name: of the data set. Returns (N, K, M) float32: the column `rewards` of a
    Dataset.
    """
    columns = []
    for folder, model in models.items():
        entry = key(hash_model(model), hash_examples(dataset.examples), computing.dtype)
        rewards = cached(cache_folder(folder, out_dir), f"{name}-rewards", entry, score, model,
                         dataset, f"{name} rewards")
        columns.append(np.array(rewards, np.float32))       # (N, K)
    return np.stack(columns, axis=2)


def mean_reward(models, dataset):
    """Scores a data set by some reward models, {folder: model}. Returns their mean, (N, K)."""
    return np.mean([score(model, dataset, folder) for folder, model in models.items()], axis=0)


def reward_samples(judges, texts, prompts, samples, tokenizer):
    """Rewards samples, one for each prompt.

    judges: {folder: RewardModel}, whose mean is the reward. If it is empty, TinyTLDR's oracle reads
    the text. Reward models were trained to be read at the end-of-text token, so a sample without it
    gets one appended. texts: the N prompts as the oracle reads them. prompts, samples: N lists of
    token ids. Returns (N,).
    """
    if not judges:
        replies = [to_text(sample, tokenizer) for sample in samples]
        return np.array(list(map(tinytldr.oracle_reward, texts, replies)))
    block_size = min(judge.config.block_size for judge in judges.values())
    pairs = [with_end(*pair, tokenizer.ends, block_size) for pair in zip(prompts, samples)]
    dataset = Dataset([(prompt, [sample]) for prompt, sample in pairs])
    return mean_reward(judges, dataset)[:, 0]


def judge_samples(name, judges, texts, prompts, samples, tokenizer, args):
    """Rewards samples by `reward_samples`, prints how many of them were cut off, and subtracts
    --missing_eos_penalty from the reward of each of those. name: whose samples they are. Returns
    (rewards (N,), which samples were cut off (N,) bool)."""
    penalty = args.missing_eos_penalty or 0
    then = "judged with one appended" if judges else "the oracle judges the text that there is"
    then += f", minus --missing_eos_penalty={penalty:g}" if penalty else ""
    cut = count_cut_off(name, samples, tokenizer.ends, args.max_new_tokens, then)
    rewards = reward_samples(judges, texts, prompts, samples, tokenizer)
    if penalty:
        rewards = rewards - penalty * cut
    return rewards, cut


def training_pairs(args, tokenizer, policy, device, unpaired=False):
    """Loads the preference pairs that a reward model or a policy learns from. With --relabel, that
    reward model labels them again first. The training pairs are then subsampled to the length bias
    --rho (D_rho); the validation pairs keep their natural mix of lengths.

    policy: the reference, from which TinyTLDR's pairs are sampled. unpaired: takes rows with one
    labelled response as well. Returns (train, validation), a Dataset each.
    """
    cache = cache_folder(args.init_from, args.out_dir)
    labellers = load_reward_models(args.relabel, "--relabel", policy, tokenizer, device)
    pairs = []
    for split in ("train", "validation"):
        dataset = preferences(args.data, split, tokenizer, policy, cache, args.pool,
                              args.label_temperature, args.seed, args.skip_bad_rows, unpaired)
        if labellers:
            rewards = family_scores(labellers, dataset, args.out_dir, f"{split}-relabel")
            dataset = relabel(dataset, rewards.mean(axis=2))
        pairs.append(dataset)
    train, validation = pairs
    return d_rho(train, args.rho, args.n_pairs, args.seed), validation
