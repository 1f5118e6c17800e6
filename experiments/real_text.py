"""Repeats the paper's experiment on people's posts and their TL;DR, with a pretrained model.

    python experiments/real_text.py                 # minutes on one GPU, a night on 2 CPU cores
    python experiments/real_text.py --jobs=6 --minutes=7 --rhos=0.2,all --seeds=0,1,2
    python experiments/real_text.py --lora=16 --max_prompt=160 --jobs=2         # without a GPU
    python experiments/real_text.py --draw          # tables and figure of the runs so far
    python experiments/real_text.py --smoke         # all of it on made-up posts, a minute on CPU

A model learns to write summaries from those of the posts' authors (SFT). It is the reference. The
oracle is a reward model trained on people's comparisons. The reference writes summaries of other
posts, and the oracle labels pairs of them. A *cell* is a rho and a seed, which draw training pairs
from these. In each cell there is one reward model, a family of them, and a policy for each method,
at the beta or tau that a small grid has found best (the same in all cells). Policies are judged on
held-out posts by the oracle, by a second oracle, and by ROUGE-L with the author's summary.
docs/real_text.md explains it, and dev/LOG.md, "Real text: the plan", has the questions.

Every run becomes a row of runs.csv as soon as it is finished. If you call the script again, it
skips the runs that are there.
"""
import argparse
import csv
import gc
import json
import os
import re
import resource
import sys
import time
import traceback
from concurrent.futures import FIRST_COMPLETED, wait
from concurrent.futures.process import BrokenProcessPool
from statistics import mean

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np
import torch

import tinytldr
from data import Dataset, biased_subset, get_tokenizer, longer, preferences
from evaluate import answer, compare, interval
from experiments import figure2, trials
from experiments.real_text_report import JUDGE_COLUMNS, JUDGES, LOSSES, METHODS, draw
from losses import needs
from model import GPT, GPTConfig
from reward import RewardModel, judge_samples
from support.columns import sample, score, was_cut_off
from support.device import device_name, setup
from support.flags import (
    InputError,
    Parser,
    comma_separated,
    fraction_or_all,
    in_a_line,
    not_negative_float,
    positive_float,
    positive_int,
    run_script,
    seed,
)
from support.report import markdown_table, read_evaluations, training_curve
from support.rows import load_rows
from support.run import read_json, remove, replacing, run_flags, write_json
from support.tokenizer import own_tokenizer, prompt_ids, save_tokenizer, to_text
from support.tokens import SPLITS, split_hashes, turn_hashes

# ------ the numbers of the experiment: each name is a flag, and the number its default

NUMBERS = dict(
    max_prompt=256,         # longest post, in tokens, that is sampled from or judged on
    sft_prompt=400,         # longest post of SFT
    sft_steps=100,          # of SFT,
    sft_batch_size=32,      # its posts in a step
    oracle_steps=80,        # of the oracle; half of them for the second one, on half of the pairs
    pool=1500,              # posts whose sampled summaries become training pairs
    samples=8,              # summaries of each, which make half as many pairs
    n_pairs=1000,           # training pairs of a cell
    rm_steps=125,           # of each reward model: 2 epochs; the family's on smaller subsets less
    rm_batch_size=16,       # pairs in a step, of the oracles too
    steps=125,              # of each policy: 2 epochs;
    long_steps=375,         # of those at a tenth of the chosen beta: 6 epochs
    batch_size=16,          # its pairs in a step
    checkpoints=3,          # of each policy, of which validation chooses,
    n_eval=128,             # on so many posts
    n_validation=260,       # posts on which betas are chosen
    n_test=260,             # posts on which methods are compared,
    test_samples=2,         # samples of each of these posts,
    validation_samples=2,   # and of each validation post
    max_new_tokens=64,      # longest sample
)
RATES = dict(sft_lr=5e-5, oracle_lr=2e-5, rm_lr=2e-5)
LRS = (5e-6, 2e-5, 5e-5)        # of all policies: what DPO and d-DPO prefer on average
VALUES = (0.05, 0.2, 1)         # of every beta and tau
CHOOSE_RHO, CHOOSE_SEED = 0.2, 1000
COLLAPSING = ("dpo", "e-dpo", "d-dpo", "ipo")       # at a tenth of the chosen beta
SHARDS = 6                      # jobs that sample the pool
COLUMNS = ["run", "purpose", "rho", "seed", "method", "loss", "rewards", "knob", "value", "gamma",
           "n_pairs", "max_steps", "batch_size", "lr", "lora", "freeze", "checkpoint", "n_prompts",
           *[name for judge in JUDGES for name in (judge, f"{judge}_95")], "win_rate", "length",
           "unended", "kl_pi_ref", "kl_ref_pi", "chosen_change", "rejected_change",
           "last_chosen_change", "last_rejected_change", *LOSSES, "seconds", "memory_gb", "device",
           "commit", "reference"]


def parse_flags(argv):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--init_from", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="the pretrained model: "
        "a folder or a name on the hub (default: HuggingFaceTB/SmolLM2-135M-Instruct)")
    add("--posts", default="trl-lib/tldr", help="posts with their authors' summaries: a file or a "
        "name on the hub, with prompt and completion (default: trl-lib/tldr)")
    add("--pairs", default="trl-lib/tldr-preference", help="people's comparisons: a file or a name "
        "on the hub, with prompt, chosen and rejected (default: trl-lib/tldr-preference)")
    add("--rhos", type=comma_separated(fraction_or_all, "fractions, or all"), default=[0.2, "all"],
        help="the length biases of the cells (default: 0.2,all)")
    add("--seeds", type=comma_separated(seed, "seeds"), default=[0, 1, 2], help="the seeds of the "
        "cells (default: 0,1,2)")
    add("--methods", type=comma_separated(str, "methods"), default=list(METHODS),
        help=f"the methods to compare (default: all, which are {','.join(METHODS)})")
    for name, number in (NUMBERS | RATES).items():
        kind = positive_int if name in NUMBERS else positive_float
        add(f"--{name}", type=kind, default=number, help=f"(default: {number:g}; the comments at "
            "the top of this script explain it)")
    add("--lrs", type=comma_separated(positive_float, "rates"), default=list(LRS), help="the "
        f"learning rates to choose from, for policies (default: {','.join(map(str, LRS))})")
    add("--values", type=comma_separated(positive_float, "numbers"), default=list(VALUES),
        help=f"the betas and taus to choose from (default: {','.join(map(str, VALUES))})")
    add("--missing_eos_penalty", type=not_negative_float, default=1.0, help="how much a "
        "sample loses, in standard deviations of the reward, if it was cut off before its "
        "end-of-text token (default: 1)")
    add("--lora", type=positive_int, help="train reward models and policies as adapters of this "
        "rank, next to the reference; the oracles are whole models (default: all are)")
    add("--freeze", type=positive_int, help="train only what is above this many of the lowest "
        "layers, in SFT too, but not in the oracles (default: whole models)")
    add("--flags", default="", help="more flags for all training runs")
    add("--jobs", type=positive_int, default=2, help="how many runs to do at a time, on a GPU too "
        "(default: 2)")
    add("--minutes", type=positive_float, help="begin no run later than this many minutes after "
        "the start")
    add("--out_dir", default="out/real_text", help="the folder for the runs (default: "
        "out/real_text)")
    add("--results", default="out/real_text/results", help="the folder for tables and figure "
        "(default: out/real_text/results)")
    add("--keep_models", action="store_true", help="keep all policies (default: those of the first "
        "cell)")
    add("--draw", action="store_true", help="make tables and figure of the runs that are there, "
        "and train nothing")
    add("--smoke", action="store_true", help="run all of it with a random model and made-up posts, "
        "to see whether it works on this machine")
    parser.add_shared("device", "dtype")
    args = parser.parse_args(argv)
    for name in args.methods:
        if name not in METHODS:
            raise InputError(f"--methods: {name!r} is none of {', '.join(METHODS)}")
    return args


# ------ data: what SFT reads, what is sampled from, and what policies are judged on

def prepare(args):
    """Deals out the posts: writes sft.jsonl and posts.json, {"pool": [[prompt, summary], ...],
    "validation": ..., "test": ...}. Long posts are left out, not cut, and counted."""
    if os.path.exists(f"{args.out_dir}/posts.json"):
        return
    tokenizer = get_tokenizer(own_tokenizer(args.init_from))
    rows = list(load_rows(args.posts, demonstrations=True))
    prompts = [row["prompt"] for row in rows]
    sizes = [len(ids) for ids in tokenizer.encode_ordinary_batch(prompts)]
    turns = [turn_hashes(prompt) for prompt in prompts]
    hashes = split_hashes(np.concatenate([np.array(hashes, np.uint64) for hashes in turns]),
                          np.array([len(hashes) for hashes in turns]))
    parts = {"pool": [], "validation": [], "test": []}
    room = {"pool": args.pool, "validation": args.n_validation, "test": args.n_test}
    sft, seen, n_long = [], set(), 0
    for i in np.random.default_rng(0).permutation(len(rows)):
        prompt, summary = prompts[i], rows[i]["responses"][0]
        part = {"train": "pool"}.get(SPLITS[hashes[i]], SPLITS[hashes[i]])
        if prompt in seen:
            continue
        seen.add(prompt)
        if sizes[i] <= args.max_prompt and len(parts[part]) < room[part]:
            parts[part].append([prompt, summary])
        elif sizes[i] <= args.sft_prompt:
            sft.append({"prompt": prompt, "completion": summary})
        n_long += sizes[i] > args.sft_prompt
    write_rows(f"{args.out_dir}/sft.jsonl", sft)
    write_json(f"{args.out_dir}/posts.json", parts)
    numbers = ", ".join(f"{len(posts)} {part}" for part, posts in parts.items())
    print(f"{len(rows)} posts: {numbers} (of at most {args.max_prompt} tokens), {len(sft)} for SFT "
          f"(at most {args.sft_prompt}), {n_long} left out as longer, "
          f"{len(rows) - len(seen)} as repeated", flush=True)


def write_rows(path, rows):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def posts_of(args, part):
    return read_json(f"{args.out_dir}/posts.json")[part]


# ------ what a worker does

loaded = {}         # models that a worker needs again and again


def model_of(folder, kind, device):
    """Returns the reference or an oracle. Each worker reads it once."""
    if folder not in loaded:
        loaded[folder] = kind.from_pretrained(folder).to(device)
    return loaded[folder]


class Worker:
    """Holds what a job computes with: device, precision, tokenizer, reference, both oracles."""

    def __init__(self, args, number):
        self.number, self.max_new_tokens = number, args.max_new_tokens
        self.missing_eos_penalty = args.missing_eos_penalty
        self.args = argparse.Namespace(
            device=args.device, dtype=args.dtype, seed=number, temperature=1.0,
            max_new_tokens=args.max_new_tokens, missing_eos_penalty=args.missing_eos_penalty)
        self.device = setup(self.args)
        self.tokenizer = get_tokenizer(own_tokenizer(f"{args.out_dir}/sft"))
        self.folder = args.out_dir

    def reference(self):
        return model_of(f"{self.folder}/sft", GPT, self.device)

    def oracle(self, name):
        return model_of(f"{self.folder}/{name}", RewardModel, self.device)

    def encode(self, prompt):
        """Returns the token ids of a post, as they are in training."""
        return prompt_ids(prompt, self.tokenizer)

    def encode_reply(self, text):
        """Returns the token ids of a summary, with the end of text."""
        return [*self.tokenizer.encode_inside([text])[0], self.tokenizer.eot_token]


def train(args, script, folder, *flags, whole=False):
    """Trains with the flags that all runs share. The reference is never an adapter, and an oracle
    (whole) has neither adapters nor frozen layers. On a GPU, where a run takes seconds, no state is
    saved for resuming."""
    parts = []
    if args.lora and not whole and "--loss=sft" not in flags:
        parts.append(f"--lora={args.lora}")
    if args.freeze and not whole:
        parts.append(f"--freeze={args.freeze}")
    states = device_name(args.device) != "cuda"
    seconds = trials.train(script, folder, *flags, *parts, f"--device={args.device}",
                           f"--dtype={args.dtype}", f"--n_eval={args.n_eval}",
                           *args.flags.split(), states=states)
    for parent, _, names in os.walk(folder):
        for name in {"state.pt", "best.pt"} & set(names):
            remove(os.path.join(parent, name))
    return seconds


def train_sft(args):
    train(args, "train_policy", f"{args.out_dir}/sft", "--loss=sft",
          f"--data={args.out_dir}/sft.jsonl", f"--init_from={args.init_from}",
          f"--max_steps={args.sft_steps}", f"--batch_size={args.sft_batch_size}",
          f"--lr={args.sft_lr}", f"--eval_every={args.sft_steps}")


def train_oracle(args, name):
    """Trains the oracle on all of people's comparisons that are for training, or the second oracle,
    with another seed and on half of them."""
    worker, steps, half = Worker(args, 0), args.oracle_steps, []
    if name == "second":
        with trials.silence():
            rows = preferences(args.pairs, "train", worker.tokenizer, worker.reference(), None)
        steps, half = max(1, steps // 2), [f"--n_pairs={len(rows) // 2}", "--seed=1"]
    train(args, "train_rm", f"{args.out_dir}/{name}", f"--init_from={args.out_dir}/sft",
          f"--data={args.pairs}", f"--max_steps={steps}", f"--batch_size={args.rm_batch_size}",
          f"--lr={args.oracle_lr}", f"--eval_every={steps}", *half, whole=True)


def draw_samples(args, part, shard, n_shards):
    """Samples summaries from the reference for a share of the posts of a part: a file of texts,
    None where a sample did not end."""
    path = samples_file(args, part, shard)
    if os.path.exists(path):
        return
    worker = Worker(args, 0)
    prompts = [worker.encode(prompt) for prompt, _ in posts_of(args, part)[shard::n_shards]]
    n = args.samples if part == "pool" else 2
    copies = [prompt for prompt in prompts for _ in range(n)]
    ends = worker.tokenizer.ends
    replies = sample(worker.reference(), copies, args.max_new_tokens, ends, [7, shard])
    texts = [None if was_cut_off(reply, ends) else to_text(reply, worker.tokenizer)
             for reply in replies]
    write_json(path, {"texts": [texts[i:i + n] for i in range(0, len(texts), n)]})


def samples_file(args, part, shard):
    return f"{args.out_dir}/samples/{part}-{shard}.json"


def label(args):
    """Labels all samples by the oracle: writes pairs.json, {"pool": [{"prompt", "chosen",
    "rejected", "lengths"}, ...], "validation": ..., "n_pairs": how many a cell can have}. Pairs
    with a sample that did not end, and ties, are left out and counted."""
    path = f"{args.out_dir}/pairs.json"
    if os.path.exists(path):
        return read_json(path)["said"]
    worker, labelled, said = Worker(args, 0), {}, []
    for part, shards in (("pool", SHARDS), ("validation", 1)):
        posts = posts_of(args, part)
        texts = [None] * len(posts)
        for shard in range(shards):
            texts[shard::shards] = read_json(samples_file(args, part, shard))["texts"]
        usable, n_open, n_equal = [], 0, 0      # [(prompt, [text, text, ...])], two of each pair
        for (prompt, _), replies in zip(posts, texts):
            kept = []
            for pair in zip(replies[::2], replies[1::2]):
                n_open += None in pair
                n_equal += None not in pair and pair[0].strip() == pair[1].strip()
                if None not in pair and pair[0].strip() != pair[1].strip() and all(
                        text.strip() for text in pair):
                    kept += pair
            if kept:
                usable.append((prompt, kept))
        examples = [(worker.encode(prompt), [worker.encode_reply(text) for text in replies])
                    for prompt, replies in usable]                      # a post's pairs as one tree
        rewards = score(worker.oracle("oracle"), Dataset(examples))     # (posts, samples)
        labelled[part], n_ties = [], 0
        for (prompt, replies), (_, ids), values in zip(usable, examples, rewards):
            for i in range(0, len(replies), 2):
                best, other = (i, i + 1) if values[i] > values[i + 1] else (i + 1, i)
                n_ties += values[i] == values[i + 1]
                if values[i] != values[i + 1]:
                    labelled[part].append({
                        "prompt": prompt, "chosen": replies[best], "rejected": replies[other],
                        "lengths": [len(ids[best]), len(ids[other])]})
        if not labelled[part]:
            raise InputError(f"{part}: of {sum(map(len, texts)) // 2} pairs, {n_open} have a "
                             f"sample that did not end in --max_new_tokens={args.max_new_tokens}, "
                             "and the others are ties; is the reference trained (--sft_steps)?")
        sides = longer(np.array([row["lengths"] for row in labelled[part]]))
        said.append(f"{part}: {len(labelled[part])} pairs, the longer one preferred in "
                    f"{(sides == 1).sum() / max(1, (sides != 0).sum()):.0%} of those that have "
                    f"one; left out {n_open} with a sample that did not end, {n_equal} of equal "
                    f"texts, {n_ties} ties")
    lengths = np.array([row["lengths"] for row in labelled["pool"]])
    wanted = [args.n_pairs, len(lengths)]
    for rho in {CHOOSE_RHO, *args.rhos} - {"all"}:
        wanted.append(len(biased_subset(lengths, rho)))
    if min(wanted) < args.n_pairs:
        said.append(f"--n_pairs={args.n_pairs}: there are {min(wanted)} with these labels, which "
                    "each cell takes")
    write_json(path, {**labelled, "n_pairs": min(wanted), "said": said})
    return said


def make_cell(args, cell, rho, number):
    """Writes a cell's pairs: D_rho for training, drawn by the seed, and validation pairs as they
    come (their posts' hashes tell the two apart)."""
    path = f"{args.out_dir}/{cell}/pairs.jsonl"
    if os.path.exists(path):
        return
    pairs = read_json(f"{args.out_dir}/pairs.json")
    n, lengths = pairs["n_pairs"], np.array([row["lengths"] for row in pairs["pool"]])
    if rho == "all":
        rows = np.random.default_rng(number).choice(len(lengths), n, replace=False)
    else:
        rows = biased_subset(lengths, rho, n, number)
    chosen = [pairs["pool"][i] for i in rows] + pairs["validation"]
    write_rows(path, [{name: row[name] for name in ("prompt", "chosen", "rejected")}
                      for row in chosen])


def cell_flags(args, cell, number):
    return [f"--init_from={args.out_dir}/sft", f"--data={args.out_dir}/{cell}/pairs.jsonl",
            f"--seed={number}"]


def train_reward_models(args, cell, rho, number, family):
    """Trains the single reward model of a cell, or its family."""
    make_cell(args, cell, rho, number)
    bias = [f"--bias={figure2.FAMILY}"] if family else []
    train(args, "train_rm", f"{args.out_dir}/{cell}/{'rms' if family else 'rm'}",
          *cell_flags(args, cell, number), f"--max_steps={args.rm_steps}",
          f"--batch_size={args.rm_batch_size}", f"--lr={args.rm_lr}",
          f"--eval_every={args.rm_steps}", *bias)


def rate_judges(args, cell, rho, number):
    """Measures how good the reward models of a cell are, or the oracles (cell None): on people's
    held-out pairs, next to a judge that picks the longer response, and on validation pairs that the
    oracle labelled. Returns rows of judges.csv."""
    worker = Worker(args, 0)
    names = ["oracle", "second"]
    if cell is not None:
        names = [f"{cell}/rm", *[f"{cell}/rms/{bias}" for bias in figure2.FAMILY.split(",")]]
    with trials.silence():
        ref = worker.reference()
        human = [preferences(args.pairs, split, worker.tokenizer, ref, None)
                 for split in ("validation", "test")]
        labelled = read_json(f"{args.out_dir}/pairs.json")["validation"]
    labelled = [Dataset([(worker.encode(row["prompt"]),
                          [worker.encode_reply(row[name]) for name in ("chosen", "rejected")])
                         for row in labelled])]
    rows = []
    for name in names:
        folder = f"{args.out_dir}/{name}"
        model = RewardModel.from_pretrained(folder).to(worker.device)
        row = {"run": name, "rho": rho, "seed": number, "model": name.removeprefix(f"{cell}/")}
        for kind, datasets in (("human", human), ("oracle", labelled)):
            margins = np.concatenate([np.subtract(*score(model, dataset).T)
                                      for dataset in datasets])
            lengths = np.concatenate([dataset.response_lengths() for dataset in datasets])
            values = agreement(margins, lengths[:, 0] - lengths[:, 1])
            row |= {f"{kind}_{what}": value for what, value in values.items()}
        rows.append(row)
    return rows


def agreement(margins, differences):
    """Measures how often a judge prefers the chosen response, with its 95% interval, and how often
    the longer response is the chosen one. A tie counts half. margins, differences: (N,), the
    rewards and lengths of chosen minus rejected responses."""
    right = (margins > 0) + 0.5 * (margins == 0)
    accuracy, half_width = interval(right)
    flat = margins.std() == 0 or differences.std() == 0
    return {"pairs": len(margins), "accuracy": accuracy, "95": half_width,
            "longer": float(((differences > 0) + 0.5 * (differences == 0)).mean()),
            "length_correlation": 0.0 if flat else float(np.corrcoef(margins, differences)[0, 1])}


def rouge_l(text, reference):
    """Computes ROUGE-L F1: finds the longest common subsequence of words, divides its length by
    that of each text, and takes the harmonic mean. Words are runs of letters and digits, in lower
    case, not stemmed."""
    words, others = [re.findall(r"[a-z0-9]+", part.lower()) for part in (text, reference)]
    longest = [0] * (len(others) + 1)           # of the words so far and others[:j]
    for word in words:
        before = longest[:]
        for j, other in enumerate(others, 1):
            longest[j] = before[j - 1] + 1 if word == other else max(before[j], longest[j - 1])
    return 2 * longest[-1] / max(1, len(words) + len(others))


def judge(worker, policy, posts, copies, names, spread=None):
    """Has a policy summarise held-out posts, `copies` times each. A judge reads the samples of a
    post together, as one tree. The scale of a reward model means nothing, so a reward is divided
    by the standard deviation of its judge's rewards for the reference's samples.

    names: of the reward models that judge. spread: these standard deviations, {name: number}, or
    None if the policy is the reference. Returns ({judge or number: (N,) means over copies},
    Dataset of the samples as they were drawn, spread).
    """
    prompts = [worker.encode(prompt) for prompt, _ in posts]
    ends, repeated = worker.tokenizer.ends, [prompt for prompt in prompts for _ in range(copies)]
    samples = sample(policy, repeated, worker.max_new_tokens, ends, [worker.number, 4])
    samples = [samples[i:i + copies] for i in range(0, len(samples), copies)]   # of each post
    cut = np.array([[was_cut_off(reply, ends) for reply in replies] for replies in samples])
    ended = Dataset([
        (prompt, [(reply if was_cut_off(reply, ends) else reply[:-1]) + ends[:1]
                  for reply in replies])
        for prompt, replies in zip(prompts, samples)])
    values = {name: score(worker.oracle(name), ended) for name in names}
    spread = spread or {name: float(rewards.std()) for name, rewards in values.items()}
    for name in names:
        values[name] = values[name] / spread[name] - worker.missing_eos_penalty * cut
    values["rouge"] = np.array([[rouge_l(to_text(reply, worker.tokenizer), summary)
                                 for reply in replies]
                                for replies, (_, summary) in zip(samples, posts)])
    values |= {"length": np.array([list(map(len, replies)) for replies in samples]),
               "unended": cut}                                              # all (N, copies)
    own = Dataset(list(zip(prompts, samples)))
    return {name: value.mean(axis=1) for name, value in values.items()}, own, spread


def judges_of(split):
    """Names the reward models that judge a split: betas are chosen by the oracle alone."""
    return ["oracle", "second"] if split == "test" else ["oracle"]


def samples_of_each(args, split):
    return args.test_samples if split == "test" else args.validation_samples


def reference_file(args, split, number):
    return f"{args.out_dir}/judged/{split}-{number}.json"


def judge_reference(args, split, number):
    """Writes a file with the reference's own summaries, with which those of all policies are
    compared. Returns two rows: of the reference, and of the authors' summaries."""
    worker, posts = Worker(args, number), posts_of(args, split)
    ref = worker.reference()
    names = judges_of(split)
    values, own, spread = judge(worker, ref, posts, samples_of_each(args, split), names)
    write_json(reference_file(args, split, number), {
        "spread": spread, "values": {name: value.tolist() for name, value in values.items()},
        "samples": [[list(map(int, reply)) for reply in replies] for _, replies in own.examples],
        "logps": score(ref, own).tolist() if split == "test" else None})
    authors = [worker.encode_reply(summary) for _, summary in posts]
    dataset = Dataset([(worker.encode(prompt), [reply])
                       for (prompt, _), reply in zip(posts, authors)])
    by_authors = {name: score(worker.oracle(name), dataset)[:, 0] / spread[name]
                  for name in names}
    by_authors["length"] = np.array(list(map(len, authors)))
    rows = []
    for method, numbers in (("sft", values), ("authors", by_authors)):
        row = {"run": f"{split}/{number}/{method}", "purpose": "reference", "seed": number,
               "method": method, "n_prompts": len(posts),
               "length": float(numbers["length"].mean())}
        if method == "sft":
            row["unended"] = float(numbers["unended"].mean())
            row["rouge"] = float(numbers["rouge"].mean())
        for name in names:
            row[name], row[f"{name}_95"] = interval(numbers[name] - values[name])
        rows.append({**row, "by_prompt": numbers})
    return rows


def policy_run(args, run, purpose, cell, number, method, value, lr):
    """Trains a policy and judges it: on test posts, or to choose its beta (purpose "rate" or
    "grid") on validation posts. value, lr: None for those that were chosen. Returns a row."""
    start = time.time()
    chosen = {} if value and lr else read_json(f"{args.results}/chosen.json")
    loss, rewards, flags = METHODS[method]
    knob = figure2.KNOB[loss]
    lr = lr or chosen["lr"]
    if not value:
        value = chosen["value"][loss] / (10 if purpose == "collapse" else 1)
    folder = f"{args.out_dir}/{run}"
    flags = [*flags, f"--loss={loss}", f"--{knob}={value:g}", *cell_flags(args, cell, number)]
    if rewards:
        flags.append(f"--rewards={args.out_dir}/{cell}/{rewards}")
    split = "validation" if purpose in ("rate", "grid") else "test"
    before = read_json(reference_file(args, split, number))
    select = purpose != "collapse" and args.checkpoints > 1
    if select:
        penalty = args.missing_eos_penalty * before["spread"]["oracle"]
        flags += [f"--select={args.out_dir}/oracle", f"--missing_eos_penalty={penalty:g}"]
    if select or "p-dpo" in loss or loss == "e-dpo":            # it samples
        flags.append(f"--max_new_tokens={args.max_new_tokens}")
    steps = args.long_steps if purpose == "collapse" else args.steps
    train(args, "train_policy", folder, *flags, f"--max_steps={steps}",
          f"--batch_size={args.batch_size}", f"--lr={lr:g}",
          f"--eval_every={-(-steps // args.checkpoints)}")

    worker, posts = Worker(args, number), posts_of(args, split)
    policy = GPT.from_pretrained(folder).to(worker.device)
    values, own, _ = judge(worker, policy, posts, samples_of_each(args, split), judges_of(split),
                           before["spread"])
    row = {"run": run, "purpose": purpose, "rho": cell.split("/")[0], "seed": number,
           "method": method, "loss": loss, "rewards": rewards, "knob": knob, "value": value,
           "lr": lr, "lora": args.lora, "freeze": args.freeze, "n_prompts": len(posts),
           "length": float(values["length"].mean()), "unended": float(values["unended"].mean()),
           "device": hardware(worker.device)}
    for name in set(JUDGES) & set(values):
        row[name], row[f"{name}_95"] = interval(values[name] - np.array(before["values"][name]))
    if split == "test":
        of_ref = Dataset([(prompt, samples) for (prompt, _), samples
                          in zip(own.examples, before["samples"])],
                         ref_logps=np.array(before["logps"], np.float32))
        difference = values["oracle"] - before["values"]["oracle"]
        numbers = compare(policy, worker.reference(), own, of_ref, difference, 1)
        row |= {name: numbers[name] for name in ("win_rate", "kl_pi_ref", "kl_ref_pi")}
    trained_with = run_flags(folder)
    row |= {name: trained_with[name] for name in ("gamma", "max_steps", "batch_size")
            if name in trained_with}
    row["n_pairs"] = read_json(f"{args.out_dir}/pairs.json")["n_pairs"]
    if method == "balanced":
        row["n_pairs"] = "its balanced subset"
    steps, chosen_change, rejected_change, best = training_curve(folder)
    row |= {"checkpoint": steps[best], "chosen_change": chosen_change[best],
            "rejected_change": rejected_change[best], "last_chosen_change": chosen_change[-1],
            "last_rejected_change": rejected_change[-1], **losses_of(folder)}
    if not (args.keep_models or run in kept_for_samples(args)):
        remove(f"{folder}/model.safetensors")
    del policy
    return [{**row, "seconds": time.time() - start, "by_prompt": values}]


def losses_of(folder):
    """Reads from a policy's metrics.jsonl its loss at the first step, where it is the reference,
    and at the last: {column: number} for training and validation pairs."""
    evaluations = read_evaluations(folder)
    return {f"{part}_loss_{when}": line[f"{part}/loss"] for part in ("train", "validation")
            for when, line in (("first", evaluations[0]), ("last", evaluations[-1]))}


def hardware(device):
    return torch.cuda.get_device_name() if device.type == "cuda" else device.type


def kept_for_samples(args):
    """Lists the runs whose policies are kept: those of the first cell."""
    return [run_name(args.rhos[0], args.seeds[0], method) for method in args.methods]


def run_name(rho, number, method):
    return f"{rho}/{number}/{method}"


def choose_rate(args):
    """Chooses the learning rate of all policies: the one with the highest validation advantage, as
    a mean over the losses that tried it, or the only one. Writes it to chosen.json."""
    if len(args.lrs) == 1:
        write_json(f"{args.results}/chosen.json", {"lr": args.lrs[0]}, indent=1)
        return [f"learning rate {args.lrs[0]:g}, as --lrs says"]
    reached = {}
    for row in figure2.read_rows(f"{args.results}/runs.csv"):
        if row["purpose"] == "rate":
            reached.setdefault(float(row["lr"]), []).append(float(row["oracle"]))
    best = max(args.lrs, key=lambda lr: mean(reached[lr]))
    write_json(f"{args.results}/chosen.json", {"lr": best, "rates": reached}, indent=1)
    return [f"learning rate {best:g}, of " + ", ".join(
        f"{lr:g} ({mean(values):+.2f})" for lr, values in sorted(reached.items()))]


def choose_values(args):
    """Chooses each loss's beta or tau by its validation advantage. Adds it to chosen.json."""
    record = read_json(f"{args.results}/chosen.json")
    reached = {}
    for row in figure2.read_rows(f"{args.results}/runs.csv"):
        if row["purpose"] == "grid":
            reached.setdefault(row["loss"], {})[float(row["value"])] = float(row["oracle"])
    record["value"] = {loss: max(values, key=values.get) for loss, values in reached.items()}
    write_json(f"{args.results}/chosen.json", {**record, "grid": reached}, indent=1)
    return [f"{loss}: {figure2.KNOB[loss]} {record['value'][loss]:g}, of " + ", ".join(
        f"{value:g} ({advantage:+.2f})" for value, advantage in sorted(values.items()))
        for loss, values in reached.items()]


# ------ jobs: in order of importance, each begins when those before it are done

def columns_by(method, run, shared):
    """Lists the earlier runs that compute what this run needs too, and then is on disk: samples for
    the KL, and the rewards of its reward models. shared: {column: the first run of the cell that
    computes it}, to which this run is added."""
    loss, rewards, _ = METHODS[method]
    columns = [column for column in ("kl" if "kl" in needs(loss) else None, rewards) if column]
    return [first for first in dict.fromkeys(shared.setdefault(column, run) for column in columns)
            if first != run]


def plan(args):
    """Lists the jobs. Returns {name: (function, arguments, names of the jobs that it needs)}."""
    jobs = {"sft": (train_sft, (), [])}
    parts = [("pool", shard, SHARDS) for shard in range(SHARDS)] + [("validation", 0, 1)]
    for part in parts:
        jobs[f"samples {part[0]} {part[1]}"] = (draw_samples, part, ["sft"])
    jobs["oracle"] = (train_oracle, ("oracle",), ["sft"])
    jobs["second"] = (train_oracle, ("second",), ["sft"])
    jobs["label"] = (label, (), [name for name in jobs if name not in ("sft", "second")])
    judged = ["label", "second"]

    def add_reward_models(cell, rho, number):
        for name, family in (("rm", False), ("rms", True)):
            jobs[f"{cell}/{name}"] = (train_reward_models, (cell, rho, number, family), ["label"])

    def add_policy(run, purpose, cell, number, method, value=None, lr=None, after=()):
        rewards = METHODS[method][1]
        needed = [f"{cell}/{rewards.split('/')[0]}"] if rewards else [f"{cell}/rm"]
        split = "validation" if purpose in ("rate", "grid") else "test"
        jobs[run] = (policy_run, (run, purpose, cell, number, method, value, lr),
                     [*needed, f"reference {split} {number}", *after])

    def add_long_runs(numbers):
        for number in numbers:
            for method in [method for method in COLLAPSING if method in args.methods]:
                add_policy(f"collapse/{number}/{method}", "collapse", f"{args.rhos[0]}/{number}",
                           number, method, after=["choose values"])

    # The learning rate, then each loss's beta, on pairs of a seed of their own.
    cell = f"{CHOOSE_RHO}/{CHOOSE_SEED}"
    jobs[f"reference validation {CHOOSE_SEED}"] = (
        judge_reference, ("validation", CHOOSE_SEED), judged)
    add_reward_models(cell, CHOOSE_RHO, CHOOSE_SEED)
    middle = args.values[len(args.values) // 2]
    for loss in ("dpo", "d-dpo") if len(args.lrs) > 1 else ():
        for lr in args.lrs:
            add_policy(f"rate/{loss}/{lr:g}", "rate", cell, CHOOSE_SEED, loss, middle, lr)
    jobs["choose rate"] = (choose_rate, (), [name for name in jobs if name.startswith("rate/")])
    jobs["judges: oracles"] = (rate_judges, (None, "", ""), judged)
    for rho in args.rhos[:1]:
        for number in args.seeds:
            add_reward_models(f"{rho}/{number}", rho, number)
    shared = {}
    for loss in dict.fromkeys(METHODS[method][0] for method in args.methods):
        for value in args.values:
            run = f"grid/{loss}/{value:g}"
            add_policy(run, "grid", cell, CHOOSE_SEED, loss, value, None,
                       ["choose rate", *columns_by(loss, run, shared)])
    jobs["choose values"] = (choose_values, (),
                             [name for name in jobs if name.startswith("grid/")])
    for number in args.seeds:
        jobs[f"reference test {number}"] = (judge_reference, ("test", number), judged)

    for rho in args.rhos:
        for number in args.seeds:
            cell = f"{rho}/{number}"
            add_reward_models(cell, rho, number)
            shared = {}
            for method in args.methods:
                run = run_name(rho, number, method)
                add_policy(run, "run", cell, number, method,
                           after=["choose values", *columns_by(method, run, shared)])
            jobs[f"judges: {cell}"] = (rate_judges, (cell, rho, number),
                                       [f"{cell}/rm", f"{cell}/rms"])
        if rho == args.rhos[0]:
            add_long_runs(args.seeds[:1])
    add_long_runs(args.seeds)
    jobs["samples"] = (show_samples, (), [run_name(args.rhos[0], args.seeds[0], method)
                                         for method in args.methods])
    return jobs


def timed(function, *args):
    """Does a job in a worker. Returns (its result, seconds, peak memory in GB)."""
    start, on_gpu = time.time(), torch.cuda.is_initialized()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    try:
        result = function(*args)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20
        if torch.cuda.is_initialized():
            memory = torch.cuda.max_memory_allocated() / 2 ** 30
    finally:
        if torch.cuda.is_initialized():     # leave room for the others
            gc.collect()
            torch.cuda.empty_cache()
    return result, time.time() - start, memory


def run_jobs(args, jobs, done, start):
    """Runs the jobs that are not done, --jobs at a time. A job for which the others leave no memory
    is tried again, once. If a job fails otherwise, a line says so, and jobs that need it are left
    out.

    jobs: see `plan`. done: names, to which those of finished jobs are added. start: when --minutes
    began. Returns the names of those that failed, and of those that were not begun.
    BrokenProcessPool if something has killed a worker."""
    late = False
    waiting = [name for name in jobs if name not in done]
    running, failed, again = {}, [], set()
    with trials.workers(args.jobs) as pool:
        while waiting or running:
            late = late or args.minutes and time.time() - start > 60 * args.minutes
            ready = [] if late else [name for name in waiting if set(jobs[name][2]) <= done]
            for name in ready[:args.jobs - len(running)]:
                function, arguments, _ = jobs[name]
                running[pool.submit(timed, function, args, *arguments)] = name
                waiting.remove(name)
            if not running:
                break
            for job in wait(running, return_when=FIRST_COMPLETED)[0]:
                name = running.pop(job)
                try:
                    result, seconds, memory = job.result()
                except torch.OutOfMemoryError if name not in again else () as error:
                    again.add(name)
                    waiting.append(name)
                    remove(f"{args.out_dir}/{name}")
                    print(f"{name}: to be tried again: {in_a_line(error)}", flush=True)
                    continue
                except BrokenProcessPool:
                    raise
                except Exception as error:      # the others may be of use all the same
                    failed.append(name)
                    print(f"{name} failed: {in_a_line(error)}", flush=True)
                    traceback.print_exception(error)
                    continue
                done.add(name)
                finished(args, name, result, seconds, memory, time.time() - start)
    return failed, waiting


identity = {}       # columns of all tables: of the code, and of the reference's weights


def finished(args, name, result, seconds, memory, now):
    """Writes down the result of a job: rows for the tables, or lines to print."""
    if not identity:
        identity.update(commit=figure2.commit(),
                        reference=trials.weights(f"{args.out_dir}/sft")[:8])
    line = ""
    append(f"{args.results}/stages.csv", [{"job": name, "seconds": seconds, "memory_gb": memory}],
           ["job", "seconds", "memory_gb"])
    if name.startswith("judges"):
        append(f"{args.results}/judges.csv", [{**row, **identity} for row in result], JUDGE_COLUMNS)
        line = "  ".join(f"{row['model']} {row['human_accuracy']:.2f}" for row in result)
        line = f"right on human pairs: {line} (the longer one {result[0]['human_longer']:.2f})"
    elif result and isinstance(result[0], dict):
        by_prompt = [{"run": row["run"], **{
            judge: " ".join(f"{value:.4g}" for value in row["by_prompt"].get(judge, []))
            for judge in JUDGES}} for row in result]
        append(f"{args.results}/by_prompt.csv", by_prompt, ["run", *JUDGES])
        rows = [{**row, "memory_gb": memory, **identity} for row in result]
        append(f"{args.results}/runs.csv",
               [{column: row.get(column) for column in COLUMNS} for row in rows], COLUMNS)
        lines = []
        for row in result:
            second = f", second {row['second']:+.2f}" if "second" in row else ""
            lines.append(f"{row['method']} {row['oracle']:+.2f} ± {row['oracle_95']:.2f}{second}, "
                         f"length {row['length']:.0f}")
        line = "  ".join(lines)
    elif result:
        line = "\n".join(result)
    print(f"[{now:5.0f} s] {name} ({seconds:.0f} s, {memory:.1f} GB) {line}".rstrip(), flush=True)


def append(path, rows, columns):
    """Adds rows to a CSV file, which may be long."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    new = not os.path.exists(path)
    with open(path, "a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns)
        if new:
            writer.writeheader()
        for row in rows:
            writer.writerow({name: f"{value:.5g}" if isinstance(value, float) else value
                             for name, value in row.items()})


# ------ what the policies write

POSTS = (       # made up for this page
    """SUBREDDIT: r/Advice

TITLE: My neighbour keeps borrowing my ladder and never brings it back

POST: I bought a good ladder two years ago to clean the gutters. My neighbour asked for it last \
spring, and I was glad to help. Since then it has lived in his garage. Each time I need it I have \
to ring his bell, and twice he wasn't home, so I paid somebody to do what I could have done in ten \
minutes. He is a kind man and feeds our cat when we travel, so I don't want a quarrel. I thought \
about buying a second one and saying nothing, but that feels silly.

TL;DR:""",
    """SUBREDDIT: r/running

TITLE: Should I still run the half marathon after two weeks of being ill?

POST: I have trained since January for a half marathon that is ten days away. My longest run was \
18 km and I felt great. Then I caught a bad flu and did not run at all for two weeks. Yesterday I \
tried an easy 5 km and had to walk the last part. My friends say that I should start slowly and \
see. My sister, who is a nurse, says to skip it. I can move my place to the race in October for \
15 euros.

TL;DR:""",
    """SUBREDDIT: r/relationships

TITLE: I [27F] found out that my flatmate [25F] reads my letters

POST: We have shared a flat for a year and got on well. Last week I saw that an envelope from my \
bank had been opened and glued again. Yesterday she asked me how my job search was going, and I \
have told nobody about it. The only place where it was written down is a letter on my desk. I want \
to ask her, but our lease runs until summer and I can't afford to move out. My boyfriend says that \
I should put a lock on my door and let it go.

TL;DR:""",
)


def show_samples(args):
    """Writes samples.md: what the reference, DPO and the best other method of the first cell write
    about three posts, and what the oracles say. Returns lines to print."""
    rows = [row for row in figure2.read_rows(f"{args.results}/runs.csv")
            if row["purpose"] == "run" and row["rho"] == str(args.rhos[0])]
    reached = {}
    for row in rows:
        run = run_name(args.rhos[0], args.seeds[0], row["method"])
        if trials.weights(f"{args.out_dir}/{run}"):
            reached.setdefault(row["method"], []).append(float(row["oracle"]))
    if not reached:
        return ["no samples: there are no policies of the first cell"]
    best = max(reached.keys() - {"dpo"} or reached, key=lambda method: mean(reached[method]))
    folders = {"SFT": f"{args.out_dir}/sft"}
    for method in dict.fromkeys(["dpo", best]):
        if method in reached:
            run = run_name(args.rhos[0], args.seeds[0], method)
            folders[method] = f"{args.out_dir}/{run}"
    worker, parts = Worker(args, 0), []
    # Without the penalty, which is in standard deviations, and which the second oracle, that reads
    # the text again, would not subtract
    asking = argparse.Namespace(**vars(worker.args) | {"missing_eos_penalty": None})
    answers = {}
    for name, folder in folders.items():
        policy = GPT.from_pretrained(folder).to(worker.device)
        prompts = [worker.encode(post) for post in POSTS]
        with trials.silence():
            _, replies, first, _ = answer(
                name, policy, POSTS, prompts, {"oracle": worker.oracle("oracle")},
                worker.tokenizer, asking)
            ids = [worker.encode_reply(reply) for reply in replies]
            second, _ = judge_samples(name, {"second": worker.oracle("second")}, POSTS, prompts,
                                      ids, worker.tokenizer, asking)
        answers[name] = list(zip(replies, first, second))
    for i, post in enumerate(POSTS):
        quoted = post.replace("\n", "\n> ")
        table = [[name, f"{replies[i][1]:+.2f}", f"{replies[i][2]:+.2f}",
                  " ".join(replies[i][0].split())]
                 for name, replies in answers.items()]
        parts.append(f"> {quoted}\n\n"
                     + markdown_table(["policy", "oracle", "second oracle", "summary"], table))
    with replacing(f"{args.results}/samples.md") as temporary:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write("\n\n".join(parts) + "\n")
    return [f"what {', '.join(folders)} write: {args.results}/samples.md"]


# ------ a model and posts that cost nothing

SMOKE = dict(max_prompt=120, sft_prompt=200, sft_steps=60, sft_batch_size=8, sft_lr=1e-2,
             oracle_lr=1e-2, rm_lr=1e-2, oracle_steps=4, pool=40, samples=8, n_pairs=24, rm_steps=4,
             rm_batch_size=8, steps=4, batch_size=8, long_steps=6, checkpoints=2, n_eval=8,
             n_validation=8, n_test=8, test_samples=2, validation_samples=1, max_new_tokens=40,
             lrs=[1e-4, 1e-3], values=[0.1, 1.0])


def make_smoke(args):
    """Makes a random model of two layers, and files with TinyTLDR's posts in place of real ones."""
    tokenizer = tinytldr.tokenizer()
    args.init_from = f"{args.out_dir}/model"
    args.posts, args.pairs = f"{args.out_dir}/in/posts.jsonl", f"{args.out_dir}/in/pairs.jsonl"
    for name, number in SMOKE.items():
        setattr(args, name, number)
    if os.path.exists(args.pairs):
        return
    torch.manual_seed(0)
    config = GPTConfig(block_size=1024, vocab_size=tokenizer.n_vocab, n_layer=2, n_head=4,
                       n_embd=32, family="llama", n_kv_head=2, n_inner=64, mlp="swiglu",
                       norm="rms", qkv_bias=False, proj_bias=False, mlp_bias=False,
                       rope_theta=10000.0)
    GPT(config).save_pretrained(args.init_from, tokenizer.eot_token)
    save_tokenizer(args.init_from, tokenizer, config.block_size)
    posts = [tinytldr.post(0, "train", i) for i in range(150)]
    summaries = [[tinytldr.demonstration(0, "train", i, person) for person in (0, 1)]
                 for i in range(len(posts))]
    write_rows(args.posts, [{"prompt": post, "completion": pair[0]}
                            for post, pair in zip(posts[:100], summaries)])
    write_rows(args.pairs, [{"prompt": post, "chosen": pair[0], "rejected": pair[1]}
                            for post, pair in zip(posts[100:], summaries[100:])
                            if pair[0] != pair[1]])


# ------ the experiment

MAY_CHANGE = {"rhos", "seeds", "methods", "jobs", "minutes", "out_dir", "results", "keep_models",
              "draw", "device", "dtype"}


def check_settings(args):
    """Raises InputError if the runs in --results have other flags. Writes down the flags."""
    path = f"{args.results}/settings.json"
    flags = {name: value for name, value in vars(args).items() if name not in MAY_CHANGE}
    if os.path.exists(path):
        for name, value in read_json(path).items():
            if flags.get(name) != value:
                raise InputError(f"--results: {args.results} was begun with --{name}={value}, not "
                                 f"{flags.get(name)}; name another folder, or remove this one and "
                                 "--out_dir")
    write_json(path, flags, indent=1)


def finished_before(args):
    """Lists the jobs whose rows are in the tables. InputError if these are of another reference."""
    rows = [row for name in ("runs", "judges")
            for row in figure2.read_rows(f"{args.results}/{name}.csv")]
    references = {row["reference"] for row in rows}
    if references - {(trials.weights(f"{args.out_dir}/sft") or "")[:8]}:
        raise InputError(f"--results: the runs in {args.results} are from another reference than "
                         f"{args.out_dir}/sft; name another folder, or remove it")
    runs = {row["run"] for row in rows}
    done = runs | {f"judges: {run.removesuffix('/rm')}" for run in runs if run.endswith("/rm")}
    done |= {"judges: oracles" for run in runs if run == "oracle"}
    for run in runs:
        if run.endswith("/sft"):
            split, number, _ = run.split("/")
            done.add(f"reference {split} {number}")
    return done


def main(argv=None):
    args = parse_flags(argv)
    if args.draw:
        return draw(args.results)
    for folder in (args.results, f"{args.out_dir}/samples", f"{args.out_dir}/judged"):
        os.makedirs(folder, exist_ok=True)
    if args.smoke:
        make_smoke(args)
    check_settings(args)
    prepare(args)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")    # what workers, forked, may not use
    jobs, start = plan(args), time.time()
    for attempts_left in reversed(range(3)):
        try:
            failed, missing = run_jobs(args, jobs, finished_before(args), start)
            break
        except BrokenProcessPool as error:
            print(f"{in_a_line(error)} Something killed it: too little memory for --jobs="
                  f"{args.jobs}? All begin again where they were.", flush=True)
            if not attempts_left:
                raise
    draw(args.results)
    for what, names in (("failed", failed), ("left to do", missing)):
        if names:
            print(f"{len(names)} {what}: {', '.join(names[:8])}{' ...' if names[8:] else ''}")
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    run_script(main)
