"""Preference data: from files to token ids, once; the tree batch; relabelling; and the biased training set D_rho.

In text, a row is {"prompt": str, "responses": [str, ...]}: for a preference pair the chosen response first and the
rejected one second, for a demonstration just one. `tokenise` turns rows into examples, (prompt ids, [response ids, ...]),
each response ending in the end-of-text token, and `collate` turns examples into the one batch format there is.

    python data.py --data=prefs.jsonl --show    # one batch in colour, and what became of every row
"""
import argparse
import glob
import hashlib
import json
import os
from dataclasses import dataclass, fields
from functools import lru_cache

import numpy as np
import tiktoken
import torch

import runtime
import tinytldr
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
    """The same pairs with the higher-rewarded response as the chosen one; ties dropped. rewards: (N, 2)."""
    rewards = np.asarray(rewards)
    keep = np.flatnonzero(rewards[:, 0] != rewards[:, 1])
    order = {i: ([0, 1] if rewards[i, 0] > rewards[i, 1] else [1, 0]) for i in keep}
    return Dataset([(dataset.examples[i][0], [dataset.examples[i][1][k] for k in order[i]]) for i in keep],
                   [{**dataset.rows[i], "responses": [dataset.rows[i]["responses"][k] for k in order[i]]} for i in keep])


# ---------------------------------------------------------------- text to tokens

@dataclass
class Dataset:
    """examples: list of (prompt ids, [response ids, ...]); rows: the text of each."""
    examples: list
    rows: list

    def __len__(self):
        return len(self.examples)

    def take(self, indices):
        return Dataset([self.examples[i] for i in indices], [self.rows[i] for i in indices])

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


def fit(prompt, responses, block_size):
    """Makes a prompt fit before its responses: it loses its start; they keep all, the end-of-text token too.
    Returns the prompt ids, or None if a response alone leaves no room for one prompt token."""
    room = block_size - max(map(len, responses))
    return prompt[-room:] if room >= 1 else None


def tokenise(rows, tokenizer, block_size, name="data"):
    """rows -> Dataset; prints how many rows there are, and how many were dropped and why."""
    prompts = tokenizer.encode_ordinary_batch([row["prompt"] for row in rows])
    responses = iter(tokenizer.encode_ordinary_batch([response for row in rows for response in row["responses"]]))
    examples, kept, too_long, same = [], [], 0, 0
    for row, prompt in zip(rows, prompts):
        ids = [next(responses) + [tokenizer.eot_token] for _ in row["responses"]]
        prompt = fit(prompt or [tokenizer.eot_token], ids, block_size)
        if prompt is None:
            too_long += 1
        elif len(ids) == 2 and ids[0] == ids[1]:
            same += 1
        else:
            examples.append((np.array(prompt, np.int32), [np.array(response, np.int32) for response in ids]))
            kept.append(row)
    print(f"{name}: {len(rows)} rows"
          + (f", {too_long} dropped (a response alone does not fit block_size {block_size})" if too_long else "")
          + (f", {same} dropped (chosen and rejected are the same)" if same else ""))
    return Dataset(examples, kept)


# ---------------------------------------------------------------- rows from files

def chat_text(messages):
    """Chat messages as plain text, in the layout of Anthropic's HH data: "\n\nHuman: ...\n\nAssistant: ..."."""
    names = {"user": "Human", "assistant": "Assistant", "system": "System"}
    if not all(isinstance(message["content"], str) for message in messages):
        raise TypeError
    return "".join(f"\n\n{names[message['role']]}: {message['content']}" for message in messages)


def implicit_prompt(chosen, rejected):
    """The prompt that two whole texts share: up to the last "Assistant:" of their common prefix in a dialogue, up to its
    last space otherwise. "" if they share nothing."""
    common = os.path.commonprefix([chosen, rejected])
    turn = common.rfind("\n\nAssistant:")
    return common[:turn + len("\n\nAssistant:")] if turn >= 0 else common[:max(common.rfind(" "), 0)]


def parse_row(record, demonstrations):
    """One record of a file, in any of TRL's layouts -> a row. ValueError says what is wrong with it."""
    columns = ("prompt", "completion") if demonstrations and "completion" in record else ("chosen", "rejected")
    texts = {}
    for column in ("prompt",) * ("prompt" in record) + columns:
        value = record.get(column)
        if isinstance(value, list):
            try:
                value = chat_text(value)
            except (KeyError, TypeError):
                raise ValueError(f"column {column!r} is not a list of chat messages with a role (user, assistant or system) "
                                 "and a text as content") from None
            if column == "prompt":
                value += "\n\nAssistant:"
            elif "prompt" in texts:       # which may stand again before the response, and ends in "Assistant:" already
                value = value.removeprefix(texts["prompt"]).removeprefix("\n\nAssistant:")
        if not isinstance(value, str):
            raise ValueError(f"column {column!r} is {'missing' if value is None else 'neither text nor chat messages'}")
        texts[column] = value
    if "prompt" in texts:
        prompt, responses = texts["prompt"], [texts[column] for column in columns if column != "prompt"]
    else:
        prompt = implicit_prompt(texts["chosen"], texts["rejected"])
        if not prompt:
            raise ValueError("there is no column 'prompt', and 'chosen' and 'rejected' share no beginning")
        responses = [texts[column][len(prompt):] for column in columns]
    for column, response in zip(columns[-len(responses):], responses):
        # a blank turn in a whole dialogue is what the assistant said there; a blank column is a mistake in the file
        if not (response.strip() if "prompt" in texts else response):
            raise ValueError(f"the response {column!r} is empty")
    return {"prompt": prompt, "responses": responses[:1] if demonstrations else responses}


BUILDERS = {"jsonl": "json", "json": "json", "csv": "csv", "parquet": "parquet"}


def load_rows(data, demonstrations=False):
    """Rows of a JSONL, JSON, CSV or Parquet file (gzip too), or of a data set on the hub, in TRL's column names:
    prompt, chosen, rejected; or chosen, rejected with the prompt as their common beginning; or, for demonstrations,
    prompt, completion (a preference file serves too: its chosen responses). InputError names the file and the row."""
    import datasets   # here, so that the rest runs where it is not installed
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL + 1)      # its troubles are reported below, in one line
    suffix = data.removesuffix(".gz").rsplit(".", 1)[-1]
    try:
        if os.path.isfile(data):
            if suffix not in BUILDERS:
                raise InputError(f"--data: {data}: files end in {', '.join(BUILDERS)}, or one of these and .gz")
            if os.path.getsize(data) == 0:
                raise InputError(f"--data: {data}: the file is empty")
            records = datasets.load_dataset(BUILDERS[suffix], data_files=glob.escape(data), split="train")
        elif suffix in BUILDERS or os.path.exists(data) or data.count("/") > 1 or not data:
            raise InputError(f"--data: {data}: {'a folder, not a file' if os.path.isdir(data) else 'no such file'}")
        else:
            records = datasets.load_dataset(data, split="train")
    except InputError:
        raise
    except Exception as error:     # datasets raises whatever its readers do
        reason = ' '.join(str(error.__cause__ or error).split())[:200]
        if "corresponds to no data" in reason or "BatchSize must be greater" in reason:
            reason = "the file has no rows"
        raise InputError(f"--data: {data}: {first_bad_line(data) or reason}") from error
    wanted = [("prompt", "completion"), ("chosen", "rejected")][not demonstrations:]
    if not any(set(columns) <= set(records.column_names) for columns in wanted):
        raise InputError(f"--data: {data}: needs columns {' or '.join(' and '.join(columns) for columns in wanted)}, "
                         f"has {', '.join(records.column_names) or 'none'}")
    rows = []
    for number in range(len(records)):
        try:
            rows.append(parse_row(records[number], demonstrations))
        except ValueError as error:     # also text that is not UTF-8
            raise InputError(f"--data: {data}: row {number + 1}: {error}") from error
    if not rows:
        raise InputError(f"--data: {data}: the file has no rows")
    return rows


def first_bad_line(path):
    """Which line of a JSONL file is not JSON: what `datasets` does not say. None if that is not the trouble."""
    if not path.removesuffix(".gz").endswith(".jsonl") or not os.path.isfile(path):
        return None
    import gzip
    with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8", errors="replace") as file:
        try:
            for number, line in enumerate(file, 1):
                if line.strip() and not isinstance(json.loads(line), dict):
                    return f"row {number}: not a JSON object"
        except ValueError as error:
            return f"row {number}: not JSON: {error}"
        except (OSError, EOFError) as error:
            return f"not a whole gzip file: {error}"


def split_of(prompt):
    """Which split a prompt of a file belongs to, by its hash: about 80% train, 10% validation, 10% test. So all pairs
    with one prompt are in one split, and a prompt has the same split in every file."""
    bucket = hashlib.sha256(prompt.encode()).digest()[0]
    return "validation" if bucket < 26 else "test" if bucket < 52 else "train"


# ---------------------------------------------------------------- the data sets that the scripts ask for

def demonstrations(data, split, tokenizer, block_size, n=None, seed=0):
    """Prompts with responses to imitate, for supervised fine-tuning: those of a file, one each; or n of TinyTLDR's with
    four each (a long prompt costs little when its responses share it)."""
    if data == "tinytldr":
        rows = [{"prompt": tinytldr.post(seed, split, i),
                 "responses": [tinytldr.demonstration(seed, split, i, person) for person in range(4)]} for i in range(n)]
    else:
        rows = [row for row in load_rows(data, demonstrations=True) if split_of(row["prompt"]) == split][:n]
    return tokenise(rows, tokenizer, block_size, f"{split} demonstrations")


PAIRS_FROM = {"train": 200_000, "validation": 0, "test": 0}    # first index of the posts for pairs: not those of SFT


def preferences(data, split, tokenizer, block_size, n=None, ref=None, cache=None, hard=False, seed=0):
    """Preference pairs as they are, with the natural mix of lengths: those of a file, or for TinyTLDR n pairs sampled
    from the reference policy `ref` at temperature 1 and labelled by the oracle, kept in the folder `cache`."""
    if data != "tinytldr":
        rows = [row for row in load_rows(data) if split_of(row["prompt"]) == split][:n]
        return tokenise(rows, tokenizer, block_size, f"{split} pairs")

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
        key = runtime.key(runtime.hash_weights(ref), source.read(), data, split, PAIRS_FROM[split], n, hard, seed)
    rows = runtime.cached(cache, f"{split}-pairs", key, sample_and_label)
    return tokenise(rows, tokenizer, block_size, f"{split} pairs")


def training_pairs(args, tokenizer, ref, device, autocast):
    """What a reward model or a policy learns from: (D_rho of the training pairs, validation pairs as they come).

    args: the flags of runtime.shared_flags. ref: the policy that TinyTLDR's pairs are sampled from."""
    rho, cache = runtime.resolve_rho(args), runtime.cache_folder(args.init_from, args.out_dir)
    tiny = args.data == "tinytldr"
    splits = []
    for split, n in (("train", args.pool if tiny else None), ("validation", 1000 if tiny else None)):
        dataset = preferences(args.data, split, tokenizer, ref.config.block_size, n, ref, cache, args.hard_labels, args.seed)
        if args.relabel and len(dataset):
            from reward import load_reward_model
            oracle = load_reward_model(args.relabel, "--relabel", ref, args.tokenizer, device)
            dataset = relabel(dataset, runtime.score(oracle, dataset.examples, autocast, desc="relabel"))
        if not len(dataset):
            raise InputError(f"--data: {args.data}: no usable pair in the {split} split")
        splits.append(dataset)
    train, validation = splits
    n = args.n_pairs or (4000 if tiny else None)
    if rho is None:
        return train.take(range(min(n or len(train), len(train)))), validation
    try:
        return train.take(biased_subset(train.response_lengths(), rho, n, args.seed)), validation
    except ValueError as error:
        raise InputError(f"--rho, --n_pairs: {error}") from error


def show(dataset, tokenizer, n=4):
    """Prints one batch as the model sees it: prompt plain, each response in a colour, padding as dots."""
    batch = collate(dataset.examples[:n])
    colours = ["\033[0m", "\033[32m", "\033[31m", "\033[34m", "\033[35m"]
    for tokens, branch in zip(batch.tokens.tolist(), batch.branch.tolist()):
        for token, role in zip(tokens, branch):
            print(colours[max(role, 0) % len(colours)] + ("·" if role < 0 else tokenizer.decode([token])), end="")
        print("\033[0m\n")
    print(f"tokens {tuple(batch.tokens.shape)}: {(batch.branch == 0).sum()} prompt, {(batch.branch > 0).sum()} response, "
          f"{(batch.branch < 0).sum()} padding")


def main(argv=None):
    parser = runtime.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a JSONL, JSON, CSV or Parquet file of pairs, or a hub name")
    parser.add_argument("--tokenizer", default="gpt2", help="tinytldr, or a name that tiktoken knows")
    parser.add_argument("--block_size", type=runtime.positive(int), default=1024, help="longest prompt + response, in tokens")
    parser.add_argument("--show", action="store_true", help="print one batch, prompt and responses coloured")
    args = parser.parse_args(argv)
    tokenizer = get_tokenizer(args.tokenizer)
    dataset = tokenise(load_rows(args.data), tokenizer, args.block_size, args.data)
    if not len(dataset):
        raise InputError(f"--data: {args.data}: no usable pair")
    if args.show:
        show(dataset, tokenizer)
    lengths = dataset.response_lengths()
    who, prompts = longer(lengths), [len(prompt) for prompt, _ in dataset.examples]
    for name, values in (("prompt", prompts), ("chosen", lengths[:, 0]), ("rejected", lengths[:, 1])):
        print(f"{name:9} tokens: median {np.median(values):.0f}, 99th percentile {np.percentile(values, 99):.0f}, "
              f"longest {max(values)}")
    print(f"longer response chosen in {(who == 1).sum()} pairs, rejected in {(who == -1).sum()}, neither longer in "
          f"{(who == 0).sum()}")


if __name__ == "__main__":
    runtime.run(main)
