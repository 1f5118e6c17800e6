"""A model over a whole data set, once: scores and samples."""
import contextlib
import sys

import numpy as np
import torch
from tqdm import tqdm

from support.device import FEW_SHAPES, new_generator, round_up
from support.flags import InputError
from support.processes import add_up, in_shares, progress_bar, share_in_step
from support.sharding import gathered

TOKENS_PER_BATCH, PROMPTS_PER_STREAM = 16_384, 1024
MANY_CUT_OFF = 0.05         # a larger share of samples without an end is worth a warning


@torch.no_grad()
def score(model, dataset, autocast=contextlib.nullcontext, multiple=1, desc="score"):
    """model(batch) for all rows of a data set, the longest first: log-probs from a policy, rewards
    from a reward model. Returns (N, K) float32."""
    device = next(model.parameters()).device
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
            batch = dataset.batch(np.resize(rows, n) if same_n else rows, multiple).to(device)
            with autocast():
                values = model(batch).float().cpu().numpy()[:len(rows)]
            if mine:        # as many columns as this batch has responses, at most K
                scores[rows, :values.shape[1]] = values
            bar.update()
    return add_up(scores)


def sample(model, prompts, max_new_tokens, stop, seed, temperature=1.0,
           autocast=contextlib.nullcontext, desc="sample"):
    """One response for each prompt. prompts: lists of token ids; where one leaves no room for
    max_new_tokens, its response is cut off. seed: a number or several. Returns lists of token ids.

    The random numbers come from generators of their own, one for each thousand prompts: sampling
    never touches the training's, and does not depend on the number of processes.
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

    with progress_bar(total=len(prompts), desc=desc) as bar, autocast():
        return in_shares(sample_part, parts)


def stream(policy, name, tokenizer, ids, args):
    """Prints --n replies to a prompt (token ids), each token as it is drawn. Returns the text of
    the last."""
    generator = new_generator(next(policy.parameters()).device, args.seed)
    for _ in range(args.n):
        print(f"[{name}]", end="", flush=True)
        reply = stream_reply(policy, tokenizer, ids, args, generator)
    return to_text(reply, tokenizer)


def stream_reply(policy, tokenizer, ids, args, generator):
    """Prints one reply, each token as it is drawn. Returns its tokens."""
    drawn, printed = [], ""

    def on_token(tokens):
        nonlocal printed
        drawn.append(tokens[0])
        text = to_text(drawn, tokenizer)
        if not text.endswith("\ufffd"):     # a letter may be several tokens: wait for all of it
            print(text[len(printed):], end="", flush=True)
            printed = text

    reply, = policy.generate([ids], args.max_new_tokens, args.temperature, tokenizer.eot_token,
                             generator, on_token=on_token, top_k=args.top_k, top_p=args.top_p)
    ending = "" if reply[-1] == tokenizer.eot_token else " ..."
    print(to_text(reply, tokenizer)[len(printed):] + ending + "\n")
    return reply


def prompt_room(model, max_new_tokens):
    """How many tokens a prompt may have. InputError if that is none."""
    room = model.config.block_size - max_new_tokens
    if room < 1:
        raise InputError(f"--max_new_tokens: {max_new_tokens} leaves no room for a prompt in "
                         f"block_size {model.config.block_size}")
    return room


def with_room(prompts, model, max_new_tokens):
    """The end of each prompt (token ids) that leaves room for max_new_tokens; says how many lose
    their start."""
    room = prompt_room(model, max_new_tokens)
    n_cut = sum(len(prompt) > room for prompt in prompts)
    if n_cut:
        print(f"{n_cut} of {len(prompts)} prompts lose their start: {max_new_tokens} new tokens in "
              f"block_size {model.config.block_size} leave room for {room}")
    return [prompt[-room:] for prompt in prompts]


def with_end(prompt, sample, end, block_size):
    """Returns a prompt and a sample (token ids) as a reward model was trained to read them: the
    sample ends in the end-of-text token `end`. One that was cut off gets it. Where block_size has
    no room for it, the prompt loses its start; if the prompt is down to one token, the sample loses
    its last ones."""
    if was_cut_off(sample, end):
        sample = [*sample[:block_size - 2], end]
    return prompt[-(block_size - len(sample)):], sample


def was_cut_off(sample, end):
    """Tells whether a sample stopped at max_new_tokens or at block_size, not in end-of-text."""
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


def to_text(response, tokenizer):
    """A sample as text, without its end-of-text token, nor ids that a vocabulary padded beyond the
    tokenizer's lets a model sample."""
    return tokenizer.decode([token for token in response
                             if token != tokenizer.eot_token and token < tokenizer.n_vocab])
