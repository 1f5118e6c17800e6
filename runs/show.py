"""Shows what training sees of a file: a batch in colour, lengths in tokens, what was dropped.

    python runs/show.py --data=prefs.jsonl                      # the prompt plain, chosen, rejected
    python runs/show.py --data=demos.jsonl --sft                # as --loss=sft reads it
"""
import os
import sys
from itertools import groupby

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np

from data import Dataset, get_tokenizer, longer
from support.flags import Parser, positive_int, run_script
from support.tokens import random_order, select, tokenised_file

PLAIN, *COLOURS = [f"\033[{code}m" for code in (0, 32, 31, 34, 35)]     # green, red, blue, purple


def parse_flags(argv):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--data", required=True, help="a JSONL, JSON, CSV or Parquet file, a folder of such files, "
        "or a name on the Hugging Face hub")
    add("--sft", action="store_true", help="read demonstrations (prompt, completion), as "
        "--loss=sft does")
    parser.add_shared("skip_bad_rows")
    add("--tokenizer", default="gpt2", help="tinytldr, a name that tiktoken knows, or the folder "
        "of a model that has its own, whose chat template then renders messages (default: gpt2)")
    add("--block_size", type=positive_int, default=1024, help="longest prompt + response, in "
        "tokens (default: 1024)")
    args = parser.parse_args(argv)
    return args


def show_batch(batch, tokenizer):
    """Prints a TreeBatch as the model sees it: prompts plain, each response in a colour, padding as
    dots."""
    rows = zip(batch.tokens.tolist(), batch.branch.tolist(), batch.lengths.tolist())
    for tokens, branch, lengths in rows:
        start = 0
        for role, part in groupby(branch):      # 0: the prompt; k: response k; -1: padding
            end = start + len(list(part))
            text = tokenizer.decode(tokens[start:end]) if role >= 0 else "·" * (end - start)
            colour = COLOURS[(role - 1) % len(COLOURS)] if role > 0 else PLAIN
            print(colour + text, end="")
            start = end
        print(f"{PLAIN}\n[{branch.count(0)} prompt tokens, {' + '.join(map(str, lengths))} "
              "response tokens]\n")
    branch = batch.branch
    print(f"tokens {tuple(branch.shape)}: {(branch == 0).sum()} prompt, {(branch > 0).sum()} "
          f"response, {(branch < 0).sum()} padding")


def show_lengths(dataset):
    """Prints how long prompts and responses are, and how often the longer one is preferred."""
    lengths = dataset.response_lengths()                                        # (N, K)
    K = lengths.shape[1]
    names = {1: ["response"], 2: ["chosen", "rejected"]}
    columns = {"prompt": dataset.row_lengths() - lengths.sum(axis=1)}
    columns |= zip(names.get(K, [f"rank {k + 1}" for k in range(K)]), lengths.T)
    for name, values in columns.items():
        low, median, high, most = np.percentile(values, [10, 50, 90, 99])
        print(f"{name:9} tokens: 10th percentile {low:.0f}, median {median:.0f}, 90th {high:.0f}, "
              f"99th {most:.0f}, longest {values.max()}")
    if K == 2:
        sides = longer(lengths)
        chosen, rejected, neither = [(sides == side).sum() for side in (1, -1, 0)]
        print(f"longer response (by at least 10%) chosen in {chosen} pairs, rejected in "
              f"{rejected}, neither longer in {neither}: of the unequal ones the longer is "
              f"preferred in {chosen / max(1, chosen + rejected):.0%}")


def main(argv=None):
    args = parse_flags(argv)
    tokenizer = get_tokenizer(args.tokenizer)
    arrays = tokenised_file(args.data, tokenizer, args.sft, args.skip_bad_rows)
    dataset = Dataset(**select(arrays, args.block_size, args.data, unpaired=True))
    show_batch(dataset.batch(random_order(len(dataset))[:4]), tokenizer)
    scores = ""
    if dataset.rewards is not None:
        scores = f", {dataset.rewards.shape[2]} score(s) for each response"
    print(f"{len(arrays['hash'])} rows read, {len(dataset)} used{scores}")
    show_lengths(dataset)


if __name__ == "__main__":
    run_script(main)
