"""Turns rows of text into flat arrays of token ids, kept on disk. Picks the usable rows, and the
prompts that a policy answers."""
import bisect
import hashlib
import math
import os
import re
from array import array
from dataclasses import dataclass
from itertools import chain, islice

import numpy as np

from support.columns import cached, key
from support.flags import InputError
from support.rows import load_rows, row_texts, segments_of
from support.sources import check_is_file, folder_files, name_and_split, open_hub
from support.tokenizer import (
    HH,
    encode_text,
    fingerprint,
    prompt_ids,
    to_text,
)

SAID = set()    # {(data, message)} that have been printed, and are not printed again
LAYOUT = 14     # raise it when the arrays below, or what is read into them, change
SPLITS = np.array(["validation"] * 26 + ["test"] * 26 + ["train"] * 204)    # about 10, 10 and 80%


# ------------------------------------------------------------------ splits


def turn_hashes(prompt):
    """Returns a list of 64-bit hashes of a prompt's beginnings: of a dialogue, what was said before
    each reply of the assistant to a person, and so the whole at last; of other prompts the whole.
    Messages have the hashes of the same dialogue in HH's layout."""
    if isinstance(prompt, str):
        pieces = re.split("(?=\n\nAssistant:)", prompt)
        if pieces[-1].strip() == "Assistant:" and "\n\nHuman:" in prompt:
            del pieces[-1]          # its text is still to come
    else:
        pieces = [""]
        for message in prompt:
            begins = [""] if message["role"] == "assistant" else []
            pieces += begins
            pieces[-1] += HH.render([message])
    digest, hashes, person = hashlib.sha256(), [], False
    for number, piece in enumerate(pieces, 1):
        digest.update(piece.encode())
        person = person or "\n\nHuman:" in piece
        if person or number == len(pieces):
            hashes.append(int.from_bytes(digest.digest()[:8], "big"))
    return hashes


def split_hashes(turns, n_turns):
    """Returns (N,) uint8, a byte for each prompt by which it is split: of the hash of its first
    turn, so that all prompts of a dialogue are in the same split.

    Where many dialogues begin with the same turn, such as a greeting or worked examples, the next
    turn decides. Many are 2 of them and 2% of all; or, where the turn is also a prompt of its own,
    10 of them and 10%. So the bytes depend only on which prompts there are, not on how often or in
    which order. turns: `turn_hashes` of N prompts, one after the other. n_turns: (N,) how many each
    has.
    """
    ends = np.cumsum(n_turns)
    level = np.zeros(len(n_turns), np.int64)
    chosen = turns[ends - n_turns]                                              # (N,)
    whole = turns[ends - 1]                                                     # (N,)
    # A dialogue is a whole prompt with which no other prompt begins.
    _, first_rows = np.unique(whole, return_index=True)
    dialogues = first_rows[~np.isin(whole[first_rows], np.delete(turns, ends - 1))]
    while True:
        # How many dialogues begin with the turns that were chosen for them?
        heads, counts = np.unique(chosen[dialogues], return_counts=True)
        fewest = np.where(np.isin(heads, whole), max(10, 0.1 * len(dialogues)),
                          max(2, 0.02 * len(dialogues)))
        deeper = np.isin(chosen, heads[counts >= fewest]) & (level + 1 < n_turns)
        if not deeper.any():
            return (chosen >> np.uint64(56)).astype(np.uint8)
        level[deeper] += 1
        chosen = turns[ends - n_turns + level]


# ------------------------------------------------------------------ text that a tokenizer can read

LONG = 100_000          # characters; shorter text can be read by every tokenizer
# How other models' special tokens are written, where a text ends
FOREIGN_END = re.compile(r"(</s>|<eos>|<pad>|<end_of_turn>|\[EOS\]|\[PAD\]|\[SEP\]|<\|\w+\|>|"
                         r"<\uff5c[\w\u2581]+\uff5c>)$", re.I)


def preparer(tokenizer):
    """Returns prepare(row, notes) for `load_rows`. It takes the tokenizer's special tokens off the
    end of responses, and counts in `notes` where it did, and where else special tokens are written
    in the text. A row of chat messages gets its "segments". ValueError for a row that the tokenizer
    or its chat template can't read."""
    specials = sorted(tokenizer.special_tokens_set)
    either = "|".join(map(re.escape, sorted(specials, key=len, reverse=True))) or r"(?!)"
    anywhere, end = re.compile(either), re.compile(rf"((?:{either})\s*)+$")

    def without_end(text, taken_off):
        if not text.rstrip().endswith(tuple(specials)):
            return text
        if not end.sub("", text).strip():
            raise ValueError(f"a response is nothing but {text.strip()}")
        taken_off.append(text)
        return end.sub("", text)

    def prepare(row, notes):
        taken_off = []
        if isinstance(row["prompt"], str):
            row["responses"] = [without_end(text, taken_off) for text in row["responses"]]
        else:
            for response in row["responses"]:
                last = without_end(response[-1]["content"], taken_off)
                response[-1] = response[-1] | {"content": last}
            row["segments"] = segments_of(row, tokenizer.template)
            check_written(row, tokenizer.template.source, notes)
        if taken_off:
            notes["{} rows: a special token such as end-of-text is written at the end of a "
                  "response; it is taken off"] += 1
        prompt, responses = row_texts(row)
        written = set(anywhere.findall("\0".join([prompt, *responses])))
        if written:
            notes["warning: special tokens of the tokenizer are written in the text of {} rows; "
                  "there they are read as ordinary text"] += 1
        foreign = {match[0] for text in responses
                   if (match := FOREIGN_END.search(text.rstrip()[-30:]))}
        for token in foreign - written:
            notes[f"warning: a response ends in {token} in {{}} rows; to this tokenizer that is "
                  "ordinary text, which the model would learn to write"] += 1
        for text in (prompt, *responses):
            if len(text) > LONG:
                encode_text(text, tokenizer)

    return prepare


def check_written(row, source, notes):
    """Counts in `notes` what a chat template leaves out of the messages of a row. source: the
    template's. ValueError if that is all of a reply."""
    prompt, responses = row["segments"]
    text = prompt + "".join(map(joined, responses))
    messages = list(chain(row["prompt"], *row["responses"]))
    for message in chain(*row["responses"]):
        if not message["content"] and message.get("tool_calls") and "tool_calls" not in source:
            raise ValueError("a reply is nothing but 'tool_calls', which are not read by the chat "
                             "layout")
    for name in {name for message in messages for name in message if name not in source}:
        notes[f"{{}} rows: {name!r} of their messages is not read by the chat layout"] += 1
    for role in {message["role"] for message in messages
                 if (words := re.findall(r"\w+", message["content"])) and words[-1] not in text}:
        notes[f"warning: in {{}} rows the chat template writes nothing of what {role!r} says"] += 1


# ------------------------------------------------------------------ token ids


def encode(rows, tokenizer):
    """Turns rows (of support/rows.py) into token ids. Every response ends in the end-of-text token,
    which for a model with a chat template is its end of a turn; an empty prompt is that token
    alone. A token of a response that is not learnt is written as its complement, ~token.

    Returns {"tokens": all prompts and responses one after the other, "lengths": (N, 1 + K) tokens
    in each row's prompt and responses, "hash": (N,) `split_hashes`, "scores": (N, K, M) if all rows
    have them, and "desirable": (N,) bool if rows have one response with a label}.
    """
    dtype = np.uint16 if tokenizer.n_vocab <= 2 ** 16 else np.int32
    tokens, lengths, scores, n_unscored, desirable = [], [], [], 0, []
    turns, n_turns = array("Q"), array("i")
    rows = iter(rows)
    while part := list(islice(rows, 1000)):
        ids = list(chain.from_iterable(encode_part(part, tokenizer)))
        columns = len(ids) // len(part)         # 1 + K
        part_tokens = np.fromiter(chain.from_iterable(ids), np.int32)
        tokens.append(part_tokens.astype(dtype if part_tokens.min() >= 0 else np.int32))
        lengths.append(np.array(list(map(len, ids)), np.int32).reshape(-1, columns))
        for row in part:
            hashes = turn_hashes(row["prompt"])
            turns.extend(hashes)
            n_turns.append(len(hashes))
        scored = [row["scores"] for row in part if "scores" in row]
        scores += [np.array(scored, np.float32)] if scored else []
        n_unscored += len(part) - len(scored)
        desirable += [row["desirable"] for row in part if "desirable" in row]
    arrays = {"tokens": np.concatenate(tokens or [np.zeros(0, dtype)]),
              "lengths": np.concatenate(lengths or [np.zeros((0, 1), np.int32)]),
              "hash": split_hashes(np.array(turns, np.uint64), np.array(n_turns, np.int64))}
    if scores and n_unscored:
        print(f"scores: left out, as {n_unscored} of {len(n_turns)} rows have none")
    elif scores:
        arrays["scores"] = np.concatenate(scores)
    if desirable:
        arrays["desirable"] = np.array(desirable)
    return arrays


def encode_part(rows, tokenizer):
    """Yields [prompt ids, response ids, ...] of some rows; see `encode`."""
    segments = [row.get("segments") or segments_of(row, tokenizer.template) for row in rows]
    by_template = [tokenizer.template is not HH and not isinstance(row["prompt"], str)
                   for row in rows]
    texts, further = [], []         # what is text all through: prompts, and what goes on with them
    rendered = []                   # what has a template's special tokens
    for is_rendered, (prompt, responses) in zip(by_template, segments):
        if is_rendered:
            rendered += [prompt, *(prompt + joined(response) for response in responses)]
        else:
            texts.append(prompt)
            further += [text for response in responses for text, _ in response]
    texts = iter(tokenizer.encode_ordinary_batch(texts, num_threads=os.cpu_count()))
    further = iter(tokenizer.encode_inside(further, num_threads=os.cpu_count()))
    rendered = iter(tokenizer.encode_rendered(rendered) if rendered else ())
    end = tokenizer.eot_token
    for is_rendered, (prompt, responses) in zip(by_template, segments):
        prompt_ids = (next(rendered)[0] if is_rendered
                      else tokenizer.start + next(texts) or [end])
        parts = [prompt_ids]
        for response in responses:
            pieces = (cut_out(prompt, prompt_ids, response, *next(rendered), tokenizer)
                      if is_rendered else [next(further) for _ in response])
            ids = [token if learnt else ~token for piece, (_, learnt) in zip(pieces, response)
                   for token in piece]
            parts.append(ids if is_rendered and ids[-1] == end else [*ids, end])
        yield parts


def cut_out(prompt, prompt_ids, response, ids, ends, tokenizer):
    """Cuts the tokens of a rendered prompt and response, which end at `ends`, where the segments
    of the response do. Returns lists of ids, one for each segment."""
    if ids[:len(prompt_ids)] != prompt_ids:     # a token across the border between the two
        texts = [text for text, _ in response]
        return [part for part, _ in tokenizer.encode_rendered(texts, inside=True)]
    place, parts, first = len(prompt), [], len(prompt_ids)
    for text, _ in response:
        place += len(text)
        last = bisect.bisect_right(ends, place)
        parts.append(ids[first:last])
        first = last
    return parts


def joined(segments):
    return "".join(text for text, _ in segments)


# ------------------------------------------------------------------ kept on disk


def tokenised_file(data, tokenizer, demonstrations=False, skip_bad_rows=False):
    """Encodes all rows of a file, a folder or a hub data set. Returns the arrays of `encode`.

    They are kept in the folder NANOPREF_CACHE (default: ~/.cache/nanopref) under a hash of the
    content of the files (of a hub data set: of what `datasets` says of it)."""
    source, split = name_and_split(data)
    check_is_file(source)
    hub = None if os.path.exists(source) else open_hub(data)
    content = hash_content(source, split) if hub is None else hub._fingerprint
    entry = key(LAYOUT, content, split, *fingerprint(tokenizer),
                sorted(tokenizer.special_tokens_set), demonstrations, bool(skip_bad_rows))

    def encode_file():
        said = []       # messages about rows that were left out or changed
        rows = load_rows(data, demonstrations, skip_bad_rows, hub, said.append, preparer(tokenizer))
        arrays = encode(rows, tokenizer)
        if hub is None and hash_content(source, split) != content:
            raise InputError(f"--data: {data}: it changed while it was read; start again when it "
                             "is complete")
        return arrays | {"said": np.array(said, str)}

    home = os.path.expanduser("~/.cache/nanopref").removeprefix("~/")   # without a home: here
    arrays = cached(os.environ.get("NANOPREF_CACHE") or home, "tokens", entry, encode_file)
    for message in arrays.pop("said").tolist():
        if (data, message) not in SAID:
            print(f"{data}: {message}")
        # Said once, although a run reads the data again for each of its parts.
        if message.startswith(("warning: ", "reads ", "columns ")):
            SAID.add((data, message))
    return arrays


def hash_content(path, split=None):
    """Returns a hash of a file, or of the files of a folder that are read and their names.
    InputError if one can't be read, or may have no end."""
    names = folder_files(path, split, str) if os.path.isdir(path) else ["."]
    digest = hashlib.sha256()
    for name in names:
        file = os.path.normpath(os.path.join(path, name))
        check_is_file(file)
        digest.update(name.encode() + b"\0")
        try:
            with open(file, "rb") as opened:
                while part := opened.read(2 ** 20):
                    digest.update(part)
        except OSError as error:
            raise InputError(f"--data: {file}: {error.strerror}") from error
    return digest.hexdigest()


# ------------------------------------------------------------------ which rows are of use


@dataclass
class Examples:
    """Holds rows of `encode`'s arrays: a sequence of (prompt ids, [response ids, ...]), which are
    cut out of the tokens when they are asked for, so that a million rows are a few numbers each.

    tokens   all prompts and responses one after the other; ~token where it is not learnt
    ends     (N, 1 + K) where each row's prompt and responses end
    lengths  (N, 1 + K) how long they are; a prompt may be shorter here, it loses its start
    """
    tokens: np.ndarray
    ends: np.ndarray
    lengths: np.ndarray

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, i):
        parts = zip(self.ends[i].tolist(), self.lengths[i].tolist())
        prompt, *responses = [self.tokens[end - length:end] for end, length in parts]
        return prompt, [response for response in responses if len(response)]

    def take(self, rows):
        """Returns some rows: indices, or a mask."""
        return Examples(self.tokens, self.ends[rows], self.lengths[rows])


def example_lengths(examples):
    """Returns (N, 1 + K) tokens in the prompt and responses of each row, of Examples or of a
    list."""
    if isinstance(examples, Examples):
        return examples.lengths
    columns = 1 + max((len(responses) for _, responses in examples), default=0)
    lengths = np.zeros((len(examples), columns), np.int64)      # 0: there is no such response
    for row, (prompt, responses) in zip(lengths, examples):
        row[:1 + len(responses)] = [len(ids) for ids in (prompt, *responses)]
    return lengths


def fit(arrays, block_size):
    """Returns all rows of `encode` as Examples that fit in block_size. A prompt loses its start to
    make room for its responses, which stay whole. Where they leave none, it has length 0."""
    lengths = arrays["lengths"].copy()
    ends = lengths.ravel().cumsum(dtype=np.int64).reshape(lengths.shape)
    room = block_size - lengths[:, 1:].max(axis=1, initial=0)
    lengths[:, 0] = np.clip(room, 0, lengths[:, 0])
    return Examples(arrays["tokens"], ends, lengths)


def equal_responses(examples):
    """Returns (N,) whether all responses of a row, of Examples, are the same."""
    lengths = examples.lengths[:, 1:]
    equal = (lengths == lengths[:, :1]).all(axis=1) & (lengths.shape[1] > 1)
    for row in np.flatnonzero(equal):
        _, responses = examples[row]
        equal[row] = all(np.array_equal(ids, responses[0]) for ids in responses)
    return equal


def needed_block_size(lengths):
    """Returns the block_size in which 99% of rows fit whole, a multiple of 64. lengths: (N, 1 +
    K)."""
    needed = np.percentile(lengths[:, 0] + lengths[:, 1:].max(axis=1), 99)
    return 64 * math.ceil(needed / 64)


def longest_sample(lengths, block_size, rows):
    """Returns the default of --max_new_tokens, and prints it: what 99% of the responses need. That
    may take the room of 1% of the prompts, and of more only up to half of block_size. lengths: (N,
    1 + K) tokens in the prompt and the responses of each row; rows: which they are."""
    prompt, response = (math.ceil(np.percentile(part, 99)) for part in (lengths[:, 0],
                                                                        lengths[:, 1:]))
    room = max(block_size - prompt, block_size // 2)
    why = f"99% of the {rows} responses " + (
        "are no longer" if response <= room else
        f"need {response}, and prompts their room in block_size {block_size}")
    print(f"--max_new_tokens={min(response, room)}: {why}")
    return min(response, room)


def default_block_size(args, tokenizer):
    """Returns the block_size of a model from scratch, by the demonstrations of --data: what they
    need, from 192 (there is room for a prompt and a sample) to GPT-2's 1024."""
    arrays = tokenised_file(args.data, tokenizer, True, args.skip_bad_rows)
    block_size = min(max(192, needed_block_size(arrays["lengths"])), 1024)
    print(f"{args.data}: block_size {block_size}, by the length of its rows")
    return block_size


def random_order(n):
    """Returns the numbers below n, (n,) int64, in an order that depends on n alone: of a file that
    is sorted, the first rows are a random part, the same for every method and every --seed."""
    return np.random.default_rng([0, 8]).permutation(n)


def select(arrays, block_size, name="data", split=None, unpaired=False):
    """Picks the usable rows of `encode`, in one split or in all. Returns {"examples":
    Examples, "rewards": the scores (N, K, M) or None, "desirable": (N,) or None}. Says how many
    were dropped and why, and how many prompts were cut. A prompt's split goes by its hash: it is
    the same in every file. The rows of a split are in random order. unpaired: whether single
    responses with a label are of use. InputError if there is no such row."""
    if "desirable" in arrays and not unpaired:
        raise InputError(f"--data: {name}: single responses with a label (prompt, completion, "
                         "label), which --loss=kto trains on; all else compares responses, which "
                         "have to stand in chosen and rejected, or in responses")
    rows = np.arange(len(arrays["hash"]))
    if split is not None:
        rows = random_order(len(rows))
        rows = rows[SPLITS[arrays["hash"]][rows] == split]
    examples = fit(arrays, block_size).take(rows)
    fits, equal = examples.lengths[:, 0] > 0, equal_responses(examples)
    kept, examples = rows[fits & ~equal], examples.take(fits & ~equal)
    lengths = arrays["lengths"][kept]
    n_cut = (examples.lengths[:, 0] < lengths[:, 0]).sum()
    message = f"{name}: {len(rows)} rows"
    if not fits.all():
        message += (f", {(~fits).sum()} dropped (a response alone does not fit block_size "
                    f"{block_size})")
    if (fits & equal).any():
        what = "chosen and rejected" if lengths.shape[1] == 3 else "all responses"
        message += f", {(fits & equal).sum()} dropped ({what} are the same)"
    if n_cut:
        message += f", {n_cut} prompts lose their start (block_size {block_size})"
    print(message)
    if not len(kept):
        why = "" if len(rows) or split is None else (
            ": rows go to train, validation and test by a hash of their prompt (all rows of a "
            "dialogue together), and none came here; more distinct prompts are needed")
        raise InputError(f"--data: {name}: no usable row{why}")
    if n_cut > 0.05 * len(kept):
        print(f"warning: {name}: {n_cut / len(kept):.0%} of the prompts lose their start; with "
              f"block_size {needed_block_size(lengths)} it would be 1%")
    columns = {"rewards": arrays.get("scores"), "desirable": arrays.get("desirable")}
    return {"examples": examples, **{column: None if values is None else values[kept]
                                     for column, values in columns.items()}}


def select_file(data, split, tokenizer, block_size, skip_bad_rows, demonstrations=False,
                unpaired=False):
    """Returns what `select` finds in a split of a file."""
    arrays = tokenised_file(data, tokenizer, demonstrations, skip_bad_rows)
    return select(arrays, block_size, f"{data}, {split}", split, unpaired)


def prompts_of(arrays, split):
    """Returns the prompts of a split, each once, as lists of token ids, in random order (in that of
    the rows, those with many rows would come early)."""
    lengths = arrays["lengths"]
    ends = lengths.ravel().cumsum().reshape(lengths.shape)[:, 0]
    rows = np.flatnonzero(SPLITS[arrays["hash"]] == split)
    prompts = [tuple(arrays["tokens"][ends[row] - lengths[row, 0]:ends[row]].tolist())
               for row in rows]
    distinct = list(dict.fromkeys(prompts))
    return [list(distinct[i]) for i in random_order(len(distinct))]


# ------------------------------------------------------------------ prompts to answer


def held_out_prompts(args, tokenizer, post, needed=1):
    """Takes --n_prompts prompts of --split of --data, each once, a random part of those that there
    are; says so if there are fewer. post: tinytldr.post. Returns (texts, lists of token ids, and
    how long the rows of the split are: (N, 1 + K), or None for tinytldr). InputError if fewer
    prompts than needed."""
    if args.data == "tinytldr":
        texts = [post(args.seed, args.split, i) for i in range(args.n_prompts)]
        prompts, lengths = [prompt_ids(text, tokenizer) for text in texts], None
    else:
        demonstrations = vars(args).get("rms") is None      # will do; reward models need pairs
        arrays = tokenised_file(args.data, tokenizer, demonstrations,
                                vars(args).get("skip_bad_rows"))
        there = prompts_of(arrays, args.split)
        lengths = arrays["lengths"][SPLITS[arrays["hash"]] == args.split]
        prompts = there[:args.n_prompts]
        texts = [to_text(prompt, tokenizer) for prompt in prompts]
        if len(there) < args.n_prompts:
            print(f"--n_prompts={args.n_prompts}: the {args.split} split of {args.data} has "
                  f"{len(there)}, which are taken")
    if len(prompts) < needed:
        raise InputError(f"--data, --n_prompts: {len(prompts)} in the {args.split} split of "
                         f"{args.data}; at least {needed} are needed")
    return texts, prompts, lengths


def prompt_tokens(turns, tokenizer, room, chat):
    """Returns what the policy reads, as at most `room` token ids. What does not fit loses its
    start, which is printed. InputError if the tokenizer can't read it.

    turns: the prompts of the person, and the replies to all but the last. Of these the policy reads
    the last; or with `chat` all of them, as a dialogue that waits for the assistant's next reply:
    where they do not fit, the oldest are taken out of the list.
    """
    try:
        "".join(turns).encode()
        while True:
            messages = [{"role": ("user", "assistant")[i % 2], "content": turn.strip()}
                        for i, turn in enumerate(turns)]
            ids = prompt_ids(messages if chat else turns[-1], tokenizer)
            if len(ids) <= room or len(turns) == 1 or not chat:
                break
            del turns[:2]           # what the person said, and the reply to it
    except UnicodeEncodeError as error:     # a terminal's bytes, which may be anything
        raise InputError("the prompt: not UTF-8 text") from error
    except ValueError as error:
        raise InputError(f"the prompt: {error}") from error
    return last_tokens(ids, room)


def last_tokens(ids, room):
    """Returns the last `room` token ids of a prompt. Prints it if the prompt loses its start."""
    if len(ids) > room:
        print(f"(room for {room} of the prompt's {len(ids)} tokens: it loses its start)")
    return ids[-room:]


def prompt_room(model, max_new_tokens):
    """Returns how many tokens a prompt may have. InputError if that is none."""
    room = model.config.block_size - max_new_tokens
    if room < 1:
        raise InputError(f"--max_new_tokens: {max_new_tokens} leaves no room for a prompt in "
                         f"block_size {model.config.block_size}")
    return room


def with_room(prompts, model, max_new_tokens):
    """Returns the end of each prompt (token ids) that leaves room for max_new_tokens; says how many
    lose their start."""
    room = prompt_room(model, max_new_tokens)
    n_cut = sum(len(prompt) > room for prompt in prompts)
    if n_cut:
        print(f"{n_cut} of {len(prompts)} prompts lose their start: {max_new_tokens} new tokens in "
              f"block_size {model.config.block_size} leave room for {room}")
    return [prompt[-room:] for prompt in prompts]
