"""Preference data: from files to token ids, once; the tree batch; relabelling; and the biased training set D_rho.

In text, a row is {"prompt": str, "responses": [str, ...]}: for a preference pair the chosen response first and the
rejected one second, for a ranking the best first, for a demonstration just one; and "scores", if rewards came with it.
`encode` turns rows into token ids, each response ending in the end-of-text token, `select` those of a split into examples,
(prompt ids, [response ids, ...]), and `collate` turns examples into the one batch format there is.

    python data.py --data=prefs.jsonl --show                       # one batch in colour, and what became of every row
    python data.py --data=trl-lib/ultrafeedback_binarized --show   # a data set on the Hugging Face hub
"""
import argparse
import hashlib
import json
import os
from dataclasses import dataclass, fields
from functools import lru_cache
from itertools import chain, groupby, islice

import numpy as np
import tiktoken
import torch

import formats
import runtime
import tinytldr
from formats import load_rows, open_records
from runtime import InputError


# ---------------------------------------------------------------- the tree batch

@dataclass
class TreeBatch:
    """B rows, each one prompt followed by its K responses; R response tokens in all.

    tokens     (B, T) int64   prompt, response 1, ..., response K, padding
    branch     (B, T) int64   0 in the prompt, k in response k, -1 in padding
    position   (B, T) int64   counts up through the prompt; every response starts again at the prompt's length
    predictor  (R,)   int64   where each response token is predicted from: an index into the B * (T - context) positions
    target     (R,)   int64   the response token to predict there
    slot       (R,)   int64   row * K + response, the log-prob that it adds to (B * K: padding, thrown away)
    last       (B, K) int64   column, after the context, of each response's last token, where a reward is read
    lengths    (B, K) int64   response lengths in tokens
    context    int            columns that come before every row's last prompt token: looked at, never read
    """
    tokens: torch.Tensor
    branch: torch.Tensor
    position: torch.Tensor
    predictor: torch.Tensor
    target: torch.Tensor
    slot: torch.Tensor
    last: torch.Tensor
    lengths: torch.Tensor
    context: int

    def to(self, device):
        tensors = [getattr(self, field.name).to(device, non_blocking=True) for field in fields(self)[:-1]]
        return TreeBatch(*tensors, self.context)


def collate(examples, multiple=1):
    """(prompt ids, [response ids, ...]) examples -> TreeBatch.

    Every example has the same number K of responses; prompts and responses have one token or more. `multiple` rounds T
    and R up, so that compilers which want few distinct shapes (torch_xla) see few. ValueError if an example is off.
    """
    B, K = len(examples), len(examples[0][1])
    for prompt, responses in examples:
        if len(responses) != K:
            raise ValueError(f"every example of a batch needs the same number of responses: got {K} and {len(responses)}")
        if not len(prompt) or not all(len(response) for response in responses):
            raise ValueError("prompts and responses need at least one token")
    lengths = np.array([[len(response) for response in responses] for _, responses in examples], dtype=np.int64)   # (B, K)
    T = max(len(prompt) + n for (prompt, _), n in zip(examples, lengths.sum(axis=1)))
    T = -(-T // multiple) * multiple
    R = -(-lengths.sum() // multiple) * multiple

    context = min(len(prompt) for prompt, _ in examples) - 1
    context = context // multiple * multiple
    tokens, position = np.zeros((B, T), np.int64), np.zeros((B, T), np.int64)
    branch, last = np.full((B, T), -1, np.int64), np.zeros((B, K), np.int64)
    predictor, target, slot = np.zeros(R, np.int64), np.zeros(R, np.int64), np.full(R, B * K, np.int64)
    r = 0                                                       # response tokens so far
    for b, (prompt, responses) in enumerate(examples):
        at = 0                                                  # columns of this row so far

        def append(ids, role, first_position):
            """Puts ids with their role in the row: the one place where tokens, branch and position are written."""
            nonlocal at
            columns = slice(at, at + len(ids))
            tokens[b, columns], branch[b, columns] = ids, role
            position[b, columns] = np.arange(first_position, first_position + len(ids))
            at += len(ids)
            return columns

        append(prompt, 0, 0)
        for k, response in enumerate(responses):
            columns, n = append(response, k + 1, len(prompt)), len(response)
            first = b * (T - context) - context                 # what column 0 would have as its index
            predictor[r] = first + len(prompt) - 1              # the first token is predicted from the end of the prompt,
            predictor[r + 1:r + n] = first + np.arange(columns.start, columns.stop - 1)   # the others from the one before
            target[r:r + n], slot[r:r + n] = response, b * K + k
            last[b, k] = columns.stop - 1 - context
            r += n
    return TreeBatch(*map(torch.from_numpy, (tokens, branch, position, predictor, target, slot, last, lengths)), context)


def batches(lengths, batch_size, seed, epoch, window=32):
    """One epoch of batches of similar length: a list of index arrays, a pure function of its arguments.

    lengths: (N,), tokens per row. The indices are shuffled, cut into windows of `window` batches, sorted by length
    inside each window and cut into batches, whose order is shuffled again. What does not fill a batch is left out this
    epoch, and is somewhere else in the next; if there is less than one batch, all of it is one.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))
    batch_size = min(batch_size, len(order))
    order = order[:len(order) // batch_size * batch_size]
    cut = []
    for at in range(0, len(order), window * batch_size):
        part = order[at:at + window * batch_size]
        part = part[np.argsort(lengths[part], kind="stable")]
        cut += list(part.reshape(-1, batch_size))
    return [cut[i] for i in rng.permutation(len(cut))]


def batch_order(lengths, batch_size, seed):
    """-> a function from the step to the rows of its batch: epoch after epoch of `batches`. As it depends on the step
    alone, a resumed run sees what the uninterrupted one would have seen."""
    per_epoch = len(batches(lengths, batch_size, seed, 0))
    plan = lru_cache(maxsize=1)(lambda epoch: batches(lengths, batch_size, seed, epoch))
    return lambda step: plan(step // per_epoch)[step % per_epoch]


# ---------------------------------------------------------------- who is longer, and D_rho

def longer(lengths):
    """Which response of each pair is longer, by at least 10% more tokens. lengths: (N, 2) chosen/rejected.
    Returns (N,): +1 the chosen one, -1 the rejected one, 0 neither."""
    chosen, rejected = np.asarray(lengths, dtype=np.int64).T
    return np.where(10 * chosen >= 11 * rejected, 1, np.where(10 * rejected >= 11 * chosen, -1, 0))


def biased_subset(lengths, rho, n=None, seed=0):
    """D_rho, a training set with a length bias: indices of n pairs, in a fraction rho of which the longer response is
    the chosen one. Pairs with no longer response are left out.

    lengths: (N, 2) response lengths in tokens, chosen/rejected. rho: in [0, 1]. n: how many pairs, or None for as many
    as there can be. Returns (n,) int64 indices, in order. ValueError if there are too few pairs.
    Source: the paper's experiments on TL;DR, where the bias is rho in {.2, .3, ..., .8}.
    """
    if not 0 <= rho <= 1:
        raise ValueError(f"rho is a fraction between 0 and 1, not {rho}")
    who = longer(lengths)
    chosen, rejected = np.flatnonzero(who == 1), np.flatnonzero(who == -1)
    possible = lambda n: 0 < n and round(rho * n) <= len(chosen) and n - round(rho * n) <= len(rejected)
    if n is None:
        n = next(filter(possible, range(len(chosen) + len(rejected), 0, -1)), 0)
    if not possible(n):
        raise ValueError(f"no {n or 'such'} pairs with the longer response chosen in a fraction {rho}: of {len(who)} pairs, "
                         f"{len(chosen)} have the longer one chosen and {len(rejected)} have it rejected")
    n_chosen = round(rho * n)
    rng = np.random.default_rng(seed)
    return np.sort(np.concatenate([rng.choice(chosen, n_chosen, replace=False),
                                   rng.choice(rejected, n - n_chosen, replace=False)]))


def relabel(dataset, rewards):
    """The same rows with their responses in the order of the rewards, the highest first; rows with ties dropped.
    rewards: (N, K)."""
    rewards = np.asarray(rewards)
    order = np.argsort(-rewards, axis=1)                                                        # (N, K)
    keep = [i for i, row in enumerate(rewards) if len(set(row.tolist())) == len(row)]
    if len(keep) < len(rewards):
        print(f"relabelled: {len(rewards) - len(keep)} dropped (the reward model is undecided)")
    scores = None if dataset.scores is None else np.take_along_axis(dataset.scores, order[:, :, None], axis=1)[keep]
    return Dataset([(dataset.examples[i][0], [dataset.examples[i][1][k] for k in order[i]]) for i in keep], scores)


# ---------------------------------------------------------------- text to tokens

@dataclass
class Dataset:
    """examples: list of N (prompt ids, [response ids, ...]). scores: (N, K, M) float32, M rewards for each of the K responses,
    if the data came with them."""
    examples: list
    scores: np.ndarray = None

    def __len__(self):
        return len(self.examples)

    def take(self, indices):
        indices = list(indices)
        return Dataset([self.examples[i] for i in indices], None if self.scores is None else self.scores[indices])

    def response_lengths(self):
        """(N, K) tokens in each response, the end-of-text token included."""
        return np.array([[len(response) for response in responses] for _, responses in self.examples])

    def row_lengths(self):
        """(N,) tokens in each row of a tree batch."""
        return np.array([len(prompt) + sum(map(len, responses)) for prompt, responses in self.examples])


def get_tokenizer(name):
    """A tiktoken.Encoding: "tinytldr" is built here, any other name is tiktoken's (such as "gpt2")."""
    if name == "tinytldr":
        return tinytldr.tokenizer()
    try:
        return tiktoken.get_encoding(name)
    except ValueError as error:
        raise InputError(f"--tokenizer: there is no encoding {name!r}; use tinytldr, gpt2 or another name that tiktoken knows") from error
    except Exception as error:     # tiktoken downloads on first use, through whatever raises here
        raise InputError(f"--tokenizer: tiktoken could not download its {name!r} encoding ({type(error).__name__}); "
                         "on a machine without network, point TIKTOKEN_CACHE_DIR at a copy of its cache") from error


def save_tokenizer(directory, tokenizer, block_size):
    """Writes a tiktoken.Encoding as tokenizer.json and tokenizer_config.json, so that `transformers` reads and writes the same
    tokens with a saved model.

    tiktoken merges two neighbours if together they are a token, those with the lowest rank first; tokenizer.json lists pairs
    to merge, the first ones first: so every way to cut a token in two tokens is such a pair.
    """
    ranks = tokenizer._mergeable_ranks                                       # {bytes: id}
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]        # GPT-2 writes these bytes as they are,
    letters = {byte: chr(byte) for byte in printable}                        # and the others as the letters from 256 on
    letters |= {byte: chr(256 + i) for i, byte in enumerate(sorted(set(range(256)) - set(printable)))}
    text = lambda token: "".join(map(letters.__getitem__, token))
    merges = [f"{text(token[:cut])} {text(token[cut:])}" for token in sorted(ranks, key=ranks.get)
              for cut in range(1, len(token)) if token[:cut] in ranks and token[cut:] in ranks]
    special = [{"id": number, "content": name, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
                "special": True} for name, number in tokenizer._special_tokens.items()]
    pattern = tokenizer._pat_str.replace("}+", "}")      # "possessive" there; here it would mean "and that several times"
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    as_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    end = tokenizer.decode([tokenizer.eot_token])
    write_json(os.path.join(directory, "tokenizer.json"), {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": special, "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, as_bytes]}, "post_processor": None, "decoder": as_bytes,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
                  "fuse_unk": False, "byte_fallback": False, "ignore_merges": True,
                  "vocab": {text(token): rank for token, rank in ranks.items()}, "merges": merges}})
    write_json(os.path.join(directory, "tokenizer_config.json"), {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": end, "eos_token": end, "model_max_length": block_size,
        "clean_up_tokenization_spaces": False})


def write_json(path, value):
    with open(path, "w", encoding="utf-8") as file:
        json.dump(value, file)


def fit(prompt, responses, block_size):
    """Makes a prompt fit before its responses: it loses its start; they keep all, the end-of-text token too.
    Returns the prompt ids, or None if a response alone leaves no room for one prompt token."""
    room = block_size - max(map(len, responses))
    return prompt[-room:] if room >= 1 else None


def bucket_of(prompt):
    """0 to 255, by the prompt's hash: its split in SPLITS. So all rows with one prompt are in one split, and a prompt has the
    same split in every file."""
    return hashlib.sha256(prompt.encode()).digest()[0]


SPLITS = np.array(["validation"] * 26 + ["test"] * 26 + ["train"] * 204)      # about 80% train, 10% validation, 10% test


def encode(rows, tokenizer):
    """Token ids of rows, in flat arrays, as they are kept on disk.

    rows: an iterable. Returns {"tokens": all prompts and responses one after the other, "lengths": (N, 1 + K) tokens in each
    row's prompt and responses, "bucket": (N,) each row's place in SPLITS, and "scores": (N, K, M) if all rows have them}.
    ValueError says which row is unlike the first.
    """
    dtype = np.uint16 if tokenizer.n_vocab <= 2 ** 16 else np.int32
    tokens, lengths, bucket, scores, K, rows = [], [], [], [], None, iter(rows)
    while part := list(islice(rows, 1000)):
        for row in part:
            K = K or len(row["responses"])
            if len(row["responses"]) != K:
                raise ValueError(f"row {len(bucket) + 1}: {len(row['responses'])} responses, the first row has {K}; they must be as many")
            bucket.append(bucket_of(row["prompt"]))
            scores.append(row.get("scores"))
        texts = [text for row in part for text in (row["prompt"], *row["responses"])]
        ids = tokenizer.encode_ordinary_batch(texts, num_threads=os.cpu_count())
        for i, one in enumerate(ids):
            is_prompt = i % (1 + K) == 0
            if not is_prompt or not one:      # an empty prompt is an end of text, and a response ends in one
                one.append(tokenizer.eot_token)
        lengths += map(len, ids)
        tokens.append(np.fromiter(chain.from_iterable(ids), dtype))
    arrays = {"tokens": np.concatenate(tokens or [np.zeros(0, dtype)]), "bucket": np.array(bucket, np.uint8),
              "lengths": np.array(lengths, np.int32).reshape(len(bucket), 1 + (K or 0))}
    shapes = [np.shape(one) for one in scores]      # (K, M) each, or () where there is none
    if () in shapes:
        if any(shapes):
            print(f"scores: left out, as {shapes.count(())} of {len(shapes)} rows have none")
        return arrays
    for number, shape in enumerate(shapes, 1):
        if shape != shapes[0]:
            raise ValueError(f"row {number}: {shape[1]} scores for each response, the first row has {shapes[0][1]}; they must be as many")
    return arrays | {"scores": np.array(scores, np.float32)}


def fitted(arrays, block_size, numbers):
    """Some rows of `encode`, as examples: yields (row number, prompt, [responses]); the prompt is None where a response alone
    does not fit."""
    lengths = arrays["lengths"]
    ends = lengths.ravel().cumsum().reshape(lengths.shape)
    for number, row_ends, row_lengths in zip(numbers.tolist(), ends[numbers].tolist(), lengths[numbers].tolist()):
        prompt, *responses = [arrays["tokens"][end - n:end] for end, n in zip(row_ends, row_lengths)]
        yield number, fit(prompt, responses, block_size), responses


def select(arrays, block_size, name="data", split=None):
    """The rows of `encode` that are of use, in one split or in all -> Dataset; prints how many were dropped and why."""
    bucket, K = arrays["bucket"], arrays["lengths"].shape[1] - 1
    numbers = np.arange(len(bucket)) if split is None else np.flatnonzero(SPLITS[bucket] == split)
    examples, kept, too_long, same = [], [], 0, 0
    for number, prompt, responses in fitted(arrays, block_size, numbers):
        if prompt is None:
            too_long += 1
        elif K > 1 and all(len(r) == len(responses[0]) and (r == responses[0]).all() for r in responses[1:]):
            same += 1
        else:
            examples.append((prompt, responses))
            kept.append(number)
    print(f"{name}: {len(numbers)} rows"
          + (f", {too_long} dropped (a response alone does not fit block_size {block_size})" if too_long else "")
          + (f", {same} dropped ({'chosen and rejected' if K == 2 else 'all responses'} are the same)" if same else ""))
    return Dataset(examples, arrays["scores"][kept] if "scores" in arrays else None)


def tokenised_file(data, tokenizer, demonstrations=False):
    """`encode` of all rows of a file or hub data set, done once: kept in the folder NANOPREF_CACHE (default: ~/.cache/nanopref)
    under a hash of what is in the file (of a folder or a hub data set: of what `datasets` says of it)."""
    folder = os.environ.get("NANOPREF_CACHE") or os.path.expanduser("~/.cache/nanopref")
    records = None
    if os.path.isfile(data):
        content = hashlib.sha256()
        with open(data, "rb") as file:
            while part := file.read(2 ** 20):
                content.update(part)
        content = content.hexdigest()
    else:
        records = open_records(data)
        content = records._fingerprint
    sources = []      # another way to read is other data
    for source in (__file__, formats.__file__, tinytldr.__file__):
        with open(source, "rb") as file:
            sources.append(file.read())
    path = os.path.join(folder, runtime.key(content, *sources, tokenizer.name, tokenizer.n_vocab, demonstrations) + ".npz")
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise InputError(f"NANOPREF_CACHE: the folder {folder!r} can't be made: {error.strerror}") from error
    if os.path.exists(path):
        try:
            with np.load(path) as arrays:
                arrays = dict(arrays)
            print(f"{data}: tokens from {path}")
            return arrays
        except Exception:     # numpy raises many kinds for a damaged file, which is written anew
            print(f"{path}: damaged")
    try:
        arrays = encode(load_rows(data, demonstrations, records), tokenizer)
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"--data: {data}: {error}") from error
    temporary = f"{path}.{os.getpid()}.tmp"
    with open(temporary, "wb") as file:
        np.savez(file, **arrays)
    os.replace(temporary, path)
    return arrays


# ---------------------------------------------------------------- the data sets that the scripts ask for

def file_splits(data, splits, tokenizer, block_size, demonstrations=False):
    """-> a Dataset for each of the splits of a file or hub data set."""
    arrays = tokenised_file(data, tokenizer, demonstrations)
    kind = "demonstrations" if demonstrations else "preferences"
    return [select(arrays, block_size, f"{split} {kind}", split) for split in splits]


def demonstrations(data, tokenizer, block_size, seed=0):
    """Prompts with responses to imitate, for supervised fine-tuning: those of a file, one each; or TinyTLDR's with four
    each (a long prompt costs little when its responses share it). -> (train, validation)"""
    if data != "tinytldr":
        return file_splits(data, ("train", "validation"), tokenizer, block_size, demonstrations=True)
    return [select(encode(({"prompt": tinytldr.post(seed, split, i),
                            "responses": [tinytldr.demonstration(seed, split, i, person) for person in range(4)]}
                           for i in range(n)), tokenizer), block_size, f"{split} demonstrations")
            for split, n in (("train", 20_000), ("validation", 1000))]


PAIRS_FROM = {"train": 200_000, "validation": 0, "test": 0}    # first index of the posts for pairs: not those of SFT


def preferences(data, splits, tokenizer, block_size, ref=None, cache=None, pool=10_000, hard=False, seed=0):
    """Preferences as they are, with the natural mix of lengths, a Dataset for each split: those of a file; or for TinyTLDR
    pairs sampled from the reference policy `ref` at temperature 1 and labelled by the oracle, kept in the folder `cache`,
    `pool` of them to train on and 1,000 in other splits."""
    if data != "tinytldr":
        return file_splits(data, splits, tokenizer, block_size)
    return [tiny_pairs(split, pool if split == "train" else 1000, tokenizer, block_size, ref, cache, hard, seed) for split in splits]


def tiny_pairs(split, n, tokenizer, block_size, ref, cache, hard, seed):
    def sample_and_label():
        prompts = [tinytldr.post(seed, split, PAIRS_FROM[split] + i) for i in range(n)]
        responses, _ = runtime.sample(ref, tokenizer, [p for p in prompts for _ in range(2)], block_size,
                                      seed=[seed, tinytldr.SPLIT_START[split]], desc=f"sample {split} pairs")
        pairs = [responses[2 * i:2 * i + 2] for i in range(n)]
        rewards = np.array([[tinytldr.oracle_reward(p, y) for y in pair] for p, pair in zip(prompts, pairs)])   # (n, 2)
        first = tinytldr.prefers_first(rewards, seed, hard)
        rows = [{"prompt": p, "responses": pair if one else pair[::-1]}
                for p, pair, r, one in zip(prompts, pairs, rewards, first) if r[0] != r[1] and all(pair)]
        print(f"{split} pairs: {n} sampled, {n - len(rows)} dropped (equal rewards or an empty summary)")
        return rows

    with open(tinytldr.__file__, "rb") as source:     # another world is other data
        key = runtime.key(runtime.hash_weights(ref), source.read(), "tinytldr", split, PAIRS_FROM[split], n, hard, seed)
    return select(encode(runtime.cached(cache, f"{split}-pairs", key, sample_and_label), tokenizer), block_size, f"{split} pairs")


def training_pairs(args, tokenizer, ref, device, autocast):
    """What a reward model or a policy learns from: (D_rho of the training pairs, validation pairs as they come).

    args: the flags of runtime.shared_flags. ref: the policy that TinyTLDR's pairs are sampled from."""
    rho, cache = runtime.resolve_rho(args), runtime.cache_folder(args.init_from, args.out_dir)
    names = ("train", "validation")
    splits = preferences(args.data, names, tokenizer, ref.config.block_size, ref, cache, args.pool, args.hard_labels, args.seed)
    if args.relabel:
        from reward import family_scores, load_reward_model      # here, as reward.py stands on this file
        oracle = {args.relabel: load_reward_model(args.relabel, "--relabel", ref, args.tokenizer, device)}
        splits = [relabel(dataset, family_scores(oracle, dataset, args.dtype, autocast, f"{name}-relabel")[:, :, 0])
                  for name, dataset in zip(names, splits) if len(dataset)]
    if len(splits) < 2 or not all(map(len, splits)):
        raise InputError(f"--data: {args.data}: no usable row in the train or the validation split")
    train, validation = splits
    n = args.n_pairs or (4000 if args.data == "tinytldr" else None)
    if rho is None:
        return train.take(range(min(n or len(train), len(train)))), validation
    if train.response_lengths().shape[1] != 2:
        raise InputError("--rho: D_rho is made of pairs, and the rows of --data have more responses; use --rho=all")
    try:
        chosen = biased_subset(train.response_lengths(), rho, n, args.seed)
    except ValueError as error:
        raise InputError(f"--rho, --n_pairs: {error}") from error
    d_rho = train.take(chosen)
    print(f"D_rho: {len(d_rho)} of {len(train)} training pairs, the longer response preferred in "
          f"{(longer(d_rho.response_lengths()) == 1).mean():.0%} of them")
    return d_rho, validation


def show(dataset, tokenizer, n=4):
    """Prints one batch as the model sees it: prompt plain, each response in a colour, padding as dots; and its lengths."""
    batch = collate(dataset.examples[:n])
    colours = ["\033[0m", "\033[32m", "\033[31m", "\033[34m", "\033[35m"]
    for tokens, branch, lengths in zip(batch.tokens.tolist(), batch.branch.tolist(), batch.lengths.tolist()):
        for role, part in groupby(zip(branch, tokens), key=lambda column: column[0]):
            ids = [token for _, token in part]
            print(colours[max(role, 0) % len(colours)] + ("·" * len(ids) if role < 0 else tokenizer.decode(ids)), end="")
        print(f"\033[0m\n[{branch.count(0)} prompt tokens, {' + '.join(map(str, lengths))} response tokens]\n")
    print(f"tokens {tuple(batch.tokens.shape)}: {(batch.branch == 0).sum()} prompt, {(batch.branch > 0).sum()} response, "
          f"{(batch.branch < 0).sum()} padding")


def main(argv=None):
    parser = runtime.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a JSONL, JSON, CSV or Parquet file, or a hub name")
    parser.add_argument("--sft", action="store_true", help="read demonstrations (prompt, completion), as --loss=sft does")
    parser.add_argument("--tokenizer", default="gpt2", help="tinytldr, or a name that tiktoken knows")
    parser.add_argument("--block_size", type=runtime.positive(int), default=1024, help="longest prompt + response, in tokens")
    parser.add_argument("--show", action="store_true", help="print one batch, prompt and responses coloured")
    args = parser.parse_args(argv)
    tokenizer = get_tokenizer(args.tokenizer)
    arrays = tokenised_file(args.data, tokenizer, args.sft)
    dataset = select(arrays, args.block_size, args.data)
    if not len(dataset):
        raise InputError(f"--data: {args.data}: no usable row")
    if args.show:
        show(dataset, tokenizer)
    lengths, prompts = dataset.response_lengths(), np.array([len(prompt) for prompt, _ in dataset.examples])
    K = lengths.shape[1]
    print(f"{len(arrays['bucket'])} rows read, {len(dataset)} used" + (f", {dataset.scores.shape[2]} score(s) for each response"
                                                                     if dataset.scores is not None else ""))
    names = ["response"] if K == 1 else ["chosen", "rejected"] if K == 2 else [f"rank {k + 1}" for k in range(K)]
    for name, values in (("prompt", prompts), *zip(names, lengths.T)):
        low, median, high, most = np.percentile(values, [10, 50, 90, 99])
        print(f"{name:9} tokens: 10th percentile {low:.0f}, median {median:.0f}, 90th {high:.0f}, 99th {most:.0f}, longest {values.max()}")
    if K == 2:
        who = longer(lengths)
        print(f"longer response (by at least 10%) chosen in {(who == 1).sum()} pairs, rejected in {(who == -1).sum()}, neither longer "
              f"in {(who == 0).sum()}: of the unequal ones the longer is preferred in {(who == 1).sum() / max(1, (who != 0).sum()):.0%}")


if __name__ == "__main__":
    runtime.run(main)
