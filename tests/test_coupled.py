"""Losses in which pairs depend on each other (losses.COUPLED): the numbers of a run are those of
whole batches, however many rows a forward pass has."""
import json

import numpy as np
import pytest
import torch

import train_policy
import zoo
from losses import COUPLED, knobs, loss_function, needs
from train_policy import WholeBatch

FLAGS = ["--max_steps=4", "--batch_size=8", "--n_eval=13", "--lr=3e-3", "--eval_every=2"]


@pytest.fixture
def rows(tmp_path):
    """Writes a file of pairs, or of single responses with a label. Returns the flag."""
    def write(unpaired):
        path = tmp_path / f"{unpaired}.jsonl"
        with open(path, "w") as file:
            for i in range(120):
                texts = [" my cat is sad", " no. 7"][::1 if i % 3 else -1]
                row = {"prompt": f"POST {i}: the job" + " and cat" * (i % 7)}
                row |= ({"completion": texts[0], "label": i % 3 > 0} if unpaired else
                        {"chosen": texts[0], "rejected": texts[1] + " boss" * (i % 4)})
                file.write(json.dumps(row) + "\n")
        return f"--data={path}"
    return write


@pytest.mark.parametrize("loss, unpaired", [("kto", True), ("kto", False), ("bco", False),
                                            ("aot", False), ("aot-unpaired", False)])
def test_a_step_is_that_of_the_whole_batch(world, tmp_path, rows, loss, unpaired):
    lines = []
    for size in (8, 3):
        train_policy.main([f"--loss={loss}", rows(unpaired), f"--init_from={world}/sft", *FLAGS,
                           f"--micro_batch_size={size}", f"--out_dir={tmp_path}/{size}"])
        text = (tmp_path / f"{size}/metrics.jsonl").read_text()
        lines.append(list(map(json.loads, text.splitlines())))
    for whole, parts in zip(*lines, strict=True):
        numbers = [{name: value for name, value in line.items() if not name.endswith("accuracy")}
                   for line in (whole, parts)]      # of margins that are 0 but for rounding
        assert numbers[0] == pytest.approx(numbers[1], rel=1e-4, abs=1e-4)
    assert abs(lines[0][-1]["train/loss"] - lines[0][0]["train/loss"]) > 1e-3


def test_the_gradient_of_each_part_is_its_share():
    """Of a loss that multiplies what all rows have, so that a part needs the others' log-probs."""
    whole = object.__new__(WholeBatch)
    whole.rows, whole.logps = np.array([5, 2, 9]), torch.tensor([[1.0, 2], [3, 4], [5, 6]])
    logps = whole.logps.clone().requires_grad_()
    logps.prod().backward()
    wanted, total = logps.grad, torch.zeros(3, 2)
    for part, places in (([5, 9], [0, 2]), ([2], [1])):
        own = whole.logps[places].clone().requires_grad_()
        whole.with_part(np.array(part), own).prod().backward()
        total[places] += own.grad
    torch.testing.assert_close(total, wanted)


@pytest.mark.parametrize("name", zoo.all_losses())
def test_the_table_names_all_of_them(name):
    """A loss is coupled if it gives a pair by itself another number than in a batch."""
    torch.manual_seed(0)
    logps = -5 - torch.rand(4, 2, dtype=torch.float64)
    columns = {"logps": logps, "ref_logps": logps - torch.rand(4, 2), "kl": torch.ones(4),
               "rewards": torch.randn(4, 2, 2), "lengths": torch.tensor([[3, 5]] * 4)}
    columns = {need: columns[need] for need in needs(name)}
    flags = {"gamma": 0.1} if "gamma" in knobs(name) else {}
    together = loss_function(name)(**columns, **flags)
    alone = [loss_function(name)(**{need: column[i:i + 1] for need, column in columns.items()},
                                 **flags) for i in range(4)]
    assert (name in COUPLED) != torch.allclose(together, torch.cat(alone))
