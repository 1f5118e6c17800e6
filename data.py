"""Turns preference data into batches: the tree batch, batch order, biased subsets (D_rho).

A row is {"prompt": ..., "responses": [..., ...]}, in text or chat messages. The responses are the
chosen and the rejected one, or K of them, the best first, or a demonstration, or one response with
a label that says whether it is desirable. As token ids, a row is an *example*: (prompt ids,
[response ids, ...]), where each response ends in the end-of-text token. Everything about an example
that stays fixed during training (the reference's log-probs, rewards) is a column of the `Dataset`.

Not every token of a response has to be learnt. Where a person speaks between two turns of the
assistant, the model should read what they say, but not learn to say it. Such a token is stored as
~token, which is -1 - token: the minus sign is the mark, and ~ once more gives the token back.

    python runs/show.py --data=prefs.jsonl      # one batch in colour, and what became of every row
"""
from dataclasses import dataclass, fields
from itertools import combinations

import numpy as np
import torch

import tinytldr
from support.device import computing, round_up
from support.flags import InputError
from support.tokenizer import read_tokenizer
from support.tokens import Examples, encode, example_lengths, select, select_file

# ------ the tree batch


@dataclass
class TreeBatch:
    """Holds B rows, each of them a prompt followed by its K responses. T is the number of columns.
    R counts the tokens that are learnt: those of all responses in the batch, without the ones that
    are only read. A place in the batch is one number, row * T + column.

    tokens     (B, T) int64   prompt, response 1, ..., response K, padding
    branch     (B, T) int64   0 in the prompt, k in response k, -1 in padding
    position   (B, T) int64   counts up; every response starts again at the prompt's length
    own        (R,)   int64   the place of each learnt token
    predictor  (R,)   int64   the place that predicts it: the token before it; for the first token
                              of a response, the last one of the prompt
    target     (R,)   int64   the token itself
    slot       (R,)   int64   row * K + response: whose log-prob it is part of (B * K: padding)
    last       (B, K) int64   the place of each response's last token
    lengths    (B, K) int64   learnt tokens of each response, 0 where a row has fewer responses

    Dataset.batch adds these:

    pairs        (P, 2) int64   which two responses of its row each pair compares, the chosen first
    pair_row     (P,)   int64   the row of each pair
    pair_weight  (P,) float32   1 / (pairs in its row): the weights of a row add up to 1
    samples      (B, S) int64   which responses of each row are samples from the reference
    desirable    (B,) bool      the label of each row's one response, if it has a label
    label_weight (B,) float32   1 / the share of the data set's rows that have this label
    ref_logps    (B, K) float32       the reference's log-probs of the responses, if known
    rewards      (B, K - S, M) float32    rewards by M reward models, if known
    below        (B, T, C) float32        what frozen layers compute, if there are any
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
    desirable: torch.Tensor = None
    label_weight: torch.Tensor = None
    ref_logps: torch.Tensor = None
    rewards: torch.Tensor = None
    below: torch.Tensor = None

    def to(self, device):
        """Moves all tensors to a device. Returns the batch itself."""
        for field in fields(self):
            value = getattr(self, field.name)
            if torch.is_tensor(value):
                setattr(self, field.name, value.to(device))
        return self

    def pair_up(self, values):
        """Picks the values of the two responses of every pair, the chosen one first.

        values: (B, K, ...), one for each response. Returns (P, 2, ...).
        """
        return values[self.pair_row[:, None], self.pairs]

    def sum_tokens(self, values):
        """Adds up the values of each response's learnt tokens. values: (R,). Returns (B, K)."""
        B, K = self.last.size()
        sums = torch.zeros(B * K + 1, dtype=values.dtype, device=values.device)
        sums = sums.index_add(0, self.slot, values)
        return sums[:-1].view(B, K)                     # the last slot collects padding


def collate(examples, multiple=1):
    """Lays out B examples, (prompt ids, [response ids, ...]) each, as a TreeBatch.

    K is the largest number of responses. A token that is stored as ~token is put into the tree like
    any other, and later tokens of its response see it, but no log-prob counts it. ValueError if a
    prompt or a response has no token. multiple: T and R are rounded up to a multiple of this, so
    that batches come in few shapes. Padding is 0, but -1 in branch and B * K in slot.
    """
    B, K = len(examples), max(len(responses) for _, responses in examples)
    for prompt, responses in examples:
        if min(len(ids) for ids in (prompt, *responses)) == 0:
            raise ValueError("prompts and responses need at least one token")

    T = max(len(prompt) + sum(map(len, responses)) for prompt, responses in examples)
    R = sum(np.sum(np.asarray(ids) >= 0) for _, responses in examples for ids in responses)
    if multiple > 1:
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
            ids = np.asarray(ids, np.int64)
            learnt = ids >= 0                               # the others are stored as ~token
            ids = np.where(learnt, ids, ~ids)
            end = start + len(ids)
            first_position = 0 if role == 0 else len(prompt)
            tokens[b, start:end] = ids
            branch[b, start:end] = role
            position[b, start:end] = first_position + np.arange(len(ids))
            if role > 0:
                k = role - 1
                before = b * T + np.arange(start - 1, end - 1)      # the token before each;
                before[0] = b * T + len(prompt) - 1         # for the first, the prompt's last
                part = slice(r, r + learnt.sum())
                own[part] = b * T + np.arange(start, end)[learnt]
                predictor[part] = before[learnt]
                target[part] = ids[learnt]
                slot[part] = b * K + k
                last[b, k] = b * T + end - 1
                lengths[b, k] = learnt.sum()
                r += learnt.sum()
            start = end
    arrays = (tokens, branch, position, own, predictor, target, slot, last, lengths)
    return TreeBatch(*map(torch.from_numpy, arrays))


# ------ data sets


@dataclass
class Dataset:
    """Holds N examples, and a column for everything about them that training takes as given.

    examples    N (prompt ids, [response ids, ...]): the best response first, and after the last one
                S samples from the reference. Tokens that are only read are stored as ~token. Rows
                may have different numbers of responses. K is the largest, and the columns below are
                padded to it.
    rewards     (N, K - S, M) float32: rewards of the responses by M reward models, or from the file
    ref_logps   (N, K) float32: the reference's log-probs of the responses, in nats
    n_samples   S, which is 0 where the loss has no KL term
    below       N (T, C) float32: with --freeze, what the frozen layers make of each row's T tokens
    desirable   (N,) bool: the labels of responses that have no partner, or None. A row then has one
                response; in the place of a sample, KTO adds the response of another row
    """
    examples: list
    rewards: np.ndarray = None
    ref_logps: np.ndarray = None
    n_samples: int = 0
    below: list = None
    desirable: np.ndarray = None

    def __len__(self):
        return len(self.examples)

    def take(self, rows):
        """Returns a data set of some of the rows. rows: their indices."""
        rewards = None if self.rewards is None else self.rewards[rows]
        ref_logps = None if self.ref_logps is None else self.ref_logps[rows]
        below = None if self.below is None else [self.below[row] for row in rows]
        desirable = None if self.desirable is None else self.desirable[rows]
        if isinstance(self.examples, Examples):
            examples = self.examples.take(rows)
        else:       # made up, or with samples or new labels: a plain list
            examples = [self.examples[row] for row in rows]
        return Dataset(examples, rewards, ref_logps, self.n_samples, below, desirable)

    def first(self, n):
        """Returns a data set of the first n rows (None: all). They are a random part of it, because
        TinyTLDR's posts are drawn at random, and the rows of a file are shuffled when read."""
        return self.take(np.arange(len(self))[:n])

    def batch(self, rows):
        """Returns the TreeBatch of some rows, with their columns. rows: their indices."""
        examples = [self.examples[i] for i in rows]
        batch = collate(examples, computing.multiple)
        K, S = batch.lengths.size(1), self.n_samples        # K: of these rows, not of all
        n_responses = [len(responses) - S for _, responses in examples]
        batch.pairs, batch.pair_row, batch.pair_weight = ranked_pairs(n_responses)
        batch.samples = torch.tensor(n_responses)[:, None] + torch.arange(S)      # (B, S)
        if self.ref_logps is not None:
            batch.ref_logps = torch.from_numpy(self.ref_logps[rows, :K])
        if self.rewards is not None:
            batch.rewards = torch.from_numpy(self.rewards[rows, :K - S])
        if self.below is not None:
            B, T = batch.tokens.size()
            batch.below = torch.zeros(B, T, self.below[0].shape[1])     # (B, T, C)
            for b, row in enumerate(rows):
                batch.below[b, :len(self.below[row])] = torch.from_numpy(self.below[row])
        if self.desirable is not None:
            batch.desirable = torch.from_numpy(self.desirable[rows])
            share = float(self.desirable.mean())
            batch.label_weight = 1 / torch.where(batch.desirable, share, 1 - share)
        return batch

    def with_samples(self, samples):
        """Returns a data set of the same rows, each with a sample from the reference as its last
        response. samples: N lists of token ids. ref_logps is None there: it would lack the samples.
        """
        examples = [(prompt, [*responses, np.array(sample, np.int32)])
                    for (prompt, responses), sample in zip(self.examples, samples)]
        return Dataset(examples, self.rewards, None, self.n_samples + 1,
                       desirable=self.desirable)

    def with_mismatched(self, block_size):
        """Returns a data set of the same rows, each with the response of the next row as its last
        response: KTO's reference point is estimated by these. One that does not fit block_size
        after this prompt loses its end, and the number of those is printed, as is how many answer
        the same prompt after all."""
        prompts, own = zip(*[(prompt, responses[0]) for prompt, responses in self.examples])
        n_same = sum(map(np.array_equal, prompts, [*prompts[1:], prompts[0]]))
        if n_same:
            print(f"{n_same} of {len(self)} mismatched responses answer the same prompt, which the "
                  "next row has too")
        others = [*own[1:], own[0]]
        rooms = [block_size - len(prompt) for prompt, _ in self.examples]
        n_cut = sum(len(other) > room for other, room in zip(others, rooms))
        if n_cut:
            print(f"{n_cut} of {len(self)} mismatched responses lose their end, as they don't fit "
                  f"block_size {block_size}")
        return self.with_samples([other[:room] for other, room in zip(others, rooms)])

    def response_lengths(self):
        """Counts the tokens in each response, its end-of-text token included. Samples from the
        reference are responses too. Returns (N, K), 0 where a row has fewer responses."""
        return example_lengths(self.examples)[:, 1:]

    def row_lengths(self):
        """Counts the tokens in each row, prompt and all responses. Returns (N,)."""
        return example_lengths(self.examples).sum(axis=1)


def ranked_pairs(n_responses):
    """Lists all pairs of responses in each row, where responses are ranked, the best first.

    Two responses make one pair, K make K (K - 1) / 2, and one makes none. They are listed row after
    row, in the order (0, 1), (0, 2), ..., (1, 2), and so on. n_responses: B numbers, one for each
    row. Returns (pairs (P, 2), pair_row (P,), pair_weight (P,)) as in a TreeBatch.
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
    """Returns a data set sorted by row length, the shortest first, so that a batch of neighbours
    has little padding."""
    return dataset.take(np.argsort(dataset.row_lengths(), kind="stable"))


# ------ batch order


def batches(lengths, batch_size, seed, epoch, window=32):
    """Plans one epoch of batches of rows of similar length, as a pure function of its arguments.

    First the rows are shuffled. If the last ones are too few for a batch, they are left out of this
    epoch (if there are too few rows for any batch, all of them are one batch). Then the rows are
    cut into windows of `window` batches. Each window is sorted by length (ties keep their order)
    and cut into batches. At the end the order of all batches is shuffled. Both times a permutation
    is drawn from np.random.default_rng([seed, epoch]): of all rows, then of the batches.
    lengths: (N,) tokens in each row. Returns a list of arrays of row indices, (batch_size,) each.
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
    """Says which rows each step trains on: epoch after epoch of `batches`. The answer depends on
    nothing but the step, so a resumed run sees the same rows as one that was never interrupted.
    (The plan that is kept here is only a cache.) lengths: (N,) tokens in each row."""

    def __init__(self, lengths, batch_size, seed):
        self.arguments = (lengths, batch_size, seed)
        self.epoch, self.plan = 0, batches(*self.arguments, epoch=0)

    def rows(self, step):
        """Returns the indices of the rows that a step trains on, (batch_size,)."""
        epoch, number = divmod(step, len(self.plan))        # every epoch has this many batches
        if epoch != self.epoch:
            self.epoch, self.plan = epoch, batches(*self.arguments, epoch)
        return self.plan[number]


# ------ D_rho and relabelling


def longer(lengths):
    """Says which response of each pair is longer, by at least 10% more tokens.

    lengths: (N, 2) tokens in the chosen and the rejected response. Returns (N,): +1 if the chosen
    one is longer, -1 if the rejected one is, 0 if neither is.
    """
    chosen, rejected = np.asarray(lengths, dtype=np.int64).T
    return np.where(10 * chosen >= 11 * rejected, 1, np.where(10 * rejected >= 11 * chosen, -1, 0))


def biased_subset(lengths, rho, n=None, seed=0):
    """Draws D_rho, a training set with a length bias: in a fraction rho of its n pairs the longer
    response is the chosen one. Pairs of about equal length are left out.

    lengths: (N, 2) tokens in the chosen and the rejected response. rho: in [0, 1]. n: how many
    pairs, or None for as many as possible. Returns (n,) int64 indices of pairs, in order.
    InputError, which is a ValueError, if there are too few pairs. Source: the paper's experiments
    on TL;DR.
    """
    if not 0 <= rho <= 1:
        raise InputError(f"rho is a fraction between 0 and 1, not {rho}")
    if np.shape(lengths)[1] != 2:
        raise InputError("--rho, --bias: subsets by length are of pairs; with one response a row, "
                         "or more than two, use --rho=all")
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
    """Takes training pairs with a length bias out of a data set, and prints how many it took.

    rho: the fraction of pairs in which the longer response is the chosen one; or "all", for the
    first n rows as they are. n: how many, or None for as many as possible. Returns a Dataset.
    """
    if rho == "all":
        if n is not None and n > len(dataset):
            print(f"--n_pairs={n}: there are {len(dataset)} training rows, which are taken")
        return dataset.first(n)
    subset = dataset.take(biased_subset(dataset.response_lengths(), rho, n, seed))
    share = (longer(subset.response_lengths()) == 1).mean()
    print(f"D_rho: {len(subset)} of {len(dataset)} training pairs, the longer response preferred "
          f"in {share:.0%} of them")
    return subset


def relabel(dataset, rewards):
    """Orders the responses of each row by new rewards, the highest first. Rows with a tie are
    dropped, and the number of them is printed.

    rewards: (N, K), one for each response. Returns a Dataset. InputError if no row is left, or rows
    have no two responses.
    """
    if dataset.desirable is not None:
        raise InputError("--relabel: it orders the responses of a row, and rows have one, with a "
                         "label")
    order = np.argsort(-rewards, axis=1)                                            # (N, K)
    undecided = (np.diff(np.sort(rewards, axis=1), axis=1) == 0).any(axis=1)        # (N,)
    if undecided.any():
        print(f"relabelled: {undecided.sum()} dropped (the reward model is undecided)")
    if undecided.all():
        raise InputError("--relabel: no row is left")
    columns = dataset.rewards
    if columns is not None:
        columns = np.take_along_axis(columns, order[:, :, None], axis=1)
    examples = [(prompt, [responses[k] for k in row_order])
                for (prompt, responses), row_order in zip(dataset.examples, order)]
    return Dataset(examples, columns).take(np.flatnonzero(~undecided))


# ------ text to tokens to data sets

def get_tokenizer(name):
    """Returns the tokenizer of this name. "tinytldr" is the built-in one. A folder, or a name that
    ends in "/", is that of a model that brings its own. Any other name, such as "gpt2", is one of
    tiktoken's. InputError if there is none."""
    return tinytldr.tokenizer() if name == "tinytldr" else read_tokenizer(name)


def demonstrations(data, split, tokenizer, block_size, seed=0, skip_bad_rows=False):
    """Reads demonstrations for supervised fine-tuning: prompts with responses to imitate. Each row
    of a file has one response, each of TinyTLDR's posts has four, so that the prompt is computed
    only once for all of them. Returns a Dataset.

    data: "tinytldr", or a file, folder or hub name. split: "train", "validation" or "test". seed:
    of TinyTLDR's posts. skip_bad_rows: leaves out rows in which something is wrong. InputError if
    the data can't be read or has no usable row.
    """
    if data == "tinytldr":
        arrays = encode(tinytldr.demonstration_rows(seed, split), tokenizer)
        return Dataset(**select(arrays, block_size, f"{data}, {split}"))
    return Dataset(**select_file(data, split, tokenizer, block_size, skip_bad_rows,
                                 demonstrations=True))


def preferences(data, split, tokenizer, policy, cache, pool=None, label_temperature=0, seed=0,
                skip_bad_rows=False, unpaired=False):
    """Reads preferences, with their natural mix of lengths: those of a file, or for TinyTLDR pairs
    of responses sampled from `policy`. Returns a Dataset.

    data: "tinytldr", or a file, folder or hub name. split: "train", "validation" or "test". policy:
    a GPT; prompts are cut to its block_size. cache: the folder in which TinyTLDR's pairs are kept.
    pool, label_temperature, seed: how many pairs of TinyTLDR are sampled to train on, and the noise
    and the random numbers of their labels. skip_bad_rows: leaves out rows in which something is
    wrong. unpaired: takes single responses with a label as well. InputError if the data can't be
    read or has no usable row.
    """
    block_size = policy.config.block_size
    if data == "tinytldr":
        n = pool if split == "train" else 1000
        rows = tinytldr.pair_rows(split, n, policy, tokenizer, cache, label_temperature, seed)
        return Dataset(**select(encode(rows, tokenizer), block_size, f"{data}, {split}"))
    return Dataset(**select_file(data, split, tokenizer, block_size, skip_bad_rows,
                                 unpaired=unpaired))
