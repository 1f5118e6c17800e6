"""Computes columns of a data set: for each row, scores by a model or responses sampled from it.
Keeps them on disk, in files named by a hash of what they depend on. Checks them before the first
step, which costs little and catches most mistakes."""
import contextlib
import hashlib
import json
import os
import sys
from itertools import chain

import numpy as np
import torch
from tqdm import tqdm

from support.device import (
    PROCESSES,
    RANK,
    add_up,
    all_shares,
    compute,
    computing,
    in_float32,
    new_generator,
    own_share,
    progress_bar,
    round_up,
    unsharded,
    wait,
    whole_on_cpu,
)
from support.flags import InputError
from support.run import remove_leftovers, replacing

TOKENS_PER_BATCH, PROMPTS_PER_STREAM = 16_384, 1024
MANY_CUT_OFF = 0.05         # a larger share of samples without an end is worth a warning
SOME = 16                   # rows whose log-probs are computed in float32 as well


def score(model, dataset, desc="score"):
    """Returns model(batch) for all rows of a data set, (N, K) float32: log-probs from a policy,
    rewards from a reward model."""
    device = next(model.parameters()).device
    scores = np.zeros(dataset.response_lengths().shape, np.float32)         # (N, K)
    for rows, values in over_rows(model, dataset, device, desc):
        scores[rows, :values.shape[1]] = values     # as many columns as these rows' responses
    return scores


@torch.no_grad()
def over_rows(function, dataset, device, desc):
    """Calls function(batch) for all rows of a data set, those of similar length together, the
    longest first. Returns [(rows, their values)], float32 arrays."""
    sizes = dataset.row_lengths()
    order = np.argsort(-sizes, kind="stable")
    parts, done = [], 0
    while done < len(order):
        n = max(1, TOKENS_PER_BATCH // round_up(sizes[order[done]], computing.multiple))
        rows = order[done:done + n]
        parts.append(np.resize(rows, n) if computing.few_shapes else rows)      # repeats rows
        done += n
    values = {}
    with progress_bar(total=len(parts), desc=desc) as bar:
        for part in own_share(len(parts)):
            batch = dataset.batch(parts[part]).to(device)
            with compute():
                values[part] = function(batch).float().cpu().numpy()
            bar.update()
    return list(zip(parts, all_shares(values)))


def add_frozen(dataset, model, cache, name):
    """Adds the column `below` to a data set if the model has frozen layers (--freeze). What they
    compute does not change, so it is computed once, and kept on disk.

    cache: the folder for that. name: the data set's split.
    """
    n, sizes = model.transformer.frozen, dataset.row_lengths()
    if n:
        check_memory(int(sizes.sum()), model.config.n_embd)
        entry = key(hash_model(model), n, hash_examples(dataset.examples), computing.dtype)
        states = cached(cache, f"{name}-frozen", entry, frozen_states, model, dataset)
        dataset.below = np.split(states, np.cumsum(sizes)[:-1])             # N (T, C)


def check_memory(n_tokens, width):
    """Raises InputError if the column `below` can't fit this machine's memory: 4 bytes for each of
    `width` numbers a token, twice while it is computed."""
    needed, memory = 8 * n_tokens * width, None
    with contextlib.suppress(AttributeError, OSError, ValueError):      # Windows does not tell
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if memory is not None and needed > memory:
        raise InputError(f"--freeze: to keep what the frozen layers make of {n_tokens:,} tokens "
                         f"takes {needed / 2 ** 30:.3g} GiB of memory, and this machine has "
                         f"{memory / 2 ** 30:.3g}; take fewer rows, or leave --freeze out")


class HighestFrozenLayer(Exception):
    """Ends a forward pass above the highest frozen layer."""


def frozen_states(model, dataset):
    """Computes what the frozen layers make of every token of a data set. Returns (tokens of all
    rows, C) float32."""
    transformer, sizes = model.transformer, dataset.row_lengths()
    device, outputs = next(model.parameters()).device, []

    def keep(layer, inputs, output):
        outputs.append(output)
        raise HighestFrozenLayer

    def states_of(batch):
        with contextlib.suppress(HighestFrozenLayer):
            model(batch)
        return outputs.pop()                                                # (B, T, C)

    hook = transformer.h[transformer.frozen - 1].register_forward_hook(keep)
    states = np.zeros((sizes.sum(), transformer.config.n_embd), np.float32)
    starts = np.cumsum(sizes) - sizes
    for rows, values in over_rows(states_of, dataset, device, "frozen layers"):
        for row, of_row in zip(rows, values):
            states[starts[row]:starts[row] + sizes[row]] = of_row[:sizes[row]]
    hook.remove()
    return states


def sample(model, prompts, max_new_tokens, stop, seed, temperature=1.0, desc="sample"):
    """Samples one response to each prompt; both are lists of token ids. stop: the token or tokens
    that end a response. seed: a number or several. Every thousand prompts have their own
    generator, so sampling neither changes the training nor depends on the number of processes."""
    model = unsharded(model)
    device = next(model.parameters()).device
    parts = [prompts[first:first + PROMPTS_PER_STREAM]
             for first in range(0, len(prompts), PROMPTS_PER_STREAM)]
    responses = {}
    with progress_bar(total=len(prompts), desc=desc) as bar, compute():
        for part in own_share(len(parts)):
            stream = np.random.SeedSequence([*np.atleast_1d(seed), part])
            generator = new_generator(device, int(stream.generate_state(1)[0]))
            responses[part] = model.generate(parts[part], max_new_tokens, temperature, stop,
                                             generator)
            bar.update(len(parts[part]))
    return list(chain.from_iterable(all_shares(responses)))


# ------------------------------------------------------------------ samples that were cut off


def with_end(prompt, sample, ends, block_size):
    """Returns a prompt and a sample (token ids) as a reward model was trained to read them. The
    sample ends in the first of `ends`, the tokens that end a text: it is appended, or replaces
    another of them. To make room in block_size, the prompt loses its start, down to one token, and
    then the sample its last tokens."""
    if not was_cut_off(sample, ends):
        sample = sample[:-1]
    sample = [*sample[:block_size - 2], ends[0]]
    return prompt[-(block_size - len(sample)):], sample


def was_cut_off(sample, ends):
    """Returns whether a sample stopped at max_new_tokens or at block_size, without one of `ends`,
    the tokens that end a text."""
    return len(sample) == 0 or sample[-1] not in ends


def count_cut_off(name, samples, ends, max_new_tokens, then):
    """Prints how many samples were cut off, as a warning if they are more than 5%. name: whose they
    are. ends: the tokens that end a text. then: what becomes of those, as text. Returns which were
    cut off, (N,) bool."""
    cut = np.array([was_cut_off(sample, ends) for sample in samples])
    at_limit = cut & np.array([len(sample) >= max_new_tokens for sample in samples])
    print_cut_off(name, len(cut), max_new_tokens, int(at_limit.sum()), int((cut & ~at_limit).sum()),
                then)
    return cut


def print_cut_off(name, n, max_new_tokens, n_at_limit, n_at_block_size, then):
    """Prints how many of n samples were cut off, if any were, at max_new_tokens and at
    block_size."""
    n_cut = n_at_limit + n_at_block_size
    places = {f"--max_new_tokens={max_new_tokens}": n_at_limit, "block_size": n_at_block_size}
    where = " and ".join(f"{number} at {place}" for place, number in places.items() if number)
    many = n_cut > MANY_CUT_OFF * n
    if n_cut:       # tqdm: there may be a progress bar
        tqdm.write("warning: " * many + f"{name}: {n_cut} of {n} samples ({n_cut / n:.1%}) were "
                   f"cut off before their end-of-text token, {where}: {then}"
                   + "; a higher --max_new_tokens cuts off fewer" * (many and n_at_limit > 0),
                   file=sys.stdout)


# ------------------------------------------------------------------ kept on disk


def cached(folder, name, entry, function, *args, **options):
    """Returns function(*args, **options): an array, {name: array}, or a value that JSON can hold.
    It is computed once, and later read from folder/name-entry.npz. If that can't be written (the
    disk is full, or the folder belongs to somebody else), a warning says so. InputError if a number
    in it is not finite."""
    path = os.path.join(folder, f"{name}-{entry}.npz")
    value = read_value(path)
    if add_up({"read": value is not None})["read"] == PROCESSES:        # all decide alike
        print(f"{name}: from {path}")
        return value
    value = function(*args, **options)
    arrays = value if isinstance(value, dict) else {"array": value}
    try:
        if not isinstance(value, (np.ndarray, dict)):
            text = json.dumps(value, allow_nan=False)
            arrays = {"json": np.frombuffer(text.encode(), np.uint8)}
        elif isinstance(value, np.ndarray) and not np.isfinite(value).all():
            raise ValueError
    except ValueError as error:
        raise InputError(f"{name}: the model gives numbers that are not finite") from error
    if RANK == 0:
        try:
            os.makedirs(folder, exist_ok=True)
            remove_leftovers(folder)
            with replacing(path) as temporary, open(temporary, "wb") as file:
                np.savez(file, **arrays)
        except (InputError, OSError) as error:
            print(f"warning: not kept for the next run: {error}")
    wait()
    return value


def read_value(path):
    """Returns the value in a cached file; None if there is no file, or it is damaged."""
    try:
        with np.load(path) as file:         # compares the checksums in the file
            arrays = dict(file)
        if "json" in arrays:
            return json.loads(arrays["json"].tobytes())
        return arrays.get("array", arrays)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except Exception as error:      # numpy and zipfile raise many kinds
        reason = error.strerror if isinstance(error, OSError) else "damaged"
        print(f"{path}: {reason}, so it is computed again")
        return None


def cache_folder(init_from, out_dir):
    """Returns the folder that keeps a reference's scores and samples. It is in the reference's own
    folder, so that all policies trained from it share them, or in the run's, if the reference is on
    the hub or its folder can't be written to."""
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


def hash_model(model):
    """Returns a hash of a model: of its weights, and of the sizes and switches that say what is
    computed with them (two models may differ in nothing but their number of heads)."""
    return key(hash_weights(model), model.config)


def hash_weights(model):
    """Returns a hash of all tensors of a model and of their names. A frozen weight, which may be
    large and shared by several adapters, is hashed once."""
    digest = hashlib.sha256()
    frozen = {name: weight for name, weight in model.named_parameters(remove_duplicate=False)
              if not weight.requires_grad}
    for name, tensor in model.state_dict().items():
        if name in frozen:
            content = hash_frozen(frozen[name])
        else:
            content = whole_on_cpu(tensor).numpy().tobytes()
        digest.update(name.encode() + content)
    return digest.hexdigest()


def hash_frozen(weight):
    """Returns a hash of a weight. It is kept in an attribute of the weight until that changes."""
    version, kept = getattr(weight, "kept_hash", (None, None))
    if version != weight._version:
        kept = hashlib.sha256(whole_on_cpu(weight.detach()).numpy().tobytes()).digest()
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


# ------------------------------------------------------------------ checks before the first step


def check_rounding(policy, dataset, split):
    """Compares the reference's log-probs in bfloat16 (the column ref_logps) with those of a float32
    forward pass, in some rows, and prints how far apart they are. Warns if that is more than 0.5
    nats plus 0.02 for each token of a response: rounding reaches that in models of many layers that
    were themselves trained in bfloat16, where a single token can be off by 2 nats. AssertionError
    if that many are off by more than 0.5 nats plus a fifth of the log-prob that rounding can't
    explain it (more than half), or if one is not a number. policy: still the reference. split: the
    data set's name."""
    rows = np.linspace(0, len(dataset) - 1, min(SOME, len(dataset))).astype(int)
    some = dataset.take(rows)
    some.below = None           # all layers in float32, frozen ones too
    with in_float32():
        exact = score(policy, some, desc="float32")                                 # (rows, K)
    error = np.abs(some.ref_logps - exact)
    far = error > 0.5 + 0.2 * np.abs(exact)
    if far.mean() > 0.5 or not np.isfinite(error).all():
        raise AssertionError(f"the reference's {split} log-probs in bfloat16 differ from those in "
                             f"float32 by up to {error.max():.2g} nats; use --dtype=float32, or "
                             "delete the cache if another version of this code has written it")
    much = (error > 0.5 + 0.02 * some.response_lengths()).any()
    print(("warning: " if much else "") + f"{split} log-probs in bfloat16: within "
          f"{error.max():.1g} nats of float32, in {len(rows)} rows"
          + ("; --dtype=float32 is exact, and slower" if much else ""))


def check_step_0(losses, expected, logps, ref_logps, args):
    """Checks that before step 0 the policy is the reference: its log-probs are the cached ones, and
    the loss is that of the reference itself. Differences that rounding can explain are accepted.

    losses: (P,) of the first micro-batch, before the first update. expected: (P,), the same with
    the reference in the policy's place. logps, ref_logps: (b, K).
    """
    change = (logps - ref_logps).abs().max().item()
    least, relative = (1e-3, 1e-5) if args.dtype == "float32" else (0.5, 1e-3)
    if change > least + relative * ref_logps.abs().max():
        raise AssertionError("before step 0, the policy's log-probs differ from the reference's by "
                             f"up to {change} nats")
    scale = max(1, args.beta or 1, *(args.gamma or ()))
    for name in ("weight", "desirable_weight", "undesirable_weight"):       # of terms in beta * h
        scale *= max(1, getattr(args, name, None) or 1)
    slack = 2 * scale * change + 1e-4       # of beta * h (or its square), or the KL
    wrong = (losses - expected).abs() > (1 + expected.abs()) * slack + slack**2
    if wrong.any():
        raise AssertionError(f"at the reference, {args.loss} is {losses[wrong][0]:.4f}, not "
                             f"{expected[wrong][0]:.4f}")
    print(f"step 0: policy == reference to {change:.0e} nats, {args.loss} loss "
          f"{losses.sum() / len(logps):.4f}")


def check_labels(desirable, args):
    """Prints how many training rows are desirable and how many are not. If one kind outweighs the
    other by half, says which weights would make up for it (Ethayarajh et al. 2024, Sec. 4.2).
    desirable: (N,) bool. InputError if there is only one kind: KTO would move all responses alike.
    """
    wanted, unwanted = int(desirable.sum()), int((~desirable).sum())
    if not wanted or not unwanted:
        raise InputError(f"--data: {args.data}: all {len(desirable)} training rows have the label "
                         f"{bool(wanted)}, and --loss={args.loss} needs both kinds"
                         + "; --loss=sft imitates what people wanted" * bool(wanted))
    line = f"labels: {wanted} desirable, {unwanted} undesirable"
    sums = args.desirable_weight * wanted, args.undesirable_weight * unwanted
    if min(sums) < 2 / 3 * max(sums):
        line += (f", which weigh {sums[0]:g} and {sums[1]:g} in all; "
                 f"--desirable_weight={sums[1] / wanted:.3g} or "
                 f"--undesirable_weight={sums[0] / unwanted:.3g} would make that equal")
    print(line)


def print_spread(rewards, names):
    """Prints how much the margins of each member of a family vary, and warns of one whose margins
    hardly do: while the policy is near the reference, e-DPO's minimum picks it for nearly all
    pairs, whatever it has learnt. rewards: (N, K, M) of the training rows, the best response first.
    names: of the M reward models, or none where the rewards came with the data."""
    better, worse = np.triu_indices(rewards.shape[1], k=1)
    margins = rewards[:, better] - rewards[:, worse]                        # (N, pairs, M)
    spread = margins.std(axis=(0, 1))                                       # (M,)
    names = [f"{m} ({name})" for m, name in enumerate(names or ["score"] * len(spread))]
    print("standard deviation of the margins of each reward model: "
          + ", ".join(f"{name} {value:.3g}" for name, value in zip(names, spread)))
    for name, value in zip(names, spread):
        if value < np.median(spread) / 10:
            print(f"warning: the margins of reward model {name} hardly vary, so that the minimum "
                  "will pick it for nearly all pairs; train it for longer, or leave it out")
