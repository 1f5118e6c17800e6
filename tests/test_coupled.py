"""Losses in which pairs depend on each other (losses.COUPLED): they get whole batches only."""
import pytest
import torch

import train_policy
from losses import COUPLED, EVERY_LOSS, knobs, needs
from support.flags import InputError


@pytest.mark.parametrize("name", sorted(EVERY_LOSS))
def test_the_table_names_all_of_them(name):
    """A loss is coupled if it gives a pair by itself another number than in a batch."""
    torch.manual_seed(0)
    logps = -5 - torch.rand(4, 2, dtype=torch.float64)
    columns = {"logps": logps, "ref_logps": logps - torch.rand(4, 2), "kl": torch.ones(4),
               "rewards": torch.randn(4, 2, 2), "lengths": torch.tensor([[3, 5]] * 4)}
    columns = {need: columns[need] for need in needs(name)}
    flags = {"gamma": 0.1} if "gamma" in knobs(name) else {}
    together = EVERY_LOSS[name](**columns, **flags)
    alone = [EVERY_LOSS[name](**{need: column[i:i + 1] for need, column in columns.items()},
                                 **flags) for i in range(4)]
    assert (name in COUPLED) != torch.allclose(together, torch.cat(alone))


@pytest.mark.parametrize("loss", sorted(COUPLED))
def test_a_part_of_a_batch_is_refused(world, loss):
    """A flag for memory, or the number of processes, would change what is trained."""
    flags = [f"--loss={loss}", f"--init_from={world}/sft", "--batch_size=8"]
    assert train_policy.parse_flags([*flags, "--micro_batch_size=8"]).micro_batch_size == 8
    with pytest.raises(InputError, match="all in one forward pass"):
        train_policy.parse_flags([*flags, "--micro_batch_size=4"])
