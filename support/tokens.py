"""Rows of text as flat arrays of token ids, kept on disk."""
import hashlib
import os
from itertools import chain, islice

import numpy as np

from support.cache import key
from support.files import replacing
from support.flags import InputError
from support.formats import load_rows, open_records

LAYOUT = 1      # raise it when the arrays below, or what is read into them, change
SPLITS = np.array(["validation"] * 26 + ["test"] * 26 + ["train"] * 204)    # about 10, 10 and 80%


def encode(rows, tokenizer):
    """Token ids of rows of text. Every response ends in the end-of-text token; an empty prompt is
    that token alone.

    rows: an iterable of {"prompt": str, "responses": [str, ...]}, maybe with "scores". Returns
    {"tokens": all prompts and responses one after the other, "lengths": (N, 1 + K) tokens in each
    row's prompt and responses, "hash": (N,) a byte of the prompt's hash, by which rows are split,
    and "scores": (N, K, M) if all rows have them}. ValueError says which row is unlike the first.
    """
    dtype = np.uint16 if tokenizer.n_vocab <= 2 ** 16 else np.int32
    tokens, lengths, hashes, scores, K = [], [], [], [], None
    rows = iter(rows)
    while part := list(islice(rows, 1000)):
        for row in part:
            K = K or len(row["responses"])
            if len(row["responses"]) != K:
                raise ValueError(f"row {len(hashes) + 1}: {len(row['responses'])} responses, the "
                                 f"first row has {K}; they must be as many")
            hashes.append(hashlib.sha256(row["prompt"].encode()).digest()[0])
            scores.append(row.get("scores"))
        texts = list(chain.from_iterable((row["prompt"], *row["responses"]) for row in part))
        ids = tokenizer.encode_ordinary_batch(texts, num_threads=os.cpu_count())
        for i, text_ids in enumerate(ids):
            is_prompt = i % (1 + K) == 0
            if not is_prompt or not text_ids:
                text_ids.append(tokenizer.eot_token)
        lengths += map(len, ids)
        tokens.append(np.fromiter(chain.from_iterable(ids), dtype))
    arrays = {"tokens": np.concatenate(tokens or [np.zeros(0, dtype)]),
              "hash": np.array(hashes, np.uint8),
              "lengths": np.array(lengths, np.int32).reshape(len(hashes), 1 + (K or 0))}
    if check_scores(scores):
        arrays["scores"] = np.array(scores, np.float32)
    return arrays


def check_scores(scores):
    """Have all rows scores? Says so if only some do. ValueError if they are not as many each."""
    shapes = [np.shape(row_scores) for row_scores in scores]    # (K, M), or () for none
    if () in shapes:
        if any(shapes):
            print(f"scores: left out, as {shapes.count(())} of {len(shapes)} rows have none")
        return False
    for number, shape in enumerate(shapes, 1):
        if shape != shapes[0]:
            raise ValueError(f"row {number}: {shape[1]} scores for each response, the first row "
                             f"has {shapes[0][1]}; they must be as many")
    return bool(shapes)


def tokenised_file(data, tokenizer, demonstrations=False):
    """`encode` of all rows of a file or hub data set, done once.

    Kept in the folder NANOPREF_CACHE (default: ~/.cache/nanopref) under a hash of what is in the
    file (of a folder or a hub data set: of what `datasets` says of it)."""
    default = os.path.expanduser("~/.cache/nanopref")
    folder = os.environ.get("NANOPREF_CACHE") or default
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise InputError(f"NANOPREF_CACHE: the folder {folder!r} can't be made: {error.strerror}"
                         ) from error
    records = None
    if os.path.isfile(data):
        content = hash_file(data)
    else:
        records = open_records(data)
        content = records._fingerprint
    words = b"\0".join(tokenizer.token_byte_values())
    name = key(LAYOUT, content, tokenizer.name, tokenizer.n_vocab, tokenizer._pat_str, words,
               demonstrations)
    path = os.path.join(folder, name + ".npz")
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
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)
    return arrays


def hash_file(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(2 ** 20):
            digest.update(part)
    return digest.hexdigest()


# ------------------------------------------------------------------ which rows are of use


def fit(prompt, responses, block_size):
    """Makes a prompt fit before its responses: it loses its start, they keep all, the end-of-text
    token too. Returns the prompt ids, or None if a response alone leaves no room for a token."""
    room = block_size - max(map(len, responses))
    return prompt[-room:] if room >= 1 else None


def examples_of(arrays, block_size, rows):
    """Rows of `encode`'s arrays as examples: yields (row, prompt ids, [response ids]); the prompt
    is None where a response alone does not fit block_size."""
    lengths = arrays["lengths"]
    ends = lengths.ravel().cumsum().reshape(lengths.shape)
    numbers = zip(rows.tolist(), ends[rows].tolist(), lengths[rows].tolist())
    for row, row_ends, row_lengths in numbers:
        parts = [arrays["tokens"][end - n:end] for end, n in zip(row_ends, row_lengths)]
        prompt, responses = parts[0], parts[1:]
        yield row, fit(prompt, responses, block_size), responses


def select(arrays, block_size, name="data", split=None):
    """The rows of `encode` that are of use, in one split or in all; says how many were dropped and
    why. A prompt's split goes by its hash: it is the same in every file. Returns (examples,
    scores): a list of (prompt ids, [response ids, ...]), and (N, K, M) or None. InputError if there
    is no such row."""
    rows = np.arange(len(arrays["hash"]))
    if split is not None:
        rows = np.flatnonzero(SPLITS[arrays["hash"]] == split)
    K = arrays["lengths"].shape[1] - 1
    examples, kept, too_long, equal = [], [], 0, 0
    for row, prompt, responses in examples_of(arrays, block_size, rows):
        if prompt is None:
            too_long += 1
        elif K > 1 and all(np.array_equal(ids, responses[0]) for ids in responses[1:]):
            equal += 1
        else:
            examples.append((prompt, responses))
            kept.append(row)
    message = f"{name}: {len(rows)} rows"
    if too_long:
        message += f", {too_long} dropped (a response alone does not fit block_size {block_size})"
    if equal:
        what = "chosen and rejected" if K == 2 else "all responses"
        message += f", {equal} dropped ({what} are the same)"
    print(message)
    if not examples:
        raise InputError(f"--data: {name}: no usable row")
    return examples, arrays["scores"][kept] if "scores" in arrays else None


def prompts_of(arrays, split):
    """The prompts of a split, each once, as lists of token ids, in the order of their rows."""
    lengths = arrays["lengths"]
    ends = lengths.ravel().cumsum().reshape(lengths.shape)[:, 0]
    rows = np.flatnonzero(SPLITS[arrays["hash"]] == split)
    prompts = [tuple(arrays["tokens"][ends[row] - lengths[row, 0]:ends[row]].tolist())
               for row in rows]
    return [list(prompt) for prompt in dict.fromkeys(prompts)]
