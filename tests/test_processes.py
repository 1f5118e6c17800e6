"""Several processes compute what a single one does (torchrun on the CPU, gloo)."""
import json
import os
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from support import processes

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SCRIPT = """
import sys
sys.path.insert(0, {root!r})
import train_policy, train_rm
shared = ["--data={data}", "--tokenizer=tinytldr", "--max_steps=20", "--eval_every=10",
          "--batch_size=7", "--micro_batch_size=3", "--n_eval=13", "--device=cpu"]
train_policy.main([*shared, "--loss=sft", "--out_dir={out}/sft", "--n_layer=1", "--n_head=2",
                   "--n_embd=16", "--block_size=48", "--lr=1e-3"])
start = [*shared, "--init_from={out}/sft"]
train_rm.main([*start, "--out_dir={out}/rm"])
train_policy.main([*start, "--loss=e-dpo", "--rewards=scores", "--max_new_tokens=8",
                   "--select={out}/rm", "--out_dir={out}/e-dpo"])
"""


def write_pairs(path):
    """Preferences between words, some long and some short, with rewards of two models."""
    draw = random.Random(0)
    words = ["my boss", "broke", "sad", "loud music", "move out?", "tell others?", "my cat"]
    with open(path, "w", encoding="utf-8") as file:
        for i in range(120):
            chosen, rejected = ("; ".join(draw.choices(words, k=draw.randint(1, 4)))
                                for _ in range(2))
            record = {"prompt": f"POST: {' '.join(draw.choices(words, k=3))} {i}",
                      "chosen": chosen, "rejected": rejected + " no"}
            for side in ("chosen", "rejected"):
                record[f"score_{side}"] = [draw.gauss(0, 1), draw.gauss(0, 1)]
            file.write(json.dumps(record) + "\n")


def run(n, tmp_path):
    out = tmp_path / str(n)
    script = tmp_path / f"{n}.py"
    script.write_text(SCRIPT.format(root=ROOT, data=tmp_path / "pairs.jsonl", out=out))
    command = [sys.executable]
    if n > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"]
    environment = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "datasets")}
    done = subprocess.run([*command, str(script)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return out, done.stdout


def test_two_processes_compute_what_a_single_one_does(tmp_path, hub_cache):
    """SFT, a reward model and e-DPO, 20 steps of 7 rows in micro-batches of 3, so that the shares
    are unequal: what is logged and the weights are equal to 1e-5, and each line is printed once."""
    write_pairs(tmp_path / "pairs.jsonl")
    (alone, printed), (shared, printed_by_two) = (run(n, tmp_path) for n in (1, 2))
    for name in ("sft", "rm", "e-dpo"):
        lines = [[json.loads(line) for line in (folder / name / "metrics.jsonl").open()]
                 for folder in (alone, shared)]
        assert len(lines[0]) == len(lines[1]) == 5
        for of_alone, of_shared in zip(*lines):
            if of_alone["step"] == 0:   # margins are rounding errors; accuracy counts their signs
                of_alone = {k: v for k, v in of_alone.items() if not k.endswith("accuracy")}
                of_shared = {k: v for k, v in of_shared.items() if not k.endswith("accuracy")}
            assert of_shared == pytest.approx(of_alone, rel=1e-5, abs=1e-5), name
        weights = load_file(shared / name / "model.safetensors")
        for key, tensor in load_file(alone / name / "model.safetensors").items():
            torch.testing.assert_close(weights[key], tensor, rtol=0, atol=1e-5)
    assert printed.count("step    20") == printed_by_two.count("step    20") == 3


def test_without_torchrun_there_is_a_single_process():
    rows = np.arange(5)
    assert processes.processes() == 1 and processes.is_first()
    assert [part.tolist() for part in processes.micro_batches(rows, 2)] == [[0, 1], [2, 3], [4]]
    assert processes.add_up(rows) is rows
    assert processes.in_shares(range, [2, 3]) == [0, 1, 0, 1, 2]


def test_shares_are_every_nth_row(monkeypatch):
    monkeypatch.setattr(processes, "processes", lambda: 2)
    shares = []
    for number in (0, 1):
        monkeypatch.setattr(processes, "rank", lambda: number)
        shares.append([part.tolist() for part in processes.micro_batches(np.arange(5), 2)])
    assert shares == [[[0, 2], [4]], [[1, 3]]]
