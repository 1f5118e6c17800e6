"""Preference data, from text to batches: the tree batch, batch order, biased subsets (D_rho).

In text a row is {"prompt": str, "responses": [str, ...]}: the chosen response and the rejected one,
or K of them, the best first, or one demonstration. In token ids it is an *example*, (prompt ids,
[response ids, ...]), each response ending in the end-of-text token. What training takes as given
about every example (the reference's log-probs, rewards) is a column of the `Dataset`.

    python runs/show.py --data=prefs.jsonl      # one batch in colour, and what became of every row
"""
from dataclasses import dataclass, fields
from itertools import combinations

import numpy as np
import torch

import tinytldr
from support.device import round_up
from support.flags import InputError
from support.tokenizer import read_tokenizer
from support.tokens import encode, example_lengths, reorder, select, select_file, take_rows

# ------ the tree batch


@dataclass
class TreeBatch:
    """B rows, each one prompt followed by its K responses; R response tokens in all.

    tokens     (B, T) int64   prompt, response 1, ..., response K, padding
    branch     (B, T) int64   0 in the prompt, k in response k, -1 in padding
    position   (B, T) int64   counts up; every response starts again at the prompt's length
    own        (R,)   int64   where each response token is: row * T + column
    predictor  (R,)   int64   where it is predicted: row * T + column
    target     (R,)   int64   the token itself
    slot       (R,)   int64   row * K + response: the log-prob it is part of (B * K: padding)
    last       (B, K) int64   where each response's last token is: row * T + column
    lengths    (B, K) int64   response lengths in tokens, 0 where a row has fewer responses

    What a data set adds to it (Dataset.batch):

    pairs        (P, 2) int64   which two responses of its row each pair compares, the chosen first
    pair_row     (P,)   int64   the row of each pair
    pair_weight  (P,) float32   1 / (pairs in its row): the weights of a row add up to 1
    samples      (B, S) int64   which responses of each row are samples from the reference
    ref_logps    (B, K) float32       the reference's log-probs of the responses, if known
    rewards      (B, K - S, M) float32    rewards by M reward models, if known
    """
    tokens: torch.Tensor
    branch: torch.Tensor
    position: torch.Tensor
    own: torch.Tensor
    predictor: torch.Tensor
    target: torch.Tensor
    slot: torch.Tensor
    last: torch.Tensor
    lengths: torch.Tensor
    pairs: torch.Tensor = None
    pair_row: torch.Tensor = None
    pair_weight: torch.Tensor = None
    samples: torch.Tensor = None
    ref_logps: torch.Tensor = None
    rewards: torch.Tensor = None

    def to(self, device):
        for field in fields(self):
            value = getattr(self, field.name)
            if torch.is_tensor(value):
                setattr(self, field.name, value.to(device))
        return self

    def pair_up(self, values):
        """Takes the two responses of every pair. values: (B, K, ...). Returns (P, 2, ...)."""
        return values[self.pair_row[:, None], self.pairs]

    def sum_tokens(self, values):
        """Adds up the values of each response's tokens. values: (R,). Returns (B, K)."""
        B, K = self.last.size()
        sums = torch.zeros(B * K + 1, dtype=values.dtype, device=values.device)
        sums = sums.index_add(0, self.slot, values)
        return sums[:-1].view(B, K)                     # the last slot collects padding


def collate(examples, multiple=1):
    """(prompt ids, [response ids, ...]) examples -> TreeBatch.

    Prompts and responses have a token or more (ValueError); K is the largest number of responses.
    `multiple` rounds T and R up, so that shapes are few.
    """
    B, K = len(examples), max(len(responses) for _, responses in examples)
    for prompt, responses in examples:
        if min(len(ids) for ids in (prompt, *responses)) == 0:
            raise ValueError("prompts and responses need at least one token")

    T = max(len(prompt) + sum(map(len, responses)) for prompt, responses in examples)
    R = sum(len(response) for _, responses in examples for response in responses)
    T, R = round_up(T, multiple), round_up(R, multiple)

    tokens = np.zeros((B, T), np.int64)
    branch = np.full((B, T), -1, np.int64)
    position = np.zeros((B, T), np.int64)
    own, predictor, target = np.zeros((3, R), np.int64)
    slot = np.full(R, B * K, np.int64)
    last, lengths = np.zeros((B, K), np.int64), np.zeros((B, K), np.int64)
    r = 0                                                   # response tokens so far
    for b, (prompt, responses) in enumerate(examples):
        start = 0                                           # the column where the next part begins
        for role, ids in enumerate([prompt, *responses]):   # 0: the prompt; k: response k
            end = start + len(ids)
            first_position = 0 if role == 0 else len(prompt)
            tokens[b, start:end] = ids
            branch[b, start:end] = role
            position[b, start:end] = first_position + np.arange(len(ids))
            if role > 0:
                k = role - 1
                part = slice(r, r + len(ids))
                own[part] = b * T + np.arange(start, end)
                predictor[part] = own[part] - 1             # the token before;
                predictor[r] = b * T + len(prompt) - 1      # for the first one, the prompt's last
                target[part] = ids
                slot[part] = b * K + k
                last[b, k] = b * T + end - 1
                lengths[b, k] = len(ids)
                r += len(ids)
            start = end
    arrays = (tokens, branch, position, own, predictor, target, slot, last, lengths)
    return TreeBatch(*map(torch.from_numpy, arrays))


# ------ data sets


@dataclass
class Dataset:
    """N examples, and what training takes as given about them, a column each.

    examples    N (prompt ids, [response ids, ...]): the best response first, and after the last one
                S samples from the reference. Rows may have different numbers of responses: K is the
                largest, and the columns below are padded.
    rewards     (N, K - S, M) float32: rewards of the responses by M reward models, or from the file
    ref_logps   (N, K) float32: the reference's log-probs of the responses
    n_samples   S, 0 where the loss has no KL term
    """
    examples: list
    rewards: np.ndarray = None
    ref_logps: np.ndarray = None
    n_samples: int = 0

    def __len__(self):
        return len(self.examples)

    def take(self, rows):
        """The data set of some rows: indices."""
        rewards = None if self.rewards is None else self.rewards[rows]
        ref_logps = None if self.ref_logps is None else self.ref_logps[rows]
        return Dataset(take_rows(self.examples, rows), rewards, ref_logps, self.n_samples)

    def first(self, n):
        """The first n rows (None: all). A random part: TinyTLDR's posts are drawn at random, and a
        file's rows are in random order (support/tokens.py)."""
        return self.take(np.arange(len(self))[:n])

    def batch(self, rows, multiple=1):
        """The TreeBatch of some rows, with their columns. multiple: see collate."""
        examples = [self.examples[i] for i in rows]
        batch = collate(examples, multiple)
        K, S = batch.lengths.size(1), self.n_samples        # K: of these rows, not of all
        n_responses = [len(responses) - S for _, responses in examples]
        batch.pairs, batch.pair_row, batch.pair_weight = ranked_pairs(n_responses)
        batch.samples = torch.tensor(n_responses)[:, None] + torch.arange(S)      # (B, S)
        if self.ref_logps is not None:
            batch.ref_logps = torch.from_numpy(self.ref_logps[rows, :K])
        if self.rewards is not None:
            batch.rewards = torch.from_numpy(self.rewards[rows, :K - S])
        return batch

    def with_samples(self, samples):
        """The same rows, each with one more response: a sample from the reference (token ids)."""
        examples = [(prompt, [*responses, np.array(sample, np.int32)])
                    for (prompt, responses), sample in zip(self.examples, samples)]
        return Dataset(examples, self.rewards, None, self.n_samples + 1)

    def response_lengths(self):
        """(N, K + S) tokens in each response, the end-of-text token included."""
        return example_lengths(self.examples)[:, 1:]

    def row_lengths(self):
        """(N,) tokens in each row of a tree batch."""
        return example_lengths(self.examples).sum(axis=1)


def ranked_pairs(n_responses):
    """Lists all pairs of each row's responses, which are ranked, the best first.

    n_responses: of each of B rows. Returns (pairs (P, 2), pair_row (P,), pair_weight (P,)), as in a
    TreeBatch: two responses are one pair, K are K (K - 1) / 2, one is none.
    """
    pairs, pair_row, pair_weight = [], [], []
    for row, K in enumerate(n_responses):
        for pair in combinations(range(K), 2):
            pairs.append(pair)
            pair_row.append(row)
            pair_weight.append(2 / (K * (K - 1)))
    return (torch.tensor(pairs, dtype=torch.int64).view(-1, 2),
            torch.tensor(pair_row, dtype=torch.int64),
            torch.tensor(pair_weight, dtype=torch.float32))


def by_length(dataset):
    """The same rows, the shortest first: in batches that way, there is little padding."""
    return dataset.take(np.argsort(dataset.row_lengths(), kind="stable"))


# ------ batch order


def batches(lengths, batch_size, seed, epoch, window=32):
    """One epoch of batches of similar length, a pure function of its arguments: index arrays.

    lengths: (N,), tokens per row. The indices are shuffled; the last, too few for a batch, are left
    out this epoch (if all are too few, they are one batch). The others are cut into windows of
    `window` batches, sorted by length inside each (ties keep their order) and cut into batches,
    whose order is shuffled again.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))
    batch_size = min(batch_size, len(order))
    order = order[:len(order) // batch_size * batch_size]
    plan = []
    for start in range(0, len(order), window * batch_size):
        part = order[start:start + window * batch_size]
        part = part[np.argsort(lengths[part], kind="stable")]
        plan += list(part.reshape(-1, batch_size))
    return [plan[i] for i in rng.permutation(len(plan))]


class BatchOrder:
    """Which rows each step trains on: epoch after epoch of `batches`. `rows` depends on the step
    alone (the plan is a cache), so that a resumed run sees what it would have seen."""

    def __init__(self, lengths, batch_size, seed):
        self.arguments = (lengths, batch_size, seed)
        self.epoch, self.plan = 0, batches(*self.arguments, epoch=0)

    def rows(self, step):
        """Indices of the training rows of this step: (batch_size,)."""
        epoch, number = divmod(step, len(self.plan))        # all epochs have as many batches
        if epoch != self.epoch:
            self.epoch, self.plan = epoch, batches(*self.arguments, epoch)
        return self.plan[number]


# ------ D_rho and relabelling


def longer(lengths):
    """Which response of each pair is longer, by at least 10% more tokens. lengths: (N, 2)
    chosen/rejected. Returns (N,): +1 the chosen one, -1 the rejected one, 0 neither."""
    chosen, rejected = np.asarray(lengths, dtype=np.int64).T
    return np.where(10 * chosen >= 11 * rejected, 1, np.where(10 * rejected >= 11 * chosen, -1, 0))


def biased_subset(lengths, rho, n=None, seed=0):
    """D_rho, a training set with a length bias: indices of n pairs, in a fraction rho of which the
    longer response is the chosen one. Pairs of about equal length are left out.

    lengths: (N, 2) response lengths in tokens, chosen/rejected. rho: in [0, 1]. n: how many pairs,
    or None for as many as there can be. Returns (n,) int64 indices, in order. InputError (a
    ValueError) if there are too few pairs. Source: the paper's experiments on TL;DR.
    """
    if not 0 <= rho <= 1:
        raise InputError(f"rho is a fraction between 0 and 1, not {rho}")
    if np.shape(lengths)[1] != 2:
        raise InputError("--rho, --bias: subsets by length are of pairs; with more responses use "
                         "--rho=all")
    sides = longer(lengths)
    chosen, rejected = np.flatnonzero(sides == 1), np.flatnonzero(sides == -1)

    def possible(n):
        return 0 < n and round(rho * n) <= len(chosen) and n - round(rho * n) <= len(rejected)

    if n is None:
        n = len(chosen) + len(rejected)
        while n > 0 and not possible(n):
            n -= 1
    if not possible(n):
        raise InputError(f"--rho, --bias, --n_pairs: no {n or 'such'} pairs in which the longer "
                         f"response is chosen in a fraction {rho}: of {len(sides)}, {len(chosen)} "
                         f"have it chosen and {len(rejected)} rejected")
    n_chosen = round(rho * n)
    rng = np.random.default_rng(seed)
    return np.sort(np.concatenate([rng.choice(chosen, n_chosen, replace=False),
                                   rng.choice(rejected, n - n_chosen, replace=False)]))


def d_rho(dataset, rho, n, seed):
    """Takes n training pairs with this bias (None: as many as possible), and prints what was found;
    rho "all": n rows as they are."""
    if rho == "all":
        return dataset.first(n)
    subset = dataset.take(biased_subset(dataset.response_lengths(), rho, n, seed))
    share = (longer(subset.response_lengths()) == 1).mean()
    print(f"D_rho: {len(subset)} of {len(dataset)} training pairs, the longer response preferred "
          f"in {share:.0%} of them")
    return subset


def relabel(dataset, rewards):
    """The same rows, each with its responses in the order of the rewards, the highest first; rows
    with ties dropped. rewards: (N, K), of rows with K responses each."""
    order = np.argsort(-rewards, axis=1)                                            # (N, K)
    undecided = (np.diff(np.sort(rewards, axis=1), axis=1) == 0).any(axis=1)        # (N,)
    if undecided.any():
        print(f"relabelled: {undecided.sum()} dropped (the reward model is undecided)")
    if undecided.all():
        raise InputError("--relabel: no row is left")
    columns = dataset.rewards
    if columns is not None:
        columns = np.take_along_axis(columns, order[:, :, None], axis=1)
    return Dataset(reorder(dataset.examples, order), columns).take(np.flatnonzero(~undecided))


# ------ text to tokens to data sets

def get_tokenizer(name):
    """A tokenizer: "tinytldr" is built here, other words are tiktoken's ("gpt2"), and a name that
    ends in "/" is the folder of a model that has its own."""
    return tinytldr.tokenizer() if name == "tinytldr" else read_tokenizer(name)


def demonstrations(data, split, tokenizer, block_size, seed=0, skip_bad_rows=False):
    """A Dataset of prompts with responses to imitate, for supervised fine-tuning: those of a file,
    one each; or TinyTLDR's with four each (a prompt costs little if its responses share it)."""
    if data == "tinytldr":
        arrays = encode(tinytldr.demonstration_rows(seed, split), tokenizer)
        return Dataset(*select(arrays, block_size, f"{data}, {split}"))
    return Dataset(*select_file(data, split, tokenizer, block_size, skip_bad_rows,
                                demonstrations=True))


def preferences(data, split, tokenizer, policy, cache, pool=None, label_temperature=0, seed=0,
                skip_bad_rows=False):
    """A Dataset of preferences as they come, with their natural mix of lengths: those of a file; or
    for TinyTLDR pairs sampled from `policy`, `pool` of them to train on."""
    block_size = policy.config.block_size
    if data == "tinytldr":
        n = pool if split == "train" else 1000
        rows = tinytldr.pair_rows(split, n, policy, tokenizer, cache, label_temperature, seed)
        return Dataset(*select(encode(rows, tokenizer), block_size, f"{data}, {split}"))
    return Dataset(*select_file(data, split, tokenizer, block_size, skip_bad_rows))
