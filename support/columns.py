"""Computes columns of a data set, what a model says of each row: scores, and sampled responses.
Keeps what is constant on disk, in files named by what it depends on."""
import hashlib
import json
import os
import sys

import numpy as np
import torch
from tqdm import tqdm

from support.device import FEW_SHAPES, compute, new_generator, round_up, shape_multiple
from support.files import remove_leftovers, replacing
from support.flags import InputError
from support.processes import (
    add_up,
    first_says,
    gathered,
    in_shares,
    is_first,
    progress_bar,
    share_in_step,
    wait,
    whole,
)

TOKENS_PER_BATCH, PROMPTS_PER_STREAM = 16_384, 1024
MANY_CUT_OFF = 0.05         # a larger share of samples without an end is worth a warning


@torch.no_grad()
def score(model, dataset, desc="score"):
    """Returns model(batch) for all rows of a data set, (N, K) float32: log-probs from a policy,
    rewards from a reward model. The longest rows come first."""
    device, multiple = next(model.parameters()).device, shape_multiple()
    sizes = dataset.row_lengths()
    order = np.argsort(-sizes, kind="stable")
    scores = np.zeros(dataset.response_lengths().shape, np.float32)         # (N, K)
    done = 0
    batches = []
    while done < len(order):
        n = max(1, TOKENS_PER_BATCH // round_up(sizes[order[done]], multiple))
        batches.append((n, order[done:done + n]))
        done += n
    with progress_bar(total=len(batches), desc=desc) as bar:
        for (n, rows), mine in share_in_step(batches):
            same_n = multiple >= FEW_SHAPES     # repeat rows rather than have fewer
            batch = dataset.batch(np.resize(rows, n) if same_n else rows).to(device)
            with compute():
                values = model(batch).float().cpu().numpy()[:len(rows)]
            if mine:        # as many columns as this batch has responses, at most K
                scores[rows, :values.shape[1]] = values
            bar.update()
    return add_up(scores)


def sample(model, prompts, max_new_tokens, stop, seed, temperature=1.0, desc="sample"):
    """Samples one response to each prompt. prompts: lists of token ids; where one leaves no room
    for max_new_tokens, its response is cut off. seed: a number or several. Returns lists of token
    ids.

    The random numbers come from generators of their own, one for each thousand prompts, so that
    sampling does not change the training, nor depend on the number of processes.
    """
    model = gathered(model)
    device = next(model.parameters()).device
    parts = [range(first, min(first + PROMPTS_PER_STREAM, len(prompts)))
             for first in range(0, len(prompts), PROMPTS_PER_STREAM)]

    def sample_part(part):
        stream = np.random.SeedSequence([*np.atleast_1d(seed), part.start // PROMPTS_PER_STREAM])
        generator = new_generator(device, int(stream.generate_state(1)[0]))
        responses = model.generate([prompts[i] for i in part], max_new_tokens, temperature, stop,
                                   generator)
        bar.update(len(part))
        return responses

    with progress_bar(total=len(prompts), desc=desc) as bar, compute():
        return in_shares(sample_part, parts)


# ------------------------------------------------------------------ samples that were cut off


def with_end(prompt, sample, end, block_size):
    """Returns a prompt and a sample (token ids) as a reward model was trained to read them: the
    sample ends in the end-of-text token `end`. One that was cut off gets it. Where block_size has
    no room for it, the prompt loses its start; if the prompt is down to one token, the sample loses
    its last ones."""
    if was_cut_off(sample, end):
        sample = [*sample[:block_size - 2], end]
    return prompt[-(block_size - len(sample)):], sample


def was_cut_off(sample, end):
    """Returns whether a sample stopped at max_new_tokens or at block_size, not in end-of-text."""
    return len(sample) == 0 or sample[-1] != end


def count_cut_off(name, samples, end, max_new_tokens, then):
    """Prints how many samples were cut off, as a warning if they are more than 5%. name: whose
    samples; end: the end-of-text token; then: what becomes of them. Returns (N,) bool."""
    cut = np.array([was_cut_off(sample, end) for sample in samples])
    at_limit = cut & np.array([len(sample) >= max_new_tokens for sample in samples])
    say_cut_off(name, len(cut), max_new_tokens, int(at_limit.sum()), int((cut & ~at_limit).sum()),
                then)
    return cut


def say_cut_off(name, n, max_new_tokens, n_at_limit, n_at_block_size, then):
    """Prints how many of n samples were cut off, if any were, at max_new_tokens and at
    block_size."""
    n_cut = n_at_limit + n_at_block_size
    if not n_cut:
        return
    places = {f"--max_new_tokens={max_new_tokens}": n_at_limit, "block_size": n_at_block_size}
    where = " and ".join(f"{number} at {place}" for place, number in places.items() if number)
    line = (f"{name}: {n_cut} of {n} samples ({n_cut / n:.1%}) were cut off before their "
            f"end-of-text token, {where}: {then}")
    if n_cut > MANY_CUT_OFF * n:
        line = f"warning: {line}"
        line += "; a higher --max_new_tokens cuts off fewer" if n_at_limit else ""
    tqdm.write(line, file=sys.stdout)           # there may be a progress bar


# ------------------------------------------------------------------ kept on disk


def cached(folder, name, entry, function, *args, **options):
    """Returns function(*args, **options), an array or a value that JSON can hold. Computes it once;
    later it comes from folder/name-entry.npz. InputError if a number in it is not finite."""
    path = os.path.join(folder, f"{name}-{entry}.npz")
    if is_first():
        remove_leftovers(folder)
    value = read_value(path)
    if first_says(value is not None):
        print(f"{name}: from {path}")
        return value
    value = function(*args, **options)
    try:
        arrays = to_arrays(value)
    except ValueError as error:
        raise InputError(f"{name}: the model gives numbers that are not finite") from error
    if is_first():
        write_arrays(path, arrays)
    wait()
    return value


def to_arrays(value):
    """Returns {kind: array} of a value to keep. ValueError if a number is not finite."""
    if not isinstance(value, np.ndarray):
        return {"json": np.frombuffer(json.dumps(value, allow_nan=False).encode(), np.uint8)}
    if not np.isfinite(value).all():
        raise ValueError
    return {"array": value}


def write_arrays(path, arrays):
    """Writes arrays to a file. If that is not possible (the disk is full, or the folder belongs to
    somebody else), they will be computed again next time, which is no reason to stop."""
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with replacing(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, **arrays)
    except (InputError, OSError) as error:
        print(f"warning: not kept for the next run: {error}")


def read_value(path):
    """Returns the value in a cached file; None if there is no file, or it is damaged."""
    try:
        with np.load(path) as arrays:       # compares the checksums in the file
            if "array" in arrays:
                return arrays["array"]
            return json.loads(arrays["json"].tobytes())
    except FileNotFoundError:
        return None
    except Exception as error:      # numpy and zipfile raise many kinds
        reason = error.strerror if isinstance(error, OSError) else "damaged"
        print(f"{path}: {reason}, so it is computed again")
        return None


def cache_folder(init_from, out_dir):
    """Returns the folder for a reference's scores and samples: in its own folder, so that all
    policies trained from it share them. For a hub name, or where nothing can be written next to the
    reference, in the run's folder."""
    cache = os.path.join(init_from, "cache")
    folder = cache if os.path.lexists(cache) else init_from
    if os.path.isdir(folder) and os.access(folder, os.W_OK):
        return cache
    return os.path.join(out_dir, "cache")


def key(*parts):
    """Returns a short hash of bytes, arrays and printable values, for the names of cached files."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            part = part.tobytes()
        digest.update(part if isinstance(part, bytes) else repr(part).encode())
        digest.update(b"\0")
    return digest.hexdigest()[:16]


def hash_weights(model):
    """Returns a hash of all tensors of a model and of their names. Of a frozen weight, which may be
    large and which several adapters may share, the hash is computed once."""
    digest = hashlib.sha256()
    frozen = {name: weight for name, weight in model.named_parameters(remove_duplicate=False)
              if not weight.requires_grad}
    for name, tensor in model.state_dict().items():
        content = hash_frozen(frozen[name]) if name in frozen else content_of(tensor)
        digest.update(name.encode() + content)
    return digest.hexdigest()


def content_of(tensor):
    return whole(tensor.detach()).numpy().tobytes()


def hash_frozen(weight):
    """Returns a hash of a weight, which is kept in an attribute of it until the weight changes."""
    version, kept = getattr(weight, "kept_hash", (None, None))
    if version != weight._version:
        kept = hashlib.sha256(content_of(weight)).digest()
        weight.kept_hash = (weight._version, kept)
    return kept


def hash_examples(examples):
    """Returns a hash of examples: (prompt ids, [response ids, ...])."""
    digest = hashlib.sha256()
    for prompt, responses in examples:
        for ids in (prompt, *responses):
            digest.update(np.asarray(ids, np.int32).tobytes() + b"|")
        digest.update(b"\n")
    return digest.hexdigest()
