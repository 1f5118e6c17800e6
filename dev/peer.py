"""Makes TRL's trainers read our rows of token ids. tests/plumbing/test_parity.py compares with
them, and dev/bench_trl.py races against them."""
import tokenizers
import torch
import transformers
import trl

# These make TRL's trainers quiet, and give them the same work: no truncation, no checkpoints.
SETTINGS = dict(report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no", max_length=None,
                remove_unused_columns=False)
BEST = dict(bf16=False, gradient_checkpointing=False)        # on a CPU


class PreparedDPOTrainer(trl.DPOTrainer):
    """Trains on rows that are token ids already (RewardTrainer takes these anyway), in the order of
    the rows."""

    def _prepare_dataset(self, dataset, *_):
        return dataset

    def _get_train_sampler(self, *_):
        return torch.utils.data.SequentialSampler(self.train_dataset)


class PreparedRewardTrainer(trl.RewardTrainer):
    def _get_train_sampler(self, *_):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def peer_tokenizer(vocab_size):
    """Makes a tokenizer, which TRL's trainers need. They only ask it for its padding token."""
    words = {str(i): i for i in range(vocab_size - 1)} | {"<end>": vocab_size - 1}
    model = tokenizers.models.WordLevel(words, "0")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(model),
                                                eos_token="<end>", pad_token="0")


def features(examples):
    """Converts our examples, [(prompt ids, [chosen ids, rejected ids])], to the columns of TRL's
    DPOTrainer."""
    rows = []
    for prompt, (chosen, rejected) in examples:
        parts = {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
        rows.append({name: [int(token) for token in tokens] for name, tokens in parts.items()})
    return rows


def reward_features(examples):
    """Converts our examples to the columns of TRL's RewardTrainer, which reads whole sequences."""
    return [{"chosen_ids": row["prompt_ids"] + row["chosen_ids"],
             "rejected_ids": row["prompt_ids"] + row["rejected_ids"]}
            for row in features(examples)]
