"""Explicit reward models: the transformer with a one-number head, families of them, and scoring.

A reward model reads one number at each response's last token, in the same tree batch that the policy uses. It is known
only up to a constant per prompt: Bradley-Terry sees differences, and so does everything downstream.

    python reward.py --score --data=prefs.jsonl --rewards=out/rms     # -> out/scored.jsonl: the same rows, with scores
"""
import argparse
import json
import os

import numpy as np
import torch
import torch.nn as nn

import runtime
from data import encode, fitted, get_tokenizer
from formats import load_rows
from model import Transformer, gpt_config, init_weights, load_tensors, read_checkpoint, write_checkpoint
from runtime import InputError


class RewardModel(nn.Module):
    """r(x, y). Laid out as Hugging Face's GPT2ForSequenceClassification with one label."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = Transformer(config)
        self.score = nn.Linear(config.n_embd, 1, bias=False)
        init_weights(self, config)
        nn.init.zeros_(self.score.weight)       # all rewards start at 0, so the first Bradley-Terry loss is ln 2

    def forward(self, batch):
        """TreeBatch -> rewards (B, K) float32."""
        hidden = self.transformer.tree(batch)                                      # (B, T - context, C)
        rows = torch.arange(hidden.size(0), device=hidden.device).unsqueeze(1)     # (B, 1)
        with torch.autocast(hidden.device.type, enabled=False):                    # bfloat16 rewards would tie
            return self.score(hidden[rows, batch.last]).squeeze(2).float()         # (B, K, C) -> (B, K)

    @classmethod
    def from_policy(cls, gpt):
        """A reward model whose transformer starts from a language model's; its head starts at zero."""
        model = cls(gpt.config)
        model.transformer.load_state_dict(gpt.transformer.state_dict())
        return model

    @classmethod
    def from_pretrained(cls, dir_or_hub_name):
        config, tensors = read_checkpoint(dir_or_hub_name)
        if "score.weight" not in tensors:
            raise InputError(f"{dir_or_hub_name}: this is a language model, not a reward model (no 'score.weight')")
        model = cls(gpt_config(config, dir_or_hub_name))
        tensors.pop("lm_head.weight", None)
        load_tensors(model, tensors, dir_or_hub_name)
        return model

    def save_pretrained(self, directory, eos_token_id=None):
        # transformers reads the reward at the last token that is not pad_token_id, which so can't be the end-of-text token
        write_checkpoint(directory, self.state_dict(), self.config, eos_token_id, architectures=["GPT2ForSequenceClassification"],
                         id2label={"0": "reward"}, label2id={"reward": 0}, pad_token_id=0)


def family_folders(folders, flag="--rewards"):
    """The reward models that `--rewards=A,B` means: each folder is one (it holds a config.json) or has one in each of
    its subfolders. Returns the list of folders, in the order given and by name within a family."""
    found = []
    for folder in folders.split(","):
        if os.path.exists(os.path.join(folder, "config.json")):
            found.append(folder)
            continue
        members = sorted(entry.path for entry in os.scandir(folder) if os.path.exists(os.path.join(entry.path, "config.json"))
                         ) if os.path.isdir(folder) else []
        if not members or not folder:
            raise InputError(f"{flag}: no reward model in {folder!r}: train one with python train_rm.py --out_dir={folder}")
        found += members
    return found


def load_reward_model(folder, flag, policy, tokenizer, device):
    """The reward model in a run folder, if it reads the same tokens as the policy; InputError names the flag if not."""
    model, theirs = RewardModel.from_pretrained(folder), runtime.run_flags(folder).get("tokenizer", tokenizer)
    if theirs != tokenizer:
        raise InputError(f"{flag}: {folder} reads {theirs} tokens, the policy {tokenizer} tokens")
    for name in ("vocab_size", "block_size"):
        if getattr(model.config, name) < getattr(policy.config, name):
            raise InputError(f"{flag}: {folder} has {name} {getattr(model.config, name)}, the policy "
                             f"{getattr(policy.config, name)}")
    return model.to(device)


def family_scores(models, dataset, dtype, autocast, name, K=None):
    """Every reward model's scores of the first K responses of each row (default: all), cached next to the model. models:
    {folder: RewardModel}. Returns (N, K, M) float32."""
    ranked = [(prompt, responses[:K]) for prompt, responses in dataset.examples]
    scores = []
    for folder, model in models.items():
        key = runtime.key(runtime.hash_weights(model), runtime.hash_examples(ranked), dtype)
        scores.append(runtime.cached(os.path.join(folder, "cache"), f"{name}-rewards", key, lambda: runtime.score(
            model, ranked, autocast, desc=f"{name} rewards").tolist()))
    return np.array(scores, np.float32).transpose(1, 2, 0)      # (M, N, K) -> (N, K, M)


def main(argv=None):
    parser = runtime.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--score", action="store_true", required=True, help="score every response of --data (there is nothing else)")
    parser.add_argument("--data", required=True, help="preferences: a file or a hub name")
    parser.add_argument("--rewards", default="out/rms", help="reward models, or folders of families, comma-separated")
    parser.add_argument("--out", default="out/scored.jsonl", help="the file to write: prompt, chosen, rejected, score_chosen, "
                        "score_rejected (or prompt, responses, ranks, scores); scores are lists if there are several reward models")
    runtime.device_flags(parser)
    args = parser.parse_args(argv)
    args.seed = 0
    if os.path.isdir(args.out) or not args.out.endswith(".jsonl"):
        raise InputError(f"--out: {args.out!r} is not the name of a .jsonl file")
    runtime.check_out_dir(os.path.dirname(args.out) or ".", "--out")
    device, autocast = runtime.setup(args)
    folders = family_folders(args.rewards)
    models = [RewardModel.from_pretrained(folder).to(device) for folder in folders]
    names = [runtime.run_flags(folder).get("tokenizer", "gpt2") for folder in folders]
    if len(set(names)) > 1:
        raise InputError(f"--rewards: {folders[0]} reads {names[0]} tokens, and another of them {(set(names) - {names[0]}).pop()} tokens")
    tokenizer, block_size = get_tokenizer(names[0]), min(model.config.block_size for model in models)
    for folder, model in zip(folders, models):
        if model.config.vocab_size < tokenizer.n_vocab:
            raise InputError(f"--rewards: {folder} knows {model.config.vocab_size} tokens, and {names[0]} has {tokenizer.n_vocab}")

    rows = list(load_rows(args.data))
    try:
        arrays = encode(rows, tokenizer)
    except ValueError as error:
        raise InputError(f"--data: {args.data}: {error}") from error
    kept = [(number, (prompt, responses)) for number, prompt, responses in fitted(arrays, block_size, np.arange(len(rows)))
            if prompt is not None and all(text.strip() for text in rows[number]["responses"])]
    if not kept:
        raise InputError(f"--data: {args.data}: no row fits block_size {block_size}")
    scores = np.stack([runtime.score(model, [example for _, example in kept], autocast, desc=folder)
                       for folder, model in zip(folders, models)], axis=2)                                      # (N, K, M)
    os.makedirs(os.path.dirname(args.out) or ".", exist_ok=True)
    with open(args.out + ".tmp", "w", encoding="utf-8") as file:
        for (number, _), row_scores in zip(kept, scores.tolist()):
            row, values = rows[number], [s if len(models) > 1 else s[0] for s in row_scores]
            if len(values) == 2:
                record = dict(zip(("chosen", "rejected", "score_chosen", "score_rejected"), row["responses"] + values))
            else:      # the order stays what it was, whatever the scores say
                record = {"responses": row["responses"], "ranks": list(range(1, len(values) + 1)), "scores": values}
            file.write(json.dumps({"prompt": row["prompt"]} | record, ensure_ascii=False) + "\n")
    os.replace(args.out + ".tmp", args.out)
    print(f"{args.out}: {len(kept)} rows with the scores of {len(models)} reward models; {len(rows) - len(kept)} dropped (a response is "
          f"blank, or alone does not fit block_size {block_size})")


if __name__ == "__main__":
    runtime.run(main)
