"""Lists the sets of the course: functions for students to write, and the points of each function.

runs/assignment.py makes the copies, runs/grade.py gives the points, and docs/assignments.md
explains the sets. Each set builds on those before it.
"""

SETS = {
    "pairs": {
        "losses.log_ratio_margin": 4,
        "losses.dpo": 3,
        "losses.ipo": 3,
    },
    "distillation": {
        "losses.d_dpo": 3,
        "losses.forward_kl": 3,
        "losses.e_dpo": 5,
        "losses.best_member": 2,
    },
    "bias": {
        "data.longer": 2,
        "data.relabel": 3,
        "data.biased_subset": 5,
        "data.batches": 5,
    },
    "reward": {
        "data.ranked_pairs": 3,
        "losses.bradley_terry": 3,
        "reward.RewardModel.forward": 4,
    },
    "tree": {
        "model.Attention.forward": 5,
        "model.tree_mask": 5,
        "data.collate": 10,
        "model.GPT.response_logps": 5,
    },
    "generation": {
        "model.likely": 4,
        "model.draw": 3,
        "model.GPT._generate_batch": 10,
    },
    "training": {
        "train_policy.learning_rate": 3,
        "train_policy.loss_flags": 3,
        "train_policy.statistics": 4,
        "evaluate.interval": 3,
    },
}
