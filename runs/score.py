"""Scores every response of a file by reward models, and writes the scores as new columns.

    python runs/score.py --data=prefs.jsonl --rewards=out/rms       # -> out/scored.jsonl
    python train_policy.py --loss=e-dpo --data=out/scored.jsonl --rewards=scores --out_dir=out/mine

The columns are prompt, chosen, rejected, score_chosen and score_rejected, or for more than two
responses prompt, responses, ranks and scores. A score is a number, or a list if there are several
reward models.
"""
import json
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np

from data import Dataset, get_tokenizer
from reward import read_reward_models
from support.columns import print_cut_off, score
from support.device import setup
from support.flags import (
    InputError,
    Parser,
    check_out_dir,
    positive_int,
    resolve,
    run_script,
)
from support.rows import load_rows, row_texts
from support.run import family_folders, naming_file, replacing
from support.tokenizer import check_same_tokenizer, check_vocabulary, own_tokenizer
from support.tokens import encode, fit, preparer


def parse_flags(argv):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--data", required=True, help="preferences: a file, a folder or a hub name")
    parser.add_shared("skip_bad_rows")
    add("--rewards", default="out/rms", help="the reward models that score: folders of single ones "
        "or of families, separated by commas (default: out/rms)")
    add("--out", default="out/scored.jsonl", help="the file to write (default: out/scored.jsonl)")
    add("--max_new_tokens", type=positive_int, help="if the responses are samples: how many tokens "
        "(of the reward models) they could have. Those with as many were cut off, and are counted")
    parser.add_shared("missing_eos_penalty", "device", "dtype")
    args = parser.parse_args(argv)
    args.seed = 0
    resolve(args, {"missing_eos_penalty": (args.max_new_tokens is not None, None,
                                           "--max_new_tokens, which says what was cut off")})
    if os.path.isdir(args.out) or not args.out.endswith(".jsonl"):
        raise InputError(f"--out: {args.out!r} is not the name of a .jsonl file")
    if os.path.realpath(args.out) == os.path.realpath(args.data):
        raise InputError("--out: it is also --data, which would be overwritten; name another file")
    check_out_dir(os.path.dirname(args.out) or ".", flag="--out")
    return args


def load(folders, device):
    """Reads reward models. Returns {folder: RewardModel} and the tokenizer that all of them read.
    """
    tokenizer = get_tokenizer(own_tokenizer(folders[0]))
    for folder in folders:
        check_same_tokenizer(f"--rewards: {folder}", folder, tokenizer)
    models = read_reward_models(folders, device)
    for folder, model in models.items():
        check_vocabulary(model, tokenizer, f"--rewards: {folder}")
    return models, tokenizer


def scorable(data, tokenizer, block_size, skip_bad_rows=False):
    """Reads the rows whose responses can be scored. Returns (rows of text, Dataset)."""
    rows = list(load_rows(data, skip_bad_rows=skip_bad_rows, prepare=preparer(tokenizer)))
    arrays = encode(rows, tokenizer)
    if "desirable" in arrays:
        raise InputError(f"--data: {data}: single responses with a label; scores compare responses")
    examples = fit(arrays, block_size)
    kept = [number for number, row in enumerate(rows) if examples.lengths[number, 0] > 0
            and all(text.strip() for text in row_texts(row)[1])]
    n_cut = (examples.lengths[kept, 0] < arrays["lengths"][kept, 0]).sum()
    print(f"{len(rows) - len(kept)} of {len(rows)} rows dropped (a response is blank, or alone "
          f"does not fit block_size {block_size}), {n_cut} prompts lose their start")
    if not kept:
        raise InputError(f"--data: {data}: no usable row")
    return [rows[number] for number in kept], Dataset(examples.take(kept))


def cut_off(dataset, args):
    """Finds responses that were cut off when they were sampled: text has no end-of-text token to
    tell, so these are the ones that fill --max_new_tokens without it. Says how many there are.
    Returns (N, K) bool."""
    cut = dataset.response_lengths() - 1 >= args.max_new_tokens
    penalty = args.missing_eos_penalty or 0
    then = "judged with one appended"
    then += f", minus --missing_eos_penalty={penalty:g}" if penalty else ""
    print_cut_off(args.data, cut.size, args.max_new_tokens, int(cut.sum()), 0, then)
    return cut


def record(row, scores):
    """Makes one line of the file. scores: for each response a number or a list."""
    responses = row["responses"]
    if len(responses) == 2:
        columns = dict(zip(("chosen", "rejected", "score_chosen", "score_rejected"),
                           (*responses, *scores)))
    else:                           # the order stays what it was, whatever the scores say
        ranks = list(range(1, len(responses) + 1))
        columns = {"responses": responses, "ranks": ranks, "scores": scores}
    return {"prompt": row["prompt"], **columns}


def main(argv=None):
    args = parse_flags(argv)
    device = setup(args)
    models, tokenizer = load(family_folders(args.rewards), device)
    block_size = min(model.config.block_size for model in models.values())
    rows, dataset = scorable(args.data, tokenizer, block_size, args.skip_bad_rows)
    rewards = np.stack([score(model, dataset, folder)
                        for folder, model in models.items()], axis=2)           # (N, K, M)
    if args.max_new_tokens:
        cut = cut_off(dataset, args)                                            # (N, K)
        rewards = rewards - (args.missing_eos_penalty or 0) * cut[:, :, None]
    if len(models) == 1:
        rewards = rewards[:, :, 0]                                              # (N, K)
    with naming_file(args.out):
        os.makedirs(os.path.dirname(args.out) or ".", exist_ok=True)
    with replacing(args.out) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for row, scores in zip(rows, rewards.tolist()):
            file.write(json.dumps(record(row, scores), ensure_ascii=False) + "\n")
    print(f"{args.out}: {len(rows)} rows with the scores of {len(models)} reward models, each "
          "response read with the end-of-text token after it")


if __name__ == "__main__":
    run_script(main)
