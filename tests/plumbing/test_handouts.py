"""The numbers in the answers of runs/handouts/, computed by the code that they are about."""
from pathlib import Path

import numpy as np
import pytest
import torch

import losses
from data import biased_subset, collate, longer, ranked_pairs
from model import draw, tree_mask
from support.flags import InputError
from train_policy import learning_rate

FOLDER = Path(__file__).parents[2] / "runs" / "handouts"


def says(name, *phrases):
    """Does the text of a set say this? Line breaks don't matter."""
    text = " ".join((FOLDER / f"{name}.md").read_text(encoding="utf-8").split())
    for phrase in phrases:
        assert phrase in text, phrase


def test_pairs():
    logps, ref_logps = torch.tensor([[-12.0, -10.0]]), torch.tensor([[-14.0, -9.0]])
    assert losses.log_ratio_margin(logps, ref_logps).item() == 3
    loss = losses.dpo(logps, ref_logps, 0.5).item()
    assert losses.dpo(logps, logps).item() == pytest.approx(0.693, abs=5e-4)
    assert losses.ipo(logps, logps, 0.1).item() == pytest.approx(25)
    assert torch.equal(losses.dpo(logps + 5, ref_logps), losses.dpo(logps, ref_logps))
    says("pairs", "so h = 3", f"= {loss:.3f}", "log 2 = 0.693", "(1 / 0.2)^2 = 25")


def test_distillation():
    """The gradient of each loss at h = 2; the minimum inside and outside of the mean."""
    logps = torch.tensor([[2.0, 0.0]], requires_grad=True)
    rewards = torch.tensor([[[1.0, 4.0, 7.0], [0.0, 0.0, 0.0]]])
    values, slopes = [], []
    for loss in (losses.ensemble_distill, losses.d_dpo):
        value = loss(logps, torch.zeros(1, 2), rewards, beta=1.0)
        values.append(value.item())
        slopes.append(torch.autograd.grad(value.sum(), logps)[0][0, 0].item())
    assert values == [1, 4] and slopes == [2, -4]
    says("distillation", "so the loss is 1", "2 (h - 1) = 2", "its loss is 4", "2 (h - 4) = -4")

    gaps = torch.tensor([[1.0, 3.0], [5.0, 2.0]])           # (pairs, models A and B)
    squares = (gaps - torch.tensor([[1.0], [2.0]])) ** 2
    assert squares.min(dim=1).values.mean() == 0 and squares.mean(dim=0).tolist() == [4.5, 2]
    says("distillation", "(0 + 9) / 2 = 4.5", "(4 + 0) / 2 = 2, so the minimum is 2")


def test_training():
    rates = {step: learning_rate(step, 320, 2e-4) for step in (0, 15, 16, 168, 319)}
    assert rates == pytest.approx({0: 1.25e-5, 15: 2e-4, 16: 2e-4, 168: 1e-4, 319: 5.34e-9},
                                  rel=1e-3)
    assert 1.96 * 3.4 / 1000 ** 0.5 == pytest.approx(0.21, abs=5e-3)
    says("training", "1.25e-5", "so 1e-4", "near 5e-9", "half-way: 0.00505", "= 0.21, so ± 0.21")


def test_bias():
    assert longer([(11, 10), (21, 20), (10, 11), (10, 10)]).tolist() == [1, 0, -1, 0]
    assert 55 < 1.1 * 50            # the hint on floating point
    assert longer([(55, 50)]).tolist() == [1]
    lengths = np.array([(20, 10)] * 60 + [(10, 20)] * 40)
    for rho, n in ((0.2, 50), (0.8, 75)):
        assert len(biased_subset(lengths, rho)) == n
        with pytest.raises(InputError):
            biased_subset(lengths, rho, n + 1)
    says("bias", "40 / 0.8 = 50 pairs", "60 / 0.8 = 75 pairs")


def test_reward():
    for n, pairs in ((2, 1), (4, 6), (8, 28)):
        assert ranked_pairs([n])[2].tolist() == pytest.approx([1 / pairs] * pairs)
    says("reward", "Six pairs with a weight of 1/6 each", "28 votes")


def test_tree():
    batch = collate([([7, 7], [[1, 2], [3]])])
    assert batch.branch.tolist() == [[0, 0, 1, 1, 2]]
    assert batch.position.tolist() == [[0, 1, 2, 3, 2]] and batch.predictor.tolist() == [1, 2, 1]
    seen = (tree_mask(batch.branch, torch.float32)[0, 0] == 0).int().tolist()
    rows = ", ".join("".join(map(str, row)) for row in seen)
    says("tree", "Branch 0 0 1 1 2, position 0 1 2 3 2", "2, 3, 4: 1, 2, 1", rows,
         f"160^2 = {160 ** 2:,}, against 3 x 120^2 = {3 * 120 ** 2:,}",
         f"301^2 = {301 ** 2:,} against 3 x 101^2 = {3 * 101 ** 2:,}")


def test_generation():
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
    number = torch.tensor([[0.6]], dtype=torch.float64)
    assert draw(logits, 1, number).item() == 1 and draw(logits, 1, number, top_p=0.7).item() == 0
    without = sum(100 + t for t in range(64))
    says("generation", "163 in all", f"= {without:,}: {without / 163:.0f} times",
         f"{12 * 2 * 768 * 4:,} bytes", "65,536 of them take 4.8 GB")
    assert 65_536 * 12 * 2 * 768 * 4 == pytest.approx(4.8e9, rel=0.01)
