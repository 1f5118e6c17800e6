"""Scores every response of a file by reward models, and writes the scores as columns beside them.

    python runs/score.py --data=prefs.jsonl --rewards=out/rms       # -> out/scored.jsonl
    python train_policy.py --loss=e-dpo --data=out/scored.jsonl --rewards=scores

The columns: prompt, chosen, rejected, score_chosen, score_rejected; of more than two responses
prompt, responses, ranks, scores. A score is a number, or a list if there are several reward models.
"""
import json
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np

from data import Dataset, get_tokenizer
from reward import RewardModel
from support.device import setup, shape_multiple
from support.files import replacing
from support.flags import InputError, Parser, check_out_dir, device_flags, run_script, skip_flag
from support.formats import load_rows
from support.passes import score
from support.run import family_folders, run_flags
from support.tokenizer import check_vocabulary
from support.tokens import encode, fit


def parse_flags(argv):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--data", required=True, help="preferences: a file or a hub name")
    skip_flag(parser)
    add("--rewards", default="out/rms", help="reward models, or folders of families, "
        "comma-separated")
    add("--out", default="out/scored.jsonl", help="the file to write")
    device_flags(parser)
    args = parser.parse_args(argv)
    args.seed = 0
    if os.path.isdir(args.out) or not args.out.endswith(".jsonl"):
        raise InputError(f"--out: {args.out!r} is not the name of a .jsonl file")
    if os.path.realpath(args.out) == os.path.realpath(args.data):
        raise InputError("--out: it is also --data, which would be overwritten; name another file")
    check_out_dir(os.path.dirname(args.out) or ".", flag="--out")
    return args


def load(folders, device):
    """{folder: RewardModel}, and the tokenizer that all of them read."""
    names = [run_flags(folder).get("tokenizer", "gpt2") for folder in folders]
    for folder, name in zip(folders, names):
        if name != names[0]:
            raise InputError(f"--rewards: {folders[0]} reads {names[0]} tokens, {folder} {name}")
    tokenizer = get_tokenizer(names[0])
    models = {folder: RewardModel.from_pretrained(folder).to(device) for folder in folders}
    for folder, model in models.items():
        check_vocabulary(model, tokenizer, f"--rewards: {folder}")
    return models, tokenizer


def scorable(data, tokenizer, block_size, skip_bad_rows=False):
    """Rows of text whose responses can be scored, and their examples: (rows, Dataset)."""
    rows = list(load_rows(data, skip_bad_rows=skip_bad_rows))
    arrays = encode(rows, tokenizer)
    examples = fit(arrays, block_size)
    kept = [number for number, row in enumerate(rows) if examples.lengths[number, 0] > 0
            and all(text.strip() for text in row["responses"])]
    n_cut = (examples.lengths[kept, 0] < arrays["lengths"][kept, 0]).sum()
    print(f"{len(rows) - len(kept)} of {len(rows)} rows dropped (a response is blank, or alone "
          f"does not fit block_size {block_size}), {n_cut} prompts lose their start")
    if not kept:
        raise InputError(f"--data: {data}: no usable row")
    return [rows[number] for number in kept], Dataset(examples.take(kept))


def record(row, scores):
    """One line of the file. scores: for each response a number or a list."""
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
    device, autocast = setup(args)
    models, tokenizer = load(family_folders(args.rewards), device)
    block_size = min(model.config.block_size for model in models.values())
    rows, dataset = scorable(args.data, tokenizer, block_size, args.skip_bad_rows)
    rewards = np.stack([score(model, dataset, autocast, shape_multiple(args), folder)
                        for folder, model in models.items()], axis=2)           # (N, K, M)
    if len(models) == 1:
        rewards = rewards[:, :, 0]                                              # (N, K)
    os.makedirs(os.path.dirname(args.out) or ".", exist_ok=True)
    with replacing(args.out) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for row, scores in zip(rows, rewards.tolist()):
            file.write(json.dumps(record(row, scores), ensure_ascii=False) + "\n")
    print(f"{args.out}: {len(rows)} rows with the scores of {len(models)} reward models")


if __name__ == "__main__":
    run_script(main)
