"""The benchmark runs, and counts what it says. No test looks at a time."""
import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import bench
from data import collate
from model import GPT, GPTConfig, tree_mask
from runtime import InputError

CONFIG = GPTConfig(block_size=64, vocab_size=50, n_layer=3, n_head=2, n_embd=16)
SMALL = ["--prompt=12", "--response=3,5", "--batch_size=2", "--steps=1", "--device=cpu"]


@pytest.fixture(autouse=True)
def micro(monkeypatch):
    monkeypatch.setitem(bench.MODELS, "tiny", dict(n_layer=2, n_head=2, n_embd=16, vocab_size=50))


@pytest.mark.parametrize("n_responses", [1, 2, 3])
def test_needed_operations(n_responses):
    """For one row, which has no padding: the matrix products that a forward pass really does, less the context's queries in
    the last layer (computed with the keys and values, and not needed), plus two products per pair of tokens in sight."""
    examples = [(list(range(9)), [[1, 2, 3], [4], [5, 6, 7, 8]][:n_responses])]
    batch, C = collate(examples), CONFIG.n_embd
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        GPT(CONFIG).response_logps(batch)
    counts = {str(operator): count for operator, count in counter.get_flop_counts()["Global"].items()}
    products = counts["aten.mm"] + counts["aten.addmm"]
    in_sight = (tree_mask(batch.branch, 0, torch.float32) == 0)[0, 0].sum(dim=1)         # (T,)
    pairs = (CONFIG.n_layer - 1) * in_sight.sum() + in_sight[batch.context:].sum()
    assert bench.needed_flops(CONFIG, examples) == products - 2 * C * C * batch.context + 4 * C * pairs


def test_all_tasks(capsys):
    bench.main(["--model=tiny", *SMALL])
    table = capsys.readouterr().out
    assert all(f"| {task} |" in table for task in bench.TASKS)


def test_json_and_sizes(capsys):
    bench.main(["--model=tiny", *SMALL, "--only=dpo", "--json", "--n_responses=4"])
    (result,), machine = json.loads(capsys.readouterr().out)
    assert 2 * (12 + 4 * 3) <= result["useful"] <= 2 * (12 + 4 * 5) and machine["dtype"] == "float32"


def test_profile(capsys):
    bench.main(["--model=tiny", *SMALL, "--only=e-dpo", "--profile"])
    out = capsys.readouterr().out
    shares = [float(line.split("|")[2].strip(" %")) for line in out.split("part of the step")[1].splitlines() if "%" in line]
    assert "aten::mm" in out and sum(shares) == pytest.approx(100, abs=1)


@pytest.mark.parametrize("flag", ["--only=ppo", "--response=5", "--response=0,4", "--response=a,b"])
def test_refuses(flag):
    with pytest.raises(InputError, match=flag.split("=")[0]):
        bench.main([flag])
